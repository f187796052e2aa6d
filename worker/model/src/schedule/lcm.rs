//! The steps of latent consistency sampling.

use super::noise::NoiseSchedule;
use super::solver::{SolverConfig, SolverStep};

/// Standard deviation of the data in the boundary conditions.
const SIGMA_DATA: f64 = 0.5;

/// Plans `num_steps` steps, no more than the model was distilled on: to `d = c_out data + c_skip x`, then, but for the last step, up to the
/// next timestep with fresh noise, `x_next = sqrt(alpha_bar') d + sqrt(1 - alpha_bar') noise`.
///
/// With `u` the scaled timestep, `c_skip = 0.25 / (u^2 + 0.25)` and `c_out = u / sqrt(u^2 + 0.25)`.
/// Source: Luo et al. 2023 (arXiv:2310.04378), algorithm 3 with the timesteps of the published models.
pub(super) fn plan(schedule: &NoiseSchedule, config: &SolverConfig, num_steps: usize) -> Vec<SolverStep> {
    let distilled = config.lcm_steps.max(1);
    let stride = schedule.len() / distilled;
    // Evenly from the top of those it was distilled on, rounded down.
    let timesteps: Vec<usize> =
        (0..num_steps).map(|index| distilled - index * distilled / num_steps).map(|nth| (nth * stride).saturating_sub(1)).collect();
    let step = |(index, &timestep): (usize, &usize)| {
        let alpha_bar = schedule.alpha_bar(timestep);
        let (signal, noise) = (alpha_bar.sqrt(), (1.0 - alpha_bar).sqrt());
        let scaled = timestep as f64 * config.lcm_timestep_scaling;
        let variance = scaled * scaled + SIGMA_DATA * SIGMA_DATA;
        let (skip, out) = (SIGMA_DATA * SIGMA_DATA / variance, scaled / variance.sqrt());
        let (signal_next, noise_scale) = match timesteps.get(index + 1) {
            Some(&next) => (schedule.alpha_bar(next).sqrt(), (1.0 - schedule.alpha_bar(next)).sqrt()),
            None => (1.0, 0.0),
        };
        let [data_from_sample, data_from_output] = config.prediction.data_of_preserved(signal, noise);
        SolverStep {
            timestep: timestep as f64,
            noised: [signal, noise],
            input_scale: 1.0,
            data_from_sample,
            data_from_output,
            correction: 0.0,
            sample_scale: signal_next * skip,
            target_scale: signal_next * out,
            noise_scale,
        }
    };
    timesteps.iter().enumerate().map(step).collect()
}
