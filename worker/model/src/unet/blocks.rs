//! The blocks of the U: down, mid, up.

use tch::Tensor;

use super::attention::{SpatialTransformer, TransformerSpec};
use crate::nn::{Conv2d, ResnetBlock, ResnetSpec, upsample_nearest};
use crate::weights::Scope;

/// What every block of a forward pass sees beside its input.
#[derive(Clone, Copy)]
pub(super) struct Condition<'a> {
    /// Time embedding after its SiLU `[B, T]`.
    pub time: &'a Tensor,
    /// Text states `[B, L, D]`.
    pub text: &'a Tensor,
}

/// A residual block and, where the level has attention, the transformer behind it.
struct Stage {
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
            Some(attention) => attention.forward(&hidden, condition.text),
            None => hidden,
        }
    }
}

/// One level on the way down.
pub(super) struct DownBlock {
    stages: Vec<Stage>,
    /// 3x3 convolution of stride 2; the innermost level has none.
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

    /// Appends the skip connections to `skips`; returns the block's output.
    pub fn forward(&self, input: &Tensor, condition: Condition, skips: &mut Vec<Tensor>) -> Tensor {
        let mut hidden = input.shallow_clone();
        for stage in &self.stages {
            hidden = stage.forward(&hidden, condition);
            skips.push(hidden.shallow_clone());
        }
        if let Some(downsampler) = &self.downsampler {
            hidden = downsampler.forward(&hidden);
            skips.push(hidden.shallow_clone());
        }
        hidden
    }
}

/// The innermost block: a stage, and with attention one more residual block behind it.
pub(super) struct MidBlock {
    first: Stage,
    second: Option<ResnetBlock>,
}

impl MidBlock {
    pub fn new(scope: &Scope, channels: i64, resnet: &ResnetSpec, attention: Option<TransformerSpec>) -> Self {
        let second = attention.map(|_| ResnetBlock::new(&(scope / "resnets" / 1), channels, channels, resnet));
        Self { first: Stage::new(scope, 0, channels, channels, resnet, attention), second }
    }

    pub fn forward(&self, input: &Tensor, condition: Condition) -> Tensor {
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
    /// 3x3 convolution after the doubling of the size; the outermost level has none.
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

    /// Takes the skip connections it consumes off the end of `skips`; returns the block's output.
    pub fn forward(&self, input: &Tensor, condition: Condition, skips: &mut Vec<Tensor>) -> Tensor {
        let mut hidden = input.shallow_clone();
        for stage in &self.stages {
            let joined = match skips.pop() {
                Some(skip) => Tensor::cat(&[&hidden, &skip], 1),
                None => hidden,
            };
            hidden = stage.forward(&joined, condition);
        }
        let Some(upsampler) = &self.upsampler else { return hidden };
        let (_, _, height, width) = hidden.size4().unwrap_or_default();
        // The next skip has the size that the downsampling halved; with an odd size, that is not twice the half.
        let size = skips.last().and_then(|skip| skip.size4().ok()).map_or([2 * height, 2 * width], |(_, _, height, width)| [height, width]);
        upsampler.forward(&upsample_nearest(&hidden, size))
    }
}
