//! AdamW, the moving average of the weights and gradient clipping, each as a few in-place operations on flat `f32` buffers.
//!
//! An adapter's parameters are views into one buffer ([`crate::adapter::Adapter::flat`]), so one optimiser step is half a dozen
//! kernels however many tensors there are, and the state to hand to a newcomer is three buffers and a step number.

use std::collections::BTreeMap;

use tch::{Device, Kind, Tensor, no_grad_guard};

use crate::Result;
use crate::adapter::flat::{self, FlatFile};

/// Metadata key of the number of updates behind a saved state.
const STEP: &str = "step";

/// The constants of [`AdamW`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamWConfig {
    /// Decay of the mean gradient.
    pub beta1: f64,
    /// Decay of the mean squared gradient.
    pub beta2: f64,
    /// Added to the root of the mean square.
    pub eps: f64,
    /// Share of every weight that is taken away a step, times the learning rate.
    pub weight_decay: f64,
}

impl Default for AdamWConfig {
    /// The published trainer's values: betas 0.9 and 0.999, eps 1e-8, and no decay.
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.0 }
    }
}

/// Adam with bias correction and decoupled weight decay.
///
/// Source: Loshchilov and Hutter 2017 (arXiv:1711.05101), algorithm 2.
#[derive(Debug)]
pub struct AdamW {
    config: AdamWConfig,
    step: u64,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
}

impl AdamW {
    /// Starts with zero moments for `num_parameters` parameters on `device`.
    pub fn new(config: AdamWConfig, num_parameters: i64, device: Device) -> Self {
        let zeros = || Tensor::zeros([num_parameters], (Kind::Float, device));
        Self { config, step: 0, exp_avg: zeros(), exp_avg_sq: zeros() }
    }

    /// Applies one update to `parameters` in place.
    ///
    /// Shapes: `parameters`, `gradient` `[P]`, `f32`, on the optimiser's device.
    /// Errors: [`crate::Error::Shape`] if a length is not the optimiser's; nothing has changed then. If libtorch fails in the middle
    /// ([`crate::Error::Torch`]), the buffers are of no use any more.
    pub fn step(&mut self, parameters: &Tensor, gradient: &Tensor, lr: f64) -> Result<()> {
        flat::check_length("AdamW parameters", parameters, self.exp_avg.numel())?;
        flat::check_length("AdamW gradient", gradient, self.exp_avg.numel())?;
        let _guard = no_grad_guard();
        let AdamWConfig { beta1, beta2, eps, weight_decay } = self.config;
        self.step += 1;
        // Beyond i32::MAX steps the correction is 1 to the last bit.
        let exponent = i32::try_from(self.step).unwrap_or(i32::MAX);
        let (correction1, correction2) = (1.0 - beta1.powi(exponent), 1.0 - beta2.powi(exponent));

        let mut parameters = parameters.shallow_clone();
        if weight_decay != 0.0 {
            let _ = parameters.f_mul_scalar_(1.0 - lr * weight_decay)?;
        }
        let _ = self.exp_avg.f_lerp_(gradient, 1.0 - beta1)?;
        let _ = self.exp_avg_sq.f_lerp_(&gradient.f_square()?, 1.0 - beta2)?;
        // lr * (m / c1) / (sqrt(v / c2) + eps)
        let mut update = self.exp_avg_sq.f_sqrt()?;
        let _ = update.f_mul_scalar_(correction2.sqrt().recip())?.f_add_scalar_(eps)?;
        let mut update = self.exp_avg.f_div(&update)?;
        let _ = update.f_mul_scalar_(lr / correction1)?;
        let _ = parameters.f_sub_(&update)?;
        Ok(())
    }

    /// Returns the number of updates applied.
    pub fn num_steps(&self) -> u64 {
        self.step
    }

    /// Returns the running mean of the gradient, `[P]`.
    pub fn exp_avg(&self) -> &Tensor {
        &self.exp_avg
    }

    /// Returns the running mean of the squared gradient, `[P]`.
    pub fn exp_avg_sq(&self) -> &Tensor {
        &self.exp_avg_sq
    }

    /// Takes over another optimiser's state, copying into this one's buffers.
    ///
    /// Errors: [`crate::Error::Shape`] if a length is not the optimiser's; nothing has changed then.
    pub fn restore(&mut self, num_steps: u64, exp_avg: &Tensor, exp_avg_sq: &Tensor) -> Result<()> {
        flat::check_length("AdamW exp_avg", exp_avg, self.exp_avg.numel())?;
        flat::check_length("AdamW exp_avg_sq", exp_avg_sq, self.exp_avg_sq.numel())?;
        self.exp_avg.f_copy_(exp_avg)?;
        self.exp_avg_sq.f_copy_(exp_avg_sq)?;
        self.step = num_steps;
        Ok(())
    }

    /// Writes the state as safetensors: `exp_avg` and `exp_avg_sq`, the number of updates as metadata `step`.
    pub fn to_safetensors(&self) -> Result<Vec<u8>> {
        flat::serialize(
            &[("exp_avg".into(), self.exp_avg.shallow_clone()), ("exp_avg_sq".into(), self.exp_avg_sq.shallow_clone())],
            &BTreeMap::from([(STEP.into(), self.step.to_string())]),
        )
    }

    /// Reads what [`AdamW::to_safetensors`] wrote. The configuration is not part of the state.
    ///
    /// Errors: [`crate::Error::Invalid`] if the bytes are not such a state; [`crate::Error::Shape`] if the two lengths differ.
    pub fn from_safetensors(config: AdamWConfig, bytes: &[u8], device: Device) -> Result<Self> {
        let file = FlatFile::parse("optimiser state", bytes)?;
        let (exp_avg, exp_avg_sq) = (file.flat("exp_avg", device)?, file.flat("exp_avg_sq", device)?);
        flat::check_length("AdamW exp_avg_sq", &exp_avg_sq, exp_avg.numel())?;
        Ok(Self { config, step: file.metadata_number(STEP)?, exp_avg, exp_avg_sq })
    }
}

/// The exponential moving average of the weights.
#[derive(Debug)]
pub struct Ema {
    decay: f64,
    average: Tensor,
}

impl Ema {
    /// Starts as a copy of `parameters` `[P]`; each update keeps `decay` of the average.
    pub fn new(parameters: &Tensor, decay: f64) -> Result<Self> {
        let average = parameters.f_detach()?.f_to_kind(Kind::Float)?;
        Ok(Self { decay, average: flat::copy(&average)? })
    }

    /// Moves the average towards `parameters`.
    ///
    /// Errors: [`crate::Error::Shape`] if the length is not the average's.
    pub fn update(&mut self, parameters: &Tensor) -> Result<()> {
        flat::check_length("EMA parameters", parameters, self.average.numel())?;
        let _guard = no_grad_guard();
        let _ = self.average.f_lerp_(parameters, 1.0 - self.decay)?;
        Ok(())
    }

    /// Returns the average, `[P]`, `f32`.
    pub fn flat(&self) -> &Tensor {
        &self.average
    }

    /// Takes over another average, copying into this one's buffer.
    ///
    /// Errors: [`crate::Error::Shape`] if the length is not the average's.
    pub fn restore(&mut self, average: &Tensor) -> Result<()> {
        flat::check_length("EMA average", average, self.average.numel())?;
        Ok(self.average.f_copy_(average)?)
    }
}

/// Scales `gradient` in place so that its L2 norm is at most `max_norm`, and returns the norm it had.
///
/// A norm that is not finite is returned and the gradient left as it is: whether to drop the step is the caller's decision.
/// As PyTorch does, 1e-6 is added to the norm before dividing.
pub fn clip_grad_norm(gradient: &mut Tensor, max_norm: f64) -> Result<f64> {
    let _guard = no_grad_guard();
    // Each rank sums for itself, in an order that depends on its GPU: in double precision the order does not show in what is left after
    // rounding.
    let norm = gradient.f_norm_scalaropt_dtype(2.0, Kind::Double)?.f_double_value(&[])?;
    let norm = f64::from(norm as f32);
    let scale = max_norm / (norm + 1e-6);
    if norm.is_finite() && scale < 1.0 {
        let _ = gradient.f_mul_scalar_(scale)?;
    }
    Ok(norm)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Error;
    use crate::adapter::{Adapter, AdapterConfig};

    fn values(tensor: &Tensor) -> Vec<f32> {
        Vec::try_from(tensor).unwrap()
    }

    fn assert_close(got: &Tensor, expected: &[f32], tolerance: f32) {
        for (got, expected) in values(got).into_iter().zip(expected) {
            assert!((got - expected).abs() <= tolerance, "{got}, not {expected}");
        }
    }

    /// ```python
    /// p = torch.tensor([1., -2., .5, 0.]); o = torch.optim.AdamW([p], lr=1e-2, betas=(.9, .99), eps=1e-6, weight_decay=.1)
    /// for i in range(10):
    ///     p.grad = torch.tensor([.1 * (i + 1), -1., (-1.) ** i, 1e-5]); o.param_groups[0]["lr"] = 1e-2 * (1 - i / 20); o.step()
    /// ```
    #[test]
    fn ten_steps_agree_with_pytorch() {
        let parameters = Tensor::from_slice(&[1f32, -2.0, 0.5, 0.0]);
        let config = AdamWConfig { beta1: 0.9, beta2: 0.99, eps: 1e-6, weight_decay: 0.1 };
        let mut optimiser = AdamW::new(config, 4, Device::Cpu);
        for i in 0..10 {
            let sign = if i % 2 == 0 { 1.0 } else { -1.0 };
            let gradient = Tensor::from_slice(&[0.1 * (i + 1) as f32, -1.0, sign, 1e-5]);
            optimiser.step(&parameters, &gradient, 1e-2 * (1.0 - f64::from(i) / 20.0)).unwrap();
        }
        assert_eq!(optimiser.num_steps(), 10);
        assert_close(&parameters, &PYTORCH_PARAMETERS, 1e-6);
        assert_close(optimiser.exp_avg(), &PYTORCH_EXP_AVG, 1e-6);
        assert_close(optimiser.exp_avg_sq(), &PYTORCH_EXP_AVG_SQ, 1e-6);
    }

    const PYTORCH_PARAMETERS: [f32; 4] = [0.9168029, -1.9073226, 0.48177913, -0.07021028];
    const PYTORCH_EXP_AVG: [f32; 4] = [0.41381058, -0.6513216, -0.03428008, 6.5132153e-06];
    const PYTORCH_EXP_AVG_SQ: [f32; 4] = [0.037687402, 0.09561792, 0.09561792, 9.5617915e-12];

    #[test]
    fn an_adapter_learns_through_its_flat_buffer() {
        let config = AdapterConfig { input: 8, hidden: 32, depth: 3, pooled: 6, output: Some(4) };
        let adapter = Adapter::fresh(config, 0, Device::Cpu).unwrap();
        let teacher = Adapter::fresh(config, 1, Device::Cpu).unwrap();
        let mut optimiser = AdamW::new(AdamWConfig::default(), adapter.num_parameters() as i64, Device::Cpu);
        let states = Tensor::arange(16 * 8, (Kind::Float, Device::Cpu)).view([4, 4, 8]).sin();
        let wanted = teacher.forward(&states).sequence.detach();
        let mut losses = Vec::new();
        for _ in 0..100 {
            let loss = adapter.forward(&states).sequence.mse_loss(&wanted, tch::Reduction::Mean);
            let gradients = Tensor::run_backward(&[&loss], adapter.parameters(), false, false);
            // The pooled output is not part of this loss, yet every parameter is: the sequence is computed from the same states.
            let mut gradient = Tensor::cat(&gradients.iter().map(|gradient| gradient.flatten(0, -1)).collect::<Vec<_>>(), 0);
            clip_grad_norm(&mut gradient, 1.0).unwrap();
            optimiser.step(adapter.flat(), &gradient, 1e-2).unwrap();
            losses.push(loss.double_value(&[]));
        }
        assert!(losses[99] < 0.02 * losses[0], "{} to {}", losses[0], losses[99]);
    }

    #[test]
    fn a_saved_optimiser_goes_on_as_if_nothing_had_happened() {
        let gradient = Tensor::from_slice(&[0.3f32, -0.7]);
        let (straight, resumed) = (Tensor::zeros([2], (Kind::Float, Device::Cpu)), Tensor::zeros([2], (Kind::Float, Device::Cpu)));
        let mut first = AdamW::new(AdamWConfig::default(), 2, Device::Cpu);
        first.step(&straight, &gradient, 1e-2).unwrap();
        let mut second = AdamW::from_safetensors(AdamWConfig::default(), &first.to_safetensors().unwrap(), Device::Cpu).unwrap();
        resumed.shallow_clone().copy_(&straight);
        first.step(&straight, &gradient, 1e-2).unwrap();
        second.step(&resumed, &gradient, 1e-2).unwrap();
        assert_eq!(values(&straight), values(&resumed));
        assert_eq!(second.num_steps(), 2);

        let mut third = AdamW::new(AdamWConfig::default(), 2, Device::Cpu);
        third.restore(2, second.exp_avg(), second.exp_avg_sq()).unwrap();
        assert_eq!(values(third.exp_avg()), values(first.exp_avg()));
    }

    #[test]
    fn lengths_are_checked_before_anything_changes() {
        let mut optimiser = AdamW::new(AdamWConfig::default(), 2, Device::Cpu);
        let (two, three) = (Tensor::ones([2], (Kind::Float, Device::Cpu)), Tensor::ones([3], (Kind::Float, Device::Cpu)));
        assert!(matches!(optimiser.step(&two, &three, 0.1), Err(Error::Shape { .. })));
        assert!(matches!(optimiser.restore(1, &two, &three), Err(Error::Shape { .. })));
        assert_eq!(optimiser.num_steps(), 0);
        assert_eq!(values(&two), [1.0, 1.0]);
    }

    #[test]
    fn foreign_bytes_are_refused() {
        let ones = Tensor::ones([2], (Kind::Float, Device::Cpu));
        let other = flat::serialize(&[("average".into(), ones)], &BTreeMap::new()).unwrap();
        for bytes in [&b"not safetensors"[..], &other] {
            let error = AdamW::from_safetensors(AdamWConfig::default(), bytes, Device::Cpu).unwrap_err();
            assert!(matches!(error, Error::Invalid { .. }), "{error}");
        }
    }

    #[test]
    fn the_average_follows_at_its_own_pace_and_is_taken_over() {
        let parameters = Tensor::from_slice(&[1f32, 2.0]);
        let mut ema = Ema::new(&parameters, 0.9).unwrap();
        let mut moved = parameters.shallow_clone();
        let _ = moved.fill_(11.0);
        ema.update(&parameters).unwrap();
        assert_close(ema.flat(), &[2.0, 2.9], 1e-6);
        let mut restored = Ema::new(&Tensor::zeros_like(&parameters), 0.9).unwrap();
        restored.restore(ema.flat()).unwrap();
        assert_eq!(values(restored.flat()), values(ema.flat()));
        assert!(matches!(restored.restore(&Tensor::ones([3], (Kind::Float, Device::Cpu))), Err(Error::Shape { .. })));
    }

    #[test]
    fn clipping_scales_long_gradients_only() {
        let mut gradient = Tensor::from_slice(&[3f32, 4.0]);
        assert_eq!(clip_grad_norm(&mut gradient, 10.0).unwrap(), 5.0);
        assert_eq!(values(&gradient), [3.0, 4.0]);
        assert_eq!(clip_grad_norm(&mut gradient, 1.0).unwrap(), 5.0);
        assert_close(&gradient, &[0.6, 0.8], 1e-6);
        let mut broken = Tensor::from_slice(&[f32::NAN, 4.0]);
        assert!(clip_grad_norm(&mut broken, 1.0).unwrap().is_nan());
        assert_eq!(broken.double_value(&[1]), 4.0);
    }
}
