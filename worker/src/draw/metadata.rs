//! What an adapter's file says about itself: the trainer writes it, the sampler reads it, people may.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use peapod_model::{Error, Result, adapter};

/// How an adapter came about, and how its prompts must be encoded. Files of other programs say little of it or nothing.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct AdapterMetadata {
    /// The program that wrote it.
    pub version: Option<String>,
    /// The job that trained it.
    pub job: Option<String>,
    /// The step after which it was saved.
    pub step: Option<u64>,
    /// The family of models it was trained for.
    pub architecture: Option<String>,
    /// How much of a moving average was kept at each step; `None` for the weights themselves.
    pub ema_decay: Option<f64>,
    /// The text encoder it was trained for: a folder, or a name on the hub.
    pub encoder: Option<PathBuf>,
    /// The number of tokens its prompts were padded to.
    pub context_length: Option<u32>,
    /// Whether curly quotes in its prompts were straightened.
    pub normalize_quotes: Option<bool>,
    /// Whether the token states of Chinese-CLIP were projected.
    pub project: Option<bool>,
    /// Whether padding was left out of the pooled mean and hidden from cross-attention.
    pub mask_pads: Option<bool>,
}

const VERSION: &str = "version";
const JOB: &str = "job";
const STEP: &str = "step";
const ARCHITECTURE: &str = "architecture";
const EMA_DECAY: &str = "ema_decay";
const ENCODER: &str = "encoder";
const CONTEXT_LENGTH: &str = "context_length";
const NORMALIZE_QUOTES: &str = "normalize_quotes";
const PROJECT: &str = "project";
const MASK_PADS: &str = "mask_pads";

impl AdapterMetadata {
    /// Reads it from an adapter's file; empty for one without.
    ///
    /// # Errors
    /// The model crate's; [`Error::Invalid`] naming key and value of what cannot be understood.
    pub fn read(path: &Path) -> Result<Self> {
        let metadata = adapter::metadata(path)?;
        let text = |key| metadata.get(key).cloned();
        Ok(Self {
            version: text(VERSION),
            job: text(JOB),
            step: value(path, &metadata, STEP, "a whole number")?,
            architecture: text(ARCHITECTURE),
            ema_decay: value(path, &metadata, EMA_DECAY, "a number")?,
            encoder: text(ENCODER).map(PathBuf::from),
            context_length: value(path, &metadata, CONTEXT_LENGTH, "a number of tokens")?,
            normalize_quotes: value(path, &metadata, NORMALIZE_QUOTES, "true or false")?,
            project: value(path, &metadata, PROJECT, "true or false")?,
            mask_pads: value(path, &metadata, MASK_PADS, "true or false")?,
        })
    }

    /// As a file holds it.
    #[must_use]
    pub fn to_map(&self) -> BTreeMap<String, String> {
        let entries = [
            // By which Python's libraries know what a file's tensors are.
            ("format", Some("pt".to_owned())),
            (VERSION, self.version.clone()),
            (JOB, self.job.clone()),
            (STEP, self.step.map(|step| step.to_string())),
            (ARCHITECTURE, self.architecture.clone()),
            (EMA_DECAY, self.ema_decay.map(|decay| decay.to_string())),
            (ENCODER, self.encoder.as_ref().map(|encoder| encoder.display().to_string())),
            (CONTEXT_LENGTH, self.context_length.map(|length| length.to_string())),
            (NORMALIZE_QUOTES, self.normalize_quotes.map(|is_so| is_so.to_string())),
            (PROJECT, self.project.map(|is_so| is_so.to_string())),
            (MASK_PADS, self.mask_pads.map(|is_so| is_so.to_string())),
        ];
        entries.into_iter().filter_map(|(key, value)| Some((key.to_owned(), value?))).collect()
    }

    /// Job and step, as far as both are said.
    pub(super) fn origin(&self) -> Option<String> {
        self.job.as_ref().zip(self.step).map(|(job, step)| format!("{job}, step {step}"))
    }
}

/// The value of a key, if there is one.
fn value<T: FromStr>(path: &Path, metadata: &BTreeMap<String, String>, key: &str, wanted: &str) -> Result<Option<T>> {
    let parse = |text: &String| {
        text.parse().map_err(|_| {
            let reason = format!("its metadata say {key} = {text:?}, wanted {wanted}: it was written by another program, or damaged");
            Error::Invalid { path: path.into(), reason }
        })
    };
    metadata.get(key).map(parse).transpose()
}

#[cfg(test)]
mod tests {
    use peapod_model::adapter::{Adapter, AdapterConfig};
    use tch::Device;

    use super::*;

    fn read(metadata: &BTreeMap<String, String>) -> Result<AdapterMetadata> {
        let config = AdapterConfig { input: 4, hidden: 4, depth: 3, pooled: 4, output: None };
        let file = tempfile::NamedTempFile::with_suffix(".safetensors").unwrap();
        std::fs::write(file.path(), Adapter::fresh(config, 0, Device::Cpu).unwrap().to_safetensors(metadata).unwrap()).unwrap();
        AdapterMetadata::read(file.path())
    }

    #[test]
    fn what_is_written_is_read() {
        let whole = AdapterMetadata {
            version: Some("1.2.3".into()),
            job: Some("demo".into()),
            step: Some(7),
            architecture: Some("sdxl".into()),
            ema_decay: Some(0.999),
            encoder: Some("org/encoder".into()),
            context_length: Some(52),
            normalize_quotes: Some(false),
            project: Some(true),
            mask_pads: Some(true),
        };
        assert_eq!(read(&whole.to_map()).unwrap(), whole);
        assert_eq!(whole.origin().as_deref(), Some("demo, step 7"));
        let nothing = AdapterMetadata::default();
        assert_eq!(nothing.to_map().into_iter().collect::<Vec<_>>(), [("format".to_owned(), "pt".to_owned())]);
        assert_eq!((read(&BTreeMap::new()).unwrap(), nothing.origin()), (nothing, None));
    }

    #[test]
    fn values_that_cannot_be_understood_are_named_with_their_key() {
        for (key, value) in
            [("context_length", "many"), ("context_length", "-1"), ("mask_pads", "True"), ("normalize_quotes", "no"), ("step", "")]
        {
            let error = read(&[(key.to_owned(), value.to_owned())].into()).unwrap_err().to_string();
            assert!(error.contains(&format!("{key} = {value:?}")) && error.contains(".safetensors"), "{error}");
        }
    }
}
