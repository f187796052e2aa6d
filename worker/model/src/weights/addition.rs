//! What is added to weights as they are read.

use std::collections::BTreeMap;

use tch::{Device, Kind, Tensor};

use super::Stored;

/// Products of two thin matrices, by the key of what they are added to.
pub(crate) type Additions = BTreeMap<String, Vec<Addition>>;

/// `scale * up @ down`, which is added to a weight.
#[derive(Clone)]
pub(crate) struct Addition {
    /// `[rank, ..]`; what follows the rank has as many elements as a row of the weight.
    pub down: Stored,
    /// `[rows of the weight, rank, ..]`, where what follows the rank is 1.
    pub up: Stored,
    /// What the product is multiplied by.
    pub scale: f64,
}

impl Addition {
    /// Computes the product, `f32`, in the shape of the weight.
    pub(super) fn compute(&self, shape: &[i64]) -> Tensor {
        let flat = |stored: &Stored| stored.entry.copy(&stored.map, Kind::Float, Device::Cpu).flatten(1, -1);
        (flat(&self.up).matmul(&flat(&self.down)) * self.scale).reshape(shape)
    }
}
