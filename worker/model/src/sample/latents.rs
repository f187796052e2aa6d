//! The noise pictures are made from.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use rand_distr::{Distribution, StandardNormal};
use tch::{Device, Tensor};

use crate::Result;

/// Standard normal noise for a batch of pictures.
///
/// Every picture has a stream of its own on the host: neither the batch it is drawn in nor the device changes it.
#[derive(Debug)]
pub struct Noise {
    streams: Vec<ChaCha8Rng>,
    shape: [i64; 3],
    device: Device,
}

impl Noise {
    /// The streams of the pictures numbered `first_image` and following. Shapes: `shape` is that of one picture's latents, `[channels, h,
    /// w]`.
    pub fn new(seed: u64, first_image: u64, num_images: usize, shape: [i64; 3], device: Device) -> Self {
        let stream = |image: u64| {
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            rng.set_stream(first_image.wrapping_add(image));
            rng
        };
        Self { streams: (0..num_images as u64).map(stream).collect(), shape, device }
    }

    /// Draws the next tensor. Shapes: `f32` `[num_images, channels, h, w]`.
    pub fn draw(&mut self) -> Result<Tensor> {
        let num_elements = usize::try_from(self.shape.iter().product::<i64>()).unwrap_or(0);
        let mut elements: Vec<f32> = Vec::with_capacity(self.streams.len() * num_elements);
        for rng in &mut self.streams {
            elements.extend((0..num_elements).map(|_| -> f32 { StandardNormal.sample(rng) }));
        }
        let [channels, height, width] = self.shape;
        Ok(Tensor::f_from_slice(&elements)?.f_view([self.streams.len() as i64, channels, height, width])?.f_to_device(self.device)?)
    }
}

/// Draws the noise that the pictures numbered `first_image` and following begin with: the first of [`Noise`].
///
/// Shapes: `shape` is `[channels, h, w]`; returns `f32` `[num_images, channels, h, w]`.
pub fn initial_latents(seed: u64, first_image: u64, num_images: usize, shape: [i64; 3], device: Device) -> Result<Tensor> {
    Noise::new(seed, first_image, num_images, shape, device).draw()
}

#[cfg(test)]
mod tests {
    use tch::Kind;

    use super::*;

    #[test]
    fn an_image_does_not_depend_on_its_batch() {
        let noise = |first, num| Noise::new(7, first, num, [4, 8, 8], Device::Cpu);
        let (mut batch, mut alone) = (noise(0, 3), noise(2, 1));
        for _ in 0..2 {
            assert!(batch.draw().unwrap().get(2).equal(&alone.draw().unwrap().get(0)));
        }
        let first = noise(0, 3).draw().unwrap();
        assert!(first.equal(&initial_latents(7, 0, 3, [4, 8, 8], Device::Cpu).unwrap()));
        assert!(!first.get(0).equal(&first.get(1)));
        assert!(!first.equal(&batch.draw().unwrap()), "each draw is another");
        assert!(!first.equal(&initial_latents(8, 0, 3, [4, 8, 8], Device::Cpu).unwrap()));
    }

    #[test]
    fn latents_are_standard_normal() {
        let latents = initial_latents(0, 0, 4, [4, 32, 32], Device::Cpu).unwrap();
        assert!(latents.mean(Kind::Float).double_value(&[]).abs() < 0.03);
        assert!((latents.std(true).double_value(&[]) - 1.0).abs() < 0.03);
    }
}
