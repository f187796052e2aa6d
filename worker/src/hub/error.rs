//! What keeps a model from being fetched, in words that say what to do.

use std::io;
use std::path::PathBuf;

use peapod_model::hub::{HubName, current_folder};

/// Why a model could not be fetched.
#[derive(Debug, thiserror::Error)]
pub enum HubError {
    /// It is neither here nor there.
    #[error("{name}: there is no such file or folder in {}, and {endpoint} has no model of this name{but}", current_folder())]
    Missing {
        /// As it was given.
        name: HubName,
        /// The hub that was asked.
        endpoint: String,
        /// What else it may be, in words: another revision, one that is shown to its owner alone.
        but: String,
    },
    /// It is there, but not for everybody.
    #[error(
        "{name}: there is no such file or folder in {}, and {endpoint} denies access to a model of this name ({reason}, {asked}): if the name is right, \
         accept the model's terms on {endpoint}/{} and set HF_TOKEN to a token of that account",
        current_folder(),
        .name.repository()
    )]
    Denied {
        /// As it was given.
        name: HubName,
        /// The hub that was asked.
        endpoint: String,
        /// What it said.
        reason: String,
        /// Whether a token was shown, in words.
        asked: &'static str,
    },
    /// The hub does not answer, or not as a hub.
    #[error(
        "{name}: there is no such file or folder in {}, and it could not be fetched: {reason}; where the hub can be reached, `worker fetch {name}` \
         puts it into the cache, which HF_HOME moves",
        current_folder()
    )]
    Unreachable {
        /// As it was given.
        name: HubName,
        /// What happened last.
        reason: String,
    },
    /// The repository holds no model.
    #[error("{name}: none of the {num_files} files that {endpoint} has of it is one that is loaded")]
    NoModel {
        /// As it was given.
        name: HubName,
        /// The hub that was asked.
        endpoint: String,
        /// How many files there are.
        num_files: usize,
    },
    /// What came is not what was listed.
    #[error("{name}: {file} arrived damaged twice: its SHA-256 is {found}, the hub lists {expected}; is there a proxy between?")]
    Damaged {
        /// As it was given.
        name: HubName,
        /// The file in the repository.
        file: String,
        /// Of what arrived.
        found: String,
        /// What the hub says.
        expected: String,
    },
    /// The cache cannot hold it.
    #[error("{name}: its files take {needed}, {free} are free in the cache {cache}: make room, or set HF_HOME to a folder elsewhere")]
    NoSpace {
        /// As it was given.
        name: HubName,
        /// What is still to be fetched.
        needed: String,
        /// What is free.
        free: String,
        /// The folder.
        cache: String,
    },
    /// The cache cannot be written.
    #[error(
        "{name}: there is no such file or folder in {}, and it cannot be fetched into the hub's cache, which HF_HOME moves: {path}: {source}",
        current_folder()
    )]
    Cache {
        /// As it was given.
        name: HubName,
        /// File or folder.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// It would have to be fetched.
    #[error(
        "{name}: there is no such file or folder in {}, it is not in the hub's cache either, and HF_HUB_OFFLINE forbids to fetch it",
        current_folder()
    )]
    Offline {
        /// As it was given.
        name: HubName,
    },
    /// Nothing says where the cache is.
    #[error("{name}: neither HF_HOME nor HOME says where the hub's cache is")]
    NoCache {
        /// As it was given.
        name: HubName,
    },
}

impl HubError {
    /// Whether another machine, or a later time, would see the same.
    #[must_use]
    pub fn is_permanent(&self) -> bool {
        match self {
            Self::Missing { .. } | Self::Denied { .. } | Self::NoModel { .. } | Self::NoCache { .. } | Self::Offline { .. } => true,
            Self::Cache { source, .. } => matches!(source.kind(), io::ErrorKind::ReadOnlyFilesystem | io::ErrorKind::PermissionDenied),
            Self::Unreachable { .. } | Self::Damaged { .. } | Self::NoSpace { .. } => false,
        }
    }
}
