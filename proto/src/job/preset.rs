//! Named sets of defaults.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use toml::{Table, Value};

use super::Job;

/// What the fields that a job file leaves out are filled in from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Preset {
    /// The method as it is meant to be.
    #[default]
    Fixed,
    /// The published trainer, with its quirks: for comparison with it.
    Reference,
}

/// The quirks of the published trainer. Each can be set back in the job file.
const REFERENCE: &str = include_str!("reference.toml");

impl Preset {
    /// The fields that differ from their own defaults.
    pub(super) fn defaults(self) -> Option<&'static str> {
        match self {
            Self::Fixed => None,
            Self::Reference => Some(REFERENCE),
        }
    }
}

/// Parses a job file with `defaults` under it.
pub(super) fn fill_in(text: &str, defaults: &str) -> Result<Job, toml::de::Error> {
    let mut job: Table = text.parse()?;
    merge(&mut job, defaults.parse()?);
    Value::Table(job).try_into()
}

fn merge(job: &mut Table, defaults: Table) {
    for (key, default) in defaults {
        match (job.get_mut(&key), default) {
            (Some(Value::Table(section)), Value::Table(default)) => merge(section, default),
            (Some(_), _) => {}
            (None, default) => drop(job.insert(key, default)),
        }
    }
}
