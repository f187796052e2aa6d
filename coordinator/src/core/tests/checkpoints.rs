//! What is kept on disk, and how a job goes on from it.

use super::*;

#[test]
fn checkpoint_carries_the_ledger_of_its_own_step() {
    let (mut world, workers) = World::running(2);
    let (leases, _) = world.lease(workers[0], 1);
    let shard = leases[0].shard;
    world.report_with(workers[0], 1, Some(&names(0, shard, 0..1)), Some(5)).unwrap();
    world.report(workers[0], 2, Some(&names(0, shard, 1..2)));
    world.report_with(workers[1], 1, None, Some(5)).unwrap();
    world.report(workers[1], 2, None);
    let frozen = world.said.iter().find_map(|effect| match effect {
        Effect::Freeze { step: Step(1), ledger, .. } => Some(ledger.clone()),
        _ => None,
    });
    assert_eq!(frozen.unwrap().totals().committed, 1, "step 2 is not in it");
    world.event(Event::CheckpointStored { step: Step(1), generation: Generation(1) }).unwrap();
    assert_eq!(world.core.checkpoint_step(), Some(Step(1)));
}

#[test]
fn copy_of_a_void_step_is_never_a_checkpoint() {
    let (mut world, workers) = World::running(2);
    world.report_with(workers[0], 1, Some(&[]), Some(5)).unwrap();
    world.die(workers[0]);
    world.stopped(workers[1], 0, StopCause::Aborted, vec![]);
    world.event(Event::CheckpointStored { step: Step(1), generation: Generation(1) }).unwrap();
    assert_eq!(world.core.checkpoint_step(), None);
}

#[test]
fn checkpoint_is_asked_for_by_time() {
    let (mut world, workers) = World::running(2);
    world.pass(301, &workers);
    let asked = world.sent(workers[0]).iter().filter(|message| matches!(message, ToWorker::TakeSnapshot { .. })).count();
    assert_eq!(asked, 1);
}

#[test]
fn all_dead_go_back_to_the_checkpoint_and_its_ledger() {
    let (mut world, workers) = World::running(1);
    let (leases, _) = world.lease(workers[0], 1);
    let shard = leases[0].shard;
    world.report_with(workers[0], 1, Some(&names(0, shard, 0..1)), Some(1)).unwrap();
    world.event(Event::CheckpointStored { step: Step(1), generation: Generation(1) }).unwrap();
    world.report(workers[0], 2, Some(&names(0, shard, 1..2)));
    assert_eq!(world.core.ledger().totals().committed, 2);
    world.die(workers[0]);
    world.pass(2, &[]);
    assert_eq!(world.core.ledger().totals().committed, 2, "it may only have been cut off");
    let newcomer = world.join(Some(0)).unwrap();
    world.ready(newcomer);
    world.pass(1, &[newcomer]);
    assert!(world.said.contains(&Effect::Notice(Notice::RolledBack { from: Step(2), to: Step(1) })));
    assert_eq!(world.core.ledger().totals().committed, 1);
    world.bootstrap(newcomer);
    let assignment = world.assignment(newcomer);
    assert_eq!((assignment.base_step, assignment.checkpoint_step), (Step(1), Some(Step(1))));
    let (again, _) = world.lease(newcomer, 4);
    let open = again.iter().find(|lease| lease.shard == shard && lease.epoch == Epoch(0)).expect("its shard is read again");
    assert_eq!(open.done.iter().collect::<Vec<_>>(), [0]);
}

#[test]
fn resumed_job_starts_from_the_checkpoints_ledger() {
    let mut ledger = Ledger::new(4);
    ledger.commit(SampleName { epoch: Epoch(0), shard: ShardId(2), index: 0 }, Step(1)).unwrap();
    let resume = Resume { step: Step(40), ledger: Arc::new(ledger), generation: Generation(3) };
    let mut world = World::new(config(1));
    world.core = Core::new(config(1), Some(resume));
    let worker = world.join(None).unwrap();
    world.ready(worker);
    assert_eq!(world.core.generation(), Generation(4), "generations go on from the checkpoint's");
    world.bootstrap(worker);
    assert_eq!(world.assignment(worker).checkpoint_step, Some(Step(40)));
    world.report(worker, 41, Some(&[]));
    assert_eq!(world.core.final_step(), Step(41));
}

#[test]
fn job_whose_last_step_is_stored_has_nothing_left_to_train() {
    for (step, is_over) in [(99, false), (100, true)] {
        let mut world = World::new(config(1));
        let resume = Resume { step: Step(step), ledger: Arc::new(Ledger::new(4)), generation: Generation(3) };
        world.core = Core::new(config(1), Some(resume));
        let worker = world.join(None).unwrap();
        world.ready(worker);
        assert_eq!(world.outcome().is_some(), is_over, "from step {step} of 100");
    }
}

fn let_go(world: &World, worker: WorkerId) -> bool {
    world.sent(worker).iter().any(|message| matches!(message, ToWorker::Stop { reason: StopReason::Drained, .. }))
}

fn asked(world: &World, worker: WorkerId) -> usize {
    world.sent(worker).iter().filter(|message| matches!(message, ToWorker::TakeSnapshot { .. })).count()
}

#[test]
fn workers_that_are_all_taken_away_at_once_leave_their_last_step_behind() {
    let (mut world, workers) = World::running(2);
    for &worker in &workers {
        world.say(worker, FromWorker::Leaving { reason: "SIGTERM".into() }).unwrap();
    }
    let record = world.record(1, &[]);
    world.stopped(workers[0], 1, StopCause::Planned, vec![record]);
    world.stopped(workers[1], 1, StopCause::Planned, vec![]);
    assert!(!let_go(&world, workers[0]) && let_go(&world, workers[1]), "one of them sends what both hold");
    assert_eq!((asked(&world, workers[0]), asked(&world, workers[1])), (1, 0));
    // A replacement that is ready before the copy has arrived waits for it.
    let newcomers = [world.join(None).unwrap(), world.join(None).unwrap()];
    newcomers.iter().for_each(|&worker| world.ready(worker));
    assert_eq!(world.core.generation(), Generation(1));
    world.event(Event::CheckpointStored { step: Step(1), generation: Generation(1) }).unwrap();
    assert!(let_go(&world, workers[0]));
    assert!(!world.said.iter().any(|effect| matches!(effect, Effect::Notice(Notice::RolledBack { .. }))));
    assert_eq!(world.core.generation(), Generation(2));
    world.bootstrap(newcomers[0]);
    assert_eq!(world.assignment(newcomers[0]).checkpoint_step, Some(Step(1)));
}

#[test]
fn last_holder_that_is_drained_while_others_are_missing_leaves_its_step_behind() {
    let (mut world, workers) = World::running(2);
    let record = world.record(1, &[]);
    world.die(workers[0]);
    world.stopped(workers[1], 1, StopCause::Aborted, vec![record]);
    world.event(Event::Drain { rank: Rank(1) }).unwrap();
    assert!(!let_go(&world, workers[1]));
    // It is tried three times: then the worker may go, whatever is lost.
    for tries in 1..=3 {
        assert_eq!((asked(&world, workers[1]), let_go(&world, workers[1])), (tries, false));
        world.event(Event::CheckpointFailed { step: Step(1), generation: Generation(1), error: "disk full".into() }).unwrap();
    }
    assert!(let_go(&world, workers[1]));
    assert!(world.said.contains(&Effect::Notice(Notice::RolledBack { from: Step(1), to: Step(0) })));
}

#[test]
fn last_holder_whose_copy_does_not_come_is_asked_again_every_two_minutes_and_may_go_after_the_third() {
    let mut world = World::new(Config { join_timeout: Duration::from_secs(900), ..config(2) });
    let workers = [world.join(None).unwrap(), world.join(None).unwrap()];
    workers.iter().for_each(|&worker| world.ready(worker));
    world.bootstrap(workers[0]);
    let record = world.record(1, &[]);
    world.die(workers[0]);
    world.stopped(workers[1], 1, StopCause::Aborted, vec![record]);
    // At another time than one at which it is said who is missing.
    world.pass(2, &workers[1..]);
    world.event(Event::Drain { rank: Rank(1) }).unwrap();
    for tries in 1..=3 {
        assert_eq!((asked(&world, workers[1]), let_go(&world, workers[1])), (tries, false));
        world.pass(119, &workers[1..]);
        assert_eq!((asked(&world, workers[1]), let_go(&world, workers[1])), (tries, false), "not before");
        world.pass(1, &workers[1..]);
    }
    assert!(let_go(&world, workers[1]));
}

#[test]
fn death_of_another_holder_does_not_interrupt_who_sends_the_last_checkpoint() {
    let (mut world, workers) = World::running(2);
    let record = world.record(1, &[]);
    world.stopped(workers[0], 1, StopCause::StepsDone, vec![record]);
    world.stopped(workers[1], 1, StopCause::StepsDone, vec![]);
    world.die(workers[1]);
    assert_eq!((asked(&world, workers[0]), world.core.state().as_str()), (1, "storing the last checkpoint"));
    world.event(Event::CheckpointStored { step: Step(1), generation: Generation(1) }).unwrap();
    assert_eq!(world.outcome(), Some(Outcome::Finished));
}

#[test]
fn copies_that_never_come_are_forgotten_with_the_next_one_that_is_stored() {
    let (mut world, workers) = World::running(1);
    for step in 1..=3 {
        world.report_with(workers[0], step, Some(&[]), Some(5)).unwrap();
    }
    world.event(Event::CheckpointStored { step: Step(2), generation: Generation(1) }).unwrap();
    let awaited: Vec<bool> = (1..=3).map(|step| world.core.awaits_checkpoint(Step(step), Generation(1))).collect();
    assert_eq!(awaited, [false, false, true]);
}

#[test]
fn failed_upload_that_nobody_waits_for_changes_nothing() {
    let (mut world, workers) = World::running(1);
    world.report_with(workers[0], 1, Some(&[]), Some(5)).unwrap();
    world.now += Duration::from_secs(1);
    let (said, before) = (world.said.len(), format!("{:?}", world.core));
    for (step, generation) in [(1, 9), (0, 1)] {
        world
            .event(Event::CheckpointFailed { step: Step(step), generation: Generation(generation), error: "a stranger's".into() })
            .unwrap();
    }
    assert_eq!((world.said.len(), format!("{:?}", world.core)), (said, before));
    // Of a step that may be final soon it is said.
    world.event(Event::CheckpointFailed { step: Step(2), generation: Generation(1), error: "disk full".into() }).unwrap();
    assert!(matches!(world.said.last(), Some(Effect::Notice(Notice::CheckpointFailed { step: Step(2), .. }))));
}
