//! Kernels beside libtorch's own operators, on the device at hand.

use std::panic::{AssertUnwindSafe, catch_unwind};

use tch::{Device, Kind, Tensor, with_grad};

use crate::error::{Error, Result, message};
use crate::launch::Kernels;
use crate::registry::name;
use crate::{GroupNorm, LayerNorm};

/// Channels, groups, height and width of maps: groups that end within a pack and ones that do not, several blocks and one, a row a block at
/// a time and many, and the widest.
const MAPS: [[i64; 4]; 5] = [[320, 32, 12, 9], [128, 32, 40, 40], [1280, 32, 5, 4], [2560, 32, 3, 4], [64, 4, 3, 1]];
/// Rows and width of token states: widths that fill a warp's packs and ones that do not.
const STATES: [[i64; 2]; 3] = [[7, 640], [5, 1280], [9, 72]];
const BATCH: i64 = 2;
/// The units in the last place that a value may be off, of the largest one: the last rounding and, in a difference of sums, some more.
const ROUNDINGS: f64 = 4.0;

/// Computes every operator forth and back, with kernels and, in f32, with libtorch.
///
/// # Errors
/// [`Error::Wrong`] for the first that differs by more than rounding; those of the kernels and of libtorch.
pub(crate) fn prove(kernels: &Kernels, device: Device) -> Result<()> {
    let proof = Proof { kernels, device };
    // Operators panic where a GPU refuses; what is around the panic also sets the caller's gradient mode back.
    with_grad(|| catch_unwind(AssertUnwindSafe(|| proof.run()))).unwrap_or_else(|panic| {
        let answer = message(&*panic).unwrap_or_else(|| "an operator panicked".into());
        Err(Error::Gpu { doing: "prove the kernels", answer })
    })
}

struct Proof<'a> {
    kernels: &'a Kernels,
    device: Device,
}

impl Proof<'_> {
    fn run(&self) -> Result<()> {
        for map in MAPS {
            for (silu, added) in [(true, true), (true, false), (false, false)] {
                self.group_norm(map, silu, added)?;
            }
            self.residual(map)?;
            self.mean_squares(map)?;
        }
        for size in STATES {
            self.layer_norm(size)?;
            self.geglu(size)?;
        }
        Ok(())
    }

    /// Numbers that are the same whenever they are asked for, without libtorch's generator, whose state is the caller's.
    fn numbers(&self, shape: &[i64], seed: u64) -> Tensor {
        let count: i64 = shape.iter().product();
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let values: Vec<f32> = (0..count)
            .map(|_| {
                // Sum of four uniform numbers, of a shift register: about normal.
                (0..4)
                    .map(|_| {
                        state ^= state << 13;
                        state ^= state >> 7;
                        state ^= state << 17;
                        (state >> 40) as f32 / (1 << 24) as f32 - 0.5
                    })
                    .sum::<f32>()
                    * 1.7
            })
            .collect();
        Tensor::from_slice(&values).reshape(shape).to_kind(self.kernels.kind()).to_device(self.device)
    }

    fn leaf(&self, shape: &[i64], seed: u64) -> Tensor {
        self.numbers(shape, seed).set_requires_grad(true)
    }

    fn group_norm(&self, [channels, groups, height, width]: [i64; 4], silu: bool, added: bool) -> Result<()> {
        // A mean of several deviations costs digits where sums of squares are taken carelessly.
        let map = self.numbers(&[BATCH, height, width, channels], 1) * 1.5 + 4.0;
        let input = map.permute([0, 3, 1, 2]).set_requires_grad(true);
        let added = added.then(|| self.leaf(&[BATCH, channels], 2));
        let (weight, bias) = (self.numbers(&[channels], 3), self.numbers(&[channels], 4));
        let norm = GroupNorm { weight: &weight, bias: &bias, groups, eps: 1e-5, silu };
        let made = norm.forward(self.kernels, &input, added.as_ref()).ok_or_else(|| self.refused("group norm"))?;
        let [wide, wide_weight, wide_bias] = [&input, &weight, &bias].map(|tensor| tensor.to_kind(Kind::Float));
        let wide = match &added {
            Some(added) => wide + added.to_kind(Kind::Float).unsqueeze(-1).unsqueeze(-1),
            None => wide,
        };
        let expected = wide.f_group_norm(groups, Some(&wide_weight), Some(&wide_bias), 1e-5, false)?;
        let expected = if silu { expected.silu() } else { expected };
        let inputs: Vec<&Tensor> = [&input].into_iter().chain(&added).collect();
        self.compare("group norm", &[(&made, &expected)], &inputs)
    }

    fn layer_norm(&self, [rows, width]: [i64; 2]) -> Result<()> {
        let (input, residual) = (self.leaf(&[BATCH, rows, width], 5), self.leaf(&[BATCH, rows, width], 6));
        let (weight, bias) = (self.numbers(&[width], 7), self.numbers(&[width], 8));
        let norm = LayerNorm { weight: &weight, bias: &bias, eps: 1e-5 };
        let (sum, made) = norm.forward(self.kernels, &input, &residual).ok_or_else(|| self.refused("layer norm"))?;
        // The sum is rounded before the norm, as it is where both are computed one after the other.
        let wide_sum = (&input + &residual).to_kind(Kind::Float);
        let [wide_weight, wide_bias] = [&weight, &bias].map(|tensor| tensor.to_kind(Kind::Float));
        let expected = wide_sum.f_layer_norm(&[width][..], Some(&wide_weight), Some(&wide_bias), 1e-5, false)?;
        self.compare("layer norm", &[(&sum, &wide_sum), (&made, &expected)], &[&input, &residual])
    }

    fn residual(&self, [channels, _, height, width]: [i64; 4]) -> Result<()> {
        let map = |seed| self.numbers(&[BATCH, height, width, channels], seed).permute([0, 3, 1, 2]).set_requires_grad(true);
        let (input, residual, bias) = (map(22), map(23), self.numbers(&[channels], 24));
        let made = self.kernels.add_residual(&input, &residual, &bias).ok_or_else(|| self.refused("sum of two maps"))?;
        let [input32, residual32, bias32] = [&input, &residual, &bias].map(|tensor| tensor.to_kind(Kind::Float));
        let expected = input32 + residual32 + bias32.reshape([-1, 1, 1]);
        self.compare("sum of two maps", &[(&made, &expected)], &[&input, &residual])
    }

    fn mean_squares(&self, [channels, _, height, width]: [i64; 4]) -> Result<()> {
        let map = |seed| self.numbers(&[BATCH, height, width, channels], seed).permute([0, 3, 1, 2]);
        let (left, right) = (map(20).set_requires_grad(true), map(21));
        let made = self.kernels.mean_squares(&left, &right).ok_or_else(|| self.refused("mean of squares"))?;
        let squares = (left.to_kind(Kind::Float) - right.to_kind(Kind::Float)).square();
        let expected = squares.mean_dim(&[1_i64, 2, 3][..], false, Kind::Float);
        self.compare("mean of squares", &[(&made, &expected)], &[&left])
    }

    fn geglu(&self, [rows, width]: [i64; 2]) -> Result<()> {
        let input = self.leaf(&[BATCH, rows, 2 * width], 9);
        let made = self.kernels.geglu(&input).ok_or_else(|| self.refused("GEGLU"))?;
        let halves = input.to_kind(Kind::Float).f_chunk(2, -1)?;
        let expected = &halves[0] * halves[1].gelu("none");
        self.compare("GEGLU", &[(&made, &expected)], &[&input])
    }

    /// Compares outputs, and the gradients of the inputs of a sum of them that weighs each value otherwise.
    fn compare(&self, operator: &'static str, outputs: &[(&Tensor, &Tensor)], inputs: &[&Tensor]) -> Result<()> {
        let loss = |of: &dyn Fn(&(&Tensor, &Tensor)) -> Tensor| {
            let parts = outputs.iter().enumerate().map(|(index, output)| {
                let value = of(output);
                let weights = self.numbers(&value.size(), 10 + index as u64).to_kind(value.kind());
                (value * weights).sum(Kind::Float)
            });
            parts.reduce(|sum, part| sum + part)
        };
        let gradients = |loss: Option<Tensor>| loss.map_or(Ok(Vec::new()), |loss| Tensor::f_run_backward(&[loss], inputs, false, false));
        let ours = gradients(loss(&|(ours, _)| ours.shallow_clone()))?;
        let theirs = gradients(loss(&|(_, theirs)| theirs.shallow_clone()))?;
        let pairs = outputs.iter().copied().chain(ours.iter().zip(&theirs));
        for (ours, theirs) in pairs {
            self.check(operator, ours, theirs)?;
        }
        Ok(())
    }

    fn check(&self, operator: &'static str, ours: &Tensor, theirs: &Tensor) -> Result<()> {
        let [ours, theirs] = [ours, theirs].map(|tensor| tensor.detach().to_kind(Kind::Double));
        let largest = theirs.abs().max().double_value(&[]);
        let difference = (ours - theirs).abs().max().double_value(&[]) / largest;
        let unit = match self.kernels.kind() {
            Kind::BFloat16 => 2.0_f64.powi(-8),
            Kind::Half => 2.0_f64.powi(-11),
            // Sums of thousands of numbers in f32, in another order.
            _ => 2.0_f64.powi(-18),
        };
        let tolerance = ROUNDINGS * unit;
        // A NaN is not below anything.
        if difference < tolerance {
            return Ok(());
        }
        let numbers = name(self.kernels.kind()).unwrap_or_default();
        Err(Error::Wrong { operator, numbers, difference, tolerance })
    }

    fn refused(&self, operator: &'static str) -> Error {
        Error::Gpu { doing: "prove an operator", answer: format!("{operator} does not take what it is made for") }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::emulator;
    use crate::launch::{Kernel, Launch, Shape};

    #[test]
    fn emulated_kernels_compute_what_libtorch_does_in_every_kind() {
        for kind in [Kind::Float, Kind::Half, Kind::BFloat16] {
            prove(&emulator::kernels(kind), Device::Cpu).unwrap_or_else(|error| panic!("{error}"));
        }
    }

    /// What refuses every launch.
    struct Broken;

    impl Launch for Broken {
        fn launch(&self, kernel: Kernel, _: Shape, _: &[u64]) -> Result<()> {
            Err(Error::Gpu { doing: "launch a kernel", answer: format!("{}: no", kernel.name()) })
        }
    }

    #[test]
    fn a_gpu_that_refuses_is_an_error_and_leaves_gradients_as_they_were() {
        let kernels = Kernels::new(Kind::Float, 1, Arc::new(Broken));
        let _guard = tch::no_grad_guard();
        let refused = prove(&kernels, Device::Cpu).unwrap_err().to_string();
        assert_eq!(refused, "cannot prove the kernels: cannot launch a kernel: group_norm_sums: no");
        let x = Tensor::ones([1], (Kind::Float, Device::Cpu)).set_requires_grad(true);
        assert!(!(x * 2.0).requires_grad(), "the caller wants no gradients");
    }
}
