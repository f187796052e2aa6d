//! Reading a job file and its shard list, before anything starts.

use std::fmt::Write as _;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use peapod_data::{Seen, SourceOptions, Sources};
use peapod_proto::ids::SampleName;
use peapod_proto::job::{Job, JobArgs, JobFile};

use crate::store::Store;

use crate::core::order::Source;

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
}

/// What this machine sees of the shards.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Visibility {
    /// Shards found here.
    pub found: usize,
    /// Their size.
    pub num_bytes: u64,
    /// Shards not found here.
    pub missing: Vec<String>,
    /// Shards of which a store does not say from here whether they exist.
    pub unknown: usize,
    /// The first of those, and why.
    pub why_unknown: Option<String>,
    /// Shards that were not looked at, because they are many and far away.
    pub not_asked: usize,
}

/// Most shards behind a network that are asked for before a job: every one costs a request.
const MAX_ASKED: usize = 1000;

/// What is wrong with a list that is empty, or has comments only.
const NO_SHARDS: &str = "no shard is named by its lists";

/// Shards named in an error before the rest is counted.
const MISSING_SHOWN: usize = 5;

/// Reads and validates a job file and expands its shard list.
///
/// # Errors
/// One line for each thing that is wrong, with the file's name.
pub fn load(args: &JobArgs) -> Result<LoadedJob, String> {
    let JobFile { job, text: toml } = args.read()?;
    let path = &args.job;
    let (shards, sources) = expand(&job).map_err(|error| format!("{}: {error}", path.display()))?;
    let visible = look(&shards);
    Ok(LoadedJob { job, toml, shards: shards.into(), sources: sources.into(), visible })
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

fn look(shards: &[String]) -> Visibility {
    let is_far = |shard: &str| shard.contains("://") && !shard.starts_with("file://");
    let num_far = shards.iter().filter(|shard| is_far(shard)).count();
    // Spread over all of them: lists end too early, or one host of several is down.
    let every = num_far.div_ceil(MAX_ASKED).max(1);
    let mut far = 0..;
    let asked: Vec<String> =
        shards.iter().filter(|shard| !is_far(shard) || far.next().is_some_and(|at: usize| at.is_multiple_of(every))).cloned().collect();
    let mut visible = Visibility { not_asked: shards.len() - asked.len(), ..Visibility::default() };
    for (shard, seen) in asked.iter().zip(Sources::new(SourceOptions::impatient()).look(&asked)) {
        match seen {
            Seen::Bytes(len) => {
                visible.found += 1;
                visible.num_bytes += len;
            }
            Seen::Missing => visible.missing.push(shard.clone()),
            Seen::Unknown(why) => {
                visible.unknown += 1;
                visible.why_unknown.get_or_insert_with(|| format!("{shard}: {why}"));
            }
        }
    }
    visible
}

impl Visibility {
    /// What is wrong with the shard list as far as this machine can tell; `here` if the workers run on it too.
    ///
    /// A coordinator may run where no data is mounted: if it sees none of the shards it cannot judge them. If it sees some,
    /// the others are missing.
    ///
    /// # Errors
    /// Names the first missing shards.
    pub fn judge(&self, here: bool) -> Result<(), String> {
        // A store's answer is the same everywhere.
        let is_local = |shard: &String| !shard.contains("://") || shard.starts_with("file://");
        if self.missing.is_empty() || (self.found == 0 && !here && self.missing.iter().all(is_local)) {
            return Ok(());
        }
        let mut text = format!("{} of {} shards do not exist:", self.missing.len(), self.missing.len() + self.found);
        for shard in self.missing.iter().take(MISSING_SHOWN) {
            let _ = write!(text, "\n  {shard}");
        }
        if self.missing.len() > MISSING_SHOWN {
            let _ = write!(text, "\n  and {} more", self.missing.len() - MISSING_SHOWN);
        }
        Err(text)
    }
}

impl Visibility {
    /// The shard list in a line, with what could not be seen of it.
    #[must_use]
    pub fn describe(&self, num_shards: usize) -> String {
        let mut text = format!("{num_shards} shards");
        if self.found > 0 {
            let about = if self.not_asked > 0 { format!("{} of them looked at, ", self.found) } else { String::new() };
            let _ = write!(text, ", {about}{:.1} MB", self.num_bytes as f64 / 1e6);
        } else if self.unknown == 0 {
            text.push_str(", none of them visible from this machine: the workers must see them");
        }
        if let Some(why) = &self.why_unknown {
            let _ = write!(text, "; {} cannot be looked at from this machine, such as {why}", self.unknown);
        }
        text
    }
}

/// What `coordinator check` prints. The models are looked at by `worker`, the program that can read them.
///
/// # Errors
/// As [`load`], for shards that are missing, and with the worker's words for models that do not fit.
pub fn report(args: &JobArgs, worker: &Path) -> Result<String, String> {
    let LoadedJob { job, shards, sources, visible, .. } = load(args)?;
    let path = &args.job;
    visible.judge(false)?;
    if let Some(store) = job.checkpoint.store.as_ref().filter(|store| store.contains("://")) {
        // Nobody is asked for anything.
        Store::at(store).map_err(|error| format!("{}: {error}", path.display()))?;
    }
    let mut text = format!("{} is a valid job: {}\n", path.display(), job.name);
    let length = match (job.train.steps, job.train.epochs) {
        (Some(steps), _) => format!("{steps} steps"),
        (_, Some(epochs)) => format!("{epochs} epochs"),
        _ => String::new(),
    };
    let _ = writeln!(text, "  {length}, {} samples a step, in parts of {}", job.train.global_batch, job.train.micro_batch);
    for oddity in job.oddities() {
        let _ = writeln!(text, "  {oddity}");
    }
    let _ = writeln!(text, "  {}", visible.describe(shards.len()));
    for Source { name, num_shards, weight } in sources.iter().filter(|source| !source.name.is_empty()) {
        let _ = writeln!(text, "    {name}: {num_shards} shards, weight {weight}");
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
        assert!(error.starts_with("7 of 8 shards do not exist") && error.contains("01.tar") && error.contains("and 2 more"), "{error}");
    }

    #[test]
    fn a_machine_without_the_data_cannot_judge_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = job(folder.path(), "{00..07}.tar");
        assert!(report(&path, Path::new("nobody")).unwrap().contains("none of them visible"));
        assert!(load(&path).unwrap().visible.judge(true).is_err(), "unless the workers run here too");
    }

    #[test]
    fn shards_behind_a_network_are_looked_at_too() {
        // Nobody listens at this port.
        let seen = look(&["http://127.0.0.1:1/{00}.tar".to_owned()]);
        assert_eq!((seen.found, seen.missing.len(), seen.unknown), (0, 0, 1));
        assert!(seen.judge(true).is_ok());
        let line = seen.describe(1);
        assert!(line.starts_with("1 shards; 1 cannot be looked at from this machine, such as http://127.0.0.1:1/"), "{line}");
        let missing = Visibility { missing: vec!["http://host/0.tar".into()], ..Visibility::default() };
        assert!(missing.judge(false).is_err(), "a server's answer is the same everywhere");
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
