//! `worker`: parse, run, exit.

use std::process::ExitCode;

use clap::Parser;
use peapod_worker::args::{Cli, Command, Shards};
use peapod_worker::shards::{inspect, make};
use peapod_worker::{bench, check, device, supervisor};
use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    let Cli { command, run } = Cli::parse();
    tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info")))
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
        .with_target(false)
        .with_writer(std::io::stderr)
        .init();
    let (choice, share_gpus) = match &command {
        None => (run.device, run.allow_shared_gpu),
        Some(Command::Check { device, .. }) => (*device, false),
        Some(Command::Bench(options)) => (options.device, false),
        Some(Command::Shards(_)) => (device::Choice::Cpu, false),
    };
    if share_gpus && std::env::var_os("NCCL_HOSTID").is_none() {
        // NCCL refuses two members on one GPU of a host: to it, each worker is a host of its own.
        // SAFETY: this process has no other thread yet.
        unsafe { std::env::set_var("NCCL_HOSTID", format!("peapod-{}", std::process::id())) };
    }
    // Arguments that cannot work are told before what this machine lacks.
    let opened = if command.is_none() { run.validate().map(|_| ()) } else { Ok(()) }.and_then(|()| device::open(choice, share_gpus));
    let device = match opened {
        Ok(device) => device,
        Err(problem) => {
            eprintln!("worker: {problem}");
            return ExitCode::from(supervisor::BAD_ARGUMENTS);
        }
    };
    // libtorch reads these before its first tensor; pools of several threads each would spin against the other workers'.
    tch::set_num_interop_threads(1);
    if let Some(command) = command {
        tch::set_num_threads(1);
        let report = match command {
            Command::Check { job, partial, .. } => check::report(&job, partial),
            Command::Bench(options) => bench::run(&options, device),
            Command::Shards(Shards::Inspect(options)) => inspect::run(&options),
            Command::Shards(Shards::Make(options)) => make::run(&options),
        };
        return match report {
            Ok(report) => {
                print!("{report}");
                ExitCode::SUCCESS
            }
            Err(problem) => {
                eprintln!("worker: {problem}");
                ExitCode::from(supervisor::BAD_ARGUMENTS)
            }
        };
    }
    let runtime = match tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("worker: cannot start: {error}");
            return ExitCode::FAILURE;
        }
    };
    let exit = runtime.block_on(supervisor::run(run, device));
    if !exit.message.is_empty() {
        eprintln!("worker: {}", exit.message);
    }
    // Threads in libtorch cannot be interrupted; the process does not wait for them.
    std::process::exit(exit.code.into());
}
