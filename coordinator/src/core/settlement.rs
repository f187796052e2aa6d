//! How a generation is left, and what of it stands.

use std::collections::{BTreeMap, BTreeSet};

use peapod_proto::ids::{Generation, MemberIndex, Step, WorkerId};
use peapod_proto::message::{Phase, StopCause, StopReason, Stopped, ToWorker};

use super::ledger::{Ledger, Rules};
use super::membership::Worker;
use super::{Core, CoreError, Effect, Fact, JobPhase, Notice, Outcome, Progress, Returned, Timestamp, Truth, worker_mut};

impl Core {
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

    /// Breaks the generation up: every survivor is told to leave its collective.
    pub(super) fn abort(&mut self, now: Timestamp, reason: &str, out: &mut Vec<Effect>) {
        let JobPhase::Running { members, .. } = &self.phase else { return };
        let members: Vec<WorkerId> = members.iter().copied().filter(|member| self.workers.contains_key(member)).collect();
        out.push(Effect::Notice(Notice::Aborted { generation: self.generation, reason: reason.to_owned() }));
        for &worker in &members {
            let message = ToWorker::Abort { generation: self.generation, reason: reason.to_owned() };
            out.push(Effect::Send { worker, message });
        }
        // What becomes final now did not take as long as a step takes.
        self.pace.pause();
        let deadline = now + self.config.heartbeat_timeout;
        self.phase = JobPhase::Stopping { members, stopped: BTreeMap::new(), deadline, aborted: true };
        self.settle_if_all_stopped(now, out);
    }

    /// A meeting that one of its members will not come to: those still on their way must not wait for it.
    pub(super) fn abort_the_rest(&mut self, now: Timestamp, reason: &str, out: &mut Vec<Effect>) {
        let JobPhase::Stopping { members, stopped, deadline, aborted: aborted @ false } = &mut self.phase else { return };
        *aborted = true;
        *deadline = now + self.config.heartbeat_timeout;
        for &worker in members.iter().filter(|member| !stopped.contains_key(member)) {
            let message = ToWorker::Abort { generation: self.generation, reason: reason.to_owned() };
            out.push(Effect::Send { worker, message });
        }
    }

    pub(super) fn member_stopped(
        &mut self,
        now: Timestamp,
        id: WorkerId,
        stopped: Stopped,
        out: &mut Vec<Effect>,
    ) -> Result<(), CoreError> {
        if let JobPhase::Returning { said, .. } = &mut self.phase {
            if self.last_members.iter().any(|member| member.worker == id) {
                said.insert(id, Returned::Stopped(stopped));
                self.end_wait_if_all_spoke(now, out);
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
                    let whom = stopped.lost_member.and_then(|index| self.whois(index)).unwrap_or_default();
                    let reason = format!("{name} at step {}: {}{whom}", stopped.applied, stopped.reason);
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

    /// Who a member is that another one knows by its index only, to be said behind that.
    fn whois(&self, index: MemberIndex) -> Option<String> {
        let member = self.last_members.get(index.0 as usize)?;
        self.workers.get(&member.worker).map(|worker| format!("; member {index} is {}", worker.name()))
    }

    /// Once every survivor has spoken: the source's step is the truth.
    pub(super) fn settle_if_all_stopped(&mut self, now: Timestamp, out: &mut Vec<Effect>) {
        let JobPhase::Stopping { members, stopped, aborted, .. } = &self.phase else { return };
        let is_broken = *aborted;
        if members.iter().any(|member| !stopped.contains_key(member)) {
            return;
        }
        let members = members.clone();
        let broken = self.broken_link(&members, stopped);
        let mut stopped: BTreeMap<WorkerId, Stopped> = stopped.iter().map(|(&id, said)| (id, self.on_the_line(said.clone()))).collect();
        // An honest survivor holds every final step; whatever it holds beyond becomes the truth.
        let least = self.truth.step.max(self.progress.final_step());
        // Most advanced first; the lowest id among equals.
        let source = members.iter().copied().max_by_key(|id| (stopped[id].applied, std::cmp::Reverse(*id)));
        let source = source.and_then(|id| stopped.remove(&id).map(|said| (id, said))).filter(|(_, said)| said.applied >= least);
        if let Some((one, other)) = broken {
            self.note_broken(now, one, other, out);
        }
        // What of it becomes final below starts the count again.
        if is_broken && let Some(reason) = self.note_breakage(now) {
            return self.fail(reason, out);
        }
        match source {
            Some((source, said)) => self.settle_on(now, source, &said, &stopped, out),
            None => self.settle_on_nobody(now, out),
        }
    }

    /// No survivor holds all final steps.
    fn settle_on_nobody(&mut self, now: Timestamp, out: &mut Vec<Effect>) {
        self.truth.holders.clear();
        self.release_leases_of_the_gone(out);
        self.gather(now, out);
        self.forget_truth_without_holders(out);
        if let Some(reason) = self.stop_requested.clone() {
            return self.ask_for_last_checkpoint(now, Outcome::Stopped { reason }, 1, out);
        }
        self.try_form(now, out);
    }

    /// What the source `said` it has applied is the truth, and whoever of the `others` holds as much holds it too.
    fn settle_on(&mut self, now: Timestamp, source: WorkerId, said: &Stopped, others: &BTreeMap<WorkerId, Stopped>, out: &mut Vec<Effect>) {
        out.push(Effect::Void { generation: self.generation, after: said.applied });
        let stands = |&(step, generation): &(Step, Generation)| generation != self.generation || step <= said.applied;
        self.checkpoint.frozen.retain(|key, _| stands(key));
        self.checkpoint.senders.retain(|key, _| stands(key));
        let base = self.truth.step;
        self.commit_source(now, said, out);
        if matches!(self.phase, JobPhase::Done(_)) {
            return;
        }
        let equals: BTreeMap<WorkerId, &Stopped> = others
            .iter()
            .filter(|(_, other)| other.applied == said.applied)
            .map(|(&id, other)| (id, other))
            .chain([(source, said)])
            .collect();
        // Whoever holds the source's step may know more about it: that it was the last one, or its losses on the validation samples.
        if let Some(losses) = equals.values().find_map(|equal| equal.validation) {
            self.validated(losses, out);
        }
        // With nothing trained, some may never have received the fresh weights: the next source makes the same ones.
        let holders = if said.applied == Step(0) { BTreeSet::new() } else { equals.keys().copied().collect() };
        let generation = if said.applied > base { self.generation } else { self.truth.generation };
        self.truth = Truth { step: said.applied, generation, holders };
        self.cut_off.clear();
        out.push(Effect::Persist(Fact::Settled { step: said.applied, generation }));
        self.release_leases_of_the_gone(out);

        let is_over = |cause| equals.values().any(|equal| equal.cause == cause);
        self.end_or_gather(now, is_over(StopCause::StepsDone), is_over(StopCause::DataDone), out);
    }

    /// Ends the job if it is at its goal or was asked to stop, or waits for the next generation's members.
    fn end_or_gather(&mut self, now: Timestamp, steps_done: bool, is_dry: bool, out: &mut Vec<Effect>) {
        // A member that leaves is given nothing more: what is left because of that is for the next generation. A coordinator that was
        // started again may know less than its members have done: whoever has not asked it yet reads once more what it is believed to hold.
        let is_left = self.leases.any_left() || self.grant_again.iter().any(|member| self.workers.contains_key(member));
        let is_short = self.config.epochs.is_none() || self.unaccounted().is_some();
        let data_done = is_dry && !(is_left && is_short);
        let done = steps_done || data_done || self.config.last_step.is_some_and(|last| self.truth.step >= last);
        if data_done && let Some(reason) = self.unaccounted() {
            self.note_failure(reason.clone());
            return self.fail(reason, out);
        }
        if done {
            return self.ask_for_last_checkpoint(now, Outcome::Finished, 1, out);
        }
        if let Some(reason) = self.stop_requested.clone() {
            return self.ask_for_last_checkpoint(now, Outcome::Stopped { reason }, 1, out);
        }
        self.gather(now, out);
        self.let_leavers_go(now, out);
    }

    /// Why the data cannot be done although no worker has any left: a promise of the ledger is broken.
    pub(super) fn unaccounted(&self) -> Option<String> {
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

    pub(super) fn release_leases_of_the_gone(&mut self, out: &mut Vec<Effect>) {
        self.keep_leases_of(|core, holder| core.workers.contains_key(&holder), out);
    }

    /// Takes back what those hold who are not in the generation that begins: nobody would read it. And whoever comes back into a later one
    /// cannot know whether the share it had in flight was trained.
    pub(super) fn release_leases_outside(&mut self, members: &[WorkerId], out: &mut Vec<Effect>) {
        let members: BTreeSet<&WorkerId> = members.iter().collect();
        self.keep_leases_of(|_, holder| members.contains(&holder), out);
    }

    fn keep_leases_of(&mut self, keeps: impl Fn(&Self, WorkerId) -> bool, out: &mut Vec<Effect>) {
        let released: BTreeSet<WorkerId> = self.leases.holders().into_iter().filter(|&holder| !keeps(self, holder)).collect();
        if released.is_empty() {
            return;
        }
        released.iter().for_each(|&holder| self.leases.release(holder));
        self.last_members.retain(|member| !released.contains(&member.worker));
        out.push(Effect::Persist(Fact::Released(released)));
    }

    /// With nobody left who holds the newest weights, the newest checkpoint is the truth, and its ledger the ledger.
    pub(super) fn forget_truth_without_holders(&mut self, out: &mut Vec<Effect>) {
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
        if from != to || self.truth != truth || !self.last_members.is_empty() {
            self.truth = truth;
            self.last_members.clear();
            out.push(Effect::Persist(Fact::FromCheckpoint { step: to, ledger }));
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
}
