//! Every model the method names trains from a job file, from the coordinator's start to an adapter on disk: on small random ones.

use std::path::PathBuf;

use peapod_tests::harness::{Cluster, Process, workspace};

fn case(path: &str) -> String {
    workspace().join("tests/golden/cases").join(path).display().to_string()
}

/// Two steps of eight samples on one worker.
fn two_steps() -> Cluster {
    let mut cluster = Cluster::new();
    cluster.job.set_steps(2).set("train.global_batch", 8).set("train.micro_batch", 4).set("adapter.hidden", 24);
    cluster
}

/// Runs the job; the shapes of its adapter by name, after a look at the losses.
fn train(cluster: &Cluster) -> Vec<(String, Vec<usize>)> {
    cluster.coordinator(1, &["--local"]).expect_exit(0);
    let log = std::fs::read_to_string(cluster.state_dir().join("steps.jsonl")).unwrap();
    let steps: Vec<serde_json::Value> = log.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(steps.len(), 2);
    for step in steps {
        assert_eq!(step["skipped"], false, "{step}");
        let [logit, feature, norm] = ["logit", "feature", "grad_norm"].map(|name| step[name].as_f64().unwrap());
        assert!(logit > 0.0 && feature > 0.0 && norm > 0.0, "{step}");
    }
    let stored = cluster.newest_checkpoint().tensors("adapter.safetensors");
    stored.into_iter().map(|(name, tensor)| (name, tensor.shape)).collect()
}

fn shape_of(shapes: &[(String, Vec<usize>)], name: &str) -> Vec<usize> {
    shapes.iter().find(|(known, _)| known == name).unwrap_or_else(|| panic!("no {name} in {shapes:?}")).1.clone()
}

/// SDXL with the student of a golden case; its states are `width` wide.
fn student_trains(student: &str, context_length: i64, width: usize) {
    let mut cluster = two_steps();
    cluster.job.set("student.path", case(student)).set("student.context_length", context_length);
    let shapes = train(&cluster);
    assert_eq!(shape_of(&shapes, "projector.0.weight"), [24, width]);
    assert_eq!(shape_of(&shapes, "fc.weight"), [80, 48], "the demo's SDXL");
    assert_eq!(cluster.newest_checkpoint().metadata("adapter.safetensors")["context_length"], context_length.to_string());
}

#[test]
fn chinese_clip_trains_in_both_of_its_layouts() {
    student_trains("student_chinese_clip/student", 24, 16);
    student_trains("student_chinese_clip_authors/student", 24, 16);
}

#[test]
fn open_clip_xlm_roberta_trains() {
    student_trains("student_open_clip/student", 24, 16);
}

#[test]
fn mt5_trains() {
    student_trains("student_mt5/student", 77, 16);
}

#[test]
fn alt_clip_trains() {
    student_trains("student_alt_clip/student", 24, 12);
}

#[test]
fn pair_of_xlm_roberta_and_chinese_clip_trains() {
    student_trains("student_pair/student", 64, 32);
}

/// SD1.5 and its own student, and what `sample` draws with the adapter that comes of it.
#[test]
fn sd15_trains_and_draws() {
    let mut cluster = two_steps();
    let (model, student) = (case("distill_sd15/sd15"), case("distill_sd15/student"));
    cluster.job.set("model.path", model.clone()).set("student.path", student.clone()).set("student.context_length", 16);
    let shapes = train(&cluster);
    assert!(shapes.iter().all(|(name, _)| !name.starts_with("fc.")), "{shapes:?}");
    let text_width = cross_attention_width(&model);
    assert_eq!(shape_of(&shapes, "projector.4.weight"), [text_width, 24]);
    let checkpoint = cluster.newest_checkpoint();
    assert_eq!(checkpoint.metadata("adapter.safetensors")["architecture"], "sd15");

    let out = cluster.folder().join("sheet.png");
    let adapter = checkpoint.folder.display().to_string();
    let arguments = [
        "--model",
        &model,
        "--adapter",
        &adapter,
        "--student",
        &student,
        "--compare",
        "--prompt",
        "红色的圆形",
        "--teacher-prompt",
        "a red circle",
        "--steps",
        "2",
        "--width",
        "64",
        "--height",
        "64",
        "--threads",
        "1",
        "--out",
        out.to_str().unwrap(),
    ];
    Process::start("sample", "sample", &arguments).expect_exit(0);
    let sheet = image::open(&out).unwrap();
    assert!(sheet.width() > 2 * 64 && sheet.height() > 64, "two pictures side by side");
}

fn cross_attention_width(model: &str) -> usize {
    let config = std::fs::read(PathBuf::from(model).join("unet/config.json")).unwrap();
    let config: serde_json::Value = serde_json::from_slice(&config).unwrap();
    config["cross_attention_dim"].as_u64().unwrap() as usize
}

/// The published trainer's quirks, all of them at once.
#[test]
fn preset_reference_trains() {
    let mut cluster = two_steps();
    cluster.job.set("preset", "reference").set("loss.noise_offset", 0.5);
    train(&cluster);
}

#[test]
fn options_of_diffusion_trainers_train_together() {
    let mut cluster = two_steps();
    let model = case("distill_velocity_min_snr/sdxl");
    cluster.job.set("model.path", model).set("loss.min_snr_gamma", 5.0).set("train.gradient_checkpointing", true);
    cluster.job.set("train.ema_decay", 0.9).set("train.decay", "cosine").set("adapter.mask_pads", true);
    train(&cluster);
}

/// Eight bits in the transformers: other losses than in f32, and not by much.
#[test]
fn fp8_linears_train_as_f32_does_but_for_digits() {
    let first_losses = |fp8_linears: bool| {
        let mut cluster = two_steps();
        cluster.job.set("train.fp8_linears", fp8_linears);
        train(&cluster);
        let log = std::fs::read_to_string(cluster.state_dir().join("steps.jsonl")).unwrap();
        let step: serde_json::Value = serde_json::from_str(log.lines().next().unwrap()).unwrap();
        ["logit", "feature"].map(|name| step[name].as_f64().unwrap())
    };
    for (rounded, whole) in first_losses(true).into_iter().zip(first_losses(false)) {
        let difference = (rounded / whole - 1.0).abs();
        assert!(difference > 1e-6 && difference < 0.1, "{rounded} beside {whole}");
    }
}
