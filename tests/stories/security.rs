//! Who may come in: certificates, tokens, refusals that say why, and clients that mean harm.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use peapod_proto::secure::{Access, AccessArgs, refusal};
use peapod_proto::v1::control_client::ControlClient;
use peapod_proto::v1::from_worker::Message;
use peapod_proto::v1::membership_client::MembershipClient;
use peapod_proto::{PROGRAM_VERSION, PROTOCOL_VERSION, v1};
use peapod_tests::harness::{Cluster, Coordinator, Process, Signal};
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use tonic::Code;

const TOKEN: &str = "a-token-that-was-agreed-on";

/// An authority that issues certificates for this machine.
struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
}

impl Authority {
    fn new() -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, "an authority");
        let key = KeyPair::generate().unwrap();
        let pem = params.self_signed(&key).unwrap().pem();
        Self { issuer: Issuer::new(params, key), pem }
    }

    /// Writes a certificate and its key beside the job; returns their paths.
    fn issue(&self, cluster: &Cluster, name: &str, last_year: i32) -> [String; 2] {
        let mut params = CertificateParams::new(["localhost".to_owned(), "127.0.0.1".to_owned()]).unwrap();
        params.not_before = rcgen::date_time_ymd(2000, 1, 1);
        params.not_after = rcgen::date_time_ymd(last_year, 1, 1);
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        [file(cluster, &format!("{name}.pem"), &certificate.pem()), file(cluster, &format!("{name}.key"), &key.serialize_pem())]
    }
}

fn file(cluster: &Cluster, name: &str, text: &str) -> String {
    let path = cluster.folder().join(name);
    std::fs::write(&path, text).unwrap();
    path.to_str().unwrap().to_owned()
}

fn join_string(coordinator: &Coordinator) -> String {
    let line = coordinator.wait_for("worker --join STRING  (the string is in ");
    let path = line.split_once("is in ").unwrap().1.trim_end_matches(')');
    std::fs::read_to_string(path).unwrap().trim().to_owned()
}

fn token_of(join: &str) -> &str {
    join.strip_prefix("peapod://").unwrap().split_once('@').unwrap().0
}

/// Starts a worker that knows nothing but these arguments.
fn worker(arguments: &[&str]) -> Process {
    Process::start(&format!("worker {}", arguments.join(" ")), "worker", &[&["--threads", "1"], arguments].concat())
}

#[test]
fn join_string_is_all_that_a_worker_and_the_commands_need() {
    let cluster = Cluster::new();
    let mut coordinator = cluster.coordinator(1, &["--tls"]);
    let join = join_string(&coordinator);
    let state_dir = cluster.state_dir();
    let mut status = Process::start("status", "coordinator", &["status", "--state-dir", state_dir.to_str().unwrap()]);
    status.expect_exit(0);
    status.assert_said("waiting for rank 0");
    let mut elsewhere = Process::start("status", "coordinator", &["status", "--join", &join]);
    elsewhere.expect_exit(0);
    let mut worker = worker(&["--join", &join]);
    coordinator.expect_exit(0);
    worker.expect_exit(0);
    assert_eq!(cluster.newest_checkpoint().step, 4);

    // No terminal shows it to a person here, so that nobody collects it.
    let lines = [coordinator.lines(), worker.lines(), status.lines()].concat();
    let with_token: Vec<&String> = lines.iter().filter(|line| line.contains(token_of(&join))).collect();
    assert!(with_token.is_empty(), "{with_token:?}");
    for secret in ["identity.pem", "token", "join"] {
        use std::os::unix::fs::PermissionsExt;
        let mode = std::fs::metadata(state_dir.join(secret)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{secret}");
    }
}

#[test]
fn workers_of_a_local_world_join_by_tls_too() {
    let cluster = Cluster::new();
    let mut coordinator = cluster.coordinator(2, &["--local", "--tls"]);
    coordinator.expect_exit(0);
    coordinator.assert_said("listening on https://127.0.0.1:");
    assert_eq!(cluster.newest_checkpoint().step, 4);
}

#[test]
fn beyond_this_machine_a_worker_needs_the_join_string() {
    let cluster = Cluster::new();
    let mut coordinator = cluster.coordinator(1, &["--listen", "0.0.0.0:0"]);
    let join = join_string(&coordinator);
    let port = coordinator.url().rsplit_once(':').unwrap().1.to_owned();
    let mut plain = worker(&["--coordinator", &format!("http://127.0.0.1:{port}")]);
    plain.expect_exit(2);
    plain.assert_said("this port speaks TLS only");
    // The name in the string need not be one that this machine can look up.
    let mut worker = worker(&["--join", &join, "--coordinator", &format!("https://127.0.0.1:{port}")]);
    coordinator.expect_exit(0);
    worker.expect_exit(0);
}

#[test]
fn own_certificates_work_and_each_refusal_says_which() {
    let cluster = Cluster::new();
    let (authority, stranger) = (Authority::new(), Authority::new());
    let [certificate, key] = authority.issue(&cluster, "coordinator", 2999);
    let token = file(&cluster, "token", TOKEN);
    let (ca, wrong_ca) = (file(&cluster, "ca.pem", &authority.pem), file(&cluster, "stranger.pem", &stranger.pem));
    let wrong_token = file(&cluster, "wrong", "another-token-altogether");
    let mut coordinator = cluster.coordinator(1, &["--tls-cert", &certificate, "--tls-key", &key, "--token-file", &token]);
    let url = coordinator.url();
    let plain_url = url.replace("https", "http");
    let join = std::fs::read_to_string(cluster.state_dir().join("join")).unwrap();
    let other_pin = format!("{}{}", &join.trim()[..join.trim().len() - 8], "00000000");

    let started = Instant::now();
    for (arguments, words) in [
        (&["--coordinator", &url, "--tls-ca", &wrong_ca, "--token-file", &token][..], "not issued by the authority in --tls-ca"),
        (&["--coordinator", &url, "--tls-ca", &ca, "--token-file", &wrong_token], "wrong token"),
        (&["--coordinator", &url, "--tls-ca", &ca], "--token-file"),
        (&["--coordinator", &url], "needs --join STRING, or --tls-ca FILE and --token-file FILE"),
        (&["--coordinator", &plain_url], "this port speaks TLS only"),
        (&["--coordinator", &plain_url, "--tls-ca", &ca, "--token-file", &token], "without encryption"),
        (&["--join", &other_pin], "its certificate is not the one in the join string"),
        (&["--join", "peapod://half"], "copy the whole line"),
    ] {
        let mut refused = worker(arguments);
        refused.expect_exit(2);
        refused.assert_said(words);
        assert!(refused.lines().iter().all(|line| !line.contains("peapod://half")), "what may hold a token is not repeated");
    }
    assert!(started.elapsed() < Duration::from_secs(30), "a refusal is not tried again");
    for words in ["wrong token", "does not take this coordinator's certificate", "speaks without TLS"] {
        let said = coordinator.wait_for(words);
        assert!(said.contains("refused 127.0.0.1:"), "{said}");
    }

    // Without a token nothing is answered, not even to commands.
    let access = Access::new(Some(&url), &AccessArgs { tls_ca: Some(PathBuf::from(&ca)), ..AccessArgs::default() }).unwrap();
    let status = runtime().block_on(async {
        let link = access.connect(&access.endpoint().unwrap()).await.unwrap();
        ControlClient::new(link).stop(v1::StopRequest { reason: "by a stranger".into() }).await.unwrap_err()
    });
    assert_eq!(status.code(), Code::Unauthenticated);
    assert!(refusal(&status).unwrap().contains("no token"), "{status}");

    let mut worker = worker(&["--coordinator", &url, "--tls-ca", &ca, "--token-file", &token]);
    coordinator.expect_exit(0);
    worker.expect_exit(0);
    let lines = [coordinator.lines(), worker.lines()].concat();
    assert!(lines.iter().all(|line| !line.contains(TOKEN)), "the user's own token is printed nowhere");
}

#[test]
fn expired_certificate_is_named() {
    let cluster = Cluster::new();
    let authority = Authority::new();
    let [certificate, key] = authority.issue(&cluster, "old", 2001);
    let (token, ca) = (file(&cluster, "token", TOKEN), file(&cluster, "ca.pem", &authority.pem));
    let mut coordinator = cluster.coordinator(1, &["--tls-cert", &certificate, "--tls-key", &key, "--token-file", &token]);
    let mut refused = worker(&["--coordinator", &coordinator.url(), "--tls-ca", &ca, "--token-file", &token]);
    refused.expect_exit(2);
    refused.assert_said("its certificate has expired");
    coordinator.signal(Signal::INT);
    coordinator.expect_exit(130);
}

#[test]
fn mutual_tls_lets_in_who_shows_a_certificate() {
    let cluster = Cluster::new();
    let (authority, stranger) = (Authority::new(), Authority::new());
    let [certificate, key] = authority.issue(&cluster, "coordinator", 2999);
    let [own, own_key] = authority.issue(&cluster, "worker", 2999);
    let [strange, strange_key] = stranger.issue(&cluster, "stranger", 2999);
    let (token, ca) = (file(&cluster, "token", TOKEN), file(&cluster, "ca.pem", &authority.pem));
    let mut coordinator =
        cluster.coordinator(1, &["--tls-cert", &certificate, "--tls-key", &key, "--tls-client-ca", &ca, "--token-file", &token]);
    let url = coordinator.url();
    let with = ["--coordinator", &url, "--tls-ca", &ca, "--token-file", &token];
    for (more, words) in [
        (&[][..], "asks for a certificate: give --tls-cert and --tls-key"),
        (&["--tls-cert", &strange, "--tls-key", &strange_key], "does not take the certificate of --tls-cert"),
    ] {
        let mut refused = worker(&[&with[..], more].concat());
        refused.expect_exit(2);
        refused.assert_said(words);
    }
    coordinator.wait_for("it shows no certificate");
    let mut worker = worker(&[&with[..], &["--tls-cert", &own, "--tls-key", &own_key]].concat());
    coordinator.expect_exit(0);
    worker.expect_exit(0);
}

#[test]
fn join_string_against_a_coordinator_without_tls_is_explained() {
    let cluster = Cluster::new();
    let mut plain = cluster.coordinator(1, &[]);
    let authority = plain.url().replace("http://", "");
    let join = format!("peapod://{TOKEN}@{authority}/{}", "0".repeat(64));
    let mut refused = worker(&["--join", &join]);
    refused.expect_exit(2);
    refused.assert_said("it speaks without TLS");
    plain.wait_for("it speaks TLS, and this coordinator listens without");
    plain.signal(Signal::INT);
    plain.expect_exit(130);
}

/// Passes bytes on and keeps them.
struct Wiretap {
    address: SocketAddr,
    heard: Arc<Mutex<Vec<u8>>>,
}

impl Wiretap {
    fn before(target: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let (address, heard, target) = (listener.local_addr().unwrap(), Arc::default(), target.to_owned());
        let ear = Arc::clone(&heard);
        std::thread::spawn(move || {
            for caller in listener.incoming() {
                let (Ok(caller), Ok(called)) = (caller, TcpStream::connect(&target)) else { return };
                let (from, to) = (caller.try_clone().unwrap(), called.try_clone().unwrap());
                for (from, to) in [(from, to), (called, caller)] {
                    let ear = Arc::clone(&ear);
                    std::thread::spawn(move || listen(from, to, &ear));
                }
            }
        });
        Self { address, heard }
    }

    fn heard(&self, text: &str) -> bool {
        let heard = self.heard.lock().unwrap_or_else(PoisonError::into_inner);
        heard.windows(text.len()).any(|window| window == text.as_bytes())
    }
}

fn listen(mut from: TcpStream, mut to: TcpStream, ear: &Mutex<Vec<u8>>) {
    let mut buffer = [0; 16 * 1024];
    while let Ok(count @ 1..) = from.read(&mut buffer) {
        ear.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(&buffer[..count]);
        if to.write_all(&buffer[..count]).is_err() {
            return;
        }
    }
    let _ = to.shutdown(std::net::Shutdown::Write);
}

#[test]
fn nothing_can_be_read_on_the_wire_behind_tls() {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap().trim().to_owned();
    // What the job file, the worker's hello and the transport say in so many words.
    let words = ["[train]", "global_batch", "adapter.safetensors", "PRI * HTTP/2.0", PROGRAM_VERSION, &host];
    for is_secret in [false, true] {
        let cluster = Cluster::new();
        let mut coordinator = cluster.coordinator(1, if is_secret { &["--tls"] } else { &[] });
        let url = coordinator.url();
        let tap = Wiretap::before(url.split_once("://").unwrap().1);
        let through = url.split_once("://").unwrap().0.to_owned() + &format!("://{}", tap.address);
        let join = is_secret.then(|| join_string(&coordinator));
        let mut arguments = vec!["--coordinator", &through];
        if let Some(join) = &join {
            arguments.extend(["--join", join]);
        }
        let mut worker = worker(&arguments);
        coordinator.expect_exit(0);
        worker.expect_exit(0);
        // Short words may come up by chance among so many bytes.
        for word in words.iter().filter(|word| word.len() >= 6) {
            assert_eq!(tap.heard(word), !is_secret, "{word:?}, with TLS: {is_secret}");
        }
        if let Some(join) = &join {
            assert!(!tap.heard(token_of(join)));
        }
    }
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap()
}

fn hello(incarnation: u64, host: String) -> Message {
    Message::Hello(v1::Hello {
        protocol_version: PROTOCOL_VERSION,
        program_version: PROGRAM_VERSION.into(),
        incarnation,
        attempt: 0,
        requested_rank: None,
        host,
        pid: 1,
        device: "cpu".into(),
    })
}

type Client = MembershipClient<tonic::transport::Channel>;

/// Says these things on a stream of its own, and hears how it ends.
async fn say(client: &Client, messages: Vec<Message>) -> tonic::Status {
    let messages: Vec<v1::FromWorker> = messages.into_iter().map(|message| v1::FromWorker { message: Some(message) }).collect();
    let mut replies = match client.clone().join(tonic::codegen::tokio_stream::iter(messages)).await {
        Ok(replies) => replies.into_inner(),
        Err(status) => return status,
    };
    loop {
        match replies.message().await {
            Ok(Some(_)) => {}
            Ok(None) => return tonic::Status::ok("ended in order"),
            Err(status) => return status,
        }
    }
}

#[test]
fn clients_that_mean_harm_get_errors_and_the_job_goes_on() {
    let mut cluster = Cluster::new();
    cluster.job.set("train.steps", 40);
    let mut coordinator = cluster.coordinator(1, &[]);
    coordinator.allow_error(" lost at step ");
    let mut honest = coordinator.worker_of_rank(0);
    coordinator.wait_for_step(1);
    let url = coordinator.url();
    let address = url.split_once("://").unwrap().1;

    // Bytes that are no HTTP/2, and frames that are none.
    for start in [&b""[..], b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", &[0x16, 3, 1]] {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        let noise: Vec<u8> = start.iter().copied().chain((0..20_000_u32).map(|at| (at.wrapping_mul(2_654_435_761) >> 13) as u8)).collect();
        // The other end may have hung up before all of it was sent, as it should.
        let _ = stream.write_all(&noise);
        let mut answer = Vec::new();
        let _ = stream.take(1 << 20).read_to_end(&mut answer);
        assert!(answer.len() < 1000, "noise costs little: {} bytes", answer.len());
    }

    runtime().block_on(async {
        let channel = tonic::transport::Endpoint::from_shared(url.clone()).unwrap().connect().await.unwrap();
        let client = MembershipClient::new(channel);
        for (messages, code, words) in [
            (vec![hello(1, "x".repeat(1 << 20))], Code::ResourceExhausted, "first message of a stream"),
            (vec![Message::Heartbeat(v1::Heartbeat::default())], Code::InvalidArgument, "malformed message"),
            (vec![Message::Leaving(v1::Leaving::default())], Code::InvalidArgument, "the first message of a stream is a hello"),
            (vec![], Code::InvalidArgument, "ended before its hello"),
        ] {
            let status = say(&client, messages).await;
            assert!(status.code() == code && status.message().contains(words), "{status}");
        }
        // Members of nothing that speak for the first generation, with names of samples that are not theirs.
        let generation = 1;
        let record = v1::StepRecord {
            step: 2,
            generation,
            names: vec![v1::SampleName { epoch: 0, shard: 0, index: 0 }],
            losses: Some(v1::StepLosses::default()),
            ..v1::StepRecord::default()
        };
        let report = v1::StepReport { generation, step: 2, record: Some(record.clone()), ..v1::StepReport::default() };
        let stopped = v1::Stopped { generation, applied_step: u64::MAX, cause: 1, records: vec![record], ..v1::Stopped::default() };
        let lies = [
            Message::StepReport(report),
            Message::Stopped(stopped),
            Message::LeaseRequest(v1::LeaseRequest { generation, num_leases: u32::MAX, is_idle: true }),
            Message::Bootstrap(v1::Bootstrap { generation, bytes: vec![1; 1000] }),
            Message::ShardReport(v1::ShardReport { lease_id: 1, num_samples: Some(0), ..v1::ShardReport::default() }),
            Message::GaveBack(v1::GaveBack { lease_id: 1, from: 0 }),
            Message::Continuing(v1::Continuing { generation, applied_step: u64::MAX, records: vec![] }),
        ];
        for (number, lie) in (0..).zip(lies) {
            say(&client, vec![hello(100 + number, "liar".into()), lie]).await;
        }
        // Joins upon joins.
        for number in 0..200 {
            say(&client, vec![hello(1000 + number, "flood".into())]).await;
        }
        let giant = v1::WorkerFailure { phase: "x".repeat(2 << 20), permanent: true, ..v1::WorkerFailure::default() };
        let status = say(&client, vec![hello(5000, "giant".into()), Message::Failure(giant)]).await;
        assert!(status.message().contains("a failure of "), "{status}");
    });

    // Connections that say nothing; the honest worker has its place already.
    let idle: Vec<TcpStream> = (0..200).map(|_| TcpStream::connect(address).unwrap()).collect();
    coordinator.wait_for_step(5);
    drop(idle);

    coordinator.expect_exit(0);
    honest.expect_exit(0);
    assert_eq!(cluster.newest_checkpoint().step, 40);
}
