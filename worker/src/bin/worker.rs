//! `worker`: parse, run, exit.

use std::fmt::Display;
use std::io::{self, Write};
use std::process::ExitCode;

use clap::{CommandFactory, Parser};
use peapod_proto::program;
use peapod_worker::args::{Cli, Command, Shards};
use peapod_worker::device::{Sharing, nccl_settings};
use peapod_worker::shards::{Report, inspect, make};
use peapod_worker::{bench, check, device, fetch, loss_error, precompute, supervisor, vae_error};

fn main() -> ExitCode {
    let Cli { command, run, logs } = Cli::parse();
    if let Some(Command::Pages(pages)) = &command {
        return match pages.answer(Cli::command()) {
            Err(error) if !program::nobody_reads(&error) => fail(error, 1),
            _ => ExitCode::SUCCESS,
        };
    }
    let shares_gpus = command.is_none() && run.allow_shared_gpu;
    // SAFETY: nothing before this has started a thread.
    unsafe { nccl_settings::settle(shares_gpus, run.advertise) };
    if let Err(problem) = program::start("worker", logs, io::stderr) {
        return fail(problem, supervisor::BAD_ARGUMENTS);
    }
    let (choice, kernels) = match &command {
        None => (run.device, Some(run.kernels)),
        Some(Command::Check(options)) => (options.device, Some(options.kernels)),
        Some(Command::Bench(options)) => (options.device, Some(options.kernels)),
        Some(Command::VaeError(options)) => (options.compute.device, Some(options.compute.kernels)),
        Some(Command::LossError(options)) => (options.compute.device, Some(options.compute.kernels)),
        Some(Command::Precompute(options)) => (options.compute.device, Some(options.compute.kernels)),
        Some(Command::Fetch(_) | Command::Shards(_) | Command::Pages(_)) => (device::Choice::Cpu, None),
    };
    let sharing = match &command {
        Some(_) => Sharing::Ignored,
        None if shares_gpus => Sharing::Allowed,
        None => Sharing::Refused,
    };
    // Arguments that cannot work are told before what this machine lacks.
    let opened = if command.is_none() { run.validate().map(|_| ()) } else { Ok(()) }.and_then(|()| device::open(choice, sharing));
    let device = match opened {
        Ok(device) => device,
        Err(problem) => return fail(problem, supervisor::BAD_ARGUMENTS),
    };
    if let Some(kernels) = kernels {
        kernels.settle(device);
    }
    // libtorch reads these before its first tensor; pools of several threads each would spin against the other workers'.
    tch::set_num_interop_threads(1);
    if let Some(command) = command {
        tch::set_num_threads(1);
        let report = match command {
            Command::Check(options) => check::report(&options, device),
            Command::Fetch(options) => match fetch::run(&options) {
                Err(problem) if !problem.is_permanent() => return fail(problem, 1),
                report => report.map_err(|problem| problem.to_string()),
            },
            Command::Bench(options) => bench::run(&options, device),
            Command::VaeError(options) => vae_error::run(&options, device),
            Command::LossError(options) => loss_error::run(&options, device),
            Command::Precompute(options) => match precompute::Plan::new(&options).map(|plan| plan.run(device)) {
                Ok(Err(problem)) => return fail(problem, 1),
                Ok(Ok(report)) => return print(report),
                Err(problem) => Err(problem),
            },
            Command::Shards(Shards::Inspect(options)) => match inspect::report(&options) {
                Ok(report) => return print(report),
                Err(problem) => Err(problem),
            },
            Command::Shards(Shards::Make(options)) => make::run(&options),
            // Answered above.
            Command::Pages(_) => Ok(String::new()),
        };
        return match report {
            Ok(text) => print(Report { text, problem: None }),
            Err(problem) => fail(problem, supervisor::BAD_ARGUMENTS),
        };
    }
    let runtime = match tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return fail(format_args!("cannot start: {error}"), 1),
    };
    let exit = runtime.block_on(supervisor::run(run, device));
    let line = format!("worker: {}", exit.message);
    match exit.is_failure() {
        _ if exit.message.is_empty() => {}
        true => program::say_failure(line),
        false => program::say(line),
    }
    program::otlp::finish();
    leave(exit.code)
}

/// Ends the process at once. The trainer's thread may be in libtorch and another in NCCL, which cannot be interrupted: what they do while
/// the libraries' destructors run would cost the exit code, or the exit.
fn leave(code: u8) -> ! {
    // Nothing else is buffered: logs go to an unbuffered stream.
    let _ = io::stdout().flush();
    // SAFETY: ends the process, whatever its threads do.
    unsafe { libc::_exit(code.into()) }
}

/// What was seen comes first, and what is wrong with it last.
fn print(Report { text, problem }: Report) -> ExitCode {
    let printed = io::stdout().write_all(text.as_bytes());
    match (problem, printed) {
        (Some(problem), _) => fail(problem, 1),
        (None, Err(error)) if !program::nobody_reads(&error) => fail(format_args!("cannot print: {error}"), 1),
        (None, _) => ExitCode::SUCCESS,
    }
}

fn fail(problem: impl Display, code: u8) -> ExitCode {
    program::say_failure(format_args!("worker: {problem}"));
    ExitCode::from(code)
}
