//! What signals come to.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use peapod_proto::program::{Signals, StopSignal};
use tokio::sync::mpsc;

use crate::core::Event;
use crate::driver::Command;

/// Turns the first signal into an orderly stop and the second into an end. The first one's exit code is in `exit_code` before anybody hears
/// of it: what it brings about may be over before this is.
///
/// SIGTERM is what a service manager sends before it starts the coordinator again, here or elsewhere: the job stays, unless the workers are
/// this process's own and would die with it. So it does where the terminal is closed.
pub async fn watch(mut signals: Signals, commands: mpsc::Sender<Command>, local: bool, exit_code: Arc<AtomicU8>) {
    let ended = signals.next().await;
    let (name, code) = (ended.name(), ended.code());
    exit_code.store(code, Ordering::Release);
    if ended != StopSignal::Interrupted && !local {
        tracing::info!("{name}: leaving the job to its workers and the next coordinator");
        let _ = commands.send(Command::GoAway).await;
        return;
    }
    tracing::info!("{name}: ending the job with a checkpoint; once more to end it at once");
    let _ = commands.send(Command::Tell(Event::Stop { reason: name.into() })).await;
    // Part of this task, which ends with the job: a late second signal says nothing of a checkpoint that is stored. A terminal that goes
    // sends SIGHUP itself, and so does the shell in it.
    while signals.next().await == StopSignal::HungUp {}
    tracing::error!("ended at once, without a checkpoint");
    std::process::exit(code.into());
}
