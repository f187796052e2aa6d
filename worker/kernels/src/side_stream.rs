//! A second stream of a GPU, for work that the first one will need and does not wait for yet.

use std::ffi::c_char;

use tch::Tensor;
use torch_sys::C_tensor;

use crate::error::Result;
use crate::graph::{MAX_PROBLEM, check, pointers};

unsafe extern "C" {
    fn peapod_open_stream(device: i32, id: *mut i64, problem: *mut c_char) -> bool;
    fn peapod_exchange_stream(device: i32, id: i64, before: *mut i64, problem: *mut c_char) -> bool;
    fn peapod_join_stream(device: i32, id: i64, tensors: *const *const C_tensor, num_tensors: usize, problem: *mut c_char) -> bool;
}

/// A stream of libtorch's beside the one that a thread works on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SideStream {
    device: i32,
    /// libtorch's name for it; its streams live as long as the process.
    id: i64,
}

impl SideStream {
    /// One on a GPU, behind everything that the current stream has been given so far.
    ///
    /// # Errors
    /// [`Error::Gpu`](crate::Error::Gpu) if libtorch has no such GPU.
    pub fn open(ordinal: usize) -> Result<Self> {
        let device = i32::try_from(ordinal).unwrap_or(i32::MAX);
        let (mut id, mut problem) = (0, [0; MAX_PROBLEM]);
        // SAFETY: writes one number, or a message.
        let is_done = unsafe { peapod_open_stream(device, &mut id, problem.as_mut_ptr()) };
        check(is_done, "take a second stream", &problem)?;
        Ok(Self { device, id })
    }

    /// Does `work`, whose launches go to this stream instead of the thread's own. It must not touch what that one still writes: nothing is
    /// waited for.
    ///
    /// # Errors
    /// [`Error::Gpu`](crate::Error::Gpu) with libtorch's message; then nothing was done.
    pub fn run<T>(self, work: impl FnOnce() -> T) -> Result<T> {
        let _back = Exchanged { device: self.device, before: exchange(self.device, self.id)? };
        Ok(work())
    }

    /// Has the thread's own stream wait for all that this one was given so far, and keeps `tensors`, which were made here, until it is done
    /// with them as well: the allocator knows of this stream alone.
    ///
    /// # Errors
    /// [`Error::Gpu`](crate::Error::Gpu) with libtorch's message; then the tensors must not be used.
    pub fn join(self, tensors: &[&Tensor]) -> Result<()> {
        let (tensors, mut problem) = (pointers(tensors), [0; MAX_PROBLEM]);
        // SAFETY: as many valid tensors as it is told; writes a message at most.
        let is_done = unsafe { peapod_join_stream(self.device, self.id, tensors.as_ptr(), tensors.len(), problem.as_mut_ptr()) };
        check(is_done, "wait for a second stream", &problem)
    }
}

/// Gives a thread its stream back, also when it unwinds.
struct Exchanged {
    device: i32,
    before: i64,
}

impl Drop for Exchanged {
    fn drop(&mut self) {
        if let Err(error) = exchange(self.device, self.before) {
            tracing::error!("a thread keeps its second stream: {error}");
        }
    }
}

/// Makes a stream the thread's own; returns the one it had.
fn exchange(device: i32, id: i64) -> Result<i64> {
    let (mut before, mut problem) = (0, [0; MAX_PROBLEM]);
    // SAFETY: the streams that are named here came from libtorch; writes one number, or a message.
    let is_done = unsafe { peapod_exchange_stream(device, id, &mut before, problem.as_mut_ptr()) };
    check(is_done, "change the stream", &problem)?;
    Ok(before)
}

#[cfg(test)]
mod tests {
    use tch::{Cuda, Device, Kind};

    use super::*;
    use crate::current_stream;

    /// What is made on the second stream is whole on the first, round after round in the same memory.
    #[test]
    fn work_of_a_second_stream_is_whole_on_the_first() {
        if !Cuda::is_available() {
            let refused = SideStream::open(0).unwrap_err().to_string();
            assert!(refused.starts_with("cannot take a second stream: "), "{refused}");
            return;
        }
        let own = current_stream(0).unwrap();
        let side = SideStream::open(0).unwrap();
        let gpu = (Kind::Double, Device::Cuda(0));
        let busy = Tensor::ones([2048, 2048], gpu);
        for round in 1..=20 {
            let made = side
                .run(|| {
                    assert_ne!(current_stream(0).unwrap(), own);
                    // Long enough that a stream that does not wait would read too early.
                    let slow = busy.matmul(&busy);
                    (slow * 0.0 + f64::from(round)).sum(Kind::Double)
                })
                .unwrap();
            assert_eq!(current_stream(0).unwrap(), own);
            side.join(&[&made]).unwrap();
            let sum = &made + 1.0;
            drop(made);
            assert_eq!(sum.double_value(&[]), f64::from(round) * 2048.0 * 2048.0 + 1.0);
        }
        let unwound = std::panic::catch_unwind(|| side.run(|| panic!("on purpose")));
        assert!(unwound.is_err() && current_stream(0).unwrap() == own);
    }
}
