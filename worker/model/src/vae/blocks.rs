//! Encoder and decoder.

use tch::{Kind, Tensor};

use super::VaeConfig;
use crate::nn::{Conv2d, GroupNorm, Linear, ResnetBlock, ResnetSpec, attention, upsample_nearest};
use crate::weights::Scope;

/// Epsilon of all group norms, fixed in diffusers.
const NORM_EPS: f64 = 1e-6;
/// The widest head that cuDNN's attention and FlashAttention take; libtorch has none for wider ones but its slowest.
const WIDEST_HEAD: i64 = 256;
/// Scores that are held at a time, in f32: half a gigabyte.
const MAX_SCORES: i64 = 1 << 27;

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

/// One row below and one column to the right, of zeros, none on the other sides: the original's padding. libtorch's own operator fills all
/// of the map with them first.
fn pad(map: &Tensor) -> Tensor {
    let size = map.size();
    let (height, width) = (size[2], size[3]);
    let padded = Tensor::empty([size[0], height + 1, width + 1, size[1]], (map.kind(), map.device())).permute([0, 3, 1, 2]);
    padded.narrow(2, 0, height).narrow(3, 0, width).copy_(map);
    let _ = padded.narrow(2, height, 1).zero_();
    let _ = padded.narrow(3, width, 1).zero_();
    padded
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
                hidden = downsampler.forward(&pad(&hidden));
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
        let is_too_wide = input.size()[1] > WIDEST_HEAD && input.device().is_cuda();
        let attended = match is_too_wide && !query.requires_grad() {
            true => attention_in_parts(&query, &key, &value, MAX_SCORES),
            false => attention(&query, &key, &value, 1, None, false),
        };
        let attended = self.out.forward(&attended);
        attended.transpose(1, 2).reshape(input.size()) + input
    }
}

/// Attention of one head as two products with the softmax between them, so many scores at a time. Scores and their softmax are in f32,
/// whatever the kind. Knows no way back.
///
/// Shapes: `query` `[B, Q, width]`, `key` and `value` `[B, K, width]`; returns `[B, Q, width]`.
fn attention_in_parts(query: &Tensor, key: &Tensor, value: &Tensor, max_scores: i64) -> Tensor {
    let (size, num_keys) = (query.size(), key.size()[1]);
    let (batch, num_queries) = (size[0], size[1]);
    let query = query * (size[2] as f64).powf(-0.5);
    let samples = (max_scores / (num_queries * num_keys).max(1)).clamp(1, batch.max(1));
    // Of a single sample, where that has more scores already.
    let rows = (max_scores / num_keys.max(1)).clamp(1, num_queries.max(1));
    let output = query.empty_like();
    let starts = |end: i64, step: i64| (0..end).step_by(step as usize).map(move |start| (start, step.min(end - start)));
    for (first, count) in starts(batch, samples) {
        let part = |tensor: &Tensor| tensor.narrow(0, first, count);
        let (query, output, key, value) = (part(&query), part(&output), part(key).transpose(1, 2), part(value));
        for (first, count) in starts(num_queries, rows) {
            let weights = product_in_f32(&query.narrow(1, first, count), &key).softmax(-1, Kind::Float);
            output.narrow(1, first, count).copy_(&weights.to_kind(value.kind()).bmm(&value));
        }
    }
    output
}

/// The products of two batches of matrices, in f32.
fn product_in_f32(left: &Tensor, right: &Tensor) -> Tensor {
    if left.kind() == Kind::Float {
        return left.bmm(right);
    }
    // A GPU's own sums are in f32: they are not rounded on their way out. Processors have no such product.
    left.f_bmm_dtype(right, Kind::Float).unwrap_or_else(|_| left.to_kind(Kind::Float).bmm(&right.to_kind(Kind::Float)))
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;

    fn numbers(shape: &[i64], speed: f64, kind: Kind) -> Tensor {
        let count: i64 = shape.iter().product();
        (Tensor::arange(count, (Kind::Double, Device::Cpu)) * speed).sin().reshape(shape).to_kind(kind) * 1.5
    }

    /// Several samples at a time, one, and parts of one; in bf16 up to the rounding of queries, weights and results.
    #[test]
    fn attention_in_parts_is_attention() {
        for (kind, tolerance) in [(Kind::Float, 1e-6), (Kind::BFloat16, 2e-2), (Kind::Half, 2e-3)] {
            let states = |speed| numbers(&[3, 20, 512], speed, kind);
            let (query, key, value) = (states(0.7), states(1.3), states(0.11));
            let [query32, key32, value32] = [&query, &key, &value].map(|tensor| tensor.to_kind(Kind::Float));
            let wanted = attention(&query32, &key32, &value32, 1, None, false);
            for max_scores in [MAX_SCORES, 2 * 400, 400, 7 * 20, 1] {
                let got = attention_in_parts(&query, &key, &value, max_scores);
                assert_eq!((got.kind(), got.size()), (kind, vec![3, 20, 512]));
                let difference = (got.to_kind(Kind::Float) - &wanted).abs().max().double_value(&[]) / wanted.abs().max().double_value(&[]);
                assert!(difference < tolerance, "{kind:?}, {max_scores} scores: {difference}");
            }
        }
    }

    #[test]
    fn padding_is_a_row_and_a_column_of_zeros_with_the_channels_last() {
        let map = numbers(&[2, 5, 6, 3], 0.9, Kind::Float).permute([0, 3, 1, 2]);
        let padded = pad(&map);
        assert_eq!(padded, map.constant_pad_nd([0, 1, 0, 1]));
        assert!(padded.permute([0, 2, 3, 1]).is_contiguous());
    }
}
