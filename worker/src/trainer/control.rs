//! What other threads ask of the trainer while it is in the middle of a step.

use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use peapod_collective::AbortHandle;
use peapod_data::LoaderHandle;
use peapod_proto::ids::{Generation, Step};
use peapod_proto::message::{Heartbeat, Memory, Phase};

/// Shared between the trainer's thread and the supervisor.
#[derive(Default)]
pub struct Control {
    breaking: Mutex<Breaking>,
    change_asked: AtomicU64,
    snapshot_asked: AtomicU64,
    phase: AtomicU8,
    step: AtomicU64,
    generation: AtomicU64,
    /// Pieces of models that have come.
    fetched: AtomicU64,
    memory: Mutex<Memory>,
}

#[derive(Default)]
struct Breaking {
    /// The newest generation that was aborted, and why: the trainer may not have begun it yet.
    aborted: Option<(Generation, String)>,
    current: Option<(Generation, AbortHandle)>,
    loader: Option<LoaderHandle>,
}

impl Control {
    fn breaking(&self) -> MutexGuard<'_, Breaking> {
        self.breaking.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets [`Control::abort`] break a wait for samples, and grants reach the data threads.
    pub fn set_loader(&self, loader: LoaderHandle) {
        self.breaking().loader = Some(loader);
    }

    /// The data threads, once they run.
    pub fn loader(&self) -> Option<LoaderHandle> {
        self.breaking().loader.clone()
    }

    /// Begins a generation; the handle is aborted already if the abort came first.
    pub fn begin(&self, generation: Generation) -> AbortHandle {
        let handle = AbortHandle::new();
        let mut breaking = self.breaking();
        if let Some(loader) = &breaking.loader {
            loader.resume();
        }
        breaking.current = Some((generation, handle.clone()));
        let early = breaking.aborted.clone().filter(|(aborted, _)| *aborted >= generation);
        drop(breaking);
        self.generation.store(generation.0, Ordering::Release);
        if let Some((_, reason)) = early {
            // A wait for samples would not see the handle.
            if let Some(loader) = self.loader() {
                loader.cancel();
            }
            handle.abort(reason);
        }
        handle
    }

    /// Ends the current generation.
    pub fn end(&self) {
        self.breaking().current = None;
        self.generation.store(Generation::NONE.0, Ordering::Release);
    }

    /// Breaks whatever the trainer does in `generation`, or will do.
    pub fn abort(&self, generation: Generation, reason: &str) {
        let mut breaking = self.breaking();
        if breaking.aborted.as_ref().is_none_or(|(aborted, _)| *aborted < generation) {
            breaking.aborted = Some((generation, reason.to_owned()));
        }
        let handle = breaking.current.as_ref().filter(|(current, _)| *current <= generation).map(|(_, handle)| handle.clone());
        if let Some(handle) = handle {
            if let Some(loader) = &breaking.loader {
                loader.cancel();
            }
            // Outside of the lock: abort closes sockets.
            drop(breaking);
            handle.abort(reason);
        }
    }

    /// Asks for a meeting after the next step of `generation`.
    pub fn ask_change(&self, generation: Generation) {
        self.change_asked.fetch_max(generation.0, Ordering::AcqRel);
    }

    /// Whether a meeting is asked for in `generation`.
    pub fn change_is_asked(&self, generation: Generation) -> bool {
        self.change_asked.load(Ordering::Acquire) >= generation.0
    }

    /// Asks for a copy of the weights after the next step of `generation`.
    pub fn ask_snapshot(&self, generation: Generation) {
        self.snapshot_asked.fetch_max(generation.0, Ordering::AcqRel);
    }

    /// Takes the request for a copy, if there is one for `generation`.
    pub fn take_snapshot_request(&self, generation: Generation) -> bool {
        self.snapshot_asked.compare_exchange(generation.0, 0, Ordering::AcqRel, Ordering::Acquire).is_ok()
    }

    /// What heartbeats say.
    pub fn heartbeat(&self) -> Heartbeat {
        Heartbeat {
            step: Step(self.step.load(Ordering::Acquire)),
            phase: Phase::ALL.get(usize::from(self.phase.load(Ordering::Acquire))).copied().unwrap_or_default(),
            generation: Generation(self.generation.load(Ordering::Acquire)),
            reads: self.breaking().loader.as_ref().map_or(0, LoaderHandle::samples_read) + self.fetched.load(Ordering::Acquire),
            memory: *self.memory.lock().unwrap_or_else(PoisonError::into_inner),
        }
    }

    /// Says what the process holds in memory.
    pub fn set_memory(&self, memory: Memory) {
        *self.memory.lock().unwrap_or_else(PoisonError::into_inner) = memory;
    }

    /// A piece of a model has come.
    pub fn fetched(&self) {
        self.fetched.fetch_add(1, Ordering::AcqRel);
    }

    /// Enters a phase.
    pub fn enter(&self, phase: Phase) {
        self.phase.store(phase as u8, Ordering::Release);
    }

    /// Says which step is applied.
    pub fn set_step(&self, step: Step) {
        self.step.store(step.0, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn abort_that_overtakes_its_assignment_is_not_lost() {
        let control = Control::default();
        control.abort(Generation(3), "rank 1 died");
        assert_eq!(control.begin(Generation(3)).reason(), Some("rank 1 died"));
        assert_eq!(control.begin(Generation(4)).reason(), None);
    }

    #[test]
    fn abort_of_an_older_generation_leaves_the_current_one_alone() {
        let control = Control::default();
        let handle = control.begin(Generation(4));
        control.abort(Generation(3), "old");
        assert_eq!(handle.reason(), None);
        control.abort(Generation(4), "now");
        assert_eq!(handle.reason(), Some("now"));
    }

    #[test]
    fn requests_belong_to_their_generation() {
        let control = Control::default();
        control.ask_change(Generation(2));
        assert!(control.change_is_asked(Generation(2)) && !control.change_is_asked(Generation(3)));
        control.ask_snapshot(Generation(2));
        assert!(!control.take_snapshot_request(Generation(3)));
        assert!(control.take_snapshot_request(Generation(2)));
        assert!(!control.take_snapshot_request(Generation(2)));
    }

    #[test]
    fn every_phase_is_said_as_it_is() {
        let control = Control::default();
        for phase in Phase::ALL {
            control.enter(phase);
            assert_eq!(control.heartbeat().phase, phase);
        }
    }
}
