//! The coordinator dies or is stopped, and another one goes on with the same workers: no step, no sample is lost.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use peapod_tests::harness::{Cluster, Coordinator, Signal, assert_epochs_trained_once, assert_trained_once, poll};

const SIZES: [usize; 4] = [160, 160, 160, 160];

/// One epoch of forty steps.
fn forty_steps() -> Cluster {
    let mut cluster = Cluster::new();
    cluster.deal_samples(&SIZES);
    cluster
}

fn address(coordinator: &Coordinator) -> String {
    coordinator.url().trim_start_matches("http://").to_owned()
}

/// The steps in the step log are 1, 2, 3 and so on.
#[track_caller]
fn assert_steps_follow_each_other(cluster: &Cluster) {
    let steps: Vec<u64> = cluster.steps().iter().map(|step| step.step).collect();
    assert_eq!(steps, (1..=steps.len() as u64).collect::<Vec<_>>());
}

#[test]
fn killed_coordinator_is_started_again_and_finds_its_workers_training() {
    let cluster = forty_steps();
    let mut coordinator = cluster.coordinator(2, &[]);
    let mut workers = [0, 1].map(|rank| coordinator.worker_of_rank(rank));
    coordinator.wait_for_step(4);
    let address = address(&coordinator);
    coordinator.signal(Signal::KILL);
    coordinator.wait();
    let before = cluster.steps().last().unwrap().step;
    for worker in &workers {
        worker.wait_for("training on and connecting again");
    }

    let mut coordinator = cluster.coordinator(2, &["--listen", &address]);
    coordinator.wait_for("going on with the run of ");
    let line = coordinator.wait_for("g000001 goes on: it was trained by 2 workers meanwhile, to step ");
    let (_, step) = line.split_once("to step ").unwrap();
    let step: u64 = step.split(' ').next().unwrap().parse().unwrap();
    assert!(step >= before, "at step {step}, yet {before} was final");
    coordinator.expect_exit(0);
    assert!(coordinator.lines_with("train from step").is_empty(), "nothing was formed anew");
    for worker in &mut workers {
        worker.expect_exit(0);
        let joined = worker.lines_with("joined as rank ");
        let rank = |line: &String| line.split_once("joined as ").map(|(_, rank)| rank.to_owned());
        assert!(joined.len() == 2 && rank(&joined[0]) == rank(&joined[1]), "twice, under one rank: {joined:?}");
    }
    assert!(coordinator.lines_with("from its checkpoint").is_empty());
    assert_trained_once(&cluster.trained_samples(), &SIZES);
    assert_steps_follow_each_other(&cluster);
    assert_eq!(cluster.newest_checkpoint().ledger_total("committed"), 640);
}

#[test]
fn sigterm_stops_the_coordinator_alone() {
    let cluster = forty_steps();
    let mut coordinator = cluster.coordinator(2, &[]);
    let mut workers = [0, 1].map(|rank| coordinator.worker_of_rank(rank));
    coordinator.wait_for_step(3);
    let address = address(&coordinator);
    coordinator.signal(Signal::TERM);
    coordinator.expect_exit(143);
    coordinator.assert_said("the workers keep what they hold and wait");
    assert!(cluster.checkpoints().is_empty(), "none is needed");
    assert!(workers.iter_mut().all(|worker| worker.is_running()));

    let mut coordinator = cluster.coordinator(2, &["--listen", &address]);
    coordinator.expect_exit(0);
    for worker in &mut workers {
        worker.expect_exit(0);
    }
    assert_trained_once(&cluster.trained_samples(), &SIZES);
    assert_steps_follow_each_other(&cluster);
}

#[test]
fn coordinator_whose_workers_are_gone_too_goes_back_to_its_checkpoint() {
    let mut cluster = forty_steps();
    cluster.job.set("checkpoint.every_steps", 4);
    let mut coordinator = cluster.coordinator(2, &[]);
    let workers = [0, 1].map(|rank| coordinator.worker_of_rank(rank));
    coordinator.wait_for("checkpoint of step 4 stored");
    coordinator.wait_for_step(6);
    coordinator.signal(Signal::KILL);
    coordinator.wait();
    drop(workers);

    let mut coordinator = cluster.coordinator(2, &[]);
    coordinator.allow_error("no worker that held step ");
    let mut workers = [0, 1].map(|rank| coordinator.worker_of_rank(rank));
    coordinator.expect_exit(0);
    coordinator.assert_said("2 workers train from step ");
    coordinator.assert_said("(from its checkpoint)");
    for worker in &mut workers {
        worker.expect_exit(0);
    }
    // The logs followed the weights back.
    assert_trained_once(&cluster.trained_samples(), &SIZES);
    assert_steps_follow_each_other(&cluster);
}

#[test]
fn journal_of_another_job_or_of_no_use_is_named() {
    let mut cluster = forty_steps();
    let mut coordinator = cluster.coordinator(1, &[]);
    let worker = coordinator.worker_of_rank(0);
    coordinator.wait_for_step(2);
    coordinator.signal(Signal::TERM);
    coordinator.expect_exit(143);
    drop(worker);

    cluster.job.set("seed", 2);
    let mut other = cluster.coordinator(1, &[]);
    other.expect_exit(2);
    other.assert_said("journal.redb belongs to another job:");
    other.assert_said("seed: 1 in the journal, 2 in the job file");

    cluster.job.set("seed", 1);
    std::fs::write(cluster.state_dir().join("journal.redb"), b"no journal").unwrap();
    let mut damaged = cluster.coordinator(1, &[]);
    damaged.expect_exit(1);
    damaged.assert_said("journal.redb cannot be opened: ");
    damaged.assert_said("to go on from the newest checkpoint without it, move this file away");
}

#[test]
fn each_epoch_holds_each_sample_once_through_all_that_can_happen() {
    let mut cluster = forty_steps();
    cluster.job.set_epochs(2).set("checkpoint.every_steps", 5);
    // Three workers, one of them killed twice and replaced.
    let mut coordinator = cluster.coordinator(3, &[]);
    coordinator.allow_error(" lost at step ");
    let address = address(&coordinator);
    let mut steady = [0, 1].map(|rank| coordinator.worker_of_rank(rank));
    let mut victim = coordinator.worker_of_rank(2);
    for step in [6, 12] {
        coordinator.wait_for_step(step);
        victim.signal(Signal::KILL);
        victim.wait();
        victim = coordinator.worker_of_rank(2);
    }
    coordinator.wait_for_step(18);

    // The coordinator stopped and started.
    coordinator.signal(Signal::TERM);
    coordinator.expect_exit(143);
    let mut coordinator = cluster.coordinator(3, &["--listen", &address]);
    coordinator.wait_for("going on with the run of ");
    coordinator.wait_for_step(26);

    // The job stopped, and resumed with one worker and then with four.
    coordinator.control(&["stop"]).expect_exit(0);
    coordinator.expect_exit(0);
    for worker in steady.iter_mut().chain([&mut victim]) {
        worker.allow_error("checkpoint of step ");
        worker.expect_exit(0);
    }
    let stopped_at = cluster.newest_checkpoint().step;
    let mut coordinator = cluster.coordinator(1, &["--local"]);
    coordinator.wait_for_step(stopped_at + 6);
    coordinator.signal(Signal::INT);
    coordinator.expect_exit(130);
    let mut coordinator = cluster.coordinator(4, &["--local"]);
    coordinator.expect_exit(0);

    assert_epochs_trained_once(&cluster.trained_samples(), &SIZES, 2);
    assert_steps_follow_each_other(&cluster);
    assert_eq!(cluster.newest_checkpoint().ledger_total("committed"), 1280);
    poll("the sample log to be whole", || (cluster.trained_samples().len() == 1280).then_some(()));
}

/// A file system of its own in a folder, for as long as this lives.
struct Mounted(PathBuf);

impl Mounted {
    fn tmpfs(folder: &Path, size: &str) -> Self {
        std::fs::create_dir_all(folder).unwrap();
        let mount = Command::new("mount").args(["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs"]).arg(folder).status();
        assert!(mount.is_ok_and(|status| status.success()), "cannot mount a file system on {}", folder.display());
        Self(folder.to_owned())
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(&self.0).status();
    }
}

#[test]
#[ignore = "mounts a file system of its own (root); `make test-all` runs it"]
fn full_disk_costs_checkpoints_and_no_sample() {
    let mut cluster = forty_steps();
    cluster.job.set("checkpoint.every_steps", 4);
    let _disk = Mounted::tmpfs(&cluster.state_dir(), "32m");
    let mut coordinator = cluster.coordinator(2, &[]);
    let mut workers = [0, 1].map(|rank| coordinator.worker_of_rank(rank));
    let address = address(&coordinator);
    coordinator.wait_for("checkpoint of step 4 stored");
    let filler = cluster.state_dir().join("filler");
    let mut file = std::fs::File::create(&filler).unwrap();
    while file.write_all(&[1; 4096]).is_ok() {}
    drop(file);
    // Its journal may have had room left, or not.
    poll("the disk to be noticed", || {
        let is_noticed = !coordinator.is_running() || !coordinator.lines_with("No space left on device").is_empty();
        is_noticed.then_some(())
    });
    std::fs::remove_file(&filler).unwrap();
    if !coordinator.is_running() {
        coordinator.expect_exit(1);
        coordinator.assert_said("once it can be, the same command goes on with the job");
        coordinator = cluster.coordinator(2, &["--listen", &address]);
    }
    // Not without an error: a checkpoint is missing.
    assert_eq!(coordinator.wait().code(), Some(0));
    workers.iter_mut().for_each(|worker| assert_eq!(worker.wait().code(), Some(0)));
    assert_eq!(cluster.newest_checkpoint().ledger_total("committed"), 640);
}
