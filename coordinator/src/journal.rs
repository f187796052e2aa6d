//! Where the facts go that a restarted coordinator must know.

use crate::core::Fact;

/// Writes facts down before anyone hears of them.
pub trait Journal: Send {
    /// Returns once `fact` would survive the coordinator's death.
    ///
    /// # Errors
    /// Whatever keeps it from being written; the job must not go on as if it were.
    fn append(&mut self, fact: &Fact) -> std::io::Result<()>;
}

/// Keeps nothing: with it, a job that outlives its coordinator starts again from the newest checkpoint.
///
/// What a checkpoint needs (its ledger, its step, its generation) is in the store, not here.
#[derive(Debug, Default)]
pub struct Volatile;

impl Journal for Volatile {
    fn append(&mut self, _fact: &Fact) -> std::io::Result<()> {
        Ok(())
    }
}
