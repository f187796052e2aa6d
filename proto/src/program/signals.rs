//! The signals that end a program.

use std::future::pending;
use std::io;

use tokio::signal::unix::{Signal, SignalKind, signal};

/// A signal that ends a program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StopSignal {
    /// SIGINT: by a person.
    Interrupted,
    /// SIGTERM: by a service manager.
    Terminated,
    /// SIGHUP: the terminal is closed, or the connection to it was lost.
    HungUp,
}

impl StopSignal {
    /// As people know it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Interrupted => "Ctrl-C",
            Self::Terminated => "SIGTERM",
            Self::HungUp => "SIGHUP (its terminal is gone)",
        }
    }

    /// The exit code that it stands for.
    #[must_use]
    pub fn code(self) -> u8 {
        match self {
            Self::Interrupted => 130,
            Self::Terminated => 143,
            Self::HungUp => 129,
        }
    }
}

/// All of them, caught: from then on they end nothing by themselves.
#[derive(Debug)]
pub struct Signals {
    interrupt: Signal,
    terminate: Signal,
    /// None where whoever started this process wanted it ignored (`nohup`).
    hangup: Option<Signal>,
}

impl Signals {
    /// Catches them, in a runtime with I/O.
    ///
    /// # Errors
    /// If the system does not let them be caught.
    pub fn catch() -> io::Result<Self> {
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        let hangup = if ignores_hangup(&status) { None } else { Some(signal(SignalKind::hangup())?) };
        Ok(Self { interrupt: signal(SignalKind::interrupt())?, terminate: signal(SignalKind::terminate())?, hangup })
    }

    /// The next one. Losing the future loses nothing.
    pub async fn next(&mut self) -> StopSignal {
        let hangup = async {
            match &mut self.hangup {
                Some(signal) => signal.recv().await,
                None => pending().await,
            }
        };
        tokio::select! {
            _ = self.interrupt.recv() => StopSignal::Interrupted,
            _ = self.terminate.recv() => StopSignal::Terminated,
            _ = hangup => StopSignal::HungUp,
        }
    }
}

/// Whether a process ignores SIGHUP, by what `/proc` tells of it: a bit for each signal, the lowest one for this.
fn ignores_hangup(status: &str) -> bool {
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    ignored.and_then(|bits| u64::from_str_radix(bits.trim(), 16).ok()).is_some_and(|bits| bits & 1 == 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_was_started_by_nohup_ignores_the_end_of_its_terminal() {
        assert!(ignores_hangup("Name:\tworker\nSigIgn:\t0000000000001001\nSigCgt:\t0000000000000000\n"));
        assert!(!ignores_hangup("SigIgn:\t0000000000001000\nSigCgt:\t0000000000000001\n"));
        assert!(!ignores_hangup("") && !ignores_hangup("SigIgn:\tx\n"));
    }
}
