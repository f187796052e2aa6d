//! Who reads what: sources drawn by weight, shards shared at the end of an epoch, handed back by who leaves, and shown to whoever asks.

use std::collections::BTreeMap;

use peapod_tests::harness::{Cluster, Coordinator, assert_trained_once, demo_samples, poll, tar_of};

/// Shards of two sources: two and six of sixteen samples.
const SIZES: [usize; 8] = [16; 8];
const NUM_SMALL: u32 = 2;

/// A job on two sources, of which the smaller has three times the weight.
fn two_sources() -> Cluster {
    let mut cluster = Cluster::new();
    cluster.deal_samples(&SIZES);
    let shards = |range: &str| format!("{}/shards/{{{range}}}.tar", cluster.folder().display());
    let sources = [("small", shards("00000..00001"), 3.0), ("large", shards("00002..00007"), 1.0)];
    cluster.job.set_sources(&sources);
    cluster
}

#[test]
fn sources_are_drawn_by_weight_and_each_counts_its_own_epochs() {
    let mut cluster = two_sources();
    cluster.job.set_steps(8);
    let mut coordinator = cluster.coordinator(1, &["--local"]);
    coordinator.expect_exit(0);
    let trained = cluster.trained_samples();
    assert_eq!(trained.len(), 128);
    let small: Vec<u32> = trained.iter().filter(|sample| sample.shard < NUM_SMALL).map(|sample| sample.epoch).collect();
    // 96 but for what is still in the shuffle buffer.
    assert!((80..=112).contains(&small.len()), "{} of the small source", small.len());
    assert!(small.iter().max() >= Some(&2), "it comes round again");
    assert!(trained.iter().all(|sample| sample.shard < NUM_SMALL || sample.epoch == 0), "the other is in its first epoch");
    let mut times: BTreeMap<(u32, u32, u32), u32> = BTreeMap::new();
    trained.iter().for_each(|sample| *times.entry((sample.epoch, sample.shard, sample.index)).or_default() += 1);
    assert!(times.values().all(|&times| times == 1));
}

#[test]
fn epoch_of_several_sources_holds_each_sample_once() {
    let mut cluster = two_sources();
    cluster.job.set_epochs(1);
    let mut coordinator = cluster.coordinator(2, &["--local"]);
    coordinator.expect_exit(0);
    assert_trained_once(&cluster.trained_samples(), &SIZES);
}

/// The shards as `status --shards --json` shows them, by number.
fn shards(coordinator: &Coordinator) -> Vec<serde_json::Value> {
    let mut status = coordinator.control(&["status", "--shards", "--json"]);
    status.wait();
    status.lines().iter().filter_map(|line| serde_json::from_str(line).ok()).collect()
}

fn ranks(shard: &serde_json::Value) -> Vec<u64> {
    shard["ranks"].as_array().into_iter().flatten().filter_map(serde_json::Value::as_u64).collect()
}

/// A job whose readers cannot read far ahead of what is trained.
fn with_small_buffers(sizes: &[usize]) -> Cluster {
    let mut cluster = Cluster::new();
    cluster.deal_samples(sizes);
    cluster.job.set("data.shuffle_buffer", 8).set("data.buffer_bytes", 1 << 20);
    cluster
}

#[test]
fn idle_worker_takes_over_the_rest_of_the_only_shard() {
    let sizes = [320];
    let cluster = with_small_buffers(&sizes);
    let mut coordinator = cluster.coordinator(2, &[]);
    let mut workers = [0, 1].map(|rank| coordinator.worker_of_rank(rank));
    // The shard has one reader, and then two.
    poll("the shard to be shared", || {
        assert!(coordinator.is_running(), "one worker read all of it");
        shards(&coordinator).first().filter(|shard| ranks(shard).len() == 2).map(|_| ())
    });
    coordinator.expect_exit(0);
    workers.iter_mut().for_each(|worker| worker.expect_exit(0));
    assert_trained_once(&cluster.trained_samples(), &sizes);
    assert_eq!(cluster.newest_checkpoint().ledger_total("committed"), 320);
}

#[test]
fn leaving_worker_hands_back_what_it_has_not_begun() {
    let sizes = [160, 160];
    let cluster = with_small_buffers(&sizes);
    let mut coordinator = cluster.coordinator(2, &[]);
    let [mut steady, mut leaves] = [0, 1].map(|rank| coordinator.worker_of_rank(rank));
    coordinator.wait_for_step(3);
    coordinator.control(&["drain", "1"]).expect_exit(0);
    leaves.expect_exit(0);
    leaves.assert_said("left the job: ");
    coordinator.wait_for("waiting for rank 1");
    let shown = shards(&coordinator);
    assert!(shown.iter().all(|shard| !ranks(shard).contains(&1)), "{shown:?}");
    assert!(shown.iter().any(|shard| shard["state"] == "pending" && shard["committed"].as_u64() > Some(0)), "begun by it: {shown:?}");
    let mut replacement = coordinator.worker_of_rank(1);
    coordinator.expect_exit(0);
    steady.expect_exit(0);
    replacement.expect_exit(0);
    // Leaving is not failing: nothing was dropped, so no step was computed twice.
    assert!(coordinator.lines_with("is broken up").is_empty());
    assert_trained_once(&cluster.trained_samples(), &sizes);
}

#[test]
fn status_tells_of_each_source_and_shard_what_became_of_its_samples() {
    let mut cluster = two_sources();
    let mut samples = demo_samples(16);
    samples[3].json = b"no json".to_vec();
    std::fs::write(cluster.folder().join("shards/00001.tar"), tar_of(&samples)).unwrap();
    // It reads no further ahead than it must: whole epochs of the small source would otherwise be counted before the first step.
    cluster.job.set_steps(100_000).set("data.shuffle_buffer", 8).set("data.buffer_bytes", 1 << 20).set("data.max_bad_fraction", 0.9);
    let mut coordinator = cluster.coordinator(1, &[]);
    let mut worker = coordinator.worker_of_rank(0);
    coordinator.wait_for_step(4);

    let mut status = coordinator.control(&["status", "--shards"]);
    status.expect_exit(0);
    status.assert_said("small (weight 3), epoch ");
    status.assert_said("large (weight 1), epoch 0: ");
    status.assert_said("    bad: ");
    status.assert_said("leased to rank 0");
    for shard in 0..SIZES.len() {
        status.assert_said(&format!("shards/{shard:05}.tar"));
    }
    let of_both = shards(&coordinator);
    assert_eq!(of_both.iter().filter(|shard| shard["source"] == "large").count(), 6);
    let mut one = coordinator.control(&["status", "--shards", "--source", "large"]);
    one.expect_exit(0);
    assert!(one.lines_with("shards/00001.tar").is_empty() && one.lines_with(".tar").len() == 6);
    let mut none = coordinator.control(&["status", "--shards", "--source", "huge"]);
    none.expect_exit(1);
    none.assert_said("no source is named \"huge\"; the job has: small, large");
    let mut whole = coordinator.control(&["status", "--json"]);
    whole.expect_exit(0);
    whole.assert_said("\"bad_json\": ");

    coordinator.control(&["stop"]).expect_exit(0);
    coordinator.expect_exit(0);
    worker.expect_exit(0);
}
