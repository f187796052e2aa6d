//! The few calls that the engine makes, so that its rules can be tested where there is no GPU.

use crate::{DeviceValues, Error};

/// Bytes of NCCL's unique id.
pub(super) const UNIQUE_ID_BYTES: usize = 128;

/// NCCL's name for a communicator: a pointer, which any thread may use to abort it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Comm(pub(super) usize);

/// What a communicator is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Progress {
    /// Work is being set up: what was launched need not be on the stream yet.
    Busy,
    /// Nothing is being set up.
    Idle,
}

/// A call that failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Fault {
    /// What was tried, as a bare verb.
    pub doing: &'static str,
    /// The answer.
    pub answer: String,
}

impl From<Fault> for Error {
    fn from(Fault { doing, answer }: Fault) -> Self {
        Self::Gpu { doing, answer }
    }
}

/// One GPU with a stream of its own and a buffer that operations work on. Nothing but `upload`, `reserve`, `download`, `trim` and `abort`
/// may block.
pub(super) trait Gpu: Send + Sync + 'static {
    /// Makes the id of a new communicator.
    fn unique_id(&self) -> Result<[u8; UNIQUE_ID_BYTES], Fault>;

    /// Begins to build a communicator; [`Gpu::progress`] says when it is ready.
    fn start(&self, id: &[u8; UNIQUE_ID_BYTES], num_members: u32, member_index: u32) -> Result<Comm, Fault>;

    /// Says what a communicator is doing, or what has gone wrong in it.
    fn progress(&self, comm: Comm) -> Result<Progress, Fault>;

    /// Copies `bytes` into the buffer, which grows to hold them.
    fn upload(&self, bytes: &[u8]) -> Result<(), Fault>;

    /// Grows the buffer to hold `num_bytes`, whatever is in them.
    fn reserve(&self, num_bytes: usize) -> Result<(), Fault>;

    /// Launches the sum of the buffer's first `num_values` f32 over all members.
    fn all_reduce(&self, comm: Comm, num_values: usize) -> Result<(), Fault>;

    /// Launches the sum of values where they lie, behind everything that is on their stream.
    fn all_reduce_in_place(&self, comm: Comm, values: DeviceValues) -> Result<(), Fault>;

    /// Whether everything is done that the newest sum in place was launched behind.
    fn has_come_to_sum(&self) -> Result<bool, Fault>;

    /// Launches the copy of the buffer's first `num_bytes` bytes from `root`.
    fn broadcast(&self, comm: Comm, num_bytes: usize, root: u32) -> Result<(), Fault>;

    /// Sets a mark behind everything that is on the stream.
    fn mark(&self) -> Result<(), Fault>;

    /// Whether the stream has passed the mark.
    fn is_past_mark(&self) -> Result<bool, Fault>;

    /// Copies the start of the buffer into `bytes`.
    fn download(&self, bytes: &mut [u8]) -> Result<(), Fault>;

    /// Gives the buffer back if it is larger than `num_bytes`. The stream is past what works on it.
    fn trim(&self, num_bytes: usize) -> Result<(), Fault>;

    /// Ends a communicator whatever it is doing. May hang.
    fn abort(&self, comm: Comm) -> Result<(), Fault>;
}
