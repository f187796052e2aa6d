//! The membership stream's messages with typed contents. What they mean is said in `membership.proto`.

use serde::{Deserialize, Serialize};

use crate::ids::{Bitmap, Epoch, Generation, Incarnation, LeaseId, MemberIndex, Rank, SampleName, ShardId, Step, WorkerId};

/// A worker's first message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hello {
    /// [`crate::PROTOCOL_VERSION`] of the sender.
    pub protocol_version: u32,
    /// [`crate::PROGRAM_VERSION`] of the sender.
    pub program_version: String,
    /// Names the process.
    pub incarnation: Incarnation,
    /// 0 for the process's first stream.
    pub attempt: u32,
    /// The rank asked for with `--rank`.
    pub requested_rank: Option<Rank>,
    /// Host name.
    pub host: String,
    /// Process id on that host.
    pub pid: u32,
    /// Device it trains on.
    pub device: String,
}

/// Where a worker is in its step. As a number, its place in [`Phase::ALL`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Phase {
    /// Models are being read.
    #[default]
    Loading,
    /// Not in a generation.
    Waiting,
    /// Building the communicator, receiving state.
    Connecting,
    /// Waiting for samples.
    Data,
    /// Forward and backward.
    Compute,
    /// In the all-reduce.
    Collective,
    /// Optimiser.
    Update,
    /// Copying weights for a checkpoint.
    Snapshot,
    /// Computing losses on the validation samples.
    Validating,
    /// Drawing pictures.
    Sampling,
    /// Forward and backward with a picture size that is new to the process: kernels are chosen or compiled.
    Warming,
    /// Fetching a model that is not on this host.
    Fetching,
}

impl Phase {
    /// Every phase.
    pub const ALL: [Self; 12] = [
        Self::Loading,
        Self::Waiting,
        Self::Connecting,
        Self::Data,
        Self::Compute,
        Self::Collective,
        Self::Update,
        Self::Snapshot,
        Self::Validating,
        Self::Sampling,
        Self::Warming,
        Self::Fetching,
    ];

    /// The word shown to people.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Loading => "loading",
            Self::Waiting => "waiting",
            Self::Connecting => "connecting",
            Self::Data => "data",
            Self::Compute => "compute",
            Self::Collective => "collective",
            Self::Update => "update",
            Self::Snapshot => "snapshot",
            Self::Validating => "validating",
            Self::Sampling => "sampling",
            Self::Warming => "warming",
            Self::Fetching => "fetching",
        }
    }
}

/// A sign of life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Heartbeat {
    /// Last applied step.
    pub step: Step,
    /// What it does now.
    pub phase: Phase,
    /// Generation it is in; [`Generation::NONE`] outside of any.
    pub generation: Generation,
    /// Samples read and decoded, and pieces of a model fetched, since the process started: what moves while it waits for a slow source.
    pub reads: u64,
    /// What it holds in memory, as it last looked.
    pub memory: Memory,
}

/// What a worker holds in memory, as far as it is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Memory {
    /// Memory of the host that the process holds.
    pub resident_bytes: Option<u64>,
    /// The memory of the GPU that it trains on, if it does.
    pub gpu: Option<GpuMemory>,
}

/// The memory of a GPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GpuMemory {
    /// In use, by whomever.
    pub used_bytes: u64,
    /// In all; no less than what is in use.
    pub total_bytes: u64,
}

/// Means over one step's global batch.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct StepLosses {
    /// Diffusion loss of native samples.
    pub task: f32,
    /// Distance of the predictions.
    pub logit: f32,
    /// Distance of the features, all hooks together, unweighted.
    pub feature: f32,
    /// L2 norm of the gradient before clipping.
    pub grad_norm: f32,
    /// Learning rate of the update.
    pub learning_rate: f32,
}

impl StepLosses {
    /// What training minimises: all losses together, the feature loss with its weight in the job.
    #[must_use]
    pub fn total(&self, feature_weight: f64) -> f64 {
        f64::from(self.task) + f64::from(self.logit) + feature_weight * f64::from(self.feature)
    }
}

/// Mean losses over the validation samples of the weights after one step.
///
/// Noise, timesteps and crops are the same each time: two of them compare weights and nothing else. Not a number where a loss was not
/// finite.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct ValidationLosses {
    /// The step.
    pub step: Step,
    /// Number of samples.
    pub samples: u32,
    /// Diffusion loss of native samples.
    pub task: f32,
    /// Distance of the predictions.
    pub logit: f32,
    /// Distance of the features, all hooks together, unweighted.
    pub feature: f32,
}

impl ValidationLosses {
    /// What training minimises: all losses together, the feature loss with its weight in the job.
    #[must_use]
    pub fn total(&self, feature_weight: f64) -> f64 {
        f64::from(self.task) + f64::from(self.logit) + feature_weight * f64::from(self.feature)
    }
}

/// What one step trained: read from the summed tail, the same on every rank.
#[derive(Debug, Clone, PartialEq)]
pub struct StepRecord {
    /// The step.
    pub step: Step,
    /// The generation that made it.
    pub generation: Generation,
    /// Every sample of its global batch.
    pub names: Vec<SampleName>,
    /// Those among them with a native caption: they train by the diffusion loss, the others by distillation.
    pub native: u32,
    /// Not finite: the weights stayed as they were, the samples count as skipped.
    pub skipped: bool,
    /// Losses.
    pub losses: StepLosses,
    /// Losses of the step before on the validation samples, where they were due.
    pub validation: Option<ValidationLosses>,
}

/// Seconds of one rank's step.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct StepTimings {
    /// Waiting for samples.
    pub data: f32,
    /// Forward and backward.
    pub compute: f32,
    /// All-reduce, with the wait for the others.
    pub collective: f32,
    /// Optimiser.
    pub update: f32,
    /// Losses on the validation samples of the step before.
    pub validation: f32,
    /// Pictures by the weights of the step before.
    pub sampling: f32,
}

impl StepTimings {
    /// Seconds of the whole step.
    #[must_use]
    pub fn total(&self) -> f64 {
        let Self { data, compute, collective, update, validation, sampling } = *self;
        [data, compute, collective, update, validation, sampling].into_iter().map(f64::from).sum()
    }
}

/// A member has applied a step.
#[derive(Debug, Clone, PartialEq)]
pub struct StepReport {
    /// The generation.
    pub generation: Generation,
    /// The step.
    pub step: Step,
    /// From member index 0 only.
    pub record: Option<StepRecord>,
    /// Where its time went.
    pub timings: StepTimings,
    /// Digest of the adapter where the step's weights were copied for a checkpoint.
    pub snapshot: Option<u64>,
}

/// Why a worker left its collective.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum StopCause {
    /// It was told to, or the collective failed.
    Aborted,
    /// All members met at a flag in the tail.
    Planned,
    /// The last step of the job is applied.
    StepsDone,
    /// No sample of the job is left.
    DataDone,
}

/// A worker stands outside its collective and holds `applied` whole. Said again on each later stream of the process.
#[derive(Debug, Clone, PartialEq)]
pub struct Stopped {
    /// The generation it left.
    pub generation: Generation,
    /// The step whose weights it holds.
    pub applied: Step,
    /// Why.
    pub cause: StopCause,
    /// Steps of this generation not known to be durable, oldest first.
    pub records: Vec<StepRecord>,
    /// What failed, when something did. Beside an orderly cause: the exchange after the job's last step, which changes no weights.
    pub reason: String,
    /// Losses of `applied` on the validation samples, where no step follows whose record could carry them.
    pub validation: Option<ValidationLosses>,
    /// The generation that trained `applied`; [`Generation::NONE`] when it comes from a checkpoint or from nothing.
    pub trained_in: Generation,
    /// The member whose connection broke first, or could not be made, if that ended it, by its own word or that of the other. It may itself
    /// have lost another.
    pub lost_member: Option<MemberIndex>,
    /// Where it was in the collective that was broken off, if it was in one.
    pub stalled: Option<Stall>,
}

/// A member that waited in a collective.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stall {
    /// The neighbour it waited for.
    pub waiting_for: MemberIndex,
    /// What had come. In a ring, who has received least is behind the broken link.
    pub received_bytes: u64,
}

impl Stopped {
    /// What a worker says that holds nothing.
    #[must_use]
    pub fn empty_handed(generation: Generation) -> Self {
        Self {
            generation,
            applied: Step(0),
            cause: StopCause::Aborted,
            records: Vec::new(),
            reason: String::new(),
            validation: None,
            trained_in: Generation::NONE,
            lost_member: None,
            stalled: None,
        }
    }
}

/// A member has trained on in its generation while the coordinator was away, and goes on.
#[derive(Debug, Clone, PartialEq)]
pub struct Continuing {
    /// The generation.
    pub generation: Generation,
    /// Its last applied step.
    pub applied: Step,
    /// Steps of this generation not known to be durable, oldest first.
    pub records: Vec<StepRecord>,
}

/// Why a sample is not trained on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum SkipReason {
    /// Kept out by the job's rules.
    Filtered,
    /// Broken.
    Bad,
}

/// A sample that is not trained on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SkippedSample {
    /// Position in tar order.
    pub index: u32,
    /// Why.
    pub reason: SkipReason,
    /// The sample's key in the tar.
    pub key: String,
    /// The rule's name, a colon, and the same in words.
    pub detail: String,
}

impl SkippedSample {
    /// The name of the rule by which it is skipped; empty if the detail has none.
    #[must_use]
    pub fn rule(&self) -> &str {
        self.detail.split_once(':').map_or("", |(rule, _)| rule)
    }
}

/// What reading a leased shard showed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardReport {
    /// The lease it was read under.
    pub lease: LeaseId,
    /// Samples passed over since the last report.
    pub skipped: Vec<SkippedSample>,
    /// Number of samples in the tar, once its end was reached.
    pub num_samples: Option<u32>,
    /// Why the tar ended early; empty if it did not.
    pub truncated: String,
}

impl ShardReport {
    /// Whether nothing of the shard could be read: it is not there, or no tar.
    #[must_use]
    pub fn is_unreadable(&self) -> bool {
        self.num_samples == Some(0) && !self.truncated.is_empty()
    }
}

/// From a worker.
#[derive(Debug, Clone, PartialEq)]
pub enum FromWorker {
    /// First message.
    Hello(Hello),
    /// Models are loaded.
    Ready {
        /// SHA-256 over what must be alike on all ranks.
        model_digest: Vec<u8>,
        /// Length of the gradient before its tail.
        num_parameters: u64,
    },
    /// Sign of life.
    Heartbeat(Heartbeat),
    /// Answer to [`ToWorker::MakeBootstrap`].
    Bootstrap {
        /// The generation it is for.
        generation: Generation,
        /// Opaque bytes.
        bytes: Vec<u8>,
    },
    /// A step is applied.
    StepReport(StepReport),
    /// Out of the collective.
    Stopped(Stopped),
    /// Still in it, and said so to a coordinator that was started again.
    Continuing(Continuing),
    /// Wants shards.
    LeaseRequest {
        /// The generation it asks in.
        generation: Generation,
        /// How many.
        num_leases: u32,
        /// It has nothing left to train and would take over the rest of what another reads.
        is_idle: bool,
    },
    /// Read a shard.
    ShardReport(ShardReport),
    /// Reads no more of a lease: what lies in its shard from an index on is untouched and may be another's.
    GaveBack {
        /// The lease.
        lease: LeaseId,
        /// The first index it leaves.
        from: u32,
    },
    /// Cannot go on; the stream ends after it.
    Failure {
        /// What it was doing.
        phase: String,
        /// What went wrong.
        message: String,
        /// Whether another try would end the same way.
        permanent: bool,
    },
    /// Wants to leave after the step in flight.
    Leaving {
        /// Why.
        reason: String,
    },
}

/// An exclusive right to read a shard.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lease {
    /// Its id.
    pub id: LeaseId,
    /// The pass.
    pub epoch: Epoch,
    /// The shard.
    pub shard: ShardId,
    /// Where the shard lies.
    pub url: String,
    /// Samples to pass over.
    pub done: Bitmap,
    /// The first sample that is another's again; none: it goes on to the end of the tar.
    pub end: Option<u32>,
}

/// A worker's place in a new generation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Assignment {
    /// The generation.
    pub generation: Generation,
    /// The worker's place in it.
    pub member_index: MemberIndex,
    /// Number of members.
    pub num_members: u32,
    /// What the communicator is built from.
    pub bootstrap: Vec<u8>,
    /// Step the generation starts from.
    pub base_step: Step,
    /// Generation that trained it.
    pub base_generation: Generation,
    /// Who holds its state.
    pub source_index: MemberIndex,
    /// Whether the source sends it to the others.
    pub broadcast_state: bool,
    /// Checkpoint the source loads first.
    pub checkpoint_step: Option<Step>,
    /// Leases the worker keeps.
    pub held_leases: Vec<LeaseId>,
    /// Samples in a step, over all members.
    pub global_batch: u32,
}

/// How a job ends for a worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum StopReason {
    /// All work is done.
    Finished,
    /// Somebody asked the job to stop.
    Stopped,
    /// The job failed.
    Failed,
    /// This worker was asked to leave; the job goes on.
    Drained,
    /// This worker was given up, though it lives; the job goes on.
    GivenUp,
}

/// To a worker.
#[derive(Debug, Clone, PartialEq)]
pub enum ToWorker {
    /// Answer to [`FromWorker::Hello`].
    Welcome {
        /// Its id.
        worker: WorkerId,
        /// Its rank, for life.
        rank: Rank,
        /// Workers in the job.
        world_size: u32,
        /// Names this run.
        job_id: String,
        /// The job file's text.
        job_toml: String,
        /// Milliseconds between heartbeats.
        heartbeat_interval_ms: u32,
        /// Silence after which either side gives the other up.
        heartbeat_timeout_ms: u32,
        /// How long the coordinator waits for missing workers, and a worker for a coordinator that is away.
        join_timeout_ms: u32,
        /// The generation that a member may stay in; [`Generation::NONE`]: it leaves any that it is in.
        continues: Generation,
    },
    /// Answer to each heartbeat.
    HeartbeatReply {
        /// The current generation.
        generation: Generation,
        /// Whether it trains.
        running: bool,
        /// For whom everyone waits.
        waiting_for: String,
    },
    /// Make the bootstrap of a generation.
    MakeBootstrap {
        /// The generation.
        generation: Generation,
        /// Its size.
        num_members: u32,
    },
    /// Join a generation.
    Assignment(Assignment),
    /// Leave a generation at once.
    Abort {
        /// The generation.
        generation: Generation,
        /// Why.
        reason: String,
    },
    /// Meet after the next step.
    PlanChange {
        /// The generation.
        generation: Generation,
        /// Why.
        reason: String,
    },
    /// Shards to read.
    LeaseGrant {
        /// The generation they are granted in.
        generation: Generation,
        /// The leases.
        leases: Vec<Lease>,
        /// No more will come in this generation.
        none_left: bool,
        /// With `none_left`: but the rest of what another reads, for the asking, once nothing is left to train.
        ask_when_idle: bool,
    },
    /// Give back what is not begun of these leases.
    GiveBack {
        /// The leases.
        leases: Vec<LeaseId>,
        /// Another is idle. Who has nothing else to train first reads a share of them, or it would be idle itself.
        for_idle: bool,
    },
    /// Steps whose names may be forgotten.
    Durable {
        /// The generation.
        generation: Generation,
        /// The last such step.
        step: Step,
    },
    /// Copy the weights for a checkpoint.
    TakeSnapshot {
        /// The generation.
        generation: Generation,
    },
    /// Leave for good.
    Stop {
        /// How the job ended.
        reason: StopReason,
        /// In words.
        message: String,
    },
}
