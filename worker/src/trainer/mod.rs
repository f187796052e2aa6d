//! The thread that owns the tensors: joins a generation, trains until it ends, says what it holds.
//!
//! Orderly ends are looked at between collectives, through flags in the tail, since a rank that skips a collective hangs the
//! others. Only an abort breaks into one; then the step in flight is dropped and its samples wait for the source's word.

mod control;
mod copying;
mod rounds;
mod state;
mod step;

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use peapod_collective::nccl::{self, NcclDevice};
use peapod_collective::tcp::{Bootstrap, Listener, Membership, TcpCollective};
use peapod_collective::{AbortHandle, Collective, Footing, SoloCollective, agree};
use peapod_data::{Loader, Share};
use peapod_model::adapter::{Adapter, AdapterConfig};
use peapod_model::distill::Distiller;
use peapod_model::optim::clip_grad_norm;
use peapod_model::schedule::LrSchedule;
use peapod_proto::ids::{Generation, LeaseId, MemberIndex, Step};
use peapod_proto::job::Job;
use peapod_proto::message::{
    Assignment, Phase, ShardReport, SkipReason, SkippedSample, Stall, StepLosses, StepRecord, StepReport, StepTimings, StopCause, Stopped,
    ValidationLosses,
};
use tch::{Device, Kind, Tensor};

pub use control::Control;
use copying::Copying;
pub use rounds::Drawn;
use rounds::{Due, Rounds, Unfinished, means};
pub use state::{Snapshot, TrainState};

use crate::faults::Faults;
use crate::lifecycle::TrainerEvent;
use crate::loss_scale::LossScale;
use crate::setup;
use crate::tail::{Contribution, Outcome, TailLayout, ValidationTotals, share_of};

/// The members of a generation are told of it within moments of each other: one that cannot be reached for so long is cut off.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(15);
/// A collective that takes longer than this is stuck for a reason that nobody else noticed.
const COLLECTIVE_TIMEOUT: Duration = Duration::from_secs(600);
/// As much longer it may take for each validation or set of pictures before it: a member with less to do waits in it for the others.
const ROUND_TIMEOUT: Duration = Duration::from_secs(600);
/// Pictures on their way hold up the end of a generation for this long at most: less than the others are waited for.
const LAST_PICTURES_TIMEOUT: Duration = Duration::from_secs(5);
/// Between two looks at whether the wait for them is broken off.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// What the supervisor tells the trainer between generations. What concerns a running one goes through [`Control`].
#[derive(Debug)]
pub enum Command {
    /// Make the bootstrap of a generation.
    MakeBootstrap {
        /// The generation.
        generation: Generation,
    },
    /// Join a generation.
    Train(Assignment),
    /// Copy the weights, if there are any.
    Snapshot {
        /// The generation that asks.
        generation: Generation,
    },
}

/// What the trainer hands out.
pub enum Output {
    /// For the lifecycle.
    Event(TrainerEvent),
    /// For the coordinator's store.
    Snapshot(Box<Snapshot>),
    /// For the coordinator's gallery.
    Picture(Box<Drawn>),
    /// From the data threads.
    Read(ShardReport),
    /// The data threads want shards.
    NeedLeases {
        /// How many.
        num: u32,
        /// Nothing is left to train.
        is_idle: bool,
    },
    /// The data threads leave the rest of a lease to others.
    GaveBack {
        /// The lease.
        lease: LeaseId,
        /// The first index they leave.
        from: u32,
    },
}

/// Fetches the files of a checkpoint from the coordinator. Called on the trainer's thread.
pub type Download = Box<dyn Fn(Step) -> Result<Vec<(String, Vec<u8>)>, String> + Send>;

/// What a trainer is started with and keeps.
pub struct Context {
    /// The job.
    pub job: Job,
    /// Where it trains.
    pub device: Device,
    /// Whether another member may train on the same GPU.
    pub allow_shared_gpu: bool,
    /// Address under which the other members reach this one.
    pub advertise: IpAddr,
    /// Where its output goes.
    pub output: Arc<dyn Fn(Output) + Send + Sync>,
    /// What others ask of it in the middle of a step.
    pub control: Arc<Control>,
    /// How it gets a checkpoint.
    pub download: Download,
    /// Where it fails on purpose.
    pub faults: Arc<Faults>,
}

/// Why a generation ended for this member.
enum Ended {
    /// In order; with a reason if the exchange after the last step failed, which changes no weights.
    Orderly(StopCause, String),
    /// The collective failed or was aborted; by the loss of a neighbour, if that is known.
    Broken { reason: String, lost: Option<MemberIndex>, stalled: Option<Stall> },
    /// This worker cannot go on.
    Failed { phase: &'static str, message: String },
    /// Nor can another in its place: the job's workers do not fit together.
    Unfit(String),
}

impl Ended {
    fn broken(reason: String) -> Self {
        Self::Broken { reason, lost: None, stalled: None }
    }

    /// What an error of a collective means, with where this member was in it.
    fn within(collective: &dyn Collective, error: peapod_collective::Error) -> Self {
        let stall =
            |stall: peapod_collective::Stall| Stall { waiting_for: MemberIndex(stall.waiting_for), received_bytes: stall.received_bytes };
        match Self::by(error) {
            Self::Broken { reason, lost, .. } => Self::Broken { reason, lost, stalled: collective.stalled().map(stall) },
            other => other,
        }
    }

    /// What an error of the collective means, and which neighbour is behind it as far as this member can see.
    fn by(error: peapod_collective::Error) -> Self {
        let lost = match &error {
            peapod_collective::Error::Unfit { .. } => return Self::Unfit(error.to_string()),
            peapod_collective::Error::AbortHung { .. } => return Self::Failed { phase: "collective", message: error.to_string() },
            peapod_collective::Error::PeerLost { member_index, .. } => Some(MemberIndex(*member_index)),
            peapod_collective::Error::Timeout { waiting_for, .. } => waiting_for.first().map(|&index| MemberIndex(index)),
            _ => None,
        };
        Self::Broken { reason: with_sources(&error), lost, stalled: None }
    }
}

/// Loads the job's models, then serves `commands` until the channel closes. The body of the trainer's thread.
pub fn run(context: Context, commands: Receiver<Command>) {
    let output = context.output.clone();
    let fail = |phase, message: String, permanent| output(Output::Event(TrainerEvent::Failed { phase, message, permanent }));
    let mut trainer = match guarded(|| Trainer::load(context)) {
        Ok(Ok(trainer)) => trainer,
        // The files are what they are: another worker with the same job would fail in the same way.
        Ok(Err(message)) => return fail("loading", message, true),
        Err(panic) => return fail("loading", panic, false),
    };
    while let Ok(command) = commands.recv() {
        if let Err(panic) = guarded(|| trainer.serve(command)) {
            return fail("training", panic, false);
        }
    }
}

/// Turns a panic, which is how libtorch's errors reach Rust, into its message.
fn guarded<T>(body: impl FnOnce() -> T) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(body)).map_err(|panic| {
        let text = panic.downcast_ref::<String>().cloned().or_else(|| panic.downcast_ref::<&str>().map(|&text| text.to_owned()));
        text.unwrap_or_else(|| "a panic without a message".into())
    })
}

struct Trainer {
    context: Context,
    models: Distiller,
    loader: Loader,
    rounds: Rounds,
    adapter_config: AdapterConfig,
    schedule: LrSchedule,
    /// Absent until the first generation, and while an incomplete one is being received.
    state: Option<TrainState>,
    /// The share of a step whose all-reduce did not finish here: consumed if the source holds that step, else to be given again.
    in_flight: Option<(Step, Share)>,
    /// Losses of the last step's weights that no record carries, as no step follows.
    last_validation: Option<ValidationLosses>,
    /// Its other end is closed once the newest pictures are sent or given up.
    pending: Option<Receiver<()>>,
    /// The checkpoint of the last step, while it is copied.
    copying: Option<Copying>,
    /// A listener whose address is in the bootstrap of a generation.
    listener: Option<(Generation, Listener)>,
    /// Opened by the first generation that needs it.
    gpu: Option<Arc<NcclDevice>>,
    /// Picture sizes and batch sizes that were computed before: the first time may take long.
    sizes_seen: BTreeSet<((u32, u32), usize)>,
}

impl Trainer {
    fn load(context: Context) -> Result<Self, String> {
        let Context { job, device, output, control, .. } = &context;
        let models = setup::load_models(job, *device).map_err(|error| error.to_string())?;
        let adapter_config = setup::adapter_config(job, &models);
        let data = setup::loader_config(job, &models);
        let rounds = Rounds::load(job, &models, &data)?;
        let model_digest = setup::model_digest(job, &adapter_config).map_err(|error| error.to_string())?;
        let model_digest = rounds.digest_with(model_digest);
        let events = output.clone();
        let loader = Loader::start(data, move |event| events(data_output(event)));
        let loader = loader.map_err(|error| error.to_string())?;
        control.set_loader(loader.handle());
        let fresh = Adapter::fresh(adapter_config, job.seed, *device).map_err(|error| error.to_string())?;
        control.enter(Phase::Waiting);
        output(Output::Event(TrainerEvent::Loaded { model_digest, num_parameters: fresh.num_parameters() as u64 }));
        Ok(Self {
            schedule: setup::lr_schedule(job),
            context,
            models,
            loader,
            rounds,
            adapter_config,
            state: None,
            in_flight: None,
            last_validation: None,
            pending: None,
            copying: None,
            listener: None,
            gpu: None,
            sizes_seen: BTreeSet::new(),
        })
    }

    fn event(&self, event: TrainerEvent) {
        (self.context.output)(Output::Event(event));
    }

    fn serve(&mut self, command: Command) {
        match command {
            Command::MakeBootstrap { generation } => match self.bootstrap(generation) {
                Ok(bytes) => self.event(TrainerEvent::Bootstrap { generation, bytes }),
                Err(message) => self.event(TrainerEvent::Failed { phase: "connecting", message, permanent: false }),
            },
            Command::Train(assignment) => self.train(&assignment),
            Command::Snapshot { generation } => {
                if let Err(error) = self.snapshot(generation) {
                    self.event(TrainerEvent::Failed { phase: "snapshot", message: error.to_string(), permanent: false });
                }
            }
        }
    }

    fn open_listener(&self) -> Result<Listener, String> {
        // Other hosts may reach the advertised address through a translation: only the loopback is bound as it is.
        let any = match self.context.advertise {
            loopback if loopback.is_loopback() => loopback,
            IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
            IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
        };
        Listener::open(any, self.context.advertise).map_err(|error| with_sources(&error))
    }

    fn bootstrap(&mut self, generation: Generation) -> Result<Vec<u8>, String> {
        let listener = self.open_listener()?;
        let bootstrap = listener.bootstrap().map_err(|error| with_sources(&error))?;
        self.listener = Some((generation, listener));
        Ok(bootstrap.to_bytes())
    }

    /// One generation, from the assignment to [`Stopped`].
    fn train(&mut self, assignment: &Assignment) {
        let generation = assignment.generation;
        let abort = self.context.control.begin(generation);
        self.context.control.enter(Phase::Connecting);
        self.last_validation = None;
        self.settle_data(assignment);
        let ended = match self.enter(assignment, &abort) {
            Ok(collective) => self.steps(assignment, &abort, collective),
            Err(ended) => ended,
        };
        let ended = self.finish_copy().err().unwrap_or(ended);
        self.context.control.end();
        self.context.control.enter(Phase::Waiting);
        let (cause, reason, lost_member, stalled) = match ended {
            Ended::Orderly(cause, reason) => (cause, reason, None, None),
            Ended::Broken { reason, lost, stalled } => (StopCause::Aborted, reason, lost, stalled),
            Ended::Failed { phase, message } => return self.event(TrainerEvent::Failed { phase, message, permanent: false }),
            Ended::Unfit(message) => return self.event(TrainerEvent::Failed { phase: "connecting", message, permanent: true }),
        };
        let applied = self.state.as_ref().map_or(Step(0), |state| state.step);
        let validation = self.last_validation.take();
        let trained_in = self.state.as_ref().map_or(Generation::NONE, |state| state.generation);
        let records = Vec::new();
        let stopped = Stopped { generation, applied, cause, records, reason, validation, trained_in, lost_member, stalled };
        self.event(TrainerEvent::Stopped(stopped));
    }

    /// Puts the data threads where the new generation starts. That leases are lost was told them with the assignment.
    fn settle_data(&mut self, assignment: &Assignment) {
        match self.in_flight.take() {
            Some((step, share)) if is_void(step, assignment.base_step) => self.loader.put_back(share),
            _ => {}
        }
        self.loader.handle().ask_again();
    }

    /// Builds the communicator and comes to hold the base step.
    fn enter(&mut self, assignment: &Assignment, abort: &AbortHandle) -> Result<Box<dyn Collective>, Ended> {
        let deadline = Instant::now() + COLLECTIVE_TIMEOUT;
        let broken = Ended::by;
        let mut collective: Box<dyn Collective> = if assignment.num_members == 1 {
            Box::new(SoloCollective::new(abort.clone()))
        } else {
            let listener = match self.listener.take().filter(|(generation, _)| *generation == assignment.generation) {
                Some((_, listener)) => listener,
                None => self.open_listener().map_err(Ended::broken)?,
            };
            let membership = Membership {
                generation: assignment.generation.0,
                member_index: assignment.member_index.0,
                num_members: assignment.num_members,
            };
            let bootstrap = Bootstrap::from_bytes(&assignment.bootstrap).map_err(broken)?;
            let connected = Instant::now() + CONNECT_TIMEOUT;
            let mut ring = TcpCollective::connect(&bootstrap, membership, listener, abort.clone(), connected).map_err(broken)?;
            let gpu = self.open_gpu().map_err(broken)?;
            let footing = gpu.as_ref().map_or(Footing::Cpu, |gpu| Footing::Gpu(gpu.uuid()));
            agree(&mut ring, footing, self.context.allow_shared_gpu, connected).map_err(broken)?;
            match gpu {
                Some(gpu) => nccl::connect(ring, gpu, deadline).map_err(broken)?,
                None => Box::new(ring),
            }
        };
        collective = self.context.faults.over(collective, assignment.base_step);
        let held =
            self.state.as_ref().is_some_and(|state| state.step == assignment.base_step && state.generation == assignment.base_generation);
        let is_source = assignment.member_index == assignment.source_index;
        if is_source && !(held && assignment.checkpoint_step.is_none()) {
            self.state = None;
            self.state = Some(self.first_state(assignment)?);
        }
        if assignment.broadcast_state {
            self.spread(assignment, collective.as_mut(), is_source, held, deadline)?;
        }
        match &self.state {
            Some(state) if state.step == assignment.base_step => {
                self.context.control.set_step(state.step);
                Ok(collective)
            }
            held => {
                let held = held.as_ref().map_or_else(|| "none".to_owned(), |state| state.step.to_string());
                let message = format!("holds step {held}, {} starts from step {}", assignment.generation, assignment.base_step);
                Err(Ended::Failed { phase: "connecting", message })
            }
        }
    }

    /// The GPU as NCCL uses it; `None` on the CPU.
    fn open_gpu(&mut self) -> Result<Option<Arc<NcclDevice>>, peapod_collective::Error> {
        if let (None, Device::Cuda(ordinal)) = (&self.gpu, self.context.device) {
            self.gpu = Some(NcclDevice::open(ordinal)?);
        }
        Ok(self.gpu.clone())
    }

    /// The state that nobody holds: of the checkpoint, or fresh.
    fn first_state(&self, assignment: &Assignment) -> Result<TrainState, Ended> {
        let failed = |message: String| Ended::Failed { phase: "resuming", message };
        let (optimizer, ema) = (setup::adamw_config(&self.context.job), self.context.job.train.ema_decay);
        let Some(step) = assignment.checkpoint_step else {
            return self.fresh_state().map_err(failed);
        };
        let files = (self.context.download)(step).map_err(failed)?;
        let part = |name: &str| files.iter().find(|(file, _)| file == name).map(|(_, bytes)| bytes.clone());
        let mut state = TrainState::from_checkpoint(self.adapter_config, optimizer, ema, self.context.device, step, part)
            .map_err(|error| failed(format!("checkpoint of step {step}: {error}")))?;
        // The networks' numbers may be others than before.
        state.loss_scale = setup::first_loss_scale(&self.context.job, self.context.device).map(|first| state.loss_scale.unwrap_or(first));
        Ok(state)
    }

    fn fresh_state(&self) -> Result<TrainState, String> {
        let (optimizer, ema) = (setup::adamw_config(&self.context.job), self.context.job.train.ema_decay);
        let mut state = TrainState::fresh(self.adapter_config, optimizer, ema, self.context.job.seed, self.context.device)
            .map_err(|error| error.to_string())?;
        state.loss_scale = setup::first_loss_scale(&self.context.job, self.context.device);
        Ok(state)
    }

    /// The source's state reaches those who lack it. Those who hold it take part and keep their own until the new one is whole.
    fn spread(
        &mut self,
        assignment: &Assignment,
        collective: &mut dyn Collective,
        is_source: bool,
        held: bool,
        deadline: Instant,
    ) -> Result<(), Ended> {
        let failed = |message: String| Ended::Failed { phase: "connecting", message };
        if !held && !is_source {
            // What it holds is of another line and must not be taken for the truth if this broadcast is cut off.
            self.state = None;
        }
        let mut scratch = match &self.state {
            Some(_) => None,
            None => Some(self.fresh_state().map_err(failed)?),
        };
        let shape = scratch.as_ref().or(self.state.as_ref());
        let mut bytes = match shape {
            Some(state) if is_source => state.to_bytes(),
            Some(state) => vec![0; state.num_bytes()],
            None => return Err(failed("no state to send or receive".into())),
        };
        let sent = collective.broadcast(&mut bytes, assignment.source_index.0, deadline);
        sent.map_err(|error| Ended::within(collective, error))?;
        if let Some(state) = &mut scratch {
            state.restore(&bytes).map_err(|error| failed(error.to_string()))?;
            state.generation = assignment.base_generation;
            self.state = scratch;
        }
        Ok(())
    }

    /// Steps until the generation ends.
    fn steps(&mut self, assignment: &Assignment, abort: &AbortHandle, mut collective: Box<dyn Collective>) -> Ended {
        let layout = TailLayout::new(assignment.num_members, assignment.global_batch);
        let place = Place { assignment, abort, layout };
        let num_parameters = self.state.as_ref().map_or(0, |state| state.adapter.num_parameters());
        let mut gradient = Tensor::zeros([num_parameters as i64], (Kind::Float, self.context.device));
        let mut wire = vec![0.0_f32; num_parameters + layout.len()];
        loop {
            match self.step(place, collective.as_mut(), &mut gradient, &mut wire) {
                Ok(None) => {}
                Ok(Some(cause)) => return Ended::Orderly(cause, self.finish(place, collective.as_mut(), &mut wire, cause)),
                Err(ended) => return ended,
            }
        }
    }

    /// One step; says when it was the generation's last.
    fn step(
        &mut self,
        place: Place<'_>,
        collective: &mut dyn Collective,
        gradient: &mut Tensor,
        wire: &mut [f32],
    ) -> Result<Option<StopCause>, Ended> {
        let Place { assignment, layout, .. } = place;
        let generation = assignment.generation;
        let owed = share_of(assignment.global_batch, assignment.member_index, assignment.num_members) as usize;
        let before = self.state.as_ref().map_or(Step(0), |state| state.step);

        // 0. What is due of the weights as they are. The data threads read on meanwhile.
        let round = self.round(place, self.rounds.due(before))?;
        let Some(state) = &self.state else { return Err(no_state()) };
        let step = before.next();
        let clock = Instant::now();

        // 1. Samples.
        self.context.control.enter(Phase::Data);
        self.context.faults.in_data(step, place.abort);
        let share = self.loader.next_share(owed).map_err(|error| match error {
            peapod_data::Error::Cancelled => Ended::broken("aborted while waiting for samples".into()),
            error => Ended::Failed { phase: "data", message: error.to_string() },
        })?;
        let data = clock.elapsed();

        // 2. Gradient of this share. From here until the sum has arrived, the share is in flight.
        let mut is_new = false;
        for batch in &share.batches {
            is_new |= self.sizes_seen.insert((batch.bucket, batch.samples.len()));
        }
        self.context.control.enter(if is_new { Phase::Warming } else { Phase::Compute });
        self.context.faults.in_compute(step);
        let share = &self.in_flight.insert((step, share)).1;
        let (models, adapter) = (&self.models, &state.adapter);
        let scale = state.loss_scale.as_ref().map_or(1.0, LossScale::factor);
        let _ = gradient.zero_();
        let result = guarded(|| step::accumulate(models, adapter, share, gradient, scale));
        let mut contribution = match result {
            Ok(Ok(contribution)) => contribution,
            Ok(Err(error)) => return Err(Ended::Failed { phase: "compute", message: error.to_string() }),
            Err(panic) => return Err(Ended::Failed { phase: "compute", message: panic }),
        };
        contribution.change = self.context.control.change_is_asked(generation);
        contribution.validation = round.validation;
        let num_parameters = gradient.numel();
        let (values, tail) = wire.split_at_mut(num_parameters);
        gradient.to_device(Device::Cpu).copy_data(values, num_parameters);
        layout.write(tail, step, assignment.member_index, &contribution);
        let compute = clock.elapsed();

        // 3. The sum over all members.
        self.context.control.enter(Phase::Collective);
        let reduced = collective.all_reduce_sum(wire, round.deadline());
        reduced.map_err(|error| Ended::within(collective, error))?;
        let (values, tail) = wire.split_at(num_parameters);
        let outcome = layout.read(tail, step).map_err(|error| Ended::broken(error.to_string()))?;
        self.in_flight = None;
        let reduced = clock.elapsed();
        let validation = means(before, &outcome.validation);
        if outcome.names.is_empty() {
            self.last_validation = validation;
            return Ok(Some(StopCause::DataDone));
        }

        // 4. The update, only now that the sum is known to be whole.
        self.finish_copy()?;
        self.context.control.enter(Phase::Update);
        let state = self.state.as_mut().ok_or_else(no_state)?;
        gradient.copy_(&Tensor::from_slice(values));
        let learning_rate = self.schedule.rate(state.step.0);
        let updated = update(state, gradient, &outcome, learning_rate, self.context.job.train.max_grad_norm);
        let (grad_norm, skipped) = updated.map_err(|error| Ended::Failed { phase: "update", message: error.to_string() })?;
        state.step = step;
        state.generation = generation;
        self.context.control.set_step(step);
        let done = clock.elapsed();
        tracing::debug!("applied step {step} in {generation}, of {} members", assignment.num_members);

        let record = StepRecord { validation, ..record(step, generation, &outcome, grad_norm, learning_rate, skipped) };
        let timings = StepTimings {
            data: data.as_secs_f32(),
            compute: (compute - data).as_secs_f32(),
            collective: (reduced - compute).as_secs_f32(),
            update: (done - reduced).as_secs_f32(),
            validation: round.validating.as_secs_f32(),
            sampling: round.sampling.as_secs_f32(),
        };
        self.report(assignment.member_index, record, timings)?;
        if self.context.job.last_step() == Some(step.0) {
            return Ok(Some(StopCause::StepsDone));
        }
        Ok(outcome.change.then_some(StopCause::Planned))
    }

    /// Does what is due of the weights between two steps.
    fn round(&mut self, place: Place<'_>, due: Due) -> Result<Round, Ended> {
        let mut round = Round { due, ..Round::default() };
        if due == Due::default() {
            return Ok(round);
        }
        let Place { assignment, abort, .. } = place;
        let state = self.state.as_ref().ok_or_else(no_state)?;
        let go_on = || abort.reason().is_none();
        let broken_off = || Ended::broken(abort.reason().unwrap_or("aborted").to_owned());
        let average = state.average().map_err(|error| Ended::Failed { phase: "validating", message: error.to_string() })?;
        let (models, adapter) = (&self.models, average.as_ref().unwrap_or(&state.adapter));
        if due.validation {
            self.context.control.enter(Phase::Validating);
            let clock = Instant::now();
            let failed = |message| Ended::Failed { phase: "validating", message };
            match guarded(|| self.rounds.validate(models, adapter, assignment, go_on)) {
                Ok(Ok(totals)) => round.validation = totals,
                Ok(Err(Unfinished::BrokenOff)) => return Err(broken_off()),
                Ok(Err(Unfinished::Failed(error))) => return Err(failed(error.to_string())),
                Err(panic) => return Err(failed(panic)),
            }
            round.validating = clock.elapsed();
        }
        if due.pictures {
            self.context.control.enter(Phase::Sampling);
            let clock = Instant::now();
            let (sent, pending) = channel();
            let keep = |index, png| {
                let drawn = Drawn { generation: assignment.generation, step: state.step, index, png, sent: sent.clone() };
                (self.context.output)(Output::Picture(Box::new(drawn)));
            };
            let message = match guarded(|| self.rounds.draw(models, adapter, state.step, assignment, go_on, keep)) {
                Ok(Ok(())) => None,
                Ok(Err(Unfinished::BrokenOff)) => return Err(broken_off()),
                Ok(Err(Unfinished::Failed(error))) => Some(error.to_string()),
                Err(panic) => Some(panic),
            };
            // Training needs no picture: the next time may go better.
            if let Some(message) = message {
                let first = message.lines().next().unwrap_or_default();
                tracing::warn!("pictures of step {} are not drawn: {first}", state.step);
            }
            round.sampling = clock.elapsed();
            self.pending = Some(pending);
        }
        Ok(round)
    }

    /// What is left to do after a generation's last step; returns what went wrong in it.
    ///
    /// The weights are final whatever happens here: nothing of it may look like a step that failed.
    fn finish(&mut self, place: Place<'_>, collective: &mut dyn Collective, wire: &mut [f32], cause: StopCause) -> String {
        let step = self.state.as_ref().map_or(Step(0), |state| state.step);
        // The number of the exchange is one that no all-reduce of this generation has had.
        let (due, number) = match cause {
            StopCause::StepsDone => (self.rounds.due_at_the_end(), step.next()),
            // The all-reduce that found no sample left has carried what was due anyway.
            StopCause::DataDone => (self.rounds.due_at_the_end().without(self.rounds.due(step)), step.next().next()),
            StopCause::Planned | StopCause::Aborted => (Due::default(), step),
        };
        let round = self.round(place, due);
        if let Some(pending) = self.pending.take() {
            wait_for_the_other_end(&pending, place.abort);
        }
        if due == Due::default() {
            return String::new();
        }
        match round.and_then(|round| self.last_exchange(place, collective, wire, number, &round)) {
            Ok(totals) => {
                self.last_validation = means(step, &totals).or(self.last_validation.take());
                String::new()
            }
            Err(Ended::Broken { reason, .. }) => reason,
            Err(Ended::Failed { phase, message }) => format!("{phase}: {message}"),
            Err(Ended::Unfit(message)) => message,
            Err(Ended::Orderly(..)) => String::new(),
        }
    }

    /// An all-reduce that carries no sample and no gradient, only what the members found out about the last weights. It also keeps them
    /// together until the slowest has drawn its pictures.
    fn last_exchange(
        &self,
        place: Place<'_>,
        collective: &mut dyn Collective,
        wire: &mut [f32],
        number: Step,
        round: &Round,
    ) -> Result<ValidationTotals, Ended> {
        self.context.control.enter(Phase::Collective);
        let tail_start = wire.len() - place.layout.len();
        wire.fill(0.0);
        let contribution = Contribution { validation: round.validation, ..Contribution::default() };
        place.layout.write(&mut wire[tail_start..], number, place.assignment.member_index, &contribution);
        collective.all_reduce_sum(wire, round.deadline()).map_err(Ended::by)?;
        let outcome = place.layout.read(&wire[tail_start..], number).map_err(|error| Ended::broken(error.to_string()))?;
        Ok(outcome.validation)
    }

    /// Tells the coordinator of an applied step; where a checkpoint is due, from the thread that copies the weights.
    fn report(&mut self, member: MemberIndex, record: StepRecord, timings: StepTimings) -> Result<(), Ended> {
        let (step, generation, began) = (record.step, record.generation, Instant::now());
        let scheduled = step.0.is_multiple_of(self.context.job.checkpoint.every_steps);
        let asked = self.context.control.take_snapshot_request(generation);
        let report = StepReport { generation, step, record: Some(record), timings, snapshot: None };
        if !scheduled && !asked {
            self.event(TrainerEvent::Step(report));
            return Ok(());
        }
        let state = self.state.as_ref().ok_or_else(no_state)?;
        let failed = |message: String| Ended::Failed { phase: "snapshot", message };
        let view = state.view(generation).map_err(|error| failed(error.to_string()))?;
        let copying = Copying::start(view, report, member == MemberIndex(0), self.context.output.clone(), began);
        self.copying = Some(copying.map_err(failed)?);
        Ok(())
    }

    fn finish_copy(&mut self) -> Result<(), Ended> {
        let Some(copying) = self.copying.take() else { return Ok(()) };
        self.context.control.enter(Phase::Snapshot);
        copying.finish().map_err(|message| Ended::Failed { phase: "snapshot", message })
    }

    fn snapshot(&mut self, generation: Generation) -> peapod_model::Result<()> {
        if let Some(state) = &self.state {
            (self.context.output)(Output::Snapshot(Box::new(state.view(generation)?.snapshot()?)));
        }
        Ok(())
    }
}

/// A member's place in a generation.
#[derive(Clone, Copy)]
struct Place<'a> {
    assignment: &'a Assignment,
    abort: &'a AbortHandle,
    layout: TailLayout,
}

/// What was done of the weights between two steps.
#[derive(Default)]
struct Round {
    due: Due,
    validation: ValidationTotals,
    validating: Duration,
    sampling: Duration,
}

impl Round {
    /// Until when the all-reduce after it may take.
    fn deadline(&self) -> Instant {
        Instant::now() + COLLECTIVE_TIMEOUT + ROUND_TIMEOUT * self.due.count()
    }
}

/// Waits until nobody can send any more, for a while or until the generation is aborted.
fn wait_for_the_other_end(pending: &Receiver<()>, abort: &AbortHandle) {
    let deadline = Instant::now() + LAST_PICTURES_TIMEOUT;
    while pending.recv_timeout(LOOK_EVERY) == Err(RecvTimeoutError::Timeout) && abort.reason().is_none() {
        if Instant::now() >= deadline {
            tracing::warn!("the last pictures are still being sent and are not waited for");
            return;
        }
    }
}

fn no_state() -> Ended {
    Ended::Failed { phase: "training", message: "no state".into() }
}

/// Whether the share of a step whose sum did not arrive here is to be trained again.
///
/// The source's sum of a step holds every member's share, whoever else received that sum: what its weights hold is consumed.
fn is_void(in_flight: Step, base: Step) -> bool {
    in_flight > base
}

/// Applies the mean gradient; a step that is not finite leaves the weights as they are, on all ranks alike.
fn update(
    state: &mut TrainState,
    gradient: &mut Tensor,
    outcome: &Outcome,
    learning_rate: f64,
    max_grad_norm: f64,
) -> peapod_model::Result<(f64, bool)> {
    let _ = gradient.f_div_scalar_(outcome.names.len() as f64)?;
    let limit = if max_grad_norm > 0.0 { max_grad_norm } else { f64::INFINITY };
    let norm = clip_grad_norm(gradient, limit)?;
    if let Some(scale) = &mut state.loss_scale {
        scale.update(!outcome.not_finite && norm.is_finite());
    }
    if outcome.not_finite || !norm.is_finite() {
        return Ok((norm, true));
    }
    state.optimizer.step(state.adapter.flat(), gradient, learning_rate)?;
    if let Some(ema) = &mut state.ema {
        ema.update(state.adapter.flat())?;
    }
    Ok((norm, false))
}

fn record(step: Step, generation: Generation, outcome: &Outcome, grad_norm: f64, learning_rate: f64, skipped: bool) -> StepRecord {
    let count = outcome.names.len() as f32;
    StepRecord {
        step,
        generation,
        names: outcome.names.clone(),
        native: outcome.native,
        skipped,
        losses: StepLosses {
            task: outcome.losses.task / count,
            logit: outcome.losses.logit / count,
            feature: outcome.losses.feature / count,
            grad_norm: grad_norm as f32,
            learning_rate: learning_rate as f32,
        },
        validation: None,
    }
}

fn data_output(event: peapod_data::LoaderEvent) -> Output {
    match event {
        peapod_data::LoaderEvent::NeedLeases { num, is_idle } => Output::NeedLeases { num, is_idle },
        peapod_data::LoaderEvent::GaveBack { lease, from } => Output::GaveBack { lease, from },
        peapod_data::LoaderEvent::Shard { lease, skipped, end } => Output::Read(shard_report(lease, skipped, end)),
    }
}

fn shard_report(lease: LeaseId, skipped: Vec<peapod_data::Skip>, end: Option<peapod_data::ShardEnd>) -> ShardReport {
    let skip = |skip: peapod_data::Skip| SkippedSample {
        index: skip.index,
        reason: match skip.rule.reason() {
            peapod_data::Reason::Filtered => SkipReason::Filtered,
            peapod_data::Reason::Bad => SkipReason::Bad,
        },
        detail: skip.detail(),
        key: skip.key,
    };
    ShardReport {
        lease,
        skipped: skipped.into_iter().map(skip).collect(),
        num_samples: end.as_ref().map(|end| end.num_samples),
        truncated: end.and_then(|end| end.truncated).unwrap_or_default(),
    }
}

/// An error with what is behind it, in one line.
fn with_sources(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn share_that_is_in_the_sources_weights_is_not_trained_again() {
        // The all-reduce of step 7 failed here. Where the source finished it, this member's samples are in its weights.
        assert!(!is_void(Step(7), Step(7)));
        assert!(!is_void(Step(7), Step(8)));
        assert!(is_void(Step(7), Step(6)));
    }
}
