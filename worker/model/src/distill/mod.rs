//! The training step of PEA distillation: an English teacher and a student in another language share one frozen UNet; the
//! gradient of their difference reaches the adapter alone.
//!
//! Notation follows the method: z says that a sample is native, m that its text is dropped, `L_task`, `L_logit` and `L_feat` are the
//! losses. Sums over samples go out, never means: whoever joins the micro-batches divides by their number.

mod batch;
mod loss;

use std::path::Path;

use serde::Deserialize;
use tch::{Device, Kind, Tensor, no_grad_guard};

use self::batch::Flags;
pub use self::batch::MicroBatch;
pub use self::loss::LossSums;
use self::loss::{Losses, sum_of_mean_squares};
use crate::adapter::{Adapter, AdapterConfig};
use crate::sample::SchedulerConfig;
use crate::schedule::{NoiseSchedule, Prediction};
use crate::text::{SdxlTextEncoders, StudentEncoder, StudentOptions, TextStates};
use crate::unet::{Added, UNet, UNetOutput};
use crate::vae::Vae;
use crate::{Error, Result};

/// What a training step computes. The default is the method's preset `fixed`.
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
}

impl Default for DistillConfig {
    fn default() -> Self {
        Self { noise_offset: 0.5, hybrid: true, distill: true, feature_weight: 0.1, time_ids_order: TimeIdsOrder::Hw, drop_pooled: false }
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
    /// Whether curly quotes in the student's prompts become straight ones.
    pub normalize_quotes: bool,
    /// The kind of UNet and text encoders.
    pub kind: Kind,
    /// The kind of the autoencoder; SDXL's overflows in f16.
    pub vae_kind: Kind,
    /// Where everything lies.
    pub device: Device,
}

/// The frozen models of the distillation and what is constant about them.
pub struct Distiller {
    unet: UNet,
    vae: Vae,
    student: StudentEncoder,
    teacher: Option<Teacher>,
    config: DistillConfig,
    /// Encoder states of the empty prompt `[1, L, Din]`. The adapter on them changes with every step.
    empty_student: Tensor,
    /// `alpha_bar` of every timestep, f32.
    alphas_cumprod: Tensor,
    device: Device,
}

/// The English side.
struct Teacher {
    encoders: SdxlTextEncoders,
    /// States of the empty prompt, batch 1.
    empty: TextStates,
}

/// What both passes of the UNet are given alike.
struct Noised {
    /// Noised latents `[B, 4, h, w]`.
    sample: Tensor,
    /// The noise in them, offset included.
    noise: Tensor,
    timesteps: Tensor,
    drop: Tensor,
    time_ids: Tensor,
}

impl Distiller {
    /// Loads an SDXL in the folders of diffusers (`unet`, `vae`, `text_encoder`, `text_encoder_2`, `tokenizer`, `tokenizer_2`,
    /// `scheduler`) and the student's text encoder from a folder of its own.
    ///
    /// Errors: those of loading each model and of [`Distiller::new`]; [`Error::Unsupported`] if the UNet does not predict noise.
    pub fn load(model_dir: &Path, student_dir: &Path, options: LoadOptions) -> Result<Self> {
        let LoadOptions { distill, context_length, normalize_quotes, kind, vae_kind, device } = options;
        let scheduler = SchedulerConfig::load(model_dir)?;
        if scheduler.solver.prediction != Prediction::Epsilon {
            let hint = "the losses compare predictions of the noise: use a model with prediction_type \"epsilon\"".into();
            return Err(Error::Unsupported { what: format!("distilling a model that predicts {:?}", scheduler.solver.prediction), hint });
        }
        let unet = UNet::load(&model_dir.join("unet"), kind, device)?;
        let vae = Vae::load(&model_dir.join("vae"), vae_kind, device)?;
        let student =
            StudentEncoder::load(student_dir, context_length, StudentOptions { normalize_quotes, ..StudentOptions::new(kind, device) })?;
        let teacher = distill.distill.then(|| SdxlTextEncoders::load(model_dir, kind, device)).transpose()?;
        Self::new(unet, vae, student, teacher, &NoiseSchedule::new(&scheduler.noise), distill, device)
    }

    /// Joins loaded models.
    ///
    /// `teacher` may be absent only if `config` asks for none. All models must lie on one device.
    /// Errors: [`Error::Shape`] if the teacher is missing or the models' widths do not fit; those of encoding the empty prompt.
    pub fn new(
        unet: UNet,
        vae: Vae,
        student: StudentEncoder,
        teacher: Option<SdxlTextEncoders>,
        schedule: &NoiseSchedule,
        config: DistillConfig,
        device: Device,
    ) -> Result<Self> {
        let fault = |detail: String| Err(Error::Shape { what: "Distiller", detail });
        if unet.config().in_channels != vae.config().latent_channels || unet.config().out_channels != vae.config().latent_channels {
            let (inputs, outputs, latents) = (unet.config().in_channels, unet.config().out_channels, vae.config().latent_channels);
            return fault(format!("a UNet from {inputs} to {outputs} channels on latents of {latents}"));
        }
        if unet.pooled_width().is_none() {
            return fault("the UNet takes no pooled text: it is not an SDXL".into());
        }
        if let Some(encoders) = teacher.as_ref().filter(|encoders| encoders.width() != unet.text_width()) {
            return fault(format!("teacher states of {}, a UNet for {}", encoders.width(), unet.text_width()));
        }
        if schedule.is_empty() {
            return fault("an empty noise schedule".into());
        }
        let _guard = no_grad_guard();
        let teacher = match (teacher, config.distill) {
            (Some(encoders), true) => Some(Teacher { empty: encoders.encode(&[""])?, encoders }),
            (None, true) => return fault("distillation without a teacher".into()),
            (_, false) => None,
        };
        let alphas_cumprod = Tensor::from_slice(schedule.alphas_cumprod()).to_kind(Kind::Float).to_device(device);
        let empty_student = student.encode(&[""])?;
        Ok(Self { unet, vae, student, teacher, config, empty_student, alphas_cumprod, device })
    }

    /// The frozen UNet.
    pub fn unet(&self) -> &UNet {
        &self.unet
    }

    /// The frozen autoencoder.
    pub fn vae(&self) -> &Vae {
        &self.vae
    }

    /// The frozen encoder of the student's language.
    pub fn student(&self) -> &StudentEncoder {
        &self.student
    }

    /// The frozen English encoders; `None` without distillation.
    pub fn teacher(&self) -> Option<&SdxlTextEncoders> {
        self.teacher.as_ref().map(|teacher| &teacher.encoders)
    }

    /// Number of timesteps that a micro-batch may draw from.
    pub fn num_timesteps(&self) -> i64 {
        self.alphas_cumprod.size()[0]
    }

    /// Adds the gradient of the loss, summed over the samples of `batch`, to `gradient`, and returns the sums of the losses.
    ///
    /// Shapes: `gradient` f32 `[P]`, in the order of the adapter's parameters.
    /// Errors: [`Error::Shape`] if batch, adapter, gradient and models do not fit; [`Error::Torch`]. Nothing is added on an error.
    pub fn accumulate(&self, adapter: &Adapter, batch: &MicroBatch, gradient: &mut Tensor) -> Result<LossSums> {
        let num_parameters: i64 = adapter.parameters().iter().map(|parameter| parameter.numel() as i64).sum();
        if gradient.size() != [num_parameters] || gradient.kind() != Kind::Float {
            let detail = format!("gradient is {:?} {:?}, wanted Float [{num_parameters}]", gradient.kind(), gradient.size());
            return Err(Error::Shape { what: "Distiller::accumulate", detail });
        }
        if batch.is_empty() {
            return Ok(LossSums::default());
        }
        let losses = self.losses(adapter, batch)?;
        let parts = Tensor::f_run_backward(&[losses.total(self.config.feature_weight)], adapter.parameters(), false, false)?;
        let flat: Vec<Tensor> = parts.iter().map(|part| part.flatten(0, -1)).collect();
        let _guard = no_grad_guard();
        let _ = gradient.g_add_(&Tensor::f_cat(&flat, 0)?);
        losses.sums(batch.len())
    }

    /// Returns the sums of the losses over the samples of `batch`, without any gradient: for validation.
    ///
    /// Errors: those of [`Distiller::accumulate`].
    pub fn evaluate(&self, adapter: &Adapter, batch: &MicroBatch) -> Result<LossSums> {
        if batch.is_empty() {
            return Ok(LossSums::default());
        }
        let _guard = no_grad_guard();
        self.losses(adapter, batch)?.sums(batch.len())
    }

    /// One forward pass of student and teacher.
    fn losses(&self, adapter: &Adapter, batch: &MicroBatch) -> Result<Losses> {
        self.check_adapter(adapter)?;
        let flags = batch.check(self.vae.config().latent_channels, self.vae.downscale(), self.num_timesteps())?;
        let noised = self.noise(batch)?;

        // Which samples each loss is summed over. Samples never mix in a network, so the teacher sees only those it is needed for.
        let (taught, untaught) = match (&self.teacher, self.config.hybrid) {
            (Some(_), true) => (Subset::of(&flags.native, false), Subset::of(&flags.native, true)),
            (Some(_), false) => (Subset::all(batch.len()), Subset::all(batch.len())),
            (None, _) => (Subset::none(), Subset::all(batch.len())),
        };
        let lesson = match &self.teacher {
            Some(teacher) if !taught.is_empty() => Some(self.teach(teacher, batch, &noised, &taught)?),
            _ => None,
        };

        let output = self.study(adapter, batch, &noised, &flags)?;
        let zero = || Tensor::zeros([], (Kind::Float, self.device));
        let task = match untaught.is_empty() {
            true => zero(),
            false => sum_of_mean_squares(&untaught.select(&output.sample), &untaught.select(&noised.noise)),
        };
        let Some(lesson) = lesson else { return Ok(Losses { task, logit: zero(), feature: zero() }) };
        let logit = sum_of_mean_squares(&taught.select(&output.sample), &lesson.sample);
        let pairs = output.features.iter().zip(&lesson.features);
        let feature = pairs.fold(zero(), |sum, (student, teacher)| sum + sum_of_mean_squares(&taught.select(student), teacher));
        Ok(Losses { task, logit, feature })
    }

    fn check_adapter(&self, adapter: &Adapter) -> Result<()> {
        let AdapterConfig { input, pooled, output, .. } = *adapter.config();
        let (got, wanted) = ((input, Some(pooled), output), (self.student.width(), self.unet.pooled_width(), Some(self.unet.text_width())));
        if got == wanted {
            return Ok(());
        }
        let detail = format!("the adapter has (input, pooled, output) {got:?}, the models {wanted:?}");
        Err(Error::Shape { what: "Distiller", detail })
    }

    /// Encodes the images and adds noise: `x_t = sqrt(alpha_bar) z + sqrt(1 - alpha_bar) eps`.
    fn noise(&self, batch: &MicroBatch) -> Result<Noised> {
        let _guard = no_grad_guard();
        let here = |tensor: &Tensor| tensor.to_device(self.device);
        let images = here(&batch.pixels).to_kind(Kind::Float) / 127.5 - 1.0;
        let latents = self.vae.encode(&images)?.sample(&here(&batch.posterior)) * self.vae.scaling_factor();
        // The target includes the offset: the student learns to predict all of the noise.
        let noise = here(&batch.noise) + here(&batch.offset).unsqueeze(-1).unsqueeze(-1) * self.config.noise_offset;
        let timesteps = here(&batch.timesteps);
        let alpha_bar = self.alphas_cumprod.index_select(0, &timesteps).reshape([-1, 1, 1, 1]);
        let noise_variance: Tensor = 1.0 - &alpha_bar;
        let sample = alpha_bar.sqrt() * latents + noise_variance.sqrt() * &noise;
        let time_ids = batch.time_ids(self.config.time_ids_order, self.device);
        Ok(Noised { sample, noise, timesteps, drop: here(&batch.drop), time_ids })
    }

    /// The teacher's pass on a subset, without gradient.
    fn teach(&self, teacher: &Teacher, batch: &MicroBatch, noised: &Noised, subset: &Subset) -> Result<UNetOutput> {
        let _guard = no_grad_guard();
        let english: Vec<&str> = subset.indices.iter().map(|&index| batch.english[index].as_str()).collect();
        let states = teacher.encoders.encode(&english)?;
        let drop = subset.select(&noised.drop);
        let text = replace_dropped(&drop, &teacher.empty.sequence, &states.sequence);
        let pooled = match self.config.drop_pooled {
            true => replace_dropped(&drop, &teacher.empty.pooled, &states.pooled),
            false => states.pooled,
        };
        let added = Added { pooled, time_ids: subset.select(&noised.time_ids) };
        self.unet.forward(&subset.select(&noised.sample), &subset.select(&noised.timesteps), &text, Some(&added))
    }

    /// The student's pass on the whole batch; the gradient flows from it to the adapter, also through the empty prompt.
    fn study(&self, adapter: &Adapter, batch: &MicroBatch, noised: &Noised, flags: &Flags) -> Result<UNetOutput> {
        let states = {
            let _guard = no_grad_guard();
            self.student.encode(&batch.captions)?
        };
        let without_pooled = || Error::Shape { what: "Distiller", detail: "the adapter makes no pooled text: it is one for SD1.5".into() };
        let prompt = adapter.forward(&states);
        let (mut text, mut pooled) = (prompt.sequence, prompt.pooled.ok_or_else(without_pooled)?);
        if flags.any_dropped {
            let empty = adapter.forward(&self.empty_student);
            text = replace_dropped(&noised.drop, &empty.sequence, &text);
            if self.config.drop_pooled {
                pooled = replace_dropped(&noised.drop, &empty.pooled.ok_or_else(without_pooled)?, &pooled);
            }
        }
        let added = Added { pooled, time_ids: noised.time_ids.shallow_clone() };
        self.unet.forward(&noised.sample, &noised.timesteps, &text, Some(&added))
    }
}

/// `empty` (batch 1) where `drop` says so, else `states`.
fn replace_dropped(drop: &Tensor, empty: &Tensor, states: &Tensor) -> Tensor {
    let mut shape = vec![1; states.dim()];
    shape[0] = -1;
    empty.where_self(&drop.reshape(shape), states)
}

/// Some samples of a batch, in order.
struct Subset {
    indices: Vec<usize>,
    is_all: bool,
}

impl Subset {
    fn of(flags: &[bool], wanted: bool) -> Self {
        let indices: Vec<usize> = (0..flags.len()).filter(|&index| flags[index] == wanted).collect();
        Self { is_all: indices.len() == flags.len(), indices }
    }

    fn all(count: usize) -> Self {
        Self { indices: (0..count).collect(), is_all: true }
    }

    fn none() -> Self {
        Self { indices: Vec::new(), is_all: false }
    }

    fn is_empty(&self) -> bool {
        self.indices.is_empty()
    }

    /// The rows of these samples; the tensor itself if that is all of them. Selecting, not masking by zero, keeps an infinite value
    /// of a sample that does not count from turning the sum into NaN.
    fn select(&self, batch: &Tensor) -> Tensor {
        if self.is_all {
            return batch.shallow_clone();
        }
        let indices: Vec<i64> = self.indices.iter().map(|&index| index as i64).collect();
        batch.index_select(0, &Tensor::from_slice(&indices).to_device(batch.device()))
    }
}

#[cfg(test)]
mod tests;
