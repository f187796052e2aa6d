//! The blocks of the U: down, mid, up. Each hands its units to a [`Pass`] in the order they are computed in.

use tch::Tensor;

use super::attention::{CrossAttention, SpatialTransformer, TransformerSpec};
use super::pass::Pass;
use crate::nn::{Conv2d, GroupNorm, ResnetBlock, ResnetSpec, upsample_nearest};
use crate::weights::Scope;

/// What every unit of a forward pass sees beside its input.
#[derive(Clone, Copy)]
pub(crate) struct Condition<'a> {
    /// Time embedding after its SiLU `[B, T]`.
    pub time: &'a Tensor,
    /// Text states `[B, L, D]`.
    pub text: &'a Tensor,
    /// Keys and values of the text for every layer of cross-attention, by its slot; empty: each layer projects the text itself.
    pub projected: &'a [Tensor],
    /// Added to the scores of cross-attention, `[B, 1, 1, L]`; `None` hides nothing.
    pub bias: Option<&'a Tensor>,
}

/// A part of the network that is computed at once. A pass that recomputes keeps what lies between units and nothing within.
#[derive(Clone, Copy)]
pub(super) enum Unit<'a> {
    Stage(&'a Stage),
    /// 3x3 convolution of stride 2.
    Downsample(&'a Conv2d),
    Mid(&'a MidBlock),
    /// Enlarged to exactly this height and width, then a 3x3 convolution.
    Upsample {
        conv: &'a Conv2d,
        size: [i64; 2],
    },
    Output(&'a Output),
}

impl Unit<'_> {
    /// `skip` is joined to the input along the channels.
    pub fn forward(self, input: &Tensor, skip: Option<&Tensor>, condition: Condition) -> Tensor {
        let joined = skip.map(|skip| Tensor::cat(&[input, skip], 1));
        let input = joined.as_ref().unwrap_or(input);
        match self {
            Self::Stage(stage) => stage.forward(input, condition),
            Self::Downsample(conv) => conv.forward(input),
            Self::Mid(mid) => mid.forward(input, condition),
            Self::Upsample { conv, size } => conv.forward(&upsample_nearest(input, size)),
            Self::Output(output) => output.forward(input),
        }
    }
}

/// A residual block and, where the level has attention, the transformer behind it.
pub(super) struct Stage {
    resnet: ResnetBlock,
    attention: Option<SpatialTransformer>,
}

impl Stage {
    /// The `index`-th stage of the block at `scope`.
    fn new(scope: &Scope, index: usize, inputs: i64, outputs: i64, resnet: &ResnetSpec, attention: Option<TransformerSpec>) -> Self {
        Self {
            resnet: ResnetBlock::new(&(scope / "resnets" / index), inputs, outputs, resnet),
            attention: attention.map(|spec| SpatialTransformer::new(&(scope / "attentions" / index), &spec)),
        }
    }

    fn forward(&self, input: &Tensor, condition: Condition) -> Tensor {
        let hidden = self.resnet.forward(input, Some(condition.time));
        match &self.attention {
            Some(attention) => attention.forward(&hidden, condition),
            None => hidden,
        }
    }
}

fn cross_attentions(stages: &mut [Stage]) -> impl Iterator<Item = &mut CrossAttention> {
    stages.iter_mut().filter_map(|stage| stage.attention.as_mut()).flat_map(SpatialTransformer::cross_attentions)
}

/// One level on the way down.
pub(crate) struct DownBlock {
    stages: Vec<Stage>,
    /// The innermost level has none.
    downsampler: Option<Conv2d>,
}

impl DownBlock {
    /// `attention` has one entry a residual block. Appends the channels of each skip connection to `skips`.
    pub fn new(
        scope: &Scope,
        inputs: i64,
        outputs: i64,
        resnet: &ResnetSpec,
        attention: &[Option<TransformerSpec>],
        downsample: bool,
        skips: &mut Vec<i64>,
    ) -> Self {
        let input_of = |index| if index == 0 { inputs } else { outputs };
        let stages = attention.iter().enumerate().map(|(index, &spec)| Stage::new(scope, index, input_of(index), outputs, resnet, spec));
        let stages: Vec<_> = stages.collect();
        let downsampler = downsample.then(|| Conv2d::new(scope / "downsamplers" / 0 / "conv", outputs, outputs, 3, 2, 1));
        skips.extend(vec![outputs; stages.len() + usize::from(downsample)]);
        Self { stages, downsampler }
    }

    /// The layers that attend to the text.
    pub fn cross_attentions(&mut self) -> impl Iterator<Item = &mut CrossAttention> {
        cross_attentions(&mut self.stages)
    }

    /// Every unit's output becomes a skip connection; the last one is the block's.
    pub fn walk<'a>(&'a self, pass: &mut Pass<'a>) {
        for stage in &self.stages {
            pass.apply(Unit::Stage(stage));
            pass.keep_skip();
        }
        if let Some(downsampler) = &self.downsampler {
            pass.apply(Unit::Downsample(downsampler));
            pass.keep_skip();
        }
    }
}

/// The innermost block: a stage, and with attention one more residual block behind it.
pub(crate) struct MidBlock {
    first: Stage,
    second: Option<ResnetBlock>,
}

impl MidBlock {
    pub fn new(scope: &Scope, channels: i64, resnet: &ResnetSpec, attention: Option<TransformerSpec>) -> Self {
        let second = attention.map(|_| ResnetBlock::new(&(scope / "resnets" / 1), channels, channels, resnet));
        Self { first: Stage::new(scope, 0, channels, channels, resnet, attention), second }
    }

    /// The layers that attend to the text.
    pub fn cross_attentions(&mut self) -> impl Iterator<Item = &mut CrossAttention> {
        cross_attentions(std::slice::from_mut(&mut self.first))
    }

    pub fn walk<'a>(&'a self, pass: &mut Pass<'a>) {
        pass.apply(Unit::Mid(self));
    }

    fn forward(&self, input: &Tensor, condition: Condition) -> Tensor {
        let hidden = self.first.forward(input, condition);
        match &self.second {
            Some(resnet) => resnet.forward(&hidden, Some(condition.time)),
            None => hidden,
        }
    }
}

/// One level on the way up.
pub(super) struct UpBlock {
    stages: Vec<Stage>,
    /// The outermost level has none.
    upsampler: Option<Conv2d>,
}

impl UpBlock {
    /// `attention` has one entry a residual block. Takes the channels of the skip connections it consumes off the end of `skips`.
    pub fn new(
        scope: &Scope,
        inputs: i64,
        outputs: i64,
        resnet: &ResnetSpec,
        attention: &[Option<TransformerSpec>],
        upsample: bool,
        skips: &mut Vec<i64>,
    ) -> Self {
        let input_of = |index| if index == 0 { inputs } else { outputs };
        let mut stage = |(index, &spec): (usize, &Option<TransformerSpec>)| {
            // A level has one stage more than skips of its own: the last one belongs to the level above, or to the input convolution.
            let skip = skips.pop().unwrap_or(0);
            Stage::new(scope, index, input_of(index) + skip, outputs, resnet, spec)
        };
        let stages = attention.iter().enumerate().map(&mut stage).collect();
        Self { stages, upsampler: upsample.then(|| Conv2d::new(scope / "upsamplers" / 0 / "conv", outputs, outputs, 3, 1, 1)) }
    }

    /// The layers that attend to the text.
    pub fn cross_attentions(&mut self) -> impl Iterator<Item = &mut CrossAttention> {
        cross_attentions(&mut self.stages)
    }

    /// Every stage consumes the newest skip connection.
    pub fn walk<'a>(&'a self, pass: &mut Pass<'a>) {
        for stage in &self.stages {
            pass.apply_joined(Unit::Stage(stage));
        }
        if let Some(conv) = &self.upsampler {
            pass.apply(Unit::Upsample { conv, size: pass.size_above() });
        }
    }
}

/// The end of the network: from features to the prediction.
pub(super) struct Output {
    norm: GroupNorm,
    conv: Conv2d,
}

impl Output {
    pub fn new(scope: &Scope, inputs: i64, outputs: i64, resnet: &ResnetSpec) -> Self {
        Self {
            norm: GroupNorm::new(scope / "conv_norm_out", resnet.groups, inputs, resnet.eps),
            conv: Conv2d::new(scope / "conv_out", inputs, outputs, 3, 1, 1),
        }
    }

    fn forward(&self, input: &Tensor) -> Tensor {
        self.conv.forward(&self.norm.forward_silu(input))
    }
}
