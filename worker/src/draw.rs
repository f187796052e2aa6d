//! Drawing with a model and an adapter: everything is checked first ([`Setup`]), then loaded once ([`Painter`]).

use std::{
    any::Any,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
};

use peapod_model::{
    adapter::{self, Adapter},
    sample::{DpmSolver, Pipeline, PipelineOptions, Progress, Prompter, SampleOptions},
    source::ModelSource,
    text::{EnglishEncoders, StudentEncoder, StudentOptions},
    unet::UNet,
};
use tch::{Device, Kind};

use crate::picture::{Picture, PictureError};

/// File name of the adapter in a checkpoint.
const ADAPTER_FILE: &str = "adapter.safetensors";
/// File name of the adapter in the folders that the published trainer saves.
const PUBLISHED_FILE: &str = "pytorch_model.bin";
/// How the names of those folders begin: `proj_STEP`, or `proj_0_STEP`, as its own scripts look for them.
const PUBLISHED_FOLDER: &str = "proj_";
/// Adapter metadata: the folder of the text encoder it was trained for.
pub const ENCODER_KEY: &str = "encoder";
/// Adapter metadata: the number of tokens its prompts were padded to.
pub const CONTEXT_LENGTH_KEY: &str = "context_length";
/// Adapter metadata: `false` if curly quotes in its prompts were left as they are.
pub const NORMALIZE_QUOTES_KEY: &str = "normalize_quotes";

/// Adapter metadata: `true` if the token states of Chinese-CLIP were projected.
pub const PROJECT_KEY: &str = "project";
/// Adapter metadata: `true` if padding was left out of the pooled mean and hidden from cross-attention.
pub const MASK_PADS_KEY: &str = "mask_pads";

/// The student encoder's folder inside a model folder that ships one.
const SHIPPED_STUDENT: &str = "text_encoder_zh";
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
    /// Nothing says which encoder the adapter was trained for.
    #[error("{} does not say its text encoder: give --student", .0.display())]
    Encoder(PathBuf),
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
    /// The model: a folder as diffusers lays it out, a checkpoint that is one file, or a name on the hub.
    pub model: PathBuf,
    /// For a checkpoint that is one file: a folder whose configurations are taken instead of the published ones.
    pub model_config: Option<PathBuf>,
    /// The adapter, if pictures are to be drawn with one.
    pub adapter: Option<PathBuf>,
    /// The student encoder's folder, or its name on the hub; by default `text_encoder_zh` of the model, else what the adapter's metadata names.
    pub student: Option<PathBuf>,
    /// Tokens of a student prompt; by default what the adapter's metadata says.
    pub context_length: Option<i64>,
    /// Whether the model's own English encoders are needed.
    pub english: bool,
}

/// Files that were found to fit together.
#[derive(Debug)]
pub struct Setup {
    model: ModelSource,
    english: bool,
    student: Option<Student>,
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
    options: StudentOptions,
    mask_pads: bool,
    /// Job and step that the adapter comes from, as far as it says.
    origin: Option<String>,
}

impl Setup {
    /// Reads configurations, names and shapes of all weights, and the adapter, and compares them; no model is loaded.
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
        let student = files.adapter.as_ref().map(|adapter| Student::check(files, &adapter_file(adapter)?, &shapes, &unet)).transpose()?;
        Ok(Self {
            model: open()?,
            english: files.english,
            student,
            multiple: vae_factor * halvings(unet.config().block_out_channels.len()),
            native_side: vae_factor * shapes.sample_size(),
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
        DpmSolver::new(self.model.scheduler(), options.num_steps)?;
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
            let english = self.english.then(|| self.model.english(kind, device)).transpose()?;
            let load_student = |student: &Student| {
                let options = StudentOptions { kind, device, ..student.options };
                let encoder = StudentEncoder::load(&student.encoder, student.context_length, options)?;
                let adapter = Adapter::load(&student.adapter, device)?;
                Ok::<_, peapod_model::Error>(LoadedStudent { encoder, adapter, mask_pads: student.mask_pads })
            };
            let student = self.student.as_ref().map(load_student).transpose()?;
            Ok(Painter { pipeline, english, student })
        })
    }
}

/// The adapter file meant by `path`: the file itself; in a folder the file there; else that of the newest whole checkpoint in it, or of the
/// last step that the published trainer saved there.
fn adapter_file(path: &Path) -> Result<PathBuf, SetupError> {
    let own = |folder: &Path| [ADAPTER_FILE, PUBLISHED_FILE].map(|name| folder.join(name)).into_iter().find(|file| file.is_file());
    if !path.is_dir() {
        return Ok(path.to_owned());
    }
    if let Some(file) = own(path) {
        return Ok(file);
    }
    let folders: Vec<PathBuf> = std::fs::read_dir(path).into_iter().flatten().filter_map(|entry| Some(entry.ok()?.path())).collect();
    // A checkpoint is whole once it has a manifest; names sort by step.
    let newest = folders.iter().filter(|folder| folder.join("manifest.json").is_file()).max().map(|folder| folder.join(ADAPTER_FILE));
    let published = || {
        let saved = folders.iter().filter_map(|folder| Some((published_step(folder)?, own(folder)?)));
        saved.max_by_key(|(step, _)| *step).map(|(_, file)| file)
    };
    let file = newest.or_else(published).unwrap_or_else(|| path.join(ADAPTER_FILE));
    present("an adapter in that folder", &file, ADAPTER_HINT)?;
    Ok(file)
}

/// The step of a folder that the published trainer saved.
fn published_step(folder: &Path) -> Option<u64> {
    let step = folder.file_name()?.to_str()?.strip_prefix(PUBLISHED_FOLDER)?;
    step.strip_prefix("0_").unwrap_or(step).parse().ok()
}

const ADAPTER_HINT: &str = "--adapter takes a file (.safetensors, pytorch_model.bin), a checkpoint's folder, or a folder of checkpoints";

impl Student {
    fn check(files: &Files, path: &Path, model: &ModelSource, unet: &UNet) -> Result<Self, SetupError> {
        present("the adapter", path, ADAPTER_HINT)?;
        let metadata = adapter::metadata(path)?;
        let shipped = model.path().join(SHIPPED_STUDENT);
        let encoder = match (&files.student, metadata.get(ENCODER_KEY)) {
            (Some(given), _) => given.clone(),
            (None, Some(named)) if Path::new(named).exists() || !shipped.exists() => named.into(),
            (None, _) if shipped.exists() => shipped,
            (None, _) => return Err(SetupError::Encoder(path.into())),
        };
        let told = metadata.get(CONTEXT_LENGTH_KEY).and_then(|length| length.parse().ok());
        let context_length = files.context_length.or(told).ok_or_else(|| SetupError::ContextLength(path.into()))?;
        let options = StudentOptions {
            normalize_quotes: metadata.get(NORMALIZE_QUOTES_KEY).is_none_or(|told| told != "false"),
            project: metadata.get(PROJECT_KEY).is_some_and(|told| told == "true"),
            ..StudentOptions::new(Kind::Float, Device::Cpu)
        };
        let student = StudentEncoder::check(&encoder, context_length, options)?;

        let fits = |what, got: Option<i64>, expected: Option<i64>, wanted_by: String| {
            let width = |side: Option<i64>| side.map_or("no width".into(), |width| format!("width {width}"));
            if got == expected {
                return Ok(());
            }
            Err(SetupError::Adapter { adapter: path.into(), what, got: width(got), expected: width(expected), wanted_by })
        };
        let shape = *Adapter::load(path, Device::Cpu)?.config();
        let the_unet = || format!("the UNet of {}", model.path().display());
        fits("input", Some(shape.input), Some(student.width()), encoder.display().to_string())?;
        // Without a last linear (SD1.5) the projector's output itself goes to cross-attention, and nothing is pooled.
        fits("output", Some(shape.output.unwrap_or(shape.pooled)), Some(unet.text_width()), the_unet())?;
        fits("pooled output", shape.output.map(|_| shape.pooled), unet.pooled_width(), the_unet())?;
        Ok(Self {
            adapter: path.into(),
            encoder,
            context_length,
            options,
            mask_pads: metadata.get(MASK_PADS_KEY).is_some_and(|told| told == "true"),
            origin: metadata.get("job").zip(metadata.get("step")).map(|(job, step)| format!("{job}, step {step}")),
        })
    }
}

/// Loaded models, ready to draw.
pub struct Painter {
    pipeline: Pipeline,
    english: Option<EnglishEncoders>,
    student: Option<LoadedStudent>,
}

struct LoadedStudent {
    encoder: StudentEncoder,
    adapter: Adapter,
    mask_pads: bool,
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
            (Road::Adapter, _, Some(LoadedStudent { encoder, adapter, mask_pads })) => {
                Prompter::Student { encoder, adapter, mask_pads: *mask_pads }
            }
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

fn present(what: &'static str, path: &Path, hint: &'static str) -> Result<(), SetupError> {
    if path.exists() { Ok(()) } else { Err(SetupError::Missing { what, path: path.into(), hint }) }
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
        assert_eq!((student.context_length, student.options.normalize_quotes), (24, true));
        assert_eq!(student.encoder, demo().join("text_encoder_zh"));
    }

    #[test]
    fn misfitting_adapters_are_refused_with_both_widths() {
        let dir = tempfile::tempdir().unwrap();
        let cases = [
            (AdapterConfig { input: 1024, ..FITTING }, "its input has width 1024", "text_encoder_zh asks for width 64"),
            (AdapterConfig { output: Some(2048), ..FITTING }, "its output has width 2048", "tests/demo/model asks for width 80"),
            (AdapterConfig { pooled: 1280, ..FITTING }, "its pooled output has width 1280", "tests/demo/model asks for width 48"),
            (AdapterConfig { pooled: 80, output: None, ..FITTING }, "its pooled output has no width", "tests/demo/model asks for width 48"),
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
        assert!(Setup::check(&no_student).unwrap_err().to_string().contains("holds no text encoder"));
    }

    /// What the published trainer leaves behind: a folder for each step it saved, named in either of two ways.
    #[test]
    fn adapters_of_the_published_trainer_are_found_by_their_highest_step() {
        let root = tempfile::tempdir().unwrap();
        let bytes = Adapter::fresh(FITTING, 0, Device::Cpu).unwrap().to_pytorch(Kind::Half).unwrap();
        for folder in ["proj_9", "proj_0_41999", "proj_1009", "projector"] {
            std::fs::create_dir(root.path().join(folder)).unwrap();
            std::fs::write(root.path().join(folder).join(PUBLISHED_FILE), &bytes).unwrap();
        }
        std::fs::create_dir(root.path().join("proj_50000")).unwrap();
        let newest = root.path().join("proj_0_41999").join(PUBLISHED_FILE);
        assert_eq!(adapter_file(root.path()).unwrap(), newest);
        assert_eq!(adapter_file(&root.path().join("proj_9")).unwrap(), root.path().join("proj_9").join(PUBLISHED_FILE));
        let files = Files { model: demo(), adapter: Some(root.path().into()), context_length: Some(24), ..Files::default() };
        assert_eq!(Setup::check(&files).unwrap().student.unwrap().adapter, newest);
        assert!(adapter_file(&root.path().join("proj_50000")).unwrap_err().to_string().contains("an adapter in that folder is missing"));
    }

    /// A student encoder need not have a config.json at its root: its own layout decides.
    #[test]
    fn pairs_of_encoders_are_students_too() {
        let dir = tempfile::tempdir().unwrap();
        let pair = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/cases/student_pair/student");
        let options = StudentOptions::new(Kind::Float, Device::Cpu);
        let width = StudentEncoder::check(&pair, 8, options).unwrap().width();
        let student = Files { student: Some(pair), context_length: Some(8), ..files(&dir, AdapterConfig { input: width, ..FITTING }) };
        assert!(Setup::check(&student).is_ok());
        let misfit = Files { adapter: files(&dir, FITTING).adapter, ..student };
        assert!(Setup::check(&misfit).unwrap_err().to_string().contains(&format!("asks for width {width}")));
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
