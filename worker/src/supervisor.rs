//! The async shell of a worker: joins lifecycle, client, trainer and signals.

use std::collections::VecDeque;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use peapod_collective::tcp::Ports;
use peapod_data::Outlook;
use peapod_proto::ids::{Incarnation, Rank, Step};
use peapod_proto::job::Job;
use peapod_proto::message::{FromWorker, Hello, Phase, ToWorker};
use peapod_proto::program::{Signals, StopSignal, host_name};
use peapod_proto::secure::Access;
use peapod_proto::trace::Trace;
use peapod_proto::{PROGRAM_VERSION, PROTOCOL_VERSION, v1, work_span};
use tch::Device;
use tokio::sync::mpsc;
use tokio::task::{JoinError, JoinHandle, JoinSet};
use tonic::Streaming;
use tracing::{Instrument, Span};

use crate::args::Args;
use crate::client::{self, ClientError, Parts};
use crate::device;
use crate::faults::Faults;
use crate::lifecycle::{Action, Input, Lifecycle, TRY_AGAIN, TrainerEvent};
use crate::outbox::Outbox;
use crate::setup;
use crate::trainer::{self, Command, Context, Control, Drawn, NotFetched, Output, Snapshot};

/// Exit code for arguments that cannot work.
pub const BAD_ARGUMENTS: u8 = 2;
/// What is under way when the worker ends gets this long: the last messages and a checkpoint being sent.
const GRACE: Duration = Duration::from_secs(10);
/// A stream that takes nothing for so long is given up.
const SEND_TIMEOUT: Duration = Duration::from_secs(10);
/// Checkpoints on their way at once when a generation stops: its last beside one before it.
const MAX_CHECKPOINTS_AT_A_STOP: usize = 2;
/// How often a download that nobody waits for any more is noticed.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// Between two looks at what the process holds in memory.
const MEMORY_EVERY: Duration = Duration::from_secs(5);
/// Until the coordinator says how often.
const FIRST_HEARTBEAT_INTERVAL: Duration = Duration::from_millis(500);
/// A coordinator of which nothing is heard for its heartbeat timeout is looked for anew, but not after less than this: it may stand still
/// for a moment.
const SHORTEST_SILENCE: Duration = Duration::from_secs(6);
/// Between streams that end before the coordinator has said a word: the first wait, doubled up to the longest.
const FIRST_WAIT: Duration = Duration::from_millis(100);
const LONGEST_WAIT: Duration = Duration::from_secs(5);

/// How a worker ended: an exit code and a last line.
#[derive(Debug)]
pub struct Exit {
    /// The code.
    pub code: u8,
    /// The line; may be empty.
    pub message: String,
}

impl Exit {
    /// Whether something went wrong: the worker was not just done, or asked to go by a signal.
    #[must_use]
    pub fn is_failure(&self) -> bool {
        !matches!(self.code, 0 | 129 | 130 | 143)
    }
}

/// What transfers say of themselves, those of the trainer's thread too; it changes with every reconnect.
type SharedSession = Arc<Mutex<Option<Trace>>>;

struct Supervisor {
    args: Args,
    access: Access,
    device: Device,
    incarnation: Incarnation,
    attempt: u32,
    life: Lifecycle,
    control: Arc<Control>,
    outbound: Option<mpsc::Sender<FromWorker>>,
    inbound: Option<Streaming<v1::ToWorker>>,
    session: SharedSession,
    local_ip: Option<IpAddr>,
    heartbeat_interval: Duration,
    /// How long nothing may be heard of the coordinator.
    silence: Duration,
    /// Heartbeats since something was heard of it. Counted, not timed: after a time in which this process stood still itself, answers are
    /// there.
    unanswered: u32,
    /// The coordinator's, once it is known.
    join_timeout: Option<Duration>,
    /// Streams in a row that ended before the coordinator said a word, and since when they do.
    fruitless: u32,
    fruitless_since: Option<Instant>,
    job: Option<Job>,
    commands: Option<std::sync::mpsc::Sender<Command>>,
    trainer: Option<std::thread::JoinHandle<()>>,
    outputs: mpsc::UnboundedReceiver<Output>,
    output: mpsc::UnboundedSender<Output>,
    checkpoints: Outbox<Box<Snapshot>>,
    pictures: JoinSet<()>,
    faults: Arc<Faults>,
    /// Whether the coordinator has said anything on the current stream.
    has_spoken: bool,
    /// Whether the current stream is given up.
    cut: bool,
    /// Whether the coordinator has welcomed the current stream.
    is_welcome: bool,
    /// Whether one keeps its heartbeats back.
    silent: bool,
    /// The last look at the memory, and when it began.
    memory: Option<(Instant, JoinHandle<()>)>,
}

/// Runs a worker to its end, training on `device`.
pub async fn run(args: Args, device: Device) -> Exit {
    let access = match args.validate() {
        Ok(access) => access,
        Err(problem) => return Exit { code: BAD_ARGUMENTS, message: problem },
    };
    let mut bytes = [0; 8];
    if let Err(error) = getrandom::fill(&mut bytes) {
        return Exit { code: 1, message: format!("no randomness from the system: {error}") };
    }
    let faults = match Faults::of_environment() {
        Ok(faults) => Arc::new(faults),
        Err(problem) => return Exit { code: BAD_ARGUMENTS, message: problem },
    };
    let (output, outputs) = mpsc::unbounded_channel();
    let mut supervisor = Supervisor {
        args,
        access,
        device,
        incarnation: Incarnation(u64::from_le_bytes(bytes)),
        attempt: 0,
        life: Lifecycle::new(),
        control: Arc::new(Control::default()),
        outbound: None,
        inbound: None,
        session: Arc::default(),
        local_ip: None,
        heartbeat_interval: FIRST_HEARTBEAT_INTERVAL,
        silence: SHORTEST_SILENCE,
        unanswered: 0,
        join_timeout: None,
        fruitless: 0,
        fruitless_since: None,
        job: None,
        commands: None,
        trainer: None,
        outputs,
        output,
        checkpoints: Outbox::default(),
        pictures: JoinSet::new(),
        faults,
        has_spoken: false,
        cut: false,
        is_welcome: false,
        silent: false,
        memory: None,
    };
    let exit = supervisor.run().await;
    supervisor.close().await;
    exit
}

impl Supervisor {
    async fn run(&mut self) -> Exit {
        let mut signals = match Signals::catch() {
            Ok(signals) => signals,
            Err(error) => return Exit { code: 1, message: format!("cannot catch signals: {error}") },
        };
        let mut heartbeat = heartbeats(self.heartbeat_interval);
        loop {
            if self.inbound.is_none() {
                let search = self.search();
                tokio::pin!(search);
                // Nothing is lost by leaving while there is no connection: a signal breaks the search at once. The trainer trains on, and
                // is listened to: what it hands out must not pile up.
                let found = loop {
                    tokio::select! {
                        found = &mut search => break found,
                        Some(output) = self.outputs.recv() => {
                            if let Some(exit) = self.take_alone(output) {
                                return exit;
                            }
                        }
                        signal = signals.next() => return self.leave_unheard(signal),
                    }
                };
                if let Err(exit) = self.joined(found) {
                    return exit;
                }
                // None was due while there was nobody to hear it: each counts as one that this stream has not answered.
                heartbeat.reset();
            }
            self.cut |= self.faults.cut_stream(self.control.heartbeat().step);
            let silent = self.is_silent().then(|| format!("nothing was heard of it for {} s", self.silence.as_secs()));
            let cut = self.cut.then(|| "this worker has cut it".to_owned()).or(silent);
            let input = tokio::select! {
                message = next_message(&mut self.inbound, cut) => match message {
                    Ok(message) if self.faults.lose(&message, self.control.heartbeat().step) => None,
                    Ok(message) => {
                        (self.unanswered, self.fruitless, self.fruitless_since, self.has_spoken) = (0, 0, None, true);
                        Some(Input::Said(message))
                    }
                    Err(cause) => match self.lost(cause) {
                        Ok(lost) => Some(lost),
                        Err(exit) => return exit,
                    },
                },
                Some(output) = self.outputs.recv() => self.take(output),
                _ = heartbeat.tick() => {
                    self.look_at_memory();
                    self.unanswered += 1;
                    Some(Input::Beat(self.control.heartbeat()))
                }
                signal = signals.next() => Some(Input::Signal(signal)),
                Some(sent) = self.checkpoints.sent() => {
                    say_if_broken("checkpoint", sent);
                    self.send_checkpoint(1);
                    None
                }
                Some(sent) = self.pictures.join_next() => {
                    say_if_broken("picture", sent);
                    None
                }
            };
            let Some(input) = input else { continue };
            if let Input::Said(ToWorker::Welcome { heartbeat_interval_ms, heartbeat_timeout_ms, join_timeout_ms, .. }) = &input {
                self.join_timeout = Some(Duration::from_millis((*join_timeout_ms).into()));
                self.heartbeat_interval = Duration::from_millis((*heartbeat_interval_ms).into());
                self.silence = Duration::from_millis((*heartbeat_timeout_ms).into()).max(SHORTEST_SILENCE);
                heartbeat = heartbeats(self.heartbeat_interval);
            }
            let is_welcome = matches!(input, Input::Said(ToWorker::Welcome { .. }));
            let has_stopped = matches!(input, Input::Trainer(TrainerEvent::Stopped(_)));
            let mut actions: VecDeque<Action> = self.life.handle(input).into();
            self.remember_identity();
            if is_welcome {
                self.is_welcome = true;
                self.send_checkpoint(1);
            }
            if has_stopped {
                // It may be the job's last: the coordinator waits for that, and no longer than for another to be asked.
                self.send_checkpoint(MAX_CHECKPOINTS_AT_A_STOP);
            }
            while let Some(action) = actions.pop_front() {
                if let Some(exit) = self.act(action).await {
                    return exit;
                }
            }
        }
    }

    /// Looks for the coordinator and opens a stream.
    fn search(&mut self) -> impl Future<Output = Result<client::Stream, ClientError>> + use<> {
        let hello = FromWorker::Hello(Hello {
            protocol_version: PROTOCOL_VERSION,
            program_version: PROGRAM_VERSION.into(),
            incarnation: self.incarnation,
            attempt: self.attempt,
            requested_rank: self.life.identity().map(|(_, rank)| rank).or(self.args.requested_rank()),
            host: host_name(),
            pid: std::process::id(),
            device: device::name(self.device),
        });
        self.attempt += 1;
        let (access, patience, returning) = (self.access.clone(), self.args.patience(self.join_timeout), self.join_timeout.is_some());
        let wait = self.fruitless.checked_sub(1).map(|times| (FIRST_WAIT * 2_u32.saturating_pow(times)).min(LONGEST_WAIT));
        async move {
            tokio::time::sleep(wait.unwrap_or_default()).await;
            client::join(&access, hello, patience, returning).await
        }
    }

    /// The stream is over. Where one after the other ends before the coordinator has said a word, the worker ends too, in time.
    fn lost(&mut self, cause: String) -> Result<Input, Exit> {
        (self.inbound, self.outbound, self.is_welcome) = (None, None, false);
        if !std::mem::take(&mut self.has_spoken) {
            self.fruitless += 1;
            let patience = self.args.patience(self.join_timeout);
            if self.fruitless_since.get_or_insert_with(Instant::now).elapsed() > patience {
                let (times, url) = (self.fruitless, self.access.url());
                let message = format!(
                    "the coordinator at {url} let this worker in {times} times and was lost each time before it said a word: {cause}"
                );
                return Err(Exit { code: TRY_AGAIN, message });
            }
        }
        Ok(Input::StreamLost { cause })
    }

    /// Has a thread of its own look at the memory, every few seconds, for the heartbeats that follow: a GPU's driver may keep it waiting.
    fn look_at_memory(&mut self) {
        if self.memory.as_ref().is_some_and(|(began, look)| began.elapsed() < MEMORY_EVERY || !look.is_finished()) {
            return;
        }
        let (control, device) = (self.control.clone(), self.device);
        let is_open = !matches!(control.heartbeat().phase, Phase::Loading | Phase::Fetching);
        let look = tokio::task::spawn_blocking(move || control.set_memory(device::usage::look(device, is_open)));
        self.memory = Some((Instant::now(), look));
    }

    /// Whether the coordinator has answered nothing for too long.
    fn is_silent(&self) -> bool {
        self.heartbeat_interval * self.unanswered > self.silence
    }

    /// Takes a stream over, or ends without one.
    fn joined(&mut self, found: Result<client::Stream, ClientError>) -> Result<(), Exit> {
        match found {
            Ok(stream) => {
                (self.cut, self.silent, self.has_spoken, self.unanswered) = (false, false, false, 0);
                self.outbound = Some(stream.outbound);
                self.inbound = Some(stream.inbound);
                self.local_ip = stream.local_ip;
                *lock(&self.session) = Some(stream.trace);
                Ok(())
            }
            Err(error) => {
                Err(match error {
                    // It was welcome with these arguments before: who was started in its place is not its fault.
                    ClientError::Refused { message, bad_arguments: true } if self.life.identity().is_some() => {
                        Exit { code: TRY_AGAIN, message: format!("lost its place while it was away: {message}") }
                    }
                    ClientError::Address(_) | ClientError::Refused { bad_arguments: true, .. } => {
                        Exit { code: BAD_ARGUMENTS, message: error.to_string() }
                    }
                    ClientError::Over(message) => Exit { code: 0, message },
                    // The coordinator may come yet, or come back.
                    ClientError::Unreachable { .. } => Exit { code: TRY_AGAIN, message: error.to_string() },
                    _ => Exit { code: 1, message: error.to_string() },
                })
            }
        }
    }

    /// Leaves as a signal wants it while there is no coordinator to hear of it.
    fn leave_unheard(&self, signal: StopSignal) -> Exit {
        let (name, url) = (signal.name(), self.access.url());
        let message = match self.life.identity() {
            None => format!("{name}: left before a coordinator answered at {url}"),
            Some(_) => format!("{name}: left at step {} while the coordinator at {url} was away", self.control.heartbeat().step),
        };
        Exit { code: signal.code(), message }
    }

    /// Takes what the trainer hands out while there is no coordinator.
    fn take_alone(&mut self, output: Output) -> Option<Exit> {
        if let Output::Snapshot(snapshot) = output {
            self.checkpoints.put(snapshot);
            return None;
        }
        let input = self.take(output)?;
        // What is to be sent is said again, as far as it matters, when there is a stream.
        self.life.handle(input).into_iter().find_map(|action| match action {
            Action::Exit { code, message } => Some(Exit { code, message }),
            _ => None,
        })
    }

    fn remember_identity(&self) {
        if let (Some(session), Some((_, rank))) = (lock(&self.session).as_ref(), self.life.identity()) {
            session.span().record("rank", rank.0);
        }
    }

    async fn send(&mut self, message: FromWorker) {
        if self.faults.keep_back(&message, self.control.heartbeat().step, &mut self.silent) {
            return;
        }
        // After one that nobody read, none is waited for: the stream is about to end.
        let Some(outbound) = self.outbound.as_ref().filter(|_| !self.cut) else { return };
        // A closed stream is noticed where it is read. One that nobody reads must not keep signals and aborts waiting.
        if tokio::time::timeout(SEND_TIMEOUT, outbound.send(message)).await.is_err() {
            tracing::warn!("the coordinator has read nothing for {} s", SEND_TIMEOUT.as_secs());
            self.cut = true;
        }
    }

    fn take(&mut self, output: Output) -> Option<Input> {
        match output {
            Output::Event(event) => Some(Input::Trainer(event)),
            Output::Read(report) => Some(Input::Read(report)),
            Output::NeedLeases { num, is_idle } => Some(Input::NeedLeases { num, is_idle }),
            Output::GaveBack { lease, from } => Some(Input::GaveBack { lease, from }),
            Output::Snapshot(snapshot) => {
                let (step, generation) = (snapshot.step, snapshot.generation);
                if let Some(older) = self.checkpoints.put(snapshot) {
                    tracing::warn!(
                        "the checkpoint of step {} is not sent: it still waited when that of step {step} was due; where the coordinator's store is slow, raise checkpoint.every_steps",
                        older.step
                    );
                }
                // What is asked for between generations is waited for: it may be the job's last. It is asked for a few times at most.
                let runs = self.control.heartbeat().generation == generation;
                self.send_checkpoint(if runs { 1 } else { usize::MAX });
                None
            }
            Output::Picture(drawn) => {
                self.send_picture(*drawn);
                None
            }
        }
    }

    async fn act(&mut self, action: Action) -> Option<Exit> {
        match action {
            Action::Send(message) => self.send(message).await,
            Action::Load { job_toml, rank } => {
                if let Err(message) = self.load(&job_toml, rank) {
                    let failure = FromWorker::Failure { phase: "loading".into(), message: message.clone(), permanent: true };
                    self.send(failure).await;
                    return Some(Exit { code: 1, message });
                }
            }
            Action::MakeBootstrap { generation, .. } => self.command(Command::MakeBootstrap { generation }),
            Action::Train(assignment) => {
                // Here and not on the trainer's thread: the next message may grant a lease, which that thread would take for a lost one.
                if let Some(loader) = self.control.loader() {
                    loader.retain_leases(&assignment.held_leases);
                }
                self.command(Command::Train(assignment));
            }
            Action::Abort { generation, reason } => self.control.abort(generation, &reason),
            Action::PlanChange { generation } => self.control.ask_change(generation),
            Action::Snapshot { generation } => {
                // A running generation sees the flag after its next step; one that has stopped sees the command.
                if self.control.heartbeat().generation == generation {
                    self.control.ask_snapshot(generation);
                } else {
                    self.command(Command::Snapshot { generation });
                }
            }
            Action::Grant { leases, none_left, ask_when_idle } => {
                if let Some(loader) = self.control.loader() {
                    let leases = leases.into_iter().map(Into::into).collect();
                    loader.answer(leases, Outlook::of_grant(none_left, ask_when_idle));
                }
            }
            Action::GiveBack { leases, for_idle } => {
                if let Some(loader) = self.control.loader() {
                    loader.give_back(&leases, for_idle);
                }
            }
            Action::AskForLeases => {
                if let Some(loader) = self.control.loader() {
                    loader.ask_again();
                }
            }
            // The loop sees that there is no stream.
            Action::Reconnect => {}
            Action::Log { text } => {
                let session = lock(&self.session).as_ref().map_or_else(Span::none, |session| session.span().clone());
                session.in_scope(|| tracing::info!("{text}"));
            }
            Action::Exit { code, message } => return Some(Exit { code, message }),
        }
        None
    }

    fn command(&self, command: Command) {
        if let Some(commands) = &self.commands {
            // A trainer that is gone has said why; the lifecycle ends on it.
            let _ = commands.send(command);
        }
    }

    /// Starts the trainer's thread.
    fn load(&mut self, job_toml: &str, rank: Rank) -> Result<(), String> {
        let job = Job::parse(job_toml).map_err(|error| format!("the coordinator's job file: {error}"))?;
        self.job = Some(job.clone());
        let (commands, inbox) = std::sync::mpsc::channel();
        self.commands = Some(commands);
        let output = self.output.clone();
        let (access, session, runtime) = (self.access.clone(), self.session.clone(), tokio::runtime::Handle::current());
        let control = self.control.clone();
        let context = Context {
            job,
            device: self.device,
            rank,
            quiet: self.args.quiet,
            allow_shared_gpu: self.args.allow_shared_gpu,
            encode_ahead: self.args.encode_ahead,
            advertise: self.advertised(),
            ports: self.args.ports.unwrap_or(Ports::ANY),
            output: Arc::new(move |message| {
                // The supervisor outlives the trainer but for the last moments of the process.
                let _ = output.send(message);
            }),
            control: self.control.clone(),
            faults: self.faults.clone(),
            download: Box::new(move |step, abort| {
                let failed = |message: String| NotFetched { message, is_over: false };
                let trace = lock(&session).clone().ok_or_else(|| failed("no connection to the coordinator".into()))?;
                let trace = trace.child(work_span!(parent: trace.span(), "download", step = step.0));
                let files = client::download(&access, &trace, step, || control.fetched()).instrument(trace.span().clone());
                let aborted = async {
                    while abort.reason().is_none() {
                        tokio::time::sleep(LOOK_EVERY).await;
                    }
                };
                runtime.block_on(async {
                    tokio::select! {
                        files = files => files.map_err(|error| {
                            NotFetched { is_over: matches!(error, ClientError::Refused { .. }), message: error.to_string() }
                        }),
                        () = aborted => Err(failed(abort.reason().unwrap_or("aborted").to_owned())),
                    }
                })
            }),
        };
        if let Some(threads) = self.args.threads {
            tch::set_num_threads(threads as i32);
        }
        let thread = std::thread::Builder::new().name("trainer".into()).spawn(move || trainer::run(context, inbox));
        self.trainer = Some(thread.map_err(|error| format!("cannot start the trainer's thread: {error}"))?);
        Ok(())
    }

    /// The address under which the other workers reach this one.
    fn advertised(&self) -> IpAddr {
        let local = self.local_ip.unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST));
        let address = self.args.advertise.unwrap_or_else(|| client::address_for_others(self.access.url(), local));
        if !address.is_loopback() {
            tracing::info!("the other workers reach this one at {address}, or elsewhere with --advertise");
        }
        address
    }

    /// Sends the newest copy of the weights, if there is one that waits and fewer than `limit` are on their way.
    fn send_checkpoint(&mut self, limit: usize) {
        if self.is_welcome
            && let Some(snapshot) = self.checkpoints.take(limit)
        {
            self.upload(*snapshot);
        }
    }

    /// Sends a checkpoint on a connection of its own, off both threads.
    fn upload(&mut self, snapshot: Snapshot) {
        let (Some(trace), Some(job)) = (lock(&self.session).clone(), self.job.clone()) else { return };
        let (access, generation, step) = (self.access.clone(), snapshot.generation, snapshot.step);
        let trace = trace.child(work_span!(parent: trace.span(), "upload", step = step.0));
        let span = trace.span().clone();
        let upload = async move {
            // Hundreds of megabytes: to write and to hash them would hold up everything else that this thread does.
            let files = tokio::task::spawn_blocking(move || files_of(&job, &snapshot, step).map(Parts::new)).await;
            let result = match files {
                Ok(Ok(parts)) => client::upload(&access, &trace, generation, step, parts).await.map_err(|error| error.to_string()),
                Ok(Err(error)) => Err(error.to_string()),
                Err(error) => Err(error.to_string()),
            };
            match result {
                Ok(location) => tracing::debug!("checkpoint of step {step} stored at {location}"),
                Err(error) => tracing::error!("checkpoint of step {step}: {error}"),
            }
        };
        self.checkpoints.send(upload.instrument(span));
    }

    /// Sends a picture on a connection of its own, off both threads. Nothing depends on its arrival.
    fn send_picture(&mut self, drawn: Drawn) {
        let Some(trace) = lock(&self.session).clone() else { return };
        let access = self.access.clone();
        let trace = trace.child(work_span!(parent: trace.span(), "picture", step = drawn.step.0, index = drawn.index));
        let span = trace.span().clone();
        let send = async move {
            let Drawn { generation, step, index, png, sent } = drawn;
            match client::send_picture(&access, &trace, generation, step, index, png).await {
                Ok(location) => tracing::debug!("picture {index} of step {step} stored at {location}"),
                Err(error) => tracing::warn!("picture {index} of step {step}: {error}"),
            }
            drop(sent);
        };
        self.pictures.spawn(send.instrument(span));
    }

    /// Ends what is under way, each part with its time.
    async fn close(&mut self) {
        self.control.abort(self.control.heartbeat().generation, "the worker ends");
        self.commands = None;
        let (mut checkpoints, mut pictures) = (std::mem::take(&mut self.checkpoints), std::mem::take(&mut self.pictures));
        // What takes longer is cut off as the sets are dropped.
        let finish = async move {
            while let Some(sent) = checkpoints.sent().await {
                say_if_broken("checkpoint", sent);
            }
            while let Some(sent) = pictures.join_next().await {
                say_if_broken("picture", sent);
            }
        };
        if self.life.left_in_order() && tokio::time::timeout(GRACE, finish).await.is_err() {
            tracing::warn!("a checkpoint or a picture was still being sent");
        }
        // Dropping the sender ends the stream once everything in it is sent; the coordinator closes its side in answer.
        self.outbound = None;
        *lock(&self.session) = None;
        let drained = async { while next_message(&mut self.inbound, None).await.is_ok() {} };
        let _ = tokio::time::timeout(Duration::from_secs(1), drained).await;
        if let Some(trainer) = self.trainer.take() {
            // It may be deep in libtorch, which cannot be interrupted; the process ends all the same.
            let _ = tokio::time::timeout(Duration::from_secs(1), tokio::task::spawn_blocking(move || trainer.join())).await;
        }
    }
}

fn files_of(job: &Job, snapshot: &Snapshot, step: Step) -> peapod_model::Result<Vec<(&'static str, Vec<u8>)>> {
    snapshot.to_files(setup::adamw_config(job), |average| setup::metadata(job, snapshot.adapter.config(), step, average))
}

/// What fails in the sending of a `what` is told there; a panic is not.
fn say_if_broken(what: &str, sent: Result<(), JoinError>) {
    if let Err(error) = sent {
        tracing::error!("a {what} was not sent: {error}");
    }
}

/// When to send heartbeats. One that is late is sent once, not made up for.
fn heartbeats(interval: Duration) -> tokio::time::Interval {
    let mut heartbeats = tokio::time::interval(interval);
    heartbeats.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    heartbeats
}

/// The next message, or why the stream is given up; never while there is none.
async fn next_message(inbound: &mut Option<Streaming<v1::ToWorker>>, cut: Option<String>) -> Result<ToWorker, String> {
    match (inbound, cut) {
        (Some(_), Some(why)) => Err(why),
        (Some(inbound), None) => client::next(inbound).await,
        (None, _) => std::future::pending().await,
    }
}

fn lock(session: &SharedSession) -> std::sync::MutexGuard<'_, Option<Trace>> {
    session.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use clap::Parser;
    use futures::StreamExt;
    use futures::stream::BoxStream;
    use tonic::{Request, Response, Status};

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: Args,
    }

    /// A coordinator that lets everybody in and drops them at once.
    struct Fickle(Arc<AtomicU32>);

    #[tonic::async_trait]
    impl v1::membership_server::Membership for Fickle {
        type JoinStream = BoxStream<'static, Result<v1::ToWorker, Status>>;

        async fn join(&self, _: Request<Streaming<v1::FromWorker>>) -> Result<Response<Self::JoinStream>, Status> {
            self.0.fetch_add(1, Ordering::Relaxed);
            Ok(Response::new(futures::stream::empty().boxed()))
        }
    }

    #[tokio::test]
    async fn streams_that_end_at_once_are_tried_ever_more_slowly_and_not_for_ever() {
        let (times, listener) = (Arc::new(AtomicU32::new(0)), tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap());
        let url = format!("http://{}", listener.local_addr().unwrap());
        let server = v1::membership_server::MembershipServer::new(Fickle(times.clone()));
        let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener);
        tokio::spawn(tonic::transport::Server::builder().add_service(server).serve_with_incoming(incoming));
        let line = Line::try_parse_from(["worker", "--coordinator", &url, "--connect-timeout", "1s"]).unwrap();
        let exit = run(line.args, Device::Cpu).await;
        assert!(exit.code == TRY_AGAIN && exit.message.contains("lost each time before it said a word: it closed"), "{exit:?}");
        // A second of pauses that double from a tenth.
        assert!((2..=8).contains(&times.load(Ordering::Relaxed)), "{times:?}");
    }
}
