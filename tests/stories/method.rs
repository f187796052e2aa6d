//! The method's own checks, one test each: what a port must get right for its adapters to be of use elsewhere.
//!
//! Numbers against PyTorch, diffusers and transformers are in the golden cases; here is the algebra around them.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use peapod_data::bucket::{self, Bucket};
use peapod_data::caption::Cleaner;
use peapod_data::draws::SampleRng;
use peapod_model::adapter::{Adapter, AdapterConfig};
use peapod_model::distill::{DistillConfig, Distiller, English, Images, LoadOptions, LossSums, MicroBatch, Prompts};
use peapod_model::schedule::{Decay, LrSchedule, NoiseConfig, NoiseSchedule, TimestepSpacing, dpm};
use peapod_model::source::ModelSource;
use peapod_model::text::{StudentOptions, TextTokenizer};
use peapod_model::unet::{Added, UNet, UNetConfig};
use peapod_model::weights::Weights;
use peapod_proto::ids::{Epoch, SampleName, ShardId};
use peapod_proto::job::{CaptionsSection, Job};
use peapod_tests::harness::workspace;
use tch::{Device, Kind, Tensor, no_grad_guard};

// ------------------------------------------------------------------------------------------------------------ 1. the adapter

/// The five shapes of the published trainer, with their parameters.
const ADAPTERS: [(AdapterConfig, usize); 5] = [
    (sdxl_adapter(1024, 1024), 6_033_408),
    (sdxl_adapter(1024, 2048), 11_538_432),
    (sdxl_adapter(2048, 2048), 13_637_632),
    (sdxl_adapter(768, 2048), 11_013_632),
    (AdapterConfig { input: 1024, hidden: 2048, depth: 3, pooled: 768, output: None }, 7_866_368),
];

const fn sdxl_adapter(input: i64, hidden: i64) -> AdapterConfig {
    AdapterConfig { input, hidden, depth: 3, pooled: 1280, output: Some(2048) }
}

#[test]
fn check_1_adapters_of_every_published_shape_have_its_keys_and_come_back_from_both_files() {
    tch::set_num_threads(1);
    for (config, num_parameters) in ADAPTERS {
        let adapter = Adapter::fresh(config, 1, Device::Cpu).unwrap();
        assert_eq!(adapter.num_parameters(), num_parameters, "{config:?}");
        let AdapterConfig { input, hidden, pooled, output, .. } = config;
        let mut shapes: BTreeMap<String, Vec<i64>> = [
            ("layernorm.weight", vec![input]),
            ("layernorm.bias", vec![input]),
            ("projector.0.weight", vec![hidden, input]),
            ("projector.2.weight", vec![hidden, hidden]),
            ("projector.4.weight", vec![pooled, hidden]),
        ]
        .map(|(key, shape)| (key.to_owned(), shape))
        .into();
        if let Some(output) = output {
            shapes.extend([("fc.weight".to_owned(), vec![output, pooled]), ("fc.bias".to_owned(), vec![output])]);
        }
        let folder = tempfile::tempdir().unwrap();
        for (name, bytes) in [
            ("adapter.safetensors", adapter.to_safetensors(&BTreeMap::new()).unwrap()),
            ("pytorch_model.bin", adapter.to_pytorch(Kind::Float, &BTreeMap::new()).unwrap()),
        ] {
            let path = folder.path().join(name);
            std::fs::write(&path, bytes).unwrap();
            let weights = Weights::open(&path).unwrap();
            let stored = weights.keys().map(|key| (key.to_owned(), weights.stored(key).unwrap().size())).collect::<BTreeMap<_, _>>();
            assert_eq!(stored, shapes, "{name}");
            let back = Adapter::load(&path, Device::Cpu).unwrap();
            assert_eq!((back.config(), back.flat().equal(adapter.flat())), (&config, true), "{name}");
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------- 2. the UNets

/// The shaping settings of stable-diffusion-xl-base-1.0; those of SD1.5 are the defaults but for the text's width.
fn published_unet(name: &str) -> UNetConfig {
    let settings = match name {
        "sdxl" => serde_json::json!({
            "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "attention_head_dim": [5, 10, 20],
            "block_out_channels": [320, 640, 1280], "cross_attention_dim": 2048,
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "projection_class_embeddings_input_dim": 2816, "transformer_layers_per_block": [1, 2, 10],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"], "use_linear_projection": true,
        }),
        _ => serde_json::json!({ "cross_attention_dim": 768 }),
    };
    serde_json::from_value(settings).unwrap()
}

/// The encoders' totals are asserted beside them, in the model crate.
#[test]
fn check_2_unets_have_the_published_sizes_and_hooks_of_the_right_shape_in_every_bucket() {
    tch::set_num_threads(1);
    assert_eq!(UNet::count_parameters(&published_unet("sdxl")).unwrap(), 2_567_463_684);
    assert_eq!(UNet::count_parameters(&published_unet("sd15")).unwrap(), 859_520_964);

    // The demo's network is wired as SDXL's; its three levels have other channels.
    let distiller = shared();
    let unet = distiller.unet();
    let &[outer, middle, inner] = unet.config().block_out_channels.as_slice() else { panic!("three levels") };
    let _guard = no_grad_guard();
    for bucket in buckets() {
        let (height, width) = (i64::from(bucket.height / 8), i64::from(bucket.width / 8));
        let zeros = |shape: &[i64]| Tensor::zeros(shape, (Kind::Float, Device::Cpu));
        let added = Added { pooled: zeros(&[1, unet.pooled_width().unwrap()]), time_ids: zeros(&[1, 6]) };
        let output = unet.forward(&zeros(&[1, 4, height, width]), &zeros(&[1]), &zeros(&[1, 5, unet.text_width()]), Some(&added)).unwrap();
        let shapes: Vec<Vec<i64>> = output.features.iter().map(Tensor::size).collect();
        let hook = |channels: i64, shrink: i64| vec![1, channels, height / shrink, width / shrink];
        let wanted = [hook(outer, 2), hook(middle, 4), hook(inner, 4), hook(inner, 4), hook(inner, 2), hook(middle, 1), hook(outer, 1)];
        assert_eq!(shapes, wanted, "{bucket:?}");
    }
}

/// The method's nine.
fn buckets() -> Vec<Bucket> {
    let job = Job::parse("[model]\npath=\"m\"\n[student]\npath=\"s\"\n[data]\nshards=[\"a.tar\"]\n[train]\nsteps=1").unwrap();
    job.data.buckets.iter().map(|&[width, height]| Bucket { width, height }).collect()
}

// ---------------------------------------------------------------------------------------------------- 3, 4, 5. the training step

fn distiller(distill: DistillConfig) -> Distiller {
    tch::set_num_threads(1);
    let model = ModelSource::open(&workspace().join("tests/demo/model"), None).unwrap();
    let options =
        LoadOptions { distill, context_length: 24, student: StudentOptions::new(Kind::Float, Device::Cpu), vae_kind: Kind::Float };
    Distiller::load(&model, &workspace().join("tests/demo/model/text_encoder_zh"), options).unwrap()
}

/// The demo's models with the default configuration, for one test at a time.
fn shared() -> MutexGuard<'static, Distiller> {
    static SHARED: OnceLock<Mutex<Distiller>> = OnceLock::new();
    SHARED.get_or_init(|| Mutex::new(distiller(DistillConfig::default()))).lock().unwrap_or_else(PoisonError::into_inner)
}

fn adapter(distiller: &Distiller) -> Adapter {
    Adapter::fresh(distiller.adapter_config(32, 3), 7, Device::Cpu).unwrap()
}

/// A batch with random tensors, the same in every run; `z` says which samples are native, `m` whose text is dropped.
fn batch(z: &[bool], m: &[bool]) -> MicroBatch {
    tch::manual_seed(11);
    let count = z.len() as i64;
    let normal = |shape: &[i64]| Tensor::randn(shape, (Kind::Float, Device::Cpu));
    let captions = ["红色的圆形", "蓝色的方块", "小的绿色三角形", "白色背景上的大星形"];
    let english = ["a red circle", "a blue square", "a small green triangle", "a big star on a white background"];
    let take = |texts: [&str; 4]| texts.iter().take(z.len()).map(|&text| text.to_owned()).collect();
    MicroBatch {
        images: Images::Pixels(Tensor::randint(256, [count, 3, 48, 64], (Kind::Uint8, Device::Cpu))),
        posterior: normal(&[count, 4, 6, 8]),
        noise: normal(&[count, 4, 6, 8]),
        offset: normal(&[count, 4]),
        timesteps: Tensor::randint(1000, [count], (Kind::Int64, Device::Cpu)),
        drop: Tensor::from_slice(m),
        native: Tensor::from_slice(z),
        prompts: Prompts::Captions(take(captions)),
        english: English::Captions(take(english)),
        original_size: vec![(640, 480); z.len()],
        crop: vec![(3, 0); z.len()],
        text_dropout: vec![0; z.len()],
    }
}

const NONE_DROPPED: [bool; 4] = [false; 4];

fn losses(distiller: &Distiller, z: &[bool]) -> LossSums {
    distiller.evaluate(&adapter(distiller), &batch(z, &NONE_DROPPED[..z.len()])).unwrap()
}

fn gradient(distiller: &Distiller, batch: &MicroBatch) -> Tensor {
    let adapter = adapter(distiller);
    let mut gradient = Tensor::zeros([adapter.num_parameters() as i64], (Kind::Float, Device::Cpu));
    distiller.accumulate(&adapter, batch, &mut gradient).unwrap();
    gradient
}

fn norm(tensor: &Tensor) -> f64 {
    tensor.norm().double_value(&[])
}

fn close(got: f64, wanted: f64) -> bool {
    (got - wanted).abs() <= 1e-5 * wanted.abs()
}

#[test]
fn check_3_losses_follow_z_and_their_gradient_is_that_of_the_weighted_sum_of_the_three() {
    let distiller_of = |config: DistillConfig| distiller(config);
    let hybrid = shared();
    let (parallel, native, mixed) =
        (losses(&hybrid, &[false; 4]), losses(&hybrid, &[true; 4]), losses(&hybrid, &[false, true, true, false]));
    assert!(parallel.task == 0.0 && parallel.logit > 0.0 && parallel.feature > 0.0, "{parallel:?}");
    assert!(native.task > 0.0 && native.logit == 0.0 && native.feature == 0.0, "{native:?}");
    assert!(mixed.task > 0.0 && mixed.task < native.task && mixed.logit > 0.0 && mixed.logit < parallel.logit, "{mixed:?}");
    // Without hybrid training z has no say.
    let whole = distiller_of(DistillConfig { hybrid: false, ..DistillConfig::default() });
    for z in [[false; 4], [true; 4]] {
        let sums = losses(&whole, &z);
        assert!(close(sums.task, native.task) && close(sums.logit, parallel.logit) && close(sums.feature, parallel.feature), "{sums:?}");
    }

    // L = task + logit + weight * feature: its derivative along any direction is that of the three numbers that are logged.
    let batch = batch(&[false, true, true, false], &[false, false, true, true]);
    let weight = 0.1;
    let adapter = adapter(&hybrid);
    let slope = gradient(&hybrid, &batch);
    let direction = &slope / norm(&slope);
    let total = |distance: f64| {
        let moved = adapter.with_parameters(&(adapter.flat() + &direction * distance)).unwrap();
        let sums = hybrid.evaluate(&moved, &batch).unwrap();
        sums.task + sums.logit + weight * sums.feature
    };
    let step = 1e-2;
    let difference = (total(step) - total(-step)) / (2.0 * step);
    // The gradient's own direction: the derivative is its norm. What is left is the curvature, and f32.
    assert!((difference - norm(&slope)).abs() < 1e-2 * norm(&slope), "{difference} {}", norm(&slope));
}

#[test]
fn check_4_gradients_are_of_the_seven_adapter_tensors_and_vanish_where_the_method_says() {
    let distiller = shared();
    let adapter = adapter(&distiller);
    assert_eq!(adapter.parameters().len(), 7);
    let slope = gradient(&distiller, &batch(&[false, true, true, false], &[false, false, true, true]));
    let mut start = 0;
    for parameter in adapter.parameters() {
        let length = parameter.numel() as i64;
        assert!(norm(&slope.narrow(0, start, length)) > 0.0, "each of the seven learns");
        start += length;
    }
    assert_eq!(start, slope.size()[0], "and nothing else does");

    // z = 1 everywhere: no distillation, so neither the weight of its losses nor the English text matters.
    let native = || batch(&[true; 4], &NONE_DROPPED);
    let once = gradient(&distiller, &native());
    let mut renamed = native();
    renamed.english = English::Captions(vec!["something else".into(); 4]);
    assert!(gradient(&distiller, &renamed).equal(&once));
    let heavy = self::distiller(DistillConfig { feature_weight: 100.0, ..DistillConfig::default() });
    assert!(gradient(&heavy, &native()).equal(&once));

    // m = 1 everywhere: the captions still reach the UNet as pooled text, and the empty prompt's states learn.
    let dropped = || batch(&[true; 4], &[true; 4]);
    let through_empty = gradient(&distiller, &dropped());
    // The last linear makes states only, so what it learns came through the empty prompt.
    let last: i64 = adapter.parameters()[5..].iter().map(|parameter| parameter.numel() as i64).sum();
    assert!(norm(&through_empty.narrow(0, through_empty.size()[0] - last, last)) > 0.0);
    let mut others = dropped();
    let Prompts::Captions(captions) = &mut others.prompts else { panic!("no captions") };
    captions.rotate_left(1);
    assert!(!gradient(&distiller, &others).equal(&through_empty), "pooled text is never dropped");
}

#[test]
fn check_5_a_teacher_that_sees_the_parallel_samples_only_says_the_same() {
    // Without hybrid training the teacher runs on the whole batch; the parallel samples' part of its losses is what hybrid training has.
    let whole = distiller(DistillConfig { hybrid: false, ..DistillConfig::default() });
    let hybrid = shared();
    let z = [false, true, true, false];
    let mixed = losses(&hybrid, &z);
    let one_by_one = |distiller: &Distiller| {
        let batch = batch(&z, &NONE_DROPPED);
        let parallel = (0..z.len()).filter(|&index| !z[index]);
        parallel.map(|index| distiller.evaluate(&adapter(distiller), &batch.single(index)).unwrap()).fold(
            LossSums::default(),
            |mut sum, part| {
                sum += part;
                sum
            },
        )
    };
    let alone = one_by_one(&whole);
    assert!(close(mixed.logit, alone.logit) && close(mixed.feature, alone.feature), "{mixed:?} {alone:?}");
}

// ------------------------------------------------------------------------------------------------------------- 6. the schedules

#[test]
fn check_6_schedules_have_the_published_numbers() {
    let noise = NoiseSchedule::new(&NoiseConfig::default());
    let alpha_bar = noise.alphas_cumprod();
    assert!((alpha_bar[999] - 0.004_660_1).abs() < 5e-8 && (alpha_bar[0] - 0.999_15).abs() < 5e-6);
    assert!((noise.sigma(0) - 0.029_17).abs() < 5e-6, "where sampling ends");

    let visited = |spacing, steps_offset, num_steps| {
        let config = dpm::DpmConfig { spacing, steps_offset, final_sigma: dpm::FinalSigma::SigmaMin, prediction: dpm::Prediction::Epsilon };
        dpm::timesteps(&noise, &config, num_steps)
    };
    let sdxl = visited(TimestepSpacing::Leading, 1, 30);
    assert_eq!((sdxl.len(), sdxl[0], sdxl[1], sdxl[29]), (30, 961, 929, 33));
    let sd15 = visited(TimestepSpacing::Linspace, 0, 30);
    assert_eq!((sd15.len(), sd15[0], sd15[1], sd15[29]), (30, 999, 966, 33));

    let rate = LrSchedule { lr: 1e-5, warmup_steps: 100, total_steps: 2_232_142, decay: Decay::Polynomial { power: 1.0, end_lr: 5e-8 } };
    for (step, wanted) in [(0, 0.0), (50, 5e-6), (100, 1e-5), (50_000, 9.777_555_7e-6)] {
        assert!((rate.rate(step) - wanted).abs() <= 1e-12, "{step}: {}", rate.rate(step));
    }
}

// ------------------------------------------------------------------------------------------------------------------ 7. the data

#[test]
fn check_7_buckets_crops_captions_and_empty_texts_are_the_methods() {
    // Bucket of each aspect ratio; from four to one on there is none.
    let nearest = |aspect: f64| bucket::nearest(&buckets(), ((aspect * 1000.0).round() as u32, 1000));
    assert_eq!([0.4, 0.52, 0.6, 1.0, 1.11, 3.99].map(nearest), [0, 1, 1, 4, 4, 8].map(Some));
    assert_eq!(nearest(4.0), None);

    // Both ends of the crop's range occur.
    let crops = (0..200).map(|index| SampleRng::new(1, SampleName { epoch: Epoch(0), shard: ShardId(0), index }).crop((2, 0)));
    let seen: std::collections::BTreeSet<(u64, u64)> = crops.collect();
    assert_eq!(seen.into_iter().collect::<Vec<_>>(), [(0, 0), (1, 0), (2, 0)]);

    // The four rules, first match first.
    let cleaner = Cleaner::new(CaptionsSection::default().rules(), true).unwrap();
    let choose = |native: &[(&str, &'static str)]| {
        let found = [&[("caption_zh", "绿 car"), ("caption_en", "a green car")], native].concat();
        let find = |key: &str| found.iter().find(|(name, _)| *name == key).map(|(_, text)| *text);
        cleaner.choose(find).map(|caption| (caption.prompt, caption.native)).unwrap()
    };
    assert_eq!(choose(&[("caption_ori", "紅 car"), ("caption_ori_zh", "蓝")]), ("红".into(), true));
    assert_eq!(choose(&[("caption_ori_zh", "藍 car")]), ("蓝".into(), true));
    assert_eq!(choose(&[("caption_ori", "car"), ("caption_ori_en", "黄 car")]), ("黄".into(), true));
    assert_eq!(choose(&[("caption_ori", "car"), ("caption_ori_zh", "蓝")]), ("绿 car".into(), false));

    // The empty text of each tokenizer.
    let ids = |tokenizer: TextTokenizer| tokenizer.encode(&[""]).unwrap().remove(0);
    let start = |ids: Vec<i64>, length: usize| {
        assert_eq!(ids.len(), length);
        ids[..4].to_vec()
    };
    assert_eq!(start(ids(TextTokenizer::clip_published(49_407, 77).unwrap()), 77), [49_406, 49_407, 49_407, 49_407]);
    assert_eq!(start(ids(TextTokenizer::clip_published(0, 77).unwrap()), 77), [49_406, 49_407, 0, 0]);
    let cases = workspace().join("tests/golden/cases");
    assert_eq!(start(ids(TextTokenizer::bert(&cases.join("tokenizer_chinese_clip"), 52).unwrap()), 52), [101, 102, 0, 0]);
    assert_eq!(start(ids(TextTokenizer::xlm_roberta(&cases.join("student_xlm_roberta/student"), 77).unwrap()), 77), [0, 2, 1, 1]);
    assert_eq!(start(ids(TextTokenizer::t5(&cases.join("student_mt5/student"), 77).unwrap()), 77), [1, 0, 0, 0]);
}
