//! Checkpoints on their way from a worker into the store, as `service.rs` takes them in.

use std::sync::Arc;
use std::time::Duration;

use peapod_coordinator::core::Event as CoreEvent;
use peapod_coordinator::core::ledger::Ledger;
use peapod_proto::ids::{Generation, Step};

use super::journal::Stored;
use super::queue::ms;
use super::weights::Weights;
use super::worker::Life;
use super::{Event, ProcessId, World};

/// A checkpoint on its way.
pub struct Upload {
    process: ProcessId,
    term: u64,
    generation: Generation,
    weights: Weights,
    ledger: Option<Arc<Ledger>>,
}

/// How far an upload is.
#[derive(Debug, Clone, Copy)]
pub enum Stage {
    /// Its parts are there.
    Parts,
    /// Its manifest is written.
    Seal,
    /// It is reported.
    Report {
        /// Whether it is whole.
        stored: bool,
    },
}

impl World {
    /// A worker sends a copy of its weights.
    pub(super) fn upload(&mut self, process: ProcessId, generation: Generation, weights: Weights) {
        let Some(term) = self.term() else { return };
        self.processes[process].uploads += 1;
        self.uploads.push(Upload { process, term, generation, weights, ledger: None });
        self.upload_goes_on(self.uploads.len() - 1, Stage::Parts, (ms(2), ms(300)));
    }

    pub(super) fn upload_goes_on(&mut self, upload: usize, stage: Stage, time: (Duration, Duration)) {
        let at = self.now + self.random.between(time);
        self.queue.push(at, Event::Upload { upload, stage });
    }

    pub(super) fn upload_is_at(&mut self, upload: usize, stage: Stage) {
        let Upload { process, term, generation, ref weights, .. } = self.uploads[upload];
        let step = weights.step();
        if self.term() != Some(term) {
            return self.upload_is_over(upload);
        }
        match stage {
            Stage::Parts => {
                // A sender that is gone takes the call with it, at whichever end that is seen first.
                let cut = std::mem::take(&mut self.cut_upload);
                if cut || self.processes[process].life == Life::Gone {
                    self.say(|| format!("the copy of step {step} is cut off"));
                    if self.random.one_in(2) {
                        // What cut it off may cut the stream off too.
                        if self.processes[process].is_running() {
                            self.break_off(process);
                        }
                        self.upload_is_over(upload);
                    } else {
                        self.upload_goes_on(upload, Stage::Report { stored: false }, (ms(0), ms(20)));
                    }
                    return;
                }
                self.ask_for_records(upload, step, generation);
            }
            Stage::Seal => {
                let Upload { ref weights, ref ledger, .. } = self.uploads[upload];
                let Some(ledger) = ledger.clone() else { return };
                if std::mem::take(&mut self.fail_store) {
                    self.say(|| format!("the checkpoint of step {step} cannot be written"));
                    return self.upload_goes_on(upload, Stage::Report { stored: false }, (ms(0), ms(5)));
                }
                if let Err(problem) = self.checks.agrees(weights, &ledger) {
                    return self
                        .fail(format!("the ledger in the checkpoint of step {step} of {generation} is not its weights': {problem}"));
                }
                let stored = Stored { weights: weights.clone(), ledger };
                let sealed = self.store.seal(step, generation, stored);
                self.say(|| format!("checkpoint of step {step} of {generation}: {sealed:?}"));
                self.upload_goes_on(upload, Stage::Report { stored: sealed.is_ok() }, (ms(0), ms(5)));
            }
            Stage::Report { stored } => {
                let event = match stored {
                    true => CoreEvent::CheckpointStored { step, generation },
                    false => CoreEvent::CheckpointFailed { step, generation, error: "as planned".into() },
                };
                let stands = self.coordinator.as_ref().is_some_and(|coordinator| coordinator.core.awaits_checkpoint(step, generation));
                self.tell(event);
                match (stored, stands) {
                    (true, true) => self.store.retain(self.plan.keep),
                    (true, false) => self.store.remove(step, generation),
                    (false, _) => {}
                }
                self.upload_is_over(upload);
            }
        }
    }

    fn upload_is_over(&mut self, upload: usize) {
        let process = self.uploads[upload].process;
        let worker = &mut self.processes[process];
        worker.uploads = worker.uploads.saturating_sub(1);
        if worker.uploads == 0 && matches!(worker.life, Life::Ending(_)) {
            self.close(process);
        }
    }

    fn ask_for_records(&mut self, upload: usize, step: Step, generation: Generation) {
        let Some(coordinator) = &mut self.coordinator else { return };
        if coordinator.frozen.contains_key(&(step, generation)) {
            // No checkpoint may know more than the journal.
            if let Err(problem) = self.journal.flush() {
                return self.fail(problem);
            }
            self.records_of(upload);
        } else if generation != coordinator.core.generation() {
            self.upload_goes_on(upload, Stage::Report { stored: false }, (ms(0), ms(5)));
        } else {
            coordinator.waiters.push((step, generation, upload));
        }
    }

    pub(super) fn records_of(&mut self, upload: usize) {
        let Upload { generation, ref weights, .. } = self.uploads[upload];
        let ledger = self.coordinator.as_ref().and_then(|coordinator| coordinator.frozen.get(&(weights.step(), generation))).cloned();
        self.uploads[upload].ledger = ledger;
        self.upload_goes_on(upload, Stage::Seal, (ms(0), ms(20)));
    }
}
