//! Wrong arguments, files and data: each gets one clear line and the right exit code, and what can go on goes on.

use std::collections::BTreeMap;
use std::path::Path;

use peapod_tests::harness::{Cluster, Process, RawSample, Signal, demo_samples, tar_of, workspace};
use safetensors::SafeTensors;
use safetensors::tensor::TensorView;

#[test]
fn unknown_key_of_the_job_file_is_answered_with_the_nearest_known_one() {
    let mut cluster = Cluster::new();
    cluster.job.set("train.lerning_rate", 1e-4);
    let mut coordinator = cluster.coordinator(1, &["--local"]);
    coordinator.expect_exit(2);
    coordinator.assert_said("unknown key `lerning_rate`, did you mean `learning_rate`?");
    coordinator.assert_said("job.toml: line ");
    assert!(!cluster.state_dir().exists(), "nothing was started");

    let path = cluster.folder().join("job.toml");
    let mut check = Process::start("check", "coordinator", &["check", "--job", path.to_str().unwrap()]);
    check.expect_exit(2);
    check.assert_said("did you mean `learning_rate`?");
}

#[test]
fn job_file_that_is_not_there_and_values_out_of_range_are_named() {
    let mut missing = Process::start("coordinator", "coordinator", &["--world-size", "1", "--job", "nowhere/job.toml"]);
    missing.expect_exit(2);
    missing.assert_said("cannot read job file nowhere/job.toml");

    let mut cluster = Cluster::new();
    cluster.job.set("train.learning_rate", -1.0).set("train.global_batch", 0);
    let mut coordinator = cluster.coordinator(1, &["--local"]);
    coordinator.expect_exit(2);
    coordinator.assert_said("job.toml: line ");
    coordinator.assert_said(": train.learning_rate (-1) must be within");
    coordinator.assert_said("train.global_batch (0) must be within");
}

#[test]
fn shards_that_do_not_exist_are_named() {
    let mut cluster = Cluster::new();
    cluster.job.set("data.shards", vec!["tests/demo/shards/{00000..00009}.tar"]);
    let mut coordinator = cluster.coordinator(2, &["--local"]);
    coordinator.expect_exit(2);
    coordinator.assert_said("4 of 10 shards do not exist:");
    coordinator.assert_said("tests/demo/shards/00006.tar");

    cluster.job.set("data.shards", vec!["nowhere/{00000..00003}.tar"]);
    let mut coordinator = cluster.coordinator(2, &["--local"]);
    coordinator.expect_exit(2);
    coordinator.assert_said("4 of 4 shards do not exist:");
}

#[test]
fn shards_that_only_workers_would_see_are_judged_when_they_cannot_be_read() {
    // A coordinator without the data lets the job start; no worker can read anything.
    let mut cluster = Cluster::new();
    cluster.job.set("data.shards", vec!["nowhere/{00000..00003}.tar"]);
    let mut coordinator = cluster.coordinator(1, &[]);
    let mut worker = coordinator.worker_of_rank(0);
    coordinator.expect_exit(1);
    coordinator.assert_said("4 shards, none of them visible from this machine");
    let reason = coordinator.lines_with("coordinator: ").pop().unwrap();
    assert!(reason.contains("cannot be read") && reason.contains("nowhere/0000"), "{reason}");
    assert!(reason.contains("data.max_bad_fraction"), "{reason}");
    worker.expect_exit(1);
}

#[test]
fn truncated_tar_is_said_once_and_the_rest_is_trained() {
    let mut samples = demo_samples(48).into_iter();
    let tars = [16, 16, 16].map(|size| tar_of(&samples.by_ref().take(size).collect::<Vec<RawSample>>()));
    let mut tars = tars.to_vec();
    // In the middle of a picture, so that it cannot be taken for a shorter tar.
    let half = demo_samples(24);
    let whole_part = tar_of(&half[16..24]).len() - 1024;
    tars[1].truncate(whole_part + 512 + 100);

    let mut cluster = Cluster::new();
    cluster.deal_tars(&tars);
    let mut coordinator = cluster.coordinator(2, &["--local"]);
    coordinator.expect_exit(0);
    let said = coordinator.lines_with("; the rest of it is lost");
    assert!(said.len() == 1 && said[0].contains("00001.tar") && said[0].contains("breaks off"), "{said:?}");
    // Sixteen and sixteen of the whole ones, eight before the break.
    assert_eq!(cluster.trained_samples().len(), 40);
    let checkpoint = cluster.newest_checkpoint();
    assert_eq!((checkpoint.ledger_total("committed"), checkpoint.ledger_total("bad")), (40, 1));
}

/// Six ways in which a sample can be broken, and the word by which its report is known.
fn break_sample(sample: &mut RawSample, way: usize) -> &'static str {
    match way {
        0 => {
            sample.jpg = b"not a picture".to_vec();
            "jpg: "
        }
        1 => {
            // The header is whole: only decoding finds it out.
            sample.jpg.truncate(sample.jpg.len() / 2);
            "jpg: "
        }
        2 => {
            sample.json = b"not json".to_vec();
            "json: "
        }
        _ => {
            sample.json = br#"{"caption_zh": 5}"#.to_vec();
            "json: "
        }
    }
}

#[test]
fn broken_samples_are_named_and_passed_over() {
    let mut samples = demo_samples(64);
    let broken: Vec<(String, &str)> =
        [3, 20, 40, 41].iter().enumerate().map(|(way, &at)| (samples[at].key.clone(), break_sample(&mut samples[at], way))).collect();
    let mut cluster = Cluster::new();
    cluster.deal_tars(&[tar_of(&samples[..32]), tar_of(&samples[32..])]);
    let mut coordinator = cluster.coordinator(2, &["--local"]);
    coordinator.expect_exit(0);
    for (key, word) in &broken {
        let said = coordinator.lines_with(&format!("bad sample {key} in "));
        assert!(said.len() == 1 && said[0].contains(word), "{key}: {said:?}");
    }
    let checkpoint = cluster.newest_checkpoint();
    assert_eq!((checkpoint.ledger_total("committed"), checkpoint.ledger_total("bad")), (60, 4));
}

#[test]
fn more_broken_samples_than_allowed_end_the_job() {
    let mut samples = demo_samples(64);
    for sample in samples.iter_mut().step_by(4) {
        sample.json = b"not json".to_vec();
    }
    let mut cluster = Cluster::new();
    cluster.deal_tars(&[tar_of(&samples[..32]), tar_of(&samples[32..])]);
    let mut coordinator = cluster.coordinator(2, &["--local"]);
    coordinator.expect_exit(1);
    let reason = coordinator.lines_with("coordinator: ").pop().unwrap();
    assert!(reason.contains("samples are broken, most often bad_json ("), "{reason}");
    assert!(reason.contains("), more than data.max_bad_fraction = 0.05; the last in "), "{reason}");
}

#[test]
fn model_with_wrong_weights_ends_the_job_with_all_that_is_wrong() {
    let mut cluster = Cluster::new();
    let model = cluster.folder().join("model");
    copy_with_links(&workspace().join("tests/demo/model"), &model, "unet");
    let weights = "diffusion_pytorch_model.safetensors";
    damage_weights(&workspace().join("tests/demo/model/unet").join(weights), &model.join("unet").join(weights));
    cluster.job.set("model.path", model.to_str().unwrap());

    let mut coordinator = cluster.coordinator(1, &[]);
    let mut worker = coordinator.worker_of_rank(0);
    coordinator.expect_exit(1);
    worker.expect_exit(1);
    let start = format!("coordinator: rank 0 (pid {} on ", worker.id());
    assert!(coordinator.lines().iter().any(|line| line.starts_with(&start) && line.contains(" failed in phase loading: ")), "{start}");
    for process in [&mut *coordinator, &mut worker] {
        process.assert_said("conv_in.weight");
        process.assert_said("conv_out.bias");
        process.assert_said(model.join("unet").to_str().unwrap());
    }
}

#[test]
fn check_of_a_job_compares_shapes_and_starts_nothing() {
    let demo = workspace().join("tests/demo/job.toml");
    let mut check = Process::start("check", "coordinator", &["check", "--job", demo.to_str().unwrap()]);
    check.expect_exit(0);
    check.assert_said("job.toml is a valid job: demo");
    check.assert_said("unet            5,205,636 parameters");
    check.assert_said("BERT            156,416 parameters");
    check.assert_said("adapter: 98,256 parameters");

    // A configuration that asks for more input channels than its weights have.
    let mut cluster = Cluster::new();
    let (model, unet) = (cluster.folder().join("model"), workspace().join("tests/demo/model/unet"));
    copy_with_links(&workspace().join("tests/demo/model"), &model, "unet");
    let weights = "diffusion_pytorch_model.safetensors";
    std::os::unix::fs::symlink(unet.join(weights), model.join("unet").join(weights)).unwrap();
    let config = std::fs::read_to_string(unet.join("config.json")).unwrap();
    let mut config: serde_json::Value = serde_json::from_str(&config).unwrap();
    config["in_channels"] = 9.into();
    std::fs::write(model.join("unet/config.json"), config.to_string()).unwrap();
    cluster.job.set("model.path", model.to_str().unwrap());
    let job = cluster.folder().join("job.toml");
    std::fs::write(&job, cluster.job.to_string()).unwrap();
    for program in ["coordinator", "worker"] {
        let mut check = Process::start(program, program, &["check", "--job", job.to_str().unwrap()]);
        check.expect_exit(2);
        check.assert_said("model.path: ");
        check.assert_said("conv_in.weight is [32, 4, 3, 3], wanted [32, 9, 3, 3]");
    }

    // What a coordinator's machine does not see is left to the workers; a worker must see it.
    cluster.job.set("model.path", "nowhere");
    std::fs::write(&job, cluster.job.to_string()).unwrap();
    let mut check = Process::start("coordinator", "coordinator", &["check", "--job", job.to_str().unwrap()]);
    check.expect_exit(0);
    check.assert_said("model nowhere is not visible from this machine: the workers must see it");
    let mut check = Process::start("worker", "worker", &["check", "--job", job.to_str().unwrap()]);
    check.expect_exit(2);
    check.assert_said(&format!("model.path: nowhere: there is no such file or folder in {}, and", workspace().display()));
}

/// A folder like `from`, made of links but for the folder `apart` in it, whose files are links too and whose weights are left out.
fn copy_with_links(from: &Path, to: &Path, apart: &str) {
    std::fs::create_dir(to).unwrap();
    for entry in from.read_dir().unwrap() {
        let entry = entry.unwrap();
        let (source, target) = (entry.path(), to.join(entry.file_name()));
        if entry.file_name() == apart {
            std::fs::create_dir(&target).unwrap();
            std::fs::copy(source.join("config.json"), target.join("config.json")).unwrap();
        } else {
            std::os::unix::fs::symlink(source, target).unwrap();
        }
    }
}

/// Copies weights without `conv_in.weight` and with a `conv_out.bias` of another length.
fn damage_weights(from: &Path, to: &Path) {
    let bytes = std::fs::read(from).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let mut tensors: BTreeMap<String, TensorView<'_>> = file.iter().map(|(name, view)| (name.to_owned(), view)).collect();
    tensors.remove("conv_in.weight").unwrap();
    let bias = tensors.remove("conv_out.bias").unwrap();
    let longer = bias.data().repeat(2);
    let longer = TensorView::new(bias.dtype(), vec![bias.shape()[0] * 2], &longer).unwrap();
    tensors.insert("conv_out.bias".into(), longer);
    std::fs::write(to, safetensors::serialize(&tensors, None).unwrap()).unwrap();
}

#[test]
fn store_that_fails_in_the_middle_of_training_is_a_warning() {
    let mut cluster = Cluster::new();
    cluster.job.set("checkpoint.every_steps", 2);
    // Where the checkpoint's folder has to be made lies a file.
    block(&cluster, 2);
    let mut coordinator = cluster.coordinator(1, &["--local"]);
    coordinator.allow_error("checkpoint of step 2");
    coordinator.expect_exit(0);
    coordinator.assert_said("checkpoint of step 2 not stored: ");
    coordinator.assert_said("checkpoint of step 4 stored");
    let kept: Vec<u64> = cluster.checkpoints().iter().map(|checkpoint| checkpoint.step).collect();
    assert_eq!(kept, [4]);
}

#[test]
fn store_that_fails_at_the_end_is_waited_for() {
    let cluster = Cluster::new();
    block(&cluster, 4);
    let mut coordinator = cluster.coordinator(1, &["--local"]);
    coordinator.allow_error("the last checkpoint, of step 4, is not stored: checkpoint store ");
    coordinator.allow_error("checkpoint of step 4");
    let line = coordinator.wait_for("trying again in 4 s: make room for it, or mend its store");
    assert!(line.contains(" is not stored: checkpoint store "), "{line}");
    std::fs::remove_file(cluster.checkpoint_folder(4, 1)).unwrap();
    coordinator.expect_exit(0);
    assert_eq!(cluster.newest_checkpoint().step, 4);
}

fn block(cluster: &Cluster, step: u64) {
    let folder = cluster.checkpoint_folder(step, 1);
    std::fs::create_dir_all(folder.parent().unwrap()).unwrap();
    std::fs::write(folder, b"in the way").unwrap();
}

#[test]
fn second_coordinator_on_the_same_state_is_refused() {
    let cluster = Cluster::new();
    let mut coordinator = cluster.coordinator(1, &[]);
    let _ = coordinator.url();
    let mut second = cluster.coordinator(1, &[]);
    second.expect_exit(2);
    second.assert_said("belongs to a coordinator that is running; give each job its own");
    coordinator.signal(Signal::INT);
    coordinator.expect_exit(130);
}

#[test]
fn coordinator_that_is_open_to_all_says_so() {
    let cluster = Cluster::new();
    let mut insecure = cluster.coordinator(1, &["--listen", "0.0.0.0:0", "--insecure"]);
    insecure.wait_for("--insecure: anyone who reaches ");
    insecure.signal(Signal::INT);
    insecure.expect_exit(130);
}

#[test]
fn port_that_is_taken_is_named() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let cluster = Cluster::new();
    let mut coordinator = cluster.coordinator(1, &["--listen", &address]);
    coordinator.expect_exit(1);
    coordinator.assert_said(&format!("cannot listen on {address}"));
}

#[test]
fn arguments_that_cannot_work_are_refused_before_anything_starts() {
    for (program, arguments, words) in [
        ("coordinator", &["--job", "tests/demo/job.toml"][..], "--world-size"),
        ("coordinator", &["--world-size", "0", "--job", "tests/demo/job.toml"], "within 1..=65536"),
        (
            "coordinator",
            &["--world-size", "64", "--job", "tests/demo/job.toml"],
            "train.global_batch (32) must be at least --world-size (64)",
        ),
        ("worker", &["--coordinator", "somewhere:7733"], "http://master:7733"),
        ("worker", &["--coordinator", "https://127.0.0.1:7733"], "needs --join STRING"),
        ("worker", &["--coordinator", "http://127.0.0.1:7733", "--device", "gpu"], "cuda:N"),
        ("worker", &["--coordinator", "http://127.0.0.1:7733", "--rank", "first"], "--rank"),
    ] {
        let mut process = Process::start(program, program, arguments);
        process.expect_exit(2);
        process.assert_said(words);
    }
}

#[test]
fn a_gpu_on_a_machine_without_one_is_refused_with_what_is_missing() {
    if std::path::Path::new("/dev/nvidiactl").exists() {
        eprintln!("skipped: this machine has an NVIDIA driver");
        return;
    }
    for arguments in [&["--coordinator", "http://127.0.0.1:7733", "--device", "cuda:0"][..], &["check", "--device", "cuda:0"]] {
        let mut process = Process::start("worker", "worker", arguments);
        process.expect_exit(2);
        process.assert_said("--device cuda:0: cannot use the NVIDIA driver");
        process.assert_said("install NVIDIA driver 580 or newer");
    }
}
