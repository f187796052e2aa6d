//! Checkpoints of real sizes are sparse files: only their headers exist, which is all that shapes need.

use std::io::Write;
use std::path::Path;

use tch::Tensor;

use super::*;
use crate::adapter::Adapter;
use crate::distill::{DistillConfig, Distiller, English, Images, LoadOptions, MicroBatch, Prompts};
use crate::schedule::Prediction;
use crate::text::StudentOptions;

fn demo() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/demo/model")
}

fn golden(file: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/cases").join(file)
}

/// Names and shapes of tensors.
type Shapes = Vec<(String, Vec<i64>)>;

/// What a model asks of empty weights.
fn requested(weights: &Weights) -> Shapes {
    let Err(Error::Weights { missing, .. }) = weights.finish(&[]) else { panic!("nothing was asked for") };
    let parse = |line: String| {
        let (name, shape) = line.split_once(' ').unwrap();
        (name.to_owned(), serde_json::from_str(shape).unwrap())
    };
    missing.into_iter().map(parse).collect()
}

/// Replaces the first of the `renames` that `name` begins with.
fn rename(name: &str, renames: &[(&str, &str)]) -> Option<String> {
    renames.iter().find_map(|(from, to)| name.strip_prefix(from).map(|rest| format!("{to}{rest}")))
}

const RESNET: [(&str, &str); 6] = [
    ("norm1", "in_layers.0"),
    ("conv1", "in_layers.2"),
    ("time_emb_proj", "emb_layers.1"),
    ("norm2", "out_layers.0"),
    ("conv2", "out_layers.3"),
    ("conv_shortcut", "skip_connection"),
];

/// Splits `12.rest`.
fn number(text: &str) -> (usize, &str) {
    let (number, rest) = text.split_once('.').unwrap();
    (number.parse().unwrap(), rest)
}

fn unet_shapes(config: &UNetConfig) -> Shapes {
    let nothing = Weights::none();
    UNet::new(&nothing.root(Kind::Float, Device::Cpu), config.clone()).unwrap();
    requested(&nothing)
}

/// A UNet's tensors under the names of the original code, in the same order; `num_resnets` are the residual blocks of a level on the way
/// down.
fn original_unet(shapes: &Shapes, num_resnets: usize) -> Shapes {
    let up_attention = |level: usize| shapes.iter().any(|(key, _)| key.starts_with(&format!("up_blocks.{level}.attentions.")));
    let module = |item: String, kind: &str, rest: &str| match kind {
        "resnets" => format!("{item}.0.{}", rename(rest, &RESNET).unwrap()),
        _ => format!("{item}.1.{rest}"),
    };
    let translate = |key: &str| {
        let ends = [
            ("time_embedding.linear_1", "time_embed.0"),
            ("time_embedding.linear_2", "time_embed.2"),
            ("add_embedding.linear_1", "label_emb.0.0"),
            ("add_embedding.linear_2", "label_emb.0.2"),
            ("conv_in", "input_blocks.0.0"),
            ("conv_norm_out", "out.0"),
            ("conv_out", "out.2"),
        ];
        if let Some(name) = rename(key, &ends) {
            return name;
        }
        let (way, rest) = key.split_once('.').unwrap();
        if way == "mid_block" {
            let (kind, rest) = rest.split_once('.').unwrap();
            let (index, rest) = number(rest);
            return match kind {
                "resnets" => format!("middle_block.{}.{}", 2 * index, rename(rest, &RESNET).unwrap()),
                _ => format!("middle_block.{}.{rest}", 2 * index + 1),
            };
        }
        let (level, rest) = number(rest);
        let (kind, rest) = rest.split_once('.').unwrap();
        let (layer, rest) = number(rest);
        match (way, kind) {
            ("down_blocks", "downsamplers") => rest.replace("conv", &format!("input_blocks.{}.0.op", (level + 1) * (num_resnets + 1))),
            ("down_blocks", _) => module(format!("input_blocks.{}", 1 + level * (num_resnets + 1) + layer), kind, rest),
            (_, "upsamplers") => {
                let place = if up_attention(level) { 2 } else { 1 };
                rest.replace("conv", &format!("output_blocks.{}.{place}.conv", level * (num_resnets + 1) + num_resnets))
            }
            _ => module(format!("output_blocks.{}", level * (num_resnets + 1) + layer), kind, rest),
        }
    };
    shapes.iter().map(|(key, shape)| (format!("model.diffusion_model.{}", translate(key)), shape.clone())).collect()
}

fn vae_shapes(config: &VaeConfig) -> Shapes {
    let nothing = Weights::none();
    Vae::new(&nothing.root(Kind::Float, Device::Cpu), config.clone()).unwrap();
    requested(&nothing)
}

/// An autoencoder's tensors under the names of the original code, in the same order.
fn original_vae(shapes: &Shapes, levels: usize) -> Shapes {
    let translate = |(key, mut shape): (String, Vec<i64>)| {
        let mut name = key.clone();
        for level in 0..levels {
            name = name.replace(&format!("up_blocks.{level}."), &format!("up.{}.", levels - 1 - level));
        }
        for (from, to) in [
            ("down_blocks", "down"),
            ("mid_block.resnets.0", "mid.block_1"),
            ("mid_block.resnets.1", "mid.block_2"),
            ("mid_block.attentions.0", "mid.attn_1"),
            ("resnets", "block"),
            ("downsamplers.0", "downsample"),
            ("upsamplers.0", "upsample"),
            ("conv_shortcut", "nin_shortcut"),
            ("conv_norm_out", "norm_out"),
            ("group_norm", "norm"),
            ("to_out.0", "proj_out"),
            (".to_", "."),
        ] {
            name = name.replace(from, to);
        }
        if key.contains("attentions") && shape.len() == 2 {
            shape.extend([1, 1]);
        }
        (format!("first_stage_model.{name}"), shape)
    };
    shapes.iter().cloned().map(translate).collect()
}

fn clip_shapes(settings: &Map<String, Value>) -> Shapes {
    let nothing = Weights::none();
    let _ = ClipTextEncoder::of(Path::new("clip"), settings.clone(), &nothing, Kind::Float, Device::Cpu);
    requested(&nothing)
}

fn original_clip_l(settings: &Map<String, Value>, prefix: &str) -> Shapes {
    clip_shapes(settings).into_iter().map(|(key, shape)| (format!("{prefix}transformer.text_model.{key}"), shape)).collect()
}

/// The name of one of bigG's tensors in the original code, where queries, keys and values are one.
fn original_big_g_name(key: &str) -> String {
    let renames = [
        ("embeddings.token_embedding", "token_embedding"),
        ("embeddings.position_embedding.weight", "positional_embedding"),
        ("encoder.layers", "transformer.resblocks"),
        ("final_layer_norm", "ln_final"),
        ("layer_norm", "ln_"),
        ("self_attn.q_proj.", "attn.in_proj_"),
        ("self_attn", "attn"),
        ("fc1", "c_fc"),
        ("fc2", "c_proj"),
    ];
    let name = renames.iter().fold(key.to_owned(), |name, (from, to)| name.replace(from, to));
    format!("conditioner.embedders.1.model.{name}")
}

fn original_big_g(settings: &Map<String, Value>) -> Shapes {
    let fused = |(key, mut shape): (String, Vec<i64>)| {
        if key.contains("q_proj") {
            shape[0] *= 3;
        }
        (!key.contains("k_proj") && !key.contains("v_proj")).then(|| (original_big_g_name(&key), shape))
    };
    let others = [("text_projection", vec![1280, 1280]), ("logit_scale", vec![])].map(|(name, shape)| (original_big_g_name(name), shape));
    clip_shapes(settings).into_iter().filter_map(fused).chain(others).collect()
}

/// Writes a safetensors file of f16 tensors that are holes.
fn write_sparse(path: &Path, shapes: &Shapes) {
    let mut at = 0;
    let mut header = Map::new();
    for (name, shape) in shapes {
        let end = at + 2 * shape.iter().product::<i64>();
        header.insert(name.clone(), serde_json::json!({ "dtype": "F16", "shape": shape, "data_offsets": [at, end] }));
        at = end;
    }
    let header = Value::from(header).to_string();
    let mut file = std::fs::File::create(path).unwrap();
    file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    file.write_all(header.as_bytes()).unwrap();
    file.set_len(8 + header.len() as u64 + at as u64).unwrap();
}

fn published(text: &str, part: &str) -> Map<String, Value> {
    let parts: Map<String, Value> = serde_json::from_str(text).unwrap();
    parts[part].as_object().unwrap().clone()
}

/// The tensors of an SDXL checkpoint whose UNet differs from the published one in some settings.
fn sdxl(changes: Value) -> Shapes {
    let mut unet = published(published::SDXL, "unet");
    unet.extend(changes.as_object().unwrap().clone());
    let unet = UNetConfig::parse(Path::new("unet"), unet.into()).unwrap();
    let vae = VaeConfig::parse(Path::new("vae"), published(published::SDXL, "vae").into()).unwrap();
    [
        original_unet(&unet_shapes(&unet), 2),
        original_vae(&vae_shapes(&vae), 4),
        original_clip_l(&published(published::SDXL, "text_encoder"), "conditioner.embedders.0."),
        original_big_g(&published(published::SDXL, "text_encoder_2")),
    ]
    .concat()
}

fn open_sparse(shapes: &Shapes) -> Result<ModelSource> {
    tch::set_num_threads(1);
    let file = tempfile::NamedTempFile::with_suffix(".safetensors").unwrap();
    write_sparse(file.path(), shapes);
    ModelSource::open(file.path(), None)
}

fn count(source: &ModelSource, part: Part) -> i64 {
    source.survey(part).unwrap().num_parameters
}

#[test]
fn sdxl_in_one_file_is_checked_whole_without_being_read() {
    let shapes = sdxl(serde_json::json!({}));
    let started = std::time::Instant::now();
    let source = open_sparse(&shapes).unwrap().shapes_only();
    assert_eq!((source.architecture(), source.sample_size()), (Architecture::Sdxl, 128));
    let counts = source.architecture().parts().iter().map(|&part| count(&source, part)).collect::<Vec<_>>();
    assert_eq!(counts, [2_567_463_684, 83_653_863, 123_060_480, 694_659_840]);
    assert_eq!(source.survey(Part::Unet).unwrap().kinds, [(Kind::Half, 2 * 2_567_463_684)]);
    let english = source.english(Kind::BFloat16, Device::Cpu).unwrap();
    assert_eq!((english.context_length(), english.width(), english.pooled_width()), (77, 2048, Some(1280)));
    assert_eq!(source.scheduler().solver.prediction, Prediction::Epsilon);
    let (scheduler, wanted) = (source.scheduler(), SchedulerConfig::load(&golden("solver_sdxl")).unwrap());
    assert_eq!((&scheduler.noise, scheduler.solver.dpm()), (&wanted.noise, wanted.solver.dpm()));
    println!("7 GB checked in {:?}", started.elapsed());
}

#[test]
fn sd15_in_one_file_is_recognised() {
    let unet = UNetConfig::parse(Path::new("unet"), published(published::SD15, "unet").into()).unwrap();
    let vae = VaeConfig::parse(Path::new("vae"), published(published::SD15, "vae").into()).unwrap();
    let clip = original_clip_l(&published(published::SD15, "text_encoder"), "cond_stage_model.");
    let source =
        open_sparse(&[original_unet(&unet_shapes(&unet), 2), original_vae(&vae_shapes(&vae), 4), clip].concat()).unwrap().shapes_only();
    assert_eq!((source.architecture(), source.sample_size()), (Architecture::Sd15, 64));
    let counts = source.architecture().parts().iter().map(|&part| count(&source, part)).collect::<Vec<_>>();
    assert_eq!(counts, [859_520_964, 83_653_863, 123_060_480]);
    assert_eq!(source.vae_config().scaling_factor, 0.18215);
    assert_eq!(source.tokenizer(77).unwrap().pad_id(), 49407);
    assert!(source.text_encoder_2(Kind::Float, Device::Cpu).err().unwrap().to_string().contains("holds no text_encoder_2"));
    let english = source.english(Kind::Float, Device::Cpu).unwrap();
    assert_eq!((english.context_length(), english.width(), english.pooled_width()), (77, 768, None));
}

/// SSD-1B: fewer layers, and a middle of one residual block.
#[test]
fn pruned_and_inpainting_networks_are_read_off_their_files() {
    let ssd_1b = serde_json::json!({
        "transformer_layers_per_block": [1, 2, 4],
        "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
        "mid_block_type": "UNetMidBlock2D",
    });
    assert_eq!(count(&open_sparse(&sdxl(ssd_1b)).unwrap(), Part::Unet), 1_331_334_404);
    let inpainting = open_sparse(&sdxl(serde_json::json!({ "in_channels": 9 }))).unwrap();
    assert_eq!((inpainting.unet_config().in_channels, inpainting.unet_config().out_channels), (9, 4));
    assert_eq!(count(&inpainting, Part::Unet), 2_567_463_684 + 5 * 320 * 9);
}

#[test]
fn marks_of_the_file_say_what_the_network_predicts() {
    let with = |marks: &[&str]| {
        let marks = marks.iter().map(|mark| (mark.to_string(), vec![0]));
        open_sparse(&sdxl(serde_json::json!({})).into_iter().chain(marks).collect())
    };
    assert_eq!(with(&["v_pred"]).unwrap().scheduler().solver.prediction, Prediction::Velocity);
    assert!(with(&["v_pred", "ztsnr"]).unwrap().scheduler().noise.zero_terminal_snr);
    assert!(with(&["ztsnr"]).unwrap_err().to_string().contains("rescale_betas_zero_snr = true"));
}

#[test]
fn a_network_of_other_widths_is_refused_with_both_shapes() {
    let source = open_sparse(&sdxl(serde_json::json!({ "cross_attention_dim": 1024 }))).unwrap();
    let error = source.survey(Part::Unet).unwrap_err().to_string();
    let part = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight is [640, 1024], wanted [640, 2048]";
    assert!(error.contains(part) && error.contains("(UNet)"), "{error}");
    // A file that lacks a level is compared with the published structure.
    let mut shapes = sdxl(serde_json::json!({}));
    shapes.retain(|(key, _)| !key.contains("output_blocks.3.") && !key.contains("output_blocks.4.") && !key.contains("output_blocks.5."));
    let error = open_sparse(&shapes).unwrap().survey(Part::Unet).unwrap_err().to_string();
    assert!(error.contains("\n  missing up_blocks.") && error.contains(" more missing\n"), "{error}");
    // Another model's file has thousands of them.
    assert!(error.lines().count() <= 3 * 9 + 1, "{error}");
}

#[test]
fn folders_and_files_give_the_same_parts() {
    tch::set_num_threads(1);
    let source = ModelSource::open(&demo(), None).unwrap();
    assert_eq!((source.architecture(), source.sample_size()), (Architecture::Sdxl, 8));
    let unet = UNet::load(&demo().join("unet"), Kind::Float, Device::Cpu).unwrap();
    assert_eq!(source.unet(Kind::Float, Device::Cpu).unwrap().text_width(), unet.text_width());
    assert_eq!(count(&source, Part::Unet), UNet::count_parameters(unet.config()).unwrap());
    assert_eq!(source.settings().unwrap().keys().collect::<Vec<_>>().len(), 5);
    let english = source.english(Kind::Float, Device::Cpu).unwrap();
    let direct = SdxlTextEncoders::load(&demo(), Kind::Float, Device::Cpu).unwrap();
    let (ours, wanted) = (english.encode(&["a red circle"]).unwrap(), direct.encode(&["a red circle"]).unwrap());
    assert_eq!((ours.sequence, ours.pooled), (wanted.sequence, Some(wanted.pooled)));
    // Opened for its shapes, the same model is all zeros.
    let zeros = ModelSource::open(&demo(), None).unwrap().shapes_only().english(Kind::Float, Device::Cpu).unwrap();
    assert_eq!(zeros.encode(&["a red circle"]).unwrap().sequence.abs().max().double_value(&[]), 0.0);
}

/// A small checkpoint's own configurations take the place of the published ones.
#[test]
fn configurations_beside_a_file_are_taken_instead() {
    tch::set_num_threads(1);
    let file = golden("single_file_sdxl/model.safetensors");
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, settings: Value| {
        let path = folder.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, settings.to_string()).unwrap();
    };
    assert!(ModelSource::open(&file, Some(folder.path())).unwrap_err().to_string().contains("looked for unet/config.json"));
    write(
        "unet/config.json",
        serde_json::json!({
            "block_out_channels": [4, 4, 8], "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"], "attention_head_dim": [1, 1, 2],
            "cross_attention_dim": 8, "norm_num_groups": 2, "use_linear_projection": true, "transformer_layers_per_block": [1, 1, 2],
            "addition_embed_type": "text_time", "addition_time_embed_dim": 2, "projection_class_embeddings_input_dim": 16,
            "sample_size": 16,
        }),
    );
    write(
        "vae/config.json",
        serde_json::json!({
            "block_out_channels": [4, 4, 8], "down_block_types": ["DownEncoderBlock2D", "DownEncoderBlock2D", "DownEncoderBlock2D"],
            "up_block_types": ["UpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D"], "norm_num_groups": 2, "layers_per_block": 2,
        }),
    );
    let clip = serde_json::json!({
        "vocab_size": 9, "hidden_size": 4, "intermediate_size": 6, "projection_dim": 4, "num_hidden_layers": 2, "num_attention_heads": 2,
        "max_position_embeddings": 5,
    });
    write("text_encoder/config.json", clip.clone());
    write("text_encoder_2/config.json", clip);
    let source = ModelSource::open(&file, Some(folder.path())).unwrap();
    assert_eq!((source.architecture(), source.sample_size()), (Architecture::Sdxl, 16));
    let text = source.text_encoder_2(Kind::Float, Device::Cpu).unwrap();
    assert!(text.forward(&[vec![1, 2, 3]]).unwrap().pooled.abs().max().double_value(&[]) > 0.0);
    for part in source.architecture().parts() {
        source.survey(*part).unwrap();
    }
    // What the folder does not hold is the published one.
    assert_eq!(source.scheduler().solver.steps_offset, 1);
    let error = ModelSource::open(&demo(), Some(folder.path())).unwrap_err().to_string();
    assert!(error.contains("has its own"), "{error}");
}

/// The demo's model written as one file in the original layout, and read back with the folder's own configurations and tokenizers.
#[test]
fn a_file_made_of_a_folder_gives_the_same_networks() {
    tch::set_num_threads(1);
    let folder = ModelSource::open(&demo(), None).unwrap();
    let (unet, vae) = (unet_shapes(folder.unet_config()), vae_shapes(folder.vae_config()));
    let num_resnets = match folder.unet_config().layers_per_block {
        crate::PerLevel::Same(layers) => layers as usize,
        crate::PerLevel::Each(_) => panic!("the demo's levels are alike"),
    };
    let levels = folder.vae_config().block_out_channels.len();
    let mut tensors = Vec::new();
    for (part, shapes, original) in [(Part::Unet, &unet, original_unet(&unet, num_resnets)), (Part::Vae, &vae, original_vae(&vae, levels))]
    {
        let weights = folder.weights(part).unwrap();
        for ((key, _), (name, shape)) in shapes.iter().zip(original) {
            tensors.push((name, weights.stored(key).unwrap().reshape(shape)));
        }
    }
    let clip_l = folder.weights(Part::TextEncoder).unwrap();
    for key in clip_l.keys() {
        let bare = key.strip_prefix("text_model.").unwrap_or(key);
        tensors.push((format!("conditioner.embedders.0.transformer.text_model.{bare}"), clip_l.stored(key).unwrap()));
    }
    let big_g = folder.weights(Part::TextEncoder2).unwrap();
    for key in big_g.keys().filter(|key| !key.contains("k_proj") && !key.contains("v_proj")) {
        let stored = |key: &str| big_g.stored(key).unwrap();
        let tensor = match key {
            "text_projection.weight" => stored(key).transpose(0, 1),
            _ if key.contains("q_proj") => {
                tch::Tensor::cat(&["q_proj", "k_proj", "v_proj"].map(|name| stored(&key.replace("q_proj", name))), 0)
            }
            _ => stored(key),
        };
        let bare = key.strip_prefix("text_model.").unwrap_or(key);
        tensors.push((original_big_g_name(bare.strip_suffix("projection.weight").map_or(bare, |_| "text_projection")), tensor));
    }
    let file = tempfile::NamedTempFile::with_suffix(".ckpt").unwrap();
    std::fs::write(file.path(), crate::weights::torch_file::serialize(&tensors, Kind::Half, &BTreeMap::new()).unwrap()).unwrap();

    let checkpoint = ModelSource::open(file.path(), Some(&demo())).unwrap();
    assert_eq!(checkpoint.settings().unwrap(), folder.settings().unwrap());
    for part in [Part::Unet, Part::Vae] {
        let (ours, wanted) = (checkpoint.weights(part).unwrap(), folder.weights(part).unwrap());
        assert!(ours.keys().eq(wanted.keys()), "{part}");
        assert!(ours.keys().all(|key| ours.stored(key) == wanted.stored(key)), "{part}");
        assert_eq!(checkpoint.survey(part).unwrap(), folder.survey(part).unwrap());
    }
    let encode = |source: &ModelSource| source.english(Kind::Float, Device::Cpu).unwrap().encode(&["a big red circle", ""]).unwrap();
    let (ours, wanted) = (encode(&checkpoint), encode(&folder));
    assert_eq!((ours.sequence, ours.pooled), (wanted.sequence, wanted.pooled));
}

/// The counts are those of the published models; the second text encoder's has its projection in it.
#[test]
fn published_models_need_no_file() {
    let count = |architecture, part| ModelSource::random(architecture).unwrap().survey(part).unwrap().num_parameters;
    for (part, published) in
        [(Part::Unet, 2_567_463_684), (Part::Vae, 83_653_863), (Part::TextEncoder, 123_060_480), (Part::TextEncoder2, 694_659_840)]
    {
        assert_eq!(count(Architecture::Sdxl, part), published, "{part}");
    }
    assert_eq!(count(Architecture::Sd15, Part::Unet), 859_520_964);
    let sdxl = ModelSource::random(Architecture::Sdxl).unwrap();
    assert_eq!((sdxl.architecture(), sdxl.sample_size()), (Architecture::Sdxl, 128));
}

/// The road that a published model takes, with the demo's widths. What comes out means nothing, but it must be numbers: whoever times a
/// step of NaN times something else.
#[test]
fn networks_of_drawn_weights_train_in_every_kind() {
    tch::set_num_threads(1);
    let mut settings = ModelSource::open(&demo(), None).unwrap().settings().unwrap();
    for part in ["text_encoder", "text_encoder_2"] {
        settings[part]["vocab_size"] = 49408.into();
        settings[part]["eos_token_id"] = 2.into();
    }
    let model = ModelSource::of("demo".into(), Origin::Random(Published(settings))).unwrap();
    for kind in [Kind::Float, Kind::BFloat16, Kind::Half] {
        let (distill, student) = (DistillConfig::default(), StudentOptions::new(kind, Device::Cpu));
        let options = LoadOptions { distill, context_length: 24, student, vae_kind: Kind::Float };
        let models = Distiller::load(&model, &demo().join("text_encoder_zh"), options).unwrap();
        let adapter = Adapter::fresh(models.adapter_config(32, 3), 7, Device::Cpu).unwrap();
        let noise = |shape: &[i64]| Tensor::randn(shape, (Kind::Float, Device::Cpu));
        let batch = MicroBatch {
            images: Images::Pixels(Tensor::randint(256, [2, 3, 64, 64], (Kind::Uint8, Device::Cpu))),
            posterior: noise(&[2, 4, 8, 8]),
            noise: noise(&[2, 4, 8, 8]),
            offset: noise(&[2, 4]),
            timesteps: Tensor::from_slice(&[10_i64, 900]),
            drop: Tensor::from_slice(&[false, true]),
            native: Tensor::from_slice(&[true, false]),
            prompts: Prompts::Captions(vec!["红色的圆形".into(), "蓝色的方块".into()]),
            english: English::Captions(vec!["a red circle".into(), "a blue square".into()]),
            original_size: vec![(64, 64); 2],
            crop: vec![(0, 0); 2],
            text_dropout: vec![0, 1],
        };
        let mut gradient = adapter.flat().zeros_like();
        let sums = models.accumulate(&adapter, &batch, &mut gradient).unwrap();
        let norm = gradient.norm().double_value(&[]);
        assert!(norm.is_finite() && norm > 0.0, "{kind:?}: {norm}");
        // The noise has a variance of about one, and so has what a network of drawn weights says of it.
        assert!(sums.task > 0.1 && sums.task < 100.0 && sums.logit.is_finite() && sums.feature.is_finite(), "{kind:?}: {sums:?}");
    }
}
