//! Time and memory of the coordinator for a job of very many shards: start, lease, commit, resume from a checkpoint's ledger, restart from
//! the journal. Fails above what the project promises of 400,000 shards: 100 MB, and a second to go on.
//!
//! usage: shards_at_scale [NUM_SHARDS] [NUM_WORKERS]          (by default 400000 and 8)

use std::collections::{BTreeMap, VecDeque};
use std::error::Error;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use peapod_coordinator::core::leases::{Grant, Granted, Leases};
use peapod_coordinator::core::ledger::{Ledger, Skip};
use peapod_coordinator::core::order::Source;
use peapod_coordinator::core::{Config, Core, Effect, Event, Resume, StreamId};
use peapod_coordinator::journal::{Disk, Journal, Run};
use peapod_proto::ids::{Generation, Incarnation, MemberIndex, SampleName, Step, WorkerId};
use peapod_proto::message::{
    FromWorker, Hello, Lease, ShardReport, SkipReason, SkippedSample, StepLosses, StepRecord, StepReport, StepTimings, ToWorker,
};
use peapod_proto::{PROGRAM_VERSION, PROTOCOL_VERSION};

/// Samples in a shard, of which every tenth is filtered.
const SHARD_LEN: u32 = 100;
/// Shards in flight at once.
const WINDOW: usize = 64;
const SEED: u64 = 1;
/// Shards whose facts are in the journal beside its snapshot: two facts each and one for 64, a little less than makes the coordinator take
/// another.
const SHARDS_SINCE: u32 = 4_800;
/// What the project promises.
const MOST_MB: u64 = 100;
const LONGEST: Duration = Duration::from_secs(1);

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let num_shards: u32 = arguments.next().map_or(Ok(400_000), |text| text.parse())?;
    let num_workers: u32 = arguments.next().map_or(Ok(8), |text| text.parse())?;
    let mut clock = Instant::now();
    let mut lap = |what: &str| {
        println!("{what:50} {:>8.3} s, {:>4} MB resident", clock.elapsed().as_secs_f64(), resident_kib() / 1000);
        clock = Instant::now();
    };
    lap("nothing");
    let shards: Arc<[String]> =
        (0..num_shards).map(|shard| format!("s3://pictures/laion-chinese/{:03}/{shard:06}.tar", shard / 1000)).collect();
    lap("shard list");
    let sources = [Source { name: "all".into(), num_shards, weight: 1.0 }];
    let start = |ledger: &Ledger| {
        let mut leases = Leases::new(SEED, &sources, Some(2), ledger);
        leases.deal_among(num_workers);
        leases
    };
    let mut ledger = Ledger::new(num_shards);
    let mut leases = start(&ledger);
    ask(&mut leases, 0, &ledger);
    lap("start, first lease");

    let mut all = start(&ledger);
    for shard in 0..num_shards {
        ask(&mut all, shard % num_workers, &ledger);
    }
    lap("all shards leased at once");
    drop(all);
    lap("and forgotten");

    leases.restart(&ledger);
    let mut in_flight = VecDeque::new();
    let mut half = String::new();
    for shard in 0..num_shards {
        in_flight.extend(ask(&mut leases, shard % num_workers, &ledger));
        if in_flight.len() == WINDOW {
            train(in_flight.pop_front(), &mut leases, &mut ledger)?;
        }
        if shard == num_shards / 2 {
            lap("half of them leased and trained, 64 in flight");
            half = serde_json::to_string(&ledger)?;
            lap(&format!("ledger written ({:.1} MB)", half.len() as f64 / 1e6));
        }
    }
    while !in_flight.is_empty() {
        train(in_flight.pop_front(), &mut leases, &mut ledger)?;
    }
    lap("the rest leased and trained");
    assert_eq!(ledger.totals().seen(), u64::from(num_shards * SHARD_LEN), "every sample is accounted for");

    drop((leases, ledger));

    let began = Instant::now();
    let ledger: Ledger = serde_json::from_str(&half)?;
    drop(half);
    let mut leases = start(&ledger);
    let num_first = (0..num_workers).filter_map(|member| ask(&mut leases, member, &ledger)).count();
    let resume_time = began.elapsed();
    lap(&format!("resumed at half, first {num_first} leases"));
    drop(leases);

    let folder = std::env::temp_dir().join(format!("peapod-shards-at-scale-{}", std::process::id()));
    std::fs::create_dir_all(&folder)?;
    let config = Config {
        world_size: num_workers,
        min_world_size: num_workers,
        workers_are_alike: false,
        global_batch: 65536,
        scale_batch: false,
        heartbeat_timeout: Duration::from_secs(3),
        join_timeout: Duration::from_secs(60),
        data_patience: Duration::from_secs(60),
        job_id: "job".into(),
        job_toml: String::new(),
        seed: SEED,
        shards,
        sources: Arc::new(sources.clone()),
        epochs: Some(2),
        last_step: None,
        checkpoint_every: Duration::from_secs(3600),
        max_bad_fraction: 0.05,
        max_skipped_steps: 10,
    };
    let resume = Resume { step: Step(1), ledger: Arc::new(ledger), generation: Generation(1) };
    let path = folder.join("journal.redb");
    let mut job = Job::start(config.clone(), resume.clone(), &path)?;
    lap("journal begun with a snapshot at half");
    job.train(SHARDS_SINCE.min(num_shards / 4))?;
    lap(&format!("{} shards more, with their facts in the journal", SHARDS_SINCE.min(num_shards / 4)));
    let before = job.core.durable();
    drop(job);

    let began = Instant::now();
    let (_journal, found) = Disk::open(&path)?;
    let found = found.ok_or("the journal is empty")?;
    assert!(found.state == before, "the journal comes to what the coordinator was");
    drop(before);
    let core = Core::restore(config, Some(resume), found.state);
    let restart_time = began.elapsed();
    lap(&format!("restarted from the journal ({:.1} MB)", std::fs::metadata(&path)?.len() as f64 / 1e6));
    println!("{}; at most {} MB resident at any time", core.state(), peak_kib() / 1000);
    std::fs::remove_dir_all(&folder)?;
    if resume_time > LONGEST || restart_time > LONGEST || peak_kib() / 1000 > MOST_MB {
        return Err(format!("more than {MOST_MB} MB, or than {LONGEST:?} to go on: {resume_time:?} and {restart_time:?}").into());
    }
    Ok(())
}

/// A coordinator with its journal, and workers that are no more than ids.
struct Job {
    core: Core,
    journal: Disk,
    workers: Vec<WorkerId>,
    granted: BTreeMap<WorkerId, Vec<Lease>>,
    step: Step,
}

impl Job {
    fn start(config: Config, resume: Resume, path: &Path) -> Result<Self, Box<dyn Error>> {
        let num_workers = config.world_size;
        let step = resume.step;
        let core = Core::new(config, Some(resume));
        let (mut journal, _) = Disk::open(path)?;
        let run = Run { job_id: "job".into(), term: 1, world_size: num_workers, job: String::new(), shards: String::new() };
        journal.begin(&run, &core.durable())?;
        let mut job = Self { core, journal, workers: Vec::new(), granted: BTreeMap::new(), step };
        for number in 1..=u64::from(num_workers) {
            let hello = Hello {
                protocol_version: PROTOCOL_VERSION,
                program_version: PROGRAM_VERSION.into(),
                incarnation: Incarnation(number),
                attempt: 0,
                requested_rank: None,
                host: "host".into(),
                pid: 1,
                device: "cpu".into(),
            };
            job.event(Event::Hello { stream: StreamId(number), hello })?;
            let id = WorkerId(number);
            job.workers.push(id);
            job.say(id, FromWorker::Ready { model_digest: vec![1], num_parameters: 1 })?;
        }
        let generation = job.core.generation();
        job.say(job.workers[0], FromWorker::Bootstrap { generation, bytes: vec![1] })?;
        Ok(job)
    }

    fn event(&mut self, event: Event) -> Result<(), Box<dyn Error>> {
        for effect in self.core.step(Duration::ZERO, event)? {
            match effect {
                Effect::Persist(fact) => self.journal.append(&fact)?,
                Effect::Send { worker, message: ToWorker::LeaseGrant { leases, .. } } => {
                    self.granted.entry(worker).or_default().extend(leases)
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn say(&mut self, worker: WorkerId, message: FromWorker) -> Result<(), Box<dyn Error>> {
        // Streams are numbered as the workers are.
        self.event(Event::Message { worker, stream: StreamId(worker.0), message })
    }

    /// Leases 64 shards at a time, reads each and trains it in one step.
    fn train(&mut self, num_shards: u32) -> Result<(), Box<dyn Error>> {
        let generation = self.core.generation();
        for turn in 0..num_shards.div_ceil(WINDOW as u32) {
            let id = self.workers[turn as usize % self.workers.len()];
            self.say(id, FromWorker::LeaseRequest { generation, num_leases: WINDOW as u32, is_idle: false })?;
            for lease in self.granted.remove(&id).unwrap_or_default() {
                self.train_shard(id, &lease)?;
            }
        }
        Ok(self.journal.flush()?)
    }

    fn train_shard(&mut self, id: WorkerId, lease: &Lease) -> Result<(), Box<dyn Error>> {
        let skip = |index| SkippedSample { index, reason: SkipReason::Filtered, key: String::new(), detail: "too_small: 1 x 1".into() };
        let skipped = (0..SHARD_LEN).step_by(10).map(skip).collect();
        let report = ShardReport { lease: lease.id, skipped, num_samples: Some(SHARD_LEN), truncated: String::new() };
        self.say(id, FromWorker::ShardReport(report))?;
        let name = |index| SampleName { epoch: lease.epoch, shard: lease.shard, index };
        let names = (0..SHARD_LEN).filter(|index| index % 10 > 0).map(name).collect();
        let (generation, step) = (self.core.generation(), self.step.next());
        self.step = step;
        let losses = StepLosses::default();
        let mut record = Some(StepRecord { step, generation, names, native: 0, skipped: false, losses, validation: None });
        for index in 0..self.workers.len() {
            let report = StepReport { generation, step, record: record.take(), timings: StepTimings::default(), snapshot: None };
            self.say(self.workers[index], FromWorker::StepReport(report))?;
        }
        Ok(())
    }
}

fn ask(leases: &mut Leases, member: u32, ledger: &Ledger) -> Option<Granted> {
    match leases.grant(WorkerId(u64::from(member) + 1), MemberIndex(member), 1, false, ledger) {
        Grant::Now { leases, .. } => leases.first().copied(),
        Grant::Later | Grant::AskBack { .. } => None,
    }
}

/// Reads a shard to its end and trains it.
fn train(granted: Option<Granted>, leases: &mut Leases, ledger: &mut Ledger) -> Result<(), Box<dyn Error>> {
    let Some(Granted { id, epoch, shard, .. }) = granted else { return Ok(()) };
    ledger.set_size(epoch, shard, SHARD_LEN)?;
    leases.set_read(id);
    for index in 0..SHARD_LEN {
        let name = SampleName { epoch, shard, index };
        match index % 10 {
            0 => ledger.skip(name, Skip::Data(SkipReason::Filtered))?,
            _ => ledger.commit(name, Step(1))?,
        };
    }
    leases.finish(epoch, shard);
    Ok(())
}

fn resident_kib() -> u64 {
    status_kib("VmRSS:")
}

fn peak_kib() -> u64 {
    status_kib("VmHWM:")
}

/// A line of what the system says of this process; 0 where it says nothing.
fn status_kib(what: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix(what));
    line.and_then(|text| text.trim().trim_end_matches(" kB").trim().parse().ok()).unwrap_or_default()
}
