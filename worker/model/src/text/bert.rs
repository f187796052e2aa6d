//! BERT, as the text half of Chinese-CLIP and of the demo's student.

use std::path::Path;

use serde::Deserialize;
use tch::{Device, Kind, Tensor};

use super::config::{check_transformer, ids_to_tensor};
use crate::Result;
use crate::config::{Supported, read_config};
use crate::nn::{Embedding, LayerNorm, Linear, attention};
use crate::weights::{Scope, Weights};

/// A `config.json` of a BERT model.
#[derive(Debug, Clone, Deserialize)]
struct BertConfig {
    vocab_size: i64,
    hidden_size: i64,
    intermediate_size: i64,
    num_hidden_layers: usize,
    num_attention_heads: i64,
    max_position_embeddings: i64,
    #[serde(default = "type_vocab_size")]
    type_vocab_size: i64,
    #[serde(default = "layer_norm_eps")]
    layer_norm_eps: f64,
}

fn type_vocab_size() -> i64 {
    2
}

fn layer_norm_eps() -> f64 {
    1e-12
}

/// Settings that change the network in ways not computed here, with the values that leave it as it is.
const SUPPORTED: &[Supported] = &[("hidden_act", r#"["gelu"]"#), ("position_embedding_type", r#"["absolute", null]"#)];

/// A BERT encoder without its pooler: bidirectional, normalised after each block, no dropout.
pub struct BertEncoder {
    config: BertConfig,
    kind: Kind,
    device: Device,
    word_embeddings: Embedding,
    /// What is added to the words whatever they are: positions and the first token type, `[positions, width]`.
    position_embeddings: Tensor,
    layer_norm: LayerNorm,
    layers: Vec<Layer>,
}

struct Layer {
    query: Linear,
    key: Linear,
    value: Linear,
    attention_output: Linear,
    attention_norm: LayerNorm,
    intermediate: Linear,
    output: Linear,
    output_norm: LayerNorm,
}

impl BertEncoder {
    /// Loads a folder with `config.json` and safetensors weights, whose keys may carry the prefix `bert.` of a task model.
    ///
    /// Errors: [`crate::Error::Io`], [`crate::Error::Invalid`] for a broken or contradictory configuration, [`crate::Error::Weights`] if the weights do not
    /// fit it, [`crate::Error::Unsupported`] for another activation than the exact GELU or relative positions.
    pub fn load(dir: &Path, kind: Kind, device: Device) -> Result<Self> {
        let path = dir.join("config.json");
        let config: BertConfig = read_config(&path, SUPPORTED)?;
        let sizes = [config.vocab_size, config.intermediate_size, config.max_position_embeddings, config.type_vocab_size];
        check_transformer(&path, config.hidden_size, config.num_attention_heads, &sizes)?;
        let weights = Weights::open(dir)?;
        let root = weights.root(kind, device);
        let bare = root.has("embeddings.word_embeddings.weight");
        let model = if bare { root } else { root / "bert" };
        let embeddings = &model / "embeddings";
        let width = config.hidden_size;
        let table = |name: &str, rows: i64| (&embeddings / name).tensor("weight", &[rows, width]);
        let first_type = table("token_type_embeddings", config.type_vocab_size).narrow(0, 0, 1);
        let encoder = Self {
            kind,
            device,
            word_embeddings: Embedding::new(&embeddings / "word_embeddings", config.vocab_size, width),
            position_embeddings: table("position_embeddings", config.max_position_embeddings) + first_type,
            layer_norm: LayerNorm::new(&embeddings / "LayerNorm", width, config.layer_norm_eps),
            layers: (0..config.num_hidden_layers).map(|index| Layer::new(&model / "encoder" / "layer" / index, &config)).collect(),
            config,
        };
        // The pooler and the heads of task models are not used here.
        weights.finish(&["position_ids", "pooler.", "bert.pooler.", "cls."])?;
        Ok(encoder)
    }

    /// Returns the states after the last layer. Positions that hold `pad_id` are not attended to, but have states of their own.
    ///
    /// Shapes: equally long rows of ids, to `[B, L, width]`, in the kind it was loaded in.
    /// Errors: [`crate::Error::Shape`] if the rows do not fit the encoder.
    pub fn forward(&self, ids: &[Vec<i64>], pad_id: i64) -> Result<Tensor> {
        let tokens = ids_to_tensor(ids, self.config.max_position_embeddings, self.config.vocab_size, self.device)?;
        let mask = Tensor::zeros([], (self.kind, self.device)).where_scalarother(&tokens.ne(pad_id), f64::NEG_INFINITY);
        let mask = mask.to_kind(self.kind).unsqueeze(1).unsqueeze(1);

        let positions = self.position_embeddings.narrow(0, 0, tokens.size()[1]);
        let embedded = self.layer_norm.forward(&(self.word_embeddings.forward(&tokens) + positions));
        Ok(self.layers.iter().fold(embedded, |states, layer| layer.forward(&states, &mask, self.config.num_attention_heads)))
    }

    /// Returns the width of the token states.
    pub fn width(&self) -> i64 {
        self.config.hidden_size
    }

    /// Returns the longest row of ids it takes.
    pub fn max_length(&self) -> i64 {
        self.config.max_position_embeddings
    }
}

impl Layer {
    fn new(scope: Scope<'_>, config: &BertConfig) -> Self {
        let (width, inner, eps) = (config.hidden_size, config.intermediate_size, config.layer_norm_eps);
        let attention = &scope / "attention";
        let projection = |name: &str| Linear::new(&attention / "self" / name, width, width, true);
        Self {
            query: projection("query"),
            key: projection("key"),
            value: projection("value"),
            attention_output: Linear::new(&attention / "output" / "dense", width, width, true),
            attention_norm: LayerNorm::new(&attention / "output" / "LayerNorm", width, eps),
            intermediate: Linear::new(&scope / "intermediate" / "dense", width, inner, true),
            output: Linear::new(&scope / "output" / "dense", inner, width, true),
            output_norm: LayerNorm::new(&scope / "output" / "LayerNorm", width, eps),
        }
    }

    fn forward(&self, states: &Tensor, mask: &Tensor, heads: i64) -> Tensor {
        let (query, key, value) = (self.query.forward(states), self.key.forward(states), self.value.forward(states));
        let attended = self.attention_output.forward(&attention(&query, &key, &value, heads, Some(mask), false));
        let states = self.attention_norm.forward(&(states + attended));
        let inner = self.intermediate.forward(&states).gelu("none");
        self.output_norm.forward(&(&states + self.output.forward(&inner)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Error;

    #[test]
    fn what_is_not_computed_is_named() {
        let dir = tempfile::tempdir().unwrap();
        for (setting, value) in [("hidden_act", "gelu_new"), ("position_embedding_type", "relative_key")] {
            std::fs::write(dir.path().join("config.json"), serde_json::json!({ setting: value }).to_string()).unwrap();
            let error = BertEncoder::load(dir.path(), Kind::Float, Device::Cpu).err().unwrap();
            assert!(matches!(error, Error::Unsupported { .. }) && error.to_string().contains(value), "{error}");
        }
    }

    #[test]
    fn padding_is_not_attended_to() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/demo/model/text_encoder_zh");
        let encoder = BertEncoder::load(&dir, Kind::Float, Device::Cpu).unwrap();
        assert_eq!((encoder.width(), encoder.max_length()), (64, 64));
        let short = encoder.forward(&[vec![2, 5, 8, 3]], 0).unwrap();
        let padded = encoder.forward(&[vec![2, 5, 8, 3, 0, 0]], 0).unwrap();
        let apart = (padded.narrow(1, 0, 4) - &short).abs().max().double_value(&[]);
        assert!(apart < 1e-5, "{apart}");
        assert_eq!(padded.isfinite().all().int64_value(&[]), 1, "padding has states too");
    }
}
