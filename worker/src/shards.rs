//! `worker shards`: what is in shards ([`inspect`]), and shards from pictures and a table of captions ([`make`]).

pub mod inspect;
pub mod make;
mod table;
pub(crate) mod whole;

use indicatif::{ProgressBar, ProgressStyle};

/// What a command over shards has to say once it has gone through all of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// As text or JSON.
    pub text: String,
    /// Why the shards are not to be used as they are, in one line.
    pub problem: Option<String>,
}

/// A bar on a terminal, nothing elsewhere.
pub(crate) fn progress_bar(len: Option<u64>, unit: &str) -> ProgressBar {
    let bar = match len {
        Some(len) => ProgressBar::new(len),
        None => ProgressBar::no_length(),
    };
    let place = if len.is_some() { "{wide_bar} {human_pos} of {human_len}" } else { "{spinner} {human_pos}" };
    let style = ProgressStyle::with_template(&format!("{place} {unit}, {{elapsed}}"));
    bar.with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}

/// `1.2 GB`.
pub(crate) fn size(num_bytes: u64) -> String {
    match num_bytes {
        0..1_000_000 => format!("{:.1} kB", num_bytes as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} MB", num_bytes as f64 / 1e6),
        _ => format!("{:.2} GB", num_bytes as f64 / 1e9),
    }
}
