//! Ending a communicator from another thread.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use crate::Error;

type Hook = Box<dyn FnOnce() + Send>;

/// Breaks a running collective, or a rendezvous under way, and makes every later call fail with [`Error::Aborted`].
///
/// Clones share one state. The handle is made before the communicator, so that building it can be broken too:
///
/// ```
/// use peapod_collective::{AbortHandle, Collective, Error, SoloCollective};
///
/// let abort = AbortHandle::new();
/// let mut solo = SoloCollective::new(abort.clone());
/// abort.abort("generation 8 begins");
/// assert!(matches!(solo.barrier(std::time::Instant::now()), Err(Error::Aborted { reason }) if reason == "generation 8 begins"));
/// ```
#[derive(Clone, Default)]
pub struct AbortHandle {
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    /// Set once. Reading it takes no lock, so a backend may look at it as often as it likes.
    reason: OnceLock<String>,
    hooks: Mutex<Hooks>,
}

#[derive(Default)]
struct Hooks {
    next_id: u64,
    waiting: Vec<(u64, Hook)>,
}

impl AbortHandle {
    /// Makes a handle that nobody has aborted.
    pub fn new() -> Self {
        Self::default()
    }

    /// Aborts. The first reason stands; later calls do nothing.
    pub fn abort(&self, reason: impl Into<String>) {
        if self.shared.reason.set(reason.into()).is_err() {
            return;
        }
        // The reason is visible before any hook wakes somebody who will ask for it.
        let hooks = std::mem::take(&mut self.shared.hooks().waiting);
        for (_, hook) in hooks {
            hook();
        }
    }

    /// Returns the reason, once aborted.
    pub fn reason(&self) -> Option<&str> {
        self.shared.reason.get().map(String::as_str)
    }

    /// Fails with [`Error::Aborted`] once aborted.
    pub fn check(&self) -> Result<(), Error> {
        match self.reason() {
            None => Ok(()),
            Some(reason) => Err(Error::Aborted { reason: reason.to_owned() }),
        }
    }

    /// Has `hook` called, on the aborting thread, when the abort comes; at once if it has come. Dropping the guard forgets the hook.
    ///
    /// For backends: whatever blocks there is woken by a hook. It must be quick, and it may already be running when the guard is dropped.
    pub fn on_abort(&self, hook: impl FnOnce() + Send + 'static) -> OnAbort {
        let mut hooks = self.shared.hooks();
        let id = hooks.next_id;
        hooks.next_id += 1;
        // Looked up under the lock: `abort` sets the reason before it takes the lock, so it either finds this hook or is seen here.
        if self.reason().is_some() {
            drop(hooks);
            hook();
        } else {
            hooks.waiting.push((id, Box::new(hook)));
        }
        OnAbort { shared: Arc::clone(&self.shared), id }
    }
}

impl Shared {
    fn hooks(&self) -> MutexGuard<'_, Hooks> {
        // Hooks run outside the lock, so a panic cannot leave the list half changed.
        self.hooks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for AbortHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AbortHandle").field("reason", &self.reason()).finish()
    }
}

/// Keeps a hook of [`AbortHandle::on_abort`] registered.
#[must_use = "dropping the guard forgets the hook"]
pub struct OnAbort {
    shared: Arc<Shared>,
    id: u64,
}

impl Drop for OnAbort {
    fn drop(&mut self) {
        self.shared.hooks().waiting.retain(|(id, _)| *id != self.id);
    }
}

impl fmt::Debug for OnAbort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OnAbort").field("id", &self.id).finish()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    fn counting_hook(calls: &Arc<AtomicU32>) -> impl FnOnce() + Send + 'static {
        let calls = Arc::clone(calls);
        move || _ = calls.fetch_add(1, Ordering::SeqCst)
    }

    #[test]
    fn the_first_reason_stands() {
        let abort = AbortHandle::new();
        assert!(abort.check().is_ok());
        abort.clone().abort("first");
        abort.abort("second");
        assert_eq!(abort.reason(), Some("first"));
    }

    #[test]
    fn a_hook_runs_once_whether_it_came_before_or_after_the_abort() {
        let (abort, calls) = (AbortHandle::new(), Arc::new(AtomicU32::new(0)));
        let _early = abort.on_abort(counting_hook(&calls));
        abort.abort("now");
        abort.abort("again");
        let _late = abort.on_abort(counting_hook(&calls));
        assert_eq!(calls.load(Ordering::SeqCst), 2);
    }

    #[test]
    fn a_dropped_guard_forgets_its_hook_and_no_other() {
        let (abort, calls) = (AbortHandle::new(), Arc::new(AtomicU32::new(0)));
        let _kept = abort.on_abort(counting_hook(&calls));
        drop(abort.on_abort(counting_hook(&calls)));
        abort.abort("now");
        assert_eq!(calls.load(Ordering::SeqCst), 1);
    }
}
