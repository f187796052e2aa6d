//! The configurations of the published SDXL and SD1.5, bent to what a checkpoint of one file shows by its names and shapes.

use serde_json::{Map, Value, json};

use super::Architecture;
use crate::weights::{SingleFile, Weights};
use crate::{Error, Result};

pub(super) const SDXL: &str = include_str!("../../assets/sdxl.json");
pub(super) const SD15: &str = include_str!("../../assets/sd15.json");

/// What the tokenizers of the two text encoders fill texts up with: the end of text, and an exclamation mark.
pub(super) const PAD_ID: i64 = 49407;
pub(super) const PAD_ID_2: i64 = 0;

/// Only SDXL's UNet has this.
const ADDED_EMBEDDING: &str = "add_embedding.";

/// The settings of all parts, by the names of their folders.
pub(super) struct Published(pub(super) Map<String, Value>);

impl Published {
    /// The configurations as they were published.
    ///
    /// Errors: none but for a damaged program.
    pub(super) fn whole(architecture: Architecture) -> Result<Self> {
        let text = match architecture {
            Architecture::Sdxl => SDXL,
            Architecture::Sd15 => SD15,
        };
        let damaged = |error: serde_json::Error| Error::Invalid { path: "published configuration".into(), reason: error.to_string() };
        serde_json::from_str(text).map(Self).map_err(damaged)
    }

    /// The configurations of a checkpoint.
    ///
    /// Errors: none but for a damaged program.
    pub(super) fn of(models: &SingleFile) -> Result<Self> {
        let is_sdxl = models.unet.holds_any(ADDED_EMBEDDING);
        let Self(mut parts) = Self::whole(if is_sdxl { Architecture::Sdxl } else { Architecture::Sd15 })?;
        if let Some(Value::Object(unet)) = parts.get_mut("unet") {
            fit_unet(unet, &models.unet);
        }
        if let Some(Value::Object(scheduler)) = parts.get_mut("scheduler") {
            if models.marks.v_prediction {
                scheduler.insert("prediction_type".into(), "v_prediction".into());
            }
            if models.marks.zero_terminal_snr {
                scheduler.insert("rescale_betas_zero_snr".into(), true.into());
            }
        }
        Ok(Self(parts))
    }

    /// The settings of the part that has this name.
    pub(super) fn settings(&self, part: &str) -> Map<String, Value> {
        self.0.get(part).and_then(Value::as_object).cloned().unwrap_or_default()
    }
}

/// A block of a UNet as the keys of its weights show it.
struct Block {
    num_resnets: usize,
    /// Transformer layers behind each residual block; empty without attention.
    layers: Vec<usize>,
}

impl Block {
    fn read(unet: &Weights, name: &str) -> Self {
        let count = |list: &str| (0..).take_while(|index| unet.holds_any(&format!("{list}.{index}."))).count();
        let num_attentions = count(&format!("{name}.attentions"));
        Self {
            num_resnets: count(&format!("{name}.resnets")),
            layers: (0..num_attentions).map(|index| count(&format!("{name}.attentions.{index}.transformer_blocks"))).collect(),
        }
    }

    /// The name of its kind: `plain`, or with attention.
    fn kind<'a>(&self, plain: &'a str, attention: &'a str) -> &'a str {
        if self.layers.is_empty() { plain } else { attention }
    }

    /// The layers as a configuration gives them: one number where they are alike, and `unused` where there are none.
    fn layers(&self, unused: usize) -> Value {
        match self.layers.as_slice() {
            [] => unused.into(),
            [first, others @ ..] if others.iter().all(|other| other == first) => (*first).into(),
            layers => layers.into(),
        }
    }
}

/// Changes the published settings of a UNet to what its weights show: inpainting models have more input channels, pruned ones fewer blocks
/// and transformer layers. Widths and heads stay the published ones; where those are others, building the network tells all differences.
fn fit_unet(settings: &mut Map<String, Value>, unet: &Weights) {
    for (setting, key, dimension) in [("in_channels", "conv_in.weight", 1), ("out_channels", "conv_out.weight", 0)] {
        if let Some(&channels) = unet.shape(key).and_then(|shape| shape.get(dimension)) {
            settings.insert(setting.into(), channels.into());
        }
    }
    let levels = settings.get("block_out_channels").and_then(Value::as_array).map_or(0, Vec::len);
    let blocks = |way: &str| (0..levels).map(|level| Block::read(unet, &format!("{way}.{level}"))).collect::<Vec<_>>();
    let (down, mid, up) = (blocks("down_blocks"), Block::read(unet, "mid_block"), blocks("up_blocks"));
    if down.iter().chain(&up).any(|block| block.num_resnets == 0) {
        // Whole levels are missing: against the published structure their keys can be named.
        return;
    }
    let mid_layers = mid.layers.first().copied().unwrap_or(1);
    let kinds = |blocks: &[Block], plain, attention| blocks.iter().map(|block| block.kind(plain, attention)).collect::<Vec<_>>();
    let structure = json!({
        "down_block_types": kinds(&down, "DownBlock2D", "CrossAttnDownBlock2D"),
        "mid_block_type": (mid.num_resnets > 0).then(|| mid.kind("UNetMidBlock2D", "UNetMidBlock2DCrossAttn")),
        "up_block_types": kinds(&up, "UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": down.iter().map(|block| block.num_resnets).collect::<Vec<_>>(),
        // The mid block has as many as the innermost level, which may have no attention of its own.
        "transformer_layers_per_block": down.iter().map(|block| block.layers(mid_layers)).collect::<Vec<_>>(),
        "reverse_transformer_layers_per_block": up.iter().map(|block| block.layers(1)).collect::<Vec<_>>(),
    });
    if let Value::Object(structure) = structure {
        settings.extend(structure);
    }
}
