//! A sum and the layer norm of it.

use tch::{Kind, Tensor, no_grad_guard};

use crate::error::Result;
use crate::graph::{is_recorded, record};
use crate::launch::{Argument, Kernel, Kernels, Shape, or_panic, parts};

/// Threads of a block; a warp of 32 takes a row. As in cuda/kernels.cu.
const THREADS: i64 = 128;
const ROWS_PER_BLOCK: i64 = THREADS / 32;

/// What a layer norm over the last dimension is made of.
#[derive(Debug, Clone, Copy)]
pub struct LayerNorm<'a> {
    /// `[D]`, frozen.
    pub weight: &'a Tensor,
    /// `[D]`, frozen.
    pub bias: &'a Tensor,
    /// Added to the variance.
    pub eps: f64,
}

impl LayerNorm<'_> {
    /// The sum of `input` and `residual`, and what the norm makes of it.
    ///
    /// Shapes: all `[.., D]`. `None` if the kernels cannot take the inputs as they are.
    ///
    /// # Panics
    /// As tch's operators do, if the GPU refuses.
    #[must_use]
    pub fn forward(&self, kernels: &Kernels, input: &Tensor, residual: &Tensor) -> Option<(Tensor, Tensor)> {
        let width = *input.size().last()?;
        let all_fit = [input, residual, self.weight, self.bias].into_iter().all(|tensor| kernels.takes(tensor));
        if !all_fit
            || input.size() != residual.size()
            || [self.weight, self.bias].iter().any(|tensor| tensor.size() != [width])
            || width % kernels.width() != 0
            || input.numel() == 0
        {
            return None;
        }
        Some(or_panic(self.run(kernels, input, residual, width)))
    }

    fn run(&self, kernels: &Kernels, input: &Tensor, residual: &Tensor, width: i64) -> Result<(Tensor, Tensor)> {
        let rows = input.numel() as i64 / width;
        let (sum, output) = (input.empty_like(), input.empty_like());
        let stats = Tensor::empty([rows, 2], (Kind::Float, input.device()));
        let shape = Shape { grid: [parts(rows, ROWS_PER_BLOCK) as u32, 1], threads: THREADS as u32, shared_bytes: 0 };
        let tensors = [input, residual, self.weight, self.bias, &sum, &output, &stats].map(Argument::Tensor);
        let sizes = [rows, width].map(Argument::Int);
        kernels.launch(Kernel::AddLayerNormForward, shape, &[&tensors[..], &sizes, &[Argument::Float(self.eps)]].concat())?;

        if is_recorded(&[input, residual]) {
            let owned = kernels.clone();
            let back = move |saved: &[Tensor], gradients: &[Option<Tensor>], wanted: &[bool]| {
                let [sum, weight, stats] = saved else { return Ok(Vec::new()) };
                let _guard = no_grad_guard();
                let as_ours = |gradient: &Tensor| gradient.to_kind(owned.kind()).contiguous();
                let (of_sum, of_output) = (gradients[0].as_ref().map(as_ours), gradients[1].as_ref().map(as_ours));
                // One gradient, as both are added alike.
                let gradient = match (of_sum, of_output) {
                    (of_sum, None) => of_sum,
                    (of_sum, Some(dy)) => {
                        let dx = sum.empty_like();
                        let direct = of_sum.as_ref().map_or(Argument::Null, Argument::Tensor);
                        let tensors = [&dy, weight, stats, &dx].map(Argument::Tensor);
                        let sizes = [rows, width].map(Argument::Int);
                        let arguments = [&[Argument::Tensor(sum), direct], &tensors[..], &sizes].concat();
                        owned.launch(Kernel::AddLayerNormBackward, shape, &arguments)?;
                        Some(dx)
                    }
                };
                Ok(wanted.iter().map(|&wanted| gradient.as_ref().filter(|_| wanted).map(Tensor::shallow_clone)).collect())
            };
            record(&[input, residual], &[&sum, &output], &[&sum, self.weight, &stats], Box::new(back))?;
        }
        Ok((sum, output))
    }
}
