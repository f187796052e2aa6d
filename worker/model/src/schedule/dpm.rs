//! The timesteps and coefficients of DPM-Solver++ (2M): a second-order multistep solver in the data prediction.

use super::noise::{NoiseSchedule, linspace};
use super::sigmas::{karras, timestep_of};
use super::solver::SolverStep;

/// How the visited timesteps are spread over those of training.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TimestepSpacing {
    /// Evenly from the last timestep to the first, rounded.
    Linspace,
    /// Whole multiples of an integer stride, from the bottom; `steps_offset` is added.
    Leading,
    /// Whole multiples of a real stride, from the top.
    Trailing,
}

impl TimestepSpacing {
    /// The spacing of a name, as configurations and command lines write it.
    pub fn named(name: &str) -> Option<Self> {
        Some(match name {
            "linspace" => Self::Linspace,
            "leading" => Self::Leading,
            "trailing" => Self::Trailing,
            _ => return None,
        })
    }
}

/// Where the last step lands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinalSigma {
    /// At no noise; the last step is then of first order.
    Zero,
    /// At the noise of timestep 0.
    SigmaMin,
}

/// What the network predicts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Prediction {
    /// The noise.
    Epsilon,
    /// The velocity `alpha * noise - sigma * x_0`.
    Velocity,
}

impl Prediction {
    /// Shares of sample and network output in the data, where a sample is `signal * data + noise * eps` and the two squares sum to 1.
    pub(super) fn data_of_preserved(self, signal: f64, noise: f64) -> [f64; 2] {
        match self {
            Self::Epsilon => [1.0 / signal, -noise / signal],
            Self::Velocity => [signal, -noise],
        }
    }
}

/// The choices that shape DPM-Solver++.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DpmConfig {
    /// Which timesteps are visited.
    pub spacing: TimestepSpacing,
    /// Added to each timestep; used by [`TimestepSpacing::Leading`] only.
    pub steps_offset: usize,
    /// Where the last step lands.
    pub final_sigma: FinalSigma,
    /// What the network predicts.
    pub prediction: Prediction,
}

/// Below this many steps the last one is of first order even if it does not land at zero noise.
const FEW_STEPS: usize = 15;

/// Returns the timesteps visited in `num_steps` steps, from noise to data.
pub fn timesteps(schedule: &NoiseSchedule, config: &DpmConfig, num_steps: usize) -> Vec<usize> {
    let num_train = schedule.len();
    match config.spacing {
        TimestepSpacing::Linspace => {
            let last = num_train.saturating_sub(1) as f64;
            // The bottom end (timestep 0) is where the last step lands, not a step of its own.
            linspace(0.0, last, num_steps + 1).into_iter().skip(1).rev().map(|t| t.round_ties_even() as usize).collect()
        }
        TimestepSpacing::Leading => {
            let stride = num_train / (num_steps + 1);
            (1..=num_steps).rev().map(|index| index * stride + config.steps_offset).collect()
        }
        TimestepSpacing::Trailing => {
            let stride = num_train as f64 / num_steps as f64;
            (0..num_steps)
                .map(|index| (num_train as f64 - index as f64 * stride).round_ties_even() as usize)
                .map(|t| t.saturating_sub(1))
                .collect()
        }
    }
}

/// Plans `num_steps` solver steps from pure noise to data.
///
/// With `sigma` the noise-to-signal ratio, `alpha = 1 / sqrt(1 + sigma^2)` and `lambda = -ln sigma`, a step of size
/// `h = lambda_next - lambda` is `x_next = (sigma_next alpha_next)/(sigma alpha) x - alpha_next (e^-h - 1) target`, where the
/// target extrapolates the data prediction by `1 / (2 r)`, `r = (lambda - lambda_previous) / h`.
///
/// Source: DPM-Solver++, Lu et al. 2022 (arXiv:2211.01095), algorithm 2.
pub fn plan(schedule: &NoiseSchedule, config: &DpmConfig, use_karras: bool, num_steps: usize) -> Vec<SolverStep> {
    let (timesteps, mut sigmas): (Vec<f64>, Vec<f64>) = if use_karras {
        // Between the ends of the whole schedule, whatever the spacing; the network is asked at the nearest whole timestep.
        let sigmas = karras(schedule.sigma(0), schedule.sigma(schedule.len().saturating_sub(1)), num_steps);
        (sigmas.iter().map(|&sigma| timestep_of(schedule, sigma).round_ties_even()).collect(), sigmas)
    } else {
        let timesteps = timesteps(schedule, config, num_steps);
        (timesteps.iter().map(|&timestep| timestep as f64).collect(), timesteps.iter().map(|&timestep| schedule.sigma(timestep)).collect())
    };
    sigmas.push(match config.final_sigma {
        FinalSigma::Zero => 0.0,
        FinalSigma::SigmaMin => schedule.sigma(0),
    });
    let first_order_end = config.final_sigma == FinalSigma::Zero || num_steps < FEW_STEPS;

    (0..num_steps)
        .map(|index| {
            let (sigma, next) = (sigmas[index], sigmas[index + 1]);
            let (alpha, alpha_next) = (signal(sigma), signal(next));
            let [data_from_sample, data_from_output] = config.prediction.data_of_preserved(alpha, sigma * alpha);
            let first_order = index == 0 || (index + 1 == num_steps && first_order_end);
            // Two neighbouring timesteps that round to the same one span no distance: nothing to extrapolate along.
            let correction = match (first_order, index.checked_sub(1).map(|previous| sigmas[previous])) {
                (false, Some(previous)) if previous != sigma => 0.5 * (sigma / next).ln() / (previous / sigma).ln(),
                _ => 0.0,
            };
            SolverStep {
                timestep: timesteps[index],
                noised: [alpha, sigma * alpha],
                input_scale: 1.0,
                data_from_sample,
                data_from_output,
                correction,
                sample_scale: (next * alpha_next) / (sigma * alpha),
                target_scale: alpha_next * (1.0 - next / sigma),
                noise_scale: 0.0,
            }
        })
        .collect()
}

/// The scale of the data at a noise-to-signal ratio.
pub(super) fn signal(sigma: f64) -> f64 {
    (1.0 + sigma * sigma).sqrt().recip()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schedule::NoiseConfig;

    fn config(spacing: TimestepSpacing) -> DpmConfig {
        DpmConfig { spacing, steps_offset: 1, final_sigma: FinalSigma::SigmaMin, prediction: Prediction::Epsilon }
    }

    fn stable_diffusion() -> NoiseSchedule {
        NoiseSchedule::new(&NoiseConfig::default())
    }

    #[test]
    fn leading_spacing_visits_the_timesteps_of_sdxl() {
        let visited = timesteps(&stable_diffusion(), &config(TimestepSpacing::Leading), 30);
        assert_eq!(visited.len(), 30);
        assert_eq!((visited[0], visited[1], visited[29]), (961, 929, 33));
    }

    #[test]
    fn linspace_spacing_visits_the_timesteps_of_stable_diffusion_1_5() {
        let visited = timesteps(&stable_diffusion(), &config(TimestepSpacing::Linspace), 30);
        assert_eq!(visited.len(), 30);
        assert_eq!((visited[0], visited[1], visited[29]), (999, 966, 33));
        // numpy's stride of 33.3 is a little less, so that 15 of them round down: diffusers 0.42.1 visits 499, not 500.
        assert_eq!(visited[15], 499);
    }

    #[test]
    fn trailing_spacing_starts_at_the_last_timestep() {
        let visited = timesteps(&stable_diffusion(), &config(TimestepSpacing::Trailing), 7);
        // diffusers 0.42.1, timestep_spacing="trailing", 7 steps.
        assert_eq!(visited, [999, 856, 713, 570, 428, 285, 142]);
    }

    /// With a network that knows the one clean image there is, any order of solver must return it.
    #[test]
    fn a_perfect_network_is_followed_to_the_clean_image() {
        for prediction in [Prediction::Epsilon, Prediction::Velocity] {
            for num_steps in [1, 2, 5, 20, 50] {
                let config = DpmConfig { final_sigma: FinalSigma::Zero, prediction, ..config(TimestepSpacing::Leading) };
                let (clean, schedule) = (0.7, stable_diffusion());
                let (mut sample, mut previous) = (-1.3, 0.0);
                for step in plan(&schedule, &config, false, num_steps) {
                    let sigma = schedule.sigma(step.timestep as usize);
                    let alpha = signal(sigma);
                    let noise = (sample - alpha * clean) / (sigma * alpha);
                    let output = match prediction {
                        Prediction::Epsilon => noise,
                        Prediction::Velocity => alpha * noise - sigma * alpha * clean,
                    };
                    let data = step.data_from_sample * sample + step.data_from_output * output;
                    let target = data + step.correction * (data - previous);
                    sample = step.sample_scale * sample + step.target_scale * target;
                    previous = data;
                }
                assert!((sample - clean).abs() < 1e-12, "{num_steps} steps end at {sample}");
            }
        }
    }

    #[test]
    fn the_first_step_and_short_or_noiseless_ends_are_of_first_order() {
        let orders = |final_sigma, num_steps| -> Vec<bool> {
            let config = DpmConfig { final_sigma, ..config(TimestepSpacing::Leading) };
            plan(&stable_diffusion(), &config, false, num_steps).iter().map(|step| step.correction != 0.0).collect()
        };
        assert_eq!(orders(FinalSigma::SigmaMin, 3), [false, true, false]);
        let long = orders(FinalSigma::SigmaMin, 15);
        assert!(!long[0] && long[1..].iter().all(|&second| second));
        let noiseless = orders(FinalSigma::Zero, 15);
        assert!(!noiseless[14] && noiseless[13]);
    }

    #[test]
    fn more_steps_than_timesteps_stay_finite() {
        for spacing in [TimestepSpacing::Leading, TimestepSpacing::Linspace, TimestepSpacing::Trailing] {
            for step in plan(&stable_diffusion(), &config(spacing), false, 1500) {
                assert!(step.sample_scale.is_finite() && step.target_scale.is_finite() && step.correction.is_finite());
            }
        }
    }
}
