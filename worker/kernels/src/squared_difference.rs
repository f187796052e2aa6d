//! The mean square of a difference, sample by sample, without the difference in memory.

use tch::{Kind, Tensor, no_grad_guard};

use crate::error::Result;
use crate::graph::{is_recorded, record};
use crate::launch::{Argument, Kernel, Kernels, Shape, or_panic, parts};

/// Threads of a block.
const THREADS: i64 = 256;
/// Blocks for each processor of the GPU.
const BLOCKS_PER_PROCESSOR: i64 = 8;

/// Samples and the packs in each.
#[derive(Debug, Clone, Copy)]
struct Cut {
    batch: i64,
    packs: i64,
    size: i64,
    packs_per_block: i64,
    chunks: i64,
}

impl Cut {
    fn shape(&self) -> Shape {
        Shape { grid: [self.chunks as u32, self.batch as u32], threads: THREADS as u32, shared_bytes: 4 * (THREADS / 32) as u32 }
    }
}

impl Kernels {
    /// The mean of `(left - right)^2` over each sample, in f32; the gradient flows to `left` alone.
    ///
    /// Shapes: both `[N, ..]`, to `[N]`. `None` if the kernels cannot take the inputs as they are: with gaps in memory, or not in the same
    /// order.
    ///
    /// # Panics
    /// As tch's operators do, if the GPU refuses.
    #[must_use]
    pub fn mean_squares(&self, left: &Tensor, right: &Tensor) -> Option<Tensor> {
        let batch = *left.size().first()?;
        // The same numbers, in the order in which they lie in memory.
        let (flat_left, flat_right) = (in_memory_order(left)?, in_memory_order(right)?);
        let size = left.numel() as i64 / batch.max(1);
        let is_alike = left.size() == right.size() && left.stride() == right.stride();
        if !is_alike || size == 0 || batch == 0 || size % self.width() != 0 || !self.takes(&flat_left) || !self.takes(&flat_right) {
            return None;
        }
        let packs = size / self.width();
        let wanted = parts(BLOCKS_PER_PROCESSOR * i64::from(self.num_processors()), batch);
        let packs_per_block = parts(packs, wanted.min(parts(packs, THREADS)));
        let cut = Cut { batch, packs, size, packs_per_block, chunks: parts(packs, packs_per_block) };
        Some(or_panic(self.run_mean_squares(left, right, cut)))
    }

    fn run_mean_squares(&self, left: &Tensor, right: &Tensor, cut: Cut) -> Result<Tensor> {
        let means = {
            let _guard = no_grad_guard();
            let partials = Tensor::empty([cut.batch, cut.chunks], (Kind::Float, left.device()));
            let tensors = [left, right, &partials].map(Argument::Tensor);
            let sizes = [cut.packs, cut.packs_per_block].map(Argument::Int);
            self.launch(Kernel::SquaredDifferenceSums, cut.shape(), &[&tensors[..], &sizes].concat())?;
            partials.sum_dim_intlist(1, false, Kind::Float) / cut.size as f64
        };
        if is_recorded(&[left]) {
            let kernels = self.clone();
            let back = move |saved: &[Tensor], gradients: &[Option<Tensor>], _: &[bool]| {
                let ([left, right], Some(gradient)) = (saved, &gradients[0]) else { return Ok(Vec::new()) };
                let _guard = no_grad_guard();
                let (gradient, dleft) = (gradient.to_kind(Kind::Float).contiguous(), left.empty_like());
                let tensors = [left, right, &gradient, &dleft].map(Argument::Tensor);
                let rest = [Argument::Int(cut.packs), Argument::Float(2.0 / cut.size as f64)];
                kernels.launch(Kernel::SquaredDifferenceGradient, cut.shape(), &[&tensors[..], &rest].concat())?;
                Ok(vec![Some(dleft)])
            };
            record(&[left], &[&means], &[left, right], Box::new(back))?;
        }
        Ok(means)
    }
}

/// A tensor whose samples lie behind each other without gaps, with its dimensions in the order of memory.
fn in_memory_order(tensor: &Tensor) -> Option<Tensor> {
    if tensor.is_contiguous() {
        return Some(tensor.shallow_clone());
    }
    let last = (tensor.dim() == 4).then(|| tensor.permute([0, 2, 3, 1]))?;
    last.is_contiguous().then_some(last)
}
