//! All randomness of one sample, as a function of the job's seed and the sample's name.
//!
//! It does not depend on who trains the sample, when or in which batch: a resumed or rearranged job draws the same numbers. The generator
//! is ChaCha8, counter-based; each quantity has a stream of its own, so that a change of one leaves the others as they are.

use peapod_proto::ids::SampleName;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};

/// The random numbers that a training step needs for one sample.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Draws {
    /// Diffusion timestep in `0..num_timesteps`.
    pub timestep: u32,
    /// Whether the prompt is replaced by the empty one.
    pub drop_condition: bool,
    /// Standard normal, for the sample from the VAE's posterior: `[latent_channels, height / vae_scale, width / vae_scale]`.
    pub posterior: Vec<f32>,
    /// Standard normal, the noise itself: shape as `posterior`.
    pub noise: Vec<f32>,
    /// Standard normal, the noise's constant part: `[latent_channels]`.
    pub offset: Vec<f32>,
    /// Seeds the dropout of the student's encoder, where a job leaves that on.
    pub text_dropout: u64,
}

/// What [`Draws`] are drawn for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct DrawShape {
    /// Channels of a latent.
    pub latent_channels: usize,
    /// Values of a latent in one channel.
    pub latent_area: usize,
    /// Length of the diffusion.
    pub num_timesteps: u32,
    /// Probability of an empty prompt.
    pub condition_dropout: f64,
}

/// The streams of a sample's generator. Their numbers are part of what a seed means: never renumber.
#[derive(Clone, Copy)]
enum Stream {
    Crop = 0,
    Timestep = 1,
    Condition = 2,
    Posterior = 3,
    Noise = 4,
    Offset = 5,
    TextDropout = 6,
}

/// The generator of one sample.
#[derive(Debug, Clone)]
pub struct SampleRng {
    key: [u8; 32],
}

impl SampleRng {
    /// The generator of sample `name` in a job with this seed.
    #[must_use]
    pub fn new(seed: u64, name: SampleName) -> Self {
        Self { key: key(seed, name, *b"peapod draws") }
    }

    /// Where to crop: `(y, x)`, uniform in `0..=slack` on each axis.
    ///
    /// `slack`: by how many pixels the scaled picture exceeds the crop, `(y, x)`.
    #[must_use]
    pub fn crop(&self, slack: (u64, u64)) -> (u64, u64) {
        let mut rng = self.stream(Stream::Crop);
        (below(&mut rng, slack.0 + 1), below(&mut rng, slack.1 + 1))
    }

    /// Everything else.
    #[must_use]
    pub fn draws(&self, shape: &DrawShape) -> Draws {
        let normal = |stream: Stream, len: usize| StandardNormal.sample_iter(self.stream(stream)).take(len).collect();
        let latent_len = shape.latent_channels * shape.latent_area;
        Draws {
            timestep: below(&mut self.stream(Stream::Timestep), shape.num_timesteps.into()) as u32,
            drop_condition: unit(&mut self.stream(Stream::Condition)) < shape.condition_dropout,
            posterior: normal(Stream::Posterior, latent_len),
            noise: normal(Stream::Noise, latent_len),
            offset: normal(Stream::Offset, shape.latent_channels),
            text_dropout: self.stream(Stream::TextDropout).next_u64(),
        }
    }

    fn stream(&self, stream: Stream) -> ChaCha8Rng {
        let mut rng = ChaCha8Rng::from_seed(self.key);
        rng.set_stream(stream as u64);
        rng
    }
}

/// A ChaCha key: the seed, a sample's name, and 12 bytes that keep apart what the generator is for.
pub(crate) fn key(seed: u64, name: SampleName, purpose: [u8; 12]) -> [u8; 32] {
    let mut key = [0; 32];
    key[..8].copy_from_slice(&seed.to_le_bytes());
    key[8..20].copy_from_slice(&name_bytes(name));
    key[20..].copy_from_slice(&purpose);
    key
}

/// A sample's name in 12 bytes.
pub(crate) fn name_bytes(name: SampleName) -> [u8; 12] {
    let mut bytes = [0; 12];
    for (target, number) in bytes.chunks_exact_mut(4).zip([name.epoch.0, name.shard.0, name.index]) {
        target.copy_from_slice(&number.to_le_bytes());
    }
    bytes
}

/// A number in `0..end`, uniform but for a bias below `end / 2^64`. 0 if `end` is.
///
/// Written out because a seed must mean the same with every version of the library.
pub(crate) fn below(rng: &mut impl Rng, end: u64) -> u64 {
    ((u128::from(rng.next_u64()) * u128::from(end)) >> 64) as u64
}

/// A number in `[0, 1)`.
fn unit(rng: &mut impl Rng) -> f64 {
    (rng.next_u64() >> 11) as f64 / (1_u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use peapod_proto::ids::{Epoch, ShardId};

    use super::*;

    fn name(index: u32) -> SampleName {
        SampleName { epoch: Epoch(2), shard: ShardId(3), index }
    }

    const SHAPE: DrawShape = DrawShape { latent_channels: 4, latent_area: 64, num_timesteps: 1000, condition_dropout: 0.1 };

    #[test]
    fn a_sample_draws_the_same_whoever_trains_it() {
        let draws = SampleRng::new(7, name(5)).draws(&SHAPE);
        assert_eq!(draws, SampleRng::new(7, name(5)).draws(&SHAPE));
        assert_ne!(draws.noise, SampleRng::new(8, name(5)).draws(&SHAPE).noise);
        assert_ne!(draws.noise, SampleRng::new(7, name(6)).draws(&SHAPE).noise);
        assert_ne!(draws.noise, draws.posterior);
        assert_eq!((draws.posterior.len(), draws.noise.len(), draws.offset.len()), (256, 256, 4));
    }

    /// Written down when first run: what a seed means must not change between versions.
    #[test]
    fn a_seed_means_the_same_in_every_version() {
        let rng = SampleRng::new(7, name(5));
        let draws = rng.draws(&SHAPE);
        assert_eq!((draws.timestep, draws.drop_condition, rng.crop((1000, 1000))), GOLDEN_INTEGERS);
        assert_eq!([draws.posterior[0], draws.noise[0], draws.noise[255], draws.offset[3]], GOLDEN_NORMALS);
    }

    const GOLDEN_INTEGERS: (u32, bool, (u64, u64)) = (128, false, (411, 294));
    const GOLDEN_NORMALS: [f32; 4] = [0.368_488_73, 1.161_265_6, 0.071_463_324, -2.396_629_6];

    #[test]
    fn crop_bounds_are_inclusive() {
        let crops: Vec<_> = (0..200).map(|index| SampleRng::new(1, name(index)).crop((2, 0))).collect();
        for y in 0..=2 {
            assert!(crops.contains(&(y, 0)), "y = {y} is never drawn");
        }
        assert!(crops.iter().all(|&(y, x)| y <= 2 && x == 0));
    }

    #[test]
    fn draws_have_the_distributions_they_should() {
        let all: Vec<Draws> = (0..2000).map(|index| SampleRng::new(11, name(index)).draws(&SHAPE)).collect();
        let mean = |values: &mut dyn Iterator<Item = f64>| {
            let (sum, count) = values.fold((0.0, 0), |(sum, count), value| (sum + value, count + 1));
            sum / f64::from(count)
        };
        // Tolerances: five standard errors.
        let noise = mean(&mut all.iter().flat_map(|draws| &draws.noise).map(|&value| f64::from(value)));
        let power = mean(&mut all.iter().flat_map(|draws| &draws.noise).map(|&value| f64::from(value).powi(2)));
        let timestep = mean(&mut all.iter().map(|draws| f64::from(draws.timestep)));
        let dropped = mean(&mut all.iter().map(|draws| f64::from(u8::from(draws.drop_condition))));
        assert!(noise.abs() < 0.007 && (power - 1.0).abs() < 0.01, "mean {noise}, power {power}");
        assert!((timestep - 499.5).abs() < 33.0 && all.iter().all(|draws| draws.timestep < 1000), "timestep {timestep}");
        assert!((dropped - 0.1).abs() < 0.034, "dropped {dropped}");
    }

    #[test]
    fn dropout_of_zero_and_one_is_never_and_always() {
        let drops = |condition_dropout| {
            (0..50).filter(|&index| SampleRng::new(1, name(index)).draws(&DrawShape { condition_dropout, ..SHAPE }).drop_condition).count()
        };
        assert_eq!((drops(0.0), drops(1.0)), (0, 50));
    }
}
