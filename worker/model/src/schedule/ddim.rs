//! The steps of DDIM without fresh noise.

use super::TimestepSpacing;
use super::noise::NoiseSchedule;
use super::solver::{SolverConfig, SolverStep, spaced};

/// Plans `num_steps` steps: `x_next = sqrt(alpha_bar') data + sqrt(1 - alpha_bar') eps`, with `eps` the noise that data and sample imply.
///
/// Each step goes down by the same number of timesteps, whatever the spacing of those it starts from.
/// Source: Song et al. 2020 (arXiv:2010.02502), eq. 12 with sigma 0.
pub(super) fn plan(schedule: &NoiseSchedule, config: &SolverConfig, num_steps: usize) -> Vec<SolverStep> {
    let stride = (schedule.len() / num_steps) as f64;
    let timesteps = spaced(schedule, config, num_steps).into_iter().map(|timestep| match config.spacing() {
        TimestepSpacing::Linspace => timestep.round_ties_even(),
        TimestepSpacing::Leading | TimestepSpacing::Trailing => timestep,
    });
    let step = |timestep: f64| {
        let alpha_bar = schedule.alpha_bar(timestep as usize);
        let next = match timestep - stride {
            next if next >= 0.0 => schedule.alpha_bar(next as usize),
            _ if config.ends_clean => 1.0,
            _ => schedule.alpha_bar(0),
        };
        let (signal, noise) = (alpha_bar.sqrt(), (1.0 - alpha_bar).sqrt());
        let [data_from_sample, data_from_output] = config.prediction.data_of_preserved(signal, noise);
        let sample_scale = (1.0 - next).sqrt() / noise;
        SolverStep {
            timestep,
            noised: [signal, noise],
            input_scale: 1.0,
            data_from_sample,
            data_from_output,
            correction: 0.0,
            sample_scale,
            target_scale: next.sqrt() - signal * sample_scale,
            noise_scale: 0.0,
        }
    };
    timesteps.map(step).collect()
}
