//! What of a job outlives its coordinator: a state that grows by facts, and a core that goes on from it.
//!
//! [`State::apply`] is the only reader of facts. The live core says each fact as it changes, so that at the end of every event the facts so
//! far come to [`Core::durable`]: the journal keeps either.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use peapod_proto::ids::{Epoch, Generation, Incarnation, LeaseId, Rank, ShardId, Step, WorkerId};
use peapod_proto::message::ValidationLosses;
use serde::{Deserialize, Serialize};

use super::data::mark_unreadable;
use super::leases::{HeldLease, Part};
use super::ledger::{Ledger, LedgerError, Skip};
use super::{Config, Core, Fact, JobPhase, Leases, Outcome, Progress, Resume, Truth};

/// A member of a generation, as much of it as tells it from others when it comes back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// Its id.
    pub worker: WorkerId,
    /// Its process.
    pub incarnation: Incarnation,
    /// Its rank, for life.
    pub rank: Rank,
}

/// A reader of a shard that is not done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Reader {
    holder: WorkerId,
    epoch: Epoch,
    shard: ShardId,
    part: Part,
    read: bool,
}

/// What a restarted coordinator knows.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct State {
    next_worker: u64,
    next_lease: LeaseId,
    generation: Generation,
    /// Members of `generation`; none once nobody holds what it came to.
    members: Vec<Member>,
    /// How many it was formed of: fewer are left where some were replaced while they were awaited.
    num_formed: usize,
    /// Where the newest agreed weights are, and which generation trained them.
    truth: (Step, Generation),
    final_step: Step,
    /// The newest checkpoint that was whole.
    checkpoint: Option<Step>,
    ledger: Ledger,
    readers: BTreeMap<LeaseId, Reader>,
    unreadable: BTreeSet<ShardId>,
    skipped_in_a_row: u32,
    validation: Option<ValidationLosses>,
    stop: Option<String>,
    outcome: Option<Outcome>,
}

/// Why a fact cannot follow those before it. Each of them means that the journal is not one that this program has written.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReplayError {
    /// The ledger refuses it.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    /// A generation is not the next one.
    #[error("{got} follows {before}")]
    Generation {
        /// It.
        got: Generation,
        /// The one before.
        before: Generation,
    },
    /// A shard is given to two readers.
    #[error("shard {shard} of epoch {epoch} is given to {holder} under lease {lease} while another reads it, or after it was done")]
    Leased {
        /// The pass.
        epoch: Epoch,
        /// The shard.
        shard: ShardId,
        /// The second reader.
        holder: WorkerId,
        /// Its lease.
        lease: LeaseId,
    },
    /// Something happened after the end.
    #[error("the run went on after its end")]
    Ended,
}

impl State {
    /// How the run ended, if it has.
    #[must_use]
    pub fn outcome(&self) -> Option<&Outcome> {
        self.outcome.as_ref()
    }

    /// Last final step.
    #[must_use]
    pub fn final_step(&self) -> Step {
        self.final_step
    }

    /// Step of the newest checkpoint that was whole, if there was one.
    #[must_use]
    pub fn checkpoint_step(&self) -> Option<Step> {
        self.checkpoint
    }

    /// The last generation.
    #[must_use]
    pub fn generation(&self) -> Generation {
        self.generation
    }

    /// What happened after all that happened before.
    ///
    /// # Errors
    /// [`ReplayError`] if that cannot be; the state is then of no use.
    pub fn apply(&mut self, fact: Fact) -> Result<(), ReplayError> {
        if self.outcome.is_some() {
            return Err(ReplayError::Ended);
        }
        match fact {
            Fact::Joined(worker) => self.next_worker = self.next_worker.max(worker.0 + 1),
            Fact::Generation { generation, members, .. } => {
                if generation <= self.generation {
                    return Err(ReplayError::Generation { got: generation, before: self.generation });
                }
                self.num_formed = members.len();
                (self.generation, self.members) = (generation, members);
            }
            Fact::Leases { holder, leases } => {
                for granted in leases {
                    let (epoch, shard, lease, part) = (granted.epoch, granted.shard, granted.id, granted.part);
                    let is_read =
                        self.readers.values().any(|reader| (reader.epoch, reader.shard) == (epoch, shard) && reader.part.overlaps(part));
                    if is_read || lease < self.next_lease || self.ledger.is_done(epoch, shard) {
                        return Err(ReplayError::Leased { epoch, shard, holder, lease });
                    }
                    self.readers.insert(lease, Reader { holder, epoch, shard, part, read: false });
                    self.next_lease = LeaseId(lease.0 + 1);
                }
            }
            Fact::Replaced(worker) => self.members.retain(|member| member.worker != worker),
            Fact::Released(holders) => {
                self.readers.retain(|_, reader| !holders.contains(&reader.holder));
                // What they read others will read: should they come back, it is not to go on with it.
                self.members.retain(|member| !holders.contains(&member.worker));
            }
            Fact::GaveBack { lease, from } => {
                let Some(reader) = self.readers.get_mut(&lease) else { return Ok(()) };
                (reader.read, reader.part) = (true, reader.part.split(from).0);
                if reader.part.is_empty() {
                    self.readers.remove(&lease);
                }
            }
            Fact::Shard(report) => {
                // Said for a lease that was held.
                let Some(reader) = self.readers.get_mut(&report.lease) else { return Ok(()) };
                let (epoch, shard) = (reader.epoch, reader.shard);
                reader.read |= report.num_samples.is_some();
                mark_unreadable(&mut self.unreadable, shard, &report);
                self.ledger.take_report(epoch, shard, &report, |_| {})?;
                self.end_reading(epoch, shard);
            }
            Fact::Commit { step, names, skipped, .. } => {
                for name in names {
                    if skipped {
                        self.ledger.skip(name, Skip::NotFinite)?;
                    } else {
                        self.ledger.commit(name, step)?;
                    }
                    self.end_reading(name.epoch, name.shard);
                }
                self.skipped_in_a_row = if skipped { self.skipped_in_a_row + 1 } else { 0 };
                self.final_step = step;
            }
            Fact::Validated(losses) => self.validation = Some(losses),
            Fact::Settled { step, generation } => (self.truth, self.final_step) = ((step, generation), step),
            Fact::FromCheckpoint { step, ledger } => {
                if let Some(ledger) = ledger {
                    self.ledger = ledger;
                    self.readers.clear();
                }
                self.members.clear();
                (self.truth, self.final_step) = ((step, Generation::NONE), step);
                self.validation = self.validation.filter(|last| last.step <= step);
            }
            Fact::Checkpoint(step) => self.checkpoint = self.checkpoint.max(Some(step)),
            Fact::Stop(reason) => self.stop = Some(reason),
            Fact::Ended(outcome) => self.outcome = Some(outcome),
        }
        Ok(())
    }

    fn end_reading(&mut self, epoch: Epoch, shard: ShardId) {
        if self.ledger.is_done(epoch, shard) {
            self.readers.retain(|_, reader| (reader.epoch, reader.shard) != (epoch, shard));
        }
    }
}

impl Core {
    /// What the facts so far have come to.
    #[must_use]
    pub fn durable(&self) -> State {
        let reader = |held: HeldLease| {
            let HeldLease { id, holder, epoch, shard, part, read } = held;
            (id, Reader { holder, epoch, shard, part, read })
        };
        State {
            next_worker: self.reserved_ids,
            next_lease: self.leases.next_id(),
            generation: self.generation,
            members: self.last_members.clone(),
            num_formed: self.num_formed,
            truth: (self.truth.step, self.truth.generation),
            final_step: self.progress.final_step(),
            checkpoint: self.checkpoint_step(),
            ledger: self.ledger.clone(),
            readers: self.leases.held().into_iter().map(reader).collect(),
            unreadable: self.unreadable.clone(),
            skipped_in_a_row: self.skipped_in_a_row,
            validation: self.validation,
            stop: self.stop_requested.clone(),
            outcome: match &self.phase {
                JobPhase::Done(outcome) => Some(outcome.clone()),
                _ => None,
            },
        }
    }

    /// A job that goes on after its coordinator was away: it forms no generation and grants no lease before all members of the last one
    /// have come back, or had the heartbeat timeout to do so. `resume` is the newest checkpoint, for the case that none of them does.
    #[must_use]
    pub fn restore(config: Config, resume: Option<Resume>, state: State) -> Self {
        let fresh = Self::new(config, resume);
        let phase = match state.outcome {
            Some(outcome) => JobPhase::Done(outcome),
            None if state.members.is_empty() => fresh.phase.clone(),
            None => JobPhase::Returning { since: Duration::ZERO, deadline: fresh.return_timeout(), said: BTreeMap::new() },
        };
        let from_checkpoint = state.members.is_empty();
        let mut core = Self {
            next_worker: state.next_worker,
            reserved_ids: state.next_worker,
            generation: state.generation.max(fresh.generation),
            phase,
            last_members: state.members,
            num_formed: state.num_formed,
            stop_requested: state.stop,
            ..fresh
        };
        if from_checkpoint {
            // Nobody is to come back: what is in the store is the truth, as at a first start.
            core.leases.restore([], state.next_lease);
            return core;
        }
        core.leases = Leases::new(core.config.seed, &core.config.sources, core.config.epochs, &state.ledger);
        let held = state.readers.into_iter().map(|(id, reader)| {
            let Reader { holder, epoch, shard, part, read } = reader;
            HeldLease { id, holder, epoch, shard, part, read }
        });
        core.leases.restore(held, state.next_lease);
        core.truth = Truth { step: state.truth.0, generation: state.truth.1, holders: BTreeSet::new() };
        core.progress = Progress::start(state.final_step, core.last_members.len() as u32);
        core.ledger = state.ledger;
        core.validation = state.validation;
        core.unreadable = state.unreadable;
        core.skipped_in_a_row = state.skipped_in_a_row;
        core.grant_again = core.last_members.iter().map(|member| member.worker).collect();
        core
    }

    /// The same job in a world of another size: its members may come back with what they hold, and then leave their generation for one of
    /// that size.
    #[must_use]
    pub fn resized(mut self) -> Self {
        // As if one had been replaced: what is not whole is not taken up.
        self.num_formed = self.last_members.len() + 1;
        self
    }

    /// The same job with generations that come after `last`, which an earlier run has had: they are part of the names of checkpoints, and a
    /// copy that is still on its way must find none of its own.
    #[must_use]
    pub fn after(mut self, last: Generation) -> Self {
        self.generation = self.generation.max(last);
        self
    }
}
