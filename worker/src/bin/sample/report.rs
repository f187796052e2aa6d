//! Tells how far it is: a bar on a terminal, a line a batch elsewhere; on standard error, so that nothing mixes with data.

use std::io::IsTerminal;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use peapod_proto::program::say;
use peapod_worker::draw::memory::peak_bytes;

pub struct Reporter {
    bar: ProgressBar,
    terminal: bool,
}

impl Reporter {
    pub fn new(num_steps: usize) -> Self {
        let terminal = std::io::stderr().is_terminal();
        let target = if terminal { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        let bar = ProgressBar::with_draw_target(Some(num_steps as u64), target);
        if let Ok(style) = ProgressStyle::with_template("{bar:32} step {pos} of {len}, {eta} left") {
            bar.set_style(style);
        }
        Self { bar, terminal }
    }

    pub fn say(&self, line: String) {
        if self.terminal {
            self.bar.println(line);
        } else {
            say(line);
        }
    }

    pub fn step(&self) {
        self.bar.inc(1);
    }

    pub fn drew(&self, done: usize, all: usize) {
        if !self.terminal && all > 1 {
            say(format_args!("drew {done} of {all} prompts"));
        }
    }

    pub fn finish(&self, num_pictures: usize, took: Duration) {
        self.bar.finish_and_clear();
        say(summary(num_pictures, took, peak_bytes()));
    }
}

/// How fast it was, and how much memory it took.
fn summary(num_pictures: usize, took: Duration, peak_bytes: Option<u64>) -> String {
    let seconds = took.as_secs_f64();
    let peak = peak_bytes.map(|bytes| format!(", peak memory {} MB", bytes >> 20)).unwrap_or_default();
    let pictures = if num_pictures == 1 { "picture" } else { "pictures" };
    format!("drew {num_pictures} {pictures} in {seconds:.2} s ({:.2} samples/s{peak})", num_pictures as f64 / seconds.max(1e-9))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_line_has_speed_and_memory() {
        assert_eq!(summary(10, Duration::from_secs(4), Some(512 << 20)), "drew 10 pictures in 4.00 s (2.50 samples/s, peak memory 512 MB)");
        assert_eq!(summary(1, Duration::from_millis(500), None), "drew 1 picture in 0.50 s (2.00 samples/s)");
    }
}
