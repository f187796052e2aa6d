//! Switches of libtorch's that hold for the whole process.

unsafe extern "C" {
    fn peapod_allow_tf32(convolutions: bool, products: bool);
}

/// Whether convolutions and products of f32 on GPUs may round what they multiply to ten bits of mantissa (TF32).
///
/// libtorch allows it in convolutions if nobody says otherwise.
pub fn allow_tf32(convolutions: bool, products: bool) {
    // SAFETY: sets two flags.
    unsafe { peapod_allow_tf32(convolutions, products) }
}
