//! What the job spends its time on, for those who account for every second.

use super::{Core, JobPhase};

/// What the job as a whole is doing, seen by its clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Activity {
    /// Too few workers have joined.
    Waiting,
    /// Enough have joined, and some read their models.
    Loading,
    /// The coordinator was away, and members of the last generation are waited for.
    Returning,
    /// The collective is being opened.
    Forming,
    /// Steps are trained.
    Training,
    /// A planned change: the members meet.
    Regrouping,
    /// A failure: the members leave their collective.
    Recovering,
    /// The last checkpoint is on its way.
    Finishing,
    /// The job has ended.
    Over,
}

impl Core {
    /// What the job is doing.
    #[must_use]
    pub fn activity(&self) -> Activity {
        match &self.phase {
            JobPhase::Gathering { .. } if self.workers.len() < self.config.min_world_size as usize => Activity::Waiting,
            JobPhase::Gathering { .. } => Activity::Loading,
            JobPhase::Returning { .. } => Activity::Returning,
            JobPhase::Forming { .. } => Activity::Forming,
            JobPhase::Running { .. } => Activity::Training,
            JobPhase::Stopping { aborted: false, .. } => Activity::Regrouping,
            JobPhase::Stopping { aborted: true, .. } => Activity::Recovering,
            JobPhase::Finishing { .. } => Activity::Finishing,
            JobPhase::Done(_) => Activity::Over,
        }
    }
}
