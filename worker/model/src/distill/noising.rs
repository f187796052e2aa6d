//! How much of a noised latent is noise, by its timestep.

use tch::{Device, Kind, Tensor};

use super::DistillConfig;
use crate::schedule::{NoiseSchedule, Prediction};
use crate::weights::Frozen;

/// What depends on the timestep alone: tables in f32, one entry a timestep.
pub(super) struct Noising {
    /// Share of the image in a noised latent: `sqrt(alpha_bar)`.
    pub signal: Frozen,
    /// Share of the noise: `sqrt(1 - alpha_bar)`.
    pub noise: Frozen,
    /// Weight of a prediction; `None`: all alike.
    pub weight: Option<Frozen>,
}

impl Noising {
    pub fn new(schedule: &NoiseSchedule, prediction: Prediction, config: &DistillConfig, device: Device) -> Self {
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
