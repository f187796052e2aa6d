//! Checkpoints are copied and hashed beside the step that follows: nothing changes the weights before its update, which alone may have to
//! wait for the copy.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use peapod_proto::ids::Step;
use peapod_proto::message::StepReport;

use super::state::View;
use super::{Output, guarded};
use crate::lifecycle::TrainerEvent;

/// A copy that is being made of a step, whose report goes out with it.
pub struct Copying {
    step: Step,
    thread: JoinHandle<Result<(), String>>,
    /// What it has cost the trainer's thread so far.
    held_up: Duration,
}

impl Copying {
    /// Hashes the state of `report`'s step and reports it, then copies the state if `keeps`. `began` is when the trainer turned to it.
    ///
    /// # Errors
    /// If there is no thread to be had.
    pub fn start(
        view: View,
        mut report: StepReport,
        keeps: bool,
        output: Arc<dyn Fn(Output) + Send + Sync>,
        began: Instant,
    ) -> Result<Self, String> {
        let step = report.step;
        let copy = move || {
            report.snapshot = Some(view.digest());
            output(Output::Event(TrainerEvent::Step(report)));
            if keeps {
                output(Output::Snapshot(Box::new(view.snapshot().map_err(|error| error.to_string())?)));
            }
            Ok(())
        };
        let thread = std::thread::Builder::new().name("checkpoint".into()).spawn(move || guarded(copy).flatten());
        let thread = thread.map_err(|error| format!("cannot start the checkpoint's thread: {error}"))?;
        Ok(Self { step, thread, held_up: began.elapsed() })
    }

    /// Waits until the report is out and the copy is made: whatever changes the weights, or says more about the step, comes after it.
    ///
    /// # Errors
    /// If the copy failed.
    pub fn finish(self) -> Result<(), String> {
        let began = Instant::now();
        let result = self.thread.join().unwrap_or_else(|_| Err("the checkpoint's thread panicked".into()));
        let held_up = self.held_up + began.elapsed();
        tracing::debug!("the checkpoint of step {} held training up for {:.2} ms", self.step, held_up.as_secs_f64() * 1000.0);
        result
    }
}
