//! What happens to a job.

use std::time::Duration;

use peapod_proto::ids::{Generation, Rank, Step, WorkerId};
use peapod_proto::message::{FromWorker, Hello};

use super::{Process, StreamId};

/// What happened.
#[derive(Debug, Clone)]
pub enum Event {
    /// A worker opened a stream.
    Hello {
        /// The stream.
        stream: StreamId,
        /// What it said.
        hello: Hello,
    },
    /// A worker said something.
    Message {
        /// Who.
        worker: WorkerId,
        /// On which stream; older ones are not listened to.
        stream: StreamId,
        /// What.
        message: FromWorker,
    },
    /// A stream broke or ended.
    Closed {
        /// Whose.
        worker: WorkerId,
        /// Which.
        stream: StreamId,
        /// Why, as far as the transport knows.
        cause: String,
    },
    /// A deadline may have passed.
    Tick,
    /// A checkpoint is whole in the store.
    CheckpointStored {
        /// Its step.
        step: Step,
        /// The generation that took it.
        generation: Generation,
    },
    /// A checkpoint could not be stored.
    CheckpointFailed {
        /// Its step.
        step: Step,
        /// The generation that took it.
        generation: Generation,
        /// Why.
        error: String,
    },
    /// Somebody wants the job to end with a checkpoint.
    Stop {
        /// Who or why.
        reason: String,
    },
    /// The shell knows that a missing worker will not come back.
    GiveUp {
        /// Why.
        reason: String,
    },
    /// A worker's process has ended: its parent says so.
    Exited {
        /// Which.
        process: Process,
        /// How.
        cause: String,
        /// What it wrote last.
        log: Vec<String>,
    },
    /// The coordinator itself stood still, or the clock jumped: what it did not hear meanwhile says nothing about anybody.
    Stalled {
        /// For how long.
        by: Duration,
    },
    /// Somebody wants a worker to leave.
    Drain {
        /// Its rank.
        rank: Rank,
    },
}
