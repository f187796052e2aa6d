//! Which steps of the current generation are final.
//!
//! A step is final when every member has reported it, or one has reported the next: to finish step S + 1 all members must
//! have entered it, and so have applied S.

use std::collections::BTreeMap;

use peapod_proto::ids::{MemberIndex, Rank, Step};
use peapod_proto::message::{StepRecord, StepReport, StepTimings, Stopped, ValidationLosses};

use super::ledger::{LedgerError, Skip};
use super::{Core, Effect, Fact, JobPhase, Notice, Timestamp};

/// One step that is not final yet.
#[derive(Debug, Clone, Default)]
struct Pending {
    num_reports: u32,
    record: Option<StepRecord>,
    timings: StepTimings,
    /// Digests of the adapter by those who copied it.
    digests: Vec<(MemberIndex, u64)>,
}

/// Reports of the current generation.
#[derive(Debug, Clone)]
pub(super) struct Progress {
    num_members: u32,
    final_step: Step,
    highest: Step,
    pending: BTreeMap<Step, Pending>,
    /// Last step each member reported.
    reported: Vec<Step>,
}

/// A step that has just become final.
pub(super) struct Finalised {
    pub record: StepRecord,
    pub timings: StepTimings,
    pub digests: Vec<(MemberIndex, u64)>,
}

impl Progress {
    /// Outside of any generation, at `step`.
    pub fn new(step: Step) -> Self {
        Self { num_members: 0, final_step: step, highest: step, pending: BTreeMap::new(), reported: Vec::new() }
    }

    /// A generation that starts from `base`.
    pub fn start(base: Step, num_members: u32) -> Self {
        Self { num_members, reported: vec![base; num_members as usize], ..Self::new(base) }
    }

    /// What a member has done while nobody listened: as if it had reported each step, and had been the one to tell its samples.
    pub fn catch_up(&mut self, member: MemberIndex, applied: Step, records: Vec<StepRecord>) {
        let Some(reported) = self.reported.get_mut(member.0 as usize) else { return };
        let before = std::mem::replace(reported, applied.max(*reported));
        self.highest = self.highest.max(applied);
        for record in records.into_iter().filter(|record| record.step > self.final_step && record.step <= applied) {
            self.pending.entry(record.step).or_default().record.get_or_insert(record);
        }
        for step in before.0 + 1..=applied.0 {
            if Step(step) > self.final_step {
                self.pending.entry(Step(step)).or_default().num_reports += 1;
            }
        }
    }

    pub fn final_step(&self) -> Step {
        self.final_step
    }

    /// Takes one member's word. A step reported twice, or out of order, counts once.
    pub fn report(&mut self, member: MemberIndex, report: StepReport) {
        let Some(reported) = self.reported.get_mut(member.0 as usize) else { return };
        if report.step != reported.next() {
            return;
        }
        *reported = report.step;
        self.highest = self.highest.max(report.step);
        if report.step <= self.final_step {
            return;
        }
        let pending = self.pending.entry(report.step).or_default();
        pending.num_reports += 1;
        if report.record.is_some() {
            pending.record = report.record;
        }
        let (slowest, said) = (&mut pending.timings, report.timings);
        slowest.data = slowest.data.max(said.data);
        slowest.compute = slowest.compute.max(said.compute);
        // Everybody waits for the slowest in the collective: the shortest stay is its own cost.
        slowest.collective = if pending.num_reports == 1 { said.collective } else { slowest.collective.min(said.collective) };
        slowest.update = slowest.update.max(said.update);
        slowest.validation = slowest.validation.max(said.validation);
        slowest.sampling = slowest.sampling.max(said.sampling);
        if let Some(digest) = report.snapshot {
            pending.digests.push((member, digest));
        }
    }

    /// The next step, if it is final and its record has arrived.
    pub fn next_final(&mut self) -> Option<Finalised> {
        let next = self.final_step.next();
        let pending = self.pending.get(&next)?;
        let is_final = pending.num_reports == self.num_members || self.highest > next;
        if !is_final || pending.record.is_none() {
            return None;
        }
        let pending = self.pending.remove(&next)?;
        self.final_step = next;
        Some(Finalised { record: pending.record?, timings: pending.timings, digests: pending.digests })
    }

    /// The source's word: its records up to `applied` are the truth, what was only reported is void.
    pub fn settle(&mut self, stopped: &Stopped) -> Result<Vec<Finalised>, Step> {
        let mut said: BTreeMap<Step, StepRecord> = stopped.records.iter().map(|record| (record.step, record.clone())).collect();
        let mut finalised = Vec::new();
        while self.final_step < stopped.applied {
            let next = self.final_step.next();
            let pending = self.pending.remove(&next).unwrap_or_default();
            let record = said.remove(&next).or(pending.record).ok_or(next)?;
            self.final_step = next;
            finalised.push(Finalised { record, timings: pending.timings, digests: pending.digests });
        }
        self.pending.clear();
        Ok(finalised)
    }
}

impl Core {
    /// Commits whatever has become final.
    pub(super) fn advance(&mut self, now: Timestamp, out: &mut Vec<Effect>) {
        while let Some(finalised) = self.progress.next_final() {
            self.commit(now, finalised, out);
            if matches!(self.phase, JobPhase::Done(_)) {
                return;
            }
        }
    }

    /// Commits what the source of the next generation holds.
    pub(super) fn commit_source(&mut self, now: Timestamp, source: &Stopped, out: &mut Vec<Effect>) {
        match self.progress.settle(source) {
            Ok(finalised) => {
                for step in finalised {
                    self.commit(now, step, out);
                }
            }
            Err(step) => {
                let reason = format!(
                    "the source of the next generation holds step {} but not the names of step {step}: the ledger cannot follow",
                    source.applied
                );
                self.note_failure(reason.clone());
                self.fail(reason, out);
            }
        }
    }

    fn commit(&mut self, now: Timestamp, step: Finalised, out: &mut Vec<Effect>) {
        if matches!(self.phase, JobPhase::Done(_)) {
            return;
        }
        let Finalised { record, timings, digests } = step;
        if let Err(error) = self.enter(&record) {
            let error = self.with_url(&error);
            self.note_failure(error.clone());
            return self.fail(error, out);
        }
        if let Some(reason) = self.divergence(&record, &digests) {
            self.note_failure(reason.clone());
            return self.fail(reason, out);
        }
        self.get_over_failure(record.step, record.generation);
        for worker in self.workers.values_mut() {
            worker.tell_durable = true;
        }
        let (names, skipped) = (record.names.clone(), record.skipped);
        out.push(Effect::Persist(Fact::Commit { step: record.step, generation: record.generation, names, skipped }));
        if digests.iter().any(|(member, _)| *member == MemberIndex(0)) {
            let ledger = std::sync::Arc::new(self.ledger.clone());
            self.checkpoint.frozen.insert((record.step, record.generation), ledger.clone());
            if let Some(&sender) = self.members().first() {
                self.checkpoint.senders.insert((record.step, record.generation), sender);
            }
            self.checkpoint.asked = false;
            self.checkpoint.next_due = now + self.config.checkpoint_every;
            out.push(Effect::Freeze { step: record.step, generation: record.generation, ledger });
        }
        if record.skipped {
            self.skipped_in_a_row += 1;
            out.push(Effect::Notice(Notice::StepSkipped { step: record.step, in_a_row: self.skipped_in_a_row }));
            if self.skipped_in_a_row > self.config.max_skipped_steps {
                let reason = format!(
                    "{} steps in a row were not finite, the last one {} (train.max_skipped_steps = {}): lower the learning rate, or start from an earlier checkpoint",
                    self.skipped_in_a_row, record.step, self.config.max_skipped_steps
                );
                self.note_failure(reason.clone());
                // Its losses on validation samples come after the job's end: nothing may follow that in the journal.
                out.push(Effect::Committed { record, timings });
                return self.fail(reason, out);
            }
        } else {
            self.skipped_in_a_row = 0;
        }
        self.fit.trained(&record);
        self.pace.step(now, timings);
        self.setbacks.progressed();
        self.mute.clear();
        let validation = record.validation;
        out.push(Effect::Committed { record, timings });
        if let Some(losses) = validation {
            self.validated(losses, out);
        }
    }

    /// Believes losses that came with a final step; says them once, though the members may have computed them in two generations.
    pub(super) fn validated(&mut self, losses: ValidationLosses, out: &mut Vec<Effect>) {
        if self.validation.is_none_or(|last| last.step < losses.step) {
            self.validation = Some(losses);
            out.push(Effect::Persist(Fact::Validated(losses)));
            out.push(Effect::Validated(losses));
        }
    }

    /// Enters a step's samples into the ledger and ends the leases of shards that are done.
    fn enter(&mut self, record: &StepRecord) -> Result<(), LedgerError> {
        for &name in &record.names {
            if !self.barren.is_empty()
                && let Some(source) = self.ledger.source_with(name.shard)
            {
                self.barren.remove(&source);
            }
            if record.skipped {
                self.ledger.skip(name, Skip::NotFinite)?;
            } else {
                self.ledger.commit(name, record.step)?;
            }
            if self.ledger.is_done(name.epoch, name.shard) {
                self.leases.finish(name.epoch, name.shard);
            }
        }
        Ok(())
    }

    /// All ranks must hold the same weights; a difference never heals by itself.
    fn divergence(&self, record: &StepRecord, digests: &[(MemberIndex, u64)]) -> Option<String> {
        let &(_, first) = digests.first()?;
        let &(other, _) = digests.iter().find(|&&(_, digest)| digest != first)?;
        let members = self.members();
        let rank = |index: MemberIndex| {
            members.get(index.0 as usize).and_then(|id| self.workers.get(id)).map_or(Rank(index.0), |worker| worker.rank)
        };
        Some(format!(
            "rank {} holds other weights than rank {} after step {}: the ranks have diverged",
            rank(other),
            rank(digests[0].0),
            record.step
        ))
    }
}
