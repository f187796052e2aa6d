//! The variance-preserving noise schedule of a diffusion model.

use std::f64::consts::FRAC_PI_2;

/// How the noise variances `beta_t` are laid out over the timesteps.
#[derive(Debug, Clone, PartialEq)]
pub enum BetaSchedule {
    /// `beta` itself grows linearly.
    Linear,
    /// `sqrt(beta)` grows linearly: the schedule of latent diffusion models.
    ScaledLinear,
    /// `alpha_bar` follows a squared cosine, with `beta` capped at 0.999.
    SquaredCosine,
    /// Every `beta` is given.
    Trained(Vec<f64>),
}

/// What a [`NoiseSchedule`] is computed from, under the names of a `scheduler_config.json`.
#[derive(Debug, Clone, PartialEq)]
pub struct NoiseConfig {
    /// Number of timesteps of training.
    pub num_train_timesteps: usize,
    /// `beta` of timestep 0.
    pub beta_start: f64,
    /// `beta` of the last timestep.
    pub beta_end: f64,
    /// The path between the two.
    pub beta_schedule: BetaSchedule,
    /// Whether the schedule is stretched until nothing of the picture is left at the last timestep.
    ///
    /// Source: Lin et al. 2023 (arXiv:2305.08891), algorithm 1.
    pub zero_terminal_snr: bool,
}

impl Default for NoiseConfig {
    /// The schedule of every Stable Diffusion model: 1000 steps, scaled linear from 0.00085 to 0.012.
    fn default() -> Self {
        Self {
            num_train_timesteps: 1000,
            beta_start: 0.00085,
            beta_end: 0.012,
            beta_schedule: BetaSchedule::ScaledLinear,
            zero_terminal_snr: false,
        }
    }
}

/// The share of signal left at each timestep: `x_t = sqrt(alpha_bar_t) * x_0 + sqrt(1 - alpha_bar_t) * noise`.
#[derive(Debug, Clone, PartialEq)]
pub struct NoiseSchedule {
    alphas_cumprod: Vec<f64>,
}

impl NoiseSchedule {
    /// Computes the schedule. An empty configuration (no timesteps) gives an empty schedule.
    pub fn new(config: &NoiseConfig) -> Self {
        let mut alphas_cumprod: Vec<f64> = betas(config)
            .into_iter()
            .scan(1.0, |alpha_bar, beta| {
                *alpha_bar *= 1.0 - beta;
                Some(*alpha_bar)
            })
            .collect();
        if config.zero_terminal_snr {
            stretch(&mut alphas_cumprod);
        }
        Self { alphas_cumprod }
    }

    /// Returns `alpha_bar_t` for every timestep, falling with `t`.
    pub fn alphas_cumprod(&self) -> &[f64] {
        &self.alphas_cumprod
    }

    /// Returns the number of timesteps.
    pub fn len(&self) -> usize {
        self.alphas_cumprod.len()
    }

    /// Says whether there is no timestep at all.
    pub fn is_empty(&self) -> bool {
        self.alphas_cumprod.is_empty()
    }

    /// Returns `alpha_bar` at `timestep`; timesteps past the end count as the last one, an empty schedule is all signal.
    pub fn alpha_bar(&self, timestep: usize) -> f64 {
        let index = timestep.min(self.len().saturating_sub(1));
        self.alphas_cumprod.get(index).copied().unwrap_or(1.0)
    }

    /// Returns the noise-to-signal ratio `sqrt((1 - alpha_bar) / alpha_bar)` at `timestep`; timesteps past the end count as
    /// the last one, an empty schedule has no noise.
    pub fn sigma(&self, timestep: usize) -> f64 {
        let alpha_bar = self.alpha_bar(timestep);
        ((1.0 - alpha_bar) / alpha_bar).sqrt()
    }
}

/// What is left of the signal where nothing should be: samplers divide by its root. The same as in diffusers.
const ALMOST_NOTHING: f64 = 1.0 / (1u64 << 24) as f64;

/// Shifts and scales the roots of `alpha_bar` so that the first stays and the last is zero.
fn stretch(alphas_cumprod: &mut [f64]) {
    let (Some(first), Some(last)) = (alphas_cumprod.first().map(|first| first.sqrt()), alphas_cumprod.last().map(|last| last.sqrt()))
    else {
        return;
    };
    // With a single timestep first and last are one: it loses its signal.
    let scale = if first > last { first / (first - last) } else { 0.0 };
    for alpha_bar in alphas_cumprod.iter_mut() {
        let root = (alpha_bar.sqrt() - last) * scale;
        *alpha_bar = (root * root).max(ALMOST_NOTHING);
    }
}

fn betas(config: &NoiseConfig) -> Vec<f64> {
    let num = config.num_train_timesteps;
    match &config.beta_schedule {
        BetaSchedule::Linear => linspace(config.beta_start, config.beta_end, num),
        BetaSchedule::ScaledLinear => {
            linspace(config.beta_start.sqrt(), config.beta_end.sqrt(), num).into_iter().map(|root| root * root).collect()
        }
        BetaSchedule::SquaredCosine => {
            let alpha_bar = |time: f64| ((time + 0.008) / 1.008 * FRAC_PI_2).cos().powi(2);
            let at = |index: usize| alpha_bar(index as f64 / num as f64);
            (0..num).map(|index| (1.0 - at(index + 1) / at(index)).min(0.999)).collect()
        }
        BetaSchedule::Trained(betas) => betas.clone(),
    }
}

/// Returns `num` evenly spaced values, both ends included, rounded as numpy rounds them.
///
/// That is, multiples of a stride which is itself rounded: which way a timestep goes that lies halfway between two depends on it.
pub(super) fn linspace(start: f64, end: f64, num: usize) -> Vec<f64> {
    let last = num.saturating_sub(1).max(1);
    let stride = (end - start) / last as f64;
    (0..num).map(|index| if index == last { end } else { start + index as f64 * stride }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stable_diffusion_schedule_has_its_known_ends() {
        let schedule = NoiseSchedule::new(&NoiseConfig::default());
        assert_eq!(schedule.len(), 1000);
        assert!((schedule.alphas_cumprod()[0] - 0.99915).abs() < 1e-9);
        assert!((schedule.alphas_cumprod()[999] - 0.0046601).abs() < 1e-7);
        assert!((schedule.sigma(0) - 0.02917).abs() < 1e-5);
        assert_eq!(schedule.sigma(5000), schedule.sigma(999));
    }

    /// diffusers 0.42.1: `DDPMScheduler(beta_schedule=.., beta_start=.., beta_end=..).alphas_cumprod[[0, 500, 998]]`.
    /// The tolerance is that of its float32 running product.
    #[test]
    fn other_schedules_agree_with_diffusers() {
        let cases =
            [(BetaSchedule::Linear, [0.9999, 0.07779665, 4.11819e-5]), (BetaSchedule::SquaredCosine, [0.99995869, 0.49228504, 2.42877e-6])];
        for (beta_schedule, expected) in cases {
            let config = NoiseConfig { beta_start: 1e-4, beta_end: 0.02, beta_schedule, ..NoiseConfig::default() };
            let schedule = NoiseSchedule::new(&config);
            for (index, expected) in [0, 500, 998].into_iter().zip(expected) {
                let got = schedule.alphas_cumprod()[index];
                assert!((got - expected).abs() < 1e-4 * expected, "{:?} at {index}: {got}, not {expected}", config.beta_schedule);
            }
        }
    }

    #[test]
    fn an_empty_schedule_is_harmless() {
        let schedule = NoiseSchedule::new(&NoiseConfig { num_train_timesteps: 0, ..NoiseConfig::default() });
        assert!(schedule.is_empty());
        assert_eq!(schedule.sigma(0), 0.0);
    }
}
