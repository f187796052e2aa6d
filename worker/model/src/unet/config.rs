//! The UNet's configuration, as diffusers writes it.

use std::path::Path;

use serde::Deserialize;
use serde_json::Value;

use crate::Result;
use crate::config::{PerLevel, Supported, faulty, num_layers, parse_config, read_config, width};

/// The settings of a `UNet2DConditionModel` that shape the network; the defaults are those of diffusers.
#[derive(Debug, Clone, Deserialize)]
#[serde(default)]
pub struct UNetConfig {
    /// Channels of the sample; 9 for inpainting.
    pub in_channels: i64,
    /// Channels of the prediction.
    pub out_channels: i64,
    /// Channels of each level, from the outermost.
    pub block_out_channels: Vec<i64>,
    /// Kinds of the blocks on the way down, one a level.
    pub down_block_types: Vec<DownBlockType>,
    /// Kind of the innermost block; `None` for a network without one.
    pub mid_block_type: Option<MidBlockType>,
    /// Kinds of the blocks on the way up, innermost level first.
    pub up_block_types: Vec<UpBlockType>,
    /// Residual blocks a level on the way down; one more each on the way up.
    pub layers_per_block: PerLevel<i64>,
    /// Transformer layers behind each residual block, a level or a block.
    pub transformer_layers_per_block: PerLevel<PerLevel<i64>>,
    /// The same on the way up, innermost level first; `None` reverses the way down.
    pub reverse_transformer_layers_per_block: Option<PerLevel<PerLevel<i64>>>,
    /// Number of attention heads of each level. (The name is a mistake of diffusers that published files have kept.)
    pub attention_head_dim: PerLevel<i64>,
    /// Width of the text states.
    pub cross_attention_dim: PerLevel<i64>,
    /// Whether attention projects in and out by linear layers or by 1x1 convolutions.
    pub use_linear_projection: bool,
    /// Groups of all group norms.
    pub norm_num_groups: i64,
    /// Epsilon of the group norms outside the attention.
    pub norm_eps: f64,
    /// Whether sinusoids are `[cos, sin]` rather than `[sin, cos]`.
    pub flip_sin_to_cos: bool,
    /// Shift in the sinusoids' frequencies.
    pub freq_shift: f64,
    /// What is added to the time embedding.
    pub addition_embed_type: Option<AdditionEmbedType>,
    /// Width of the sinusoid of each of the six time ids.
    pub addition_time_embed_dim: Option<i64>,
    /// Width of pooled text and time ids together.
    pub projection_class_embeddings_input_dim: Option<i64>,
}

/// A block on the way down.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub enum DownBlockType {
    /// Residual blocks only.
    DownBlock2D,
    /// Residual blocks, each followed by attention.
    CrossAttnDownBlock2D,
}

/// The innermost block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub enum MidBlockType {
    /// Attention between two residual blocks.
    UNetMidBlock2DCrossAttn,
    /// One residual block (SSD-1B).
    UNetMidBlock2D,
}

/// A block on the way up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub enum UpBlockType {
    /// Residual blocks only.
    UpBlock2D,
    /// Residual blocks, each followed by attention.
    CrossAttnUpBlock2D,
}

/// What is added to the time embedding.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AdditionEmbedType {
    /// SDXL: the pooled text and six time ids.
    TextTime,
}

/// Settings that change the network in ways not computed here, with the values that leave it as it is.
pub(crate) const SUPPORTED: &[Supported] = &[
    ("act_fn", r#"["silu", "swish"]"#),
    ("attention_type", r#"["default"]"#),
    ("center_input_sample", "[false]"),
    ("class_embed_type", "[null]"),
    ("class_embeddings_concat", "[false]"),
    ("conv_in_kernel", "[3]"),
    ("conv_out_kernel", "[3]"),
    ("cross_attention_norm", "[null]"),
    ("downsample_padding", "[1]"),
    ("dual_cross_attention", "[false]"),
    ("encoder_hid_dim", "[null]"),
    ("encoder_hid_dim_type", "[null]"),
    ("mid_block_only_cross_attention", "[null, false]"),
    ("mid_block_scale_factor", "[1, 1.0]"),
    ("num_attention_heads", "[null]"),
    ("num_class_embeds", "[null]"),
    ("only_cross_attention", "[false]"),
    ("resnet_out_scale_factor", "[1, 1.0]"),
    ("resnet_skip_time_act", "[false]"),
    ("resnet_time_scale_shift", r#"["default"]"#),
    ("time_cond_proj_dim", "[null]"),
    ("time_embedding_act_fn", "[null]"),
    ("time_embedding_dim", "[null]"),
    ("time_embedding_type", r#"["positional"]"#),
    ("timestep_post_act", "[null]"),
];

/// Time ids of an image: original size, crop corner, target size.
pub(super) const NUM_TIME_IDS: i64 = 6;

impl Default for UNetConfig {
    fn default() -> Self {
        use DownBlockType::{CrossAttnDownBlock2D, DownBlock2D};
        use UpBlockType::{CrossAttnUpBlock2D, UpBlock2D};
        Self {
            in_channels: 4,
            out_channels: 4,
            block_out_channels: vec![320, 640, 1280, 1280],
            down_block_types: vec![CrossAttnDownBlock2D, CrossAttnDownBlock2D, CrossAttnDownBlock2D, DownBlock2D],
            mid_block_type: Some(MidBlockType::UNetMidBlock2DCrossAttn),
            up_block_types: vec![UpBlock2D, CrossAttnUpBlock2D, CrossAttnUpBlock2D, CrossAttnUpBlock2D],
            layers_per_block: PerLevel::Same(2),
            transformer_layers_per_block: PerLevel::Same(PerLevel::Same(1)),
            reverse_transformer_layers_per_block: None,
            attention_head_dim: PerLevel::Same(8),
            cross_attention_dim: PerLevel::Same(1280),
            use_linear_projection: false,
            norm_num_groups: 32,
            norm_eps: 1e-5,
            flip_sin_to_cos: true,
            freq_shift: 0.0,
            addition_embed_type: None,
            addition_time_embed_dim: None,
            projection_class_embeddings_input_dim: None,
        }
    }
}

impl UNetConfig {
    /// Reads a `config.json`.
    ///
    /// Errors: [`Error::Io`](crate::Error::Io), [`Error::Invalid`](crate::Error::Invalid) for damaged JSON or unknown block kinds,
    /// [`Error::Unsupported`](crate::Error::Unsupported) for a setting whose value is not computed.
    pub fn read(path: &Path) -> Result<Self> {
        read_config(path, SUPPORTED)
    }

    /// As [`UNetConfig::read`], of settings that came from elsewhere; `path` names them in errors.
    pub(crate) fn parse(path: &Path, settings: Value) -> Result<Self> {
        parse_config(path, settings, SUPPORTED)
    }

    /// Widths of the pooled text that the network takes and of each time id's sinusoid; `None` if it takes neither.
    ///
    /// Errors: [`Error::Config`](crate::Error::Config) for a `text_time` embedding without its two widths, or with widths that leave
    /// nothing to the text.
    pub(super) fn addition_widths(&self) -> Result<Option<AdditionWidths>> {
        if self.addition_embed_type.is_none() {
            return Ok(None);
        }
        let (Some(time_id), Some(total)) = (self.addition_time_embed_dim, self.projection_class_embeddings_input_dim) else {
            let reason = "text_time needs addition_time_embed_dim and projection_class_embeddings_input_dim";
            return Err(faulty("addition_embed_type", reason));
        };
        let time_id = width("addition_time_embed_dim", time_id)?;
        let total = width("projection_class_embeddings_input_dim", total)?;
        let pooled = total - NUM_TIME_IDS * time_id;
        if pooled < 1 {
            let reason = format!("{total} leaves no width to the text beside {NUM_TIME_IDS} x {time_id}");
            return Err(faulty("projection_class_embeddings_input_dim", reason));
        }
        Ok(Some(AdditionWidths { pooled, time_id, total }))
    }

    /// The levels with all per-level settings of the way down resolved and checked, from the outermost.
    pub(super) fn levels(&self) -> Result<Vec<Level>> {
        let (count, down) = (self.block_out_channels.len(), self.down_block_types.len());
        if count == 0 || down != count {
            return Err(faulty("block_out_channels", format!("{count} levels, {down} down_block_types")));
        }
        width("in_channels", self.in_channels)?;
        let num_resnets = resolve("layers_per_block", &self.layers_per_block, count)?;
        let heads = resolve("attention_head_dim", &self.attention_head_dim, count)?;
        let context = resolve("cross_attention_dim", &self.cross_attention_dim, count)?;
        let down = resolve(DOWN_LAYERS, &self.transformer_layers_per_block, count)?;
        let level = |index: usize| {
            let channels = width("block_out_channels", self.block_out_channels[index])?;
            let heads = width("attention_head_dim", heads[index])?;
            let num_resnets = num_layers("layers_per_block", num_resnets[index], 1)?;
            for (setting, parts) in [("norm_num_groups", self.norm_num_groups), ("attention_head_dim", heads)] {
                if parts < 1 || channels % parts != 0 {
                    return Err(faulty(setting, format!("{channels} channels cannot be split into {parts}")));
                }
            }
            let down = match self.down_block_types[index] {
                DownBlockType::DownBlock2D => None,
                DownBlockType::CrossAttnDownBlock2D => Some(transformer_layers(DOWN_LAYERS, &down[index], num_resnets)?),
            };
            Ok(Level { channels, heads, context_width: width("cross_attention_dim", context[index])?, num_resnets, down })
        };
        (0..count).map(level).collect()
    }

    /// Transformer layers behind each residual block on the way up, innermost level first; `None` for a level without attention.
    /// `levels` are those of [`UNetConfig::levels`].
    pub(super) fn up_layers(&self, levels: &[Level]) -> Result<Vec<Option<Vec<usize>>>> {
        let (count, up) = (levels.len(), self.up_block_types.len());
        if up != count {
            return Err(faulty("block_out_channels", format!("{count} levels, {up} up_block_types")));
        }
        width("out_channels", self.out_channels)?;
        let layers = match &self.reverse_transformer_layers_per_block {
            Some(layers) => resolve(UP_LAYERS, layers, count)?,
            None => {
                let down = resolve(DOWN_LAYERS, &self.transformer_layers_per_block, count)?;
                if down.iter().any(|layers| matches!(layers, PerLevel::Each(_))) {
                    return Err(faulty(UP_LAYERS, "needed where transformer_layers_per_block goes block by block"));
                }
                down.into_iter().rev().collect()
            }
        };
        let kinds = self.up_block_types.iter().zip(&layers).zip(levels.iter().rev());
        kinds
            .map(|((kind, layers), level)| match kind {
                UpBlockType::UpBlock2D => Ok(None),
                UpBlockType::CrossAttnUpBlock2D => transformer_layers(UP_LAYERS, layers, level.num_resnets + 1).map(Some),
            })
            .collect()
    }

    /// Transformer layers of the mid block: those of the innermost level.
    pub(super) fn mid_transformer_layers(&self) -> Result<usize> {
        match resolve(DOWN_LAYERS, &self.transformer_layers_per_block, self.block_out_channels.len())?.pop() {
            Some(PerLevel::Same(layers)) => num_layers(DOWN_LAYERS, layers, 0),
            _ => Err(faulty(DOWN_LAYERS, "the last entry must be one number: it is the mid block's")),
        }
    }
}

const DOWN_LAYERS: &str = "transformer_layers_per_block";
const UP_LAYERS: &str = "reverse_transformer_layers_per_block";

/// Widths of the added embedding's input.
#[derive(Debug, Clone, Copy)]
pub(super) struct AdditionWidths {
    pub pooled: i64,
    /// Of each time id's sinusoid.
    pub time_id: i64,
    /// Of all together.
    pub total: i64,
}

/// One level of the network: what its way down is made of, and its way up but for the transformers.
#[derive(Debug, Clone)]
pub(super) struct Level {
    pub channels: i64,
    pub heads: i64,
    pub context_width: i64,
    /// Residual blocks on the way down; one more on the way up.
    pub num_resnets: usize,
    /// Transformer layers behind each residual block on the way down; `None` without attention.
    pub down: Option<Vec<usize>>,
}

fn resolve<T: Clone>(setting: &'static str, value: &PerLevel<T>, count: usize) -> Result<Vec<T>> {
    value.resolve(count).ok_or_else(|| faulty(setting, format!("wanted one entry or {count}")))
}

fn transformer_layers(setting: &'static str, value: &PerLevel<i64>, num_resnets: usize) -> Result<Vec<usize>> {
    resolve(setting, value, num_resnets)?.into_iter().map(|layers| num_layers(setting, layers, 0)).collect()
}
