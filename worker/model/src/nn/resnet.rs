//! The residual block of the UNet and of the VAE.

use peapod_kernels::Kernels;
use tch::Tensor;

use super::{Conv2d, GroupNorm, Linear};
use crate::weights::{Frozen, Scope};

/// What is alike in all residual blocks of a model.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ResnetSpec {
    /// Groups of the group norms.
    pub groups: i64,
    /// Epsilon of the group norms.
    pub eps: f64,
    /// Width of the time embedding; `None` where there is none (the VAE).
    pub time_width: Option<i64>,
}

/// Two 3x3 convolutions, each behind group norm and SiLU, beside a shortcut; the time embedding is added between them.
///
/// Source: `ResnetBlock2D` of diffusers, `time_embedding_norm="default"`.
pub(crate) struct ResnetBlock {
    norm1: GroupNorm,
    conv1: Conv2d,
    time_emb_proj: Option<Linear>,
    norm2: GroupNorm,
    conv2: Conv2d,
    /// 1x1, where the number of channels changes.
    conv_shortcut: Option<Conv2d>,
    sum: BiasedSum,
}

/// The sum of both ways through a block, which were left without their biases if it adds these in the same walk over the map.
struct BiasedSum {
    /// The operator, and what it adds to each channel.
    fused: Option<(Kernels, Frozen)>,
}

impl BiasedSum {
    fn new(scope: &Scope, conv: &Conv2d, shortcut: Option<&Conv2d>) -> Self {
        let bias = || match shortcut {
            Some(shortcut) => &*conv.bias + &*shortcut.bias,
            None => conv.bias.shallow_clone(),
        };
        Self { fused: scope.kernels().map(|kernels| (kernels, Frozen::new(bias()))) }
    }

    /// `conv` of `hidden` beside `shortcut` of `input`.
    fn forward(&self, conv: &Conv2d, hidden: &Tensor, shortcut: Option<&Conv2d>, input: &Tensor) -> Tensor {
        let Some((kernels, bias)) = &self.fused else {
            let hidden = conv.forward(hidden);
            return shortcut.map_or_else(|| input + &hidden, |shortcut| shortcut.forward(input) + &hidden);
        };
        let hidden = conv.forward_unbiased(hidden).0;
        let beside = shortcut.map_or_else(|| input.shallow_clone(), |shortcut| shortcut.forward_unbiased(input).0);
        let sum = kernels.add_residual(&hidden, &beside, bias);
        sum.unwrap_or_else(|| hidden + beside + bias.reshape([-1, 1, 1]))
    }
}

impl ResnetBlock {
    pub fn new(scope: &Scope, inputs: i64, outputs: i64, spec: &ResnetSpec) -> Self {
        let conv2 = Conv2d::new(scope / "conv2", outputs, outputs, 3, 1, 1);
        let conv_shortcut = (inputs != outputs).then(|| Conv2d::new(scope / "conv_shortcut", inputs, outputs, 1, 1, 0));
        Self {
            norm1: GroupNorm::new(scope / "norm1", spec.groups, inputs, spec.eps),
            conv1: Conv2d::new(scope / "conv1", inputs, outputs, 3, 1, 1),
            time_emb_proj: spec.time_width.map(|width| Linear::new(scope / "time_emb_proj", width, outputs, true)),
            norm2: GroupNorm::new(scope / "norm2", spec.groups, outputs, spec.eps),
            sum: BiasedSum::new(scope, &conv2, conv_shortcut.as_ref()),
            conv2,
            conv_shortcut,
        }
    }

    /// Shapes: `input` `[B, inputs, H, W]`; `time`, after its SiLU (which all blocks share), `[B, time_width]`; returns
    /// `[B, outputs, H, W]`.
    pub fn forward(&self, input: &Tensor, time: Option<&Tensor>) -> Tensor {
        let normed = self.norm1.forward_silu(input);
        let time = self.time_emb_proj.as_ref().zip(time).map(|(projection, time)| projection.forward(time));
        let normed = if self.norm2.is_fused() {
            // One walk over the map adds the convolution's bias, too.
            let (hidden, bias) = self.conv1.forward_unbiased(&normed);
            let added = match time {
                Some(time) => time + bias,
                None => bias.expand([input.size()[0], -1], false).contiguous(),
            };
            self.norm2.forward_sum_silu(hidden, &added)
        } else {
            let hidden = self.conv1.forward(&normed);
            match time {
                Some(time) => self.norm2.forward_sum_silu(hidden, &time),
                None => self.norm2.forward_silu(&hidden),
            }
        };
        self.sum.forward(&self.conv2, &normed, self.conv_shortcut.as_ref(), input)
    }
}
