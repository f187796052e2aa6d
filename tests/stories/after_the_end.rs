//! A job that is over, for those who come afterwards: people who look, controllers that start everything again, workers that are late.

use peapod_tests::harness::{Cluster, Coordinator, Process, Signal};

fn two_steps() -> Cluster {
    let mut cluster = Cluster::new();
    cluster.job.set_steps(2);
    cluster
}

/// What `coordinator status` says first.
#[track_caller]
fn status(coordinator: &Coordinator) -> String {
    let mut status = coordinator.control(&["status"]);
    status.expect_exit(0);
    status.lines_with(", step ").first().cloned().expect("a state and a step")
}

#[track_caller]
fn assert_not_needed(mut late: Process) {
    late.expect_exit(0);
    late.assert_said("no worker is needed any more");
}

#[test]
fn coordinator_that_stays_shows_the_finished_job_also_when_it_is_started_again() {
    let cluster = two_steps();
    let mut coordinator = cluster.coordinator(1, &["--stay"]);
    coordinator.worker_of_rank(0).expect_exit(0);
    coordinator.wait_for("page and status stay until a signal");
    assert!(status(&coordinator).contains("finished, step 2 of 2"));
    assert_not_needed(coordinator.worker("late", &[]));
    coordinator.signal(Signal::TERM);
    coordinator.expect_exit(0);

    let mut again = cluster.coordinator(1, &["--stay"]);
    again.wait_for("the job is finished already");
    assert!(status(&again).contains("finished, step 2 of 2"));
    assert_not_needed(again.worker("late", &["--rank", "0"]));
    again.control(&["stop"]).expect_exit(0);
    assert!(status(&again).contains("finished"), "there is nothing to stop");
    again.assert_said("page and status stay");
    again.signal(Signal::TERM);
    again.expect_exit(0);
    assert!(again.lines_with("start on each host").is_empty());
    assert_eq!((cluster.steps().len(), cluster.checkpoints().len()), (2, 1));
}

#[test]
fn stopped_job_is_shown_as_stopped_and_goes_on_at_the_next_start() {
    let mut cluster = Cluster::new();
    cluster.job.set_steps(100_000);
    let mut coordinator = cluster.coordinator(1, &["--stay"]);
    let mut worker = coordinator.worker_of_rank(0);
    coordinator.wait_for_step(2);
    coordinator.control(&["stop"]).expect_exit(0);
    worker.expect_exit(0);
    coordinator.wait_for("page and status stay until a signal");
    assert!(status(&coordinator).contains(": stopped, step "));
    coordinator.signal(Signal::TERM);
    coordinator.expect_exit(0);

    let step = cluster.newest_checkpoint().step;
    cluster.job.set_steps(u32::try_from(step).unwrap() + 1);
    let mut longer = cluster.coordinator(1, &["--stay"]);
    longer.worker_of_rank(0).expect_exit(0);
    longer.assert_said(&format!("1 worker trains from step {step} (from its checkpoint)"));
    longer.wait_for("page and status stay until a signal");
    longer.signal(Signal::INT);
    longer.expect_exit(0);
}

#[test]
fn who_asks_after_the_end_is_told_how_the_last_run_from_the_folder_ended() {
    let mut cluster = Cluster::new();
    let state_dir = cluster.state_dir();
    let ask = |command: &str| {
        let mut asked = Process::start(command, "coordinator", &[command, "--state-dir", state_dir.to_str().unwrap()]);
        asked.expect_exit(1);
        asked.lines().pop().unwrap()
    };
    let from = format!("coordinator: no coordinator runs from {}: ", state_dir.display());
    assert_eq!(ask("status"), format!("{from}there is no address in it"));
    cluster.job.set_steps(100_000);
    let mut coordinator = cluster.coordinator(1, &["--local"]);
    coordinator.wait_for_step(2);
    coordinator.control(&["stop"]).expect_exit(0);
    coordinator.expect_exit(0);
    let step = cluster.newest_checkpoint().step;
    let stopped = format!("{from}its job was stopped at step {step}: stopped on request; the same command goes on with it");
    assert_eq!([ask("status"), ask("stop")], [stopped.clone(), stopped]);

    let mut again = cluster.coordinator(1, &[]);
    let url = again.url();
    again.wait_for("waiting for rank 0");
    again.signal(Signal::KILL);
    again.wait();
    assert_eq!(
        ask("status"),
        format!(
            "coordinator: no coordinator answers at {url}: the last one was killed, or its machine failed; the same command goes on with the job"
        )
    );

    cluster.job.set_steps(u32::try_from(step).unwrap() + 1);
    cluster.coordinator(1, &["--local"]).expect_exit(0);
    assert_eq!(ask("stop"), format!("{from}its job is finished, at step {}", step + 1));
}

#[test]
fn ctrl_c_ends_a_coordinator_that_would_stay() {
    let mut cluster = Cluster::new();
    cluster.job.set_steps(100_000);
    let mut coordinator = cluster.coordinator(1, &["--stay"]);
    let mut worker = coordinator.worker_of_rank(0);
    coordinator.wait_for_step(1);
    coordinator.signal(Signal::INT);
    coordinator.expect_exit(130);
    worker.expect_exit(0);
}

#[test]
fn job_of_epochs_is_known_to_be_finished_too() {
    let mut cluster = Cluster::new();
    cluster.deal_samples(&[16, 16]);
    let mut coordinator = cluster.coordinator(1, &[]);
    coordinator.worker_of_rank(0).expect_exit(0);
    coordinator.expect_exit(0);

    let mut again = cluster.coordinator(1, &[]);
    again.expect_exit(0);
    again.assert_said("the job is finished already");
    again.assert_said("train.epochs is 1");

    cluster.job.set_epochs(2);
    let mut longer = cluster.coordinator(1, &[]);
    longer.worker_of_rank(0).expect_exit(0);
    longer.expect_exit(0);
    assert_eq!(cluster.newest_checkpoint().ledger_total("committed"), 64);
}
