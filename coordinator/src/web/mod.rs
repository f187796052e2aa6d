//! The HTTP side: a live page of the job, `/metrics` for Prometheus, `/healthz` and `/readyz`.
//!
//! Everything here can only be read. It shows what the job file calls the job, hosts and devices of workers, losses, shards by source,
//! pictures and their prompts: no token, no key, no credentials. It listens on this machine unless `--http-addr` says otherwise.

mod metrics;
mod page;

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use axum::Router;
use axum::extract::{Path as At, State};
use axum::http::{HeaderName, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use hyper_util::service::TowerToHyperService;
use peapod_proto::program::host_name;
use peapod_proto::secure::PAGE_ONLY;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch};
use tokio::task::JoinSet;

use crate::announce::authority_for_workers;
use crate::config::address;
use crate::driver::{Command, Look};
use crate::gate::answer_and_close;

/// Where the page is, unless it is said.
pub const DEFAULT_HTTP_PORT: u16 = 7734;
/// What a client of gRPC says first: it takes this port for the coordinator's.
const HTTP2: &[u8] = b"PRI";
/// How long the driver may take to answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// Connections at once; more wait to be taken.
const MAX_CONNECTIONS: usize = 256;
/// How long a client may take to ask, also for the next thing.
const ASKING: Duration = Duration::from_secs(15);
/// After a listener's error (no file descriptor left, say): a loop that only fails would take a core.
const AFTER_ERROR: Duration = Duration::from_millis(100);

/// What `--http-addr` says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HttpAddr {
    /// No page and no metrics.
    Off,
    /// Here.
    At(SocketAddr),
}

impl FromStr for HttpAddr {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "off" => Ok(Self::Off),
            text => address(text).map(Self::At).map_err(|error| format!("{error}; or `off` for none")),
        }
    }
}

/// What of the job is shown besides its state.
#[derive(Debug, Clone)]
pub struct Shown {
    /// Its name.
    pub job: String,
    /// Names this run.
    pub job_id: String,
    /// Last step, if the job is given in steps.
    pub last_step: Option<u64>,
    /// Weight of the feature loss.
    pub feature_weight: f64,
    /// Members of a whole world.
    pub world_size: u32,
    /// Silence after which a worker is dead.
    pub heartbeat_timeout: Duration,
    /// Where pictures are kept.
    pub pictures: PathBuf,
}

/// What every answer is made of.
#[derive(Debug)]
struct Site {
    commands: mpsc::Sender<Command>,
    shown: Shown,
}

type Shared = State<Arc<Site>>;

/// Opens the port; nothing if there is to be none. The usual one may be taken by another job: then any free one does.
///
/// # Errors
/// If the port that was asked for cannot be had.
pub async fn listen(address: Option<HttpAddr>) -> anyhow::Result<Option<TcpListener>> {
    let usual = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), DEFAULT_HTTP_PORT);
    let listener = match address {
        Some(HttpAddr::Off) => return Ok(None),
        Some(HttpAddr::At(address)) => {
            TcpListener::bind(address).await.with_context(|| format!("cannot listen on --http-addr {address}"))?
        }
        None => match TcpListener::bind(usual).await {
            Ok(listener) => listener,
            Err(_) => TcpListener::bind(SocketAddr::new(usual.ip(), 0)).await.context("cannot listen for the web page")?,
        },
    };
    tracing::info!("live page and metrics on http://{}/", listener.local_addr()?);
    Ok(Some(listener))
}

/// Where the page is, as those see it who reach this machine.
///
/// # Errors
/// If the system does not say where it listens.
pub fn url(listener: &TcpListener) -> std::io::Result<String> {
    Ok(format!("http://{}/", authority_for_workers(listener.local_addr()?, &host_name())))
}

/// Serves until `over` turns true.
pub async fn serve(listener: TcpListener, commands: mpsc::Sender<Command>, shown: Shown, mut over: watch::Receiver<bool>) {
    let router = router(Arc::new(Site { commands, shown }));
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            (stream, place) = accept(&listener, &places) => drop(connections.spawn(converse(stream, router.clone(), place, ASKING))),
            Some(_) = connections.join_next() => {}
            _ = over.wait_for(|&over| over) => return,
        }
    }
}

/// The next client, once there is a place for it.
async fn accept(listener: &TcpListener, places: &Arc<Semaphore>) -> (TcpStream, Option<OwnedSemaphorePermit>) {
    // None only of a semaphore that is closed, which nobody does.
    let place = places.clone().acquire_owned().await.ok();
    loop {
        match listener.accept().await {
            Ok((stream, _)) => return (stream, place),
            Err(error) => {
                tracing::warn!("cannot take a connection to the page: {error}");
                tokio::time::sleep(AFTER_ERROR).await;
            }
        }
    }
}

/// Answers one client for as long as it asks.
async fn converse(mut stream: TcpStream, router: Router, _place: Option<OwnedSemaphorePermit>, asking: Duration) {
    let mut first = [0; HTTP2.len()];
    match tokio::time::timeout(asking, stream.peek(&mut first)).await {
        Ok(Ok(_)) if first == HTTP2 => return answer_and_close(&mut stream, PAGE_ONLY).await,
        Ok(Ok(_)) => {}
        _ => return,
    }
    let mut builder = Builder::new(TokioExecutor::new()).http1_only();
    builder.http1().timer(TokioTimer::new()).header_read_timeout(asking);
    // However it ends, the client has seen it too.
    let _ = builder.serve_connection(TokioIo::new(stream), TowerToHyperService::new(router)).await;
}

fn router(site: Arc<Site>) -> Router {
    Router::new()
        .route("/", get(|| asset("text/html; charset=utf-8", include_str!("assets/index.html"))))
        .route("/page.css", get(|| asset("text/css; charset=utf-8", include_str!("assets/page.css"))))
        .route("/page.js", get(|| asset("text/javascript; charset=utf-8", include_str!("assets/page.js"))))
        .route("/charts.js", get(|| asset("text/javascript; charset=utf-8", include_str!("assets/charts.js"))))
        .route("/uplot.js", get(|| asset("text/javascript; charset=utf-8", include_str!("assets/uplot.js"))))
        .route("/uplot.css", get(|| asset("text/css; charset=utf-8", include_str!("assets/uplot.css"))))
        .route("/api/state/{edition}/{from}", get(state))
        .route("/metrics", get(scrape))
        .route("/healthz", get(alive))
        .route("/readyz", get(alive))
        .route("/pictures/{step}/{file}", get(picture))
        .with_state(site)
}

/// Nothing but what this server gives may be loaded by the page, and nobody may frame it.
const HEADERS: [(HeaderName, &str); 3] = [
    (header::CONTENT_SECURITY_POLICY, "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'"),
    (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
    (header::CACHE_CONTROL, "no-cache"),
];

async fn asset(kind: &'static str, text: &'static str) -> Response {
    (HEADERS, [(header::CONTENT_TYPE, kind)], text).into_response()
}

impl Site {
    async fn look(&self) -> Result<Box<Look>, Response> {
        self.ask(|reply| Command::Look { reply }).await
    }

    async fn ask<T>(&self, command: impl FnOnce(oneshot::Sender<T>) -> Command) -> Result<T, Response> {
        let (reply, answer) = oneshot::channel();
        let ask = async {
            self.commands.send(command(reply)).await.ok()?;
            answer.await.ok()
        };
        match tokio::time::timeout(PATIENCE, ask).await {
            Ok(Some(answer)) => Ok(answer),
            Ok(None) => Err((StatusCode::SERVICE_UNAVAILABLE, "the coordinator is stopping\n").into_response()),
            Err(_) => Err((StatusCode::SERVICE_UNAVAILABLE, "the coordinator does not answer\n").into_response()),
        }
    }
}

/// Whether the coordinator itself is well: a job that waits for its workers is no reason to start it again.
async fn alive(State(site): Shared) -> Response {
    match site.ask(|reply| Command::Ping { reply }).await {
        Ok(()) => "ok\n".into_response(),
        Err(problem) => problem,
    }
}

async fn scrape(State(site): Shared) -> Response {
    match site.look().await {
        Ok(look) => match metrics::text(&site.shown, &look.0, &look.1) {
            Ok(text) => (HEADERS, [(header::CONTENT_TYPE, metrics::CONTENT_TYPE)], text).into_response(),
            Err(_) => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
        },
        Err(problem) => problem,
    }
}

async fn state(State(site): Shared, At((edition, from)): At<(u32, u64)>) -> Response {
    match site.look().await {
        Ok(look) => {
            let pictures = drawn_steps(&site.shown.pictures).await;
            let state = page::state(&site.shown, &look.0, &look.1, edition, from, &pictures);
            (HEADERS, [(header::CONTENT_TYPE, "application/json")], state.to_string()).into_response()
        }
        Err(problem) => problem,
    }
}

/// Folders of pictures, oldest first, the newest few of them; none before the first.
async fn drawn_steps(folder: &Path) -> Vec<String> {
    let mut names = Vec::new();
    if let Ok(mut entries) = tokio::fs::read_dir(folder).await {
        while let Ok(Some(entry)) = entries.next_entry().await {
            names.extend(entry.file_name().into_string().ok().filter(|name| is_step(name)));
        }
    }
    names.sort();
    names.split_off(names.len().saturating_sub(page::MAX_PICTURE_STEPS))
}

fn is_step(name: &str) -> bool {
    name.strip_prefix("step-").is_some_and(|digits| !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit()))
}

async fn picture(State(site): Shared, At((step, file)): At<(String, String)>) -> Response {
    let is_png = file.strip_suffix(".png").is_some_and(|digits| !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit()));
    // No other name reaches the file system.
    if !is_step(&step) || !(is_png || file == "pictures.json") {
        return StatusCode::NOT_FOUND.into_response();
    }
    match tokio::fs::read(site.shown.pictures.join(step).join(&file)).await {
        Ok(bytes) => (HEADERS, [(header::CONTENT_TYPE, if is_png { "image/png" } else { "application/json" })], bytes).into_response(),
        Err(_) => StatusCode::NOT_FOUND.into_response(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn address_is_an_address_or_off() {
        assert_eq!("off".parse(), Ok(HttpAddr::Off));
        assert_eq!("127.0.0.1:0".parse(), Ok(HttpAddr::At("127.0.0.1:0".parse().unwrap())));
        assert_eq!("localhost:0".parse(), Ok(HttpAddr::At("127.0.0.1:0".parse().unwrap())));
        assert!("7734".parse::<HttpAddr>().unwrap_err().ends_with("0.0.0.0:7734 for other hosts too; or `off` for none"));
    }

    #[tokio::test]
    async fn usual_port_taken_by_another_job_is_no_failure_and_one_asked_for_is() {
        let first = listen(Some("127.0.0.1:0".parse().unwrap())).await.unwrap().unwrap();
        let taken = HttpAddr::At(first.local_addr().unwrap());
        assert!(listen(Some(taken)).await.unwrap_err().to_string().contains("--http-addr"));
        let [one, other] = [listen(None).await.unwrap().unwrap(), listen(None).await.unwrap().unwrap()];
        assert_ne!(one.local_addr().unwrap(), other.local_addr().unwrap());
        assert!(listen(Some(HttpAddr::Off)).await.unwrap().is_none());
    }

    #[tokio::test]
    async fn client_that_never_asks_is_cut_off_and_one_that_asks_is_answered() {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let listener = listen(Some("127.0.0.1:0".parse().unwrap())).await.unwrap().unwrap();
        let address = listener.local_addr().unwrap();
        let places = Arc::new(Semaphore::new(1));
        tokio::spawn(async move {
            let router = Router::new().route("/", get(|| async { "ok" }));
            loop {
                let (stream, place) = accept(&listener, &places).await;
                tokio::spawn(converse(stream, router.clone(), place, Duration::from_millis(50)));
            }
        });
        let mut silent = TcpStream::connect(address).await.unwrap();
        silent.write_all(b"GET / HTTP/1.1\r\nHost:").await.unwrap();
        // It waits for the place of the one before.
        let mut asks = TcpStream::connect(address).await.unwrap();
        asks.write_all(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").await.unwrap();
        let mut said = String::new();
        asks.read_to_string(&mut said).await.unwrap();
        assert!(said.starts_with("HTTP/1.1 200") && said.ends_with("ok"), "{said}");
        silent.read_to_end(&mut Vec::new()).await.unwrap();
    }

    #[test]
    fn only_names_of_pictures_reach_the_disk() {
        assert!(is_step("step-000000010"));
        for name in ["step-", "..", "step-1/..", "step-1x", ""] {
            assert!(!is_step(name), "{name}");
        }
    }
}
