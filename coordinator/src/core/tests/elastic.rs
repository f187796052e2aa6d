//! Worlds that grow and shrink, spares that stand in, and members that train on while the coordinator is away.

use super::*;

fn elastic(min: u32, world_size: u32) -> Config {
    Config { min_world_size: min, ..config(world_size) }
}

/// `size` ready workers in the first generation of an elastic world.
fn running(min: u32, world_size: u32, size: u32) -> (World, Vec<WorkerId>) {
    let mut world = World::new(elastic(min, world_size));
    let workers: Vec<WorkerId> = (0..size).map(|_| world.join(None).unwrap()).collect();
    workers.iter().for_each(|&worker| world.ready(worker));
    if size < world_size {
        world.pass(30, &workers);
    }
    world.bootstrap(workers[0]);
    assert_eq!(world.core.state(), "training");
    (world, workers)
}

fn num_members(world: &World) -> Option<u32> {
    let formed = |effect: &Effect| match effect {
        Effect::Notice(Notice::Formed { num_members, .. }) => Some(*num_members),
        _ => None,
    };
    world.said.iter().rev().find_map(formed)
}

fn met(world: &mut World, workers: &[WorkerId], step: u64) {
    workers.iter().for_each(|&worker| world.stopped(worker, step, StopCause::Planned, vec![]));
}

#[test]
fn elastic_world_starts_small_once_nobody_has_come_for_ten_heartbeat_timeouts() {
    let mut world = World::new(elastic(2, 4));
    let mut workers: Vec<WorkerId> = (0..2).map(|_| world.join(None).unwrap()).collect();
    world.ready(workers[0]);
    world.pass(10, &workers);
    assert_eq!(world.core.state(), "waiting for workers: 1 of at least 2 are ready, rank 1 loading models");
    world.ready(workers[1]);
    world.pass(20, &workers);
    assert_eq!(world.core.state(), "2 of 4 workers are ready, 2 are enough: waiting a little for more");
    // One more is on its way: it is waited for however long it loads.
    workers.push(world.join(None).unwrap());
    world.ready(workers[2]);
    world.pass(28, &workers);
    assert_eq!(world.core.generation(), Generation::NONE);
    assert!(world.core.next_deadline().unwrap() <= world.now + Duration::from_secs(2), "looked at again");
    world.pass(2, &workers);
    assert_eq!(world.core.generation(), Generation(1));
    world.bootstrap(workers[0]);
    assert_eq!(num_members(&world), Some(3));
}

#[test]
fn worker_that_fetches_a_model_holds_up_no_elastic_world() {
    let mut world = World::new(Config { min_world_size: 2, ..config(3) });
    let ready = [world.join(Some(0)).unwrap(), world.join(Some(1)).unwrap()];
    let fetching = world.join(Some(2)).unwrap();
    ready.iter().for_each(|&worker| world.ready(worker));
    for second in 1..=59 {
        world.now += Duration::from_secs(1);
        for worker in [ready[0], ready[1], fetching] {
            let phase = if worker == fetching { Phase::Fetching } else { Phase::Waiting };
            let beat = Heartbeat { step: Step(0), phase, generation: Generation::NONE, reads: second, memory: Memory::default() };
            let _ = world.say(worker, FromWorker::Heartbeat(beat));
        }
        world.event(Event::Tick).unwrap();
    }
    assert_eq!(world.core.generation(), Generation(1), "{}", world.core.state());
}

#[test]
fn worker_that_loads_for_ever_holds_up_an_elastic_world_no_longer_than_the_join_timeout() {
    let mut world = World::new(elastic(1, 2));
    let workers = [world.join(None).unwrap(), world.join(None).unwrap()];
    world.ready(workers[0]);
    world.pass(59, &workers);
    assert_eq!(world.core.generation(), Generation::NONE);
    world.pass(1, &workers);
    assert_eq!(world.core.state(), "forming");
}

#[test]
fn members_that_are_all_cut_off_at_once_come_back_and_nothing_is_trained_again() {
    let (mut world, workers) = World::running(2);
    for step in 1..=2 {
        world.report(workers[0], step, Some(&[]));
        world.report(workers[1], step, None);
    }
    workers.iter().for_each(|&worker| world.die(worker));
    assert_eq!(world.core.state(), "waiting for the workers to come back");
    // They have trained on meanwhile, as they do without a coordinator.
    let records: Vec<StepRecord> = (3..=4).map(|step| world.record(step, &[])).collect();
    for (incarnation, &worker) in [1000, 1001].into_iter().zip(&workers) {
        assert_eq!(world.hello(None, incarnation, 1).unwrap(), worker);
        let Some(ToWorker::Welcome { continues, .. }) = world.sent(worker).pop() else { panic!() };
        assert_eq!(continues, Generation(1));
        world.ready(worker);
        let continuing = Continuing { generation: Generation(1), applied: Step(4), records: records.clone() };
        world.say(worker, FromWorker::Continuing(continuing)).unwrap();
    }
    assert_eq!((world.core.state().as_str(), world.core.final_step(), world.core.generation()), ("training", Step(4), Generation(1)));
}

#[test]
fn members_that_come_back_one_by_one_are_waited_for_from_the_first() {
    let (mut world, workers) = World::running(3);
    world.report(workers[0], 1, Some(&[]));
    workers[1..].iter().for_each(|&worker| world.report(worker, 1, None));
    workers.iter().for_each(|&worker| world.die(worker));
    world.pass(2, &[]);
    let first = world.hello(None, 1000, 1).unwrap();
    // Three seconds from the cut they are still waited for, and no more three seconds after the first was back.
    world.pass(2, &[first]);
    assert_eq!(world.core.state(), "waiting for the workers to come back");
    let second = world.hello(None, 1001, 1).unwrap();
    world.pass(1, &[first, second]);
    assert_ne!(world.core.state(), "waiting for the workers to come back");
}

#[test]
fn members_that_are_all_back_have_the_time_of_an_answer_to_say_what_they_hold() {
    let (mut world, workers) = World::running(2);
    world.report(workers[0], 1, Some(&[]));
    world.report(workers[1], 1, None);
    workers.iter().for_each(|&worker| world.die(worker));
    world.pass(2, &[]);
    let back = [1000, 1001].map(|incarnation| world.hello(None, incarnation, 1).unwrap());
    world.pass(9, &back);
    assert_eq!(world.core.state(), "waiting for the workers to come back");
    world.pass(1, &back);
    assert_ne!(world.core.state(), "waiting for the workers to come back");
}

#[test]
fn member_that_claims_steps_without_their_samples_is_not_believed() {
    let (mut world, workers) = World::running(1);
    world.report(workers[0], 1, Some(&[]));
    world.die(workers[0]);
    let back = world.hello(None, 1000, 1).unwrap();
    world.ready(back);
    let records = vec![world.record(2, &[])];
    let continuing = |applied| FromWorker::Continuing(Continuing { generation: Generation(1), applied, records: records.clone() });
    let refused = world.say(back, continuing(Step(u64::MAX)));
    assert!(matches!(refused, Err(CoreError::Unexpected { what: "continuing", .. })), "{refused:?}");
    world.say(back, continuing(Step(2))).unwrap();
    assert_eq!((world.core.state().as_str(), world.core.final_step()), ("training", Step(2)));
}

#[test]
fn holder_that_is_cut_off_while_others_are_missing_comes_back_with_what_it_holds() {
    let (mut world, workers) = World::running(2);
    let record = world.record(1, &[]);
    world.report(workers[0], 1, Some(&[]));
    world.report(workers[1], 1, None);
    world.die(workers[0]);
    world.stopped(workers[1], 1, StopCause::Aborted, vec![record.clone()]);
    world.die(workers[1]);
    let back = world.hello(None, 1001, 1).unwrap();
    assert_eq!(back, workers[1]);
    world.stopped(back, 1, StopCause::Aborted, vec![record]);
    world.ready(back);
    assert_eq!(world.core.state(), "waiting for rank 0");
    let newcomer = world.join(Some(0)).unwrap();
    world.ready(newcomer);
    let first = world.core.last_members[0].worker;
    world.bootstrap(first);
    assert_eq!(world.assignment(back).base_step, Step(1));
}

#[test]
fn processes_that_are_known_to_have_ended_are_not_waited_for() {
    let (mut world, workers) = World::running(1);
    world.report(workers[0], 1, Some(&[]));
    let process = Process { host: "host".into(), pid: 1 };
    world.event(Event::Exited { process, cause: "exited with code 1".into(), log: vec![] }).unwrap();
    assert_eq!(world.core.state(), "waiting for rank 0");
    assert!(world.said.contains(&Effect::Notice(Notice::RolledBack { from: Step(1), to: Step(0) })));
}

#[test]
fn whole_world_does_not_wait() {
    let mut world = World::new(elastic(1, 2));
    let workers: Vec<WorkerId> = (0..2).map(|_| world.join(None).unwrap()).collect();
    workers.iter().for_each(|&worker| world.ready(worker));
    assert_eq!(world.core.generation(), Generation(1));
}

#[test]
fn survivors_of_an_elastic_world_go_on_at_once_and_with_the_same_batch() {
    let (mut world, workers) = running(2, 4, 3);
    world.die(workers[0]);
    for &worker in &workers[1..] {
        world.stopped(worker, 0, StopCause::Aborted, vec![]);
    }
    // Nothing was trained, so that this is a start again; but nobody has come for long.
    world.bootstrap(workers[1]);
    let (shard, now) = (world.lease(workers[1], 1).0[0].shard, world.now);
    let record = world.record(1, &names(0, shard, 0..3));
    world.die(workers[2]);
    world.stopped(workers[1], 1, StopCause::Aborted, vec![record]);
    assert_eq!((world.now, world.core.state().as_str()), (now, "waiting for workers: 1 of at least 2 are ready"));
    let newcomer = world.join(None).unwrap();
    world.ready(newcomer);
    assert_eq!((world.core.generation(), world.core.final_step()), (Generation(3), Step(1)));
    let first = if world.core.workers[&newcomer].rank.0 == 0 { newcomer } else { workers[1] };
    world.bootstrap(first);
    let assignment = world.assignment(workers[1]);
    assert_eq!((assignment.num_members, assignment.global_batch, assignment.broadcast_state), (2, 16, true));
}

#[test]
fn batch_of_a_smaller_world_is_smaller_where_the_job_says_so() {
    let core = |scale_batch| Core::new(Config { scale_batch, ..elastic(1, 8) }, None);
    assert_eq!([8, 4, 3, 1].map(|members| core(true).global_batch(members)), [16, 8, 6, 2]);
    assert_eq!(core(false).global_batch(3), 16);
    // Each member has a sample.
    let tight = Core::new(Config { scale_batch: true, global_batch: 8, ..elastic(1, 8) }, None);
    assert_eq!([8, 7, 1].map(|members| tight.global_batch(members)), [8, 7, 1]);
}

#[test]
fn newcomer_is_let_in_by_a_meeting_once_its_models_are_loaded() {
    let (mut world, workers) = running(1, 3, 2);
    let newcomer = world.join(None).unwrap();
    assert_eq!(world.core.workers[&newcomer].rank, Rank(2));
    assert_eq!(world.core.state(), "training", "loading disturbs nobody");
    world.ready(newcomer);
    assert_eq!(world.core.state(), "training, to meet after this step");
    let reason = world.said.iter().find_map(|effect| match effect {
        Effect::Notice(Notice::Planned { reason }) => Some(reason.clone()),
        _ => None,
    });
    assert_eq!(reason.as_deref(), Some("rank 2 joins"));
    assert!(!world.said.iter().any(|effect| matches!(effect, Effect::Send { message: ToWorker::Abort { .. }, .. })));
    let shard = world.lease(workers[0], 1).0[0].shard;
    let record = world.record(1, &names(0, shard, 0..2));
    for &worker in &workers {
        world.stopped(worker, 1, StopCause::Planned, vec![record.clone()]);
    }
    world.bootstrap(workers[0]);
    let assignment = world.assignment(newcomer);
    assert_eq!((assignment.num_members, assignment.base_step, assignment.broadcast_state), (3, Step(1), true));
}

#[test]
fn newcomers_that_became_ready_while_a_generation_formed_are_let_in_next() {
    let mut world = World::new(elastic(1, 2));
    let first = world.join(None).unwrap();
    world.ready(first);
    world.pass(30, &[first]);
    assert_eq!(world.core.state(), "forming");
    let second = world.join(None).unwrap();
    world.ready(second);
    world.bootstrap(first);
    assert_eq!(world.core.state(), "training, to meet after this step");
    met(&mut world, &[first], 0);
    assert_eq!(world.core.generation(), Generation(2));
}

#[test]
fn spare_waits_warm_and_stands_in_at_once() {
    let (mut world, workers) = World::running(2);
    let spare = world.join(None).unwrap();
    world.ready(spare);
    assert_eq!(world.core.workers[&spare].rank, Rank(2));
    assert_eq!(world.core.state(), "training", "a full world needs nobody");
    let shard = world.lease(workers[0], 1).0[0].shard;
    world.report(workers[0], 1, Some(&names(0, shard, 0..3)));
    world.die(workers[1]);
    let record = world.record(1, &names(0, shard, 0..3));
    world.stopped(workers[0], 1, StopCause::Aborted, vec![record]);
    assert_eq!(world.core.generation(), Generation(2));
    world.bootstrap(workers[0]);
    assert_eq!(world.assignment(spare).member_index, MemberIndex(1));
    // The dead one's replacement is the spare now, and the spare's next stream has its own rank again.
    let replacement = world.join(None).unwrap();
    world.ready(replacement);
    assert_eq!((world.core.workers[&replacement].rank, world.core.state().as_str()), (Rank(1), "training"));
    let incarnation = world.core.workers[&spare].incarnation.0;
    let again = world.hello(Some(2), incarnation, 1).unwrap();
    assert_eq!(world.core.workers[&again].rank, Rank(2));
}

#[test]
fn spare_stands_in_at_once_for_who_dies_or_leaves_while_a_generation_forms() {
    for drained in [false, true] {
        let mut world = World::new(config(2));
        let workers: Vec<WorkerId> = (0..3).map(|_| world.join(None).unwrap()).collect();
        workers.iter().for_each(|&worker| world.ready(worker));
        assert_eq!((world.core.generation(), world.core.state().as_str()), (Generation(1), "forming"));
        if drained {
            world.event(Event::Drain { rank: Rank(0) }).unwrap();
        } else {
            world.die(workers[0]);
        }
        assert_eq!((world.core.generation(), world.core.state().as_str()), (Generation(2), "forming"));
        world.bootstrap(workers[1]);
        assert_eq!(world.assignment(workers[2]).member_index, MemberIndex(1));
    }
}

#[test]
fn world_grows_no_larger_than_its_size_however_many_spares_wait() {
    let (mut world, workers) = World::running(2);
    let spares = [world.join(None).unwrap(), world.join(None).unwrap()];
    spares.iter().for_each(|&spare| world.ready(spare));
    let record = world.record(1, &[]);
    world.die(workers[0]);
    world.stopped(workers[1], 1, StopCause::Aborted, vec![record]);
    world.bootstrap(workers[1]);
    let members: Vec<WorkerId> = world.core.last_members.iter().map(|member| member.worker).collect();
    assert_eq!(members, [workers[1], spares[0]], "the one that trained, and the first of those that wait");
}

#[test]
fn spare_that_leaves_or_dies_is_not_noticed_by_those_who_train() {
    let (mut world, workers) = World::running(2);
    let spares = [world.join(None).unwrap(), world.join(None).unwrap()];
    world.ready(spares[0]);
    world.report(workers[0], 1, Some(&[]));
    world.report(workers[1], 1, None);
    world.say(spares[0], FromWorker::Leaving { reason: "SIGTERM".into() }).unwrap();
    assert!(matches!(world.sent(spares[0]).last(), Some(ToWorker::Stop { reason: StopReason::Drained, .. })));
    world.die(spares[1]);
    assert_eq!((world.core.state().as_str(), world.core.final_step()), ("training", Step(1)));
    assert!(world.core.first_failure().is_none());
}

#[test]
fn drained_worker_of_an_elastic_world_is_not_waited_for() {
    let (mut world, workers) = running(1, 2, 2);
    world.event(Event::Drain { rank: Rank(1) }).unwrap();
    let shard = world.lease(workers[0], 1).0[0].shard;
    let record = world.record(1, &names(0, shard, 0..2));
    for &worker in &workers {
        world.stopped(worker, 1, StopCause::Planned, vec![record.clone()]);
    }
    assert_eq!((world.core.generation(), world.core.state().as_str()), (Generation(2), "forming"));
    world.bootstrap(workers[0]);
    assert_eq!(num_members(&world), Some(1));
}

/// Two workers that have trained step 1; the coordinator is started again, and its workers find it.
fn restarted(min: u32) -> (World, Vec<WorkerId>, ShardId) {
    let (mut world, workers) = World::running(2);
    let shard = world.lease(workers[0], 1).0[0].shard;
    world.report(workers[0], 1, Some(&names(0, shard, 0..3)));
    world.report(workers[1], 1, None);
    let state = world.core.durable();
    world.core = Core::restore(elastic(min, 2), None, state);
    world.said.clear();
    (world, workers, shard)
}

fn back(world: &mut World, incarnation: u64) -> WorkerId {
    let worker = world.hello(None, incarnation, 1).unwrap();
    let welcome = world.sent(worker).pop();
    assert!(matches!(welcome, Some(ToWorker::Welcome { continues: Generation(1), .. })), "{welcome:?}");
    world.ready(worker);
    worker
}

fn goes_on(world: &mut World, worker: WorkerId, step: u64, records: Vec<StepRecord>) {
    let continuing = Continuing { generation: Generation(1), applied: Step(step), records };
    world.say(worker, FromWorker::Continuing(continuing)).unwrap();
}

#[test]
fn members_that_all_train_on_are_taken_up_in_their_generation() {
    let (mut world, _, shard) = restarted(2);
    let first = back(&mut world, 1000);
    let [second_step, third_step, fourth_step] = [2, 3, 4].map(|step| {
        let from = step as u32 + 1;
        world.record(step, &names(0, shard, from..from + 1))
    });
    goes_on(&mut world, first, 2, vec![second_step.clone()]);
    // It trains and asks on while the other is awaited; nothing is given out before.
    world.report(first, 3, Some(&third_step.names));
    world.say(first, FromWorker::LeaseRequest { generation: Generation(1), num_leases: 1, is_idle: false }).unwrap();
    assert!(!world.said.iter().any(|effect| matches!(effect, Effect::Persist(Fact::Leases { .. }))));
    // Nor does it take the wait for the end of its generation.
    world.pass(1, &[first]);
    assert!(matches!(world.sent(first).last(), Some(ToWorker::HeartbeatReply { generation: Generation(1), running: true, .. })));
    assert_eq!(world.core.final_step(), Step(1));
    let second = back(&mut world, 1001);
    goes_on(&mut world, second, 4, vec![second_step, third_step, fourth_step]);
    assert_eq!((world.core.state().as_str(), world.core.generation()), ("training", Generation(1)));
    // Step 3 is final, as one member has gone beyond it; step 4 is not.
    assert_eq!((world.core.final_step(), world.core.ledger().totals().committed), (Step(3), 5));
    assert!(!world.said.iter().any(|effect| matches!(effect, Effect::Send { message: ToWorker::Abort { .. }, .. })));
    assert!(world.said.iter().any(|effect| matches!(effect, Effect::Notice(Notice::TakenUp { num_members: 2, .. }))));
    // Its request is answered first with what it holds: the lease may never have arrived.
    let grants = |message: &ToWorker| match message {
        ToWorker::LeaseGrant { leases, .. } => Some(leases.iter().map(|lease| lease.id).collect::<Vec<_>>()),
        _ => None,
    };
    assert_eq!(world.sent(first).iter().filter_map(grants).collect::<Vec<_>>(), [vec![LeaseId(1)]]);
    world.report(first, 4, Some(&names(0, shard, 5..6)));
    assert_eq!((world.core.final_step(), world.core.ledger().totals().committed), (Step(4), 6));
}

#[test]
fn member_that_dies_after_the_return_is_a_death_as_any_other() {
    let (mut world, workers, shard) = restarted(1);
    for (incarnation, worker) in [(1000, workers[0]), (1001, workers[1])] {
        assert_eq!(back(&mut world, incarnation), worker);
        goes_on(&mut world, worker, 1, vec![]);
    }
    world.die(workers[1]);
    let record = world.record(2, &names(0, shard, 3..4));
    world.stopped(workers[0], 2, StopCause::Aborted, vec![record]);
    assert_eq!((world.core.generation(), world.core.final_step()), (Generation(2), Step(2)));
}

#[test]
fn generation_that_one_member_has_left_is_left_by_all() {
    let (mut world, workers, _) = restarted(2);
    back(&mut world, 1000);
    goes_on(&mut world, workers[0], 1, vec![]);
    back(&mut world, 1001);
    world.stopped(workers[1], 1, StopCause::Aborted, vec![]);
    let told = world.sent(workers[0]);
    assert!(told.iter().any(|message| matches!(message, ToWorker::Abort { generation: Generation(1), .. })), "{told:?}");
    world.stopped(workers[0], 1, StopCause::Aborted, vec![]);
    assert_eq!((world.core.generation(), world.core.state().as_str()), (Generation(2), "forming"));
}

#[test]
fn generation_of_which_a_member_was_replaced_is_not_taken_up() {
    let (mut world, workers, _) = restarted(1);
    let replacement = world.join(Some(1)).unwrap();
    world.ready(replacement);
    back(&mut world, 1000);
    goes_on(&mut world, workers[0], 1, vec![]);
    assert_eq!(world.core.state(), "regrouping");
    assert!(matches!(world.sent(workers[0]).last(), Some(ToWorker::Abort { generation: Generation(1), .. })));
    world.stopped(workers[0], 1, StopCause::Aborted, vec![]);
    assert_eq!((world.core.generation(), world.core.last_members.len()), (Generation(2), 2));
}

#[test]
fn end_of_a_job_that_one_member_has_come_to_is_waited_for() {
    let (mut world, workers, shard) = restarted(2);
    let last = world.record(2, &names(0, shard, 3..4));
    back(&mut world, 1000);
    world.stopped(workers[0], 2, StopCause::StepsDone, vec![last.clone()]);
    back(&mut world, 1001);
    goes_on(&mut world, workers[1], 1, vec![]);
    assert!(!world.said.iter().any(|effect| matches!(effect, Effect::Send { message: ToWorker::Abort { .. }, .. })));
    world.stopped(workers[1], 2, StopCause::StepsDone, vec![last]);
    assert_eq!((world.core.final_step(), world.core.state().as_str()), (Step(2), "storing the last checkpoint"));
}

#[test]
fn member_that_died_while_the_coordinator_was_away_is_not_waited_for_when_its_neighbour_saw_it() {
    let (mut world, workers, _) = restarted(1);
    let survivor = back(&mut world, 1000);
    let stopped =
        Stopped { applied: Step(1), trained_in: Generation(1), lost_member: Some(MemberIndex(1)), ..Stopped::empty_handed(Generation(1)) };
    world.say(survivor, FromWorker::Stopped(stopped)).unwrap();
    assert_eq!((survivor, world.core.generation(), world.core.state().as_str()), (workers[0], Generation(2), "forming"));
}

#[test]
fn member_that_is_not_seen_dead_is_waited_for_and_those_back_leave_when_it_does_not_come() {
    let (mut world, workers, _) = restarted(1);
    back(&mut world, 1000);
    goes_on(&mut world, workers[0], 1, vec![]);
    world.pass(2, &workers[..1]);
    assert_eq!(world.core.state(), "waiting for the workers to come back");
    world.pass(1, &workers[..1]);
    assert!(matches!(
        world.sent(workers[0]).last(),
        Some(ToWorker::Abort { generation: Generation(1), .. } | ToWorker::HeartbeatReply { running: false, .. })
    ));
    world.stopped(workers[0], 1, StopCause::Aborted, vec![]);
    assert_eq!(world.core.generation(), Generation(2));
}

/// A coordinator that is started again with another world size, whose two members come back and say that they have trained on.
fn resized(world_size: u32, applied: [u64; 2]) -> (World, Vec<WorkerId>) {
    let (mut world, workers) = World::running(2);
    for (index, &worker) in workers.iter().enumerate() {
        world.report(worker, 1, (index == 0).then_some(&[][..]));
    }
    let records: Vec<StepRecord> = (2..=3).map(|step| world.record(step, &[])).collect();
    world.core = Core::restore(config(world_size), None, world.core.durable()).resized();
    for ((incarnation, &worker), applied) in [1000, 1001].into_iter().zip(&workers).zip(applied) {
        assert_eq!(world.hello(Some(incarnation as u32 - 1000), incarnation, 1).unwrap(), worker);
        world.ready(worker);
        let continuing = Continuing { generation: Generation(1), applied: Step(applied), records: records.clone() };
        world.say(worker, FromWorker::Continuing(continuing)).unwrap();
    }
    for (&worker, applied) in workers.iter().zip(applied) {
        assert!(world.sent(worker).iter().any(|message| matches!(message, ToWorker::Abort { .. })), "they are to regroup");
        world.stopped(worker, applied, StopCause::Aborted, records.clone());
    }
    (world, workers)
}

#[test]
fn coordinator_that_is_started_again_for_a_smaller_world_goes_on_with_those_who_hold_the_most() {
    for (applied, stays) in [([3, 3], 0), ([2, 3], 1)] {
        let (mut world, workers) = resized(1, applied);
        assert_eq!(world.core.state(), "forming");
        world.bootstrap(workers[stays]);
        assert_eq!((num_members(&world), world.assignment(workers[stays]).base_step), (Some(1), Step(3)));
    }
}

#[test]
fn coordinator_that_is_started_again_for_a_larger_world_waits_for_it_with_what_its_workers_hold() {
    let (mut world, workers) = resized(3, [3, 3]);
    assert_eq!(world.core.state(), "waiting for rank 2");
    let third = world.join(None).unwrap();
    world.ready(third);
    world.bootstrap(workers[0]);
    assert_eq!((num_members(&world), world.assignment(third).base_step), (Some(3), Step(3)));
}
