//! A disk that fails: at one of its operations, and from then on.

use std::io::{Error, ErrorKind};
use std::sync::{Arc, Mutex, MutexGuard};

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// What a disk writes whole or not at all.
const SECTOR: usize = 512;

#[derive(Debug, Clone)]
enum Operation {
    Write { offset: usize, data: Vec<u8> },
    SetLen(usize),
}

impl Operation {
    fn apply(&self, content: &mut Vec<u8>) {
        match self {
            Self::Write { offset, data } => {
                let end = offset + data.len();
                if content.len() < end {
                    content.resize(end, 0);
                }
                content[*offset..end].copy_from_slice(data);
            }
            Self::SetLen(len) => content.resize(*len, 0),
        }
    }
}

#[derive(Debug, Default)]
struct State {
    /// As whoever reads sees it.
    content: Vec<u8>,
    /// What a power failure leaves for certain.
    synced: Vec<u8>,
    since: Vec<Operation>,
    num_operations: usize,
    fails_at: usize,
}

impl State {
    /// Counts an operation that changes something, unless the disk has failed.
    fn begin(&mut self) -> Result<(), Error> {
        if self.num_operations >= self.fails_at {
            return Err(Error::from(ErrorKind::StorageFull));
        }
        self.num_operations += 1;
        Ok(())
    }
}

/// The disk; clones are the same one.
#[derive(Debug, Clone, Default)]
pub struct Media(Arc<Mutex<State>>);

impl Media {
    /// An empty one, all of whose operations from number `fails_at` on fail.
    pub fn new(fails_at: usize) -> Self {
        Self(Arc::new(Mutex::new(State { fails_at, ..State::default() })))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    fn of(content: Vec<u8>) -> Self {
        Self(Arc::new(Mutex::new(State { synced: content.clone(), content, fails_at: usize::MAX, ..State::default() })))
    }

    pub fn num_operations(&self) -> usize {
        self.state().num_operations
    }

    pub fn has_failed(&self) -> bool {
        let state = self.state();
        state.num_operations >= state.fails_at
    }

    /// One that works, with all that was written to this one.
    pub fn as_written(&self) -> Self {
        Self::of(self.state().content.clone())
    }

    /// One that works, with what was synced of this one, and any of the sectors written since, in any order.
    pub fn after_power_failure(&self, seed: u64) -> Self {
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        let state = self.state();
        let mut content = state.synced.clone();
        for operation in &state.since {
            match operation {
                Operation::SetLen(_) if random.random() => operation.apply(&mut content),
                Operation::SetLen(_) => {}
                Operation::Write { offset, data } => {
                    for (number, sector) in data.chunks(SECTOR).enumerate() {
                        if random.random() {
                            Operation::Write { offset: offset + number * SECTOR, data: sector.to_vec() }.apply(&mut content);
                        }
                    }
                }
            }
        }
        Self::of(content)
    }
}

impl redb::StorageBackend for Media {
    fn len(&self) -> Result<u64, Error> {
        Ok(self.state().content.len() as u64)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), Error> {
        let state = self.state();
        let from = offset as usize;
        let range = state.content.get(from..from + out.len()).ok_or(ErrorKind::UnexpectedEof)?;
        out.copy_from_slice(range);
        Ok(())
    }

    fn set_len(&self, len: u64) -> Result<(), Error> {
        let mut state = self.state();
        state.begin()?;
        let operation = Operation::SetLen(len as usize);
        operation.apply(&mut state.content);
        state.since.push(operation);
        Ok(())
    }

    fn sync_data(&self) -> Result<(), Error> {
        let mut state = self.state();
        state.begin()?;
        state.synced = state.content.clone();
        state.since.clear();
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> Result<(), Error> {
        let mut state = self.state();
        state.begin()?;
        let operation = Operation::Write { offset: offset as usize, data: data.to_vec() };
        operation.apply(&mut state.content);
        state.since.push(operation);
        Ok(())
    }
}
