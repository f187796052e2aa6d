//! From a job file to loaded models and the configurations of everything that trains them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use peapod_data::{LoaderConfig, expand_shards};
use peapod_model::adapter::AdapterConfig;
use peapod_model::distill::{DistillConfig, Distiller, LoadOptions, Precision, TimeIdsOrder};
use peapod_model::hub;
use peapod_model::optim::AdamWConfig;
use peapod_model::schedule::{Decay, LrSchedule};
use peapod_model::source::{Architecture, ModelSource};
use peapod_model::text::{StudentEncoder, StudentOptions};
use peapod_proto::PROGRAM_VERSION;
use peapod_proto::ids::Step;
use peapod_proto::job::{self, Dtype, Job, Preset, StudentSection, VaeDtype};
use sha2::{Digest, Sha256};
use tch::{Device, Kind};

use crate::draw::AdapterMetadata;
use crate::loss_scale::LossScale;
use crate::numbers::VaeNumbers;
use crate::precompute::recipe;

/// Standard deviation of the constant part of the noise that SDXL is trained with; SD1.5 is trained without.
const SDXL_NOISE_OFFSET: f64 = 0.5;

/// Shards of one of a job's sources, which lie one after the other in its list.
pub struct Source {
    /// Empty for a job that has but one.
    pub name: String,
    /// How many.
    pub len: usize,
}

/// All shards of a job, source by source.
///
/// # Errors
/// Names the pattern that cannot be expanded.
pub fn shards(job: &Job) -> Result<(Vec<String>, Vec<Source>), String> {
    let (mut shards, mut sources) = (Vec::new(), Vec::new());
    let named = job.data.sources.iter().map(|source| (source.name.as_str(), &source.shards));
    let lists = if job.data.sources.is_empty() { vec![("", &job.data.shards)] } else { named.collect() };
    for (name, list) in lists {
        let found = expand_shards(list).map_err(|error| format!("data.shards: {error}"))?;
        sources.push(Source { name: name.to_owned(), len: found.len() });
        shards.extend(found);
    }
    Ok((shards, sources))
}

/// What a job's frozen models are loaded from: paths, or names on the hub.
pub fn model_paths(job: &Job) -> impl Iterator<Item = &Path> {
    [&job.model.path, &job.student.path].into_iter().chain(&job.model.config).map(PathBuf::as_path)
}

/// Loads the frozen models of a job.
///
/// # Errors
/// The model crate's, naming file and key.
pub fn load_models(job: &Job, device: Device) -> peapod_model::Result<Distiller> {
    let model = ModelSource::open(&job.model.path, job.model.config.as_deref())?;
    let vae_numbers = vae_numbers(job, device);
    vae_numbers.settle();
    let options = LoadOptions {
        distill: distill_config(job, model.architecture()),
        context_length: job.student.context_length.into(),
        student: student_options(job, network_kind(job, device), device),
        vae_kind: vae_numbers.kind(),
    };
    Distiller::load(&model, &job.student.path, options)
}

/// The kind that UNet and text encoders compute in.
#[must_use]
pub fn network_kind(job: &Job, device: Device) -> Kind {
    match (job.train.dtype, job.preset) {
        (Dtype::F32, _) => Kind::Float,
        (Dtype::Bf16, _) => Kind::BFloat16,
        (Dtype::F16, _) => Kind::Half,
        (Dtype::Auto, _) if !device.is_cuda() => Kind::Float,
        (Dtype::Auto, Preset::Fixed) => Kind::BFloat16,
        (Dtype::Auto, Preset::Reference) => Kind::Half,
    }
}

/// The numbers that the autoencoder computes in while training.
#[must_use]
pub fn vae_numbers(job: &Job, device: Device) -> VaeNumbers {
    match (job.model.vae_dtype, job.preset) {
        (VaeDtype::F32, _) => VaeNumbers::F32,
        (VaeDtype::Tf32, _) => VaeNumbers::Tf32,
        (VaeDtype::Bf16, _) => VaeNumbers::Bf16,
        (VaeDtype::Auto, _) if !device.is_cuda() => VaeNumbers::F32,
        (VaeDtype::Auto, Preset::Fixed) => VaeNumbers::Bf16,
        // The published trainer asks for f32, and PyTorch gives convolutions TF32 unless it is told not to.
        (VaeDtype::Auto, Preset::Reference) => VaeNumbers::Tf32,
    }
}

/// The scale of the loss that a fresh run begins with; `None` where the networks' numbers need none.
#[must_use]
pub fn first_loss_scale(job: &Job, device: Device) -> Option<LossScale> {
    (network_kind(job, device) == Kind::Half).then(LossScale::default)
}

/// How a job's student encoder is loaded.
#[must_use]
pub fn student_options(job: &Job, kind: Kind, device: Device) -> StudentOptions {
    let StudentSection { normalize_quotes, project, dropout, .. } = job.student;
    StudentOptions { normalize_quotes, project, dropout, kind, device }
}

/// What a training step of a job computes; some defaults depend on the model.
fn distill_config(job: &Job, architecture: Architecture) -> DistillConfig {
    let (loss, is_sdxl) = (&job.loss, architecture == Architecture::Sdxl);
    let precision = |precision| match precision {
        job::Precision::F32 => Precision::F32,
        job::Precision::F16 => Precision::F16,
    };
    DistillConfig {
        noise_offset: loss.noise_offset.unwrap_or(if is_sdxl { SDXL_NOISE_OFFSET } else { 0.0 }),
        hybrid: loss.hybrid,
        distill: loss.distill,
        feature_weight: loss.feature_weight,
        time_ids_order: match loss.time_ids_order {
            job::TimeIdsOrder::Hw => TimeIdsOrder::Hw,
            job::TimeIdsOrder::Wh => TimeIdsOrder::Wh,
        },
        drop_pooled: loss.drop_pooled,
        min_snr_gamma: loss.min_snr_gamma,
        loss_dtype: precision(loss.dtype),
        schedule_dtype: precision(loss.schedule_dtype),
        vae_round_fp16: job.model.vae_round_fp16,
        feature_guard: loss.feature_guard.unwrap_or(job.preset == Preset::Reference && !is_sdxl),
        mask_pads: job.adapter.mask_pads,
        gradient_checkpointing: job.train.gradient_checkpointing,
        fp8_linears: job.train.fp8_linears,
    }
}

/// The adapter of a job, between its student encoder and its UNet.
#[must_use]
pub fn adapter_config(job: &Job, models: &Distiller) -> AdapterConfig {
    models.adapter_config(job.adapter.hidden.into(), job.adapter.depth as usize)
}

/// What the data threads need of a job and its models.
///
/// # Errors
/// The model crate's: the models are asked what they make of something known, to tell whether cached shards are theirs.
pub fn loader_config(job: &Job, models: &Distiller) -> peapod_model::Result<LoaderConfig> {
    Ok(LoaderConfig {
        data: job.data.clone(),
        seed: job.seed,
        micro_batch: job.train.micro_batch as usize,
        latent_channels: models.vae().config().latent_channels as usize,
        vae_scale: models.vae().downscale() as u32,
        num_timesteps: models.num_timesteps() as u32,
        condition_dropout: job.loss.condition_dropout,
        recipe: recipe::of_training(job, models)?,
    })
}

/// The optimiser of a job.
#[must_use]
pub fn adamw_config(job: &Job) -> AdamWConfig {
    let train = &job.train;
    AdamWConfig { beta1: train.betas[0], beta2: train.betas[1], eps: train.epsilon, weight_decay: train.weight_decay }
}

/// The learning rate of a job.
#[must_use]
pub fn lr_schedule(job: &Job) -> LrSchedule {
    let train = &job.train;
    let end_lr = train.final_learning_rate;
    LrSchedule {
        lr: train.learning_rate,
        warmup_steps: train.warmup_steps,
        // Without an end the decay is constant, which validation has made sure of.
        total_steps: train.decay_end().unwrap_or(u64::MAX),
        decay: match train.decay {
            job::Decay::Constant => Decay::Constant,
            job::Decay::Cosine => Decay::Cosine { end_lr },
            job::Decay::Polynomial => Decay::Polynomial { power: train.decay_power, end_lr },
        },
    }
}

/// SHA-256 over what must be alike on all ranks for their gradients to be of the same thing: of model and student encoder the
/// configurations, the tokenizers, samples of all weights, and the commit where they come from the hub. Where they lie does not matter.
///
/// # Errors
/// Names the file that cannot be read.
pub fn model_digest(job: &Job, adapter: &AdapterConfig) -> peapod_model::Result<Vec<u8>> {
    let mut hasher = Sha256::new();
    let mut take = |piece: &[u8]| {
        // With its length before it, no piece can be taken for parts of two.
        hasher.update((piece.len() as u64).to_le_bytes());
        hasher.update(piece);
    };
    take(format!("{adapter:?}").as_bytes());
    let model = ModelSource::open(&job.model.path, job.model.config.as_deref())?;
    let student = hub::locate(&job.student.path)?;
    for folder in [model.path(), &student] {
        take(hub::commit_of(folder).unwrap_or_default().as_bytes());
    }
    model.sketch(&mut take)?;
    StudentEncoder::sketch(&student, &mut take)?;
    Ok(hasher.finalize().to_vec())
}

/// What the adapter's file of a step says about itself; `average`: the moving average's.
#[must_use]
pub fn metadata(job: &Job, adapter: &AdapterConfig, step: Step, average: bool) -> BTreeMap<String, String> {
    let metadata = AdapterMetadata {
        version: Some(PROGRAM_VERSION.into()),
        job: Some(job.name.clone()),
        step: Some(step.0),
        architecture: Some(if adapter.output.is_some() { "sdxl" } else { "sd15" }.into()),
        ema_decay: average.then_some(job.train.ema_decay),
        encoder: Some(job.student.path.clone()),
        context_length: Some(job.student.context_length),
        normalize_quotes: Some(job.student.normalize_quotes),
        project: Some(job.student.project),
        mask_pads: Some(job.adapter.mask_pads),
    };
    metadata.to_map()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_those_of_the_device_unless_the_job_says_otherwise() {
        let job = |preset: &str, dtype: &str, vae: &str| {
            let text = format!(
                "preset = \"{preset}\"\n[model]\npath = \"m\"\nvae_dtype = \"{vae}\"\n[student]\npath = \"s\"\n[data]\nshards = [\"a.tar\"]\n\
                 [train]\nsteps = 1\ndtype = \"{dtype}\"\n"
            );
            Job::parse(&text).unwrap()
        };
        let (cpu, gpu) = (Device::Cpu, Device::Cuda(0));
        for (job, device, network, vae) in [
            (job("fixed", "auto", "auto"), cpu, Kind::Float, VaeNumbers::F32),
            (job("fixed", "auto", "auto"), gpu, Kind::BFloat16, VaeNumbers::Bf16),
            (job("reference", "auto", "auto"), cpu, Kind::Float, VaeNumbers::F32),
            (job("reference", "auto", "auto"), gpu, Kind::Half, VaeNumbers::Tf32),
            (job("fixed", "f16", "f32"), cpu, Kind::Half, VaeNumbers::F32),
            (job("reference", "bf16", "bf16"), gpu, Kind::BFloat16, VaeNumbers::Bf16),
            (job("fixed", "f32", "tf32"), gpu, Kind::Float, VaeNumbers::Tf32),
            (job("reference", "f32", "f32"), gpu, Kind::Float, VaeNumbers::F32),
        ] {
            assert_eq!((network_kind(&job, device), vae_numbers(&job, device)), (network, vae), "{:?} {device:?}", job.preset);
            assert_eq!(first_loss_scale(&job, device).is_some(), network == Kind::Half);
        }
    }

    /// Copies a folder with all that lies in it.
    fn copy(from: &Path, to: &Path) {
        std::fs::create_dir_all(to).unwrap();
        for entry in std::fs::read_dir(from).unwrap() {
            let (path, name) = entry.map(|entry| (entry.path(), entry.file_name())).unwrap();
            if path.is_dir() {
                copy(&path, &to.join(name));
            } else {
                std::fs::copy(&path, to.join(name)).unwrap();
            }
        }
    }

    #[test]
    fn models_with_other_weights_or_vocabularies_are_told_apart_wherever_they_lie() {
        let folder = tempfile::tempdir().unwrap();
        let (demo, copied) = (Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/demo/model"), folder.path().join("model"));
        copy(&demo, &copied);
        let digest = |model: &Path| {
            let text = format!(
                "[model]\npath = \"{0}\"\n[student]\npath = \"{0}/text_encoder_zh\"\n[data]\nshards = [\"a.tar\"]\n[train]\nsteps = 1\n",
                model.display()
            );
            let adapter = AdapterConfig { input: 64, hidden: 32, depth: 3, pooled: 48, output: Some(80) };
            model_digest(&Job::parse(&text).unwrap(), &adapter).unwrap()
        };
        let same = digest(&demo);
        assert_eq!(digest(&copied), same);
        for (part, file) in [
            ("text_encoder_zh", "model.safetensors"),
            ("text_encoder_zh", "vocab.txt"),
            ("unet", "diffusion_pytorch_model.safetensors"),
            ("vae", "diffusion_pytorch_model.safetensors"),
            ("text_encoder_2", "model.safetensors"),
            ("tokenizer", "tokenizer.json"),
        ] {
            let path = copied.join(part).join(file);
            let bytes = std::fs::read(&path).unwrap();
            // The last number or character before the end.
            let mut other = bytes.clone();
            let at = other.len() - 2;
            other[at] ^= 1;
            std::fs::write(&path, other).unwrap();
            assert_ne!(digest(&copied), same, "{}", path.display());
            std::fs::write(&path, bytes).unwrap();
        }
        assert_eq!(digest(&copied), same);
    }
}
