//! Workers that live and do not get on: they are named with what they do, and the job goes on without them.

use std::time::Duration;

use peapod_tests::harness::{Cluster, Fault, FaultPlan, FileServer, Habits, Point, Signal, assert_trained_once, demo_samples, tar_of};

const SIZES: [usize; 4] = [48, 48, 48, 48];

/// One epoch of twelve steps with pictures of one size: the first step of each size may take long.
fn twelve_steps() -> Cluster {
    let mut cluster = Cluster::new();
    cluster.deal_samples(&SIZES);
    cluster.job.set("data.buckets", vec![toml::Value::from(vec![64, 64])]);
    cluster
}

#[test]
fn worker_that_hangs_in_a_step_is_named_and_replaced() {
    let cluster = twelve_steps();
    let mut coordinator = cluster.coordinator(2, &["--heartbeat-timeout", "2s"]);
    coordinator.allow_error(" lost at step ");
    let plan = FaultPlan::new().at(Point::HangInCompute, 1, 8);
    let [mut steady, mut hanging] = plan.workers(&coordinator, 2).try_into().unwrap();
    let line = coordinator.wait_for("ERROR rank ");
    assert!(line.contains(&format!("rank 1 (pid {} on ", hanging.id())), "{line}");
    let named = " lost at step 7 in phase compute: it lives but has not got on in phase compute for ";
    assert!(line.contains(named) && line.contains("; another waits for it in the all-reduce of step 8"), "{line}");
    // A process of a service manager is started again at this code.
    hanging.expect_exit(75);
    hanging.assert_said("worker: given up by the coordinator: it lives but has not got on in phase compute");
    let mut replacement = coordinator.worker_of_rank(1);
    coordinator.expect_exit(0);
    steady.expect_exit(0);
    replacement.expect_exit(0);
    assert_trained_once(&cluster.trained_samples(), &SIZES);
}

#[test]
fn frozen_worker_whose_place_was_taken_leaves_with_one_line() {
    let cluster = twelve_steps();
    let mut coordinator = cluster.coordinator(2, &["--heartbeat-timeout", "2s"]);
    coordinator.allow_error(" lost at step ");
    let [mut steady, mut frozen] = [0, 1].map(|rank| coordinator.worker_of_rank(rank));
    coordinator.wait_for_step(2);
    frozen.signal(Signal::STOP);
    // Started at once: until the other is known to be dead its rank is taken.
    let mut replacement = coordinator.worker_of_rank(1);
    coordinator.wait_for(" lost at step ");
    coordinator.wait_for("g000002: 2 workers train from step ");
    frozen.signal(Signal::CONT);
    frozen.expect_exit(75);
    frozen.assert_said("worker: lost its place while it was away: rank 1 is taken by pid ");
    coordinator.expect_exit(0);
    steady.expect_exit(0);
    replacement.expect_exit(0);
    replacement.assert_said("trying for 2 s, as it may have died unnoticed");
    assert_trained_once(&cluster.trained_samples(), &SIZES);
}

#[test]
fn coordinator_that_stood_still_takes_nobody_for_dead() {
    // Longer than any worker may be silent; and, with a timeout of a slow network, longer than most are patient.
    for (timeout, still) in [("1s", Duration::from_millis(2500)), ("9s", Duration::from_millis(7500))] {
        let mut cluster = twelve_steps();
        cluster.job.set("train.epochs", 4);
        let mut coordinator = cluster.coordinator(2, &["--heartbeat-timeout", timeout]);
        let mut workers = [0, 1].map(|rank| coordinator.worker_of_rank(rank));
        coordinator.wait_for_step(2);
        coordinator.signal(Signal::STOP);
        std::thread::sleep(still);
        coordinator.signal(Signal::CONT);
        coordinator.expect_exit(0);
        workers.iter_mut().for_each(|worker| worker.expect_exit(0));
        coordinator.assert_said("the coordinator stood still for ");
        assert!(coordinator.lines_with(" lost at step ").is_empty() && coordinator.lines_with("g000002").is_empty());
    }
}

#[test]
fn source_that_stalls_for_good_ends_the_job_with_who_waited_for_what() {
    let server = FileServer::start();
    let mut cluster = twelve_steps();
    for (number, samples) in demo_samples(192).chunks(48).enumerate() {
        server.put(&format!("{number:05}.tar"), &tar_of(samples));
    }
    cluster.job.set("data.shards", vec![server.url("{00000..00003}.tar")]).set("data.read_timeout", "300ms");
    cluster.job.set("data.retries", 1).set("data.give_up_after", "1s");
    // The data threads read no further ahead than this, and never come to an end.
    cluster.job.set("data.buffer_bytes", 1 << 20).set_steps(100_000);
    let mut coordinator = cluster.coordinator(2, &["--local", "--max-restarts", "0"]);
    coordinator.wait_for_step(2);
    // It answers, and then nothing comes, on connections that stay open.
    server.set_habits(Habits { fails_every: Some((1, Fault::StallAfter(0))), ..Habits::default() });
    coordinator.expect_exit(1);
    let reason = coordinator.lines_with("coordinator: ").pop().unwrap();
    let named = reason.contains("coordinator: rank ") && reason.contains(" failed in phase data: read http://");
    assert!(named && reason.contains(".tar: ") && reason.contains("; given up after "), "{reason}");
}

#[test]
fn worker_that_runs_out_of_memory_goes_on_in_smaller_parts() {
    let cluster = twelve_steps();
    let mut coordinator = cluster.coordinator(2, &[]);
    let plan = FaultPlan::new().at(Point::RunOutOfMemory, 1, 3).at(Point::RunOutOfMemory, 1, 5);
    let [mut steady, mut short] = plan.workers(&coordinator, 2).try_into().unwrap();
    coordinator.expect_exit(0);
    steady.expect_exit(0);
    short.expect_exit(0);
    for parts in ["in 2 parts", "in 4 parts"] {
        short.assert_said(&format!("out of memory: micro-batches of 8 are computed {parts} from here on, with the same result"));
    }
    assert_trained_once(&cluster.trained_samples(), &SIZES);
}
