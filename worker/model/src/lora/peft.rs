//! What PEFT says, apart from the factors, of the strength they were trained with: in a file of its own, or in diffusers' metadata.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize;
use serde_json::{Map, Value};

use super::keys::PEFT_BEGINNING;
use crate::config::{Supported, parse_config, read_config};
use crate::source::Part;
use crate::weights::Weights;
use crate::{Error, Result};

/// Where diffusers says it in a file's metadata, for all parts of a model.
const METADATA: &str = "lora_adapter_metadata";
/// Where PEFT itself says it, beside a file.
const CONFIG_FILE: &str = "adapter_config.json";
/// Parts that LoRAs are made for.
const PARTS: [Part; 3] = [Part::Unet, Part::TextEncoder, Part::TextEncoder2];

/// Settings that make something else of the factors than a sum, or that changed the model itself, with the values that do not.
const SUPPORTED: &[Supported] = &[
    ("peft_type", r#"["LORA", null]"#),
    ("use_dora", "[false, null]"),
    ("init_lora_weights", r#"[true, false, "gaussian", "orthogonal", "eva", null]"#),
];

/// The part of PEFT's `LoraConfig` that bears on the strength. Ranks are read off the factors.
#[derive(Debug, Deserialize)]
struct LoraConfig {
    lora_alpha: f64,
    /// Alphas of single modules, by regular expressions.
    alpha_pattern: Option<BTreeMap<String, f64>>,
    use_rslora: Option<bool>,
}

/// How a product of factors is scaled.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Strength {
    /// By this, divided by the rank.
    ByRank(f64),
    /// By this, divided by the square root of the rank.
    ///
    /// Source: Kalajdzievski 2023 (arXiv:2312.03732).
    ByRoot(f64),
}

impl Strength {
    /// The factor at a rank.
    pub(super) fn at(self, rank: f64) -> f64 {
        match self {
            Self::ByRank(alpha) => alpha / rank,
            Self::ByRoot(alpha) => alpha / rank.sqrt(),
        }
    }
}

/// The strengths of a file's modules, where it leaves them to PEFT.
#[derive(Default)]
pub(super) struct PeftStrengths(BTreeMap<Part, LoraConfig>);

impl PeftStrengths {
    /// Reads them from the metadata of a file, or, for a file that PEFT wrote, from the `adapter_config.json` beside it; none if there is
    /// neither. `path` is what `weights` were opened from.
    ///
    /// Errors: [`Error::Io`] and [`Error::Invalid`] for what cannot be read; [`Error::Unsupported`] for variants that are no sum of a
    /// weight and a product, or alphas of modules that are not simply named.
    pub(super) fn read(path: &Path, weights: &Weights) -> Result<Self> {
        if let Some(text) = weights.metadata(METADATA) {
            let settings = serde_json::from_str(&text)
                .map_err(|error| Error::Invalid { path: path.into(), reason: format!("{METADATA} of its metadata: {error}") })?;
            return Self::of_metadata(path, &settings);
        }
        let folder = if path.is_dir() { path } else { path.parent().unwrap_or(Path::new("")) };
        let file = folder.join(CONFIG_FILE);
        // Other files in a folder are none of PEFT's business.
        if !weights.holds_any(PEFT_BEGINNING) || !file.is_file() {
            return Ok(Self::default());
        }
        let settings = read_config(&file, &[])?;
        Ok(Self(BTreeMap::from([(Part::Unet, LoraConfig::parse(&file, settings)?)])))
    }

    /// Reads settings whose names begin with that of the part they are for, or that are for all parts.
    fn of_metadata(path: &Path, settings: &Map<String, Value>) -> Result<Self> {
        let mut configs = BTreeMap::new();
        for part in PARTS {
            let own = settings.iter().filter_map(|(name, value)| Some((name.strip_prefix(part.name())?.strip_prefix('.')?, value)));
            let of_all = settings.iter().filter(|(name, _)| !name.contains('.')).map(|(name, value)| (name.as_str(), value));
            let settings: Map<String, Value> = of_all.chain(own).map(|(name, value)| (name.to_owned(), value.clone())).collect();
            if !settings.is_empty() {
                configs.insert(part, LoraConfig::parse(path, settings.into())?);
            }
        }
        Ok(Self(configs))
    }

    /// The strength of a module; `None` if nothing is said of its part.
    ///
    /// Errors: [`Error::Unsupported`] if it has two alphas: which comes first is not known here.
    pub(super) fn of(&self, part: Part, module: &str) -> Result<Option<Strength>> {
        let Some(config) = self.0.get(&part) else { return Ok(None) };
        let patterns = config.alpha_pattern.iter().flatten().filter(|(pattern, _)| is_named(module, pattern));
        let mut alphas: Vec<f64> = patterns.map(|(_, alpha)| *alpha).collect();
        alphas.dedup();
        let alpha = match alphas[..] {
            [] => config.lora_alpha,
            [alpha] => alpha,
            [first, second, ..] => {
                let what = format!("alpha_pattern that gives {module} both {first} and {second}");
                return Err(Error::Unsupported { what, hint: "name each module once".into() });
            }
        };
        Ok(Some(if config.use_rslora == Some(true) { Strength::ByRoot(alpha) } else { Strength::ByRank(alpha) }))
    }

    /// The error of a file whose factors came without their strength.
    pub(super) fn missing(path: &Path) -> Error {
        let reason = format!("PEFT wrote it, which keeps the strength of a LoRA (lora_alpha) in {CONFIG_FILE}: put that file beside it");
        Error::Invalid { path: path.into(), reason }
    }
}

impl LoraConfig {
    fn parse(path: &Path, settings: Value) -> Result<Self> {
        let config: Self = parse_config(path, settings, SUPPORTED)?;
        // A dot stands for any letter there, which here can only be a dot.
        let is_plain = |pattern: &str| {
            let name = pattern.strip_prefix('^').unwrap_or(pattern);
            name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'.')
        };
        if let Some(pattern) = config.alpha_pattern.iter().flatten().map(|(pattern, _)| pattern).find(|pattern| !is_plain(pattern)) {
            let hint = format!("{}: give the names of modules instead of regular expressions", path.display());
            return Err(Error::Unsupported { what: format!("alpha_pattern {pattern:?}"), hint });
        }
        Ok(config)
    }
}

/// Whether a pattern that is a name means a module: the whole of its name, or the end of it unless the pattern begins with `^`.
fn is_named(module: &str, pattern: &str) -> bool {
    match pattern.strip_prefix('^') {
        Some(name) => module == name,
        None => module.strip_suffix(pattern).is_some_and(|rest| rest.is_empty() || rest.ends_with('.')),
    }
}
