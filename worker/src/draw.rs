//! Drawing with a model and an adapter: everything is checked first ([`Setup`]), then loaded once ([`Painter`]).

use std::{
    any::Any,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
};

use peapod_model::{
    PerLevel,
    adapter::{self, Adapter},
    sample::{DpmSolver, Pipeline, PipelineOptions, Progress, Prompter, SampleOptions, SchedulerConfig},
    text::{SdxlTextEncoders, StudentEncoder, StudentOptions},
    unet::UNetConfig,
    vae::VaeConfig,
};
use tch::{Device, Kind};

use crate::picture::{Picture, PictureError};

/// File name of the adapter in a checkpoint.
const ADAPTER_FILE: &str = "adapter.safetensors";
/// Adapter metadata: the folder of the text encoder it was trained for.
pub const ENCODER_KEY: &str = "encoder";
/// Adapter metadata: the number of tokens its prompts were padded to.
pub const CONTEXT_LENGTH_KEY: &str = "context_length";
/// Adapter metadata: `false` if curly quotes in its prompts were left as they are.
pub const NORMALIZE_QUOTES_KEY: &str = "normalize_quotes";

/// The student encoder's folder inside a model folder that ships one.
const SHIPPED_STUDENT: &str = "text_encoder_zh";
/// The latent size of a UNet whose configuration does not say it: SDXL's.
const SAMPLE_SIZE: i64 = 128;
/// Longer sides than this are a typing error: attention alone would need terabytes.
const MAX_SIDE: i64 = 8192;

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
    /// A configuration or the adapter cannot be used.
    #[error(transparent)]
    Model(#[from] peapod_model::Error),
    /// A configuration is not what it should be.
    #[error("{}: {reason}", path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The adapter was made for another model or another encoder.
    #[error("{} does not fit: its {what} has {got}, {} asks for {expected}", adapter.display(), wanted_by.display())]
    Adapter {
        /// The adapter's file.
        adapter: PathBuf,
        /// Which of its widths.
        what: &'static str,
        /// The adapter's.
        got: String,
        /// The model's or the encoder's.
        expected: String,
        /// Whose configuration asks for it.
        wanted_by: PathBuf,
    },
    /// Nothing says how long the adapter's prompts are.
    #[error("{} does not say its context length: give --context-length (52 for the published Chinese adapters)", .0.display())]
    ContextLength(PathBuf),
    /// The size of the pictures is impossible.
    #[error("{width}x{height} pixels cannot be drawn: width and height must be multiples of {multiple} between {multiple} and {MAX_SIDE}")]
    Size {
        /// Width in pixels.
        width: i64,
        /// Height in pixels.
        height: i64,
        /// What both must be divisible by: how much the VAE and the UNet reduce together.
        multiple: i64,
    },
    /// Guidance is no number that can be used.
    #[error("guidance {0} must be a number from 0 to 100")]
    Guidance(f64),
}

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
    /// Through the student encoder and the adapter.
    Adapter,
}

/// Files named by the user.
#[derive(Clone, Debug, Default)]
pub struct Files {
    /// The model's folder, as diffusers lays it out.
    pub model: PathBuf,
    /// The adapter, if pictures are to be drawn with one.
    pub adapter: Option<PathBuf>,
    /// The student encoder's folder; by default `text_encoder_zh` of the model, else what the adapter's metadata names.
    pub student: Option<PathBuf>,
    /// Tokens of a student prompt; by default what the adapter's metadata says.
    pub context_length: Option<i64>,
    /// Whether the model's own English encoders are needed.
    pub english: bool,
}

/// Files that were found to fit together.
#[derive(Debug)]
pub struct Setup {
    model: PathBuf,
    english: bool,
    student: Option<Student>,
    scheduler: SchedulerConfig,
    /// What picture sides must be divisible by.
    multiple: i64,
    /// The side the model was trained to draw, in pixels.
    native_side: i64,
}

#[derive(Debug)]
struct Student {
    adapter: PathBuf,
    encoder: PathBuf,
    context_length: i64,
    normalize_quotes: bool,
    /// Job and step that the adapter comes from, as far as it says.
    origin: Option<String>,
}

impl Setup {
    /// Reads configurations and the adapter, and compares them; no model is loaded.
    ///
    /// Errors: [`SetupError`], which names both sides of what does not fit.
    pub fn check(files: &Files) -> Result<Self, SetupError> {
        let model = &files.model;
        let hint = "--model takes a folder as diffusers saves it: unet, vae, scheduler, text_encoder, ...";
        present("the model", model, hint)?;
        for part in ["unet/config.json", "vae/config.json", "scheduler/scheduler_config.json"] {
            present("a part of the model", &model.join(part), hint)?;
        }
        if files.english {
            for part in ["text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"] {
                present("an English text encoder", &model.join(part), "give --adapter to draw without the model's own encoders")?;
            }
        }
        let unet_path = model.join("unet/config.json");
        let unet = UNetConfig::read(&unet_path)?;
        let vae_factor = halvings(VaeConfig::read(&model.join("vae/config.json"))?.block_out_channels.len());
        let scheduler = SchedulerConfig::load(model)?;
        let check_student = |adapter: &PathBuf| Student::check(files, &adapter_file(adapter)?, &unet, &unet_path);
        let student = files.adapter.as_ref().map(check_student).transpose()?;
        Ok(Self {
            model: model.clone(),
            english: files.english,
            student,
            scheduler,
            multiple: vae_factor * halvings(unet.block_out_channels.len()),
            native_side: vae_factor * config_number(&unet_path, &["sample_size"])?.unwrap_or(SAMPLE_SIZE),
        })
    }

    /// Job and step that the adapter comes from, if it says so.
    pub fn adapter_origin(&self) -> Option<&str> {
        self.student.as_ref()?.origin.as_deref()
    }

    /// The width and height of a picture nobody gave a size for.
    pub fn native_side(&self) -> i64 {
        self.native_side
    }

    /// Checks what is asked of the model.
    ///
    /// Errors: [`SetupError::Size`], [`SetupError::Guidance`], or [`SetupError::Model`] for an impossible number of steps.
    pub fn check_options(&self, options: &SampleOptions) -> Result<(), SetupError> {
        let &SampleOptions { width, height, guidance, .. } = options;
        let multiple = self.multiple;
        if [width, height].iter().any(|side| !(multiple..=MAX_SIDE).contains(side) || side % multiple != 0) {
            return Err(SetupError::Size { width, height, multiple });
        }
        if !(0.0..=100.0).contains(&guidance) {
            return Err(SetupError::Guidance(guidance));
        }
        DpmSolver::new(&self.scheduler, options.num_steps)?;
        Ok(())
    }

    /// Loads the models: on a GPU in bf16 if libtorch sees one, else on the CPU in f32. The VAE is f32 everywhere (SDXL's overflows in f16).
    ///
    /// Errors: [`DrawError::Model`].
    pub fn load(&self) -> Result<Painter, DrawError> {
        catching(|| {
            let device = Device::cuda_if_available();
            let kind = if device.is_cuda() { Kind::BFloat16 } else { Kind::Float };
            let pipeline = Pipeline::load(&self.model, PipelineOptions { device, unet_kind: kind, vae_kind: Kind::Float })?;
            let english = self.english.then(|| SdxlTextEncoders::load(&self.model, kind, device)).transpose()?;
            let load_student = |student: &Student| {
                let options = StudentOptions { normalize_quotes: student.normalize_quotes, ..StudentOptions::new(kind, device) };
                let encoder = StudentEncoder::load(&student.encoder, student.context_length, options)?;
                Ok::<_, peapod_model::Error>((encoder, Adapter::load(&student.adapter, device)?))
            };
            let student = self.student.as_ref().map(load_student).transpose()?;
            Ok(Painter { pipeline, english, student })
        })
    }
}

/// The adapter file meant by `path`: the file itself, or in a folder of checkpoints that of the newest whole one.
fn adapter_file(path: &Path) -> Result<PathBuf, SetupError> {
    if !path.is_dir() {
        return Ok(path.to_owned());
    }
    let own = path.join(ADAPTER_FILE);
    if own.is_file() {
        return Ok(own);
    }
    // A checkpoint is whole once it has a manifest; names sort by step.
    let folders = std::fs::read_dir(path).into_iter().flatten().filter_map(|entry| Some(entry.ok()?.path()));
    let newest = folders.filter(|folder| folder.join("manifest.json").is_file()).max();
    let hint = "--adapter takes a .safetensors file, a checkpoint's folder, or a folder of checkpoints";
    let file = newest.map_or(own, |folder| folder.join(ADAPTER_FILE));
    present("an adapter in that folder", &file, hint)?;
    Ok(file)
}

impl Student {
    fn check(files: &Files, path: &Path, unet: &UNetConfig, unet_path: &Path) -> Result<Self, SetupError> {
        present("the adapter", path, "--adapter takes a .safetensors file, or a folder of checkpoints")?;
        let metadata = adapter::metadata(path)?;
        let shipped = files.model.join(SHIPPED_STUDENT);
        let encoder = match (&files.student, metadata.get(ENCODER_KEY)) {
            (Some(given), _) => given.clone(),
            (None, Some(named)) if !shipped.exists() => named.into(),
            (None, _) => shipped,
        };
        let config = encoder.join("config.json");
        present("the student encoder", &config, "--student takes a folder with config.json, model.safetensors and vocab.txt")?;

        // `d_model` is what T5 calls its width.
        let encoder_width = config_number(&config, &["hidden_size", "d_model"])?;
        let text_width = match &unet.cross_attention_dim {
            PerLevel::Same(width) => Some(*width),
            PerLevel::Each(widths) => widths.first().copied(),
        };
        let fits = |what, got: Option<i64>, expected: Option<i64>, wanted_by: &Path| {
            let width = |side: Option<i64>| side.map_or("no width".into(), |width| format!("width {width}"));
            if got == expected {
                return Ok(());
            }
            let (adapter, wanted_by) = (path.into(), wanted_by.into());
            Err(SetupError::Adapter { adapter, what, got: width(got), expected: width(expected), wanted_by })
        };
        let shape = *Adapter::load(path, Device::Cpu)?.config();
        if encoder_width.is_some() {
            fits("input", Some(shape.input), encoder_width, &config)?;
        }
        // Without a last linear (SD1.5) the projector's output itself goes to cross-attention, and nothing is pooled.
        fits("output", Some(shape.output.unwrap_or(shape.pooled)), text_width, unet_path)?;
        fits("pooled output", shape.output.map(|_| shape.pooled), pooled_width(unet), unet_path)?;

        let told = metadata.get(CONTEXT_LENGTH_KEY).and_then(|length| length.parse().ok());
        Ok(Self {
            adapter: path.into(),
            encoder,
            context_length: files.context_length.or(told).ok_or_else(|| SetupError::ContextLength(path.into()))?,
            normalize_quotes: metadata.get(NORMALIZE_QUOTES_KEY).is_none_or(|told| told != "false"),
            origin: metadata.get("job").zip(metadata.get("step")).map(|(job, step)| format!("{job}, step {step}")),
        })
    }
}

/// Loaded models, ready to draw.
pub struct Painter {
    pipeline: Pipeline,
    english: Option<SdxlTextEncoders>,
    student: Option<(StudentEncoder, Adapter)>,
}

impl Painter {
    /// Draws one picture a prompt. The same seed and picture number begin with the same noise on either road.
    ///
    /// Errors: [`DrawError::Road`] if the setup did not include `road`; [`DrawError::Model`] and [`DrawError::Panic`] from the model.
    pub fn draw(
        &self,
        road: Road,
        prompts: &[&str],
        options: &SampleOptions,
        on_step: impl FnMut(Progress),
    ) -> Result<Vec<Picture>, DrawError> {
        let prompter = match (road, &self.english, &self.student) {
            (Road::English, Some(encoders), _) => Prompter::English(encoders),
            (Road::Adapter, _, Some((encoder, adapter))) => Prompter::Student { encoder, adapter },
            _ => return Err(DrawError::Road(road)),
        };
        let bytes = catching(|| {
            let drawn = self.pipeline.sampler().draw(prompter, prompts, options, on_step)?;
            let mut bytes = vec![0u8; drawn.numel()];
            drawn.f_copy_data_u8(&mut bytes, drawn.numel()).map_err(peapod_model::Error::from)?;
            Ok(bytes)
        })?;
        let (width, height) = (u32::try_from(options.width).unwrap_or(0), u32::try_from(options.height).unwrap_or(0));
        let size = width as usize * height as usize * 3;
        Ok(bytes.chunks(size.max(1)).map(|rgb| Picture::new(width, height, rgb.to_vec())).collect::<Result<_, _>>()?)
    }
}

/// Runs `work`, turning a panic of libtorch's wrapper into an error.
fn catching<T>(work: impl FnOnce() -> Result<T, DrawError>) -> Result<T, DrawError> {
    // Unwind safety: what `work` touched is dropped or only read afterwards.
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|payload| Err(DrawError::Panic(panic_message(payload.as_ref()))))
}

/// What a panic said; its first line, since libtorch appends its own backtrace.
fn panic_message(payload: &(dyn Any + Send)) -> String {
    let text = payload.downcast_ref::<String>().map(String::as_str).or_else(|| payload.downcast_ref::<&str>().copied());
    text.and_then(|text| text.lines().next()).unwrap_or("unknown reason").to_owned()
}

/// How much `num_levels` levels reduce a side: by two between each of them.
fn halvings(num_levels: usize) -> i64 {
    1 << num_levels.saturating_sub(1).min(30)
}

/// The width of the pooled text a UNet takes beside its six time ids; `None` if it takes none.
fn pooled_width(unet: &UNetConfig) -> Option<i64> {
    unet.addition_embed_type?;
    let time_ids = unet.addition_time_embed_dim?.saturating_mul(6);
    Some(unet.projection_class_embeddings_input_dim?.saturating_sub(time_ids))
}

fn present(what: &'static str, path: &Path, hint: &'static str) -> Result<(), SetupError> {
    if path.exists() { Ok(()) } else { Err(SetupError::Missing { what, path: path.into(), hint }) }
}

/// The first of `keys` that a JSON configuration has as a positive number.
fn config_number(path: &Path, keys: &[&str]) -> Result<Option<i64>, SetupError> {
    let invalid = |reason: String| SetupError::Config { path: path.into(), reason };
    let text = std::fs::read_to_string(path).map_err(|error| invalid(error.to_string()))?;
    let json: serde_json::Value = serde_json::from_str(&text).map_err(|error| invalid(error.to_string()))?;
    Ok(keys.iter().find_map(|key| json.get(key)?.as_i64()).filter(|number| (1..=1 << 20).contains(number)))
}

#[cfg(test)]
mod tests {
    use peapod_model::adapter::AdapterConfig;

    use super::*;

    /// The demo's model: 64x64 pixels, UNet of three levels, cross-attention 80, pooled 48, student encoder 64.
    fn demo() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/demo/model")
    }

    fn files(dir: &tempfile::TempDir, config: AdapterConfig) -> Files {
        let path = dir.path().join("adapter.safetensors");
        let metadata = [(CONTEXT_LENGTH_KEY.to_owned(), "24".to_owned())].into();
        std::fs::write(&path, Adapter::fresh(config, 0, Device::Cpu).unwrap().to_safetensors(&metadata).unwrap()).unwrap();
        Files { model: demo(), adapter: Some(path), ..Files::default() }
    }

    const FITTING: AdapterConfig = AdapterConfig { input: 64, hidden: 16, depth: 3, pooled: 48, output: Some(80) };

    #[test]
    fn demo_model_and_a_fitting_adapter_pass() {
        let dir = tempfile::tempdir().unwrap();
        let setup = Setup::check(&files(&dir, FITTING)).unwrap();
        assert_eq!((setup.native_side(), setup.multiple), (64, 32));
        let student = setup.student.unwrap();
        assert_eq!((student.context_length, student.normalize_quotes), (24, true));
        assert_eq!(student.encoder, demo().join("text_encoder_zh"));
    }

    #[test]
    fn misfitting_adapters_are_refused_with_both_widths() {
        let dir = tempfile::tempdir().unwrap();
        let cases = [
            (AdapterConfig { input: 1024, ..FITTING }, "its input has width 1024", "text_encoder_zh/config.json asks for width 64"),
            (AdapterConfig { output: Some(2048), ..FITTING }, "its output has width 2048", "unet/config.json asks for width 80"),
            (AdapterConfig { pooled: 1280, ..FITTING }, "its pooled output has width 1280", "unet/config.json asks for width 48"),
            (AdapterConfig { pooled: 80, output: None, ..FITTING }, "its pooled output has no width", "unet/config.json asks for width 48"),
        ];
        for (config, got, expected) in cases {
            let error = Setup::check(&files(&dir, config)).unwrap_err().to_string();
            assert!(error.contains(got) && error.contains(expected), "{error}");
        }
    }

    #[test]
    fn missing_files_are_named_before_anything_loads() {
        let dir = tempfile::tempdir().unwrap();
        let nowhere = Files { model: dir.path().join("nowhere"), ..Files::default() };
        assert!(Setup::check(&nowhere).unwrap_err().to_string().contains("nowhere"));
        let no_adapter = Files { model: demo(), adapter: Some(dir.path().join("a.safetensors")), ..Files::default() };
        assert!(Setup::check(&no_adapter).unwrap_err().to_string().contains("the adapter is missing"));
        let no_student = Files { student: Some(dir.path().into()), ..files(&dir, FITTING) };
        assert!(Setup::check(&no_student).unwrap_err().to_string().contains("the student encoder is missing"));
    }

    #[test]
    fn adapter_without_a_context_length_asks_for_one() {
        let dir = tempfile::tempdir().unwrap();
        let files = files(&dir, FITTING);
        let bare = Adapter::fresh(FITTING, 0, Device::Cpu).unwrap().to_safetensors(&Default::default()).unwrap();
        std::fs::write(files.adapter.as_ref().unwrap(), bare).unwrap();
        assert!(Setup::check(&files).unwrap_err().to_string().contains("give --context-length"));
        assert!(Setup::check(&Files { context_length: Some(24), ..files }).is_ok());
    }

    #[test]
    fn impossible_options_are_refused() {
        let setup = Setup::check(&Files { model: demo(), english: true, ..Files::default() }).unwrap();
        let good = SampleOptions { width: 96, height: 64, num_steps: 20, ..SampleOptions::default() };
        setup.check_options(&good).unwrap();
        let bad = |options: SampleOptions| setup.check_options(&options).unwrap_err().to_string();
        assert!(bad(SampleOptions { width: 72, ..good.clone() }).contains("multiples of 32"));
        assert!(bad(SampleOptions { height: 0, ..good.clone() }).contains("96x0 pixels"));
        assert!(bad(SampleOptions { guidance: f64::NAN, ..good.clone() }).contains("guidance NaN"));
        assert!(bad(SampleOptions { num_steps: 1000, ..good }).contains("between 1 and 999"));
    }
}
