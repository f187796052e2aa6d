//! Encoder and decoder.

use tch::Tensor;

use super::VaeConfig;
use crate::nn::{Conv2d, GroupNorm, Linear, ResnetBlock, ResnetSpec, attention, upsample_nearest};
use crate::weights::Scope;

/// Epsilon of all group norms, fixed in diffusers.
const NORM_EPS: f64 = 1e-6;

fn resnet_spec(config: &VaeConfig) -> ResnetSpec {
    ResnetSpec { groups: config.norm_num_groups, eps: NORM_EPS, time_width: None }
}

/// Residual blocks from `inputs` to `outputs` channels, the first of which makes the change.
fn resnets(scope: &Scope, inputs: i64, outputs: i64, count: usize, config: &VaeConfig) -> Vec<ResnetBlock> {
    let spec = resnet_spec(config);
    (0..count)
        .map(|index| ResnetBlock::new(&(scope / "resnets" / index), if index == 0 { inputs } else { outputs }, outputs, &spec))
        .collect()
}

fn forward_all(resnets: &[ResnetBlock], input: Tensor) -> Tensor {
    resnets.iter().fold(input, |hidden, resnet| resnet.forward(&hidden, None))
}

/// From images to the moments of latents.
pub(super) struct Encoder {
    conv_in: Conv2d,
    levels: Vec<(Vec<ResnetBlock>, Option<Conv2d>)>,
    mid: MidBlock,
    out: Output,
}

impl Encoder {
    pub fn new(scope: &Scope, config: &VaeConfig, num_resnets: usize) -> Self {
        let widths = &config.block_out_channels;
        let (first, last) = (widths[0], widths[widths.len() - 1]);
        let level = |(index, &width): (usize, &i64)| {
            let scope = scope / "down_blocks" / index;
            let inputs = widths[index.saturating_sub(1)];
            let is_last = index + 1 == widths.len();
            let downsampler = (!is_last).then(|| Conv2d::new(&scope / "downsamplers" / 0 / "conv", width, width, 3, 2, 0));
            (resnets(&scope, inputs, width, num_resnets, config), downsampler)
        };
        Self {
            conv_in: Conv2d::new(scope / "conv_in", config.in_channels, first, 3, 1, 1),
            levels: widths.iter().enumerate().map(level).collect(),
            mid: MidBlock::new(&(scope / "mid_block"), last, config),
            out: Output::new(scope, last, 2 * config.latent_channels, config),
        }
    }

    pub fn forward(&self, images: &Tensor) -> Tensor {
        let mut hidden = self.conv_in.forward(images);
        for (resnets, downsampler) in &self.levels {
            hidden = forward_all(resnets, hidden);
            if let Some(downsampler) = downsampler {
                // One row below and one column to the right, none on the other sides: the original's padding.
                hidden = downsampler.forward(&hidden.constant_pad_nd([0, 1, 0, 1]));
            }
        }
        self.out.forward(&self.mid.forward(hidden))
    }
}

/// From latents to images.
pub(super) struct Decoder {
    conv_in: Conv2d,
    mid: MidBlock,
    levels: Vec<(Vec<ResnetBlock>, Option<Conv2d>)>,
    out: Output,
}

impl Decoder {
    pub fn new(scope: &Scope, config: &VaeConfig, num_resnets: usize) -> Self {
        let widths: Vec<i64> = config.block_out_channels.iter().rev().copied().collect();
        let (first, last) = (widths[0], widths[widths.len() - 1]);
        let level = |(index, &width): (usize, &i64)| {
            let scope = scope / "up_blocks" / index;
            let inputs = widths[index.saturating_sub(1)];
            let is_last = index + 1 == widths.len();
            let upsampler = (!is_last).then(|| Conv2d::new(&scope / "upsamplers" / 0 / "conv", width, width, 3, 1, 1));
            (resnets(&scope, inputs, width, num_resnets, config), upsampler)
        };
        Self {
            conv_in: Conv2d::new(scope / "conv_in", config.latent_channels, first, 3, 1, 1),
            mid: MidBlock::new(&(scope / "mid_block"), first, config),
            levels: widths.iter().enumerate().map(level).collect(),
            out: Output::new(scope, last, config.out_channels, config),
        }
    }

    pub fn forward(&self, latents: &Tensor) -> Tensor {
        let mut hidden = self.mid.forward(self.conv_in.forward(latents));
        for (resnets, upsampler) in &self.levels {
            hidden = forward_all(resnets, hidden);
            if let Some(upsampler) = upsampler {
                let size = hidden.size();
                hidden = upsampler.forward(&upsample_nearest(&hidden, [2 * size[2], 2 * size[3]]));
            }
        }
        self.out.forward(&hidden)
    }
}

/// Group norm, SiLU and the last convolution.
struct Output {
    conv_norm_out: GroupNorm,
    conv_out: Conv2d,
}

impl Output {
    fn new(scope: &Scope, inputs: i64, outputs: i64, config: &VaeConfig) -> Self {
        Self {
            conv_norm_out: GroupNorm::new(scope / "conv_norm_out", config.norm_num_groups, inputs, NORM_EPS),
            conv_out: Conv2d::new(scope / "conv_out", inputs, outputs, 3, 1, 1),
        }
    }

    fn forward(&self, hidden: &Tensor) -> Tensor {
        self.conv_out.forward(&self.conv_norm_out.forward_silu(hidden))
    }
}

/// Attention between two residual blocks.
struct MidBlock {
    first: ResnetBlock,
    attention: Option<PixelAttention>,
    second: ResnetBlock,
}

impl MidBlock {
    fn new(scope: &Scope, channels: i64, config: &VaeConfig) -> Self {
        let resnet = |index: usize| ResnetBlock::new(&(scope / "resnets" / index), channels, channels, &resnet_spec(config));
        let attention = || PixelAttention::new(&(scope / "attentions" / 0), channels, config.norm_num_groups);
        Self { first: resnet(0), attention: config.mid_block_add_attention.then(attention), second: resnet(1) }
    }

    fn forward(&self, input: Tensor) -> Tensor {
        let mut hidden = self.first.forward(&input, None);
        if let Some(attention) = &self.attention {
            hidden = attention.forward(&hidden);
        }
        self.second.forward(&hidden, None)
    }
}

/// Single-head self-attention over pixels, beside a shortcut.
struct PixelAttention {
    group_norm: GroupNorm,
    query: Linear,
    key: Linear,
    value: Linear,
    out: Linear,
}

impl PixelAttention {
    /// Reads the key names of today's diffusers or, where they are present, those of before version 0.18 (`query`, `proj_attn`).
    fn new(scope: &Scope, channels: i64, groups: i64) -> Self {
        let is_old = (scope / "query").has("weight");
        let linear = |scope: Scope| Linear::new(scope, channels, channels, true);
        let [query, key, value] = if is_old { ["query", "key", "value"] } else { ["to_q", "to_k", "to_v"] };
        Self {
            group_norm: GroupNorm::new(scope / "group_norm", groups, channels, NORM_EPS),
            query: linear(scope / query),
            key: linear(scope / key),
            value: linear(scope / value),
            out: linear(if is_old { scope / "proj_attn" } else { scope / "to_out" / 0 }),
        }
    }

    fn forward(&self, input: &Tensor) -> Tensor {
        let tokens = self.group_norm.forward(input).flatten(2, 3).transpose(1, 2);
        let (query, key, value) = (self.query.forward(&tokens), self.key.forward(&tokens), self.value.forward(&tokens));
        let attended = self.out.forward(&attention(&query, &key, &value, 1, None, false));
        attended.transpose(1, 2).reshape(input.size()) + input
    }
}
