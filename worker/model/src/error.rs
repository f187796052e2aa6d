//! What can go wrong with a model.

use std::path::PathBuf;

/// Result of this crate's operations.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An error of the model crate.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file could not be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file was read but its content is not what it should be.
    #[error("{}: {reason}", path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What is wrong and what was expected.
        reason: String,
    },
    /// Weights and configuration do not belong together; all differences at once.
    #[error("{}: the weights do not fit the configuration: {} missing, {} misshapen, {} unknown\n{}", path.display(), missing.len(), misshapen.len(), extra.len(), list_problems(missing, misshapen, extra))]
    Weights {
        /// The file or folder the weights came from.
        path: PathBuf,
        /// Keys the model needs and the file lacks.
        missing: Vec<String>,
        /// Keys of another shape, with both shapes.
        misshapen: Vec<String>,
        /// Keys the model has no place for.
        extra: Vec<String>,
    },
    /// A LoRA file holds what this model has no place for.
    #[error("{}: {} keys fit nothing in this model:\n{}", path.display(), unknown.len(), list_problems(&[], &[], unknown))]
    Lora {
        /// The file.
        path: PathBuf,
        /// The keys, with shapes where those do not fit.
        unknown: Vec<String>,
    },
    /// A configuration asks for something that this program does not compute.
    #[error("{what} is not supported: {hint}")]
    Unsupported {
        /// The setting and its value.
        what: String,
        /// What to use instead.
        hint: String,
    },
    /// A device has no products of eight bits, or computes something else.
    #[error("no linear layers in FP8 on this device, leave `train.fp8_linears` out: {0}")]
    Fp8(#[source] peapod_kernels::Error),
    /// A GPU does not do what it was told.
    #[error(transparent)]
    Gpu(#[from] peapod_kernels::Error),
    /// Settings of a configuration contradict each other, or are beyond what any model has.
    #[error("{setting} of the configuration: {reason}")]
    Config {
        /// The setting.
        setting: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// The system gives no more threads.
    #[error("cannot start {num} threads (--threads): {reason}")]
    Threads {
        /// How many were wanted.
        num: usize,
        /// What the system said.
        reason: String,
    },
    /// Shapes of arguments do not fit together.
    #[error("shape mismatch in {what}: {detail}")]
    Shape {
        /// The operation.
        what: &'static str,
        /// Both shapes.
        detail: String,
    },
    /// libtorch failed.
    #[error("libtorch: {0}")]
    Torch(#[from] tch::TchError),
}

/// Keys of a kind that are listed: another model's file has thousands that do not fit.
const MAX_LISTED: usize = 8;

fn list_problems(missing: &[String], misshapen: &[String], extra: &[String]) -> String {
    let lines = |title: &'static str, keys: &[String]| {
        let rest = keys.len().saturating_sub(MAX_LISTED);
        let rest = (rest > 0).then(|| format!("  and {rest} more {title}"));
        keys.iter().take(MAX_LISTED).map(|key| format!("  {title} {key}")).chain(rest).collect::<Vec<_>>()
    };
    [lines("missing", missing), lines("misshapen", misshapen), lines("unknown", extra)].concat().join("\n")
}
