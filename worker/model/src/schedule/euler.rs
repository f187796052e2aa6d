//! The steps of Euler's method, with and without fresh noise. Samples are `data + sigma * noise`, not of unit variance.

use super::noise::NoiseSchedule;
use super::sigmas::{karras, sigma_at, timestep_of};
use super::solver::{Plan, SolverConfig, SolverStep, spaced};
use super::{FinalSigma, Prediction, TimestepSpacing};

/// Plans `num_steps` steps; `ancestral` ones go below each noise level and come back to it with fresh noise.
///
/// A step along the derivative `(x - data) / sigma` from `sigma` to `s` is `x_next = (s / sigma) x + (1 - s / sigma) data`.
/// Source: Karras et al. 2022 (arXiv:2206.00364), algorithm 1 without its second order; the ancestral step is k-diffusion's.
pub(super) fn plan(schedule: &NoiseSchedule, config: &SolverConfig, num_steps: usize, ancestral: bool) -> Plan {
    // 1. Timesteps, kept in f32 elsewhere, and the noise levels there.
    let mut timesteps: Vec<f64> = spaced(schedule, config, num_steps).into_iter().map(|timestep| f64::from(timestep as f32)).collect();
    let mut sigmas: Vec<f64> = timesteps.iter().map(|&timestep| sigma_at(schedule, timestep)).collect();
    if config.karras && !ancestral {
        sigmas = karras(sigmas[num_steps - 1], sigmas[0], num_steps);
        timesteps = sigmas.iter().map(|&sigma| timestep_of(schedule, sigma)).collect();
    }
    let initial_scale = match config.spacing() {
        TimestepSpacing::Leading => sigmas[0].hypot(1.0),
        TimestepSpacing::Linspace | TimestepSpacing::Trailing => sigmas[0],
    };
    sigmas.push(match config.final_sigma {
        Some(FinalSigma::SigmaMin) if !ancestral => schedule.sigma(0),
        _ => 0.0,
    });

    // 2. Steps between them.
    let step = |index: usize| {
        let (sigma, next) = (sigmas[index], sigmas[index + 1]);
        let (landing, noise_scale) = if ancestral {
            let up = (next * next * (sigma * sigma - next * next) / (sigma * sigma)).max(0.0).sqrt();
            ((next * next - up * up).max(0.0).sqrt(), up)
        } else {
            (next, 0.0)
        };
        let [data_from_sample, data_from_output] = match config.prediction {
            Prediction::Epsilon => [1.0, -sigma],
            Prediction::Velocity => [1.0 / (sigma * sigma + 1.0), -sigma / sigma.hypot(1.0)],
        };
        SolverStep {
            timestep: timesteps[index],
            noised: [1.0, sigma],
            input_scale: sigma.hypot(1.0).recip(),
            data_from_sample,
            data_from_output,
            correction: 0.0,
            sample_scale: landing / sigma,
            target_scale: 1.0 - landing / sigma,
            noise_scale,
        }
    };
    Plan { initial_scale, steps: (0..num_steps).map(step).collect() }
}
