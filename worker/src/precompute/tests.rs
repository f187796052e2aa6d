//! Shards of the demo, precomputed and trained beside the pictures they were made of.

use std::path::PathBuf;
use std::sync::mpsc::channel;

use peapod_data::caption::Caption;
use peapod_data::{LeasedShard, Loader, LoaderConfig, LoaderEvent, Prepared, Share};
use peapod_model::adapter::Adapter;
use peapod_model::distill::Distiller;
use peapod_proto::ids::{Epoch, LeaseId};
use tch::Tensor;

use super::*;
use crate::device::{Choice, KernelArgs, Kernels};
use crate::setup;
use crate::trainer::tensors::to_tensors;

/// Samples that are compared.
const NUM_SAMPLES: usize = 24;

fn demo() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/demo")
}

/// The demo's job with one of its shards and changes to its text; written down in `folder`.
fn job(folder: &Path, changes: &[(&str, &str)]) -> PathBuf {
    tch::set_num_threads(1);
    let mut text = std::fs::read_to_string(demo().join("job.toml")).unwrap();
    for (from, to) in [("{00000..00005}", "00000"), ("shuffle_buffer = 256", "shuffle_buffer = 1")].iter().chain(changes) {
        assert!(text.contains(from), "{from}");
        text = text.replace(from, to);
    }
    let path = folder.join("job.toml");
    std::fs::write(&path, text.replace("\"tests/demo", &format!("\"{}", demo().display()))).unwrap();
    path
}

fn options(job: &Path, out: &Path, text: bool) -> Options {
    let kernels = KernelArgs { kernels: Kernels::Fused, attention: None, cudnn_benchmark: false };
    let compute = ComputeArgs { device: Choice::Cpu, kernels, threads: Some(1) };
    Options { job: job.to_owned().into(), out: out.to_owned(), text, numbers: None, shards: None, compute, batch: 7 }
}

fn precompute(options: &Options) -> Result<String, String> {
    let Report { text, problem } = Plan::new(options)?.run(Device::Cpu)?;
    problem.map_or(Ok(text), Err)
}

#[test]
fn list_for_a_job_is_told_once_all_of_its_shards_are_there() {
    let folder = tempfile::tempdir().unwrap();
    let path = job(folder.path(), &[("shards/00000.tar", "shards/{00000..00001}.tar")]);
    let plan = Plan::new(&options(&path, folder.path(), false)).unwrap();
    std::fs::write(plan.target(0), "made here").unwrap();
    let told = plan.describe(&Made::default(), 0);
    assert!(told.contains("missing    1 of 2 shards; ") && !told.contains("for a job"), "{told}");
    std::fs::write(plan.target(1), "made elsewhere").unwrap();
    let told = plan.describe(&Made::default(), 0);
    assert!(told.contains("for a job  shards = [") && !told.contains("missing"), "{told}");
}

fn parse(job: &Path) -> Job {
    Job::parse(&std::fs::read_to_string(job).unwrap()).unwrap()
}

/// The first samples of a shard, as training gets them in its first pass.
fn samples(config: LoaderConfig, url: &Path) -> peapod_data::Result<Share> {
    let (sender, events) = channel();
    let mut loader = Loader::start(config, move |event| drop(sender.send(event)))?;
    let (url, done) = (url.to_str().unwrap().to_owned(), Bitmap::default());
    loader.handle().grant(vec![LeasedShard { lease: LeaseId(1), epoch: Epoch(0), shard: ShardId(0), url, done, end: None }], true);
    let share = loader.next_share(NUM_SAMPLES)?;
    let skips = events.try_iter().filter(|event| matches!(event, LoaderEvent::Shard { skipped, .. } if !skipped.is_empty()));
    assert_eq!(skips.count(), 0, "all of the demo's samples train");
    Ok(share)
}

/// The gradient of a fresh adapter, and the sums of the three losses.
fn gradient(models: &Distiller, share: &Share) -> (Tensor, [f64; 3]) {
    let adapter = Adapter::fresh(models.adapter_config(32, 3), 7, Device::Cpu).unwrap();
    let mut gradient = adapter.flat().zeros_like();
    let mut losses = [0.0; 3];
    for batch in share.batches.iter().flat_map(|batch| to_tensors(batch, models.vae().downscale()).unwrap()) {
        let native: Vec<bool> = Vec::try_from(&batch.native).unwrap();
        assert!(native.is_sorted(), "parallel samples first");
        let sums = models.accumulate(&adapter, &batch, &mut gradient).unwrap();
        losses.iter_mut().zip([sums.task, sums.logit, sums.feature]).for_each(|(total, sum)| *total += sum);
    }
    (gradient, losses)
}

fn distance(got: &(Tensor, [f64; 3]), wanted: &(Tensor, [f64; 3])) -> f64 {
    let norm = |tensor: Tensor| tensor.norm().double_value(&[]);
    let losses = got.1.iter().zip(&wanted.1).map(|(got, wanted)| (got / wanted - 1.0).abs());
    losses.fold(norm(&got.0 - &wanted.0) / norm(wanted.0.shallow_clone()), f64::max)
}

fn change(share: &mut Share, change: impl Fn(&mut Prepared)) {
    share.batches.iter_mut().flat_map(|batch| &mut batch.samples).for_each(change);
}

#[test]
fn precomputed_samples_train_as_their_pictures_do() {
    let folder = tempfile::tempdir().unwrap();
    let path = job(folder.path(), &[]);
    let job = parse(&path);
    let models = setup::load_models(&job, Device::Cpu).unwrap();
    let config = setup::loader_config(&job, &models).unwrap();
    let pictures = samples(config.clone(), &demo().join("shards/00000.tar")).unwrap();
    let wanted = gradient(&models, &pictures);
    assert!(wanted.1.iter().all(|loss| *loss > 0.0), "native and parallel samples");

    for text in [false, true] {
        let out = folder.path().join(if text { "text" } else { "latents" });
        let report = precompute(&options(&path, &out, text)).unwrap();
        assert!(report.contains("shards     1 made, 0 were there\nsamples    256, "), "{report}");
        assert!(report.contains(&format!("shards = [\"{}/{{00000..00000}}.tar\"]", out.display())), "{report}");
        let cached = || samples(config.clone(), &out.join("00000.tar")).unwrap();
        assert!(cached().names().eq(pictures.names()));
        let got = gradient(&models, &cached());
        // Convolutions of other batches: the last bits of f32.
        assert!(distance(&got, &wanted) < 1e-5, "{}", distance(&got, &wanted));

        // It would show if the noise on the latents or the crop were others, or texts were confused.
        let mut others = cached();
        change(&mut others, |sample| sample.draws.posterior.iter_mut().for_each(|number| *number = -*number));
        assert!(distance(&gradient(&models, &others), &wanted) > 1e-2, "{}", distance(&gradient(&models, &others), &wanted));
        let mut others = cached();
        change(&mut others, |sample| sample.crop.0 += 8);
        assert!(distance(&gradient(&models, &others), &wanted) > 1e-2, "{}", distance(&gradient(&models, &others), &wanted));
    }
}

#[test]
fn batches_of_pictures_and_of_precomputed_samples_mix() {
    let folder = tempfile::tempdir().unwrap();
    let path = job(folder.path(), &[]);
    let job = parse(&path);
    let models = setup::load_models(&job, Device::Cpu).unwrap();
    let config = setup::loader_config(&job, &models).unwrap();
    precompute(&options(&path, folder.path(), true)).unwrap();
    let pictures = samples(config.clone(), &demo().join("shards/00000.tar")).unwrap();
    let mut mixed = samples(config, &folder.path().join("00000.tar")).unwrap();
    for (mixed, pictures) in mixed.batches.iter_mut().zip(&pictures.batches) {
        for (sample, picture) in mixed.samples.iter_mut().zip(&pictures.samples).step_by(3) {
            *sample = picture.clone();
        }
    }
    let (got, wanted) = (gradient(&models, &mixed), gradient(&models, &pictures));
    assert!(distance(&got, &wanted) < 1e-5, "{}", distance(&got, &wanted));
}

#[test]
fn fewer_bits_cost_what_they_round() {
    let folder = tempfile::tempdir().unwrap();
    let path = job(folder.path(), &[]);
    let job = parse(&path);
    let models = setup::load_models(&job, Device::Cpu).unwrap();
    let config = setup::loader_config(&job, &models).unwrap();
    let wanted = gradient(&models, &samples(config.clone(), &demo().join("shards/00000.tar")).unwrap());
    let mut sizes = Vec::new();
    // Their 11 and 8 bits, through the networks.
    for (numbers, most) in [(Numbers::F16, 5e-4), (Numbers::Bf16, 3e-3)] {
        let out = folder.path().join(format!("{numbers:?}"));
        precompute(&Options { numbers: Some(numbers), ..options(&path, &out, true) }).unwrap();
        let got = gradient(&models, &samples(config.clone(), &out.join("00000.tar")).unwrap());
        assert!((1e-5..most).contains(&distance(&got, &wanted)), "{numbers:?}: {}", distance(&got, &wanted));
        sizes.push(std::fs::metadata(out.join("00000.tar")).unwrap().len());
    }
    assert_eq!(sizes[0], sizes[1]);
}

#[test]
fn shards_of_another_job_are_refused_and_of_this_one_made_once() {
    let folder = tempfile::tempdir().unwrap();
    let path = job(folder.path(), &[]);
    let out = folder.path().join("out");
    precompute(&options(&path, &out, false)).unwrap();
    let shard = out.join("00000.tar");
    let bytes = std::fs::read(&shard).unwrap();
    let again = precompute(&options(&path, &out, false)).unwrap();
    assert!(again.contains("shards     0 made, 1 were there"), "{again}");

    // A job that would make others does not train these, and says why.
    let other = job(folder.path(), &[("[64, 96]]", "[64, 128]]"), ("context_length = 24", "context_length = 24\ndropout = true")]);
    let models = setup::load_models(&parse(&other), Device::Cpu).unwrap();
    let error = samples(setup::loader_config(&parse(&other), &models).unwrap(), &shard).unwrap_err().to_string();
    assert!(error.contains("data.buckets was `[[64, 64], [96, 64], [64, 96]]`, is `[[64, 64], [96, 64], [64, 128]]`"), "{error}");
    assert!(error.contains("00000.tar was precomputed otherwise") && error.contains("run `worker precompute`"), "{error}");
    assert!(!error.contains("dropout"), "latents do not depend on it: {error}");

    // Nor is anything that is there made anew.
    let refuse = |options: &Options| precompute(options).unwrap_err();
    let refused = refuse(&options(&other, &out, false));
    assert!(refused.starts_with("1 of 1 shards are not made (0); the first: ") && refused.contains("data.buckets was"), "{refused}");
    let (path, device) = (job(folder.path(), &[]), Device::Cpu);
    let maker = |text: bool, numbers: &str| {
        let encoders = Encoders::load(&parse(&path), device, text, None).unwrap();
        let (reader, recipe) = (Reader::new(&parse(&path), 1).unwrap(), encoders.recipe(&parse(&path)).unwrap());
        Maker { reader, encoders, recipe, numbers: numbers.into(), batch: 4 }
    };
    let url = demo().join("shards/00000.tar").display().to_string();
    for (maker, url, words) in [
        (maker(true, "as computed"), url.as_str(), "it holds less text: remove it or give another --out"),
        (maker(false, "f16"), url.as_str(), "its numbers are as computed instead of f16"),
        (maker(false, "as computed"), "b.tar", "instead of b.tar"),
    ] {
        let error = maker.make(url, ShardId(0), &shard).unwrap_err();
        assert!(error.contains(words), "{error}");
    }
    let error = maker(false, "as computed").make(shard.to_str().unwrap(), ShardId(0), &out.join("1.tar")).unwrap_err();
    assert!(error.ends_with("00000.tar is precomputed already"), "{error}");
    std::fs::write(out.join("2.tar"), b"no tar").unwrap();
    let error = maker(false, "as computed").make(&url, ShardId(0), &out.join("2.tar")).unwrap_err();
    assert!(error.contains("is no precomputed shard"), "{error}");
    assert_eq!(std::fs::read(&shard).unwrap(), bytes);
}

/// The demo's model with the sign of every weight of one layer turned, at another place. The file is safetensors in f16.
fn other_model(folder: &Path, part: &str, layer: &str) -> PathBuf {
    let model = folder.join("model");
    for entry in std::fs::read_dir(demo().join("model")).unwrap().map(Result::unwrap).filter(|entry| entry.file_name() != part) {
        std::fs::create_dir_all(&model).unwrap();
        std::os::unix::fs::symlink(entry.path().canonicalize().unwrap(), model.join(entry.file_name())).unwrap();
    }
    std::fs::create_dir_all(model.join(part)).unwrap();
    for entry in std::fs::read_dir(demo().join("model").join(part)).unwrap().map(Result::unwrap) {
        let mut bytes = std::fs::read(entry.path()).unwrap();
        if entry.path().extension().is_some_and(|extension| extension == "safetensors") {
            let start = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
            let header: serde_json::Value = serde_json::from_slice(&bytes[8..start]).unwrap();
            let [from, to] = [0, 1].map(|at| start + header[layer]["data_offsets"][at].as_u64().unwrap() as usize);
            bytes[from..to].iter_mut().skip(1).step_by(2).for_each(|byte| *byte ^= 0x80);
        }
        std::fs::write(model.join(part).join(entry.file_name()), bytes).unwrap();
    }
    model
}

#[test]
fn models_are_told_apart_by_what_they_say_and_not_by_where_they_lie() {
    let folder = tempfile::tempdir().unwrap();
    let of = |name: &str, model: Option<&Path>, changes: &[(&str, &str)]| {
        let folder = folder.path().join(name);
        std::fs::create_dir_all(&folder).unwrap();
        let mut job = parse(&job(&folder, changes));
        job.model.path = model.unwrap_or(&job.model.path).to_owned();
        Encoders::load(&job, Device::Cpu, true, None).unwrap().recipe(&job).unwrap()
    };
    let made = of("demo", None, &[]);
    let copy = other_model(&folder.path().join("copy"), "scheduler", "");
    assert_eq!(made.differences(&of("copied", Some(&copy), &[])), Vec::<String>::new());
    for (part, layer, model) in [
        ("vae", "encoder.conv_in.weight", "model.path (autoencoder)"),
        ("text_encoder", "encoder.layers.0.mlp.fc1.weight", "model.path (text encoders)"),
        ("text_encoder_2", "text_model.encoder.layers.0.mlp.fc1.weight", "model.path (text encoders)"),
    ] {
        let other = other_model(&folder.path().join(part), part, layer);
        assert_eq!(made.differences(&of("other", Some(&other), &[])), [format!("{model} named another model")]);
    }
    // The last bits are the device's, not the model's: of bf16 the tolerance takes no notice.
    let rough = of("rough", None, &[("path = \"tests/demo/model\"", "path = \"tests/demo/model\"\nvae_dtype = \"bf16\"")]);
    assert_eq!(made.differences(&rough), ["model.vae_dtype was `f32`, is `bf16`"]);
}

/// Their dropout is drawn anew for each sample in each pass: what was drawn once would not be what the job asks for.
#[test]
fn states_of_a_student_with_dropout_are_left_to_training() {
    let folder = tempfile::tempdir().unwrap();
    let states = |path: &Path| {
        let encoders = Encoders::load(&parse(path), Device::Cpu, true, None).unwrap();
        let picture = |native| {
            let caption = Caption { prompt: "红".into(), english: "red".into(), native };
            Picture { pixels: vec![9; 64 * 96 * 3], bucket: (64, 96), original_size: (128, 192), crop: (0, 0), caption }
        };
        let samples = encoders.encode(&[&picture(false), &picture(true)]).unwrap();
        samples.iter().map(|sample| (sample.english.is_some(), sample.student.is_some())).collect::<Vec<_>>()
    };
    assert_eq!(states(&job(folder.path(), &[])), [(true, true), (false, true)]);
    let dropping = job(folder.path(), &[("context_length = 24", "context_length = 24\ndropout = true")]);
    assert_eq!(states(&dropping), [(true, false), (false, false)]);
}

#[test]
fn a_part_of_the_list_is_named_by_places() {
    assert_eq!("0..2, 7".parse(), Ok(Places(vec![(0, 2), (7, 7)])));
    for wrong in ["", "x", "3..1", "1..", "-1"] {
        assert!(wrong.parse::<Places>().unwrap_err().contains("write 0..99,120"), "{wrong}");
    }
    let folder = tempfile::tempdir().unwrap();
    let path = job(folder.path(), &[]);
    let part = |places: &str| Plan::new(&Options { shards: Some(places.parse().unwrap()), ..options(&path, folder.path(), false) });
    assert_eq!(part("0..0,0").unwrap().places, [0]);
    assert_eq!(part("0..1").err().unwrap(), "--shards: there is no shard 1: the job's list has 1, from 0");
}
