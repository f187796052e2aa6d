//! CLIP's two halves as a judge: how well a picture shows what a text says.

use std::path::Path;

use serde::Deserialize;
use tch::{Device, Kind, Tensor, no_grad_guard};

use super::clip::{Activation, ClipTextEncoder, Layer};
use super::tokenizer::TextTokenizer;
use crate::config::{num_layers, read_config, width};
use crate::hub::locate;
use crate::nn::{LayerNorm, Linear};
use crate::weights::{Frozen, Scope, Weights};
use crate::{Error, Result};

/// Mean and deviation of the channels of the pictures CLIP was trained on.
const MEAN: [f32; 3] = [0.481_454_66, 0.457_827_5, 0.408_210_73];
const DEVIATION: [f32; 3] = [0.268_629_54, 0.261_302_6, 0.275_777_1];

/// The part of a CLIP's `config.json` that concerns pictures; the defaults are those of transformers.
#[derive(Debug, Deserialize)]
struct Config {
    #[serde(default = "projection_dim")]
    projection_dim: i64,
    vision_config: VisionConfig,
}

#[derive(Debug, Deserialize)]
#[serde(default)]
struct VisionConfig {
    hidden_size: i64,
    intermediate_size: i64,
    num_hidden_layers: i64,
    num_attention_heads: i64,
    image_size: i64,
    patch_size: i64,
    hidden_act: Activation,
    layer_norm_eps: f64,
}

fn projection_dim() -> i64 {
    512
}

impl Default for VisionConfig {
    fn default() -> Self {
        Self {
            hidden_size: 768,
            intermediate_size: 3072,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            image_size: 224,
            patch_size: 32,
            hidden_act: Activation::QuickGelu,
            layer_norm_eps: 1e-5,
        }
    }
}

/// A whole CLIP, in the layout of transformers.
pub struct ClipScorer {
    tokenizer: TextTokenizer,
    text: ClipTextEncoder,
    vision: VisionTower,
    device: Device,
}

/// CLIP's image half: a transformer over patches and one token for the whole.
struct VisionTower {
    config: VisionConfig,
    class_embedding: Frozen,
    patch_embedding: Frozen,
    position_embedding: Frozen,
    pre_norm: LayerNorm,
    layers: Vec<Layer>,
    post_norm: LayerNorm,
    projection: Linear,
}

impl ClipScorer {
    /// Loads a folder with `config.json`, weights of both halves and the tokenizer; `path` may also be a name on the hub (see [`locate`]).
    ///
    /// Errors: [`Error::Invalid`], [`Error::Config`] and [`Error::Unsupported`] for a folder that holds no such CLIP, [`Error::Weights`]
    /// if the weights do not fit.
    pub fn load(path: &Path, kind: Kind, device: Device) -> Result<Self> {
        let folder = locate(path)?;
        let config: Config = read_config(&folder.join("config.json"), &[])?;
        let weights = Weights::open(&folder)?;
        let vision = VisionTower::new(&weights.root(kind, device), config.vision_config, config.projection_dim)?;
        // The text half has read its own part; each half leaves the other's keys and the training temperature alone.
        weights.finish(&["text_model.", "text_projection.", "logit_scale", "vision_model.embeddings.position_ids"])?;
        let text = ClipTextEncoder::load(&folder, kind, device)?;
        let tokenizer = TextTokenizer::clip(&folder, usize::try_from(text.max_length()).unwrap_or(0))?;
        Ok(Self { tokenizer, text, vision, device })
    }

    /// Embeds pictures of one size. Shapes: `u8` `[B, H, W, 3]`, to `f32` `[B, P]` of length 1.
    ///
    /// The shorter side is brought to what CLIP sees, bicubically as Pillow does it, and the middle cut out.
    pub fn images(&self, pictures: &Tensor) -> Result<Tensor> {
        let _guard = no_grad_guard();
        let size = pictures.size();
        let &[_, height, width, 3] = size.as_slice() else {
            return Err(Error::Shape { what: "ClipScorer::images", detail: format!("{size:?}, wanted [B, H, W, 3]") });
        };
        let side = self.vision.config.image_size;
        let (tall, wide) = if height < width { (side, side * width / height) } else { (side * height / width, side) };
        let pixels = pictures.f_to_device(self.device)?.f_permute([0, 3, 1, 2])?.f_to_kind(Kind::Float)?;
        // Pillow resizes along one axis after the other, and rounds to bytes each time.
        let resized = |pixels: &Tensor, size: [i64; 2]| {
            pixels.f_internal_upsample_bicubic2d_aa(size, false, None, None)?.f_round()?.f_clamp(0.0, 255.0)
        };
        let pixels = resized(&resized(&pixels, [height, wide])?, [tall, wide])?;
        let pixels = pixels.f_narrow(2, (tall - side) / 2, side)?.f_narrow(3, (wide - side) / 2, side)?.f_div_scalar(255.0)?;
        let channels = |values: &[f32]| Tensor::f_from_slice(values)?.f_to_device(self.device)?.f_view([1, 3, 1, 1]);
        let pixels = pixels.f_sub(&channels(&MEAN)?)?.f_div(&channels(&DEVIATION)?)?;
        unit(&self.vision.forward(&pixels)?)
    }

    /// Embeds texts. Shapes: `f32` `[B, P]` of length 1.
    ///
    /// Errors: [`Error::Shape`] if there is no text.
    pub fn texts<S: AsRef<str>>(&self, texts: &[S]) -> Result<Tensor> {
        let _guard = no_grad_guard();
        unit(&self.text.forward(&self.tokenizer.encode(texts)?)?.pooled)
    }

    /// CLIPScore of embedded pictures and texts, row by row: a hundred times their cosine, at least 0. Shapes: `[B, P]` both, to `[B]`.
    ///
    /// Source: Hessel et al. 2021 (arXiv:2104.08718), with the factor 100 that is in use now.
    pub fn scores(images: &Tensor, texts: &Tensor) -> Result<Tensor> {
        Ok(images.f_mul(texts)?.f_sum_dim_intlist(-1, false, Kind::Float)?.f_mul_scalar(100.0)?.f_clamp_min(0.0)?)
    }
}

impl VisionTower {
    fn new(root: &Scope, config: VisionConfig, projection: i64) -> Result<Self> {
        let invalid = |setting, reason: &str| Err(Error::Config { setting, reason: reason.into() });
        let (hidden, inner) = (width("hidden_size", config.hidden_size)?, width("intermediate_size", config.intermediate_size)?);
        let projection = width("projection_dim", projection)?;
        let count = num_layers("num_hidden_layers", config.num_hidden_layers, 1)?;
        let (side, patch) = (width("image_size", config.image_size)?, width("patch_size", config.patch_size)?);
        if config.num_attention_heads < 1 || hidden % config.num_attention_heads != 0 {
            return invalid("num_attention_heads", "must divide hidden_size");
        }
        if patch > side {
            return invalid("patch_size", "is larger than the picture");
        }
        let (model, eps) = (root / "vision_model", config.layer_norm_eps);
        let embeddings = &model / "embeddings";
        let positions = (side / patch) * (side / patch) + 1;
        Ok(Self {
            class_embedding: embeddings.tensor("class_embedding", &[hidden]),
            patch_embedding: (&embeddings / "patch_embedding").tensor("weight", &[hidden, 3, patch, patch]),
            position_embedding: (&embeddings / "position_embedding").tensor("weight", &[positions, hidden]),
            // The name is a slip of transformers that published files have kept.
            pre_norm: LayerNorm::new(&model / "pre_layrnorm", hidden, eps),
            layers: (0..count).map(|index| Layer::new(&model / "encoder" / "layers" / index, hidden, inner, eps)).collect(),
            post_norm: LayerNorm::new(&model / "post_layernorm", hidden, eps),
            projection: Linear::new(root / "visual_projection", hidden, projection, false),
            config,
        })
    }

    /// Shapes: `[B, 3, S, S]`, normalised, to `[B, P]`.
    fn forward(&self, pixels: &Tensor) -> Result<Tensor> {
        let patch = self.config.patch_size;
        let pixels = pixels.f_to_kind(self.patch_embedding.kind())?;
        let patches = pixels.f_conv2d(&self.patch_embedding, None::<&Tensor>, [patch, patch], [0, 0], [1, 1], 1)?;
        let patches = patches.f_flatten(2, 3)?.f_transpose(1, 2)?;
        let whole = self.class_embedding.f_view([1, 1, -1])?.f_expand([patches.size()[0], 1, -1], false)?;
        let states = Tensor::f_cat(&[whole, patches], 1)?.f_add(&self.position_embedding)?;
        let (heads, activation) = (self.config.num_attention_heads, self.config.hidden_act);
        let states = Layer::run(&self.layers, &self.pre_norm.forward(&states), heads, activation, false);
        Ok(self.projection.forward(&self.post_norm.forward(&states.f_select(1, 0)?)))
    }
}

/// Brings vectors to length 1, in f32.
fn unit(vectors: &Tensor) -> Result<Tensor> {
    let vectors = vectors.f_to_kind(Kind::Float)?;
    let lengths = vectors.f_norm_scalaropt_dim(2.0, [-1i64].as_slice(), true)?;
    Ok(vectors.f_div(&lengths)?)
}
