//! Dynamic loss scaling for networks in f16, whose gradients would be too small for their numbers.
//!
//! The loss is multiplied before the backward pass and the adapter's gradient divided, in f32, after it. All members see the same summed
//! gradient, so each draws the same conclusion from a step, and nothing needs to be agreed on; the state travels with the weights.

use serde::{Deserialize, Serialize};

/// The published trainer's first scale, its window, and its smallest scale. Its hysteresis of two is what [`LossScale::is_patient`] is
/// about.
const FIRST: f32 = 65_536.0;
const WINDOW: u32 = 1000;
const SMALLEST: f32 = 1.0;
/// In the bytes, beside the steps.
const SPENT: u32 = 1 << 31;
/// Beyond this the loss itself comes near the end of f32 in the comparison of features.
const LARGEST: f32 = 16_777_216.0;

/// What the loss is multiplied with.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LossScale {
    scale: f32,
    /// Finite steps since the scale changed or a step was not.
    good_steps: u32,
    /// Whether the next step that is not finite leaves the scale as it is: a single one may be the fault of its samples.
    #[serde(default = "yes")]
    is_patient: bool,
}

fn yes() -> bool {
    true
}

impl Default for LossScale {
    fn default() -> Self {
        Self { scale: FIRST, good_steps: 0, is_patient: true }
    }
}

impl LossScale {
    /// Bytes of [`LossScale::to_bytes`].
    pub const NUM_BYTES: usize = 8;

    /// The factor.
    #[must_use]
    pub fn factor(&self) -> f64 {
        self.scale.into()
    }

    /// Learns how a step went: doubles after a thousand that were finite. The first after that which was not is forgiven, each further one
    /// halves.
    ///
    /// Source: `DynamicLossScaler` of DeepSpeed with `delayed_shift=2`, as the published trainer has it.
    pub fn update(&mut self, is_finite: bool) {
        self.good_steps = if is_finite { self.good_steps + 1 } else { 0 };
        if self.good_steps == WINDOW {
            *self = Self { scale: (self.scale * 2.0).min(LARGEST), ..Self::default() };
        } else if !is_finite {
            if !self.is_patient {
                self.scale = (self.scale / 2.0).max(SMALLEST);
            }
            let what = if self.is_patient { "stays" } else { "is now" };
            tracing::info!("a step overflowed in f16 and is skipped; the loss scale {what} {}", self.scale);
            self.is_patient = false;
        }
    }

    /// The state as bytes, for a member that lacks it.
    #[must_use]
    pub fn to_bytes(self) -> [u8; Self::NUM_BYTES] {
        let mut bytes = [0; Self::NUM_BYTES];
        let steps = self.good_steps | if self.is_patient { 0 } else { SPENT };
        bytes[..4].copy_from_slice(&self.scale.to_le_bytes());
        bytes[4..].copy_from_slice(&steps.to_le_bytes());
        bytes
    }

    /// Reads what [`LossScale::to_bytes`] wrote; `None` if no scale is like this.
    #[must_use]
    pub fn from_bytes(bytes: [u8; Self::NUM_BYTES]) -> Option<Self> {
        let [a, b, c, d, e, f, g, h] = bytes;
        let steps = u32::from_le_bytes([e, f, g, h]);
        Self { scale: f32::from_le_bytes([a, b, c, d]), good_steps: steps & !SPENT, is_patient: steps & SPENT == 0 }.checked()
    }

    /// Itself, if it is one that training leads to.
    #[must_use]
    pub fn checked(self) -> Option<Self> {
        ((SMALLEST..=LARGEST).contains(&self.scale) && self.good_steps < WINDOW).then_some(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scale_halves_at_the_second_overflow_and_doubles_after_a_thousand_good_steps() {
        let mut scale = LossScale::default();
        (0..999).for_each(|_| scale.update(true));
        assert_eq!(scale.factor(), 65_536.0);
        scale.update(true);
        assert_eq!(scale.factor(), 131_072.0);
        (0..999).for_each(|_| scale.update(true));
        scale.update(false);
        assert_eq!(scale.factor(), 131_072.0, "the first is forgiven");
        (0..999).for_each(|_| scale.update(true));
        assert_eq!(scale.factor(), 131_072.0, "the count begins again after an overflow");
        scale.update(false);
        assert_eq!(scale.factor(), 65_536.0, "forgiven once in a thousand good steps, whatever lies between");
        scale.update(false);
        assert_eq!(scale.factor(), 32_768.0);
        (0..1000).for_each(|_| scale.update(true));
        assert_eq!(scale.factor(), 65_536.0);
        scale.update(false);
        assert_eq!(scale.factor(), 65_536.0, "and again after those");
    }

    #[test]
    fn scale_stays_within_its_bounds() {
        let mut scale = LossScale::default();
        (0..100).for_each(|_| scale.update(false));
        assert_eq!(scale.factor(), 1.0);
        (0..100_000).for_each(|_| scale.update(true));
        assert_eq!(scale.factor(), 16_777_216.0);
    }

    /// Checkpoints of before the first overflow was forgiven.
    #[test]
    fn older_states_are_read() {
        let scale: LossScale = serde_json::from_str(r#"{"scale": 32768.0, "good_steps": 7}"#).unwrap();
        assert_eq!(scale, LossScale { scale: 32_768.0, good_steps: 7, is_patient: true });
    }

    #[test]
    fn scale_survives_the_wire_and_damage_is_seen() {
        let mut scale = LossScale::default();
        assert_eq!(LossScale::from_bytes(scale.to_bytes()), Some(scale));
        (0..1100).for_each(|step| scale.update(step != 200));
        assert!(!scale.is_patient && scale.good_steps == 899);
        assert_eq!(LossScale::from_bytes(scale.to_bytes()), Some(scale));
        for (value, steps) in [(f32::NAN, 0), (0.0, 0), (f32::INFINITY, 0), (2.0, 1000)] {
            assert_eq!(LossScale::from_bytes(LossScale { scale: value, good_steps: steps, is_patient: true }.to_bytes()), None);
        }
    }
}
