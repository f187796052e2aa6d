//! The autoencoder's configuration, as diffusers writes it.

use std::path::Path;

use serde::Deserialize;
use serde_json::Value;

use crate::Result;
use crate::config::{Supported, faulty, num_layers, parse_config, read_config, width};

/// The settings of an `AutoencoderKL` that shape it; the defaults are those of diffusers.
#[derive(Debug, Clone, Deserialize)]
#[serde(default)]
pub struct VaeConfig {
    /// Channels of images.
    pub in_channels: i64,
    /// Channels of decoded images.
    pub out_channels: i64,
    /// Channels of latents.
    pub latent_channels: i64,
    /// Channels of each level, from the outermost.
    pub block_out_channels: Vec<i64>,
    /// Kinds of the encoder's blocks, one a level.
    pub down_block_types: Vec<DownBlockType>,
    /// Kinds of the decoder's blocks, one a level.
    pub up_block_types: Vec<UpBlockType>,
    /// Residual blocks a level in the encoder; one more in the decoder.
    pub layers_per_block: i64,
    /// Groups of all group norms.
    pub norm_num_groups: i64,
    /// Factor from latents to what the diffusion model sees.
    pub scaling_factor: f64,
    /// Whether the network overflows in f16 and must run in f32 where the others are halves.
    pub force_upcast: bool,
    /// Whether the innermost blocks have attention.
    pub mid_block_add_attention: bool,
    /// Whether a 1x1 convolution follows the encoder.
    pub use_quant_conv: bool,
    /// Whether a 1x1 convolution precedes the decoder.
    pub use_post_quant_conv: bool,
}

/// A level of the encoder.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub enum DownBlockType {
    /// Residual blocks only.
    DownEncoderBlock2D,
}

/// A level of the decoder.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub enum UpBlockType {
    /// Residual blocks only.
    UpDecoderBlock2D,
}

/// Settings that change the network in ways not computed here, with the values that leave it as it is.
const SUPPORTED: &[Supported] =
    &[("act_fn", r#"["silu", "swish"]"#), ("latents_mean", "[null]"), ("latents_std", "[null]"), ("shift_factor", "[null, 0, 0.0]")];

impl Default for VaeConfig {
    fn default() -> Self {
        Self {
            in_channels: 3,
            out_channels: 3,
            latent_channels: 4,
            block_out_channels: vec![64],
            down_block_types: vec![DownBlockType::DownEncoderBlock2D],
            up_block_types: vec![UpBlockType::UpDecoderBlock2D],
            layers_per_block: 1,
            norm_num_groups: 32,
            scaling_factor: 0.18215,
            force_upcast: true,
            mid_block_add_attention: true,
            use_quant_conv: true,
            use_post_quant_conv: true,
        }
    }
}

impl VaeConfig {
    /// Reads a `config.json`.
    ///
    /// Errors: [`Error::Io`](crate::Error::Io), [`Error::Invalid`](crate::Error::Invalid) for damaged JSON or unknown block kinds,
    /// [`Error::Unsupported`](crate::Error::Unsupported) for a setting whose value is not computed.
    pub fn read(path: &Path) -> Result<Self> {
        read_config(path, SUPPORTED)
    }

    /// As [`VaeConfig::read`], of settings that came from elsewhere; `path` names them in errors.
    pub(crate) fn parse(path: &Path, settings: Value) -> Result<Self> {
        parse_config(path, settings, SUPPORTED)
    }

    /// Checks that the settings fit together; returns the number of residual blocks a level of the encoder has.
    pub(super) fn check(&self) -> Result<usize> {
        let levels = self.block_out_channels.len();
        let (down, up) = (self.down_block_types.len(), self.up_block_types.len());
        if !(1..=MAX_LEVELS).contains(&levels) || down != levels || up != levels {
            let reason = format!("{levels} levels (of 1 to {MAX_LEVELS}), {down} down_block_types, {up} up_block_types");
            return Err(faulty("block_out_channels", reason));
        }
        for &channels in &self.block_out_channels {
            width("block_out_channels", channels)?;
            if self.norm_num_groups < 1 || channels % self.norm_num_groups != 0 {
                let reason = format!("{channels} channels cannot be split into {}", self.norm_num_groups);
                return Err(faulty("norm_num_groups", reason));
            }
        }
        width("in_channels", self.in_channels)?;
        width("out_channels", self.out_channels)?;
        width("latent_channels", self.latent_channels)?;
        if !(self.scaling_factor.is_finite() && self.scaling_factor > 0.0) {
            return Err(faulty("scaling_factor", format!("{} is not positive", self.scaling_factor)));
        }
        num_layers("layers_per_block", self.layers_per_block, 1)
    }
}

/// Each level halves the size, so more than this many would leave nothing of any image.
const MAX_LEVELS: usize = 16;
