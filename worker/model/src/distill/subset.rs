//! Which samples of a batch a loss is about.

use tch::{Device, Tensor};

use crate::Result;
use crate::transfer::send;

/// Some samples of a batch, in order.
pub(super) struct Subset {
    pub indices: Vec<usize>,
    rows: Rows,
}

/// How their rows are found.
enum Rows {
    All,
    /// One behind the other from this one on: parts of tensors, without a copy. Batches are put together so that it is the rule.
    Run(usize),
    /// These, i64 on the device.
    Scattered(Tensor),
}

impl Subset {
    /// The samples whose flag is as wanted, of tensors on a device.
    ///
    /// Errors: [`crate::Error::Torch`].
    pub fn of(flags: &[bool], wanted: bool, device: Device) -> Result<Self> {
        let indices: Vec<usize> = (0..flags.len()).filter(|&index| flags[index] == wanted).collect();
        let first = indices.first().copied().unwrap_or_default();
        let rows = match indices.iter().copied().eq(first..first + indices.len()) {
            true if indices.len() == flags.len() => Rows::All,
            true => Rows::Run(first),
            false => {
                let rows: Vec<i64> = indices.iter().map(|&index| index as i64).collect();
                Rows::Scattered(send(&Tensor::from_slice(&rows), device)?)
            }
        };
        Ok(Self { indices, rows })
    }

    pub fn all(count: usize) -> Self {
        Self { indices: (0..count).collect(), rows: Rows::All }
    }

    pub fn none() -> Self {
        Self { indices: Vec::new(), rows: Rows::Run(0) }
    }

    pub fn len(&self) -> usize {
        self.indices.len()
    }

    pub fn is_empty(&self) -> bool {
        self.indices.is_empty()
    }

    /// The rows of these samples; the tensor itself if that is all of them. Selecting, not masking by zero, keeps an infinite value
    /// of a sample that does not count from turning the sum into NaN.
    pub fn select(&self, batch: &Tensor) -> Tensor {
        let rows = |batch: &Tensor| match &self.rows {
            Rows::All => batch.shallow_clone(),
            Rows::Run(first) => batch.narrow(0, *first as i64, self.len() as i64),
            Rows::Scattered(indices) => batch.index_select(0, indices),
        };
        if batch.dim() == 4 && !batch.is_contiguous() && !matches!(self.rows, Rows::All) {
            // A map with its channels last stays one, and so does its gradient, which libtorch makes of zeros in the order of dimensions.
            return rows(&batch.permute([0, 2, 3, 1])).permute([0, 3, 1, 2]);
        }
        rows(batch)
    }
}

#[cfg(test)]
mod tests {
    use tch::Kind;

    use super::*;

    #[test]
    fn rows_that_lie_together_are_not_copied() {
        let batch = Tensor::arange(12, (Kind::Float, Device::Cpu)).reshape([4, 3]);
        let of = |flags: &[bool], wanted: bool| Subset::of(flags, wanted, Device::Cpu).unwrap().select(&batch);
        let sorted = [false, false, false, true];
        assert_eq!((of(&sorted, false), of(&sorted, true)), (batch.narrow(0, 0, 3), batch.narrow(0, 3, 1)));
        assert_eq!(of(&sorted, true).data_ptr(), batch.narrow(0, 3, 1).data_ptr());
        assert_eq!(of(&[true; 4], true).data_ptr(), batch.data_ptr());
        assert_eq!(of(&[true; 4], false).size(), [0, 3]);
        let mixed = [true, false, true, false];
        assert_eq!(of(&mixed, true), Tensor::cat(&[batch.narrow(0, 0, 1), batch.narrow(0, 2, 1)], 0));
        assert_eq!(Subset::of(&mixed, false, Device::Cpu).unwrap().indices, [1, 3]);
    }

    /// Else the kernels would not take them, and each gradient would be turned around on the way back.
    #[test]
    fn maps_and_their_gradients_keep_their_channels_last() {
        for flags in [[true, true, false], [true, false, true]] {
            let map = Tensor::randn([3, 2, 4, 5], (Kind::Float, Device::Cpu)).permute([0, 3, 1, 2]).set_requires_grad(true);
            let picked = Subset::of(&flags, true, Device::Cpu).unwrap().select(&map);
            assert!(picked.permute([0, 2, 3, 1]).is_contiguous());
            let gradient = &Tensor::f_run_backward(&[picked.square().sum(Kind::Float)], &[&map], false, false).unwrap()[0];
            assert!(gradient.permute([0, 2, 3, 1]).is_contiguous());
            let counts = Tensor::from_slice(&flags).to_kind(Kind::Float).reshape([3, 1, 1, 1]);
            assert_eq!(*gradient, map.detach() * 2.0 * counts);
        }
    }
}
