//! What can be checked before a model is loaded: files, shapes and options.

use std::path::{Path, PathBuf};

use peapod_collective::nccl;
use peapod_model::{
    controlnet::ControlNet,
    hub,
    lora::Lora,
    sample::{MAX_SIDE, SampleOptions},
    source::ModelSource,
    vae::Decoding,
};
use tch::{Device, Kind};

use super::inputs::Inputs;
use super::memory;
use super::metadata::AdapterMetadata;
use super::student::{SHIPPED_STUDENT, Student, adapter_file, is_average};
use crate::numbers::VaeNumbers;

/// Share of the memory that is free now which decoding may take.
const MEMORY_SHARE: f64 = 0.5;

/// Why nothing can be drawn with these files and options, found without loading a model.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    /// A file or folder is not there.
    #[error("{what} is missing: no {} ({hint})", path.display())]
    Missing {
        /// What it is.
        what: &'static str,
        /// Where it should be.
        path: PathBuf,
        /// What to do.
        hint: &'static str,
    },
    /// The model, the student encoder or the adapter cannot be used.
    #[error(transparent)]
    Model(#[from] peapod_model::Error),
    /// The adapter was made for another model or another encoder.
    #[error("{} does not fit: its {what} has {got}, {wanted_by} asks for {expected}", adapter.display())]
    Adapter {
        /// The adapter's file.
        adapter: PathBuf,
        /// Which of its widths.
        what: &'static str,
        /// The adapter's.
        got: String,
        /// The model's or the encoder's.
        expected: String,
        /// What asks for it.
        wanted_by: String,
    },
    /// The ControlNet was made for another model.
    #[error("{} does not fit: it takes {got}, the UNet of {} takes {expected}", control.display(), model.display())]
    Control {
        /// The ControlNet's folder.
        control: PathBuf,
        /// Widths of its text.
        got: String,
        /// The model.
        model: PathBuf,
        /// Widths of the UNet's.
        expected: String,
    },
    /// Nothing says which encoder the adapter was trained for.
    #[error("{} does not say its text encoder: give --student", .0.display())]
    Encoder(PathBuf),
    /// Nothing says how long the adapter's prompts are.
    #[error("{} does not say its context length: give --context-length (52 for the published Chinese adapters)", .0.display())]
    ContextLength(PathBuf),
    /// The size of the pictures is impossible.
    #[error("{width}x{height} pixels cannot be drawn: width and height must be multiples of {multiple} between {least} and {MAX_SIDE}")]
    Size {
        /// Width in pixels.
        width: i64,
        /// Height in pixels.
        height: i64,
        /// What both must be divisible by: how much the VAE reduces.
        multiple: i64,
        /// The smallest side that leaves something on each level of the UNet.
        least: i64,
    },
    /// Guidance is no number that can be used.
    #[error("guidance {0} must be a number from 0 to 100")]
    Guidance(f64),
    /// Something is a share and lies outside 0 to 1.
    #[error("{what} {value} must be a number from 0 to 1")]
    Share {
        /// What it is.
        what: &'static str,
        /// What was given.
        value: f64,
    },
    /// The model's UNet inpaints, and nothing says what.
    #[error("the UNet of {} is one for inpainting: give --init-image and --mask", .0.display())]
    NothingToInpaint(PathBuf),
}

/// Files named by the user.
#[derive(Clone, Debug, Default)]
pub struct Files {
    /// The model: a folder as diffusers lays it out, a checkpoint that is one file, or a name on the hub.
    pub model: PathBuf,
    /// For a checkpoint that is one file: a folder whose configurations are taken instead of the published ones.
    pub model_config: Option<PathBuf>,
    /// The adapters, if pictures are to be drawn with any.
    pub adapters: Vec<PathBuf>,
    /// The student encoder's folder, or its name on the hub; by default `text_encoder_zh` of the model, else what the adapter's metadata
    /// names.
    pub student: Option<PathBuf>,
    /// Tokens of a student prompt; by default what the adapter's metadata says.
    pub context_length: Option<i64>,
    /// Whether the model's own English encoders are needed.
    pub english: bool,
    /// LoRA files and how strongly each acts.
    pub loras: Vec<(PathBuf, f64)>,
    /// A ControlNet's folder, or its name on the hub.
    pub control: Option<PathBuf>,
    /// The kinds networks compute in.
    pub precision: Precision,
}

impl Files {
    /// All that is named by a path, or by a name on the hub.
    pub fn names(&self) -> impl Iterator<Item = &Path> {
        let several = self.adapters.iter().chain(self.loras.iter().map(|(path, _)| path));
        let single = [&self.model_config, &self.student, &self.control].into_iter().flatten();
        std::iter::once(&self.model).chain(several).chain(single).map(PathBuf::as_path)
    }

    /// The encoders that only the adapters' metadata name, with the adapters.
    pub fn encoders_named_by_adapters(&self) -> Vec<(&Path, PathBuf)> {
        let shipped = || hub::locate(&self.model).is_ok_and(|model| model.join(SHIPPED_STUDENT).exists());
        if self.student.is_some() || self.adapters.is_empty() || shipped() {
            return Vec::new();
        }
        // What is wrong with an adapter is said when it is opened.
        let named = |adapter: &PathBuf| AdapterMetadata::read(&adapter_file(adapter).ok()?).ok()?.encoder;
        self.adapters.iter().filter_map(|adapter| Some((adapter.as_path(), named(adapter)?))).collect()
    }
}

/// The kinds networks compute in, where the device and the model are not to decide.
#[derive(Clone, Copy, Debug, Default)]
pub struct Precision {
    /// Of UNet, ControlNet and text encoders; by default bf16 on a GPU, f32 on a CPU.
    pub networks: Option<Kind>,
    /// Of the autoencoder; by default that of the others, or f32 where its configuration says that it overflows in halves. By default
    /// libtorch lets GPUs compute the convolutions of f32 in TF32.
    pub vae: Option<VaeNumbers>,
}

/// Files that were found to fit together.
#[derive(Debug)]
pub struct Setup {
    pub(super) model: ModelSource,
    pub(super) english: bool,
    pub(super) students: Vec<Student>,
    pub(super) control: Option<PathBuf>,
    precision: Precision,
    /// What picture sides must be divisible by.
    multiple: i64,
    /// The smallest side.
    least: i64,
    /// The side the model was trained to draw, in pixels.
    native_side: i64,
}

impl Setup {
    /// Reads configurations, names and shapes of all weights, and the adapters, and compares them; no model is loaded.
    ///
    /// Errors: [`SetupError`], which names both sides of what does not fit.
    pub fn check(files: &Files) -> Result<Self, SetupError> {
        let open = || ModelSource::open(&files.model, files.model_config.as_deref());
        let shapes = open()?.shapes_only();
        let unet = shapes.unet(Kind::Float, Device::Cpu)?;
        let vae_factor = shapes.vae(Kind::Float, Device::Cpu)?.downscale();
        if files.english {
            shapes.english(Kind::Float, Device::Cpu)?;
        }
        let loras: Vec<Lora> = files.loras.iter().map(|(path, scale)| Lora::open(path, *scale)).collect::<Result<_, _>>()?;
        let student = |adapter: &PathBuf| Student::check(files, &adapter_file(adapter)?, &shapes, &unet);
        let students = files.adapters.iter().map(student).collect::<Result<_, _>>()?;
        if let Some(control) = &files.control {
            let network = ControlNet::check(control)?;
            let widths = |text: i64, pooled: Option<i64>| match pooled {
                Some(pooled) => format!("text of width {text} and pooled text of width {pooled}"),
                None => format!("text of width {text} and no pooled text"),
            };
            let (got, expected) = (widths(network.text_width(), network.pooled_width()), widths(unet.text_width(), unet.pooled_width()));
            if got != expected {
                return Err(SetupError::Control { control: control.clone(), got, model: files.model.clone(), expected });
            }
        }
        Ok(Self {
            model: open()?.with_loras(&loras)?,
            english: files.english,
            students,
            control: files.control.clone(),
            precision: files.precision,
            multiple: vae_factor,
            least: vae_factor * halvings(unet.config().block_out_channels.len()),
            native_side: vae_factor * shapes.sample_size(),
        })
    }

    /// Job and step that an adapter comes from, if it says so.
    pub fn adapter_origin(&self, index: usize) -> Option<&str> {
        self.students.get(index)?.origin.as_deref()
    }

    /// Those of the adapters' files that are the moving average of a job's weights.
    pub fn averages(&self) -> impl Iterator<Item = &Path> {
        self.students.iter().map(|student| student.adapter.as_path()).filter(|file| is_average(file))
    }

    /// The width and height of a picture nobody gave a size for.
    pub fn native_side(&self) -> i64 {
        self.native_side
    }

    /// The model.
    pub fn model(&self) -> &ModelSource {
        &self.model
    }

    /// Whether the UNet is one for inpainting.
    pub fn inpaints(&self) -> bool {
        self.model.unet_config().in_channels != self.model.vae_config().latent_channels
    }

    /// The kinds that UNet and autoencoder compute in on a device. What is asked of the autoencoder holds from here on.
    pub(super) fn settle_kinds(&self, device: Device) -> (Kind, Kind) {
        let networks = self.precision.networks.unwrap_or(if device.is_cuda() { Kind::BFloat16 } else { Kind::Float });
        let vae = if self.model.vae_config().force_upcast { Kind::Float } else { networks };
        if let Some(numbers) = self.precision.vae {
            numbers.settle();
        }
        (networks, self.precision.vae.map_or(vae, VaeNumbers::kind))
    }

    /// Checks what is asked of the model.
    ///
    /// Errors: [`SetupError::Size`], [`SetupError::Guidance`], [`SetupError::Share`], [`SetupError::NothingToInpaint`], or
    /// [`SetupError::Model`] for a scheduler or a number of steps that cannot be.
    pub fn check_options(&self, options: &SampleOptions, inputs: &Inputs) -> Result<(), SetupError> {
        let &SampleOptions { width, height, guidance, guidance_rescale, .. } = options;
        let (multiple, least) = (self.multiple, self.least);
        if [width, height].iter().any(|side| !(least..=MAX_SIDE).contains(side) || side % multiple != 0) {
            return Err(SetupError::Size { width, height, multiple, least });
        }
        if !(0.0..=100.0).contains(&guidance) {
            return Err(SetupError::Guidance(guidance));
        }
        for (what, value) in [("guidance rescale", guidance_rescale), ("strength", inputs.strength)] {
            if !(0.0..=1.0).contains(&value) {
                return Err(SetupError::Share { what, value });
            }
        }
        if self.inpaints() && inputs.mask.is_none() {
            return Err(SetupError::NothingToInpaint(self.model.path().into()));
        }
        self.model.scheduler().plan(options.solver, options.num_steps)?;
        Ok(())
    }

    /// How to decode pictures of this size so that the memory of a device which is free now suffices.
    pub fn decoding(&self, options: &SampleOptions, device: Device) -> Decoding {
        let channels = &self.model.vae_config().block_out_channels;
        let (outer, inner) = (channels.first().copied().unwrap_or(1), channels.get(1).or(channels.first()).copied().unwrap_or(1));
        // The last level holds its input and its output, before and after their norms, all at the full size.
        let bytes_each = (2 * (outer + inner)) as f64 * 4.0 * options.width as f64 * options.height as f64;
        let free = match device {
            Device::Cuda(ordinal) => nccl::memory(ordinal).ok().map(|(free, _)| free),
            _ => memory::available_bytes(),
        };
        let free = free.map_or(f64::INFINITY, |bytes| bytes as f64 * MEMORY_SHARE);
        match options.batch_size {
            batch if bytes_each * batch as f64 <= free => Decoding::Whole,
            _ if bytes_each <= free => Decoding::OneByOne,
            _ => Decoding::BY_TILES,
        }
    }
}

/// How much `num_levels` levels reduce a side: by two between each of them.
fn halvings(num_levels: usize) -> i64 {
    1 << num_levels.saturating_sub(1).min(30)
}

pub(super) fn present(what: &'static str, path: &Path, hint: &'static str) -> Result<(), SetupError> {
    if path.exists() { Ok(()) } else { Err(SetupError::Missing { what, path: path.into(), hint }) }
}
