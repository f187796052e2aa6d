//! Learning-rate schedules with warm-up.

use std::f64::consts::PI;

/// What the learning rate does after warm-up.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Decay {
    /// Stays at the base rate.
    Constant,
    /// Falls to `end_lr` at `total_steps` along half a cosine that starts at step 0.
    ///
    /// Warm-up multiplies the cosine by `min(1, (s + 1) / warmup_steps)`, so the first update already moves.
    Cosine {
        /// The rate at the end.
        end_lr: f64,
    },
    /// Falls from the base rate at the end of warm-up to `end_lr` at `total_steps` and stays there:
    /// `end_lr + (lr - end_lr) * (1 - (s - warmup) / (total - warmup))^power`. Warm-up is `lr * s / warmup_steps`.
    Polynomial {
        /// The exponent; 1 is a straight line.
        power: f64,
        /// The rate at the end.
        end_lr: f64,
    },
}

/// The learning rate as a function of the step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LrSchedule {
    /// Base rate, reached at the end of warm-up.
    pub lr: f64,
    /// Number of warm-up steps; 0 starts at the base rate.
    pub warmup_steps: u64,
    /// Number of steps at whose end the decay is complete.
    pub total_steps: u64,
    /// What follows warm-up.
    pub decay: Decay,
}

impl LrSchedule {
    /// Returns the rate of the update that follows `step` applied updates.
    pub fn rate(&self, step: u64) -> f64 {
        let (s, warmup, total) = (step as f64, self.warmup_steps as f64, self.total_steps as f64);
        let warming = step < self.warmup_steps;
        match self.decay {
            Decay::Cosine { end_lr } => {
                let ramp = if warming { (s + 1.0) / warmup } else { 1.0 };
                let progress = if step < self.total_steps { s / total } else { 1.0 };
                ramp * (end_lr + (self.lr - end_lr) * 0.5 * (1.0 + (PI * progress).cos()))
            }
            Decay::Constant | Decay::Polynomial { .. } if warming => self.lr * s / warmup,
            Decay::Constant => self.lr,
            Decay::Polynomial { end_lr, .. } if step >= self.total_steps => end_lr,
            Decay::Polynomial { power, end_lr } => {
                let remaining = 1.0 - (s - warmup) / (total - warmup);
                end_lr + (self.lr - end_lr) * remaining.powf(power)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(got: f64, expected: f64) {
        assert!((got - expected).abs() <= 1e-12 * expected.abs().max(1e-6), "{got}, not {expected}");
    }

    #[test]
    fn polynomial_decay_is_that_of_the_published_trainer() {
        let decay = Decay::Polynomial { power: 1.0, end_lr: 5e-8 };
        let schedule = LrSchedule { lr: 1e-5, warmup_steps: 100, total_steps: 2_232_142, decay };
        close(schedule.rate(0), 0.0);
        close(schedule.rate(50), 5e-6);
        close(schedule.rate(100), 1e-5);
        close(schedule.rate(50_000), 5e-8 + (1e-5 - 5e-8) * (1.0 - 49_900.0 / 2_232_042.0));
        assert!((schedule.rate(50_000) - 9.78e-6).abs() < 5e-9);
        close(schedule.rate(2_232_142), 5e-8);
        close(schedule.rate(9_000_000), 5e-8);
    }

    #[test]
    fn a_power_bends_the_polynomial() {
        let schedule = LrSchedule { lr: 1.0, warmup_steps: 0, total_steps: 100, decay: Decay::Polynomial { power: 2.0, end_lr: 0.0 } };
        close(schedule.rate(0), 1.0);
        close(schedule.rate(50), 0.25);
    }

    /// `lr * min(1, (i + 1) / 50) * .5 * (1 + math.cos(math.pi * i / 800))` for lr 2e-3.
    #[test]
    fn cosine_decay_starts_with_a_moving_step_and_ends_at_zero() {
        let schedule = LrSchedule { lr: 2e-3, warmup_steps: 50, total_steps: 800, decay: Decay::Cosine { end_lr: 0.0 } };
        close(schedule.rate(0), 4e-5);
        close(schedule.rate(49), 2e-3 * 0.5 * (1.0 + (PI * 49.0 / 800.0).cos()));
        close(schedule.rate(400), 1e-3);
        assert!(schedule.rate(799) > 0.0 && schedule.rate(799) < 1e-8);
        assert_eq!(schedule.rate(800), 0.0);
        assert_eq!(schedule.rate(10_000), 0.0);
        let lifted = LrSchedule { decay: Decay::Cosine { end_lr: 1e-4 }, ..schedule };
        close(lifted.rate(400), 1e-4 + (2e-3 - 1e-4) * 0.5);
        close(lifted.rate(800), 1e-4);
    }

    #[test]
    fn degenerate_lengths_stay_finite() {
        for decay in [Decay::Constant, Decay::Cosine { end_lr: 0.0 }, Decay::Polynomial { power: 1.0, end_lr: 1e-8 }] {
            for (warmup_steps, total_steps) in [(0, 0), (10, 10), (10, 5), (0, 1)] {
                let schedule = LrSchedule { lr: 1e-3, warmup_steps, total_steps, decay };
                for step in 0..20 {
                    let rate = schedule.rate(step);
                    assert!((0.0..=1e-3).contains(&rate), "{schedule:?} at {step}: {rate}");
                }
            }
        }
    }
}
