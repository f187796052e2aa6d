//! The training step of PEA distillation: an English teacher and a student in another language share one frozen UNet; the
//! gradient of their difference reaches the adapter alone.
//!
//! Notation follows the method: z says that a sample is native, m that its text is dropped, `L_task`, `L_logit` and `L_feat` are the
//! losses. Sums over samples go out, never means: whoever joins the micro-batches divides by their number.

mod ahead;
mod batch;
mod config;
mod lanes;
mod loss;
mod noise;
mod subset;

use std::path::Path;

use peapod_kernels::Kernels;
use tch::{Device, Kind, Tensor, no_grad_guard};

use self::batch::Flags;
pub use self::batch::{English, Images, MicroBatch, Prompts};
pub use self::config::{DistillConfig, LoadOptions, Precision, TimeIdsOrder};
use self::lanes::Lanes;
use self::loss::{Lesson, Losses};
pub use self::loss::{LossSums, PendingSums};
pub use self::noise::encode_pixels;
use self::noise::{Noised, Noising};
use self::subset::Subset;
use crate::adapter::{Adapter, AdapterConfig};
use crate::sample::{Prompter, Sampler, SchedulerConfig};
use crate::schedule::NoiseSchedule;
use crate::source::ModelSource;
use crate::text::{Conditioning, EnglishEncoders, StudentEncoder, StudentOptions};
use crate::transfer::send;
use crate::unet::{Added, ForwardOptions, UNet, UNetOutput};
use crate::vae::Vae;
use crate::weights::Frozen;
use crate::{Error, Result};

/// The frozen models of the distillation and what is constant about them.
pub struct Distiller {
    unet: UNet,
    vae: Vae,
    student: StudentEncoder,
    teacher: Option<Teacher>,
    scheduler: SchedulerConfig,
    config: DistillConfig,
    empty_student: EmptyPrompt,
    noising: Noising,
    native_side: i64,
    device: Device,
    lanes: Option<Lanes>,
    kernels: Option<Kernels>,
    /// Whether a teacher's batch is filled up to a quarter of the micro-batch.
    fills_quarters: bool,
}

/// The English side.
struct Teacher {
    encoders: EnglishEncoders,
    /// Token states of the empty prompt, `[1, L, D]`.
    empty: Frozen,
    /// Its embedding, `[1, P]`, where the model has one.
    empty_pooled: Option<Frozen>,
}

/// What the student says of the empty prompt. The adapter on it changes with every step.
struct EmptyPrompt {
    /// Encoder states without dropout `[1, L, Din]`.
    states: Frozen,
    /// Its tokens, bool `[1, L]`; `None` if padding is not masked.
    mask: Option<Frozen>,
}

/// The stages of a step, in their order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// Pictures to noised latents.
    Encode,
    /// English text, and the teacher's pass.
    Teacher,
    /// The student's text and the adapter.
    Text,
    /// The student's pass and the losses; with gradient checkpointing, its backward pass too.
    Student,
    /// The backward pass to the adapter.
    Backward,
}

impl Teacher {
    fn new(encoders: EnglishEncoders) -> Result<Self> {
        let Conditioning { sequence, pooled, .. } = encoders.encode(&[""])?;
        Ok(Self { encoders, empty: Frozen::new(sequence), empty_pooled: pooled.map(Frozen::new) })
    }
}

impl Distiller {
    /// Builds the networks of an opened SDXL or SD1.5, and loads the student's text encoder from a folder of its own.
    ///
    /// Errors: those of loading each model; [`Error::Shape`] if their widths do not fit; those of encoding the empty prompt.
    pub fn load(model: &ModelSource, student_dir: &Path, options: LoadOptions) -> Result<Self> {
        let student = StudentEncoder::load(student_dir, options.context_length, options.student)?;
        Self::with_student(model, student, options)
    }

    /// As [`Distiller::load`], with a student that was loaded already, on the device and with the context length of `options`.
    ///
    /// Errors: those of [`Distiller::load`].
    pub fn with_student(model: &ModelSource, student: StudentEncoder, options: LoadOptions) -> Result<Self> {
        let LoadOptions { distill: config, context_length: _, student: StudentOptions { kind, device, .. }, vae_kind } = options;
        let unet = if config.fp8_linears { model.unet_with_fp8_linears(kind, device)? } else { model.unet(kind, device)? };
        let vae = if config.vae_round_fp16 { model.vae_rounded(vae_kind, device)? } else { model.vae(vae_kind, device)? };
        let teacher = config.distill.then(|| model.english(kind, device)).transpose()?;

        let fault = |detail: String| Err(Error::Shape { what: "Distiller", detail });
        let (inputs, outputs, latents) = (unet.config().in_channels, unet.config().out_channels, vae.config().latent_channels);
        if inputs != latents || outputs != latents {
            return fault(format!("a UNet from {inputs} to {outputs} channels on latents of {latents}"));
        }
        if let Some(encoders) = teacher.as_ref().filter(|encoders| encoders.width() != unet.text_width()) {
            return fault(format!("teacher states of {}, a UNet for {}", encoders.width(), unet.text_width()));
        }
        let scheduler = model.scheduler().clone();
        let schedule = NoiseSchedule::new(&scheduler.noise);
        if schedule.is_empty() {
            return fault("an empty noise schedule".into());
        }
        let _guard = no_grad_guard();
        let teacher = teacher.map(Teacher::new).transpose()?;
        let mask = config.mask_pads.then(|| student.token_mask(&[""])).transpose()?;
        let empty_student = EmptyPrompt { states: Frozen::new(student.encode(&[""])?), mask: mask.map(Frozen::new) };
        let noising = Noising::new(&schedule, scheduler.solver.prediction, &config, device);
        let native_side = model.sample_size() * vae.downscale();
        let (lanes, kernels) = (Lanes::new(device)?, peapod_kernels::of(device, kind));
        Ok(Self {
            unet,
            vae,
            student,
            teacher,
            scheduler,
            config,
            empty_student,
            noising,
            native_side,
            device,
            lanes,
            kernels,
            fills_quarters: device.is_cuda(),
        })
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
    pub fn teacher(&self) -> Option<&EnglishEncoders> {
        self.teacher.as_ref().map(|teacher| &teacher.encoders)
    }

    /// The token states that the English encoders give the empty prompt, `[1, L, D]`; `None` without distillation.
    pub fn empty_english(&self) -> Option<&Tensor> {
        self.teacher.as_ref().map(|teacher| &*teacher.empty)
    }

    /// What the student's encoder says of the empty prompt, without dropout, `[1, L, Din]`.
    pub fn empty_student(&self) -> &Tensor {
        &self.empty_student.states
    }

    /// The noise schedule, and how the model asks to be sampled.
    pub fn scheduler(&self) -> &SchedulerConfig {
        &self.scheduler
    }

    /// The road from a prompt to the UNet that `adapter` is trained on.
    pub fn prompter<'a>(&'a self, adapter: &'a Adapter) -> Prompter<'a> {
        Prompter::Student { encoder: &self.student, adapter, mask_pads: self.config.mask_pads }
    }

    /// What draws pictures with these models.
    pub fn sampler(&self) -> Sampler<'_> {
        Sampler { unet: &self.unet, vae: &self.vae, scheduler: &self.scheduler, device: self.device }
    }

    /// Side of the pictures that the model was trained on, in pixels.
    pub fn native_side(&self) -> i64 {
        self.native_side
    }

    /// Number of timesteps that a micro-batch may draw from.
    pub fn num_timesteps(&self) -> i64 {
        self.noising.signal.size()[0]
    }

    /// The widths of the adapter that fits between student and UNet, with `depth` linears of `hidden` in its projector.
    pub fn adapter_config(&self, hidden: i64, depth: usize) -> AdapterConfig {
        AdapterConfig::between(self.student.width(), self.unet.text_width(), self.unet.pooled_width(), hidden, depth)
    }

    /// Adds the gradient of the loss, summed over the samples of `batch`, to `gradient`, and returns the sums of the losses.
    ///
    /// Shapes: `gradient` f32 `[P]`, in the order of the adapter's parameters.
    /// Errors: [`Error::Shape`] if batch, adapter, gradient and models do not fit; [`Error::Torch`]. Nothing is added on an error.
    pub fn accumulate(&self, adapter: &Adapter, batch: &MicroBatch, gradient: &mut Tensor) -> Result<LossSums> {
        self.accumulate_scaled(adapter, batch, gradient, 1.0)
    }

    /// As [`Distiller::accumulate`], with the loss multiplied by `scale` on the way back and the gradient divided by it at the end: keeps
    /// small gradients within the range of networks in f16. What exceeds that range makes `gradient` infinite or NaN.
    pub fn accumulate_scaled(&self, adapter: &Adapter, batch: &MicroBatch, gradient: &mut Tensor, scale: f64) -> Result<LossSums> {
        self.accumulate_observed(adapter, batch, gradient, scale, &mut |_| {})?.read()
    }

    /// As [`Distiller::accumulate_scaled`], but for the wait: a GPU may still be at work when this returns, and more can be prepared for
    /// it.
    pub fn accumulate_ahead(&self, adapter: &Adapter, batch: &MicroBatch, gradient: &mut Tensor, scale: f64) -> Result<PendingSums> {
        self.accumulate_observed(adapter, batch, gradient, scale, &mut |_| {})
    }

    /// As [`Distiller::accumulate_ahead`]; calls `observe` at the end of each stage, whose work a GPU may still have before it.
    ///
    /// On the CPU, stages are those of the first of the threads that share the samples; the last one is told again once all of them are
    /// done.
    pub fn accumulate_observed(
        &self,
        adapter: &Adapter,
        batch: &MicroBatch,
        gradient: &mut Tensor,
        scale: f64,
        observe: &mut dyn FnMut(Stage),
    ) -> Result<PendingSums> {
        let num_parameters: i64 = adapter.parameters().iter().map(|parameter| parameter.numel() as i64).sum();
        if gradient.size() != [num_parameters] || gradient.kind() != Kind::Float {
            let detail = format!("gradient is {:?} {:?}, wanted Float [{num_parameters}]", gradient.kind(), gradient.size());
            return Err(Error::Shape { what: "Distiller::accumulate", detail });
        }
        if batch.is_empty() {
            return Ok(PendingSums::default());
        }
        let differentiate =
            |adapter: &Adapter, batch: &MicroBatch, observe: &mut dyn FnMut(Stage)| self.differentiate(adapter, batch, scale, observe);
        let parts = self.in_lanes(adapter, batch, differentiate, observe)?;
        observe(Stage::Backward);
        let _guard = no_grad_guard();
        let mut sums = PendingSums::default();
        for (part, losses) in parts {
            let _ = gradient.g_add_(&part);
            sums.append(losses);
        }
        Ok(sums)
    }

    /// Does `work` to the samples of a batch, in all lanes at once if every lane has some of them. The results are in the order of the
    /// samples.
    fn in_lanes<T: Send>(
        &self,
        adapter: &Adapter,
        batch: &MicroBatch,
        work: impl Fn(&Adapter, &MicroBatch, &mut dyn FnMut(Stage)) -> Result<T> + Sync,
        observe: &mut dyn FnMut(Stage),
    ) -> Result<Vec<T>> {
        self.check(batch)?;
        let (lanes, mut parts) = match &self.lanes {
            Some(lanes) if batch.len() >= lanes.num() => (lanes, batch.split(lanes.num()).into_iter()),
            _ => return Ok(vec![work(adapter, batch, observe)?]),
        };
        let Some(first) = parts.next() else { return Ok(Vec::new()) };
        // Each lane differentiates under a name of its own.
        let rest = parts.map(|part| Ok((adapter.alias()?, part))).collect::<Result<Vec<_>>>()?;
        let (first, rest) = lanes.run(rest, |(adapter, part)| work(&adapter, &part, &mut |_| {}), || work(adapter, &first, observe));
        [first].into_iter().chain(rest).collect()
    }

    /// The gradient of the loss summed over a batch, f32 `[P]`, and the sums of the losses.
    fn differentiate(
        &self,
        adapter: &Adapter,
        batch: &MicroBatch,
        scale: f64,
        observe: &mut dyn FnMut(Stage),
    ) -> Result<(Tensor, PendingSums)> {
        let (noised, flags, lesson) = self.prepare(adapter, batch, observe)?;
        let conditioning = self.condition(adapter, batch, &noised, &flags, true)?;
        observe(Stage::Text);
        let (scalar, losses) = match self.config.gradient_checkpointing {
            true => self.study_again(&conditioning, &noised, &lesson, scale)?,
            false => {
                let losses = lesson.compare(&self.study(&conditioning, &noised)?)?;
                (losses.total(self.config.feature_weight) * scale, losses)
            }
        };
        observe(Stage::Student);
        let parts = Tensor::f_run_backward(&[scalar], adapter.parameters(), false, false)?;
        let flat: Vec<Tensor> = parts.iter().map(|part| part.flatten(0, -1)).collect();
        let _guard = no_grad_guard();
        let flat = Tensor::f_cat(&flat, 0)? / scale;
        observe(Stage::Backward);
        Ok((flat, losses.pending(batch.len())?))
    }

    /// Returns the sums of the losses over the samples of `batch`, without any gradient: for validation.
    ///
    /// Errors: those of [`Distiller::accumulate`].
    pub fn evaluate(&self, adapter: &Adapter, batch: &MicroBatch) -> Result<LossSums> {
        if batch.is_empty() {
            return Ok(LossSums::default());
        }
        let evaluate = |adapter: &Adapter, batch: &MicroBatch, observe: &mut dyn FnMut(Stage)| {
            let _guard = no_grad_guard();
            let (noised, flags, lesson) = self.prepare(adapter, batch, observe)?;
            let conditioning = self.condition(adapter, batch, &noised, &flags, false)?;
            lesson.compare(&self.study(&conditioning, &noised)?)?.pending(batch.len())
        };
        let mut sums = PendingSums::default();
        self.in_lanes(adapter, batch, evaluate, &mut |_| {})?.into_iter().for_each(|part| sums.append(part));
        sums.read()
    }

    fn check(&self, batch: &MicroBatch) -> Result<Flags> {
        let flags = batch.check(self.vae.config().latent_channels, self.vae.downscale(), self.num_timesteps())?;
        let empty = self.teacher.as_ref().map(|teacher| (&*teacher.empty, teacher.empty_pooled.as_deref()));
        batch.check_states(&self.empty_student.states, empty)?;
        Ok(flags)
    }

    /// Everything that does not depend on the adapter: noised latents, and what the teacher says of them.
    fn prepare(&self, adapter: &Adapter, batch: &MicroBatch, observe: &mut dyn FnMut(Stage)) -> Result<(Noised, Flags, Lesson)> {
        self.check_adapter(adapter)?;
        let _guard = no_grad_guard();
        let flags = self.check(batch)?;
        let noised = self.noise(batch)?;
        observe(Stage::Encode);

        // Which samples each loss is summed over. Samples never mix in a network, so the teacher sees only those it is needed for.
        let (taught, untaught) = match (&self.teacher, self.config.hybrid) {
            (Some(_), true) => (Subset::of(&flags.native, false, self.device)?, Subset::of(&flags.native, true, self.device)?),
            (Some(_), false) => (Subset::all(batch.len()), Subset::all(batch.len())),
            (None, _) => (Subset::none(), Subset::all(batch.len())),
        };
        let teacher = match &self.teacher {
            Some(teacher) if !taught.is_empty() => Some(self.teach(teacher, batch, &noised, &taught)?),
            _ => None,
        };
        observe(Stage::Teacher);
        let lesson = Lesson {
            target: untaught.select(&noised.target),
            untaught,
            taught,
            teacher,
            weights: self.noising.weight.as_ref().map(|weight| weight.index_select(0, &noised.timesteps)),
            kind: self.config.loss_dtype.kind(),
            guard: self.config.feature_guard,
            kernels: self.kernels.clone(),
        };
        Ok((noised, flags, lesson))
    }

    fn check_adapter(&self, adapter: &Adapter) -> Result<()> {
        let AdapterConfig { hidden, depth, .. } = *adapter.config();
        let wanted = self.adapter_config(hidden, depth);
        if *adapter.config() == wanted {
            return Ok(());
        }
        let widths = |config: &AdapterConfig| (config.input, config.pooled, config.output);
        let detail = format!("the adapter has (input, pooled, output) {:?}, the models {:?}", widths(adapter.config()), widths(&wanted));
        Err(Error::Shape { what: "Distiller", detail })
    }

    /// The teacher's pass on a subset.
    fn teach(&self, teacher: &Teacher, batch: &MicroBatch, noised: &Noised, subset: &Subset) -> Result<UNetOutput> {
        let num_rows = if self.fills_quarters { fill(subset.len(), batch.len()) } else { subset.len() };
        let rows = |tensor: &Tensor| repeat_last(&subset.select(tensor), num_rows);
        let states = match &batch.english {
            English::Captions(captions) => {
                // As the rows of tensors, the last one again.
                let last = subset.indices.last().into_iter().cycle();
                let captions: Vec<&str> = subset.indices.iter().chain(last).take(num_rows).map(|&index| captions[index].as_str()).collect();
                teacher.encoders.encode(&captions)?
            }
            English::States(Conditioning { sequence, pooled, .. }) => {
                let states = |tensor: &Tensor| Ok::<_, Error>(rows(&send(tensor, self.device)?)?.to_kind(Kind::Float));
                Conditioning { sequence: states(sequence)?, pooled: pooled.as_ref().map(states).transpose()?, mask: None }
            }
        };
        let drop = rows(&noised.drop)?;
        let text = replace_dropped(&drop, &teacher.empty, &states.sequence);
        let time_ids = rows(&noised.time_ids)?;
        let added = states.pooled.map(|pooled| Added {
            pooled: match &teacher.empty_pooled {
                Some(empty) if self.config.drop_pooled => replace_dropped(&drop, empty, &pooled),
                _ => pooled,
            },
            time_ids,
        });
        let UNetOutput { sample, features } =
            self.unet.forward(&rows(&noised.sample)?, &rows(&noised.timesteps)?, &text, added.as_ref())?;
        let wanted = |map: &Tensor| map.narrow(0, 0, subset.len() as i64);
        Ok(UNetOutput { sample: wanted(&sample), features: features.iter().map(wanted).collect() })
    }

    /// What the student's UNet is told; the gradient flows from it to the adapter, also through the empty prompt. Only training drops
    /// elements in the encoder.
    fn condition(&self, adapter: &Adapter, batch: &MicroBatch, noised: &Noised, flags: &Flags, training: bool) -> Result<Conditioning> {
        let encode = |prompts: &[String], seeds: &[u64]| {
            let _guard = no_grad_guard();
            if training { self.student.encode_training(prompts, seeds) } else { self.student.encode(prompts) }
        };
        let (states, mut mask) = match &batch.prompts {
            Prompts::Captions(captions) => {
                let mask = self.config.mask_pads.then(|| self.student.token_mask(captions)).transpose()?;
                (encode(captions, &batch.text_dropout)?, mask)
            }
            Prompts::States { sequence, mask } => {
                let mask = self.config.mask_pads.then(|| send(mask, self.device)).transpose()?;
                (send(sequence, self.device)?.to_kind(Kind::Float), mask)
            }
        };
        let prompt = adapter.forward_masked(&states, mask.as_ref());
        let (mut sequence, mut pooled) = (prompt.sequence, prompt.pooled);
        if flags.any_dropped {
            let states = match training && self.student.drops() {
                false => self.empty_student.states.shallow_clone(),
                // Each sample has its own, and other elements are dropped than from its caption's states.
                true => encode(&vec![String::new(); batch.len()], &batch.text_dropout.iter().map(|seed| !seed).collect::<Vec<_>>())?,
            };
            let empty = adapter.forward_masked(&states, self.empty_student.mask.as_deref());
            sequence = replace_dropped(&noised.drop, &empty.sequence, &sequence);
            mask = mask.zip(self.empty_student.mask.as_deref()).map(|(mask, empty)| replace_dropped(&noised.drop, empty, &mask));
            if self.config.drop_pooled {
                pooled = pooled.zip(empty.pooled).map(|(pooled, empty)| replace_dropped(&noised.drop, &empty, &pooled));
            }
        }
        Ok(Conditioning { sequence, pooled, mask })
    }

    /// The student's pass on the whole batch, with its graph.
    fn study(&self, conditioning: &Conditioning, noised: &Noised) -> Result<UNetOutput> {
        let options = ForwardOptions { mask: conditioning.mask.as_ref(), control: None };
        let added = added(conditioning, noised);
        self.unet.forward_with(&noised.sample, &noised.timesteps, &conditioning.sequence, added.as_ref(), &options)
    }

    /// The student's pass without its graph, and back. Returns a scalar with the loss's gradient with respect to what the adapter made, and
    /// the losses.
    fn study_again(&self, conditioning: &Conditioning, noised: &Noised, lesson: &Lesson, scale: f64) -> Result<(Tensor, Losses)> {
        let Conditioning { sequence, pooled, mask } = conditioning;
        let added = added(conditioning, noised);
        let (gradients, losses) =
            self.unet.recompute(&noised.sample, &noised.timesteps, sequence, added.as_ref(), mask.as_ref(), |output| {
                let losses = lesson.compare(output)?;
                Ok((losses.total(self.config.feature_weight) * scale, losses))
            })?;
        // The gradient of a product's sum with respect to one factor is the other.
        let along = |made: &Tensor, gradient: &Tensor| (made * gradient.to_kind(Kind::Float)).sum(Kind::Float);
        let parts = [(Some(sequence), &gradients.text), (pooled.as_ref(), &gradients.pooled)];
        let parts = parts.into_iter().filter_map(|(made, gradient)| Some(along(made?, gradient.as_ref()?)));
        Ok((parts.fold(sequence.sum(Kind::Float) * 0.0, |sum, part| sum + part), losses))
    }
}

/// SDXL's pooled text and sizes, for a UNet that takes them.
fn added(conditioning: &Conditioning, noised: &Noised) -> Option<Added> {
    let pooled = conditioning.pooled.as_ref()?.shallow_clone();
    Some(Added { pooled, time_ids: noised.time_ids.shallow_clone() })
}

/// Rows of a teacher's batch that `count` of a micro-batch's samples are filled up to: a quarter, a half, three quarters or all of it. Each
/// batch size is planned for by cuDNN and kept room for, once; a few rows more are cheaper than many sizes.
fn fill(count: usize, micro_batch: usize) -> usize {
    count.next_multiple_of(micro_batch.div_ceil(4).max(1)).min(micro_batch)
}

/// A tensor with its last row again and again, up to so many rows.
fn repeat_last(tensor: &Tensor, num_rows: usize) -> Result<Tensor> {
    let (count, num_rows) = (tensor.size().first().copied().unwrap_or_default(), num_rows as i64);
    if count == 0 || count >= num_rows {
        return Ok(tensor.shallow_clone());
    }
    let mut shape = tensor.size();
    shape[0] = num_rows - count;
    Ok(Tensor::f_cat(&[tensor, &tensor.narrow(0, count - 1, 1).expand(&shape, false)], 0)?)
}

/// `empty` (batch 1) where `drop` says so, else `states`.
fn replace_dropped(drop: &Tensor, empty: &Tensor, states: &Tensor) -> Tensor {
    let mut shape = vec![1; states.dim()];
    shape[0] = -1;
    empty.where_self(&drop.reshape(shape), states)
}

#[cfg(test)]
mod tests;
