//! Tensors that threads share.

use std::ops::Deref;

use tch::Tensor;

/// A tensor that nothing changes any more: a weight, or what is computed from weights once.
///
/// [`Tensor`] may be sent to another thread but not shared, as it can be changed through any of its names. This one can be read from
/// several threads at once, and so can the models that are made of it.
#[derive(Debug)]
pub(crate) struct Frozen(Tensor);

// SAFETY: libtorch lets a tensor be read from several threads at once, and counts its references atomically. Methods that change a tensor
// take `&mut`, which this type does not give, and no part of this crate changes a model through a second name of its weights.
unsafe impl Sync for Frozen {}

impl Frozen {
    /// Freezes a tensor whose values nothing else changes. It must not require a gradient.
    pub(crate) fn new(tensor: Tensor) -> Self {
        debug_assert!(!tensor.requires_grad(), "what is learnt is not frozen");
        Self(tensor)
    }
}

impl Deref for Frozen {
    type Target = Tensor;

    fn deref(&self) -> &Tensor {
        &self.0
    }
}
