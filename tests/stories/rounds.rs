//! Losses on samples that are never trained, and pictures drawn while training: at their steps, alike for any number of workers, once.

use std::path::PathBuf;

use image::RgbImage;
use peapod_tests::harness::{Cluster, Coordinator, Process, Signal, poll};
use serde::Deserialize;

/// A line of validation.jsonl.
#[derive(Debug, Clone, PartialEq, Deserialize)]
struct Validation {
    step: u64,
    samples: u64,
    weights: String,
    task: f64,
    logit: f64,
    feature: f64,
    total: f64,
}

const PROMPTS: [&str; 3] = ["红色的圆形", "蓝色的方形", "绿色的星形"];

/// Four steps, validated every `every` on the first samples of a shard that is not trained.
fn validated(samples: i64, every: i64) -> Cluster {
    let mut cluster = Cluster::new();
    cluster.job.set("data.shards", vec!["tests/demo/shards/{00000..00004}.tar"]);
    cluster.job.set("validation.shards", vec!["tests/demo/shards/00005.tar"]);
    cluster.job.set("validation.samples", samples).set("validation.every_steps", every);
    cluster
}

/// Pictures of [`PROMPTS`], quickly, every `every` steps of four.
fn drawn(every: i64) -> Cluster {
    let mut cluster = Cluster::new();
    cluster.job.set("pictures.prompts", PROMPTS.map(String::from).to_vec()).set("pictures.every_steps", every);
    cluster.job.set("pictures.steps", 3).set("pictures.size", vec![64, 32]).set("pictures.guidance", 2.0).set("pictures.seed", 5);
    cluster
}

fn validations(cluster: &Cluster) -> Vec<Validation> {
    let text = std::fs::read_to_string(cluster.state_dir().join("validation.jsonl")).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{line}: {error}"))).collect()
}

fn steps_of(validations: &[Validation]) -> Vec<u64> {
    validations.iter().map(|validation| validation.step).collect()
}

#[track_caller]
fn assert_close(one: &Validation, other: &Validation) {
    assert_eq!((one.step, one.samples), (other.step, other.samples));
    for (one, other) in [(one.task, other.task), (one.logit, other.logit), (one.feature, other.feature), (one.total, other.total)] {
        assert!((one - other).abs() <= 1e-5 * one.abs(), "{one} and {other}");
    }
}

fn picture_folder(cluster: &Cluster, step: u64) -> PathBuf {
    cluster.state_dir().join(format!("pictures/step-{step:09}"))
}

/// A step's pictures, checked against their list.
fn pictures(cluster: &Cluster, step: u64) -> Vec<RgbImage> {
    let folder = picture_folder(cluster, step);
    let list: serde_json::Value = serde_json::from_slice(&std::fs::read(folder.join("pictures.json")).unwrap()).unwrap();
    assert_eq!((&list["job"], &list["step"]), (&"demo".into(), &step.into()));
    let listed: Vec<&str> = list["pictures"].as_array().unwrap().iter().map(|picture| picture["prompt"].as_str().unwrap()).collect();
    assert_eq!(listed, PROMPTS);
    let picture = |index: usize| {
        let picture = image::open(folder.join(format!("{index:02}.png"))).unwrap().to_rgb8();
        assert_eq!(picture.dimensions(), (64, 32));
        picture
    };
    (0..PROMPTS.len()).map(picture).collect()
}

/// The largest difference of two pictures, in grey levels.
fn distance(one: &RgbImage, other: &RgbImage) -> u8 {
    one.as_raw().iter().zip(other.as_raw()).map(|(&one, &other)| one.abs_diff(other)).max().unwrap()
}

fn status(coordinator: &Coordinator) -> serde_json::Value {
    let mut status = coordinator.control(&["status", "--json"]);
    status.expect_exit(0);
    serde_json::from_str(&status.lines().join("\n")).unwrap()
}

/// Waits until the worker of rank 1 says that it validates the weights of `step`.
fn wait_until_validating(coordinator: &Coordinator, step: u64) {
    poll("rank 1 to validate", || {
        let status = status(coordinator);
        let worker = &status["workers"][1];
        (worker["phase"] == "validating" && worker["step"] == step).then_some(())
    });
}

#[test]
fn validation_runs_at_its_steps_and_at_the_end_and_is_the_same_again() {
    let run = || {
        let mut cluster = validated(20, 2);
        cluster.job.set_steps(5);
        let mut coordinator = cluster.coordinator(2, &["--local"]);
        coordinator.expect_exit(0);
        coordinator.assert_said("validation at step 4: total ");
        let validations = validations(&cluster);
        assert_eq!(steps_of(&validations), [0, 2, 4, 5], "each once, and the last weights although 5 is no multiple of 2");
        let manifest = std::fs::read(cluster.newest_checkpoint().folder.join("manifest.json")).unwrap();
        let manifest: serde_json::Value = serde_json::from_slice(&manifest).unwrap();
        assert_eq!(manifest["validation"]["step"], 5, "the last checkpoint says what its weights came to");
        validations
    };
    let first = run();
    for Validation { samples, weights, task, logit, feature, total, .. } in &first {
        assert_eq!((*samples, weights.as_str()), (20, "trained"));
        assert!((total - (task + logit + 0.1 * feature)).abs() < 1e-5 * total, "{first:?}");
    }
    assert!(first[3].feature < first[0].feature, "training helps: {first:?}");
    assert_eq!(run(), first);
}

#[test]
fn one_worker_and_two_find_the_same_losses_of_the_same_weights() {
    // The weights of step 2 are validated by the worker that trained them, and again by the two that go on from its checkpoint.
    let mut cluster = validated(21, 2);
    cluster.job.set_steps(2);
    cluster.coordinator(1, &["--local"]).expect_exit(0);
    cluster.job.set_steps(3);
    cluster.coordinator(2, &["--local"]).expect_exit(0);
    let validations = validations(&cluster);
    assert_eq!(steps_of(&validations), [0, 2, 2, 3]);
    assert_close(&validations[1], &validations[2]);
    assert_ne!(validations[0].feature, validations[1].feature);
}

#[test]
fn epochs_are_validated_when_no_sample_is_left() {
    for (every, expected) in [(1000, vec![0, 3]), (3, vec![0, 3]), (2, vec![0, 2, 3])] {
        let mut cluster = validated(5, every);
        cluster.deal_samples(&[24, 24]);
        cluster.coordinator(2, &["--local"]).expect_exit(0);
        assert_eq!(cluster.steps().len(), 3);
        assert_eq!(steps_of(&validations(&cluster)), expected, "every {every} steps");
    }
}

#[test]
fn average_is_validated_where_one_is_kept() {
    let mut cluster = validated(10, 1000);
    cluster.job.set("train.ema_decay", 0.999_999);
    cluster.coordinator(1, &["--local"]).expect_exit(0);
    let validations = validations(&cluster);
    assert_eq!(steps_of(&validations), [0, 4]);
    assert!(validations.iter().all(|validation| validation.weights == "average"));
    // An average that slow has hardly left the fresh weights, unlike the trained ones.
    let change = |validations: &[Validation]| (validations[1].feature / validations[0].feature - 1.0).abs();
    assert!(change(&validations) < 1e-4, "{validations:?}");
}

#[test]
fn death_between_validation_and_the_next_step_repeats_it_and_says_it_once() {
    let mut cluster = validated(250, 2);
    cluster.job.set_steps(3);
    let mut coordinator = cluster.coordinator(2, &["--heartbeat-timeout", "2s"]);
    let [mut survivor, mut victim] = [0, 1].map(|rank| coordinator.worker_of_rank(rank));
    wait_until_validating(&coordinator, 2);
    victim.signal(Signal::KILL);
    victim.wait();
    coordinator.allow_error(" lost at step 2 in phase validating");
    let mut replacement = coordinator.worker_of_rank(1);
    coordinator.expect_exit(0);
    for worker in [&mut survivor, &mut replacement] {
        worker.expect_exit(0);
    }
    coordinator.assert_said("2 workers train from step 2");
    let disturbed = validations(&cluster);
    assert_eq!(steps_of(&disturbed), [0, 2, 3]);

    let mut undisturbed = validated(250, 2);
    undisturbed.job.set_steps(3);
    undisturbed.coordinator(2, &["--local"]).expect_exit(0);
    for (disturbed, undisturbed) in disturbed.iter().zip(&validations(&undisturbed)).take(2) {
        assert_close(disturbed, undisturbed);
    }
}

#[test]
fn death_after_the_last_step_does_not_lose_the_job() {
    for epochs in [false, true] {
        let mut cluster = validated(250, 1000);
        match epochs {
            true => cluster.deal_samples(&[16, 16]),
            false => drop(cluster.job.set_steps(2)),
        }
        let mut coordinator = cluster.coordinator(2, &["--heartbeat-timeout", "2s"]);
        let [mut survivor, mut victim] = [0, 1].map(|rank| coordinator.worker_of_rank(rank));
        wait_until_validating(&coordinator, 2);
        victim.signal(Signal::KILL);
        victim.wait();
        coordinator.allow_error(" lost at step 2 in phase validating");
        coordinator.expect_exit(0);
        survivor.expect_exit(0);
        // The weights are final: nobody is waited for, and only the losses that nobody could complete are missing.
        assert_eq!((cluster.newest_checkpoint().step, steps_of(&validations(&cluster))), (2, vec![0]), "epochs: {epochs}");
    }
}

#[test]
fn status_shows_the_newest_validation_and_where_the_time_went_is_kept() {
    let mut cluster = validated(16, 2);
    cluster.job.set_steps(100_000);
    let mut coordinator = cluster.coordinator(2, &["--local"]);
    coordinator.wait_for_step(3);
    let shown = status(&coordinator);
    let step = shown["validation"]["step"].as_u64().unwrap();
    assert!(step >= 2 && step.is_multiple_of(2), "{shown:#}");
    let mut table = coordinator.control(&["status"]);
    table.expect_exit(0);
    table.assert_said("validation at step ");
    coordinator.control(&["stop"]).expect_exit(0);
    coordinator.expect_exit(0);

    let validations = validations(&cluster);
    let kept = validations.iter().find(|validation| validation.step == step).unwrap();
    assert!((shown["validation"]["total"].as_f64().unwrap() / kept.total - 1.0).abs() < 1e-6, "{shown:#}");
    let steps = std::fs::read_to_string(cluster.state_dir().join("steps.jsonl")).unwrap();
    let seconds = |line: &str| serde_json::from_str::<serde_json::Value>(line).unwrap()["validation_s"].as_f64().unwrap();
    let seconds: Vec<f64> = steps.lines().take(3).map(seconds).collect();
    assert!(seconds[0] > 0.0 && seconds[1] == 0.0 && seconds[2] > 0.0, "validated before steps 1 and 3: {seconds:?}");
}

#[test]
fn pictures_of_all_prompts_are_there_and_alike_for_one_worker_and_two() {
    let draw = |world_size: u32| {
        let cluster = drawn(3);
        let mut coordinator = cluster.coordinator(world_size, &["--local"]);
        coordinator.expect_exit(0);
        coordinator.assert_said("pictures of step 3 are in ");
        assert!(coordinator.lines_with(" WARN ").is_empty(), "no picture was lost: {:#?}", coordinator.lines_with(" WARN "));
        let folders = std::fs::read_dir(cluster.state_dir().join("pictures")).unwrap().count();
        assert_eq!(folders, 3, "before the first step, after the third and after the last");
        let pictures = [0, 3, 4].map(|step| pictures(&cluster, step));
        (cluster, pictures)
    };
    let (cluster, one) = draw(1);
    let (_, two) = draw(2);
    // Fresh weights are the same on any number of workers; later ones saw the same samples in another order.
    for (one, two) in one[0].iter().zip(&two[0]) {
        assert!(distance(one, two) <= 1);
    }
    for (prompt, (fresh, trained)) in PROMPTS.iter().zip(one[0].iter().zip(&one[2])) {
        assert!(distance(fresh, trained) > 0, "{prompt} looks as before training");
    }

    // What is shown while training is what one gets afterwards.
    let out = cluster.folder().join("sample.png");
    let adapter = cluster.newest_checkpoint().folder;
    let [adapter, out_path] = [&adapter, &out].map(|path| path.to_str().unwrap());
    let sizes = ["--width", "64", "--height", "32", "--scheduler", "dpm++", "--steps", "3", "--guidance", "2", "--seed", "5"];
    let mut arguments = vec!["--model", "tests/demo/model", "--adapter", adapter, "--prompt", PROMPTS[0], "--out", out_path];
    arguments.extend(sizes);
    Process::start("sample", "sample", &arguments).expect_exit(0);
    assert!(distance(&image::open(out).unwrap().to_rgb8(), &one[2][0]) <= 1);
}

#[test]
fn pictures_that_cannot_be_kept_are_a_warning() {
    let mut cluster = drawn(1);
    cluster.job.set_steps(2);
    // A file where the folder of the first step should be.
    std::fs::create_dir_all(cluster.state_dir().join("pictures")).unwrap();
    std::fs::write(picture_folder(&cluster, 1), b"").unwrap();
    let mut coordinator = cluster.coordinator(2, &["--local"]);
    coordinator.expect_exit(0);
    let warnings = coordinator.lines_with(" WARN [");
    assert_eq!(warnings.len(), PROMPTS.len(), "{warnings:#?}");
    assert!(warnings.iter().all(|warning| warning.contains(" of step 1: not stored: ")), "{warnings:#?}");
    for step in [0, 2] {
        pictures(&cluster, step);
    }
}

#[test]
fn rounds_that_cannot_work_are_refused_before_training_begins() {
    let mut cluster = drawn(2);
    cluster.job.set("pictures.size", vec![72, 64]);
    let mut coordinator = cluster.coordinator(1, &["--local"]);
    coordinator.expect_exit(1);
    coordinator.assert_said("pictures.size: this model cannot draw 72 x 64 pixels; both must be multiples of 32");

    let mut cluster = validated(5, 2);
    cluster.job.set("validation.shards", vec!["/nowhere/00000.tar"]);
    let mut coordinator = cluster.coordinator(1, &["--local"]);
    coordinator.expect_exit(2);
    coordinator.assert_said("validation.shards: 1 of 1 shards do not exist:");
    coordinator.assert_said("/nowhere/00000.tar");
}
