//! How operators reach their kernels, on whatever runs them.

use std::sync::Arc;

use tch::{Kind, Tensor};

use crate::error::{Error, Result};

/// A pack of numbers that a kernel reads at once.
const PACK_BYTES: usize = 16;

/// The kernels, as cuda/kernels.cu calls them. As a number, a kernel's place in [`Kernel::ALL`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kernel {
    GroupNormSums,
    GroupNormApply,
    GroupNormGradientSums,
    GroupNormGradientApply,
    AddResidual,
    GegluForward,
    GegluBackward,
    AddLayerNormForward,
    AddLayerNormBackward,
    SquaredDifferenceSums,
    SquaredDifferenceGradient,
    RowsToE4m3,
}

impl Kernel {
    pub const ALL: [Self; 12] = [
        Self::GroupNormSums,
        Self::GroupNormApply,
        Self::GroupNormGradientSums,
        Self::GroupNormGradientApply,
        Self::AddResidual,
        Self::GegluForward,
        Self::GegluBackward,
        Self::AddLayerNormForward,
        Self::AddLayerNormBackward,
        Self::SquaredDifferenceSums,
        Self::SquaredDifferenceGradient,
        Self::RowsToE4m3,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::GroupNormSums => "group_norm_sums",
            Self::GroupNormApply => "group_norm_apply",
            Self::GroupNormGradientSums => "group_norm_gradient_sums",
            Self::GroupNormGradientApply => "group_norm_gradient_apply",
            Self::AddResidual => "add_residual",
            Self::GegluForward => "geglu_forward",
            Self::GegluBackward => "geglu_backward",
            Self::AddLayerNormForward => "add_layer_norm_forward",
            Self::AddLayerNormBackward => "add_layer_norm_backward",
            Self::SquaredDifferenceSums => "squared_difference_sums",
            Self::SquaredDifferenceGradient => "squared_difference_gradient",
            Self::RowsToE4m3 => "rows_to_e4m3",
        }
    }
}

/// The threads of a launch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Shape {
    /// Blocks along x and y.
    pub grid: [u32; 2],
    /// Threads of a block.
    pub threads: u32,
    /// Shared memory of a block.
    pub shared_bytes: u32,
}

/// What a kernel is called with.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Argument<'a> {
    Tensor(&'a Tensor),
    Null,
    Int(i64),
    Float(f64),
}

/// What runs kernels in one kind of number.
pub(crate) trait Launch: Send + Sync {
    /// Launches a kernel behind everything that libtorch has launched. Each of `arguments` begins with the bytes of one.
    fn launch(&self, kernel: Kernel, shape: Shape, arguments: &[u64]) -> Result<()>;
}

/// Fused operators in one kind of number on one device.
#[derive(Clone)]
pub struct Kernels {
    kind: Kind,
    num_processors: u32,
    launcher: Arc<dyn Launch>,
}

impl Kernels {
    /// `num_processors` run blocks at the same time.
    pub(crate) fn new(kind: Kind, num_processors: u32, launcher: Arc<dyn Launch>) -> Self {
        Self { kind, num_processors, launcher }
    }

    pub(crate) fn kind(&self) -> Kind {
        self.kind
    }

    pub(crate) fn num_processors(&self) -> u32 {
        self.num_processors
    }

    /// Numbers in a pack: widths are multiples of it.
    pub(crate) fn width(&self) -> i64 {
        (PACK_BYTES / self.kind.elt_size_in_bytes()) as i64
    }

    /// Whether a kernel may read a tensor as it lies in memory, from its first number to its last.
    pub(crate) fn takes(&self, tensor: &Tensor) -> bool {
        tensor.kind() == self.kind && tensor.is_contiguous() && tensor.data_ptr().addr().is_multiple_of(PACK_BYTES)
    }

    /// # Errors
    /// [`crate::Error::Gpu`].
    pub(crate) fn launch(&self, kernel: Kernel, shape: Shape, arguments: &[Argument]) -> Result<()> {
        let bytes = |argument: &Argument| {
            Ok(match *argument {
                Argument::Tensor(tensor) => tensor.data_ptr().addr() as u64,
                Argument::Null => 0,
                // The first bytes count: machines with GPUs put the lowest one first.
                Argument::Int(value) => {
                    let too_large = |_| Error::Gpu { doing: "launch a kernel", answer: format!("{}: {value} is too large", kernel.name()) };
                    u64::from(i32::try_from(value).map_err(too_large)?.cast_unsigned())
                }
                Argument::Float(value) => u64::from((value as f32).to_bits()),
            })
        };
        self.launcher.launch(kernel, shape, &arguments.iter().map(bytes).collect::<Result<Vec<u64>>>()?)
    }
}

/// What tch's operators do with an error: their callers look out for it.
#[expect(clippy::panic, reason = "a layer has no other way than the operators beside it to say that a GPU is out of order")]
pub(crate) fn or_panic<T>(result: Result<T>) -> T {
    result.unwrap_or_else(|error| panic!("{error}"))
}

/// How many parts of `size` hold `count`, both positive.
pub(crate) fn parts(count: i64, size: i64) -> i64 {
    (count + size - 1) / size
}

/// A map `[N, C, ..]` seen as `[N, rows, C]`, if it lies in memory with its channels last.
pub(crate) fn rows(map: &Tensor) -> Option<Tensor> {
    if map.dim() < 3 {
        return None;
    }
    let rows = map.flatten(2, -1).transpose(1, 2);
    rows.is_contiguous().then_some(rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_are_found_at_their_numbers() {
        for (place, kernel) in Kernel::ALL.into_iter().enumerate() {
            assert_eq!(kernel as usize, place, "{kernel:?}");
        }
    }
}
