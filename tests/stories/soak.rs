//! The demo job under one random fault after the other: `make soak`.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use peapod_tests::harness::{Cluster, Coordinator, Process, Signal, StepLine, assert_epochs_trained_once};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Samples in each shard of the demo.
const SIZES: [usize; 6] = [256; 6];
const WORLD_SIZE: u32 = 3;
/// As many last steps count for the loss.
const LAST_STEPS: usize = 200;
/// Steps of an epoch.
const STEPS: usize = 1536 / 32;
/// Student's t of two degrees of freedom, 95 %.
const STUDENT_T: f64 = 4.303;
/// Between two looks at the processes.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// The demo job over whole epochs.
fn demo(epochs: u32, seed: i64) -> Cluster {
    let mut cluster = Cluster::new();
    cluster.job.set("train.global_batch", 32).set("train.micro_batch", 16).set("train.warmup_steps", 50).set("data.shuffle_buffer", 256);
    cluster.job.set("checkpoint.every_steps", 50).set("checkpoint.keep", 3).set("seed", seed).set_epochs(epochs);
    cluster
}

fn seconds_of(variable: &str, default: u64) -> u64 {
    std::env::var(variable).map_or(default, |text| text.parse().unwrap_or_else(|_| panic!("{variable}={text} is no number")))
}

/// Runs a job without faults; returns how long it took.
fn undisturbed(epochs: u32, seed: i64) -> (Cluster, Duration) {
    let cluster = demo(epochs, seed);
    let started = Instant::now();
    let mut coordinator = cluster.coordinator(WORLD_SIZE, &["--local"]);
    await_end(&mut coordinator, Duration::from_secs(3600));
    (cluster, started.elapsed())
}

fn await_end(process: &mut Process, patience: Duration) {
    let started = Instant::now();
    while process.is_running() {
        assert!(started.elapsed() < patience, "no end within {patience:?}");
        std::thread::sleep(LOOK_EVERY);
    }
    process.expect_exit(0);
}

/// Mean losses of the last steps: diffusion, predictions, features.
fn last_losses(cluster: &Cluster) -> [f64; 3] {
    let steps = cluster.steps();
    let last = &steps[steps.len().saturating_sub(LAST_STEPS)..];
    let samples: u64 = last.iter().map(|step| step.samples).sum();
    let mean = |part: fn(&StepLine) -> f64| last.iter().map(|step| part(step) * step.samples as f64).sum::<f64>() / samples as f64;
    [mean(|step| step.task), mean(|step| step.logit), mean(|step| step.feature)]
}

/// A worker that somebody keeps alive, as a service manager does.
struct Slot {
    rank: u32,
    process: Option<Process>,
    /// When the next one is started.
    start_at: Instant,
    /// When a frozen one goes on.
    thaw_at: Option<Instant>,
}

/// A job whose processes fail and are started again.
struct Soak<'a> {
    cluster: &'a Cluster,
    address: String,
    coordinator: Option<Coordinator>,
    start_at: Instant,
    thaw_at: Option<Instant>,
    slots: Vec<Slot>,
    random: ChaCha8Rng,
    /// Ended ones: their output is printed if the story fails.
    ended: Vec<Process>,
    faults: BTreeMap<&'static str, u32>,
    began: Instant,
}

impl Soak<'_> {
    fn arguments(address: &str) -> [&str; 6] {
        ["--min-world-size", "1", "--heartbeat-timeout", "2s", "--listen", address]
    }

    /// Starts what is due and thaws what is due; says whether the job is over.
    fn tend(&mut self) -> bool {
        let now = Instant::now();
        if let Some(coordinator) = &mut self.coordinator {
            if !coordinator.is_running() {
                match coordinator.wait().code() {
                    Some(0) => return true,
                    // Killed, or asked to leave its job to the next one.
                    None | Some(143) => {}
                    code => panic!("the coordinator ended with {code:?}"),
                }
                self.coordinator = None;
                self.thaw_at = None;
                self.start_at = now + Duration::from_millis(self.random.random_range(0..1500));
            } else if self.thaw_at.is_some_and(|at| at <= now) {
                coordinator.signal(Signal::CONT);
                self.thaw_at = None;
            }
        } else if self.start_at <= now {
            self.coordinator = Some(self.cluster.coordinator(WORLD_SIZE, &Self::arguments(&self.address)));
        }
        for slot in &mut self.slots {
            let runs = slot.process.as_mut().is_some_and(|process| process.is_running());
            match &mut slot.process {
                Some(process) if runs && slot.thaw_at.is_some_and(|at| at <= now) => {
                    process.signal(Signal::CONT);
                    slot.thaw_at = None;
                }
                Some(_) if runs => {}
                Some(process) => {
                    let code = process.wait().code();
                    let lines = process.lines();
                    assert!(matches!(code, None | Some(0 | 75 | 143)), "a worker ended with {code:?}: {:?}", lines.last());
                    self.ended.extend(slot.process.take());
                    slot.thaw_at = None;
                    slot.start_at = now + Duration::from_millis(self.random.random_range(0..1000));
                }
                None if slot.start_at <= now => {
                    let url = format!("http://{}", self.address);
                    let rank = slot.rank.to_string();
                    let arguments = ["--coordinator", &url, "--threads", "1", "--rank", &rank];
                    slot.process = Some(Process::start(&format!("worker of rank {rank}"), "worker", &arguments));
                }
                None => {}
            }
        }
        false
    }

    fn strike(&mut self) {
        let seconds = Duration::from_millis(self.random.random_range(300..5000));
        let victim = self.random.random_range(0..self.slots.len());
        let slot = &mut self.slots[victim];
        let coordinator = self.coordinator.as_ref().filter(|_| self.thaw_at.is_none());
        let worker = slot.process.as_mut().filter(|_| slot.thaw_at.is_none()).filter(|process| process.lines().len() > 1);
        let fault = match (self.random.random_range(0..100), worker, coordinator) {
            (0..30, Some(worker), _) => {
                worker.signal(Signal::KILL);
                "worker killed"
            }
            (30..55, Some(worker), _) => {
                worker.signal(Signal::STOP);
                slot.thaw_at = Some(Instant::now() + seconds);
                "worker frozen"
            }
            (55..70, Some(worker), _) => {
                worker.signal(Signal::TERM);
                "worker drained"
            }
            (70..82, _, Some(coordinator)) => {
                coordinator.signal(Signal::KILL);
                "coordinator killed"
            }
            (82..90, _, Some(coordinator)) => {
                coordinator.signal(Signal::TERM);
                "coordinator stopped"
            }
            (90.., _, Some(coordinator)) => {
                coordinator.signal(Signal::STOP);
                self.thaw_at = Some(Instant::now() + seconds);
                "coordinator frozen"
            }
            _ => return,
        };
        *self.faults.entry(fault).or_default() += 1;
        let rank = if fault.starts_with("worker") { format!(" (rank {})", slot.rank) } else { String::new() };
        println!("{:7.1} s  step {:5}  {fault}{rank}", self.began.elapsed().as_secs_f64(), self.cluster.steps().len());
    }
}

#[test]
#[ignore = "takes PEAPOD_SOAK_SECONDS (600) and as long again for what it compares with: make soak"]
fn demo_job_under_random_faults_trains_each_sample_of_each_epoch_once_and_as_well_as_without_them() {
    let seconds = seconds_of("PEAPOD_SOAK_SECONDS", 600);
    let seed = seconds_of("PEAPOD_SOAK_SEED", u64::from(std::process::id()));
    let (first, took) = undisturbed(2, 1);
    assert_epochs_trained_once(&first.trained_samples(), &SIZES, 2);
    // The faults cost about half of the time; what is left after them ends without any.
    let epochs = ((seconds as f64 / took.as_secs_f64() * 2.0 * 0.6) as u32).max(LAST_STEPS.div_ceil(STEPS) as u32 + 2);
    println!("PEAPOD_SOAK_SEED={seed}: {epochs} epochs under faults for {seconds} s");

    let cluster = demo(epochs, 1);
    let coordinator = cluster.coordinator(WORLD_SIZE, &Soak::arguments("127.0.0.1:0"));
    let address = coordinator.url().trim_start_matches("http://").to_owned();
    let now = Instant::now();
    let slots = (0..WORLD_SIZE).map(|rank| Slot { rank, process: None, start_at: now, thaw_at: None }).collect();
    let mut soak = Soak {
        cluster: &cluster,
        address,
        coordinator: Some(coordinator),
        start_at: now,
        thaw_at: None,
        slots,
        random: ChaCha8Rng::seed_from_u64(seed),
        ended: Vec::new(),
        faults: BTreeMap::new(),
        began: now,
    };
    let mut next_fault = now + Duration::from_secs(3);
    let (faults_end, patience) = (now + Duration::from_secs(seconds), Duration::from_secs(3 * seconds + 300));
    while !soak.tend() {
        let now = Instant::now();
        assert!(now < soak.began + patience, "no end within {patience:?}");
        if now >= next_fault && now < faults_end {
            soak.strike();
            next_fault = now + Duration::from_millis(soak.random.random_range(200..4000));
        }
        std::thread::sleep(LOOK_EVERY);
    }
    println!("{:7.1} s  step {:5}  the job is finished: {:?}", soak.began.elapsed().as_secs_f64(), cluster.steps().len(), soak.faults);
    assert_epochs_trained_once(&cluster.trained_samples(), &SIZES, epochs);
    assert_eq!(cluster.newest_checkpoint().ledger_total("committed"), u64::from(epochs) * 1536);
    let steps: Vec<u64> = cluster.steps().iter().map(|step| step.step).collect();
    assert_eq!(steps, (1..=steps.len() as u64).collect::<Vec<_>>());
    let disturbed = last_losses(&cluster);

    let runs = [1, 2, 3].map(|seed| last_losses(&undisturbed(epochs, seed).0));
    println!("mean losses of the last {LAST_STEPS} steps (task, logit, feature): {disturbed:?}; undisturbed {runs:?}");
    for (loss, name) in ["task", "logit", "feature"].iter().enumerate() {
        let runs = runs.map(|run| run[loss]);
        let mean = runs.iter().sum::<f64>() / 3.0;
        let deviation = (runs.iter().map(|run| (run - mean).powi(2)).sum::<f64>() / 2.0).sqrt();
        // Where a fourth run lies with a probability of 95 %, for what is known of them from three.
        let slack = STUDENT_T * deviation * (4.0_f64 / 3.0).sqrt();
        let loss = disturbed[loss];
        assert!((loss - mean).abs() <= slack, "{name}: {loss}, undisturbed runs {runs:?}");
    }
}
