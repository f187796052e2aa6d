//! The frozen layers models are made of.
//!
//! Each is built from a [`Scope`] whose keys are those of the PyTorch layer of the same name, and holds weights without gradient:
//! a backward pass goes through them to their inputs and saves nothing else.

mod fp8;
mod resnet;

use std::borrow::Borrow;

use peapod_kernels::Kernels;
use tch::Tensor;

pub(crate) use fp8::TransformerLinear;
pub(crate) use resnet::{ResnetBlock, ResnetSpec};

use crate::weights::{Frozen, Scope};

/// `y = x Wᵀ + b` on the last dimension.
pub struct Linear {
    weight: Frozen,
    bias: Option<Frozen>,
}

impl Linear {
    /// Takes `weight` `[outputs, inputs]` and, with `bias`, `bias` `[outputs]`.
    pub fn new<'a>(scope: impl Borrow<Scope<'a>>, inputs: i64, outputs: i64, bias: bool) -> Self {
        let scope = scope.borrow();
        Self { weight: scope.tensor("weight", &[outputs, inputs]), bias: bias.then(|| scope.tensor("bias", &[outputs])) }
    }

    /// Layers of the same sizes without bias below `scope` as one, whose output is theirs side by side.
    pub fn stacked(scope: &Scope, names: &[&str], inputs: i64, outputs: i64) -> Self {
        Self { weight: stacked(scope, names, "weight", &[outputs, inputs]), bias: None }
    }

    /// As [`Linear::stacked`], of layers with a bias.
    pub fn stacked_with_bias(scope: &Scope, names: &[&str], inputs: i64, outputs: i64) -> Self {
        Self { bias: Some(stacked(scope, names, "bias", &[outputs])), ..Self::stacked(scope, names, inputs, outputs) }
    }

    /// Without bias, of `outputs` rows of a larger weight from the row `first` on, which it shares.
    pub(crate) fn part(weight: &Frozen, first: i64, outputs: i64) -> Self {
        Self { weight: Frozen::new(weight.narrow(0, first, outputs)), bias: None }
    }

    /// `[outputs, inputs]`.
    pub(crate) fn weight(&self) -> &Tensor {
        &self.weight
    }

    /// Shapes: `[.., inputs]` to `[.., outputs]`.
    pub fn forward(&self, input: &Tensor) -> Tensor {
        input.linear(&self.weight, self.bias.as_deref())
    }
}

/// A tensor of each of several layers, one below the other.
fn stacked(scope: &Scope, names: &[&str], part: &str, shape: &[i64]) -> Frozen {
    let keys: Vec<String> = names.iter().map(|name| format!("{name}.{part}")).collect();
    scope.stacked(&keys.iter().map(String::as_str).collect::<Vec<_>>(), shape)
}

/// Two-dimensional convolution with a square kernel, zero padding and a bias.
///
/// Its weights lie in memory with the channels last, and so does what it makes, whatever it is given: the layout the fast kernels work in,
/// and the one in which a map's pixels are a transformer's tokens without a copy.
pub struct Conv2d {
    weight: Frozen,
    bias: Frozen,
    stride: i64,
    padding: i64,
}

impl Conv2d {
    /// Takes `weight` `[outputs, inputs, kernel, kernel]` and `bias` `[outputs]`.
    pub fn new<'a>(scope: impl Borrow<Scope<'a>>, inputs: i64, outputs: i64, kernel: i64, stride: i64, padding: i64) -> Self {
        let scope = scope.borrow();
        let weight = scope.channels_last("weight", &[outputs, inputs, kernel, kernel]);
        Self { weight, bias: scope.tensor("bias", &[outputs]), stride, padding }
    }

    /// Shapes: `[B, inputs, H, W]` to `[B, outputs, H', W']`.
    pub fn forward(&self, input: &Tensor) -> Tensor {
        self.convolve(input, Some(&self.bias))
    }

    /// As [`Conv2d::forward`], but for the bias, `[outputs]`, which is left to whoever has the next walk over the map.
    fn forward_unbiased(&self, input: &Tensor) -> (Tensor, &Tensor) {
        (self.convolve(input, None), &self.bias)
    }

    fn convolve(&self, input: &Tensor, bias: Option<&Tensor>) -> Tensor {
        input.conv2d(&self.weight, bias, [self.stride; 2], [self.padding; 2], [1, 1], 1)
    }
}

/// Layer normalisation over the last dimension, with scale and shift.
pub struct LayerNorm {
    weight: Frozen,
    bias: Frozen,
    eps: f64,
    kernels: Option<Kernels>,
}

impl LayerNorm {
    /// Takes `weight` and `bias`, both `[width]`.
    pub fn new<'a>(scope: impl Borrow<Scope<'a>>, width: i64, eps: f64) -> Self {
        Self::named(scope, ["weight", "bias"], width, eps)
    }

    /// As [`LayerNorm::new`], where a file calls scale and shift otherwise.
    pub(crate) fn named<'a>(scope: impl Borrow<Scope<'a>>, [weight, bias]: [&str; 2], width: i64, eps: f64) -> Self {
        let scope = scope.borrow();
        Self { weight: scope.tensor(weight, &[width]), bias: scope.tensor(bias, &[width]), eps, kernels: scope.kernels() }
    }

    /// Shapes: `[.., width]`, kept.
    pub fn forward(&self, input: &Tensor) -> Tensor {
        input.layer_norm(self.weight.size(), Some(&*self.weight), Some(&*self.bias), self.eps, true)
    }

    /// The sum of both, and what the norm makes of it. Shapes: all `[.., width]`.
    pub fn forward_sum(&self, input: &Tensor, residual: &Tensor) -> (Tensor, Tensor) {
        let fused = peapod_kernels::LayerNorm { weight: &self.weight, bias: &self.bias, eps: self.eps };
        self.kernels.as_ref().and_then(|kernels| fused.forward(kernels, input, residual)).unwrap_or_else(|| {
            let sum = input + residual;
            let normed = self.forward(&sum);
            (sum, normed)
        })
    }
}

/// Group normalisation over channel groups and space, with a scale and a shift per channel.
pub struct GroupNorm {
    weight: Frozen,
    bias: Frozen,
    groups: i64,
    eps: f64,
    kernels: Option<Kernels>,
}

impl GroupNorm {
    /// Takes `weight` and `bias`, both `[channels]`; `groups` divides `channels`.
    pub fn new<'a>(scope: impl Borrow<Scope<'a>>, groups: i64, channels: i64, eps: f64) -> Self {
        let scope = scope.borrow();
        Self { weight: scope.tensor("weight", &[channels]), bias: scope.tensor("bias", &[channels]), groups, eps, kernels: scope.kernels() }
    }

    /// Shapes: `[B, channels, ..]`, kept.
    pub fn forward(&self, input: &Tensor) -> Tensor {
        self.fused(input, None, false).unwrap_or_else(|| self.plain(input))
    }

    /// With a SiLU behind it. Shapes: `[B, channels, ..]`, kept.
    pub fn forward_silu(&self, input: &Tensor) -> Tensor {
        self.fused(input, None, true).unwrap_or_else(|| self.plain(input).silu())
    }

    /// With a SiLU behind it, and `added` to all of a channel before it. Shapes: `[B, channels, H, W]`, kept; `added` `[B, channels]`.
    pub fn forward_sum_silu(&self, mut input: Tensor, added: &Tensor) -> Tensor {
        if let Some(output) = self.fused(&input, Some(added), true) {
            return output;
        }
        input += added.unsqueeze(-1).unsqueeze(-1);
        self.forward_silu(&input)
    }

    /// Whether it walks over a map once, whatever it does to it.
    fn is_fused(&self) -> bool {
        self.kernels.is_some()
    }

    fn fused(&self, input: &Tensor, added: Option<&Tensor>, silu: bool) -> Option<Tensor> {
        let (weight, bias) = (&*self.weight, &*self.bias);
        peapod_kernels::GroupNorm { weight, bias, groups: self.groups, eps: self.eps, silu }.forward(self.kernels.as_ref()?, input, added)
    }

    fn plain(&self, input: &Tensor) -> Tensor {
        input.group_norm(self.groups, Some(&*self.weight), Some(&*self.bias), self.eps, true)
    }
}

/// Values times the exact (erf) GELU of their gates, which lie behind them along the last dimension.
pub(crate) struct Geglu {
    kernels: Option<Kernels>,
}

impl Geglu {
    /// It has no weights; `scope` says where it computes.
    pub fn new(scope: &Scope) -> Self {
        Self { kernels: scope.kernels() }
    }

    /// Shapes: `[.., 2 * width]` to `[.., width]`.
    pub fn forward(&self, input: &Tensor) -> Tensor {
        self.kernels.as_ref().and_then(|kernels| kernels.geglu(input)).unwrap_or_else(|| {
            let width = input.size().last().map_or(0, |double| double / 2);
            input.narrow(-1, 0, width) * input.narrow(-1, width, width).gelu("none")
        })
    }
}

/// A table of vectors, looked up by index.
pub struct Embedding {
    weight: Frozen,
}

impl Embedding {
    /// Takes `weight` `[rows, width]`.
    pub fn new<'a>(scope: impl Borrow<Scope<'a>>, rows: i64, width: i64) -> Self {
        Self { weight: scope.borrow().tensor("weight", &[rows, width]) }
    }

    /// Shapes: int64 `[..]`, every index in `0..rows`, to `[.., width]`.
    pub fn forward(&self, indices: &Tensor) -> Tensor {
        Tensor::embedding(&self.weight, indices, -1, false, false)
    }
}

/// Multi-head scaled dot-product attention of projected inputs; scores are divided by the square root of the head width.
///
/// Shapes: `query` `[B, Q, heads * width]`, `key` and `value` `[B, K, heads * width]`; returns `[B, Q, heads * width]`.
/// `mask`, if any, is broadcast to `[B, heads, Q, K]` and added to the scores; `is_causal` hides later positions and excludes a mask.
pub fn attention(query: &Tensor, key: &Tensor, value: &Tensor, heads: i64, mask: Option<&Tensor>, is_causal: bool) -> Tensor {
    let split = |x: &Tensor| x.unflatten(-1, [heads, -1]).transpose(1, 2);
    let (query, key, value) = (split(query), split(key), split(value));
    Tensor::scaled_dot_product_attention(&query, &key, &value, mask, 0.0, is_causal, None::<f64>, false).transpose(1, 2).flatten(2, 3)
}

/// Doubles height and width by repeating pixels, to exactly `size` where rounding in the downsampling left one less than the double.
pub(crate) fn upsample_nearest(input: &Tensor, size: [i64; 2]) -> Tensor {
    input.upsample_nearest2d(size, None, None)
}
