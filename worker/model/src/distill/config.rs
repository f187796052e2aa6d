//! What a step computes, and how its models are loaded.

use serde::Deserialize;
use tch::Kind;

use crate::text::StudentOptions;

/// What a training step computes. The default is the method's preset `fixed` for SDXL.
#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DistillConfig {
    /// Standard deviation of the noise that is alike in all pixels of a channel.
    pub noise_offset: f64,
    /// Whether native samples learn from the images and parallel ones from the teacher; else all learn from both.
    pub hybrid: bool,
    /// Whether there is a teacher at all.
    pub distill: bool,
    /// Weight of the feature loss.
    pub feature_weight: f64,
    /// Order of the sizes in the time ids.
    pub time_ids_order: TimeIdsOrder,
    /// Whether a dropped text is replaced in the pooled embedding too.
    pub drop_pooled: bool,
    /// Bound of the signal-to-noise ratio in the weights of the losses on predictions; 0: they are not weighted.
    ///
    /// A prediction of the noise weighs `min(SNR, gamma) / SNR`, one of the velocity `min(SNR, gamma) / (SNR + 1)`.
    /// Source: Hang et al. 2023 (arXiv:2303.09556).
    pub min_snr_gamma: f64,
    /// In which numbers predictions and features are subtracted and squared. Means are taken in f32.
    pub loss_dtype: Precision,
    /// In which numbers `alpha_bar` and the two roots of it are held.
    pub schedule_dtype: Precision,
    /// Rounds images, and the autoencoder's weights as they are loaded, to f16.
    pub vae_round_fp16: bool,
    /// Leaves a feature out of a micro-batch's loss if its squared difference is not finite somewhere.
    pub feature_guard: bool,
    /// Leaves padding out of the pooled mean and hides it from the student's cross-attention.
    pub mask_pads: bool,
    /// Computes the student's activations again in the backward pass instead of keeping them.
    pub gradient_checkpointing: bool,
    /// Multiplies in the UNet's transformers with numbers of eight bits, for teacher and student alike.
    pub fp8_linears: bool,
}

impl Default for DistillConfig {
    fn default() -> Self {
        Self {
            noise_offset: 0.5,
            hybrid: true,
            distill: true,
            feature_weight: 0.1,
            time_ids_order: TimeIdsOrder::Hw,
            drop_pooled: false,
            min_snr_gamma: 0.0,
            loss_dtype: Precision::F32,
            schedule_dtype: Precision::F32,
            vae_round_fp16: false,
            feature_guard: false,
            mask_pads: false,
            gradient_checkpointing: false,
            fp8_linears: false,
        }
    }
}

/// Numbers to compute in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// Single precision.
    F32,
    /// Half precision.
    F16,
}

impl Precision {
    pub(super) fn kind(self) -> Kind {
        match self {
            Self::F32 => Kind::Float,
            Self::F16 => Kind::Half,
        }
    }
}

/// Order of width and height in SDXL's time ids.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TimeIdsOrder {
    /// Height first, as SDXL was trained and is sampled.
    Hw,
    /// Width first, as the published trainer of the method has it.
    Wh,
}

/// How the models of a distillation are loaded.
#[derive(Debug, Clone)]
pub struct LoadOptions {
    /// What a step computes.
    pub distill: DistillConfig,
    /// Tokens a prompt of the student is cut and padded to.
    pub context_length: i64,
    /// How the student is loaded; UNet and English encoders are of its kind and lie on its device.
    pub student: StudentOptions,
    /// The kind of the autoencoder; SDXL's overflows in f16.
    pub vae_kind: Kind,
}
