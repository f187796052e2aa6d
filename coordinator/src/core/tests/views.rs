//! What those outside are shown of a job.

use super::*;

#[test]
fn activity_follows_the_job_from_its_first_worker_to_its_end() {
    let mut world = World::new(config(2));
    let mut seen = vec![world.core.activity()];
    let first = world.join(None).unwrap();
    seen.push(world.core.activity());
    let second = world.join(None).unwrap();
    seen.push(world.core.activity());
    [first, second].iter().for_each(|&worker| world.ready(worker));
    seen.push(world.core.activity());
    world.bootstrap(first);
    seen.push(world.core.activity());
    world.event(Event::Stop { reason: "enough".into() }).unwrap();
    let record = world.record(1, &[]);
    world.stopped(first, 1, StopCause::Planned, vec![record]);
    seen.push(world.core.activity());
    world.stopped(second, 1, StopCause::Planned, vec![]);
    seen.push(world.core.activity());
    world.event(Event::CheckpointStored { step: Step(1), generation: Generation(1) }).unwrap();
    seen.push(world.core.activity());
    use Activity::*;
    assert_eq!(seen, [Waiting, Waiting, Loading, Forming, Training, Regrouping, Finishing, Over]);
}

#[test]
fn job_is_complete_at_its_last_step_or_with_its_last_sample() {
    let resumed = |config: Config, step: u64, ledger: &Ledger| {
        let resume = Resume { step: Step(step), ledger: Arc::new(ledger.clone()), generation: Generation(3) };
        Core::new(config, Some(resume)).is_complete()
    };
    let (in_steps, nothing) = (config(1), Ledger::new(4));
    assert_eq!([99, 100, 101].map(|step| resumed(in_steps.clone(), step, &nothing)), [false, true, true]);

    let in_epochs = Config { epochs: Some(1), last_step: None, ..config(1) };
    let mut ledger = Ledger::new(4);
    let mut complete = vec![resumed(in_epochs.clone(), 7, &ledger)];
    for shard in 0..4 {
        ledger.set_size(Epoch(0), ShardId(shard), 0).unwrap();
        complete.push(resumed(in_epochs.clone(), 7, &ledger));
    }
    assert_eq!(complete, [false, false, false, false, true]);
    let over = Core::new(in_epochs, None).over();
    assert_eq!((over.outcome(), over.next_deadline()), (Some(&Outcome::Finished), None));
}

#[test]
fn workers_are_shown_by_rank_with_who_is_a_member() {
    let (mut world, workers) = World::running(2);
    let spare = world.join(None).unwrap();
    let shown: Vec<(WorkerId, Rank, bool)> = world.core.workers(world.now).iter().map(|view| (view.id, view.rank, view.member)).collect();
    assert_eq!(shown, [(workers[0], Rank(0), true), (workers[1], Rank(1), true), (spare, Rank(2), false)]);
    assert_eq!(world.core.heartbeat_timeout(), Duration::from_secs(3));
}

#[test]
fn shards_that_are_being_read_are_counted() {
    let (mut world, workers) = World::running(2);
    assert_eq!((world.core.num_leased(), world.core.ledger().num_shards()), (0, 4));
    world.lease(workers[0], 2);
    world.lease(workers[1], 1);
    assert_eq!(world.core.num_leased(), 3);
}

#[test]
fn copy_is_awaited_from_its_step_until_it_is_stored() {
    let (mut world, workers) = World::running(1);
    let awaits = |world: &World| world.core.awaits_checkpoint(Step(1), Generation(1));
    assert!(!awaits(&world));
    world.report_with(workers[0], 1, Some(&[]), Some(5)).unwrap();
    assert!(awaits(&world) && !world.core.awaits_checkpoint(Step(1), Generation(2)));
    world.event(Event::CheckpointStored { step: Step(1), generation: Generation(1) }).unwrap();
    assert!(!awaits(&world));
}

#[test]
fn only_what_a_worker_or_a_store_would_say_again_may_be_written_late() {
    let step = Step(1);
    let commit = Fact::Commit { step, generation: Generation(1), names: Vec::new(), skipped: false };
    assert!([commit, Fact::Validated(losses(1)), Fact::Checkpoint(step)].iter().all(Fact::may_be_late));
    let settled = Fact::Settled { step, generation: Generation(1) };
    assert!(![settled, Fact::Stop(String::new()), Fact::Ended(Outcome::Finished)].iter().any(Fact::may_be_late));
}
