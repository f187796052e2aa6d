//! Which shards this machine sees.

use std::fmt::Write as _;

use peapod_data::source::shown_url;
use peapod_data::{Seen, SourceOptions, Sources};
use peapod_proto::program::counted;

/// Most shards behind a network that are asked for before a job: every one costs a request.
const MAX_ASKED: usize = 1000;

/// Shards named in an error before the rest is counted.
const MISSING_SHOWN: usize = 5;

/// What this machine sees of a list of shards.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Visibility {
    /// Shards found here.
    pub found: usize,
    /// Their size.
    pub num_bytes: u64,
    /// Shards not found here.
    pub missing: Vec<String>,
    /// Shards of which a store does not say from here whether they exist.
    pub unknown: usize,
    /// The first of those, and why.
    pub why_unknown: Option<String>,
    /// Shards that were not looked at, because they are many and far away.
    pub not_asked: usize,
}

impl Visibility {
    /// Looks for `shards`, those behind a network too, up to a number of them.
    pub(super) fn of(shards: &[String]) -> Self {
        let is_far = |shard: &str| shard.contains("://") && !shard.starts_with("file://");
        let num_far = shards.iter().filter(|shard| is_far(shard)).count();
        // Spread over all of them: lists end too early, or one host of several is down.
        let every = num_far.div_ceil(MAX_ASKED).max(1);
        let mut far = 0..;
        let asked: Vec<String> =
            shards.iter().filter(|shard| !is_far(shard) || far.next().is_some_and(|at: usize| at.is_multiple_of(every))).cloned().collect();
        let mut visible = Self { not_asked: shards.len() - asked.len(), ..Self::default() };
        for (shard, seen) in asked.iter().zip(Sources::new(SourceOptions::impatient()).look(&asked)) {
            match seen {
                Seen::Bytes(len) => {
                    visible.found += 1;
                    visible.num_bytes += len;
                }
                Seen::Missing => visible.missing.push(shard.clone()),
                Seen::Unknown(why) => {
                    visible.unknown += 1;
                    visible.why_unknown.get_or_insert_with(|| format!("{}: {why}", shown_url(shard)));
                }
            }
        }
        visible
    }

    /// What is wrong with the shard list as far as this machine can tell; `here` if the workers run on it too.
    ///
    /// A coordinator may run where no data is mounted: if it sees none of the shards it cannot judge them. If it sees some,
    /// the others are missing.
    ///
    /// # Errors
    /// Names the first missing shards.
    pub fn judge(&self, here: bool) -> Result<(), String> {
        // A store's answer is the same everywhere.
        let is_local = |shard: &String| !shard.contains("://") || shard.starts_with("file://");
        if self.missing.is_empty() || (self.found == 0 && !here && self.missing.iter().all(is_local)) {
            return Ok(());
        }
        let mut text = format!("{} of {} shards do not exist:", self.missing.len(), self.missing.len() + self.found);
        for shard in self.missing.iter().take(MISSING_SHOWN) {
            let _ = write!(text, "\n  {}", shown_url(shard));
        }
        if self.missing.len() > MISSING_SHOWN {
            let _ = write!(text, "\n  and {} more", self.missing.len() - MISSING_SHOWN);
        }
        Err(text)
    }

    /// The shard list in a line, with what could not be seen of it.
    #[must_use]
    pub fn describe(&self, num_shards: usize) -> String {
        let mut text = counted(num_shards, "shard");
        if self.found > 0 {
            let about = if self.not_asked > 0 { format!("{} of them looked at, ", self.found) } else { String::new() };
            let _ = write!(text, ", {about}{:.1} MB", self.num_bytes as f64 / 1e6);
        } else if self.unknown == 0 {
            text.push_str(", none of them visible from this machine: the workers must see them");
        }
        if let Some(why) = &self.why_unknown {
            let _ = write!(text, "; {} cannot be looked at from this machine, such as {why}", self.unknown);
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shards_behind_a_network_are_looked_at_too() {
        // Nobody listens at this port.
        let seen = Visibility::of(&["http://127.0.0.1:1/{00}.tar".to_owned()]);
        assert_eq!((seen.found, seen.missing.len(), seen.unknown), (0, 0, 1));
        assert!(seen.judge(true).is_ok());
        let line = seen.describe(1);
        assert!(line.starts_with("1 shard; 1 cannot be looked at from this machine, such as http://127.0.0.1:1/"), "{line}");
        let missing = Visibility { missing: vec!["http://host/0.tar".into()], ..Visibility::default() };
        assert!(missing.judge(false).is_err(), "a server's answer is the same everywhere");
    }
}
