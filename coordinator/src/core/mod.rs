//! The rules of a job: who is a member, which steps are final, who reads which shard, when it ends.
//!
//! A value without clock, randomness or I/O: [`Core::step`] takes the time and an event and says what is to be done. The
//! driver does it, in order, and a send waits for the persist before it.
//!
//! A generation is left on one of two roads. *Planned* (stop, drain): every member raises a flag in the tail of its next
//! all-reduce, all see it in the same step, apply that step and say [`Stopped`]. *Failure*: every survivor is told to abort,
//! drops the step in flight and says the same. Either way the member with the most advanced step is the source, and what it
//! holds is committed; everything beyond is void, whoever had reported it.

mod checkpoint;
mod clock;
mod data;
mod durable;
mod effect;
mod error;
mod event;
mod failure;
mod fit;
mod formation;
mod hangs;
pub mod leases;
pub mod ledger;
mod membership;
pub mod order;
mod progress;
mod returning;
mod setbacks;
mod settlement;
#[cfg(test)]
pub(crate) mod tests;
mod view;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use peapod_proto::ids::{Generation, Incarnation, MemberIndex, ShardId, Step, WorkerId};
use peapod_proto::message::{FromWorker, Stopped, ToWorker, ValidationLosses};

use checkpoint::Checkpoint;
use clock::ANNOUNCE_EVERY;
use data::LeaseRequest;
pub use data::{LeaseHolder, ShardPage, ShardState, ShardView, SourceView};
use durable::Member;
pub use durable::{ReplayError, State};
pub use effect::{Effect, Fact, Notice, Outcome};
pub use error::CoreError;
pub use event::Event;
pub use failure::{Failure, Process};
use fit::Fit;
use hangs::Pace;
use leases::Leases;
use ledger::Ledger;
pub use ledger::Rules;
use membership::Worker;
pub use membership::WorkerView;
use order::Source;
use progress::Progress;
use returning::Returned;
use setbacks::Setbacks;
pub use view::Activity;

/// Time since the coordinator started.
pub type Timestamp = Duration;

/// One stream of one worker. Never reused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StreamId(pub u64);

/// What does not change while the coordinator runs.
#[derive(Debug, Clone)]
pub struct Config {
    /// Members of a whole world.
    pub world_size: u32,
    /// Members that are enough for a generation; the world size, unless it is elastic.
    pub min_world_size: u32,
    /// Silence after which a worker is dead.
    pub heartbeat_timeout: Duration,
    /// How long a job waits for missing ranks before it ends.
    pub join_timeout: Duration,
    /// How long a worker may wait for a store from which nothing comes: it gives up by itself before.
    pub data_patience: Duration,
    /// Names this run.
    pub job_id: String,
    /// The job file's text, handed to each worker.
    pub job_toml: String,
    /// Seed of the shard order.
    pub seed: u64,
    /// Addresses of the shards, source by source.
    pub shards: Arc<[String]>,
    /// The sources these are of.
    pub sources: Arc<[Source]>,
    /// Passes over the data, if the job is given in them.
    pub epochs: Option<u32>,
    /// Last step, if the job is given in steps.
    pub last_step: Option<Step>,
    /// Whether all workers are started alike, on one machine, once (`--local`): what one of them cannot do, none can, and no other comes.
    pub workers_are_alike: bool,
    /// Samples in a step of a whole world.
    pub global_batch: u32,
    /// Whether a smaller world has smaller steps.
    pub scale_batch: bool,
    /// Time between checkpoints.
    pub checkpoint_every: Duration,
    /// Share of broken samples that ends the job.
    pub max_bad_fraction: f64,
    /// Steps in a row that may be skipped.
    pub max_skipped_steps: u32,
}

/// A checkpoint to start from.
#[derive(Debug, Clone)]
pub struct Resume {
    /// Its step.
    pub step: Step,
    /// What it has been trained on.
    pub ledger: Arc<Ledger>,
    /// The last generation before it.
    pub generation: Generation,
}

/// Where the newest agreed weights are.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Truth {
    step: Step,
    /// Generation that trained it.
    generation: Generation,
    /// Live workers that hold it whole. Empty: it comes from the checkpoint, or is made fresh at step 0.
    holders: BTreeSet<WorkerId>,
}

/// What the job as a whole is doing.
#[derive(Debug, Clone)]
enum JobPhase {
    /// Waiting until enough workers are ready.
    Gathering { since: Timestamp },
    /// The coordinator was away, or all who hold the newest weights are: members of the last generation are waited for.
    Returning { since: Timestamp, deadline: Timestamp, said: BTreeMap<WorkerId, Returned> },
    /// Member index 0 makes the bootstrap.
    Forming { deadline: Timestamp, members: Vec<WorkerId> },
    /// Training.
    Running { members: Vec<WorkerId>, planned: bool },
    /// Members leave their collective and say what they hold. Unless aborted, some may still be in the step they all meet after.
    Stopping { members: Vec<WorkerId>, stopped: BTreeMap<WorkerId, Stopped>, deadline: Timestamp, aborted: bool },
    /// The last checkpoint is on its way.
    Finishing { outcome: Outcome, attempts: u32, deadline: Timestamp },
    /// Over.
    Done(Outcome),
}

/// The state of a job.
#[derive(Debug, Clone)]
pub struct Core {
    config: Config,
    next_worker: u64,
    /// Ids below this are written down as given out, some of them ahead of their workers.
    reserved_ids: u64,
    workers: BTreeMap<WorkerId, Worker>,
    generation: Generation,
    /// Members of the last generation, while any of them may hold what it came to.
    last_members: Vec<Member>,
    /// How many it was formed of, with those that were replaced since.
    num_formed: usize,
    /// Holders of the newest weights that were lost since these were agreed on; perhaps only cut off.
    cut_off: BTreeSet<WorkerId>,
    /// Workers whose process is known to have ended: they are not waited for.
    gone: BTreeSet<WorkerId>,
    /// Those that have not answered in time since a step was final.
    mute: BTreeSet<Incarnation>,
    /// Whom leases given out before a restart may not have reached: its first request is answered with all that it holds.
    grant_again: BTreeSet<WorkerId>,
    phase: JobPhase,
    truth: Truth,
    ledger: Ledger,
    leases: Leases,
    /// Members that wait for leases.
    lease_requests: BTreeMap<WorkerId, LeaseRequest>,
    progress: Progress,
    checkpoint: Checkpoint,
    /// The newest one on this line of weights.
    validation: Option<ValidationLosses>,
    first_failure: Option<Failure>,
    pace: Pace,
    setbacks: Setbacks,
    /// The generation that was left because nobody got out of its all-reduce: its members' words tell where the network is broken.
    hung: Option<Generation>,
    /// When hangs are looked for again.
    next_look: Timestamp,
    /// Nobody can have been silent for too long before: a sign of life only moves that moment further away, so that looking for it among
    /// all workers when it has come is enough.
    next_silence: Timestamp,
    stop_requested: Option<String>,
    next_announcement: Timestamp,
    /// When the last worker joined or became ready.
    last_arrival: Timestamp,
    /// Who is missing, in words.
    waiting_for: String,
    bad_shown: u64,
    /// Shards of which nothing at all could be read.
    unreadable: BTreeSet<ShardId>,
    /// Sources of which a whole epoch went by without a sample, and nothing was trained since.
    barren: BTreeSet<usize>,
    fit: Fit,
    skipped_in_a_row: u32,
}

impl Core {
    /// A job that starts fresh, or from a checkpoint.
    #[must_use]
    pub fn new(config: Config, resume: Option<Resume>) -> Self {
        let fresh = || Ledger::of_sources(config.sources.iter().map(|source| source.num_shards));
        let ledger = resume.as_ref().map_or_else(fresh, |resume| (*resume.ledger).clone());
        let step = resume.as_ref().map_or(Step(0), |resume| resume.step);
        let leases = Leases::new(config.seed, &config.sources, config.epochs, &ledger);
        let next_due = config.checkpoint_every;
        Self {
            next_worker: 1,
            reserved_ids: 1,
            workers: BTreeMap::new(),
            generation: resume.as_ref().map_or(Generation::NONE, |resume| resume.generation),
            last_members: Vec::new(),
            num_formed: 0,
            cut_off: BTreeSet::new(),
            gone: BTreeSet::new(),
            mute: BTreeSet::new(),
            grant_again: BTreeSet::new(),
            phase: JobPhase::Gathering { since: Duration::ZERO },
            truth: Truth { step, generation: Generation::NONE, holders: BTreeSet::new() },
            ledger,
            leases,
            lease_requests: BTreeMap::new(),
            progress: Progress::new(step),
            checkpoint: Checkpoint {
                last: resume,
                frozen: BTreeMap::new(),
                senders: BTreeMap::new(),
                farewell_until: None,
                silent: BTreeSet::new(),
                next_due,
                asked: false,
                farewells: 0,
            },
            validation: None,
            first_failure: None,
            pace: Pace::default(),
            setbacks: Setbacks::default(),
            hung: None,
            next_look: Duration::ZERO,
            next_silence: Duration::ZERO,
            stop_requested: None,
            next_announcement: ANNOUNCE_EVERY,
            last_arrival: Duration::ZERO,
            waiting_for: String::new(),
            bad_shown: 0,
            unreadable: BTreeSet::new(),
            barren: BTreeSet::new(),
            fit: Fit::default(),
            skipped_in_a_row: 0,
            config,
        }
    }

    /// Applies one event at `now`. On `Err` nothing has changed.
    ///
    /// # Errors
    /// [`CoreError`] says why the event is refused.
    pub fn step(&mut self, now: Timestamp, event: Event) -> Result<Vec<Effect>, CoreError> {
        let mut out = Vec::new();
        if matches!(self.phase, JobPhase::Done(_)) && !matches!(event, Event::Hello { .. }) {
            return Ok(out);
        }
        let changes_who_is_missing =
            !matches!(&event, Event::Message { message: FromWorker::Heartbeat(_) | FromWorker::StepReport(_), .. });
        match event {
            Event::Hello { stream, hello } => self.hello(now, stream, hello, &mut out)?,
            Event::Message { worker, stream, message } => self.message(now, worker, stream, message, &mut out)?,
            Event::Closed { worker, stream, cause } => {
                if self.workers.get(&worker).is_some_and(|known| known.stream == stream) {
                    self.lose(now, worker, &cause, &mut out);
                }
            }
            Event::Tick => self.tick(now, &mut out),
            Event::CheckpointStored { step, generation } => self.checkpoint_stored(now, step, generation, &mut out),
            Event::CheckpointFailed { step, generation, error } => self.checkpoint_failed(now, step, generation, &error, &mut out),
            Event::Stop { reason } => self.stop(now, reason, &mut out),
            // Its end is near, and whoever brings it about lives: those that are gone are not needed.
            Event::GiveUp { .. } if self.is_finishing() => {}
            Event::GiveUp { reason } => {
                let reason = self.first_failure().map_or_else(|| reason.clone(), |first| format!("{first}; {reason}"));
                self.give_up_job(now, reason, &mut out);
            }
            Event::Exited { process, cause, log } => self.exited(now, &process, &cause, log, &mut out),
            Event::Stalled { by } => self.stalled(by),
            Event::Drain { rank } => {
                let worker = self.workers.iter().find(|(_, worker)| worker.rank == rank).map(|(&id, _)| id);
                let worker = worker.ok_or(CoreError::NobodyHasRank(rank))?;
                self.can_be_spared(worker, rank)?;
                self.leaving(now, worker, "drained on request", &mut out);
            }
        }
        if changes_who_is_missing && matches!(self.phase, JobPhase::Gathering { .. } | JobPhase::Returning { .. }) {
            let missing = self.describe_missing();
            if missing != self.waiting_for {
                self.waiting_for = missing;
                self.next_announcement = self.next_announcement.min(now + ANNOUNCE_EVERY);
            }
        }
        if let Some(Failure { at: at @ None, .. }) = &mut self.first_failure {
            *at = Some(now);
        }
        Ok(out)
    }

    fn message(
        &mut self,
        now: Timestamp,
        id: WorkerId,
        stream: StreamId,
        message: FromWorker,
        out: &mut Vec<Effect>,
    ) -> Result<(), CoreError> {
        let worker = self.workers.get_mut(&id).filter(|worker| worker.stream == stream).ok_or(CoreError::StaleStream)?;
        worker.last_seen = now;
        match message {
            FromWorker::Hello(_) => {
                return Err(CoreError::Unexpected { what: "hello", worker: id, why: "a stream has one".into() });
            }
            FromWorker::Ready { model_digest, num_parameters } => self.ready(now, id, model_digest, num_parameters, out)?,
            FromWorker::Heartbeat(beat) => {
                let has_fetched = worker.beat(now, &beat);
                let durable = std::mem::take(&mut worker.tell_durable);
                if let JobPhase::Gathering { since } = &mut self.phase
                    && has_fetched
                {
                    // How long a model takes to come is no reason to end the job, as long as it comes.
                    *since = now;
                }
                out.push(Effect::Send {
                    worker: id,
                    message: ToWorker::HeartbeatReply {
                        generation: self.generation,
                        running: matches!(
                            self.phase,
                            JobPhase::Running { .. } | JobPhase::Stopping { aborted: false, .. } | JobPhase::Returning { .. }
                        ),
                        waiting_for: self.waiting_for().to_owned(),
                    },
                });
                if durable {
                    let (generation, step) = (self.generation, self.progress.final_step());
                    out.push(Effect::Send { worker: id, message: ToWorker::Durable { generation, step } });
                }
            }
            FromWorker::Bootstrap { generation, bytes } => self.bootstrap(now, id, generation, bytes, out)?,
            FromWorker::StepReport(report) if matches!(self.phase, JobPhase::Returning { .. }) => {
                self.fence(report.generation)?;
                self.trained_on(id, report);
            }
            FromWorker::StepReport(report) => {
                self.fence(report.generation)?;
                let index = self.member_index(id, "step report")?;
                worker_mut(&mut self.workers, id, |worker| worker.stepped(now, report.step));
                self.progress.report(index, report);
                self.advance(now, out);
            }
            FromWorker::Stopped(stopped) => self.member_stopped(now, id, stopped, out)?,
            FromWorker::Continuing(continuing) => self.continuing(now, id, continuing, out)?,
            FromWorker::LeaseRequest { generation, num_leases, is_idle } => {
                self.fence(generation)?;
                let index = self.lease_index(id)?;
                self.grant_leases(id, LeaseRequest::new(index, num_leases, is_idle), out);
            }
            FromWorker::GaveBack { lease, from } => self.gave_back(id, lease, from, out),
            FromWorker::ShardReport(report) => self.shard_report(id, report, out),
            FromWorker::Failure { phase, message, permanent } => {
                let cause = format!("failed in phase {phase}: {message}");
                let (rank, failure) = (worker.rank, format!("{} {cause}", worker.name()));
                out.push(Effect::Detach { worker: id });
                if !permanent {
                    self.gone.insert(id);
                    self.lose(now, id, &cause, out);
                } else if self.can_do_without(id) {
                    self.note_bad_host(now, id, &failure, out);
                    self.gone.insert(id);
                    self.lose(now, id, &cause, out);
                } else if self.can_wait_for_another(id) {
                    // Should nobody better come, this is why.
                    self.note_failure(failure);
                    self.setbacks.could_not_load(rank);
                    self.gone.insert(id);
                    self.lose(now, id, &cause, out);
                } else {
                    self.workers.remove(&id);
                    self.note_failure(failure.clone());
                    self.fail(failure, out);
                }
            }
            FromWorker::Leaving { reason } => self.leaving(now, id, &reason, out),
        }
        Ok(())
    }

    /// The fence: work of an older membership is void, whatever it says. Heartbeats are not fenced; they only say that a
    /// process lives.
    fn fence(&self, got: Generation) -> Result<(), CoreError> {
        if got == self.generation { Ok(()) } else { Err(CoreError::StaleGeneration { got, current: self.generation }) }
    }

    /// Members of the generation that runs or is being left.
    fn members(&self) -> &[WorkerId] {
        match &self.phase {
            JobPhase::Running { members, .. } | JobPhase::Stopping { members, .. } => members,
            _ => &[],
        }
    }

    /// The samples that a step of `num_members` has.
    fn global_batch(&self, num_members: u32) -> u32 {
        let Config { global_batch, scale_batch, world_size, .. } = self.config;
        if !scale_batch {
            return global_batch;
        }
        let scaled = u64::from(global_batch) * u64::from(num_members) / u64::from(world_size);
        // No larger than it was, and checked to be no less than the world size.
        (scaled as u32).max(num_members)
    }

    fn member_index(&self, id: WorkerId, what: &'static str) -> Result<MemberIndex, CoreError> {
        let index = self.members().iter().position(|&member| member == id);
        index.map(|index| MemberIndex(index as u32)).ok_or_else(|| CoreError::Unexpected {
            what,
            worker: id,
            why: "it is not a member".into(),
        })
    }

    /// The member that asks for a lease; of a generation that may be taken up too.
    fn lease_index(&self, id: WorkerId) -> Result<MemberIndex, CoreError> {
        let awaited = matches!(self.phase, JobPhase::Returning { .. }).then_some(&self.last_members);
        match awaited.and_then(|members| members.iter().position(|member| member.worker == id)) {
            Some(index) => Ok(MemberIndex(index as u32)),
            None => self.member_index(id, "lease request"),
        }
    }

    fn stop(&mut self, now: Timestamp, reason: String, out: &mut Vec<Effect>) {
        if self.stop_requested.is_some() {
            return;
        }
        self.stop_requested = Some(reason.clone());
        out.push(Effect::Persist(Fact::Stop(reason.clone())));
        match &self.phase {
            JobPhase::Running { .. } => self.plan(&reason, out),
            // Carried out once all have stopped; or the job ends already, and only if that fails is this its end.
            JobPhase::Stopping { .. } | JobPhase::Returning { .. } | JobPhase::Finishing { .. } | JobPhase::Done(_) => {}
            _ => self.ask_for_last_checkpoint(now, Outcome::Stopped { reason }, 1, out),
        }
    }

    /// Whether the last checkpoint is on its way from somebody who lives.
    fn is_finishing(&self) -> bool {
        matches!(self.phase, JobPhase::Finishing { .. }) && self.truth.holders.iter().any(|holder| self.workers.contains_key(holder))
    }

    /// Nobody will come whom the job could go on with. What those hold who are left is kept, where no generation is to be left first.
    fn give_up_job(&mut self, now: Timestamp, reason: String, out: &mut Vec<Effect>) {
        let is_held = self.truth.holders.iter().any(|holder| self.workers.contains_key(holder));
        if is_held && matches!(self.phase, JobPhase::Gathering { .. }) {
            self.ask_for_last_checkpoint(now, Outcome::Failed { reason }, 1, out);
        } else {
            self.fail(reason, out);
        }
    }

    fn fail(&mut self, reason: String, out: &mut Vec<Effect>) {
        if matches!(self.phase, JobPhase::Done(_)) {
            return;
        }
        self.finish(Outcome::Failed { reason }, out);
    }

    /// A job that came to its end before this coordinator was started: it can be asked about, and nobody joins it.
    #[must_use]
    pub fn over(mut self) -> Self {
        self.phase = JobPhase::Done(Outcome::Finished);
        self
    }
}

fn worker_mut(workers: &mut BTreeMap<WorkerId, Worker>, id: WorkerId, change: impl FnOnce(&mut Worker)) {
    if let Some(worker) = workers.get_mut(&id) {
        change(worker);
    }
}
