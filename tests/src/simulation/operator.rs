//! Whoever keeps the programs of a job started: a service manager, or a person with patience. And what goes wrong.

use std::time::Duration;

use peapod_coordinator::core::{Event as CoreEvent, Outcome};
use peapod_proto::ids::{Rank, Step};
use peapod_proto::program::StopSignal;
use peapod_worker::lifecycle::Input;

use super::collective::Leave;
use super::network::{LATE, SOON};
use super::plan::{Fault, When};
use super::queue::{Time, ms};
use super::{Event, ProcessId, World};

/// What is to run.
#[derive(Default)]
pub struct Operator {
    /// Workers of the job.
    pub world_size: u32,
    /// The newest process of each place.
    slots: Vec<Option<ProcessId>>,
    /// Faults that wait for a step.
    by_step: Vec<(Step, Fault)>,
    /// How the job goes on once it has stopped.
    resize: Option<(u32, Duration)>,
    /// When the last fault ends.
    pub quiet_from: Time,
    /// Times the job failed.
    pub failures: u32,
}

impl World {
    pub(super) fn set_up(&mut self) {
        self.operator.world_size = self.plan.world_size;
        for (when, fault) in self.plan.faults.clone() {
            match when {
                When::At(at) => self.queue.push(at, Event::Fault { fault }),
                When::Step(step) => self.operator.by_step.push((step, fault)),
            }
        }
        self.queue.push(self.now, Event::StartCoordinator);
        self.start_missing_workers((ms(0), ms(400)));
    }

    /// Places for workers, those that stand by among them.
    fn num_slots(&self) -> usize {
        (self.operator.world_size + self.plan.spares) as usize
    }

    /// Starts a worker in each place that has none.
    fn start_missing_workers(&mut self, within: (Duration, Duration)) {
        let num_slots = self.num_slots();
        self.operator.slots.resize(self.operator.slots.len().max(num_slots), None);
        for slot in 0..num_slots {
            let runs = self.operator.slots[slot].is_some_and(|process| self.processes[process].is_running());
            if !runs {
                let at = self.now + self.random.between(within);
                self.queue.push(at, Event::StartWorker { slot });
            }
        }
    }

    pub(super) fn start_worker(&mut self, slot: usize) {
        let runs = self.operator.slots[slot].is_some_and(|process| self.processes[process].is_running());
        if runs || slot >= self.num_slots() || self.operator.resize.is_some() {
            return;
        }
        let is_spare = slot >= self.operator.world_size as usize;
        let rank = (self.plan.asks_for_ranks && !is_spare).then_some(Rank(slot as u32));
        let process = self.start_process(slot, rank);
        self.operator.slots[slot] = Some(process);
    }

    pub(super) fn operator_sees_end(&mut self, process: ProcessId, _code: Option<u8>) {
        let slot = self.processes[process].slot;
        if self.operator.slots.get(slot).copied().flatten() == Some(process) {
            let at = self.now + self.random.between((ms(100), ms(2500)));
            self.queue.push(at, Event::StartWorker { slot });
        }
    }

    pub(super) fn operator_sees_outcome(&mut self, outcome: Outcome, first_failure: Option<String>) {
        match outcome {
            Outcome::Finished => self.outcome = Some(outcome),
            Outcome::Stopped { .. } => {
                let (world_size, pause) = self.operator.resize.take().unwrap_or((self.operator.world_size, ms(100)));
                self.operator.world_size = world_size;
                self.operator.quiet_from = self.operator.quiet_from.max(self.now + pause);
                let at = self.now + pause;
                self.queue.push(at, Event::StartCoordinator);
                self.start_missing_workers((pause / 2, pause * 2));
            }
            Outcome::Failed { reason } => {
                self.operator.failures += 1;
                if let Err(problem) = self.explain_failure(&reason, first_failure.as_deref()) {
                    return self.fail(problem);
                }
                let at = self.now + ms(500);
                self.operator.quiet_from = self.operator.quiet_from.max(at);
                self.queue.push(at, Event::StartCoordinator);
                // A stop that was asked for is over with the run.
                if let Some((world_size, _)) = self.operator.resize.take() {
                    self.operator.world_size = world_size;
                }
                self.start_missing_workers((ms(200), ms(3000)));
            }
        }
    }

    /// Faults that wait for this step come soon.
    pub(super) fn step_is_final(&mut self, step: Step) {
        let due: Vec<Fault> = self.operator.by_step.extract_if(.., |(at, _)| *at <= step).map(|(_, fault)| fault).collect();
        for fault in due {
            let at = self.now + self.random.between((ms(0), self.plan.compute.1 * 2));
            self.queue.push(at, Event::Fault { fault });
        }
    }

    /// The process in a worker's place.
    fn process_in(&self, slot: usize) -> Option<ProcessId> {
        self.operator.slots.get(slot).copied().flatten().filter(|&process| self.processes[process].is_running())
    }

    fn disturb(&mut self, process: ProcessId, until: Time) {
        self.processes[process].disturbed_at = Some(until);
        self.operator.quiet_from = self.operator.quiet_from.max(until);
    }

    pub(super) fn strike(&mut self, fault: Fault) {
        self.say(|| format!("FAULT {fault:?}"));
        self.operator.quiet_from = self.operator.quiet_from.max(self.now);
        match fault {
            Fault::Kill(slot) | Fault::Vanish(slot) => {
                if let Some(process) = self.process_in(slot) {
                    self.disturb(process, self.now);
                    self.kill(process, if matches!(fault, Fault::Kill(_)) { Leave::Died } else { Leave::Vanished });
                }
            }
            Fault::Pause(slot, time) => {
                if let Some(process) = self.process_in(slot).filter(|&process| self.processes[process].paused_until < self.now) {
                    self.disturb(process, self.now + time);
                    self.processes[process].paused_until = self.now + time;
                }
            }
            Fault::Stall(slot, time) => {
                if let Some(process) = self.process_in(slot) {
                    self.disturb(process, self.now + time);
                    self.processes[process].stalled_until = self.now + time;
                }
            }
            Fault::Hang(slot) => {
                if let Some(process) = self.process_in(slot) {
                    // Without enough steps to learn from, or when it is asked for the last checkpoint, it takes this long to be noticed.
                    self.disturb(process, self.now + 4 * self.plan.join_timeout);
                    self.processes[process].disturbed_at = Some(Time::MAX);
                    self.processes[process].hangs = true;
                }
            }
            Fault::Break(slot) => {
                if let Some(process) = self.process_in(slot) {
                    self.break_off(process);
                }
            }
            Fault::BreakAll => {
                let all: Vec<ProcessId> = (0..self.operator.slots.len()).filter_map(|slot| self.process_in(slot)).collect();
                all.into_iter().for_each(|process| self.break_off(process));
            }
            Fault::Term(slot) => {
                if let Some(process) = self.process_in(slot) {
                    self.disturb(process, self.now);
                    self.input(process, Input::Signal(StopSignal::Terminated));
                }
            }
            Fault::Drain(slot) => {
                let worker = self.process_in(slot).and_then(|process| self.processes[process].rules.identity());
                if let (Some(process), Some((_, rank))) = (self.process_in(slot), worker) {
                    self.disturb(process, self.now);
                    self.tell(CoreEvent::Drain { rank });
                }
            }
            Fault::LoseAbort(slot) => {
                if let Some(process) = self.process_in(slot) {
                    self.processes[process].lose_abort = true;
                }
            }
            Fault::Glitch => self.glitch = true,
            Fault::Crash(effects, time) => {
                match &mut self.coordinator {
                    Some(coordinator) => coordinator.crash_after = Some(effects + 1),
                    None => return,
                }
                self.queue.push(self.now + ms(3000), Event::Crash { term: self.terms });
                self.restart_after = time;
            }
            Fault::GoAway(time) => {
                self.go_away();
                self.coordinator_comes_back(time);
            }
            Fault::Freeze(time) => {
                let until = self.now + time;
                let wait = Duration::from_micros(self.random.below(2));
                if let Some(coordinator) = self.coordinator.as_mut().filter(|coordinator| coordinator.paused_until.0 < self.now) {
                    coordinator.paused_until = (until, wait);
                    let term = coordinator.term;
                    self.queue.push(until, Event::Thaw { term, stood_still: time });
                    self.operator.quiet_from = self.operator.quiet_from.max(until);
                }
            }
            Fault::Resize(world_size, pause) => {
                if self.coordinator.is_some() && self.operator.resize.is_none() {
                    self.operator.resize = Some((world_size, pause));
                    self.operator_stops();
                }
            }
            Fault::FailStore => self.fail_store = true,
            Fault::CutUpload => self.cut_upload = true,
        }
    }

    /// A worker's connection breaks.
    pub(super) fn break_off(&mut self, process: ProcessId) {
        self.disturb(process, self.now + LATE.1);
        let notices = if self.random.one_in(3) { LATE } else { SOON };
        if let Some(stream) = self.processes[process].stream() {
            self.break_stream(stream, notices);
        }
    }

    /// Asks for the stop that is wished for, of which a coordinator that has just started may not have heard.
    pub(super) fn operator_stops(&mut self) {
        if self.operator.resize.is_some() {
            self.tell(CoreEvent::Stop { reason: "to be resumed with other workers".into() });
        }
    }

    /// The job was to be stopped and is over: it goes on with as many workers as were wished for.
    pub(super) fn operator_resumes(&mut self) {
        if let Some((world_size, _)) = self.operator.resize.take() {
            self.operator.world_size = world_size;
            self.start_missing_workers((ms(100), ms(600)));
        }
    }

    /// Somebody sees that the coordinator is gone, and starts it again.
    pub(super) fn coordinator_comes_back(&mut self, time: Duration) {
        let at = self.now + time;
        self.operator.quiet_from = self.operator.quiet_from.max(at);
        self.queue.push(at, Event::StartCoordinator);
    }
}
