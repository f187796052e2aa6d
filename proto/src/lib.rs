//! What coordinator and workers agree on: the wire protocol, typed ids, and the job file.
//!
//! Messages are decoded once, by [`convert`]; past that gate no value needs checking again.

pub mod convert;
pub mod ids;
pub mod job;
pub mod message;
pub mod program;
pub mod secure;
pub mod trace;

#[doc(hidden)]
pub use tracing;

/// The generated wire types of package `peapod.v1`.
#[allow(missing_docs, clippy::all, clippy::restriction, rustdoc::all, reason = "generated")]
pub mod v1 {
    tonic::include_proto!("peapod.v1");
}

/// The largest message of a membership stream, either way. What a worker that was long without a coordinator says, and the job file with
/// its lists of shards, are the large ones.
pub const MAX_MESSAGE_BYTES: usize = 64 << 20;

/// Metadata of a refusal that may be over by itself: for how many milliseconds another try is worth it.
pub const RETRY_FOR_MS: &str = "peapod-retry-for-ms";

/// Metadata of a refusal whose cause is that the job has ended as it should: there is nothing left to join.
pub const JOB_IS_OVER: &str = "peapod-job-is-over";

/// Version of the protocol: raised whenever an older peer could misunderstand a message.
pub const PROTOCOL_VERSION: u32 = 7;

/// Version of the programs, as `--version` prints it.
pub const PROGRAM_VERSION: &str = env!("CARGO_PKG_VERSION");

/// Port the coordinator listens on unless told otherwise.
pub const DEFAULT_PORT: u16 = 7733;
