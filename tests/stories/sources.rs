//! Shards behind a server that fails now and then, or for good.

use peapod_tests::harness::{Cluster, Fault, FileServer, Habits, Process, RawSample, assert_trained_once, demo_samples, tar_of};

/// Samples of each shard.
const SIZES: [usize; 4] = [16, 24, 16, 24];

/// A cluster whose shards are on a server, and the server.
fn served() -> (Cluster, FileServer) {
    let server = FileServer::start();
    let mut samples = demo_samples(SIZES.iter().sum()).into_iter();
    for (number, &size) in SIZES.iter().enumerate() {
        server.put(&format!("{number:05}.tar"), &tar_of(&samples.by_ref().take(size).collect::<Vec<RawSample>>()));
    }
    let mut cluster = Cluster::new();
    cluster.job.set("data.shards", vec![server.url("{00000..00003}.tar")]).set_epochs(1).set("data.read_timeout", "500ms");
    (cluster, server)
}

#[test]
fn server_that_fails_now_and_then_costs_no_sample() {
    for fault in [Fault::CutAfter(20_000), Fault::StallAfter(3_000), Fault::Status(500)] {
        let (mut cluster, server) = served();
        server.set_habits(Habits { fails_every: Some((2, fault)), ..Habits::default() });
        let cache = cluster.folder().join("cache");
        cluster.job.set("data.cache_dir", cache.to_str().unwrap());
        let mut coordinator = cluster.coordinator(2, &["--local"]);
        coordinator.expect_exit(0);
        assert_trained_once(&cluster.trained_samples(), &SIZES);
        assert_eq!(cluster.newest_checkpoint().ledger_total("bad"), 0);
        let num_reads = server.take_requests().iter().filter(|request| request.starts_with("GET")).count();
        assert!(num_reads > SIZES.len(), "{fault:?}: {num_reads} reads");
        let kept = cache.read_dir().unwrap().filter(|entry| entry.as_ref().unwrap().path().extension().is_some()).count();
        assert_eq!(kept, SIZES.len());
    }
}

#[test]
fn training_waits_for_a_server_that_is_down_and_goes_on_when_it_is_back() {
    let (mut cluster, server) = served();
    cluster.job.set("data.retries", 1);
    server.set_habits(Habits { fails_every: Some((1, Fault::CutAfter(0))), ..Habits::default() });
    let mut coordinator = cluster.coordinator(2, &["--local"]);
    coordinator.wait_for(".tar cannot be read for ");
    server.set_habits(Habits::default());
    coordinator.expect_exit(0);
    assert_trained_once(&cluster.trained_samples(), &SIZES);
}

#[test]
fn server_that_stays_down_ends_the_job_with_its_words() {
    let (mut cluster, server) = served();
    cluster.job.set("data.retries", 1).set("data.give_up_after", "1s");
    server.set_habits(Habits { fails_every: Some((1, Fault::Status(503))), ..Habits::default() });
    let mut coordinator = cluster.coordinator(1, &["--local"]);
    coordinator.expect_exit(1);
    let reason = coordinator.lines_with("coordinator: ").pop().unwrap();
    assert!(
        reason.contains(" failed in phase data: read http://")
            && reason.contains(".tar: the server answers 503 Service Unavailable; given up after "),
        "{reason}"
    );
}

#[test]
fn check_counts_shards_on_a_server() {
    let (cluster, server) = served();
    let job = cluster.folder().join("job.toml");
    std::fs::write(&job, cluster.job.to_string()).unwrap();
    let check = || Process::start("check", "coordinator", &["check", "--job", job.to_str().unwrap()]);
    let mut whole = check();
    whole.expect_exit(0);
    whole.assert_said("  4 shards, 0.");
    assert!(server.take_requests().iter().all(|request| request.starts_with("HEAD ")), "nothing is fetched");
    drop(server);
    let mut down = check();
    down.expect_exit(0);
    down.assert_said("4 shards; 4 cannot be looked at from this machine, such as http://");
}
