//! Holds a job's values against their ranges, and keeps the ranges for the reference: what it says is what is checked.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::time::Duration;

use super::bytes;

/// What was found wrong, and what every key that was looked at may be.
#[derive(Debug, Default)]
pub(super) struct Checks {
    /// A line for each thing that is wrong.
    pub problems: Vec<String>,
    /// Ranges in words by key, such as `train.betas[0]`.
    pub ranges: BTreeMap<&'static str, String>,
}

impl Checks {
    /// Notes what `key` may be, and the problem, if there is one.
    pub fn rule(&mut self, key: &'static str, range: impl Into<String>, problem: Option<String>) {
        self.ranges.insert(key, range.into());
        self.problems.extend(problem);
    }

    /// Notes what is wrong beyond a single key's range.
    pub fn problem(&mut self, problem: impl Into<String>) {
        self.problems.push(problem.into());
    }

    /// Holds `value` against a range with both ends.
    pub fn within<T: Shown>(&mut self, key: &'static str, value: T, range: RangeInclusive<T>) {
        let (low, high) = (range.start().shown(), range.end().shown());
        let problem = (!range.contains(&value)).then(|| format!("{key} ({}) must be within {low}..={high}", value.shown()));
        self.rule(key, format!("{low} to {high}"), problem);
    }

    /// Holds `value` against its smallest; `why` ends the complaint.
    pub fn at_least<T: Shown>(&mut self, key: &'static str, value: T, low: T, why: &str) {
        let problem = (value < low).then(|| format!("{key} ({}) must be at least {}{why}", value.shown(), low.shown()));
        self.rule(key, format!("at least {}", low.shown()), problem);
    }

    /// Holds widths and heights against what the networks can take.
    pub fn sizes(&mut self, key: &'static str, sizes: &[[u32; 2]]) {
        self.rule(key, "multiples of 8, 8 to 8192", None);
        for [width, height] in sizes {
            if [width, height].iter().any(|side| *side % 8 != 0 || !(8..=8192).contains(*side)) {
                self.problem(format!("{key}: [{width}, {height}] must be multiples of 8 within 8..=8192"));
            }
        }
    }
}

/// A value as people write it in a job file.
pub(super) trait Shown: PartialOrd {
    /// The text.
    fn shown(&self) -> String;
}

impl Shown for u32 {
    fn shown(&self) -> String {
        self.to_string()
    }
}

impl Shown for u64 {
    fn shown(&self) -> String {
        self.to_string()
    }
}

impl Shown for f64 {
    fn shown(&self) -> String {
        let is_plain = *self == 0.0 || (1e-4..1e7).contains(&self.abs());
        if is_plain { self.to_string() } else { format!("{self:e}") }
    }
}

/// A size, which people write with its unit.
#[derive(PartialEq, PartialOrd)]
pub(super) struct Bytes(pub u64);

impl Shown for Bytes {
    fn shown(&self) -> String {
        bytes::shown(self.0)
    }
}

impl Shown for Duration {
    fn shown(&self) -> String {
        humantime::format_duration(*self).to_string()
    }
}
