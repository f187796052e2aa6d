//! What those outside are shown of a job.

use std::time::Duration;

use peapod_proto::ids::{Generation, Step};
use peapod_proto::message::ValidationLosses;

use super::{Core, Failure, JobPhase, Ledger, Outcome, Timestamp, WorkerView};

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

    /// Whether nothing is left to train: the weights are those of the last step, or every sample of every epoch is in them.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        let at_its_last_step = self.config.last_step.is_some_and(|last| self.truth.step >= last);
        at_its_last_step || (self.config.epochs.is_some() && self.unaccounted().is_none())
    }

    /// How the job ended, if it has.
    #[must_use]
    pub fn outcome(&self) -> Option<&Outcome> {
        match &self.phase {
            JobPhase::Done(outcome) => Some(outcome),
            _ => None,
        }
    }

    /// Silence after which a worker is dead.
    #[must_use]
    pub fn heartbeat_timeout(&self) -> Duration {
        self.config.heartbeat_timeout
    }

    /// The current generation.
    #[must_use]
    pub fn generation(&self) -> Generation {
        self.generation
    }

    /// Last final step.
    #[must_use]
    pub fn final_step(&self) -> Step {
        self.progress.final_step()
    }

    /// The ledger.
    #[must_use]
    pub fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    /// Number of shards of the ledger's first open epoch that are leased now.
    #[must_use]
    pub fn num_leased(&self) -> u32 {
        self.leases.num_leased(self.ledger.first_open_epoch(), 0..self.ledger.num_shards())
    }

    /// The workers, by rank.
    #[must_use]
    pub fn workers(&self, now: Timestamp) -> Vec<WorkerView> {
        let members = self.members();
        let mut views: Vec<WorkerView> = self.workers.iter().map(|(&id, worker)| worker.view(id, now, members.contains(&id))).collect();
        views.sort_by_key(|view| view.rank);
        views
    }

    /// The job's state in a few words.
    #[must_use]
    pub fn state(&self) -> String {
        match &self.phase {
            JobPhase::Gathering { .. } => self.describe_missing(),
            JobPhase::Returning { .. } => "waiting for the workers to come back".into(),
            JobPhase::Forming { .. } => "forming".into(),
            JobPhase::Running { planned: false, .. } => "training".into(),
            JobPhase::Running { planned: true, .. } => "training, to meet after this step".into(),
            JobPhase::Stopping { .. } => "regrouping".into(),
            JobPhase::Finishing { .. } => "storing the last checkpoint".into(),
            JobPhase::Done(outcome) => outcome.as_str().into(),
        }
    }

    /// Step of the newest whole checkpoint.
    #[must_use]
    pub fn checkpoint_step(&self) -> Option<Step> {
        self.checkpoint.last.as_ref().map(|last| last.step)
    }

    /// The newest losses on the validation samples.
    #[must_use]
    pub fn validation(&self) -> Option<ValidationLosses> {
        self.validation
    }

    /// The first failure that the job has not got over, in one line.
    #[must_use]
    pub fn first_failure(&self) -> Option<&str> {
        self.first_failure.as_ref().filter(|first| first.healed.is_none()).map(|first| first.text.as_str())
    }

    /// The last of these failures with all that is known about it, also if the job has got over it.
    #[must_use]
    pub fn failure(&self) -> Option<&Failure> {
        self.first_failure.as_ref()
    }
}
