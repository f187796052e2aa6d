//! Joining and leaving.

use std::collections::BTreeSet;
use std::time::Duration;

use peapod_proto::ids::{Generation, Incarnation, Rank, Step, WorkerId};
use peapod_proto::message::{Hello, Phase, StopReason, ToWorker};
use peapod_proto::{PROGRAM_VERSION, PROTOCOL_VERSION};

use super::hangs::Motion;
use super::{Core, CoreError, Effect, Fact, JobPhase, Notice, Outcome, StreamId, Timestamp};

/// Ranks are below this, those of spares too.
const MAX_RANKS: u32 = 1 << 17;

/// Ids that are written down at a time: a write that waits for the disk for each of thousands of workers would keep them waiting for
/// seconds.
const IDS_AT_ONCE: u64 = 64;

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
    pub motion: Motion,
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
        // While the last checkpoint is on its way a newcomer is welcome: should its sender die, the job goes on.
        match &self.phase {
            JobPhase::Done(Outcome::Failed { reason }) => return Err(CoreError::Ending(reason.clone())),
            JobPhase::Done(outcome) => return Err(CoreError::Over(outcome.as_str())),
            _ => {}
        }
        let world_size = self.config.world_size;
        // A spare has a rank beyond the world and keeps it on every later stream; nobody asks for one at first.
        if let Some(rank) = hello.requested_rank.filter(|rank| rank.0 >= world_size && hello.attempt == 0) {
            return Err(CoreError::NoSuchRank { rank, world_size });
        }
        // The same process on a new stream: the old stream is dead, whether or not its end has been seen.
        let returning =
            self.workers.iter().find(|(_, worker)| worker.incarnation == hello.incarnation).map(|(&id, worker)| (id, worker.attempt));
        if let Some((id, attempt)) = returning {
            if hello.attempt <= attempt {
                return Err(CoreError::StaleStream);
            }
            self.free_rank(now, hello.requested_rank, Some(id))?;
            self.lose(now, id, "came back on a new stream", out);
            if let JobPhase::Done(_) = self.phase {
                // That was the end of the job: nothing may be said after it. The worker is told when it asks again.
                return Ok(());
            }
        }
        if let Some(member) = self.awaited(hello.incarnation) {
            self.welcome(now, stream, hello, (member.worker, member.rank), self.generation, out);
            self.has_returned(now);
            return Ok(());
        }
        let rank = match self.free_rank(now, hello.requested_rank, None) {
            Ok(rank) => rank,
            // Its old stream is gone already: it is refused by having no new one, and asks again.
            Err(_) if returning.is_some() => return Ok(()),
            Err(error) => return Err(error),
        };
        if let Some(replaced) = self.absent_member(rank) {
            // Whoever asks for the rank of a worker that is awaited was started in its place.
            self.last_members.retain(|member| member.worker != replaced);
            out.push(Effect::Persist(Fact::Replaced(replaced)));
        }
        let id = WorkerId(self.next_worker);
        self.next_worker += 1;
        if id.0 >= self.reserved_ids {
            self.reserved_ids = id.0 + IDS_AT_ONCE;
            out.push(Effect::Persist(Fact::Joined(WorkerId(self.reserved_ids - 1))));
        }
        self.welcome(now, stream, hello, (id, rank), Generation::NONE, out);
        Ok(())
    }

    /// Lets a worker in; `continues` is the generation that it is a member of and may go on with.
    fn welcome(
        &mut self,
        now: Timestamp,
        stream: StreamId,
        hello: Hello,
        (id, rank): (WorkerId, Rank),
        continues: Generation,
        out: &mut Vec<Effect>,
    ) {
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
            motion: Motion::new(now),
            tell_durable: false,
            leaving: None,
        };
        out.push(Effect::Attach { worker: id, stream });
        out.push(Effect::Send {
            worker: id,
            message: ToWorker::Welcome {
                worker: id,
                rank,
                world_size: self.config.world_size,
                job_id: self.config.job_id.clone(),
                job_toml: self.config.job_toml.clone(),
                heartbeat_interval_ms: u32::try_from((self.config.heartbeat_timeout / 6).as_millis()).unwrap_or(u32::MAX),
                heartbeat_timeout_ms: u32::try_from(self.config.heartbeat_timeout.as_millis()).unwrap_or(u32::MAX),
                join_timeout_ms: u32::try_from(self.config.join_timeout.as_millis()).unwrap_or(u32::MAX),
                continues,
            },
        });
        out.push(Effect::Notice(Notice::Joined(worker.view(id, now, false))));
        self.workers.insert(id, worker);
        self.next_silence = self.next_silence.min(now + self.config.heartbeat_timeout);
        self.last_arrival = now;
    }

    /// The rank of a newcomer; `own` is the worker that it was until now.
    fn free_rank(&self, now: Timestamp, requested: Option<Rank>, own: Option<WorkerId>) -> Result<Rank, CoreError> {
        let others = || self.workers.iter().filter(|(id, _)| Some(**id) != own).map(|(_, worker)| worker);
        let holder = |rank: Rank| others().find(|worker| worker.rank == rank);
        if let Some(rank) = requested {
            return match holder(rank) {
                Some(worker) => {
                    let holder = format!("pid {} on {}", worker.pid, worker.host);
                    Err(CoreError::RankTaken { rank, holder, retry_for: self.config.heartbeat_timeout })
                }
                None => Ok(rank),
            };
        }
        let taken: BTreeSet<Rank> = others().map(|worker| worker.rank).collect();
        let reserved = self.reserved_ranks(now);
        let free = |rank: &Rank| !taken.contains(rank);
        let mut ranks = (0..self.config.world_size).map(Rank);
        if let Some(rank) = ranks.clone().find(|rank| free(rank) && !reserved.contains(rank)) {
            return Ok(rank);
        }
        if ranks.any(|rank| free(&rank)) {
            return Err(self.not_yet());
        }
        // A spare.
        (self.config.world_size..MAX_RANKS).map(Rank).find(free).ok_or(CoreError::NoRankLeft)
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
            let rank = worker.rank;
            out.push(Effect::Notice(Notice::Ready(worker.view(id, now, false))));
            self.last_arrival = now;
            self.setbacks.loaded(rank);
        }
        self.admit(out);
        self.try_form(now, out);
        Ok(())
    }

    /// A worker is gone, by whatever way. Its stream is the driver's to close.
    pub(super) fn lose(&mut self, now: Timestamp, id: WorkerId, cause: &str, out: &mut Vec<Effect>) {
        let Some(worker) = self.workers.remove(&id) else { return };
        self.lease_requests.remove(&id);
        let failure = format!("{} lost at step {} in phase {}: {cause}", worker.name(), worker.step, worker.phase.as_str());
        out.push(Effect::Notice(Notice::Lost { worker: worker.view(id, now, false), cause: cause.to_owned() }));
        let held = self.truth.holders.remove(&id);
        if held {
            self.cut_off.insert(id);
        }
        // What it was sending may still arrive, or not: somebody else is asked.
        self.checkpoint.senders.retain(|_, sender| *sender != id);
        if self.members().contains(&id) {
            self.note_death(now, id, &worker.host, out);
        }
        match &mut self.phase {
            JobPhase::Gathering { .. } | JobPhase::Done(_) => {}
            // It may come back once more.
            JobPhase::Returning { said, .. } => drop(said.remove(&id)),
            JobPhase::Forming { members, .. } => {
                if members.contains(&id) {
                    self.note_loss(failure, &worker);
                    self.gather(now, out);
                }
            }
            JobPhase::Running { members, .. } => {
                if members.contains(&id) {
                    let is_last = !members.iter().any(|member| self.workers.contains_key(member));
                    self.note_loss(failure.clone(), &worker);
                    if !(is_last && self.wait_for_return(now, out)) {
                        self.abort(now, &failure, out);
                    }
                }
            }
            JobPhase::Stopping { members, stopped, .. } => {
                let was_member = members.contains(&id);
                members.retain(|&member| member != id);
                stopped.remove(&id);
                let is_last = was_member && members.is_empty();
                self.note_loss(failure.clone(), &worker);
                if !(is_last && self.wait_for_return(now, out)) {
                    self.abort_the_rest(now, &failure, out);
                    self.settle_if_all_stopped(now, out);
                }
            }
            JobPhase::Finishing { outcome, attempts, .. } => {
                let (outcome, attempts) = (outcome.clone(), *attempts);
                self.note_loss(failure, &worker);
                if !(self.truth.holders.is_empty() && self.wait_for_return(now, out)) {
                    self.ask_for_last_checkpoint(now, outcome, attempts, out);
                }
            }
        }
        if matches!(self.phase, JobPhase::Gathering { .. }) && held && self.truth.holders.is_empty() && self.wait_for_return(now, out) {
            return;
        }
        // Its leases wait for the word of the source, except where nobody is left to speak.
        if matches!(self.phase, JobPhase::Gathering { .. }) {
            self.release_leases_of_the_gone(out);
            self.forget_truth_without_holders(out);
            // A spare, or those that are left of an elastic world, need not wait for the next event.
            self.try_form(now, out);
        }
    }

    /// Refuses to let a worker go whose leaving would end the job, as no other can come in its place.
    pub(super) fn can_be_spared(&self, id: WorkerId, rank: Rank) -> Result<(), CoreError> {
        let left = self.workers.iter().filter(|(other, worker)| **other != id && worker.leaving.is_none()).count();
        let min = self.config.min_world_size;
        if self.config.workers_are_alike && left < min as usize { Err(CoreError::CannotBeSpared { rank, left, min }) } else { Ok(()) }
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
                self.gather(now, out);
                self.let_leavers_go(now, out);
            }
            JobPhase::Stopping { members, .. } if members.contains(&id) => {}
            JobPhase::Returning { .. } => {
                if !self.last_members.iter().any(|member| member.worker == id) {
                    self.let_go(now, id, out);
                }
            }
            // It may be about to send the last checkpoint.
            JobPhase::Finishing { .. } => {}
            JobPhase::Gathering { .. } => self.let_leavers_go(now, out),
            // A spare, or a newcomer: where members train or regroup, what they hold is theirs to say.
            _ => self.let_go(now, id, out),
        }
    }

    pub(super) fn let_go(&mut self, now: Timestamp, id: WorkerId, out: &mut Vec<Effect>) {
        let Some(worker) = self.workers.remove(&id) else { return };
        self.lease_requests.remove(&id);
        let message = ToWorker::Stop { reason: StopReason::Drained, message: worker.leaving.clone().unwrap_or_default() };
        out.push(Effect::Send { worker: id, message });
        out.push(Effect::Detach { worker: id });
        out.push(Effect::Notice(Notice::Left(worker.view(id, now, false))));
        self.truth.holders.remove(&id);
    }
}
