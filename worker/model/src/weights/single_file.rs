//! A whole pipeline in one file, as communities exchange them: every key as the original training code named it.
//!
//! The names are translated to those of the folders with `config.json`, so that the same models load from both. Nothing is copied: a
//! fused projection is three looks at its rows, a transposed one a look with other strides. Where a block begins and ends is read off
//! the keys, not assumed, so pruned networks translate too.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::entry::Entry;
use super::{Stored, Weights, invalid, map_file, safetensors_file};
use crate::{Error, Result};

const UNET: &str = "model.diffusion_model.";
const VAE: &str = "first_stage_model.";
/// CLIP-L, in SD1.5's and in SDXL's files.
const TEXT_ENCODER: [&str; 2] = ["cond_stage_model.transformer.", "conditioner.embedders.0.transformer."];
/// OpenCLIP's bigG, which SDXL has besides.
const TEXT_ENCODER_2: &str = "conditioner.embedders.1.model.";
const V_PREDICTION: &str = "v_pred";
const ZERO_TERMINAL_SNR: &str = "ztsnr";
/// Where the metadata of a file says what its UNet predicts: by the ModelSpec standard, and as ComfyUI writes it.
const PREDICTIONS: [&str; 2] = ["modelspec.prediction_type", "modelspec.predict_key"];
/// What both call the velocity.
const VELOCITY: &str = "v";
/// Tensors that models trained at the noise levels of EDM (Karras et al. 2022) carry, and such a model. Their networks have the usual
/// shapes, but what goes in and what comes out is scaled otherwise.
const EDM: [([&str; 2], &str); 2] =
    [(["edm_mean", "edm_std"], "Playground v2.5"), (["edm_vpred.sigma_max", "edm_vpred.sigma_min"], "CosXL")];

/// The models of one file, each under the names that its own folder would give its tensors.
pub struct SingleFile {
    /// The UNet.
    pub unet: Weights,
    /// The autoencoder.
    pub vae: Weights,
    /// CLIP-L.
    pub text_encoder: Weights,
    /// OpenCLIP's bigG; only SDXL has it.
    pub text_encoder_2: Option<Weights>,
    /// How the file says that the model was trained, where it does.
    pub marks: Marks,
}

/// What files say of their training by empty tensors of these names, as trainers and user interfaces have agreed on, or by metadata.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Marks {
    /// `v_pred`, or `v` as the metadata's prediction: the UNet predicts the velocity, not the noise.
    pub v_prediction: bool,
    /// `ztsnr`: at the last timestep nothing of the picture is left.
    pub zero_terminal_snr: bool,
}

impl Weights {
    /// Maps an SDXL or SD1.5 checkpoint that is one file (`.safetensors` or `.ckpt`) in the layout of the original training code.
    ///
    /// What no model here uses (an average of the weights, the noise schedule) is left out.
    /// Errors: those of [`Weights::open`]; [`Error::Unsupported`] for a model trained at the noise levels of EDM; [`Error::Invalid`] if the
    /// UNet, the autoencoder or the first text encoder is missing.
    pub fn open_single_file(path: &Path) -> Result<SingleFile> {
        let (map, entries) = map_file(path)?;
        let entries: BTreeMap<String, Entry> = entries.into_iter().collect();
        for (keys, model) in EDM {
            if let Some(key) = keys.into_iter().find(|key| entries.contains_key(*key)) {
                let what = format!("{}: a model trained at the noise levels of EDM (its {key} says so), as {model} is,", path.display());
                let hint = "take one that predicts the noise or the velocity at timesteps, as SDXL and SD1.5 do".into();
                return Err(Error::Unsupported { what, hint });
            }
        }
        let below = |prefix: &str| {
            let below = entries.iter().filter_map(|(key, entry)| Some((key.strip_prefix(prefix)?.to_owned(), entry.clone())));
            below.collect::<BTreeMap<_, _>>()
        };
        let model = |name: &str, translated: BTreeMap<String, Entry>| Weights {
            path: PathBuf::from(format!("{} ({name})", path.display())),
            entries: translated.into_iter().map(|(key, entry)| (key, Stored { map: Arc::clone(&map), entry })).collect(),
            ..Weights::none()
        };
        let required = |name: &str, prefix: &str, translated: BTreeMap<String, Entry>| {
            if translated.is_empty() {
                return Err(invalid(path, format!("no single-file checkpoint of SDXL or SD1.5: no {name} (keys {prefix}..)")));
            }
            Ok(model(name, translated))
        };
        let text_encoder = TEXT_ENCODER.into_iter().map(below).find(|found| !found.is_empty()).unwrap_or_default();
        let big = open_clip(below(TEXT_ENCODER_2));
        let says_velocity = || PREDICTIONS.iter().any(|name| safetensors_file::metadata(&map, name).is_some_and(|value| value == VELOCITY));
        let marks = Marks {
            v_prediction: entries.contains_key(V_PREDICTION) || says_velocity(),
            zero_terminal_snr: entries.contains_key(ZERO_TERMINAL_SNR),
        };
        Ok(SingleFile {
            unet: required("UNet", UNET, unet(below(UNET)))?,
            vae: required("autoencoder", VAE, vae(below(VAE)))?,
            text_encoder: required("text encoder", &TEXT_ENCODER.join(".. or "), text_encoder)?,
            text_encoder_2: (!big.is_empty()).then(|| model("second text encoder", big)),
            marks,
        })
    }
}

/// Parts of names and what they become.
type Renames = &'static [(&'static str, &'static str)];

/// Replaces the first part that `name` begins with, whole words only.
fn rename(name: &str, renames: Renames) -> Option<String> {
    renames.iter().find_map(|(from, to)| {
        let rest = name.strip_prefix(from)?;
        (rest.is_empty() || rest.starts_with('.')).then(|| format!("{to}{rest}"))
    })
}

/// Splits `a.12.b` into `a`, 12 and `b`.
fn split_index<'a>(name: &'a str, list: &str) -> Option<(usize, &'a str)> {
    let (index, rest) = name.strip_prefix(list)?.strip_prefix('.')?.split_once('.')?;
    // No list has more items than 16 bits count: sums of indices cannot overflow.
    Some((index.parse::<u16>().ok()?.into(), rest))
}

const UNET_ENDS: Renames = &[
    ("time_embed.0", "time_embedding.linear_1"),
    ("time_embed.2", "time_embedding.linear_2"),
    ("label_emb.0.0", "add_embedding.linear_1"),
    ("label_emb.0.2", "add_embedding.linear_2"),
    ("input_blocks.0.0", "conv_in"),
    ("out.0", "conv_norm_out"),
    ("out.2", "conv_out"),
];

const UNET_RESNET: Renames = &[
    ("in_layers.0", "norm1"),
    ("in_layers.2", "conv1"),
    ("emb_layers.1", "time_emb_proj"),
    ("out_layers.0", "norm2"),
    ("out_layers.3", "conv2"),
    ("skip_connection", "conv_shortcut"),
];

/// Translates a UNet. Its blocks lie in flat lists there; a new level begins after each change of resolution.
fn unet(entries: BTreeMap<String, Entry>) -> BTreeMap<String, Entry> {
    let positions = UnetPositions::read(&entries);
    let translate = |key: &str| {
        if let Some(name) = rename(key, UNET_ENDS) {
            return Some(name);
        }
        if let Some((index, rest)) = split_index(key, "input_blocks") {
            let &(level, layer) = positions.input.get(&index)?;
            return unet_module(&format!("down_blocks.{level}"), layer, rest, "op", "downsamplers.0.conv");
        }
        if let Some((index, rest)) = split_index(key, "output_blocks") {
            let &(level, layer) = positions.output.get(&index)?;
            return unet_module(&format!("up_blocks.{level}"), layer, rest, "conv", "upsamplers.0.conv");
        }
        // The middle: a resnet, and in all but pruned networks a transformer and another resnet.
        let (index, rest) = split_index(key, "middle_block")?;
        match rename(rest, UNET_RESNET) {
            Some(name) => Some(format!("mid_block.resnets.{}.{name}", index.div_ceil(2))),
            None => Some(format!("mid_block.attentions.{}.{rest}", index / 2)),
        }
    };
    entries.into_iter().filter_map(|(key, entry)| Some((translate(&key)?, entry))).collect()
}

/// Translates one module of a list's item: a resnet, a transformer, or the convolution that changes the resolution.
fn unet_module(block: &str, layer: usize, name: &str, resampler: &str, resampler_name: &str) -> Option<String> {
    // The module's place in the item says nothing that its names do not.
    let (_, name) = name.split_once('.')?;
    if let Some(rest) = name.strip_prefix(resampler).and_then(|rest| rest.strip_prefix('.')) {
        return Some(format!("{block}.{resampler_name}.{rest}"));
    }
    Some(match rename(name, UNET_RESNET) {
        Some(name) => format!("{block}.resnets.{layer}.{name}"),
        None => format!("{block}.attentions.{layer}.{name}"),
    })
}

/// The level and the layer in it of each item of the two lists.
struct UnetPositions {
    input: BTreeMap<usize, (usize, usize)>,
    output: BTreeMap<usize, (usize, usize)>,
}

impl UnetPositions {
    fn read(entries: &BTreeMap<String, Entry>) -> Self {
        // Item 0 is the input's convolution. A downsampler is an item of its own; an upsampler is the last module of one.
        let positions = |list: &str, ends_level: &dyn Fn(usize) -> bool| {
            let mut indices: Vec<usize> = entries.keys().filter_map(|key| split_index(key, list)).map(|(index, _)| index).collect();
            indices.sort_unstable();
            indices.dedup();
            let (mut level, mut layer) = (0, 0);
            let position = |index| {
                let here = (level, layer);
                (level, layer) = if ends_level(index) { (level + 1, 0) } else { (level, layer + 1) };
                (index, here)
            };
            let first = usize::from(list == "input_blocks");
            indices.into_iter().filter(|&index| index >= first).map(position).collect()
        };
        let has = |key: String| entries.contains_key(&key);
        Self {
            input: positions("input_blocks", &|index| has(format!("input_blocks.{index}.0.op.weight"))),
            output: positions("output_blocks", &|index| (1..=2).any(|at| has(format!("output_blocks.{index}.{at}.conv.weight")))),
        }
    }
}

const VAE_ENDS: Renames = &[
    ("conv_in", "conv_in"),
    ("norm_out", "conv_norm_out"),
    ("conv_out", "conv_out"),
    ("mid.block_1", "mid_block.resnets.0"),
    ("mid.block_2", "mid_block.resnets.1"),
    ("mid.attn_1.norm", "mid_block.attentions.0.group_norm"),
    ("mid.attn_1.q", "mid_block.attentions.0.to_q"),
    ("mid.attn_1.k", "mid_block.attentions.0.to_k"),
    ("mid.attn_1.v", "mid_block.attentions.0.to_v"),
    ("mid.attn_1.proj_out", "mid_block.attentions.0.to_out.0"),
];

/// Translates an autoencoder. Its attention's projections are 1x1 convolutions there, and its decoder's levels count from the picture.
fn vae(entries: BTreeMap<String, Entry>) -> BTreeMap<String, Entry> {
    let up_levels = entries.keys().filter_map(|key| split_index(key, "decoder.up")).map(|(level, _)| level + 1).max().unwrap_or(0);
    let translate = |key: &str| {
        if key.starts_with("quant_conv.") || key.starts_with("post_quant_conv.") {
            return Some(key.to_owned());
        }
        let (half, name) = key.split_once('.').filter(|(half, _)| ["encoder", "decoder"].contains(half))?;
        let name = if let Some((level, rest)) = split_index(name, "down") {
            format!("down_blocks.{level}.{}", rename(rest, &[("block", "resnets"), ("downsample", "downsamplers.0")])?)
        } else if let Some((level, rest)) = split_index(name, "up") {
            let rest = rename(rest, &[("block", "resnets"), ("upsample", "upsamplers.0")])?;
            format!("up_blocks.{}.{rest}", up_levels - 1 - level)
        } else {
            rename(name, VAE_ENDS)?
        };
        Some(format!("{half}.{}", name.replace(".nin_shortcut.", ".conv_shortcut.")))
    };
    let translated = entries.into_iter().filter_map(|(key, entry)| Some((translate(&key)?, entry)));
    let linear = |(key, entry): (String, Entry)| {
        let entry = if key.contains(".attentions.") { entry.pointwise_to_linear() } else { entry };
        (key, entry)
    };
    translated.map(linear).collect()
}

const OPEN_CLIP_ENDS: Renames = &[
    ("token_embedding", "text_model.embeddings.token_embedding"),
    ("positional_embedding", "text_model.embeddings.position_embedding.weight"),
    ("ln_final", "text_model.final_layer_norm"),
];

const OPEN_CLIP_LAYER: Renames = &[
    ("ln_1", "layer_norm1"),
    ("ln_2", "layer_norm2"),
    ("attn.out_proj", "self_attn.out_proj"),
    ("mlp.c_fc", "mlp.fc1"),
    ("mlp.c_proj", "mlp.fc2"),
];

/// Translates OpenCLIP's text encoder: queries, keys and values are the thirds of one matrix there, and the projection is transposed.
fn open_clip(entries: BTreeMap<String, Entry>) -> BTreeMap<String, Entry> {
    let mut translated = BTreeMap::new();
    for (key, entry) in entries {
        if key == "text_projection" {
            translated.insert("text_projection.weight".to_owned(), entry.transposed());
        } else if let Some(name) = rename(&key, OPEN_CLIP_ENDS) {
            translated.insert(name, entry);
        } else if let Some((index, rest)) = split_index(&key, "transformer.resblocks") {
            let layer = format!("text_model.encoder.layers.{index}");
            if let Some(name) = rename(rest, OPEN_CLIP_LAYER) {
                translated.insert(format!("{layer}.{name}"), entry);
            } else if let Some(part) = rest.strip_prefix("attn.in_proj_") {
                let width = entry.shape().first().copied().unwrap_or(0) / 3;
                let thirds = ["q_proj", "k_proj", "v_proj"].into_iter().zip(0..);
                translated.extend(thirds.filter_map(|(name, third)| {
                    let rows = entry.rows(third * width..(third + 1) * width)?;
                    Some((format!("{layer}.self_attn.{name}.{part}"), rows))
                }));
            }
        }
    }
    translated
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind, Tensor};

    use super::*;
    use crate::weights::torch_file;

    fn open(keys: &[&str]) -> Result<SingleFile> {
        tch::set_num_threads(1);
        let tensors: Vec<_> = keys.iter().map(|key| (key.to_string(), Tensor::zeros([3, 1, 1, 1], (Kind::Float, Device::Cpu)))).collect();
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), torch_file::serialize(&tensors, Kind::Float, &BTreeMap::new()).unwrap()).unwrap();
        Weights::open_single_file(file.path())
    }

    #[test]
    fn levels_are_read_off_the_changes_of_resolution() {
        let file = open(&[
            "model.diffusion_model.input_blocks.0.0.weight",
            "model.diffusion_model.input_blocks.1.0.in_layers.2.weight",
            "model.diffusion_model.input_blocks.2.0.op.weight",
            "model.diffusion_model.input_blocks.3.0.in_layers.2.weight",
            "model.diffusion_model.input_blocks.3.1.proj_in.weight",
            "model.diffusion_model.middle_block.0.in_layers.2.weight",
            "model.diffusion_model.output_blocks.0.0.skip_connection.weight",
            "model.diffusion_model.output_blocks.1.0.skip_connection.weight",
            "model.diffusion_model.output_blocks.1.1.conv.weight",
            "model.diffusion_model.output_blocks.2.0.emb_layers.1.weight",
            "model_ema.decay",
            "v_pred",
            "first_stage_model.decoder.up.0.block.1.nin_shortcut.weight",
            "first_stage_model.decoder.up.1.upsample.conv.weight",
            "first_stage_model.decoder.mid.attn_1.proj_out.weight",
            "cond_stage_model.transformer.text_model.final_layer_norm.weight",
        ])
        .unwrap();
        let expected = [
            "conv_in.weight",
            "down_blocks.0.downsamplers.0.conv.weight",
            "down_blocks.0.resnets.0.conv1.weight",
            "down_blocks.1.attentions.0.proj_in.weight",
            "down_blocks.1.resnets.0.conv1.weight",
            "mid_block.resnets.0.conv1.weight",
            "up_blocks.0.resnets.0.conv_shortcut.weight",
            "up_blocks.0.resnets.1.conv_shortcut.weight",
            "up_blocks.0.upsamplers.0.conv.weight",
            "up_blocks.1.resnets.0.time_emb_proj.weight",
        ];
        assert_eq!(file.unet.keys().collect::<Vec<_>>(), expected);
        let expected = [
            "decoder.mid_block.attentions.0.to_out.0.weight",
            "decoder.up_blocks.0.upsamplers.0.conv.weight",
            "decoder.up_blocks.1.resnets.1.conv_shortcut.weight",
        ];
        assert_eq!(file.vae.keys().collect::<Vec<_>>(), expected);
        assert_eq!(file.vae.stored(expected[0]).unwrap().size(), [3, 1]);
        assert_eq!(file.text_encoder.keys().collect::<Vec<_>>(), ["text_model.final_layer_norm.weight"]);
        assert!(file.text_encoder_2.is_none());
        assert_eq!(file.marks, Marks { v_prediction: true, zero_terminal_snr: false });
    }

    /// Keys of a checkpoint's parts, one of each.
    const PARTS: [&str; 3] = [
        "model.diffusion_model.out.0.weight",
        "first_stage_model.quant_conv.weight",
        "cond_stage_model.transformer.text_model.final_layer_norm.weight",
    ];

    #[test]
    fn models_at_noise_levels_of_edm_are_refused_by_the_key_that_tells_them() {
        for (key, named) in
            [("edm_mean", "Playground"), ("edm_std", "Playground"), ("edm_vpred.sigma_max", "CosXL"), ("edm_vpred.sigma_min", "CosXL")]
        {
            let error = open(&[&PARTS[..], &[key]].concat()).err().unwrap();
            let text = error.to_string();
            assert!(matches!(error, Error::Unsupported { .. }) && text.contains(key) && text.contains(named), "{text}");
        }
    }

    #[test]
    fn the_prediction_may_stand_in_the_metadata() {
        let zeros = [0; 4];
        let marks = |name: &str, value: &str| {
            let views = PARTS.map(|key| (key, safetensors::tensor::TensorView::new(safetensors::Dtype::F32, vec![1], &zeros).unwrap()));
            let metadata = std::collections::HashMap::from([(name.to_owned(), value.to_owned())]);
            let file = tempfile::NamedTempFile::new().unwrap();
            std::fs::write(file.path(), safetensors::serialize(views, Some(metadata)).unwrap()).unwrap();
            Weights::open_single_file(file.path()).unwrap().marks
        };
        for name in PREDICTIONS {
            assert_eq!(marks(name, "v"), Marks { v_prediction: true, zero_terminal_snr: false });
            assert_eq!(marks(name, "epsilon"), Marks::default());
        }
        assert_eq!(marks("modelspec.title", "v"), Marks::default());
    }

    #[test]
    fn a_file_that_is_no_checkpoint_says_what_it_lacks() {
        let refuse = |keys: &[&str]| open(keys).err().unwrap().to_string();
        assert!(refuse(&["a"]).contains("no UNet (keys model.diffusion_model...)"));
        assert!(refuse(&["model.diffusion_model.out.0.weight"]).contains("no autoencoder"));
    }
}
