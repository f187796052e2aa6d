//! How the last run from a state folder ended, for who asks when its coordinator is gone.

use std::fmt;
use std::path::Path;

use crate::core::{Outcome, State};
use crate::journal::{self, Closed, JOURNAL};

/// What is known of a run whose coordinator has ended.
#[derive(Debug, PartialEq)]
pub(super) enum LastRun {
    /// What it came to.
    Ended(Box<State>),
    /// Its coordinator could not close its journal.
    CutShort,
}

impl LastRun {
    /// Looks into the journal of a state folder. None where there is none, where it makes no sense, or where a coordinator has it open.
    pub(super) fn of(folder: &Path) -> Option<Self> {
        match journal::look(&folder.join(JOURNAL))? {
            Closed::Whole(found) => Some(Self::Ended(Box::new(found.state))),
            Closed::CutShort => Some(Self::CutShort),
        }
    }
}

impl fmt::Display for LastRun {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = match self {
            Self::Ended(state) => state,
            Self::CutShort => return f.write_str("the last one was killed, or its machine failed; the same command goes on with the job"),
        };
        let step = state.final_step();
        match state.outcome() {
            Some(Outcome::Finished) => write!(f, "its job is finished, at step {step}"),
            Some(Outcome::Stopped { reason }) => {
                write!(f, "its job was stopped at step {step}: {reason}; the same command goes on with it")
            }
            Some(Outcome::Failed { reason }) => write!(f, "its job has failed, at step {step}: {reason}"),
            None => write!(f, "the last one has ended before its job, at step {step}; the same command goes on with the job"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::{Core, Fact, tests::config};
    use crate::journal::{Disk, Run};

    #[test]
    fn run_that_is_over_is_told_with_its_end() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(LastRun::of(folder.path()), None);
        let told = |outcome: Option<Outcome>| {
            let mut state = Core::new(config(1), None).durable();
            outcome.into_iter().for_each(|outcome| state.apply(Fact::Ended(outcome)).unwrap());
            let run = Run { job_id: "7".into(), term: 1, world_size: 1, job: String::new(), shards: String::new() };
            Disk::open(&folder.path().join(JOURNAL)).unwrap().0.begin(&run, &state).unwrap();
            LastRun::of(folder.path()).unwrap().to_string()
        };
        assert_eq!(told(Some(Outcome::Finished)), "its job is finished, at step 0");
        assert_eq!(
            told(Some(Outcome::Stopped { reason: "Ctrl-C".into() })),
            "its job was stopped at step 0: Ctrl-C; the same command goes on with it"
        );
        assert_eq!(told(Some(Outcome::Failed { reason: "rank 1 lost".into() })), "its job has failed, at step 0: rank 1 lost");
        assert_eq!(told(None), "the last one has ended before its job, at step 0; the same command goes on with the job");
    }
}
