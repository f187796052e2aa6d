//! Samples of a micro-batch side by side on the CPU.
//!
//! libtorch shares one operator out among its threads, and all wait for the last of them before the next operator begins: on latents a
//! sample of which is a few thousand numbers, that is most of what they do. Samples never mix in a network, so that each thread can take
//! some of them through the whole step by itself instead.

use rayon::{ThreadPool, ThreadPoolBuilder};
use tch::Device;

use crate::{Error, Result};

/// Threads that compute parts of the same micro-batch, each with operators of one thread.
pub(super) struct Lanes {
    /// All but the caller's thread.
    others: ThreadPool,
    /// With the caller's.
    num: usize,
}

impl Lanes {
    /// As many lanes as libtorch has been given threads; `None` if that is one, or on a GPU, which is one lane however wide.
    ///
    /// Errors: [`Error::Threads`] if the system gives no more threads.
    pub fn new(device: Device) -> Result<Option<Self>> {
        let num = usize::try_from(tch::get_num_threads()).unwrap_or(1);
        if device != Device::Cpu || num < 2 {
            return Ok(None);
        }
        let builder = ThreadPoolBuilder::new().num_threads(num - 1).thread_name(|index| format!("lane-{}", index + 1));
        let others = builder.build().map_err(|error| Error::Threads { num, reason: error.to_string() })?;
        let _restored = OneThread::here();
        // libtorch keeps this for each thread.
        others.broadcast(|_| tch::set_num_threads(1));
        Ok(Some(Self { others, num }))
    }

    /// How many there are.
    pub fn num(&self) -> usize {
        self.num
    }

    /// Does `first` on this thread while `rest` is done to each of the `parts`, beside each other. The results of these are in their order.
    pub fn run<P: Send, T: Send, F>(&self, parts: Vec<P>, rest: impl Fn(P) -> T + Sync, first: impl FnOnce() -> F) -> (F, Vec<T>) {
        let _restored = OneThread::here();
        let mut results: Vec<Option<T>> = parts.iter().map(|_| None).collect();
        let first = self.others.in_place_scope(|scope| {
            for (part, result) in parts.into_iter().zip(&mut results) {
                let rest = &rest;
                scope.spawn(move |_| *result = Some(rest(part)));
            }
            first()
        });
        // The scope has waited for all of them.
        (first, results.into_iter().flatten().collect())
    }
}

/// While it lives, libtorch computes with one thread on this one.
struct OneThread {
    before: i32,
}

impl OneThread {
    fn here() -> Self {
        let before = tch::get_num_threads();
        tch::set_num_threads(1);
        Self { before }
    }
}

impl Drop for OneThread {
    fn drop(&mut self) {
        tch::set_num_threads(self.before);
    }
}
