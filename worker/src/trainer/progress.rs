//! What a worker says of its training to whoever reads its own log.

use std::time::{Duration, Instant};

use peapod_collective::nccl;
use peapod_proto::ids::Rank;
use peapod_proto::job::Job;
use peapod_proto::message::{Assignment, StepLosses, StepRecord};
use peapod_proto::program::{counted, rate};
use tch::Device;

use super::Context;
use crate::draw::memory::held_bytes;
use crate::shards::size;
use crate::{device, numbers, setup};

/// Between two lines about steps.
const EVERY: Duration = Duration::from_secs(60);

/// Says from time to time how training goes.
pub struct Progress {
    /// Whether somebody else says it.
    quiet: bool,
    rank: Rank,
    last_step: Option<u64>,
    stretch: Stretch,
}

/// The steps since a line.
struct Stretch {
    since: Instant,
    num_samples: usize,
    /// Whether the next step is the first of a generation.
    is_fresh: bool,
}

impl Stretch {
    fn begin(since: Instant, is_fresh: bool) -> Self {
        Self { since, num_samples: 0, is_fresh }
    }
}

impl Progress {
    /// Of a job whose models are loaded.
    pub fn new(context: &Context) -> Self {
        let Context { job, rank, quiet, .. } = context;
        Self { quiet: *quiet, rank: *rank, last_step: job.last_step(), stretch: Stretch::begin(Instant::now(), true) }
    }

    /// The models are loaded.
    pub fn loaded(&self, Context { job, device, .. }: &Context, took: Duration) {
        let memory = memory(*device).map(|memory| format!("; {memory}")).unwrap_or_default();
        self.say(|| format!("{} in {:.1} s{memory}", models(job, *device), took.as_secs_f64()));
    }

    /// A generation's steps begin, of which this worker trains so many samples each.
    pub fn begin(&mut self, assignment: &Assignment, owed: usize) {
        self.stretch = Stretch::begin(Instant::now(), true);
        self.say(|| place(assignment, self.rank, owed));
    }

    /// A step is applied.
    pub fn applied(&mut self, record: &StepRecord) {
        if let Some(line) = self.line(record, Instant::now()) {
            self.say(|| line);
        }
    }

    /// What is to be said after a step.
    fn line(&mut self, record: &StepRecord, now: Instant) -> Option<String> {
        self.stretch.num_samples += record.names.len();
        let Stretch { since, num_samples, is_fresh } = self.stretch;
        let took = now.saturating_duration_since(since);
        if !is_fresh && took < EVERY {
            return None;
        }
        self.stretch = Stretch::begin(now, false);
        let of = self.last_step.map_or_else(String::new, |last| format!("/{last}"));
        let StepLosses { task, logit, feature, learning_rate, .. } = record.losses;
        let losses = match record.skipped {
            true => "skipped, as it was not finite".to_owned(),
            false => format!("task {task:.4}  logit {logit:.4}  feature {feature:.3}  lr {learning_rate:.2e}"),
        };
        let samples = rate(num_samples as f64 / took.as_secs_f64().max(1e-9));
        Some(format!("step {}{of}  {losses}  {samples} samples/s", record.step))
    }

    fn say(&self, line: impl FnOnce() -> String) {
        if !self.quiet {
            tracing::info!("{}", line());
        }
    }
}

/// Which models are loaded, and how.
fn models(job: &Job, device: Device) -> String {
    let (model, student) = (job.model.path.display(), job.student.path.display());
    let networks = numbers::name(setup::network_kind(job, device));
    let vae = setup::vae_numbers(job, device).name();
    format!("{model} (networks in {networks}, autoencoder in {vae}) and {student} are loaded on {}", device::full_name(device))
}

/// A worker's place in a generation.
fn place(assignment: &Assignment, rank: Rank, owed: usize) -> String {
    let Assignment { generation, base_step, num_members, global_batch, .. } = assignment;
    let samples = counted(*global_batch, "sample");
    format!("trains in {generation} as rank {rank} from step {base_step} (world size {num_members}): {owed} of {samples} a step")
}

/// How much memory is taken, as far as the system says.
fn memory(device: Device) -> Option<String> {
    match device {
        Device::Cuda(ordinal) => {
            let (free, total) = nccl::memory(ordinal).ok()?;
            Some(format!("{} of its {} of memory are taken", size(total.saturating_sub(free)), size(total)))
        }
        _ => Some(format!("the process holds {} of memory", size(held_bytes()?))),
    }
}

#[cfg(test)]
mod tests {
    use peapod_proto::ids::{Epoch, Generation, MemberIndex, SampleName, ShardId, Step};

    use super::*;

    fn progress(last_step: Option<u64>, now: Instant) -> Progress {
        Progress { quiet: false, rank: Rank(1), last_step, stretch: Stretch::begin(now, true) }
    }

    fn record(step: u64, skipped: bool) -> StepRecord {
        let losses = StepLosses { task: 0.25, logit: 0.5, feature: 1.0, grad_norm: 1.0, learning_rate: 1e-5 };
        let name = SampleName { epoch: Epoch(0), shard: ShardId(0), index: 0 };
        StepRecord { step: Step(step), generation: Generation(1), names: vec![name; 24], native: 0, skipped, losses, validation: None }
    }

    #[test]
    fn first_step_is_told_and_then_one_a_minute_with_the_pace_since() {
        let begun = Instant::now();
        let mut progress = progress(Some(1000), begun);
        let at = |seconds| begun + Duration::from_secs(seconds);
        let first = progress.line(&record(1, false), at(4));
        assert_eq!(first.as_deref(), Some("step 1/1000  task 0.2500  logit 0.5000  feature 1.000  lr 1.00e-5  6.0 samples/s"));
        let lines: Vec<String> = (2..=121).filter_map(|step| progress.line(&record(step, step == 61), at(4 + (step - 1)))).collect();
        assert_eq!(lines.len(), 2, "{lines:?}");
        assert_eq!(lines[0], "step 61/1000  skipped, as it was not finite  24 samples/s");
        assert!(lines[1].starts_with("step 121/1000  task ") && lines[1].ends_with("  24 samples/s"), "{lines:?}");
    }

    #[test]
    fn steps_of_a_job_in_epochs_have_no_last() {
        let begun = Instant::now();
        let line = progress(None, begun).line(&record(7, false), begun + Duration::from_secs(1)).unwrap();
        assert!(line.starts_with("step 7  task "), "{line}");
    }

    #[test]
    fn place_is_told_with_the_share() {
        let assignment = Assignment {
            generation: Generation(2),
            member_index: MemberIndex(1),
            num_members: 2,
            bootstrap: Vec::new(),
            base_step: Step(40),
            base_generation: Generation(1),
            source_index: MemberIndex(0),
            broadcast_state: false,
            checkpoint_step: None,
            held_leases: Vec::new(),
            global_batch: 24,
        };
        assert_eq!(place(&assignment, Rank(3), 12), "trains in g000002 as rank 3 from step 40 (world size 2): 12 of 24 samples a step");
    }
}
