//! Linear layers in eight bits: E4M3, with a scale for each row.
//!
//! A GPU multiplies such numbers twice as fast as those of 16 bits. The weight is frozen, so that it is rounded once, for each way through
//! the layer: by its rows on the way forth, by its columns on the way back. What comes in is rounded when it comes, row by row, which keeps
//! a token's large numbers from costing the others their digits; so is the gradient on the way back. Sums are of 32 bits.
//!
//! On the CPU the same numbers are multiplied in f32: slower than without, to see what they cost a loss.

use tch::{Device, Kind, Tensor, no_grad_guard};

use crate::Error;
use crate::error::Result;
use crate::graph::{is_recorded, record};
use crate::launch::{Argument, Kernel, Kernels, Shape, or_panic};

/// The numbers.
const CODES: Kind = Kind::Float8e4m3fn;
/// The largest number.
const LARGEST: f64 = 448.0;
/// Of a row of zeros any scale is right, but zero.
const SMALLEST_ROW: f64 = 1e-30;
/// The products of GPUs take sizes that are multiples of this.
const MULTIPLE: i64 = 16;
/// Threads of a block, at most, and packs that each may hold; as in cuda/kernels.cu.
const MAX_THREADS: i64 = 256;
const MAX_PACKS: i64 = 8;
const WARP: i64 = 32;

/// A matrix in eight bits.
#[derive(Debug)]
pub struct Fp8Matrix {
    /// `[rows, width]` in E4M3.
    pub codes: Tensor,
    /// What each row is to be multiplied with, f32 `[rows, 1]`.
    pub scales: Tensor,
}

impl Fp8Matrix {
    /// Rounds a matrix `[rows, width]`: each row relative to its largest number, which becomes 448. What is not finite becomes NaN, at
    /// least where it is.
    ///
    /// # Panics
    /// As tch's operators do, if the GPU refuses.
    #[must_use]
    pub fn round(matrix: &Tensor, kernels: Option<&Kernels>) -> Self {
        let _guard = no_grad_guard();
        kernels.and_then(|kernels| kernels.rows_to_e4m3(matrix)).unwrap_or_else(|| {
            let wide = matrix.to_kind(Kind::Float);
            let largest = wide.abs().amax([-1_i64], true).clamp_min(SMALLEST_ROW);
            let codes = (wide * (largest.full_like(LARGEST) / &largest)).to_kind(CODES);
            Self { codes, scales: largest / LARGEST }
        })
    }
}

impl Kernels {
    fn rows_to_e4m3(&self, matrix: &Tensor) -> Option<Fp8Matrix> {
        let [rows, width] = matrix.size()[..] else { return None };
        let packs = width / self.width();
        if width % self.width() != 0 || rows == 0 || packs > MAX_THREADS * MAX_PACKS || packs == 0 || !self.takes(matrix) {
            return None;
        }
        let codes = Tensor::empty([rows, width], (CODES, matrix.device()));
        let scales = Tensor::empty([rows, 1], (Kind::Float, matrix.device()));
        let threads = (packs.min(MAX_THREADS) + WARP - 1) / WARP * WARP;
        let shared_bytes = (threads / WARP) as u32 * 4;
        let shape = Shape { grid: [u32::try_from(rows).ok()?, 1], threads: threads as u32, shared_bytes };
        let arguments = [Argument::Tensor(matrix), Argument::Tensor(&codes), Argument::Tensor(&scales), Argument::Int(width)];
        or_panic(self.launch(Kernel::RowsToE4m3, shape, &arguments));
        Some(Fp8Matrix { codes, scales })
    }
}

/// A frozen linear layer in eight bits.
#[derive(Debug, Clone, Copy)]
pub struct Fp8Linear<'a> {
    /// `[outputs, inputs]`, as codes and scales of [`Fp8Matrix`].
    pub weight: (&'a Tensor, &'a Tensor),
    /// The same transposed, rounded on its own: `[inputs, outputs]`.
    pub transposed: (&'a Tensor, &'a Tensor),
    /// `[outputs]`, added to the output.
    pub bias: Option<&'a Tensor>,
}

impl Fp8Linear<'_> {
    /// Whether there are products for a layer of these sizes.
    #[must_use]
    pub fn takes(outputs: i64, inputs: i64) -> bool {
        outputs % MULTIPLE == 0 && inputs % MULTIPLE == 0 && outputs > 0 && inputs > 0
    }

    /// Shapes: `[.., inputs]` to `[.., outputs]`, of the input's kind; on a GPU it has the digits of bf16.
    ///
    /// # Panics
    /// As tch's operators do: for an input of another width, or if the GPU refuses.
    pub fn forward(&self, kernels: Option<&Kernels>, input: &Tensor) -> Tensor {
        or_panic(self.run(kernels, input))
    }

    fn run(&self, kernels: Option<&Kernels>, input: &Tensor) -> Result<Tensor> {
        let size = input.size();
        let output = {
            let _guard = no_grad_guard();
            product(input, self.weight, self.bias, true, kernels)?
        };
        if is_recorded(&[input]) {
            let (codes, scales) = self.transposed;
            let (kernels, kind) = (kernels.cloned(), input.kind());
            let back = move |saved: &[Tensor], gradients: &[Option<Tensor>], _: &[bool]| {
                let ([codes, scales], Some(gradient)) = (saved, &gradients[0]) else { return Ok(Vec::new()) };
                let _guard = no_grad_guard();
                let found = product(&gradient.to_kind(kind), (codes, scales), None, false, kernels.as_ref())?;
                debug_assert_eq!(found.size(), size);
                Ok(vec![Some(found)])
            };
            record(&[input], &[&output], &[codes, scales], Box::new(back))?;
        }
        Ok(output)
    }
}

/// `input @ weightᵀ + bias` on the last dimension, with the input rounded to eight bits.
///
/// With `fast_sums` a GPU may keep sums in fewer bits than f32 has: usual on the way forth, where it saves time; gradients are spared that.
fn product(
    input: &Tensor,
    (codes, scales): (&Tensor, &Tensor),
    bias: Option<&Tensor>,
    fast_sums: bool,
    kernels: Option<&Kernels>,
) -> Result<Tensor> {
    let (kind, mut size) = (input.kind(), input.size());
    let rows = Fp8Matrix::round(&input.f_reshape([-1, codes.size()[1]])?.contiguous(), kernels);
    let made = if input.device() == Device::Cpu {
        let wide = rows.codes.to_kind(Kind::Float).f_matmul(&codes.to_kind(Kind::Float).tr())? * &rows.scales * scales.tr();
        match bias {
            Some(bias) => wide + bias.to_kind(Kind::Float),
            None => wide,
        }
    } else {
        // The only numbers that products with a scale for each row come in.
        let bias = bias.map(|bias| bias.to_kind(Kind::BFloat16));
        rows.codes.f_internal_scaled_mm(&codes.tr(), &rows.scales, &scales.tr(), bias.as_ref(), None, Kind::BFloat16, fast_sums)?
    };
    if let Some(last) = size.last_mut() {
        *last = codes.size()[0];
    }
    Ok(made.f_reshape(size)?.to_kind(kind))
}

/// Computes a layer on a device forth and back, and compares it with what its numbers say in f32.
///
/// # Errors
/// [`Error::Torch`] if the device has no such products; [`Error::Wrong`] if they are of something else.
pub fn prove_fp8(device: Device, kind: Kind, kernels: Option<&Kernels>) -> Result<()> {
    let (outputs, inputs, tokens) = (96, 160, 40);
    let numbers = |count: i64, shape: [i64; 2], step: f64| {
        let numbers = (Tensor::arange(count, (Kind::Float, Device::Cpu)) * step).sin() * 2.0;
        // Rows of very different sizes.
        let rows = Tensor::arange(shape[0], (Kind::Float, Device::Cpu)).unsqueeze(1) * 0.05 - 3.0;
        numbers.reshape(shape) * rows.exp()
    };
    let on = |tensor: &Tensor, device| tensor.to_kind(kind).to_device(device);
    let weight = numbers(outputs * inputs, [outputs, inputs], 0.37);
    let bias = numbers(outputs, [1, outputs], 1.3).squeeze();
    let input = numbers(tokens * inputs, [tokens, inputs], 0.91);
    let weights = numbers(tokens * outputs, [tokens, outputs], 1.7);
    let compute = |device, kernels: Option<&Kernels>| -> Result<[Tensor; 2]> {
        tch::with_grad(|| {
            let weight = on(&weight, device);
            let (forth, back) = (Fp8Matrix::round(&weight, kernels), Fp8Matrix::round(&weight.tr().contiguous(), kernels));
            let (weight, transposed) = ((&forth.codes, &forth.scales), (&back.codes, &back.scales));
            let bias = on(&bias, device);
            let input = on(&input, device).set_requires_grad(true);
            let output = Fp8Linear { weight, transposed, bias: Some(&bias) }.run(kernels, &input)?;
            let loss = (&output * on(&weights, device)).f_sum(Kind::Float)?;
            let gradient = Tensor::f_run_backward(&[&loss], &[&input], false, false)?.pop().unwrap_or_default();
            Ok([output, gradient].map(|made| made.detach().to_device(Device::Cpu).to_kind(Kind::Double)))
        })
    };
    for (made, expected) in compute(device, kernels)?.iter().zip(&compute(Device::Cpu, None)?) {
        // Of each row's largest: rows are of different sizes.
        let largest = expected.abs().amax([1_i64], true);
        let difference = ((made - expected) / largest).abs().max().double_value(&[]);
        // Rounded to bf16 at the end, and summed with fewer bits on the way.
        let tolerance = 2.0_f64.powi(-6);
        // A NaN is not below anything.
        if difference < tolerance {
            continue;
        }
        return Err(Error::Wrong { operator: "a linear layer", numbers: "FP8", difference, tolerance });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::emulator;

    const CPU: (Kind, Device) = (Kind::Float, Device::Cpu);

    fn bytes(matrix: &Fp8Matrix) -> Vec<i64> {
        let codes = matrix.codes.view_dtype(Kind::Uint8).to_kind(Kind::Int64);
        Vec::try_from(codes.flatten(0, -1)).unwrap()
    }

    fn values(matrix: &Fp8Matrix) -> Tensor {
        matrix.codes.to_kind(Kind::Float) * &matrix.scales
    }

    fn layer_of(weight: &Tensor) -> (Fp8Matrix, Fp8Matrix) {
        (Fp8Matrix::round(weight, None), Fp8Matrix::round(&weight.tr().contiguous(), None))
    }

    fn forward(layer: &(Fp8Matrix, Fp8Matrix), bias: Option<&Tensor>, input: &Tensor) -> Tensor {
        let (weight, transposed) = layer;
        let (weight, transposed) = ((&weight.codes, &weight.scales), (&transposed.codes, &transposed.scales));
        Fp8Linear { weight, transposed, bias }.forward(None, input)
    }

    #[test]
    fn layer_computes_the_same_with_the_kernel() {
        for kind in [Kind::Float, Kind::Half, Kind::BFloat16] {
            prove_fp8(Device::Cpu, kind, Some(&emulator::kernels(kind))).unwrap();
        }
    }

    /// Every code there is, ties between codes, and what lies between.
    #[test]
    fn kernel_rounds_to_the_same_codes_as_libtorch() {
        for (kind, width) in [(Kind::Float, 4096), (Kind::Float, 52), (Kind::BFloat16, 4096), (Kind::Half, 24)] {
            let kernels = emulator::kernels(kind);
            // From 448 down to less than half the smallest code, both signs, in unequal steps.
            let fine = (Tensor::arange(2 * width, CPU) * -0.0061).exp() * 448.0;
            let ties = Tensor::arange(width, CPU) * 2.0_f64.powi(-10);
            let signs = Tensor::arange(width, CPU).remainder(2.0) * 2.0 - 1.0;
            let rows = Tensor::cat(&[fine.reshape([2, width]), ties.unsqueeze(0), Tensor::zeros([1, width], CPU)], 0) * signs;
            let rows = rows.to_kind(kind);
            let (ours, theirs) = (kernels.rows_to_e4m3(&rows).unwrap(), Fp8Matrix::round(&rows, None));
            assert_eq!(bytes(&ours), bytes(&theirs), "{kind:?}");
            assert_eq!(ours.scales, theirs.scales);
            assert_eq!(values(&ours).get(3).abs().max().double_value(&[]), 0.0);
            let largest = rows.to_kind(Kind::Float).abs().amax([-1_i64], false);
            assert!(((values(&ours).abs().amax([-1_i64], false) - &largest) / (largest + 1e-9)).abs().max().double_value(&[]) < 1e-6);
        }
    }

    #[test]
    fn rows_lose_a_sixteenth_at_most() {
        let matrix = (Tensor::arange(64 * 96, CPU) * 0.37).sin().reshape([64, 96]) * (Tensor::arange(64, CPU).unsqueeze(1) - 32.0).exp();
        let rounded = values(&Fp8Matrix::round(&matrix, None));
        // Numbers below a 2^-14th of the row's largest share its smallest step.
        let floor = matrix.abs().amax([-1_i64], true) / LARGEST * 2.0_f64.powi(-10);
        let lost = (&rounded - &matrix).abs() - matrix.abs() / 16.0;
        assert_eq!(lost.le_tensor(&(floor * 1.001)).all().int64_value(&[]), 1);
    }

    #[test]
    fn what_is_not_finite_stays_so() {
        for kernels in [None, Some(emulator::kernels(Kind::Float))] {
            for odd in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
                let mut matrix = Tensor::ones([2, 32], CPU);
                let _ = matrix.get(0).get(5).fill_(odd);
                let values = values(&Fp8Matrix::round(&matrix, kernels.as_ref()));
                assert!(values.get(0).get(5).double_value(&[]).is_nan(), "{odd}");
                assert_eq!(values.get(1), Tensor::ones([32], CPU), "another row");
                let _ = matrix.fill_(0.0);
            }
        }
    }

    #[test]
    fn output_and_gradient_are_those_of_the_weight_to_within_its_digits() {
        // The digits behind those of a sine: nothing that cancels out in a sum.
        let numbers = |count: i64, step: f64| (Tensor::arange(count, CPU) * step).sin().g_mul_scalar(4096.0).frac();
        let weight = numbers(48 * 64, 0.73).reshape([48, 64]);
        let bias = Tensor::arange(48, CPU) * 0.1;
        let layer = layer_of(&weight);
        let input = || numbers(2 * 5 * 64, 1.1).reshape([2, 5, 64]).set_requires_grad(true);
        let towards = numbers(2 * 5 * 48, 0.9).reshape([2, 5, 48]);
        let of = |layer: &dyn Fn(&Tensor) -> Tensor| {
            let input = input();
            let output = layer(&input);
            (&output * &towards).sum(Kind::Float).backward();
            [output.detach(), input.grad()]
        };
        let rounded = of(&|input| forward(&layer, Some(&bias), input));
        let exact = of(&|input| input.linear(&weight, Some(&bias)));
        for (rounded, exact) in rounded.iter().zip(&exact) {
            assert_eq!(rounded.size(), exact.size());
            let error = ((rounded - exact).norm() / exact.norm()).double_value(&[]);
            // Not exact either, else nothing was rounded.
            assert!(error < 0.05 && error > 1e-3, "{error}");
        }
        assert!(!forward(&layer, None, &input().detach()).requires_grad());
    }

    #[test]
    fn sizes_that_have_no_product_are_told() {
        assert!(Fp8Linear::takes(32, 64) && !Fp8Linear::takes(24, 64) && !Fp8Linear::takes(64, 8) && !Fp8Linear::takes(0, 16));
        let kernels = emulator::kernels(Kind::Float);
        assert!(kernels.rows_to_e4m3(&Tensor::zeros([2, 8192], CPU)).is_some());
        assert!(kernels.rows_to_e4m3(&Tensor::zeros([2, 8196], CPU)).is_none(), "more than a block holds");
        assert!(kernels.rows_to_e4m3(&Tensor::zeros([2, 18], CPU)).is_none(), "no whole packs");
        assert!(kernels.rows_to_e4m3(&Tensor::zeros([0, 16], CPU)).is_none() && kernels.rows_to_e4m3(&Tensor::zeros([16], CPU)).is_none());
    }
}
