//! BERT and its descendants RoBERTa and XLM-R, alone or as the text half of Chinese-CLIP and others.

use std::path::Path;

use serde::Deserialize;
use tch::{Device, Kind, Tensor};

use super::config::{Architecture, TextSettings, check_dropout, check_transformer, ids_to_tensor};
use super::dropout::Dropout;
use super::tower::Tower;
use crate::config::Supported;
use crate::nn::{Embedding, LayerNorm, Linear};
use crate::weights::{Frozen, Scope, Weights};
use crate::{Error, Result};

/// A `config.json` of a BERT model.
#[derive(Debug, Clone, Deserialize)]
struct BertConfig {
    vocab_size: i64,
    hidden_size: i64,
    intermediate_size: i64,
    num_hidden_layers: usize,
    num_attention_heads: i64,
    max_position_embeddings: i64,
    type_vocab_size: i64,
    layer_norm_eps: f64,
    pad_token_id: Option<i64>,
    hidden_dropout_prob: f64,
    attention_probs_dropout_prob: f64,
}

/// Settings that change the network in ways not computed here, with the values that leave it as it is.
const SUPPORTED: &[Supported] =
    &[("hidden_act", r#"["gelu"]"#), ("position_embedding_type", r#"["absolute", null]"#), ("is_decoder", "[false, null]")];

/// The end of a key that each model has once.
const LANDMARK: &str = "embeddings.word_embeddings.weight";

/// A BERT encoder without its pooler: bidirectional, normalised after each block.
pub struct BertEncoder {
    config: BertConfig,
    /// The id that RoBERTa does not count: its positions number the other tokens, from the row behind this id's.
    uncounted: Option<i64>,
    kind: Kind,
    device: Device,
    word_embeddings: Embedding,
    /// What is added to the words whatever they are: positions and the first token type, `[positions, width]`.
    position_embeddings: Frozen,
    layer_norm: LayerNorm,
    layers: Vec<Layer>,
}

struct Layer {
    /// Queries, keys and values side by side.
    projections: Linear,
    attention_output: Linear,
    attention_norm: LayerNorm,
    intermediate: Linear,
    output: Linear,
    output_norm: LayerNorm,
}

impl BertEncoder {
    /// Loads a folder with `config.json` (of a `bert`, `roberta`, `xlm-roberta` or `chinese_clip` model) and weights, under whatever
    /// prefix the model they belong to gives them.
    ///
    /// Errors: [`crate::Error::Io`], [`crate::Error::Invalid`] for a broken or contradictory configuration, [`crate::Error::Weights`] if
    /// the weights do not fit it, [`crate::Error::Unsupported`] for another activation than the exact GELU, relative positions or another
    /// kind of model.
    pub fn load(dir: &Path, kind: Kind, device: Device) -> Result<Self> {
        let settings = TextSettings::read(&dir.join("config.json"))?;
        Self::from_weights(&settings, &Weights::open(dir)?, kind, device)
    }

    /// Takes the encoder from weights that may hold other models too.
    pub(super) fn from_weights(settings: &TextSettings, weights: &Weights, kind: Kind, device: Device) -> Result<Self> {
        let tower = Tower::find(weights, LANDMARK);
        let encoder = Self::new(settings, &tower.scope(kind, device))?;
        Self::finish(&tower)?;
        Ok(encoder)
    }

    /// Where weights hold an encoder of this kind.
    pub(super) fn tower(weights: &Weights) -> Tower<'_> {
        Tower::find(weights, LANDMARK)
    }

    /// The matrix by which Chinese-CLIP brings text states into the space it shares with images: `[width, projected]`.
    ///
    /// transformers keeps a linear layer of it, its authors the matrix itself.
    /// Errors: [`Error::Unsupported`] if the weights are not Chinese-CLIP's, [`Error::Invalid`] if it does not fit the encoder.
    pub(super) fn chinese_clip_projection(&self, settings: &TextSettings, weights: &Weights) -> Result<Tensor> {
        let tower = Self::tower(weights);
        let linear = || tower.beside("text_projection.weight").filter(|_| settings.is_chinese_clip());
        let Some(matrix) = tower.beside("text_projection").or_else(|| linear().map(|weight| weight.tr())) else {
            return Err(Self::not_chinese_clip(settings));
        };
        match matrix.size().as_slice() {
            &[inputs, _] if inputs == self.width() => Ok(matrix.f_to_device(self.device)?.f_to_kind(self.kind)?),
            size => {
                let reason = format!("a text_projection of {size:?} does not fit states of a width of {}", self.width());
                Err(Error::Invalid { path: settings.path().into(), reason })
            }
        }
    }

    /// Says that an encoder has no projection that Chinese-CLIP's authors made for it.
    pub(super) fn not_chinese_clip(settings: &TextSettings) -> Error {
        let what = format!("projecting the token states of {}", settings.path().display());
        Error::Unsupported {
            what,
            hint: "only whole models of Chinese-CLIP have a text_projection for them; switch the projection off".into(),
        }
    }

    /// Checks that nothing of the encoder was left over but what is not used here: the pooler, the heads of task models and the tables of
    /// position numbers in old exports.
    pub(super) fn finish(tower: &Tower<'_>) -> Result<()> {
        tower.finish(&["pooler.", "cls.", "lm_head.", "classifier.", "embeddings.position_ids", "embeddings.token_type_ids"])
    }

    /// Takes the tensors of an encoder from `model`; whoever owns the weights finishes the account.
    pub(super) fn new(settings: &TextSettings, model: &Scope<'_>) -> Result<Self> {
        let config: BertConfig = settings.parse(SUPPORTED)?;
        let sizes = [config.vocab_size, config.intermediate_size, config.max_position_embeddings, config.type_vocab_size];
        check_transformer(settings.path(), config.hidden_size, config.num_attention_heads, &sizes)?;
        let rates =
            [("hidden_dropout_prob", config.hidden_dropout_prob), ("attention_probs_dropout_prob", config.attention_probs_dropout_prob)];
        check_dropout(settings.path(), &rates)?;
        let invalid = |reason: String| Error::Invalid { path: settings.path().into(), reason };
        let uncounted = match settings.architecture() {
            Architecture::Bert => None,
            Architecture::Roberta | Architecture::XlmRoberta | Architecture::AltClip => {
                let pad = config.pad_token_id.ok_or_else(|| invalid("needs a pad_token_id: positions are counted from it".into()))?;
                if !(0..config.max_position_embeddings - 1).contains(&pad) {
                    return Err(invalid(format!("leaves no position behind pad_token_id {pad}")));
                }
                Some(pad)
            }
            other => return Err(invalid(format!("describes a model of kind {other:?}, not a BERT"))),
        };

        let embeddings = model / "embeddings";
        let width = config.hidden_size;
        let table = |name: &str, rows: i64| (&embeddings / name).tensor("weight", &[rows, width]);
        let first_type = table("token_type_embeddings", config.type_vocab_size).narrow(0, 0, 1);
        Ok(Self {
            uncounted,
            kind: model.kind(),
            device: model.device(),
            word_embeddings: Embedding::new(&embeddings / "word_embeddings", config.vocab_size, width),
            position_embeddings: Frozen::new(&*table("position_embeddings", config.max_position_embeddings) + first_type),
            layer_norm: layer_norm(&(&embeddings / "LayerNorm"), width, config.layer_norm_eps),
            layers: (0..config.num_hidden_layers).map(|index| Layer::new(model / "encoder" / "layer" / index, &config)).collect(),
            config,
        })
    }

    /// Returns the states after the last layer. Positions that hold `pad_id` are not attended to, but have states of their own.
    ///
    /// Shapes: equally long rows of ids, to `[B, L, width]`, in the kind it was loaded in.
    /// Errors: [`crate::Error::Shape`] if the rows do not fit the encoder.
    pub fn forward(&self, ids: &[Vec<i64>], pad_id: i64) -> Result<Tensor> {
        self.forward_dropping(ids, pad_id, &Dropout::off())
    }

    /// As [`BertEncoder::forward`], with dropout.
    pub(super) fn forward_dropping(&self, ids: &[Vec<i64>], pad_id: i64, dropout: &Dropout) -> Result<Tensor> {
        let tokens = self.tokens(ids)?;
        Ok(self.run(&tokens, &tokens.ne(pad_id), dropout))
    }

    /// As [`BertEncoder::forward_dropping`], where only the `pad_id` that fill a row up behind its last token are padding: a pad written
    /// out in the text is attended to, as by callers that take the mask from the tokenizer.
    pub(super) fn forward_to_the_end(&self, ids: &[Vec<i64>], pad_id: i64, dropout: &Dropout) -> Result<Tensor> {
        let tokens = self.tokens(ids)?;
        Ok(self.run(&tokens, &reached(&tokens.ne(pad_id)), dropout))
    }

    /// Returns which positions [`BertEncoder::forward`] attends to: bool `[B, L]`.
    pub(super) fn token_mask(&self, ids: &[Vec<i64>], pad_id: i64) -> Result<Tensor> {
        Ok(self.tokens(ids)?.ne(pad_id))
    }

    /// Returns which positions [`BertEncoder::forward_to_the_end`] attends to: bool `[B, L]`.
    pub(super) fn token_mask_to_the_end(&self, ids: &[Vec<i64>], pad_id: i64) -> Result<Tensor> {
        Ok(reached(&self.token_mask(ids, pad_id)?))
    }

    fn tokens(&self, ids: &[Vec<i64>]) -> Result<Tensor> {
        ids_to_tensor(ids, self.max_length(), self.config.vocab_size, self.device)
    }

    /// Shapes: `tokens` int64 and `attended` bool, both `[B, L]`.
    fn run(&self, tokens: &Tensor, attended: &Tensor, dropout: &Dropout) -> Tensor {
        let mask = Tensor::zeros([], (self.kind, self.device)).where_scalarother(attended, f64::NEG_INFINITY);
        let mask = mask.to_kind(self.kind).unsqueeze(1).unsqueeze(1);

        let positions = match self.uncounted {
            None => self.position_embeddings.narrow(0, 0, tokens.size()[1]),
            Some(pad) => {
                let counted = tokens.ne(pad).to_kind(Kind::Int64);
                let rows = counted.cumsum(1, Kind::Int64) * counted + pad;
                Tensor::embedding(&self.position_embeddings, &rows, -1, false, false)
            }
        };
        let embedded = self.layer_norm.forward(&(self.word_embeddings.forward(tokens) + positions));
        let embedded = dropout.apply(embedded, self.config.hidden_dropout_prob);
        self.layers.iter().fold(embedded, |states, layer| layer.forward(&states, &mask, &self.config, dropout))
    }

    /// Returns the width of the token states.
    pub fn width(&self) -> i64 {
        self.config.hidden_size
    }

    /// Returns the longest row of ids it takes.
    pub fn max_length(&self) -> i64 {
        self.config.max_position_embeddings - self.uncounted.map_or(0, |pad| pad + 1)
    }
}

/// Positions with a true one at or behind them. Shapes: bool `[B, L]`, kept.
fn reached(tokens: &Tensor) -> Tensor {
    // Counted from the back.
    tokens.to_kind(Kind::Int64).flip([1]).cumsum(1, Kind::Int64).flip([1]).gt(0)
}

/// A layer norm, also of files converted from BERT's first code, which named scale and shift as its paper does.
fn layer_norm(scope: &Scope<'_>, width: i64, eps: f64) -> LayerNorm {
    let names = if scope.has("gamma") { ["gamma", "beta"] } else { ["weight", "bias"] };
    LayerNorm::named(scope, names, width, eps)
}

impl Layer {
    fn new(scope: Scope<'_>, config: &BertConfig) -> Self {
        let (width, inner, eps) = (config.hidden_size, config.intermediate_size, config.layer_norm_eps);
        let attention = &scope / "attention";
        Self {
            projections: Linear::stacked_with_bias(&(&attention / "self"), &["query", "key", "value"], width, width),
            attention_output: Linear::new(&attention / "output" / "dense", width, width, true),
            attention_norm: layer_norm(&(&attention / "output" / "LayerNorm"), width, eps),
            intermediate: Linear::new(&scope / "intermediate" / "dense", width, inner, true),
            output: Linear::new(&scope / "output" / "dense", inner, width, true),
            output_norm: layer_norm(&(&scope / "output" / "LayerNorm"), width, eps),
        }
    }

    fn forward(&self, states: &Tensor, mask: &Tensor, config: &BertConfig, dropout: &Dropout) -> Tensor {
        let projected = self.projections.forward(states).unflatten(-1, [3, config.num_attention_heads, -1]).transpose(1, 3);
        let [query, key, value] = [0, 1, 2].map(|part| projected.select(2, part));
        let attended = dropout.attention([&query, &key, &value], mask, None, config.attention_probs_dropout_prob);
        let attended = self.attention_output.forward(&attended.transpose(1, 2).flatten(2, 3));
        let attended = dropout.apply(attended, config.hidden_dropout_prob);
        let states = self.attention_norm.forward_sum(&attended, states).1;
        let inner = self.intermediate.forward(&states).gelu("none");
        let output = dropout.apply(self.output.forward(&inner), config.hidden_dropout_prob);
        self.output_norm.forward_sum(&output, &states).1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Parameters of an encoder of 24 layers, 1024 wide with 16 heads, as both published student encoders have.
    fn count_large(architecture: Architecture, changes: serde_json::Value) -> i64 {
        tch::set_num_threads(1);
        let mut settings = serde_json::json!({
            "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
        });
        let settings = settings.as_object_mut().unwrap();
        settings.extend(changes.as_object().unwrap().clone());
        let settings = TextSettings::published(Path::new("config.json"), architecture, settings.clone());
        let nothing = Weights::none();
        BertEncoder::new(&settings, &nothing.root(Kind::Float, Device::Cpu)).unwrap();
        nothing.num_requested()
    }

    /// Neither the pooler, which its authors drop, nor the `text_projection` of 1024 x 1024 is in the total.
    #[test]
    fn chinese_clip_has_the_published_number_of_parameters_without_pooler_and_projection() {
        let sizes = serde_json::json!({ "vocab_size": 21_128, "max_position_embeddings": 512, "type_vocab_size": 2 });
        assert_eq!(count_large(Architecture::Bert, sizes), 324_472_832);
    }

    /// Neither the pooler nor open_clip's projection of pooled states is in the total.
    #[test]
    fn xlm_r_large_has_the_published_number_of_parameters_without_pooler_and_projection() {
        let sizes = serde_json::json!({ "vocab_size": 250_002, "max_position_embeddings": 514, "type_vocab_size": 1 });
        assert_eq!(count_large(Architecture::XlmRoberta, sizes), 558_840_832);
    }

    #[test]
    fn what_is_not_computed_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.json");
        for (setting, value) in [("hidden_act", "gelu_new"), ("position_embedding_type", "relative_key")] {
            std::fs::write(&path, serde_json::json!({ "model_type": "bert", setting: value }).to_string()).unwrap();
            let settings = TextSettings::read(&path).unwrap();
            let error = BertEncoder::new(&settings, &Weights::none().root(Kind::Float, Device::Cpu)).err().unwrap();
            assert!(matches!(error, Error::Unsupported { .. }) && error.to_string().contains(value), "{error}");
        }
    }

    /// Positions are looked up behind the pad id: one that leaves none would read beyond the table.
    #[test]
    fn a_pad_id_must_leave_room_for_positions() {
        let read = |pad: serde_json::Value| {
            let settings = serde_json::json!({ "max_position_embeddings": 8, "pad_token_id": pad }).as_object().unwrap().clone();
            let settings = TextSettings::published(Path::new("config.json"), Architecture::Roberta, settings);
            BertEncoder::new(&settings, &Weights::none().root(Kind::Float, Device::Cpu))
        };
        assert_eq!(read(1.into()).unwrap().max_length(), 6);
        for pad in [7.into(), (-1).into(), serde_json::Value::Null] {
            assert!(matches!(read(pad).err().unwrap(), Error::Invalid { .. }));
        }
    }

    #[test]
    fn norms_of_the_first_code_are_read_by_their_old_names() {
        let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/demo/model/text_encoder_zh");
        let dir = tempfile::tempdir().unwrap();
        std::fs::copy(demo.join("config.json"), dir.path().join("config.json")).unwrap();
        let renamed = |key: String| {
            let old = key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta");
            format!("bert.{old}")
        };
        let tensors = Tensor::read_safetensors(demo.join("model.safetensors")).unwrap();
        let tensors: Vec<_> = tensors.into_iter().map(|(key, tensor)| (renamed(key), tensor)).collect();
        assert!(tensors.iter().any(|(key, _)| key == "bert.encoder.layer.0.attention.output.LayerNorm.gamma"));
        Tensor::write_safetensors(&tensors, dir.path().join("model.safetensors")).unwrap();
        let states = |dir: &Path| BertEncoder::load(dir, Kind::Float, Device::Cpu).unwrap().forward(&[vec![2, 5, 8, 3]], 0).unwrap();
        assert_eq!(states(dir.path()), states(&demo));
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
