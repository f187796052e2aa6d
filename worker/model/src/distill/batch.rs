//! What one micro-batch of training is made of.

use tch::{Device, Kind, Tensor};

use super::TimeIdsOrder;
use crate::text::Conditioning;
use crate::transfer::send;
use crate::vae::Moments;
use crate::{Error, Result};

/// What the samples show.
#[derive(Debug)]
pub enum Images {
    /// RGB pixels, u8 `[B, 3, H, W]`.
    Pixels(Tensor),
    /// What the autoencoder has said of them before, not yet multiplied by its scaling factor, `[B, 4, h, w]` of any kind.
    Moments(Moments),
}

/// What the teacher is told of each sample. That of native samples is not read in hybrid training.
#[derive(Debug)]
pub enum English {
    /// English captions.
    Captions(Vec<String>),
    /// What the encoders have said of them before, of any kind.
    States(Conditioning),
}

/// What the student is told of each sample.
#[derive(Debug)]
pub enum Prompts {
    /// Captions in its language.
    Captions(Vec<String>),
    /// What its encoder has said of them before, without dropout.
    States {
        /// Token states `[B, L, Din]` of any kind.
        sequence: Tensor,
        /// Tokens that are no padding, bool `[B, L]`.
        mask: Tensor,
    },
}

/// One single-bucket micro-batch: encoded samples and all the randomness that their step needs, drawn by whoever made the batch.
///
/// B samples of H x W pixels, h x w latents. Tensors may lie on the host; they are copied where the models are.
#[derive(Debug)]
pub struct MicroBatch {
    /// The pictures.
    pub images: Images,
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
    /// Texts in the student's language.
    pub prompts: Prompts,
    /// The teacher's texts.
    pub english: English,
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
        self.original_size.len()
    }

    /// Whether there are no samples.
    pub fn is_empty(&self) -> bool {
        self.original_size.is_empty()
    }

    /// Every `step`-th sample from `first` on as a batch of their own.
    ///
    /// Panics: if there is none.
    fn every(&self, first: usize, step: usize) -> Self {
        let rows = |tensor: &Tensor| tensor.slice(0, first as i64, None, step as i64);
        Self {
            images: match &self.images {
                Images::Pixels(pixels) => Images::Pixels(rows(pixels)),
                Images::Moments(Moments { mean, log_variance }) => {
                    Images::Moments(Moments { mean: rows(mean), log_variance: rows(log_variance) })
                }
            },
            posterior: rows(&self.posterior),
            noise: rows(&self.noise),
            offset: rows(&self.offset),
            timesteps: rows(&self.timesteps),
            drop: rows(&self.drop),
            native: rows(&self.native),
            prompts: match &self.prompts {
                Prompts::Captions(captions) => Prompts::Captions(every(captions, first, step)),
                Prompts::States { sequence, mask } => Prompts::States { sequence: rows(sequence), mask: rows(mask) },
            },
            english: match &self.english {
                English::Captions(captions) => English::Captions(every(captions, first, step)),
                English::States(Conditioning { sequence, pooled, mask }) => English::States(Conditioning {
                    sequence: rows(sequence),
                    pooled: pooled.as_ref().map(rows),
                    mask: mask.as_ref().map(rows),
                }),
            },
            original_size: every(&self.original_size, first, step),
            crop: every(&self.crop, first, step),
            text_dropout: every(&self.text_dropout, first, step),
        }
    }

    /// Puts what is large of it where the models are, behind the work that a GPU has already. Flags stay on the host, where they are looked
    /// at.
    ///
    /// Errors: [`Error::Torch`].
    pub fn send_ahead(&mut self, device: Device) -> Result<()> {
        let here = |tensor: &mut Tensor| send(tensor, device).map(|sent| *tensor = sent);
        match &mut self.images {
            Images::Pixels(pixels) => here(pixels)?,
            Images::Moments(Moments { mean, log_variance }) => [mean, log_variance].into_iter().try_for_each(here)?,
        }
        [&mut self.posterior, &mut self.noise, &mut self.offset].into_iter().try_for_each(here)
    }

    /// All its tensors, wherever they lie.
    pub fn tensors(&self) -> Vec<&Tensor> {
        let Self { images, posterior, noise, offset, timesteps, drop, native, prompts, english, .. } = self;
        let mut tensors = vec![posterior, noise, offset, timesteps, drop, native];
        match images {
            Images::Pixels(pixels) => tensors.push(pixels),
            Images::Moments(Moments { mean, log_variance }) => tensors.extend([mean, log_variance]),
        }
        if let Prompts::States { sequence, mask } = prompts {
            tensors.extend([sequence, mask]);
        }
        if let English::States(Conditioning { sequence, pooled, mask }) = english {
            tensors.extend([Some(sequence), pooled.as_ref(), mask.as_ref()].into_iter().flatten());
        }
        tensors
    }

    /// One of the samples as a batch of its own.
    ///
    /// Panics: if there is no such sample.
    pub fn single(&self, index: usize) -> Self {
        self.every(index, self.len())
    }

    /// The samples dealt out to `num` batches, or fewer if there are fewer samples: as equal in size as can be, and in what they cost,
    /// where native samples, which need no teacher, lie together.
    #[must_use]
    pub fn split(&self, num: usize) -> Vec<Self> {
        let num = num.clamp(1, self.len().max(1));
        (0..num).map(|part| self.every(part, num)).collect()
    }

    /// Checks kinds and shapes against each other and the models, and reads the flags.
    ///
    /// `num_timesteps` bounds the times: an index beyond a table is a crash of the device, not an error, once it is there.
    pub(super) fn check(&self, latent_channels: i64, downscale: i64, num_timesteps: i64) -> Result<Flags> {
        let fault = |detail: String| Err(Error::Shape { what: "MicroBatch", detail });
        let count = self.len() as i64;
        let latents = match &self.images {
            Images::Pixels(pixels) => match pixels.size().as_slice() {
                &[samples, 3, height, width] if samples == count && height % downscale == 0 && width % downscale == 0 => {
                    vec![count, latent_channels, height / downscale, width / downscale]
                }
                size => return fault(format!("pixels {size:?}, wanted [{count}, 3, H, W] with H and W multiples of {downscale}")),
            },
            Images::Moments(Moments { mean, log_variance }) => match mean.size().as_slice() {
                &[samples, channels, _, _] if samples == count && channels == latent_channels && log_variance.size() == mean.size() => {
                    mean.size()
                }
                size => return fault(format!("moments {size:?}, wanted twice [{count}, {latent_channels}, h, w]")),
            },
        };
        if let Images::Pixels(pixels) = &self.images
            && pixels.kind() != Kind::Uint8
        {
            return fault(format!("pixels are {:?}, wanted Uint8", pixels.kind()));
        }
        for (name, tensor, kind, shape) in [
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
        let rows = |tensor: &Tensor| tensor.size().first().map_or(0, |&rows| rows as usize);
        let prompts = match &self.prompts {
            Prompts::Captions(captions) => captions.len(),
            Prompts::States { sequence, mask } if mask.kind() == Kind::Bool && mask.size() == sequence.size()[..2.min(sequence.dim())] => {
                rows(sequence)
            }
            Prompts::States { sequence, mask } => {
                return fault(format!("states {:?} with a mask {:?} {:?}", sequence.size(), mask.kind(), mask.size()));
            }
        };
        let english = match &self.english {
            English::Captions(captions) => captions.len(),
            English::States(states) => rows(&states.sequence),
        };
        for (name, len) in
            [("prompts", prompts), ("english", english), ("crop", self.crop.len()), ("text_dropout", self.text_dropout.len())]
        {
            if len != self.len() {
                return fault(format!("{len} entries of {name} for {count} samples"));
            }
        }
        if let Some(time) = Vec::<i64>::try_from(&self.timesteps)?.into_iter().find(|time| !(0..num_timesteps).contains(time)) {
            return fault(format!("timestep {time} is not in 0..{num_timesteps}"));
        }
        let any_dropped = Vec::<bool>::try_from(&self.drop)?.contains(&true);
        Ok(Flags { native: Vec::<bool>::try_from(&self.native)?, any_dropped })
    }

    /// Checks text states that were made before against those of the empty prompt, token states and pooled, batch 1: what does not fit
    /// would be a crash in the networks.
    pub(super) fn check_states(&self, student: &Tensor, teacher: Option<(&Tensor, Option<&Tensor>)>) -> Result<()> {
        let check = |what: &str, tensor: &Tensor, empty: &Tensor| {
            let wanted = [&[self.len() as i64], &empty.size()[1..]].concat();
            match tensor.size() == wanted {
                true => Ok(()),
                false => Err(Error::Shape { what: "MicroBatch", detail: format!("{what} {:?}, wanted {wanted:?}", tensor.size()) }),
            }
        };
        if let Prompts::States { sequence, .. } = &self.prompts {
            check("states of the student", sequence, student)?;
        }
        if let (English::States(states), Some((sequence, pooled))) = (&self.english, teacher) {
            check("states of the teacher", &states.sequence, sequence)?;
            match (&states.pooled, pooled) {
                (Some(pooled), Some(empty)) => check("pooled text of the teacher", pooled, empty)?,
                (None, None) => {}
                (pooled, _) => {
                    let detail = format!("{} pooled text of the teacher", if pooled.is_some() { "unwanted" } else { "no" });
                    return Err(Error::Shape { what: "MicroBatch", detail });
                }
            }
        }
        Ok(())
    }

    /// SDXL's time ids, f32 `[B, 6]`: original size, top and left of the crop, target size.
    pub(super) fn time_ids(&self, order: TimeIdsOrder, downscale: i64, device: Device) -> Result<Tensor> {
        let size = self.noise.size();
        let ordered = |width: i64, height: i64| match order {
            TimeIdsOrder::Hw => [height, width],
            TimeIdsOrder::Wh => [width, height],
        };
        let target = ordered(size[3] * downscale, size[2] * downscale);
        let ids: Vec<i64> = (self.original_size.iter().zip(&self.crop))
            .flat_map(|(&(width, height), &(top, left))| [ordered(width, height), [top, left], target].concat())
            .collect();
        send(&Tensor::from_slice(&ids).reshape([-1, 6]).to_kind(Kind::Float), device)
    }
}

fn every<T: Clone>(values: &[T], first: usize, step: usize) -> Vec<T> {
    values[first..].iter().step_by(step).cloned().collect()
}
