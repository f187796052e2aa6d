//! Fused operators for frozen networks on GPUs, and the switches of libtorch that its C interface lacks.
//!
//! libtorch computes a group norm and the SiLU behind it, or the two halves of a gated feed-forward layer, one after the other, and each
//! operator writes to memory what the next one reads back; its group norm also undoes the layout that convolutions are fast in. Here each
//! such chain is one kernel, with a backward pass to its inputs alone: weights are frozen.
//!
//! Kernels are compiled for the GPU at hand when the first network asks for them, and proved on it against libtorch's own operators: a
//! kernel that cannot be compiled, or that computes something else, is warned of and not used. [`Fp8Linear`] is a linear layer in eight
//! bits, which costs digits and is for those who ask for it: where it cannot be had, that is an error.

mod compiler;
mod error;
mod fp8;
mod geglu;
mod gpu;
mod graph;
mod group_norm;
mod launch;
mod layer_norm;
mod proof;
mod registry;
mod residual;
mod side_stream;
mod squared_difference;
mod switches;

#[cfg(any(test, feature = "emulator"))]
pub mod emulator;

#[cfg(test)]
mod tests;

pub use compiler::open_compiler;
pub use error::Error;
pub use fp8::{Fp8Linear, Fp8Matrix, prove_fp8};
pub use graph::{current_stream, pinned, release_unused_memory};
pub use group_norm::GroupNorm;
pub use launch::Kernels;
pub use layer_norm::LayerNorm;
pub use registry::{Mode, of, set_mode};
pub use side_stream::SideStream;
pub use switches::{Attention, allow_tf32, prefer_attention};
