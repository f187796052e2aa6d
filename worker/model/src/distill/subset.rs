//! Which samples of a batch a loss is about.

use tch::Tensor;

/// Some samples of a batch, in order.
pub(super) struct Subset {
    pub indices: Vec<usize>,
    is_all: bool,
}

impl Subset {
    pub fn of(flags: &[bool], wanted: bool) -> Self {
        let indices: Vec<usize> = (0..flags.len()).filter(|&index| flags[index] == wanted).collect();
        Self { is_all: indices.len() == flags.len(), indices }
    }

    pub fn all(count: usize) -> Self {
        Self { indices: (0..count).collect(), is_all: true }
    }

    pub fn none() -> Self {
        Self { indices: Vec::new(), is_all: false }
    }

    pub fn is_empty(&self) -> bool {
        self.indices.is_empty()
    }

    /// The rows of these samples; the tensor itself if that is all of them. Selecting, not masking by zero, keeps an infinite value
    /// of a sample that does not count from turning the sum into NaN.
    pub fn select(&self, batch: &Tensor) -> Tensor {
        if self.is_all {
            return batch.shallow_clone();
        }
        let indices: Vec<i64> = self.indices.iter().map(|&index| index as i64).collect();
        let indices = Tensor::from_slice(&indices).to_device(batch.device());
        if batch.dim() == 4 && !batch.is_contiguous() {
            // A map with its channels last stays one.
            return batch.permute([0, 2, 3, 1]).index_select(0, &indices).permute([0, 3, 1, 2]);
        }
        batch.index_select(0, &indices)
    }
}
