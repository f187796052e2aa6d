//! A real process fails at an exact point of a step: the ranks come to one state, bit by bit, and each sample is trained once.
//!
//! Every second step is a checkpoint, and with each the coordinator compares the digests of what the ranks hold: ranks that diverged would
//! end the job.

use std::collections::BTreeMap;

use peapod_tests::harness::{Cluster, Coordinator, FaultPlan, Point, Process, Signal, assert_trained_once};

const SIZES: [usize; 4] = [48, 48, 48, 48];

/// One epoch of twelve steps.
fn twelve_steps() -> Cluster {
    let mut cluster = Cluster::new();
    cluster.deal_samples(&SIZES);
    cluster.job.set("checkpoint.every_steps", 2);
    cluster
}

/// Ends a story: everybody left in order, no sample is lost or doubled, and the steps follow each other.
#[track_caller]
fn finish<'a>(cluster: &Cluster, coordinator: &mut Coordinator, workers: impl IntoIterator<Item = &'a mut Process>) {
    coordinator.expect_exit(0);
    for worker in workers {
        // One of weights that did not last.
        worker.allow_error("checkpoint of step ");
        worker.expect_exit(0);
    }
    assert_trained_once(&cluster.trained_samples(), &SIZES);
    let steps: Vec<u64> = cluster.steps().iter().map(|step| step.step).collect();
    // More than twelve where shards changed hands: the last steps are short of samples on one rank then.
    let last = steps.len() as u64;
    assert_eq!(steps, (1..=last).collect::<Vec<_>>());
    let newest = cluster.newest_checkpoint();
    assert_eq!((newest.step, newest.ledger_total("committed")), (last, 192));
}

/// The weights and the optimiser's state of a finished job, as digests.
fn final_state(cluster: &Cluster) -> BTreeMap<String, String> {
    let mut parts = cluster.newest_checkpoint().parts;
    parts.retain(|name, _| name.ends_with(".safetensors"));
    assert!(parts.contains_key("optimizer.safetensors"), "{parts:?}");
    parts
}

/// Where an undisturbed run of two workers ends.
fn undisturbed() -> BTreeMap<String, String> {
    let cluster = twelve_steps();
    let mut coordinator = cluster.coordinator(2, &[]);
    let mut workers = FaultPlan::new().workers(&coordinator, 2);
    finish(&cluster, &mut coordinator, &mut workers);
    final_state(&cluster)
}

#[test]
fn all_reduce_that_fails_with_nobody_dead_is_done_again_to_the_same_weights() {
    let cluster = twelve_steps();
    let mut coordinator = cluster.coordinator(2, &[]);
    // It finishes on the other rank, first with the one that tells the samples and then with the one that does not.
    let plan = FaultPlan::new().fail_all_reduce(1, 3).fail_all_reduce(0, 5);
    // It finishes nowhere.
    let plan = plan.at(Point::RefuseAllReduce, 1, 7).at(Point::RefuseAllReduce, 0, 9);
    let mut workers = plan.workers(&coordinator, 2);
    finish(&cluster, &mut coordinator, &mut workers);
    let formed: Vec<String> = coordinator.lines_with(": 2 workers train from step ");
    let bases: Vec<&str> = formed.iter().filter_map(|line| line.rsplit(' ').next()).collect();
    assert_eq!(bases, ["0", "3", "5", "6", "8"], "what one rank holds is the truth, what none holds is not");
    assert!(coordinator.lines_with(" lost at step ").is_empty(), "nobody died");
    // Whose word comes first is open: the one whose all-reduce fails, or the other that loses it in the next.
    coordinator.assert_said("g000001 is broken up: rank ");
    workers[0].assert_said("PEAPOD_FAULTS is set: this worker is going to fail on purpose (lose-all-reduce@5,refuse-all-reduce@9)");
    assert_eq!(final_state(&cluster), undisturbed());
}

#[test]
fn worker_that_dies_with_the_sum_of_a_step_has_trained_it() {
    let cluster = twelve_steps();
    let mut coordinator = cluster.coordinator(2, &[]);
    coordinator.allow_error(" lost at step ");
    let [mut survivor, mut victim] = FaultPlan::new().at(Point::DieAfterAllReduce, 1, 5).workers(&coordinator, 2).try_into().unwrap();
    victim.wait();
    let mut replacement = coordinator.worker_of_rank(1);
    finish(&cluster, &mut coordinator, [&mut survivor, &mut replacement]);
    coordinator.assert_said("g000002: 2 workers train from step 5");
}

#[test]
fn step_that_only_a_dead_worker_held_is_trained_again() {
    let cluster = twelve_steps();
    let mut coordinator = cluster.coordinator(2, &[]);
    coordinator.allow_error(" lost at step ");
    let plan = FaultPlan::new().at(Point::DieAfterAllReduce, 0, 5).fail_all_reduce(1, 5);
    let [mut victim, mut survivor] = plan.workers(&coordinator, 2).try_into().unwrap();
    victim.wait();
    let mut replacement = coordinator.worker_of_rank(0);
    finish(&cluster, &mut coordinator, [&mut survivor, &mut replacement]);
    coordinator.assert_said("g000002: 2 workers train from step 4");
}

#[test]
fn step_that_was_reported_by_a_worker_that_then_hangs_is_void() {
    let cluster = twelve_steps();
    let mut coordinator = cluster.coordinator(2, &["--min-world-size", "1", "--heartbeat-timeout", "2s"]);
    coordinator.allow_error(" lost at step ");
    // Rank 0 applies and reports step 5, and then neither hears an abort nor says what it holds.
    let plan = FaultPlan::new().fail_all_reduce(1, 5).at(Point::HangInData, 0, 6);
    let [hanging, mut survivor] = plan.workers(&coordinator, 2).try_into().unwrap();
    coordinator.wait_for("g000002: 1 worker trains from step 4");
    hanging.signal(Signal::KILL);
    finish(&cluster, &mut coordinator, [&mut survivor]);
}

#[test]
fn lost_abort_is_made_up_for_by_the_next_heartbeat() {
    let cluster = twelve_steps();
    let mut coordinator = cluster.coordinator(2, &[]);
    coordinator.allow_error(" lost at step ");
    // Outside of a collective nothing but the coordinator's word says that a peer is gone.
    let plan = FaultPlan::new().kill(1, 5).at(Point::StallInData, 0, 5).at(Point::MissAbort, 0, 4);
    let [mut survivor, mut victim] = plan.workers(&coordinator, 2).try_into().unwrap();
    victim.wait();
    let mut replacement = coordinator.worker_of_rank(1);
    finish(&cluster, &mut coordinator, [&mut survivor, &mut replacement]);
    survivor.assert_said("PEAPOD_FAULTS: miss-abort at step 4");
    coordinator.assert_said("g000002: 2 workers train from step 4");
}

#[test]
fn worker_that_was_wrongly_taken_for_dead_comes_back() {
    let cluster = twelve_steps();
    let mut coordinator = cluster.coordinator(2, &["--heartbeat-timeout", "1500ms"]);
    coordinator.allow_error(" lost at step ");
    // One by its stream, the other by its silence; neither has stopped training.
    let plan = FaultPlan::new().at(Point::CutStream, 1, 3).at(Point::FallSilent, 0, 6).at(Point::StallInData, 0, 8);
    let mut workers = plan.workers(&coordinator, 2);
    finish(&cluster, &mut coordinator, &mut workers);
    let lost = coordinator.lines_with("ERROR rank ");
    assert!(lost.len() == 2 && lost[0].contains("rank 1 (pid ") && lost[1].contains("rank 0 (pid "), "{lost:#?}");
    // Their shards were dealt anew, so the steps hold other samples than those of an undisturbed run.
    assert_eq!(coordinator.lines_with(" joined, ").len(), 4);
}

#[test]
fn state_that_is_cut_off_on_its_way_replaces_none() {
    let cluster = twelve_steps();
    let mut coordinator = cluster.coordinator(3, &[]);
    coordinator.allow_error(" lost at step ");
    // The replacement of rank 2 has half of the state when its source dies. Rank 1 holds it, too, and must still.
    let plan = FaultPlan::new().kill(2, 5).kill_in_broadcast(0, 4);
    let [mut source, mut survivor, mut victim] = plan.workers(&coordinator, 3).try_into().unwrap();
    victim.wait();
    let mut second = plan.replacement(&coordinator, 2);
    source.wait();
    let mut third = plan.replacement(&coordinator, 0);
    finish(&cluster, &mut coordinator, [&mut survivor, &mut second, &mut third]);
    let formed = coordinator.lines_with(": 3 workers train from step 4");
    assert_eq!(formed.len(), 2, "{formed:#?}");
}

#[test]
fn state_whose_way_breaks_with_nobody_dead_is_sent_again() {
    let cluster = twelve_steps();
    let mut coordinator = cluster.coordinator(2, &[]);
    coordinator.allow_error(" lost at step ");
    let plan = FaultPlan::new().kill(1, 5).fail_broadcast(0, 4);
    let [mut source, mut victim] = plan.workers(&coordinator, 2).try_into().unwrap();
    victim.wait();
    let mut replacement = plan.replacement(&coordinator, 1);
    finish(&cluster, &mut coordinator, [&mut source, &mut replacement]);
    let formed = coordinator.lines_with(": 2 workers train from step 4");
    assert_eq!(formed.len(), 2, "{formed:#?}");
}

#[test]
fn plan_of_faults_that_makes_no_sense_is_refused() {
    let environment = [("PEAPOD_FAULTS", "explode@3".to_owned())];
    let mut worker = Process::start_with("worker", "worker", &["--coordinator", "http://127.0.0.1:1"], &environment);
    worker.expect_exit(2);
    worker.assert_said("worker: PEAPOD_FAULTS: there is no point \"explode\"");
}
