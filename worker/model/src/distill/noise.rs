//! From pictures, or what was made of them before, to noised latents.

use tch::{Device, Kind, Tensor};

use super::batch::{Images, MicroBatch};
use super::{DistillConfig, Distiller};
use crate::Result;
use crate::schedule::{NoiseSchedule, Prediction};
use crate::transfer::send;
use crate::vae::{Moments, Vae};
use crate::weights::Frozen;

/// What depends on the timestep alone: tables in f32, one entry a timestep.
pub(super) struct Noising {
    /// Share of the image in a noised latent: `sqrt(alpha_bar)`.
    pub(super) signal: Frozen,
    /// Share of the noise: `sqrt(1 - alpha_bar)`.
    pub(super) noise: Frozen,
    /// Weight of a prediction; `None`: all alike.
    pub(super) weight: Option<Frozen>,
}

/// What both passes of the UNet are given alike.
pub(super) struct Noised {
    /// Noised latents `[B, 4, h, w]`.
    pub(super) sample: Tensor,
    /// What the network should predict of them: the noise in them, offset included, or the velocity.
    pub(super) target: Tensor,
    pub(super) timesteps: Tensor,
    pub(super) drop: Tensor,
    pub(super) time_ids: Tensor,
}

impl Distiller {
    /// Encodes the images, where they are not encoded yet, and adds noise: `x_t = sqrt(alpha_bar) z + sqrt(1 - alpha_bar) eps`.
    pub(super) fn noise(&self, batch: &MicroBatch) -> Result<Noised> {
        let here = |tensor: &Tensor| send(tensor, self.device);
        let moments = match &batch.images {
            Images::Pixels(pixels) => encode_pixels(&self.vae, &here(pixels)?, self.config.vae_round_fp16)?,
            Images::Moments(Moments { mean, log_variance }) => {
                Moments { mean: here(mean)?.to_kind(Kind::Float), log_variance: here(log_variance)?.to_kind(Kind::Float) }
            }
        };
        let latents = moments.sample(&here(&batch.posterior)?) * self.vae.scaling_factor();
        // The target includes the offset: the student learns to predict all of the noise.
        let noise = here(&batch.noise)? + here(&batch.offset)?.unsqueeze(-1).unsqueeze(-1) * self.config.noise_offset;
        let timesteps = here(&batch.timesteps)?;
        let at = |table: &Tensor| table.index_select(0, &timesteps).reshape([-1, 1, 1, 1]);
        let (signal_share, noise_share) = (at(&self.noising.signal), at(&self.noising.noise));
        let sample = &signal_share * &latents + &noise_share * &noise;
        let target = match self.scheduler.solver.prediction {
            Prediction::Epsilon => noise,
            Prediction::Velocity => signal_share * noise - noise_share * latents,
        };
        let time_ids = batch.time_ids(self.config.time_ids_order, self.vae.downscale(), self.device)?;
        Ok(Noised { sample, target, timesteps, drop: here(&batch.drop)?, time_ids })
    }
}

/// What the autoencoder says of RGB pixels, u8 `[B, 3, H, W]` on its device; with `round_fp16` of pixels rounded to f16.
///
/// Errors: those of [`Vae::encode`].
pub fn encode_pixels(vae: &Vae, pixels: &Tensor, round_fp16: bool) -> Result<Moments> {
    let mut images = pixels.to_kind(Kind::Float) / 127.5 - 1.0;
    if round_fp16 {
        images = images.to_kind(Kind::Half).to_kind(Kind::Float);
    }
    vae.encode(&images)
}

impl Noising {
    pub(super) fn new(schedule: &NoiseSchedule, prediction: Prediction, config: &DistillConfig, device: Device) -> Self {
        // In half precision the table is rounded first and the roots are taken of what is left, as in the published trainer.
        let kind = config.schedule_dtype.kind();
        let alpha_bar = Tensor::from_slice(schedule.alphas_cumprod()).to_kind(Kind::Float).to_kind(kind);
        let variance: Tensor = 1.0 - &alpha_bar;
        let table = |tensor: Tensor| Frozen::new(tensor.to_kind(Kind::Float).to_device(device));
        let weight = |alpha_bar: &f64| {
            let ratio = alpha_bar / (1.0 - alpha_bar);
            let bounded = ratio.min(config.min_snr_gamma);
            match prediction {
                Prediction::Epsilon => bounded / ratio,
                Prediction::Velocity => bounded / (ratio + 1.0),
            }
        };
        let weights = || Tensor::from_slice(&schedule.alphas_cumprod().iter().map(weight).collect::<Vec<f64>>());
        Self {
            signal: table(alpha_bar.sqrt()),
            noise: table(variance.sqrt()),
            weight: (config.min_snr_gamma > 0.0).then(|| table(weights())),
        }
    }
}
