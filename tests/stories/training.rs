//! Two workers train together, started by one command or by hand; what comes of it is whole, exact and the same either way.

use peapod_tests::harness::{
    Checkpoint, Cluster, Process, RawSample, StoredTensor, TrainedSample, assert_trained_once, demo_samples, tar_of,
};
use safetensors::Dtype;

/// Shards of unequal size, so that one worker runs out of samples before the other.
const SIZES: [usize; 4] = [20, 26, 18, 24];

/// One epoch over [`SIZES`] with a checkpoint every second step.
fn one_epoch() -> Cluster {
    let mut cluster = Cluster::new();
    cluster.deal_samples(&SIZES);
    cluster.job.set("checkpoint.every_steps", 2).set("train.ema_decay", 0.9);
    cluster
}

#[test]
fn two_local_workers_train_an_epoch_and_every_sample_exactly_once() {
    let cluster = one_epoch();
    let mut coordinator = cluster.coordinator(2, &["--local"]);
    coordinator.expect_exit(0);

    let steps = cluster.steps();
    let last = steps.last().unwrap().step;
    assert!(steps.iter().all(|step| step.samples <= 16), "{steps:?}");
    assert_trained_once(&cluster.trained_samples(), &SIZES);

    coordinator.assert_said(&format!("steps       {last}, up to step {last}, 88 samples at "));
    coordinator.assert_said("losses      first step -> mean of the last tenth");
    coordinator.assert_said(&format!("checkpoint  {}", cluster.checkpoint_folder(last, 1).canonicalize().unwrap().display()));
    assert!(
        !coordinator.lines_with("[0] ").is_empty() && !coordinator.lines_with("[1] ").is_empty(),
        "workers' lines come with their rank"
    );

    // At each of these the coordinator compared the weights of both ranks; a difference would have ended the job.
    let checkpoints = cluster.checkpoints();
    let mut due: Vec<u64> = (2..=last).step_by(2).chain([last]).collect();
    due.dedup();
    assert_eq!(checkpoints.iter().map(|checkpoint| checkpoint.step).collect::<Vec<_>>(), due);
    for checkpoint in &checkpoints {
        let parts: Vec<&str> = checkpoint.parts.keys().map(String::as_str).collect();
        assert_eq!(parts, ["adapter.safetensors", "adapter_ema.safetensors", "ledger.json", "optimizer.safetensors", "pytorch_model.bin"]);
        let trained: u64 = steps.iter().filter(|step| step.step <= checkpoint.step).map(|step| step.samples).sum();
        assert_eq!(checkpoint.ledger_total("committed"), trained, "the ledger follows the weights");
    }
}

#[test]
fn every_worker_has_its_part_of_the_last_epoch() {
    let mut cluster = Cluster::new();
    cluster.deal_samples(&[8, 8]);
    cluster.coordinator(2, &["--local"]).expect_exit(0);
    // One shard each, so both have their half of the only batch.
    assert_eq!(cluster.steps().iter().map(|step| step.samples).collect::<Vec<_>>(), [16]);
}

#[test]
fn workers_started_by_hand_do_the_same_as_local_ones() {
    let six_steps = || {
        let mut cluster = one_epoch();
        cluster.job.set_steps(6);
        cluster
    };
    let local = six_steps();
    local.coordinator(2, &["--local"]).expect_exit(0);

    let by_hand = six_steps();
    let mut coordinator = by_hand.coordinator(2, &[]);
    coordinator.wait_for("start on each host, once a GPU:  worker --coordinator http://127.0.0.1:");
    // The last comes first: places among the members follow ranks, not arrival.
    let mut last = coordinator.worker_of_rank(1);
    coordinator.wait_for("rank 1 ");
    let mut first = coordinator.worker_of_rank(0);
    coordinator.expect_exit(0);
    for worker in [&mut first, &mut last] {
        worker.expect_exit(0);
        worker.assert_said("the job ended: the job is finished");
    }

    // An undisturbed fixed world is deterministic: the same samples in the same steps, and the same weights to the last bit.
    assert_eq!(sorted(by_hand.trained_samples()), sorted(local.trained_samples()));
    let weights = |cluster: &Cluster| {
        let read = |checkpoint: &Checkpoint| (checkpoint.step, checkpoint.tensors("adapter.safetensors"));
        cluster.checkpoints().iter().map(read).collect::<Vec<_>>()
    };
    let (by_hand, local) = (weights(&by_hand), weights(&local));
    assert_eq!(local.len(), 3);
    for ((step, by_hand), (_, local)) in by_hand.iter().zip(&local) {
        assert!(by_hand == local, "weights of step {step} differ");
    }
}

fn sorted(mut samples: Vec<TrainedSample>) -> Vec<TrainedSample> {
    samples.sort_unstable();
    samples
}

#[test]
fn one_worker_and_two_compute_the_same_gradient_from_the_same_batch() {
    // Pictures of one bucket in tar order: the same sixteen samples make the first step, in one micro-batch or in two on two workers.
    let shape = |sample: &RawSample| image::load_from_memory(&sample.jpg).unwrap().to_rgb8().dimensions();
    let mut samples = demo_samples(128);
    samples.retain(|sample| matches!(shape(sample), (width, height) if width == height));
    let tars = [tar_of(&samples[..8]), tar_of(&samples[8..16])];
    let gradient = |world_size: u32| {
        let mut cluster = Cluster::new();
        cluster.deal_tars(&tars);
        cluster.job.set_steps(1).set("train.max_grad_norm", 0.0).set("train.micro_batch", 16).set("data.shuffle_buffer", 1);
        cluster.coordinator(world_size, &["--local"]).expect_exit(0);
        assert_trained_once(&cluster.trained_samples(), &[8, 8]);
        cluster.newest_checkpoint().mean_gradient()
    };
    let (one, two) = (gradient(1), gradient(2));
    assert_eq!(one.len(), two.len());
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|value| value * value).sum::<f64>().sqrt();
    let size = norm(&mut one.iter().map(|&value| value.into()));
    let difference = norm(&mut one.iter().zip(&two).map(|(&one, &two)| f64::from(one) - f64::from(two)));
    println!("relative difference {:.2e}", difference / size);
    // What is left is the order of sums in f32.
    assert!(size > 0.0 && difference <= 1e-5 * size, "norm {size}, difference {difference}");
}

#[test]
fn adapter_file_has_the_published_keys_and_says_where_it_comes_from() {
    let mut cluster = Cluster::new();
    cluster.job.set_steps(2).set("train.ema_decay", 0.5);
    cluster.coordinator(1, &["--local"]).expect_exit(0);
    let checkpoint = cluster.newest_checkpoint();
    for part in ["adapter.safetensors", "adapter_ema.safetensors"] {
        // The demo's widths in the places of the published ones: 64 -> 256 -> 256 -> 48, and 48 -> 80.
        let shapes: [(&str, &[usize]); 7] = [
            ("fc.bias", &[80]),
            ("fc.weight", &[80, 48]),
            ("layernorm.bias", &[64]),
            ("layernorm.weight", &[64]),
            ("projector.0.weight", &[256, 64]),
            ("projector.2.weight", &[256, 256]),
            ("projector.4.weight", &[48, 256]),
        ];
        let stored = checkpoint.tensors(part);
        let found: Vec<(&str, &[usize])> = stored.iter().map(|(name, tensor)| (name.as_str(), tensor.shape.as_slice())).collect();
        assert_eq!(found, shapes, "{part}");
        assert!(stored.values().all(|tensor| tensor.dtype == Dtype::F32), "{part}");
        assert!(stored.values().flat_map(values).all(f32::is_finite), "{part}");

        let metadata = checkpoint.metadata(part);
        for (key, value) in [
            ("format", "pt"),
            ("step", "2"),
            ("job", "demo"),
            ("architecture", "sdxl"),
            ("context_length", "24"),
            ("encoder", "tests/demo/model/text_encoder_zh"),
        ] {
            assert_eq!(metadata.get(key).map(String::as_str), Some(value), "{key} in {part}");
        }
    }
    assert_ne!(checkpoint.tensors("adapter.safetensors"), checkpoint.tensors("adapter_ema.safetensors"), "the average is kept apart");
}

fn values(tensor: &StoredTensor) -> impl Iterator<Item = f32> + '_ {
    tensor.bytes.chunks_exact(4).map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap()))
}

#[test]
fn running_job_shows_its_state_and_stops_on_request() {
    let mut cluster = Cluster::new();
    cluster.job.set_steps(100_000);
    let mut coordinator = cluster.coordinator(2, &["--local"]);
    coordinator.wait_for_step(2);

    let mut status = coordinator.control(&["status", "--json"]);
    status.expect_exit(0);
    let status: serde_json::Value = serde_json::from_str(&status.lines().join("\n")).unwrap();
    assert_eq!((&status["job"], &status["state"]), (&"demo".into(), &"training".into()), "{status:#}");
    assert_eq!(status["total_steps"], 100_000);
    let step = status["step"].as_u64().unwrap();
    assert!(step >= 2 && status["samples"]["committed"] == step * 16, "{status:#}");
    assert_eq!(status["shards"]["total"], 6);
    let workers = status["workers"].as_array().unwrap();
    assert_eq!(workers.len(), 2);
    for (rank, worker) in workers.iter().enumerate() {
        assert_eq!(worker["rank"], rank);
        assert_eq!(worker["pid"], coordinator.pid_of_rank(rank as u32));
        assert_eq!((&worker["device"], &worker["member"]), (&"cpu".into(), &true.into()));
    }
    let mut table = coordinator.control(&["status"]);
    table.expect_exit(0);
    table.assert_said("demo: training, step ");

    coordinator.control(&["stop"]).expect_exit(0);
    coordinator.expect_exit(0);
    coordinator.assert_said("stopped: stopped on request");
    assert_eq!(cluster.newest_checkpoint().step, cluster.steps().last().unwrap().step, "everything done is kept");
}

#[test]
fn job_file_written_by_init_is_valid_and_never_written_over() {
    let cluster = Cluster::new();
    let path = cluster.folder().join("new.toml");
    let path = path.to_str().unwrap();
    let run = |arguments: &[&str]| Process::start(arguments[0], "coordinator", arguments);
    run(&["init", "--demo", path]).expect_exit(0);
    let mut check = run(&["check", "--job", path]);
    check.expect_exit(0);
    check.assert_said(&format!("{path} is a valid job: demo"));
    check.assert_said("800 steps, 32 samples a step, in parts of 16");
    check.assert_said("6 shards, ");

    let mut again = run(&["init", path]);
    again.expect_exit(2);
    again.assert_said(&format!("{path} exists already; name another file"));
}
