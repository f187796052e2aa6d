//! Sections of the job file about networks: the teacher, the student, and the adapter between them.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::checks::Checks;
use super::yes;

/// The English model that teaches: an SDXL or an SD1.5.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ModelSection {
    /// What the workers load: a folder in the layout diffusers uses (unet/, vae/, text_encoder/, tokenizer/, ...), a checkpoint that is
    /// one file (.safetensors, .ckpt), or a name on the model hub (`ORG/NAME`, `ORG/NAME@REVISION`), which workers fetch into their host's
    /// cache.
    pub path: PathBuf,
    /// For a checkpoint that is one file: a folder whose configurations and tokenizers are taken instead of the published ones.
    #[serde(default)]
    pub config: Option<PathBuf>,
    /// Rounds pictures and the autoencoder's weights to f16 before they are used, as the published trainer does.
    #[serde(default)]
    pub vae_round_fp16: bool,
    /// Numbers the autoencoder computes in while training. By default f32 on the CPU and bf16 on GPUs, where the preset `reference` has
    /// TF32 (of SD1.5 the published trainer's has f16, which is not offered).
    /// What fewer bits cost a model's latents is what `worker vae-error` prints.
    #[serde(default)]
    pub vae_dtype: VaeDtype,
}

/// Numbers of the autoencoder; SDXL's overflows in f16.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum VaeDtype {
    /// As the device and the preset suggest.
    #[default]
    Auto,
    /// Single precision.
    F32,
    /// Single precision, of which a GPU's convolutions leave out half the bits of what they multiply.
    Tf32,
    /// The range of single precision in half the bits.
    Bf16,
}

/// The text encoder of the new language.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct StudentSection {
    /// A folder (config.json, weights, vocabulary), or a name on the model hub, which workers fetch into their host's cache; as the workers
    /// see it.
    pub path: PathBuf,
    /// Tokens a prompt is padded or cut to. The adapter is bound to it: sampling uses the same.
    #[serde(default = "StudentSection::default_context_length")]
    pub context_length: u32,
    /// Replaces curly quotes, which Chinese vocabularies lack, by straight ones.
    #[serde(default = "yes")]
    pub normalize_quotes: bool,
    /// Multiplies Chinese-CLIP's token states by its text projection.
    #[serde(default)]
    pub project: bool,
    /// Leaves the encoder's dropout on while training, as the published trainer does.
    #[serde(default)]
    pub dropout: bool,
}

impl StudentSection {
    fn default_context_length() -> u32 {
        52
    }

    pub(super) fn check(&self, checks: &mut Checks) {
        checks.within("student.context_length", self.context_length, 3..=512);
    }
}

/// The adapter's shape: LayerNorm, `depth` linears with GELU between, and a linear to the cross-attention width.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct AdapterSection {
    /// Width of the hidden layers.
    pub hidden: u32,
    /// Number of linears in the projector.
    pub depth: u32,
    /// Leaves padding out of the pooled mean and hides it from cross-attention. Published adapters were trained without.
    pub mask_pads: bool,
}

impl Default for AdapterSection {
    fn default() -> Self {
        Self { hidden: 1024, depth: 3, mask_pads: false }
    }
}

impl AdapterSection {
    pub(super) fn check(&self, checks: &mut Checks) {
        checks.within("adapter.hidden", self.hidden, 1..=65_536);
        checks.within("adapter.depth", self.depth, 2..=16);
    }
}
