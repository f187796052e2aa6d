//! The denoising UNet of SDXL and its relatives (SD1.5, SSD-1B, inpainting), in the layout of diffusers.
//!
//! One frozen network serves as teacher and as student; beside its prediction it returns the outputs of its blocks, which the
//! distillation compares.

mod attention;
mod blocks;
mod config;
mod embedding;
mod trunk;

use std::path::Path;

use tch::{Device, Kind, Tensor};

use self::blocks::{Condition, UpBlock};
pub(crate) use self::config::SUPPORTED;
pub use self::config::{AdditionEmbedType, DownBlockType, MidBlockType, UNetConfig, UpBlockType};
pub(crate) use self::trunk::Trunk;
use self::trunk::{resnet_spec, transformer_specs};
use crate::Result;
use crate::nn::{Conv2d, GroupNorm};
use crate::weights::{Scope, Weights};

/// Width of the time embedding in units of the outermost level's channels.
const TIME_EXPANSION: i64 = 4;

/// A frozen UNet.
pub struct UNet {
    trunk: Trunk,
    up: Vec<UpBlock>,
    conv_norm_out: GroupNorm,
    conv_out: Conv2d,
}

/// What SDXL's UNet is told beside the token states.
#[derive(Debug)]
pub struct Added {
    /// Pooled text `[B, pooled width]`.
    pub pooled: Tensor,
    /// Six time ids an image `[B, 6]`: original size, crop corner, target size; any kind.
    pub time_ids: Tensor,
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
    /// Errors: [`crate::Error::Config`] if settings contradict each other.
    pub fn new(scope: &Scope, config: UNetConfig) -> Result<Self> {
        let levels = config.levels()?;
        let up_layers = config.up_layers(&levels)?;

        // 1. Embeddings, input, down, mid.
        let trunk = Trunk::new(scope, config)?;
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
        let conv_norm_out = GroupNorm::new(scope / "conv_norm_out", config.norm_num_groups, first, config.norm_eps);
        let conv_out = Conv2d::new(scope / "conv_out", first, config.out_channels, 3, 1, 1);
        Ok(Self { trunk, up, conv_norm_out, conv_out })
    }

    /// Number of parameters of a network with this configuration; nothing is allocated.
    ///
    /// Errors: [`crate::Error::Config`] if settings contradict each other.
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
    /// Errors: [`crate::Error::Shape`] if the shapes do not fit each other or the network, or if `added` is missing or superfluous.
    pub fn forward(&self, sample: &Tensor, timesteps: &Tensor, text: &Tensor, added: Option<&Added>) -> Result<UNetOutput> {
        self.trunk.check("UNet::forward", sample, timesteps, text, added)?;
        let (sample, text) = (sample.to_kind(self.kind()), text.to_kind(self.kind()));

        // 1. Time.
        let time = self.trunk.time(timesteps, added);
        let condition = Condition { time: &time, text: &text };
        let mut features = Vec::with_capacity(self.num_features());

        // 2. Down.
        let mut hidden = self.trunk.input(&sample);
        let mut skips = vec![hidden.shallow_clone()];
        for block in &self.trunk.down {
            hidden = block.forward(&hidden, condition, &mut skips);
            features.push(hidden.shallow_clone());
        }

        // 3. Mid.
        if let Some(mid) = &self.trunk.mid {
            hidden = mid.forward(&hidden, condition);
            features.push(hidden.shallow_clone());
        }

        // 4. Up.
        for block in &self.up {
            hidden = block.forward(&hidden, condition, &mut skips);
            features.push(hidden.shallow_clone());
        }

        // 5. Output.
        let sample = self.conv_out.forward(&self.conv_norm_out.forward(&hidden).silu());
        Ok(UNetOutput { sample, features })
    }
}

#[cfg(test)]
mod tests;
