//! Workers come, go, die, freeze and ask for what they cannot have; the job goes on exactly, or says why not.

use std::net::TcpListener;

use peapod_tests::harness::{Cluster, Coordinator, Process, Signal, assert_trained_once, kill, workspace};

const SIZES: [usize; 4] = [48, 48, 48, 48];

/// One epoch of twelve steps: long enough to break into.
fn twelve_steps() -> Cluster {
    let mut cluster = Cluster::new();
    cluster.deal_samples(&SIZES);
    cluster
}

fn two_workers(coordinator: &Coordinator) -> [Process; 2] {
    [0, 1].map(|rank| coordinator.worker_of_rank(rank))
}

/// What every disturbed epoch must come to.
#[track_caller]
fn assert_whole(cluster: &Cluster) {
    assert_trained_once(&cluster.trained_samples(), &SIZES);
    assert_eq!(cluster.newest_checkpoint().ledger_total("committed"), 192);
}

#[test]
fn replacement_of_a_killed_worker_finishes_the_epoch_exactly() {
    let cluster = twelve_steps();
    let mut coordinator = cluster.coordinator(2, &[]);
    let [mut survivor, mut victim] = two_workers(&coordinator);
    coordinator.wait_for_step(3);
    victim.signal(Signal::KILL);
    victim.wait();

    coordinator.allow_error(" lost at step ");
    coordinator.wait_for("rank 1 (pid ");
    coordinator.wait_for(" lost at step ");
    // It is said at once, and again every few seconds.
    let line = coordinator.wait_for_times("waiting for rank 1; giving up in ", 2);
    assert!(line.ends_with(" s (--join-timeout)"), "{line}");
    assert!(coordinator.is_running() && survivor.is_running());

    let mut replacement = coordinator.worker_of_rank(1);
    coordinator.expect_exit(0);
    survivor.expect_exit(0);
    replacement.expect_exit(0);
    assert_whole(&cluster);
}

#[test]
fn job_without_a_replacement_ends_with_its_first_failure() {
    let cluster = twelve_steps();
    let mut coordinator = cluster.coordinator(2, &["--join-timeout", "3s"]);
    let [mut survivor, victim] = two_workers(&coordinator);
    coordinator.wait_for_step(2);
    let pid = victim.id();
    victim.signal(Signal::KILL);

    coordinator.expect_exit(1);
    let reason = coordinator.lines_with("coordinator: ").pop().unwrap();
    assert!(reason.starts_with(&format!("coordinator: rank 1 (pid {pid} on ")), "{reason}");
    assert!(reason.contains(" lost at step ") && reason.contains(" in phase "), "{reason}");
    assert!(reason.ends_with("; then waiting for rank 1 for 3 s (--join-timeout)"), "{reason}");
    survivor.expect_exit(1);
    survivor.assert_said("the job failed: rank 1 ");
}

#[test]
fn local_coordinator_starts_a_dead_worker_again() {
    let cluster = twelve_steps();
    let mut coordinator = cluster.coordinator(2, &["--local"]);
    coordinator.wait_for_step(3);
    let before = coordinator.pid_of_rank(0);
    // The one that makes the bootstrap and sends the checkpoints.
    kill(before);
    coordinator.allow_error(" lost at step ");
    coordinator.expect_exit(0);
    coordinator.assert_said("worker of rank 0 was killed by signal 9 (SIGKILL");
    coordinator.assert_said("starting it again (restart 1 of 3 since the newest checkpoint)");
    assert_ne!(coordinator.pid_of_rank(0), before);
    assert_whole(&cluster);
}

#[test]
fn restarts_are_not_without_end() {
    let cluster = twelve_steps();
    let mut coordinator = cluster.coordinator(2, &["--local", "--max-restarts", "0"]);
    coordinator.wait_for_step(2);
    kill(coordinator.pid_of_rank(1));
    coordinator.expect_exit(1);
    coordinator.assert_said("worker of rank 1 was killed by signal 9");
    coordinator.assert_said("no restart is left (--max-restarts 0)");
}

#[test]
fn job_that_loses_all_its_workers_goes_back_to_its_checkpoint() {
    let mut cluster = twelve_steps();
    cluster.job.set("checkpoint.every_steps", 4);
    let mut coordinator = cluster.coordinator(2, &["--local"]);
    coordinator.wait_for("checkpoint of step 4 stored");
    coordinator.wait_for_step(6);
    for rank in [0, 1] {
        kill(coordinator.pid_of_rank(rank));
    }
    coordinator.allow_error(" lost at step ");
    coordinator.allow_error("no worker that held step ");
    coordinator.expect_exit(0);
    coordinator.assert_said(": going back to step 4, ");
    coordinator.assert_said("2 workers train from step 4 (from its checkpoint)");
    // Steps were trained again, so the log has samples twice; the weights have not.
    assert_eq!(cluster.newest_checkpoint().ledger_total("committed"), 192);
}

#[test]
fn workers_are_replaced_one_after_the_other_without_losing_a_step() {
    let cluster = twelve_steps();
    let mut coordinator = cluster.coordinator(2, &[]);
    let [mut drained, mut terminated] = two_workers(&coordinator);
    coordinator.wait_for_step(2);

    coordinator.control(&["drain", "0"]).expect_exit(0);
    drained.expect_exit(0);
    drained.assert_said("left the job: ");
    coordinator.wait_for("waiting for rank 0");
    // Without --rank the free one is assigned.
    let mut first = coordinator.worker("first replacement", &[]);
    coordinator.wait_for_times(" workers train from step ", 2);
    let step = cluster.steps().last().unwrap().step;
    coordinator.wait_for_step(step + 1);

    terminated.signal(Signal::TERM);
    terminated.expect_exit(143);
    terminated.assert_said("left the job: SIGTERM");
    let mut second = coordinator.worker("second replacement", &[]);
    coordinator.expect_exit(0);
    first.expect_exit(0);
    second.expect_exit(0);
    // Leaving is not failing: nothing was dropped, so no step was computed twice.
    assert!(coordinator.lines_with("is broken up").is_empty());
    assert_whole(&cluster);

    let mut nobody = Process::start("drain", "coordinator", &["drain", "0", "--coordinator", &coordinator.url()]);
    nobody.expect_exit(1);
    nobody.assert_said("no coordinator answers at http://127.0.0.1:");
}

#[test]
fn frozen_worker_is_dead_until_it_thaws() {
    let cluster = twelve_steps();
    let mut coordinator = cluster.coordinator(2, &["--heartbeat-timeout", "2s"]);
    let [mut steady, mut frozen] = two_workers(&coordinator);
    coordinator.wait_for_step(2);
    frozen.signal(Signal::STOP);
    coordinator.allow_error(" lost at step ");
    coordinator.wait_for(" lost at step ");
    coordinator.wait_for("waiting for rank 1");
    frozen.signal(Signal::CONT);
    coordinator.expect_exit(0);
    steady.expect_exit(0);
    frozen.expect_exit(0);
    frozen.assert_said("lost the coordinator");
    assert_whole(&cluster);
}

#[test]
fn world_that_cannot_form_says_who_is_missing_and_refuses_who_does_not_fit() {
    let cluster = Cluster::new();
    let mut coordinator = cluster.coordinator(4, &["--join-timeout", "8s"]);
    let mut waiting = coordinator.worker_of_rank(1);
    coordinator.wait_for(" is ready");

    let mut beyond = coordinator.worker_of_rank(7);
    beyond.expect_exit(2);
    beyond.assert_said("worker: rank 7 does not exist: the ranks of this job are 0..=3 (--world-size 4)");
    let mut doubled = coordinator.worker_of_rank(1);
    doubled.expect_exit(2);
    doubled.assert_said(&format!("worker: rank 1 is taken by pid {} on ", waiting.id()));
    doubled.assert_said("give each worker its own --rank, or none");

    coordinator.wait_for("waiting for ranks 0, 2-3");
    coordinator.expect_exit(1);
    coordinator.assert_said("coordinator: waiting for ranks 0, 2-3 for 8 s (--join-timeout)");
    waiting.expect_exit(1);
    waiting.assert_said("the job failed: waiting for ranks 0, 2-3");
}

#[test]
fn elastic_world_trains_on_with_whom_it_has_and_lets_a_newcomer_in() {
    let mut cluster = Cluster::new();
    cluster.deal_samples(&[160, 160]);
    let mut coordinator = cluster.coordinator(2, &["--min-world-size", "1"]);
    coordinator.wait_for("job demo: 1 to 2 workers");
    let [mut survivor, mut victim] = two_workers(&coordinator);
    coordinator.wait_for_step(3);
    coordinator.allow_error(" lost at step ");
    victim.signal(Signal::KILL);
    victim.wait();
    coordinator.wait_for("g000002: 1 worker trains from step ");
    let mut newcomer = coordinator.worker("newcomer", &[]);
    coordinator.wait_for("rank 1 joins: the workers meet after this step");
    coordinator.wait_for("g000003: 2 workers train from step ");
    coordinator.expect_exit(0);
    survivor.expect_exit(0);
    newcomer.expect_exit(0);
    assert!(coordinator.lines_with("waiting for workers").is_empty(), "nobody waited");
    assert_trained_once(&cluster.trained_samples(), &[160, 160]);
    let alone = coordinator.lines_with("g000003: 2 workers train from step ").pop().unwrap();
    let alone: usize = alone.rsplit(' ').next().unwrap().parse().unwrap();
    assert!(alone > 3 && cluster.steps()[..alone].iter().all(|step| step.samples == 16), "one worker does the whole batch");
}

#[test]
fn worker_beyond_the_world_waits_as_a_spare_and_stands_in_for_a_dead_one() {
    let cluster = twelve_steps();
    let mut coordinator = cluster.coordinator(2, &[]);
    let [mut survivor, mut victim] = two_workers(&coordinator);
    coordinator.wait_for_step(1);
    let mut spare = coordinator.worker("spare", &[]);
    spare.wait_for("joined as a spare, rank 2: stands in when one of the 2 workers is lost");
    coordinator.wait_for("rank 2 (pid ");
    coordinator.wait_for(" is ready");
    coordinator.wait_for_times(" is ready", 3);
    assert!(coordinator.lines_with("meet after this step").is_empty(), "a full world takes no notice");
    coordinator.allow_error(" lost at step ");
    victim.signal(Signal::KILL);
    victim.wait();
    coordinator.expect_exit(0);
    survivor.expect_exit(0);
    spare.expect_exit(0);
    coordinator.assert_said("g000002: 2 workers train from step ");
    assert_whole(&cluster);
}

#[test]
fn spare_on_whose_disk_the_model_is_missing_is_no_end_to_the_job() {
    let mut cluster = twelve_steps();
    let model = cluster.folder().join("model");
    std::os::unix::fs::symlink(workspace().join("tests/demo/model"), &model).unwrap();
    cluster.job.set("model.path", model.to_str().unwrap());
    let mut coordinator = cluster.coordinator(1, &[]);
    let mut worker = coordinator.worker_of_rank(0);
    coordinator.wait_for(" is ready");
    std::fs::remove_file(&model).unwrap();
    coordinator.allow_error(" lost at step ");
    let mut spare = coordinator.worker("spare", &[]);
    spare.expect_exit(1);
    coordinator.wait_for("rank 1 (pid ");
    coordinator.wait_for(" failed in phase loading: ");
    coordinator.expect_exit(0);
    worker.expect_exit(0);
    assert!(coordinator.lines_with("first failure").is_empty());
    assert_whole(&cluster);
}

#[test]
fn worker_that_finds_no_coordinator_says_where_it_looked() {
    let free = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", free.local_addr().unwrap());
    drop(free);
    let mut worker = Process::start("worker", "worker", &["--coordinator", &url, "--connect-timeout", "1s"]);
    worker.expect_exit(75);
    worker.assert_said(&format!("worker: no coordinator answers at {url}"));

    // Without it the coordinator may take ten minutes to start; who does not want to wait is told what was left.
    let mut waiting = Process::start("waiting", "worker", &["--coordinator", &url]);
    let line = waiting.wait_for(&format!("no coordinator answers at {url} yet ("));
    assert!(line.contains("waiting for it to be started, another 10m") || line.contains("another 9m"), "{line}");
    waiting.signal(Signal::INT);
    waiting.expect_exit(130);
    let last = waiting.lines().pop();
    assert_eq!(last, Some(format!("worker: Ctrl-C: left before a coordinator answered at {url}")));
}

#[test]
fn who_is_given_the_port_of_the_page_is_told_so() {
    let cluster = twelve_steps();
    let mut coordinator = cluster.coordinator(1, &[]);
    let line = coordinator.wait_for("live page and metrics on http://");
    let page = line.split_once("http://").unwrap().1.trim_end_matches('/');
    let plain = format!("http://{page}");
    let words = "the coordinator refuses: this is the port of the live page; workers and commands connect to the one of --listen";
    let mut worker = Process::start("worker", "worker", &["--coordinator", &plain]);
    worker.expect_exit(2);
    worker.assert_said(&format!("worker: {words}"));
    let mut status = Process::start("status", "coordinator", &["status", "--coordinator", &plain]);
    status.expect_exit(1);
    status.assert_said(words);
    // With a join string whose port was changed.
    let join = format!("peapod://0123456789abcdef@{page}/{}", "0".repeat(64));
    let mut joining = Process::start("joining", "worker", &["--join", &join]);
    joining.expect_exit(2);
    joining.assert_said("it speaks without TLS: ");
    joining.assert_said("(or the port is that of its live page)");
    coordinator.worker("right", &[]).expect_exit(0);
    coordinator.expect_exit(0);
}

#[test]
fn worker_gives_up_on_a_coordinator_that_vanished() {
    let mut cluster = Cluster::new();
    cluster.job.set_steps(100_000);
    let mut coordinator = cluster.coordinator(1, &[]);
    let mut worker = coordinator.worker("worker", &["--connect-timeout", "1s"]);
    coordinator.wait_for_step(1);
    coordinator.signal(Signal::KILL);
    coordinator.wait();
    worker.expect_exit(75);
    worker.assert_said("lost the coordinator");
    worker.assert_said(&format!("worker: no coordinator answers at {}", coordinator.url()));
}

#[test]
fn worker_of_a_run_with_another_job_file_is_sent_away_to_be_started_again() {
    let mut cluster = Cluster::new();
    cluster.job.set_steps(100_000).set("checkpoint.every_steps", 2);
    let mut coordinator = cluster.coordinator(1, &[]);
    let mut old = coordinator.worker("worker of the first run", &[]);
    coordinator.wait_for("checkpoint of step 2 stored");
    let address = coordinator.url().trim_start_matches("http://").to_owned();
    coordinator.signal(Signal::KILL);
    coordinator.wait();

    cluster.job.set("train.learning_rate", 1e-3);
    let mut coordinator = cluster.coordinator(1, &["--listen", &address]);
    coordinator.wait_for("the run in the journal has another job file");
    // 75 is EX_TEMPFAIL: a service manager starts the worker again.
    old.expect_exit(75);
    old.assert_said("the coordinator was started anew and no longer knows this run; start the worker again to resume from its checkpoint");
    coordinator.allow_error(" lost at step ");
    let mut new = coordinator.worker("worker of the second run", &[]);
    coordinator.wait_for("(from its checkpoint)");
    coordinator.signal(Signal::INT);
    coordinator.expect_exit(130);
    new.expect_exit(0);
}
