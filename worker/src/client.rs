//! Calls to the coordinator, each with its deadline.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket};
use std::time::Duration;

use futures::StreamExt;
use peapod_proto::ids::{Generation, Step};
use peapod_proto::message::{FromWorker, ToWorker};
use peapod_proto::secure::{Access, AccessError, Link, failure, innermost, refusal};
use peapod_proto::trace::Trace;
use peapod_proto::{JOB_IS_OVER, MAX_MESSAGE_BYTES, RETRY_FOR_MS, v1, work_span};
use sha2::{Digest, Sha256};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Endpoint;
use tonic::{Code, Streaming};

/// Messages that may wait to be sent.
const OUTBOUND_CAPACITY: usize = 1024;
/// One attempt to connect.
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(5);
/// From the first byte of an attempt to the coordinator's answer. It answers at once, whoever else is awaited: what takes longer is lost.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(15);
/// Between attempts: the first wait, doubled up to the longest.
const FIRST_WAIT: Duration = Duration::from_millis(100);
const LONGEST_WAIT: Duration = Duration::from_secs(2);
/// The longest wait of a worker that a coordinator knows: it waits for it no longer than its heartbeat timeout after it was started again.
const LONGEST_WAIT_OF_A_MEMBER: Duration = Duration::from_millis(400);
/// Between two lines about a coordinator that does not answer, unless there is news.
const SAY_EVERY: Duration = Duration::from_secs(60);
/// Silence of a transfer's connection after which it is probed; and for how long an answer to that may be missing, which on a slow line
/// comes after all that was sent before. (A membership stream is probed by its heartbeats.)
const KEEPALIVE: Duration = Duration::from_secs(3);
const KEEPALIVE_ANSWER: Duration = Duration::from_secs(20);
/// One picture.
const PICTURE_TIMEOUT: Duration = Duration::from_secs(60);
/// A whole checkpoint on its way to the coordinator's store. One that takes longer is older than the next.
const UPLOAD_TIMEOUT: Duration = Duration::from_secs(600);
/// Silence in the middle of a checkpoint that is being fetched.
const DOWNLOAD_SILENCE: Duration = Duration::from_secs(60);
/// What failed, where a download did.
const NOT_RECEIVED: &str = "checkpoint not received";
/// Bytes in one message of an upload.
const CHUNK: usize = 1 << 20;

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The address is not one.
    #[error("{0}")]
    Address(String),
    /// Nobody answers.
    #[error("no coordinator answers at {address} (tried for {:.0} s): is it running, and is the address right? Last error: {last}", tried_for.as_secs_f64())]
    Unreachable {
        /// The address.
        address: String,
        /// How long it was tried.
        tried_for: Duration,
        /// The last attempt's error.
        last: String,
    },
    /// The job has ended as it should, without this worker.
    #[error("{0}")]
    Over(String),
    /// The coordinator refuses this worker for good.
    #[error("{message}")]
    Refused {
        /// Its words.
        message: String,
        /// Whether the arguments are to blame.
        bad_arguments: bool,
    },
    /// A transfer failed.
    #[error("{what}: {message}")]
    Transfer {
        /// The transfer.
        what: &'static str,
        /// What went wrong.
        message: String,
    },
}

/// An open membership stream.
pub struct Stream {
    /// For messages up; dropping it ends the stream in order.
    pub outbound: mpsc::Sender<FromWorker>,
    /// Messages down.
    pub inbound: Streaming<v1::ToWorker>,
    /// This host's address on the way to the coordinator.
    pub local_ip: Option<IpAddr>,
    /// What happens while it lasts.
    pub trace: Trace,
}

/// Opens a membership stream, trying for `patience`; more often where `returning`.
///
/// # Errors
/// [`ClientError::Unreachable`] after that time; [`ClientError::Refused`] and [`ClientError::Over`] at once.
pub async fn join(access: &Access, hello: FromWorker, patience: Duration, returning: bool) -> Result<Stream, ClientError> {
    search(access, hello, patience, returning, ANSWER_TIMEOUT).await
}

async fn search(
    access: &Access,
    hello: FromWorker,
    patience: Duration,
    returning: bool,
    answer_timeout: Duration,
) -> Result<Stream, ClientError> {
    let endpoint = endpoint(access).map_err(ClientError::Address)?;
    let started = std::time::Instant::now();
    let mut wait = FIRST_WAIT;
    let mut taken_since = None;
    let mut said: Option<(String, std::time::Instant)> = None;
    let longest = if returning { LONGEST_WAIT_OF_A_MEMBER } else { LONGEST_WAIT };
    loop {
        let answer = tokio::time::timeout(answer_timeout, attempt(access, &endpoint, hello.clone())).await;
        let no_answer = || Err(Attempt::Failed(format!("no answer within {} s", answer_timeout.as_secs_f64())));
        let last = match answer.unwrap_or_else(|_| no_answer()) {
            Ok(stream) => return Ok(stream),
            Err(Attempt::Over(message)) => return Err(ClientError::Over(message)),
            Err(Attempt::Refused { message, bad_arguments }) => return Err(ClientError::Refused { message, bad_arguments }),
            // Whoever had the rank may have died a moment ago, and this worker be the one in its place; unless it is the one that was
            // replaced.
            Err(Attempt::Taken { message, retry_for }) => {
                let since = *taken_since.get_or_insert_with(|| {
                    tracing::info!("{message}; trying for {:.0} s, as it may have died unnoticed", retry_for.as_secs_f64());
                    std::time::Instant::now()
                });
                if returning || since.elapsed() > retry_for + LONGEST_WAIT_OF_A_MEMBER {
                    return Err(ClientError::Refused { message, bad_arguments: true });
                }
                tokio::time::sleep(LONGEST_WAIT_OF_A_MEMBER.mul_f64(jitter())).await;
                continue;
            }
            Err(Attempt::Failed(last)) => last,
        };
        if started.elapsed() + wait > patience {
            return Err(ClientError::Unreachable { address: access.url().into(), tried_for: started.elapsed(), last });
        }
        // Minutes of silence look like a program that hangs.
        if said.as_ref().is_none_or(|(known, at)| *known != last || at.elapsed() >= SAY_EVERY) {
            let left = Duration::from_secs(patience.saturating_sub(started.elapsed()).as_secs_f64().ceil() as u64);
            let until = if returning { "to come back" } else { "to be started" };
            let url = access.url();
            tracing::info!(
                "no coordinator answers at {url} yet ({last}): waiting for it {until}, another {}",
                humantime::format_duration(left)
            );
            said = Some((last, std::time::Instant::now()));
        }
        tokio::time::sleep(wait.mul_f64(jitter())).await;
        wait = (wait * 2).min(longest);
    }
}

/// The coordinator's address, with the time that an attempt may take.
fn endpoint(access: &Access) -> Result<Endpoint, String> {
    Ok(access.endpoint()?.connect_timeout(ATTEMPT_TIMEOUT))
}

enum Attempt {
    Over(String),
    Refused { message: String, bad_arguments: bool },
    Taken { message: String, retry_for: Duration },
    Failed(String),
}

async fn attempt(access: &Access, endpoint: &Endpoint, hello: FromWorker) -> Result<Stream, Attempt> {
    let (channel, local_ip) = access.connect_from(endpoint).await.map_err(|error| match error {
        AccessError::Refused(message) => Attempt::Refused { message, bad_arguments: true },
        AccessError::Failed(last) => Attempt::Failed(last),
    })?;
    let (outbound, messages) = mpsc::channel(OUTBOUND_CAPACITY);
    // The channel has room: nothing is in it yet.
    let _ = outbound.try_send(hello);
    let messages = ReceiverStream::new(messages).map(v1::FromWorker::from);
    let trace = Trace::begin(work_span!("session", rank = tracing::field::Empty));
    let mut client = v1::membership_client::MembershipClient::new(channel).max_decoding_message_size(MAX_MESSAGE_BYTES);
    let status = match client.join(trace.request(messages)).await {
        Ok(reply) => return Ok(Stream { outbound, inbound: reply.into_inner(), local_ip, trace }),
        Err(status) => status,
    };
    if let Some(message) = refusal(&status) {
        return Err(Attempt::Refused { message, bad_arguments: true });
    }
    if status.metadata().contains_key(JOB_IS_OVER) {
        return Err(Attempt::Over(status.message().into()));
    }
    let retry_for = status.metadata().get(RETRY_FOR_MS).and_then(|value| value.to_str().ok()?.parse().ok()).map(Duration::from_millis);
    Err(match (status.code(), retry_for) {
        (Code::AlreadyExists, Some(retry_for)) => Attempt::Taken { message: status.message().into(), retry_for },
        (Code::InvalidArgument | Code::AlreadyExists, _) => Attempt::Refused { message: status.message().into(), bad_arguments: true },
        (Code::FailedPrecondition | Code::Unimplemented, _) => Attempt::Refused { message: status.message().into(), bad_arguments: false },
        _ => Attempt::Failed(failure(&status)),
    })
}

/// A factor within 0.5..1.5, so that workers that lost the same coordinator do not all come back at once.
fn jitter() -> f64 {
    let mut byte = [0; 1];
    // Without randomness there is no jitter; nothing depends on it.
    let _ = getrandom::fill(&mut byte);
    0.5 + f64::from(byte[0]) / 256.0
}

/// The address under which the other workers reach this one, if it is connected to the coordinator at `url` from `local`.
///
/// Where the coordinator is called by a name, workers of other hosts may come by it; on the coordinator's own host that name often leads to
/// the loopback, where they do not reach anybody: there it is the address of the route to everywhere else.
#[must_use]
pub fn address_for_others(url: &str, local: IpAddr) -> IpAddr {
    let host = url.parse::<tonic::codegen::http::Uri>().ok().and_then(|uri| Some(uri.host()?.trim_matches(['[', ']']).to_owned()));
    let is_name = host.is_some_and(|host| host.parse::<IpAddr>().is_err() && host != "localhost");
    if !local.is_loopback() || !is_name {
        return local;
    }
    // Networks of documentation, that nobody is in. Connecting a datagram socket sends nothing; it only chooses a route.
    let elsewhere: [(IpAddr, IpAddr); 2] = [
        (Ipv4Addr::UNSPECIFIED.into(), Ipv4Addr::new(192, 0, 2, 1).into()),
        (Ipv6Addr::UNSPECIFIED.into(), Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1).into()),
    ];
    let on_the_way = |(any, there): (IpAddr, IpAddr)| {
        let socket = UdpSocket::bind((any, 0)).ok()?;
        socket.connect((there, 9)).ok()?;
        Some(socket.local_addr().ok()?.ip()).filter(|ip| !ip.is_loopback() && !ip.is_unspecified())
    };
    elsewhere.into_iter().find_map(on_the_way).unwrap_or(local)
}

/// The next message of a stream, checked.
///
/// # Errors
/// Why the stream is over.
pub async fn next(inbound: &mut Streaming<v1::ToWorker>) -> Result<ToWorker, String> {
    match inbound.message().await {
        Ok(Some(message)) => ToWorker::try_from(message).map_err(|error| error.to_string()),
        Ok(None) => Err("it closed the connection".into()),
        Err(status) => Err(if status.message().is_empty() { innermost(&status) } else { status.message().into() }),
    }
}

/// Opens a connection for one transfer, which ends with it. What the coordinator has not read of a transfer fills its connection's window:
/// on the one of the membership stream, heartbeats would wait behind it, and the worker be taken for dead.
async fn connect_apart(access: &Access) -> Result<Link, String> {
    let endpoint = endpoint(access)?;
    let endpoint = endpoint.http2_keep_alive_interval(KEEPALIVE).keep_alive_timeout(KEEPALIVE_ANSWER).keep_alive_while_idle(true);
    let started = std::time::Instant::now();
    let mut wait = FIRST_WAIT;
    loop {
        let last = match access.connect(&endpoint).await {
            Ok(link) => return Ok(link),
            Err(AccessError::Refused(message)) => return Err(message),
            Err(AccessError::Failed(last)) => last,
        };
        if started.elapsed() + wait > ANSWER_TIMEOUT {
            return Err(format!("no connection to {} within {} s ({last})", access.url(), ANSWER_TIMEOUT.as_secs()));
        }
        tokio::time::sleep(wait.mul_f64(jitter())).await;
        wait = (wait * 2).min(LONGEST_WAIT);
    }
}

/// Sends something on a connection of its own; `what` is said where it has not arrived within `limit`.
async fn transfer<T>(
    access: &Access,
    what: &'static str,
    limit: Duration,
    send: impl AsyncFnOnce(Link) -> Result<tonic::Response<T>, tonic::Status>,
) -> Result<T, ClientError> {
    let sending = async {
        let reply = send(connect_apart(access).await?).await;
        reply.map(tonic::Response::into_inner).map_err(|status| status.message().to_owned())
    };
    let reply = tokio::time::timeout(limit, sending).await.unwrap_or_else(|_| Err(format!("not done within {} s", limit.as_secs())));
    reply.map_err(|message| ClientError::Transfer { what, message })
}

/// A checkpoint's files, and what an upload says of them before it sends them.
pub struct Parts {
    header: Vec<v1::CheckpointPart>,
    files: Vec<Vec<u8>>,
}

impl Parts {
    /// Hashes the files, which may take as long as to write them: nothing for a thread that others wait for.
    #[must_use]
    pub fn new(files: Vec<(&'static str, Vec<u8>)>) -> Self {
        let part = |(name, bytes): &(&'static str, Vec<u8>)| v1::CheckpointPart {
            name: (*name).into(),
            num_bytes: bytes.len() as u64,
            sha256: Sha256::digest(bytes).to_vec(),
        };
        Self { header: files.iter().map(part).collect(), files: files.into_iter().map(|(_, bytes)| bytes).collect() }
    }

    /// The messages of an upload. No more of them is in memory than is being sent, and no file that is sent.
    fn messages(self, generation: Generation, step: Step) -> impl Iterator<Item = v1::UploadMessage> {
        use v1::upload_message::Message;
        let header = v1::CheckpointHeader { generation: generation.0, step: step.0, parts: self.header };
        let chunks = self.files.into_iter().flat_map(|file| {
            let num = file.len().div_ceil(CHUNK);
            (0..num).map(move |at| Message::Chunk(file[at * CHUNK..file.len().min((at + 1) * CHUNK)].to_vec()))
        });
        std::iter::once(Message::Header(header)).chain(chunks).map(|message| v1::UploadMessage { message: Some(message) })
    }
}

/// Sends a checkpoint's files on a connection of their own, as the work of `trace`.
///
/// # Errors
/// [`ClientError::Transfer`] with the coordinator's words, or when it takes more than ten minutes.
pub async fn upload(access: &Access, trace: &Trace, generation: Generation, step: Step, parts: Parts) -> Result<String, ClientError> {
    let messages = futures::stream::iter(parts.messages(generation, step));
    let send = async |link| v1::checkpoints_client::CheckpointsClient::new(link).upload(trace.request(messages)).await;
    Ok(transfer(access, "checkpoint not stored", UPLOAD_TIMEOUT, send).await?.location)
}

/// Sends a picture on a connection of its own, as the work of `trace`; returns where it is kept.
///
/// # Errors
/// [`ClientError::Transfer`] with the coordinator's words, or when it does not answer in a minute.
pub async fn send_picture(
    access: &Access,
    trace: &Trace,
    generation: Generation,
    step: Step,
    index: u32,
    png: Vec<u8>,
) -> Result<String, ClientError> {
    let picture = v1::KeepPicture { generation: generation.0, step: step.0, index, png };
    let send = async |link| v1::pictures_client::PicturesClient::new(link).keep(trace.request(picture)).await;
    Ok(transfer(access, "not stored", PICTURE_TIMEOUT, send).await?.location)
}

/// Fetches a checkpoint's files on a connection of their own, as the work of `trace`, and checks each against its SHA-256. `moved` hears of
/// each piece.
///
/// # Errors
/// [`ClientError::Transfer`] for what may go well another time, [`ClientError::Refused`] for what will not.
pub async fn download(access: &Access, trace: &Trace, step: Step, moved: impl Fn()) -> Result<Vec<(String, Vec<u8>)>, ClientError> {
    use v1::download_message::Message;
    let failed = |message: String| ClientError::Transfer { what: NOT_RECEIVED, message };
    let request = v1::DownloadRequest { step: step.0 };
    let mut client = v1::checkpoints_client::CheckpointsClient::new(connect_apart(access).await.map_err(failed)?);
    let mut messages = in_time(client.download(trace.request(request))).await?.into_inner();
    let mut next = async || {
        let message = in_time(messages.message()).await?;
        moved();
        Ok::<_, ClientError>(message.and_then(|message| message.message))
    };
    let header = match next().await? {
        Some(Message::Header(header)) => header,
        _ => return Err(failed("it does not begin with its header".into())),
    };
    let mut files: Vec<(String, Vec<u8>)> = Vec::new();
    let mut rest: Vec<u8> = Vec::new();
    for part in header.parts {
        while (rest.len() as u64) < part.num_bytes {
            match next().await? {
                Some(Message::Chunk(chunk)) => rest.extend(chunk),
                _ => return Err(failed(format!("it ended in the middle of {}", part.name))),
            }
        }
        // The loop above has made sure that this fits in memory: it is there.
        let after = rest.split_off(part.num_bytes as usize);
        let bytes = std::mem::replace(&mut rest, after);
        if Sha256::digest(&bytes).as_slice() != part.sha256 {
            return Err(failed(format!("{} does not have its SHA-256", part.name)));
        }
        files.push((part.name, bytes));
    }
    Ok(files)
}

/// What a download says next, or why it says nothing.
async fn in_time<T>(answer: impl Future<Output = Result<T, tonic::Status>>) -> Result<T, ClientError> {
    let failed = |message: String| ClientError::Transfer { what: NOT_RECEIVED, message };
    let answer = tokio::time::timeout(DOWNLOAD_SILENCE, answer).await;
    let answer = answer.map_err(|_| failed(format!("nothing came for {} s", DOWNLOAD_SILENCE.as_secs())))?;
    answer.map_err(|status| match status.code() {
        Code::NotFound | Code::DataLoss | Code::Unauthenticated => {
            ClientError::Refused { message: format!("{NOT_RECEIVED}: {}", status.message()), bad_arguments: false }
        }
        _ => failed(if status.message().is_empty() { innermost(&status) } else { status.message().into() }),
    })
}

#[cfg(test)]
mod tests {
    use futures::stream::BoxStream;
    use peapod_proto::ids::{Incarnation, WorkerId};
    use peapod_proto::message::{Heartbeat, Hello, Memory, Phase};
    use peapod_proto::secure::AccessArgs;
    use tonic::{Request, Response, Status};

    use super::*;

    /// A coordinator that is alive on the wire, and never answers.
    struct Mute;

    #[tonic::async_trait]
    impl v1::membership_server::Membership for Mute {
        type JoinStream = BoxStream<'static, Result<v1::ToWorker, Status>>;

        async fn join(&self, _: Request<Streaming<v1::FromWorker>>) -> Result<Response<Self::JoinStream>, Status> {
            futures::future::pending().await
        }
    }

    /// One that reads its workers' streams, and of a transfer nothing: its store hangs.
    struct Hung {
        /// What came on a stream.
        heard: mpsc::UnboundedSender<v1::FromWorker>,
        /// Calls of transfers.
        transfers: mpsc::UnboundedSender<&'static str>,
    }

    #[tonic::async_trait]
    impl v1::membership_server::Membership for Hung {
        type JoinStream = BoxStream<'static, Result<v1::ToWorker, Status>>;

        async fn join(&self, request: Request<Streaming<v1::FromWorker>>) -> Result<Response<Self::JoinStream>, Status> {
            let (mut inbound, heard) = (request.into_inner(), self.heard.clone());
            tokio::spawn(
                async move { while inbound.message().await.is_ok_and(|message| message.is_some_and(|it| heard.send(it).is_ok())) {} },
            );
            Ok(Response::new(futures::stream::pending().boxed()))
        }
    }

    #[tonic::async_trait]
    impl v1::checkpoints_server::Checkpoints for Hung {
        type DownloadStream = BoxStream<'static, Result<v1::DownloadMessage, Status>>;

        async fn upload(&self, unread: Request<Streaming<v1::UploadMessage>>) -> Result<Response<v1::UploadReceipt>, Status> {
            let _ = self.transfers.send("upload");
            let _unread = unread;
            futures::future::pending().await
        }

        async fn download(&self, _: Request<v1::DownloadRequest>) -> Result<Response<Self::DownloadStream>, Status> {
            Err(Status::unimplemented("it keeps nothing"))
        }
    }

    /// Serves a router on a free port; the server ends with the runtime.
    async fn serve(router: tonic::transport::server::Router) -> Access {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener);
        tokio::spawn(router.serve_with_incoming(incoming));
        Access::new(Some(&url), &AccessArgs::default()).unwrap()
    }

    fn hello() -> FromWorker {
        FromWorker::Hello(Hello {
            protocol_version: 1,
            program_version: "1.0.0".into(),
            incarnation: Incarnation(1),
            attempt: 0,
            requested_rank: None,
            host: "host".into(),
            pid: 1,
            device: "cpu".into(),
        })
    }

    #[tokio::test]
    async fn coordinator_that_never_answers_is_given_up() {
        let server = v1::membership_server::MembershipServer::new(Mute);
        let access = serve(tonic::transport::Server::builder().add_service(server)).await;
        let answer = search(&access, hello(), Duration::ZERO, false, Duration::from_millis(50)).await;
        let Err(ClientError::Unreachable { last, .. }) = answer else { panic!("joined a coordinator that says nothing") };
        assert_eq!(last, "no answer within 0.05 s");
    }

    /// A coordinator whose job file has a long list of shards.
    struct Wordy;

    #[tonic::async_trait]
    impl v1::membership_server::Membership for Wordy {
        type JoinStream = BoxStream<'static, Result<v1::ToWorker, Status>>;

        async fn join(&self, _: Request<Streaming<v1::FromWorker>>) -> Result<Response<Self::JoinStream>, Status> {
            let welcome = ToWorker::Welcome {
                worker: WorkerId(1),
                rank: peapod_proto::ids::Rank(0),
                world_size: 1,
                job_id: "job".into(),
                job_toml: "x".repeat(6 << 20),
                heartbeat_interval_ms: 500,
                heartbeat_timeout_ms: 3000,
                join_timeout_ms: 60_000,
                continues: Generation::NONE,
            };
            Ok(Response::new(futures::stream::iter([Ok(v1::ToWorker::from(welcome))]).boxed()))
        }
    }

    #[tokio::test]
    async fn job_file_of_megabytes_arrives() {
        let access = serve(tonic::transport::Server::builder().add_service(v1::membership_server::MembershipServer::new(Wordy))).await;
        let mut stream = join(&access, hello(), Duration::from_secs(5), false).await.unwrap();
        assert_eq!(stream.local_ip, Some(Ipv4Addr::LOCALHOST.into()));
        let said = next(&mut stream.inbound).await;
        assert!(matches!(&said, Ok(ToWorker::Welcome { job_toml, .. }) if job_toml.len() == 6 << 20));
    }

    #[test]
    fn loopback_is_for_who_asks_for_it_and_not_for_a_name_that_leads_to_it() {
        let local: IpAddr = Ipv4Addr::LOCALHOST.into();
        for url in ["http://127.0.0.1:7733", "https://localhost:7733", "http://[::1]:7733"] {
            assert_eq!(address_for_others(url, local), local);
        }
        let outer: IpAddr = Ipv4Addr::new(10, 0, 0, 3).into();
        assert_eq!(address_for_others("https://master:7733", outer), outer);
        // Where this machine has a route to anywhere else.
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        if socket.connect("192.0.2.1:9").is_ok() {
            let found = address_for_others("https://master:7733", Ipv4Addr::new(127, 0, 1, 1).into());
            assert_eq!(found, socket.local_addr().unwrap().ip());
        }
    }

    /// Answers every connection with these bytes, whatever comes on it.
    async fn stranger(answer: &'static [u8]) -> Access {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let _ = stream.read(&mut [0; 24]).await;
                let _ = stream.write_all(answer).await;
                // The answer would be lost with bytes that nobody has read.
                let _ = stream.shutdown().await;
                let _ = tokio::io::copy(&mut stream, &mut tokio::io::sink()).await;
            }
        });
        Access::new(Some(&url), &AccessArgs::default()).unwrap()
    }

    #[tokio::test]
    async fn another_service_at_the_address_is_told_from_a_coordinator() {
        // A web server of HTTP/1 alone, and the alert of one that speaks TLS.
        for answer in [&b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n"[..], b"\x15\x03\x03\x00\x02\x02\x46"] {
            let access = stranger(answer).await;
            let answer = search(&access, hello(), Duration::ZERO, false, Duration::from_secs(10)).await;
            let Err(ClientError::Unreachable { last, .. }) = answer else { panic!("joined what is no coordinator") };
            assert!(last.starts_with("what answers there is no coordinator, or speaks TLS; a coordinator listens on port 7733"), "{last}");
        }
    }

    #[test]
    fn upload_is_its_header_and_its_files_in_pieces() {
        use v1::upload_message::Message;
        let files = [("a", vec![1; 2 * CHUNK + 3]), ("b", Vec::new()), ("c", vec![2; CHUNK])];
        let mut messages = Parts::new(files.to_vec()).messages(Generation(2), Step(3)).map(|message| message.message.unwrap());
        let Some(Message::Header(header)) = messages.next() else { panic!("it begins with its header") };
        assert_eq!((header.generation, header.step), (2, 3));
        for (part, (name, bytes)) in header.parts.iter().zip(&files) {
            assert_eq!((part.name.as_str(), part.num_bytes, &part.sha256[..]), (*name, bytes.len() as u64, &Sha256::digest(bytes)[..]));
        }
        let chunk = |message| if let Message::Chunk(chunk) = message { chunk } else { panic!("a second header") };
        let chunks: Vec<Vec<u8>> = messages.map(chunk).collect();
        assert_eq!(chunks.iter().map(Vec::len).collect::<Vec<_>>(), [CHUNK, CHUNK, 3, CHUNK]);
        assert_eq!(chunks.concat(), files.map(|(_, bytes)| bytes).concat());
    }

    #[tokio::test]
    async fn upload_that_nobody_reads_holds_up_no_heartbeat() {
        let ((heard, mut messages), (transfers, mut calls)) = (mpsc::unbounded_channel(), mpsc::unbounded_channel());
        let hung = std::sync::Arc::new(Hung { heard, transfers });
        let router = tonic::transport::Server::builder()
            .add_service(v1::membership_server::MembershipServer::from_arc(hung.clone()))
            .add_service(v1::checkpoints_server::CheckpointsServer::from_arc(hung));
        let access = serve(router).await;
        let stream = join(&access, hello(), Duration::from_secs(5), false).await.unwrap();
        // Far more than the windows of a stream and of a connection take.
        let parts = Parts::new(vec![("adapter.safetensors", vec![7; 8 << 20])]);
        let upload = async { upload(&access, &stream.trace, Generation(1), Step(1), parts).await.unwrap_err() };
        let beat = async {
            assert_eq!(calls.recv().await, Some("upload"));
            // More than one: the first may have left before the window was full.
            for num in 0..100 {
                let heartbeat =
                    Heartbeat { step: Step(num), phase: Phase::Compute, generation: Generation(1), reads: 0, memory: Memory::default() };
                stream.outbound.send(FromWorker::Heartbeat(heartbeat)).await.unwrap();
                let heard =
                    async { while FromWorker::try_from(messages.recv().await.unwrap()).unwrap() != FromWorker::Heartbeat(heartbeat) {} };
                tokio::time::timeout(Duration::from_secs(20), heard).await.expect("the heartbeat waits behind the upload");
            }
        };
        tokio::select! {
            error = upload => panic!("{error}"),
            () = beat => {}
        }
    }
}
