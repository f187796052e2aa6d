//! Switches of libtorch's that hold for the whole process.

unsafe extern "C" {
    fn peapod_allow_tf32(convolutions: bool, products: bool);
    fn peapod_prefer_attention(backend: i64);
}

/// Implementations of attention on GPUs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Attention {
    /// FlashAttention, which libtorch tries first by itself.
    Flash,
    /// That of cuDNN.
    Cudnn,
    /// The one that xFormers brought.
    Efficient,
}

/// Says which implementation of attention libtorch tries first. Where it does not take what it is given, the others follow.
pub fn prefer_attention(attention: Attention) {
    // at::SDPBackend.
    let backend = match attention {
        Attention::Flash => 1,
        Attention::Efficient => 2,
        Attention::Cudnn => 3,
    };
    // SAFETY: sets an order.
    unsafe { peapod_prefer_attention(backend) }
}

/// Whether convolutions and products of f32 on GPUs may round what they multiply to ten bits of mantissa (TF32).
///
/// libtorch allows it in convolutions if nobody says otherwise.
pub fn allow_tf32(convolutions: bool, products: bool) {
    // SAFETY: sets two flags.
    unsafe { peapod_allow_tf32(convolutions, products) }
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind, Tensor};

    use super::*;

    /// On the CPU the order means nothing; every one of them must be an order to libtorch, which panics at others.
    #[test]
    fn switches_are_known_to_libtorch() {
        allow_tf32(true, true);
        allow_tf32(false, false);
        for attention in [Attention::Efficient, Attention::Cudnn, Attention::Flash] {
            prefer_attention(attention);
            let states = Tensor::ones([1, 2, 3, 8], (Kind::Float, Device::Cpu));
            let made = Tensor::scaled_dot_product_attention(&states, &states, &states, None::<&Tensor>, 0.0, false, None::<f64>, false);
            assert!((made - &states).abs().max().double_value(&[]) < 1e-6);
        }
    }
}
