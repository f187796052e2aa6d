//! A worker's process: what `worker::supervisor` does around the real [`Lifecycle`], in its order.

use std::collections::VecDeque;
use std::time::Duration;

use peapod_data::{Outlook, Share};
use peapod_proto::ids::{Generation, Incarnation, LeaseId, Rank};
use peapod_proto::message::{FromWorker, Hello, Lease, ShardReport, ToWorker};
use peapod_proto::{PROGRAM_VERSION, PROTOCOL_VERSION};
use peapod_worker::lifecycle::{Action, Input, Lifecycle, TrainerEvent};
use peapod_worker::trainer::Control;

use super::collective::Leave;
use super::coordinator::Answer;
use super::loader::{Loader, News};
use super::network::{Down, SOON, StreamKey, Up};
use super::queue::{Time, ms};
use super::trainer::{Command, Trainer};
use super::weights::Weights;
use super::{Event, ProcessId, World};

/// Until the coordinator says how often.
const FIRST_HEARTBEAT_INTERVAL: Duration = ms_const(500);
/// Waits between two attempts to reach the coordinator: the first, and the longest before and after the first welcome.
const WAITS: [Duration; 3] = [ms_const(100), ms_const(2000), ms_const(400)];
/// What a process that ends in order still has for a checkpoint on its way.
const GRACE: Duration = ms_const(10_000);

const fn ms_const(milliseconds: u64) -> Duration {
    Duration::from_millis(milliseconds)
}

/// What trainer and data threads say to the supervisor, in one line.
#[derive(Debug)]
pub enum Output {
    /// For the lifecycle.
    Event(TrainerEvent),
    /// For the coordinator's store.
    Snapshot {
        /// The generation it was copied in.
        generation: Generation,
        /// The copy.
        weights: Weights,
    },
    /// From the data threads.
    Read(ShardReport),
    /// From the data threads: the first index of a lease that is left to others.
    GaveBack(LeaseId, u32),
    /// The data threads want shards; as ones that are idle.
    NeedLeases(u32, bool),
}

/// The way to the coordinator.
#[derive(Debug)]
pub enum Link {
    /// Looking for it, with the stream of the attempt under way.
    Searching { attempt: u64, stream: Option<StreamKey>, wait: Duration },
    /// There.
    Open(StreamKey),
    /// Closed for good.
    Closed,
}

/// How a process is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Life {
    /// It runs.
    Running,
    /// It ends by itself, with this code.
    Ending(u8),
    /// It was killed, or is over.
    Gone,
}

/// A worker process.
pub struct Process {
    /// Where the operator keeps it.
    pub slot: usize,
    rank: Option<Rank>,
    incarnation: Incarnation,
    attempt: u32,
    /// The rules.
    pub rules: Lifecycle,
    /// What concerns a running generation.
    pub control: Control,
    /// The way to the coordinator.
    pub link: Link,
    searches: u64,
    has_joined: bool,
    heartbeat: Duration,
    beat: u64,
    outputs: VecDeque<Output>,
    /// Its trainer.
    pub trainer: Trainer,
    /// Its data threads, once they run.
    pub loader: Option<Loader>,
    reads: bool,
    /// How it is.
    pub life: Life,
    /// It is stopped until then.
    pub paused_until: Time,
    /// Its trainer does nothing any more.
    pub hangs: bool,
    /// Nothing passes between it and the coordinator until then.
    pub stalled_until: Time,
    /// When something last happened to it that the coordinator may take for its death.
    pub disturbed_at: Option<Time>,
    /// Its next Abort is lost.
    pub lose_abort: bool,
    /// Uploads on their way.
    pub uploads: u32,
}

impl Process {
    /// Whether it does anything.
    pub fn is_running(&self) -> bool {
        self.life == Life::Running
    }

    /// Its stream, if it has one.
    pub fn stream(&self) -> Option<StreamKey> {
        match self.link {
            Link::Open(stream) => Some(stream),
            Link::Searching { stream, .. } => stream,
            Link::Closed => None,
        }
    }
}

impl World {
    pub(super) fn start_process(&mut self, slot: usize, rank: Option<Rank>) -> ProcessId {
        let process = self.processes.len();
        self.processes.push(Process {
            slot,
            rank,
            incarnation: Incarnation(1000 + process as u64),
            attempt: 0,
            rules: Lifecycle::new(),
            control: Control::default(),
            link: Link::Closed,
            searches: 0,
            has_joined: false,
            heartbeat: FIRST_HEARTBEAT_INTERVAL,
            beat: 0,
            outputs: VecDeque::new(),
            trainer: Trainer::new(),
            loader: None,
            reads: false,
            life: Life::Running,
            paused_until: Time::ZERO,
            hangs: false,
            stalled_until: Time::ZERO,
            disturbed_at: None,
            lose_abort: false,
            uploads: 0,
        });
        self.say(|| format!("p{process} starts in slot {slot}"));
        self.search(process);
        self.queue.push(self.now, Event::Beat { process, beat: 0 });
        process
    }

    // ---- the way to the coordinator ----

    /// Looks for the coordinator: one hello for all attempts.
    fn search(&mut self, process: ProcessId) {
        let worker = &mut self.processes[process];
        worker.attempt += 1;
        worker.searches += 1;
        worker.link = Link::Searching { attempt: worker.searches, stream: None, wait: WAITS[0] };
        let attempt = worker.searches;
        let at = self.arrival(process);
        self.queue.push(at, Event::Hello { process, attempt });
    }

    fn hello(&self, process: ProcessId) -> Hello {
        let worker = &self.processes[process];
        Hello {
            protocol_version: PROTOCOL_VERSION,
            program_version: PROGRAM_VERSION.into(),
            incarnation: worker.incarnation,
            attempt: worker.attempt - 1,
            requested_rank: worker.rules.identity().map(|(_, rank)| rank).or(worker.rank),
            host: "host".into(),
            pid: process as u32,
            device: "cpu".into(),
        }
    }

    /// A hello reaches the place where the coordinator should be.
    pub(super) fn hello_arrives(&mut self, process: ProcessId, attempt: u64) {
        if !self.is_searching(process, attempt) {
            return;
        }
        let hello = self.hello(process);
        match self.answer_hello(process, hello) {
            Answer::Welcome(stream) => {
                if let Link::Searching { stream: attempted, .. } = &mut self.processes[process].link {
                    *attempted = Some(stream);
                }
            }
            answer => {
                let at = self.arrival(process);
                self.queue.push(at, Event::Refused { process, attempt, answer });
            }
        }
    }

    fn is_searching(&self, process: ProcessId, attempt: u64) -> bool {
        let worker = &self.processes[process];
        worker.is_running() && matches!(worker.link, Link::Searching { attempt: current, .. } if current == attempt)
    }

    pub(super) fn refused(&mut self, process: ProcessId, attempt: u64, answer: Answer) {
        if !self.is_searching(process, attempt) {
            return;
        }
        if let Answer::Refused { code, why } = answer {
            self.say(|| format!("p{process} is refused: {why}"));
            return self.exit(process, code, &why);
        }
        self.try_again(process);
    }

    /// An attempt came to nothing: the same hello once more, later.
    fn try_again(&mut self, process: ProcessId) {
        let worker = &mut self.processes[process];
        let longest = if worker.has_joined { WAITS[2] } else { WAITS[1] };
        let Link::Searching { attempt, stream, wait } = &mut worker.link else { return };
        *stream = None;
        worker.searches += 1;
        *attempt = worker.searches;
        let (attempt, waited) = (*attempt, *wait);
        *wait = (*wait * 2).min(longest);
        let at = self.now + self.random.between((waited / 2, waited * 3 / 2)) + self.latency();
        let at = at.max(self.processes[process].stalled_until);
        self.queue.push(at, Event::Hello { process, attempt });
    }

    pub(super) fn down_arrives(&mut self, stream: StreamKey, down: Down) {
        let process = self.streams[stream].process;
        if !self.processes[process].is_running() || self.processes[process].stream() != Some(stream) {
            return;
        }
        let is_open = matches!(self.processes[process].link, Link::Open(_));
        match down {
            Down::Joined => {
                self.processes[process].link = Link::Open(stream);
                // What was said meanwhile has waited.
                for _ in 0..self.processes[process].outputs.len() {
                    self.queue.push(self.now, Event::Output { process });
                }
            }
            Down::Message(message) => {
                if matches!(message, ToWorker::Abort { .. }) && std::mem::take(&mut self.processes[process].lose_abort) {
                    return self.say(|| format!("p{process} never hears {message:?}"));
                }
                if let ToWorker::Welcome { heartbeat_interval_ms, .. } = &message {
                    let worker = &mut self.processes[process];
                    worker.has_joined = true;
                    worker.heartbeat = ms((*heartbeat_interval_ms).into());
                    worker.beat += 1;
                    let beat = worker.beat;
                    self.queue.push(self.now, Event::Beat { process, beat });
                }
                self.input(process, Input::Said(message));
            }
            Down::End(_) if !is_open => self.try_again(process),
            Down::End(cause) => {
                self.send_up(stream, Up::End("its process closed the connection"));
                self.processes[process].link = Link::Closed;
                self.input(process, Input::StreamLost { cause: cause.into() });
                if self.processes[process].is_running() {
                    self.search(process);
                }
            }
        }
    }

    fn send(&mut self, process: ProcessId, message: FromWorker) {
        if let Link::Open(stream) = self.processes[process].link {
            self.send_up(stream, Up::Message(message));
        }
    }

    pub(super) fn beat(&mut self, process: ProcessId, beat: u64) {
        if !self.processes[process].is_running() || self.processes[process].beat != beat {
            return;
        }
        if let Link::Open(_) = self.processes[process].link {
            let heartbeat = self.processes[process].control.heartbeat();
            self.input(process, Input::Beat(heartbeat));
        }
        self.queue.push(self.now + self.processes[process].heartbeat, Event::Beat { process, beat });
    }

    // ---- the supervisor's loop ----

    pub(super) fn output(&mut self, process: ProcessId, output: Output) {
        self.processes[process].outputs.push_back(output);
        let at = self.now + self.random.between((ms(0), ms(1)));
        self.queue.push(at, Event::Output { process });
    }

    /// The supervisor takes the oldest output, unless it looks for the coordinator.
    pub(super) fn take_output(&mut self, process: ProcessId) {
        let worker = &mut self.processes[process];
        if !worker.is_running() || !matches!(worker.link, Link::Open(_)) {
            return;
        }
        match worker.outputs.pop_front() {
            None => {}
            Some(Output::Event(event)) => self.input(process, Input::Trainer(event)),
            Some(Output::Read(report)) => self.input(process, Input::Read(report)),
            Some(Output::GaveBack(lease, from)) => self.input(process, Input::GaveBack { lease, from }),
            Some(Output::NeedLeases(num, is_idle)) => self.input(process, Input::NeedLeases { num, is_idle }),
            Some(Output::Snapshot { generation, weights }) => self.upload(process, generation, weights),
        }
    }

    pub(super) fn input(&mut self, process: ProcessId, input: Input) {
        self.say(|| format!("p{process} <- {input:?}"));
        for action in self.processes[process].rules.handle(input) {
            if !self.processes[process].is_running() {
                return;
            }
            self.act(process, action);
        }
    }

    fn act(&mut self, process: ProcessId, action: Action) {
        match action {
            Action::Send(message) => self.send(process, message),
            Action::Load { .. } => self.start_trainer(process),
            Action::MakeBootstrap { generation, num_members } => self.command(process, Command::MakeBootstrap(generation, num_members)),
            Action::Train(assignment) => {
                if let Some(loader) = &mut self.processes[process].loader {
                    loader.retain_leases(&assignment.held_leases);
                }
                self.ask_for_leases(process);
                self.command(process, Command::Train(assignment));
            }
            Action::Abort { generation, reason } => self.abort(process, generation, &reason),
            Action::PlanChange { generation } => self.processes[process].control.ask_change(generation),
            Action::Snapshot { generation } => {
                let control = &self.processes[process].control;
                if control.heartbeat().generation == generation {
                    control.ask_snapshot(generation);
                } else {
                    self.command(process, Command::Snapshot(generation));
                }
            }
            Action::Grant { leases, none_left, ask_when_idle } => {
                self.grant(process, leases, Outlook::of_grant(none_left, ask_when_idle));
            }
            Action::GiveBack { leases, for_idle } => leases.into_iter().for_each(|lease| self.give_back(process, lease, for_idle)),
            Action::AskForLeases => {
                if let Some(loader) = &mut self.processes[process].loader {
                    loader.forget_answer();
                }
                self.ask_for_leases(process);
            }
            Action::Reconnect => {}
            Action::Log { text } => self.say(|| format!("p{process}: {text}")),
            Action::Exit { code, message } => self.exit(process, code, &message),
        }
    }

    // ---- the data threads ----

    pub(super) fn start_loader(&mut self, process: ProcessId) {
        let share = self.plan.global_batch as usize;
        let max_buffered = self.random.within(1, 3) as usize * share + 4;
        self.processes[process].loader = Some(Loader::new(max_buffered));
        self.ask_for_leases(process);
    }

    pub(super) fn ask_for_leases(&mut self, process: ProcessId) {
        if let Some((num, is_idle)) = self.processes[process].loader.as_mut().and_then(Loader::ask) {
            self.output(process, Output::NeedLeases(num, is_idle));
        }
    }

    fn give_back(&mut self, process: ProcessId, lease: LeaseId, for_idle: bool) {
        let Some(loader) = &mut self.processes[process].loader else { return };
        let Some(from) = loader.give_back(lease, for_idle) else { return };
        self.output(process, Output::GaveBack(lease, from));
        self.ask_for_leases(process);
        self.read_on(process);
        self.look_for_share(process);
    }

    fn grant(&mut self, process: ProcessId, leases: Vec<Lease>, outlook: Outlook) {
        if let Some(loader) = &mut self.processes[process].loader {
            loader.grant(leases, outlook);
            self.ask_for_leases(process);
            self.read_on(process);
            self.look_for_share(process);
        }
    }

    /// Puts the data threads where a new generation starts.
    pub(super) fn settle_data(&mut self, process: ProcessId, void: Option<Share>) {
        let Some(loader) = &mut self.processes[process].loader else { return };
        if let Some(share) = void {
            loader.put_back(share);
        }
        loader.forget_answer();
        self.ask_for_leases(process);
        self.read_on(process);
    }

    /// Has the reader go on, if there is something to read and room for it.
    pub(super) fn read_on(&mut self, process: ProcessId) {
        let worker = &mut self.processes[process];
        let Some(loader) = &mut worker.loader else { return };
        if worker.reads || !loader.wants_to_read() {
            return;
        }
        worker.reads = true;
        let at = self.now + self.random.between(self.plan.reading);
        self.queue.push(at, Event::Read { process });
        // It has begun a lease, perhaps: then it may ask for one more.
        self.ask_for_leases(process);
    }

    pub(super) fn read(&mut self, process: ProcessId) {
        let worker = &mut self.processes[process];
        worker.reads = false;
        if !worker.is_running() {
            return;
        }
        let Some(loader) = &mut worker.loader else { return };
        let shards = &self.plan.shards;
        let News { report, gave_back } = loader.read(4, shards);
        self.reports(process, report);
        if let Some((lease, end)) = gave_back {
            self.output(process, Output::GaveBack(lease, end));
        }
        self.ask_for_leases(process);
        self.read_on(process);
        self.look_for_share(process);
    }

    // ---- its end ----

    /// The process ends by itself: a code and a last line.
    pub(super) fn exit(&mut self, process: ProcessId, code: u8, message: &str) {
        self.say(|| format!("p{process} exits with {code}: {message}"));
        self.processes[process].life = Life::Ending(code);
        self.trainer_is_gone(process, Leave::Shut);
        let patience =
            if self.processes[process].rules.left_in_order() && self.processes[process].uploads > 0 { GRACE } else { Duration::ZERO };
        self.queue.push(self.now + patience, Event::Close { process });
        self.operator_sees_end(process, Some(code));
    }

    /// Uploads are done or given up: the stream is closed, and the process is over.
    pub(super) fn close(&mut self, process: ProcessId) {
        if self.processes[process].life == Life::Gone {
            return;
        }
        if let Some(stream) = self.processes[process].stream() {
            self.send_up(stream, Up::End("its process closed the connection"));
        }
        self.processes[process].link = Link::Closed;
        self.processes[process].life = Life::Gone;
    }

    /// The process dies at once.
    pub(super) fn kill(&mut self, process: ProcessId, how: Leave) {
        if self.processes[process].life == Life::Gone {
            return;
        }
        self.say(|| format!("p{process} dies ({how:?})"));
        self.trainer_is_gone(process, how);
        if let Some(stream) = self.processes[process].stream()
            && how == Leave::Died
        {
            self.break_stream(stream, SOON);
        }
        self.processes[process].link = Link::Closed;
        self.processes[process].life = Life::Gone;
        self.operator_sees_end(process, None);
    }
}
