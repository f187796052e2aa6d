//! A job that was stopped goes on from its checkpoint and ends as if it had not been.

use peapod_tests::harness::{Cluster, Process, Signal, assert_trained_once, is_alive, poll};

const SIZES: [usize; 4] = [40, 40, 40, 40];

/// One epoch of ten steps.
fn ten_steps() -> Cluster {
    let mut cluster = Cluster::new();
    cluster.deal_samples(&SIZES);
    cluster
}

/// Mean feature loss over the last samples of the epoch, which half of it is.
fn late_loss(cluster: &Cluster) -> f64 {
    let (mut samples, mut sum) = (0, 0.0);
    for step in cluster.steps().iter().rev() {
        samples += step.samples;
        sum += step.feature * step.samples as f64;
        if samples >= 80 {
            break;
        }
    }
    sum / samples as f64
}

#[test]
fn job_stopped_by_ctrl_c_resumes_and_ends_as_an_unstopped_one() {
    let unstopped = ten_steps();
    unstopped.coordinator(2, &["--local"]).expect_exit(0);

    let cluster = ten_steps();
    let mut coordinator = cluster.coordinator(2, &["--local"]);
    coordinator.wait_for_step(3);
    coordinator.signal(Signal::INT);
    coordinator.expect_exit(130);
    coordinator.assert_said("Ctrl-C: ending the job with a checkpoint");
    let stopped_at = cluster.newest_checkpoint();
    assert_eq!(stopped_at.step, cluster.steps().last().unwrap().step, "everything done is kept");
    let trained = cluster.trained_samples().len() as u64;
    assert_eq!(stopped_at.ledger_total("committed"), trained);
    assert!(trained < 160, "the job was to be stopped in the middle");

    let mut coordinator = cluster.coordinator(2, &["--local"]);
    coordinator.expect_exit(0);
    coordinator.assert_said("resuming from ");
    coordinator.assert_said(&format!("2 workers train from step {} (from its checkpoint)", stopped_at.step));

    // Neither a sample is lost nor one trained twice, nor a step number given twice.
    assert_trained_once(&cluster.trained_samples(), &SIZES);
    let steps: Vec<u64> = cluster.steps().iter().map(|step| step.step).collect();
    assert_eq!(steps, (1..=steps.len() as u64).collect::<Vec<_>>());
    // The rest comes in another order, so the losses agree within what the order makes of them.
    let (resumed, straight) = (late_loss(&cluster), late_loss(&unstopped));
    println!("feature loss at the end: {resumed:.3} resumed, {straight:.3} unstopped");
    assert!((resumed / straight - 1.0).abs() < 0.25, "{resumed} after a stop, {straight} without");
}

#[test]
fn stopped_job_resumes_with_another_number_of_workers() {
    let cluster = ten_steps();
    let mut coordinator = cluster.coordinator(2, &["--local"]);
    coordinator.wait_for_step(3);
    coordinator.control(&["stop"]).expect_exit(0);
    coordinator.expect_exit(0);

    let mut coordinator = cluster.coordinator(1, &["--local"]);
    coordinator.expect_exit(0);
    coordinator.assert_said("1 worker trains from step ");
    assert_trained_once(&cluster.trained_samples(), &SIZES);
    assert_eq!(cluster.newest_checkpoint().ledger_total("committed"), 160);
}

#[test]
fn sigterm_ends_a_local_job_with_a_checkpoint_as_its_workers_die_with_it() {
    signals_end_a_local_job_with_a_checkpoint(&[Signal::TERM], 143);
}

#[test]
fn terminal_that_is_closed_ends_a_local_job_with_a_checkpoint() {
    // From the system, and from the shell that ran in it.
    signals_end_a_local_job_with_a_checkpoint(&[Signal::HUP, Signal::HUP], 129);
}

fn signals_end_a_local_job_with_a_checkpoint(signals: &[Signal], code: i32) {
    let mut cluster = Cluster::new();
    cluster.job.set_steps(100_000);
    let mut coordinator = cluster.coordinator(1, &["--local"]);
    coordinator.wait_for_step(1);
    for &signal in signals {
        coordinator.signal(signal);
        // Two that are sent at once may arrive as one.
        coordinator.wait_for(": ending the job with a checkpoint");
    }
    coordinator.expect_exit(code);
    assert_eq!(cluster.newest_checkpoint().step, cluster.steps().last().unwrap().step);
}

#[test]
fn job_whose_checkpoints_are_not_where_they_were_does_not_start_anew_by_itself() {
    let mut cluster = ten_steps();
    cluster.job.set("checkpoint.every_steps", 2);
    let mut coordinator = cluster.coordinator(1, &["--local"]);
    coordinator.wait_for("checkpoint of step 4 stored");
    coordinator.control(&["stop"]).expect_exit(0);
    coordinator.expect_exit(0);
    let stopped_at = cluster.newest_checkpoint().step;
    let steps = cluster.steps().len();

    // As where a disk is not mounted.
    let (here, away) = (cluster.state_dir().join("checkpoints"), cluster.state_dir().join("away"));
    std::fs::rename(&here, &away).unwrap();
    let mut coordinator = cluster.coordinator(1, &["--local"]);
    coordinator.expect_exit(2);
    let said = format!("the last run had stored a checkpoint of step {stopped_at}, and ");
    let reason = coordinator.lines_with(&said).pop().unwrap();
    assert!(reason.contains(" holds none: is it there, and mounted? To train from step 0 all the same, "), "{reason}");
    assert_eq!(cluster.steps().len(), steps, "nothing has changed");

    // Where an older one is left, the job goes on from it, and says what that costs.
    std::fs::remove_dir_all(&here).unwrap();
    std::fs::rename(&away, &here).unwrap();
    let newest = cluster.checkpoints().pop().unwrap();
    std::fs::remove_dir_all(newest.folder).unwrap();
    let older = cluster.newest_checkpoint().step;
    let mut coordinator = cluster.coordinator(1, &["--local"]);
    coordinator.expect_exit(0);
    let again = stopped_at - older;
    coordinator.assert_said(&format!("holds none after step {older}: {again} steps or more are trained again"));
    assert_eq!(cluster.newest_checkpoint().ledger_total("committed"), 160);
}

#[test]
fn killed_coordinator_leaves_no_orphans_and_the_job_resumes_from_its_last_checkpoint() {
    let mut cluster = ten_steps();
    cluster.job.set("checkpoint.every_steps", 2);
    let mut coordinator = cluster.coordinator(2, &["--local"]);
    coordinator.wait_for("checkpoint of step 4 stored");
    let workers = [0, 1].map(|rank| coordinator.pid_of_rank(rank));
    coordinator.signal(Signal::KILL);
    coordinator.wait();
    poll("the workers to follow their coordinator", || workers.iter().all(|&pid| !is_alive(pid)).then_some(()));

    let before = cluster.newest_checkpoint().step;
    let mut coordinator = cluster.coordinator(2, &["--local"]);
    coordinator.expect_exit(0);
    coordinator.assert_said(&format!("2 workers train from step {before} (from its checkpoint)"));
    // Steps beyond the checkpoint died with the weights they were in; in the weights that are left, every sample is once.
    assert_eq!(cluster.newest_checkpoint().ledger_total("committed"), 160);
}

#[test]
fn of_two_coordinators_on_one_store_the_older_one_ends() {
    let mut cluster = Cluster::new();
    let store = cluster.folder().join("store");
    cluster.job.set_steps(100_000).set("checkpoint.store", store.to_str().unwrap()).set("checkpoint.every_steps", 5);
    let mut older = cluster.coordinator(1, &["--local"]);
    older.wait_for("checkpoint of step 5 stored");
    older.signal(Signal::STOP);

    let [job, state] = ["job.toml", "other-state"].map(|name| cluster.folder().join(name).to_str().unwrap().to_owned());
    let arguments = ["--world-size", "1", "--local", "--listen", "127.0.0.1:0", "--http-addr", "off", "--job", &job, "--state-dir", &state];
    let mut newer = Process::start("newer", "coordinator", &arguments);
    newer.wait_for("if that lives, it ends at its next checkpoint");
    newer.wait_for("1 worker trains from step ");
    older.signal(Signal::CONT);
    older.expect_exit(1);
    older.assert_said("two must not write there, and this is the older one");

    let own = newer.lines_with("stored").len();
    newer.wait_for_times("stored", own + 1);
    newer.signal(Signal::INT);
    newer.expect_exit(130);

    // Whatever starts it again, it does not take the store back.
    let mut older = cluster.coordinator(1, &["--local"]);
    older.expect_exit(2);
    older.assert_said("has taken over");
    older.assert_said("to take it back, give another --state-dir");
}

#[test]
fn finished_job_has_nothing_left_to_do_and_its_state_belongs_to_it_alone() {
    let mut cluster = Cluster::new();
    cluster.job.set_steps(2);
    cluster.coordinator(1, &["--local"]).expect_exit(0);

    let mut again = cluster.coordinator(1, &["--local"]);
    again.expect_exit(0);
    again.assert_said("the job is finished already");

    cluster.job.set("seed", 2).set("adapter.hidden", 128);
    let mut other = cluster.coordinator(1, &["--local"]);
    other.expect_exit(2);
    other.assert_said("belongs to another job");
    other.assert_said("seed: 1 in the checkpoint, 2 in the job file");
    other.assert_said("adapter.hidden: 256 in the checkpoint, 128 in the job file");

    // What may change, may: a finished job goes on when it is made longer.
    cluster.job.set("seed", 1).set("adapter.hidden", 256).set("train.steps", 3).set("train.learning_rate", 1e-3);
    let mut longer = cluster.coordinator(1, &["--local"]);
    longer.expect_exit(0);
    longer.assert_said("its new settings hold from here on");
    assert_eq!(cluster.newest_checkpoint().step, 3);
}

#[test]
fn damaged_checkpoint_is_named_and_not_passed_over() {
    let mut cluster = Cluster::new();
    cluster.job.set_steps(2).set("checkpoint.every_steps", 1);
    cluster.coordinator(1, &["--local"]).expect_exit(0);
    let adapter = cluster.newest_checkpoint().folder.join("adapter.safetensors");
    std::fs::write(&adapter, b"half").unwrap();

    cluster.job.set_steps(4);
    let mut coordinator = cluster.coordinator(1, &["--local"]);
    coordinator.expect_exit(1);
    coordinator.assert_said("is damaged: adapter.safetensors has 4 bytes, the manifest says ");
}
