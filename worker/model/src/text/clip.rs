//! The text half of CLIP, as Stable Diffusion uses it.

use std::path::Path;

use serde::Deserialize;
use serde_json::{Map, Value};
use tch::{Device, Kind, Tensor};

use super::config::{Architecture, TextSettings, check_transformer, ids_to_tensor};
use super::tower::Tower;
use crate::Result;
use crate::nn::{Embedding, LayerNorm, Linear, attention};
use crate::transfer::send;
use crate::weights::{Frozen, Scope, Weights};

/// Old configurations name this id as end of text though no tokenizer uses it so.
const MISNAMED_EOS: i64 = 2;

/// A `config.json` of a CLIP text model.
#[derive(Debug, Clone, Deserialize)]
struct ClipTextConfig {
    vocab_size: i64,
    hidden_size: i64,
    intermediate_size: i64,
    num_hidden_layers: usize,
    num_attention_heads: i64,
    #[serde(default = "max_position_embeddings")]
    max_position_embeddings: i64,
    #[serde(default)]
    hidden_act: Activation,
    #[serde(default = "layer_norm_eps")]
    layer_norm_eps: f64,
    #[serde(default = "eos_token_id")]
    eos_token_id: i64,
    #[serde(default)]
    projection_dim: i64,
}

impl ClipTextConfig {
    fn new(settings: &TextSettings) -> Result<Self> {
        let config: Self = settings.parse(&[("hidden_act", r#"["quick_gelu", "gelu"]"#)])?;
        let sizes = [config.vocab_size, config.intermediate_size, config.max_position_embeddings, config.num_hidden_layers as i64];
        check_transformer(settings.path(), config.hidden_size, config.num_attention_heads, &sizes)?;
        Ok(config)
    }
}

fn max_position_embeddings() -> i64 {
    77
}

fn layer_norm_eps() -> f64 {
    1e-5
}

fn eos_token_id() -> i64 {
    49407
}

/// The activation of the feed-forward layers.
#[derive(Debug, Clone, Copy, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Activation {
    /// `x * sigmoid(1.702 x)`: OpenAI's models.
    #[default]
    QuickGelu,
    /// The exact erf form: OpenCLIP's models.
    Gelu,
}

/// A CLIP text encoder: causal, normalised before each block.
pub struct ClipTextEncoder {
    config: ClipTextConfig,
    device: Device,
    token_embedding: Embedding,
    position_embedding: Frozen,
    layers: Vec<Layer>,
    final_layer_norm: LayerNorm,
    projection: Option<Linear>,
}

/// What a CLIP text encoder computes, in the kind it was loaded in.
#[derive(Debug)]
pub struct ClipTextStates {
    /// The states entering the last layer, not normalised, `[B, L, width]`.
    pub penultimate: Tensor,
    /// The states after the last layer and the final norm, `[B, L, width]`.
    pub last: Tensor,
    /// [`ClipTextStates::last`] at the end of the text, projected where the model has a projection: `[B, width]` or `[B, projection]`.
    pub pooled: Tensor,
}

/// A transformer layer, normalised before each of its two parts: of the text half and of the image half.
pub(super) struct Layer {
    layer_norm1: LayerNorm,
    /// Queries, keys and values side by side.
    projections: Linear,
    out: Linear,
    layer_norm2: LayerNorm,
    fc1: Linear,
    fc2: Linear,
}

impl ClipTextEncoder {
    /// Loads a folder with `config.json` and weights, of a text model or of a whole CLIP.
    ///
    /// Errors: [`crate::Error::Io`], [`crate::Error::Invalid`] for a broken or contradictory configuration, [`crate::Error::Unsupported`]
    /// for another activation, [`crate::Error::Weights`] if the weights do not fit.
    pub fn load(dir: &Path, kind: Kind, device: Device) -> Result<Self> {
        let settings = TextSettings::read_as(&dir.join("config.json"), Architecture::Clip)?;
        let config = ClipTextConfig::new(&settings)?;
        Self::with_config(config, &Weights::open(dir)?, kind, device)
    }

    /// As [`ClipTextEncoder::load`], of settings and weights that were opened already; `path` names the settings in errors.
    pub(crate) fn of(path: &Path, settings: Map<String, Value>, weights: &Weights, kind: Kind, device: Device) -> Result<Self> {
        Self::from_weights(&TextSettings::of(path, Architecture::Clip, settings), weights, kind, device)
    }

    /// Takes the encoder from weights that may hold the image encoder too.
    pub(super) fn from_weights(settings: &TextSettings, weights: &Weights, kind: Kind, device: Device) -> Result<Self> {
        Self::with_config(ClipTextConfig::new(settings)?, weights, kind, device)
    }

    fn with_config(config: ClipTextConfig, weights: &Weights, kind: Kind, device: Device) -> Result<Self> {
        // The prefix is `text_model`; files written by transformers 5 for the model without projection leave it out.
        let tower = Tower::find(weights, "embeddings.token_embedding.weight");
        let projection = Some(tower.parent(kind, device)).filter(|beside| beside.has("text_projection.weight"));
        let encoder = Self::new(config, &tower.scope(kind, device), projection.map(|beside| beside / "text_projection"));
        // Old exports carry a table of position numbers.
        tower.finish(&["embeddings.position_ids"])?;
        Ok(encoder)
    }

    /// Takes the tensors of an encoder from `model`, and its projection from a scope of its own, if it has one.
    fn new(config: ClipTextConfig, model: &Scope<'_>, projection: Option<Scope<'_>>) -> Self {
        let embeddings = model / "embeddings";
        let width = config.hidden_size;
        Self {
            device: model.device(),
            token_embedding: Embedding::new(&embeddings / "token_embedding", config.vocab_size, width),
            position_embedding: (&embeddings / "position_embedding").tensor("weight", &[config.max_position_embeddings, width]),
            layers: (0..config.num_hidden_layers)
                .map(|index| Layer::new(model / "encoder" / "layers" / index, width, config.intermediate_size, config.layer_norm_eps))
                .collect(),
            final_layer_norm: LayerNorm::new(model / "final_layer_norm", width, config.layer_norm_eps),
            projection: projection.map(|scope| Linear::new(scope, width, config.projection_dim, false)),
            config,
        }
    }

    /// Runs all layers. Shapes: equally long rows of ids; see [`ClipTextStates`].
    ///
    /// Errors: [`crate::Error::Shape`] if the rows do not fit the encoder.
    pub fn forward(&self, ids: &[Vec<i64>]) -> Result<ClipTextStates> {
        let penultimate = self.penultimate(ids)?;
        let last = self.run(&self.layers[self.layers.len().saturating_sub(1)..], &penultimate);
        let last = self.final_layer_norm.forward(&last);

        let ends: Vec<i64> = ids.iter().map(|row| self.end_of_text(row)).collect();
        let rows = Tensor::arange(ids.len() as i64, (Kind::Int64, self.device));
        let ends = send(&Tensor::f_from_slice(&ends)?, self.device)?;
        let pooled = last.f_index(&[Some(rows), Some(ends)])?;
        let pooled = self.projection.as_ref().map_or_else(|| pooled.shallow_clone(), |projection| projection.forward(&pooled));
        Ok(ClipTextStates { penultimate, last, pooled })
    }

    /// Runs all layers but the last, whose work would be thrown away. Shapes: equally long rows of ids, to `[B, L, width]`.
    ///
    /// Errors: [`crate::Error::Shape`] if the rows do not fit the encoder.
    pub fn penultimate(&self, ids: &[Vec<i64>]) -> Result<Tensor> {
        let tokens = self.tokens(ids)?;
        let positions = self.position_embedding.narrow(0, 0, tokens.size()[1]);
        let embedded = self.token_embedding.forward(&tokens) + positions;
        let but_last = self.layers.len().saturating_sub(1);
        Ok(self.run(&self.layers[..but_last], &embedded))
    }

    /// Returns where there is a token and no padding: bool `[B, L]`, true up to the first `end_id`, everywhere in a row without one.
    ///
    /// The pad id tells nothing, as CLIP pads with the end of the text; nor does the configuration, which may misname it.
    pub(super) fn token_mask(&self, ids: &[Vec<i64>], end_id: Option<i64>) -> Result<Tensor> {
        // No id is negative.
        let ends = self.tokens(ids)?.eq(end_id.unwrap_or(-1)).to_kind(Kind::Int64);
        // The ends before a position, not counting itself.
        Ok((ends.cumsum(1, Kind::Int64) - ends).eq(0))
    }

    fn tokens(&self, ids: &[Vec<i64>]) -> Result<Tensor> {
        ids_to_tensor(ids, self.config.max_position_embeddings, self.config.vocab_size, self.device)
    }

    /// Returns the width of the token states.
    pub fn width(&self) -> i64 {
        self.config.hidden_size
    }

    /// Returns the width of [`ClipTextStates::pooled`].
    pub fn pooled_width(&self) -> i64 {
        if self.projection.is_some() { self.config.projection_dim } else { self.config.hidden_size }
    }

    /// Returns the longest row of ids it takes.
    pub fn max_length(&self) -> i64 {
        self.config.max_position_embeddings
    }

    /// Finds the position whose state stands for the whole text.
    ///
    /// With the id 2 in the configuration it is the highest id, which for OpenAI's vocabulary is the end of text; otherwise the first
    /// end of text, since some tokenizers pad with higher ids. 0 if there is none.
    fn end_of_text(&self, ids: &[i64]) -> i64 {
        let position = if self.config.eos_token_id == MISNAMED_EOS {
            let highest = ids.iter().max();
            ids.iter().position(|id| Some(id) == highest)
        } else {
            ids.iter().position(|&id| id == self.config.eos_token_id)
        };
        position.unwrap_or(0) as i64
    }

    fn run(&self, layers: &[Layer], states: &Tensor) -> Tensor {
        Layer::run(layers, states, self.config.num_attention_heads, self.config.hidden_act, true)
    }
}

impl Layer {
    /// Takes the tensors below `scope`: states of `width`, a feed-forward layer of `inner`.
    pub(super) fn new(scope: Scope<'_>, width: i64, inner: i64, eps: f64) -> Self {
        let attention = &scope / "self_attn";
        Self {
            layer_norm1: LayerNorm::new(&scope / "layer_norm1", width, eps),
            projections: Linear::stacked_with_bias(&attention, &["q_proj", "k_proj", "v_proj"], width, width),
            out: Linear::new(&attention / "out_proj", width, width, true),
            layer_norm2: LayerNorm::new(&scope / "layer_norm2", width, eps),
            fc1: Linear::new(&scope / "mlp" / "fc1", width, inner, true),
            fc2: Linear::new(&scope / "mlp" / "fc2", inner, width, true),
        }
    }

    /// Runs layers one behind the other. Shapes: `[B, L, width]`, kept; `causal` hides later positions.
    pub(super) fn run(layers: &[Self], states: &Tensor, heads: i64, activation: Activation, causal: bool) -> Tensor {
        let (mut stem, mut branch) = (states.shallow_clone(), None);
        for layer in layers {
            let (next_stem, next_branch) = layer.forward(&stem, branch.as_ref(), heads, activation, causal);
            (stem, branch) = (next_stem, Some(next_branch));
        }
        branch.map_or_else(|| stem.shallow_clone(), |branch| &stem + branch)
    }

    /// Takes the layer before's states in two parts and gives its own likewise: the sum of both is the next norm's.
    fn forward(&self, stem: &Tensor, branch: Option<&Tensor>, heads: i64, activation: Activation, causal: bool) -> (Tensor, Tensor) {
        let (states, normed) = match branch {
            Some(branch) => self.layer_norm1.forward_sum(branch, stem),
            None => (stem.shallow_clone(), self.layer_norm1.forward(stem)),
        };
        let projected = self.projections.forward(&normed).chunk(3, -1);
        let attended = self.out.forward(&attention(&projected[0], &projected[1], &projected[2], heads, None, causal));
        let (states, normed) = self.layer_norm2.forward_sum(&attended, &states);
        let inner = self.fc1.forward(&normed);
        let inner = match activation {
            Activation::QuickGelu => &inner * (&inner * 1.702).sigmoid(),
            Activation::Gelu => inner.gelu("none"),
        };
        (states, self.fc2.forward(&inner))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Error;

    /// Writes a configuration, with some settings replaced, into a folder without weights, and says why loading it fails.
    fn refusal(settings: &[(&str, serde_json::Value)]) -> Error {
        let mut config = serde_json::json!({
            "vocab_size": 10, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        });
        for (name, value) in settings {
            config[name] = value.clone();
        }
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
        ClipTextEncoder::load(dir.path(), Kind::Float, Device::Cpu).err().unwrap()
    }

    /// Parameters of an encoder of these sizes, with or without its projection.
    fn count(settings: serde_json::Value, with_projection: bool) -> i64 {
        tch::set_num_threads(1);
        let settings = TextSettings::published(Path::new("config.json"), Architecture::Clip, settings.as_object().unwrap().clone());
        let nothing = Weights::none();
        let root = nothing.root(Kind::Float, Device::Cpu);
        let projection = with_projection.then(|| &root / "text_projection");
        ClipTextEncoder::new(ClipTextConfig::new(&settings).unwrap(), &(&root / "text_model"), projection);
        nothing.num_requested()
    }

    /// SDXL's first encoder, which is SD1.5's only one: CLIP's own projection is not in its total, as no Stable Diffusion uses it.
    #[test]
    fn clip_l_has_the_published_number_of_parameters_without_a_projection() {
        let settings = serde_json::json!({
            "vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
        });
        assert_eq!(count(settings, false), 123_060_480);
    }

    /// SDXL's second encoder: its total counts the projection of 1280 x 1280, which makes the pooled text.
    #[test]
    fn open_clip_big_g_has_the_published_number_of_parameters_with_its_projection() {
        let settings = serde_json::json!({
            "vocab_size": 49408, "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20,
            "hidden_act": "gelu", "projection_dim": 1280,
        });
        assert_eq!(count(settings.clone(), true), 694_659_840);
        assert_eq!(count(settings, false), 694_659_840 - 1280 * 1280);
    }

    #[test]
    fn contradictory_configurations_are_refused() {
        assert!(refusal(&[]).to_string().contains("holds no weights"));
        assert!(matches!(refusal(&[("hidden_act", "relu".into())]), Error::Unsupported { .. }));
        for (name, value) in [("num_attention_heads", 3), ("num_attention_heads", 0), ("hidden_size", -8), ("num_hidden_layers", 0)] {
            let error = refusal(&[(name, value.into())]);
            assert!(error.to_string().contains("multiple of the heads"), "{name} = {value}: {error}");
        }
        assert!(matches!(refusal(&[("vocab_size", "many".into())]), Error::Invalid { .. }));
    }
}
