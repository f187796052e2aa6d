//! The job file: what to train, on what, and how.
//!
//! It is given once, to the coordinator; workers receive its text on joining and parse it with the same code.
//! Every field but the paths has a default; unknown keys are errors that name the nearest known key.

mod bytes;
mod captions;
mod checks;
mod data;
mod duration;
mod elsewhere;
mod error;
mod file;
mod models;
mod oddities;
mod preset;
mod reference;
mod results;
mod train;

pub use captions::{CaptionRules, CaptionsSection, Language, NativeBy, Ranges, Script};
pub use data::{DataSection, Filter, SourceSection};
pub use error::JobError;
pub use file::{JobArgs, JobFile, OptionalJobArgs, Setting};
pub use models::{AdapterSection, ModelSection, StudentSection, VaeDtype};
pub use preset::Preset;
pub use reference::reference;
pub use results::{CheckpointSection, PicturesSection, ValidationSection};
pub use train::{Decay, Dtype, LossSection, Precision, TimeIdsOrder, TrainSection};

use checks::Checks;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A job file with every field explained, as `coordinator init` writes it.
pub const TEMPLATE: &str = include_str!("template.toml");

/// A training job.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Job {
    /// Shown in logs and in checkpoint metadata.
    #[serde(default = "default_name")]
    pub name: String,
    /// The defaults of all other fields.
    #[serde(default)]
    pub preset: Preset,
    /// Seeds the fresh adapter, the order of shards, and every draw made for a sample. Below 2^63 (a TOML integer).
    #[serde(default)]
    pub seed: u64,
    /// The English model that teaches.
    pub model: ModelSection,
    /// The text encoder of the new language.
    pub student: StudentSection,
    /// The adapter's shape.
    #[serde(default)]
    pub adapter: AdapterSection,
    /// Where samples come from and which are kept.
    pub data: DataSection,
    /// Batch, length and optimiser.
    pub train: TrainSection,
    /// The method's switches.
    #[serde(default)]
    pub loss: LossSection,
    /// When and where weights are kept.
    #[serde(default)]
    pub checkpoint: CheckpointSection,
    /// Losses on samples that are never trained.
    #[serde(default)]
    pub validation: ValidationSection,
    /// Pictures drawn while training.
    #[serde(default)]
    pub pictures: PicturesSection,
}

fn default_name() -> String {
    "pea".into()
}

fn yes() -> bool {
    true
}

impl Job {
    /// Parses and validates a job file's text.
    ///
    /// # Errors
    /// [`JobError`] with one line for each thing that is wrong.
    pub fn parse(text: &str) -> Result<Self, JobError> {
        let toml = toml::Deserializer::parse(text).map_err(|error| JobError::from_toml(text, &error))?;
        let job: Self = serde_path_to_error::deserialize(toml).map_err(|error| JobError::of_key(text, &error))?;
        let job = match job.preset.defaults() {
            None => job,
            // Parsed once more: only the text says which fields are the preset's to fill in.
            Some(defaults) => preset::fill_in(text, defaults).map_err(|error| JobError::from_toml(text, &error))?,
        };
        job.validate().map_err(|error| error.with_lines(text))?;
        Ok(job)
    }

    /// Checks ranges and the relations between fields.
    ///
    /// # Errors
    /// [`JobError`] with one line for each field out of its range and each relation that does not hold.
    pub fn validate(&self) -> Result<(), JobError> {
        let mut checks = Checks::default();
        self.check(&mut checks);
        if checks.problems.is_empty() { Ok(()) } else { Err(JobError { problems: checks.problems }) }
    }

    fn check(&self, checks: &mut Checks) {
        let is_empty = self.name.trim().is_empty();
        checks.rule("name", "not empty", is_empty.then(|| "name is empty: logs and checkpoints call the job by it".into()));
        self.adapter.check(checks);
        self.student.check(checks);
        self.data.check(checks);
        self.train.check(checks);
        self.loss.check(checks);
        self.checkpoint.check(checks);
        self.validation.check(checks);
        self.pictures.check(checks);
    }

    /// The step after which the job ends, when it is given in steps.
    #[must_use]
    pub fn last_step(&self) -> Option<u64> {
        self.train.steps
    }

    /// Names the fields in which `other` is another training run, so that one's checkpoint does not continue the other.
    ///
    /// Batch, learning rate, length, checkpoint policy and loss switches may change between a run and its continuation.
    #[must_use]
    pub fn identity_differences(&self, other: &Self) -> Vec<String> {
        let mut differences = Vec::new();
        let mut compare = |field: &str, here: String, there: String| {
            if here != there {
                differences.push(format!("{field}: {there} in the checkpoint, {here} in the job file"));
            }
        };
        compare("seed", self.seed.to_string(), other.seed.to_string());
        compare("model.path", self.model.path.display().to_string(), other.model.path.display().to_string());
        compare("student.path", self.student.path.display().to_string(), other.student.path.display().to_string());
        compare("student.context_length", self.student.context_length.to_string(), other.student.context_length.to_string());
        compare("student.project", self.student.project.to_string(), other.student.project.to_string());
        compare("adapter.mask_pads", self.adapter.mask_pads.to_string(), other.adapter.mask_pads.to_string());
        compare("adapter.hidden", self.adapter.hidden.to_string(), other.adapter.hidden.to_string());
        compare("adapter.depth", self.adapter.depth.to_string(), other.adapter.depth.to_string());
        compare("data.shards", format!("{:?}", self.data.shards), format!("{:?}", other.data.shards));
        // Weights may change: the ledger knows what is done in whichever order.
        let sources =
            |job: &Self| job.data.sources.iter().map(|source| format!("{} = {:?}", source.name, source.shards)).collect::<Vec<_>>();
        compare("data.sources", sources(self).join(", "), sources(other).join(", "));
        differences
    }

    /// The fields that have another value in `other`, as they are named in the job file.
    #[must_use]
    pub fn changed_keys(&self, other: &Self) -> Vec<String> {
        let value = |job: &Self| serde_json::to_value(job).unwrap_or_default();
        let mut changed = Vec::new();
        compare("", &value(self), &value(other), &mut changed);
        changed
    }
}

/// Adds the names of the fields below `name` that differ.
fn compare(name: &str, here: &serde_json::Value, there: &serde_json::Value, changed: &mut Vec<String>) {
    use serde_json::Value::Object;
    let (Object(ours), Object(theirs)) = (here, there) else {
        if here != there {
            changed.push(name.to_owned());
        }
        return;
    };
    let null = serde_json::Value::Null;
    let keys: std::collections::BTreeSet<&String> = ours.keys().chain(theirs.keys()).collect();
    for key in keys {
        let name = if name.is_empty() { key.clone() } else { format!("{name}.{key}") };
        compare(&name, ours.get(key).unwrap_or(&null), theirs.get(key).unwrap_or(&null), changed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMALL: &str = r#"
        [model]
        path = "model"
        [student]
        path = "student"
        [data]
        shards = ["{00000..00005}.tar"]
        [train]
        steps = 10
    "#;

    #[test]
    fn template_is_a_valid_job_with_the_defaults() {
        let template = Job::parse(TEMPLATE).unwrap();
        let mut defaults = Job::parse(SMALL).unwrap();
        defaults.name.clone_from(&template.name);
        defaults.model.clone_from(&template.model);
        defaults.student.path.clone_from(&template.student.path);
        defaults.data.shards.clone_from(&template.data.shards);
        defaults.train.steps = template.train.steps;
        assert_eq!(template, defaults, "the template must show the defaults");
    }

    #[test]
    fn examples_are_valid_jobs() {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/jobs");
        let mut files: Vec<_> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
        files.retain(|file| file.extension().is_some_and(|extension| extension == "toml"));
        assert!(files.len() >= 3, "{files:?}");
        for file in files {
            let job = Job::parse(&std::fs::read_to_string(&file).unwrap()).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
            assert_eq!(Some(job.name.as_str()), file.file_stem().and_then(|stem| stem.to_str()));
        }
    }

    #[test]
    fn unknown_key_names_the_nearest_known_one() {
        let error = Job::parse(&SMALL.replace("steps = 10", "steps = 10\nlerning_rate = 1e-4")).unwrap_err().to_string();
        assert!(error.contains("`lerning_rate`") && error.contains("did you mean `learning_rate`"), "{error}");
        assert!(error.contains("line"), "{error}");
    }

    #[test]
    fn every_problem_is_listed_at_once() {
        let text = SMALL.replace("steps = 10", "global_batch = 0\nlearning_rate = -1.0");
        let error = Job::parse(&text).unwrap_err();
        assert_eq!(error.problems.len(), 3, "{error}");
        assert!(error.to_string().contains("train.steps or train.epochs"), "{error}");
    }

    #[test]
    fn job_without_a_name_is_refused() {
        let error = Job::parse(&format!("name = \" \"\n{SMALL}")).unwrap_err().to_string();
        assert_eq!(error, "line 1: name is empty: logs and checkpoints call the job by it");
    }

    #[test]
    fn sizes_and_times_have_units() {
        let with = |line: &str| Job::parse(&SMALL.replace("[train]", &format!("{line}\n[train]"))).unwrap().data;
        let sizes = ["\"500 MB\"", "\"2GiB\"", "1048576"].map(|size| with(&format!("buffer_bytes = {size}")).buffer_bytes);
        assert_eq!(sizes, [500_000_000, 2 << 30, 1 << 20]);
        let times = ["90 s", "10m", "1h 30m"].map(|time| with(&format!("give_up_after = {time:?}")).give_up_after.as_secs());
        assert_eq!(times, [90, 600, 5400]);
    }

    #[test]
    fn missing_section_is_named() {
        let error = Job::parse("seed = 1").unwrap_err().to_string();
        assert!(error.contains("missing field `model`"), "{error}");
    }

    #[test]
    fn decay_over_epochs_needs_its_length() {
        let epochs = SMALL.replace("steps = 10", "epochs = 2");
        assert!(Job::parse(&epochs).unwrap_err().to_string().contains("train.decay_steps"));
        assert!(Job::parse(&epochs.replace("epochs = 2", "epochs = 2\ndecay_steps = 50")).is_ok());
        assert!(Job::parse(&epochs.replace("epochs = 2", "epochs = 2\ndecay = \"constant\"")).is_ok());
    }

    #[test]
    fn preset_fills_in_what_the_file_leaves_out() {
        let job = Job::parse(&format!("preset = \"reference\"\n{SMALL}")).unwrap();
        assert_eq!((job.loss.time_ids_order, job.loss.dtype, job.student.dropout), (TimeIdsOrder::Wh, Precision::F16, true));
        assert_eq!((job.train.decay_steps, job.train.steps), (Some(2_232_142), Some(10)));
        assert!(!job.data.fast_shrink && Job::parse(SMALL).unwrap().data.fast_shrink);
        let job = Job::parse(&format!("preset = \"reference\"\n[loss]\ndtype = \"f32\"\n{SMALL}")).unwrap();
        assert_eq!((job.loss.time_ids_order, job.loss.dtype), (TimeIdsOrder::Wh, Precision::F32), "what the file says stands");
        let fixed = Job::parse(&format!("preset = \"fixed\"\n{SMALL}")).unwrap();
        assert_eq!(fixed, Job::parse(SMALL).unwrap());
        let error = Job::parse(&format!("preset = \"referense\"\n{SMALL}")).unwrap_err().to_string();
        assert!(error.contains("did you mean `reference`"), "{error}");
    }

    #[test]
    fn sources_stand_in_place_of_shards() {
        let sources =
            "[[data.sources]]\nname = \"a\"\nshards = [\"a.tar\"]\nweight = 3\n[[data.sources]]\nname = \"b\"\nshards = [\"b.tar\"]";
        let mixed = SMALL.replace("shards = [\"{00000..00005}.tar\"]", sources);
        let job = Job::parse(&mixed).unwrap();
        assert_eq!(job.data.sources.iter().map(|source| source.weight).collect::<Vec<_>>(), [3.0, 1.0]);
        let other = Job::parse(&mixed.replace("weight = 3", "weight = 0.5")).unwrap();
        assert!(job.identity_differences(&other).is_empty(), "the mixture may change");
        assert_eq!(job.identity_differences(&Job::parse(&mixed.replace("b.tar", "c.tar")).unwrap()).len(), 1);
        let problems = |text: &str| Job::parse(text).unwrap_err().problems.join("; ");
        assert!(
            problems(&SMALL.replace("[train]", &format!("{sources}\n[train]"))).contains("exactly one of data.shards or [[data.sources]]")
        );
        assert!(problems(&mixed.replace("\"b\"", "\"a\"")).contains("two are named \"a\""));
        assert!(problems(&mixed.replace("weight = 3", "weight = 0")).contains("has weight 0"));
    }

    #[test]
    fn changed_fields_are_named_as_in_the_file() {
        let job = Job::parse(SMALL).unwrap();
        let mut other = job.clone();
        assert!(job.changed_keys(&other).is_empty());
        other.train.learning_rate = 3e-4;
        other.train.decay_steps = Some(7);
        other.name = "other".into();
        assert_eq!(job.changed_keys(&other), ["name", "train.decay_steps", "train.learning_rate"]);
    }

    #[test]
    fn checkpoints_are_kept_where_files_can_be_written() {
        let with = |store: &str| Job::parse(&format!("{SMALL}\n[checkpoint]\nstore = {store:?}"));
        let error = with("https://host/run").unwrap_err().to_string();
        assert!(error.contains("checkpoint.store (https://host/run) must be a folder, or one in a store"), "{error}");
        assert_eq!(
            with("s3:/bucket/run").unwrap_err().to_string(),
            "line 12: checkpoint.store: an address has two slashes, s3://bucket/run"
        );
        assert!(with("/mnt/run").is_ok() && with("run").is_ok() && with("s3://bucket/run").is_ok());
    }

    #[test]
    fn identity_ignores_what_may_change() {
        let job = Job::parse(SMALL).unwrap();
        let mut other = job.clone();
        other.train.learning_rate = 3e-4;
        other.train.steps = Some(20);
        assert!(job.identity_differences(&other).is_empty());
        other.seed = 5;
        other.adapter.hidden = 64;
        assert_eq!(job.identity_differences(&other).len(), 2);
    }
}
