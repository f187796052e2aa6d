//! Runs the real programs as real processes: a coordinator and workers that talk over sockets on free ports.
//!
//! A story sets up a [`Cluster`], starts a [`Coordinator`] and perhaps [`Process`]es of workers in it, waits for states, breaks things, and
//! looks at exit codes, printed lines and files. Nothing sleeps for a guess: every wait names what it waits for and has a deadline. What a
//! process printed is shown when its story fails, and no process or file outlives its story.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "what goes wrong here goes wrong in a test, and a panic is how a test fails")]

mod checkpoint;
mod cluster;
mod faults;
mod http;
mod hub;
mod job;
mod process;
mod programs;
mod shards;

pub use checkpoint::{Checkpoint, StoredTensor};
pub use cluster::{Cluster, Coordinator, StepLine, TrainedSample, assert_epochs_trained_once, assert_trained_once};
pub use faults::FaultPlan;
pub use http::{Fault, FileServer, Habits};
pub use hub::HubServer;
pub use job::JobFile;
pub use peapod_worker::faults::Point;
pub use process::{Process, is_alive, kill};
pub use programs::{program, workspace};
pub use rustix::process::Signal;
pub use shards::{RawSample, demo_samples, tar_of};

use std::time::{Duration, Instant};

/// How long a story waits for something that must come. Far above what it takes on an idle machine: it ends a hang, it measures nothing.
pub const PATIENCE: Duration = Duration::from_secs(90);

/// Between two looks at something that cannot wake its waiter, such as a file.
const POLL: Duration = Duration::from_millis(20);

/// Looks until `look` finds something.
///
/// # Panics
/// After [`PATIENCE`], naming `what` was awaited.
pub fn poll<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let started = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(started.elapsed() < PATIENCE, "waited {PATIENCE:?} for {what}");
        std::thread::sleep(POLL);
    }
}
