//! Sections of the job file about what comes out: checkpoints, validation losses, pictures.

use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::checks::Checks;
use super::duration;

/// When and where weights are kept.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct CheckpointSection {
    /// A folder on the coordinator, or one in a store (`s3://`, `gs://`, `az://`; in a build with that feature); by default `checkpoints`
    /// in its state folder.
    pub store: Option<String>,
    /// Steps between checkpoints.
    pub every_steps: u64,
    /// Time between checkpoints, whichever comes first.
    #[serde(with = "duration")]
    #[schemars(schema_with = "duration::schema")]
    pub every: Duration,
    /// Newest checkpoints to keep.
    pub keep: u32,
}

impl Default for CheckpointSection {
    fn default() -> Self {
        Self { store: None, every_steps: 1000, every: Duration::from_secs(300), keep: 3 }
    }
}

impl CheckpointSection {
    pub(super) fn check(&self, checks: &mut Checks) {
        if let Some(store) = self.store.as_ref().filter(|store| store.starts_with("http://") || store.starts_with("https://")) {
            checks.problem(format!("checkpoint.store ({store}) must be a folder, or one in a store: a web server takes no files"));
        }
        let slip = self.store.as_ref().and_then(|store| store.split_once(":/")).filter(|(scheme, rest)| {
            !scheme.is_empty() && scheme.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit()) && !rest.starts_with('/')
        });
        if let Some((scheme, rest)) = slip {
            checks.problem(format!("checkpoint.store: an address has two slashes, {scheme}://{rest}"));
        }
        checks.at_least("checkpoint.every_steps", self.every_steps, 1, "");
        checks.at_least("checkpoint.every", self.every, Duration::from_secs(1), "");
        checks.at_least("checkpoint.keep", self.keep, 1, ": the newest is what a job resumes from");
    }
}

/// Losses on samples that are never trained, with the same noise and timesteps each time; of the weights' average where one is kept.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ValidationSection {
    /// webdataset tars as in `data.shards`, read by every worker; none: no validation.
    pub shards: Vec<String>,
    /// Steps between two validations; there is one before the first step and one at the end too.
    pub every_steps: u64,
    /// Samples to use, the first of the shards; 0: all of them.
    pub samples: u32,
}

impl Default for ValidationSection {
    fn default() -> Self {
        Self { shards: Vec::new(), every_steps: 1000, samples: 0 }
    }
}

impl ValidationSection {
    pub(super) fn check(&self, checks: &mut Checks) {
        checks.at_least("validation.every_steps", self.every_steps, 1, "; leave validation.shards out for no validation");
    }
}

/// Pictures drawn while training, the workers sharing the prompts.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct PicturesSection {
    /// Prompts in the new language; none: no pictures.
    pub prompts: Vec<String>,
    /// Steps between two sets of pictures; there is one before the first step and one at the end too.
    pub every_steps: u64,
    /// Width and height in pixels; by default the model's own size.
    pub size: Option<[u32; 2]>,
    /// Steps of the sampler.
    pub steps: u32,
    /// How strongly pictures follow their prompt.
    pub guidance: f64,
    /// Seed of the noise they begin with.
    pub seed: u64,
}

impl Default for PicturesSection {
    fn default() -> Self {
        Self { prompts: Vec::new(), every_steps: 1000, size: None, steps: 30, guidance: 7.5, seed: 0 }
    }
}

impl PicturesSection {
    pub(super) fn check(&self, checks: &mut Checks) {
        checks.at_least("pictures.every_steps", self.every_steps, 1, "; leave pictures.prompts out for no pictures");
        checks.within("pictures.steps", self.steps, 1..=999);
        checks.within("pictures.guidance", self.guidance, 0.0..=100.0);
        let count = self.prompts.len();
        let problem = (count > MAX_PICTURES).then(|| format!("pictures.prompts has {count} prompts, at most {MAX_PICTURES} are drawn"));
        checks.rule("pictures.prompts", format!("at most {MAX_PICTURES}"), problem);
        checks.sizes("pictures.size", self.size.as_slice());
    }
}

/// More pictures than this a time would be a gallery, not a look at how training goes.
const MAX_PICTURES: usize = 1000;
