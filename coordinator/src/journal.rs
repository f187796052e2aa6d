//! Where the facts go that a restarted coordinator must know: `journal.redb` in the state folder.
//!
//! The file holds one run: who it is, a snapshot of its state, and the facts since. A snapshot replaces the facts before it in one
//! transaction, so that the file stays small and a restart fast. Facts that may be late wait up to [`LATEST`] for others to share a write
//! to the disk with.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use redb::{Database, DatabaseError, ReadOnlyDatabase, ReadableDatabase, ReadableTable, ReadableTableMetadata, TableDefinition};
use serde::{Deserialize, Serialize};

use crate::core::{Fact, ReplayError, State};

/// The file of a run in its state folder, for a coordinator that is started again.
pub const JOURNAL: &str = "journal.redb";
/// How late a fact may be on disk that may be late at all.
pub const LATEST: Duration = Duration::from_millis(200);
/// Facts after which a snapshot is taken though no checkpoint was.
const SNAPSHOT_AFTER: u64 = 10_000;
/// Layout that this program writes and reads.
const FORMAT: u32 = 3;

/// The run, as JSON: readable without this program.
const RUN: TableDefinition<'_, &str, &str> = TableDefinition::new("run");
const SNAPSHOT: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("snapshot");
const FACTS: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("facts");
/// The only key of the first two.
const ONLY: &str = "";

/// What a run is recognised by.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Run {
    /// Names it; the same over all starts of its coordinator.
    pub job_id: String,
    /// How often its coordinator was started.
    pub term: u64,
    /// Its number of workers.
    pub world_size: u32,
    /// The job file.
    pub job: String,
    /// SHA-256 of its shards' addresses, hexadecimal.
    pub shards: String,
}

/// Why there is no journal.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// The file cannot be opened, read or written.
    #[error("the journal {} cannot be {what}: {reason}{}", path.display(), what.hint())]
    File {
        /// The file.
        path: PathBuf,
        /// What was to be done with it.
        what: Action,
        /// The reason.
        reason: String,
    },
    /// Another version of this program has written it.
    #[error(
        "the journal {} is of another version of this program (its format is {format}, this one reads {FORMAT}): end its job with that version \
         (`coordinator stop`), or move the file away, and the job goes on from its newest checkpoint",
        path.display()
    )]
    Format {
        /// The file.
        path: PathBuf,
        /// Its format.
        format: u32,
    },
    /// What is written in it makes no sense.
    #[error("the journal {} is damaged: {reason}{}", path.display(), Action::Read.hint())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// In what way.
        reason: String,
    },
}

/// What is done with a journal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// At the start.
    Open,
    /// At the start.
    Read,
    /// While the job runs.
    Write,
}

impl Action {
    /// What to do about a journal of which it fails.
    fn hint(self) -> &'static str {
        match self {
            Self::Open | Self::Read => "; to go on from the newest checkpoint without it, move this file away",
            Self::Write => "; once it can be, the same command goes on with the job",
        }
    }
}

impl std::fmt::Display for Action {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Open => "opened",
            Self::Read => "read",
            Self::Write => "written",
        })
    }
}

/// A run found in a journal.
#[derive(Debug, Clone, PartialEq)]
pub struct Found {
    /// Which.
    pub run: Run,
    /// What all its facts come to.
    pub state: State,
}

/// What lies in a journal that no coordinator has open.
#[derive(Debug, PartialEq)]
pub enum Closed {
    /// A run, closed in order.
    Whole(Box<Found>),
    /// A run whose coordinator was killed, or whose machine failed: to be read it must be mended, which is for a coordinator to do.
    CutShort,
}

/// Looks into a journal and changes nothing. None if it is not there, a coordinator has it open, or it cannot be read.
#[must_use]
pub fn look(path: &Path) -> Option<Closed> {
    let look = || match ReadOnlyDatabase::open(path) {
        Ok(database) => read(&database).ok()?.0.map(|found| Closed::Whole(Box::new(found))),
        Err(DatabaseError::RepairAborted) => Some(Closed::CutShort),
        Err(_) => None,
    };
    // As when it is opened.
    std::panic::catch_unwind(look).unwrap_or(None)
}

/// Writes facts down before anyone hears of them.
pub trait Journal: Send {
    /// Adds a fact. On return it would survive the coordinator's death, unless it [may be late](Fact::may_be_late).
    ///
    /// # Errors
    /// Whatever keeps it from being written; the job must not go on as if it were.
    fn append(&mut self, fact: &Fact) -> Result<(), JournalError>;

    /// On return every fact would survive.
    ///
    /// # Errors
    /// As [`Journal::append`].
    fn flush(&mut self) -> Result<(), JournalError>;

    /// When [`Journal::flush`] is next due.
    fn flush_at(&self) -> Option<Instant>;

    /// Whether it is time to let [`Journal::compact`] replace the facts.
    fn is_long(&self) -> bool;

    /// Replaces all facts by the state they come to.
    ///
    /// # Errors
    /// As [`Journal::append`].
    fn compact(&mut self, state: &State) -> Result<(), JournalError>;
}

/// A journal on disk.
#[derive(Debug)]
pub struct Disk {
    database: Database,
    path: PathBuf,
    /// Facts that are not on disk.
    pending: Vec<Vec<u8>>,
    oldest_pending: Option<Instant>,
    next: u64,
    num_facts: u64,
    checkpoint_since: bool,
}

impl Disk {
    /// Opens a journal, or makes an empty one, and reads what it holds.
    ///
    /// # Errors
    /// [`JournalError`] names the file and says what to do.
    pub fn open(path: &Path) -> Result<(Self, Option<Found>), JournalError> {
        let fail = |what| move |reason: String| JournalError::File { path: path.to_owned(), what, reason };
        // A damaged file can make the library panic where it trusts what it reads.
        let opened = std::panic::catch_unwind(|| Database::create(path).map_err(|error| error.to_string()));
        let database = opened.unwrap_or_else(|_| Err("it is damaged".into())).map_err(fail(Action::Open))?;
        Self::read(database, path)
    }

    fn read(database: Database, path: &Path) -> Result<(Self, Option<Found>), JournalError> {
        let fail = |what| move |reason: String| JournalError::File { path: path.to_owned(), what, reason };
        let read = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| read(&database)));
        let (found, next, num_facts) = match read.unwrap_or_else(|_| Err(ReadError::Damaged("its pages make no sense".into()))) {
            Ok(read) => read,
            Err(ReadError::Format(format)) => return Err(JournalError::Format { path: path.to_owned(), format }),
            Err(ReadError::Damaged(reason)) => return Err(JournalError::Damaged { path: path.to_owned(), reason }),
            Err(ReadError::File(error)) => return Err(fail(Action::Read)(error.to_string())),
        };
        let disk =
            Self { database, path: path.to_owned(), pending: Vec::new(), oldest_pending: None, next, num_facts, checkpoint_since: false };
        Ok((disk, found))
    }

    /// Starts a run, or a further term of the one that was found: nothing else is in the file after it.
    ///
    /// # Errors
    /// [`JournalError::File`].
    pub fn begin(&mut self, run: &Run, state: &State) -> Result<(), JournalError> {
        let text = serde_json::to_string(&Header { format: FORMAT, run: run.clone() }).map_err(|error| self.not_written(&error))?;
        self.replace(Some(&text), state)
    }

    fn not_written(&self, error: &dyn std::fmt::Display) -> JournalError {
        JournalError::File { path: self.path.clone(), what: Action::Write, reason: error.to_string() }
    }

    fn replace(&mut self, run: Option<&str>, state: &State) -> Result<(), JournalError> {
        let bytes = postcard::to_stdvec(state).map_err(|error| self.not_written(&error))?;
        let replace = || -> Result<(), redb::Error> {
            let transaction = self.database.begin_write()?;
            if let Some(run) = run {
                transaction.open_table(RUN)?.insert(ONLY, run)?;
            }
            transaction.open_table(SNAPSHOT)?.insert(ONLY, bytes.as_slice())?;
            transaction.delete_table(FACTS)?;
            transaction.open_table(FACTS)?;
            Ok(transaction.commit()?)
        };
        replace().map_err(|error| self.not_written(&error))?;
        self.pending.clear();
        (self.oldest_pending, self.num_facts, self.checkpoint_since) = (None, 0, false);
        Ok(())
    }
}

impl Journal for Disk {
    fn append(&mut self, fact: &Fact) -> Result<(), JournalError> {
        self.pending.push(postcard::to_stdvec(fact).map_err(|error| self.not_written(&error))?);
        self.checkpoint_since |= matches!(fact, Fact::Checkpoint(_));
        if !fact.may_be_late() {
            return self.flush();
        }
        self.oldest_pending.get_or_insert_with(Instant::now);
        Ok(())
    }

    fn flush(&mut self) -> Result<(), JournalError> {
        if self.pending.is_empty() {
            return Ok(());
        }
        let write = || -> Result<(), redb::Error> {
            let transaction = self.database.begin_write()?;
            {
                let mut facts = transaction.open_table(FACTS)?;
                for (number, bytes) in (self.next..).zip(&self.pending) {
                    facts.insert(number, bytes.as_slice())?;
                }
            }
            Ok(transaction.commit()?)
        };
        write().map_err(|error| self.not_written(&error))?;
        let written = self.pending.len() as u64;
        self.pending.clear();
        self.oldest_pending = None;
        self.next += written;
        self.num_facts += written;
        Ok(())
    }

    fn flush_at(&self) -> Option<Instant> {
        self.oldest_pending.map(|oldest| oldest + LATEST)
    }

    fn is_long(&self) -> bool {
        self.checkpoint_since || self.num_facts + self.pending.len() as u64 >= SNAPSHOT_AFTER
    }

    fn compact(&mut self, state: &State) -> Result<(), JournalError> {
        self.replace(None, state)
    }
}

#[derive(Serialize, Deserialize)]
struct Header {
    format: u32,
    #[serde(flatten)]
    run: Run,
}

#[derive(Deserialize)]
struct Version {
    format: u32,
}

enum ReadError {
    File(redb::Error),
    Format(u32),
    Damaged(String),
}

impl<E: Into<redb::Error>> From<E> for ReadError {
    fn from(error: E) -> Self {
        Self::File(error.into())
    }
}

fn damaged(error: impl std::fmt::Display) -> ReadError {
    ReadError::Damaged(error.to_string())
}

/// What a journal holds, the number of the next fact, and how many there are.
fn read(database: &impl ReadableDatabase) -> Result<(Option<Found>, u64, u64), ReadError> {
    let transaction = database.begin_read()?;
    let run = match transaction.open_table(RUN) {
        Ok(table) => table,
        Err(redb::TableError::TableDoesNotExist(_)) => return Ok((None, 0, 0)),
        Err(error) => return Err(error.into()),
    };
    let Some(text) = run.get(ONLY)? else { return Ok((None, 0, 0)) };
    // Alone first: what else is in it may be of another shape.
    let Version { format } = serde_json::from_str(text.value()).map_err(damaged)?;
    if format != FORMAT {
        return Err(ReadError::Format(format));
    }
    let Header { run, .. } = serde_json::from_str(text.value()).map_err(damaged)?;
    let snapshot = transaction.open_table(SNAPSHOT)?;
    let snapshot = snapshot.get(ONLY)?.ok_or_else(|| damaged("it has no snapshot"))?;
    let mut state: State = postcard::from_bytes(snapshot.value()).map_err(damaged)?;
    let facts = transaction.open_table(FACTS)?;
    let mut next = 0;
    for entry in facts.iter()? {
        let (number, bytes) = entry?;
        let fact: Fact = postcard::from_bytes(bytes.value()).map_err(damaged)?;
        state.apply(fact).map_err(|error: ReplayError| damaged(format!("fact {}: {error}", number.value())))?;
        next = number.value() + 1;
    }
    Ok((Some(Found { run, state }), next, facts.len()?))
}

#[cfg(test)]
mod tests;
