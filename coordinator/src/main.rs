//! `coordinator`: parse, validate, run.

use std::io::{IsTerminal, Write};
use std::path::Path;
use std::process::ExitCode;

use clap::{CommandFactory, Parser};
use peapod_coordinator::config::{Checkpoints, Cli, Command, LogFormat};
use peapod_coordinator::local::Local;
use peapod_coordinator::observe::Bar;
use peapod_coordinator::run::{Exit, run};
use peapod_coordinator::{check, control, export};
use peapod_proto::job::TEMPLATE;
use tracing_subscriber::EnvFilter;

/// Bad arguments, job file or checkpoint.
const REFUSED: u8 = 2;

const DEMO: &str = include_str!("../../tests/demo/job.toml");

#[tokio::main]
async fn main() -> ExitCode {
    let cli = Cli::parse();
    let bar = Bar::new();
    let logs = tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info")))
        .with_target(false)
        .with_writer(bar.clone());
    match cli.log_format {
        LogFormat::Pretty => logs.with_ansi(std::io::stderr().is_terminal()).init(),
        LogFormat::Json => logs.json().flatten_event(true).init(),
    }
    match command(cli, bar).await {
        Ok(Exit::Finished) => ExitCode::SUCCESS,
        Ok(Exit::Stopped { code }) => ExitCode::from(code),
        Ok(Exit::Failed(reason)) => fail(&reason, 1),
        Ok(Exit::Refused(reason)) => fail(&reason, REFUSED),
        Err(error) => fail(&format!("{error:#}"), 1),
    }
}

fn fail(reason: &str, code: u8) -> ExitCode {
    // The last line a person sees says what went wrong.
    eprintln!("coordinator: {reason}");
    ExitCode::from(code)
}

async fn command(cli: Cli, bar: Bar) -> anyhow::Result<Exit> {
    match cli.command {
        None => return run(cli.run, bar).await,
        Some(Command::Init { demo, path }) => return init(&path, if demo { DEMO } else { TEMPLATE }),
        Some(Command::Check { job }) => match check::report(&job, &Local::find_program()) {
            Ok(report) => print!("{report}"),
            Err(problem) => return Ok(Exit::Refused(problem)),
        },
        Some(Command::Checkpoints { command: Checkpoints::List { store, json } }) => match export::list(&store.checkpoints, json).await {
            Ok(list) => print!("{list}"),
            Err(problem) => return Ok(Exit::Refused(problem)),
        },
        Some(Command::Checkpoints { command: Checkpoints::Export(args) } | Command::Export(args)) => {
            match export::export(&args.store.checkpoints, args.step, &args.out).await {
                Ok(path) => println!("wrote {}", path.display()),
                Err(problem) => return Ok(Exit::Refused(problem)),
            }
        }
        Some(Command::Completions { shell }) => {
            clap_complete::generate(shell, &mut Cli::command(), "coordinator", &mut std::io::stdout().lock());
        }
        Some(Command::Status { target, json, watch: true, .. }) => control::watch(&target, json).await?,
        Some(Command::Status { target, shards: false, json, .. }) => println!("{}", control::status(&target, json).await?),
        Some(Command::Status { target, source, json, .. }) => {
            control::shards(&target, source.as_deref(), json, &mut std::io::stdout().lock()).await?;
        }
        Some(Command::Stop { target }) => control::stop(&target).await?,
        Some(Command::Drain { rank, target }) => control::drain(&target, rank).await?,
    }
    Ok(Exit::Finished)
}

fn init(path: &Path, text: &str) -> anyhow::Result<Exit> {
    let file = std::fs::OpenOptions::new().write(true).create_new(true).open(path);
    match file.and_then(|mut file| file.write_all(text.as_bytes())) {
        Ok(()) => {
            println!("wrote {}", path.display());
            Ok(Exit::Finished)
        }
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
            Ok(Exit::Refused(format!("{} exists already; name another file", path.display())))
        }
        Err(error) => Err(anyhow::anyhow!("cannot write {}: {error}", path.display())),
    }
}
