//! What must hold, whatever happens.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use peapod_coordinator::core::Outcome;
use peapod_coordinator::core::ledger::Ledger;
use peapod_proto::ids::{Epoch, Generation, SampleName, ShardId, Step, WorkerId};
use peapod_proto::message::{Assignment, StepRecord, ToWorker};

use super::plan::Kind;
use super::queue::Time;
use super::weights::Weights;
use super::{ProcessId, World};

/// What has been seen so far.
#[derive(Default)]
pub struct Checks {
    /// Final steps on the line that goes on, by the generation that made them.
    log: BTreeMap<Step, Generation>,
    last: Step,
    /// What every member of a generation holds after a step.
    states: HashMap<(Generation, Step), u64>,
    generations: BTreeSet<Generation>,
    assignments: Vec<(WorkerId, Assignment)>,
    /// Members of the newest generation, and when it was formed.
    members: Vec<ProcessId>,
    formed_at: Time,
    /// Times the job went back to a checkpoint.
    pub rollbacks: u32,
}

impl Checks {
    /// Whether a ledger holds exactly the samples of some weights, each once.
    pub fn agrees(&self, weights: &Weights, ledger: &Ledger) -> Result<(), String> {
        let mut trained: HashSet<SampleName> = HashSet::new();
        let (mut committed, mut not_finite) = (0, 0);
        let mut expected = weights.step();
        for made in weights.steps() {
            if made.step != expected {
                return Err(format!("step {} follows step {} in the weights", expected, made.step));
            }
            expected = Step(expected.0.saturating_sub(1));
            for &name in &made.names {
                if !trained.insert(name) {
                    return Err(format!("sample {name} is in the weights twice"));
                }
                if !ledger.is_done(name.epoch, name.shard) && !ledger.done_samples(name.epoch, name.shard).contains(name.index) {
                    return Err(format!("sample {name} of step {} is in the weights and not in the ledger", made.step));
                }
            }
            *(if made.skipped { &mut not_finite } else { &mut committed }) += made.names.len() as u64;
        }
        if expected != Step(0) {
            return Err(format!("the weights begin after step {expected}"));
        }
        let totals = ledger.totals();
        if (totals.committed, totals.not_finite) != (committed, not_finite) {
            return Err(format!("the weights have {committed} samples and {not_finite} that were not finite, the ledger {totals:?}"));
        }
        Ok(())
    }

    /// A coordinator starts where this step is final.
    pub fn go_back_to(&mut self, step: Step) {
        self.log.retain(|&logged, _| logged <= step);
        self.last = step;
    }

    /// A step becomes final.
    pub fn committed(&mut self, record: &StepRecord) -> Result<(), String> {
        if record.step != self.last.next() {
            return Err(format!("step {} becomes final after step {}", record.step, self.last));
        }
        self.last = record.step;
        self.log.insert(record.step, record.generation);
        Ok(())
    }

    /// Whether weights have every step that is final.
    fn has_every_final_step(&self, weights: &Weights) -> Result<(), String> {
        let made: BTreeMap<Step, Generation> = weights.steps().map(|made| (made.step, made.generation)).collect();
        match self.log.iter().find(|(step, generation)| made.get(step) != Some(generation)) {
            Some((step, generation)) => {
                Err(format!("step {step} of {generation} was final, the weights that go on have it of {:?}", made.get(step)))
            }
            None => Ok(()),
        }
    }
}

impl World {
    /// A member of a generation holds something: all members hold the same after the same step.
    pub(super) fn note_state(&mut self, process: ProcessId, generation: Generation) {
        let Some(state) = &self.processes[process].trainer.state else { return };
        let (step, digest) = (state.step(), state.weights.digest());
        let first = *self.checks.states.entry((generation, step)).or_insert(digest);
        if first != digest {
            self.fail(format!("p{process} holds other weights than the others after step {step} of {generation}"));
        }
    }

    /// The coordinator says something that must be said once.
    pub(super) fn sends(&mut self, message: &ToWorker) -> Result<(), String> {
        match message {
            ToWorker::MakeBootstrap { generation, .. } if !self.checks.generations.insert(*generation) => {
                Err(format!("{generation} is begun twice"))
            }
            ToWorker::MakeBootstrap { .. } => {
                self.checks.assignments.clear();
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// Remembers what is sent to whom, until the generation is said to be formed.
    pub(super) fn assigns(&mut self, worker: WorkerId, message: &ToWorker) {
        if let ToWorker::Assignment(assignment) = message {
            self.checks.assignments.push((worker, assignment.clone()));
        }
    }

    /// A generation begins: what its source holds is exactly the ledger, and has every final step.
    pub(super) fn formed(&mut self) -> Result<(), String> {
        let assignments = std::mem::take(&mut self.checks.assignments);
        let process_of = |worker: &WorkerId| {
            self.streams
                .iter()
                .rev()
                .find(|stream| stream.worker == Some(*worker) && stream.term == self.terms)
                .map(|stream| stream.process)
        };
        self.checks.members = assignments.iter().filter_map(|(worker, _)| process_of(worker)).collect();
        self.checks.formed_at = self.now;
        let Some((source, assignment)) = assignments.iter().find(|(_, assignment)| assignment.member_index == assignment.source_index)
        else {
            return Err("a generation without a source".into());
        };
        let weights = match assignment.checkpoint_step {
            Some(step) => self.store.find(step).map(|stored| stored.weights.clone()),
            None if assignment.base_step == Step(0) => Some(Weights::default()),
            None => {
                let state = process_of(source).and_then(|process| self.processes[process].trainer.state.clone());
                // A source that has just died keeps nobody waiting: its death is on the way.
                let base = (assignment.base_step, assignment.base_generation);
                state.filter(|state| (state.step(), state.generation) == base).map(|state| state.weights)
            }
        };
        let generation = assignment.generation;
        let Some(weights) = weights else {
            return Err(format!("{generation} starts from step {}, which its source does not hold", assignment.base_step));
        };
        if weights.step() != assignment.base_step {
            return Err(format!("{generation} starts from step {}, its source holds step {}", assignment.base_step, weights.step()));
        }
        let Some(coordinator) = &self.coordinator else { return Ok(()) };
        self.checks.agrees(&weights, coordinator.core.ledger()).map_err(|problem| format!("as {generation} begins: {problem}"))?;
        self.checks.has_every_final_step(&weights).map_err(|problem| format!("as {generation} begins: {problem}"))
    }

    /// Whether somebody who holds what is given up was well all the time.
    fn well_holder(&self, step: Step) -> Option<ProcessId> {
        let is_well = |&&process: &&ProcessId| {
            let worker = &self.processes[process];
            let undisturbed = worker.disturbed_at.is_none_or(|at| at < self.checks.formed_at);
            let holds = worker.trainer.state.as_ref().is_some_and(|state| state.step() >= step);
            worker.is_running() && undisturbed && holds
        };
        self.checks.members.iter().find(is_well).copied()
    }

    /// The job goes back to a checkpoint: only where everybody who held more was disturbed.
    pub(super) fn rolled_back(&mut self, from: Step, to: Step) -> Result<(), String> {
        self.checks.rollbacks += 1;
        self.checks.go_back_to(to);
        match self.well_holder(from) {
            Some(process) => Err(format!("step {from} is given up for step {to}, though p{process} holds it and is well")),
            None => Ok(()),
        }
    }

    /// The job fails: only where everybody who held its weights was disturbed.
    pub(super) fn explain_failure(&self, reason: &str, first_failure: Option<&str>) -> Result<(), String> {
        // A worker that hangs while it loads keeps its place for as long as others are waited for.
        if reason.ends_with("(--join-timeout)") && self.processes.iter().any(|process| process.hangs) {
            return Ok(());
        }
        let step = self.checks.last;
        let is_gone = reason.starts_with("every worker that held step ") || reason.ends_with("its copy has not arrived");
        match self.well_holder(step).filter(|_| is_gone) {
            None if is_gone => Ok(()),
            Some(process) => Err(format!("the job failed though p{process} holds step {step} and is well: {reason}")),
            None => Err(format!("the job failed: {reason} (first: {first_failure:?})")),
        }
    }

    /// The job has ended: everything that was to be trained is in the weights that are kept, once.
    pub(super) fn check_end(&self) -> Result<(), String> {
        if self.outcome != Some(Outcome::Finished) {
            return Err("the job has not finished".into());
        }
        let trainable = |kind: &Kind| matches!(kind, Kind::Good | Kind::NotFinite);
        let per_epoch: usize = self.plan.shards.iter().flatten().filter(|kind| trainable(kind)).count();
        let Some((resume, stored)) = self.store.newest() else { return Err("nothing is kept".into()) };
        self.checks.agrees(&stored.weights, &stored.ledger)?;
        self.checks.has_every_final_step(&stored.weights)?;
        if let Some(last) = self.plan.last_step {
            return if resume.step == last { Ok(()) } else { Err(format!("the job ended with step {}, not {last}", resume.step)) };
        }
        let epochs = self.plan.epochs.unwrap_or_default();
        let trained: HashSet<SampleName> = stored.weights.steps().flat_map(|made| made.names.iter().copied()).collect();
        for epoch in (0..epochs).map(Epoch) {
            for (shard, kinds) in self.plan.shards.iter().enumerate() {
                for (index, kind) in kinds.iter().enumerate() {
                    let name = SampleName { epoch, shard: ShardId(shard as u32), index: index as u32 };
                    if trainable(kind) != trained.contains(&name) {
                        return Err(format!("sample {name}, which is {kind:?}: in the weights is {}", trained.contains(&name)));
                    }
                }
            }
        }
        // The ledger may not know yet that a shard has no more than that: its size can be learnt after the last step.
        if trained.len() == per_epoch * epochs as usize { Ok(()) } else { Err(format!("{} samples are trained", trained.len())) }
    }
}
