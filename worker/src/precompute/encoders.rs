//! The frozen encoders of a job without its UNet, and what they make of samples.

use peapod_data::cached::{Array, CachedSample, Dtype, EnglishStates, Recipe, StudentStates};
use peapod_data::caption::Caption;
use peapod_model::distill::encode_pixels;
use peapod_model::source::ModelSource;
use peapod_model::text::{Conditioning, EnglishEncoders, StudentEncoder};
use peapod_model::vae::Vae;
use peapod_model::{Error, Result};
use peapod_proto::job::Job;
use tch::{Device, Kind, Tensor, no_grad_guard};

use super::recipe;
use crate::setup;

/// A decoded sample.
pub struct Picture {
    /// RGB, `[height, width, 3]` of the bucket.
    pub pixels: Vec<u8>,
    /// Width and height.
    pub bucket: (u32, u32),
    /// Width and height of the picture as found.
    pub original_size: (u32, u32),
    /// Where the crop's corner lies in the scaled picture, `(y, x)`.
    pub crop: (u32, u32),
    /// What it trains with.
    pub caption: Caption,
}

/// What computes cached samples.
pub struct Encoders {
    vae: Vae,
    round_fp16: bool,
    text: Option<Text>,
    /// What numbers are stored in; `None`: what they are computed in, so that nothing is lost.
    numbers: Option<Kind>,
    device: Device,
}

struct Text {
    /// `None` for a job without a teacher.
    english: Option<EnglishEncoders>,
    /// `None` where training drops elements on the way: those states are others each time.
    student: Option<StudentEncoder>,
    /// Whether native samples have a teacher too.
    is_all_taught: bool,
    kind: Kind,
}

impl Encoders {
    /// Loads the autoencoder, and `with_text` the text encoders, as training would.
    ///
    /// # Errors
    /// The model crate's, naming file and key.
    pub fn load(job: &Job, device: Device, with_text: bool, numbers: Option<Kind>) -> Result<Self> {
        let model = ModelSource::open(&job.model.path, job.model.config.as_deref())?;
        let vae_numbers = setup::vae_numbers(job, device);
        vae_numbers.settle();
        let vae_kind = vae_numbers.kind();
        let round_fp16 = job.model.vae_round_fp16;
        let vae = if round_fp16 { model.vae_rounded(vae_kind, device)? } else { model.vae(vae_kind, device)? };
        let load_text = || {
            let kind = setup::network_kind(job, device);
            let options = setup::student_options(job, kind, device);
            let student = || StudentEncoder::load(&job.student.path, job.student.context_length.into(), options);
            Ok::<_, Error>(Text {
                english: job.loss.distill.then(|| model.english(kind, device)).transpose()?,
                student: (!options.dropout).then(student).transpose()?,
                is_all_taught: !job.loss.hybrid,
                kind,
            })
        };
        Ok(Self { vae, round_fp16, text: with_text.then(load_text).transpose()?, numbers, device })
    }

    /// Pixels to a latent, along one side.
    pub fn downscale(&self) -> u32 {
        self.vae.downscale() as u32
    }

    /// What its samples are made with.
    ///
    /// # Errors
    /// The model crate's.
    pub fn recipe(&self, job: &Job) -> Result<Recipe> {
        let _guard = no_grad_guard();
        let mut recipe = recipe::of_latents(job, &self.vae, self.device)?;
        if let Some(Text { english, student, kind, .. }) = &self.text {
            if let Some(english) = english {
                recipe::add_english(&mut recipe, job, *kind, &english.encode(&[""])?.sequence);
            }
            if let Some(student) = student {
                recipe::add_student(&mut recipe, job, *kind, &student.encode(&[""])?);
            }
        }
        Ok(recipe)
    }

    /// Encodes pictures of one bucket, at least one, at once.
    ///
    /// # Errors
    /// The model crate's. Where libtorch has no `Result`, a panic.
    pub fn encode(&self, pictures: &[&Picture]) -> Result<Vec<CachedSample>> {
        let _guard = no_grad_guard();
        let (width, height) = pictures.first().map_or((0, 0), |picture| picture.bucket);
        // Whole pictures, which lie with their channels last, as in training: number by number it would take ten times as long.
        let bytes = pictures.iter().map(|picture| picture.pixels.as_slice()).collect::<Vec<_>>().concat();
        let shape = [pictures.len() as i64, height.into(), width.into(), 3];
        let pixels = Tensor::from_slice(&bytes).view(shape).to_device(self.device).permute([0, 3, 1, 2]);
        let moments = encode_pixels(&self.vae, &pixels, self.round_fp16)?;
        let kind = self.numbers.unwrap_or(self.vae.kind());
        let (means, log_variances) = (rows(&moments.mean, kind)?, rows(&moments.log_variance, kind)?);
        let mut samples = Vec::with_capacity(pictures.len());
        for ((picture, mean), log_variance) in pictures.iter().zip(means).zip(log_variances) {
            let Picture { original_size, crop, .. } = **picture;
            samples.push(CachedSample { original_size, crop, mean, log_variance, english: None, student: None });
        }
        if let Some(text) = &self.text {
            text.add(pictures, &mut samples, self.numbers.unwrap_or(text.kind))?;
        }
        Ok(samples)
    }
}

impl Text {
    /// Adds the states of the pictures' captions to their samples.
    fn add(&self, pictures: &[&Picture], samples: &mut [CachedSample], kind: Kind) -> Result<()> {
        if let Some(encoders) = &self.english {
            let is_taught = |picture: &Picture| self.is_all_taught || !picture.caption.native;
            let taught: Vec<usize> = (0..pictures.len()).filter(|&at| is_taught(pictures[at])).collect();
            let captions: Vec<&str> = taught.iter().map(|&at| pictures[at].caption.english.as_str()).collect();
            if !captions.is_empty() {
                let Conditioning { sequence, pooled, .. } = encoders.encode(&captions)?;
                let mut pooled = pooled.map(|pooled| rows(&pooled, kind)).transpose()?.map(Vec::into_iter);
                for (&at, sequence) in taught.iter().zip(rows(&sequence, kind)?) {
                    samples[at].english = Some(EnglishStates { sequence, pooled: pooled.as_mut().and_then(Iterator::next) });
                }
            }
        }
        if let Some(encoder) = &self.student {
            let prompts: Vec<&str> = pictures.iter().map(|picture| picture.caption.prompt.as_str()).collect();
            let sequences = rows(&encoder.encode(&prompts)?, kind)?;
            let masks = rows(&encoder.token_mask(&prompts)?, Kind::Uint8)?;
            for (sample, (sequence, mask)) in samples.iter_mut().zip(sequences.into_iter().zip(masks)) {
                sample.student = Some(StudentStates { sequence, mask });
            }
        }
        Ok(())
    }
}

/// The rows of a tensor, stored in a kind.
fn rows(tensor: &Tensor, kind: Kind) -> Result<Vec<Array>> {
    let dtype = match kind {
        Kind::Half => Dtype::F16,
        Kind::BFloat16 => Dtype::BF16,
        Kind::Uint8 => Dtype::U8,
        _ => Dtype::F32,
    };
    let size = tensor.size();
    let shape: Vec<usize> = size[1..].iter().map(|&length| length as usize).collect();
    let numel = shape.iter().product::<usize>();
    let tensor = tensor.f_to_kind(kind)?.f_to_device(Device::Cpu)?;
    let row = |at: i64| {
        let row = tensor.f_select(0, at)?.f_contiguous()?;
        let mut bytes = vec![0; numel * kind.elt_size_in_bytes()];
        row.f_copy_data_u8(&mut bytes, numel)?;
        Ok(Array { dtype, shape: shape.clone(), bytes })
    };
    (0..size[0]).map(row).collect()
}
