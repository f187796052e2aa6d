//! The way in: connections are taken, shake hands within a time, and are let through with their first call that carries the token.
//!
//! What is refused is said in one line with the peer's address; a flood of refusals is summed up.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use peapod_proto::secure::{AUTHORIZATION, BEARER, NEEDS_TLS, Token};
use rustls::ServerConfig;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::time::{Sleep, sleep};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tonic::service::Interceptor;
use tonic::transport::server::Connected;
use tonic::{Request, Status};

/// How long a connection may take from its first packet to its first call that is let in.
const ADMISSION_TIMEOUT: Duration = Duration::from_secs(10);
/// Connections that have not made such a call yet. A worker that finds no place tries again.
const MAX_WAITING: usize = 2048;
/// Of these, from one host that is not this machine: one stranger cannot take all the places.
const MAX_WAITING_OF_ONE_HOST: usize = 128;
/// Refusals that are logged one by one within a period; the rest of it is counted.
const LINES_PER_PERIOD: usize = 8;
const PERIOD: Duration = Duration::from_secs(10);
/// After a listener's error (no file descriptor left, say): a loop that only fails would take a core.
const AFTER_ERROR: Duration = Duration::from_millis(100);

/// Lines about refusals, few of them.
#[derive(Debug, Clone, Default)]
pub struct Refusals(Arc<Mutex<Period>>);

#[derive(Debug)]
struct Period {
    began: Instant,
    said: Vec<(IpAddr, String)>,
    unsaid: u64,
}

impl Period {
    fn from(began: Instant) -> Self {
        Self { began, said: Vec::new(), unsaid: 0 }
    }
}

impl Default for Period {
    fn default() -> Self {
        Self::from(Instant::now())
    }
}

impl Refusals {
    /// Logs that `peer` was refused, unless that was said a moment ago or too much was.
    pub fn log(&self, peer: SocketAddr, why: &str) {
        let (unsaid, say) = self.count(Instant::now(), peer.ip(), why);
        if unsaid > 0 {
            tracing::warn!("{unsaid} more refusals in the last seconds");
        }
        if say {
            tracing::warn!("refused {peer}: {why}");
        }
    }

    /// Counts a refusal: how many of an earlier period have not been said, and whether this one is to be.
    fn count(&self, now: Instant, address: IpAddr, why: &str) -> (u64, bool) {
        let mut period = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut unsaid = 0;
        if now.saturating_duration_since(period.began) >= PERIOD {
            unsaid = period.unsaid;
            *period = Period::from(now);
        }
        let is_new = !period.said.iter().any(|(of, before)| *of == address && before == why);
        let say = is_new && period.said.len() < LINES_PER_PERIOD;
        if say {
            period.said.push((address, why.to_owned()));
        } else {
            period.unsaid += 1;
        }
        (unsaid, say)
    }
}

/// A place among the connections that are not let in yet; given up on drop.
#[derive(Debug)]
struct Place {
    host: IpAddr,
    waiting: Arc<Mutex<BTreeMap<IpAddr, usize>>>,
    _permit: OwnedSemaphorePermit,
}

/// What stands for the host behind an address: with IPv6 one has a whole network of 64 bits to choose addresses from.
fn host_of(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) if !address.is_loopback() => Ipv6Addr::from_bits(address.to_bits() >> 64 << 64).into(),
        address => address,
    }
}

impl Place {
    fn take(places: &Arc<Semaphore>, waiting: &Arc<Mutex<BTreeMap<IpAddr, usize>>>, address: IpAddr) -> Option<Self> {
        let permit = places.clone().try_acquire_owned().ok()?;
        let mut counts = waiting.lock().unwrap_or_else(PoisonError::into_inner);
        let host = host_of(address);
        let count = counts.entry(host).or_default();
        if *count >= MAX_WAITING_OF_ONE_HOST && !host.is_loopback() {
            return None;
        }
        *count += 1;
        Some(Self { host, waiting: waiting.clone(), _permit: permit })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut counts = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = counts.get_mut(&self.host) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.host);
            }
        }
    }
}

/// Who is at the other end of a connection.
#[derive(Debug, Clone)]
pub struct Peer {
    /// Its address.
    pub address: SocketAddr,
    /// Its place while it waits; empty once it is let in.
    place: Arc<Mutex<Option<Place>>>,
}

impl Peer {
    fn admit(&self) {
        *self.place.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    fn is_admitted(&self) -> bool {
        self.place.lock().unwrap_or_else(PoisonError::into_inner).is_none()
    }
}

/// A connection that has shaken hands.
pub struct Connection {
    stream: Stream,
    peer: Peer,
    /// When it must have been let in; none once it is.
    deadline: Option<Pin<Box<Sleep>>>,
}

enum Stream {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

impl Connected for Connection {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        self.peer.clone()
    }
}

impl AsyncRead for Connection {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.deadline.is_some() && self.peer.is_admitted() {
            self.deadline = None;
        }
        if let Some(deadline) = &mut self.deadline
            && deadline.as_mut().poll(cx).is_ready()
        {
            return Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "no call with a token in time")));
        }
        match &mut self.stream {
            Stream::Plain(stream) => Pin::new(stream).poll_read(cx, buffer),
            Stream::Tls(stream) => Pin::new(stream.as_mut()).poll_read(cx, buffer),
        }
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match &mut self.stream {
            Stream::Plain(stream) => Pin::new(stream).poll_write(cx, bytes),
            Stream::Tls(stream) => Pin::new(stream.as_mut()).poll_write(cx, bytes),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.stream {
            Stream::Plain(stream) => Pin::new(stream).poll_flush(cx),
            Stream::Tls(stream) => Pin::new(stream.as_mut()).poll_flush(cx),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.stream {
            Stream::Plain(stream) => Pin::new(stream).poll_shutdown(cx),
            Stream::Tls(stream) => Pin::new(stream.as_mut()).poll_shutdown(cx),
        }
    }
}

/// Connections as they come, each once it has shaken hands.
pub struct Incoming(mpsc::Receiver<Connection>);

impl futures::Stream for Incoming {
    type Item = io::Result<Connection>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        Poll::Ready(ready!(self.0.poll_recv(cx)).map(Ok))
    }
}

/// Takes connections until `over` turns true or nobody wants them; with `tls` they shake hands first, each in a task of its own.
#[must_use]
pub fn open(listener: TcpListener, tls: Option<Arc<ServerConfig>>, refusals: Refusals, over: watch::Receiver<bool>) -> Incoming {
    let (sender, receiver) = mpsc::channel(16);
    tokio::spawn(accept(listener, tls.map(TlsAcceptor::from), refusals, over, sender));
    Incoming(receiver)
}

async fn accept(
    listener: TcpListener,
    tls: Option<TlsAcceptor>,
    refusals: Refusals,
    mut over: watch::Receiver<bool>,
    sender: mpsc::Sender<Connection>,
) {
    let (places, waiting) = (Arc::new(Semaphore::new(MAX_WAITING)), Arc::default());
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = over.wait_for(|&over| over) => return,
            () = sender.closed() => return,
        };
        let (stream, address) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!("cannot take a connection: {error}");
                sleep(AFTER_ERROR).await;
                continue;
            }
        };
        let Some(place) = Place::take(&places, &waiting, address.ip()) else {
            refusals.log(address, "too many connections that have not joined yet");
            continue;
        };
        let peer = Peer { address, place: Arc::new(Mutex::new(Some(place))) };
        let (tls, refusals, sender) = (tls.clone(), refusals.clone(), sender.clone());
        // Ends by itself, within its time.
        tokio::spawn(async move {
            match tokio::time::timeout(ADMISSION_TIMEOUT, shake_hands(stream, tls)).await {
                Ok(Ok(stream)) => {
                    let connection = Connection { stream, peer, deadline: Some(Box::pin(sleep(ADMISSION_TIMEOUT))) };
                    // The server may be over.
                    let _ = sender.send(connection).await;
                }
                Ok(Err(Some(why))) => refusals.log(address, &why),
                Ok(Err(None)) => {}
                Err(_) => refusals.log(address, &format!("no handshake within {} s", ADMISSION_TIMEOUT.as_secs())),
            }
        });
    }
}

/// First byte of a TLS handshake.
const TLS_HANDSHAKE: u8 = 0x16;

/// Settles whether both ends speak TLS. The error is a line for the log; none for one that came and went.
async fn shake_hands(mut stream: TcpStream, tls: Option<TlsAcceptor>) -> Result<Stream, Option<String>> {
    // Without it a small message would wait for the answer to the one before.
    let _ = stream.set_nodelay(true);
    let mut first = [0; 1];
    if !matches!(stream.peek(&mut first).await, Ok(1)) {
        return Err(None);
    }
    match tls {
        None if first[0] == TLS_HANDSHAKE => {
            // The server's answer tells the other end what it has met.
            answer_and_close(&mut stream, "this port speaks without TLS").await;
            Err(Some("it speaks TLS, and this coordinator listens without: join with http://".into()))
        }
        None => Ok(Stream::Plain(stream)),
        Some(_) if first[0] != TLS_HANDSHAKE => {
            answer_and_close(&mut stream, NEEDS_TLS).await;
            Err(Some("it speaks without TLS: join with the join string, or with https://".into()))
        }
        Some(tls) => match tls.accept(stream).into_fallible().await {
            Ok(stream) => Ok(Stream::Tls(Box::new(stream))),
            // The alert that says why has been written.
            Err((error, mut stream)) => {
                close_gently(&mut stream).await;
                Err(Some(handshake_failed(&error)))
            }
        },
    }
}

/// Tells a peer that speaks HTTP/2 why it is sent away.
pub async fn answer_and_close(stream: &mut TcpStream, words: &str) {
    wait_for_request(stream).await;
    if stream.write_all(&http2_goaway(words)).await.is_ok() {
        close_gently(stream).await;
    }
}

/// Reads on until a request has begun, for a moment: a client whose connection ends before it has asked for anything hands up that it
/// ended, and not why.
async fn wait_for_request(stream: &mut TcpStream) {
    use tokio::io::AsyncReadExt;
    let read = async {
        let (mut said, mut more) = (Vec::new(), [0; 4096]);
        while said.len() < 64 * 1024 && b"PRI".starts_with(&said[..said.len().min(3)]) && !has_request(&said) {
            match stream.read(&mut more).await {
                Ok(0) | Err(_) => return,
                Ok(num_bytes) => said.extend_from_slice(&more[..num_bytes]),
            }
        }
    };
    let _ = tokio::time::timeout(REQUEST_PATIENCE, read).await;
}

/// Whether what a client of HTTP/2 has said holds the beginning of a request: a HEADERS frame (RFC 9113, 3.4 and 4.1).
fn has_request(said: &[u8]) -> bool {
    const PREFACE_BYTES: usize = 24;
    const HEADERS: u8 = 1;
    let mut rest = said.get(PREFACE_BYTES..).unwrap_or_default();
    while let Some((head, after)) = rest.split_at_checked(9) {
        if head[3] == HEADERS {
            return true;
        }
        let length = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
        rest = after.get(length..).unwrap_or_default();
    }
    false
}

/// Ends what is written, and takes what the peer sends meanwhile: closing a socket with unread bytes would take back the last words on it.
async fn close_gently(stream: &mut TcpStream) {
    use tokio::io::AsyncReadExt;
    if stream.shutdown().await.is_err() {
        return;
    }
    let mut rest = stream.take(64 * 1024);
    // Whoever goes on talking has had its answer.
    let _ = tokio::time::timeout(Duration::from_secs(1), tokio::io::copy(&mut rest, &mut tokio::io::sink())).await;
}

/// For how long the request of a client that is sent away is waited for.
const REQUEST_PATIENCE: Duration = Duration::from_millis(300);

/// An empty SETTINGS frame and a GOAWAY with INADEQUATE_SECURITY and these words (RFC 9113, 6.5, 6.8 and 7).
fn http2_goaway(words: &str) -> Vec<u8> {
    const INADEQUATE_SECURITY: u32 = 0xc;
    let mut bytes = vec![0, 0, 0, 4, 0, 0, 0, 0, 0];
    let length = 8 + words.len() as u32;
    bytes.extend_from_slice(&length.to_be_bytes()[1..]);
    bytes.extend_from_slice(&[7, 0, 0, 0, 0, 0]);
    bytes.extend_from_slice(&0_u32.to_be_bytes());
    bytes.extend_from_slice(&INADEQUATE_SECURITY.to_be_bytes());
    bytes.extend_from_slice(words.as_bytes());
    bytes
}

fn handshake_failed(error: &io::Error) -> String {
    use rustls::{AlertDescription as Alert, Error};
    match error.get_ref().and_then(|inner| inner.downcast_ref::<Error>()) {
        Some(Error::AlertReceived(
            alert
            @ (Alert::UnknownCA | Alert::BadCertificate | Alert::CertificateUnknown | Alert::CertificateExpired | Alert::AccessDenied),
        )) => {
            format!(
                "it does not take this coordinator's certificate ({alert:?}): its --join or --tls-ca is of another, or the certificate has run out"
            )
        }
        Some(Error::NoCertificatesPresented) => "it shows no certificate, and --tls-client-ca asks for one".into(),
        Some(Error::InvalidCertificate(problem)) => format!("its certificate is not taken: {problem}"),
        _ => format!("TLS handshake: {error}"),
    }
}

/// Looks at each call before anything of it is read: does it carry the token?
#[derive(Debug, Clone)]
pub struct Guard {
    token: Option<Token>,
    refusals: Refusals,
}

impl Guard {
    /// A guard that asks for `token`, or lets all in.
    #[must_use]
    pub fn new(token: Option<Token>, refusals: Refusals) -> Self {
        Self { token, refusals }
    }
}

impl Interceptor for Guard {
    fn call(&mut self, request: Request<()>) -> Result<Request<()>, Status> {
        let peer = request.extensions().get::<Peer>();
        let verdict = match &self.token {
            None => Ok(()),
            Some(token) => match request.metadata().get(AUTHORIZATION).map(|value| value.as_bytes().strip_prefix(BEARER.as_bytes())) {
                None => Err("no token: join with the join string, or give --token-file"),
                Some(Some(claimed)) if token.is(claimed) => Ok(()),
                Some(_) => Err("wrong token: the job's token is in the coordinator's --state-dir or --token-file"),
            },
        };
        match verdict {
            Ok(()) => {
                if let Some(peer) = peer {
                    peer.admit();
                }
                Ok(request)
            }
            Err(why) => {
                if let Some(peer) = peer {
                    self.refusals.log(peer.address, why);
                }
                Err(Status::unauthenticated(why))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use peapod_proto::secure::read_certificates;

    use super::*;

    #[test]
    fn request_begins_with_its_headers() {
        let frame = |kind: u8, body: &[u8]| [&(body.len() as u32).to_be_bytes()[1..], &[kind, 0, 0, 0, 0, 0], body].concat();
        let start = [&b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"[..], &frame(4, &[1; 12]), &frame(8, &[0, 0, 1, 0])].concat();
        let whole = [&start[..], &frame(1, b"path")].concat();
        assert!(has_request(&whole) && has_request(&whole[..start.len() + 9]));
        assert!((0..start.len() + 9).all(|len| !has_request(&whole[..len])));
    }

    use crate::config::SecurityArgs;
    use crate::secrets::{IDENTITY, Secrets};

    #[test]
    fn guard_tells_no_token_from_a_wrong_one() {
        let token = Token::parse("0123456789abcdef").unwrap();
        let mut guard = Guard::new(Some(token), Refusals::default());
        let mut call = |value: Option<&str>| {
            let mut request = Request::new(());
            if let Some(value) = value {
                request.metadata_mut().insert(AUTHORIZATION, value.parse().unwrap());
            }
            guard.call(request).map(drop).map_err(|status| status.message().to_owned())
        };
        assert!(call(Some("Bearer 0123456789abcdef")).is_ok());
        assert!(call(None).unwrap_err().contains("no token"));
        for wrong in ["Bearer 0123456789abcdeX", "Bearer ", "0123456789abcdef", "Basic 0123456789abcdef"] {
            assert!(call(Some(wrong)).unwrap_err().contains("wrong token"), "{wrong}");
        }
        assert!(Guard::new(None, Refusals::default()).call(Request::new(())).is_ok());
    }

    /// A client of TLS 1.3 is done before its certificate is missed, and may have sent a lot by then.
    #[tokio::test]
    async fn refused_peer_that_talks_on_still_hears_why() {
        use tokio::io::AsyncReadExt;
        let folder = tempfile::tempdir().unwrap();
        let prepare = |args: &SecurityArgs| Secrets::prepare(args, folder.path(), "localhost", [127, 0, 0, 1].into()).unwrap();
        let identity = folder.path().join(IDENTITY);
        let _ = prepare(&SecurityArgs::default());
        let asking = prepare(&SecurityArgs { tls_client_ca: Some(identity.clone()), ..SecurityArgs::default() });
        let mut roots = rustls::RootCertStore::empty();
        roots.add(read_certificates(&identity).unwrap().remove(0)).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let client = rustls::ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
        let client = tokio_rustls::TlsConnector::from(Arc::new(client.with_root_certificates(roots).with_no_client_auth()));

        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let peer = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (stream, _) = listener.accept().await.unwrap();
        let verdict = tokio::spawn(shake_hands(stream, Some(TlsAcceptor::from(asking.tls))));
        let mut peer = client.connect("localhost".try_into().unwrap(), peer).await.unwrap();
        peer.write_all(&[0; 32 * 1024]).await.unwrap();
        // Meanwhile the other end has refused: whoever writes into a reset does not look what there is to read.
        for _ in 0..20 {
            sleep(Duration::from_millis(5)).await;
            peer.write_all(&[0; 64]).await.expect("no reset");
        }
        let answer = peer.read(&mut [0; 16]).await.unwrap_err().to_string();
        assert!(answer.contains("CertificateRequired"), "{answer}");
        drop(peer);
        let why = verdict.await.unwrap().err().flatten();
        assert_eq!(why.as_deref(), Some("it shows no certificate, and --tls-client-ca asks for one"));

        // The same for one that is met without TLS.
        let mut peer = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        peer.write_all(&[&[TLS_HANDSHAKE][..], &[0; 32 * 1024]].concat()).await.unwrap();
        let (stream, _) = listener.accept().await.unwrap();
        let verdict = tokio::spawn(shake_hands(stream, None));
        let mut heard = Vec::new();
        peer.read_to_end(&mut heard).await.expect("the end is orderly");
        assert!(String::from_utf8_lossy(&heard).contains("this port speaks without TLS"));
        drop(peer);
        assert!(verdict.await.unwrap().is_err_and(|why| why.is_some()));
    }

    #[test]
    fn flood_of_refusals_is_summed_up() {
        let refusals = Refusals::default();
        let now = Instant::now();
        let count = |at: Instant, last: u8| refusals.count(at, [10, 0, 0, last].into(), "no token");
        let said = (0..1000).filter(|number| count(now, (number % 100) as u8).1).count();
        assert_eq!(said, LINES_PER_PERIOD);
        assert_eq!(count(now + PERIOD, 1), (1000 - LINES_PER_PERIOD as u64, true));
        assert_eq!(count(now + PERIOD, 1), (0, false), "said already");
        assert_eq!(count(now + PERIOD, 2), (0, true));
        assert_eq!(count(now + 2 * PERIOD, 1), (1, true));
    }

    #[test]
    fn one_host_cannot_take_all_places() {
        let (places, waiting) = (Arc::new(Semaphore::new(MAX_WAITING)), Arc::default());
        let take = |last: u8| Place::take(&places, &waiting, [10, 0, 0, last].into());
        let taken: Vec<Place> = std::iter::from_fn(|| take(1)).collect();
        assert_eq!(taken.len(), MAX_WAITING_OF_ONE_HOST);
        assert!(take(2).is_some());
        drop(taken);
        assert!(take(1).is_some());
        assert!(waiting.lock().unwrap().is_empty(), "places are given back");
    }

    #[test]
    fn host_has_a_network_of_addresses_with_ipv6_and_one_without() {
        let host = |address: &str| host_of(address.parse().unwrap());
        assert_eq!(host("2001:db8:1:2::1"), host("2001:db8:1:2:ffff::9"));
        assert_ne!(host("2001:db8:1:2::1"), host("2001:db8:1:3::1"));
        assert_eq!(host("::ffff:10.0.0.1"), host("10.0.0.1"));
        assert_ne!(host("10.0.0.1"), host("10.0.0.2"));
        assert!(host("::1").is_loopback());
    }
}
