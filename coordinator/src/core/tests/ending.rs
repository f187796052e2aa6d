//! How a job ends.

use super::*;

#[test]
fn stop_meets_after_a_step_keeps_a_checkpoint_and_ends() {
    let (mut world, workers) = World::running(2);
    world.event(Event::Stop { reason: "Ctrl-C".into() }).unwrap();
    assert!(matches!(world.sent(workers[1]).last(), Some(ToWorker::PlanChange { .. })));
    let record = world.record(1, &[]);
    world.stopped(workers[0], 1, StopCause::Planned, vec![record]);
    assert_eq!(world.outcome(), None);
    world.stopped(workers[1], 1, StopCause::Planned, vec![]);
    assert!(matches!(world.sent(workers[0]).last(), Some(ToWorker::TakeSnapshot { .. })));
    world.event(Event::CheckpointStored { step: Step(1), generation: Generation(1) }).unwrap();
    assert_eq!(world.outcome(), Some(Outcome::Stopped { reason: "Ctrl-C".into() }));
    assert_eq!(world.join(None), Err(CoreError::Over("stopped")));
}

#[test]
fn heartbeats_do_not_break_a_meeting_that_is_under_way() {
    let (mut world, workers) = World::running(3);
    world.event(Event::Drain { rank: Rank(2) }).unwrap();
    let record = world.record(1, &[]);
    world.stopped(workers[0], 1, StopCause::Planned, vec![record]);
    let beat = Heartbeat { step: Step(0), phase: Phase::Collective, generation: Generation(1), reads: 0, memory: Memory::default() };
    world.say(workers[1], FromWorker::Heartbeat(beat)).unwrap();
    assert!(matches!(world.sent(workers[1]).last(), Some(ToWorker::HeartbeatReply { running: true, .. })));
    // But a member that dies on the way to the meeting ends it for those still waiting for it.
    world.die(workers[2]);
    assert!(matches!(world.sent(workers[1]).last(), Some(ToWorker::Abort { generation: Generation(1), .. })));
    world.stopped(workers[1], 0, StopCause::Aborted, vec![]);
    assert_eq!((world.core.state().as_str(), world.core.final_step()), ("waiting for rank 2", Step(1)));
}

#[test]
fn epochs_end_only_when_every_shard_is_accounted_for() {
    let mut with_epochs = config(1);
    (with_epochs.epochs, with_epochs.last_step) = (Some(1), None);
    for complete in [false, true] {
        let mut world = World::new(with_epochs.clone());
        let worker = world.join(None).unwrap();
        world.ready(worker);
        world.bootstrap(worker);
        let (leases, _) = world.lease(worker, 4);
        world.report(worker, 1, Some(&names(0, leases[0].shard, 0..1)));
        for (lease, num) in leases[..if complete { 4 } else { 3 }].iter().zip([1, 0, 0, 0]) {
            let report = ShardReport { lease: lease.id, skipped: vec![], num_samples: Some(num), truncated: String::new() };
            world.say(worker, FromWorker::ShardReport(report)).unwrap();
        }
        world.stopped(worker, 1, StopCause::DataDone, vec![]);
        match world.outcome() {
            None => assert!(complete && world.core.state() == "storing the last checkpoint", "{}", world.core.state()),
            Some(Outcome::Failed { reason }) => assert!(!complete && reason.contains("1 shards of epoch 0"), "{reason}"),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn last_checkpoint_that_cannot_be_stored_is_tried_for_ten_minutes_before_the_job_fails() {
    let (mut world, workers) = World::running(1);
    world.report(workers[0], 1, Some(&[]));
    world.stopped(workers[0], 1, StopCause::StepsDone, vec![]);
    let num_asked = |world: &World| {
        let is_asked = |message: &&ToWorker| matches!(message, ToWorker::TakeSnapshot { .. });
        world.sent(workers[0]).iter().filter(is_asked).count()
    };
    let pauses = [2, 4, 8, 16, 32].into_iter().chain([60; 10]).map(Some).chain([None]);
    for (attempt, pause) in pauses.enumerate() {
        assert_eq!((world.outcome(), num_asked(&world)), (None, attempt + 1));
        world.event(Event::CheckpointFailed { step: Step(1), generation: Generation(1), error: "disk full".into() }).unwrap();
        let told = world.said.iter().rev().find_map(|effect| match effect {
            Effect::Notice(Notice::CheckpointFailed { again_in, .. }) => Some(*again_in),
            _ => None,
        });
        assert_eq!(told, Some(pause.map(Duration::from_secs)));
        world.pass(pause.unwrap_or(0), &workers);
    }
    let Some(Outcome::Failed { reason }) = world.outcome() else { panic!() };
    assert!(reason.contains("disk full") && reason.contains("16 attempts"), "{reason}");
}

#[test]
fn copy_of_an_earlier_step_does_not_end_a_job_that_waits_for_its_last() {
    let (mut world, workers) = World::running(1);
    world.report_with(workers[0], 1, Some(&[]), Some(5)).unwrap();
    world.report(workers[0], 2, Some(&[]));
    world.stopped(workers[0], 2, StopCause::StepsDone, vec![]);
    world.event(Event::CheckpointStored { step: Step(1), generation: Generation(1) }).unwrap();
    assert_eq!((world.outcome(), world.core.checkpoint_step()), (None, Some(Step(1))));
    world.event(Event::CheckpointStored { step: Step(2), generation: Generation(1) }).unwrap();
    assert_eq!((world.outcome(), world.core.checkpoint_step()), (Some(Outcome::Finished), Some(Step(2))));
}

#[test]
fn broken_promise_of_the_ledger_names_the_source() {
    let source = |name: &str, num_shards| Source { name: name.into(), ..Source::unnamed(num_shards) };
    let sources: Arc<[Source]> = Arc::new([source("photos", 1), source("drawings", 3)]);
    let mut world = World::new(Config { epochs: Some(1), last_step: None, sources, ..config(1) });
    let worker = world.join(None).unwrap();
    world.ready(worker);
    world.bootstrap(worker);
    let (leases, _) = world.lease(worker, 4);
    for lease in leases.iter().filter(|lease| lease.shard != ShardId(0)) {
        let report = ShardReport { lease: lease.id, skipped: vec![], num_samples: Some(0), truncated: String::new() };
        world.say(worker, FromWorker::ShardReport(report)).unwrap();
    }
    world.stopped(worker, 0, StopCause::DataDone, vec![]);
    let Some(Outcome::Failed { reason }) = world.outcome() else { panic!("{:?}", world.outcome()) };
    assert!(reason.contains("1 shards of source photos of epoch 0 are not accounted for"), "{reason}");
}

#[test]
fn death_of_the_sender_of_the_last_checkpoint_asks_the_next_holder() {
    let (mut world, workers) = World::running(2);
    let record = world.record(1, &[]);
    world.stopped(workers[0], 1, StopCause::StepsDone, vec![record]);
    world.stopped(workers[1], 1, StopCause::StepsDone, vec![]);
    world.die(workers[0]);
    assert!(matches!(world.sent(workers[1]).last(), Some(ToWorker::TakeSnapshot { .. })));
    // The one that is left is cut off: the job does not end while it may come back.
    world.die(workers[1]);
    assert_eq!((world.outcome(), world.core.state().as_str()), (None, "waiting for the workers to come back"));
    let back = world.hello(Some(1), 1001, 1).unwrap();
    assert_eq!(back, workers[1]);
    world.stopped(back, 1, StopCause::StepsDone, vec![]);
    world.ready(back);
    // The other might come back too; it has died.
    world.pass(4, &[back]);
    assert!(world.sent(back).iter().any(|message| matches!(message, ToWorker::TakeSnapshot { .. })));
    world.event(Event::CheckpointStored { step: Step(1), generation: Generation(1) }).unwrap();
    assert_eq!(world.outcome(), Some(Outcome::Finished));
}

#[test]
fn job_whose_last_step_dies_with_its_holders_ends_with_the_first_failure() {
    let (mut world, workers) = World::running(1);
    let record = world.record(1, &[]);
    world.stopped(workers[0], 1, StopCause::StepsDone, vec![record]);
    world.die(workers[0]);
    world.pass(60, &[]);
    let Some(Outcome::Failed { reason }) = world.outcome() else { panic!("{}", world.core.state()) };
    assert!(reason.contains("no worker came back within 60 s"), "{reason}");
}

#[test]
fn death_in_the_exchange_after_the_last_data_does_not_lose_the_job() {
    let mut world = World::new(Config { epochs: Some(1), last_step: None, ..config(3) });
    let workers: Vec<WorkerId> = (0..3).map(|rank| world.join(Some(rank)).unwrap()).collect();
    for &worker in &workers {
        world.ready(worker);
    }
    world.bootstrap(workers[0]);
    let sample = names(0, ShardId(0), 0..1);
    for lease in
        workers.iter().flat_map(|&worker| world.lease(worker, 4).0.into_iter().map(move |lease| (worker, lease))).collect::<Vec<_>>()
    {
        let num_samples = Some(u32::from(lease.1.shard == ShardId(0)));
        let report = ShardReport { lease: lease.1.id, skipped: vec![], num_samples, truncated: String::new() };
        world.say(lease.0, FromWorker::ShardReport(report)).unwrap();
    }
    for &worker in &workers {
        world.report(worker, 1, (worker == workers[0]).then_some(&sample[..]));
    }
    // All gave empty shares and validate the last weights; one dies in the middle of it.
    world.die(workers[2]);
    // The lowest id is the source, and was told so early that it does not know that it was the end.
    world.stopped(workers[0], 1, StopCause::Aborted, vec![]);
    world.stopped_with(workers[1], 1, StopCause::DataDone, vec![], "rank 2 is gone", None);
    assert!(matches!(world.sent(workers[0]).last(), Some(ToWorker::TakeSnapshot { .. })), "the job ends with what it has");
    world.event(Event::CheckpointStored { step: Step(1), generation: Generation(1) }).unwrap();
    assert_eq!((world.outcome(), world.validated()), (Some(Outcome::Finished), vec![]));
}

#[test]
fn failed_exchange_after_the_last_step_breaks_up_those_still_in_it() {
    let (mut world, workers) = World::running(2);
    let record = world.record(1, &[]);
    world.stopped_with(workers[0], 1, StopCause::StepsDone, vec![record], "connection reset", None);
    assert!(matches!(world.sent(workers[1]).last(), Some(ToWorker::Abort { generation: Generation(1), .. })));
    world.stopped_with(workers[1], 1, StopCause::StepsDone, vec![], "aborted", None);
    world.event(Event::CheckpointStored { step: Step(1), generation: Generation(1) }).unwrap();
    assert_eq!(world.outcome(), Some(Outcome::Finished));
}

#[test]
fn permanent_failure_of_one_worker_ends_the_job_at_once() {
    let (mut world, workers) = World::running(2);
    let failure = FromWorker::Failure { phase: "loading".into(), message: "no such file".into(), permanent: true };
    world.say(workers[1], failure).unwrap();
    let Some(Outcome::Failed { reason }) = world.outcome() else { panic!() };
    assert_eq!(reason, "rank 1 (pid 1 on host) failed in phase loading: no such file");
    assert!(matches!(world.sent(workers[0]).last(), Some(ToWorker::Stop { reason: StopReason::Failed, .. })));
}

#[test]
fn whoever_gives_up_names_what_failed_first() {
    for (died, expected) in [(false, "no restart is left"), (true, "rank 1 (pid 1 on host) lost at step 0")] {
        let (mut world, workers) = World::running(2);
        if died {
            world.die(workers[1]);
        }
        world.event(Event::GiveUp { reason: "no restart is left".into() }).unwrap();
        let Some(Outcome::Failed { reason }) = world.outcome() else { panic!("{}", world.core.state()) };
        assert!(reason.starts_with(expected) && reason.ends_with("no restart is left"), "{reason}");
    }
}

#[test]
fn failure_that_the_job_got_over_is_not_the_cause_of_its_end() {
    let (mut world, workers) = World::running(2);
    world.die(workers[1]);
    assert!(world.core.first_failure().is_some());
    world.stopped(workers[0], 0, StopCause::Aborted, vec![]);
    world.ready(workers[0]);
    let other = world.join(Some(1)).unwrap();
    world.ready(other);
    world.bootstrap(workers[0]);
    assert!(world.core.first_failure().is_some(), "nothing is trained yet");
    world.report(workers[0], 1, Some(&[]));
    world.report(other, 1, None);
    assert_eq!((world.core.first_failure(), world.core.failure().unwrap().healed), (None, Some(Step(1))));
    world.die(other);
    assert!(world.core.first_failure().unwrap().contains("rank 1 (pid "), "the next one counts again");
    assert_eq!(world.core.failure().unwrap().healed, None);
}

#[test]
fn worker_whose_leaving_would_end_a_local_job_is_not_drained() {
    let mut world = World::new(Config { workers_are_alike: true, min_world_size: 1, ..config(2) });
    let workers = [0, 1].map(|rank| world.join(Some(rank)).unwrap());
    world.event(Event::Drain { rank: Rank(0) }).unwrap();
    let error = world.event(Event::Drain { rank: Rank(1) }).unwrap_err().to_string();
    assert!(error.starts_with("rank 1 cannot be spared: 0 workers would be left, 1 are needed"), "{error}");
    assert!(world.core.workers[&workers[1]].leaving.is_none());
}

#[test]
fn job_that_is_given_up_keeps_what_those_hold_who_are_left() {
    let (mut world, workers) = World::running(2);
    world.report(workers[0], 1, Some(&[]));
    world.report(workers[1], 1, None);
    world.event(Event::Drain { rank: Rank(1) }).unwrap();
    workers.iter().for_each(|&worker| world.stopped(worker, 1, StopCause::Planned, vec![]));
    for _ in 0..2 {
        // The second is of another worker that left, while the copy is on its way.
        world.event(Event::GiveUp { reason: "one is left, two are needed".into() }).unwrap();
        assert!(matches!(world.sent(workers[0]).last(), Some(ToWorker::TakeSnapshot { .. })));
        assert_eq!(world.outcome(), None);
    }
    world.event(Event::CheckpointStored { step: Step(1), generation: Generation(1) }).unwrap();
    assert_eq!(world.outcome(), Some(Outcome::Failed { reason: "one is left, two are needed".into() }));
}

#[test]
fn stop_of_a_job_that_has_not_begun_ends_it_at_once() {
    let mut world = World::new(config(2));
    let worker = world.join(None).unwrap();
    world.ready(worker);
    for reason in ["enough", "once more"] {
        world.event(Event::Stop { reason: reason.into() }).unwrap();
    }
    assert_eq!(world.outcome(), Some(Outcome::Stopped { reason: "enough".into() }));
    let written = world.said.iter().filter(|effect| matches!(effect, Effect::Persist(Fact::Stop(_)))).count();
    assert_eq!(written, 1, "only the first counts");
}

#[test]
fn job_that_was_to_stop_ends_when_its_coordinator_is_started_again_and_nobody_holds_anything() {
    let mut world = World::new(config(1));
    let mut state = world.core.durable();
    state.apply(Fact::Stop("Ctrl-C".into())).unwrap();
    world.core = Core::restore(config(1), None, state);
    assert_eq!(world.core.next_deadline(), Some(Duration::ZERO));
    world.event(Event::Tick).unwrap();
    assert_eq!(world.outcome(), Some(Outcome::Stopped { reason: "Ctrl-C".into() }));
}

#[test]
fn failure_of_a_worker_that_another_may_do_without_is_its_death_with_its_own_words() {
    let (mut world, workers) = World::running(2);
    let failure = FromWorker::Failure { phase: "data".into(), message: "the disk is gone".into(), permanent: false };
    world.say(workers[1], failure).unwrap();
    let failure = world.core.first_failure().unwrap();
    assert!(failure.starts_with("rank 1") && failure.ends_with("failed in phase data: the disk is gone"), "{failure}");
    assert!(world.sent(workers[0]).iter().any(|message| matches!(message, ToWorker::Abort { .. })));
    assert!(world.said.iter().any(|effect| matches!(effect, Effect::Detach { worker } if *worker == workers[1])));
    assert_eq!((world.outcome(), world.core.state().as_str()), (None, "regrouping"));
}
