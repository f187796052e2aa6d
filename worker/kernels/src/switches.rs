//! Switches of libtorch's that hold for the whole process.

use std::ffi::c_char;

use tch::{Device, Kind, Tensor};

use crate::error::Result;
use crate::graph::{MAX_PROBLEM, check};

unsafe extern "C" {
    fn peapod_allow_tf32(convolutions: bool, products: bool, problem: *mut c_char) -> bool;
    fn peapod_prefer_attention(backend: i64, problem: *mut c_char) -> bool;
    #[cfg(test)]
    fn peapod_preferred_attention() -> i64;
}

/// Implementations of attention on GPUs. By itself libtorch tries cuDNN's first on data centre GPUs from Hopper on, and FlashAttention
/// first on others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Attention {
    /// FlashAttention.
    Flash,
    /// That of cuDNN.
    Cudnn,
    /// The one that xFormers brought.
    Efficient,
}

impl Attention {
    /// As at::SDPBackend numbers them.
    fn number(self) -> i64 {
        match self {
            Self::Flash => 1,
            Self::Efficient => 2,
            Self::Cudnn => 3,
        }
    }
}

/// Says which implementation of attention libtorch tries first on a device. Where it does not take what it is given, the others follow.
///
/// # Errors
/// [`crate::Error::Gpu`] with libtorch's message, and what was tried first before still is.
pub fn prefer_attention(attention: Attention, device: Device) -> Result<()> {
    if device.is_cuda() {
        // The first time that libtorch chooses on a GPU it sets an order for this GPU, over any that was set before. A choice reads shapes
        // alone.
        let states = Tensor::f_empty([1, 1, 8, 64], (Kind::BFloat16, device))?;
        Tensor::f_internal_fused_sdp_choice(&states, &states, &states, None::<&Tensor>, 0.0, false, None::<f64>, false)?;
    }
    let mut problem = [0; MAX_PROBLEM];
    // SAFETY: sets an order, or writes a message.
    let is_done = unsafe { peapod_prefer_attention(attention.number(), problem.as_mut_ptr()) };
    check(is_done, "set the order of attentions", &problem)
}

/// Whether convolutions and products of f32 on GPUs may round what they multiply to ten bits of mantissa (TF32).
///
/// libtorch allows it in convolutions if nobody says otherwise.
pub fn allow_tf32(convolutions: bool, products: bool) {
    let mut problem = [0; MAX_PROBLEM];
    // SAFETY: sets two flags, or writes a message.
    let is_done = unsafe { peapod_allow_tf32(convolutions, products, problem.as_mut_ptr()) };
    if let Err(error) = check(is_done, "say whether TF32 may be used", &problem) {
        tracing::warn!("{error}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// On the CPU the order means nothing, but each must be an order to libtorch. Where there is a GPU, libtorch sets its own at its first
    /// choice, which must not undo ours.
    #[test]
    fn switches_are_known_to_libtorch_and_stay() {
        allow_tf32(true, true);
        allow_tf32(false, false);
        let device = Device::cuda_if_available();
        for attention in [Attention::Efficient, Attention::Cudnn, Attention::Flash] {
            prefer_attention(attention, device).unwrap();
            let states = Tensor::ones([1, 2, 8, 64], (Kind::BFloat16, device));
            let made = Tensor::scaled_dot_product_attention(&states, &states, &states, None::<&Tensor>, 0.0, false, None::<f64>, false);
            assert!((made - &states).abs().max().double_value(&[]) < 1e-2);
            // SAFETY: it takes nothing, and reads a number.
            assert_eq!(unsafe { peapod_preferred_attention() }, attention.number());
        }
    }
}
