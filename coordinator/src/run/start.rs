//! What a run begins from: the job file, the newest checkpoint, and the journal of a coordinator before this one.

use std::fmt;
use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use peapod_proto::ids::{Generation, Step};
use peapod_proto::job::Job;

use super::Exit;
use crate::check::{self, LoadedJob};
use crate::config::RunArgs;
use crate::core::{Config, Core, Resume};
use crate::journal::{Disk, Found, JOURNAL, Run};
use crate::shard_list::{self, ShardList};
use crate::store::{Store, StoreError, sha256};

/// A worker's own deadlines come first by this much.
const MARGIN: Duration = Duration::from_secs(10);
/// Everything that was there before the run, and the core that goes on from it.
pub(super) struct Start {
    pub job: Job,
    pub run: Run,
    pub num_shards: usize,
    /// Its shards, as its checkpoints remember them.
    pub lists: Vec<ShardList>,
    pub store: Store,
    /// Its newest checkpoint, which the job goes on from unless workers hold more.
    pub stored: Option<(Step, Generation)>,
    pub journal: Disk,
    pub core: Core,
    /// Whether a run or a checkpoint was there before.
    pub goes_back: bool,
    /// Whether the job has come to its end before: there is nothing to train.
    pub is_finished: bool,
    /// Of the state folder.
    pub _lock: File,
}

impl Start {
    /// Looks at everything that is named and kept. `Err` within says how the run ends before it has begun.
    pub async fn find(args: &RunArgs) -> anyhow::Result<Result<Self, Exit>> {
        let loaded = match load(args) {
            Ok(loaded) => loaded,
            Err(problem) => return Ok(Err(Exit::Refused(problem))),
        };
        let LoadedJob { ref job, ref toml, ref shards, ref sources, .. } = loaded;
        let lists = ShardList::of(shards, sources);
        let _lock = match lock(&args.state_dir)? {
            Ok(lock) => lock,
            Err(problem) => return Ok(Err(Exit::Refused(problem))),
        };
        let store = match &job.checkpoint.store {
            Some(address) => Store::at(address),
            None => Store::local(&args.state_dir.join("checkpoints")),
        };
        let store = match store {
            Ok(store) => store,
            Err(error @ StoreError::Address(_)) => return Ok(Err(Exit::Refused(error.to_string()))),
            Err(error) => return Ok(Err(Exit::Failed(error.to_string()))),
        };
        let resume = match resume(&store, job, &lists).await? {
            Ok(resume) => resume,
            Err(problem) => return Ok(Err(Exit::Refused(problem))),
        };
        let journal_path = args.state_dir.join(JOURNAL);
        let (journal, found) = match Disk::open(&journal_path) {
            Ok(opened) => opened,
            Err(error) => return Ok(Err(Exit::Failed(error.to_string()))),
        };
        let missing = found.as_ref().and_then(|found| Missing::find(found, resume.as_ref(), &store));
        let last_generation = found.as_ref().map_or(Generation::NONE, |found| found.state.generation());
        // A run that has come to its end is in its checkpoint.
        let found = found.filter(|found| found.state.outcome().is_none());
        if let Some(problem) = found.as_ref().and_then(|found| of_another_job(found, job, &journal_path)) {
            return Ok(Err(Exit::Refused(problem)));
        }
        let goes_back = found.is_some() || resume.is_some();

        let stored = resume.as_ref().map(|resume| (resume.step, resume.generation));
        let step = stored.map_or(Step(0), |(step, _)| step);
        let shards_digest = hex::encode(sha256(shards.join("\n").as_bytes()));
        let run = Run { job_id: String::new(), term: 1, world_size: args.world_size, job: toml.clone(), shards: shards_digest };
        if let Some(problem) = found.as_ref().and_then(|found| of_other_shards(found, &run, resume.as_ref(), args.local, &journal_path)) {
            return Ok(Err(Exit::Refused(problem)));
        }
        let found = found.filter(|found| goes_on(found, &run, resume.as_ref(), args.local));
        if let Some(missing) = missing {
            // Workers that go on with what they hold need no checkpoint, and would be lost with another state folder.
            if found.is_none() && resume.is_none() {
                return Ok(Err(Exit::Refused(missing.refusal(&journal_path))));
            }
            tracing::warn!("{missing}{}", if found.is_none() { missing.cost() } else { String::new() });
        }
        let run = match &found {
            Some(found) => Run { job_id: found.run.job_id.clone(), term: found.run.term + 1, ..run },
            None => Run { job_id: format!("{:016x}", random()?), ..run },
        };
        let config = config(args, &loaded, &run.job_id);
        let fresh = Core::new(config.clone(), resume.clone()).after(last_generation);
        let is_finished = fresh.is_complete();
        if is_finished {
            say_finished(job, step, &store);
            if !args.stay {
                return Ok(Err(Exit::Finished));
            }
        }
        let core = match found {
            _ if is_finished => fresh.over(),
            Some(found) => go_on(config, resume, found, &run, &journal_path),
            None => {
                if let Some((step, generation)) = stored {
                    tracing::info!("resuming from {}", store.location(step, generation));
                }
                fresh
            }
        };
        let num_shards = shards.len();
        Ok(Ok(Self { job: loaded.job, run, num_shards, lists, store, stored, journal, core, goes_back, is_finished, _lock }))
    }
}

/// Reads the job file and looks for its shards.
fn load(args: &RunArgs) -> Result<LoadedJob, String> {
    args.validate()?;
    let loaded = check::load(&args.job)?;
    let LoadedJob { job, shards, visible, .. } = &loaded;
    loaded.judge(args.local).map_err(|problem| format!("{}: {problem}", args.job.job.display()))?;
    if visible.found == 0 || visible.unknown > 0 {
        tracing::warn!("{}", visible.describe(shards.len()));
    }
    let (batch, world) = (job.train.global_batch, args.world_size);
    if batch < world {
        return Err(format!("train.global_batch ({batch}) must be at least --world-size ({world}): every worker trains part of it"));
    }
    loaded.oddities().iter().for_each(|oddity| tracing::warn!("{}: {oddity}", args.job.job.display()));
    Ok(loaded)
}

/// What does not change while the coordinator runs.
fn config(args: &RunArgs, loaded: &LoadedJob, job_id: &str) -> Config {
    let LoadedJob { job, toml, shards, sources, .. } = loaded;
    Config {
        world_size: args.world_size,
        min_world_size: args.min_world_size(),
        heartbeat_timeout: args.heartbeat_timeout,
        join_timeout: args.join_timeout,
        // It gives up by itself when the store has failed for so long, after a last wait for an answer.
        data_patience: job.data.give_up_after + 2 * job.data.read_timeout + MARGIN,
        job_id: job_id.to_owned(),
        job_toml: toml.clone(),
        seed: job.seed,
        shards: shards.clone(),
        sources: sources.clone(),
        epochs: job.train.epochs,
        last_step: job.last_step().map(Step),
        workers_are_alike: args.local,
        global_batch: job.train.global_batch,
        scale_batch: job.train.scale_batch,
        checkpoint_every: job.checkpoint.every,
        max_bad_fraction: job.data.max_bad_fraction,
        max_skipped_steps: job.train.max_skipped_steps,
    }
}

fn say_finished(job: &Job, step: Step, store: &Store) {
    let (steps, epochs) = (job.last_step(), job.train.epochs);
    let goal = steps.map(|last| format!("train.steps is {last}")).or(epochs.map(|epochs| format!("train.epochs is {epochs}")));
    let goal = goal.unwrap_or_default();
    tracing::info!("the job is finished already: its checkpoint in {} is of step {step}, {goal}", store.root());
}

fn go_on(config: Config, resume: Option<Resume>, found: Found, run: &Run, journal: &Path) -> Core {
    let core = Core::restore(config, resume, found.state);
    let (path, step, term) = (journal.display(), core.final_step(), run.term);
    tracing::info!("going on with the run of {path}, start {term}: its workers hold step {step} or a later one");
    let (before, now) = (found.run.world_size, run.world_size);
    if before == now {
        return core;
    }
    tracing::info!("--world-size is {now} now, {before} before: its workers regroup with what they hold");
    core.resized()
}

/// A checkpoint that a run has stored, and that is not in the store any more.
struct Missing {
    step: Step,
    newest: Option<Step>,
    store: String,
}

impl Missing {
    fn find(found: &Found, resume: Option<&Resume>, store: &Store) -> Option<Self> {
        let newest = resume.map(|resume| resume.step);
        let step = found.state.checkpoint_step().filter(|&step| newest < Some(step))?;
        Some(Self { step, newest, store: store.root().to_owned() })
    }

    /// What it costs where no worker holds more.
    fn cost(&self) -> String {
        let steps = self.step.0 - self.newest.map_or(0, |step| step.0);
        format!(": {steps} steps or more are trained again")
    }

    fn refusal(&self, journal: &Path) -> String {
        let path = journal.display();
        format!("{self}: is it there, and mounted? To train from step 0 all the same, give another --state-dir, or move {path} away")
    }
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { step, newest, store } = self;
        write!(f, "the last run had stored a checkpoint of step {step}, and {store} holds ")?;
        match newest {
            Some(newest) => write!(f, "none after step {newest}"),
            None => f.write_str("none"),
        }
    }
}

/// Whether the workers of a run, if they live, go on with it. If not, says what that costs.
fn goes_on(found: &Found, run: &Run, resume: Option<&Resume>, local: bool) -> bool {
    let Some(why) = new_run(found, run, resume, local) else { return true };
    let step = resume.map_or(Step(0), |resume| resume.step);
    let lost = match found.state.final_step().0.saturating_sub(step.0) {
        0 => String::new(),
        steps => format!("; {steps} steps or more are trained again"),
    };
    tracing::warn!("{why}: its workers are sent away, and the job goes on from step {step}, where its newest checkpoint is{lost}");
    false
}

/// Why a journal must not be gone on with: it is of another job.
fn of_another_job(found: &Found, job: &Job, path: &Path) -> Option<String> {
    let before = match Job::parse(&found.run.job) {
        Ok(before) => before,
        Err(error) => return Some(format!("the job file kept in {} cannot be read: {error}", path.display())),
    };
    let differences = job.identity_differences(&before);
    let list: String =
        differences.iter().map(|difference| format!("\n  {}", difference.replace("in the checkpoint", "in the journal"))).collect();
    (!differences.is_empty()).then(|| {
        format!(
            "the journal {} belongs to another job:{list}\nTo go on with it, restore these; to start anew, give another --state-dir",
            path.display()
        )
    })
}

/// Why a journal must not be gone on with: what was trained in it is of other shards.
fn of_other_shards(found: &Found, run: &Run, resume: Option<&Resume>, local: bool, path: &Path) -> Option<String> {
    // Without a checkpoint only workers can hold anything, and those of `--local` are gone.
    let is_kept = resume.is_some() || (!local && found.state.final_step() > Step(0));
    (is_kept && found.run.shards != run.shards)
        .then(|| format!("the run in the journal {} has another list of shards. {}", path.display(), shard_list::RESTORE))
}

/// Why the workers of a run, if they live, cannot go on with it.
fn new_run(found: &Found, run: &Run, resume: Option<&Resume>, local: bool) -> Option<&'static str> {
    let Found { run: before, state } = found;
    if local {
        Some("the run in the journal is over, as --local starts workers of its own")
    } else if before.job != run.job {
        Some("the run in the journal has another job file")
    } else if before.shards != run.shards {
        Some("the run in the journal has another list of shards")
    } else if resume.is_some_and(|resume| resume.generation > state.generation()) {
        Some("the run in the journal is older than the newest checkpoint")
    } else {
        None
    }
}

/// Keeps a second coordinator out of the folder.
fn lock(state_dir: &Path) -> anyhow::Result<Result<File, String>> {
    std::fs::create_dir_all(state_dir).with_context(|| format!("cannot make --state-dir {}", state_dir.display()))?;
    let path = state_dir.join("lock");
    let file = File::create(&path).with_context(|| format!("cannot write {}", path.display()))?;
    Ok(match file.try_lock() {
        Ok(()) => Ok(file),
        Err(std::fs::TryLockError::WouldBlock) => {
            Err(format!("--state-dir {} belongs to a coordinator that is running; give each job its own", state_dir.display()))
        }
        Err(std::fs::TryLockError::Error(error)) => return Err(error).with_context(|| format!("cannot lock {}", path.display())),
    })
}

/// The newest checkpoint, if it is of this job and its shards.
async fn resume(store: &Store, job: &Job, lists: &[ShardList]) -> anyhow::Result<Result<Option<Resume>, String>> {
    let newest = store.newest().await.map_err(|error| match error {
        StoreError::Damaged { .. } => anyhow::anyhow!("{error}; move it away to go on from the one before"),
        error => error.into(),
    })?;
    let Some((manifest, ledger)) = newest else { return Ok(Ok(None)) };
    let location = store.location(manifest.step, manifest.generation);
    let before = match Job::parse(&manifest.job) {
        Ok(before) => before,
        Err(error) => return Ok(Err(format!("the job file kept in {location} cannot be read: {error}"))),
    };
    let differences = job.identity_differences(&before);
    if !differences.is_empty() {
        let list = differences.iter().map(|difference| format!("\n  {difference}")).collect::<String>();
        return Ok(Err(format!(
            "the checkpoint in {location} belongs to another job:{list}\nTo go on with it, restore these; to start anew, give another --state-dir or checkpoint.store"
        )));
    }
    let changes = shard_list::changes(&manifest.shards, lists);
    if !changes.is_empty() {
        let list = changes.iter().map(|change| format!("\n  {change}")).collect::<String>();
        return Ok(Err(format!("the checkpoint in {location} was trained on another list of shards:{list}\n{}", shard_list::RESTORE)));
    }
    let changed = job.changed_keys(&before);
    if !changed.is_empty() {
        tracing::info!("the job file has changed since {location} ({}); its new settings hold from here on", changed.join(", "));
    }
    Ok(Ok(Some(Resume { step: manifest.step, ledger: Arc::new(ledger), generation: manifest.generation })))
}

pub(super) fn random() -> anyhow::Result<u64> {
    let mut bytes = [0; 8];
    getrandom::fill(&mut bytes).map_err(|error| anyhow::anyhow!("no randomness from the system: {error}"))?;
    Ok(u64::from_le_bytes(bytes))
}
