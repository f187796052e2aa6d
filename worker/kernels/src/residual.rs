//! The sum at the end of a residual block, with the biases of the convolutions that made its parts.

use tch::Tensor;

use crate::error::Result;
use crate::graph::{is_recorded, record};
use crate::launch::{Argument, Kernel, Kernels, Shape, or_panic, parts, rows};

/// Threads of a block.
const THREADS: i64 = 256;
/// Blocks for each processor of the GPU, at most: as many as are at work at a time.
const BLOCKS_PER_PROCESSOR: i64 = 8;

impl Kernels {
    /// `input + residual`, and `bias` to all of a channel.
    ///
    /// Shapes: both maps `[N, C, ..]`, kept, and so is their layout; `bias` `[C]`, frozen. `None` if the kernel cannot take the inputs as
    /// they are.
    ///
    /// # Panics
    /// As tch's operators do, if the GPU refuses.
    #[must_use]
    pub fn add_residual(&self, input: &Tensor, residual: &Tensor, bias: &Tensor) -> Option<Tensor> {
        let (left, right) = (rows(input)?, rows(residual)?);
        let [batch, num_rows, channels] = left.size3().ok()?.into();
        let do_fit = input.size() == residual.size() && bias.size() == [channels] && channels % self.width() == 0;
        if !do_fit || input.numel() == 0 || ![&left, &right, bias].into_iter().all(|tensor| self.takes(tensor)) {
            return None;
        }
        Some(or_panic(self.run_add_residual(input, residual, bias, [batch * num_rows, channels])))
    }

    fn run_add_residual(&self, input: &Tensor, residual: &Tensor, bias: &Tensor, [rows, channels]: [i64; 2]) -> Result<Tensor> {
        let output = input.empty_like();
        let blocks = parts(rows * (channels / self.width()), THREADS).min(BLOCKS_PER_PROCESSOR * i64::from(self.num_processors()));
        let shape = Shape { grid: [blocks as u32, 1], threads: THREADS as u32, shared_bytes: 0 };
        let tensors = [input, residual, bias, &output].map(Argument::Tensor);
        self.launch(Kernel::AddResidual, shape, &[&tensors[..], &[rows, channels].map(Argument::Int)].concat())?;
        if is_recorded(&[input, residual]) {
            let kind = self.kind();
            // What comes back to the sum comes back to each of its parts.
            let back = move |_: &[Tensor], gradients: &[Option<Tensor>], wanted: &[bool]| {
                let gradient = gradients[0].as_ref().map(|gradient| gradient.to_kind(kind));
                Ok(wanted.iter().map(|&wanted| gradient.as_ref().filter(|_| wanted).map(Tensor::shallow_clone)).collect())
            };
            record(&[input, residual], &[&output], &[], Box::new(back))?;
        }
        Ok(output)
    }
}
