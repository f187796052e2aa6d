//! What can go wrong between a shard and a batch.

use std::io;

use crate::cached::RecipeError;
use crate::source::shown_url;

/// This crate's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why data could not be had. A broken *sample* is no error: it is reported as a [`Skip`](crate::Skip).
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An entry of `data.shards` cannot be expanded.
    #[error("shard pattern `{}`: {reason}", shown_url(.pattern))]
    Pattern {
        /// The entry as written.
        pattern: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A shard lies where nothing can read it.
    #[error("`{}`: {scheme}:// is none of file, http, https, s3, gs, az", shown_url(.url))]
    UnsupportedScheme {
        /// The shard.
        url: String,
        /// What stands before `://`.
        scheme: String,
    },
    /// A shard lies in a store that this build cannot read.
    #[error("{url}: this build has no {store} support: build with --features {feature}")]
    NoSupport {
        /// The shard.
        url: String,
        /// The store's name.
        store: &'static str,
        /// The feature that is missing.
        feature: &'static str,
    },
    /// A shard names a shell command.
    #[error("shard `{url}`: `pipe:` would run a shell command and is refused")]
    Pipe {
        /// The shard.
        url: String,
    },
    /// There is no such shard, or it begins as none does.
    #[error("open {}: {source}", shown_url(.url))]
    Open {
        /// The shard.
        url: String,
        /// The system's answer.
        source: io::Error,
    },
    /// A shard's store, or the disk or mount that it is on, refuses it, has failed for too long, or has changed it meanwhile. What is in
    /// the shard is not lost.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// What reads shards over a network cannot be started.
    #[error("start reading over the network: {0}")]
    Network(String),
    /// A picture cannot be decoded.
    #[error("jpg: {0}")]
    Picture(String),
    /// A picture is in another format than its name says.
    #[error("jpg: this is {0}; JPEG and PNG are read")]
    PictureFormat(&'static str),
    /// A picture's header claims more pixels than are decoded.
    #[error("jpg: {width} x {height} is more than {limit} pixels")]
    PictureSize {
        /// Width in pixels.
        width: u32,
        /// Height in pixels.
        height: u32,
        /// Most pixels that are decoded.
        limit: u64,
    },
    /// What a cached sample holds cannot be used.
    #[error("latents: {0}")]
    Cached(String),
    /// A cached shard was made for another job.
    #[error(transparent)]
    Recipe(#[from] RecipeError),
    /// The tables from traditional to simplified characters cannot be read.
    #[error("read the tables from traditional to simplified characters: {0}")]
    Tables(String),
    /// The loader's configuration contradicts itself.
    #[error("loader: {0}")]
    Config(String),
    /// The validation samples cannot be used.
    #[error("{0}")]
    Validation(String),
    /// A data thread cannot be started.
    #[error("start a data thread: {0}")]
    Spawn(io::Error),
    /// A data thread ended in a panic; nothing more will come.
    #[error("a data thread panicked")]
    ThreadPanicked,
    /// [`LoaderHandle::cancel`](crate::LoaderHandle::cancel) was called while a share was awaited. Nothing is lost.
    #[error("cancelled while waiting for samples")]
    Cancelled,
}

/// Why a reader gives up for good.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// A shard cannot be had.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A shard was made for another job.
    #[error(transparent)]
    Recipe(#[from] RecipeError),
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Store(error) => error.into(),
            Failure::Recipe(error) => error.into(),
        }
    }
}

/// A shard that could not be had, though nothing is known to be wrong with it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("read {}: {reason}", shown_url(.url))]
pub struct StoreError {
    /// The shard; it is shown without what may be secret of it.
    pub url: String,
    /// What its store or the system said last, and what to do.
    pub reason: String,
    /// Whether it is that nobody may read it, or nobody without other credentials.
    pub denied: bool,
}

impl StoreError {
    pub(crate) fn new(url: impl Into<String>, reason: impl Into<String>) -> Self {
        Self { url: url.into(), reason: reason.into(), denied: false }
    }
}
