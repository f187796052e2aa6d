//! How many files and connections the process may have open at once.

/// What a coordinator has open beside its workers' connections: logs, the journal, checkpoints, the page.
const OWN: u64 = 64;
/// Connections of one worker: its stream, and a transfer.
const OF_A_WORKER: u64 = 2;

/// Raises the soft limit as far as the system lets it, and warns where a world of this size can run into what is left.
pub fn raise_limit(world_size: u32) {
    let wanted = u64::from(world_size) * OF_A_WORKER + OWN;
    match raise() {
        Some(limit) if limit < wanted => {
            tracing::warn!("{world_size} workers may need {wanted} open files, the limit is {limit}: raise it (ulimit -n, LimitNOFILE=)");
        }
        Some(_) => {}
        None => tracing::warn!("the limit of open files cannot be read"),
    }
}

/// Sets the soft limit to the hard one; gives the limit that holds then.
fn raise() -> Option<u64> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: getrlimit writes to the struct it is given, which lives through the call.
    #[allow(unsafe_code)]
    let got = unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) };
    if got != 0 {
        return None;
    }
    let raised = libc::rlimit { rlim_cur: limit.rlim_max, ..limit };
    // SAFETY: setrlimit reads the struct it is given, which lives through the call.
    #[allow(unsafe_code)]
    let set = unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const raised) };
    Some(if set == 0 { raised.rlim_cur } else { limit.rlim_cur })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limit_is_raised_and_stays_so() {
        let limit = raise().unwrap();
        assert!(limit > OWN);
        assert_eq!(raise(), Some(limit));
    }
}
