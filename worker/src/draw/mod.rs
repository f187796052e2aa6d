//! Drawing with a model and an adapter: everything is checked first ([`Setup`]), then loaded once ([`Painter`]).

pub mod canny;
mod inputs;
mod latents;
pub mod memory;
mod metadata;
mod setup;
mod student;

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    rc::Rc,
};

use peapod_model::{
    adapter::Adapter,
    controlnet::ControlNet,
    panics,
    sample::{Control, Inpaint, Pipeline, PipelineOptions, Progress, Prompter, SampleOptions, StartImage, Task},
    text::{EnglishEncoders, Overlooked, StudentEncoder, StudentOptions},
};
use tch::{Device, Tensor};

pub use self::inputs::{InputError, InputFiles, Inputs};
pub use self::latents::{read_latents, write_latents};
pub use self::metadata::AdapterMetadata;
pub use self::setup::{Files, Precision, Setup, SetupError};
pub(crate) use self::student::adapter_file;
use crate::picture::{Picture, PictureError};

/// Why drawing failed.
#[derive(Debug, thiserror::Error)]
pub enum DrawError {
    /// A model could not be loaded or run.
    #[error(transparent)]
    Model(#[from] peapod_model::Error),
    /// libtorch gave up: out of memory, for example.
    #[error("libtorch failed: {0}")]
    Panic(String),
    /// A road was asked for that the setup did not include.
    #[error("the {0:?} road was not set up")]
    Road(Road),
    /// The model gave something that is no picture.
    #[error(transparent)]
    Picture(#[from] PictureError),
}

/// How a prompt reaches the UNet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Road {
    /// Through the model's own encoders: the teacher.
    English,
    /// Through the student encoder and the adapter of this number.
    Adapter(usize),
}

/// Loaded models, ready to draw.
pub struct Painter {
    pipeline: Pipeline,
    english: Option<EnglishEncoders>,
    students: Vec<LoadedStudent>,
    control: Option<ControlNet>,
    device: Device,
}

struct LoadedStudent {
    /// Adapters of the same encoder share it.
    encoder: Rc<StudentEncoder>,
    adapter: Adapter,
    mask_pads: bool,
}

/// Pictures, and the latents they were made from.
pub struct Drawing {
    /// One a prompt.
    pub pictures: Vec<Picture>,
    /// The noise they began with, `[B, C, h, w]`.
    pub initial: Tensor,
    /// The clean latents they were decoded from, `[B, C, h, w]`.
    pub latents: Tensor,
}

impl Painter {
    /// Loads the models on a device that is open; see [`Precision`] for the kinds.
    ///
    /// Errors: [`DrawError::Model`].
    pub fn load(setup: &Setup, device: Device) -> Result<Self, DrawError> {
        catching(|| {
            let (kind, vae_kind) = setup.settle_kinds(device);
            let pipeline = Pipeline::load(&setup.model, PipelineOptions { device, unet_kind: kind, vae_kind })?;
            let english = setup.english.then(|| setup.model.english(kind, device)).transpose()?;
            let mut students: Vec<LoadedStudent> = Vec::new();
            for (index, student) in setup.students.iter().enumerate() {
                let shared = setup.students[..index].iter().position(|other| other.shares_encoder(student));
                let encoder = match shared.and_then(|other| students.get(other)) {
                    Some(other) => Rc::clone(&other.encoder),
                    None => {
                        let options = StudentOptions { kind, device, ..student.options };
                        Rc::new(StudentEncoder::load(&student.encoder, student.context_length, options)?)
                    }
                };
                students.push(LoadedStudent { encoder, adapter: Adapter::load(&student.adapter, device)?, mask_pads: student.mask_pads });
            }
            let control = setup.control.as_ref().map(|control| ControlNet::open(control, kind, device)).transpose()?;
            Ok(Self { pipeline, english, students, control, device })
        })
    }

    /// Prepares what pictures start from, and are steered by. `noise` is that of [`read_latents`].
    ///
    /// Errors: [`DrawError::Model`].
    pub fn task(&self, inputs: &Inputs, options: &SampleOptions, noise: Option<Tensor>) -> Result<Task<'_>, DrawError> {
        catching(|| {
            let vae = self.pipeline.sampler().vae;
            let pixels = inputs.image_pixels(options, self.device);
            let image = pixels.as_ref().map(|pixels| StartImage::encode(vae, pixels, inputs.strength)).transpose()?;
            let mask = inputs.mask_pixels(options, self.device);
            let inpaint = pixels.as_ref().zip(mask.as_ref()).map(|(pixels, mask)| Inpaint::encode(vae, pixels, mask)).transpose()?;
            let control = self.control.as_ref().zip(inputs.control_pixels(options, self.device));
            let control = control.map(|(network, image)| Control { network, image, scale: inputs.control_scale });
            Ok(Task { noise, image, inpaint, control })
        })
    }

    /// Says what of a prompt is not seen on a road, and how many tokens are.
    ///
    /// Errors: [`DrawError::Road`] if the setup did not include `road`; [`DrawError::Model`] if a tokenizer fails.
    pub fn overlooked(&self, road: Road, prompt: &str) -> Result<(Overlooked, i64), DrawError> {
        match road {
            Road::English => self.english.as_ref().map(|encoders| Ok((encoders.overlooked(prompt)?, encoders.context_length()))),
            Road::Adapter(index) => self.students.get(index).map(|student| {
                let encoder = &student.encoder;
                Ok((encoder.overlooked(prompt)?, encoder.context_length()))
            }),
        }
        .unwrap_or(Err(DrawError::Road(road)))
    }

    /// Draws one picture a prompt. The same seed and picture number begin with the same noise on every road. Where decoding runs out of
    /// memory it is done once more tile by tile.
    ///
    /// Errors: [`DrawError::Road`] if the setup did not include `road`; [`DrawError::Model`] and [`DrawError::Panic`] from the model.
    pub fn draw(
        &self,
        road: Road,
        prompts: &[&str],
        options: &SampleOptions,
        task: &Task<'_>,
        on_step: &mut dyn FnMut(Progress),
    ) -> Result<Drawing, DrawError> {
        let prompter = match road {
            Road::English => self.english.as_ref().map(Prompter::English),
            Road::Adapter(index) => self.students.get(index).map(|LoadedStudent { encoder, adapter, mask_pads }| Prompter::Student {
                encoder,
                adapter,
                mask_pads: *mask_pads,
            }),
        };
        let prompter = prompter.ok_or(DrawError::Road(road))?;
        let sampler = self.pipeline.sampler();
        let drawn = catching(|| Ok(sampler.draw_task(prompter, prompts, options, task, on_step)?))?;
        let mut bytes = vec![0u8; drawn.pictures.numel()];
        drawn.pictures.f_copy_data_u8(&mut bytes, drawn.pictures.numel()).map_err(peapod_model::Error::from)?;
        let (width, height) = (u32::try_from(options.width).unwrap_or(0), u32::try_from(options.height).unwrap_or(0));
        let size = width as usize * height as usize * 3;
        let pictures = bytes.chunks(size.max(1)).map(|rgb| Picture::new(width, height, rgb.to_vec())).collect::<Result<_, _>>()?;
        Ok(Drawing { pictures, initial: drawn.initial, latents: drawn.latents })
    }
}

/// Runs `work`, turning a panic of libtorch's wrapper into an error.
fn catching<T>(work: impl FnOnce() -> Result<T, DrawError>) -> Result<T, DrawError> {
    // Unwind safety: what `work` touched is dropped or only read afterwards.
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
        // Its first line, since libtorch appends its own backtrace.
        let first_line = panics::message(panic.as_ref()).lines().next().unwrap_or_default();
        Err(DrawError::Panic(first_line.to_owned()))
    })
}

#[cfg(test)]
mod tests;
