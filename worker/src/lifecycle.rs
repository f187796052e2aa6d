//! A worker's life as rules: what it does when something is said to it or happens in it. No sockets, tensors or clock.
//!
//! ```text
//! Joining -> Loading -> Waiting <-> Training -> Left
//! ```
//!
//! A lost stream breaks nothing: the worker trains on with the leases it has, until its peers leave it or the coordinator is back. To a
//! coordinator that was started again all that it has read and trained meanwhile is news: it says so, and stays in its generation if it
//! may.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use peapod_proto::ids::{Generation, LeaseId, MemberIndex, Rank, Step, WorkerId};
use peapod_proto::message::{
    Assignment, Continuing, FromWorker, Heartbeat, Lease, ShardReport, SkipReason, SkippedSample, StepRecord, StepReport, StopReason,
    Stopped, ToWorker,
};
use peapod_proto::program::StopSignal;

/// What happens to a worker.
#[derive(Debug)]
pub enum Input {
    /// The coordinator said something.
    Said(ToWorker),
    /// The stream to the coordinator broke.
    StreamLost {
        /// Why, as far as is known.
        cause: String,
    },
    /// The trainer finished something.
    Trainer(TrainerEvent),
    /// The data threads read something.
    Read(ShardReport),
    /// The data threads want shards.
    NeedLeases {
        /// How many.
        num: u32,
        /// Nothing is left to train.
        is_idle: bool,
    },
    /// The data threads leave the rest of a lease to others.
    GaveBack {
        /// The lease.
        lease: LeaseId,
        /// The first index they leave.
        from: u32,
    },
    /// A heartbeat is due, and there is a stream.
    Beat(Heartbeat),
    /// The worker is to go.
    Signal(StopSignal),
}

/// What the trainer's thread says.
#[derive(Debug)]
pub enum TrainerEvent {
    /// Models are loaded.
    Loaded {
        /// SHA-256 over what must be alike on all ranks.
        model_digest: Vec<u8>,
        /// Length of the gradient before its tail.
        num_parameters: u64,
    },
    /// A bootstrap is made.
    Bootstrap {
        /// For this generation.
        generation: Generation,
        /// Opaque bytes.
        bytes: Vec<u8>,
    },
    /// A step is applied. Its record is there on every member.
    Step(StepReport),
    /// It has left the collective. The records are the lifecycle's to add.
    Stopped(Stopped),
    /// It cannot go on.
    Failed {
        /// What it was doing.
        phase: &'static str,
        /// What went wrong.
        message: String,
        /// Whether another try would end the same way.
        permanent: bool,
    },
}

/// What a worker does.
#[derive(Debug, PartialEq)]
pub enum Action {
    /// Tell the coordinator.
    Send(FromWorker),
    /// Load the models of a job.
    Load {
        /// The job file's text.
        job_toml: String,
        /// The worker's rank.
        rank: Rank,
    },
    /// Have the trainer make a bootstrap.
    MakeBootstrap {
        /// The generation.
        generation: Generation,
        /// Its size.
        num_members: u32,
    },
    /// Have the trainer join a generation.
    Train(Assignment),
    /// Break what the trainer does in a generation.
    Abort {
        /// The generation.
        generation: Generation,
        /// Why.
        reason: String,
    },
    /// Have the trainer ask for a meeting in its next all-reduce.
    PlanChange {
        /// The generation.
        generation: Generation,
    },
    /// Have the trainer copy its weights for a checkpoint.
    Snapshot {
        /// The generation.
        generation: Generation,
    },
    /// Hand shards to the data threads.
    Grant {
        /// The leases.
        leases: Vec<Lease>,
        /// No more will come in this generation.
        none_left: bool,
        /// But the rest of what another reads, for the asking, once nothing is left to train.
        ask_when_idle: bool,
    },
    /// Have the data threads leave the rest of leases to others.
    GiveBack {
        /// The leases.
        leases: Vec<LeaseId>,
        /// Once there is a share to train.
        for_idle: bool,
    },
    /// Have the data threads ask for shards again, if they lack any.
    AskForLeases,
    /// Connect again.
    Reconnect,
    /// Say it to the user.
    Log {
        /// The words.
        text: String,
    },
    /// Leave, with an exit code and a last line.
    Exit {
        /// The code.
        code: u8,
        /// The line; empty for none.
        message: String,
    },
}

/// The job is over or gone, or nobody answers; starting the worker again may help.
pub const TRY_AGAIN: u8 = 75;

#[derive(Debug, Clone, PartialEq, Eq)]
enum State {
    /// Before the first welcome, or after a stream was lost.
    Joining,
    /// Models are being read.
    Loading,
    /// Ready, outside of any generation.
    Waiting,
    /// In a generation.
    Training(Generation),
    /// Gone.
    Left,
}

/// A worker's life.
#[derive(Debug)]
pub struct Lifecycle {
    state: State,
    identity: Option<(WorkerId, Rank)>,
    job_id: Option<String>,
    loaded: Option<(Vec<u8>, u64)>,
    loading: bool,
    /// Whether the coordinator has welcomed the current stream.
    joined: bool,
    /// Welcomed in the middle of a generation, which is left before anything else is said.
    returning: bool,
    /// Its place in the generation it is in, or was last.
    member_index: MemberIndex,
    /// The last step applied in it, or its base.
    applied: Step,
    /// Steps of it that are not known to be on disk.
    records: VecDeque<StepRecord>,
    /// What it said last that it holds.
    stopped: Stopped,
    /// Heartbeats that it has sent on the current stream.
    beats: u64,
    /// How many of them were answered.
    beats_answered: u64,
    /// What it has read of the shards that it holds and is not known to be on disk, without the words.
    read: BTreeMap<LeaseId, Read>,
    /// From where on it has left the rest of a lease to others.
    gave_back: BTreeMap<LeaseId, u32>,
    leaving: Option<StopSignal>,
    left_in_order: bool,
    waiting_for: String,
}

impl Default for Lifecycle {
    fn default() -> Self {
        Self::new()
    }
}

impl Lifecycle {
    /// A worker that has not joined.
    #[must_use]
    pub fn new() -> Self {
        Self {
            state: State::Joining,
            identity: None,
            job_id: None,
            loaded: None,
            loading: false,
            joined: false,
            returning: false,
            member_index: MemberIndex(0),
            applied: Step(0),
            records: VecDeque::new(),
            stopped: Stopped::empty_handed(Generation::NONE),
            beats: 0,
            beats_answered: 0,
            read: BTreeMap::new(),
            gave_back: BTreeMap::new(),
            leaving: None,
            left_in_order: false,
            waiting_for: String::new(),
        }
    }

    /// The worker's id and rank, once it has been welcomed.
    #[must_use]
    pub fn identity(&self) -> Option<(WorkerId, Rank)> {
        self.identity
    }

    /// Whether it has left with time for what is still being sent.
    #[must_use]
    pub fn left_in_order(&self) -> bool {
        self.left_in_order
    }

    /// What follows from `input`.
    pub fn handle(&mut self, input: Input) -> Vec<Action> {
        if self.state == State::Left {
            return Vec::new();
        }
        match input {
            Input::Said(message) => self.said(message),
            Input::StreamLost { cause } => self.stream_lost(&cause),
            Input::Trainer(event) => self.trainer(event),
            Input::Read(report) => {
                self.remember(&report);
                vec![Action::Send(FromWorker::ShardReport(report))]
            }
            Input::GaveBack { lease, from } => {
                self.gave_back.insert(lease, from);
                vec![Action::Send(FromWorker::GaveBack { lease, from })]
            }
            Input::NeedLeases { num, is_idle } => match self.state {
                State::Training(generation) if self.joined && !self.returning => {
                    vec![Action::Send(FromWorker::LeaseRequest { generation, num_leases: num, is_idle })]
                }
                // Nobody to ask: the data threads are told to ask again when the next generation begins.
                _ => Vec::new(),
            },
            Input::Beat(heartbeat) => {
                self.beats += 1;
                vec![Action::Send(FromWorker::Heartbeat(heartbeat))]
            }
            Input::Signal(signal) => self.signal(signal),
        }
    }

    fn said(&mut self, message: ToWorker) -> Vec<Action> {
        match message {
            ToWorker::Welcome { worker, rank, world_size, job_id, job_toml, continues, .. } => {
                self.welcome((worker, rank), world_size, job_id, job_toml, continues)
            }
            ToWorker::HeartbeatReply { generation, running, waiting_for } => {
                self.beats_answered += 1;
                self.heartbeat_reply(generation, running, waiting_for)
            }
            ToWorker::MakeBootstrap { generation, num_members } => vec![Action::MakeBootstrap { generation, num_members }],
            ToWorker::Assignment(assignment) => {
                self.state = State::Training(assignment.generation);
                self.member_index = assignment.member_index;
                self.applied = assignment.base_step;
                self.records.clear();
                let held: BTreeSet<LeaseId> = assignment.held_leases.iter().copied().collect();
                self.read.retain(|lease, _| held.contains(lease));
                self.gave_back.retain(|lease, _| held.contains(lease));
                self.waiting_for.clear();
                vec![Action::Train(assignment)]
            }
            ToWorker::Abort { generation, reason } => vec![Action::Abort { generation, reason }],
            ToWorker::PlanChange { generation, .. } => vec![Action::PlanChange { generation }],
            ToWorker::GiveBack { leases, for_idle } => vec![Action::GiveBack { leases, for_idle }],
            ToWorker::LeaseGrant { generation, leases, none_left, ask_when_idle } => {
                // A grant of a generation that is over still holds: the next assignment lists it. Its `none_left` does not.
                let current = self.state == State::Training(generation);
                vec![Action::Grant { leases, none_left: none_left && current, ask_when_idle }]
            }
            ToWorker::Durable { generation, step } => {
                if self.state == State::Training(generation) {
                    self.records.retain(|record| record.step > step);
                    self.forget_what_is_on_disk();
                }
                Vec::new()
            }
            ToWorker::TakeSnapshot { generation } => vec![Action::Snapshot { generation }],
            ToWorker::Stop { reason, message } => {
                self.state = State::Left;
                self.left_in_order = matches!(reason, StopReason::Finished | StopReason::Stopped | StopReason::Drained);
                let code = match reason {
                    StopReason::Finished | StopReason::Stopped => 0,
                    StopReason::Drained => self.leaving.map_or(0, StopSignal::code),
                    StopReason::Failed => 1,
                    StopReason::GivenUp => TRY_AGAIN,
                };
                let message = match reason {
                    StopReason::Finished | StopReason::Stopped => format!("the job ended: {message}"),
                    StopReason::Drained => format!("left the job: {message}"),
                    StopReason::Failed => format!("the job failed: {message}"),
                    StopReason::GivenUp => format!("given up by the coordinator: {message}"),
                };
                vec![Action::Exit { code, message }]
            }
        }
    }

    fn welcome(
        &mut self,
        identity: (WorkerId, Rank),
        world_size: u32,
        job_id: String,
        job_toml: String,
        continues: Generation,
    ) -> Vec<Action> {
        if self.job_id.as_ref().is_some_and(|known| *known != job_id) {
            self.state = State::Left;
            let message =
                "the coordinator was started anew and no longer knows this run; start the worker again to resume from its checkpoint";
            return vec![Action::Exit { code: TRY_AGAIN, message: message.into() }];
        }
        let again = self.identity.is_some();
        self.identity = Some(identity);
        self.job_id = Some(job_id);
        self.joined = true;
        let rank = identity.1;
        let text = if rank.0 < world_size {
            format!("joined as rank {rank} of {world_size}")
        } else {
            format!("joined as a spare, rank {rank}: stands in when one of the {world_size} workers is lost")
        };
        let mut actions = vec![Action::Log { text }];
        if again {
            self.read.values_mut().for_each(|read| read.beat = self.beats + 1);
            actions.extend(self.read.iter().map(|(&lease, read)| Action::Send(FromWorker::ShardReport(read.report(lease)))));
            let gave_back = self.gave_back.iter().map(|(&lease, &from)| Action::Send(FromWorker::GaveBack { lease, from }));
            actions.extend(gave_back);
        }
        let ready = self.loaded.clone().map(|(model_digest, num_parameters)| FromWorker::Ready { model_digest, num_parameters });
        if let State::Training(generation) = self.state {
            if generation == continues
                && let Some(ready) = ready
            {
                let records = self.records.iter().cloned().collect();
                let continuing = Continuing { generation, applied: self.applied, records };
                actions.extend([Action::Send(ready), Action::Send(FromWorker::Continuing(continuing)), Action::AskForLeases]);
                return actions;
            }
            self.returning = true;
            actions.push(Action::Abort { generation, reason: "the coordinator is back".into() });
            return actions;
        }
        if again {
            actions.push(Action::Send(FromWorker::Stopped(self.stopped.clone())));
        }
        match (ready, self.loading) {
            (Some(ready), _) => {
                self.state = State::Waiting;
                actions.push(Action::Send(ready));
            }
            (None, true) => self.state = State::Loading,
            (None, false) => {
                self.state = State::Loading;
                self.loading = true;
                actions.push(Action::Load { job_toml, rank });
            }
        }
        actions
    }

    /// Abort is a state as well as a message: a lost Abort is noticed here.
    fn heartbeat_reply(&mut self, generation: Generation, running: bool, waiting_for: String) -> Vec<Action> {
        let mut actions = Vec::new();
        if let State::Training(mine) = self.state
            && (generation > mine || (generation == mine && !running))
        {
            let reason = format!("the coordinator says that {mine} is over");
            actions.push(Action::Abort { generation: mine, reason });
        }
        if waiting_for != self.waiting_for {
            if !waiting_for.is_empty() && self.state == State::Waiting {
                actions.push(Action::Log { text: waiting_for.clone() });
            }
            self.waiting_for = waiting_for;
        }
        actions
    }

    fn stream_lost(&mut self, cause: &str) -> Vec<Action> {
        if let Some(signal) = self.leaving {
            (self.state, self.left_in_order) = (State::Left, true);
            let message = format!("{}: left while the coordinator was away ({cause})", signal.name());
            return vec![Action::Exit { code: signal.code(), message }];
        }
        (self.joined, self.returning) = (false, false);
        (self.beats, self.beats_answered) = (0, 0);
        // Where the coordinator lives and takes this worker for dead, its peers leave it and its collective fails.
        let meanwhile = if let State::Training(_) = self.state {
            "training on and connecting again"
        } else {
            self.state = State::Joining;
            "connecting again"
        };
        vec![Action::Log { text: format!("lost the coordinator ({cause}); {meanwhile}") }, Action::Reconnect]
    }

    /// Keeps what was read of a shard for a coordinator that will not have heard of it.
    fn remember(&mut self, report: &ShardReport) {
        let known = self.read.entry(report.lease).or_default();
        known.beat = self.beats + 1;
        known.skipped.extend(report.skipped.iter().map(|sample| (sample.index, sample.reason)));
        known.num_samples = report.num_samples.or(known.num_samples);
        if !report.truncated.is_empty() {
            known.truncated.clone_from(&report.truncated);
        }
    }

    /// What was read and said before a heartbeat that is answered has been heard, as a stream keeps the order; and what was heard is
    /// written down before the coordinator says that steps are.
    ///
    /// That a step is final proves nothing of the kind: the others' words suffice for that. And one that is about to leave its generation
    /// may have said it in vain, as its leases are in the name that it had before.
    fn forget_what_is_on_disk(&mut self) {
        if !self.returning {
            self.read.retain(|_, read| read.beat > self.beats_answered);
        }
    }

    fn trainer(&mut self, event: TrainerEvent) -> Vec<Action> {
        match event {
            TrainerEvent::Loaded { model_digest, num_parameters } => {
                self.loaded = Some((model_digest.clone(), num_parameters));
                self.loading = false;
                if self.state != State::Loading {
                    return Vec::new();
                }
                self.state = State::Waiting;
                vec![Action::Send(FromWorker::Ready { model_digest, num_parameters })]
            }
            TrainerEvent::Bootstrap { generation, bytes } => vec![Action::Send(FromWorker::Bootstrap { generation, bytes })],
            TrainerEvent::Step(mut report) => {
                self.applied = report.step;
                self.records.extend(report.record.clone());
                // While the coordinator is away, and until it has heard what this worker holds, the names of steps are kept for that.
                if !self.joined || self.returning {
                    return Vec::new();
                }
                // They are the same on every member: one tells them.
                report.record = report.record.filter(|_| self.member_index == MemberIndex(0));
                vec![Action::Send(FromWorker::StepReport(report))]
            }
            TrainerEvent::Stopped(stopped) => {
                let stopped = Stopped { records: self.records.iter().cloned().collect(), ..stopped };
                self.stopped = stopped.clone();
                if self.state == State::Training(stopped.generation) {
                    self.state = if self.joined { State::Waiting } else { State::Joining };
                }
                if !self.joined {
                    return Vec::new();
                }
                let mut actions = vec![Action::Send(FromWorker::Stopped(stopped))];
                if std::mem::take(&mut self.returning)
                    && let Some((model_digest, num_parameters)) = self.loaded.clone()
                {
                    actions.push(Action::Send(FromWorker::Ready { model_digest, num_parameters }));
                }
                actions
            }
            TrainerEvent::Failed { phase, message, permanent } => {
                self.state = State::Left;
                let failure = FromWorker::Failure { phase: phase.into(), message: message.clone(), permanent };
                vec![Action::Send(failure), Action::Exit { code: 1, message: format!("failed in phase {phase}: {message}") }]
            }
        }
    }

    fn signal(&mut self, signal: StopSignal) -> Vec<Action> {
        let name = signal.name();
        if self.leaving.is_some() && signal == StopSignal::HungUp {
            // A terminal that goes sends it, and so does the shell in it.
            return vec![];
        }
        if self.leaving.is_some() || self.state == State::Joining {
            self.state = State::Left;
            return vec![Action::Exit { code: signal.code(), message: format!("{name}: left at once, without what was in flight") }];
        }
        self.leaving = Some(signal);
        vec![
            Action::Log { text: format!("{name}: leaving after the step in flight; once more to leave at once") },
            Action::Send(FromWorker::Leaving { reason: name.into() }),
        ]
    }
}

/// What was read of a shard, without the words: a generation may last for weeks, and skip millions of samples. For that reason it is not
/// kept for longer than it has to be, either.
#[derive(Debug, Clone, Default)]
struct Read {
    /// The heartbeat that follows the last of it, counted on the stream.
    beat: u64,
    skipped: Vec<(u32, SkipReason)>,
    num_samples: Option<u32>,
    truncated: String,
}

impl Read {
    fn report(&self, lease: LeaseId) -> ShardReport {
        let skipped = |&(index, reason): &(u32, SkipReason)| SkippedSample { index, reason, key: String::new(), detail: String::new() };
        ShardReport {
            lease,
            skipped: self.skipped.iter().map(skipped).collect(),
            num_samples: self.num_samples,
            truncated: self.truncated.clone(),
        }
    }
}

#[cfg(test)]
mod tests;
