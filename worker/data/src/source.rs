//! Where shards lie, and opening one of them: a file, or an object that is read over a network.
//!
//! ```text
//! url -> file: retries ---------------------------------------------> decompress -> Stream
//!     -> http, s3, gs, az: ranges, deadlines, retries -> cache file --^
//! ```
//!
//! A stream ends early in one of two ways, and they are kept apart. What is *damaged* is read as far as it goes: its rest is lost, and
//! counted. What *cannot be had* is nobody's loss: the stream waits for its store, disk or mount, and in the end [`Halt`] says that it was
//! given up.

mod address;
mod cache;
mod compress;
pub(crate) mod expand;
mod http;
mod local;
mod object;
mod patience;
mod pieces;
mod remote;

use std::io::{self, Read};
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use peapod_proto::ids::Bitmap;
use peapod_proto::job::DataSection;

use crate::error::StoreError;
use crate::shard::{Found, RawSample, ShardEnd, read_shard};
use crate::{Error, Result};
pub use address::shown_url;
use cache::{Cache, Tee};
use local::LocalReader;
pub use object::{folder_at, one_line};
use remote::Remote;

/// Bytes asked for at once.
const CHUNK_BYTES: u64 = 8 << 20;

/// Pause before the first retry; it doubles with each.
const FIRST_PAUSE: Duration = Duration::from_millis(200);

/// How shards are read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SourceOptions {
    /// Longest wait for an answer, and for the next bytes of one.
    pub read_timeout: Duration,
    /// Failures in a row that are no news.
    pub retries: u32,
    /// How long a store may fail altogether, at least: then the shard is given up.
    pub give_up_after: Duration,
    /// Folder and size of the cache.
    pub cache: Option<(PathBuf, u64)>,
    /// Bytes asked for at once; two such pieces are fetched ahead of the one that is read.
    pub chunk_bytes: u64,
    /// Pause before the first retry.
    pub first_pause: Duration,
    /// Whether what lies behind an address never changes, so that answers need not be of one version by what servers call it.
    pub immutable: bool,
}

impl SourceOptions {
    /// What a job says.
    #[must_use]
    pub fn new(data: &DataSection) -> Self {
        Self {
            read_timeout: data.read_timeout,
            retries: data.retries,
            give_up_after: data.give_up_after,
            cache: data.cache_dir.clone().map(|folder| (folder, data.cache_bytes)),
            ..Self::default()
        }
    }

    /// For looking at shards before a job: a store that does not answer soon is reported instead of waited for.
    #[must_use]
    pub fn impatient() -> Self {
        Self { read_timeout: Duration::from_secs(10), retries: 2, ..Self::default() }
    }
}

impl Default for SourceOptions {
    /// Five retries and no cache.
    fn default() -> Self {
        Self {
            read_timeout: Duration::from_secs(30),
            retries: 5,
            give_up_after: Duration::ZERO,
            cache: None,
            chunk_bytes: CHUNK_BYTES,
            first_pause: FIRST_PAUSE,
            immutable: false,
        }
    }
}

/// Opens shards wherever they lie. Credentials of stores come from this process's environment.
#[derive(Debug, Default)]
pub struct Sources {
    options: SourceOptions,
    cache: Option<Cache>,
    /// What servers are shown that are asked over http.
    token: Option<Token>,
    /// Made when the first address needs it.
    remote: OnceLock<Arc<Remote>>,
}

/// A secret.
struct Token(String);

impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Token(..)")
    }
}

/// What a look at a shard has shown.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Seen {
    /// It is there and has this many bytes.
    Bytes(u64),
    /// It is not there.
    Missing,
    /// That cannot be told from here, and why.
    Unknown(String),
}

impl Sources {
    /// Nothing is opened yet, and the cache's folder is made when it is first needed.
    #[must_use]
    pub fn new(options: SourceOptions) -> Self {
        let cache = options.cache.clone().map(|(folder, max_bytes)| Cache::new(folder, max_bytes));
        Self { options, cache, token: None, remote: OnceLock::new() }
    }

    /// Shows a token (`Authorization: Bearer`) to the servers that are asked over http, but to none that they point to.
    #[must_use]
    pub fn with_token(self, token: impl Into<String>) -> Self {
        Self { token: Some(Token(token.into())), ..self }
    }

    /// Opens a shard for reading from its start; compression is undone on the way.
    ///
    /// `is_cancelled` is asked now and then while a store is waited for.
    ///
    /// Errors: [`Error::Open`] if there is no such shard; [`Error::Store`] if it cannot be read, or its store refuses or does not answer;
    /// [`Error::Cancelled`];
    /// [`Error::UnsupportedScheme`], [`Error::NoSupport`], [`Error::Pipe`].
    pub fn open<'a>(&self, url: &str, is_cancelled: impl Fn() -> bool + Send + 'a) -> Result<Stream<'a>> {
        let halt = Halt::default();
        let raw: Box<dyn Read + Send + 'a> = match Location::of(url)? {
            Location::Local(path) => Box::new(local::open(url, path, &self.options, Box::new(is_cancelled), &halt)?),
            Location::Http | Location::Store(_) => self.open_remote(url, Box::new(is_cancelled), &halt)?,
        };
        let reader = compress::decompress(raw).map_err(|source| match halt.check() {
            Ok(()) => Error::Open { url: url.into(), source },
            Err(error) => error,
        })?;
        Ok(Stream { reader, halt })
    }

    /// Opens what lies in a store or on a server, which need not be a shard, for reading as it is from the byte `start` on.
    ///
    /// Errors: those of [`open`](Self::open), which may also come later, from [`Halt::check`].
    pub fn open_as_it_is<'a>(&self, url: &str, start: u64, is_cancelled: impl Fn() -> bool + Send + 'a) -> Result<Stream<'a>> {
        let halt = Halt::default();
        let remote = self.remote()?;
        let (_, reader) = remote.open(url, remote.object(url)?, start, &self.options, Box::new(is_cancelled), &halt)?;
        Ok(Stream { reader: Box::new(reader), halt })
    }

    /// Reads a shard's samples, but for those marked in `done`, as [`read_shard`] does; `check` judges the stamp of one that was
    /// precomputed.
    ///
    /// Returns `None` if `visit` broke off.
    ///
    /// Errors: those of [`open`](Self::open), of which [`Error::Store`] and [`Error::Cancelled`] may also come behind some samples;
    /// `check`'s.
    pub fn read<'a>(
        &self,
        url: &str,
        done: &Bitmap,
        is_cancelled: impl Fn() -> bool + Send + 'a,
        check: impl Fn(&[u8]) -> Result<()>,
        mut visit: impl FnMut(RawSample) -> ControlFlow<()>,
    ) -> Result<Option<ShardEnd>> {
        let mut tar = self.open(url, is_cancelled)?;
        let halt = tar.halt();
        let mut refusal = None;
        let end = read_shard(&mut tar, done, |found| match found {
            Found::Stamp(stamp) => match check(&stamp) {
                Ok(()) => ControlFlow::Continue(()),
                Err(error) => {
                    refusal = Some(error);
                    ControlFlow::Break(())
                }
            },
            // A sample that a failed read cut short is not a broken one.
            Found::Sample(_) if halt.is_set() => ControlFlow::Break(()),
            Found::Sample(sample) => visit(sample),
        });
        refusal.map_or(Ok(()), Err)?;
        halt.check()?;
        Ok(end)
    }

    fn open_remote<'a>(&self, url: &str, is_cancelled: remote::IsCancelled<'a>, halt: &Halt) -> Result<Box<dyn Read + Send + 'a>> {
        let remote = self.remote()?;
        let object = remote.object(url)?;
        if let Some(cache) = &self.cache {
            let cached = match remote.identify(&object, &self.options, &is_cancelled) {
                Ok(identity) => cache.get(url, &identity, &is_cancelled)?,
                // A store that is down for a while costs nothing where the shard is at hand, as it was when this job last asked for it.
                Err(remote::Failure::Passing(_)) => cache.known(url, &is_cancelled)?,
                Err(remote::Failure::Cancelled) => return Err(Error::Cancelled),
                // Some stores answer nothing but reads.
                Err(_) => None,
            };
            if let Some((file, path)) = cached {
                return Ok(Box::new(LocalReader::of(file, path, url, &self.options, is_cancelled, halt)?));
            }
        }
        let (identity, reader) = remote.open(url, object, 0, &self.options, is_cancelled, halt)?;
        let filling = self.cache.as_ref().and_then(|cache| cache.begin(url, &identity));
        Ok(match filling {
            Some(filling) => Box::new(Tee::new(reader, filling)),
            None => Box::new(reader),
        })
    }

    /// Looks whether shards exist and how large they are, many at a time.
    #[must_use]
    pub fn look(&self, urls: &[String]) -> Vec<Seen> {
        let local = |url: &String| match Location::of(url) {
            Ok(Location::Local(path)) => match std::fs::metadata(path) {
                Ok(metadata) if metadata.is_file() => Some(Seen::Bytes(metadata.len())),
                Err(error) if !local::is_missing(&error) => Some(Seen::Unknown(error.to_string())),
                _ => Some(Seen::Missing),
            },
            Ok(_) => None,
            Err(error) => Some(Seen::Unknown(error.to_string())),
        };
        let mut seen: Vec<Option<Seen>> = urls.iter().map(local).collect();
        let far: Vec<String> = urls.iter().zip(&seen).filter(|(_, seen)| seen.is_none()).map(|(url, _)| url.clone()).collect();
        if !far.is_empty() {
            let answers = match self.remote() {
                Ok(remote) => remote.look(&far, &self.options),
                Err(error) => vec![Seen::Unknown(error.to_string()); far.len()],
            };
            seen.iter_mut().filter(|seen| seen.is_none()).zip(answers).for_each(|(seen, answer)| *seen = Some(answer));
        }
        seen.into_iter().flatten().collect()
    }

    fn remote(&self) -> Result<&Arc<Remote>> {
        if let Some(remote) = self.remote.get() {
            return Ok(remote);
        }
        let remote = Arc::new(Remote::new(&self.options, self.token.as_ref().map(|token| token.0.as_str()))?);
        Ok(self.remote.get_or_init(|| remote))
    }
}

/// A shard that is being read.
pub struct Stream<'a> {
    reader: Box<dyn Read + Send + 'a>,
    halt: Halt,
}

impl Stream<'_> {
    /// Says, once a read has failed, whether the shard could not be had; to be kept beside the stream.
    #[must_use]
    pub fn halt(&self) -> Halt {
        self.halt.clone()
    }
}

impl Read for Stream<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.reader.read(buf)
    }
}

/// Why a stream ended before its shard did, if it is not the shard's fault. The readers on top of a stream change errors on their way up,
/// hence a place apart.
#[derive(Debug, Clone, Default)]
pub struct Halt(Arc<OnceLock<Stopped>>);

#[derive(Debug, Clone)]
enum Stopped {
    Cancelled,
    Failed(StoreError),
}

impl Halt {
    /// Whether what was read last is no part of the shard.
    #[must_use]
    pub fn is_set(&self) -> bool {
        self.0.get().is_some()
    }

    /// Errors: [`Error::Cancelled`], [`Error::Store`].
    pub fn check(&self) -> Result<()> {
        match self.0.get() {
            None => Ok(()),
            Some(Stopped::Cancelled) => Err(Error::Cancelled),
            Some(Stopped::Failed(error)) => Err(Error::Store(error.clone())),
        }
    }

    /// Notes why the stream of `url` ends. The first cause stands.
    fn stop(&self, url: &str, error: Error) {
        let _ = self.0.set(match error {
            Error::Cancelled => Stopped::Cancelled,
            Error::Store(error) => Stopped::Failed(error),
            other => Stopped::Failed(StoreError::new(url, other.to_string())),
        });
    }
}

/// Expands the entries of `data.shards` into the job's shard list, in order.
///
/// An entry may join several by `::`, hold ranges (`{00000..00123}`, inclusive, zero-padded) and alternatives (`{a,b}`), and, in a path and
/// in the name of an object in a store, the wildcards `*`, `?` and `[a-z]`, whose matches come in alphabetical order. An entry `@list`
/// stands for the lines of a file, which may lie anywhere a shard may.
///
/// Errors: [`Error::Pattern`] if an entry is empty, a range is malformed, a wildcard matches nothing or the list grows beyond the
/// number of shards a job can name; [`Error::UnsupportedScheme`], [`Error::NoSupport`] and [`Error::Pipe`] for what cannot be read; those
/// of [`Sources::open`] for a list.
pub fn expand_shards(patterns: &[String]) -> Result<Vec<String>> {
    expand::expand(&Sources::new(SourceOptions::impatient()), patterns)
}

/// Opens a shard with the default [`SourceOptions`]; see [`Sources::open`].
pub fn open(url: &str) -> Result<Stream<'static>> {
    Sources::default().open(url, || false)
}

/// How a shard is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Location<'a> {
    /// By a path on this host.
    Local(&'a str),
    /// By plain requests.
    Http,
    /// As an object in a store that this build can read.
    Store(StoreKind),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum StoreKind {
    S3,
    Gcs,
    Azure,
}

impl<'a> Location<'a> {
    fn of(url: &'a str) -> Result<Self> {
        if url.trim_start().starts_with("pipe:") {
            return Err(Error::Pipe { url: url.into() });
        }
        let Some((scheme, rest)) = url.split_once("://") else { return Ok(Self::Local(url)) };
        let (kind, name, feature, is_built) = match scheme {
            "file" => return Ok(Self::Local(rest)),
            "http" | "https" => return Ok(Self::Http),
            "s3" | "s3a" => (StoreKind::S3, "S3", "aws", cfg!(feature = "aws")),
            "gs" => (StoreKind::Gcs, "Google Cloud Storage", "gcp", cfg!(feature = "gcp")),
            "az" | "azure" | "adl" | "abfs" | "abfss" => (StoreKind::Azure, "Azure", "azure", cfg!(feature = "azure")),
            _ => return Err(Error::UnsupportedScheme { url: url.into(), scheme: scheme.into() }),
        };
        if is_built { Ok(Self::Store(kind)) } else { Err(Error::NoSupport { url: url.into(), store: name, feature }) }
    }
}

#[cfg(test)]
mod tests;
