//! The way from noise to clean latents: solver steps with classifier-free guidance.

use std::convert::Infallible;
use std::ops::ControlFlow;

use tch::{Kind, Tensor, no_grad_guard};

use super::options::SampleOptions;
use super::pipeline::Sampler;
use super::solver::Solver;
use super::task::{Inpainting, Task};
use crate::controlnet::ControlOptions;
use crate::text::Conditioning;
use crate::unet::{Added, ForwardOptions};
use crate::{Error, Result};

/// What pictures should show, and what they should not.
#[derive(Clone, Copy)]
pub struct Texts<'a> {
    /// One row a picture.
    pub positive: &'a Conditioning,
    /// One row for all pictures; `None` draws without guidance.
    pub negative: Option<&'a Conditioning>,
}

/// What the networks are told beside the sample, alike in all steps: the unconditional rows first, then the conditional ones.
struct Told {
    copies: i64,
    sequence: Tensor,
    added: Option<Added>,
    mask: Option<Tensor>,
}

impl Sampler<'_> {
    /// Runs the solver to clean latents, in `f32`.
    ///
    /// Shapes: `initial` is standard normal noise `[B, C, h, w]`; `noise` is asked for more of it where the scheduler adds some.
    /// Errors: those of [`Sampler::try_draw_task`].
    pub fn denoise(
        &self,
        initial: &Tensor,
        texts: Texts<'_>,
        options: &SampleOptions,
        task: &Task<'_>,
        noise: &mut dyn FnMut() -> Result<Tensor>,
    ) -> Result<Tensor> {
        match self.try_denoise(initial, texts, options, task, noise, &mut || ControlFlow::<Infallible>::Continue(()))? {
            ControlFlow::Continue(latents) => Ok(latents),
            ControlFlow::Break(never) => match never {},
        }
    }

    pub(super) fn try_denoise<B>(
        &self,
        initial: &Tensor,
        texts: Texts<'_>,
        options: &SampleOptions,
        task: &Task<'_>,
        noise: &mut dyn FnMut() -> Result<Tensor>,
        on_step: &mut dyn FnMut() -> ControlFlow<B>,
    ) -> Result<ControlFlow<B, Tensor>> {
        let _guard = no_grad_guard();
        let &SampleOptions { guidance, guidance_rescale, .. } = options;
        let inpainting = task.inpainting(self.unet.config().in_channels, self.vae.config().latent_channels)?;
        let num_images = initial.size().first().copied().unwrap_or(0);
        let told = self.told(texts, num_images, options)?;
        let rows = told.copies * num_images;
        let control_image = match &task.control {
            Some(control) => Some(control.image.f_to_device(self.device)?.f_expand([rows, -1, -1, -1], false)?),
            None => None,
        };
        // What inpainting UNets see behind the latents.
        let channels = match (inpainting, &task.inpaint) {
            (Inpainting::Channels, Some(inpaint)) => {
                Some(Tensor::f_cat(&[&inpaint.mask, &inpaint.masked], 1)?.f_expand([rows, -1, -1, -1], false)?)
            }
            _ => None,
        };

        // 1. The sample to begin with.
        let plan = self.scheduler.plan(options.solver, options.num_steps)?;
        let initial = initial.f_to_kind(Kind::Float)?;
        let first = task.image.as_ref().map_or(0, |image| options.first_step(image.strength));
        let mut solver = Solver::from(plan, first);
        if solver.num_left() == 0 {
            let what = format!("a strength that leaves none of {} steps", options.num_steps);
            return Err(Error::Unsupported { what, hint: "raise the strength or the number of steps".into() });
        }
        let mut latents = match &task.image {
            // Inpainting at full strength sees nothing of what was below the mask.
            Some(image) if inpainting == Inpainting::Nothing || image.strength < 1.0 => solver.noised(&image.latents, &initial)?,
            _ => solver.initial(&initial)?,
        };

        // 2. The steps.
        while let Some(timestep) = solver.timestep() {
            let timesteps = Tensor::f_full([rows], timestep, (Kind::Float, self.device))?;
            let input = solver.input(&latents)?.f_repeat([told.copies, 1, 1, 1])?;
            let residuals = match (&task.control, &control_image) {
                (Some(control), Some(image)) => {
                    let options = ControlOptions { image, scale: control.scale, mask: told.mask.as_ref() };
                    Some(control.network.forward(&input, &timesteps, &told.sequence, told.added.as_ref(), &options)?)
                }
                _ => None,
            };
            let forward = ForwardOptions { mask: told.mask.as_ref(), control: residuals.as_ref() };
            let input = match &channels {
                Some(channels) => Tensor::f_cat(&[&input, channels], 1)?,
                None => input,
            };
            let output = self.unet.forward_with(&input, &timesteps, &told.sequence, told.added.as_ref(), &forward)?;
            let predicted = output.sample.f_to_kind(Kind::Float)?;
            let predicted = if told.copies == 2 { guide(&predicted, guidance, guidance_rescale)? } else { predicted };
            latents = solver.step(&latents, &predicted, &mut *noise)?;
            if let (Inpainting::Blended, Some(image), Some(inpaint)) = (inpainting, &task.image, &task.inpaint) {
                let kept = solver.noised(&image.latents, &initial)?;
                latents = kept.f_add(&latents.f_sub(&kept)?.f_mul(&inpaint.mask)?)?;
            }
            if let ControlFlow::Break(reason) = on_step() {
                return Ok(ControlFlow::Break(reason));
            }
        }
        Ok(ControlFlow::Continue(latents))
    }

    /// Joins both texts, and adds the picture's sizes.
    fn told(&self, texts: Texts<'_>, num_images: i64, options: &SampleOptions) -> Result<Told> {
        let Texts { positive, negative } = texts;
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
        Ok(Told { copies, sequence, added, mask: joined(|conditioning| conditioning.mask.as_ref())? })
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
    use std::path::Path;

    use tch::Device;

    use super::*;
    use crate::controlnet::ControlNet;
    use crate::sample::{Control, SchedulerConfig, initial_latents};
    use crate::unet::UNet;
    use crate::vae::Vae;

    #[test]
    fn rescaled_guidance_has_the_contrast_of_the_conditional_prediction() {
        let predicted = initial_latents(1, 0, 4, [4, 8, 8], Device::Cpu).unwrap();
        let conditional = predicted.narrow(0, 2, 2);
        let deviation = |x: &Tensor| x.std_dim(&[1i64, 2, 3][..], true, false);
        let guided = guide(&predicted, 7.5, 1.0).unwrap();
        assert!((deviation(&guided) - deviation(&conditional)).abs().max().double_value(&[]) < 1e-5);
        assert!(guide(&predicted, 1.0, 0.0).unwrap().allclose(&conditional, 1e-5, 1e-6, false));
    }

    /// Text states of masked padding reach the picture neither through the UNet nor through the ControlNet.
    #[test]
    fn padding_that_is_masked_is_hidden_from_the_controlnet_too() {
        tch::set_num_threads(1);
        let (kind, device) = (Kind::Float, Device::Cpu);
        let case = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/cases/draw_sd15");
        let unet = UNet::load(&case.join("unet"), kind, device).unwrap();
        let vae = Vae::load(&case.join("vae"), kind, device).unwrap();
        let control = ControlNet::load(&case.join("controlnet"), kind, device).unwrap();
        let scheduler = SchedulerConfig::load(&case).unwrap();
        let sampler = Sampler { unet: &unet, vae: &vae, scheduler: &scheduler, device };
        let side = 8 * control.config().downscale();
        let image = Tensor::arange(3 * side * side, (kind, device)).sin().abs().view([1, 3, side, side]);
        let task = Task { control: Some(Control { network: &control, image, scale: 1.0 }), ..Task::default() };
        let draw = |padding: f64, is_masked: bool| {
            let words = Tensor::arange(3 * unet.text_width(), (kind, device)).cos().view([1, 3, -1]);
            let pads = Tensor::full([1, 2, unet.text_width()], padding, (kind, device));
            let mask = is_masked.then(|| Tensor::from_slice(&[true, true, true, false, false]).unsqueeze(0));
            let positive = Conditioning { sequence: Tensor::cat(&[words, pads], 1), pooled: None, mask };
            let options = SampleOptions { num_steps: 2, ..SampleOptions::default() };
            let initial = initial_latents(1, 0, 1, [4, 8, 8], device).unwrap();
            let texts = Texts { positive: &positive, negative: None };
            sampler.denoise(&initial, texts, &options, &task, &mut || panic!("no noise is added")).unwrap()
        };
        let apart = |is_masked| (draw(-3.0, is_masked) - draw(5.0, is_masked)).abs().max().double_value(&[]);
        assert!(apart(false) > 1e-3 && apart(true) == 0.0, "{} and {}", apart(false), apart(true));
    }
}
