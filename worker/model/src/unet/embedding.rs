//! Timesteps and time ids as vectors.

use tch::{Kind, Tensor};

use super::UNetConfig;
use crate::nn::Linear;
use crate::weights::Scope;

/// Longest wavelength of the sinusoids, in units of 2π.
const MAX_PERIOD: f64 = 10_000.0;

/// Sinusoids of `values` at `width / 2` frequencies that fall geometrically from 1.
///
/// Shapes: `values` `[N]`; returns f32 `[N, width]`, always computed in f32, as half floats cannot hold timesteps times frequencies.
/// Source: `get_timestep_embedding` of diffusers.
pub(super) fn sinusoids(values: &Tensor, width: i64, config: &UNetConfig) -> Tensor {
    let half = width / 2;
    let frequency = Tensor::arange(half, (Kind::Float, values.device())) * (-MAX_PERIOD.ln() / (half as f64 - config.freq_shift));
    let angle = values.to_kind(Kind::Float).unsqueeze(-1) * frequency.exp().unsqueeze(0);
    let (sin, cos) = (angle.sin(), angle.cos());
    let embedding = if config.flip_sin_to_cos { Tensor::cat(&[cos, sin], -1) } else { Tensor::cat(&[sin, cos], -1) };
    embedding.constant_pad_nd([0, width % 2])
}

/// Two linear layers with a SiLU between them.
pub(super) struct EmbeddingMlp {
    linear_1: Linear,
    linear_2: Linear,
}

impl EmbeddingMlp {
    pub fn new(scope: Scope, inputs: i64, width: i64) -> Self {
        Self {
            linear_1: Linear::new(&scope / "linear_1", inputs, width, true),
            linear_2: Linear::new(&scope / "linear_2", width, width, true),
        }
    }

    /// Shapes: `[B, inputs]` to `[B, width]`.
    pub fn forward(&self, input: &Tensor) -> Tensor {
        self.linear_2.forward(&self.linear_1.forward(input).silu())
    }
}
