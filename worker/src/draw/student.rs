//! The student's side of a drawing: an adapter's file, the encoder it was trained for, and whether the two fit the model.

use std::path::{Path, PathBuf};

use peapod_model::{
    adapter::{ADAPTER_FILE, Adapter, PYTORCH_FILE},
    hub,
    source::ModelSource,
    text::{StudentEncoder, StudentOptions},
    unet::UNet,
};
use tch::{Device, Kind};

use super::metadata::AdapterMetadata;
use super::setup::{Files, SetupError, present};
use crate::trainer::Snapshot;

/// File name of the moving average in a checkpoint, which a job that keeps one validates, shows in its pictures and exports.
const AVERAGE_FILE: &str = Snapshot::EMA;
/// How the names of the folders begin that the published trainer saves: `proj_STEP`, or `proj_0_STEP`, as its own scripts look for them.
const PUBLISHED_FOLDER: &str = "proj_";
/// The student encoder's folder inside a model folder that ships one.
pub(super) const SHIPPED_STUDENT: &str = "text_encoder_zh";

/// An adapter and its encoder that were found to fit.
#[derive(Debug)]
pub(super) struct Student {
    pub adapter: PathBuf,
    pub encoder: PathBuf,
    pub context_length: i64,
    pub options: StudentOptions,
    pub mask_pads: bool,
    /// Job and step that the adapter comes from, as far as it says.
    pub origin: Option<String>,
}

/// The adapter file meant by `path`: the file itself; in a folder the file there; else that of the newest whole checkpoint in it, or of the
/// last step that the published trainer saved there. Where there is a moving average beside the weights, it is meant.
pub(crate) fn adapter_file(path: &Path) -> Result<PathBuf, SetupError> {
    let found = hub::locate(path);
    let path = found.as_deref().unwrap_or(path);
    let first = |folder: &Path, names: &[&str]| names.iter().map(|name| folder.join(name)).find(|file| file.is_file());
    let own = |folder: &Path| first(folder, &[AVERAGE_FILE, ADAPTER_FILE, PYTORCH_FILE]);
    if !path.is_dir() {
        return Ok(path.to_owned());
    }
    if let Some(file) = own(path) {
        return Ok(file);
    }
    let folders: Vec<PathBuf> = std::fs::read_dir(path).into_iter().flatten().filter_map(|entry| Some(entry.ok()?.path())).collect();
    // A checkpoint is whole once it has a manifest; names sort by step.
    let newest = folders.iter().filter(|folder| folder.join("manifest.json").is_file()).max();
    let newest = newest.map(|folder| first(folder, &[AVERAGE_FILE]).unwrap_or_else(|| folder.join(ADAPTER_FILE)));
    let published = || {
        let saved = folders.iter().filter_map(|folder| Some((published_step(folder)?, own(folder)?)));
        saved.max_by_key(|(step, _)| *step).map(|(_, file)| file)
    };
    let file = newest.or_else(published).unwrap_or_else(|| path.join(ADAPTER_FILE));
    present("an adapter in that folder", &file, ADAPTER_HINT)?;
    Ok(file)
}

/// Whether a file is a checkpoint's moving average, by its name.
pub(super) fn is_average(file: &Path) -> bool {
    file.file_name().is_some_and(|name| name == AVERAGE_FILE)
}

/// The step of a folder that the published trainer saved.
fn published_step(folder: &Path) -> Option<u64> {
    let step = folder.file_name()?.to_str()?.strip_prefix(PUBLISHED_FOLDER)?;
    step.strip_prefix("0_").unwrap_or(step).parse().ok()
}

const ADAPTER_HINT: &str = "--adapter takes a file (.safetensors, pytorch_model.bin), a checkpoint's folder, or a folder of checkpoints";

impl Student {
    /// Whether another adapter's encoder is the same, loaded in the same way.
    pub(super) fn shares_encoder(&self, other: &Self) -> bool {
        let of = |student: &Self| {
            let StudentOptions { normalize_quotes, project, .. } = student.options;
            (student.encoder.clone(), student.context_length, normalize_quotes, project)
        };
        of(self) == of(other)
    }

    /// Compares the adapter at `path` with its encoder and with the model.
    ///
    /// Errors: [`SetupError`], which names both sides of what does not fit.
    pub(super) fn check(files: &Files, path: &Path, model: &ModelSource, unet: &UNet) -> Result<Self, SetupError> {
        present("the adapter", path, ADAPTER_HINT)?;
        let metadata = AdapterMetadata::read(path)?;
        let shipped = model.path().join(SHIPPED_STUDENT);
        let encoder = match (&files.student, &metadata.encoder) {
            (Some(given), _) => given.clone(),
            (None, Some(named)) if named.exists() || !shipped.exists() => named.clone(),
            (None, _) if shipped.exists() => shipped,
            (None, _) => return Err(SetupError::Encoder(path.into())),
        };
        let context_length =
            files.context_length.or(metadata.context_length.map(i64::from)).ok_or_else(|| SetupError::ContextLength(path.into()))?;
        let options = StudentOptions {
            normalize_quotes: metadata.normalize_quotes.unwrap_or(true),
            project: metadata.project.unwrap_or(false),
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
            mask_pads: metadata.mask_pads.unwrap_or(false),
            origin: metadata.origin(),
        })
    }
}
