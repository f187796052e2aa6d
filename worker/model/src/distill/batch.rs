//! What one micro-batch of training is made of.

use tch::{Device, Kind, Tensor};

use super::TimeIdsOrder;
use crate::{Error, Result};

/// One single-bucket micro-batch: encoded samples and all the randomness that their step needs, drawn by whoever made the batch.
///
/// B samples of H x W pixels, h x w latents. Tensors may lie on the host; they are copied where the models are.
#[derive(Debug)]
pub struct MicroBatch {
    /// RGB pixels, u8 `[B, 3, H, W]`.
    pub pixels: Tensor,
    /// Standard normal numbers that draw the latents from the encoder's distribution, f32 `[B, 4, h, w]`.
    pub posterior: Tensor,
    /// Standard normal noise, f32 `[B, 4, h, w]`.
    pub noise: Tensor,
    /// Standard normal offset of each channel's noise, f32 `[B, 4]`.
    pub offset: Tensor,
    /// Diffusion times, i64 `[B]`.
    pub timesteps: Tensor,
    /// Samples whose text is dropped, bool `[B]`.
    pub drop: Tensor,
    /// Samples with a native caption and no trusted English one (z = 1), bool `[B]`.
    pub native: Tensor,
    /// Captions in the student's language.
    pub captions: Vec<String>,
    /// English captions for the teacher; those of native samples are not read in hybrid training.
    pub english: Vec<String>,
    /// Width and height of each image before it was resized.
    pub original_size: Vec<(i64, i64)>,
    /// Top and left of each crop, in resized pixels.
    pub crop: Vec<(i64, i64)>,
    /// Seeds of the dropout in the student's encoder; read only where that is on.
    pub text_dropout: Vec<u64>,
}

/// The parts of a batch that decide what is computed, as host values.
pub(super) struct Flags {
    pub native: Vec<bool>,
    pub any_dropped: bool,
}

impl MicroBatch {
    /// Number of samples.
    pub fn len(&self) -> usize {
        self.captions.len()
    }

    /// Whether there are no samples.
    pub fn is_empty(&self) -> bool {
        self.captions.is_empty()
    }

    /// The samples `from..to` as a batch of their own.
    ///
    /// Panics: if there are no such samples.
    fn range(&self, from: usize, to: usize) -> Self {
        let rows = |tensor: &Tensor| tensor.narrow(0, from as i64, (to - from) as i64);
        Self {
            pixels: rows(&self.pixels),
            posterior: rows(&self.posterior),
            noise: rows(&self.noise),
            offset: rows(&self.offset),
            timesteps: rows(&self.timesteps),
            drop: rows(&self.drop),
            native: rows(&self.native),
            captions: self.captions[from..to].to_vec(),
            english: self.english[from..to].to_vec(),
            original_size: self.original_size[from..to].to_vec(),
            crop: self.crop[from..to].to_vec(),
            text_dropout: self.text_dropout[from..to].to_vec(),
        }
    }

    /// One of the samples as a batch of its own.
    ///
    /// Panics: if there is no such sample.
    pub fn single(&self, index: usize) -> Self {
        self.range(index, index + 1)
    }

    /// The samples in `num` batches, or fewer if there are fewer samples, as equal in size as can be, in order.
    pub(super) fn split(&self, num: usize) -> Vec<Self> {
        let num = num.clamp(1, self.len().max(1));
        let bound = |part: usize| part * self.len() / num;
        (0..num).map(|part| self.range(bound(part), bound(part + 1))).collect()
    }

    /// Checks kinds and shapes against each other and the models, and reads the flags.
    ///
    /// `num_timesteps` bounds the times: an index beyond a table is a crash of the device, not an error, once it is there.
    pub(super) fn check(&self, latent_channels: i64, downscale: i64, num_timesteps: i64) -> Result<Flags> {
        let fault = |detail: String| Err(Error::Shape { what: "MicroBatch", detail });
        let count = self.len() as i64;
        let (height, width) = match self.pixels.size().as_slice() {
            &[samples, 3, height, width] if samples == count && height % downscale == 0 && width % downscale == 0 => (height, width),
            size => return fault(format!("pixels {size:?}, wanted [{count}, 3, H, W] with H and W multiples of {downscale}")),
        };
        let latents = vec![count, latent_channels, height / downscale, width / downscale];
        for (name, tensor, kind, shape) in [
            ("pixels", &self.pixels, Kind::Uint8, vec![count, 3, height, width]),
            ("posterior", &self.posterior, Kind::Float, latents.clone()),
            ("noise", &self.noise, Kind::Float, latents),
            ("offset", &self.offset, Kind::Float, vec![count, latent_channels]),
            ("timesteps", &self.timesteps, Kind::Int64, vec![count]),
            ("drop", &self.drop, Kind::Bool, vec![count]),
            ("native", &self.native, Kind::Bool, vec![count]),
        ] {
            if tensor.kind() != kind || tensor.size() != shape {
                return fault(format!("{name} is {:?} {:?}, wanted {kind:?} {shape:?}", tensor.kind(), tensor.size()));
            }
        }
        for (name, len) in [
            ("english", self.english.len()),
            ("original_size", self.original_size.len()),
            ("crop", self.crop.len()),
            ("text_dropout", self.text_dropout.len()),
        ] {
            if len != self.len() {
                return fault(format!("{len} entries of {name} for {count} captions"));
            }
        }
        if let Some(time) = Vec::<i64>::try_from(&self.timesteps)?.into_iter().find(|time| !(0..num_timesteps).contains(time)) {
            return fault(format!("timestep {time} is not in 0..{num_timesteps}"));
        }
        let any_dropped = Vec::<bool>::try_from(&self.drop)?.contains(&true);
        Ok(Flags { native: Vec::<bool>::try_from(&self.native)?, any_dropped })
    }

    /// SDXL's time ids, f32 `[B, 6]`: original size, top and left of the crop, target size.
    pub(super) fn time_ids(&self, order: TimeIdsOrder, device: Device) -> Tensor {
        let size = self.pixels.size();
        let ordered = |width: i64, height: i64| match order {
            TimeIdsOrder::Hw => [height, width],
            TimeIdsOrder::Wh => [width, height],
        };
        let target = ordered(size[3], size[2]);
        let ids: Vec<i64> = (self.original_size.iter().zip(&self.crop))
            .flat_map(|(&(width, height), &(top, left))| [ordered(width, height), [top, left], target].concat())
            .collect();
        Tensor::from_slice(&ids).reshape([-1, 6]).to_kind(Kind::Float).to_device(device)
    }
}
