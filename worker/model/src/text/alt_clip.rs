//! AltCLIP's text encoder: XLM-R, then a linear layer to the width of the English encoder it was distilled from.

use serde::Deserialize;
use tch::{Device, Kind, Tensor};

use super::bert::BertEncoder;
use super::config::TextSettings;
use super::dropout::Dropout;
use crate::nn::Linear;
use crate::weights::Weights;
use crate::{Error, Result};

/// AltCLIP's encoder as FlagAI runs it: each token's last state is projected as it is.
///
/// The weights hold a layer norm (`pre_LN`) that FlagAI applies to the pooled state alone. transformers applies it to all tokens, so its
/// states differ; adapters were trained on FlagAI's.
pub(super) struct AltClipEncoder {
    roberta: BertEncoder,
    transformation: Linear,
    width: i64,
}

/// The one setting beyond XLM-R's.
#[derive(Deserialize)]
struct Projection {
    #[serde(default = "project_dim")]
    project_dim: i64,
}

fn project_dim() -> i64 {
    768
}

impl AltClipEncoder {
    /// Takes the encoder from weights that may hold the image encoder too. Errors: see [`BertEncoder::load`].
    pub(super) fn from_weights(settings: &TextSettings, weights: &Weights, kind: Kind, device: Device) -> Result<Self> {
        let Projection { project_dim: width } = settings.parse(&[])?;
        if width < 1 {
            return Err(Error::Invalid { path: settings.path().into(), reason: format!("project_dim = {width} must be at least 1") });
        }
        let tower = BertEncoder::tower(weights);
        let roberta = BertEncoder::new(settings, &tower.scope(kind, device))?;
        let transformation = Linear::new(tower.parent(kind, device) / "transformation", roberta.width(), width, true);
        BertEncoder::finish(&tower)?;
        Ok(Self { roberta, transformation, width })
    }

    /// Shapes: equally long rows of ids, to `[B, L, width]`. Errors: [`Error::Shape`] if the rows do not fit the encoder.
    pub(super) fn forward(&self, ids: &[Vec<i64>], pad_id: i64, dropout: &Dropout) -> Result<Tensor> {
        Ok(self.transformation.forward(&self.roberta.forward_to_the_end(ids, pad_id, dropout)?))
    }

    /// Returns where there is a token and no padding, as the tokenizer says: bool `[B, L]`.
    pub(super) fn token_mask(&self, ids: &[Vec<i64>], pad_id: i64) -> Result<Tensor> {
        self.roberta.token_mask_to_the_end(ids, pad_id)
    }

    pub(super) fn width(&self) -> i64 {
        self.width
    }

    pub(super) fn max_length(&self) -> i64 {
        self.roberta.max_length()
    }
}
