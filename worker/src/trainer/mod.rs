//! The thread that owns the tensors: joins a generation, trains until it ends, says what it holds.
//!
//! Orderly ends are looked at between collectives, through flags in the tail, since a rank that skips a collective hangs the
//! others. Only an abort breaks into one; then the step in flight is dropped and its samples wait for the source's word.

mod ahead;
mod control;
mod copying;
mod ended;
mod meeting;
mod progress;
mod reading;
mod rounds;
mod state;
mod step;
pub(crate) mod tensors;
mod training;
pub(crate) mod wire;

use std::cell::Cell;
use std::collections::BTreeSet;
use std::net::IpAddr;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::Instant;

use peapod_collective::AbortHandle;
use peapod_collective::nccl::NcclDevice;
use peapod_collective::tcp::{Listener, Ports};
use peapod_data::{Loader, Share};
use peapod_kernels::SideStream;
use peapod_model::adapter::{Adapter, AdapterConfig};
use peapod_model::distill::Distiller;
use peapod_model::panics;
use peapod_model::schedule::LrSchedule;
use peapod_proto::ids::{Generation, LeaseId, Rank, Step};
use peapod_proto::job::Job;
use peapod_proto::message::{Assignment, Phase, ShardReport, StopCause, Stopped, ValidationLosses};
use tch::Device;

use ahead::{Ahead, Encoding};
pub use control::Control;
use copying::Copying;
use ended::Ended;
use progress::Progress;
use reading::data_output;
pub use rounds::Drawn;
use rounds::Rounds;
pub use state::{Snapshot, TrainState};

use crate::faults::Faults;
use crate::hub::{self, HubError, Watch};
use crate::lifecycle::TrainerEvent;
use crate::setup;

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

/// Fetches the files of a checkpoint from the coordinator, unless the generation is aborted meanwhile. Called on the trainer's thread.
pub type Download = Box<dyn Fn(Step, &AbortHandle) -> Result<Vec<(String, Vec<u8>)>, NotFetched> + Send>;

/// Why there are no files.
#[derive(Debug)]
pub struct NotFetched {
    /// What was said.
    pub message: String,
    /// Whether it would be the same another time.
    pub is_over: bool,
}

/// What a trainer is started with and keeps.
pub struct Context {
    /// The job.
    pub job: Job,
    /// Where it trains.
    pub device: Device,
    /// Rank of this worker.
    pub rank: Rank,
    /// Whether somebody else tells how training goes.
    pub quiet: bool,
    /// Whether another member may train on the same GPU.
    pub allow_shared_gpu: bool,
    /// Whether pictures and captions are encoded beside the step before theirs, on a GPU.
    pub encode_ahead: bool,
    /// Address under which the other members reach this one.
    pub advertise: IpAddr,
    /// Where it listens for them.
    pub ports: Ports,
    /// Where its output goes.
    pub output: Arc<dyn Fn(Output) + Send + Sync>,
    /// What others ask of it in the middle of a step.
    pub control: Arc<Control>,
    /// How it gets a checkpoint.
    pub download: Download,
    /// Where it fails on purpose.
    pub faults: Arc<Faults>,
}

/// Loads the job's models, then serves `commands` until the channel closes. The body of the trainer's thread.
pub fn run(context: Context, commands: Receiver<Command>) {
    let output = context.output.clone();
    let fail = |phase, message: String, permanent| output(Output::Event(TrainerEvent::Failed { phase, message, permanent }));
    let mut trainer = match guarded(|| Trainer::load(context)) {
        Ok(Ok(trainer)) => trainer,
        Ok(Err(Unloaded { message, permanent })) => return fail("loading", message, permanent),
        Err(panic) => return fail("loading", panic, false),
    };
    while let Ok(command) = commands.recv() {
        if let Err(panic) = guarded(|| trainer.serve(command)) {
            return fail("training", panic, false);
        }
    }
}

/// Turns a panic, which is how libtorch's errors reach Rust, into its message.
pub(crate) fn guarded<T>(body: impl FnOnce() -> T) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(body)).map_err(|panic| panics::message(panic.as_ref()).to_owned())
}

/// Why a job cannot be loaded.
struct Unloaded {
    message: String,
    /// Whether another worker with the same job would fail in the same way.
    permanent: bool,
}

impl From<String> for Unloaded {
    /// What is wrong with the job or with the machine's files, which are what they are.
    fn from(message: String) -> Self {
        Self { message, permanent: true }
    }
}

impl From<HubError> for Unloaded {
    /// Another host may reach a hub that this one does not.
    fn from(error: HubError) -> Self {
        Self { permanent: error.is_permanent(), message: error.to_string() }
    }
}

/// Tells the log of models that are fetched, and the coordinator that something comes.
struct Fetching<'a>(&'a Control);

impl Watch for Fetching<'_> {
    fn say(&self, line: &str) {
        hub::Log.say(line);
    }

    fn moved(&self, _num_bytes: u64) {
        self.0.fetched();
    }
}

impl From<peapod_model::Error> for Unloaded {
    /// What libtorch refuses, want of memory say, may go well another time.
    fn from(error: peapod_model::Error) -> Self {
        Self { permanent: !matches!(error, peapod_model::Error::Torch(_)), message: error.to_string() }
    }
}

struct Trainer {
    context: Context,
    models: Distiller,
    loader: Loader,
    rounds: Rounds,
    progress: Progress,
    adapter_config: AdapterConfig,
    schedule: LrSchedule,
    /// Absent until the first generation, and while an incomplete one is being received.
    state: Option<TrainState>,
    /// The share of a step whose all-reduce did not finish here: consumed if the source holds that step, else to be given again.
    in_flight: Option<(Step, Share)>,
    /// The share of the next step of this generation, taken while a GPU computed the one before. It is the loader's again when the
    /// generation ends.
    ahead: Option<Ahead>,
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
    /// Picture sizes, batch sizes and, on GPUs, sizes of the teacher's part that were computed before: the first time may take long.
    sizes_seen: BTreeSet<((u32, u32), usize, usize)>,
    /// Parts in which a micro-batch is computed: more than one where the device ran out of memory.
    parts: usize,
    encoding: Cell<Encoding>,
}

impl Trainer {
    fn load(context: Context) -> Result<Self, Unloaded> {
        let Context { job, device, output, control, .. } = &context;
        if job.train.fp8_linears && !device.is_cuda() {
            tracing::warn!(
                "train.fp8_linears on the CPU: numbers are rounded as on a GPU and computed in f32, which takes longer than without"
            );
        }
        control.enter(Phase::Fetching);
        hub::bring(setup::model_paths(job), &Fetching(control))?;
        control.enter(Phase::Loading);
        let clock = Instant::now();
        let models = setup::load_models(job, *device)?;
        let adapter_config = setup::adapter_config(job, &models);
        let data = setup::loader_config(job, &models)?;
        let rounds = Rounds::load(job, &models, &data)?;
        let model_digest = setup::model_digest(job, &adapter_config)?;
        let model_digest = rounds.digest_with(model_digest);
        let events = output.clone();
        let loader = Loader::start(data, move |event| events(data_output(event)));
        let loader = loader.map_err(|error| error.to_string())?;
        control.set_loader(loader.handle());
        let fresh = Adapter::fresh(adapter_config, job.seed, *device)?;
        let encoding = match *device {
            Device::Cuda(ordinal) if context.encode_ahead => {
                Encoding::Ahead(Some(SideStream::open(ordinal).map_err(|error| error.to_string())?))
            }
            _ => Encoding::InStep,
        };
        control.enter(Phase::Waiting);
        let progress = Progress::new(&context);
        progress.loaded(&context, clock.elapsed());
        output(Output::Event(TrainerEvent::Loaded { model_digest, num_parameters: fresh.num_parameters() as u64 }));
        Ok(Self {
            schedule: setup::lr_schedule(job),
            context,
            models,
            loader,
            rounds,
            progress,
            adapter_config,
            state: None,
            in_flight: None,
            ahead: None,
            last_validation: None,
            pending: None,
            copying: None,
            listener: None,
            gpu: None,
            sizes_seen: BTreeSet::new(),
            parts: 1,
            encoding: Cell::new(encoding),
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
        let ended = self.without_a_broken_gpu(ended);
        self.context.control.end();
        self.context.control.enter(Phase::Waiting);
        let (cause, reason, lost_member, stalled) = match ended {
            Ended::Orderly(cause, reason) => (cause, reason, None, None),
            Ended::Broken { reason, lost, stalled } => (StopCause::Aborted, reason, lost, stalled),
            Ended::Failed { phase, message } => return self.event(TrainerEvent::Failed { phase, message, permanent: false }),
            Ended::Unfit { phase, message } => return self.event(TrainerEvent::Failed { phase, message, permanent: true }),
        };
        let applied = self.state.as_ref().map_or(Step(0), |state| state.step);
        let validation = self.last_validation.take();
        let trained_in = self.state.as_ref().map_or(Generation::NONE, |state| state.generation);
        let records = Vec::new();
        let stopped = Stopped { generation, applied, cause, records, reason, validation, trained_in, lost_member, stalled };
        self.event(TrainerEvent::Stopped(stopped));
    }

    /// What failed on a GPU that this process cannot use any more ends the process: the next generation would fail likewise.
    fn without_a_broken_gpu(&self, ended: Ended) -> Ended {
        match (ended, self.gpu.as_ref().and_then(|gpu| gpu.check_health().err())) {
            (Ended::Broken { reason, .. }, Some(error)) => Ended::Failed { phase: "collective", message: format!("{reason}: {error}") },
            (ended, _) => ended,
        }
    }

    fn snapshot(&mut self, generation: Generation) -> peapod_model::Result<()> {
        if let Some(state) = &self.state {
            (self.context.output)(Output::Snapshot(Box::new(state.view(generation)?.snapshot()?)));
        }
        Ok(())
    }
}
