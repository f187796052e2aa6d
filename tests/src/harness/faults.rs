//! Which worker fails on purpose, where and at which step.

use std::collections::BTreeMap;

use peapod_worker::faults::{Point, VARIABLE};

use super::{Coordinator, Process};

/// Failures by (rank, step). A worker is told its own through its environment, logs that it was, and fails once for each; the one that
/// [replaces](FaultPlan::replacement) it fails no more.
///
/// ```no_run
/// use peapod_tests::harness::{Cluster, FaultPlan};
///
/// let cluster = Cluster::new();
/// let coordinator = cluster.coordinator(2, &[]);
/// let workers = FaultPlan::new().fail_all_reduce(1, 3).kill(0, 5).workers(&coordinator, 2);
/// ```
#[derive(Debug, Clone, Default)]
pub struct FaultPlan {
    by_rank: BTreeMap<u32, Vec<String>>,
    on_all: Vec<String>,
}

impl FaultPlan {
    /// Nothing fails.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// The worker dies as it enters the all-reduce of a step.
    #[must_use]
    pub fn kill(self, rank: u32, step: u64) -> Self {
        self.at(Point::DieBeforeAllReduce, rank, step)
    }

    /// The all-reduce of a step finishes on the other ranks and fails on this one, which lives.
    #[must_use]
    pub fn fail_all_reduce(self, rank: u32, step: u64) -> Self {
        self.at(Point::LoseAllReduce, rank, step)
    }

    /// The worker dies between the halves of a state that is passed on, of this step or a later one.
    #[must_use]
    pub fn kill_in_broadcast(mut self, rank: u32, step: u64) -> Self {
        self.halve_broadcasts();
        self.at(Point::DieInBroadcast, rank, step)
    }

    /// The worker's part in passing a state on fails between the halves; it lives.
    #[must_use]
    pub fn fail_broadcast(mut self, rank: u32, step: u64) -> Self {
        self.halve_broadcasts();
        self.at(Point::FailInBroadcast, rank, step)
    }

    /// The worker fails at this point of a step.
    #[must_use]
    pub fn at(mut self, point: Point, rank: u32, step: u64) -> Self {
        self.by_rank.entry(rank).or_default().push(format!("{point}@{step}"));
        self
    }

    fn halve_broadcasts(&mut self) {
        // All members must cut it at the same place.
        self.on_all = vec![format!("{}@0", Point::HalveBroadcasts)];
    }

    /// Starts the worker of a rank with what is planned for it.
    #[must_use]
    pub fn worker(&self, coordinator: &Coordinator, rank: u32) -> Process {
        let planned = self.by_rank.get(&rank).into_iter().flatten();
        self.start(coordinator, rank, planned)
    }

    /// Starts a worker in the place of one that failed: nothing is planned for it but what all must do alike.
    #[must_use]
    pub fn replacement(&self, coordinator: &Coordinator, rank: u32) -> Process {
        self.start(coordinator, rank, &[])
    }

    fn start<'a>(&'a self, coordinator: &Coordinator, rank: u32, planned: impl IntoIterator<Item = &'a String>) -> Process {
        let faults: Vec<&str> = self.on_all.iter().chain(planned).map(String::as_str).collect();
        let environment = [(VARIABLE, faults.join(","))];
        let environment = if faults.is_empty() { &[][..] } else { &environment[..] };
        coordinator.worker_with(&format!("worker of rank {rank}"), &["--rank", &rank.to_string()], environment)
    }

    /// Starts the workers of the first ranks.
    #[must_use]
    pub fn workers(&self, coordinator: &Coordinator, num_workers: u32) -> Vec<Process> {
        (0..num_workers).map(|rank| self.worker(coordinator, rank)).collect()
    }
}
