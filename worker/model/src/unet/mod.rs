//! The denoising UNet of SDXL and its relatives (SD1.5, SSD-1B, inpainting), in the layout of diffusers.
//!
//! One frozen network serves as teacher and as student; beside its prediction it returns the outputs of its blocks, which the
//! distillation compares.

mod attention;
mod blocks;
mod config;
mod embedding;
mod pass;

use std::path::Path;

use tch::{Device, Kind, Tensor, no_grad_guard};

use self::attention::TransformerSpec;
use self::blocks::{Condition, DownBlock, MidBlock, Output, Unit, UpBlock};
pub use self::config::{AdditionEmbedType, DownBlockType, MidBlockType, UNetConfig, UpBlockType};
use self::config::{AdditionWidths, Level, NUM_TIME_IDS};
use self::embedding::{EmbeddingMlp, sinusoids};
use self::pass::{ConditionGradients, Pass, vector_jacobian, walk_back};
use crate::config::faulty;
use crate::nn::{Conv2d, ResnetSpec};
use crate::weights::{Scope, Weights};
use crate::{Error, Result};

/// Width of the time embedding in units of the outermost level's channels.
const TIME_EXPANSION: i64 = 4;

/// A frozen UNet.
pub struct UNet {
    config: UNetConfig,
    time_embedding: EmbeddingMlp,
    addition: Option<AdditionEmbedding>,
    conv_in: Conv2d,
    down: Vec<DownBlock>,
    mid: Option<MidBlock>,
    up: Vec<UpBlock>,
    output: Output,
    text_width: i64,
    kind: Kind,
}

/// SDXL's embedding of pooled text and time ids.
struct AdditionEmbedding {
    mlp: EmbeddingMlp,
    widths: AdditionWidths,
}

/// What SDXL's UNet is told beside the token states.
#[derive(Debug)]
pub struct Added {
    /// Pooled text `[B, pooled width]`.
    pub pooled: Tensor,
    /// Six time ids an image `[B, 6]`: original size, crop corner, target size; any kind.
    pub time_ids: Tensor,
}

/// What a forward pass may be told beyond its inputs.
#[derive(Debug, Clone, Copy, Default)]
pub struct ForwardOptions<'a> {
    /// The text states that are attended to, bool `[B, L]`; `None`: all of them, those of padding too.
    pub mask: Option<&'a Tensor>,
    /// What a ControlNet adds.
    pub control: Option<&'a ControlResiduals>,
}

/// What a ControlNet adds to the skip connections and to the innermost block's output.
#[derive(Debug)]
pub struct ControlResiduals {
    /// One for each skip connection, from the input convolution's on.
    pub down: Vec<Tensor>,
    /// For the innermost block.
    pub mid: Tensor,
}

/// What a forward pass gives.
#[derive(Debug)]
pub struct UNetOutput {
    /// The prediction `[B, out_channels, h, w]`.
    pub sample: Tensor,
    /// The outputs of the blocks in order: down from the outermost (after the downsampler, where there is one), mid, up from the
    /// innermost (after the upsampler). Not normalised.
    pub features: Vec<Tensor>,
}

/// Gradients of a loss with respect to what a UNet is told by the text, of the network's kind.
#[derive(Debug)]
pub struct TextGradients {
    /// Of the text states `[B, L, D]`; `None` if the loss does not depend on them.
    pub text: Option<Tensor>,
    /// Of the pooled text `[B, pooled width]`; `None` likewise, or where there is none.
    pub pooled: Option<Tensor>,
}

impl UNet {
    /// Loads a folder with `config.json` and weights.
    ///
    /// Errors: those of [`UNetConfig::read`], [`Weights::open`] and [`Weights::finish`].
    pub fn load(folder: &Path, kind: Kind, device: Device) -> Result<Self> {
        let config = UNetConfig::read(&folder.join("config.json"))?;
        let weights = Weights::open(folder)?;
        let unet = Self::new(&weights.root(kind, device), config)?;
        weights.finish(&[])?;
        Ok(unet)
    }

    /// Builds the network from the tensors below `scope`.
    ///
    /// Errors: [`Error::Config`] if settings contradict each other.
    pub fn new(scope: &Scope, config: UNetConfig) -> Result<Self> {
        let levels = config.levels()?;
        let (first, last) = match levels.as_slice() {
            [first, .., last] => (first.channels, last),
            [only] => (only.channels, only),
            [] => return Err(faulty("block_out_channels", "no levels")),
        };
        let time_width = TIME_EXPANSION * first;
        let resnet = ResnetSpec { groups: config.norm_num_groups, eps: config.norm_eps, time_width: Some(time_width) };
        let transformer = |level: &Level, num_layers: usize| TransformerSpec {
            channels: level.channels,
            heads: level.heads,
            context_width: level.context_width,
            num_layers,
            groups: config.norm_num_groups,
            linear_projection: config.use_linear_projection,
        };
        let transformers = |level: &Level, layers: &Option<Vec<usize>>, num_resnets: usize| match layers {
            Some(layers) => layers.iter().map(|&num_layers| Some(transformer(level, num_layers))).collect(),
            None => vec![None; num_resnets],
        };

        // 1. Embeddings and input.
        let time_embedding = EmbeddingMlp::new(scope / "time_embedding", first, time_width);
        let addition = config.addition_widths()?.map(|widths| {
            let mlp = EmbeddingMlp::new(scope / "add_embedding", widths.total, time_width);
            AdditionEmbedding { mlp, widths }
        });
        let conv_in = Conv2d::new(scope / "conv_in", config.in_channels, first, 3, 1, 1);

        // 2. Down, remembering the channels of each skip connection.
        let mut skips = vec![first];
        let mut channels = first;
        let mut down = Vec::new();
        for (index, level) in levels.iter().enumerate() {
            let scope = scope / "down_blocks" / index;
            let attention = transformers(level, &level.down, level.num_resnets);
            let downsample = index + 1 < levels.len();
            down.push(DownBlock::new(&scope, channels, level.channels, &resnet, &attention, downsample, &mut skips));
            channels = level.channels;
        }

        // 3. Mid.
        let mid_attention = match config.mid_block_type {
            Some(MidBlockType::UNetMidBlock2DCrossAttn) => Some(transformer(last, config.mid_transformer_layers()?)),
            Some(MidBlockType::UNetMidBlock2D) | None => None,
        };
        let mid = config.mid_block_type.map(|_| MidBlock::new(&(scope / "mid_block"), channels, &resnet, mid_attention));

        // 4. Up, consuming the skips.
        let mut up = Vec::new();
        for (index, level) in levels.iter().rev().enumerate() {
            let scope = scope / "up_blocks" / index;
            let attention = transformers(level, &level.up, level.num_resnets + 1);
            let upsample = index + 1 < levels.len();
            up.push(UpBlock::new(&scope, channels, level.channels, &resnet, &attention, upsample, &mut skips));
            channels = level.channels;
        }

        // 5. Output.
        let output = Output::new(scope, first, config.out_channels, &resnet);
        let text_width = last.context_width;
        Ok(Self { config, time_embedding, addition, conv_in, down, mid, up, output, text_width, kind: scope.kind() })
    }

    /// Number of parameters of a network with this configuration; nothing is allocated.
    ///
    /// Errors: [`Error::Config`] if settings contradict each other.
    pub fn count_parameters(config: &UNetConfig) -> Result<i64> {
        let nothing = Weights::none();
        Self::new(&nothing.root(Kind::Float, Device::Cpu), config.clone())?;
        Ok(nothing.num_requested())
    }

    /// The configuration.
    pub fn config(&self) -> &UNetConfig {
        &self.config
    }

    /// The kind of the weights, in which everything but the sinusoids is computed.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Width of the text states it attends to.
    pub fn text_width(&self) -> i64 {
        self.text_width
    }

    /// Width of the pooled text it takes; `None` if it takes none.
    pub fn pooled_width(&self) -> Option<i64> {
        self.addition.as_ref().map(|addition| addition.widths.pooled)
    }

    /// Number of features a forward pass returns.
    pub fn num_features(&self) -> usize {
        self.down.len() + usize::from(self.mid.is_some()) + self.up.len()
    }

    /// Predicts the noise in a sample (or whatever the network was trained to predict).
    ///
    /// Shapes: `sample` `[B, in_channels, h, w]`, `timesteps` `[B]`, `text` `[B, L, D]`; inputs of another kind are converted.
    /// Errors: [`Error::Shape`] if the shapes do not fit each other or the network, or if `added` is missing or superfluous.
    pub fn forward(&self, sample: &Tensor, timesteps: &Tensor, text: &Tensor, added: Option<&Added>) -> Result<UNetOutput> {
        self.forward_with(sample, timesteps, text, added, &ForwardOptions::default())
    }

    /// As [`UNet::forward`], with more to consider.
    ///
    /// Errors: those of [`UNet::forward`], also for options of other shapes.
    pub fn forward_with(
        &self,
        sample: &Tensor,
        timesteps: &Tensor,
        text: &Tensor,
        added: Option<&Added>,
        options: &ForwardOptions,
    ) -> Result<UNetOutput> {
        self.check(sample, timesteps, text, added)?;
        let (sample, text) = (sample.to_kind(self.kind), text.to_kind(self.kind));
        let (time, bias) = (self.time(timesteps, added), self.attention_bias(&text, options.mask)?);
        let mut pass = Pass::new(Condition { time: &time, text: &text, bias: bias.as_ref() }, self.conv_in.forward(&sample));
        self.walk(&mut pass, options.control)?;
        Ok(UNetOutput { sample: pass.hidden().shallow_clone(), features: pass.features() })
    }

    /// Computes what [`UNet::forward_with`] does without a graph: a backward pass then computes each unit again, so that only what lies
    /// between units is kept meanwhile.
    ///
    /// The result goes to `loss`, which makes a scalar of it; the gradients of text and pooled text come back with what else it returns.
    /// Errors: those of [`UNet::forward`] and of `loss`.
    pub fn recompute<T>(
        &self,
        sample: &Tensor,
        timesteps: &Tensor,
        text: &Tensor,
        added: Option<&Added>,
        mask: Option<&Tensor>,
        loss: impl FnOnce(&UNetOutput) -> Result<(Tensor, T)>,
    ) -> Result<(TextGradients, T)> {
        self.check(sample, timesteps, text, added)?;
        let (sample, text) = (sample.to_kind(self.kind), text.detach().to_kind(self.kind));
        let bias = self.attention_bias(&text, mask)?;
        let added =
            added.map(|added| Added { pooled: added.pooled.detach().set_requires_grad(true), time_ids: added.time_ids.shallow_clone() });

        // 1. Forward, with a memory instead of a graph. The time embedding is cheap: it keeps its graph.
        let graph_of_time = self.time(timesteps, added.as_ref());
        let time = graph_of_time.detach();
        let (pass, output) = {
            let _guard = no_grad_guard();
            let condition = Condition { time: &time, text: &text, bias: bias.as_ref() };
            let mut pass = Pass::remembering(condition, self.conv_in.forward(&sample));
            self.walk(&mut pass, None)?;
            let output = UNetOutput { sample: pass.hidden().shallow_clone(), features: pass.features() };
            (pass, output)
        };

        // 2. The loss of leaves that stand for the outputs.
        let leaf = |tensor: &Tensor| tensor.detach().set_requires_grad(true);
        let leaves = UNetOutput { sample: leaf(&output.sample), features: output.features.iter().map(leaf).collect() };
        drop(output);
        let (scalar, rest) = loss(&leaves)?;
        let inputs: Vec<&Tensor> = std::iter::once(&leaves.sample).chain(&leaves.features).collect();
        let mut gradients = Tensor::f_run_backward(&[&scalar], &inputs, false, false)?.into_iter();
        let of_sample = gradients.next().unwrap_or_default();

        // 3. Back through the units, and through the time embedding to the pooled text.
        let ConditionGradients { time: of_time, text } = walk_back(pass, of_sample, gradients.collect())?;
        let pooled = match (&added, of_time) {
            (Some(added), Some(gradient)) => vector_jacobian(&graph_of_time, &gradient, &[&added.pooled])?.pop(),
            _ => None,
        };
        Ok((TextGradients { text, pooled }, rest))
    }

    /// The time embedding with what is added to it, after the SiLU that every residual block begins with: applied once here.
    fn time(&self, timesteps: &Tensor, added: Option<&Added>) -> Tensor {
        let channels = self.config.block_out_channels[0];
        let time = self.time_embedding.forward(&sinusoids(timesteps, channels, &self.config).to_kind(self.kind));
        let time = match (&self.addition, added) {
            (Some(addition), Some(added)) => time + addition.forward(added, &self.config, self.kind),
            _ => time,
        };
        time.silu()
    }

    /// What hides the unmasked text states from cross-attention, `[B, 1, 1, L]`.
    fn attention_bias(&self, text: &Tensor, mask: Option<&Tensor>) -> Result<Option<Tensor>> {
        let Some(mask) = mask else { return Ok(None) };
        if mask.size() != text.size()[..2] || mask.kind() != Kind::Bool {
            let detail = format!("a mask of {:?} {:?} for text of {:?}", mask.kind(), mask.size(), text.size());
            return Err(Error::Shape { what: "UNet::forward", detail });
        }
        let shown = Tensor::zeros([], (self.kind, text.device()));
        Ok(Some(shown.where_scalarother(mask, f64::NEG_INFINITY).to_kind(self.kind).unsqueeze(1).unsqueeze(1)))
    }

    /// Everything between the first convolution and the prediction.
    fn walk<'a>(&'a self, pass: &mut Pass<'a>, control: Option<&ControlResiduals>) -> Result<()> {
        // 1. Down.
        for block in &self.down {
            block.walk(pass);
            pass.keep_feature();
        }
        if let Some(ControlResiduals { down, mid }) = control {
            let sizes_fit =
                down.len() == pass.skips().len() && pass.skips().zip(down).all(|(skip, residual)| skip.size() == residual.size());
            if !sizes_fit || mid.size() != pass.hidden().size() {
                let detail = format!("{} residuals for {} skip connections, or of other sizes", down.len(), pass.skips().len());
                return Err(Error::Shape { what: "ControlNet residuals", detail });
            }
        }

        // 2. Mid.
        if let Some(mid) = &self.mid {
            mid.walk(pass);
        }
        if let Some(ControlResiduals { down, mid }) = control {
            pass.add_to_skips(down);
            pass.add(mid);
        }
        if self.mid.is_some() {
            pass.keep_feature();
        }

        // 3. Up.
        for block in &self.up {
            block.walk(pass);
            pass.keep_feature();
        }

        // 4. Output.
        pass.apply(Unit::Output(&self.output));
        Ok(())
    }

    fn check(&self, sample: &Tensor, timesteps: &Tensor, text: &Tensor, added: Option<&Added>) -> Result<()> {
        let fault = |detail: String| Err(Error::Shape { what: "UNet::forward", detail });
        let (sample, text) = (sample.size(), text.size());
        let (&[batch, channels, _, _], &[text_batch, _, text_width]) = (sample.as_slice(), text.as_slice()) else {
            return fault(format!("sample {sample:?} and text {text:?}, wanted [B, C, h, w] and [B, L, D]"));
        };
        if channels != self.config.in_channels || text_width != self.text_width {
            return fault(format!(
                "{channels} channels and text of {text_width}, wanted {} and {}",
                self.config.in_channels, self.text_width
            ));
        }
        if text_batch != batch || timesteps.size() != [batch] {
            return fault(format!("text {text:?} and timesteps {:?} for {batch} samples", timesteps.size()));
        }
        match (&self.addition, added) {
            (None, None) => Ok(()),
            (Some(addition), Some(Added { pooled, time_ids }))
                if pooled.size() == [batch, addition.widths.pooled] && time_ids.size() == [batch, NUM_TIME_IDS] =>
            {
                Ok(())
            }
            (Some(addition), Some(Added { pooled, time_ids })) => fault(format!(
                "pooled {:?} and time ids {:?}, wanted [{batch}, {}] and [{batch}, {NUM_TIME_IDS}]",
                pooled.size(),
                time_ids.size(),
                addition.widths.pooled
            )),
            (Some(_), None) => fault("this network needs pooled text and time ids".into()),
            (None, Some(_)) => fault("this network takes no pooled text and time ids".into()),
        }
    }
}

impl AdditionEmbedding {
    fn forward(&self, added: &Added, config: &UNetConfig, kind: Kind) -> Tensor {
        let ids = sinusoids(&added.time_ids.flatten(0, 1), self.widths.time_id, config);
        let ids = ids.reshape([-1, NUM_TIME_IDS * self.widths.time_id]).to_kind(kind);
        self.mlp.forward(&Tensor::cat(&[added.pooled.to_kind(kind), ids], 1))
    }
}

#[cfg(test)]
mod tests;
