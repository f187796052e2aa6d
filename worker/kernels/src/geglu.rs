//! Values times the exact GELU of their gates.

use tch::{Tensor, no_grad_guard};

use crate::error::Result;
use crate::graph::{is_recorded, record};
use crate::launch::{Argument, Kernel, Kernels, Shape, or_panic, parts};

/// Threads of a block.
const THREADS: i64 = 256;
/// Blocks for each processor of the GPU; those go on where there are more numbers.
const BLOCKS_PER_PROCESSOR: i64 = 16;

impl Kernels {
    /// `value * gelu(gate)` of `input`'s two halves.
    ///
    /// Shapes: `input` `[.., 2 * D]`, values before gates, to `[.., D]`. `None` if the kernels cannot take the input as it is.
    ///
    /// # Panics
    /// As tch's operators do, if the GPU refuses.
    #[must_use]
    pub fn geglu(&self, input: &Tensor) -> Option<Tensor> {
        let double = *input.size().last()?;
        let inner = double / 2;
        if double % 2 != 0 || inner == 0 || inner % self.width() != 0 || !self.takes(input) || input.numel() == 0 {
            return None;
        }
        Some(or_panic(self.run_geglu(input, inner)))
    }

    fn run_geglu(&self, input: &Tensor, inner: i64) -> Result<Tensor> {
        let mut size = input.size();
        if let Some(last) = size.last_mut() {
            *last = inner;
        }
        let output = Tensor::empty(size, (self.kind(), input.device()));
        let rows = output.numel() as i64 / inner;
        let sizes = [rows, inner].map(Argument::Int);
        let arguments = [&[input, &output].map(Argument::Tensor)[..], &sizes].concat();
        let shape = self.geglu_shape(rows, inner);
        self.launch(Kernel::GegluForward, shape, &arguments)?;
        if is_recorded(&[input]) {
            let kernels = self.clone();
            let back = move |saved: &[Tensor], gradients: &[Option<Tensor>], _: &[bool]| {
                let ([input], Some(gradient)) = (saved, &gradients[0]) else { return Ok(Vec::new()) };
                let _guard = no_grad_guard();
                let (dy, dx) = (gradient.to_kind(kernels.kind()).contiguous(), input.empty_like());
                let arguments = [&[input, &dy, &dx].map(Argument::Tensor)[..], &[rows, inner].map(Argument::Int)].concat();
                kernels.launch(Kernel::GegluBackward, shape, &arguments)?;
                Ok(vec![Some(dx)])
            };
            record(&[input], &[&output], &[input], Box::new(back))?;
        }
        Ok(output)
    }

    fn geglu_shape(&self, rows: i64, inner: i64) -> Shape {
        let blocks = parts(rows * (inner / self.width()), THREADS);
        let blocks = blocks.min(BLOCKS_PER_PROCESSOR * i64::from(self.num_processors()));
        Shape { grid: [blocks as u32, 1], threads: THREADS as u32, shared_bytes: 0 }
    }
}
