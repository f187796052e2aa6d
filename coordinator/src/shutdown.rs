//! The signals that end a coordinator.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use anyhow::Context;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;

use crate::core::Event;
use crate::driver::Command;

/// A signal that ends a coordinator.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StopSignal {
    /// SIGINT: by a person.
    Interrupted,
    /// SIGTERM: by a service manager.
    Terminated,
}

impl StopSignal {
    /// As people know it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Interrupted => "Ctrl-C",
            Self::Terminated => "SIGTERM",
        }
    }

    /// The exit code that it stands for.
    fn code(self) -> u8 {
        match self {
            Self::Interrupted => 130,
            Self::Terminated => 143,
        }
    }
}

/// Ctrl-C and SIGTERM, caught before anyone hears of the coordinator.
pub struct Signals {
    interrupt: Signal,
    terminate: Signal,
}

impl Signals {
    /// From here on they end nothing by themselves.
    ///
    /// # Errors
    /// If the system does not let them be caught.
    pub fn catch() -> anyhow::Result<Self> {
        let catch = |kind| signal(kind).context("cannot catch signals");
        Ok(Self { interrupt: catch(SignalKind::interrupt())?, terminate: catch(SignalKind::terminate())? })
    }

    /// Turns the first signal into an orderly stop and the second into an end. The first one's exit code is in `exit_code` before anybody hears of it:
    /// what it brings about may be over before this is.
    ///
    /// SIGTERM is what a service manager sends before it starts the coordinator again, here or elsewhere: the job stays, unless the workers are this
    /// process's own and would die with it.
    pub async fn watch(mut self, commands: mpsc::Sender<Command>, local: bool, exit_code: Arc<AtomicU8>) {
        let ended = self.next().await;
        let (name, code) = (ended.name(), ended.code());
        exit_code.store(code, Ordering::Release);
        if ended == StopSignal::Terminated && !local {
            tracing::info!("SIGTERM: leaving the job to its workers and the next coordinator");
            let _ = commands.send(Command::GoAway).await;
            return;
        }
        tracing::info!("{name}: ending the job with a checkpoint; once more to end it at once");
        let _ = commands.send(Command::Tell(Event::Stop { reason: name.into() })).await;
        // Part of this task, which ends with the job: a late second signal says nothing of a checkpoint that is stored.
        self.next().await;
        tracing::error!("ended at once, without a checkpoint");
        std::process::exit(code.into());
    }

    /// The next one.
    pub async fn next(&mut self) -> StopSignal {
        tokio::select! {
            _ = self.interrupt.recv() => StopSignal::Interrupted,
            _ = self.terminate.recv() => StopSignal::Terminated,
        }
    }
}
