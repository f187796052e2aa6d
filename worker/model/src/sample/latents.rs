//! The noise pictures start from.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use rand_distr::{Distribution, StandardNormal};
use tch::{Device, Tensor};

use crate::Result;

/// Draws standard normal latents for the images numbered `first_image` and following.
///
/// Every image has a stream of its own on the host: neither the batch it is drawn in nor the device changes it.
/// Shapes: `shape` is `[channels, h, w]`; returns `f32` `[num_images, channels, h, w]`.
pub fn initial_latents(seed: u64, first_image: u64, num_images: usize, shape: [i64; 3], device: Device) -> Result<Tensor> {
    let num_elements = usize::try_from(shape.iter().product::<i64>()).unwrap_or(0);
    let mut elements: Vec<f32> = Vec::with_capacity(num_images * num_elements);
    for image in 0..num_images as u64 {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(first_image.wrapping_add(image));
        elements.extend((0..num_elements).map(|_| -> f32 { StandardNormal.sample(&mut rng) }));
    }
    let [channels, height, width] = shape;
    Ok(Tensor::f_from_slice(&elements)?.f_view([num_images as i64, channels, height, width])?.f_to_device(device)?)
}

#[cfg(test)]
mod tests {
    use tch::Kind;

    use super::*;

    #[test]
    fn an_image_does_not_depend_on_its_batch() {
        let draw = |seed, first, num| initial_latents(seed, first, num, [4, 8, 8], Device::Cpu).unwrap();
        let batch = draw(7, 0, 3);
        for image in 0..3 {
            assert!(batch.get(image).equal(&draw(7, image as u64, 1).get(0)));
        }
        assert!(!batch.get(0).equal(&batch.get(1)));
        assert!(!batch.equal(&draw(8, 0, 3)));
    }

    #[test]
    fn latents_are_standard_normal() {
        let latents = initial_latents(0, 0, 4, [4, 32, 32], Device::Cpu).unwrap();
        assert!(latents.mean(Kind::Float).double_value(&[]).abs() < 0.03);
        assert!((latents.std(true).double_value(&[]) - 1.0).abs() < 0.03);
    }
}
