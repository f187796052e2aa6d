//! Collective operations between the members of one generation: all-reduce, broadcast and barrier.
//!
//! Each generation of the membership builds a new communicator, uses it until the membership changes or something fails, and drops it. The
//! trainer thread calls one flat all-reduce a step; other threads hold an [`AbortHandle`] and can break a running call at once.
//!
//! # What every backend promises
//! - All members call the same operations, in the same order, with the same lengths. Meeting another operation, length or root is an error,
//!   never a wrong sum. A call skipped in a row of equal ones cannot be told apart: what members must agree on, such as the step, belongs
//!   in the data.
//! - A sum is bit-identical on all members, and does not depend on timing: the same contributions give the same bits again.
//! - A call ends: with the result, with the loss of a neighbour, at its deadline, or on abort.
//! - The first error poisons the communicator: every later call fails. Its buffers then hold unspecified values, which the caller discards.
//!
//! [`SoloCollective`] is a world of one, [`tcp::TcpCollective`] a ring of sockets for CPU workers, [`nccl`] for GPUs. All pass the suite in
//! `conformance`, which the feature of that name exports.

mod abort;
mod agreement;
mod announcement;
#[cfg(any(test, feature = "conformance"))]
pub mod conformance;
mod error;
pub mod nccl;
mod solo;
pub mod tcp;

use std::time::Instant;

pub use abort::{AbortHandle, OnAbort};
pub use agreement::{Footing, agree};
pub use announcement::{Announcement, Operation};
pub use error::Error;
pub use solo::SoloCollective;

/// Where a member was in a call that failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stall {
    /// The neighbour it waited for.
    pub waiting_for: u32,
    /// Bytes of the call that had come from the neighbour before it: in a ring, who has received least is behind the broken link.
    pub received_bytes: u64,
}

/// What is summed, and where it lies.
#[derive(Debug)]
pub enum Values<'a> {
    /// In the memory of this process.
    Host(&'a mut [f32]),
    /// In that of the GPU that the communicator works on, where it stays.
    Device(DeviceValues),
}

impl Values<'_> {
    fn num_bytes(&self) -> usize {
        size_of::<f32>()
            * match self {
                Self::Host(values) => values.len(),
                Self::Device(DeviceValues { num_values, .. }) => *num_values,
            }
    }
}

/// f32 values in a GPU's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceValues {
    address: u64,
    num_values: usize,
    stream: u64,
}

impl DeviceValues {
    /// `num_values` from `address` on, which the work on `stream` has made; 0 is the GPU's first stream.
    ///
    /// # Safety
    /// Until the call that they are given to has returned, the values lie there, on the GPU that its communicator works on, nothing but
    /// what is on the stream already touches them, and the stream is one of that GPU.
    #[must_use]
    pub unsafe fn new(address: u64, num_values: usize, stream: u64) -> Self {
        Self { address, num_values, stream }
    }
}

/// A communicator: one member's end of the group that trains together.
pub trait Collective: Send {
    /// This member's place, in `0..num_members`.
    fn member_index(&self) -> u32;

    /// How many members take part in every call.
    fn num_members(&self) -> u32;

    /// Sums `values` element-wise over all members; every member ends with bit-identical contents.
    ///
    /// A slot that one member writes and the others leave 0 keeps that member's integer exactly, below 2^24. Where values lie on one member
    /// does not matter to the others.
    ///
    /// Errors: [`Error::InvalidArgument`] for values on a device where [`Collective::sums_on_device`] is false.
    fn all_reduce_sum_in(&mut self, values: Values<'_>, deadline: Instant) -> Result<(), Error>;

    /// As [`Collective::all_reduce_sum_in`], of values in the memory of this process.
    fn all_reduce_sum(&mut self, data: &mut [f32], deadline: Instant) -> Result<(), Error> {
        self.all_reduce_sum_in(Values::Host(data), deadline)
    }

    /// Whether values may stay on a device.
    fn sums_on_device(&self) -> bool {
        false
    }

    /// Replaces every member's `data` by that of member `root`.
    ///
    /// Returns once this member's part is done: others may not have the bytes yet, and if they then fail, this member's next call does.
    fn broadcast(&mut self, data: &mut [u8], root: u32, deadline: Instant) -> Result<(), Error>;

    /// Returns once every member has entered.
    fn barrier(&mut self, deadline: Instant) -> Result<(), Error>;

    /// Says where this member was in the call that failed, if the backend can tell.
    fn stalled(&self) -> Option<Stall> {
        None
    }

    /// Returns the handle that ends this communicator from any thread.
    fn abort_handle(&self) -> AbortHandle;
}
