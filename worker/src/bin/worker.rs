//! `worker`: parse, run, exit.

use std::process::ExitCode;

use clap::Parser;
use peapod_worker::args::Args;
use peapod_worker::supervisor;
use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    let args = Args::parse();
    tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info")))
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
        .with_target(false)
        .with_writer(std::io::stderr)
        .init();
    // libtorch reads these before its first tensor; pools of several threads each would spin against the other workers'.
    tch::set_num_interop_threads(1);
    let runtime = match tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("worker: cannot start: {error}");
            return ExitCode::FAILURE;
        }
    };
    let exit = runtime.block_on(supervisor::run(args));
    if !exit.message.is_empty() {
        eprintln!("worker: {}", exit.message);
    }
    // Threads in libtorch cannot be interrupted; the process does not wait for them.
    std::process::exit(exit.code.into());
}
