//! A job file on the command line, with what is set otherwise beside it.

use std::path::{Path, PathBuf};
use std::str::FromStr;

use toml::{Table, Value};

use super::{Job, JobError};

/// Which job.
#[derive(Debug, Clone, PartialEq, clap::Args)]
pub struct JobArgs {
    /// Job file
    #[arg(long, default_value = "job.toml")]
    pub job: PathBuf,
    /// Sets a key of the job file for this once, such as train.learning_rate=1e-4; with nothing behind `=` leaves it out. May be given
    /// several times
    #[arg(long, value_name = "KEY=VALUE")]
    pub set: Vec<Setting>,
}

/// Which job, if any.
#[derive(Debug, Clone, Default, PartialEq, clap::Args)]
pub struct OptionalJobArgs {
    /// Job file
    #[arg(long)]
    pub job: Option<PathBuf>,
    /// Sets a key of the job file for this once, such as model.path=ORG/NAME; with nothing behind `=` leaves it out. May be given several
    /// times
    #[arg(long, value_name = "KEY=VALUE", requires = "job")]
    pub set: Vec<Setting>,
}

impl OptionalJobArgs {
    /// The job that is named.
    #[must_use]
    pub fn job(&self) -> Option<JobArgs> {
        Some(JobArgs { job: self.job.clone()?, set: self.set.clone() })
    }
}

/// A job file that was read.
#[derive(Debug, Clone, PartialEq)]
pub struct JobFile {
    /// What it says.
    pub job: Job,
    /// Its text: the file's, or, where something was set otherwise, one that says the same.
    pub text: String,
}

/// A key of a job file and its value.
#[derive(Debug, Clone, PartialEq)]
pub struct Setting {
    key: Vec<String>,
    value: Option<Value>,
    text: String,
}

impl FromStr for Setting {
    type Err = String;

    /// The value is read as TOML, and what is none is a text: a path need not be quoted.
    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is no KEY=VALUE, such as train.learning_rate=1e-4");
        let (key, value) = text.split_once('=').ok_or_else(wrong)?;
        let key: Vec<String> = key.trim().split('.').map(str::to_owned).collect();
        if key.iter().any(String::is_empty) {
            return Err(wrong());
        }
        let read = |value: &str| toml::from_str::<Table>(&format!("value = {value}")).ok().filter(|read| read.len() == 1)?.remove("value");
        let value = Some(value.trim()).filter(|value| !value.is_empty());
        let value = value.map(|value| read(value).unwrap_or_else(|| value.into()));
        Ok(Self { key, value, text: text.to_owned() })
    }
}

impl Setting {
    /// As it was given.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.text
    }

    fn apply(&self, job: &mut Table) -> Result<(), String> {
        let Some((name, sections)) = self.key.split_last() else { return Ok(()) };
        let mut table = job;
        for section in sections {
            table = table
                .entry(section)
                .or_insert_with(|| Table::new().into())
                .as_table_mut()
                .ok_or_else(|| format!("--set {}: {section} is no section", self.text))?;
        }
        match &self.value {
            Some(value) => table.insert(name.clone(), value.clone()),
            None => match table.remove(name) {
                None => return Err(format!("--set {}: the job file does not have it", self.text)),
                removed => removed,
            },
        };
        Ok(())
    }
}

impl From<PathBuf> for JobArgs {
    fn from(job: PathBuf) -> Self {
        Self { job, set: Vec::new() }
    }
}

impl JobArgs {
    /// Reads and checks the job.
    ///
    /// # Errors
    /// A line for each thing that is wrong with it, with the file's path.
    pub fn read(&self) -> Result<JobFile, String> {
        let path = &self.job;
        let mut text = std::fs::read_to_string(path).map_err(|error| {
            let hint = if error.kind() == std::io::ErrorKind::NotFound { "; `coordinator init` writes one to start from" } else { "" };
            format!("cannot read job file {}: {error}{hint}", path.display())
        })?;
        if !self.set.is_empty() {
            let mut table: Table = toml::from_str(&text).map_err(|error| named(path, &JobError::from_toml(&text, &error)))?;
            for setting in &self.set {
                setting.apply(&mut table)?;
            }
            text = toml::to_string(&table).map_err(|error| format!("--set: {error}"))?;
        }
        let job = Job::parse(&text).map_err(|mut error| {
            if !self.set.is_empty() {
                error.problems.iter_mut().for_each(|problem| *problem = without_line(problem).to_owned());
            }
            named(path, &error)
        })?;
        Ok(JobFile { job, text })
    }

    /// The arguments that name the same job.
    pub fn to_arguments(&self) -> impl Iterator<Item = std::ffi::OsString> {
        let set = self.set.iter().flat_map(|setting| ["--set", setting.as_str()]).map(Into::into);
        ["--job".into(), self.job.clone().into_os_string()].into_iter().chain(set)
    }
}

fn named(path: &Path, error: &JobError) -> String {
    let lines: Vec<String> = error.problems.iter().map(|problem| format!("{}: {problem}", path.display())).collect();
    lines.join("\n")
}

/// The lines of a text that nobody has written say nothing.
fn without_line(problem: &str) -> &str {
    match problem.strip_prefix("line ").and_then(|rest| rest.split_once(": ")) {
        Some((number, rest)) if number.bytes().all(|digit| digit.is_ascii_digit()) => rest,
        _ => problem,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str =
        "# mine\n[model]\npath = \"m\"\n[student]\npath = \"s\"\n[data]\nshards = [\"a.tar\"]\n[train]\nepochs = 2\ndecay = \"constant\"\n";

    fn read(set: &[&str]) -> Result<JobFile, String> {
        let folder = tempfile::tempdir().unwrap();
        let job = folder.path().join("job.toml");
        std::fs::write(&job, TEXT).unwrap();
        let set = set.iter().map(|text| text.parse()).collect::<Result<_, _>>()?;
        JobArgs { job: job.clone(), set }.read().map_err(|error| error.replace(job.to_str().unwrap(), "job.toml"))
    }

    #[test]
    fn keys_are_set_added_and_left_out_and_the_text_says_the_same() {
        assert_eq!(read(&[]).unwrap().text, TEXT);
        let file = read(&[
            "train.learning_rate=1e-4",
            "train.epochs=",
            "train.steps = 30",
            "model.path=org/name",
            "data.shards=[\"b.tar\", \"c.tar\"]",
            "checkpoint.every_steps=5",
            "name=a=b",
        ])
        .unwrap();
        let Job { name, train, model, data, checkpoint, .. } = &file.job;
        assert_eq!((train.learning_rate, train.epochs, train.steps, name.as_str()), (1e-4, None, Some(30), "a=b"));
        assert_eq!(
            (model.path.to_str(), &data.shards[..], checkpoint.every_steps),
            (Some("org/name"), &["b.tar".into(), "c.tar".into()][..], 5)
        );
        assert_eq!(Job::parse(&file.text).unwrap(), file.job);
    }

    #[test]
    fn refusals_name_the_key_and_no_line_of_a_text_that_nobody_wrote() {
        assert_eq!(read(&["train.steps"]).unwrap_err(), "\"train.steps\" is no KEY=VALUE, such as train.learning_rate=1e-4");
        assert_eq!(read(&[".steps=1"]).unwrap_err(), "\".steps=1\" is no KEY=VALUE, such as train.learning_rate=1e-4");
        assert_eq!(read(&["train.stepz="]).unwrap_err(), "--set train.stepz=: the job file does not have it");
        assert_eq!(read(&["model.path.x=1"]).unwrap_err(), "--set model.path.x=1: path is no section");
        assert_eq!(read(&["train.learning_rat=1"]).unwrap_err(), "job.toml: unknown key `learning_rat`, did you mean `learning_rate`?");
        assert_eq!(read(&["train.steps=3"]).unwrap_err(), "job.toml: give exactly one of train.steps or train.epochs");
        let error = read(&["train.micro_batch=many"]).unwrap_err();
        assert_eq!(error, "job.toml: train.micro_batch: a whole number is needed, such as 1000, not \"many\"");
    }

    #[test]
    fn arguments_name_the_same_job_again() {
        let args = JobArgs { job: "a.toml".into(), set: vec!["seed=1".parse().unwrap()] };
        assert_eq!(args.to_arguments().collect::<Vec<_>>(), ["--job", "a.toml", "--set", "seed=1"]);
    }
}
