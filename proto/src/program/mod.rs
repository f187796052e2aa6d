//! What the programs have in common at their edges: log lines, what they print, manual pages.

mod logs;
mod numbers;
pub mod otlp;
mod pages;
mod signals;
pub mod version;

use std::fmt::Display;
use std::io::{self, Write};
use std::time::SystemTime;

pub use logs::{LogArgs, LogFormat, log_format, start};
pub use numbers::{counted, rate};
pub use pages::Pages;
pub use signals::{Signals, StopSignal};

/// Says a line on standard error. It may be that nobody listens any more, which is no reason to end otherwise than one would.
pub fn say(line: impl Display) {
    write(log_format(), "INFO", &line);
}

/// Says on standard error why a program fails: the last line that it writes there.
pub fn say_failure(line: impl Display) {
    write(log_format(), "ERROR", &line);
}

/// Whatever RUST_LOG leaves out of the log lines: whoever started the program is to know this.
fn write(format: LogFormat, level: &str, line: &dyn Display) {
    let _ = match format {
        LogFormat::Pretty => writeln!(io::stderr().lock(), "{line}"),
        LogFormat::Json => writeln!(io::stderr().lock(), "{}", as_json(SystemTime::now(), level, line)),
    };
}

/// A line as the log lines for machines are.
fn as_json(now: SystemTime, level: &str, line: &dyn Display) -> serde_json::Value {
    let timestamp = humantime::format_rfc3339_micros(now).to_string();
    serde_json::json!({ "timestamp": timestamp, "level": level, "message": line.to_string() })
}

/// This machine, as its kernel calls it.
#[must_use]
pub fn host_name() -> String {
    std::fs::read_to_string("/proc/sys/kernel/hostname").map_or_else(|_| "unknown".into(), |name| name.trim().to_owned())
}

/// Whether whoever read what was written has had enough: `| head`, or a pager that was left. To go on would help nobody, and nothing went
/// wrong.
#[must_use]
pub fn nobody_reads(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::BrokenPipe
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn last_line_for_machines_is_one_object_whatever_it_says() {
        let line = as_json(SystemTime::UNIX_EPOCH, "ERROR", &"worker: no \"model\" at\n  here");
        assert_eq!(
            line.to_string(),
            r#"{"level":"ERROR","message":"worker: no \"model\" at\n  here","timestamp":"1970-01-01T00:00:00.000000Z"}"#
        );
    }
}
