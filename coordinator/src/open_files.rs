//! How many files and connections the process may have open at once.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// What a coordinator has open beside its workers' connections: logs, the journal, checkpoints, the page.
const OWN: u64 = 64;
/// Connections of one worker: its stream, and a transfer.
const OF_A_WORKER: u64 = 2;

/// Raises the soft limit as far as the system lets it, and warns where a world of this size can run into what is left.
pub fn raise_limit(world_size: u32) {
    let wanted = u64::from(world_size) * OF_A_WORKER + OWN;
    let limit = raise();
    if limit < wanted {
        tracing::warn!("{world_size} workers may need {wanted} open files, the limit is {limit}: raise it (ulimit -n, LimitNOFILE=)");
    }
}

/// Sets the soft limit to the hard one; gives the limit that holds then, the largest number if there is none.
fn raise() -> u64 {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit { current: limit.maximum, ..limit };
    let held = if setrlimit(Resource::Nofile, raised).is_ok() { raised } else { limit };
    held.current.unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limit_is_raised_and_stays_so() {
        let limit = raise();
        assert!(limit > OWN);
        assert_eq!(raise(), limit);
    }
}
