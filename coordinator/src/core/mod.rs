//! The rules of a job: who is a member, which steps are final, who reads which shard, when it ends.
//!
//! A value without clock, randomness or I/O: [`Core::step`] takes the time and an event and says what is to be done. The
//! driver does it, in order, and a send waits for the persist before it.
//!
//! A generation is left on one of two roads. *Planned* (stop, drain): every member raises a flag in the tail of its next
//! all-reduce, all see it in the same step, apply that step and say [`Stopped`]. *Failure*: every survivor is told to abort,
//! drops the step in flight and says the same. Either way the member with the most advanced step is the source, and what it
//! holds is committed; everything beyond is void, whoever had reported it.

mod activity;
mod checkpoint;
mod data;
mod durable;
mod effect;
mod error;
mod event;
mod formation;
mod hangs;
pub mod leases;
pub mod ledger;
mod membership;
pub mod order;
mod progress;
mod setbacks;
mod settlement;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use peapod_proto::ids::{Generation, Incarnation, MemberIndex, ShardId, Step, WorkerId};
use peapod_proto::message::{Continuing, FromWorker, Stopped, ToWorker, ValidationLosses};

pub use activity::Activity;
use checkpoint::Checkpoint;
use data::LeaseRequest;
pub use data::{LeaseHolder, ShardPage, ShardState, ShardView, SourceView};
use durable::Member;
pub use durable::{ReplayError, State};
pub use effect::{Effect, Fact, Notice, Outcome};
pub use error::CoreError;
pub use event::Event;
use hangs::Pace;
use leases::Leases;
use ledger::Ledger;
pub use ledger::Rules;
use membership::Worker;
pub use membership::WorkerView;
use order::Source;
use progress::Progress;
use setbacks::Setbacks;

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

/// What a member says that comes back to a coordinator which was started again.
#[derive(Debug, Clone)]
enum Returned {
    /// Its generation is over for it.
    Stopped(Stopped),
    /// It trains on.
    Continuing(Continuing),
}

/// What went wrong first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// In one line.
    pub text: String,
    /// When; none within the event that brought it.
    pub at: Option<Timestamp>,
    /// Whose process it was, if it was one: its end may be explained later.
    pub process: Option<Process>,
    /// What the process wrote last, if that is known.
    pub log: Vec<String>,
}

/// A process of a worker, as its host knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Process {
    /// Its host.
    pub host: String,
    /// Its id there.
    pub pid: u32,
}

/// How often the waiting notice is repeated.
const ANNOUNCE_EVERY: Duration = Duration::from_secs(5);

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
    /// Nobody can have been silent for too long before: a sign of life only moves that moment further away, so that looking for it among all
    /// workers when it has come is enough.
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
            Event::GiveUp { reason } => {
                let reason = self.first_failure().map_or_else(|| reason.clone(), |first| format!("{first}; {reason}"));
                self.fail(reason, &mut out);
            }
            Event::Exited { process, cause, log } => self.exited(now, &process, &cause, log, &mut out),
            Event::Stalled { by } => self.stalled(by),
            Event::Drain { rank } => {
                let worker = self.workers.iter().find(|(_, worker)| worker.rank == rank).map(|(&id, _)| id);
                self.leaving(now, worker.ok_or(CoreError::NobodyHasRank(rank))?, "drained on request", &mut out);
            }
        }
        if changes_who_is_missing && matches!(self.phase, JobPhase::Gathering { .. } | JobPhase::Returning { .. }) {
            self.waiting_for = self.describe_missing();
        }
        if let Some(Failure { at: at @ None, .. }) = &mut self.first_failure {
            *at = Some(now);
        }
        Ok(out)
    }

    /// When [`Event::Tick`] is next needed.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Timestamp> {
        let silence = (!self.workers.is_empty()).then_some(self.next_silence);
        let job = match &self.phase {
            // A coordinator that was started again after it was asked to stop.
            JobPhase::Gathering { .. } if self.stop_requested.is_some() => Some(Duration::ZERO),
            JobPhase::Gathering { since } => {
                let at = self.next_announcement.min(*since + self.config.join_timeout);
                Some(self.starts_at().map_or(at, |starts| at.min(starts)))
            }
            JobPhase::Running { .. } => (!self.checkpoint.asked).then_some(self.checkpoint.next_due),
            JobPhase::Forming { deadline, .. } | JobPhase::Stopping { deadline, .. } | JobPhase::Returning { deadline, .. } => {
                Some(*deadline)
            }
            JobPhase::Finishing { deadline, .. } => Some(*deadline),
            JobPhase::Done(_) => None,
        };
        let hangs = (!self.workers.is_empty()).then_some(self.next_look);
        [silence, job, hangs, self.setbacks.next_end()].into_iter().flatten().min()
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
                worker.beat(now, &beat);
                let durable = std::mem::take(&mut worker.tell_durable);
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
                let failure = format!("{} {cause}", worker.name());
                out.push(Effect::Detach { worker: id });
                if permanent && !self.can_do_without(id) {
                    self.workers.remove(&id);
                    self.note_failure(failure.clone());
                    self.fail(failure, out);
                } else {
                    if permanent {
                        self.note_bad_host(now, id, &failure, out);
                    }
                    self.gone.insert(id);
                    self.lose(now, id, &cause, out);
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

    fn look_for_silence(&mut self, now: Timestamp, out: &mut Vec<Effect>) {
        if now < self.next_silence {
            return;
        }
        let timeout = self.config.heartbeat_timeout;
        let (silent, alive): (Vec<_>, Vec<_>) =
            self.workers.iter().map(|(&id, worker)| (worker.last_seen + timeout, id)).partition(|&(at, _)| at <= now);
        self.next_silence = alive.into_iter().map(|(at, _)| at).min().unwrap_or(now + timeout);
        for (_, id) in silent {
            let cause = format!("no sign of life for {:.1} s", timeout.as_secs_f64());
            out.push(Effect::Detach { worker: id });
            self.lose(now, id, &cause, out);
        }
    }

    fn tick(&mut self, now: Timestamp, out: &mut Vec<Effect>) {
        self.look_for_silence(now, out);
        self.look_for_hangs(now, out);
        if self.setbacks.forgive(now) {
            self.admit(out);
        }
        let shards = self.setbacks.forgive_shards(now);
        if !shards.is_empty() {
            shards.into_iter().for_each(|(epoch, shard)| self.leases.take_up(epoch, shard));
            self.answer_lease_requests(out);
        }
        match &self.phase {
            JobPhase::Gathering { .. } if self.stop_requested.is_some() => {
                let reason = self.stop_requested.clone().unwrap_or_default();
                self.ask_for_last_checkpoint(now, Outcome::Stopped { reason }, 1, out);
            }
            JobPhase::Gathering { .. } if self.checkpoint.farewell_until.is_some_and(|until| until <= now) => {
                self.farewell_is_due(now, out)
            }
            JobPhase::Gathering { since } => {
                let (since, left) = (*since, (*since + self.config.join_timeout).saturating_sub(now));
                self.try_form(now, out);
                if !matches!(self.phase, JobPhase::Gathering { .. }) {
                    return;
                }
                if left.is_zero() {
                    let waited = format!("{} for {:.0} s (--join-timeout)", self.describe_missing(), (now - since).as_secs_f64());
                    let reason = match self.first_failure() {
                        Some(first) => format!("{first}; then {waited}"),
                        None => waited,
                    };
                    self.fail(reason, out);
                } else if self.next_announcement <= now {
                    self.next_announcement = now + ANNOUNCE_EVERY;
                    out.push(Effect::Notice(Notice::Waiting { text: self.describe_missing(), left }));
                }
            }
            JobPhase::Running { members, .. } if self.checkpoint.next_due <= now && !self.checkpoint.asked => {
                self.checkpoint.asked = true;
                let message = ToWorker::TakeSnapshot { generation: self.generation };
                out.push(Effect::Send { worker: members[0], message });
            }
            JobPhase::Returning { deadline, .. } if *deadline <= now => self.wait_ended(now, out),
            JobPhase::Finishing { outcome, attempts, deadline } if *deadline <= now => {
                let (outcome, attempts) = (outcome.clone(), *attempts);
                self.last_checkpoint_is_due(now, outcome, attempts, out);
            }
            JobPhase::Forming { deadline, members } if *deadline <= now => {
                let id = members[0];
                self.did_not_answer(now, id, "did not open its end of the collective in time", out);
            }
            JobPhase::Stopping { members, stopped, deadline, .. } if *deadline <= now => {
                let mute: Vec<WorkerId> = members.iter().copied().filter(|member| !stopped.contains_key(member)).collect();
                for id in mute {
                    self.did_not_answer(now, id, "did not leave its collective in time", out);
                }
            }
            _ => {}
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

    fn fail(&mut self, reason: String, out: &mut Vec<Effect>) {
        if matches!(self.phase, JobPhase::Done(_)) {
            return;
        }
        self.finish(Outcome::Failed { reason }, out);
    }

    fn note_failure(&mut self, text: String) {
        self.first_failure.get_or_insert(Failure { text, at: None, process: None, log: Vec::new() });
    }

    /// A failure that is the end of a worker's process, or of its stream.
    fn note_loss(&mut self, text: String, worker: &Worker) {
        let process = Some(Process { host: worker.host.clone(), pid: worker.pid });
        self.first_failure.get_or_insert(Failure { text, at: None, process, log: Vec::new() });
    }

    /// A process has ended, and its parent knows how. Its stream may not have ended yet, or have ended without a cause.
    fn exited(&mut self, now: Timestamp, process: &Process, cause: &str, log: Vec<String>, out: &mut Vec<Effect>) {
        let of_process = |worker: &Worker| worker.pid == process.pid && worker.host == process.host;
        if let Some(id) = self.workers.iter().find(|(_, worker)| of_process(worker)).map(|(&id, _)| id) {
            out.push(Effect::Detach { worker: id });
            self.gone.insert(id);
            self.lose(now, id, cause, out);
        }
        if let Some(first) = self.first_failure.as_mut().filter(|first| first.process.as_ref() == Some(process) && first.log.is_empty()) {
            first.log = log;
            if !first.text.contains(cause) {
                first.text = format!("{}; the process {cause}", first.text);
                out.push(Effect::Notice(Notice::Explained { failure: first.clone() }));
            }
        }
    }

    /// The coordinator itself stood still: what it has not heard meanwhile is nobody's silence.
    fn stalled(&mut self, by: Duration) {
        for worker in self.workers.values_mut() {
            worker.last_seen += by;
            worker.motion.stood_still(by);
        }
        self.pace.pause();
        self.next_look += by;
        match &mut self.phase {
            JobPhase::Forming { deadline, .. }
            | JobPhase::Stopping { deadline, .. }
            | JobPhase::Returning { deadline, .. }
            | JobPhase::Finishing { deadline, .. } => *deadline += by,
            JobPhase::Gathering { since } => *since += by,
            JobPhase::Running { .. } | JobPhase::Done(_) => {}
        }
    }

    /// Whether nothing is left to train: the weights are those of the last step, or every sample of every epoch is in them.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        let at_its_last_step = self.config.last_step.is_some_and(|last| self.truth.step >= last);
        at_its_last_step || (self.config.epochs.is_some() && self.unaccounted().is_none())
    }

    /// A job that came to its end before this coordinator was started: it can be asked about, and nobody joins it.
    #[must_use]
    pub fn over(mut self) -> Self {
        self.phase = JobPhase::Done(Outcome::Finished);
        self
    }

    /// How the job ended, if it has.
    #[must_use]
    pub fn outcome(&self) -> Option<&Outcome> {
        match &self.phase {
            JobPhase::Done(outcome) => Some(outcome),
            _ => None,
        }
    }

    /// Silence after which a worker is dead.
    #[must_use]
    pub fn heartbeat_timeout(&self) -> Duration {
        self.config.heartbeat_timeout
    }

    /// The current generation.
    #[must_use]
    pub fn generation(&self) -> Generation {
        self.generation
    }

    /// Last final step.
    #[must_use]
    pub fn final_step(&self) -> Step {
        self.progress.final_step()
    }

    /// The ledger.
    #[must_use]
    pub fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    /// Number of shards of the ledger's first open epoch that are leased now.
    #[must_use]
    pub fn num_leased(&self) -> u32 {
        self.leases.num_leased(self.ledger.first_open_epoch(), 0..self.ledger.num_shards())
    }

    /// The workers, by rank.
    #[must_use]
    pub fn workers(&self, now: Timestamp) -> Vec<WorkerView> {
        let members = self.members();
        let mut views: Vec<WorkerView> = self.workers.iter().map(|(&id, worker)| worker.view(id, now, members.contains(&id))).collect();
        views.sort_by_key(|view| view.rank);
        views
    }

    /// The job's state in a few words.
    #[must_use]
    pub fn state(&self) -> String {
        match &self.phase {
            JobPhase::Gathering { .. } => self.describe_missing(),
            JobPhase::Returning { .. } => "waiting for the workers to come back".into(),
            JobPhase::Forming { .. } => "forming".into(),
            JobPhase::Running { planned: false, .. } => "training".into(),
            JobPhase::Running { planned: true, .. } => "training, to meet after this step".into(),
            JobPhase::Stopping { .. } => "regrouping".into(),
            JobPhase::Finishing { .. } => "storing the last checkpoint".into(),
            JobPhase::Done(outcome) => outcome.as_str().into(),
        }
    }

    /// Step of the newest whole checkpoint.
    #[must_use]
    pub fn checkpoint_step(&self) -> Option<Step> {
        self.checkpoint.last.as_ref().map(|last| last.step)
    }

    /// The newest losses on the validation samples.
    #[must_use]
    pub fn validation(&self) -> Option<ValidationLosses> {
        self.validation
    }

    /// The first failure, in one line.
    #[must_use]
    pub fn first_failure(&self) -> Option<&str> {
        self.first_failure.as_ref().map(|first| first.text.as_str())
    }

    /// The first failure with all that is known about it.
    #[must_use]
    pub fn failure(&self) -> Option<&Failure> {
        self.first_failure.as_ref()
    }
}

fn worker_mut(workers: &mut BTreeMap<WorkerId, Worker>, id: WorkerId, change: impl FnOnce(&mut Worker)) {
    if let Some(worker) = workers.get_mut(&id) {
        change(worker);
    }
}
