//! Spatial transformers: self-attention over the pixels, cross-attention to the text, feed-forward.

use tch::Tensor;

use super::blocks::Condition;
use crate::nn::{Conv2d, Geglu, GroupNorm, LayerNorm, Linear, TransformerLinear, attention};
use crate::weights::{Frozen, Scope};

/// Fixed in diffusers, whatever `norm_eps` says.
const GROUP_NORM_EPS: f64 = 1e-6;
const LAYER_NORM_EPS: f64 = 1e-5;

/// Sizes of a spatial transformer.
#[derive(Debug, Clone, Copy)]
pub(crate) struct TransformerSpec {
    pub channels: i64,
    pub heads: i64,
    pub context_width: i64,
    pub num_layers: usize,
    pub groups: i64,
    pub linear_projection: bool,
}

/// Transformer layers over the pixels of a feature map, beside a shortcut.
///
/// Source: `Transformer2DModel` of diffusers, with text states.
pub(super) struct SpatialTransformer {
    norm: GroupNorm,
    proj_in: Projection,
    layers: Vec<TransformerLayer>,
    proj_out: Projection,
}

impl SpatialTransformer {
    pub fn new(scope: &Scope, spec: &TransformerSpec) -> Self {
        let layers = scope / "transformer_blocks";
        Self {
            norm: GroupNorm::new(scope / "norm", spec.groups, spec.channels, GROUP_NORM_EPS),
            proj_in: Projection::new(scope / "proj_in", spec),
            layers: (0..spec.num_layers).map(|index| TransformerLayer::new(&layers / index, spec)).collect(),
            proj_out: Projection::new(scope / "proj_out", spec),
        }
    }

    /// The layers that attend to the text.
    pub fn cross_attentions(&mut self) -> impl Iterator<Item = &mut CrossAttention> {
        self.layers.iter_mut().map(|layer| &mut layer.cross_attention)
    }

    /// Shapes: `input` `[B, channels, H, W]`, kept.
    pub fn forward(&self, input: &Tensor, condition: Condition) -> Tensor {
        let size = input.size();
        let mut tokens = self.proj_in.forward_tokens(&self.norm.forward(input));
        let mut branch = None;
        for layer in &self.layers {
            let (stem, next) = layer.forward(tokens, branch, condition);
            (tokens, branch) = (stem, Some(next));
        }
        let tokens = branch.map_or_else(|| tokens.shallow_clone(), |branch| branch + &tokens);
        self.proj_out.forward_map(&tokens, &size) + input
    }
}

/// The change between feature map and tokens: a linear layer on tokens, or (SD1.5) a 1x1 convolution on the map. The same numbers,
/// in other shapes.
enum Projection {
    Linear(Linear),
    Conv(Conv2d),
}

impl Projection {
    fn new(scope: Scope, spec: &TransformerSpec) -> Self {
        if spec.linear_projection {
            Self::Linear(Linear::new(scope, spec.channels, spec.channels, true))
        } else {
            Self::Conv(Conv2d::new(scope, spec.channels, spec.channels, 1, 1, 0))
        }
    }

    /// `[B, C, H, W]` to `[B, H * W, C]`.
    fn forward_tokens(&self, map: &Tensor) -> Tensor {
        let to_tokens = |map: &Tensor| map.flatten(2, 3).transpose(1, 2);
        match self {
            Self::Linear(linear) => linear.forward(&to_tokens(map)),
            Self::Conv(conv) => to_tokens(&conv.forward(map)),
        }
    }

    /// `[B, H * W, C]` to `[B, C, H, W]`.
    fn forward_map(&self, tokens: &Tensor, size: &[i64]) -> Tensor {
        let to_map = |tokens: &Tensor| tokens.transpose(1, 2).reshape(size);
        match self {
            Self::Linear(linear) => to_map(&linear.forward(tokens)),
            Self::Conv(conv) => conv.forward(&to_map(tokens)),
        }
    }
}

/// One transformer layer, normalised before each of its three parts.
struct TransformerLayer {
    norm1: LayerNorm,
    self_attention: SelfAttention,
    norm2: LayerNorm,
    cross_attention: CrossAttention,
    norm3: LayerNorm,
    feed_forward: GegluFeedForward,
}

impl TransformerLayer {
    fn new(scope: Scope, spec: &TransformerSpec) -> Self {
        let width = spec.channels;
        let norm = |name: &str| LayerNorm::new(&scope / name, width, LAYER_NORM_EPS);
        Self {
            norm1: norm("norm1"),
            self_attention: SelfAttention::new(&scope / "attn1", spec),
            norm2: norm("norm2"),
            cross_attention: CrossAttention::new(&scope / "attn2", spec),
            norm3: norm("norm3"),
            feed_forward: GegluFeedForward::new(&scope / "ff" / "net", width),
        }
    }

    /// Takes tokens and what the layer before would add to them; returns both of its own. Whoever normalises a sum is the one who adds it
    /// up.
    fn forward(&self, tokens: Tensor, branch: Option<Tensor>, condition: Condition) -> (Tensor, Tensor) {
        let (tokens, normed) = match branch {
            Some(branch) => self.norm1.forward_sum(&branch, &tokens),
            None => {
                let normed = self.norm1.forward(&tokens);
                (tokens, normed)
            }
        };
        let (tokens, normed) = self.norm2.forward_sum(&self.self_attention.forward(&normed), &tokens);
        let (tokens, normed) = self.norm3.forward_sum(&self.cross_attention.forward(&normed, condition), &tokens);
        let branch = self.feed_forward.forward(&normed);
        (tokens, branch)
    }
}

/// Multi-head self-attention; queries, keys and values are projected without bias, in one product.
struct SelfAttention {
    to_qkv: TransformerLinear,
    to_out: TransformerLinear,
    heads: i64,
}

impl SelfAttention {
    fn new(scope: Scope, spec: &TransformerSpec) -> Self {
        let width = spec.channels;
        let (to_qkv, to_out) = (["to_q", "to_k", "to_v"], Linear::new(&scope / "to_out" / 0, width, width, true));
        Self {
            to_qkv: TransformerLinear::new(Linear::stacked(&scope, &to_qkv, width, width), &scope),
            to_out: TransformerLinear::new(to_out, &scope),
            heads: spec.heads,
        }
    }

    fn forward(&self, tokens: &Tensor) -> Tensor {
        let projected = self.to_qkv.forward(tokens).chunk(3, -1);
        self.to_out.forward(&attention(&projected[0], &projected[1], &projected[2], self.heads, None, false))
    }
}

/// Multi-head attention of pixels to text; keys and values are projected in one product, all without bias.
///
/// What comes from the text keeps its digits: it is little work, and all that the adapter learns from passes through it.
pub(super) struct CrossAttention {
    to_q: TransformerLinear,
    to_kv: Linear,
    to_out: TransformerLinear,
    heads: i64,
    /// Where its keys and values are among those of all layers, if they are projected together.
    slot: Option<usize>,
}

impl CrossAttention {
    fn new(scope: Scope, spec: &TransformerSpec) -> Self {
        let width = spec.channels;
        Self {
            to_q: TransformerLinear::new(Linear::new(&scope / "to_q", width, width, false), &scope),
            to_kv: Linear::stacked(&scope, &["to_k", "to_v"], spec.context_width, width),
            to_out: TransformerLinear::new(Linear::new(&scope / "to_out" / 0, width, width, true), &scope),
            heads: spec.heads,
            slot: None,
        }
    }

    fn forward(&self, tokens: &Tensor, condition: Condition) -> Tensor {
        let projected = match self.slot.and_then(|slot| condition.projected.get(slot)) {
            Some(projected) => projected.chunk(2, -1),
            None => self.to_kv.forward(condition.text).chunk(2, -1),
        };
        let query = self.to_q.forward(tokens);
        self.to_out.forward(&attention(&query, &projected[0], &projected[1], self.heads, condition.bias, false))
    }
}

/// The projections of the text to keys and values in all layers of cross-attention, as one product: each alone is too small to fill a GPU.
pub(super) struct TextProjection {
    weight: Frozen,
    widths: Vec<i64>,
}

impl TextProjection {
    /// Moves the weights of all `layers` into one, of which each keeps its part. `None` if there are none, or if the weights are not there.
    pub fn gather<'a>(layers: impl Iterator<Item = &'a mut CrossAttention>) -> Option<Self> {
        let layers: Vec<&mut CrossAttention> = layers.collect();
        let weights: Vec<&Tensor> = layers.iter().map(|layer| layer.to_kv.weight()).collect();
        // What stands for a tensor that no file holds takes no memory, and should not here.
        if weights.is_empty() || !weights.iter().all(|weight| weight.is_contiguous()) {
            return None;
        }
        let widths: Vec<i64> = weights.iter().map(|weight| weight.size()[0]).collect();
        let weight = Frozen::new(Tensor::cat(&weights, 0));
        let mut first = 0;
        for (slot, (layer, &width)) in layers.into_iter().zip(&widths).enumerate() {
            layer.to_kv = Linear::part(&weight, first, width);
            layer.slot = Some(slot);
            first += width;
        }
        Some(Self { weight, widths })
    }

    /// Shapes: `text` `[B, L, D]`; keys and values of a layer, `[B, L, 2 * width]`, by its slot.
    pub fn forward(&self, text: &Tensor) -> Vec<Tensor> {
        text.linear(&self.weight, None::<&Tensor>).split_with_sizes(&self.widths, -1)
    }
}

/// A feed-forward layer of four times the width, gated by an exact (erf) GELU.
struct GegluFeedForward {
    proj: TransformerLinear,
    gate: Geglu,
    out: TransformerLinear,
}

impl GegluFeedForward {
    const EXPANSION: i64 = 4;

    fn new(scope: Scope, width: i64) -> Self {
        let inner = Self::EXPANSION * width;
        // `proj` makes values and gates at once. Key 1 of the sequence is the dropout, which has no weights.
        let (proj, out) = (Linear::new(&scope / 0 / "proj", width, 2 * inner, true), Linear::new(&scope / 2, inner, width, true));
        Self { proj: TransformerLinear::new(proj, &scope), gate: Geglu::new(&scope), out: TransformerLinear::new(out, &scope) }
    }

    fn forward(&self, tokens: &Tensor) -> Tensor {
        self.out.forward(&self.gate.forward(&self.proj.forward(tokens)))
    }
}
