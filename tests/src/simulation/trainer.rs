//! A worker's trainer: the same order of events as `worker::trainer`, with its [`Control`] and its tail, and no tensors.

use std::collections::VecDeque;
use std::rc::Rc;

use peapod_collective::AbortHandle;
use peapod_data::Share;
use peapod_proto::ids::{Generation, Step};
use peapod_proto::message::{Assignment, Phase, ShardReport, StepLosses, StepRecord, StepReport, StepTimings, StopCause, Stopped};
use peapod_worker::lifecycle::TrainerEvent;
use peapod_worker::tail::{Contribution, TailLayout, share_of};
use peapod_worker::trainer::Control;

use super::collective::{GroupId, Leave, Part};
use super::loader::kind;
use super::plan::Kind;
use super::queue::ms;
use super::weights::{TrainState, Weights};
use super::worker::Output;
use super::{Event, ProcessId, World};

/// What the supervisor tells the trainer.
#[derive(Debug)]
pub enum Command {
    /// Make the bootstrap of a generation.
    MakeBootstrap(Generation, u32),
    /// Join a generation.
    Train(Assignment),
    /// Copy the weights.
    Snapshot(Generation),
}

/// What a trainer wakes from.
#[derive(Debug, Clone)]
pub enum Wake {
    /// What takes time is done.
    Done,
    /// All members are there.
    Connected,
    /// The source's state is here.
    Received(TrainState),
    /// The sum is here.
    Summed(Rc<Vec<f32>>),
    /// The collective failed or was aborted.
    Broken(String),
}

/// What it is at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Doing {
    Nothing,
    Loading,
    MakingBootstrap(Generation, u32),
    Connecting,
    Downloading,
    Receiving,
    WaitingForSamples,
    Computing,
    Summing,
}

/// A generation it is in.
struct Membership {
    assignment: Assignment,
    abort: AbortHandle,
    group: Option<GroupId>,
    /// Collectives completed, the forming among them.
    completed: u64,
    layout: TailLayout,
}

/// Why a generation ended.
enum Ended {
    Orderly(StopCause),
    Broken(String),
    Failed { phase: &'static str, message: String },
}

/// The thread that owns the weights.
pub struct Trainer {
    doing: Doing,
    /// Wakes of another number are of something that is over.
    token: u64,
    pub(super) commands: VecDeque<Command>,
    /// What it holds.
    pub state: Option<TrainState>,
    in_flight: Option<(Step, Share)>,
    listener: Option<(Generation, GroupId)>,
    membership: Option<Membership>,
}

impl Trainer {
    /// Before its thread starts.
    pub fn new() -> Self {
        Self { doing: Doing::Nothing, token: 0, commands: VecDeque::new(), state: None, in_flight: None, listener: None, membership: None }
    }

    /// Whether it has left a generation through an abort that it may not have noticed yet.
    fn aborted(&self) -> Option<String> {
        self.membership.as_ref().and_then(|membership| membership.abort.reason()).map(str::to_owned)
    }
}

impl World {
    fn trainer(&mut self, process: ProcessId) -> &mut Trainer {
        &mut self.processes[process].trainer
    }

    fn control(&self, process: ProcessId) -> &Control {
        &self.processes[process].control
    }

    /// Begins something that ends with a wake of the number it returns.
    fn wait_for(&mut self, process: ProcessId, doing: Doing) -> u64 {
        let trainer = self.trainer(process);
        trainer.token += 1;
        trainer.doing = doing;
        trainer.token
    }

    fn take_time(&mut self, process: ProcessId, doing: Doing, time: (std::time::Duration, std::time::Duration)) {
        let token = self.wait_for(process, doing);
        let at = self.now + self.random.between(time);
        self.queue.push(at, Event::Trainer { process, token, wake: Wake::Done });
    }

    pub(super) fn start_trainer(&mut self, process: ProcessId) {
        self.take_time(process, Doing::Loading, self.plan.loading);
    }

    pub(super) fn command(&mut self, process: ProcessId, command: Command) {
        self.trainer(process).commands.push_back(command);
        let at = self.now + self.random.between((ms(0), ms(1)));
        self.queue.push(at, Event::Serve { process });
    }

    /// The trainer looks for its next command, if it is not at something.
    pub(super) fn serve(&mut self, process: ProcessId) {
        while self.processes[process].is_running() && self.trainer(process).doing == Doing::Nothing {
            match self.trainer(process).commands.pop_front() {
                None => return,
                Some(Command::MakeBootstrap(generation, num_members)) => {
                    self.take_time(process, Doing::MakingBootstrap(generation, num_members), (ms(1), ms(20)))
                }
                Some(Command::Train(assignment)) => self.begin(process, assignment),
                Some(Command::Snapshot(generation)) => self.snapshot(process, generation),
            }
        }
    }

    pub(super) fn wake(&mut self, process: ProcessId, token: u64, wake: Wake) {
        if token != self.trainer(process).token {
            return;
        }
        if let Wake::Broken(reason) = wake {
            // An abort's reason says more than what it did to the sockets.
            let reason = self.trainer(process).aborted().unwrap_or(reason);
            return self.end(process, Ended::Broken(reason));
        }
        match (self.trainer(process).doing, wake) {
            (Doing::Loading, _) => self.loaded(process),
            (Doing::MakingBootstrap(generation, num_members), _) => {
                let group = self.open_group(generation, num_members);
                self.trainer(process).listener = Some((generation, group));
                let bytes = (group as u64).to_le_bytes().to_vec();
                self.output(process, Output::Event(TrainerEvent::Bootstrap { generation, bytes }));
                self.idle(process);
            }
            (Doing::Connecting, _) => {
                self.has_completed(process);
                self.connected(process);
            }
            (Doing::Downloading, _) => self.downloaded(process),
            (Doing::Receiving, Wake::Received(state)) => {
                self.has_completed(process);
                self.received(process, state);
            }
            (Doing::Computing, _) => self.computed(process),
            (Doing::Summing, Wake::Summed(sum)) => {
                self.has_completed(process);
                self.summed(process, &sum);
            }
            (doing, wake) => self.fail(format!("a trainer that is {doing:?} wakes from {wake:?}")),
        }
    }

    fn has_completed(&mut self, process: ProcessId) {
        let Some(membership) = &mut self.trainer(process).membership else { return };
        membership.completed += 1;
        let (group, index) = (membership.group, membership.assignment.member_index.0);
        if let Some(group) = group {
            self.completed(group, index);
        }
    }

    fn idle(&mut self, process: ProcessId) {
        let trainer = self.trainer(process);
        trainer.token += 1;
        trainer.doing = Doing::Nothing;
        self.serve(process);
    }

    fn loaded(&mut self, process: ProcessId) {
        self.start_loader(process);
        self.control(process).enter(Phase::Waiting);
        self.output(process, Output::Event(TrainerEvent::Loaded { model_digest: vec![7], num_parameters: 1 }));
        self.idle(process);
    }

    fn begin(&mut self, process: ProcessId, assignment: Assignment) {
        let generation = assignment.generation;
        let abort = self.control(process).begin(generation);
        if let Some(loader) = &mut self.processes[process].loader {
            loader.set_cancelled(false);
        }
        self.control(process).enter(Phase::Connecting);
        let in_flight = self.trainer(process).in_flight.take();
        self.settle_data(process, in_flight.filter(|(step, _)| *step > assignment.base_step).map(|(_, share)| share));

        let layout = TailLayout::new(assignment.num_members, assignment.global_batch);
        let index = assignment.member_index.0;
        let listener = self.trainer(process).listener.take().filter(|(made_for, _)| *made_for == generation).map(|(_, group)| group);
        let bootstrap: [u8; 8] = assignment.bootstrap.clone().try_into().unwrap_or_default();
        let group = u64::from_le_bytes(bootstrap) as GroupId;
        let num_members = assignment.num_members;
        let group = (num_members > 1).then_some(group);
        self.trainer(process).membership = Some(Membership { assignment, abort, group: None, completed: 0, layout });
        let Some(group) = group else { return self.connected(process) };
        if index == 0 && listener != Some(group) {
            return self.end(process, Ended::Broken("member 0 listens elsewhere than the bootstrap says".into()));
        }
        if let Some(reason) = self.trainer(process).aborted() {
            return self.end(process, Ended::Broken(reason));
        }
        if let Some(membership) = &mut self.trainer(process).membership {
            membership.group = Some(group);
        }
        let token = self.wait_for(process, Doing::Connecting);
        self.join_group(group, generation, index, process, token);
    }

    fn connected(&mut self, process: ProcessId) {
        let trainer = self.trainer(process);
        let Some(Membership { assignment, .. }) = &trainer.membership else { return };
        let held = trainer
            .state
            .as_ref()
            .is_some_and(|state| (state.step(), state.generation) == (assignment.base_step, assignment.base_generation));
        let is_source = assignment.member_index == assignment.source_index;
        if is_source && !(held && assignment.checkpoint_step.is_none()) {
            let from_checkpoint = assignment.checkpoint_step.is_some();
            trainer.state = None;
            if from_checkpoint {
                return self.take_time(process, Doing::Downloading, (ms(5), ms(200)));
            }
            trainer.state = Some(TrainState::default());
        }
        self.spread(process, is_source, held);
    }

    fn downloaded(&mut self, process: ProcessId) {
        let step = self.trainer(process).membership.as_ref().and_then(|membership| membership.assignment.checkpoint_step);
        let found = step.filter(|_| self.coordinator.is_some()).and_then(|step| self.store.find(step).cloned());
        let Some(stored) = found else {
            return self.end(process, Ended::Failed { phase: "resuming", message: format!("there is no checkpoint of step {step:?}") });
        };
        self.trainer(process).state = Some(TrainState { weights: stored.weights, generation: Generation::NONE });
        self.spread(process, true, false);
    }

    /// The source's state goes to those who lack it.
    fn spread(&mut self, process: ProcessId, is_source: bool, held: bool) {
        let aborted = self.trainer(process).aborted();
        let trainer = self.trainer(process);
        let Some(Membership { assignment, group, completed, .. }) = &trainer.membership else { return };
        if !assignment.broadcast_state {
            return self.entered(process);
        }
        if !held && !is_source {
            trainer.state = None;
        }
        if let Some(reason) = aborted {
            return self.end(process, Ended::Broken(reason));
        }
        let part = Part::Broadcast(trainer.state.clone().filter(|_| is_source));
        let (Some(group), index, number) = (*group, assignment.member_index.0, *completed) else { return self.entered(process) };
        let token = self.wait_for(process, Doing::Receiving);
        self.enter(group, index, number, part, token);
    }

    fn received(&mut self, process: ProcessId, state: TrainState) {
        let trainer = self.trainer(process);
        let Some(Membership { assignment, .. }) = &trainer.membership else { return };
        if trainer.state.is_none() {
            trainer.state = Some(TrainState { weights: state.weights, generation: assignment.base_generation });
        }
        self.entered(process);
    }

    fn entered(&mut self, process: ProcessId) {
        let trainer = self.trainer(process);
        let Some(Membership { assignment, .. }) = &trainer.membership else { return };
        let (generation, base) = (assignment.generation, assignment.base_step);
        let held = trainer.state.as_ref().map(TrainState::step);
        if held != Some(base) {
            let message = format!("holds step {held:?}, {generation} starts from step {base}");
            return self.end(process, Ended::Failed { phase: "connecting", message });
        }
        self.control(process).set_step(base);
        self.note_state(process, generation);
        self.next_step(process);
    }

    fn next_step(&mut self, process: ProcessId) {
        self.wait_for(process, Doing::WaitingForSamples);
        self.control(process).enter(Phase::Data);
        self.look_for_share(process);
    }

    /// Something about the samples has changed, which the trainer may be waiting for.
    pub(super) fn look_for_share(&mut self, process: ProcessId) {
        let Some(owed) = self.processes[process].trainer.owed() else { return };
        let Some(loader) = &mut self.processes[process].loader else { return };
        if loader.is_cancelled() {
            return self.end(process, Ended::Broken("aborted while waiting for samples".into()));
        }
        let (share, reports) = loader.take_share(owed, &self.plan.shards);
        reports.into_iter().for_each(|report| self.output(process, Output::Read(report)));
        self.read_on(process);
        let Some(share) = share else {
            // Nothing more will come by itself, perhaps.
            return self.ask_for_leases(process);
        };
        self.control(process).enter(Phase::Compute);
        let trainer = self.trainer(process);
        let step = trainer.state.as_ref().map_or(Step(0), TrainState::step).next();
        trainer.in_flight = Some((step, share));
        self.take_time(process, Doing::Computing, self.plan.compute);
    }

    fn computed(&mut self, process: ProcessId) {
        let trainer = &self.processes[process].trainer;
        let (Some(Membership { assignment, group, completed, layout, .. }), Some((step, share))) =
            (&trainer.membership, &trainer.in_flight)
        else {
            return;
        };
        let contribution = Contribution {
            names: share.names().collect(),
            change: self.control(process).change_is_asked(assignment.generation),
            not_finite: share.names().any(|name| kind(&self.plan.shards, name) == Kind::NotFinite),
            ..Contribution::default()
        };
        let mut tail = vec![0.0; layout.len()];
        layout.write(&mut tail, *step, assignment.member_index, &contribution);
        let (group, index, number) = (*group, assignment.member_index.0, *completed);
        self.control(process).enter(Phase::Collective);
        if let Some(reason) = self.trainer(process).aborted() {
            return self.end(process, Ended::Broken(reason));
        }
        let Some(group) = group else { return self.summed(process, &tail) };
        let token = self.wait_for(process, Doing::Summing);
        self.enter(group, index, number, Part::Sum(tail), token);
    }

    fn summed(&mut self, process: ProcessId, sum: &[f32]) {
        let trainer = &mut self.processes[process].trainer;
        let (Some(membership), Some((step, _))) = (&trainer.membership, &trainer.in_flight) else { return };
        let step = *step;
        let (generation, index) = (membership.assignment.generation, membership.assignment.member_index);
        let outcome = match membership.layout.read(sum, step) {
            Ok(outcome) => outcome,
            Err(error) => return self.fail(format!("the sum of step {step} of {generation} is not one: {error}")),
        };
        trainer.in_flight = None;
        if outcome.names.is_empty() {
            return self.end(process, Ended::Orderly(StopCause::DataDone));
        }
        let state = trainer.state.take().unwrap_or_default();
        let weights: Weights = state.weights.after(step, generation, outcome.names.clone(), outcome.not_finite);
        trainer.state = Some(TrainState { weights, generation });
        self.control(process).set_step(step);
        self.note_state(process, generation);
        let record = StepRecord {
            step,
            generation,
            names: outcome.names,
            native: 0,
            skipped: outcome.not_finite,
            losses: StepLosses::default(),
            validation: None,
        };
        let is_first = index.0 == 0;
        let scheduled = step.0.is_multiple_of(self.plan.checkpoint_steps);
        let asked = self.control(process).take_snapshot_request(generation);
        let trainer = self.trainer(process);
        let digest = (scheduled || asked).then(|| trainer.state.as_ref().map_or(0, |state| state.weights.digest()));
        let report = StepReport { generation, step, record: Some(record), timings: StepTimings::default(), snapshot: digest };
        self.output(process, Output::Event(TrainerEvent::Step(report)));
        if is_first && digest.is_some() {
            self.snapshot(process, generation);
        }
        if self.plan.last_step == Some(step) {
            return self.end(process, Ended::Orderly(StopCause::StepsDone));
        }
        if outcome.change {
            return self.end(process, Ended::Orderly(StopCause::Planned));
        }
        self.next_step(process);
    }

    fn snapshot(&mut self, process: ProcessId, generation: Generation) {
        if let Some(state) = self.trainer(process).state.clone() {
            self.output(process, Output::Snapshot { generation, weights: state.weights });
        }
    }

    fn end(&mut self, process: ProcessId, ended: Ended) {
        let Some(membership) = self.trainer(process).membership.take() else { return };
        let generation = membership.assignment.generation;
        if let Some(group) = membership.group {
            self.leave_group(group, membership.assignment.member_index.0, membership.completed, Leave::Shut);
        }
        self.control(process).end();
        self.control(process).enter(Phase::Waiting);
        let (cause, reason) = match ended {
            Ended::Orderly(cause) => (cause, String::new()),
            Ended::Broken(reason) => (StopCause::Aborted, reason),
            Ended::Failed { phase, message } => {
                self.output(process, Output::Event(TrainerEvent::Failed { phase, message, permanent: false }));
                return self.idle(process);
            }
        };
        let trainer = self.trainer(process);
        let state = trainer.state.clone().unwrap_or_default();
        let (applied, trained_in) = (state.step(), state.generation);
        let (records, validation, lost_member, stalled) = (Vec::new(), None, None, None);
        let stopped = Stopped { generation, applied, cause, records, reason, validation, trained_in, lost_member, stalled };
        self.output(process, Output::Event(TrainerEvent::Stopped(stopped)));
        self.idle(process);
    }

    /// The supervisor has the trainer break off what it does in a generation.
    pub(super) fn abort(&mut self, process: ProcessId, generation: Generation, reason: &str) {
        self.control(process).abort(generation, reason);
        let worker = &mut self.processes[process];
        let Some(membership) = &worker.trainer.membership else { return };
        if membership.assignment.generation > generation || membership.abort.reason().is_none() {
            return;
        }
        if let Some(loader) = &mut worker.loader {
            loader.set_cancelled(true);
        }
        match worker.trainer.doing {
            Doing::WaitingForSamples => self.look_for_share(process),
            Doing::Connecting | Doing::Receiving | Doing::Summing => {
                let token = worker.trainer.token;
                let at = self.now + self.random.between((ms(0), ms(3)));
                self.queue.push(at, Event::Trainer { process, token, wake: Wake::Broken(reason.to_owned()) });
            }
            // It looks when that is done.
            _ => {}
        }
    }

    /// The process is gone, and with it its place in a group.
    pub(super) fn trainer_is_gone(&mut self, process: ProcessId, how: Leave) {
        let trainer = self.trainer(process);
        trainer.token += 1;
        if let Some(membership) = trainer.membership.take()
            && let Some(group) = membership.group
        {
            self.leave_group(group, membership.assignment.member_index.0, membership.completed, how);
        }
    }

    /// What is said to the supervisor by the data threads.
    pub(super) fn reports(&mut self, process: ProcessId, report: Option<ShardReport>) {
        if let Some(report) = report {
            self.output(process, Output::Read(report));
        }
    }
}

impl Trainer {
    /// The share it waits for, if it does.
    fn owed(&self) -> Option<usize> {
        let Membership { assignment, .. } = self.membership.as_ref().filter(|_| self.doing == Doing::WaitingForSamples)?;
        Some(share_of(assignment.global_batch, assignment.member_index, assignment.num_members) as usize)
    }
}
