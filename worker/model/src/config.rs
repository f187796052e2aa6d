//! Reading the `config.json` that lies beside published weights.

use std::path::Path;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::{Error, Result};

/// A setting given once for all levels of a model, or level by level.
///
/// The order of the variants matters to serde: a list is first tried as one entry a level.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(untagged)]
pub enum PerLevel<T> {
    /// One entry a level.
    Each(Vec<T>),
    /// The same on all levels.
    Same(T),
}

impl<T: Clone> PerLevel<T> {
    /// The entries of `levels` levels, or `None` if there is another number of them.
    pub(crate) fn resolve(&self, levels: usize) -> Option<Vec<T>> {
        match self {
            Self::Each(entries) => (entries.len() == levels).then(|| entries.clone()),
            Self::Same(entry) => Some(vec![entry.clone(); levels]),
        }
    }
}

/// A setting that only some values of are computed: its name and those values as JSON. An absent setting is fine, and so is a list of such
/// values, one a level.
pub(crate) type Supported = (&'static str, &'static str);

/// Reads a configuration, refusing settings whose value is not among the supported ones. Settings named nowhere are ignored: they
/// concern training, or describe other variants.
///
/// `supported` maps a setting to a JSON list of the values that are computed.
/// Errors: [`Error::Io`], [`Error::Invalid`] for other JSON than `T` wants, [`Error::Unsupported`] naming the setting.
pub(crate) fn read_config<T: DeserializeOwned>(path: &Path, supported: &[Supported]) -> Result<T> {
    let bytes = std::fs::read(path).map_err(|source| Error::Io { path: path.to_path_buf(), source })?;
    let settings = serde_json::from_slice(&bytes)
        // No limit, to those who write it: published schedulers have a `lambda_min_clipped` of -Infinity.
        .or_else(|error| peapod_json::without_not_numbers(&bytes).map_or(Err(error), |bytes| serde_json::from_slice(&bytes)))
        .map_err(|error| Error::Invalid { path: path.to_path_buf(), reason: error.to_string() })?;
    parse_config(path, settings, supported)
}

/// As [`read_config`], of settings that were read from the file at `path` already.
pub(crate) fn parse_config<T: DeserializeOwned>(path: &Path, settings: Value, supported: &[Supported]) -> Result<T> {
    let invalid = |error: serde_json::Error| Error::Invalid { path: path.to_path_buf(), reason: error.to_string() };
    if let Some((what, values)) = unsupported_setting(&settings, supported) {
        return Err(Error::Unsupported { what, hint: format!("{} must be one of {values}", path.display()) });
    }
    serde_json::from_value(settings).map_err(invalid)
}

/// The first setting whose value is not among the supported ones, with that value, and those values.
pub(crate) fn unsupported_setting(settings: &Value, supported: &[Supported]) -> Option<(String, &'static str)> {
    supported.iter().find_map(|&(name, values)| {
        let value = settings.get(name)?;
        let accepted: Vec<Value> = serde_json::from_str(values).unwrap_or_default();
        let of_levels = || value.as_array().is_some_and(|levels| levels.iter().all(|level| accepted.contains(level)));
        (!accepted.contains(value) && !of_levels()).then(|| (format!("{name} = {value}"), values))
    })
}

/// Widest layer and longest list that are believed. Beyond them a configuration is damaged, and sizes computed from it could overflow.
const MAX_WIDTH: i64 = 1 << 20;
const MAX_LAYERS: i64 = 1000;

/// A width, such as a number of channels: at least 1.
pub(crate) fn width(setting: &'static str, value: i64) -> Result<i64> {
    in_range(setting, value, 1, MAX_WIDTH)
}

/// A number of layers, from `least`.
pub(crate) fn num_layers(setting: &'static str, value: i64, least: i64) -> Result<usize> {
    // The range makes the conversion safe.
    in_range(setting, value, least, MAX_LAYERS).map(|value| value as usize)
}

fn in_range(setting: &'static str, value: i64, least: i64, most: i64) -> Result<i64> {
    if (least..=most).contains(&value) { Ok(value) } else { Err(faulty(setting, format!("{value} is not in {least}..={most}"))) }
}

/// The error of a setting that does not fit the others.
pub(crate) fn faulty(setting: &'static str, reason: impl Into<String>) -> Error {
    Error::Config { setting, reason: reason.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn infinities_of_python_are_no_limit_outside_of_strings() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let read = |text: &str| {
            std::fs::write(file.path(), text).unwrap();
            read_config::<Value>(file.path(), &[]).map_err(|error| error.to_string())
        };
        let text = r#"{"least": -Infinity, "most": [Infinity, NaN], "named": "-Infinity \" NaN", "NaN": 1}"#;
        let wanted = serde_json::json!({ "least": null, "most": [null, null], "named": "-Infinity \" NaN", "NaN": 1 });
        assert_eq!(read(text).unwrap(), wanted);
        for damaged in ["{\"a\": Infinit}", "{\"a\": \"", "\"\\", "{\"a\": -Infinity"] {
            assert!(read(damaged).is_err(), "{damaged}");
        }
    }
}
