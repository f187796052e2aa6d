//! What very many workers cost a coordinator: a real one is started, and this program is all of its workers, each with a connection of its
//! own. They join, say that their models are loaded and form a world; then each reports a step and its life once a second.
//!
//! Fails above what the project promises: 2 s to form a world of 1,024, and a core and 500 MB for 4,096 workers that report.
//!
//! usage: workers_at_scale COORDINATOR [NUM_WORKERS] [SECONDS]          (by default 4096 and 20; 0 seconds only form the world)

use std::collections::VecDeque;
use std::error::Error;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures::StreamExt;
use peapod_proto::ids::{Generation, Incarnation, MemberIndex, SampleName, Step};
use peapod_proto::message::{
    Assignment, FromWorker, Heartbeat, Hello, Lease, Memory, Phase, ShardReport, StepLosses, StepRecord, StepReport, StepTimings, ToWorker,
};
use peapod_proto::{PROGRAM_VERSION, PROTOCOL_VERSION, v1};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval_at};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;
use tonic::transport::Endpoint;

/// Samples in a shard; every worker trains one sample in a step, so that it asks for a shard as often.
const SHARD_LEN: u32 = 50;
/// Longer than by default: all workers knock at once.
const HEARTBEAT_TIMEOUT: &str = "10s";
const HEARTBEAT_EVERY: Duration = Duration::from_secs(1);
const STEP_EVERY: Duration = Duration::from_secs(1);
/// Descriptors of either process beside its connections.
const SPARE_FILES: u64 = 64;
/// Between two attempts to connect.
const RETRY_AFTER: Duration = Duration::from_millis(50);
/// Longest anything here may take.
const PATIENCE: Duration = Duration::from_secs(120);
/// What the project promises.
const LONGEST_FORMING: (usize, Duration) = (1024, Duration::from_secs(2));
const MOST_CORES: f64 = 1.0;
const MOST_MB: u64 = 500;

/// Samples of all workers that no record has named yet: the first member tells them, as in a step's all-reduce.
type Trained = Arc<Mutex<Vec<SampleName>>>;
type Failure = Box<dyn Error + Send + Sync>;

#[tokio::main]
async fn main() -> Result<(), Failure> {
    let mut arguments = std::env::args().skip(1);
    let program = arguments.next().ok_or("usage: workers_at_scale COORDINATOR [NUM_WORKERS] [SECONDS]")?;
    let num_workers: usize = arguments.next().map_or(Ok(4096), |text| text.parse())?;
    let seconds: u64 = arguments.next().map_or(Ok(20), |text| text.parse())?;
    let most_files = most_files()?;
    if most_files < num_workers as u64 + SPARE_FILES {
        return Err(
            format!("{num_workers} connections need more files than the {most_files} that are allowed: raise them with ulimit -n").into()
        );
    }
    let folder = std::env::temp_dir().join(format!("peapod-workers-at-scale-{}", std::process::id()));
    std::fs::create_dir_all(&folder)?;
    let result = measure(Path::new(&program), &folder, num_workers, seconds).await;
    std::fs::remove_dir_all(&folder)?;
    result
}

async fn measure(program: &Path, folder: &Path, num_workers: usize, seconds: u64) -> Result<(), Failure> {
    let coordinator = Coordinator::start(program, folder, num_workers).await?;
    let (began, before) = (Instant::now(), coordinator.cpu_seconds()?);
    let mut joining = JoinSet::new();
    for number in 0..num_workers {
        joining.spawn(Worker::join(coordinator.address.clone(), number));
    }
    let mut workers = Vec::with_capacity(num_workers);
    while let Some(worker) = tokio::time::timeout(PATIENCE, joining.join_next()).await? {
        workers.push(worker??);
    }
    let forming = began.elapsed();
    println!(
        "| a world of {num_workers} formed over as many connections | {:.2} s, {:.2} s of the coordinator's | {} MB |",
        forming.as_secs_f64(),
        coordinator.cpu_seconds()? - before,
        coordinator.resident_mb()?
    );
    let mut cores = 0.0;
    if seconds > 0 {
        let generation = workers[0].assignment.generation;
        let first = tokio::time::Instant::now() + STEP_EVERY;
        let mut training = JoinSet::new();
        let trained = Trained::default();
        for worker in workers {
            training.spawn(worker.train(generation, num_workers as u32, first, trained.clone()));
        }
        // The first leases are all asked for at once.
        tokio::time::sleep(2 * STEP_EVERY).await;
        let (began, before) = (Instant::now(), coordinator.cpu_seconds()?);
        tokio::select! {
            () = tokio::time::sleep(Duration::from_secs(seconds)) => {}
            ended = training.join_next() => return Err(format!("a worker ended early: {ended:?}").into()),
        }
        let (took, used) = (began.elapsed().as_secs_f64(), coordinator.cpu_seconds()? - before);
        cores = used / took;
        let steps = std::fs::read_to_string(folder.join("state/steps.jsonl"))?.lines().count();
        println!(
            "| {num_workers} workers that report a step and their life each second, {took:.0} s, {steps} steps | {cores:.2} cores | {} MB |",
            coordinator.resident_mb()?
        );
        if (steps as u64) < seconds {
            return Err(format!("only {steps} steps became final in {seconds} s").into());
        }
    }
    let is_slow = num_workers <= LONGEST_FORMING.0 && forming > LONGEST_FORMING.1;
    let resident = coordinator.resident_mb()?;
    if is_slow || cores > MOST_CORES || resident > MOST_MB {
        return Err(format!(
            "above {:?} to form a world of {}, or {MOST_CORES} core, or {MOST_MB} MB: {forming:.2?}, {cores:.2} cores, {resident} MB",
            LONGEST_FORMING.1, LONGEST_FORMING.0
        )
        .into());
    }
    Ok(())
}

/// A coordinator in a process of its own, killed on drop.
struct Coordinator {
    process: Child,
    address: String,
}

impl Coordinator {
    async fn start(program: &Path, folder: &Path, num_workers: usize) -> Result<Self, Failure> {
        let job = folder.join("job.toml");
        // Neither models nor shards exist: a coordinator reads neither.
        let text = format!(
            "name = \"scale\"\n[model]\npath = \"model\"\n[student]\npath = \"student\"\n[data]\nshards = [\"{}/{{000000..099999}}.tar\"]\n\
             [train]\nsteps = 1000000\nglobal_batch = {num_workers}\n",
            folder.join("nowhere").display()
        );
        std::fs::write(&job, text)?;
        let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?.to_string();
        drop(listener);
        let process = Command::new(program)
            .args(["--world-size", &num_workers.to_string(), "--listen", &address, "--heartbeat-timeout", HEARTBEAT_TIMEOUT])
            .arg("--job")
            .arg(&job)
            .arg("--state-dir")
            .arg(folder.join("state"))
            // A line for each of thousands of workers is a matter of the terminal.
            .env("RUST_LOG", "warn")
            .stdout(Stdio::null())
            .spawn()?;
        let mut coordinator = Self { process, address };
        let began = Instant::now();
        while tokio::net::TcpStream::connect(&coordinator.address).await.is_err() {
            if began.elapsed() > PATIENCE || coordinator.process.try_wait()?.is_some() {
                return Err("the coordinator does not come up".into());
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(coordinator)
    }

    /// What all its threads have used.
    fn cpu_seconds(&self) -> Result<f64, Failure> {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.process.id()))?;
        let (_, fields) = stat.rsplit_once(')').ok_or("no process status")?;
        let fields: Vec<&str> = fields.split_whitespace().collect();
        let ticks = |index: usize| fields.get(index).and_then(|text| text.parse::<f64>().ok()).ok_or("no times in the process status");
        // Linux counts a hundred of these ticks a second on every common machine.
        Ok((ticks(11)? + ticks(12)?) / 100.0)
    }

    fn resident_mb(&self) -> Result<u64, Failure> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.process.id()))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).ok_or("no memory in the process status")?;
        Ok(line.trim().trim_end_matches(" kB").trim().parse::<u64>()? / 1000)
    }
}

impl Drop for Coordinator {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// A worker as its coordinator sees one.
struct Worker {
    outbound: mpsc::Sender<FromWorker>,
    inbound: Streaming<v1::ToWorker>,
    assignment: Assignment,
}

impl Worker {
    /// Joins, is ready at once, and waits for the world to be formed.
    async fn join(address: String, number: usize) -> Result<Self, Failure> {
        let began = Instant::now();
        let (outbound, mut inbound) = loop {
            match Self::attempt(&address, number).await {
                Ok(streams) => break streams,
                // As a worker does: the coordinator's queue of new connections may be full.
                Err(_) if began.elapsed() < PATIENCE => tokio::time::sleep(RETRY_AFTER).await,
                Err(error) => return Err(error),
            }
        };
        let mut beats = tokio::time::interval(HEARTBEAT_EVERY);
        loop {
            let message = tokio::select! {
                message = inbound.message() => message?.ok_or("the stream ended before the world was formed")?,
                _ = beats.tick() => {
                    let beat = Heartbeat { step: Step(0), phase: Phase::Waiting, generation: Generation::NONE, reads: 0, memory: Memory::default() };
                    outbound.send(FromWorker::Heartbeat(beat)).await?;
                    continue;
                }
            };
            match ToWorker::try_from(message)? {
                ToWorker::Welcome { .. } => outbound.send(FromWorker::Ready { model_digest: vec![1], num_parameters: 1 }).await?,
                ToWorker::MakeBootstrap { generation, .. } => {
                    outbound.send(FromWorker::Bootstrap { generation, bytes: vec![1; 64] }).await?;
                }
                ToWorker::Assignment(assignment) => return Ok(Self { outbound, inbound, assignment }),
                ToWorker::Stop { message, .. } => return Err(message.into()),
                _ => {}
            }
        }
    }

    /// Opens a stream.
    async fn attempt(address: &str, number: usize) -> Result<(mpsc::Sender<FromWorker>, Streaming<v1::ToWorker>), Failure> {
        let channel = Endpoint::from_shared(format!("http://{address}"))?.tcp_nodelay(true).connect().await?;
        let (outbound, messages) = mpsc::channel(64);
        let hello = Hello {
            protocol_version: PROTOCOL_VERSION,
            program_version: PROGRAM_VERSION.into(),
            incarnation: Incarnation(number as u64 + 1),
            attempt: 0,
            requested_rank: None,
            host: format!("host-{}", number / 8),
            pid: number as u32 + 1,
            device: "cpu".into(),
        };
        outbound.send(FromWorker::Hello(hello)).await?;
        let messages = ReceiverStream::new(messages).map(v1::FromWorker::from);
        let inbound = v1::membership_client::MembershipClient::new(channel).join(messages).await?.into_inner();
        Ok((outbound, inbound))
    }

    /// Trains a sample of its own in each step, in step with the others, as long as nobody ends it.
    async fn train(
        mut self,
        generation: Generation,
        num_members: u32,
        first: tokio::time::Instant,
        trained: Trained,
    ) -> Result<(), Failure> {
        let index = self.assignment.member_index;
        let mut step = self.assignment.base_step;
        // Heartbeats are spread over their interval; steps end for all at once.
        let mut beats = interval_at(first + HEARTBEAT_EVERY * index.0 / num_members, HEARTBEAT_EVERY);
        let mut steps = interval_at(first, STEP_EVERY);
        beats.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut samples = Samples::default();
        let names = || trained.lock().unwrap_or_else(PoisonError::into_inner);
        self.ask(generation).await?;
        loop {
            tokio::select! {
                _ = beats.tick() => {
                    let beat = Heartbeat { step, phase: Phase::Compute, generation, reads: step.0, memory: Memory::default() };
                    self.outbound.send(FromWorker::Heartbeat(beat)).await?;
                }
                _ = steps.tick() => {
                    step = step.next();
                    names().extend(samples.next());
                    let record = (index == MemberIndex(0)).then(|| record(step, generation, std::mem::take(&mut *names())));
                    let report = StepReport { generation, step, record, timings: StepTimings::default(), snapshot: None };
                    self.outbound.send(FromWorker::StepReport(report)).await?;
                    if samples.is_done() {
                        self.ask(generation).await?;
                    }
                }
                message = self.inbound.message() => match ToWorker::try_from(message?.ok_or("the stream ended")?)? {
                    ToWorker::LeaseGrant { leases, .. } => {
                        for lease in &leases {
                            let report = ShardReport { lease: lease.id, skipped: Vec::new(), num_samples: Some(SHARD_LEN), truncated: String::new() };
                            self.outbound.send(FromWorker::ShardReport(report)).await?;
                        }
                        samples.leases.extend(leases);
                    }
                    ToWorker::Stop { message, .. } => return Err(message.into()),
                    _ => {}
                }
            }
        }
    }

    async fn ask(&self, generation: Generation) -> Result<(), Failure> {
        Ok(self.outbound.send(FromWorker::LeaseRequest { generation, num_leases: 1, is_idle: false }).await?)
    }
}

fn record(step: Step, generation: Generation, names: Vec<SampleName>) -> StepRecord {
    StepRecord { step, generation, names, native: 0, skipped: false, losses: StepLosses::default(), validation: None }
}

/// What a worker has of its shards.
#[derive(Default)]
struct Samples {
    leases: VecDeque<Lease>,
    index: u32,
}

impl Samples {
    fn next(&mut self) -> Option<SampleName> {
        let lease = self.leases.front()?;
        let name = SampleName { epoch: lease.epoch, shard: lease.shard, index: self.index };
        self.index += 1;
        if self.index == SHARD_LEN {
            self.index = 0;
            self.leases.pop_front();
        }
        Some(name)
    }

    /// Nothing is left.
    fn is_done(&self) -> bool {
        self.leases.is_empty()
    }
}

/// Files that this process, and so its child, may have open.
fn most_files() -> Result<u64, Failure> {
    let limits = std::fs::read_to_string("/proc/self/limits")?;
    let line = limits.lines().find_map(|line| line.strip_prefix("Max open files")).ok_or("no limit of open files")?;
    // "unlimited" is no number.
    Ok(line.split_whitespace().next().and_then(|text| text.parse().ok()).unwrap_or(u64::MAX))
}
