//! The ControlNet's configuration, as diffusers writes it.

use std::path::Path;

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::Result;
use crate::config::{Supported, faulty, parse_config, read_config, width};
use crate::unet::{SUPPORTED as UNET_SUPPORTED, UNetConfig};

/// The settings of a `ControlNetModel` that shape it; the defaults are those of diffusers.
#[derive(Debug, Clone, Deserialize)]
pub struct ControlNetConfig {
    /// The settings it shares with the UNet it steers. Those of the output and of the way up, which it lacks, are not looked at.
    #[serde(flatten)]
    pub unet: UNetConfig,
    /// Channels of control images.
    #[serde(default = "conditioning_channels")]
    pub conditioning_channels: i64,
    /// Channels of the layers that bring a control image to the size of the latents, from the outermost: each but the first halves the
    /// size.
    #[serde(default = "conditioning_embedding_out_channels")]
    pub conditioning_embedding_out_channels: Vec<i64>,
}

fn conditioning_channels() -> i64 {
    3
}

fn conditioning_embedding_out_channels() -> Vec<i64> {
    vec![16, 32, 96, 256]
}

/// Settings beyond the UNet's that change the network in ways not computed here, with the values that leave it as it is.
const SUPPORTED: &[Supported] = &[("controlnet_conditioning_channel_order", r#"["rgb"]"#), ("global_pool_conditions", "[false]")];

/// Most halvings of the control image: more would leave nothing of any image.
const MAX_HALVINGS: usize = 16;

impl Default for ControlNetConfig {
    fn default() -> Self {
        Self {
            unet: UNetConfig::default(),
            conditioning_channels: conditioning_channels(),
            conditioning_embedding_out_channels: conditioning_embedding_out_channels(),
        }
    }
}

impl ControlNetConfig {
    /// Reads a `config.json`.
    ///
    /// Errors: [`Error::Io`](crate::Error::Io), [`Error::Invalid`](crate::Error::Invalid) for damaged JSON or unknown block kinds,
    /// [`Error::Unsupported`](crate::Error::Unsupported) for a setting whose value is not computed.
    pub fn read(path: &Path) -> Result<Self> {
        let mut settings: Map<String, Value> = read_config(path, &[])?;
        // A ControlNet may say the number of heads by its right name, which diffusers does not let a UNet do.
        if let Some(heads) = settings.remove("num_attention_heads").filter(|heads| !heads.is_null()) {
            settings.insert("attention_head_dim".into(), heads);
        }
        parse_config(path, settings.into(), &[UNET_SUPPORTED, SUPPORTED].concat())
    }

    /// Checks the settings that the UNet does not share.
    pub(super) fn check(&self) -> Result<()> {
        width("conditioning_channels", self.conditioning_channels)?;
        let layers = self.conditioning_embedding_out_channels.len();
        if !(1..=MAX_HALVINGS + 1).contains(&layers) {
            return Err(faulty("conditioning_embedding_out_channels", format!("{layers} entries are not in 1..={}", MAX_HALVINGS + 1)));
        }
        for &channels in &self.conditioning_embedding_out_channels {
            width("conditioning_embedding_out_channels", channels)?;
        }
        if self.unet.mid_block_type.is_none() {
            return Err(faulty("mid_block_type", "a ControlNet needs a mid block"));
        }
        Ok(())
    }

    /// Pixels of the control image per latent in each direction.
    pub fn downscale(&self) -> i64 {
        1 << self.conditioning_embedding_out_channels.len().saturating_sub(1)
    }
}
