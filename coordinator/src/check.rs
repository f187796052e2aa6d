//! Reading a job file and its shard list, before anything starts.

mod visibility;

use std::collections::HashSet;
use std::fmt::Write as _;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use peapod_data::source::shown_url;
use peapod_proto::ids::SampleName;
use peapod_proto::job::{Job, JobArgs, JobFile};
use peapod_proto::program::counted;

pub use visibility::Visibility;

use crate::core::order::Source;
use crate::store::Store;

/// A job that can be started.
#[derive(Debug, Clone)]
pub struct LoadedJob {
    /// The parsed file.
    pub job: Job,
    /// Its text, as workers receive it.
    pub toml: String,
    /// Addresses of all shards, source by source.
    pub shards: Arc<[String]>,
    /// The sources they are of.
    pub sources: Arc<[Source]>,
    /// Which of them this machine sees.
    pub visible: Visibility,
    /// The shards of its validation samples, or why this machine cannot list them; none without validation.
    pub validation: Option<Result<Validation, String>>,
}

/// Shards of samples that are never trained. Workers list them for themselves.
#[derive(Debug, Clone)]
pub struct Validation {
    /// Their addresses.
    pub shards: Vec<String>,
    /// Which of them this machine sees.
    pub visible: Visibility,
}

/// What is wrong with a list that is empty, or has comments only.
const NO_SHARDS: &str = "no shard is named by its lists";

/// Reads and validates a job file and expands its shard list.
///
/// # Errors
/// One line for each thing that is wrong, with the file's name.
pub fn load(args: &JobArgs) -> Result<LoadedJob, String> {
    let JobFile { job, text: toml } = args.read()?;
    let path = &args.job;
    let (shards, sources) = expand(&job).map_err(|error| format!("{}: {error}", path.display()))?;
    let visible = Visibility::of(&shards);
    let validation = (!job.validation.shards.is_empty()).then(|| Validation::list(&job));
    Ok(LoadedJob { job, toml, shards: shards.into(), sources: sources.into(), visible, validation })
}

impl LoadedJob {
    /// What is wrong with the shard lists as far as this machine can tell; `here` if the workers run on it too.
    ///
    /// # Errors
    /// As [`Visibility::judge`].
    pub fn judge(&self, here: bool) -> Result<(), String> {
        self.visible.judge(here)?;
        match &self.validation {
            Some(Err(problem)) if here => Err(problem.clone()),
            Some(Ok(validation)) => validation.visible.judge(here).map_err(|problem| format!("validation.shards: {problem}")),
            _ => Ok(()),
        }
    }

    /// What is allowed and hardly meant.
    #[must_use]
    pub fn oddities(&self) -> Vec<String> {
        let mut found = self.job.oddities();
        let mut trained = HashSet::with_capacity(self.shards.len());
        let again: Vec<&String> = self.shards.iter().filter(|shard| !trained.insert(*shard)).collect();
        if let Some(first) = again.first() {
            let (shards, such) = (counted(again.len(), "shard"), shown_url(first));
            found.push(format!("data.shards names {shards} twice, such as {such}: what is in them is trained twice an epoch"));
        }
        match &self.validation {
            Some(Ok(Validation { shards, .. })) => {
                let both: Vec<&String> = shards.iter().filter(|shard| trained.contains(shard)).collect();
                if let Some(first) = both.first() {
                    let (num, all) = (both.len(), shards.len());
                    found.push(format!(
                        "validation.shards: {num} of {all} are trained on too, such as {}: their losses say nothing of new samples",
                        shown_url(first)
                    ));
                }
            }
            Some(Err(problem)) => found.push(format!("{problem}, as seen from this machine")),
            None => {}
        }
        found
    }
}

impl Validation {
    fn list(job: &Job) -> Result<Self, String> {
        let shards = peapod_data::expand_shards(&job.validation.shards).map_err(|error| format!("validation.shards: {error}"))?;
        if shards.is_empty() {
            return Err(format!("validation.shards: {NO_SHARDS}"));
        }
        let visible = Visibility::of(&shards);
        Ok(Self { shards, visible })
    }
}

/// The shards of all sources, and how many each of these has.
fn expand(job: &Job) -> Result<(Vec<String>, Vec<Source>), String> {
    if job.data.sources.is_empty() {
        let shards = peapod_data::expand_shards(&job.data.shards).map_err(|error| format!("data.shards: {error}"))?;
        if shards.is_empty() {
            return Err(format!("data.shards: {NO_SHARDS}"));
        }
        let sources = vec![Source::unnamed(shards.len() as u32)];
        return Ok((shards, sources));
    }
    let (mut shards, mut sources) = (Vec::new(), Vec::new());
    for source in &job.data.sources {
        let found = peapod_data::expand_shards(&source.shards).map_err(|error| format!("data.sources: {:?}: {error}", source.name))?;
        if found.is_empty() {
            return Err(format!("data.sources: {:?}: {NO_SHARDS}", source.name));
        }
        sources.push(Source { name: source.name.clone(), num_shards: found.len() as u32, weight: source.weight });
        shards.extend(found);
    }
    let limit = SampleName::LIMIT as usize;
    if shards.len() > limit {
        Err(format!("data.sources: {} shards, at most {limit} can be named", shards.len()))
    } else {
        Ok((shards, sources))
    }
}

/// What `coordinator check` prints. The models are looked at by `worker`, the program that can read them.
///
/// # Errors
/// As [`load`], for shards that are missing, and with the worker's words for models that do not fit.
pub fn report(args: &JobArgs, worker: &Path) -> Result<String, String> {
    let loaded = load(args)?;
    let LoadedJob { job, shards, sources, visible, validation, .. } = &loaded;
    let path = &args.job;
    loaded.judge(false).map_err(|problem| format!("{}: {problem}", path.display()))?;
    match job.checkpoint.store.as_deref().map(|store| store.strip_prefix("file://").unwrap_or(store)) {
        // Nobody is asked for anything.
        Some(store) if store.contains("://") => drop(Store::at(store).map_err(|error| format!("{}: {error}", path.display()))?),
        Some(store) if Path::new(store).is_file() => {
            return Err(format!(
                "{}: checkpoint.store: {store} is a file; it must be a folder, which need not be there yet",
                path.display()
            ));
        }
        _ => {}
    }
    let mut text = format!("{} is a valid job: {}\n", path.display(), job.name);
    let length = match (job.train.steps, job.train.epochs) {
        (Some(steps), _) => counted(steps, "step"),
        (_, Some(epochs)) => counted(epochs, "epoch"),
        _ => String::new(),
    };
    let _ = writeln!(text, "  {length}, {} a step, in parts of {}", counted(job.train.global_batch, "sample"), job.train.micro_batch);
    for oddity in loaded.oddities() {
        let _ = writeln!(text, "  {oddity}");
    }
    let _ = writeln!(text, "  {}", visible.describe(shards.len()));
    for Source { name, num_shards, weight } in sources.iter().filter(|source| !source.name.is_empty()) {
        let _ = writeln!(text, "    {name}: {}, weight {weight}", counted(*num_shards, "shard"));
    }
    if let Some(Ok(Validation { shards, visible })) = validation {
        let _ = writeln!(text, "  validation: {}", visible.describe(shards.len()));
    }
    match Shapes::check(args, worker) {
        Shapes::Fit(lines) => text.extend(lines.lines().map(|line| format!("  {line}\n"))),
        Shapes::Refused(problem) => return Err(format!("{}: {problem}", path.display())),
        Shapes::NotChecked(reason) => {
            for (name, model) in [("model", &job.model.path), ("student", &job.student.path)] {
                let seen = if model.exists() { "is here" } else { "is not visible from this machine: the workers must see it" };
                let _ = writeln!(text, "  {name} {} {seen}", model.display());
            }
            let _ = writeln!(text, "  shapes were not checked: {reason}");
        }
    }
    Ok(text)
}

/// What the worker program says of a job's models.
enum Shapes {
    /// They fit, as far as they are visible from here; a description of them.
    Fit(String),
    /// Something does not fit.
    Refused(String),
    /// Nobody looked.
    NotChecked(String),
}

/// Exit code of a worker that has found something wrong.
const REFUSED: i32 = 2;

impl Shapes {
    fn check(job: &JobArgs, worker: &Path) -> Self {
        let output = match Command::new(worker).args(["check", "--partial"]).args(job.to_arguments()).output() {
            Ok(output) => output,
            Err(error) => return Self::NotChecked(format!("cannot run {}: {error}", worker.display())),
        };
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim_end().to_owned();
        let said = text(&output.stderr);
        match output.status.code() {
            Some(0) => Self::Fit(text(&output.stdout)),
            Some(REFUSED) => Self::Refused(said.strip_prefix("worker: ").unwrap_or(&said).to_owned()),
            // One that cannot start here, without libtorch say, is no judge of the job.
            _ => {
                Self::NotChecked(format!("{} ended with {}: {}", worker.display(), output.status, said.lines().last().unwrap_or_default()))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job(folder: &Path, shards: &str) -> JobArgs {
        let path = folder.join("job.toml");
        let text =
            format!("[model]\npath=\"m\"\n[student]\npath=\"s\"\n[data]\nshards=[\"{}/{shards}\"]\n[train]\nsteps=1\n", folder.display());
        std::fs::write(&path, text).unwrap();
        path.into()
    }

    /// A worker program that says this and ends with this code.
    fn worker(folder: &Path, script: &str) -> std::path::PathBuf {
        use std::os::unix::fs::PermissionsExt;
        let path = folder.join("worker");
        std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    #[test]
    fn the_worker_beside_it_judges_the_models() {
        let folder = tempfile::tempdir().unwrap();
        let path = job(folder.path(), "00.tar");
        let fit = worker(folder.path(), "echo \"model m: $1 $2 $3\"");
        assert!(report(&path, &fit).unwrap().contains("\n  model m: check --partial --job\n"));
        let all = worker(folder.path(), "shift 4; echo \"$*\"");
        let changed = JobArgs { set: vec!["train.steps=7".parse().unwrap()], ..path.clone() };
        let said = report(&changed, &all).unwrap();
        assert!(said.contains("\n  7 steps, ") && said.contains("\n  --set train.steps=7\n"), "{said}");
        assert!(said.contains("\n  train.warmup_steps (100) leaves none of 7 steps"), "{said}");
        let refuse = worker(folder.path(), "echo 'worker: model.path: conv_in.weight' >&2; exit 2");
        let error = report(&path, &refuse).unwrap_err();
        assert!(error.ends_with("job.toml: model.path: conv_in.weight"), "{error}");
        let broken = worker(folder.path(), "echo 'libtorch_cpu.so: cannot open' >&2; exit 127");
        let said = report(&path, &broken).unwrap();
        assert!(
            said.contains("model m is not visible") && said.contains("shapes were not checked: ") && said.contains("libtorch_cpu.so"),
            "{said}"
        );
        assert!(report(&path, &folder.path().join("nobody")).unwrap().contains("shapes were not checked: cannot run "));
    }

    #[test]
    fn missing_shards_are_named_where_others_are_seen() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("00.tar"), b"x").unwrap();
        let path = job(folder.path(), "{00..07}.tar");
        let error = report(&path, Path::new("nobody")).unwrap_err();
        let error = error.split_once("job.toml: ").unwrap().1;
        assert!(error.starts_with("7 of 8 shards do not exist") && error.contains("01.tar") && error.contains("and 2 more"), "{error}");
    }

    #[test]
    fn a_machine_without_the_data_cannot_judge_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = job(folder.path(), "{00..07}.tar");
        assert!(report(&path, Path::new("nobody")).unwrap().contains("none of them visible"));
        assert!(load(&path).unwrap().visible.judge(true).is_err(), "unless the workers run here too");
    }

    /// A job with this added to it, in a folder with the shards 00 to 03.
    fn with(folder: &Path, more: &str) -> JobArgs {
        (0..4).for_each(|shard| std::fs::write(folder.join(format!("{shard:02}.tar")), b"x").unwrap());
        let path = job(folder, "{00..02}.tar");
        let text = std::fs::read_to_string(&path.job).unwrap();
        std::fs::write(&path.job, text + &more.replace("DIR", &folder.display().to_string())).unwrap();
        path
    }

    #[test]
    fn validation_shards_are_looked_at_before_any_worker_does() {
        let said = |more: &str| {
            let folder = tempfile::tempdir().unwrap();
            report(&with(folder.path(), more), Path::new("nobody"))
        };
        let text = said("[validation]\nshards = [\"DIR/03.tar\"]").unwrap();
        assert!(text.contains("\n  validation: 1 shard, 0.0 MB\n") && !text.contains("trained on too"), "{text}");
        let error = said("[validation]\nshards = [\"DIR/{03..04}.tar\"]").unwrap_err();
        assert!(error.contains("job.toml: validation.shards: 1 of 2 shards do not exist:") && error.contains("04.tar"), "{error}");
        let text = said("[validation]\nshards = [\"DIR/{02..03}.tar\"]").unwrap();
        assert!(text.contains("validation.shards: 1 of 2 are trained on too, such as ") && text.contains("02.tar"), "{text}");
        // Workers may see what this machine does not.
        let text = said("[validation]\nshards = [\"/nowhere/*.tar\"]").unwrap();
        assert!(text.contains("`/nowhere/*.tar` matches no file, as seen from this machine"), "{text}");
        let folder = tempfile::tempdir().unwrap();
        let loaded = load(&with(folder.path(), "[validation]\nshards = [\"/nowhere/*.tar\"]")).unwrap();
        assert!(loaded.judge(true).unwrap_err().starts_with("validation.shards: "), "unless they run on it");
    }

    #[test]
    fn shards_that_are_listed_twice_are_told() {
        let folder = tempfile::tempdir().unwrap();
        let path = with(folder.path(), "");
        let text = std::fs::read_to_string(&path.job).unwrap().replace("{00..02}.tar", "{00,01,00}.tar");
        std::fs::write(&path.job, text).unwrap();
        let odd = load(&path).unwrap().oddities();
        assert!(odd.iter().any(|odd| odd.starts_with("data.shards names 1 shard twice, such as ")), "{odd:?}");
    }

    #[test]
    fn file_is_no_store() {
        let folder = tempfile::tempdir().unwrap();
        let path = with(folder.path(), "[checkpoint]\nstore = \"DIR/00.tar\"");
        let error = report(&path, Path::new("nobody")).unwrap_err();
        assert!(error.contains("checkpoint.store: ") && error.contains("00.tar is a file"), "{error}");
    }

    #[test]
    fn list_without_a_shard_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("list.txt"), "# nothing yet\n").unwrap();
        let path = job(folder.path(), "00.tar");
        let text = std::fs::read_to_string(&path.job)
            .unwrap()
            .replace(&format!("{}/00.tar", folder.path().display()), &format!("@{}/list.txt", folder.path().display()));
        std::fs::write(&path.job, text).unwrap();
        assert!(load(&path).unwrap_err().ends_with("data.shards: no shard is named by its lists"));
    }

    #[test]
    fn missing_job_file_says_how_to_get_one() {
        assert!(load(&std::path::PathBuf::from("nowhere/job.toml").into()).unwrap_err().contains("coordinator init"));
    }
}
