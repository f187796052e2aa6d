//! `coordinator`: parse, validate, run.

use std::io::{self, Write};
use std::path::Path;
use std::process::ExitCode;

use clap::{CommandFactory, Parser};
use peapod_coordinator::config::{Checkpoints, Cli, Command};
use peapod_coordinator::local::Local;
use peapod_coordinator::observe::Bar;
use peapod_coordinator::run::{Exit, run};
use peapod_coordinator::{check, checkpoints, control};
use peapod_proto::job::{self, TEMPLATE};
use peapod_proto::program;

/// Bad arguments, job file or checkpoint.
const REFUSED: u8 = 2;

const DEMO: &str = include_str!("../../tests/demo/job.toml");

#[tokio::main]
async fn main() -> ExitCode {
    let cli = Cli::parse();
    let bar = Bar::new();
    if let Err(problem) = program::start("coordinator", cli.logs, bar.clone()) {
        return fail(&problem, REFUSED);
    }
    let ended = match cli.command {
        None => run(cli.run, bar).await,
        Some(command) => match answer(command, &mut io::stdout()).await {
            Err(error) if error.downcast_ref().is_some_and(program::nobody_reads) => Ok(Exit::Finished),
            ended => ended,
        },
    };
    program::otlp::finish();
    match ended {
        Ok(Exit::Finished) => ExitCode::SUCCESS,
        Ok(Exit::Stopped { code }) => ExitCode::from(code),
        Ok(Exit::Failed(reason)) => fail(&reason, 1),
        Ok(Exit::Refused(reason)) => fail(&reason, REFUSED),
        Err(error) => fail(&format!("{error:#}"), 1),
    }
}

fn fail(reason: &str, code: u8) -> ExitCode {
    // The last line a person sees says what went wrong.
    program::say_failure(format_args!("coordinator: {reason}"));
    ExitCode::from(code)
}

async fn answer(command: Command, out: &mut impl Write) -> anyhow::Result<Exit> {
    match command {
        Command::Init { demo, path } => return init(&path, if demo { DEMO } else { TEMPLATE }, out),
        Command::Check(job) => match check::report(&job, &Local::find_program()) {
            Ok(report) => write!(out, "{report}")?,
            Err(problem) => return Ok(Exit::Refused(problem)),
        },
        Command::Reference => write!(out, "{}", job::reference())?,
        Command::Checkpoints { command: Checkpoints::List { store, json } } => {
            match checkpoints::list(&store.address(), store.logs(), json).await {
                Ok(list) => write!(out, "{list}")?,
                Err(problem) => return Ok(Exit::Refused(problem)),
            }
        }
        Command::Checkpoints { command: Checkpoints::Export(args) } | Command::Export(args) => {
            match checkpoints::export(&args.store.address(), args.step, &args.out).await {
                Ok(path) => writeln!(out, "wrote {}", path.display())?,
                Err(problem) => return Ok(Exit::Refused(problem)),
            }
        }
        Command::Pages(pages) => pages.answer(Cli::command())?,
        Command::Status { target, json, watch: true, .. } => return control::watch(&target, json, out).await,
        Command::Status { target, shards: false, json, .. } => writeln!(out, "{}", control::status(&target, json).await?)?,
        Command::Status { target, source, json, .. } => control::shards(&target, source.as_deref(), json, out).await?,
        Command::Stop { target } => control::stop(&target).await?,
        Command::Drain { rank, target } => control::drain(&target, rank).await?,
    }
    out.flush()?;
    Ok(Exit::Finished)
}

fn init(path: &Path, text: &str, out: &mut impl Write) -> anyhow::Result<Exit> {
    let file = std::fs::OpenOptions::new().write(true).create_new(true).open(path);
    match file.and_then(|mut file| file.write_all(text.as_bytes())) {
        Ok(()) => {
            writeln!(out, "wrote {}", path.display())?;
            Ok(Exit::Finished)
        }
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            Ok(Exit::Refused(format!("{} exists already; name another file", path.display())))
        }
        Err(error) => Err(anyhow::anyhow!("cannot write {}: {error}", path.display())),
    }
}
