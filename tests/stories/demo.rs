//! The demo from end to end: what `make demo` runs, judged by numbers instead of eyes.

use std::path::Path;
use std::process::Command;

use peapod_tests::classifier::{Classifier, Picture, prompts};
use peapod_tests::harness::{program, workspace};

/// Seed of the judged pictures. The teacher draws every one of the hundred prompts right with it.
const SEED: &str = "3";

fn run(name: &str, arguments: &[&str]) {
    let status = Command::new(program(name)).args(arguments).current_dir(workspace()).status().unwrap();
    assert!(status.success(), "{name} {arguments:?}: {status}");
}

/// Draws one picture for each line of `lines` and counts those that show the colour and shape that were asked for.
fn score(folder: &Path, name: &str, lines: &[&str], adapter: Option<&Path>) -> usize {
    let (list, out) = (folder.join(format!("{name}.txt")), folder.join(format!("{name}.png")));
    std::fs::write(&list, lines.join("\n")).unwrap();
    let mut arguments = vec!["--model", "tests/demo/model", "--prompts", list.to_str().unwrap(), "--out", out.to_str().unwrap()];
    arguments.extend(["--scheduler", "dpm++", "--steps", "20", "--guidance", "5", "--seed", SEED, "--batch", "25"]);
    if let Some(adapter) = adapter {
        arguments.extend(["--adapter", adapter.to_str().unwrap()]);
    }
    run("sample", &arguments);
    let picture = |index: usize| {
        let image = image::open(folder.join(format!("{name}-{index:03}.png"))).unwrap().to_rgb8();
        Picture { width: image.width() as usize, height: image.height() as usize, rgb: image.into_raw() }
    };
    let pictures: Vec<Picture> = (0..lines.len()).map(picture).collect();
    let verdicts = Classifier::load().unwrap().classify(&pictures).unwrap();
    prompts().iter().zip(&verdicts).filter(|(prompt, verdict)| prompt.met_by(verdict)).count()
}

/// The adapter that lies beside the demo: `tests/demo/README.md` says how it was trained.
#[test]
fn committed_adapter_draws_what_chinese_prompts_name() {
    let folder = tempfile::tempdir().unwrap();
    let prompts = prompts();
    let (zh, en): (Vec<&str>, Vec<&str>) = prompts.iter().map(|prompt| (prompt.zh.as_str(), prompt.en.as_str())).unzip();
    let teacher = score(folder.path(), "teacher", &en, None);
    let adapter = score(folder.path(), "adapter", &zh, Some(&workspace().join("tests/demo/adapter.safetensors")));
    println!("right colour and shape of {}: English teacher {teacher}, committed Chinese adapter {adapter}", prompts.len());
    assert_eq!(teacher, 100);
    assert!(adapter >= 97, "the committed adapter draws {adapter} of 100 prompts right");
}

#[test]
#[ignore = "trains for five minutes on all cores: `make test` runs it by itself after the others"]
fn trained_adapter_draws_what_chinese_prompts_name() {
    let folder = tempfile::tempdir().unwrap();
    let state = folder.path().join("state");
    run("coordinator", &["--world-size", "2", "--local", "--job", "tests/demo/job.toml", "--state-dir", state.to_str().unwrap()]);

    let steps = std::fs::read_to_string(state.join("steps.jsonl")).unwrap();
    let feature = |line: &str| serde_json::from_str::<serde_json::Value>(line).unwrap()["feature"].as_f64().unwrap();
    let losses: Vec<f64> = steps.lines().map(feature).collect();
    let tenth = losses.len() / 10;
    let last = losses[losses.len() - tenth..].iter().sum::<f64>() / tenth as f64;
    println!("feature loss: first step {:.3}, mean of the last {tenth} steps {last:.3}", losses[0]);
    assert!(losses.len() == 800 && last <= losses[0] / 4.0);

    let prompts = prompts();
    let (zh, en): (Vec<&str>, Vec<&str>) = prompts.iter().map(|prompt| (prompt.zh.as_str(), prompt.en.as_str())).unzip();
    let teacher = score(folder.path(), "teacher", &en, None);
    let adapter = score(folder.path(), "adapter", &zh, Some(&state.join("checkpoints")));
    println!("right colour and shape of {}: English teacher {teacher}, Chinese adapter {adapter}", prompts.len());
    assert_eq!(teacher, 100);
    assert!(adapter >= 90, "the adapter draws {adapter} of 100 prompts right");
}
