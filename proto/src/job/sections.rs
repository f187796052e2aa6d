//! The sections of a job file with their defaults and ranges.

use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::captions::CaptionsSection;
use crate::ids::SampleName;

/// The English model that teaches: an SDXL or an SD1.5.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelSection {
    /// What the workers load: a folder in the layout diffusers uses (unet/, vae/, text_encoder/, tokenizer/, ...), a checkpoint that is
    /// one file (.safetensors, .ckpt), or a name on the model hub (`ORG/NAME`, `ORG/NAME@REVISION`) that is in the local cache.
    pub path: PathBuf,
    /// For a checkpoint that is one file: a folder whose configurations and tokenizers are taken instead of the published ones.
    #[serde(default)]
    pub config: Option<PathBuf>,
    /// Rounds pictures and the autoencoder's weights to f16 before they are used, as the published trainer does.
    #[serde(default)]
    pub vae_round_fp16: bool,
    /// Numbers the autoencoder computes in while training. By default bf16 on GPUs, f32 on the CPU and in the preset `reference`. libtorch lets
    /// newer GPUs compute the convolutions of f32 in TF32.
    #[serde(default)]
    pub vae_dtype: VaeDtype,
}

/// Numbers of the autoencoder; SDXL's overflows in f16.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VaeDtype {
    /// As the device and the preset suggest.
    #[default]
    Auto,
    /// Single precision.
    F32,
    /// The range of single precision in half the bits.
    Bf16,
}

/// The text encoder of the new language.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StudentSection {
    /// A folder (config.json, weights, vocabulary), or a name on the model hub that is in the local cache; as the workers see it.
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

    pub(super) fn validate(&self, problems: &mut Vec<String>) {
        if !(3..=512).contains(&self.context_length) {
            problems.push(format!("student.context_length ({}) must be within 3..=512", self.context_length));
        }
    }
}

/// The adapter's shape: LayerNorm, `depth` linears with GELU between, and a linear to the cross-attention width.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
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
    pub(super) fn validate(&self, problems: &mut Vec<String>) {
        if !(1..=65_536).contains(&self.hidden) {
            problems.push(format!("adapter.hidden ({}) must be within 1..=65536", self.hidden));
        }
        if !(2..=16).contains(&self.depth) {
            problems.push(format!("adapter.depth ({}) must be within 2..=16", self.depth));
        }
    }
}

/// Which samples that carry a watermark score are trained. Samples without one always are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Filter {
    /// By size; those without a key of a native caption by aesthetic score and watermark too. The published trainer of SDXL.
    #[default]
    Sdxl,
    /// By aesthetic score and watermark, whatever their size and captions. The published trainer of SD1.5.
    Sd15,
    /// All of them.
    None,
}

/// Where samples come from and which are kept.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataSection {
    /// webdataset tars of jpg + json, plain, gzip or zstd: paths and addresses (http, https, s3, gs, az), with `{00000..00123}` ranges and
    /// wildcards, several joined by `::`; `@FILE` for a file of them. Give this or `sources`.
    #[serde(default)]
    pub shards: Vec<String>,
    /// Several sets of such tars, mixed by weight. Give this or `shards`.
    #[serde(default)]
    pub sources: Vec<SourceSection>,
    /// Aspect buckets as [width, height].
    #[serde(default = "DataSection::default_buckets")]
    pub buckets: Vec<[u32; 2]>,
    /// Which samples that carry a watermark score are trained.
    #[serde(default)]
    pub filter: Filter,
    /// Smallest width x height of a sample that carries a watermark score.
    #[serde(default = "DataSection::default_min_pixels")]
    pub min_pixels: u64,
    /// Lowest aesthetic score of a sample that carries a watermark score and no native caption.
    #[serde(default = "DataSection::default_min_aesthetic")]
    pub min_aesthetic: f64,
    /// Highest watermark score of such a sample.
    #[serde(default = "DataSection::default_max_watermark")]
    pub max_watermark: f64,
    /// Key of the watermark score in a sample's json.
    #[serde(default = "DataSection::default_watermark_key")]
    pub watermark_key: String,
    /// Key of the aesthetic score.
    #[serde(default = "DataSection::default_aesthetic_key")]
    pub aesthetic_key: String,
    /// Turns pictures as their EXIF data says. The published trainer does not.
    #[serde(default)]
    pub exif_rotate: bool,
    /// Drops prompts of which cleaning leaves no character of the language, instead of training them empty.
    #[serde(default = "yes")]
    pub strict_clean: bool,
    /// Share of broken samples above which the job stops. Filtered samples do not count.
    #[serde(default = "DataSection::default_max_bad_fraction")]
    pub max_bad_fraction: f64,
    /// Encoded bytes a worker may hold in its buffers.
    #[serde(default = "DataSection::default_buffer_bytes")]
    pub buffer_bytes: u64,
    /// Samples a worker gathers before it draws among them, so that a batch is not one region of one tar.
    #[serde(default = "DataSection::default_shuffle_buffer")]
    pub shuffle_buffer: u32,
    /// Threads that decode pictures in each worker; 0: one for every two cores, at most 8.
    #[serde(default)]
    pub decode_threads: u32,
    /// Longest wait for a store's answer, and for the next bytes of one, before it is asked again.
    #[serde(default = "DataSection::default_read_timeout", with = "duration")]
    pub read_timeout: Duration,
    /// Failures of a store in a row that are no news.
    #[serde(default = "DataSection::default_retries")]
    pub retries: u32,
    /// How long a store may go on failing before a worker gives up. Training waits meanwhile.
    #[serde(default = "DataSection::default_give_up_after", with = "duration")]
    pub give_up_after: Duration,
    /// A folder on each host that keeps shards read over a network; workers of one host share it. By default none are kept.
    #[serde(default)]
    pub cache_dir: Option<PathBuf>,
    /// Largest size of that folder; what was used longest ago goes first.
    #[serde(default = "DataSection::default_cache_bytes")]
    pub cache_bytes: u64,
    /// Which captions count and how they are cleaned.
    #[serde(default)]
    pub captions: CaptionsSection,
    /// Decodes pictures of at least four times their bucket's width and height at a half, a quarter or an eighth of their size, never below
    /// twice the bucket's, before they are scaled: faster, and 0.2 grey levels away from the whole picture on average.
    #[serde(default = "yes")]
    pub fast_shrink: bool,
}

/// A set of shards in a mixture.
///
/// Shards are drawn from the sources in proportion to their weights, evenly spread. With `train.steps` each source starts over whenever it has
/// been read, for as long as the job lasts; with `train.epochs` each is passed over that many times, and the weights say only how fast.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SourceSection {
    /// What `coordinator status` calls it.
    pub name: String,
    /// As `data.shards`.
    pub shards: Vec<String>,
    /// Shards drawn from it for one of a source of weight 1. Shards are counted, not samples: for weights of samples, cut shards to one size.
    #[serde(default = "SourceSection::default_weight")]
    pub weight: f64,
}

impl SourceSection {
    fn default_weight() -> f64 {
        1.0
    }

    fn validate(&self, problems: &mut Vec<String>) {
        let name = &self.name;
        if name.is_empty() {
            problems.push("data.sources: a source has an empty name".into());
        }
        if self.shards.is_empty() {
            problems.push(format!("data.sources: {name:?} has no shards: name at least one tar"));
        }
        if !(1e-3..=1e3).contains(&self.weight) {
            problems.push(format!("data.sources: {name:?} has weight {}; it must be within 0.001..=1000", self.weight));
        }
    }
}

impl DataSection {
    fn default_buckets() -> Vec<[u32; 2]> {
        vec![[448, 896], [448, 832], [512, 768], [576, 704], [640, 640], [704, 576], [768, 512], [832, 448], [896, 448]]
    }
    fn default_min_pixels() -> u64 {
        640 * 640
    }
    fn default_min_aesthetic() -> f64 {
        6.0
    }
    fn default_max_watermark() -> f64 {
        0.5
    }
    fn default_watermark_key() -> String {
        "watermark".into()
    }
    fn default_aesthetic_key() -> String {
        "aesthetic_score".into()
    }
    fn default_max_bad_fraction() -> f64 {
        0.05
    }
    fn default_buffer_bytes() -> u64 {
        256 << 20
    }
    fn default_shuffle_buffer() -> u32 {
        1000
    }
    fn default_read_timeout() -> Duration {
        Duration::from_secs(30)
    }
    fn default_retries() -> u32 {
        5
    }
    fn default_give_up_after() -> Duration {
        Duration::from_secs(600)
    }
    fn default_cache_bytes() -> u64 {
        100 << 30
    }

    pub(super) fn validate(&self, problems: &mut Vec<String>) {
        match (self.shards.is_empty(), self.sources.is_empty()) {
            (true, true) => problems.push("data.shards is empty: name at least one tar, such as \"/data/{00000..00099}.tar\"".into()),
            (false, false) => problems.push("give exactly one of data.shards or [[data.sources]]".into()),
            _ => {}
        }
        for (index, source) in self.sources.iter().enumerate() {
            source.validate(problems);
            if self.sources[..index].iter().any(|other| other.name == source.name) {
                problems.push(format!("data.sources: two are named {:?}", source.name));
            }
        }
        if self.buckets.is_empty() {
            problems.push("data.buckets is empty: leave the key out for the nine of the method".into());
        }
        for [width, height] in &self.buckets {
            if width % 8 != 0 || height % 8 != 0 || !(8..=8192).contains(width) || !(8..=8192).contains(height) {
                problems.push(format!("data.buckets: [{width}, {height}] must be multiples of 8 within 8..=8192"));
            }
        }
        if !(0.0..=1.0).contains(&self.max_bad_fraction) {
            problems.push(format!("data.max_bad_fraction ({}) must be within 0..=1", self.max_bad_fraction));
        }
        if !self.min_aesthetic.is_finite() || !self.max_watermark.is_finite() {
            problems.push("data.min_aesthetic and data.max_watermark must be finite numbers".into());
        }
        if self.buffer_bytes < 1 << 20 {
            problems.push(format!("data.buffer_bytes ({}) must be at least 1048576 (1 MiB)", self.buffer_bytes));
        }
        if self.shuffle_buffer == 0 {
            problems.push("data.shuffle_buffer must be at least 1 (1: tar order)".into());
        }
        for (field, key) in [("watermark_key", &self.watermark_key), ("aesthetic_key", &self.aesthetic_key)] {
            if key.is_empty() {
                problems.push(format!("data.{field} is empty: name a key of the samples' json, or leave it out"));
            }
        }
        self.captions.validate(problems);
        if self.decode_threads > 256 {
            problems.push(format!("data.decode_threads ({}) must be within 0..=256", self.decode_threads));
        }
        if !(Duration::from_millis(100)..=Duration::from_secs(3600)).contains(&self.read_timeout) {
            problems.push(format!("data.read_timeout ({}) must be within 100ms..=1h", humantime::format_duration(self.read_timeout)));
        }
        if self.retries > 1000 {
            problems.push(format!("data.retries ({}) must be within 0..=1000", self.retries));
        }
        if self.give_up_after > Duration::from_secs(7 * 24 * 3600) {
            problems.push(format!("data.give_up_after ({}) must be at most 7days", humantime::format_duration(self.give_up_after)));
        }
        if self.cache_dir.is_some() && self.cache_bytes < 1 << 20 {
            problems.push(format!("data.cache_bytes ({}) must be at least 1048576 (1 MiB)", self.cache_bytes));
        }
    }
}

/// How the learning rate goes on after the warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Decay {
    /// Stays.
    Constant,
    /// Half a cosine from `learning_rate` to `final_learning_rate`.
    Cosine,
    /// `(1 - progress)^power` between the two.
    Polynomial,
}

/// Numbers of the frozen networks. Adapter, losses, gradients and optimiser are f32 whatever it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Dtype {
    /// bf16 on GPUs (f16 in the preset `reference`), f32 on the CPU.
    #[default]
    Auto,
    /// Single precision.
    F32,
    /// The range of single precision in half the bits.
    Bf16,
    /// Half precision; the loss is scaled to keep gradients in its range.
    F16,
}

/// Batch, length and optimiser.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TrainSection {
    /// Optimiser updates to make. Give this or `epochs`.
    pub steps: Option<u64>,
    /// Passes over the data to make. Give this or `steps`.
    pub epochs: Option<u32>,
    /// Samples in one update, over all workers.
    pub global_batch: u32,
    /// Where fewer workers than the world size train, makes the global batch smaller in proportion instead of each worker's share larger. The
    /// learning rate stays as it is.
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
            dtype: Dtype::Auto,
        }
    }
}

impl TrainSection {
    pub(super) fn validate(&self, problems: &mut Vec<String>) {
        match (self.steps, self.epochs) {
            (Some(_), Some(_)) | (None, None) => problems.push("give exactly one of train.steps or train.epochs".into()),
            (Some(0), _) => problems.push("train.steps must be at least 1".into()),
            (_, Some(0)) => problems.push("train.epochs must be at least 1".into()),
            (_, Some(epochs)) if epochs >= SampleName::LIMIT => problems.push("train.epochs must be below 16777216".into()),
            _ => {}
        }
        if self.epochs.is_some() && self.decay_steps.is_none() && self.decay != Decay::Constant {
            problems.push("train.epochs needs train.decay_steps (or train.decay = \"constant\"): the decay's length is not known".into());
        }
        if !(1..=1 << 20).contains(&self.global_batch) {
            problems.push(format!("train.global_batch ({}) must be within 1..=1048576", self.global_batch));
        }
        if !(1..=4096).contains(&self.micro_batch) {
            problems.push(format!("train.micro_batch ({}) must be within 1..=4096", self.micro_batch));
        }
        let mut within = |name: &str, value: f64, low: f64, high: f64| {
            if !(low..=high).contains(&value) {
                problems.push(format!("train.{name} ({value}) must be within {low}..={high}"));
            }
        };
        within("learning_rate", self.learning_rate, 0.0, 1.0);
        within("final_learning_rate", self.final_learning_rate, 0.0, 1.0);
        within("decay_power", self.decay_power, 0.1, 10.0);
        within("betas[0]", self.betas[0], 0.0, 0.999_999);
        within("betas[1]", self.betas[1], 0.0, 0.999_999_9);
        within("epsilon", self.epsilon, 1e-20, 1e-1);
        within("weight_decay", self.weight_decay, 0.0, 10.0);
        within("max_grad_norm", self.max_grad_norm, 0.0, 1e9);
        within("ema_decay", self.ema_decay, 0.0, 0.999_999_9);
    }

    /// Step at which the decay of the learning rate ends.
    #[must_use]
    pub fn decay_end(&self) -> Option<u64> {
        self.decay_steps.or(self.steps)
    }
}

/// Order of width and height in the six size numbers SDXL is conditioned on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TimeIdsOrder {
    /// Height first, as SDXL was trained and as samplers give them.
    Hw,
    /// Width first, as the original trainer gave them.
    Wh,
}

/// The numbers something is computed in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Precision {
    /// Single precision.
    F32,
    /// Half precision.
    F16,
}

/// The method's switches.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
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
    /// Leaves a feature out of a micro-batch's loss where it is not finite; by default only for SD1.5 in the preset `reference`.
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
    pub(super) fn validate(&self, problems: &mut Vec<String>) {
        let mut within = |name: &str, value: f64, low: f64, high: f64| {
            if !(low..=high).contains(&value) {
                problems.push(format!("loss.{name} ({value}) must be within {low}..={high}"));
            }
        };
        within("noise_offset", self.noise_offset.unwrap_or_default(), 0.0, 10.0);
        within("condition_dropout", self.condition_dropout, 0.0, 1.0);
        within("feature_weight", self.feature_weight, 0.0, 1e6);
        within("min_snr_gamma", self.min_snr_gamma, 0.0, 1e6);
    }
}

/// When and where weights are kept.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CheckpointSection {
    /// A folder on the coordinator; by default `checkpoints` in its state folder.
    pub store: Option<PathBuf>,
    /// Steps between checkpoints.
    pub every_steps: u64,
    /// Time between checkpoints, whichever comes first.
    #[serde(with = "duration")]
    pub every: Duration,
    /// Newest checkpoints to keep.
    pub keep: u32,
}

impl Default for CheckpointSection {
    fn default() -> Self {
        Self { store: None, every_steps: 1000, every: Duration::from_secs(300), keep: 3 }
    }
}

impl CheckpointSection {
    pub(super) fn validate(&self, problems: &mut Vec<String>) {
        if self.every_steps == 0 {
            problems.push("checkpoint.every_steps must be at least 1".into());
        }
        if self.every < Duration::from_secs(1) {
            problems.push(format!("checkpoint.every ({}) must be at least 1s", humantime::format_duration(self.every)));
        }
        if self.keep == 0 {
            problems.push("checkpoint.keep must be at least 1: the newest is what a job resumes from".into());
        }
    }
}

/// Losses on samples that are never trained, with the same noise and timesteps each time; of the weights' average where one is kept.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ValidationSection {
    /// webdataset tars as in `data.shards`, read by every worker; none: no validation.
    pub shards: Vec<String>,
    /// Steps between two validations; there is one before the first step and one at the end too.
    pub every_steps: u64,
    /// Samples to use, the first of the shards; 0: all of them.
    pub samples: u32,
}

impl Default for ValidationSection {
    fn default() -> Self {
        Self { shards: Vec::new(), every_steps: 1000, samples: 0 }
    }
}

impl ValidationSection {
    pub(super) fn validate(&self, problems: &mut Vec<String>) {
        if self.every_steps == 0 {
            problems.push("validation.every_steps must be at least 1; leave validation.shards out for no validation".into());
        }
    }
}

/// Pictures drawn while training, the workers sharing the prompts.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PicturesSection {
    /// Prompts in the new language; none: no pictures.
    pub prompts: Vec<String>,
    /// Steps between two sets of pictures; there is one before the first step and one at the end too.
    pub every_steps: u64,
    /// Width and height in pixels; by default the model's own size.
    pub size: Option<[u32; 2]>,
    /// Steps of the sampler.
    pub steps: u32,
    /// How strongly pictures follow their prompt.
    pub guidance: f64,
    /// Seed of the noise they begin with.
    pub seed: u64,
}

impl Default for PicturesSection {
    fn default() -> Self {
        Self { prompts: Vec::new(), every_steps: 1000, size: None, steps: 30, guidance: 7.5, seed: 0 }
    }
}

impl PicturesSection {
    pub(super) fn validate(&self, problems: &mut Vec<String>) {
        if self.every_steps == 0 {
            problems.push("pictures.every_steps must be at least 1; leave pictures.prompts out for no pictures".into());
        }
        if !(1..=999).contains(&self.steps) {
            problems.push(format!("pictures.steps ({}) must be within 1..=999", self.steps));
        }
        if !(0.0..=100.0).contains(&self.guidance) {
            problems.push(format!("pictures.guidance ({}) must be within 0..=100", self.guidance));
        }
        if self.prompts.len() > MAX_PICTURES {
            problems.push(format!("pictures.prompts has {} prompts, at most {MAX_PICTURES} are drawn", self.prompts.len()));
        }
        if let Some([width, height]) = self.size
            && [width, height].iter().any(|side| side % 8 != 0 || !(8..=8192).contains(side))
        {
            problems.push(format!("pictures.size: [{width}, {height}] must be multiples of 8 within 8..=8192"));
        }
    }
}

/// More pictures than this a time would be a gallery, not a look at how training goes.
const MAX_PICTURES: usize = 1000;

fn yes() -> bool {
    true
}

/// Durations as people write them: "5m", "90s".
mod duration {
    use std::time::Duration;

    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub fn serialize<S: Serializer>(value: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&humantime::format_duration(*value))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
        let text = String::deserialize(deserializer)?;
        humantime::parse_duration(&text).map_err(|error| D::Error::custom(format!("`{text}` is not a duration like \"5m\": {error}")))
    }
}
