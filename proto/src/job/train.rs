//! Sections of the job file about learning: batch, length, optimiser, and the method's switches.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::checks::Checks;
use crate::ids::SampleName;

/// How the learning rate goes on after the warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Decay {
    /// Stays.
    Constant,
    /// Half a cosine over all steps, those of the warm-up too, from `learning_rate` to `final_learning_rate`.
    Cosine,
    /// `(1 - progress)^power` between the two.
    Polynomial,
}

/// Numbers of the frozen networks. Adapter, losses, gradients and optimiser are f32 whatever it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Dtype {
    /// bf16 on GPUs (f16 in the preset `reference`), f32 on the CPU.
    #[default]
    Auto,
    /// Single precision.
    F32,
    /// The range of single precision in half the bits.
    Bf16,
    /// Half precision; the loss, summed over a micro-batch, is scaled to keep gradients in its range: from 2^16 on, twice as much after
    /// 1000 finite steps, half as much at an overflow, of which the first since it was last doubled is forgiven.
    F16,
}

/// Batch, length and optimiser.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct TrainSection {
    /// Optimiser updates to make. Give this or `epochs`.
    pub steps: Option<u64>,
    /// Passes over the data to make. Give this or `steps`.
    pub epochs: Option<u32>,
    /// Samples in one update, over all workers.
    pub global_batch: u32,
    /// Where fewer workers than the world size train, makes the global batch smaller in proportion instead of each worker's share larger.
    /// The learning rate stays as it is.
    pub scale_batch: bool,
    /// Samples a worker computes at once; its share of the global batch is done in as many parts as needed.
    pub micro_batch: u32,
    /// Peak learning rate.
    pub learning_rate: f64,
    /// Learning rate at the end of the decay.
    pub final_learning_rate: f64,
    /// Steps over which the learning rate rises linearly from 0.
    pub warmup_steps: u64,
    /// How it goes on from there.
    pub decay: Decay,
    /// Exponent of the polynomial decay.
    pub decay_power: f64,
    /// Step at which the decay ends; by default `steps`.
    pub decay_steps: Option<u64>,
    /// AdamW's decay rates of the two moments.
    pub betas: [f64; 2],
    /// AdamW's epsilon.
    pub epsilon: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Gradients of a larger L2 norm are scaled down to it; 0: never.
    pub max_grad_norm: f64,
    /// Decay of the exponential moving average of the weights; 0: none is kept.
    pub ema_decay: f64,
    /// Steps in a row that may be skipped because a loss or gradient was not finite; one more ends the job.
    pub max_skipped_steps: u32,
    /// Computes the UNet's activations again in the backward pass instead of keeping them: less memory, a third more work.
    pub gradient_checkpointing: bool,
    /// Multiplies in the attention and feed-forward layers of the UNet with FP8 numbers (E4M3, a scale for each token), for teacher and
    /// student alike: faster on GPUs of compute capability 9.0. `worker loss-error` says what it costs losses and gradient.
    pub fp8_linears: bool,
    /// Numbers the frozen networks compute in.
    pub dtype: Dtype,
}

impl Default for TrainSection {
    fn default() -> Self {
        Self {
            steps: None,
            epochs: None,
            global_batch: 240,
            scale_batch: false,
            micro_batch: 10,
            learning_rate: 1e-5,
            final_learning_rate: 5e-8,
            warmup_steps: 100,
            decay: Decay::Polynomial,
            decay_power: 1.0,
            decay_steps: None,
            betas: [0.9, 0.999],
            epsilon: 1e-8,
            weight_decay: 0.0,
            max_grad_norm: 0.0,
            ema_decay: 0.0,
            max_skipped_steps: 10,
            gradient_checkpointing: false,
            fp8_linears: false,
            dtype: Dtype::Auto,
        }
    }
}

impl TrainSection {
    pub(super) fn check(&self, checks: &mut Checks) {
        if self.steps.is_some() == self.epochs.is_some() {
            checks.problem("give exactly one of train.steps or train.epochs");
        }
        checks.at_least("train.steps", self.steps.unwrap_or(1), 1, "");
        checks.within("train.epochs", self.epochs.unwrap_or(1), 1..=SampleName::LIMIT - 1);
        if self.epochs.is_some() && self.decay_steps.is_none() && self.decay != Decay::Constant {
            checks.problem("train.epochs needs train.decay_steps (or train.decay = \"constant\"): the decay's length is not known");
        }
        checks.within("train.global_batch", self.global_batch, 1..=1 << 20);
        checks.within("train.micro_batch", self.micro_batch, 1..=4096);
        checks.within("train.learning_rate", self.learning_rate, 0.0..=1.0);
        checks.within("train.final_learning_rate", self.final_learning_rate, 0.0..=1.0);
        checks.within("train.decay_power", self.decay_power, 0.1..=10.0);
        checks.within("train.betas[0]", self.betas[0], 0.0..=0.999_999);
        checks.within("train.betas[1]", self.betas[1], 0.0..=0.999_999_9);
        checks.within("train.epsilon", self.epsilon, 1e-20..=1e-1);
        checks.within("train.weight_decay", self.weight_decay, 0.0..=10.0);
        checks.within("train.max_grad_norm", self.max_grad_norm, 0.0..=1e9);
        checks.within("train.ema_decay", self.ema_decay, 0.0..=0.999_999_9);
    }

    /// Step at which the decay of the learning rate ends.
    #[must_use]
    pub fn decay_end(&self) -> Option<u64> {
        self.decay_steps.or(self.steps)
    }
}

/// Order of width and height in the six size numbers SDXL is conditioned on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum TimeIdsOrder {
    /// Height first, as SDXL was trained and as samplers give them.
    Hw,
    /// Width first, as the original trainer gave them.
    Wh,
}

/// The numbers something is computed in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Precision {
    /// Single precision.
    F32,
    /// Half precision.
    F16,
}

/// The method's switches.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct LossSection {
    /// Standard deviation of the constant part added to each noise channel; by default 0.5 for SDXL and 0 for SD1.5.
    pub noise_offset: Option<f64>,
    /// Probability with which a sample's prompt is replaced by the empty one, for both student and teacher.
    pub condition_dropout: f64,
    /// Native captions train by the diffusion loss, parallel ones by distillation. Off: every sample by both.
    pub hybrid: bool,
    /// Whether the teacher is used at all.
    pub distill: bool,
    /// Weight of the feature loss.
    pub feature_weight: f64,
    /// Order of the size conditioning.
    pub time_ids_order: TimeIdsOrder,
    /// Whether the pooled state is dropped together with the prompt.
    pub drop_pooled: bool,
    /// Weighs the losses on predictions by `min(SNR, gamma) / SNR` of their timestep; 0: all timesteps alike. 5 is usual.
    pub min_snr_gamma: f64,
    /// Numbers in which predictions and features are compared.
    pub dtype: Precision,
    /// Numbers of the noise schedule.
    pub schedule_dtype: Precision,
    /// Leaves a feature out of a micro-batch's loss where it is not finite; by default only for SD1.5 in the preset `reference`. It looks
    /// at the samples that the teacher teaches; the published trainer's looks at native ones, too.
    pub feature_guard: Option<bool>,
}

impl Default for LossSection {
    fn default() -> Self {
        Self {
            noise_offset: None,
            condition_dropout: 0.1,
            hybrid: true,
            distill: true,
            feature_weight: 0.1,
            time_ids_order: TimeIdsOrder::Hw,
            drop_pooled: false,
            min_snr_gamma: 0.0,
            dtype: Precision::F32,
            schedule_dtype: Precision::F32,
            feature_guard: None,
        }
    }
}

impl LossSection {
    pub(super) fn check(&self, checks: &mut Checks) {
        checks.within("loss.noise_offset", self.noise_offset.unwrap_or_default(), 0.0..=10.0);
        checks.within("loss.condition_dropout", self.condition_dropout, 0.0..=1.0);
        checks.within("loss.feature_weight", self.feature_weight, 0.0..=1e6);
        checks.within("loss.min_snr_gamma", self.min_snr_gamma, 0.0..=1e6);
    }
}
