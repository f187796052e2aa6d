//! Linear layers that may have eight bits a number.

use peapod_kernels::{Fp8Linear, Fp8Matrix, Kernels};
use tch::Tensor;

use super::Linear;
use crate::weights::{Frozen, Scope};

/// A linear layer of a transformer, in eight bits where its scope wants that and its sizes allow it.
pub(crate) enum TransformerLinear {
    /// In the network's own numbers.
    Whole(Linear),
    /// In eight bits.
    Rounded(RoundedLinear),
}

/// The weight twice, rounded by its rows and by its columns, one for each way through it: together they take what 16 bits do.
pub(crate) struct RoundedLinear {
    weight: Rounded,
    transposed: Rounded,
    bias: Option<Frozen>,
    kernels: Option<Kernels>,
}

/// Codes and scales.
struct Rounded(Frozen, Frozen);

impl Rounded {
    fn new(matrix: &Tensor, kernels: Option<&Kernels>) -> Self {
        let Fp8Matrix { codes, scales } = Fp8Matrix::round(matrix, kernels);
        Self(Frozen::new(codes), Frozen::new(scales))
    }
}

impl TransformerLinear {
    /// The layer as `scope` wants it.
    pub fn new(linear: Linear, scope: &Scope) -> Self {
        let fits = matches!(linear.weight.size()[..], [outputs, inputs] if Fp8Linear::takes(outputs, inputs));
        // What stands for a tensor that no file holds takes no memory, and should not here.
        if !scope.has_fp8_linears() || !fits || !linear.weight.is_contiguous() {
            return Self::Whole(linear);
        }
        let kernels = scope.kernels();
        Self::Rounded(RoundedLinear {
            weight: Rounded::new(&linear.weight, kernels.as_ref()),
            transposed: Rounded::new(&linear.weight.tr().contiguous(), kernels.as_ref()),
            bias: linear.bias,
            kernels,
        })
    }

    /// Shapes: `[.., inputs]` to `[.., outputs]`.
    pub fn forward(&self, input: &Tensor) -> Tensor {
        match self {
            Self::Whole(linear) => linear.forward(input),
            Self::Rounded(RoundedLinear { weight, transposed, bias, kernels }) => {
                let layer = Fp8Linear { weight: (&weight.0, &weight.1), transposed: (&transposed.0, &transposed.1), bias: bias.as_deref() };
                layer.forward(kernels.as_ref(), input)
            }
        }
    }
}
