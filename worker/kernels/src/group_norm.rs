//! Group norm, what is added to its input, and the SiLU behind it.

use tch::{Kind, Tensor, no_grad_guard};

use crate::error::Result;
use crate::graph::{is_recorded, record};
use crate::launch::{Argument, Kernel, Kernels, Shape, or_panic, parts, rows};

/// Threads of a block, if so many have a row.
const THREADS: i64 = 384;
/// Threads of a block that has a wider row; as in cuda/kernels.cu, where only f32 needs more, with its smaller packs.
const MAX_THREADS: i64 = 640;
/// Blocks for each processor of the GPU, at most. It has two of the way back at work at a time, by their registers, and three of the way
/// forth: both then end with their last wave about full, where a few blocks more would begin another one.
const BLOCKS_PER_PROCESSOR: i64 = 6;

/// What a group norm is made of.
#[derive(Debug, Clone, Copy)]
pub struct GroupNorm<'a> {
    /// `[C]`, frozen.
    pub weight: &'a Tensor,
    /// `[C]`, frozen.
    pub bias: &'a Tensor,
    /// Divides C.
    pub groups: i64,
    /// Added to the variance.
    pub eps: f64,
    /// Whether a SiLU follows.
    pub silu: bool,
}

/// How a map is cut into blocks.
#[derive(Debug, Clone, Copy)]
struct Cut {
    batch: i64,
    rows: i64,
    channels: i64,
    groups: i64,
    threads: i64,
    rows_per_block: i64,
    chunks: i64,
}

impl Cut {
    /// `None` for widths that the kernels cannot take.
    fn new(kernels: &Kernels, [batch, rows, channels]: [i64; 3], groups: i64) -> Option<Self> {
        let columns = channels / kernels.width();
        let is_empty = batch * rows * channels == 0;
        let max_threads = if kernels.kind() == Kind::Float { MAX_THREADS } else { THREADS };
        if is_empty || channels % kernels.width() != 0 || columns > max_threads || channels % groups != 0 {
            return None;
        }
        let lanes = (THREADS / columns).max(1);
        let threads = lanes * columns;
        if 2 * groups > threads {
            return None;
        }
        let wanted = (BLOCKS_PER_PROCESSOR * i64::from(kernels.num_processors()) / batch).max(1);
        let rows_per_block = parts(rows, wanted.min(parts(rows, lanes)));
        Some(Self { batch, rows, channels, groups, threads, rows_per_block, chunks: parts(rows, rows_per_block) })
    }

    fn shape(&self, shared_floats: i64) -> Shape {
        Shape { grid: [self.chunks as u32, self.batch as u32], threads: self.threads as u32, shared_bytes: 4 * shared_floats as u32 }
    }

    /// A sum and another of each channel, in each of the block's lanes.
    fn summing(&self, kernels: &Kernels) -> Shape {
        self.shape(2 * self.threads * kernels.width())
    }

    /// The groups' sums behind a float a thread; later a sum of each channel, in each lane.
    fn applying(&self, kernels: &Kernels) -> Shape {
        self.shape((self.threads + 2 * self.groups).max(self.threads * kernels.width()))
    }

    /// Two sums of each group in each block.
    fn partials(&self, like: &Tensor) -> Tensor {
        Tensor::empty([self.batch, self.chunks, self.groups, 2], (Kind::Float, like.device()))
    }
}

impl GroupNorm<'_> {
    /// Shapes: `input` `[N, C, ..]`, kept, and so is its layout; `added`, if any, `[N, C]`, is added to all of a channel first.
    ///
    /// `None` if the kernels cannot take the input as it is: of another kind, not with its channels last in memory, or of other widths.
    ///
    /// # Panics
    /// As tch's operators do, if the GPU refuses.
    #[must_use]
    pub fn forward(&self, kernels: &Kernels, input: &Tensor, added: Option<&Tensor>) -> Option<Tensor> {
        let x = rows(input)?;
        let cut = Cut::new(kernels, x.size3().ok()?.into(), self.groups)?;
        let read = [Some(&x), added, Some(self.weight), Some(self.bias)];
        let are_sizes_right = [self.weight, self.bias].iter().all(|tensor| tensor.size() == [cut.channels])
            && added.is_none_or(|added| added.size() == [cut.batch, cut.channels]);
        if !are_sizes_right || !read.into_iter().flatten().all(|tensor| kernels.takes(tensor)) {
            return None;
        }
        Some(or_panic(self.run(kernels, cut, input, &x, added)))
    }

    fn run(&self, kernels: &Kernels, cut: Cut, input: &Tensor, x: &Tensor, added: Option<&Tensor>) -> Result<Tensor> {
        let output = input.empty_like();
        let stats = Tensor::empty([cut.batch, self.groups, 2], (Kind::Float, input.device()));
        let (partials, first) = (cut.partials(input), added.map_or(Argument::Null, Argument::Tensor));
        let sizes = [cut.rows, cut.channels, cut.groups, cut.rows_per_block].map(Argument::Int);
        let sums = [Argument::Tensor(x), first, Argument::Tensor(&partials)];
        kernels.launch(Kernel::GroupNormSums, cut.summing(kernels), &[&sums[..], &sizes].concat())?;
        let apply = [x, self.weight, self.bias, &partials, &output, &stats].map(Argument::Tensor);
        let rest = [Argument::Float(self.eps), Argument::Int(self.silu.into())];
        let arguments = [&apply[..1], &[first], &apply[1..], &sizes, &rest].concat();
        kernels.launch(Kernel::GroupNormApply, cut.applying(kernels), &arguments)?;

        let inputs: Vec<&Tensor> = [input].into_iter().chain(added).collect();
        if is_recorded(&inputs) {
            let (kernels, silu) = (kernels.clone(), self.silu);
            let saved: Vec<&Tensor> = [input, self.weight, self.bias, &stats].into_iter().chain(added).collect();
            let back = move |saved: &[Tensor], gradients: &[Option<Tensor>], wanted: &[bool]| match &gradients[0] {
                Some(gradient) => go_back(&kernels, cut, silu, saved, gradient, wanted.get(1) == Some(&true)),
                None => Ok(Vec::new()),
            };
            record(&inputs, &[&output], &saved, Box::new(back))?;
        }
        Ok(output)
    }
}

/// The gradients of the input and, if it is asked for, of what was added.
fn go_back(kernels: &Kernels, cut: Cut, silu: bool, saved: &[Tensor], gradient: &Tensor, wants_added: bool) -> Result<Vec<Option<Tensor>>> {
    let [input, weight, bias, stats, added @ ..] = saved else { return Ok(Vec::new()) };
    let like_input = |map: &Tensor| map.flatten(2, -1).transpose(1, 2).contiguous();
    let _guard = no_grad_guard();
    let (x, dy, dx) = (like_input(input), like_input(&gradient.to_kind(kernels.kind())), input.empty_like());
    let partials = cut.partials(input);
    let options = (Kind::Float, input.device());
    let of_added = wants_added.then(|| Tensor::empty([cut.batch, cut.chunks, cut.channels], options));

    let first = added.first().map_or(Argument::Null, Argument::Tensor);
    let sizes = [cut.rows, cut.channels, cut.groups, cut.rows_per_block, silu.into()].map(Argument::Int);
    let read = [Argument::Tensor(&x), first].into_iter().chain([&dy, weight, bias, stats, &partials].map(Argument::Tensor));
    let read: Vec<Argument> = read.collect();
    kernels.launch(Kernel::GroupNormGradientSums, cut.summing(kernels), &[&read[..], &sizes].concat())?;
    let written = [Argument::Tensor(&dx), of_added.as_ref().map_or(Argument::Null, Argument::Tensor)];
    kernels.launch(Kernel::GroupNormGradientApply, cut.applying(kernels), &[&read[..], &written, &sizes].concat())?;

    let of_added = of_added.map(|partials| partials.sum_dim_intlist(1, false, Kind::Float).to_kind(kernels.kind()));
    Ok(vec![Some(dx), of_added])
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    struct Nothing;

    impl crate::launch::Launch for Nothing {
        fn launch(&self, _: Kernel, _: Shape, _: &[u64]) -> Result<()> {
            Ok(())
        }
    }

    /// On a GPU of 132 processors: 264 blocks of the way back at a time and 396 of the way forth, each in whole waves.
    #[test]
    fn the_last_wave_is_about_full() {
        let kernels = Kernels::new(Kind::BFloat16, 132, Arc::new(Nothing));
        for batch in [4, 10, 16, 32, 48] {
            for (rows, channels) in [(6400, 320), (6400, 960), (16384, 640), (1600, 640), (409_600, 128)] {
                let cut = Cut::new(&kernels, [batch, rows, channels], 32).unwrap();
                let blocks = cut.chunks * batch;
                assert!(blocks <= 792 && blocks * 100 >= 792 * 85, "{batch} of {rows} rows: {blocks} blocks");
                assert!(cut.rows_per_block * (cut.chunks - 1) < rows && cut.rows_per_block * cut.chunks >= rows);
            }
        }
        // More samples than blocks.
        assert_eq!(Cut::new(&kernels, [1000, 64, 320], 32).unwrap().chunks, 1);
    }
}
