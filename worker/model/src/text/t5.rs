//! The encoder of mT5.

use std::path::Path;
use std::sync::{Mutex, PoisonError};

use serde::Deserialize;
use tch::{Device, Kind, Tensor};

use super::config::{TextSettings, check_dropout, check_transformer, ids_to_tensor};
use super::dropout::Dropout;
use super::tower::Tower;
use crate::Result;
use crate::config::Supported;
use crate::nn::{Embedding, Linear};
use crate::transfer::send;
use crate::weights::{Frozen, Scope, Weights};

/// A `config.json` of a T5 model.
#[derive(Debug, Clone, Deserialize)]
struct T5Config {
    vocab_size: i64,
    d_model: i64,
    d_kv: i64,
    d_ff: i64,
    num_layers: usize,
    num_heads: i64,
    #[serde(default = "num_buckets")]
    relative_attention_num_buckets: i64,
    #[serde(default = "max_distance")]
    relative_attention_max_distance: i64,
    #[serde(default = "layer_norm_epsilon")]
    layer_norm_epsilon: f64,
    #[serde(default = "dropout_rate")]
    dropout_rate: f64,
    /// Named only to be required: without it transformers falls back to the ungated layer of the first T5.
    #[serde(rename = "feed_forward_proj")]
    _feed_forward_proj: String,
}

fn num_buckets() -> i64 {
    32
}

fn max_distance() -> i64 {
    128
}

fn layer_norm_epsilon() -> f64 {
    1e-6
}

fn dropout_rate() -> f64 {
    0.1
}

/// Settings that change the network in ways not computed here, with the values that leave it as it is.
const SUPPORTED: &[Supported] = &[("feed_forward_proj", r#"["gated-gelu"]"#)];

/// Longest row taken. The network has no limit, the table of pairs of positions grows with the square.
const MAX_LENGTH: i64 = 4096;

/// mT5's encoder, and that of any T5 with its gated feed-forward layer: bidirectional, normalised before each block, positions by a learnt
/// bias of the attention scores that the first layer holds for all.
pub struct T5Encoder {
    config: T5Config,
    kind: Kind,
    device: Device,
    embedding: Embedding,
    relative_attention_bias: Embedding,
    /// The bias for rows of the length that was asked for last, which is every row's where a student has one length.
    last_bias: Mutex<Option<(i64, Frozen)>>,
    layers: Vec<Layer>,
    final_norm: RmsNorm,
}

struct Layer {
    attention_norm: RmsNorm,
    /// Queries, keys and values side by side.
    projections: Linear,
    output: Linear,
    feed_forward_norm: RmsNorm,
    gate: Linear,
    input: Linear,
    down: Linear,
}

/// Root mean square normalisation over the last dimension, with a scale.
struct RmsNorm {
    weight: Frozen,
    eps: f64,
}

impl RmsNorm {
    fn new(scope: Scope<'_>, width: i64, eps: f64) -> Self {
        Self { weight: scope.tensor("weight", &[width]), eps }
    }

    /// The mean is taken in f32 whatever the kind, as the original does.
    fn forward(&self, input: &Tensor) -> Tensor {
        let wide = input.to_kind(Kind::Float);
        let scale = (wide.square().mean_dim([-1i64].as_slice(), true, Kind::Float) + self.eps).rsqrt();
        (wide * scale).to_kind(self.weight.kind()) * &*self.weight
    }
}

impl T5Encoder {
    /// Loads a folder with `config.json` and weights, of an encoder or of a whole model (whose decoder is left alone).
    ///
    /// [`Kind::Half`] is computed in [`Kind::BFloat16`], since the activations of this model exceed the range of the former.
    /// Errors: [`crate::Error::Io`], [`crate::Error::Invalid`] for a broken or contradictory configuration, [`crate::Error::Weights`] if
    /// the weights do not fit it, [`crate::Error::Unsupported`] for the ungated layers of the first T5.
    pub fn load(dir: &Path, kind: Kind, device: Device) -> Result<Self> {
        let settings = TextSettings::read(&dir.join("config.json"))?;
        Self::from_weights(&settings, &Weights::open(dir)?, kind, device)
    }

    /// Takes the encoder from weights that may hold other models too.
    pub(super) fn from_weights(settings: &TextSettings, weights: &Weights, kind: Kind, device: Device) -> Result<Self> {
        let kind = if kind == Kind::Half { Kind::BFloat16 } else { kind };
        let tower = Tower::find(weights, "block.0.layer.0.SelfAttention.q.weight");
        let model = tower.scope(kind, device);
        // Whole models name the table they share with the decoder; encoders alone may have it under either name or both.
        let shared = tower.parent(kind, device);
        let embedding = if shared.has("shared.weight") { shared / "shared" } else { &model / "embed_tokens" };
        let encoder = Self::new(settings, &model, embedding)?;
        tower.finish(&["embed_tokens.weight"])?;
        Ok(encoder)
    }

    fn new(settings: &TextSettings, model: &Scope<'_>, embedding: Scope<'_>) -> Result<Self> {
        let config: T5Config = settings.parse(SUPPORTED)?;
        let half_buckets = config.relative_attention_num_buckets / 2;
        // The logarithmic half of the buckets begins at half of `half_buckets`, and the maximal distance must lie beyond it.
        let buckets = [half_buckets / 2, config.relative_attention_max_distance - half_buckets / 2];
        let sizes = [config.vocab_size, config.d_kv, config.d_ff, config.num_layers as i64, buckets[0], buckets[1]];
        check_transformer(settings.path(), config.num_heads * config.d_kv, config.num_heads, &sizes)?;
        check_transformer(settings.path(), config.d_model, 1, &[])?;
        check_dropout(settings.path(), &[("dropout_rate", config.dropout_rate)])?;
        let bias = model / "block" / 0 / "layer" / 0 / "SelfAttention" / "relative_attention_bias";
        Ok(Self {
            kind: model.kind(),
            device: model.device(),
            embedding: Embedding::new(embedding, config.vocab_size, config.d_model),
            relative_attention_bias: Embedding::new(bias, config.relative_attention_num_buckets, config.num_heads),
            last_bias: Mutex::new(None),
            layers: (0..config.num_layers).map(|index| Layer::new(model / "block" / index / "layer", &config)).collect(),
            final_norm: RmsNorm::new(model / "final_layer_norm", config.d_model, config.layer_norm_epsilon),
            config,
        })
    }

    /// Returns the normalised states after the last layer. Positions that hold `pad_id` are not attended to, but have states of their own.
    ///
    /// Shapes: equally long rows of ids, to `[B, L, width]`, in the kind it computes in.
    /// Errors: [`crate::Error::Shape`] if the rows do not fit the encoder.
    pub fn forward(&self, ids: &[Vec<i64>], pad_id: i64) -> Result<Tensor> {
        self.forward_dropping(ids, pad_id, &Dropout::off())
    }

    /// As [`T5Encoder::forward`], with dropout.
    pub(super) fn forward_dropping(&self, ids: &[Vec<i64>], pad_id: i64, dropout: &Dropout) -> Result<Tensor> {
        let tokens = self.tokens(ids)?;
        let mask = Tensor::zeros([], (self.kind, self.device)).where_scalarother(&tokens.ne(pad_id), f64::NEG_INFINITY);
        let bias = self.position_bias(tokens.size()[1])? + mask.to_kind(self.kind).unsqueeze(1).unsqueeze(1);
        let rate = self.config.dropout_rate;
        let embedded = dropout.apply(self.embedding.forward(&tokens), rate);
        let last = self.layers.iter().fold(embedded, |states, layer| layer.forward(&states, &bias, &self.config, dropout));
        Ok(dropout.apply(self.final_norm.forward(&last), rate))
    }

    /// Returns where there is a token and no padding: bool `[B, L]`.
    pub(super) fn token_mask(&self, ids: &[Vec<i64>], pad_id: i64) -> Result<Tensor> {
        Ok(self.tokens(ids)?.ne(pad_id))
    }

    fn tokens(&self, ids: &[Vec<i64>]) -> Result<Tensor> {
        ids_to_tensor(ids, MAX_LENGTH, self.config.vocab_size, self.device)
    }

    /// Returns the width of the token states.
    pub fn width(&self) -> i64 {
        self.config.d_model
    }

    /// Returns the longest row of ids it takes.
    pub fn max_length(&self) -> i64 {
        MAX_LENGTH
    }

    /// What is added to the attention scores of each pair of positions, `[1, heads, length, length]`.
    fn position_bias(&self, length: i64) -> Result<Tensor> {
        let mut last = self.last_bias.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, bias)) = last.as_ref().filter(|(known, _)| *known == length) {
            return Ok(bias.shallow_clone());
        }
        let positions = Tensor::arange(length, (Kind::Int64, Device::Cpu));
        let buckets = send(&self.bucket(&(positions.unsqueeze(0) - positions.unsqueeze(1))), self.device)?;
        let bias = self.relative_attention_bias.forward(&buckets).permute([2, 0, 1]).unsqueeze(0);
        *last = Some((length, Frozen::new(bias.shallow_clone())));
        Ok(bias)
    }

    /// The buckets of keys that stand `offset` positions behind their queries (int64, any shape): half of the buckets for either
    /// direction, of which the first half holds one distance each and the others ever more.
    ///
    /// Source: T5, Raffel et al. 2020 (arXiv:1910.10683), section 2.1. In f32 as there: which bucket a border falls in depends on it.
    fn bucket(&self, offset: &Tensor) -> Tensor {
        let buckets = self.config.relative_attention_num_buckets / 2;
        let exact = buckets / 2;
        let octaves = (self.config.relative_attention_max_distance as f64 / exact as f64).ln();
        let distance = offset.abs();
        let far = (distance.to_kind(Kind::Float) / exact as f64).log() / octaves * (buckets - exact) as f64;
        let far = (far.to_kind(Kind::Int64) + exact).clamp_max(buckets - 1);
        let behind = offset.gt(0).to_kind(Kind::Int64) * buckets;
        distance.where_self(&distance.lt(exact), &far) + behind
    }
}

impl Layer {
    fn new(scope: Scope<'_>, config: &T5Config) -> Self {
        let (width, inner, all_heads, eps) = (config.d_model, config.d_ff, config.num_heads * config.d_kv, config.layer_norm_epsilon);
        let (attention, feed_forward) = (&scope / 0 / "SelfAttention", &scope / 1 / "DenseReluDense");
        Self {
            attention_norm: RmsNorm::new(&scope / 0 / "layer_norm", width, eps),
            projections: Linear::stacked(&attention, &["q", "k", "v"], width, all_heads),
            output: Linear::new(&attention / "o", all_heads, width, false),
            feed_forward_norm: RmsNorm::new(&scope / 1 / "layer_norm", width, eps),
            gate: Linear::new(&feed_forward / "wi_0", width, inner, false),
            input: Linear::new(&feed_forward / "wi_1", width, inner, false),
            down: Linear::new(&feed_forward / "wo", inner, width, false),
        }
    }

    fn forward(&self, states: &Tensor, bias: &Tensor, config: &T5Config, dropout: &Dropout) -> Tensor {
        let rate = config.dropout_rate;
        let normed = self.attention_norm.forward(states);
        let projected = self.projections.forward(&normed).unflatten(-1, [3, config.num_heads, -1]).transpose(1, 3);
        let [query, key, value] = [0, 1, 2].map(|part| projected.select(2, part));
        // Scores are not divided by anything: the initialisation of this model took care of their size.
        let attended = dropout.attention([&query, &key, &value], bias, Some(1.0), rate);
        let attended = self.output.forward(&attended.transpose(1, 2).flatten(2, 3));
        let states = states + dropout.apply(attended, rate);

        let normed = self.feed_forward_norm.forward(&states);
        let inner = dropout.apply(self.gate.forward(&normed).gelu("tanh") * self.input.forward(&normed), rate);
        states + dropout.apply(self.down.forward(&inner), rate)
    }
}

#[cfg(test)]
mod tests {
    use super::super::config::Architecture;
    use super::*;
    use crate::Error;

    /// The settings of an encoder of mT5-XL's sizes, with some replaced.
    fn settings(changes: serde_json::Value) -> TextSettings {
        let mut settings = serde_json::json!({
            "vocab_size": 250_112, "d_model": 2048, "d_kv": 64, "d_ff": 5120, "num_layers": 24, "num_heads": 32, "feed_forward_proj": "gated-gelu",
        });
        let settings = settings.as_object_mut().unwrap();
        settings.extend(changes.as_object().unwrap().clone());
        TextSettings::published(Path::new("config.json"), Architecture::T5, settings.clone())
    }

    /// The table of tokens is counted once, and nothing of the decoder.
    #[test]
    fn mt5_xl_has_the_published_number_of_parameters() {
        tch::set_num_threads(1);
        let nothing = Weights::none();
        let model = nothing.root(Kind::Float, Device::Cpu);
        T5Encoder::new(&settings(serde_json::json!({})), &model, &model / "shared").unwrap();
        assert_eq!(nothing.num_requested(), 1_669_958_656);
    }

    #[test]
    fn what_is_not_computed_is_refused() {
        let load = |changes| T5Encoder::from_weights(&settings(changes), &Weights::none(), Kind::Float, Device::Cpu).err().unwrap();
        assert!(matches!(load(serde_json::json!({ "feed_forward_proj": "relu" })), Error::Unsupported { .. }));
        let wrong = [("num_heads", 0), ("d_kv", -1), ("relative_attention_num_buckets", 2), ("relative_attention_max_distance", 8)];
        for (name, value) in wrong.into_iter().chain([("dropout_rate", 1)]) {
            let error = load(serde_json::json!({ name: value }));
            assert!(matches!(error, Error::Invalid { .. }), "{name} = {value}: {error}");
        }
        assert!(matches!(load(serde_json::json!({})), Error::Weights { .. }));
    }
}
