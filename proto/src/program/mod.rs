//! What the programs have in common at their edges: log lines, what they print, manual pages.

mod logs;
mod numbers;
pub mod otlp;
mod pages;
mod signals;
pub mod version;

use std::fmt::Display;
use std::io::{self, Write};

pub use logs::{LogArgs, LogFormat, start};
pub use numbers::{counted, rate};
pub use pages::Pages;
pub use signals::{Signals, StopSignal};

/// Says a line on standard error. It may be that nobody listens any more, which is no reason to end otherwise than one would.
pub fn say(line: impl Display) {
    let _ = writeln!(io::stderr().lock(), "{line}");
}

/// This machine, as its kernel calls it.
#[must_use]
pub fn host_name() -> String {
    std::fs::read_to_string("/proc/sys/kernel/hostname").map_or_else(|_| "unknown".into(), |name| name.trim().to_owned())
}

/// Whether whoever read what was written has had enough: `| head`, or a pager that was left. To go on would help nobody, and nothing went wrong.
#[must_use]
pub fn nobody_reads(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::BrokenPipe
}
