//! What the driver is to do.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use peapod_proto::ids::{Generation, LeaseId, SampleName, Step, WorkerId};
use peapod_proto::message::{ShardReport, StepRecord, StepTimings, ToWorker, ValidationLosses};
use serde::{Deserialize, Serialize};

use super::durable::Member;
use super::leases::Granted;
use super::ledger::{Ledger, Rules};
use super::{Failure, StreamId, WorkerView};

/// How a job ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    /// All steps or epochs are done.
    Finished,
    /// Stopped on request, with a checkpoint of everything done.
    Stopped {
        /// The request.
        reason: String,
    },
    /// It could not go on.
    Failed {
        /// The first failure, or what else went wrong.
        reason: String,
    },
}

impl Outcome {
    /// In one word.
    #[must_use]
    pub fn as_str(&self) -> &'static str {
        match self {
            Self::Finished => "finished",
            Self::Stopped { .. } => "stopped",
            Self::Failed { .. } => "failed",
        }
    }
}

/// What the driver is to do, in this order.
#[derive(Debug, Clone, PartialEq)]
pub enum Effect {
    /// From now on, messages to `worker` go out on `stream`; an older stream of it is dropped.
    Attach {
        /// Who.
        worker: WorkerId,
        /// Where.
        stream: StreamId,
    },
    /// Tell a worker.
    Send {
        /// Whom.
        worker: WorkerId,
        /// What.
        message: ToWorker,
    },
    /// End a worker's stream after what was sent.
    Detach {
        /// Whose.
        worker: WorkerId,
    },
    /// Write down before anyone hears of it.
    Persist(Fact),
    /// A step is final: its samples are in the weights for good.
    Committed {
        /// The step.
        record: StepRecord,
        /// Seconds of its slowest member, by part.
        timings: StepTimings,
    },
    /// Losses on the validation samples of a step that is final.
    Validated(ValidationLosses),
    /// The ledger of a step that was copied for a checkpoint: to be stored with it.
    Freeze {
        /// The step.
        step: Step,
        /// Its generation.
        generation: Generation,
        /// The ledger.
        ledger: Arc<Ledger>,
    },
    /// Copies of later steps of this generation are of no line that goes on: refuse them.
    Void {
        /// The generation.
        generation: Generation,
        /// The last step that stands.
        after: Step,
    },
    /// Something people want to read.
    Notice(Notice),
    /// The job is over.
    Finish(Outcome),
}

/// What a restarted coordinator must know. [`State::apply`](super::State::apply) says what each comes to.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Fact {
    /// Workers have ids up to this one, or are about to: no other worker will have them.
    Joined(WorkerId),
    /// A membership was formed.
    Generation {
        /// Its number.
        generation: Generation,
        /// Its members by index.
        members: Vec<Member>,
        /// The step it starts from.
        base_step: Step,
    },
    /// Shards were given out.
    Leases {
        /// To whom.
        holder: WorkerId,
        /// Which.
        leases: Vec<Granted>,
    },
    /// A member of the last generation is not waited for any more.
    Replaced(WorkerId),
    /// Holders are gone; what they read is anybody's.
    Released(BTreeSet<WorkerId>),
    /// A lease's holder will not train what lies in its shard from an index on.
    GaveBack {
        /// The lease.
        lease: LeaseId,
        /// The first index that somebody else may have.
        from: u32,
    },
    /// A shard was read to its end, or samples of it were skipped.
    Shard(ShardReport),
    /// A step became final.
    Commit {
        /// The step.
        step: Step,
        /// Its generation.
        generation: Generation,
        /// Its samples.
        names: Vec<SampleName>,
        /// It was not finite.
        skipped: bool,
    },
    /// Losses on the validation samples are believed.
    Validated(ValidationLosses),
    /// A generation is over: this step is what it came to.
    Settled {
        /// The step.
        step: Step,
        /// Who trained it.
        generation: Generation,
    },
    /// Nobody holds anything newer than the newest checkpoint: it is where the job goes on.
    FromCheckpoint {
        /// Its step.
        step: Step,
        /// Its ledger, where the job has been further; every lease is void then.
        ledger: Option<Ledger>,
    },
    /// A checkpoint is whole.
    Checkpoint(Step),
    /// The job is to end.
    Stop(String),
    /// It has ended.
    Ended(Outcome),
}

impl Fact {
    /// Whether it may be written a little late: those who could contradict it repeat it when they come back.
    ///
    /// Workers keep the names of steps until they are told that these are on disk, and what they read of shards that they hold. Where they
    /// are gone too, the weights are, or the shard is read again.
    #[must_use]
    pub fn may_be_late(&self) -> bool {
        matches!(self, Self::Commit { .. } | Self::Shard(_) | Self::Validated(_) | Self::Checkpoint(_))
    }
}

/// What people want to read.
#[derive(Debug, Clone, PartialEq)]
pub enum Notice {
    /// A worker joined.
    Joined(WorkerView),
    /// A worker loaded its models.
    Ready(WorkerView),
    /// The world is not complete; said again every few seconds.
    Waiting {
        /// For whom.
        text: String,
        /// Until the job gives up.
        left: Duration,
        /// Whether nobody is missing: all are here and load their models, which takes its time.
        is_usual: bool,
        /// Until enough workers start without the others, if nobody else comes.
        starts_in: Option<Duration>,
    },
    /// A generation starts.
    Formed {
        /// Its number.
        generation: Generation,
        /// Its size.
        num_members: u32,
        /// The step it starts from.
        base_step: Step,
        /// Whether that step comes from a checkpoint.
        from_checkpoint: bool,
    },
    /// The coordinator was away, and the members of its last generation have trained on.
    TakenUp {
        /// The generation.
        generation: Generation,
        /// Its size.
        num_members: u32,
        /// The last final step.
        step: Step,
    },
    /// A worker is gone.
    Lost {
        /// Who.
        worker: WorkerView,
        /// Why.
        cause: String,
    },
    /// A worker left as asked.
    Left(WorkerView),
    /// Something fails again and again and is left out for a while, if the others are enough.
    SetAside {
        /// What, and why.
        what: String,
        /// For how long.
        lasts: Duration,
    },
    /// More has become known about the first failure.
    Explained {
        /// All of it.
        failure: Failure,
    },
    /// A generation was broken up.
    Aborted {
        /// Which.
        generation: Generation,
        /// Why.
        reason: String,
    },
    /// All members meet after the next step.
    Planned {
        /// Why.
        reason: String,
    },
    /// No worker that holds the newest weights is connected any more; some may only have been cut off.
    CutOff {
        /// What they hold.
        step: Step,
        /// How long they are waited for.
        timeout: Duration,
    },
    /// No survivor holds the newest weights: the job goes on from an older step.
    RolledBack {
        /// What is lost.
        from: Step,
        /// Where it goes on.
        to: Step,
    },
    /// A step was skipped because it was not finite.
    StepSkipped {
        /// The step.
        step: Step,
        /// How many in a row.
        in_a_row: u32,
    },
    /// A sample or the rest of a shard could not be used.
    BadData {
        /// The shard's address.
        shard: String,
        /// The sample's key; empty for the rest of the shard.
        key: String,
        /// Why.
        detail: String,
    },
    /// Most of what was read so far is filtered out.
    MostlyFiltered {
        /// How many samples.
        num_filtered: u64,
        /// Of how many.
        num_read: u64,
        /// By which rules.
        rules: BTreeMap<String, u64>,
    },
    /// All samples that were trained so far have native captions: of the others each lacks one side of its pair.
    NoPairs {
        /// Those that lack it.
        num_one_sided: u64,
        /// Those that were trained.
        num_native: u64,
    },
    /// The job is over: what was passed over in it, if anything was.
    Skipped(Rules),
    /// A checkpoint is whole.
    Checkpoint {
        /// Its step.
        step: Step,
    },
    /// A checkpoint could not be kept; another one will be tried.
    CheckpointFailed {
        /// Its step.
        step: Step,
        /// Why.
        error: String,
        /// When it is tried again, if it is the job's last.
        again_in: Option<Duration>,
    },
}
