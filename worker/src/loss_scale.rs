//! Dynamic loss scaling for networks in f16, whose gradients would be too small for their numbers.
//!
//! The loss is multiplied before the backward pass and the adapter's gradient divided, in f32, after it. All members see the same summed gradient,
//! so each draws the same conclusion from a step, and nothing needs to be agreed on; the state travels with the weights.

use serde::{Deserialize, Serialize};

/// The published trainer's first scale, its window, and its smallest scale.
const FIRST: f32 = 65_536.0;
const WINDOW: u32 = 1000;
const SMALLEST: f32 = 1.0;
/// Beyond this the loss itself comes near the end of f32 in the comparison of features.
const LARGEST: f32 = 16_777_216.0;

/// What the loss is multiplied with.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LossScale {
    scale: f32,
    /// Finite steps since the scale changed.
    good_steps: u32,
}

impl Default for LossScale {
    fn default() -> Self {
        Self { scale: FIRST, good_steps: 0 }
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

    /// Learns how a step went: halves after one that was not finite, doubles after a thousand that were.
    pub fn update(&mut self, is_finite: bool) {
        self.good_steps = if is_finite { self.good_steps + 1 } else { 0 };
        if !is_finite {
            self.scale = (self.scale / 2.0).max(SMALLEST);
            tracing::info!("a step overflowed in f16 and is skipped; the loss scale is now {}", self.scale);
        } else if self.good_steps == WINDOW {
            (self.scale, self.good_steps) = ((self.scale * 2.0).min(LARGEST), 0);
        }
    }

    /// The state as bytes, for a member that lacks it.
    #[must_use]
    pub fn to_bytes(self) -> [u8; Self::NUM_BYTES] {
        let mut bytes = [0; Self::NUM_BYTES];
        bytes[..4].copy_from_slice(&self.scale.to_le_bytes());
        bytes[4..].copy_from_slice(&self.good_steps.to_le_bytes());
        bytes
    }

    /// Reads what [`LossScale::to_bytes`] wrote; `None` if no scale is like this.
    #[must_use]
    pub fn from_bytes(bytes: [u8; Self::NUM_BYTES]) -> Option<Self> {
        let [a, b, c, d, e, f, g, h] = bytes;
        Self { scale: f32::from_le_bytes([a, b, c, d]), good_steps: u32::from_le_bytes([e, f, g, h]) }.checked()
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
    fn scale_halves_at_once_and_doubles_after_a_thousand_good_steps() {
        let mut scale = LossScale::default();
        (0..999).for_each(|_| scale.update(true));
        assert_eq!(scale.factor(), 65_536.0);
        scale.update(true);
        assert_eq!(scale.factor(), 131_072.0);
        (0..999).for_each(|_| scale.update(true));
        scale.update(false);
        assert_eq!(scale.factor(), 65_536.0);
        (0..999).for_each(|_| scale.update(true));
        assert_eq!(scale.factor(), 65_536.0, "the count begins again after an overflow");
        scale.update(true);
        assert_eq!(scale.factor(), 131_072.0);
    }

    #[test]
    fn scale_stays_within_its_bounds() {
        let mut scale = LossScale::default();
        (0..100).for_each(|_| scale.update(false));
        assert_eq!(scale.factor(), 1.0);
        (0..100_000).for_each(|_| scale.update(true));
        assert_eq!(scale.factor(), 16_777_216.0);
    }

    #[test]
    fn scale_survives_the_wire_and_damage_is_seen() {
        let mut scale = LossScale::default();
        (0..1234).for_each(|step| scale.update(step != 200));
        assert_eq!(LossScale::from_bytes(scale.to_bytes()), Some(scale));
        for (value, steps) in [(f32::NAN, 0), (0.0, 0), (f32::INFINITY, 0), (2.0, 1000)] {
            assert_eq!(LossScale::from_bytes(LossScale { scale: value, good_steps: steps }.to_bytes()), None);
        }
    }
}
