//! Weights that are drawn, for networks of which no file is at hand.

use tch::{Device, Kind, Tensor};

/// Stands in for files: it has whatever tensor is asked for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Random {
    /// Tensors that networks may have or not, and that are there.
    pub(super) optional: &'static [&'static str],
}

/// Draws a tensor such that layers neither shrink nor blow up what passes through them, and that f16 holds what tens of layers add up to.
///
/// Matrices, convolutions and tables are normal with a variance of one over the elements that make up an output; scales of norms are ones,
/// shifts and biases zeros.
pub(super) fn draw(key: &str, shape: &[i64], kind: Kind, device: Device) -> Tensor {
    match shape {
        [_, inputs @ ..] if !inputs.is_empty() => {
            let mut tensor = Tensor::randn(shape, (kind, device));
            // In place: the largest table would not fit twice beside the others.
            tensor.g_mul_scalar_((inputs.iter().product::<i64>() as f64).sqrt().recip())
        }
        _ if key.ends_with("weight") => Tensor::ones(shape, (kind, device)),
        _ => Tensor::zeros(shape, (kind, device)),
    }
}
