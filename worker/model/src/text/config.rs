//! What the configuration files of text encoders and the token ids fed to them have in common.

use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use tch::{Device, Tensor};

use crate::config::{Supported, parse_config, read_config};
use crate::transfer::send;
use crate::{Error, Result};

/// The settings of a text model as its `config.json` gives them.
pub(super) struct TextSettings {
    path: PathBuf,
    architecture: Architecture,
    is_chinese_clip: bool,
    settings: Map<String, Value>,
}

/// The architectures that can be loaded, by `model_type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Architecture {
    /// BERT, also as the text half of Chinese-CLIP.
    Bert,
    /// RoBERTa: BERT whose positions are counted from behind the pad id.
    Roberta,
    /// XLM-R: RoBERTa with a sentencepiece vocabulary.
    XlmRoberta,
    /// AltCLIP: XLM-R and a linear layer.
    AltClip,
    /// The text half of CLIP.
    Clip,
    /// The encoder of mT5, or of a T5 built like it.
    T5,
}

impl Architecture {
    fn of(model_type: &str) -> Option<Self> {
        Some(match model_type {
            "bert" | "chinese_clip" | "chinese_clip_text_model" => Self::Bert,
            "roberta" => Self::Roberta,
            "xlm-roberta" => Self::XlmRoberta,
            "altclip" | "altclip_text_model" => Self::AltClip,
            "clip" | "clip_text_model" => Self::Clip,
            "mt5" | "t5" => Self::T5,
            _ => return None,
        })
    }

    /// What people call it.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Bert => "BERT",
            Self::Roberta => "RoBERTa",
            Self::XlmRoberta => "XLM-R",
            Self::AltClip => "AltCLIP",
            Self::Clip => "CLIP",
            Self::T5 => "mT5",
        }
    }

    /// What the library that writes the configurations fills in where they are silent: nested ones hold only what differs.
    fn defaults(self) -> Value {
        let bert = |vocab: i64, width: i64, layers: i64, positions: i64, types: i64, eps: f64, pad: i64| {
            serde_json::json!({
                "vocab_size": vocab, "hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers,
                "num_attention_heads": width / 64, "max_position_embeddings": positions, "type_vocab_size": types,
                "layer_norm_eps": eps, "pad_token_id": pad, "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1,
            })
        };
        match self {
            Self::Bert => bert(30522, 768, 12, 512, 2, 1e-12, 0),
            Self::Roberta => bert(50265, 768, 12, 512, 2, 1e-12, 1),
            Self::XlmRoberta => bert(30522, 768, 12, 512, 2, 1e-12, 1),
            Self::AltClip => bert(250_002, 1024, 24, 514, 1, 1e-5, 1),
            Self::Clip => serde_json::json!({
                "vocab_size": 49408, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8,
            }),
            Self::T5 => Value::Object(Map::new()),
        }
    }
}

impl TextSettings {
    /// Reads `config.json`, or its part `text_config` where the file describes a model of texts and images.
    ///
    /// Errors: [`Error::Io`], [`Error::Invalid`] if it is not such a file or names no `model_type`, [`Error::Unsupported`] for a
    /// `model_type` that cannot be loaded.
    pub(super) fn read(path: &Path) -> Result<Self> {
        let TextPart { settings, whole, part } = TextPart::of(read_config(path, &[])?);
        let Some(named) = whole.as_ref().or(part.as_ref()) else {
            return Err(Error::Invalid { path: path.into(), reason: "has no model_type".into() });
        };
        // A dual encoder of any two models has a name of its own; its text part says what it is.
        let Some(architecture) = [&whole, &part].into_iter().flatten().find_map(|name| Architecture::of(name)) else {
            return Err(Error::Unsupported {
                what: format!("a text encoder of model_type {named:?}"),
                hint: "bert, chinese_clip, roberta, xlm-roberta, altclip, clip and mt5 can be loaded".into(),
            });
        };
        let is_chinese_clip = [&whole, &part].into_iter().flatten().any(|name| name.starts_with("chinese_clip"));
        Ok(Self { path: path.into(), architecture, is_chinese_clip, settings })
    }

    /// Reads `config.json` of a model whose architecture is known from where it lies.
    pub(super) fn read_as(path: &Path, architecture: Architecture) -> Result<Self> {
        Ok(Self::of(path, architecture, read_config(path, &[])?))
    }

    /// As [`TextSettings::read_as`], of settings that were read already; `path` names them in errors.
    pub(super) fn of(path: &Path, architecture: Architecture, settings: Map<String, Value>) -> Self {
        Self { path: path.into(), architecture, is_chinese_clip: false, settings: TextPart::of(settings).settings }
    }

    /// Settings that no `config.json` gives: those of a published model known by its name.
    pub(super) fn published(path: &Path, architecture: Architecture, settings: Map<String, Value>) -> Self {
        Self { path: path.into(), architecture, is_chinese_clip: false, settings }
    }

    /// Whether the file calls the model Chinese-CLIP, in the layout of transformers.
    pub(super) fn is_chinese_clip(&self) -> bool {
        self.is_chinese_clip
    }

    /// The architecture they describe.
    pub(super) fn architecture(&self) -> Architecture {
        self.architecture
    }

    /// The file they come from.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// The settings as `T`, with the defaults of their architecture, refusing those that are not computed (see [`read_config`]).
    pub(super) fn parse<T: DeserializeOwned>(&self, supported: &[Supported]) -> Result<T> {
        let mut settings = self.architecture.defaults();
        if let Value::Object(defaults) = &mut settings {
            defaults.extend(self.settings.clone());
        }
        parse_config(&self.path, settings, supported)
    }
}

/// What a `config.json` says of texts.
struct TextPart {
    settings: Map<String, Value>,
    /// The `model_type` of the file.
    whole: Option<String>,
    /// The `model_type` of its part `text_config`.
    part: Option<String>,
}

impl TextPart {
    fn of(mut settings: Map<String, Value>) -> Self {
        let model_type = |settings: &Map<String, Value>| settings.get("model_type").and_then(Value::as_str).map(str::to_owned);
        let whole = model_type(&settings);
        let (mut text, part) = match (settings.remove("text_config"), settings.remove("text_config_dict")) {
            // CLIP's older exports say it twice. The second counts, with the defaults of its class where it is silent.
            (text, Some(Value::Object(counts))) => {
                let part = model_type(&counts).or_else(|| model_type(text.as_ref()?.as_object()?));
                (counts, part)
            }
            (Some(Value::Object(text)), _) => {
                let part = model_type(&text);
                (text, part)
            }
            _ => return Self { settings, whole, part: None },
        };
        // The width of the space shared with images is written outside.
        text.extend(settings.remove("projection_dim").map(|width| ("projection_dim".to_owned(), width)));
        Self { settings: text, whole, part }
    }
}

/// Checks the widths of a transformer: `width` divides evenly into `heads`, and nothing is zero or negative.
pub(super) fn check_transformer(path: &Path, width: i64, heads: i64, others: &[i64]) -> Result<()> {
    if heads >= 1 && width >= 1 && width % heads == 0 && others.iter().all(|&size| size >= 1) {
        return Ok(());
    }
    let reason = format!("{heads} heads of a width of {width}: sizes must be positive and the width a multiple of the heads");
    Err(Error::Invalid { path: path.into(), reason })
}

/// Checks rates of dropout.
pub(super) fn check_dropout(path: &Path, rates: &[(&str, f64)]) -> Result<()> {
    match rates.iter().find(|(_, rate)| !(0.0..1.0).contains(rate)) {
        None => Ok(()),
        Some((setting, rate)) => {
            Err(Error::Invalid { path: path.into(), reason: format!("{setting} = {rate} must be at least 0 and less than 1") })
        }
    }
}

/// Moves token ids to a device.
///
/// Shapes: equally long rows, to int64 `[B, L]`.
/// Errors: [`Error::Shape`] if there is no row, rows differ in length or exceed `max_length`, or an id is outside `0..vocab_size`
/// (libtorch would abort the device over it).
pub(super) fn ids_to_tensor(ids: &[Vec<i64>], max_length: i64, vocab_size: i64, device: Device) -> Result<Tensor> {
    let shape_error = |detail: String| Error::Shape { what: "token ids", detail };
    let length = ids.first().map(Vec::len).ok_or_else(|| shape_error("no rows".into()))?;
    if let Some(other) = ids.iter().find(|row| row.len() != length) {
        return Err(shape_error(format!("rows of {length} and of {}", other.len())));
    }
    if length == 0 || length as i64 > max_length {
        return Err(shape_error(format!("rows of {length}, the encoder has {max_length} positions")));
    }
    let flat = ids.concat();
    if let Some(id) = flat.iter().find(|id| !(0..vocab_size).contains(*id)) {
        return Err(shape_error(format!("id {id}, the encoder's vocabulary has {vocab_size}")));
    }
    send(&Tensor::f_from_slice(&flat)?.f_view([ids.len() as i64, length as i64])?, device)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_clip_says_of_texts_for_the_second_time_counts() {
        let part = |settings: Value| {
            let TextPart { settings, whole, part } = TextPart::of(settings.as_object().unwrap().clone());
            (Value::from(settings), whole, part)
        };
        let (first, second) =
            (json!({ "model_type": "clip_text_model", "hidden_size": 8, "hidden_act": "gelu" }), json!({ "hidden_size": 16 }));
        let names = |whole: &str| (Some(whole.to_owned()), Some("clip_text_model".to_owned()));
        let (settings, whole, named) =
            part(json!({ "model_type": "clip", "projection_dim": 4, "text_config": first, "text_config_dict": second }));
        assert_eq!((settings, (whole, named)), (json!({ "hidden_size": 16, "projection_dim": 4 }), names("clip")));
        let (settings, whole, named) = part(json!({ "model_type": "clip", "text_config": first, "text_config_dict": null }));
        assert_eq!((settings, (whole, named)), (first, names("clip")));
        assert_eq!(part(second.clone()), (second, None, None));
    }

    #[test]
    fn ids_that_would_abort_the_device_are_refused() {
        let convert = |rows: &[Vec<i64>]| ids_to_tensor(rows, 4, 10, Device::Cpu);
        assert_eq!(convert(&[vec![1, 2], vec![3, 9]]).unwrap().size(), [2, 2]);
        for rows in [vec![], vec![vec![]], vec![vec![1], vec![1, 2]], vec![vec![0; 5]], vec![vec![10]], vec![vec![-1]]] {
            assert!(matches!(convert(&rows), Err(Error::Shape { .. })), "{rows:?}");
        }
    }
}
