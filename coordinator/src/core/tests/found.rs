//! What simulated clusters have found, each as the few events that it takes.

use super::*;

/// The journal of everything that was said, from its beginning.
fn replayed(world: &World, config: Config) -> State {
    let mut state = Core::new(config, None).durable();
    for effect in &world.said {
        if let Effect::Persist(fact) = effect {
            state.apply(fact.clone()).unwrap();
        }
    }
    state
}

/// A job of one pass over four shards, whose two workers have begun.
fn one_epoch() -> (World, Vec<WorkerId>) {
    let mut world = World::new(Config { epochs: Some(1), last_step: None, ..config(2) });
    let workers: Vec<WorkerId> = (0..2).map(|rank| world.join(Some(rank)).unwrap()).collect();
    workers.iter().for_each(|&worker| world.ready(worker));
    world.bootstrap(workers[0]);
    (world, workers)
}

fn read(world: &mut World, worker: WorkerId, lease: LeaseId) {
    let report = ShardReport { lease, skipped: vec![], num_samples: Some(1), truncated: String::new() };
    world.say(worker, FromWorker::ShardReport(report)).unwrap();
}

fn hello_of(incarnation: u64, attempt: u32) -> Hello {
    Hello {
        protocol_version: PROTOCOL_VERSION,
        program_version: PROGRAM_VERSION.into(),
        incarnation: Incarnation(incarnation),
        attempt,
        requested_rank: None,
        host: "host".into(),
        pid: 1,
        device: "cpu".into(),
    }
}

#[test]
fn journal_follows_the_ledger_back_though_all_who_were_awaited_are_replaced() {
    let (mut world, workers) = World::running(2);
    let (leases, _) = world.lease(workers[0], 1);
    world.report(workers[0], 1, Some(&names(0, leases[0].shard, 0..3)));
    world.report(workers[1], 1, None);
    let state = world.core.durable();
    world.core = Core::restore(config(2), None, state.clone());
    world.said.clear();
    let newcomers = [0, 1].map(|rank| world.join(Some(rank)).unwrap());
    newcomers.iter().for_each(|&worker| world.ready(worker));
    world.pass(4, &newcomers);
    assert_eq!((world.core.generation(), world.core.ledger().totals().committed), (Generation(2), 0));
    let mut journal = state;
    for effect in &world.said {
        if let Effect::Persist(fact) = effect {
            journal.apply(fact.clone()).unwrap();
        }
    }
    assert_eq!(journal, world.core.durable(), "a second restart would find samples that nobody holds");
}

#[test]
fn refused_copy_of_an_earlier_step_says_nothing_about_the_last_checkpoint() {
    let (mut world, workers) = World::running(2);
    let (leases, _) = world.lease(workers[0], 1);
    world.report(workers[0], 1, Some(&names(0, leases[0].shard, 0..3)));
    world.report(workers[1], 1, None);
    world.event(Event::Stop { reason: "enough".into() }).unwrap();
    workers.iter().for_each(|&worker| world.stopped(worker, 1, StopCause::Planned, vec![]));
    assert_eq!(world.core.state(), "storing the last checkpoint");
    let failed = |step, generation| Event::CheckpointFailed { step: Step(step), generation: Generation(generation), error: "void".into() };
    (0..5).for_each(|_| world.event(failed(0, 1)).unwrap());
    assert_eq!(world.core.state(), "storing the last checkpoint");
    world.event(Event::CheckpointStored { step: Step(1), generation: Generation(1) }).unwrap();
    assert_eq!(world.outcome(), Some(Outcome::Stopped { reason: "enough".into() }));
}

#[test]
fn member_with_much_to_read_keeps_nobody_waiting_for_its_first_shard() {
    let (mut world, workers) = one_epoch();
    let (kept, _) = world.lease(workers[0], 1);
    let (lost, _) = world.lease(workers[1], 1);
    world.die(workers[1]);
    world.stopped(workers[0], 0, StopCause::Aborted, vec![]);
    let newcomer = world.join(None).unwrap();
    world.ready(newcomer);
    world.bootstrap(workers[0]);
    // The survivor still reads and does not ask; its step waits for the newcomer's share.
    let (again, _) = world.lease(newcomer, 1);
    assert_eq!(again[0].shard, lost[0].shard);
    read(&mut world, newcomer, again[0].id);
    let (own, _) = world.lease(newcomer, 1);
    read(&mut world, newcomer, own[0].id);
    let (taken_over, _) = world.lease(newcomer, 1);
    assert_ne!(taken_over[0].id, own[0].id, "an answer of its own: what is dealt to the survivor, who has enough");
    assert!([kept[0].shard, again[0].shard, own[0].shard].iter().all(|&shard| shard != taken_over[0].shard));
}

#[test]
fn end_of_a_shard_that_only_the_dead_have_seen_is_looked_for_again() {
    let (mut world, workers) = one_epoch();
    let mut sizes_known = Vec::new();
    for _ in 0..2 {
        for &worker in &workers {
            sizes_known.extend(world.lease(worker, 1).0.into_iter().map(|lease| (worker, lease)));
        }
    }
    let trained: Vec<SampleName> = sizes_known.iter().flat_map(|(_, lease)| names(0, lease.shard, 0..1)).collect();
    for (worker, lease) in &sizes_known[..3] {
        read(&mut world, *worker, lease.id);
    }
    let (dead, _) = sizes_known[3];
    let survivor = workers[usize::from(dead == workers[0])];
    world.report(workers[0], 1, Some(&trained));
    world.report(workers[1], 1, None);
    world.die(dead);
    world.stopped(survivor, 1, StopCause::DataDone, vec![]);
    assert_eq!((world.outcome(), world.core.state().as_str()), (None, "waiting for rank 1"));
}

#[test]
fn drain_of_a_newcomer_leaves_what_the_members_hold_alone() {
    let (mut world, workers) = World::running(2);
    let (leases, _) = world.lease(workers[0], 1);
    world.report(workers[0], 1, Some(&names(0, leases[0].shard, 0..3)));
    world.report(workers[1], 1, None);
    world.die(workers[1]);
    // The survivor has not spoken yet.
    world.join(None).unwrap();
    world.event(Event::Drain { rank: Rank(1) }).unwrap();
    assert_eq!((world.core.final_step(), world.core.ledger().totals().committed), (Step(1), 3));
    world.stopped(workers[0], 1, StopCause::Aborted, vec![]);
    assert_eq!(world.core.state(), "waiting for rank 1");
}

#[test]
fn source_that_leaves_while_a_generation_is_formed_is_not_counted_on() {
    let (mut world, workers) = World::running(2);
    let (leases, _) = world.lease(workers[0], 1);
    world.report(workers[0], 1, Some(&names(0, leases[0].shard, 0..3)));
    world.report(workers[1], 1, None);
    world.die(workers[1]);
    world.stopped(workers[0], 1, StopCause::Aborted, vec![]);
    let newcomer = world.join(None).unwrap();
    world.ready(newcomer);
    assert_eq!(world.core.generation(), Generation(2));
    world.event(Event::Drain { rank: Rank(0) }).unwrap();
    let other = world.join(None).unwrap();
    world.ready(other);
    assert_eq!(world.core.generation(), Generation(2), "it stays until what it holds is stored");
    world.event(Event::CheckpointStored { step: Step(1), generation: Generation(2) }).unwrap();
    world.bootstrap(newcomer);
    let assignment = world.assignment(newcomer);
    assert_eq!((assignment.base_step, assignment.checkpoint_step), (Step(1), Some(Step(1))));
}

#[test]
fn nothing_is_said_after_the_end_that_a_return_brings_about() {
    let (mut world, workers) = World::running(2);
    world.event(Event::Stop { reason: "enough".into() }).unwrap();
    // Nothing is trained yet: with the other's word in, the loss of this one is the end.
    world.stopped(workers[0], 0, StopCause::Planned, vec![]);
    let result = world.event(Event::Hello { stream: StreamId(77), hello: hello_of(1001, 1) });
    assert_eq!((result, world.outcome()), (Ok(()), Some(Outcome::Stopped { reason: "enough".into() })));
    replayed(&world, config(2));
}

#[test]
fn generations_of_a_run_that_is_over_are_not_begun_again() {
    let mut core = Core::new(config(1), None).after(Generation(7));
    assert_eq!(core.generation(), Generation(7));
    let hello = hello_of(1, 0);
    core.step(Duration::ZERO, Event::Hello { stream: StreamId(1), hello }).unwrap();
    let ready = FromWorker::Ready { model_digest: vec![7], num_parameters: 10 };
    core.step(Duration::ZERO, Event::Message { worker: WorkerId(1), stream: StreamId(1), message: ready }).unwrap();
    assert_eq!(core.generation(), Generation(8));
}

#[test]
fn last_copy_that_was_cut_off_before_its_step_was_final_is_asked_for_again() {
    let (mut world, workers) = World::running(2);
    let (leases, _) = world.lease(workers[0], 1);
    let trained = names(0, leases[0].shard, 0..3);
    let cut = Event::CheckpointFailed { step: Step(1), generation: Generation(1), error: "cut off".into() };
    world.event(cut).unwrap();
    world.report_with(workers[0], 1, Some(&trained), Some(7)).unwrap();
    world.report_with(workers[1], 1, None, Some(7)).unwrap();
    workers.iter().for_each(|&worker| world.stopped(worker, 1, StopCause::StepsDone, vec![]));
    assert_eq!(world.core.state(), "storing the last checkpoint");
    let is_asked = |message: &ToWorker| matches!(message, ToWorker::TakeSnapshot { .. });
    let asked = |world: &World| workers.iter().map(|&id| world.sent(id).iter().filter(|&sent| is_asked(sent)).count()).collect::<Vec<_>>();
    world.pass(61, &workers);
    assert_eq!(asked(&world), [0, 0], "it may be on its way");
    world.pass(2, &workers);
    assert_eq!(asked(&world), [0, 1], "of the other one, for the first may hang");
    world.event(Event::CheckpointStored { step: Step(1), generation: Generation(1) }).unwrap();
    assert_eq!(world.outcome(), Some(Outcome::Finished));
}

#[test]
fn job_given_in_steps_is_not_done_because_its_last_worker_is_given_nothing_more() {
    let (mut world, workers) = World::running(1);
    let (leases, _) = world.lease(workers[0], 1);
    world.report(workers[0], 1, Some(&names(0, leases[0].shard, 0..3)));
    world.event(Event::Drain { rank: Rank(0) }).unwrap();
    // It hands back what it has not begun, uses up the rest, and its share is empty before it sees the flag.
    world.stopped(workers[0], 1, StopCause::DataDone, vec![]);
    assert_eq!((world.outcome(), world.core.state().as_str()), (None, "waiting for rank 0, rank 0 stores step 1 before it leaves"));
    world.event(Event::CheckpointStored { step: Step(1), generation: Generation(1) }).unwrap();
    assert_eq!((world.outcome(), world.core.state().as_str()), (None, "waiting for rank 0"));
}

#[test]
fn who_comes_back_while_others_begin_anew_holds_no_shard_any_more() {
    // It may have trained a step that did not count, and the others have made one of the same number since: it could not tell.
    let config = Config { min_world_size: 2, ..config(3) };
    let mut world = World::new(config.clone());
    let workers: Vec<WorkerId> = (0..3).map(|rank| world.join(Some(rank)).unwrap()).collect();
    workers.iter().for_each(|&worker| world.ready(worker));
    world.bootstrap(workers[0]);
    let (leases, _) = world.lease(workers[2], 1);
    for (index, &worker) in workers.iter().enumerate() {
        world.report(worker, 1, (index == 0).then_some(&[][..]));
    }
    let incarnations: Vec<u64> = workers.iter().map(|id| world.core.workers[id].incarnation.0).collect();
    // After a restart of the coordinator all come back and say what they hold, and this one is not ready again when it has said so.
    world.core = Core::restore(config, None, world.core.durable());
    world.said.clear();
    world.now = Duration::ZERO;
    for (rank, &incarnation) in (0..).zip(&incarnations) {
        world.hello(Some(rank), incarnation, 1).unwrap();
    }
    workers[..2].iter().for_each(|&worker| world.ready(worker));
    assert_eq!(world.core.leases.held_by(workers[2]), [leases[0].id]);
    workers.iter().for_each(|&worker| world.stopped(worker, 1, StopCause::Aborted, vec![]));
    assert!(world.core.workers.contains_key(&workers[2]), "it is no death");
    assert_eq!((world.core.state(), world.core.last_members.len()), ("forming".into(), 2));
    assert_eq!(world.core.leases.held_by(workers[2]), []);
}

#[test]
fn who_holds_shards_that_others_were_given_does_not_go_on_with_them_after_a_restart() {
    let (mut world, workers) = World::running(1);
    world.lease(workers[0], 1);
    let incarnation = world.core.workers[&workers[0]].incarnation;
    world.die(workers[0]);
    // The coordinator dies when it has written that these shards are free, and nothing after that.
    let mut state = Core::new(config(1), None).durable();
    for effect in &world.said {
        if let Effect::Persist(fact) = effect {
            state.apply(fact.clone()).unwrap();
            if matches!(fact, Fact::Released(_)) {
                break;
            }
        }
    }
    world.core = Core::restore(config(1), None, state);
    world.said.clear();
    let id = world.hello(Some(0), incarnation.0, 1).unwrap();
    let welcome = world.sent(id).into_iter().find(|message| matches!(message, ToWorker::Welcome { .. }));
    assert!(matches!(welcome, Some(ToWorker::Welcome { continues: Generation::NONE, .. })), "{welcome:?}");
}
