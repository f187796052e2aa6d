//! Reading objects over a network: pieces fetched ahead, a deadline for each wait, and retries that go on at the byte where it broke.
//!
//! One runtime thread does the waiting; the data threads read from a channel.

use std::collections::VecDeque;
use std::io::{self, Read};
use std::ops::Range;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, Once};
use std::time::Duration;

use bytes::{Buf, Bytes};
use futures::StreamExt;
use futures::stream::BoxStream;
use reqwest::header::{AUTHORIZATION, HeaderMap, HeaderValue};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinHandle;

use super::address::shown_url;
use super::expand::NOT_HIDDEN;
use super::patience::{Patience, pause};
use super::pieces::{Pieces, within};
use super::{Halt, Location, Seen, SourceOptions, http};
use crate::error::StoreError;
use crate::{Error, Result};

/// Pieces held at once: the one that is read and two ahead of it.
const CHUNKS: usize = 3;

/// How often a thread that waits for bytes asks whether it still should.
pub const CANCEL_POLL: Duration = Duration::from_millis(50);

/// Shards that are looked at side by side.
const LOOKS: usize = 32;

/// Asked while a store is waited for.
pub type IsCancelled<'a> = Box<dyn Fn() -> bool + Send + 'a>;

/// What tells one version of an object from another. Stores differ in what they say.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Identity {
    pub size: Option<u64>,
    pub etag: Option<String>,
    pub modified: Option<String>,
}

impl Identity {
    /// Whether anything that both know is different.
    pub fn differs(&self, other: &Self) -> bool {
        let text = |here: &Option<String>, there: &Option<String>| here.is_some() && there.is_some() && here != there;
        let size = self.size.is_some() && other.size.is_some() && self.size != other.size;
        // Servers of one object behind one address may disagree on its time, but not on its tag.
        let modified = (self.etag.is_none() || other.etag.is_none()) && text(&self.modified, &other.modified);
        size || modified || text(&self.etag, &other.etag)
    }
}

/// Why a request has failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Failure {
    /// It may succeed the next time.
    Passing(String),
    /// There is no such object.
    Missing(String),
    /// It will not succeed: the store refuses, or has failed for too long.
    Lasting(String),
    /// It will not succeed with these credentials.
    Denied(String),
    /// The object is no longer the one that was begun.
    Changed,
    /// Nobody waits for it any more.
    Cancelled,
}

impl Failure {
    pub fn into_error(self, url: &str) -> Error {
        let store = |reason: String| Error::Store(StoreError::new(url, reason));
        match self {
            Self::Missing(text) => Error::Open { url: url.into(), source: io::Error::new(io::ErrorKind::NotFound, text) },
            Self::Passing(text) | Self::Lasting(text) => store(text),
            Self::Denied(reason) => Error::Store(StoreError { denied: true, ..StoreError::new(url, reason) }),
            Self::Changed => store("it was changed while it was read; shards must stay as they are for the length of a job".into()),
            Self::Cancelled => Error::Cancelled,
        }
    }
}

/// The beginning of an answer, and its bytes.
pub struct Answer {
    pub identity: Identity,
    /// Where in the object the body begins.
    pub start: u64,
    /// Where it ends, as far as the server says: that may be before the end of what was asked for.
    pub end: Option<u64>,
    /// Whether it is what was asked for, rather than the whole object.
    pub is_part: bool,
    pub body: BoxStream<'static, Result<Bytes, Failure>>,
}

/// An object, by the means to ask for it.
#[derive(Debug, Clone)]
pub enum Object {
    Http { client: reqwest::Client, url: String },
    Stored(super::object::Stored),
}

impl Object {
    pub async fn get(&self, range: Option<Range<u64>>, identity: &Identity) -> Result<Answer, Failure> {
        match self {
            Self::Http { client, url } => http::get(client, url, range, identity).await,
            Self::Stored(stored) => stored.get(range, identity).await,
        }
    }

    async fn identify(&self) -> Result<Identity, Failure> {
        match self {
            Self::Http { client, url } => http::identify(client, url).await,
            Self::Stored(stored) => stored.identify().await,
        }
    }
}

/// Says with what TLS is computed, which has to be known before the first client is made.
pub fn choose_cryptography() {
    static PROVIDER: Once = Once::new();
    // Fails if the program has chosen one already, which serves as well.
    PROVIDER.call_once(|| drop(rustls::crypto::ring::default_provider().install_default()));
}

/// What all remote reads share.
#[derive(Debug)]
pub struct Remote {
    /// `None` only while it is being dropped.
    runtime: Option<tokio::runtime::Runtime>,
    client: reqwest::Client,
    stores: super::object::Stores,
}

impl Drop for Remote {
    fn drop(&mut self) {
        // An ordinary drop waits for tasks, which a program that is itself asynchronous must not.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl Remote {
    /// Errors: [`Error::Network`].
    pub fn new(options: &SourceOptions, token: Option<&str>) -> Result<Self> {
        choose_cryptography();
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).thread_name("data-remote").enable_all().build();
        let mut headers = HeaderMap::new();
        if let Some(token) = token {
            let value = HeaderValue::from_str(&format!("Bearer {token}"));
            let mut value = value.map_err(|_| Error::Network("the token holds a character that no header can".into()))?;
            // It is printed nowhere. To other servers that an answer points to the client shows none.
            value.set_sensitive(true);
            headers.insert(AUTHORIZATION, value);
        }
        let client = reqwest::Client::builder()
            .default_headers(headers)
            .user_agent(concat!("peapod/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(options.read_timeout)
            .build()
            .map_err(|error| Error::Network(format!("{error:?}")))?;
        Ok(Self {
            runtime: Some(runtime.map_err(|error| Error::Network(error.to_string()))?),
            client,
            stores: super::object::Stores::default(),
        })
    }

    pub fn object(&self, url: &str) -> Result<Object> {
        match Location::of(url)? {
            Location::Store(kind) => Ok(Object::Stored(self.stores.object(kind, url)?)),
            _ => Ok(Object::Http { client: self.client.clone(), url: url.into() }),
        }
    }

    /// Which version of an object is there.
    pub fn identify(&self, object: &Object, options: &SourceOptions, is_cancelled: &dyn Fn() -> bool) -> Result<Identity, Failure> {
        let (object, options) = (object.clone(), options.clone());
        self.wait_for(async move { ask(&object, &options).await }, is_cancelled)
    }

    /// Looks whether objects exist and how large they are.
    pub fn look(&self, urls: &[String], options: &SourceOptions) -> Vec<Seen> {
        let objects: Vec<Result<Object>> = urls.iter().map(|url| self.object(url)).collect();
        let options = options.clone();
        let num = urls.len();
        let looks = futures::stream::iter(objects).map(move |object| {
            let options = options.clone();
            async move {
                match object {
                    Ok(object) => match ask(&object, &options).await {
                        Ok(Identity { size: Some(size), .. }) => Seen::Bytes(size),
                        Ok(_) => Seen::Unknown("its server does not tell its size".into()),
                        Err(Failure::Missing(_)) => Seen::Missing,
                        Err(Failure::Passing(text) | Failure::Lasting(text) | Failure::Denied(text)) => Seen::Unknown(text),
                        Err(Failure::Changed) => Seen::Unknown("it is being changed".into()),
                        Err(Failure::Cancelled) => Seen::Unknown("interrupted".into()),
                    },
                    Err(error) => Seen::Unknown(error.to_string()),
                }
            }
        });
        let all = looks.buffered(LOOKS).collect();
        self.wait_for(async move { Ok(all.await) }, &|| false).unwrap_or_else(|_| vec![Seen::Unknown("interrupted".into()); num])
    }

    /// Opens an object at the byte `start`; waits for its first answer.
    pub fn open<'a>(
        &self,
        url: &str,
        object: Object,
        start: u64,
        options: &SourceOptions,
        is_cancelled: IsCancelled<'a>,
        halt: &Halt,
    ) -> Result<(Identity, RemoteReader<'a>)> {
        let (send, messages) = channel();
        let patience = Arc::new(Patience { url: url.into(), options: options.clone(), warned: Mutex::new(None) });
        let task = async move {
            let last = match produce(Arc::new(object), start, patience, &send).await {
                Ok(()) => Message::End,
                Err(failure) => Message::Failed(failure),
            };
            // A reader that is gone needs no answer.
            let _ = send.send(last);
        };
        let Some(runtime) = &self.runtime else { return Err(Error::Network("shutting down".into())) };
        let reader = RemoteReader {
            url: url.into(),
            messages,
            task: runtime.spawn(task),
            pieces: VecDeque::new(),
            permit: None,
            has_ended: false,
            is_cancelled,
            halt: halt.clone(),
        };
        match reader.next_message()? {
            Message::Opened(identity) => Ok((identity, reader)),
            Message::Failed(failure) => Err(failure.into_error(url)),
            Message::Chunk { .. } | Message::End => Err(Failure::Lasting("no beginning".into()).into_error(url)),
        }
    }

    /// The addresses of all objects in a folder of a store.
    fn list(&self, stored: super::object::Stored, options: &SourceOptions) -> Result<Vec<String>, Failure> {
        let options = options.clone();
        self.wait_for(async move { repeated(&options, || stored.list(options.read_timeout)).await }, &|| false)
    }

    /// Runs something on the runtime's thread. Unlike the runtime's own ways it may be called from a thread of another runtime.
    fn wait_for<T: Send + 'static>(
        &self,
        work: impl Future<Output = Result<T, Failure>> + Send + 'static,
        is_cancelled: &dyn Fn() -> bool,
    ) -> Result<T, Failure> {
        let (send, receive) = channel();
        let Some(runtime) = &self.runtime else { return Err(Failure::Lasting("interrupted".into())) };
        let task = runtime.spawn(async move {
            let _ = send.send(work.await);
        });
        loop {
            match receive.recv_timeout(CANCEL_POLL) {
                Ok(answer) => return answer,
                Err(RecvTimeoutError::Timeout) if is_cancelled() => {
                    task.abort();
                    return Err(Failure::Cancelled);
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return Err(Failure::Lasting("interrupted".into())),
            }
        }
    }
}

/// Asks which version of an object is there, a few times.
async fn ask(object: &Object, options: &SourceOptions) -> Result<Identity, Failure> {
    repeated(options, || within(options.read_timeout, object.identify())).await
}

/// Asks again after failures that pass, as often as `options` say.
async fn repeated<T, Asked: Future<Output = Result<T, Failure>>>(options: &SourceOptions, ask: impl Fn() -> Asked) -> Result<T, Failure> {
    let mut attempt = 0;
    loop {
        match ask().await {
            Err(Failure::Passing(_)) if attempt < options.retries => {
                tokio::time::sleep(pause(options.first_pause, attempt)).await;
                attempt += 1;
            }
            answer => return answer,
        }
    }
}

/// The objects of a store that match `url`'s wildcards, in alphabetical order.
pub fn matching_objects(remote: &Remote, url: &str, options: &SourceOptions) -> Result<Vec<String>> {
    let fail = |reason: String| Error::Pattern { pattern: url.into(), reason };
    let wildcard = glob::Pattern::new(url).map_err(|error| fail(error.to_string()))?;
    let end = url.find(['*', '?', '[']).unwrap_or(url.len());
    let folder = url[..end].rfind('/').map_or(url, |slash| &url[..=slash]);
    let Location::Store(kind) = Location::of(url)? else { return Err(fail("not in a store".into())) };
    let all = remote.list(remote.stores.object(kind, folder)?, options).map_err(|failure| failure.into_error(url))?;
    let mut matching: Vec<String> = all.into_iter().filter(|object| wildcard.matches_with(object, NOT_HIDDEN)).collect();
    matching.sort_unstable();
    if matching.is_empty() { Err(fail(format!("`{}` matches no object", shown_url(url)))) } else { Ok(matching) }
}

/// From the runtime's thread to the one that reads.
enum Message {
    Opened(Identity),
    Chunk { pieces: VecDeque<Bytes>, permit: OwnedSemaphorePermit },
    End,
    Failed(Failure),
}

/// The blocking end of a read.
pub struct RemoteReader<'a> {
    url: String,
    messages: Receiver<Message>,
    task: JoinHandle<()>,
    pieces: VecDeque<Bytes>,
    /// Held while its pieces are: it lets the task fetch another chunk.
    permit: Option<OwnedSemaphorePermit>,
    has_ended: bool,
    is_cancelled: IsCancelled<'a>,
    halt: Halt,
}

impl RemoteReader<'_> {
    fn next_message(&self) -> Result<Message> {
        loop {
            match self.messages.recv_timeout(CANCEL_POLL) {
                Ok(message) => return Ok(message),
                Err(RecvTimeoutError::Timeout) if (self.is_cancelled)() => return Err(Error::Cancelled),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(Failure::Lasting("reading it was broken off".into()).into_error(&self.url));
                }
            }
        }
    }

    /// Ends the stream for a reason that is not in the shard.
    fn stop(&mut self, error: Error) -> io::Error {
        self.has_ended = true;
        let text = error.to_string();
        self.halt.stop(&self.url, error);
        io::Error::other(text)
    }
}

impl Read for RemoteReader<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        loop {
            if let Some(piece) = self.pieces.front_mut() {
                let len = piece.len().min(buf.len());
                piece.copy_to_slice(&mut buf[..len]);
                if piece.is_empty() {
                    self.pieces.pop_front();
                }
                return Ok(len);
            }
            self.permit = None;
            // Whoever reads on behind a failure meets it again.
            if self.halt.is_set() {
                return Err(io::Error::other(format!("read {}: given up", shown_url(&self.url))));
            }
            if self.has_ended {
                return Ok(0);
            }
            match self.next_message() {
                Ok(Message::Chunk { pieces, permit }) => (self.pieces, self.permit) = (pieces, Some(permit)),
                Ok(Message::End) => self.has_ended = true,
                Ok(Message::Failed(failure)) => {
                    let error = failure.into_error(&self.url);
                    return Err(self.stop(error));
                }
                Ok(Message::Opened(_)) => {}
                Err(error) => return Err(self.stop(error)),
            }
        }
    }
}

impl Drop for RemoteReader<'_> {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Fetches an object and sends it on, no further ahead of its reader than a few chunks.
async fn produce(object: Arc<Object>, start: u64, patience: Arc<Patience>, send: &Sender<Message>) -> Result<(), Failure> {
    let chunk = patience.options.chunk_bytes.max(1);
    let mut first = Pieces {
        object,
        patience: patience.clone(),
        identity: Identity::default(),
        at: start,
        end: Some(start + chunk),
        in_parts: true,
        answer: None,
        failing: None,
    };
    let (mut identity, is_part) = first.begin().await?;
    if patience.options.immutable {
        identity = Identity { size: identity.size, ..Identity::default() };
    }
    first.identity = identity.clone();
    if send.send(Message::Opened(identity.clone())).is_err() {
        return Ok(());
    }
    let permits = Arc::new(Semaphore::new(CHUNKS));
    let Some(size) = identity.size.filter(|_| is_part) else {
        first.in_parts = false;
        first.end = identity.size;
        if is_part {
            // A part of an object of unknown size: asked for anew as a whole.
            first.answer = None;
        }
        return produce_whole(first, chunk, &permits, send).await;
    };
    // The beginning is on its way already; the rest is asked for in parts of the same size.
    first.end = Some((start + chunk).min(size));
    let (object, mut first) = (first.object.clone(), Some(first));
    let starts = (0..).map(|number: u64| start + number * chunk).take_while(|&start| start < size);
    let mut chunks = futures::stream::iter(starts)
        .map(|start| {
            let pieces = first.take().unwrap_or_else(|| Pieces {
                object: object.clone(),
                patience: patience.clone(),
                identity: identity.clone(),
                at: start,
                end: Some((start + chunk).min(size)),
                in_parts: true,
                answer: None,
                failing: None,
            });
            fetch_chunk(pieces, permits.clone())
        })
        .buffered(CHUNKS);
    while let Some(chunk) = chunks.next().await {
        if send.send(chunk?).is_err() {
            break;
        }
    }
    Ok(())
}

async fn fetch_chunk(mut from: Pieces, permits: Arc<Semaphore>) -> Result<Message, Failure> {
    let permit = permit(permits).await?;
    let mut pieces = VecDeque::new();
    while let Some(piece) = from.next().await? {
        pieces.push_back(piece);
    }
    Ok(Message::Chunk { pieces, permit })
}

/// For a server that knows no ranges: one answer, and after a break another, of which the beginning is thrown away.
async fn produce_whole(mut from: Pieces, chunk: u64, permits: &Arc<Semaphore>, send: &Sender<Message>) -> Result<(), Failure> {
    loop {
        let permit = permit(permits.clone()).await?;
        let (mut pieces, mut len) = (VecDeque::new(), 0);
        while len < chunk
            && let Some(piece) = from.next().await?
        {
            len += piece.len() as u64;
            pieces.push_back(piece);
        }
        if len == 0 || send.send(Message::Chunk { pieces, permit }).is_err() {
            return Ok(());
        }
    }
}

async fn permit(permits: Arc<Semaphore>) -> Result<OwnedSemaphorePermit, Failure> {
    permits.acquire_owned().await.map_err(|_| Failure::Lasting("interrupted".into()))
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    #[test]
    fn versions_differ_by_what_both_servers_tell() {
        let version = |size: u64, etag: &str, modified: &str| {
            let text = |text: &str| (!text.is_empty()).then(|| text.to_owned());
            Identity { size: (size > 0).then_some(size), etag: text(etag), modified: text(modified) }
        };
        let known = version(5, "\"a\"", "Monday");
        assert!(!known.differs(&version(0, "", "")) && !known.differs(&version(5, "\"a\"", "Tuesday")));
        assert!(known.differs(&version(6, "\"a\"", "Monday")) && known.differs(&version(5, "\"b\"", "Monday")));
        assert!(known.differs(&version(5, "", "Tuesday")));
    }

    #[tokio::test]
    async fn failures_that_pass_are_asked_again_and_others_are_not() {
        let options = SourceOptions { retries: 2, first_pause: Duration::from_millis(1), ..SourceOptions::default() };
        let asked = async |failures: u32, failure: fn() -> Failure| {
            let times = Cell::new(0);
            let answer = repeated(&options, || {
                times.set(times.get() + 1);
                std::future::ready(if times.get() > failures { Ok(()) } else { Err(failure()) })
            });
            (answer.await.is_ok(), times.get())
        };
        let (passing, lasting) = (|| Failure::Passing("busy".into()), || Failure::Lasting("no".into()));
        assert_eq!(asked(2, passing).await, (true, 3));
        assert_eq!(asked(3, passing).await, (false, 3));
        assert_eq!(asked(1, lasting).await, (false, 1));
    }
}
