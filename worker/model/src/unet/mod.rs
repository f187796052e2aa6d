//! The denoising UNet of SDXL and its relatives (SD1.5, SSD-1B, inpainting), in the layout of diffusers.
//!
//! One frozen network serves as teacher and as student; beside its prediction it returns the outputs of its blocks, which the
//! distillation compares.

mod attention;
mod blocks;
mod config;
mod embedding;
mod pass;
mod trunk;

use std::path::Path;

use tch::{Device, Kind, Tensor, no_grad_guard};

use self::attention::TextProjection;
pub(crate) use self::blocks::Condition;
use self::blocks::{Output, Unit, UpBlock};
pub(crate) use self::config::SUPPORTED;
pub use self::config::{AdditionEmbedType, DownBlockType, MidBlockType, UNetConfig, UpBlockType};
pub(crate) use self::pass::Pass;
use self::pass::{ConditionGradients, vector_jacobian, walk_back};
pub(crate) use self::trunk::Trunk;
use self::trunk::{resnet_spec, transformer_specs};
use crate::controlnet::ControlResiduals;
use crate::weights::{Scope, Weights};
use crate::{Error, Result};

/// Width of the time embedding in units of the outermost level's channels.
const TIME_EXPANSION: i64 = 4;

/// A frozen UNet.
pub struct UNet {
    trunk: Trunk,
    up: Vec<UpBlock>,
    output: Output,
    text_projection: Option<TextProjection>,
}

/// What a forward pass is called in errors.
const WHAT: &str = "UNet::forward";

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
        let up_layers = config.up_layers(&levels)?;

        // 1. Embeddings, input, down, mid.
        let mut trunk = Trunk::new(scope, config)?;
        let config = &trunk.config;
        let first = config.block_out_channels[0];
        let resnet = resnet_spec(config, first);
        let mut channels = config.block_out_channels[levels.len() - 1];

        // 2. Up, consuming the skips.
        let mut skips = trunk.skip_channels().to_vec();
        let mut up = Vec::new();
        for (index, (level, layers)) in levels.iter().rev().zip(&up_layers).enumerate() {
            let scope = scope / "up_blocks" / index;
            let attention = transformer_specs(config, level, layers.as_deref(), level.num_resnets + 1);
            let upsample = index + 1 < levels.len();
            up.push(UpBlock::new(&scope, channels, level.channels, &resnet, &attention, upsample, &mut skips));
            channels = level.channels;
        }

        // 3. Output.
        let output = Output::new(scope, first, config.out_channels, &resnet);

        // 4. What all layers make of the text.
        let layers = trunk.cross_attentions().chain(up.iter_mut().flat_map(UpBlock::cross_attentions));
        let text_projection = TextProjection::gather(layers);
        Ok(Self { trunk, up, output, text_projection })
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
        self.trunk.config()
    }

    /// The kind of the weights, in which everything but the sinusoids is computed.
    pub fn kind(&self) -> Kind {
        self.trunk.kind()
    }

    /// Width of the text states it attends to.
    pub fn text_width(&self) -> i64 {
        self.trunk.text_width()
    }

    /// Width of the pooled text it takes; `None` if it takes none.
    pub fn pooled_width(&self) -> Option<i64> {
        self.trunk.pooled_width()
    }

    /// Number of features a forward pass returns.
    pub fn num_features(&self) -> usize {
        self.trunk.down.len() + usize::from(self.trunk.mid.is_some()) + self.up.len()
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
        self.trunk.check(WHAT, sample, timesteps, text, added)?;
        let (sample, text) = (sample.to_kind(self.kind()), text.to_kind(self.kind()));
        let (time, bias) = (self.trunk.time(timesteps, added), self.trunk.attention_bias(WHAT, &text, options.mask)?);
        let projected = self.text_projection.as_ref().map_or_else(Vec::new, |projection| projection.forward(&text));
        let condition = Condition { time: &time, text: &text, projected: &projected, bias: bias.as_ref() };
        let mut pass = Pass::new(condition, self.trunk.input(&sample));
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
        self.trunk.check(WHAT, sample, timesteps, text, added)?;
        let (sample, text) = (sample.to_kind(self.kind()), text.detach().to_kind(self.kind()));
        let bias = self.trunk.attention_bias(WHAT, &text, mask)?;
        let added =
            added.map(|added| Added { pooled: added.pooled.detach().set_requires_grad(true), time_ids: added.time_ids.shallow_clone() });

        // 1. Forward, with a memory instead of a graph. The time embedding is cheap: it keeps its graph.
        let graph_of_time = self.trunk.time(timesteps, added.as_ref());
        let time = graph_of_time.detach();
        let (pass, output) = {
            let _guard = no_grad_guard();
            let condition = Condition { time: &time, text: &text, projected: &[], bias: bias.as_ref() };
            let mut pass = Pass::remembering(condition, self.trunk.input(&sample));
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

    /// Everything between the first convolution and the prediction.
    fn walk<'a>(&'a self, pass: &mut Pass<'a>, control: Option<&ControlResiduals>) -> Result<()> {
        // 1. Down, and the mid block.
        self.trunk.walk(pass);

        // 2. What a ControlNet adds.
        if let Some(ControlResiduals { down, mid }) = control {
            let fits = |(here, residual): (&Tensor, &Tensor)| here.size() == residual.size();
            if down.len() != pass.skips().len() || !pass.skips().zip(down).all(fits) || !fits((pass.hidden(), mid)) {
                let detail = format!("{} residuals for {} skip connections, or of other sizes", down.len(), pass.skips().len());
                return Err(Error::Shape { what: "ControlNet residuals", detail });
            }
            pass.add_to_skips(down);
            pass.add(mid);
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
}

#[cfg(test)]
mod tests;
