//! Joining, forming a generation, leaving it.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use peapod_proto::ids::{Generation, Incarnation, MemberIndex, Rank, Step, WorkerId};
use peapod_proto::message::{Assignment, Hello, Phase, StopCause, StopReason, Stopped, ToWorker};
use peapod_proto::{PROGRAM_VERSION, PROTOCOL_VERSION};

use super::durable::Member;
use super::ledger::{Ledger, Rules};
use super::{ANNOUNCE_EVERY, Core, CoreError, Effect, Fact, JobPhase, Notice, Outcome, Progress, StreamId, Timestamp, Truth, worker_mut};

/// A worker process that has a stream.
#[derive(Debug, Clone)]
pub(super) struct Worker {
    pub rank: Rank,
    pub incarnation: Incarnation,
    pub attempt: u32,
    pub stream: StreamId,
    pub host: String,
    pub pid: u32,
    pub device: String,
    pub last_seen: Timestamp,
    pub state: WorkerState,
    pub step: Step,
    pub phase: Phase,
    /// Steps became durable since it was last told.
    pub tell_durable: bool,
    /// Why it wants to leave.
    pub leaving: Option<String>,
}

/// How far a worker is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum WorkerState {
    /// Reading its models.
    Loading,
    /// Able to be a member.
    Ready { model_digest: Vec<u8>, num_parameters: u64 },
}

/// A worker as people see it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WorkerView {
    /// Its id.
    pub id: WorkerId,
    /// Its rank.
    pub rank: Rank,
    /// Its host.
    pub host: String,
    /// Its process id there.
    pub pid: u32,
    /// Its device.
    pub device: String,
    /// What it last said it does.
    pub phase: Phase,
    /// Its last applied step.
    pub step: Step,
    /// Time since its last message.
    pub silence: Duration,
    /// Whether it is a member of the current generation.
    pub member: bool,
}

impl std::fmt::Display for WorkerView {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "rank {} (pid {} on {})", self.rank, self.pid, self.host)
    }
}

impl Worker {
    pub fn name(&self) -> String {
        format!("rank {} (pid {} on {})", self.rank, self.pid, self.host)
    }

    pub fn view(&self, id: WorkerId, now: Timestamp, member: bool) -> WorkerView {
        WorkerView {
            id,
            rank: self.rank,
            host: self.host.clone(),
            pid: self.pid,
            device: self.device.clone(),
            phase: self.phase,
            step: self.step,
            silence: now.saturating_sub(self.last_seen),
            member,
        }
    }

    pub fn is_ready(&self) -> bool {
        matches!(self.state, WorkerState::Ready { .. }) && self.leaving.is_none()
    }
}

impl Core {
    pub(super) fn hello(&mut self, now: Timestamp, stream: StreamId, hello: Hello, out: &mut Vec<Effect>) -> Result<(), CoreError> {
        if hello.protocol_version != PROTOCOL_VERSION {
            return Err(CoreError::Version {
                theirs: hello.program_version,
                theirs_protocol: hello.protocol_version,
                ours: PROGRAM_VERSION.into(),
                ours_protocol: PROTOCOL_VERSION,
            });
        }
        if let JobPhase::Finishing { .. } | JobPhase::Done(_) = self.phase {
            return Err(CoreError::Ending(self.state()));
        }
        let world_size = self.config.world_size;
        if let Some(rank) = hello.requested_rank.filter(|rank| rank.0 >= world_size) {
            return Err(CoreError::NoSuchRank { rank, world_size });
        }
        // The same process on a new stream: the old stream is dead, whether or not its end has been seen.
        let returning =
            self.workers.iter().find(|(_, worker)| worker.incarnation == hello.incarnation).map(|(&id, worker)| (id, worker.attempt));
        if let Some((id, attempt)) = returning {
            if hello.attempt <= attempt {
                return Err(CoreError::StaleStream);
            }
            self.lose(now, id, "came back on a new stream", out);
        }
        let awaited = self.awaited(hello.incarnation);
        let returns = awaited.is_some();
        let (id, rank) = match awaited {
            Some(member) => (member.worker, member.rank),
            None => {
                let rank = self.free_rank(now, hello.requested_rank)?;
                let id = WorkerId(self.next_worker);
                if let Some(replaced) = self.absent_member(rank) {
                    // Whoever asks for the rank of a worker that is awaited was started in its place.
                    self.last_members.retain(|member| member.worker != replaced);
                    out.push(Effect::Persist(Fact::Replaced(replaced)));
                }
                self.next_worker += 1;
                out.push(Effect::Persist(Fact::Joined(id)));
                (id, rank)
            }
        };
        let worker = Worker {
            rank,
            incarnation: hello.incarnation,
            attempt: hello.attempt,
            stream,
            host: hello.host,
            pid: hello.pid,
            device: hello.device,
            last_seen: now,
            state: WorkerState::Loading,
            step: Step(0),
            phase: Phase::Loading,
            tell_durable: false,
            leaving: None,
        };
        out.push(Effect::Attach { worker: id, stream });
        out.push(Effect::Send {
            worker: id,
            message: ToWorker::Welcome {
                worker: id,
                rank,
                world_size,
                job_id: self.config.job_id.clone(),
                job_toml: self.config.job_toml.clone(),
                heartbeat_interval_ms: (self.config.heartbeat_timeout / 6).as_millis() as u32,
                heartbeat_timeout_ms: self.config.heartbeat_timeout.as_millis() as u32,
                join_timeout_ms: u32::try_from(self.config.join_timeout.as_millis()).unwrap_or(u32::MAX),
            },
        });
        out.push(Effect::Notice(Notice::Joined(worker.view(id, now, false))));
        self.workers.insert(id, worker);
        if returns {
            self.has_returned(now, out);
        }
        Ok(())
    }

    fn free_rank(&self, now: Timestamp, requested: Option<Rank>) -> Result<Rank, CoreError> {
        let holder = |rank: Rank| self.workers.values().find(|worker| worker.rank == rank);
        if let Some(rank) = requested {
            return match holder(rank) {
                Some(worker) => Err(CoreError::RankTaken { rank, holder: format!("pid {} on {}", worker.pid, worker.host) }),
                None => Ok(rank),
            };
        }
        let taken: BTreeSet<Rank> = self.workers.values().map(|worker| worker.rank).collect();
        let reserved = self.reserved_ranks(now);
        let free = |rank: &Rank| !taken.contains(rank);
        let mut ranks = (0..self.config.world_size).map(Rank);
        if let Some(rank) = ranks.clone().find(|rank| free(rank) && !reserved.contains(rank)) {
            return Ok(rank);
        }
        Err(if ranks.any(|rank| free(&rank)) {
            self.not_yet()
        } else {
            CoreError::WorldFull { world_size: self.config.world_size, holders: self.workers.values().map(Worker::name).collect() }
        })
    }

    pub(super) fn ready(
        &mut self,
        now: Timestamp,
        id: WorkerId,
        model_digest: Vec<u8>,
        num_parameters: u64,
        out: &mut Vec<Effect>,
    ) -> Result<(), CoreError> {
        let state = WorkerState::Ready { model_digest, num_parameters };
        let other =
            self.workers.iter().find(|&(&other, worker)| other != id && worker.state != WorkerState::Loading && worker.state != state);
        if let Some((_, other)) = other {
            let worker = self.workers.get(&id).map(Worker::name).unwrap_or_default();
            return Err(CoreError::ModelsDiffer { worker, other: other.name() });
        }
        if let Some(worker) = self.workers.get_mut(&id).filter(|worker| worker.state == WorkerState::Loading) {
            worker.state = state;
            worker.phase = Phase::Waiting;
            out.push(Effect::Notice(Notice::Ready(worker.view(id, now, false))));
        }
        self.try_form(now, out);
        Ok(())
    }

    /// Starts the next generation if everyone is there.
    fn try_form(&mut self, now: Timestamp, out: &mut Vec<Effect>) {
        if !matches!(self.phase, JobPhase::Gathering { .. }) {
            return;
        }
        let mut ready: Vec<(Rank, WorkerId)> =
            self.workers.iter().filter(|(_, worker)| worker.is_ready()).map(|(&id, worker)| (worker.rank, id)).collect();
        if ready.len() < self.config.world_size as usize {
            return;
        }
        ready.sort_unstable();
        let members: Vec<WorkerId> = ready.into_iter().map(|(_, id)| id).collect();
        self.generation = self.generation.next();
        let message = ToWorker::MakeBootstrap { generation: self.generation, num_members: members.len() as u32 };
        let member = |id: &WorkerId| {
            let worker = self.workers.get(id)?;
            Some(Member { worker: *id, incarnation: worker.incarnation, rank: worker.rank })
        };
        self.last_members = members.iter().filter_map(member).collect();
        let journalled = self.last_members.clone();
        out.push(Effect::Persist(Fact::Generation { generation: self.generation, members: journalled, base_step: self.truth.step }));
        out.push(Effect::Send { worker: members[0], message });
        self.phase = JobPhase::Forming { deadline: now + self.reply_timeout(), members };
    }

    pub(super) fn bootstrap(
        &mut self,
        now: Timestamp,
        id: WorkerId,
        generation: Generation,
        bytes: Vec<u8>,
        out: &mut Vec<Effect>,
    ) -> Result<(), CoreError> {
        self.fence(generation)?;
        let JobPhase::Forming { members, .. } = &self.phase else {
            return Err(CoreError::Unexpected { what: "bootstrap", worker: id, why: format!("the job is {}", self.state()) });
        };
        if members[0] != id {
            return Err(CoreError::Unexpected { what: "bootstrap", worker: id, why: "it is not member 0".into() });
        }
        let members = members.clone();
        let holders = &self.truth.holders;
        let source = members.iter().position(|member| holders.contains(member));
        let broadcast_state = source.is_none() || members.iter().any(|member| !holders.contains(member));
        let checkpoint_step = source.is_none().then(|| self.checkpoint_step()).flatten();
        for (index, &member) in members.iter().enumerate() {
            let assignment = Assignment {
                generation,
                member_index: MemberIndex(index as u32),
                num_members: members.len() as u32,
                bootstrap: bytes.clone(),
                base_step: self.truth.step,
                base_generation: self.truth.generation,
                source_index: MemberIndex(source.unwrap_or(0) as u32),
                broadcast_state,
                checkpoint_step,
                held_leases: self.leases.held_by(member),
            };
            out.push(Effect::Send { worker: member, message: ToWorker::Assignment(assignment) });
        }
        out.push(Effect::Notice(Notice::Formed {
            generation,
            num_members: members.len() as u32,
            base_step: self.truth.step,
            from_checkpoint: checkpoint_step.is_some(),
        }));
        self.lease_requests.clear();
        self.leases.deal_among(members.len() as u32);
        self.progress = Progress::start(self.truth.step, members.len() as u32);
        self.checkpoint.asked = false;
        self.checkpoint.next_due = self.checkpoint.next_due.max(now);
        self.phase = JobPhase::Running { members, planned: false };
        Ok(())
    }

    /// A worker is gone, by whatever way. Its stream is the driver's to close.
    pub(super) fn lose(&mut self, now: Timestamp, id: WorkerId, cause: &str, out: &mut Vec<Effect>) {
        let Some(worker) = self.workers.remove(&id) else { return };
        self.lease_requests.remove(&id);
        let failure = format!("{} lost at step {} in phase {}: {cause}", worker.name(), worker.step, worker.phase.as_str());
        out.push(Effect::Notice(Notice::Lost { worker: worker.view(id, now, false), cause: cause.to_owned() }));
        self.truth.holders.remove(&id);
        match &mut self.phase {
            JobPhase::Gathering { .. } | JobPhase::Done(_) => {}
            // It may come back once more.
            JobPhase::Returning { stopped, .. } => drop(stopped.remove(&id)),
            JobPhase::Forming { members, .. } => {
                if members.contains(&id) {
                    self.note_failure(failure);
                    self.gather(now, out);
                }
            }
            JobPhase::Running { members, .. } => {
                if members.contains(&id) {
                    self.note_failure(failure.clone());
                    self.abort(now, &failure, out);
                }
            }
            JobPhase::Stopping { members, stopped, .. } => {
                members.retain(|&member| member != id);
                stopped.remove(&id);
                self.note_failure(failure.clone());
                self.abort_the_rest(now, &failure, out);
                self.settle_if_all_stopped(now, out);
            }
            JobPhase::Finishing { outcome, attempts } => {
                let (outcome, attempts) = (outcome.clone(), *attempts);
                self.note_failure(failure);
                self.ask_for_last_checkpoint(outcome, attempts, out);
            }
        }
        // Its leases wait for the word of the source, except where nobody is left to speak.
        if matches!(self.phase, JobPhase::Gathering { .. }) {
            self.release_leases_of_the_gone(out);
            self.forget_truth_without_holders(out);
        }
    }

    /// Breaks the generation up: every survivor is told to leave its collective.
    fn abort(&mut self, now: Timestamp, reason: &str, out: &mut Vec<Effect>) {
        let JobPhase::Running { members, .. } = &self.phase else { return };
        let members: Vec<WorkerId> = members.iter().copied().filter(|member| self.workers.contains_key(member)).collect();
        out.push(Effect::Notice(Notice::Aborted { generation: self.generation, reason: reason.to_owned() }));
        for &worker in &members {
            let message = ToWorker::Abort { generation: self.generation, reason: reason.to_owned() };
            out.push(Effect::Send { worker, message });
        }
        let deadline = now + self.config.heartbeat_timeout;
        self.phase = JobPhase::Stopping { members, stopped: BTreeMap::new(), deadline, aborted: true };
        self.settle_if_all_stopped(now, out);
    }

    /// A meeting that one of its members will not come to: those still on their way must not wait for it.
    fn abort_the_rest(&mut self, now: Timestamp, reason: &str, out: &mut Vec<Effect>) {
        let JobPhase::Stopping { members, stopped, deadline, aborted: aborted @ false } = &mut self.phase else { return };
        *aborted = true;
        *deadline = now + self.config.heartbeat_timeout;
        for &worker in members.iter().filter(|member| !stopped.contains_key(member)) {
            let message = ToWorker::Abort { generation: self.generation, reason: reason.to_owned() };
            out.push(Effect::Send { worker, message });
        }
    }

    /// Asks all members to meet after the step in flight.
    pub(super) fn plan(&mut self, reason: &str, out: &mut Vec<Effect>) {
        let JobPhase::Running { members, planned } = &mut self.phase else { return };
        if std::mem::replace(planned, true) {
            return;
        }
        out.push(Effect::Notice(Notice::Planned { reason: reason.to_owned() }));
        for &worker in members.iter() {
            let message = ToWorker::PlanChange { generation: self.generation, reason: reason.to_owned() };
            out.push(Effect::Send { worker, message });
        }
    }

    pub(super) fn leaving(&mut self, now: Timestamp, id: WorkerId, reason: &str, out: &mut Vec<Effect>) {
        let Some(worker) = self.workers.get_mut(&id) else { return };
        let text = format!("{} leaves: {reason}", worker.name());
        worker.leaving = Some(reason.to_owned());
        match &self.phase {
            JobPhase::Running { members, .. } if members.contains(&id) => {
                self.plan(&text, out);
                self.take_back_leases(id, out);
            }
            JobPhase::Forming { members, .. } if members.contains(&id) => {
                self.let_go(now, id, out);
                self.gather(now, out);
                self.release_leases_of_the_gone(out);
                self.forget_truth_without_holders(out);
            }
            JobPhase::Stopping { members, .. } if members.contains(&id) => {}
            JobPhase::Returning { .. } => {
                if !self.last_members.iter().any(|member| member.worker == id) {
                    self.let_go(now, id, out);
                }
            }
            // It may be about to send the last checkpoint.
            JobPhase::Finishing { .. } => {}
            _ => {
                self.let_go(now, id, out);
                // Where members train or regroup, what they hold is theirs to say.
                if matches!(self.phase, JobPhase::Gathering { .. }) {
                    self.release_leases_of_the_gone(out);
                    self.forget_truth_without_holders(out);
                }
            }
        }
    }

    fn let_go(&mut self, now: Timestamp, id: WorkerId, out: &mut Vec<Effect>) {
        let Some(worker) = self.workers.remove(&id) else { return };
        self.lease_requests.remove(&id);
        let message = ToWorker::Stop { reason: StopReason::Drained, message: worker.leaving.clone().unwrap_or_default() };
        out.push(Effect::Send { worker: id, message });
        out.push(Effect::Detach { worker: id });
        out.push(Effect::Notice(Notice::Left(worker.view(id, now, false))));
        self.truth.holders.remove(&id);
    }

    pub(super) fn member_stopped(
        &mut self,
        now: Timestamp,
        id: WorkerId,
        stopped: Stopped,
        out: &mut Vec<Effect>,
    ) -> Result<(), CoreError> {
        if let JobPhase::Returning { stopped: all, .. } = &mut self.phase {
            if self.last_members.iter().any(|member| member.worker == id) {
                all.insert(id, stopped);
            }
            return Ok(());
        }
        if !self.members().contains(&id) {
            // It came back to a coordinator that has gone on without it: nobody needs what it holds.
            return Ok(());
        }
        // Who has come back after a restart may have missed the last generation.
        if !matches!(self.phase, JobPhase::Stopping { .. }) || stopped.generation > self.generation {
            self.fence(stopped.generation)?;
        }
        worker_mut(&mut self.workers, id, |worker| {
            worker.phase = Phase::Waiting;
            worker.step = stopped.applied;
        });
        match &mut self.phase {
            JobPhase::Running { members, planned } => {
                // A collective that failed on one rank is over for all of them, though nobody may have died. That holds for the exchange
                // after the last step too, whose failure is the reason beside an orderly cause.
                if stopped.cause == StopCause::Aborted || !stopped.reason.is_empty() {
                    let name = self.workers.get(&id).map(Worker::name).unwrap_or_default();
                    let reason = format!("{name} at step {}: {}", stopped.applied, stopped.reason);
                    self.note_failure(reason.clone());
                    self.abort(now, &reason, out);
                } else {
                    // The first to arrive: the others met in the same step and are on their way.
                    *planned = true;
                    let members = members.clone();
                    let deadline = now + self.reply_timeout();
                    self.phase = JobPhase::Stopping { members, stopped: BTreeMap::new(), deadline, aborted: false };
                }
                if let JobPhase::Stopping { stopped: all, .. } = &mut self.phase {
                    all.insert(id, stopped);
                }
            }
            JobPhase::Stopping { stopped: all, .. } => {
                all.insert(id, stopped);
            }
            // Unreachable: `member_index` found it a member.
            _ => {}
        }
        self.settle_if_all_stopped(now, out);
        Ok(())
    }

    /// Once every survivor has spoken: the source's step is the truth.
    pub(super) fn settle_if_all_stopped(&mut self, now: Timestamp, out: &mut Vec<Effect>) {
        let JobPhase::Stopping { members, stopped, .. } = &self.phase else { return };
        if members.iter().any(|member| !stopped.contains_key(member)) {
            return;
        }
        let members = members.clone();
        let mut stopped: BTreeMap<WorkerId, Stopped> = stopped.iter().map(|(&id, said)| (id, self.on_the_line(said.clone()))).collect();
        let base = self.truth.step;
        // An honest survivor holds every final step; whatever it holds beyond becomes the truth.
        let least = base.max(self.progress.final_step());
        // Most advanced first; the lowest id among equals.
        let source = members.iter().copied().max_by_key(|id| (stopped[id].applied, std::cmp::Reverse(*id)));
        let source = source.and_then(|id| stopped.remove(&id).map(|said| (id, said))).filter(|(_, said)| said.applied >= least);
        let Some((source, said)) = source else {
            self.truth.holders.clear();
            self.release_leases_of_the_gone(out);
            self.gather(now, out);
            self.forget_truth_without_holders(out);
            if let Some(reason) = self.stop_requested.clone() {
                return self.ask_for_last_checkpoint(Outcome::Stopped { reason }, 1, out);
            }
            return self.try_form(now, out);
        };
        out.push(Effect::Void { generation: self.generation, after: said.applied });
        let stands = |&(step, generation): &(Step, Generation)| generation != self.generation || step <= said.applied;
        self.checkpoint.frozen.retain(|key, _| stands(key));
        self.checkpoint.senders.retain(|key, _| stands(key));
        self.commit_source(now, &said, out);
        if matches!(self.phase, JobPhase::Done(_)) {
            return;
        }
        // Whoever holds the source's step may know more about it: that it was the last one, or its losses on the validation samples.
        let equals = || stopped.values().filter(|other| other.applied == said.applied).chain([&said]);
        let is_over = |cause| equals().any(|other| other.cause == cause);
        let (steps_done, is_dry) = (is_over(StopCause::StepsDone), is_over(StopCause::DataDone));
        if let Some(losses) = equals().find_map(|other| other.validation) {
            self.validated(losses, out);
        }
        let mut holders: BTreeSet<WorkerId> =
            stopped.iter().filter(|(_, other)| other.applied == said.applied).map(|(&id, _)| id).collect();
        holders.insert(source);
        if said.applied == Step(0) {
            // Nothing is trained, and some may never have received the fresh weights: the next source makes the same ones.
            holders.clear();
        }
        let generation = if said.applied > base { self.generation } else { self.truth.generation };
        self.truth = Truth { step: said.applied, generation, holders };
        out.push(Effect::Persist(Fact::Settled { step: said.applied, generation }));
        self.release_leases_of_the_gone(out);

        // A member that leaves is given nothing more: what is left because of that is for the next generation. A coordinator that was started again may
        // know less than its members have done: whoever has not asked it yet reads once more what it is believed to hold.
        let is_left = self.leases.any_left() || self.grant_again.iter().any(|member| self.workers.contains_key(member));
        let data_done = is_dry && !(is_left && self.unaccounted().is_some());
        let done = steps_done || data_done || self.config.last_step.is_some_and(|last| said.applied >= last);
        if data_done && let Some(reason) = self.unaccounted() {
            self.note_failure(reason.clone());
            return self.fail(reason, out);
        }
        if done {
            return self.ask_for_last_checkpoint(Outcome::Finished, 1, out);
        }
        if let Some(reason) = self.stop_requested.clone() {
            return self.ask_for_last_checkpoint(Outcome::Stopped { reason }, 1, out);
        }
        let leavers: Vec<WorkerId> = self.workers.iter().filter(|(_, worker)| worker.leaving.is_some()).map(|(&id, _)| id).collect();
        for id in leavers {
            self.let_go(now, id, out);
        }
        self.gather(now, out);
        self.release_leases_of_the_gone(out);
        self.forget_truth_without_holders(out);
        self.try_form(now, out);
    }

    /// Why the data cannot be done although no worker has any left: a promise of the ledger is broken.
    fn unaccounted(&self) -> Option<String> {
        let epochs = self.config.epochs?;
        let source = (0..self.ledger.num_sources()).find(|&source| self.ledger.open_epoch_of(source).0 < epochs)?;
        let epoch = self.ledger.open_epoch_of(source);
        let open = self.ledger.shards_of(source).len() as u32 - self.ledger.num_done_of(source, epoch);
        let of = match self.config.sources.get(source) {
            Some(source) if !source.name.is_empty() => format!(" of source {}", source.name),
            _ => String::new(),
        };
        Some(format!("no worker has a sample left, yet {open} shards{of} of epoch {epoch} are not accounted for in the ledger"))
    }

    /// How long a worker that lives may take to answer: its trainer may be in the middle of something.
    pub(super) fn reply_timeout(&self) -> Duration {
        self.config.heartbeat_timeout.max(Duration::from_secs(10))
    }

    fn gather(&mut self, now: Timestamp, out: &mut Vec<Effect>) {
        self.phase = JobPhase::Gathering { since: now };
        self.next_announcement = now + ANNOUNCE_EVERY;
        let ready = self.workers.values().filter(|worker| worker.is_ready()).count();
        if ready < self.config.world_size as usize {
            out.push(Effect::Notice(Notice::Waiting { text: self.waiting_for(), left: self.config.join_timeout }));
        }
    }

    pub(super) fn finish(&mut self, outcome: Outcome, out: &mut Vec<Effect>) {
        out.push(Effect::Persist(Fact::Ended(outcome.clone())));
        let (reason, message) = match &outcome {
            Outcome::Finished => (StopReason::Finished, "the job is finished".to_owned()),
            Outcome::Stopped { reason } => (StopReason::Stopped, reason.clone()),
            Outcome::Failed { reason } => (StopReason::Failed, reason.clone()),
        };
        for &worker in self.workers.keys() {
            out.push(Effect::Send { worker, message: ToWorker::Stop { reason, message: message.clone() } });
            out.push(Effect::Detach { worker });
        }
        let rules = self.ledger.rules();
        if rules != Rules::default() {
            out.push(Effect::Notice(Notice::Skipped(rules)));
        }
        self.phase = JobPhase::Done(outcome.clone());
        out.push(Effect::Finish(outcome));
    }

    fn release_leases_of_the_gone(&mut self, out: &mut Vec<Effect>) {
        let gone: BTreeSet<WorkerId> = self.leases.holders().into_iter().filter(|holder| !self.workers.contains_key(holder)).collect();
        if gone.is_empty() {
            return;
        }
        gone.iter().for_each(|&holder| self.leases.release(holder));
        out.push(Effect::Persist(Fact::Released(gone)));
    }

    /// With nobody left who holds the newest weights, the newest checkpoint is the truth, and its ledger the ledger.
    fn forget_truth_without_holders(&mut self, out: &mut Vec<Effect>) {
        if !self.truth.holders.is_empty() {
            return;
        }
        let from = self.truth.step.max(self.progress.final_step());
        let to = self.checkpoint_step().unwrap_or(Step(0));
        // A checkpoint beyond what is known here has the ledger of its step all the same.
        if from != to {
            if from > to {
                out.push(Effect::Notice(Notice::RolledBack { from, to }));
            }
            out.push(Effect::Void { generation: self.generation, after: to });
            let fresh = || Ledger::of_sources(self.config.sources.iter().map(|source| source.num_shards));
            self.ledger = self.checkpoint.last.as_ref().map_or_else(fresh, |last| (*last.ledger).clone());
            self.leases.restart(&self.ledger);
            self.checkpoint.frozen.clear();
            self.checkpoint.senders.clear();
            self.progress = Progress::new(to);
            // Its steps are trained again, from other samples perhaps, and validated again.
            self.validation = self.validation.filter(|last| last.step <= to);
        }
        let ledger = (from != to).then(|| self.ledger.clone());
        let truth = Truth { step: to, generation: Generation::NONE, holders: BTreeSet::new() };
        if self.truth != truth || !self.last_members.is_empty() {
            self.truth = truth;
            self.last_members.clear();
            out.push(Effect::Persist(Fact::FromCheckpoint { step: to, ledger }));
        }
    }

    /// Who is missing, in words.
    pub(super) fn waiting_for(&self) -> String {
        let mut missing = Vec::new();
        let mut loading = Vec::new();
        for rank in (0..self.config.world_size).map(Rank) {
            match self.workers.values().find(|worker| worker.rank == rank) {
                None => missing.push(rank),
                Some(worker) if worker.state == WorkerState::Loading => loading.push(rank),
                Some(_) => {}
            }
        }
        let mut parts = Vec::new();
        if !missing.is_empty() {
            parts.push(format!("waiting for {}", ranks(&missing)));
        }
        if !loading.is_empty() {
            parts.push(format!("{} loading models", ranks(&loading)));
        }
        if parts.is_empty() { String::new() } else { parts.join(", ") }
    }
}

/// "rank 3", "ranks 0, 2-5".
fn ranks(ranks: &[Rank]) -> String {
    let mut spans: Vec<(u32, u32)> = Vec::new();
    for &Rank(rank) in ranks {
        match spans.last_mut() {
            Some((_, end)) if *end + 1 == rank => *end = rank,
            _ => spans.push((rank, rank)),
        }
    }
    let text: Vec<String> = spans.iter().map(|&(from, to)| if from == to { from.to_string() } else { format!("{from}-{to}") }).collect();
    format!("rank{} {}", if ranks.len() == 1 { "" } else { "s" }, text.join(", "))
}
