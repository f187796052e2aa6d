//! From prompts to pictures, batch by batch.

use std::convert::Infallible;
use std::ops::ControlFlow;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use tch::{Device, Kind, Tensor, no_grad_guard};

use super::config::SchedulerConfig;
use super::denoise::Texts;
use super::latents::Noise;
use super::options::{Progress, SampleOptions};
use super::prompter::Prompter;
use super::task::Task;
use crate::panics::{is_out_of_memory, message};
use crate::source::ModelSource;
use crate::unet::UNet;
use crate::vae::{Decoding, Vae};
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
        Ok(self.draw_task(prompter, prompts, options, &Task::default(), &mut on_step)?.pictures)
    }

    /// Draws as [`Sampler::draw`] does, unless `on_step` breaks off.
    ///
    /// Errors: those of [`Sampler::draw`].
    pub fn try_draw<S: AsRef<str>, B>(
        &self,
        prompter: Prompter<'_>,
        prompts: &[S],
        options: &SampleOptions,
        on_step: impl FnMut(Progress) -> ControlFlow<B>,
    ) -> Result<ControlFlow<B, Tensor>> {
        let drawn = self.try_draw_task(prompter, prompts, options, &Task::default(), on_step)?;
        Ok(drawn.map_continue(|drawn| drawn.pictures))
    }

    /// Draws as [`Sampler::draw`] does, from a picture, a mask, a control image or given noise.
    ///
    /// Errors: those of [`Sampler::try_draw_task`].
    pub fn draw_task<S: AsRef<str>>(
        &self,
        prompter: Prompter<'_>,
        prompts: &[S],
        options: &SampleOptions,
        task: &Task<'_>,
        on_step: &mut dyn FnMut(Progress),
    ) -> Result<Drawn> {
        let drawn = self.try_draw_task(prompter, prompts, options, task, |progress| {
            on_step(progress);
            ControlFlow::<Infallible>::Continue(())
        })?;
        match drawn {
            ControlFlow::Continue(drawn) => Ok(drawn),
            ControlFlow::Break(never) => match never {},
        }
    }

    /// As [`Sampler::try_draw`], from a picture, a mask, a control image or given noise.
    ///
    /// Errors: those of [`Sampler::draw`]; [`Error::Shape`] and [`Error::Unsupported`] for a task that does not fit model or options.
    pub fn try_draw_task<S: AsRef<str>, B>(
        &self,
        prompter: Prompter<'_>,
        prompts: &[S],
        options: &SampleOptions,
        task: &Task<'_>,
        mut on_step: impl FnMut(Progress) -> ControlFlow<B>,
    ) -> Result<ControlFlow<B, Drawn>> {
        let _guard = no_grad_guard();
        let batch_size = options.batch_size.max(1);
        let steps_each = options.num_steps - task.image.as_ref().map_or(0, |image| options.first_step(image.strength));
        let num_steps = prompts.len().div_ceil(batch_size) * steps_each;
        let mut steps_done = 0;
        // One negative prompt serves all pictures.
        let negative = if options.guidance > 1.0 { Some(prompter.encode(&[options.negative.as_str()])?) } else { None };
        let shape = self.latent_shape(options)?;
        let (mut pictures, mut initials, mut finals) = (Vec::new(), Vec::new(), Vec::new());
        for (index, prompts) in prompts.chunks(batch_size).enumerate() {
            let texts = Texts { positive: &prompter.encode(prompts)?, negative: negative.as_ref() };
            let first_image = options.first_image.wrapping_add((index * batch_size) as u64);
            let mut noise = Noise::new(options.seed, first_image, prompts.len(), shape, self.device);
            // The first draw is made even where it is not used: what follows is then the same.
            let drawn = noise.draw()?;
            let initial = match &task.noise {
                Some(given) => rows(given, first_image, prompts.len() as i64, shape)?.f_to_device(self.device)?,
                None => drawn,
            };
            let latents = self.try_denoise(&initial, texts, options, task, &mut || noise.draw(), &mut || {
                steps_done += 1;
                on_step(Progress { steps_done, num_steps })
            })?;
            match latents {
                ControlFlow::Continue(latents) => {
                    pictures.push(or_by_tiles(options.decoding, |decoding| self.decode_by(&latents, decoding))?);
                    initials.push(initial);
                    finals.push(latents);
                }
                ControlFlow::Break(reason) => return Ok(ControlFlow::Break(reason)),
            }
        }
        if pictures.is_empty() {
            return Err(Error::Shape { what: "Sampler::draw", detail: "no prompts".into() });
        }
        let [initial, latents] = [initials, finals].map(|batches| Tensor::f_cat(&batches, 0));
        Ok(ControlFlow::Continue(Drawn { pictures: Tensor::f_cat(&pictures, 0)?, initial: initial?, latents: latents? }))
    }

    /// Turns clean latents into pictures, all at once. Shapes: `[B, C, h, w]`, to `u8` `[B, H, W, 3]` on the host.
    pub fn decode(&self, latents: &Tensor) -> Result<Tensor> {
        self.decode_by(latents, Decoding::Whole)
    }

    /// As [`Sampler::decode`], with as much memory as `decoding` takes.
    pub fn decode_by(&self, latents: &Tensor, decoding: Decoding) -> Result<Tensor> {
        let _guard = no_grad_guard();
        let decoded = self.vae.decode_by(&latents.f_div_scalar(self.vae.scaling_factor())?, decoding)?.f_to_kind(Kind::Float)?;
        let unit = decoded.f_mul_scalar(0.5)?.f_add_scalar(0.5)?.f_clamp(0.0, 1.0)?;
        let bytes = unit.f_mul_scalar(255.0)?.f_round()?.f_to_kind(Kind::Uint8)?;
        Ok(bytes.f_permute([0, 2, 3, 1])?.f_contiguous()?.f_to_device(Device::Cpu)?)
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

/// What [`Sampler::try_draw_task`] gives.
#[derive(Debug)]
pub struct Drawn {
    /// `u8` `[B, height, width, 3]`, on the host.
    pub pictures: Tensor,
    /// The noise they began with, standard normal, `f32` `[B, C, h, w]`.
    pub initial: Tensor,
    /// The clean latents they were decoded from, scaled, `f32` `[B, C, h, w]`.
    pub latents: Tensor,
}

/// Decodes as is asked for; where that runs out of memory, which is a panic of libtorch's, tile by tile.
fn or_by_tiles(decoding: Decoding, decode: impl Fn(Decoding) -> Result<Tensor>) -> Result<Tensor> {
    let can_save = !matches!(decoding, Decoding::Tiled(_));
    // What is half done is dropped on the way out.
    match catch_unwind(AssertUnwindSafe(|| decode(decoding))) {
        Ok(Err(error)) if can_save && is_out_of_memory(&error.to_string()) => decode(Decoding::BY_TILES),
        Ok(decoded) => decoded,
        Err(panic) if can_save && is_out_of_memory(message(panic.as_ref())) => decode(Decoding::BY_TILES),
        Err(panic) => resume_unwind(panic),
    }
}

/// The given noise of the pictures numbered `first` and following.
fn rows(given: &Tensor, first: u64, count: i64, shape: [i64; 3]) -> Result<Tensor> {
    let size = given.size();
    let first = i64::try_from(first).unwrap_or(i64::MAX);
    if size.len() != 4 || size[1..] != shape || first.saturating_add(count) > size[0] {
        let detail = format!("{size:?}, wanted {count} of {shape:?} from number {first} on");
        return Err(Error::Shape { what: "given latents", detail });
    }
    Ok(given.f_narrow(0, first, count)?.f_to_kind(Kind::Float)?)
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
    fn decoding_that_runs_out_of_memory_is_done_once_more_by_tiles() {
        let tried = std::cell::RefCell::new(Vec::new());
        let decode = |decoding| {
            tried.borrow_mut().push(decoding);
            assert!(decoding == Decoding::BY_TILES, "CUDA out of memory. Tried to allocate 2.00 GiB");
            Ok(Tensor::from(1.0_f32))
        };
        assert!(or_by_tiles(Decoding::OneByOne, decode).is_ok());
        assert_eq!(*tried.borrow(), [Decoding::OneByOne, Decoding::BY_TILES]);
        let fails = |decoding, reason: &'static str| catch_unwind(|| or_by_tiles(decoding, |_| panic!("{reason}"))).is_err();
        assert!(fails(Decoding::Tiled(32), "out of memory") && fails(Decoding::Whole, "an illegal instruction"));
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
}
