//! Running a job: everything put together, from the job file to the exit code.

mod ownership;
mod serve;
mod start;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use anyhow::Context;
use tokio::sync::{mpsc, oneshot, watch};

use self::ownership::take_over;
use self::serve::{listen, serve};
use self::start::Start;
use crate::announce::{announce, authority_for_workers, leave_address, print_line, say_how_to_join, scheme};
use crate::config::RunArgs;
use crate::core::Outcome;
use crate::driver::{Command, Driver, Ending};
use crate::gallery::Gallery;
use crate::local::Local;
use crate::logs::Logs;
use crate::observe::{Bar, Observer, Summary};
use crate::secrets::{JOIN, Secrets, write_secret};
use crate::service::{JobFacts, Service};
use crate::shutdown;
use crate::store::Store;
use crate::{open_files, web};
use peapod_proto::program::{Signals, host_name};

/// Commands that may wait for the driver.
const COMMAND_CAPACITY: usize = 4096;
/// How long connections may take to end after the job.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);

/// How a run ended, in the terms of the shell.
#[derive(Debug)]
pub enum Exit {
    /// All done.
    Finished,
    /// Stopped on request; 130 after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP.
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
    let start = match Start::find(&args).await? {
        Ok(start) => start,
        Err(exit) => return Ok(exit),
    };
    let (mut facts, shown) = (facts(&args, &start), shown(&args, &start));
    let Start { job, run, num_shards, mut store, stored, mut journal, core, goes_back, is_finished, _lock, .. } = start;
    let signals = Signals::catch().context("cannot catch signals")?;
    open_files::raise_limit(args.world_size);
    let mut logs = Logs::open(&args.state_dir, args.sample_log.as_deref(), !job.validation.shards.is_empty())?;
    let gallery = Gallery::new(&args.state_dir.join("pictures"), &job)?;
    let listener = listen(args.listen_address())
        .with_context(|| format!("cannot listen on {}, give another --listen ADDRESS:PORT", args.listen_address()))?;
    let http = web::listen(args.http_addr).await?;
    facts.page = http.as_ref().map(web::url).transpose()?;
    let listening = listener.local_addr()?;
    let secrets = match secrets(&args, listening) {
        Ok(secrets) => secrets,
        Err(problem) => return Ok(Exit::Refused(problem)),
    };
    // Not before: another coordinator ends of this, and here nothing that people mistype is left.
    let is_shared = job.checkpoint.store.is_some();
    if is_shared
        && !is_finished
        && let Err(exit) = take_over(&mut store, &args.state_dir, stored).await?
    {
        return Ok(exit);
    }
    let left_address = match leave_address(&args.state_dir, scheme(args.is_secure()), listening, &run.job_id) {
        Ok(left) => left,
        Err(problem) => return Ok(Exit::Failed(problem)),
    };
    announce(&args, &job, listening, num_shards, secrets.as_ref());
    if is_finished {
        tracing::info!("nothing is left to train: start no workers");
    } else {
        say_how_to_join(&args, listening, secrets.as_ref(), &bar);
    }

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
    let server = serve(&args, listener, secrets.as_ref(), service, commands.clone(), &is_over);
    let page = http.map(|listener| tokio::spawn(web::serve(listener, commands.clone(), shown, is_over.clone())));
    let exit_code = Arc::new(AtomicU8::new(0));
    let signals = tokio::spawn(shutdown::watch(signals, commands.clone(), args.local, exit_code.clone()));
    let children = args.local.then(|| tokio::spawn(local(&args, listening, secrets.as_ref()).run(commands.clone(), is_over)));

    let driver = start_driver(driver).context("cannot start the driver's thread")?;
    let ended = match children {
        // Without workers the driver would wait for its whole join timeout.
        Some(children) => run_with_children(driver, children, &commands, &over).await?,
        None => driver.await.context(DRIVER_BROKE)?,
    };
    let (ending, mut driver) = ended;
    // From here on a signal is for whoever waits below.
    let mut next_signals = Signals::catch().context("cannot catch signals")?;
    signals.abort();
    let code = exit_code.load(Ordering::Acquire);
    if let Ending::Over(outcome) = &ending {
        print_summary(driver.summary(), &store).await;
        if args.stay && code == 0 && !matches!(outcome, Outcome::Failed { .. }) {
            tracing::info!("the job is {}: page and status stay until a signal (--stay)", outcome.as_str());
            tokio::select! {
                () = driver.answer() => {}
                ended = next_signals.next() => tracing::info!("{}: the coordinator ends", ended.name()),
            }
        }
    }
    // With it end the workers' streams: the server would wait for them.
    drop(driver);
    let _ = over.send(true);
    drop(left_address);
    // The last messages to the workers are on their way; a connection that does not end by itself is cut.
    let _ = tokio::time::timeout(CLOSE_TIMEOUT, server).await;
    if let Some(page) = page {
        // A browser keeps its connection open: it is cut.
        page.abort();
    }
    Ok(exit(ending, code))
}

/// What the services say of the job.
fn facts(args: &RunArgs, start: &Start) -> JobFacts {
    let Start { job, run, num_shards, lists, .. } = start;
    JobFacts {
        job_id: run.job_id.clone(),
        name: job.name.clone(),
        toml: run.job.clone(),
        shards: lists.clone(),
        last_step: job.last_step(),
        num_shards: *num_shards as u32,
        world_size: args.world_size,
        page: None,
        keep: job.checkpoint.keep,
        feature_weight: job.loss.feature_weight,
    }
}

/// What the page says of it.
fn shown(args: &RunArgs, start: &Start) -> web::Shown {
    let Start { job, run, .. } = start;
    web::Shown {
        job: job.name.clone(),
        job_id: run.job_id.clone(),
        last_step: job.last_step(),
        feature_weight: job.loss.feature_weight,
        world_size: args.world_size,
        heartbeat_timeout: args.heartbeat_timeout,
        pictures: args.state_dir.join("pictures"),
    }
}

/// The workers of `--local`.
fn local(args: &RunArgs, listening: SocketAddr, secrets: Option<&Secrets>) -> Local {
    Local {
        program: Local::find_program(),
        world_size: args.world_size,
        coordinator: format!("{}://{listening}", scheme(args.is_secure())),
        join: secrets.map(|secrets| secrets.join_string(listening.to_string())),
        max_restarts: args.max_restarts,
        min_world_size: args.min_world_size(),
        host: host_name(),
    }
}

fn exit(ending: Ending, code: u8) -> Exit {
    match ending {
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
    }
}

type Driven = (Ending, Driver);

/// What is told where a driver has ended without an ending; its panic is in the log.
const DRIVER_BROKE: &str = "the driver broke: an error of this program";

/// Starts a driver on a thread of its own: it writes to the disk between two messages, and while that takes its time, the runtime's threads
/// take in heartbeats.
fn start_driver(driver: Driver) -> std::io::Result<oneshot::Receiver<Driven>> {
    let (ended, driven) = oneshot::channel();
    let runtime = tokio::runtime::Handle::current();
    let drive = move || {
        // Nobody waits for it where the run has failed meanwhile.
        let _ = ended.send(runtime.block_on(driver.run()));
    };
    std::thread::Builder::new().name("driver".into()).spawn(drive)?;
    Ok(driven)
}

async fn run_with_children(
    mut driver: oneshot::Receiver<Driven>,
    mut local: tokio::task::JoinHandle<std::io::Result<()>>,
    commands: &mpsc::Sender<Command>,
    over: &watch::Sender<bool>,
) -> anyhow::Result<Driven> {
    tokio::select! {
        driven = &mut driver => {
            let _ = over.send(true);
            local.await.context("workers")??;
            driven.context(DRIVER_BROKE)
        }
        result = &mut local => {
            // Otherwise all children ended in a way that no restart cures; what they said is in the log.
            if let Err(error) = result.context("workers").and_then(|result| Ok(result?)) {
                let _ = commands.send(Command::Yield { reason: format!("{error:#}") }).await;
            }
            driver.await.context(DRIVER_BROKE)
        }
    }
}

/// Says what the job came to. Its end stands, whatever keeps its store from being looked at now.
async fn print_summary(summary: Option<Summary>, store: &Store) {
    if let Some(summary) = &summary {
        print_line(&summary.to_string());
    }
    match store.list().await {
        Ok(mut manifests) => {
            if let Some(manifest) = manifests.pop() {
                print_line(&format!("checkpoint  {}", store.location(manifest.step, manifest.generation)));
            }
        }
        Err(error) => tracing::error!("{error}"),
    }
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
