//! What can go wrong with a kernel.

use std::any::Any;

/// A kernel that cannot be made or run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The driver's or the compiler's answer.
    #[error("cannot {doing}: {answer}")]
    Gpu {
        /// What was tried, as a bare verb.
        doing: &'static str,
        /// The answer.
        answer: String,
    },
    /// A kernel computes something else than libtorch.
    #[error("{operator} in {numbers} differs from libtorch's by {difference:.2e} of its largest value, more than {tolerance:.2e}")]
    Wrong {
        /// Which operator.
        operator: &'static str,
        /// The numbers it computes in.
        numbers: &'static str,
        /// The largest difference.
        difference: f64,
        /// What rounding explains.
        tolerance: f64,
    },
    /// An error of libtorch.
    #[error(transparent)]
    Torch(#[from] tch::TchError),
}

/// A result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// What a panic says, where it says something.
pub(crate) fn message(panic: &(dyn Any + Send)) -> Option<String> {
    panic.downcast_ref::<String>().cloned().or_else(|| panic.downcast_ref::<&str>().map(|message| (*message).to_owned()))
}
