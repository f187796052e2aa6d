//! What a folder of a published text encoder holds: its settings, its weights, and how its library cleans texts.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::clean::Cleaning;
use super::config::{Architecture, TextSettings};
use crate::config::{parse_config, read_config};
use crate::weights::Weights;
use crate::{Error, Result};

/// A text encoder ready to be built.
pub(super) struct Source {
    pub(super) settings: TextSettings,
    pub(super) weights: Weights,
    pub(super) cleaning: Cleaning,
}

/// Names open_clip gives a model's weights, in the order they are looked for; the names of transformers come after them.
const OPEN_CLIP_WEIGHTS: [&str; 3] = ["open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin"];

/// Where a folder keeps what is not in its weights; the first says that they are open_clip's.
pub(super) const CONFIGURATIONS: [&str; 2] = ["open_clip_config.json", "config.json"];

/// How the file names of Chinese-CLIP's authors begin and end.
const CHINESE_CLIP_WEIGHTS: (&str, [&str; 2]) = ("clip_cn_", [".pt", ".safetensors"]);

/// The part of an `open_clip_config.json` that concerns texts.
#[derive(Deserialize)]
struct OpenClipConfig {
    model_cfg: OpenClipModel,
}

#[derive(Deserialize)]
struct OpenClipModel {
    text_cfg: Map<String, Value>,
}

#[derive(Deserialize)]
struct OpenClipText {
    hf_model_name: Option<String>,
    #[serde(default)]
    tokenizer_kwargs: Map<String, Value>,
}

impl Source {
    /// A BERT of these settings with drawn weights, of which there is no folder.
    pub(super) fn random(settings: Map<String, Value>) -> Self {
        let settings = TextSettings::published(Path::new("published BERT"), Architecture::Bert, settings);
        Self { settings, weights: Weights::random(&[]), cleaning: Cleaning::Keep }
    }

    /// Opens a folder in the layout of open_clip (`open_clip_config.json`), of Chinese-CLIP's authors (`clip_cn_*.pt`) or of transformers
    /// (`config.json`).
    ///
    /// The first two name their text model only; a `config.json` of it beside them is taken where there is one, else the sizes it was
    /// published with.
    /// Errors: [`Error::Io`] and [`Error::Invalid`] for files that cannot be read, [`Error::Unsupported`] for models that cannot be loaded.
    pub(super) fn open(dir: &Path) -> Result<Self> {
        let [open_clip, config] = CONFIGURATIONS.map(|name| dir.join(name));
        if open_clip.is_file() {
            return Self::open_clip(dir, &open_clip);
        }
        if let Some(file) = chinese_clip_file(dir)? {
            return Self::chinese_clip(dir, &file);
        }
        if !config.is_file() {
            let (start, _) = CHINESE_CLIP_WEIGHTS;
            let reason = format!("holds no text encoder; looked for open_clip_config.json, {start}*.pt and config.json");
            return Err(Error::Invalid { path: dir.into(), reason });
        }
        let settings = TextSettings::read(&config)?;
        Ok(Self { settings, weights: Weights::open(dir)?, cleaning: Cleaning::Keep })
    }

    fn open_clip(dir: &Path, path: &Path) -> Result<Self> {
        let config: OpenClipConfig = read_config(path, &[])?;
        let text: OpenClipText = parse_config(path, Value::Object(config.model_cfg.text_cfg), &[])?;
        let unsupported = |what: String, hint: &str| Error::Unsupported { what: format!("{}: {what}", path.display()), hint: hint.into() };
        let Some(name) = text.hf_model_name else {
            let hint = "convert it to transformers' layout; open_clip models with an hf_model_name can be loaded as they are";
            return Err(unsupported("open_clip's own text transformer".into(), hint));
        };
        // What is left of the settings changes ids: a text in lower case without punctuation, no end of text, other languages.
        let usual = |(name, value): (&String, &Value)| matches!((name.as_str(), value.as_str()), ("clean", Some("whitespace")));
        if let Some((setting, value)) = text.tokenizer_kwargs.iter().find(|&setting| !usual(setting)) {
            return Err(unsupported(format!("tokenizer_kwargs {setting} = {value}"), "only clean = \"whitespace\" is known here"));
        }
        let own = dir.join("config.json");
        let settings = if own.is_file() {
            TextSettings::read(&own)?
        } else {
            let Some((architecture, settings)) = published_sizes(&name) else {
                return Err(unsupported(format!("hf_model_name {name:?}"), "put the config.json of that model beside it"));
            };
            TextSettings::published(path, architecture, settings)
        };
        let weights = OPEN_CLIP_WEIGHTS.iter().map(|name| dir.join(name)).find(|file| file.is_file());
        Ok(Self { settings, weights: Weights::open(weights.as_deref().unwrap_or(dir))?, cleaning: Cleaning::OpenClip })
    }

    fn chinese_clip(dir: &Path, file: &Path) -> Result<Self> {
        let weights = Weights::open(file)?;
        let own = dir.join("config.json");
        let settings = if own.is_file() {
            TextSettings::read_as(&own, Architecture::Bert)?
        } else {
            // The authors' three text models differ in depth: RBT3, RoBERTa-wwm-ext and RoBERTa-wwm-ext-large.
            let num_layers = (0..).take_while(|layer| weights.keys().any(|key| key.ends_with(&layer_key(*layer)))).count();
            TextSettings::published(file, Architecture::Bert, chinese_clip_sizes(num_layers))
        };
        Ok(Self { settings, weights, cleaning: Cleaning::Keep })
    }
}

/// Layers of the text model that the method was published with: Chinese-CLIP ViT-H/14's.
pub(super) const CHINESE_CLIP_LAYERS: usize = 24;

/// The settings of the text model of Chinese-CLIP that has so many layers.
pub(super) fn chinese_clip_sizes(num_layers: usize) -> Map<String, Value> {
    let width = if num_layers > 12 { 1024 } else { 768 };
    with_sizes(width, num_layers, [("vocab_size", 21_128), ("max_position_embeddings", 512), ("type_vocab_size", 2)])
}

/// The end of a key that each layer of a BERT has once.
fn layer_key(layer: usize) -> String {
    format!(".encoder.layer.{layer}.attention.self.query.weight")
}

fn is_chinese_clip_file(name: &str) -> bool {
    let (start, ends) = CHINESE_CLIP_WEIGHTS;
    name.starts_with(start) && ends.iter().any(|end| name.ends_with(end))
}

/// The only weight file of Chinese-CLIP's authors in a folder, if there is one.
fn chinese_clip_file(dir: &Path) -> Result<Option<PathBuf>> {
    let failed = |source| Error::Io { path: dir.into(), source };
    let (start, _) = CHINESE_CLIP_WEIGHTS;
    let mut files = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let name = entry.file_name();
        if name.to_str().is_some_and(is_chinese_clip_file) {
            files.push(entry.path());
        }
    }
    if files.len() > 1 {
        return Err(Error::Invalid { path: dir.into(), reason: format!("holds {} files {start}*: which one is meant?", files.len()) });
    }
    Ok(files.pop())
}

/// Of the files of a folder, the weights of a layout that is not transformers'; as [`Source::open`] finds them.
pub(crate) fn own_weights<'a>(files: &BTreeSet<&'a str>) -> Option<&'a str> {
    if files.contains("open_clip_config.json") {
        return OPEN_CLIP_WEIGHTS.iter().find_map(|name| files.get(name).copied());
    }
    let mut of_chinese_clip = files.iter().copied().filter(|name| is_chinese_clip_file(name));
    of_chinese_clip.next().filter(|_| of_chinese_clip.next().is_none())
}

/// The sizes of models that open_clip names in its own configurations.
fn published_sizes(name: &str) -> Option<(Architecture, Map<String, Value>)> {
    let name = name.rsplit('/').next().unwrap_or(name);
    let roberta = |width, layers, vocab: i64| {
        let mut settings = with_sizes(width, layers, [("vocab_size", vocab), ("max_position_embeddings", 514), ("type_vocab_size", 1)]);
        settings.insert("layer_norm_eps".into(), json!(1e-5));
        settings
    };
    let mt5 = |width: i64, inner: i64, layers: i64, heads: i64| {
        let names = ["vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads"];
        let sizes = names.into_iter().zip([250_112, width, 64, inner, layers, heads]).map(|(name, size)| (name.to_owned(), json!(size)));
        sizes.chain([("feed_forward_proj".to_owned(), json!("gated-gelu"))]).collect()
    };
    Some(match name {
        "xlm-roberta-base" => (Architecture::XlmRoberta, roberta(768, 12, 250_002)),
        "xlm-roberta-large" => (Architecture::XlmRoberta, roberta(1024, 24, 250_002)),
        "roberta-base" => (Architecture::Roberta, roberta(768, 12, 50_265)),
        "roberta-large" => (Architecture::Roberta, roberta(1024, 24, 50_265)),
        "mt5-small" => (Architecture::T5, mt5(512, 1024, 8, 6)),
        "mt5-base" => (Architecture::T5, mt5(768, 2048, 12, 12)),
        "mt5-large" => (Architecture::T5, mt5(1024, 2816, 24, 16)),
        "mt5-xl" => (Architecture::T5, mt5(2048, 5120, 24, 32)),
        _ => return None,
    })
}

/// BERT's settings: heads of 64 and an inner width of four times the outer, as all of its published sizes have.
fn with_sizes(width: i64, num_layers: usize, others: [(&str, i64); 3]) -> Map<String, Value> {
    let layers = num_layers as i64;
    let sizes =
        [("hidden_size", width), ("num_hidden_layers", layers), ("num_attention_heads", width / 64), ("intermediate_size", 4 * width)];
    sizes.into_iter().chain(others).map(|(name, size)| (name.to_owned(), json!(size))).collect()
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::super::bert::BertEncoder;
    use super::*;

    #[test]
    fn published_sizes_have_the_published_numbers_of_parameters() {
        tch::set_num_threads(1);
        let count = |architecture, settings| {
            let nothing = Weights::none();
            let settings = TextSettings::published(Path::new("config.json"), architecture, settings);
            BertEncoder::new(&settings, &nothing.root(Kind::Float, Device::Cpu)).unwrap();
            nothing.num_requested()
        };
        let (architecture, settings) = published_sizes("FacebookAI/xlm-roberta-large").unwrap();
        assert_eq!(count(architecture, settings), 558_840_832);
        assert_eq!(count(Architecture::Bert, chinese_clip_sizes(CHINESE_CLIP_LAYERS)), 324_472_832);
    }

    #[test]
    fn open_clip_models_that_cannot_be_loaded_say_why() {
        let refuse = |text_cfg: Value| {
            let dir = tempfile::tempdir().unwrap();
            let config = json!({ "model_cfg": { "embed_dim": 1024, "text_cfg": text_cfg }, "preprocess_cfg": {} });
            std::fs::write(dir.path().join("open_clip_config.json"), config.to_string()).unwrap();
            Source::open(dir.path()).err().unwrap().to_string()
        };
        assert!(refuse(json!({ "context_length": 77, "width": 768 })).contains("own text transformer"));
        assert!(refuse(json!({ "hf_model_name": "gpt2" })).contains("gpt2"));
        let other_cleaning = json!({ "hf_model_name": "xlm-roberta-base", "tokenizer_kwargs": { "clean": "canonicalize" } });
        assert!(refuse(other_cleaning).contains("canonicalize"));
        assert!(refuse(json!({ "hf_model_name": "xlm-roberta-base" })).contains("holds no weights"));
    }

    #[test]
    fn two_checkpoints_of_chinese_clip_in_a_folder_are_ambiguous() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["clip_cn_vit-h-14.pt", "clip_cn_rn50.pt"] {
            std::fs::write(dir.path().join(name), "").unwrap();
        }
        assert!(Source::open(dir.path()).err().unwrap().to_string().contains("which one"));
    }
}
