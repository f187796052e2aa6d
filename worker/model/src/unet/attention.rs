//! Spatial transformers: self-attention over the pixels, cross-attention to the text, feed-forward.

use tch::Tensor;

use crate::nn::{Conv2d, GroupNorm, LayerNorm, Linear, attention};
use crate::weights::Scope;

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

    /// Shapes: `input` `[B, channels, H, W]`, kept; `text` `[B, L, context_width]`; `bias`, added to the scores of the text, `[B, 1, 1, L]`.
    pub fn forward(&self, input: &Tensor, text: &Tensor, bias: Option<&Tensor>) -> Tensor {
        let size = input.size();
        let mut tokens = self.proj_in.forward_tokens(&self.norm.forward(input));
        for layer in &self.layers {
            tokens = layer.forward(&tokens, text, bias);
        }
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

    fn forward(&self, tokens: &Tensor, text: &Tensor, bias: Option<&Tensor>) -> Tensor {
        let tokens = self.self_attention.forward(&self.norm1.forward(tokens)) + tokens;
        let tokens = self.cross_attention.forward(&self.norm2.forward(&tokens), text, bias) + tokens;
        self.feed_forward.forward(&self.norm3.forward(&tokens)) + tokens
    }
}

/// Multi-head self-attention; queries, keys and values are projected without bias, in one product.
struct SelfAttention {
    to_qkv: Linear,
    to_out: Linear,
    heads: i64,
}

impl SelfAttention {
    fn new(scope: Scope, spec: &TransformerSpec) -> Self {
        let width = spec.channels;
        let to_out = Linear::new(&scope / "to_out" / 0, width, width, true);
        Self { to_qkv: Linear::stacked(&scope, &["to_q", "to_k", "to_v"], width, width), to_out, heads: spec.heads }
    }

    fn forward(&self, tokens: &Tensor) -> Tensor {
        let projected = self.to_qkv.forward(tokens).chunk(3, -1);
        self.to_out.forward(&attention(&projected[0], &projected[1], &projected[2], self.heads, None, false))
    }
}

/// Multi-head attention of pixels to text; keys and values are projected in one product, all without bias.
struct CrossAttention {
    to_q: Linear,
    to_kv: Linear,
    to_out: Linear,
    heads: i64,
}

impl CrossAttention {
    fn new(scope: Scope, spec: &TransformerSpec) -> Self {
        let width = spec.channels;
        Self {
            to_q: Linear::new(&scope / "to_q", width, width, false),
            to_kv: Linear::stacked(&scope, &["to_k", "to_v"], spec.context_width, width),
            to_out: Linear::new(&scope / "to_out" / 0, width, width, true),
            heads: spec.heads,
        }
    }

    fn forward(&self, tokens: &Tensor, text: &Tensor, bias: Option<&Tensor>) -> Tensor {
        let (query, projected) = (self.to_q.forward(tokens), self.to_kv.forward(text).chunk(2, -1));
        self.to_out.forward(&attention(&query, &projected[0], &projected[1], self.heads, bias, false))
    }
}

/// A feed-forward layer of four times the width, gated by an exact (erf) GELU.
struct GegluFeedForward {
    proj: Linear,
    out: Linear,
}

impl GegluFeedForward {
    const EXPANSION: i64 = 4;

    fn new(scope: Scope, width: i64) -> Self {
        let inner = Self::EXPANSION * width;
        // `proj` makes values and gates at once. Key 1 of the sequence is the dropout, which has no weights.
        Self { proj: Linear::new(&scope / 0 / "proj", width, 2 * inner, true), out: Linear::new(&scope / 2, inner, width, true) }
    }

    fn forward(&self, tokens: &Tensor) -> Tensor {
        let projected = self.proj.forward(tokens);
        let inner = projected.size()[2] / 2;
        let (value, gate) = (projected.narrow(-1, 0, inner), projected.narrow(-1, inner, inner));
        self.out.forward(&(value * gate.gelu("none")))
    }
}
