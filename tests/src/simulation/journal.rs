//! What outlives a coordinator: its journal, without what was not written yet, and the store of checkpoints.

use std::collections::BTreeMap;
use std::sync::Arc;

use peapod_coordinator::core::ledger::Ledger;
use peapod_coordinator::core::{Fact, Resume, State};
use peapod_coordinator::journal::LATEST;
use peapod_proto::ids::{Generation, Step};

use super::queue::Time;
use super::weights::Weights;

/// The journal, as [`peapod_coordinator::journal::Disk`] keeps it.
#[derive(Default)]
pub struct Journal {
    /// The run, its world size, and what the facts on disk come to.
    pub on_disk: Option<(String, u32, State)>,
    pending: Vec<Fact>,
    oldest_pending: Option<Time>,
    checkpoint_since: bool,
}

impl Journal {
    /// Starts a run or a term of it.
    pub fn begin(&mut self, job_id: String, world_size: u32, state: State) {
        *self = Self { on_disk: Some((job_id, world_size, state)), ..Self::default() };
    }

    /// Adds a fact, on disk at once unless it may be late.
    pub fn append(&mut self, now: Time, fact: Fact) -> Result<(), String> {
        let may_be_late = fact.may_be_late();
        self.checkpoint_since |= matches!(fact, Fact::Checkpoint(_));
        self.pending.push(fact);
        if !may_be_late {
            return self.flush();
        }
        self.oldest_pending.get_or_insert(now);
        Ok(())
    }

    /// Everything is on disk after it.
    pub fn flush(&mut self) -> Result<(), String> {
        self.oldest_pending = None;
        let Some((_, _, state)) = &mut self.on_disk else { return Err("a journal without a run".into()) };
        for fact in self.pending.drain(..) {
            let text = format!("{fact:?}");
            state.apply(fact).map_err(|error| format!("the journal cannot be replayed: {error}, at {text}"))?;
        }
        Ok(())
    }

    /// When it is to be flushed.
    pub fn flush_at(&self) -> Option<Time> {
        self.oldest_pending.map(|oldest| oldest + LATEST)
    }

    /// Whether a snapshot is due.
    pub fn is_long(&self) -> bool {
        self.checkpoint_since
    }

    /// A snapshot takes the place of the facts, and is what they come to.
    pub fn compact(&mut self, state: &State) -> Result<(), String> {
        self.flush()?;
        self.checkpoint_since = false;
        self.agrees(state)
    }

    /// Whether the facts so far come to `state`.
    pub fn agrees(&self, state: &State) -> Result<(), String> {
        let Some((_, _, replayed)) = &self.on_disk else { return Ok(()) };
        let mut replayed = replayed.clone();
        for fact in &self.pending {
            replayed.apply(fact.clone()).map_err(|error| error.to_string())?;
        }
        if replayed == *state { Ok(()) } else { Err(format!("the journal says\n{replayed:?}\nand the core is\n{state:?}")) }
    }

    /// The coordinator dies with what it had not written.
    pub fn lose_pending(&mut self) {
        self.pending.clear();
        self.oldest_pending = None;
    }
}

/// A whole checkpoint.
#[derive(Clone)]
pub struct Stored {
    /// Its weights.
    pub weights: Weights,
    /// Its ledger.
    pub ledger: Arc<Ledger>,
}

/// The store: only what is whole is in it.
#[derive(Default)]
pub struct Store {
    checkpoints: BTreeMap<(Step, Generation), Stored>,
}

impl Store {
    /// Makes a checkpoint whole; refuses a second one of the same name.
    pub fn seal(&mut self, step: Step, generation: Generation, stored: Stored) -> Result<(), String> {
        if self.checkpoints.contains_key(&(step, generation)) {
            return Err(format!("step {step} of {generation} is stored already"));
        }
        self.checkpoints.insert((step, generation), stored);
        Ok(())
    }

    /// Takes one away that is not on the line of weights that goes on.
    pub fn remove(&mut self, step: Step, generation: Generation) {
        self.checkpoints.remove(&(step, generation));
    }

    /// Forgets all but the newest.
    pub fn retain(&mut self, keep: usize) {
        while self.checkpoints.len() > keep {
            self.checkpoints.pop_first();
        }
    }

    /// The one of `step` that was made last.
    pub fn find(&self, step: Step) -> Option<&Stored> {
        self.checkpoints.iter().rfind(|((stored, _), _)| *stored == step).map(|(_, stored)| stored)
    }

    /// The newest.
    pub fn newest(&self) -> Option<(Resume, &Stored)> {
        let (&(step, generation), stored) = self.checkpoints.last_key_value()?;
        Some((Resume { step, ledger: stored.ledger.clone(), generation }, stored))
    }
}
