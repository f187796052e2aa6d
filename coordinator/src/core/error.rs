//! Why an event is refused.

use std::time::Duration;

use peapod_proto::ids::{Generation, Rank, WorkerId};

/// An event that is refused. Nothing has changed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CoreError {
    /// Another protocol.
    #[error(
        "worker {theirs} speaks protocol {theirs_protocol}, this coordinator {ours} speaks {ours_protocol}: install the same version on all hosts"
    )]
    Version {
        /// Version of the worker.
        theirs: String,
        /// Its protocol.
        theirs_protocol: u32,
        /// Version of the coordinator.
        ours: String,
        /// Its protocol.
        ours_protocol: u32,
    },
    /// No such rank.
    #[error("rank {rank} does not exist: the ranks of this job are 0..={} (--world-size {world_size})", world_size - 1)]
    NoSuchRank {
        /// The rank asked for.
        rank: Rank,
        /// Size of the world.
        world_size: u32,
    },
    /// The rank is taken.
    #[error("rank {rank} is taken by {holder}; give each worker its own --rank, or none")]
    RankTaken {
        /// The rank asked for.
        rank: Rank,
        /// Who has it.
        holder: String,
        /// How long it takes until its holder is known to be dead, if it is.
        retry_for: Duration,
    },
    /// No rank is free, not even for a spare.
    #[error("no rank is left for another worker")]
    NoRankLeft,
    /// Free ranks are kept for workers that may come back.
    #[error("the coordinator was started again and waits for {0} workers to come back; their ranks are theirs until then")]
    NotYet(usize),
    /// The job has failed.
    #[error("the job has failed ({0}): no worker can join any more")]
    Ending(String),
    /// The job has ended as it should.
    #[error("the job is {0}: no worker is needed any more")]
    Over(&'static str),
    /// Models or validation samples differ between workers.
    #[error("{worker} loaded other models or validation samples than {other}: every worker must see the same files")]
    ModelsDiffer {
        /// The newcomer.
        worker: String,
        /// One that was there.
        other: String,
    },
    /// A message from a stream that is not the worker's current one.
    #[error("a message from a stream that is not current")]
    StaleStream,
    /// Work of another membership is void.
    #[error("{got} is over, {current} is current")]
    StaleGeneration {
        /// The generation named.
        got: Generation,
        /// The current one.
        current: Generation,
    },
    /// A message that does not belong in this state.
    #[error("unexpected {what} from {worker}: {why}")]
    Unexpected {
        /// The message.
        what: &'static str,
        /// From whom.
        worker: WorkerId,
        /// Why not.
        why: String,
    },
    /// Too few workers would be left, and none is to come.
    #[error(
        "rank {rank} cannot be spared: {left} workers would be left, {min} are needed (--min-world-size), and with --local no other comes; \
         `coordinator stop` ends the job with a checkpoint"
    )]
    CannotBeSpared {
        /// The rank.
        rank: Rank,
        /// The number of workers without it.
        left: usize,
        /// How many are enough.
        min: u32,
    },
    /// No worker has this rank.
    #[error("no worker has rank {0}")]
    NobodyHasRank(Rank),
}
