//! Text to image with classifier-free guidance.

use std::convert::Infallible;
use std::ops::ControlFlow;

use tch::{Device, Kind, Tensor, no_grad_guard};

use super::config::SchedulerConfig;
use super::latents::initial_latents;
use super::prompter::Prompter;
use super::solver::DpmSolver;
use crate::source::ModelSource;
use crate::text::Conditioning;
use crate::unet::{Added, ForwardOptions, UNet};
use crate::vae::Vae;
use crate::{Error, Result};

/// How a [`Pipeline`] is loaded.
#[derive(Debug, Clone, Copy)]
pub struct PipelineOptions {
    /// Where everything runs.
    pub device: Device,
    /// The kind the UNet computes in.
    pub unet_kind: Kind,
    /// The kind the VAE computes in; SDXL's overflows in f16.
    pub vae_kind: Kind,
}

/// What to draw, and how.
#[derive(Debug, Clone, PartialEq)]
pub struct SampleOptions {
    /// Height of the pictures in pixels.
    pub height: i64,
    /// Width of the pictures in pixels.
    pub width: i64,
    /// Number of solver steps.
    pub num_steps: usize,
    /// How far to go beyond the unconditional prediction, in the direction of the prompt; 1 or less draws without guidance.
    pub guidance: f64,
    /// Share of the rescaled prediction whose contrast is that of the conditional one (arXiv:2305.08891, section 3.4); 0 leaves it out.
    pub guidance_rescale: f64,
    /// What the pictures should not show.
    pub negative: String,
    /// Seed of the pictures.
    pub seed: u64,
    /// Number of the first picture under this seed: picture 5 is the same whether drawn alone or sixth of ten.
    pub first_image: u64,
    /// Number of pictures drawn at a time.
    pub batch_size: usize,
}

impl Default for SampleOptions {
    /// SDXL's customary values: 1024 x 1024, 30 steps, guidance 7.5.
    fn default() -> Self {
        Self {
            height: 1024,
            width: 1024,
            num_steps: 30,
            guidance: 7.5,
            guidance_rescale: 0.0,
            negative: String::new(),
            seed: 0,
            first_image: 0,
            batch_size: 1,
        }
    }
}

/// How far a call has come; given after each solver step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Number of UNet steps done, over all batches.
    pub steps_done: usize,
    /// Number of UNet steps of the whole call.
    pub num_steps: usize,
}

/// A model loaded for drawing.
pub struct Pipeline {
    unet: UNet,
    vae: Vae,
    scheduler: SchedulerConfig,
    device: Device,
}

/// What drawing needs of a model, borrowed: from a [`Pipeline`], or from a trainer that has the parts loaded anyway.
#[derive(Clone, Copy)]
pub struct Sampler<'a> {
    /// The noise predictor.
    pub unet: &'a UNet,
    /// Turns latents into pictures.
    pub vae: &'a Vae,
    /// Noise schedule and solver settings.
    pub scheduler: &'a SchedulerConfig,
    /// Where the UNet and the VAE are.
    pub device: Device,
}

impl Pipeline {
    /// Builds UNet and autoencoder of an opened model. Text encoders are loaded apart: see [`Prompter`].
    ///
    /// Errors: those of [`ModelSource::unet`] and [`ModelSource::vae`].
    pub fn load(model: &ModelSource, options: PipelineOptions) -> Result<Self> {
        Ok(Self {
            unet: model.unet(options.unet_kind, options.device)?,
            vae: model.vae(options.vae_kind, options.device)?,
            scheduler: model.scheduler().clone(),
            device: options.device,
        })
    }

    /// Returns the parts to draw with.
    pub fn sampler(&self) -> Sampler<'_> {
        Sampler { unet: &self.unet, vae: &self.vae, scheduler: &self.scheduler, device: self.device }
    }
}

impl Sampler<'_> {
    /// Draws one picture a prompt. Shapes: `u8` `[B, height, width, 3]` on the host.
    ///
    /// Errors: [`Error::Shape`] if there is no prompt, a size is not a multiple of what the VAE needs or the conditioning does not fit
    /// the UNet; [`Error::Unsupported`] for an impossible number of steps.
    pub fn draw<S: AsRef<str>>(
        &self,
        prompter: Prompter<'_>,
        prompts: &[S],
        options: &SampleOptions,
        mut on_step: impl FnMut(Progress),
    ) -> Result<Tensor> {
        let drawn = self.try_draw(prompter, prompts, options, |progress| {
            on_step(progress);
            ControlFlow::<Infallible>::Continue(())
        })?;
        match drawn {
            ControlFlow::Continue(pictures) => Ok(pictures),
            ControlFlow::Break(never) => match never {},
        }
    }

    /// Draws as [`Sampler::draw`] does, unless `on_step` breaks off.
    ///
    /// Errors: those of [`Sampler::draw`].
    pub fn try_draw<S: AsRef<str>, B>(
        &self,
        prompter: Prompter<'_>,
        prompts: &[S],
        options: &SampleOptions,
        mut on_step: impl FnMut(Progress) -> ControlFlow<B>,
    ) -> Result<ControlFlow<B, Tensor>> {
        let _guard = no_grad_guard();
        let batch_size = options.batch_size.max(1);
        let num_steps = prompts.len().div_ceil(batch_size) * options.num_steps;
        let mut steps_done = 0;
        // One negative prompt serves all pictures.
        let negative = if options.guidance > 1.0 { Some(prompter.encode(&[options.negative.as_str()])?) } else { None };
        let mut pictures = Vec::new();
        for (index, prompts) in prompts.chunks(batch_size).enumerate() {
            let positive = prompter.encode(prompts)?;
            let first_image = options.first_image.wrapping_add((index * batch_size) as u64);
            let latents = initial_latents(options.seed, first_image, prompts.len(), self.latent_shape(options)?, self.device)?;
            let latents = self.try_denoise(&latents, &positive, negative.as_ref(), options, || {
                steps_done += 1;
                on_step(Progress { steps_done, num_steps })
            })?;
            match latents {
                ControlFlow::Continue(latents) => pictures.push(self.decode(&latents)?),
                ControlFlow::Break(reason) => return Ok(ControlFlow::Break(reason)),
            }
        }
        if pictures.is_empty() {
            return Err(Error::Shape { what: "Sampler::draw", detail: "no prompts".into() });
        }
        Ok(ControlFlow::Continue(Tensor::f_cat(&pictures, 0)?))
    }

    /// Runs the solver from pure noise to clean latents, in `f32`.
    ///
    /// Shapes: `latents` `[B, C, h, w]`; `positive` of batch B, `negative` of batch 1, or none to draw without guidance.
    /// Errors: those of [`Sampler::draw`].
    pub fn denoise(
        &self,
        latents: &Tensor,
        positive: &Conditioning,
        negative: Option<&Conditioning>,
        options: &SampleOptions,
        mut on_step: impl FnMut(),
    ) -> Result<Tensor> {
        let clean = self.try_denoise(latents, positive, negative, options, || {
            on_step();
            ControlFlow::<Infallible>::Continue(())
        })?;
        match clean {
            ControlFlow::Continue(latents) => Ok(latents),
            ControlFlow::Break(never) => match never {},
        }
    }

    fn try_denoise<B>(
        &self,
        latents: &Tensor,
        positive: &Conditioning,
        negative: Option<&Conditioning>,
        options: &SampleOptions,
        mut on_step: impl FnMut() -> ControlFlow<B>,
    ) -> Result<ControlFlow<B, Tensor>> {
        let _guard = no_grad_guard();
        let &SampleOptions { guidance, guidance_rescale, .. } = options;
        let mut solver = DpmSolver::new(self.scheduler, options.num_steps)?;
        let num_images = latents.size().first().copied().unwrap_or(0);
        // Unconditional rows come first, then the conditional ones.
        let copies = if negative.is_some() { 2 } else { 1 };
        let joined = |part: fn(&Conditioning) -> Option<&Tensor>| -> Result<Option<Tensor>> {
            let Some(positive) = part(positive) else { return Ok(None) };
            let Some(negative) = negative.and_then(part) else { return Ok(Some(positive.shallow_clone())) };
            let mut size = negative.size();
            size[0] = num_images;
            Ok(Some(Tensor::f_cat(&[negative.f_expand(size, false)?, positive.shallow_clone()], 0)?))
        };
        let sequence = joined(|conditioning| Some(&conditioning.sequence))?.unwrap_or_else(|| positive.sequence.shallow_clone());
        let added = self.added(joined(|conditioning| conditioning.pooled.as_ref())?, copies * num_images, options)?;

        let mask = joined(|conditioning| conditioning.mask.as_ref())?;
        let options = ForwardOptions { mask: mask.as_ref(), control: None };

        let mut latents = latents.f_to_kind(Kind::Float)?;
        while let Some(timestep) = solver.timestep() {
            let timesteps = Tensor::f_full([copies * num_images], timestep, (Kind::Int64, self.device))?;
            let input = latents.f_repeat([copies, 1, 1, 1])?;
            let output = self.unet.forward_with(&input, &timesteps, &sequence, added.as_ref(), &options)?;
            let predicted = output.sample.f_to_kind(Kind::Float)?;
            let predicted = if negative.is_some() { guide(&predicted, guidance, guidance_rescale)? } else { predicted };
            latents = solver.step(&latents, &predicted)?;
            if let ControlFlow::Break(reason) = on_step() {
                return Ok(ControlFlow::Break(reason));
            }
        }
        Ok(ControlFlow::Continue(latents))
    }

    /// Turns clean latents into pictures. Shapes: `[B, C, h, w]`, to `u8` `[B, H, W, 3]` on the host.
    pub fn decode(&self, latents: &Tensor) -> Result<Tensor> {
        let _guard = no_grad_guard();
        let decoded = self.vae.decode(&latents.f_div_scalar(self.vae.scaling_factor())?)?.f_to_kind(Kind::Float)?;
        let unit = decoded.f_mul_scalar(0.5)?.f_add_scalar(0.5)?.f_clamp(0.0, 1.0)?;
        let bytes = unit.f_mul_scalar(255.0)?.f_round()?.f_to_kind(Kind::Uint8)?;
        Ok(bytes.f_permute([0, 2, 3, 1])?.f_contiguous()?.f_to_device(Device::Cpu)?)
    }

    /// Pooled text and sizes, for a UNet that takes them: nothing was cropped, and the pictures' size is what was asked for.
    fn added(&self, pooled: Option<Tensor>, rows: i64, options: &SampleOptions) -> Result<Option<Added>> {
        let Some(width) = self.unet.pooled_width() else { return Ok(None) };
        let Some(pooled) = pooled else {
            let detail = format!("the UNet takes pooled text of width {width}, the conditioning has none (an SD1.5 adapter?)");
            return Err(Error::Shape { what: "conditioning", detail });
        };
        let (height, width) = (options.height as f32, options.width as f32);
        let time_ids = Tensor::f_from_slice(&[height, width, 0.0, 0.0, height, width])?.f_to_device(self.device)?;
        Ok(Some(Added { pooled, time_ids: time_ids.f_expand([rows, 6], false)? }))
    }

    fn latent_shape(&self, options: &SampleOptions) -> Result<[i64; 3]> {
        let (factor, SampleOptions { height, width, .. }) = (self.vae.downscale(), options);
        if *height < 1 || *width < 1 || height % factor != 0 || width % factor != 0 {
            let detail = format!("{width} x {height}; both must be positive multiples of {factor}");
            return Err(Error::Shape { what: "picture size", detail });
        }
        Ok([self.vae.config().latent_channels, height / factor, width / factor])
    }
}

/// Joins the unconditional and the conditional half of a prediction: `u + s (c - u)`, then brought part of the way back to the
/// standard deviation of `c`.
///
/// Shapes: `[2 B, C, h, w]` to `[B, C, h, w]`.
fn guide(predicted: &Tensor, scale: f64, rescale: f64) -> Result<Tensor> {
    let halves = predicted.f_chunk(2, 0)?;
    let [unconditional, conditional] = halves.as_slice() else {
        return Err(Error::Shape { what: "guidance", detail: format!("a batch of {:?} has no two halves", predicted.size()) });
    };
    let guided = unconditional.f_add(&conditional.f_sub(unconditional)?.f_mul_scalar(scale)?)?;
    if rescale <= 0.0 {
        return Ok(guided);
    }
    let deviation = |x: &Tensor| x.f_std_dim(&[1i64, 2, 3][..], true, true);
    let rescaled = guided.f_mul(&deviation(conditional)?.f_div(&deviation(&guided)?)?)?;
    Ok(guided.f_lerp(&rescaled, rescale)?)
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};

    use super::*;
    use crate::adapter::{Adapter, AdapterConfig};
    use crate::text::{StudentEncoder, StudentOptions};

    const OPTIONS: PipelineOptions = PipelineOptions { device: Device::Cpu, unet_kind: Kind::Float, vae_kind: Kind::Float };

    fn demo() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/demo/model")
    }

    fn model() -> ModelSource {
        ModelSource::open(&demo(), None).unwrap()
    }

    fn student() -> StudentEncoder {
        let options = StudentOptions::new(Kind::Float, Device::Cpu);
        StudentEncoder::load(&demo().join("text_encoder_zh"), 24, options).unwrap()
    }

    fn adapter(input: i64, output: Option<i64>) -> Adapter {
        let pooled = if output.is_some() { 48 } else { 80 };
        Adapter::fresh(AdapterConfig { input, hidden: 32, depth: 3, pooled, output }, 0, Device::Cpu).unwrap()
    }

    fn small() -> SampleOptions {
        SampleOptions { height: 32, width: 48, num_steps: 2, guidance: 3.0, seed: 9, ..SampleOptions::default() }
    }

    #[test]
    fn a_picture_does_not_depend_on_the_batch_it_is_drawn_in() {
        let pipeline = Pipeline::load(&model(), OPTIONS).unwrap();
        let (encoder, adapter) = (student(), adapter(64, Some(80)));
        let prompter = Prompter::Student { encoder: &encoder, adapter: &adapter, mask_pads: false };
        let mut reports = Vec::new();
        let prompts = ["红色的圆形", "蓝色的方形", "绿色的星形"];
        let singly = pipeline.sampler().draw(prompter, &prompts, &small(), |progress| reports.push(progress.steps_done)).unwrap();
        assert_eq!((singly.size(), singly.kind()), (vec![3, 32, 48, 3], Kind::Uint8));
        assert_eq!(reports, [1, 2, 3, 4, 5, 6]);

        let differ = |left: &Tensor, right: &Tensor| {
            let distance = (left.to_kind(Kind::Int) - right.to_kind(Kind::Int)).abs();
            distance.max().int64_value(&[])
        };
        // Another batch size may choose other kernels, which round differently: one grey level at most.
        let together = SampleOptions { batch_size: 2, ..small() };
        assert!(differ(&singly, &pipeline.sampler().draw(prompter, &prompts, &together, |_| ()).unwrap()) <= 1);
        let half_way = |progress: Progress| if progress.steps_done < 3 { ControlFlow::Continue(()) } else { ControlFlow::Break("enough") };
        let broken_off = pipeline.sampler().try_draw(prompter, &prompts, &small(), half_way).unwrap();
        assert!(matches!(broken_off, ControlFlow::Break("enough")));
        let last = SampleOptions { first_image: 2, ..small() };
        assert_eq!(differ(&singly.narrow(0, 2, 1), &pipeline.sampler().draw(prompter, &prompts[2..], &last, |_| ()).unwrap()), 0);
    }

    #[test]
    fn half_precision_draws_nearly_the_same() {
        let (encoder, adapter) = (student(), adapter(64, Some(80)));
        let prompter = Prompter::Student { encoder: &encoder, adapter: &adapter, mask_pads: false };
        let draw = |kind| {
            let pipeline = Pipeline::load(&model(), PipelineOptions { unet_kind: kind, ..OPTIONS }).unwrap();
            pipeline.sampler().draw(prompter, &["红色的圆形"], &small(), |_| ()).unwrap().to_kind(Kind::Float)
        };
        let distance = (draw(Kind::Float) - draw(Kind::BFloat16)).abs().mean(Kind::Float).double_value(&[]);
        assert!(distance < 8.0, "{distance} grey levels of 255");
    }

    #[test]
    fn what_does_not_fit_is_refused_before_any_work() {
        let pipeline = Pipeline::load(&model(), OPTIONS).unwrap();
        let encoder = student();
        let draw = |adapter: &Adapter, options: &SampleOptions, prompts: &[&str]| {
            let prompter = Prompter::Student { encoder: &encoder, adapter, mask_pads: false };
            pipeline.sampler().draw(prompter, prompts, options, |_| panic!("a step was made")).unwrap_err()
        };
        let fits = adapter(64, Some(80));
        let one: &[&str] = &["红"];
        assert!(draw(&fits, &small(), &[]).to_string().contains("no prompts"));
        assert!(draw(&fits, &SampleOptions { width: 50, ..small() }, one).to_string().contains("multiples of 8"));
        assert!(draw(&fits, &SampleOptions { num_steps: 0, ..small() }, one).to_string().contains("between 1 and 999"));
        assert!(draw(&fits, &SampleOptions { num_steps: 1000, ..small() }, one).to_string().contains("between 1 and 999"));
        assert!(draw(&adapter(32, Some(80)), &small(), one).to_string().contains("64 wide, the adapter was made for 32"));
        assert!(draw(&adapter(64, None), &small(), one).to_string().contains("pooled text of width 48"));
        assert!(matches!(draw(&adapter(64, Some(72)), &small(), one), Error::Shape { .. }));
    }

    #[test]
    fn rescaled_guidance_has_the_contrast_of_the_conditional_prediction() {
        let predicted = initial_latents(1, 0, 4, [4, 8, 8], Device::Cpu).unwrap();
        let conditional = predicted.narrow(0, 2, 2);
        let deviation = |x: &Tensor| x.std_dim(&[1i64, 2, 3][..], true, false);
        let guided = guide(&predicted, 7.5, 1.0).unwrap();
        assert!((deviation(&guided) - deviation(&conditional)).abs().max().double_value(&[]) < 1e-5);
        assert!(guide(&predicted, 1.0, 0.0).unwrap().allclose(&conditional, 1e-5, 1e-6, false));
    }
}
