//! How long a store that fails is asked again.

use std::hash::{BuildHasher, RandomState};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use super::SourceOptions;
use super::address::shown_url;
use super::remote::Failure;

/// Longest pause between two attempts.
const MAX_PAUSE: Duration = Duration::from_secs(30);

/// How often a store that stays away is in the log.
const WARN_EVERY: Duration = Duration::from_secs(60);

/// Failures in a row.
#[derive(Debug)]
pub struct Failing {
    since: Instant,
    count: u32,
}

/// How long a shard's store is waited for.
pub struct Patience {
    pub url: String,
    pub options: SourceOptions,
    /// When the log last said that it is waited for.
    pub warned: Mutex<Option<Instant>>,
}

impl Patience {
    /// Waits before the next attempt.
    ///
    /// Errors: as [`next_pause`](Self::next_pause).
    pub async fn hold_out(&self, failing: &mut Option<Failing>, reason: &str) -> Result<(), Failure> {
        tokio::time::sleep(self.next_pause(failing, reason)?).await;
        Ok(())
    }

    /// How long to wait before the next attempt.
    ///
    /// Errors: [`Failure::Lasting`] when it has been long enough.
    pub fn next_pause(&self, failing: &mut Option<Failing>, reason: &str) -> Result<Duration, Failure> {
        let SourceOptions { retries, give_up_after, first_pause, .. } = self.options;
        let failing = failing.get_or_insert_with(|| Failing { since: Instant::now(), count: 0 });
        failing.count += 1;
        let lasted = failing.since.elapsed();
        if failing.count > retries {
            if lasted >= give_up_after {
                let attempts = failing.count;
                return Err(Failure::Lasting(format!("{reason}; given up after {attempts} attempts in {:.1} s", lasted.as_secs_f64())));
            }
            let mut warned = self.warned.lock().unwrap_or_else(PoisonError::into_inner);
            if warned.is_none_or(|last| last.elapsed() >= WARN_EVERY) {
                *warned = Some(Instant::now());
                tracing::warn!(
                    "{} cannot be read for {:.0} s: {reason}; it is tried for up to {:.0} s",
                    shown_url(&self.url),
                    lasted.as_secs_f64(),
                    give_up_after.as_secs_f64()
                );
            }
        }
        Ok(pause(first_pause, failing.count - 1))
    }
}

/// The pause after `attempt` earlier ones: twice as long each time, and a random part of it, lest many workers ask in step.
pub fn pause(first: Duration, attempt: u32) -> Duration {
    let longest = first.saturating_mul(1 << attempt.min(20)).min(MAX_PAUSE);
    // The standard library's only source of chance; what matters is that no two processes agree.
    let chance = RandomState::new().hash_one(attempt) % 1024;
    longest / 2 + longest * chance as u32 / 2048
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_a_limit_and_differ() {
        let first = Duration::from_millis(200);
        for attempt in 0..40 {
            let longest = Duration::from_millis(200 << attempt.min(20)).min(MAX_PAUSE);
            let pause = pause(first, attempt);
            assert!(pause >= longest / 2 && pause <= longest, "{attempt}: {pause:?}");
        }
        assert!((0..20).any(|_| pause(first, 3) != pause(first, 3)));
    }
}
