//! A job with its folder, and the processes that run it.

use std::collections::BTreeMap;
use std::ops::{Deref, DerefMut};
use std::path::{Path, PathBuf};

use serde::Deserialize;
use tempfile::TempDir;

use super::{Checkpoint, JobFile, Process, RawSample, demo_samples, poll, tar_of};

/// A folder with a job and all that comes of it. Declare it before the processes that use it: it is deleted on drop.
#[derive(Debug)]
pub struct Cluster {
    folder: TempDir,
    /// The job, written down when a coordinator is started.
    pub job: JobFile,
}

/// A sample in a final step, as `--sample-log` writes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct TrainedSample {
    /// The step it was trained in.
    pub step: u64,
    /// The pass over the data.
    pub epoch: u32,
    /// The shard.
    pub shard: u32,
    /// Its place in the shard.
    pub index: u32,
}

/// A final step, as steps.jsonl holds it.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct StepLine {
    /// The step.
    pub step: u64,
    /// Number of its samples.
    pub samples: u64,
    /// Those with a native caption.
    pub native: u64,
    /// Mean diffusion loss.
    pub task: f64,
    /// Mean distance of the predictions.
    pub logit: f64,
    /// Mean distance of the features.
    pub feature: f64,
}

impl Default for Cluster {
    fn default() -> Self {
        Self::new()
    }
}

impl Cluster {
    /// A cluster with the harness's default job: four steps on the demo's shards.
    ///
    /// # Panics
    /// If no folder can be made.
    #[must_use]
    pub fn new() -> Self {
        Self { folder: tempfile::tempdir().expect("a temporary folder"), job: JobFile::default() }
    }

    /// The folder.
    #[must_use]
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Replaces the job's data: shards of these sizes with samples of the demo, every one different, passed over once.
    pub fn deal_samples(&mut self, sizes: &[usize]) {
        let mut samples = demo_samples(sizes.iter().sum()).into_iter();
        let tars: Vec<Vec<u8>> = sizes.iter().map(|&size| tar_of(&samples.by_ref().take(size).collect::<Vec<RawSample>>())).collect();
        self.deal_tars(&tars);
    }

    /// Replaces the job's data: these tars, passed over once.
    ///
    /// # Panics
    /// If they cannot be written.
    pub fn deal_tars(&mut self, tars: &[Vec<u8>]) {
        let folder = self.folder().join("shards");
        std::fs::create_dir_all(&folder).expect("a folder");
        for (number, tar) in tars.iter().enumerate() {
            std::fs::write(folder.join(format!("{number:05}.tar")), tar).expect("a shard");
        }
        let pattern = format!("{}/{{00000..{:05}}}.tar", folder.display(), tars.len() - 1);
        self.job.set("data.shards", vec![pattern]).set_epochs(1);
    }

    /// The coordinator's `--state-dir`.
    #[must_use]
    pub fn state_dir(&self) -> PathBuf {
        self.folder().join("state")
    }

    /// Starts a coordinator for the job and this many workers. Each call goes on with the same state folder and logs.
    ///
    /// # Panics
    /// If it cannot be started.
    #[must_use]
    pub fn coordinator(&self, world_size: u32, arguments: &[&str]) -> Coordinator {
        let job = self.folder().join("job.toml");
        std::fs::write(&job, self.job.to_string()).expect("a job file");
        let (state, log) = (self.state_dir(), self.sample_log_path());
        let [job, state, log] = [&job, &state, &log].map(|path| path.to_str().expect("a path in UTF-8"));
        let world = world_size.to_string();
        let mut all = vec!["--world-size", &world, "--job", job, "--state-dir", state, "--sample-log", log];
        if !arguments.contains(&"--listen") {
            all.extend(["--listen", "127.0.0.1:0"]);
        }
        if !arguments.contains(&"--http-addr") {
            all.extend(["--http-addr", "127.0.0.1:0"]);
        }
        all.extend(arguments);
        let process = Process::start("coordinator", "coordinator", &all);
        Coordinator { process, world_size, steps: self.state_dir().join("steps.jsonl") }
    }

    /// Writes the job file, and gives the arguments of a coordinator that trains it with one worker of its own and serves no page: for
    /// stories about the program rather than the job.
    ///
    /// # Panics
    /// If the file cannot be written.
    #[must_use]
    pub fn local_arguments(&self) -> Vec<String> {
        let job = self.folder().join("job.toml");
        std::fs::write(&job, self.job.to_string()).expect("a job file");
        let [job, state] = [job, self.state_dir()].map(|path| path.to_str().expect("a path in UTF-8").to_owned());
        let arguments = ["--world-size", "1", "--local", "--http-addr", "off", "--job", &job, "--state-dir", &state];
        arguments.map(str::to_owned).to_vec()
    }

    fn sample_log_path(&self) -> PathBuf {
        self.folder().join("samples.tsv")
    }

    /// All samples of final steps, in the order in which those became final.
    ///
    /// # Panics
    /// If the log cannot be read.
    #[must_use]
    pub fn trained_samples(&self) -> Vec<TrainedSample> {
        let log = std::fs::read_to_string(self.sample_log_path()).expect("the sample log");
        let sample = |line: &str| {
            let numbers: Vec<u32> = line.split('\t').map(|number| number.parse().expect("a number")).collect();
            let [step, epoch, shard, index] = numbers[..] else { panic!("a line of the sample log: {line}") };
            TrainedSample { step: step.into(), epoch, shard, index }
        };
        log.lines().map(sample).collect()
    }

    /// All final steps in order.
    #[must_use]
    pub fn steps(&self) -> Vec<StepLine> {
        read_steps(&self.state_dir().join("steps.jsonl"))
    }

    /// Where the checkpoint of a step lies, or will.
    #[must_use]
    pub fn checkpoint_folder(&self, step: u64, generation: u64) -> PathBuf {
        self.state_dir().join(format!("checkpoints/step-{step:09}-g{generation:06}"))
    }

    /// All whole checkpoints, oldest first.
    ///
    /// # Panics
    /// If the store cannot be read or a checkpoint is damaged.
    #[must_use]
    pub fn checkpoints(&self) -> Vec<Checkpoint> {
        let entries = std::fs::read_dir(self.state_dir().join("checkpoints")).expect("a store");
        let mut folders: Vec<PathBuf> = entries.map(|entry| entry.expect("an entry").path()).collect();
        folders.sort();
        folders.iter().filter_map(|folder| Checkpoint::open(folder)).collect()
    }

    /// The newest whole checkpoint.
    ///
    /// # Panics
    /// If there is none.
    #[must_use]
    pub fn newest_checkpoint(&self) -> Checkpoint {
        self.checkpoints().pop().expect("a checkpoint")
    }
}

/// Reads the whole lines of a steps.jsonl.
fn read_steps(path: &Path) -> Vec<StepLine> {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let whole = &text[..text.rfind('\n').map_or(0, |end| end + 1)];
    whole.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{line}: {error}"))).collect()
}

/// Fails unless each sample of shards of these sizes was trained exactly once in one epoch, and no other was.
///
/// # Panics
/// Naming the samples and how often they were trained.
#[track_caller]
pub fn assert_trained_once(trained: &[TrainedSample], sizes: &[usize]) {
    assert_epochs_trained_once(trained, sizes, 1);
}

/// The same of so many epochs: each sample once in each of them.
///
/// # Panics
/// As [`assert_trained_once`].
#[track_caller]
pub fn assert_epochs_trained_once(trained: &[TrainedSample], sizes: &[usize], epochs: u32) {
    let mut counts: BTreeMap<(u32, u32, u32), usize> = BTreeMap::new();
    for epoch in 0..epochs {
        for (shard, &size) in sizes.iter().enumerate() {
            counts.extend((0..size as u32).map(|index| ((epoch, shard as u32, index), 0)));
        }
    }
    for sample in trained {
        *counts.entry((sample.epoch, sample.shard, sample.index)).or_default() += 1;
    }
    let num_samples = sizes.iter().sum::<usize>() * epochs as usize;
    let wrong: Vec<_> = counts.iter().filter(|(_, count)| **count != 1).collect();
    assert!(
        wrong.is_empty() && counts.len() == num_samples,
        "not every one of {num_samples} samples was trained exactly once; ((epoch, shard, index), times): {wrong:?}"
    );
}

/// A running coordinator.
#[derive(Debug)]
pub struct Coordinator {
    process: Process,
    world_size: u32,
    steps: PathBuf,
}

impl Deref for Coordinator {
    type Target = Process;

    fn deref(&self) -> &Process {
        &self.process
    }
}

impl DerefMut for Coordinator {
    fn deref_mut(&mut self) -> &mut Process {
        &mut self.process
    }
}

impl Coordinator {
    /// Its address, as soon as it listens.
    ///
    /// # Panics
    /// If it does not come to that.
    #[must_use]
    pub fn url(&self) -> String {
        let line = self.wait_for("listening on http");
        let (_, url) = line.split_once("listening on ").expect("an address");
        url.trim().to_owned()
    }

    /// Starts a worker that joins it, with more arguments, under a name for messages.
    ///
    /// It gets the threads that it would have with `--local`, so that it computes the same to the last bit.
    #[must_use]
    pub fn worker(&self, name: &str, arguments: &[&str]) -> Process {
        self.worker_with(name, arguments, &[])
    }

    /// As [`Coordinator::worker`], with variables in its environment.
    #[must_use]
    pub fn worker_with(&self, name: &str, arguments: &[&str], environment: &[(&str, String)]) -> Process {
        let url = self.url();
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let threads = (cores / self.world_size as usize).max(1).to_string();
        let mut all = vec!["--coordinator", &url, "--threads", &threads];
        all.extend(arguments);
        Process::start_with(name, "worker", &all, environment)
    }

    /// Starts a worker that asks for a rank.
    #[must_use]
    pub fn worker_of_rank(&self, rank: u32) -> Process {
        self.worker(&format!("worker of rank {rank}"), &["--rank", &rank.to_string()])
    }

    /// Talks to it: `status`, `stop`, `drain RANK`.
    #[must_use]
    pub fn control(&self, arguments: &[&str]) -> Process {
        let url = self.url();
        let mut all = arguments.to_vec();
        all.extend(["--coordinator", &url]);
        Process::start(&format!("coordinator {}", arguments.join(" ")), "coordinator", &all)
    }

    /// Waits until a step of this number or a later one is final.
    ///
    /// # Panics
    /// If the coordinator ends before, or does not come to it.
    pub fn wait_for_step(&mut self, step: u64) {
        let steps = self.steps.clone();
        let reached = || read_steps(&steps).last().is_some_and(|last| last.step >= step);
        poll(&format!("step {step}"), || {
            let is_running = self.process.is_running();
            // The file is looked at after the process: a last step may have become final between.
            let reached = reached();
            assert!(reached || is_running, "the coordinator ended before step {step}");
            reached.then_some(())
        });
    }

    /// The process id of the worker that joined last under a rank.
    ///
    /// # Panics
    /// If none did.
    #[must_use]
    pub fn pid_of_rank(&self, rank: u32) -> u32 {
        let start = format!("rank {rank} (pid ");
        let joined = self.lines_with(" joined, ");
        let line = joined.iter().rfind(|line| line.contains(&start)).unwrap_or_else(|| panic!("rank {rank} has not joined"));
        let (_, rest) = line.split_once(&start).expect("a pid");
        rest.split(' ').next().and_then(|pid| pid.parse().ok()).expect("a number")
    }
}
