//! What the Python libraries compute, computed again: every folder under `golden/cases` and under $PEAPOD_GOLDEN_DIR is a case.
//!
//! `golden/generate.py` writes the cases, `golden/README.md` says what is in a folder. To run a new kind of case, add a function to
//! [`KINDS`].

mod distill;
mod sample;
mod schedule;
mod text;
mod train;
mod weights;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use peapod_model::controlnet::{ControlNet, ControlOptions};
use peapod_model::unet::{Added, ForwardOptions, UNet};
use peapod_model::vae::Vae;
use peapod_worker::device;
use serde::de::DeserializeOwned;
use tch::{Device, Kind, Tensor, no_grad_guard};

type Tensors = BTreeMap<String, Tensor>;
type Result<T, E = Box<dyn std::error::Error>> = std::result::Result<T, E>;

/// Computes the outputs of a case.
type Run = fn(&Case) -> Result<Tensors>;

/// The kinds of cases, as `run` in case.toml names them.
const KINDS: &[(&str, Run)] = &[
    ("unet", unet),
    ("controlnet", controlnet),
    ("vae", vae),
    ("distill", distill::step),
    ("train", distill::train),
    ("tokenizer", text::tokenizer),
    ("tokenizer_published", text::tokenizer_published),
    ("clip_text", text::clip_text),
    ("bert_text", text::bert_text),
    ("student", text::student),
    ("student_ids", text::student_ids),
    ("prompts", text::prompts),
    ("adapter", train::adapter),
    ("adamw", train::adamw),
    ("lr_schedule", schedule::learning_rate),
    ("noise_schedule", schedule::noise),
    ("solver", sample::solver),
    ("pictures", sample::pictures),
    ("draw", sample::draw),
    ("vae_tiled", sample::vae_tiled),
    ("clip_score", sample::clip_score),
    ("weights", weights::file),
    ("single_file", weights::single_file),
];

/// Cases of networks alone, which can be computed elsewhere and in other numbers, and how far bf16 may be off: a layer rounds to 0.4 %, and
/// gradients have come through all of them twice, in one case at a steep place.
const NETWORKS: &[(&str, f64)] =
    &[("unet", 0.05), ("controlnet", 0.05), ("vae", 0.05), ("clip_text", 0.05), ("bert_text", 0.05), ("student", 0.05), ("distill", 0.5)];
/// What a loss is at least taken for in bf16: it is the square of a difference between two outputs that are rounded themselves.
const SMALLEST_LOSS: f64 = 0.02;
/// By how much more bf16 may be off on a GPU: at the steep place the order of sums counts too.
const ELSEWHERE: f64 = 1.5;
/// How far f32 may be off on a GPU at least, whose sums are in another order.
const F32_ELSEWHERE: f64 = 1e-3;

/// Where a case is computed, and in which numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Place {
    device: Device,
    kind: Kind,
}

const HERE: Place = Place { device: Device::Cpu, kind: Kind::Float };

#[test]
fn golden_cases_come_out_as_in_python() {
    check_all(HERE);
}

/// Too few bits for Python's digits, and enough to tell that nothing is left out or computed twice.
#[test]
fn golden_networks_come_out_in_bf16_to_its_rounding() {
    check_all(Place { kind: Kind::BFloat16, ..HERE });
}

/// On the GPU that $PEAPOD_GOLDEN_DEVICE names, as `worker --device` does: tests/gpu/run.sh sets it.
#[test]
fn golden_networks_come_out_on_a_gpu() {
    let Ok(name) = std::env::var("PEAPOD_GOLDEN_DEVICE") else {
        println!("skipped: PEAPOD_GOLDEN_DEVICE names no GPU");
        return;
    };
    // As worker does where it computes in f32: libtorch's own choice for convolutions on a GPU is TF32.
    peapod_kernels::allow_tf32(false, false);
    let device = device::open(name.parse().unwrap(), device::Sharing::Ignored).unwrap_or_else(|problem| panic!("{problem}"));
    for kind in [Kind::Float, Kind::BFloat16] {
        check_all(Place { device, kind });
    }
}

/// Checks every case that can be computed at a place.
fn check_all(place: Place) {
    // Tests run beside each other, each with libtorch's threads, which would spin for the same cores.
    tch::set_num_threads(1);
    let (mut failures, mut count) = (Vec::new(), 0);
    for folder in case_folders() {
        let name = folder.file_name().unwrap_or_default().to_string_lossy().into_owned();
        match Case::open(&folder, place).and_then(|case| case.check()) {
            Ok(None) => continue,
            Ok(Some(worst)) => println!("{name}: {worst}"),
            Err(error) => failures.push(format!("{name}: {error}")),
        }
        count += 1;
    }
    assert!(count > 0, "no golden cases found");
    assert!(failures.is_empty(), "{} of {count} golden cases differ, {place:?}:\n{}", failures.len(), failures.join("\n"));
}

/// All folders that hold a case.toml, sorted.
fn case_folders() -> Vec<PathBuf> {
    let ours = Path::new(env!("CARGO_MANIFEST_DIR")).join("golden").join("cases");
    let roots = [Some(ours), std::env::var_os("PEAPOD_GOLDEN_DIR").map(PathBuf::from)];
    let mut folders = Vec::new();
    for root in roots.into_iter().flatten() {
        let entries = std::fs::read_dir(&root).unwrap_or_else(|error| panic!("{}: {error}", root.display()));
        folders.extend(entries.map(|entry| entry.unwrap().path()).filter(|path| path.join("case.toml").is_file()));
    }
    folders.sort();
    folders
}

/// One case: its folder, its settings and its tensors.
struct Case {
    folder: PathBuf,
    settings: toml::Table,
    inputs: Tensors,
    place: Place,
}

impl Case {
    fn open(folder: &Path, place: Place) -> Result<Self> {
        let settings = std::fs::read_to_string(folder.join("case.toml"))?.parse()?;
        Ok(Self { folder: folder.to_path_buf(), settings, inputs: read_tensors(&folder.join("inputs.safetensors"))?, place })
    }

    /// Runs the case and compares; the text names the tensor farthest off. `None` if it is for the CPU and f32 alone.
    fn check(&self) -> Result<Option<String>> {
        let run: String = self.setting("run")?;
        let exact: f64 = self.setting("tolerance")?;
        let in_bf16 = NETWORKS.iter().find(|(name, _)| *name == run).map(|(_, tolerance)| *tolerance);
        let tolerance = match (self.place, in_bf16) {
            (HERE, _) => exact,
            (_, None) => return Ok(None),
            (Place { kind: Kind::Float, .. }, _) => exact.max(F32_ELSEWHERE),
            (Place { device: Device::Cpu, .. }, Some(tolerance)) => tolerance,
            (_, Some(tolerance)) => ELSEWHERE * tolerance,
        };
        let (_, kind) = KINDS.iter().find(|(name, _)| *name == run).ok_or_else(|| format!("run = {run:?} is not known"))?;
        let outputs = kind(self)?;
        let expected = read_tensors(&self.folder.join("outputs.safetensors"))?;
        if !outputs.keys().eq(expected.keys()) {
            return Err(format!("outputs {:?}, wanted {:?}", outputs.keys(), expected.keys()).into());
        }
        let mut worst = (0.0, "");
        for (name, wanted) in &expected {
            let got = &outputs[name];
            if got.size() != wanted.size() {
                return Err(format!("{name} is {:?}, wanted {:?}", got.size(), wanted.size()).into());
            }
            let is_rounded_loss = self.place.kind != Kind::Float && name.starts_with("loss.");
            let distance = relative_distance(got, wanted, if is_rounded_loss { SMALLEST_LOSS } else { f64::MIN_POSITIVE });
            if distance.is_nan() || distance > tolerance {
                return Err(format!("{name} is off by {distance:.2e}, allowed {tolerance:.0e}").into());
            }
            if distance >= worst.0 {
                worst = (distance, name);
            }
        }
        let (distance, name) = worst;
        Ok(Some(format!("{} tensors, at most {distance:.1e} off ({name}), allowed {tolerance:.0e}", expected.len())))
    }

    fn setting<T: DeserializeOwned>(&self, name: &str) -> Result<T> {
        let value = self.settings.get(name).ok_or_else(|| format!("case.toml lacks {name}"))?;
        Ok(value.clone().try_into()?)
    }

    /// A setting that is a path, seen from the case's folder; a leading `$DEMO` is the demo's model, wherever the case lies.
    fn path(&self, name: &str) -> Result<PathBuf> {
        let path = PathBuf::from(self.setting::<String>(name)?);
        Ok(match path.strip_prefix("$DEMO") {
            Ok(rest) => Path::new(env!("CARGO_MANIFEST_DIR")).join("demo").join("model").join(rest),
            Err(_) => self.folder.join(path),
        })
    }

    fn input(&self, name: &str) -> Result<Tensor> {
        let tensor = self.inputs.get(name).ok_or_else(|| format!("inputs.safetensors lacks {name}"))?;
        Ok(tensor.to_device(self.place.device))
    }
}

fn read_tensors(path: &Path) -> Result<Tensors> {
    Ok(Tensor::read_safetensors(path)?.into_iter().collect())
}

/// L2 norm of the difference over that of what is wanted, which is taken for `smallest` at least.
fn relative_distance(got: &Tensor, wanted: &Tensor, smallest: f64) -> f64 {
    let (got, wanted) = (got.to_device(Device::Cpu).to_kind(Kind::Double), wanted.to_kind(Kind::Double));
    let norm = wanted.norm().double_value(&[]);
    (got - wanted).norm().double_value(&[]) / norm.max(smallest)
}

/// A UNet's prediction and features.
fn unet(case: &Case) -> Result<Tensors> {
    let unet = UNet::load(&case.path("model")?, case.place.kind, case.place.device)?;
    let _guard = no_grad_guard();
    let output = unet.forward(&case.input("sample")?, &case.input("timesteps")?, &case.input("text")?, added(case)?.as_ref())?;
    let levels = unet.config().block_out_channels.len();
    let down = (0..levels).map(|index| format!("feature.d{index}"));
    let mid = unet.config().mid_block_type.map(|_| "feature.mid".to_owned());
    let up = (0..levels).map(|index| format!("feature.u{index}"));
    let features = down.chain(mid).chain(up).zip(output.features);
    Ok(features.chain([("sample".to_owned(), output.sample)]).collect())
}

/// A ControlNet's residuals, and the UNet's prediction with them.
fn controlnet(case: &Case) -> Result<Tensors> {
    let Place { kind, device } = case.place;
    let unet = UNet::load(&case.path("unet")?, kind, device)?;
    let control = ControlNet::load(&case.path("controlnet")?, kind, device)?;
    let (sample, timesteps, text, added) = (case.input("sample")?, case.input("timesteps")?, case.input("text")?, added(case)?);
    let _guard = no_grad_guard();
    let options = ControlOptions { image: &case.input("image")?, scale: case.setting("scale")?, mask: None };
    let residuals = control.forward(&sample, &timesteps, &text, added.as_ref(), &options)?;
    let options = ForwardOptions { control: Some(&residuals), ..ForwardOptions::default() };
    let output = unet.forward_with(&sample, &timesteps, &text, added.as_ref(), &options)?;
    let down = residuals.down.into_iter().enumerate().map(|(index, residual)| (format!("down.{index}"), residual));
    Ok(down.chain([("mid".to_owned(), residuals.mid), ("sample".to_owned(), output.sample)]).collect())
}

/// What a case tells an SDXL beside the text.
fn added(case: &Case) -> Result<Option<Added>> {
    match case.inputs.contains_key("pooled") {
        true => Ok(Some(Added { pooled: case.input("pooled")?, time_ids: case.input("time_ids")? })),
        false => Ok(None),
    }
}

/// An autoencoder's moments of images, and its images of scaled latents.
fn vae(case: &Case) -> Result<Tensors> {
    let vae = Vae::load(&case.path("model")?, case.place.kind, case.place.device)?;
    let _guard = no_grad_guard();
    let moments = vae.encode(&case.input("images")?)?;
    let decoded = vae.decode(&(case.input("latents")? / vae.scaling_factor()))?;
    Ok([("mean", moments.mean), ("log_variance", moments.log_variance), ("decoded", decoded)]
        .map(|(name, tensor)| (name.into(), tensor))
        .into())
}
