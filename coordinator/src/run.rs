//! Running a job: everything put together, from the job file to the exit code.

use std::fs::File;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use peapod_proto::ids::{Generation, Step};
use peapod_proto::job::Job;
use peapod_proto::v1;
use tokio::net::{TcpListener, TcpSocket};
use tokio::sync::{mpsc, watch};
use tonic::service::InterceptorLayer;
use tonic::transport::Server;

use crate::announce::{announce, authority_for_workers, host_name, print_line, say_how_to_join, scheme};
use crate::check::{self, LoadedJob};
use crate::config::RunArgs;
use crate::core::{Config, Core, Outcome, Resume};
use crate::driver::{Driver, Ending};
use crate::gallery::{Gallery, MAX_PNG_BYTES};
use crate::gate::{self, Guard, Refusals};
use crate::journal::{Disk, Found, Run};
use crate::limits::{MAX_MESSAGE_BYTES, SizeLimits};
use crate::local::Local;
use crate::observe::{Bar, Logs, Observer, Summary};
use crate::secrets::{JOIN, Secrets, write_secret};
use crate::service::{JobFacts, Service};
use crate::shutdown::Signals;
use crate::store::{Store, hex, sha256};
use crate::web;

/// Commands that may wait for the driver.
const COMMAND_CAPACITY: usize = 4096;
/// One message of an upload.
const MAX_CHUNK_BYTES: usize = 4 << 20;
/// A control command's request: all of them are small.
const MAX_REQUEST_BYTES: usize = 64 << 10;
/// Calls at the same time on one connection. A worker has its stream, and a few transfers.
const MAX_STREAMS: u32 = 64;
const MAX_HEADER_BYTES: u32 = 16 << 10;
/// Connections that may wait to be taken; the system may allow fewer (net.core.somaxconn). Those that find no place are tried again by their workers.
const BACKLOG: u32 = 8192;
/// How long connections may take to end after the job.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);

/// How a run ended, in the terms of the shell.
#[derive(Debug)]
pub enum Exit {
    /// All done.
    Finished,
    /// Stopped on request; 130 after Ctrl-C, 143 after SIGTERM.
    Stopped {
        /// The exit code.
        code: u8,
    },
    /// The job failed.
    Failed(String),
    /// Arguments, job file or checkpoint do not fit.
    Refused(String),
}

/// Runs a job to its end.
///
/// # Errors
/// What the machine refuses: a port, a folder, a program.
pub async fn run(args: RunArgs, bar: Bar) -> anyhow::Result<Exit> {
    if let Err(problem) = args.validate() {
        return Ok(Exit::Refused(problem));
    }
    let LoadedJob { job, toml, shards, sources, visible } = match check::load(&args.job) {
        Ok(loaded) => loaded,
        Err(problem) => return Ok(Exit::Refused(problem)),
    };
    if let Err(problem) = visible.judge(args.local) {
        return Ok(Exit::Refused(format!("{}: {problem}", args.job.display())));
    }
    if visible.found == 0 || visible.unknown > 0 {
        tracing::warn!("{}", visible.describe(shards.len()));
    }
    if job.train.global_batch < args.world_size {
        let (batch, world) = (job.train.global_batch, args.world_size);
        return Ok(Exit::Refused(format!(
            "train.global_batch ({batch}) must be at least --world-size ({world}): every worker trains part of it"
        )));
    }
    let _lock = match lock(&args.state_dir)? {
        Ok(lock) => lock,
        Err(problem) => return Ok(Exit::Refused(problem)),
    };
    let checkpoints = job.checkpoint.store.clone().unwrap_or_else(|| args.state_dir.join("checkpoints"));
    let store = Store::local(&checkpoints)?;
    let resume = match resume(&store, &job).await? {
        Ok(resume) => resume,
        Err(problem) => return Ok(Exit::Refused(problem)),
    };
    let journal_path = args.state_dir.join(JOURNAL);
    let (mut journal, found) = match Disk::open(&journal_path) {
        Ok(opened) => opened,
        Err(error) => return Ok(Exit::Failed(error.to_string())),
    };
    let last_generation = found.as_ref().map_or(Generation::NONE, |found| found.state.generation());
    // A run that has come to its end is in its checkpoint.
    let found = found.filter(|found| found.state.outcome().is_none());
    if let Some(problem) = found.as_ref().and_then(|found| of_another_job(found, &job, &journal_path)) {
        return Ok(Exit::Refused(problem));
    }
    let step = resume.as_ref().map_or(Step(0), |resume| resume.step);
    let goes_back = found.is_some() || resume.is_some();
    let run = Run {
        job_id: String::new(),
        term: 1,
        world_size: args.world_size,
        job: toml.clone(),
        shards: hex(&sha256(shards.join("\n").as_bytes())),
    };
    let found = found.filter(|found| match new_run(found, &run, resume.as_ref(), args.local) {
        Some(why) => {
            tracing::warn!("{why}: its workers are sent away, and the job goes on from step {step}, where its newest checkpoint is");
            false
        }
        None => true,
    });
    let job_id = match &found {
        Some(found) => found.run.job_id.clone(),
        None => format!("{:016x}", random()?),
    };
    let run = Run { job_id: job_id.clone(), term: found.as_ref().map_or(1, |found| found.run.term + 1), ..run };
    let config = Config {
        world_size: args.world_size,
        min_world_size: args.min_world_size(),
        heartbeat_timeout: args.heartbeat_timeout,
        join_timeout: args.join_timeout,
        // It gives up by itself when the store has failed for so long, after a last wait for an answer.
        data_patience: job.data.give_up_after + 2 * job.data.read_timeout + MARGIN,
        job_id: job_id.clone(),
        job_toml: toml.clone(),
        seed: job.seed,
        shards: shards.clone(),
        sources,
        epochs: job.train.epochs,
        last_step: job.last_step().map(Step),
        global_batch: job.train.global_batch,
        scale_batch: job.train.scale_batch,
        checkpoint_every: job.checkpoint.every,
        max_bad_fraction: job.data.max_bad_fraction,
        max_skipped_steps: job.train.max_skipped_steps,
    };
    let core = Core::new(config.clone(), resume.clone()).after(last_generation);
    let is_finished = core.is_complete();
    if is_finished {
        let (steps, epochs) = (job.last_step(), job.train.epochs);
        let goal = steps.map(|last| format!("train.steps is {last}")).or(epochs.map(|epochs| format!("train.epochs is {epochs}")));
        let goal = goal.unwrap_or_default();
        tracing::info!("the job is finished already: its checkpoint in {} is of step {step}, {goal}", checkpoints.display());
        if !args.stay {
            return Ok(Exit::Finished);
        }
    }
    let core = match found {
        _ if is_finished => core.over(),
        Some(found) => {
            let core = Core::restore(config, resume, found.state);
            tracing::info!(
                "going on with the run of {}, start {}: its workers hold step {} or a later one",
                journal_path.display(),
                run.term,
                core.final_step()
            );
            core
        }
        None => core,
    };
    let signals = Signals::catch()?;
    let validation = (!job.validation.shards.is_empty()).then(|| args.state_dir.join("validation.jsonl"));
    let mut logs = Logs::open(&args.state_dir.join("steps.jsonl"), args.sample_log.as_deref(), validation.as_deref())?;
    let gallery = Gallery::new(&args.state_dir.join("pictures"), &job)?;
    let listener = listen(args.listen_address()).with_context(|| format!("cannot listen on {}", args.listen_address()))?;
    let http = web::listen(args.http_addr).await?;
    let listening = listener.local_addr()?;
    let secrets = match secrets(&args, listening) {
        Ok(secrets) => secrets,
        Err(problem) => return Ok(Exit::Refused(problem)),
    };
    announce(&args, &job, listening, shards.len(), secrets.as_ref());
    if is_finished {
        tracing::info!("nothing is left to train: start no workers");
    } else {
        say_how_to_join(&args, listening, secrets.as_ref());
    }

    let facts = JobFacts {
        job_id: job_id.clone(),
        name: job.name.clone(),
        toml: toml.clone(),
        last_step: job.last_step(),
        num_shards: shards.len() as u32,
        keep: job.checkpoint.keep,
        feature_weight: job.loss.feature_weight,
    };
    let shown = web::Shown {
        job: job.name.clone(),
        job_id: job_id.clone(),
        last_step: job.last_step(),
        feature_weight: job.loss.feature_weight,
        world_size: args.world_size,
        heartbeat_timeout: args.heartbeat_timeout,
        pictures: args.state_dir.join("pictures"),
    };
    let step = core.final_step();
    if goes_back {
        logs.go_back_to(step).context("cannot bring the logs in --state-dir and --sample-log to where the job goes on")?;
    }
    // A run that has ended stays in the journal as it is.
    if !is_finished && let Err(error) = journal.begin(&run, &core.durable()) {
        return Ok(Exit::Failed(error.to_string()));
    }
    let observer = Observer::new(bar, logs, (&job).into(), step, job.last_step()).with_curves(&args.state_dir, step)?;
    let (commands, inbox) = mpsc::channel(COMMAND_CAPACITY);
    let driver = Driver::new(core, inbox, Box::new(journal), observer);
    let (over, is_over) = watch::channel(false);

    let service = Service::new(commands.clone(), store.clone(), gallery, facts);
    let refusals = Refusals::default();
    let (tls, token) = secrets.as_ref().map(|secrets| (secrets.tls.clone(), secrets.token.clone())).unzip();
    let incoming = gate::open(listener, tls, refusals.clone(), is_over.clone());
    let server = Server::builder()
        .max_concurrent_streams(MAX_STREAMS)
        .http2_max_header_list_size(MAX_HEADER_BYTES)
        .http2_keepalive_interval(Some(args.heartbeat_timeout))
        .http2_keepalive_timeout(Some(args.heartbeat_timeout))
        .layer(InterceptorLayer::new(Guard::new(token, refusals)))
        .layer(SizeLimits)
        .add_service(v1::membership_server::MembershipServer::new(service.clone()).max_decoding_message_size(MAX_MESSAGE_BYTES))
        .add_service(v1::checkpoints_server::CheckpointsServer::new(service.clone()).max_decoding_message_size(MAX_CHUNK_BYTES))
        .add_service(v1::pictures_server::PicturesServer::new(service.clone()).max_decoding_message_size(MAX_PNG_BYTES + 1024))
        .add_service(v1::control_server::ControlServer::new(service).max_decoding_message_size(MAX_REQUEST_BYTES))
        .serve_with_incoming_shutdown(incoming, wait_for(is_over.clone()));
    let server = tokio::spawn(server);
    let page = http.map(|listener| tokio::spawn(web::serve(listener, commands.clone(), shown, is_over.clone())));
    let signals = tokio::spawn(signals.watch(commands.clone(), args.local));
    let scheme = scheme(args.is_secure());
    let local = args.local.then(|| {
        let local = Local {
            program: Local::find_program(),
            world_size: args.world_size,
            coordinator: format!("{scheme}://{listening}"),
            join: secrets.as_ref().map(|secrets| secrets.join_string(listening.to_string())),
            max_restarts: args.max_restarts,
            min_world_size: args.min_world_size(),
            host: host_name(),
        };
        tokio::spawn(local.run(commands.clone(), is_over.clone()))
    });

    let driver = tokio::spawn(driver.run());
    let ended = match local {
        // Without workers the driver would wait for its whole join timeout.
        Some(local) => run_with_children(driver, local, &over).await?,
        None => driver.await.context("driver")?,
    };
    let (ending, mut driver) = ended;
    let (code, mut signals) = after_signals(signals, Signals::catch()?).await?;
    if let Ending::Over(outcome) = &ending {
        print_summary(driver.summary(), &store).await?;
        if args.stay && code == 0 && !matches!(outcome, Outcome::Failed { .. }) {
            tracing::info!("the job is {}: page and status stay until a signal (--stay)", outcome.as_str());
            tokio::select! {
                () = driver.answer() => {}
                (name, _) = signals.next() => tracing::info!("{name}: the coordinator ends"),
            }
        }
    }
    let _ = over.send(true);
    // The last messages to the workers are on their way; a connection that does not end by itself is cut.
    let _ = tokio::time::timeout(CLOSE_TIMEOUT, server).await;
    if let Some(page) = page {
        // A browser keeps its connection open: it is cut.
        page.abort();
    }
    Ok(match ending {
        Ending::Over(Outcome::Finished) => Exit::Finished,
        Ending::Over(Outcome::Stopped { reason }) => {
            tracing::info!("stopped: {reason}");
            Exit::Stopped { code }
        }
        Ending::Over(Outcome::Failed { reason }) => Exit::Failed(reason),
        Ending::Away => {
            tracing::info!("stopped alone: the workers keep what they hold and wait; the same command goes on with the job");
            Exit::Stopped { code }
        }
    })
}

/// The exit code of the signal that ended the job, 0 if none did, and ears for the next one; `fresh` hears whatever comes from here on.
async fn after_signals(watching: tokio::task::JoinHandle<u8>, fresh: Signals) -> anyhow::Result<(u8, Signals)> {
    if watching.is_finished() {
        return Ok((watching.await.context("signals")?, fresh));
    }
    watching.abort();
    Ok((0, fresh))
}

/// Opens the port that all workers of a job come to at once.
fn listen(address: SocketAddr) -> std::io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    // The port of a coordinator that was just killed is free.
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

type Driven = (Ending, Driver);

/// A worker's own deadlines come first by this much.
const MARGIN: Duration = Duration::from_secs(10);
/// The run in the state folder, for a coordinator that is started again.
const JOURNAL: &str = "journal.redb";

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

/// Why the workers of a run, if they live, cannot go on with it.
fn new_run(found: &Found, run: &Run, resume: Option<&Resume>, local: bool) -> Option<&'static str> {
    let Found { run: before, state } = found;
    if local {
        Some("the run in the journal is over, as --local starts workers of its own")
    } else if before.job != run.job {
        Some("the run in the journal has another job file")
    } else if before.world_size != run.world_size {
        Some("the run in the journal has another --world-size")
    } else if before.shards != run.shards {
        Some("the run in the journal has another list of shards")
    } else if resume.is_some_and(|resume| resume.generation > state.generation()) {
        Some("the run in the journal is older than the newest checkpoint")
    } else {
        None
    }
}

async fn run_with_children(
    mut driver: tokio::task::JoinHandle<Driven>,
    mut local: tokio::task::JoinHandle<std::io::Result<()>>,
    over: &watch::Sender<bool>,
) -> anyhow::Result<Driven> {
    tokio::select! {
        driven = &mut driver => {
            let _ = over.send(true);
            local.await.context("workers")??;
            driven.context("driver")
        }
        result = &mut local => {
            // All children ended in a way that no restart cures; what they said is in the log.
            result.context("workers")??;
            driver.await.context("driver")
        }
    }
}

async fn print_summary(summary: Option<Summary>, store: &Store) -> anyhow::Result<()> {
    if let Some(summary) = &summary {
        print_line(&summary.to_string());
    }
    if let Some(manifest) = store.list().await?.pop() {
        print_line(&format!("checkpoint  {}", store.location(manifest.step, manifest.generation)));
    }
    Ok(())
}

/// Certificate and token, where clients need them, with the join string left in the state folder for commands on this machine.
fn secrets(args: &RunArgs, listening: SocketAddr) -> Result<Option<Secrets>, String> {
    let join_path = args.state_dir.join(JOIN);
    if !args.is_secure() {
        return match std::fs::remove_file(&join_path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(format!("cannot remove {}: {error}", join_path.display())),
            _ => Ok(None),
        };
    }
    let secrets = Secrets::prepare(&args.security, &args.state_dir, &host_name(), listening.ip())?;
    write_secret(&join_path, &format!("{}\n", secrets.join_string(authority_for_workers(listening, &host_name())).reveal()))?;
    Ok(Some(secrets))
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

/// The newest checkpoint, if it is of this job.
async fn resume(store: &Store, job: &Job) -> anyhow::Result<Result<Option<Resume>, String>> {
    let Some((manifest, ledger)) = store.newest().await? else { return Ok(Ok(None)) };
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
    if *job != before {
        tracing::info!("the job file has changed since {location}; its new settings hold from here on");
    }
    tracing::info!("resuming from {location}");
    Ok(Ok(Some(Resume { step: manifest.step, ledger: Arc::new(ledger), generation: manifest.generation })))
}

async fn wait_for(mut over: watch::Receiver<bool>) {
    // The sender lives as long as the run.
    let _ = over.wait_for(|&over| over).await;
}

fn random() -> anyhow::Result<u64> {
    let mut bytes = [0; 8];
    getrandom::fill(&mut bytes).map_err(|error| anyhow::anyhow!("no randomness from the system: {error}"))?;
    Ok(u64::from_le_bytes(bytes))
}
