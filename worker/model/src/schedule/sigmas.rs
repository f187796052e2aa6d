//! Noise-to-signal ratios between and apart from the timesteps of training.

use super::noise::{NoiseSchedule, linspace};

/// The exponent that Karras et al. found best.
const RHO: f64 = 7.0;

/// `count` noise-to-signal ratios that fall from `largest` to `smallest`, evenly in their `RHO`-th root.
///
/// Source: Karras et al. 2022 (arXiv:2206.00364), eq. 5.
pub(super) fn karras(smallest: f64, largest: f64, count: usize) -> Vec<f64> {
    let (from, to) = (largest.powf(RHO.recip()), smallest.powf(RHO.recip()));
    linspace(0.0, 1.0, count).into_iter().map(|share| (from + share * (to - from)).powf(RHO)).collect()
}

/// The timestep at which a schedule has the ratio `sigma`, interpolated between its logarithms and kept within the schedule.
pub(super) fn timestep_of(schedule: &NoiseSchedule, sigma: f64) -> f64 {
    let wanted = sigma.max(1e-10).ln();
    // The ratio grows with the timestep.
    let (mut low, mut high) = (0, schedule.len().saturating_sub(1));
    while high - low > 1 {
        let middle = usize::midpoint(low, high);
        if schedule.sigma(middle).ln() <= wanted {
            low = middle;
        } else {
            high = middle;
        }
    }
    let [below, above] = [low, high].map(|timestep| schedule.sigma(timestep).ln());
    if above > below { low as f64 + ((wanted - below) / (above - below)).clamp(0.0, 1.0) } else { low as f64 }
}

/// The ratio at a timestep that need not be whole, interpolated linearly.
pub(super) fn sigma_at(schedule: &NoiseSchedule, timestep: f64) -> f64 {
    let below = timestep.max(0.0).floor();
    let [low, high] = [below, below + 1.0].map(|timestep| schedule.sigma(timestep as usize));
    low + (timestep - below) * (high - low)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schedule::NoiseConfig;

    #[test]
    fn timesteps_and_ratios_are_each_others_inverse() {
        let schedule = NoiseSchedule::new(&NoiseConfig::default());
        for timestep in [0, 1, 17, 500, 998, 999] {
            let there = timestep_of(&schedule, schedule.sigma(timestep));
            assert!((there - timestep as f64).abs() < 1e-6, "{timestep}: {there}");
            assert!((sigma_at(&schedule, timestep as f64) - schedule.sigma(timestep)).abs() < 1e-12);
        }
        assert_eq!((timestep_of(&schedule, 0.0), timestep_of(&schedule, 1e9)), (0.0, 999.0));
        assert!((sigma_at(&schedule, 10.5) - 0.5 * (schedule.sigma(10) + schedule.sigma(11))).abs() < 1e-12);
    }

    #[test]
    fn karras_spends_its_steps_at_low_noise() {
        let sigmas = karras(0.03, 14.6, 10);
        assert!((sigmas[0] - 14.6).abs() < 1e-9 && (sigmas[9] - 0.03).abs() < 1e-12);
        assert!(sigmas.windows(2).all(|pair| pair[1] < pair[0]) && sigmas[5] < 1.5);
    }
}
