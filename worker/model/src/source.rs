//! Where a model comes from: a folder in the layout of diffusers, a checkpoint that is one file, or a name on the hub. Its parts come out
//! ready to be built, whichever it is.

mod published;

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::{Map, Value};
use tch::{Device, Kind};

use self::published::Published;
use crate::config::read_config;
use crate::hub::locate;
use crate::lora::{self, Lora};
use crate::sample::SchedulerConfig;
use crate::text::{ClipTextEncoder, EnglishEncoders, Sd15TextEncoder, SdxlTextEncoders, TextTokenizer, sketch_tokenizer};
use crate::unet::{UNet, UNetConfig};
use crate::vae::{Vae, VaeConfig};
use crate::weights::{Additions, Scope, SingleFile, Survey, Weights};
use crate::{Error, Result};

/// The networks of a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Part {
    /// The denoising network.
    Unet,
    /// The autoencoder.
    Vae,
    /// CLIP-L.
    TextEncoder,
    /// OpenCLIP's bigG; only SDXL has it.
    TextEncoder2,
}

impl Part {
    /// The name of its folder.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Unet => "unet",
            Self::Vae => "vae",
            Self::TextEncoder => "text_encoder",
            Self::TextEncoder2 => "text_encoder_2",
        }
    }
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The families of models.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Architecture {
    /// Two text encoders; the UNet is also told the pooled text and the picture's sizes.
    Sdxl,
    /// One text encoder.
    Sd15,
}

impl Architecture {
    /// The networks that a model of this family has.
    #[must_use]
    pub fn parts(self) -> &'static [Part] {
        match self {
            Self::Sdxl => &[Part::Unet, Part::Vae, Part::TextEncoder, Part::TextEncoder2],
            Self::Sd15 => &[Part::Unet, Part::Vae, Part::TextEncoder],
        }
    }
}

impl fmt::Display for Architecture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Sdxl => "SDXL",
            Self::Sd15 => "SD1.5",
        })
    }
}

/// An opened model: its configurations are read and checked, its networks are not built yet.
///
/// Files stay mapped while it lives; see [`Weights`].
pub struct ModelSource {
    path: PathBuf,
    origin: Origin,
    unet: UNetConfig,
    vae: VaeConfig,
    scheduler: SchedulerConfig,
    sample_size: i64,
    shapes_only: bool,
    /// What LoRA files add to each part.
    additions: BTreeMap<Part, Arc<Additions>>,
}

enum Origin {
    Folder,
    File(Box<CheckpointFile>),
    /// None: configurations whose weights are drawn.
    Random(Published),
}

/// A checkpoint that is one file, and what it does not say itself.
struct CheckpointFile {
    models: SingleFile,
    published: Published,
    /// A folder whose configurations and tokenizers take the place of the published ones.
    config: Option<PathBuf>,
}

/// Where a folder keeps the noise schedule.
const SCHEDULER_FILE: &str = "scheduler/scheduler_config.json";
/// Where it keeps the tokenizers of the first and of the second text encoder.
const TOKENIZERS: [&str; 2] = ["tokenizer", "tokenizer_2"];
/// The file of a network's settings in its folder.
const CONFIG_FILE: &str = "config.json";
/// The latent size of a UNet whose configuration does not say it: SDXL's.
const SAMPLE_SIZE: i64 = 128;

impl ModelSource {
    /// Opens a folder in the layout of diffusers, a checkpoint of SDXL or SD1.5 that is one file (`.safetensors`, `.ckpt`), or a name
    /// `ORG/NAME[@REVISION]` of the hub that is in the local cache (see [`locate`]).
    ///
    /// A file does not say how its networks are configured: they are taken to be the published ones, as far as names and shapes in the
    /// file do not show otherwise (channels of the input, transformer layers, pruned blocks, a prediction of the velocity). `config` is
    /// a folder whose `unet/config.json`, `scheduler/scheduler_config.json`, `tokenizer/` and so on are taken instead, each as it is.
    ///
    /// Errors: [`Error::Io`], [`Error::Invalid`] and [`Error::Unsupported`] for files that cannot be read or used, or for a `config`
    /// beside a folder.
    pub fn open(path: &Path, config: Option<&Path>) -> Result<Self> {
        let path = locate(path)?;
        let origin = if path.is_dir() {
            if let Some(config) = config {
                let what = format!("a folder of configurations ({}) for a model that is a folder", config.display());
                return Err(Error::Unsupported {
                    what,
                    hint: format!("it is for a checkpoint that is one file; {} has its own", path.display()),
                });
            }
            Origin::Folder
        } else {
            let config = config.map(config_folder).transpose()?;
            let models = Weights::open_single_file(&path)?;
            let published = Published::of(&models)?;
            Origin::File(Box::new(CheckpointFile { models, published, config }))
        };
        Self::of(path, origin)
    }

    /// A published model of which there is no file: its networks in their full sizes, with weights drawn on the device as they are built.
    /// What they compute means nothing, what it costs is the same.
    ///
    /// Errors: none but for a damaged program.
    pub fn random(architecture: Architecture) -> Result<Self> {
        Self::of(format!("published {architecture}").into(), Origin::Random(Published::whole(architecture)?))
    }

    fn of(path: PathBuf, origin: Origin) -> Result<Self> {
        let read = |part: Part| settings(&path, &origin, part);
        let (unet_path, unet) = read(Part::Unet)?;
        let (vae_path, vae) = read(Part::Vae)?;
        let (scheduler_path, scheduler) = scheduler_settings(&path, &origin)?;
        let sample_size =
            unet.get("sample_size").and_then(Value::as_i64).filter(|size| (1..=1 << 20).contains(size)).unwrap_or(SAMPLE_SIZE);
        Ok(Self {
            unet: UNetConfig::parse(&unet_path, unet.into())?,
            vae: VaeConfig::parse(&vae_path, vae.into())?,
            scheduler: SchedulerConfig::parse(&scheduler_path, scheduler.into())?,
            path,
            origin,
            sample_size,
            shapes_only: false,
            additions: BTreeMap::new(),
        })
    }

    /// Makes all networks built from here zeros without memory, compared with their files in name, shape and kind; see
    /// [`Weights::shapes_only`].
    #[must_use]
    pub fn shapes_only(self) -> Self {
        Self { shapes_only: true, ..self }
    }

    /// Merges LoRA files into all networks built from here.
    ///
    /// Errors: [`Error::Lora`] with all keys that fit nothing in this model, and those of opening its weights.
    pub fn with_loras(mut self, loras: &[Lora]) -> Result<Self> {
        let additions = lora::additions(loras, |part| {
            let is_there = self.architecture().parts().contains(&part);
            if is_there { self.weights(part).map(Some) } else { Ok(None) }
        })?;
        self.additions = additions.into_iter().map(|(part, additions)| (part, Arc::new(additions))).collect();
        Ok(self)
    }

    /// The file or folder that was found.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The family it belongs to.
    pub fn architecture(&self) -> Architecture {
        if self.unet.addition_embed_type.is_some() { Architecture::Sdxl } else { Architecture::Sd15 }
    }

    /// The UNet's configuration.
    pub fn unet_config(&self) -> &UNetConfig {
        &self.unet
    }

    /// The autoencoder's configuration.
    pub fn vae_config(&self) -> &VaeConfig {
        &self.vae
    }

    /// The noise schedule, and how the model asks to be sampled.
    pub fn scheduler(&self) -> &SchedulerConfig {
        &self.scheduler
    }

    /// Side of the latents that the model was trained on.
    pub fn sample_size(&self) -> i64 {
        self.sample_size
    }

    /// Builds the UNet. Errors: those of [`UNet::load`].
    pub fn unet(&self, kind: Kind, device: Device) -> Result<UNet> {
        let weights = self.weights(Part::Unet)?;
        self.unet_of(&weights, &weights.root(kind, device))
    }

    /// Builds the UNet with the attention and feed-forward layers of its transformers in eight bits (but for what they make of the text).
    ///
    /// Errors: those of [`UNet::load`]; [`Error::Fp8`] if the device has no products of such numbers.
    pub fn unet_with_fp8_linears(&self, kind: Kind, device: Device) -> Result<UNet> {
        if device != Device::Cpu {
            peapod_kernels::prove_fp8(device, kind, peapod_kernels::of(device, kind).as_ref()).map_err(Error::Fp8)?;
        }
        let weights = self.weights(Part::Unet)?;
        self.unet_of(&weights, &weights.root(kind, device).with_fp8_linears())
    }

    /// Builds the autoencoder; SDXL's overflows in f16. Errors: those of [`Vae::load`].
    pub fn vae(&self, kind: Kind, device: Device) -> Result<Vae> {
        self.vae_of(&self.weights(Part::Vae)?, kind, device)
    }

    /// Builds the first text encoder. Errors: those of [`ClipTextEncoder::load`].
    pub fn text_encoder(&self, kind: Kind, device: Device) -> Result<ClipTextEncoder> {
        self.text_encoder_of(Part::TextEncoder, &self.weights(Part::TextEncoder)?, kind, device)
    }

    /// Builds the second text encoder. Errors: those of [`ClipTextEncoder::load`]; [`Error::Invalid`] if there is none.
    pub fn text_encoder_2(&self, kind: Kind, device: Device) -> Result<ClipTextEncoder> {
        self.text_encoder_of(Part::TextEncoder2, &self.weights(Part::TextEncoder2)?, kind, device)
    }

    /// Makes the first text encoder's tokenizer, for texts of at most `length` tokens. Errors: those of [`TextTokenizer::clip`].
    pub fn tokenizer(&self, length: usize) -> Result<TextTokenizer> {
        self.tokenizer_of(TOKENIZERS[0], published::PAD_ID, length)
    }

    /// Makes the second text encoder's tokenizer, as [`ModelSource::tokenizer`] does.
    pub fn tokenizer_2(&self, length: usize) -> Result<TextTokenizer> {
        self.tokenizer_of(TOKENIZERS[1], published::PAD_ID_2, length)
    }

    /// Builds the autoencoder with every weight rounded to f16 first: the published trainer of the method halves all models as it starts.
    pub fn vae_rounded(&self, kind: Kind, device: Device) -> Result<Vae> {
        let weights = self.weights(Part::Vae)?;
        let vae = Vae::new(&weights.root(kind, device).rounded(Kind::Half), self.vae.clone())?;
        weights.finish(&[])?;
        Ok(vae)
    }

    /// Builds the English text encoders with their tokenizers.
    ///
    /// Errors: those of loading the parts.
    pub fn english(&self, kind: Kind, device: Device) -> Result<EnglishEncoders> {
        let longest = |encoder: &ClipTextEncoder| usize::try_from(encoder.max_length()).unwrap_or(0);
        let first = self.text_encoder(kind, device)?;
        let tokenizer = self.tokenizer(longest(&first))?;
        Ok(match self.architecture() {
            Architecture::Sd15 => EnglishEncoders::Sd15(Box::new(Sd15TextEncoder::new(tokenizer, first))),
            Architecture::Sdxl => {
                let second = self.text_encoder_2(kind, device)?;
                let tokenizer_2 = self.tokenizer_2(longest(&second))?;
                EnglishEncoders::Sdxl(Box::new(SdxlTextEncoders::new(&self.path, (tokenizer, first), (tokenizer_2, second))?))
            }
        })
    }

    /// Compares a network with its file, reading names and shapes only, and counts.
    ///
    /// Errors: those of building it.
    pub fn survey(&self, part: Part) -> Result<Survey> {
        let weights = self.weights(part)?.shapes_only();
        let (kind, device) = (Kind::Float, Device::Cpu);
        match part {
            Part::Unet => drop(self.unet_of(&weights, &weights.root(kind, device))?),
            Part::Vae => drop(self.vae_of(&weights, kind, device)?),
            Part::TextEncoder | Part::TextEncoder2 => drop(self.text_encoder_of(part, &weights, kind, device)?),
        }
        Ok(weights.survey())
    }

    /// Hands over what tells the model from others, always in the same order: the settings of its parts, samples of their weights (see
    /// [`Weights::sketch`]), and its tokenizers. It does not depend on where the model lies.
    ///
    /// Errors: [`Error::Io`] and [`Error::Invalid`], naming the file that cannot be read.
    pub fn sketch(&self, take: &mut dyn FnMut(&[u8])) -> Result<()> {
        for (part, settings) in self.settings()? {
            take(format!("{part} {settings}").as_bytes());
        }
        for &part in self.architecture().parts() {
            take(part.name().as_bytes());
            self.weights(part)?.sketch(take);
        }
        for folder in TOKENIZERS.iter().filter_map(|name| self.tokenizer_folder(name)) {
            sketch_tokenizer(&folder, take)?;
        }
        Ok(())
    }

    /// The settings of every part that the model has, by name.
    fn settings(&self) -> Result<Map<String, Value>> {
        let parts = self.architecture().parts().iter();
        let parts = parts.map(|&part| Ok((part.name().to_owned(), Value::from(settings(&self.path, &self.origin, part)?.1))));
        let scheduler = scheduler_settings(&self.path, &self.origin).map(|(_, settings)| ("scheduler".to_owned(), settings.into()));
        parts.chain([scheduler]).collect()
    }

    fn unet_of(&self, weights: &Weights, scope: &Scope) -> Result<UNet> {
        let unet = UNet::new(scope, self.unet.clone())?;
        weights.finish(&[])?;
        Ok(unet)
    }

    fn vae_of(&self, weights: &Weights, kind: Kind, device: Device) -> Result<Vae> {
        let vae = Vae::new(&weights.root(kind, device), self.vae.clone())?;
        weights.finish(&[])?;
        Ok(vae)
    }

    fn text_encoder_of(&self, part: Part, weights: &Weights, kind: Kind, device: Device) -> Result<ClipTextEncoder> {
        let (path, settings) = settings(&self.path, &self.origin, part)?;
        ClipTextEncoder::of(&path, settings, weights, kind, device)
    }

    /// The folder of a tokenizer; `None` where the published one is taken.
    fn tokenizer_folder(&self, name: &str) -> Option<PathBuf> {
        match &self.origin {
            Origin::Folder => Some(self.path.join(name)),
            Origin::File(file) => file.config.as_ref().map(|config| config.join(name)).filter(|folder| folder.is_dir()),
            Origin::Random(_) => None,
        }
    }

    fn tokenizer_of(&self, name: &str, pad_id: i64, length: usize) -> Result<TextTokenizer> {
        match self.tokenizer_folder(name) {
            Some(folder) => TextTokenizer::clip(&folder, length),
            None => TextTokenizer::clip_published(pad_id, length),
        }
    }

    fn weights(&self, part: Part) -> Result<Weights> {
        let weights = match &self.origin {
            Origin::Folder => Weights::open(&self.path.join(part.name()))?,
            Origin::File(file) => {
                let SingleFile { unet, vae, text_encoder, text_encoder_2, marks: _ } = &file.models;
                let weights = match part {
                    Part::Unet => Some(unet),
                    Part::Vae => Some(vae),
                    Part::TextEncoder => Some(text_encoder),
                    Part::TextEncoder2 => text_encoder_2.as_ref(),
                };
                let missing = || Error::Invalid { path: self.path.clone(), reason: format!("holds no {part}") };
                weights.ok_or_else(missing)?.anew()
            }
            Origin::Random(_) if part == Part::TextEncoder2 => Weights::random(&["text_projection.weight"]),
            Origin::Random(_) => Weights::random(&[]),
        };
        let weights = match self.additions.get(&part) {
            Some(additions) => weights.with_additions(Arc::clone(additions)),
            None => weights,
        };
        Ok(if self.shapes_only { weights.shapes_only() } else { weights })
    }
}

impl fmt::Debug for ModelSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ModelSource").field("path", &self.path).field("architecture", &self.architecture()).finish_non_exhaustive()
    }
}

/// Checks a folder that was given for its configurations.
fn config_folder(path: &Path) -> Result<PathBuf> {
    let folder = locate(path)?;
    let parts = [Part::Unet, Part::Vae, Part::TextEncoder, Part::TextEncoder2].map(|part| format!("{part}/{CONFIG_FILE}"));
    let known: Vec<String> = parts.into_iter().chain([SCHEDULER_FILE, TOKENIZERS[0], TOKENIZERS[1]].map(str::to_owned)).collect();
    if known.iter().any(|name| folder.join(name).exists()) {
        return Ok(folder);
    }
    Err(Error::Invalid { path: folder, reason: format!("holds no configuration; looked for {}", known.join(", ")) })
}

/// The settings of a part, and the path that names them in errors.
fn settings(path: &Path, origin: &Origin, part: Part) -> Result<(PathBuf, Map<String, Value>)> {
    read_settings(path, origin, &format!("{part}/{CONFIG_FILE}"), part.name())
}

fn scheduler_settings(path: &Path, origin: &Origin) -> Result<(PathBuf, Map<String, Value>)> {
    read_settings(path, origin, SCHEDULER_FILE, "scheduler")
}

fn read_settings(path: &Path, origin: &Origin, file_name: &str, part: &str) -> Result<(PathBuf, Map<String, Value>)> {
    let read = |file: PathBuf| read_config(&file, &[]).map(|settings| (file, settings));
    let published = |published: &Published| (format!("{} ({part})", path.display()).into(), published.settings(part));
    match origin {
        Origin::Folder => read(path.join(file_name)),
        Origin::Random(settings) => Ok(published(settings)),
        Origin::File(checkpoint) => match checkpoint.config.as_ref().map(|config| config.join(file_name)).filter(|file| file.is_file()) {
            Some(file) => read(file),
            None => Ok(published(&checkpoint.published)),
        },
    }
}

#[cfg(test)]
mod tests;
