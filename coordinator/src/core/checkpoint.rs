//! Which checkpoints there are, which are on their way, and the last one of all.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use peapod_proto::ids::{Generation, Step, WorkerId};
use peapod_proto::message::ToWorker;

use super::ledger::Ledger;
use super::{Core, Effect, Fact, JobPhase, Notice, Outcome, Resume, Timestamp};

/// How often the last checkpoint is tried: for more than ten minutes, in which a disk can be cleared or a store come back.
const FINAL_CHECKPOINT_ATTEMPTS: u32 = 16;
/// The same where a copy has not arrived, which takes its time: who sends it may hang.
const ATTEMPTS_OF_SILENT_SENDERS: u32 = 5;
/// So many copies are asked of the last holder of a step before it may leave all the same.
const FAREWELLS: u32 = 3;
/// Time from the first failure of the last checkpoint to the next attempt; each later one waits twice as long, up to the longest.
const RETRY_AFTER: Duration = Duration::from_secs(2);
const LONGEST_RETRY: Duration = Duration::from_secs(60);
/// A copy of the last step that has not arrived after this long is lost, or its sender hangs.
const LAST_COPY: Duration = Duration::from_secs(120);

/// Which checkpoints there are and which are on their way.
#[derive(Debug, Clone)]
pub(super) struct Checkpoint {
    pub last: Option<Resume>,
    /// Steps whose copy is being sent, with their ledger.
    pub frozen: BTreeMap<(Step, Generation), Arc<Ledger>>,
    /// Who sends them.
    pub senders: BTreeMap<(Step, Generation), WorkerId>,
    /// Until when a copy is waited for that keeps the last holder from leaving.
    pub farewell_until: Option<Timestamp>,
    /// Of whom the copy of the last step has not arrived.
    pub silent: BTreeSet<WorkerId>,
    pub next_due: Timestamp,
    pub asked: bool,
    /// How often the newest weights were asked for before their last holder leaves.
    pub farewells: u32,
}

impl Core {
    /// Whether a copy of this step is of the line of weights that goes on, and not known to be stored.
    #[must_use]
    pub fn awaits_checkpoint(&self, step: Step, generation: Generation) -> bool {
        self.checkpoint.frozen.contains_key(&(step, generation))
    }

    pub(super) fn checkpoint_stored(&mut self, now: Timestamp, step: Step, generation: Generation, out: &mut Vec<Effect>) {
        self.checkpoint.senders.remove(&(step, generation));
        let Some(ledger) = self.checkpoint.frozen.remove(&(step, generation)) else { return };
        self.checkpoint.next_due = now + self.config.checkpoint_every;
        if self.checkpoint.last.as_ref().is_none_or(|last| last.step < step) {
            self.checkpoint.last = Some(Resume { step, ledger, generation });
            // Copies of earlier steps may never come, and nobody needs them now.
            self.checkpoint.frozen.retain(|&(frozen, _), _| frozen > step);
            self.checkpoint.senders.retain(|&(sent, _), _| sent > step);
        }
        out.push(Effect::Persist(Fact::Checkpoint(step)));
        out.push(Effect::Notice(Notice::Checkpoint { step }));
        match &self.phase {
            JobPhase::Finishing { outcome, .. } if step == self.truth.step => {
                let outcome = outcome.clone();
                self.finish(outcome, out);
            }
            JobPhase::Gathering { .. } => self.let_leavers_go(now, out),
            _ => {}
        }
    }

    pub(super) fn checkpoint_failed(&mut self, now: Timestamp, step: Step, generation: Generation, error: &str, out: &mut Vec<Effect>) {
        if self.checkpoint.frozen.remove(&(step, generation)).is_none() {
            if generation == self.generation && step > self.progress.final_step() {
                // Its step may be final soon: what keeps it from being stored keeps the next one too.
                out.push(Effect::Notice(Notice::CheckpointFailed { step, error: error.to_owned(), again_in: None }));
            }
            // Otherwise nobody waits for it.
            return;
        }
        self.checkpoint.senders.remove(&(step, generation));
        self.checkpoint.next_due = now + self.config.checkpoint_every;
        self.checkpoint.asked = false;
        // Copies of earlier steps that were still on their way are refused then, and say nothing about the last one.
        let is_last = (step, generation) == (self.truth.step, self.generation);
        let mut again_in = None;
        if let JobPhase::Finishing { outcome, attempts, .. } = self.phase.clone()
            && is_last
        {
            let allowed = if self.checkpoint.silent.is_empty() { FINAL_CHECKPOINT_ATTEMPTS } else { ATTEMPTS_OF_SILENT_SENDERS };
            if attempts >= allowed {
                out.push(Effect::Notice(Notice::CheckpointFailed { step, error: error.to_owned(), again_in }));
                return self.fail(format!("the last checkpoint (step {step}) could not be stored in {attempts} attempts: {error}"), out);
            }
            let pause = RETRY_AFTER.saturating_mul(2_u32.saturating_pow(attempts - 1)).min(LONGEST_RETRY);
            again_in = Some(pause);
            self.phase = JobPhase::Finishing { outcome, attempts: attempts + 1, deadline: now + pause };
        }
        out.push(Effect::Notice(Notice::CheckpointFailed { step, error: error.to_owned(), again_in }));
        if let JobPhase::Gathering { .. } = self.phase {
            self.let_leavers_go(now, out);
        }
    }

    /// Ends the job with a checkpoint of the truth, by one who holds it; at once where there is nothing new to keep.
    ///
    /// A copy that does not arrive in time is lost: whoever sent it may have lost its connection before its step was final, and a
    /// failure of that time says nothing here.
    pub(super) fn ask_for_last_checkpoint(&mut self, now: Timestamp, outcome: Outcome, attempts: u32, out: &mut Vec<Effect>) {
        let deadline = now + self.config.join_timeout.min(LAST_COPY);
        if self.checkpoint_step() == Some(self.truth.step) || self.truth.step == Step(0) {
            return self.finish(outcome, out);
        }
        let key = (self.truth.step, self.generation);
        if self.checkpoint.senders.get(&key).is_some_and(|sender| self.workers.contains_key(sender)) {
            // A copy of this very step is on its way: its arrival ends the job.
            self.phase = JobPhase::Finishing { outcome, attempts, deadline };
            return;
        }
        let mut holders: Vec<WorkerId> = self.truth.holders.iter().copied().filter(|holder| self.workers.contains_key(holder)).collect();
        // Who has not sent it may hang.
        holders.sort_by_key(|holder| self.checkpoint.silent.contains(holder));
        let Some(&holder) = holders.first() else {
            let reason = self.first_failure().unwrap_or_default().to_owned();
            let kept = self.checkpoint_step().map_or_else(|| "nothing is kept".to_owned(), |step| format!("step {step} is kept"));
            return self.fail(format!("every worker that held step {} is gone, {kept}: {reason}", self.truth.step), out);
        };
        self.ask_for_truth(holder, out);
        self.phase = JobPhase::Finishing { outcome, attempts, deadline };
    }

    /// The pause after a failure is over, or the copy that was asked for has not come in time.
    pub(super) fn last_checkpoint_is_due(&mut self, now: Timestamp, outcome: Outcome, attempts: u32, out: &mut Vec<Effect>) {
        let (step, generation) = (self.truth.step, self.generation);
        let Some(&sender) = self.checkpoint.senders.get(&(step, generation)) else {
            return self.ask_for_last_checkpoint(now, outcome, attempts, out);
        };
        self.checkpoint.silent.insert(sender);
        self.checkpoint_failed(now, step, generation, "its copy has not arrived", out);
    }

    /// Asks a holder of the newest weights, which is in no generation, for a checkpoint of them.
    fn ask_for_truth(&mut self, holder: WorkerId, out: &mut Vec<Effect>) {
        let key = (self.truth.step, self.generation);
        let ledger = Arc::new(self.ledger.clone());
        self.checkpoint.frozen.insert(key, ledger.clone());
        self.checkpoint.senders.insert(key, holder);
        out.push(Effect::Freeze { step: self.truth.step, generation: self.generation, ledger });
        out.push(Effect::Send { worker: holder, message: ToWorker::TakeSnapshot { generation: self.generation } });
    }

    /// Lets those go who want to leave, while no generation runs. If none but they hold the newest weights, one stays until these are
    /// stored: whoever takes all workers away at once, with a warning, loses nothing.
    pub(super) fn let_leavers_go(&mut self, now: Timestamp, out: &mut Vec<Effect>) {
        let mut leavers: Vec<WorkerId> = self.workers.iter().filter(|(_, worker)| worker.leaving.is_some()).map(|(&id, _)| id).collect();
        let stays = self.last_to_leave();
        if let Some(last) = stays {
            leavers.retain(|&id| id != last);
            let key = (self.truth.step, self.generation);
            if self.checkpoint.senders.get(&key).is_none_or(|sender| !self.workers.contains_key(sender)) {
                self.checkpoint.farewells += 1;
                self.ask_for_truth(last, out);
            }
            self.checkpoint.farewell_until.get_or_insert(now + LAST_COPY.min(self.config.join_timeout / 2));
        }
        for id in leavers {
            self.let_go(now, id, out);
        }
        if stays.is_none() {
            (self.checkpoint.farewells, self.checkpoint.farewell_until) = (0, None);
        }
        self.release_leases_of_the_gone(out);
        self.forget_truth_without_holders(out);
        self.try_form(now, out);
    }

    /// The copy that keeps the last holder from leaving has not come in time: it may have been refused before its step was final.
    pub(super) fn farewell_is_due(&mut self, now: Timestamp, out: &mut Vec<Effect>) {
        self.checkpoint.farewell_until = None;
        self.checkpoint.senders.remove(&(self.truth.step, self.generation));
        self.let_leavers_go(now, out);
    }

    /// The holder of the newest weights that has to stay a little, as all holders want to leave and no checkpoint has them.
    pub(super) fn last_to_leave(&self) -> Option<WorkerId> {
        let leaves = |id: &WorkerId| self.workers.get(id).is_none_or(|worker| worker.leaving.is_some());
        let waits = matches!(self.phase, JobPhase::Gathering { .. });
        let is_kept = self.checkpoint_step() >= Some(self.truth.step) || self.truth.step == Step(0);
        if !waits || is_kept || self.checkpoint.farewells >= FAREWELLS || !self.truth.holders.iter().all(leaves) {
            return None;
        }
        self.truth.holders.iter().find(|holder| self.workers.contains_key(holder)).copied()
    }
}
