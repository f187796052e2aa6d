//! Who is a member, who leaves and who comes instead.

use super::*;

fn says_that_it_waits(world: &World) -> bool {
    world.said.iter().any(|effect| matches!(effect, Effect::Notice(Notice::Waiting { .. })))
}

#[test]
fn world_forms_when_every_rank_is_ready_and_members_are_in_rank_order() {
    let mut world = World::new(config(2));
    let late = world.join(Some(1)).unwrap();
    let first = world.join(None).unwrap();
    world.ready(late);
    assert_eq!(world.core.generation(), Generation::NONE);
    assert_eq!(world.core.state(), "rank 0 loading models");
    world.ready(first);
    assert_eq!(world.core.generation(), Generation(1));
    assert_eq!(world.sent(first).pop(), Some(ToWorker::MakeBootstrap { generation: Generation(1), num_members: 2 }));
    world.bootstrap(first);
    let (a, b) = (world.assignment(first), world.assignment(late));
    assert_eq!((a.member_index, b.member_index, a.num_members), (MemberIndex(0), MemberIndex(1), 2));
    assert!(a.broadcast_state && a.checkpoint_step.is_none() && a.base_step == Step(0));
    let persisted = world.said.iter().position(|effect| matches!(effect, Effect::Persist(Fact::Generation { .. })));
    let announced = world.said.iter().position(|effect| matches!(effect, Effect::Send { message: ToWorker::MakeBootstrap { .. }, .. }));
    assert!(persisted < announced, "a generation is on disk before anyone hears of it");
}

#[test]
fn model_that_comes_slowly_ends_no_job_and_one_that_stops_coming_does() {
    let mut world = World::new(config(2));
    let (fetching, other) = (world.join(Some(0)).unwrap(), world.join(Some(1)).unwrap());
    world.ready(other);
    let fetch = |world: &mut World, reads| {
        world.now += Duration::from_secs(1);
        for (worker, phase, reads) in [(fetching, Phase::Fetching, reads), (other, Phase::Waiting, 0)] {
            let beat = Heartbeat { step: Step(0), phase, generation: Generation::NONE, reads, memory: Memory::default() };
            let _ = world.say(worker, FromWorker::Heartbeat(beat));
        }
        world.event(Event::Tick).unwrap();
    };
    for second in 1..=200 {
        fetch(&mut world, second);
    }
    assert_eq!((world.core.state(), world.outcome()), ("rank 0 fetching models".into(), None));
    for _ in 0..61 {
        fetch(&mut world, 200);
    }
    let Some(Outcome::Failed { reason }) = world.outcome() else { panic!("{:?}", world.outcome()) };
    assert!(reason.contains("rank 0 fetching models for 60 s (--join-timeout)"), "{reason}");
}

#[test]
fn day_of_waiting_is_told_less_and_less_often_and_news_at_once() {
    let day = Duration::from_secs(86_400);
    let mut world = World::new(Config { join_timeout: day, heartbeat_timeout: day, ..config(3) });
    let seconds_told = |world: &mut World, seconds: u64| -> Vec<u64> {
        let mut told = Vec::new();
        for second in 1..=seconds {
            world.said.clear();
            world.now += Duration::from_secs(1);
            world.event(Event::Tick).unwrap();
            told.extend(says_that_it_waits(world).then_some(second));
        }
        told
    };
    let told = seconds_told(&mut world, 80_000);
    assert_eq!(told[..3], [5, 10, 15]);
    assert!(told.len() < 200 && told.is_sorted_by_key(|second| *second), "{told:?}");
    assert!(told.windows(2).all(|pair| pair[1] - pair[0] <= 600), "{told:?}");
    // Whoever comes is heard of; nobody else does while it loads.
    world.hello(Some(1), 5, 0).unwrap();
    assert_eq!(seconds_told(&mut world, 60), [5]);
}

#[test]
fn wrong_and_doubled_ranks_are_refused_with_their_reason() {
    let mut world = World::new(config(2));
    let error = world.join(Some(2)).unwrap_err();
    assert_eq!(error.to_string(), "rank 2 does not exist: the ranks of this job are 0..=1 (--world-size 2)");
    world.join(Some(1)).unwrap();
    assert!(matches!(world.join(Some(1)), Err(CoreError::RankTaken { .. })));
    world.join(None).unwrap();
}

#[test]
fn another_protocol_is_refused_naming_both() {
    let mut world = World::new(config(1));
    let hello = Hello {
        protocol_version: 99,
        program_version: "9.9.9".into(),
        incarnation: Incarnation(1),
        attempt: 0,
        requested_rank: None,
        host: "h".into(),
        pid: 1,
        device: "cpu".into(),
    };
    let error = world.event(Event::Hello { stream: StreamId(1), hello }).unwrap_err().to_string();
    assert!(error.contains("9.9.9") && error.contains(PROGRAM_VERSION), "{error}");
}

#[test]
fn workers_with_other_models_are_refused() {
    let mut world = World::new(config(2));
    let (a, b) = (world.join(None).unwrap(), world.join(None).unwrap());
    world.ready(a);
    let error = world.say(b, FromWorker::Ready { model_digest: vec![8], num_parameters: 10 }).unwrap_err();
    assert!(matches!(error, CoreError::ModelsDiffer { .. }), "{error}");
}

#[test]
fn death_aborts_the_others_and_a_replacement_gets_state_and_leases() {
    let (mut world, workers) = World::running(2);
    let (kept, _) = world.lease(workers[0], 1);
    let (lost, _) = world.lease(workers[1], 1);
    let trained = names(0, kept[0].shard, 0..3);
    world.report(workers[0], 1, Some(&trained));
    world.report(workers[1], 1, None);
    world.die(workers[1]);
    assert!(matches!(world.sent(workers[0]).last(), Some(ToWorker::Abort { generation: Generation(1), .. })));
    world.stopped(workers[0], 1, StopCause::Aborted, vec![]);
    assert_eq!(world.core.state(), "waiting for rank 1");
    assert!(says_that_it_waits(&world), "at once");
    assert!(world.core.first_failure().unwrap().contains("rank 1 (pid 1 on host) lost at step 1"));

    let newcomer = world.join(None).unwrap();
    world.ready(newcomer);
    assert_eq!(world.core.generation(), Generation(2));
    world.bootstrap(workers[0]);
    let (old, new) = (world.assignment(workers[0]), world.assignment(newcomer));
    assert_eq!((old.base_step, old.base_generation, old.source_index), (Step(1), Generation(1), MemberIndex(0)));
    assert!(new.broadcast_state && new.held_leases.is_empty());
    assert_eq!(old.held_leases, [kept[0].id]);
    // The dead worker's shard comes to whoever asks first, under a new lease.
    let (again, _) = world.lease(newcomer, 1);
    assert_eq!((again[0].shard, again[0].epoch), (lost[0].shard, lost[0].epoch));
    assert_ne!(again[0].id, lost[0].id);
}

#[test]
fn failed_collective_without_a_death_regroups_the_same_members() {
    let (mut world, workers) = World::running(2);
    world.stopped(workers[1], 0, StopCause::Aborted, vec![]);
    assert!(matches!(world.sent(workers[0]).last(), Some(ToWorker::Abort { .. })));
    world.stopped(workers[0], 0, StopCause::Aborted, vec![]);
    assert_eq!(world.core.generation(), Generation(2));
    assert!(!says_that_it_waits(&world), "all are there");
    world.bootstrap(workers[0]);
    assert!(world.assignment(workers[0]).broadcast_state, "at step 0 the fresh weights may have reached nobody");
}

#[test]
fn silence_is_death_after_the_timeout_and_a_heartbeat_is_never_refused() {
    let (mut world, workers) = World::running(2);
    world.pass(2, &workers);
    world.pass(4, &workers[..1]);
    let lost = world.said.iter().any(|effect| matches!(effect, Effect::Notice(Notice::Lost { worker, .. }) if worker.id == workers[1]));
    assert!(lost);
    assert!(world.core.first_failure().unwrap().contains("no sign of life for 3.0 s"));
}

#[test]
fn survivor_that_does_not_stop_in_time_is_dead_too() {
    let (mut world, workers) = World::running(3);
    world.die(workers[2]);
    world.stopped(workers[0], 0, StopCause::Aborted, vec![]);
    world.pass(4, &workers[..2]);
    assert_eq!(world.core.state(), "waiting for ranks 1-2");
}

#[test]
fn incomplete_world_says_for_whom_it_waits_and_ends_with_the_first_failure() {
    let (mut world, workers) = World::running(2);
    world.die(workers[1]);
    world.stopped(workers[0], 0, StopCause::Aborted, vec![]);
    world.pass(59, &workers[..1]);
    let waits = world.said.iter().filter(|effect| matches!(effect, Effect::Notice(Notice::Waiting { is_usual: false, .. }))).count();
    assert!((10..=14).contains(&waits), "said every five seconds, not {waits} times");
    world.pass(2, &workers[..1]);
    let Some(Outcome::Failed { reason }) = world.outcome() else { panic!("{:?}", world.outcome()) };
    assert!(reason.contains("rank 1 (pid 1 on host) lost") && reason.contains("waiting for rank 1 for 60 s (--join-timeout)"), "{reason}");
    assert!(matches!(world.sent(workers[0]).last(), Some(ToWorker::Stop { reason: StopReason::Failed, .. })));
}

#[test]
fn wait_for_workers_that_are_all_here_and_load_is_no_warning() {
    let mut world = World::new(config(2));
    let workers = [world.join(None).unwrap()];
    let waits = |world: &World| -> Vec<bool> {
        let usual = |effect: &Effect| if let Effect::Notice(Notice::Waiting { is_usual, .. }) = effect { Some(*is_usual) } else { None };
        world.said.iter().filter_map(usual).collect()
    };
    world.pass(6, &workers);
    assert_eq!(waits(&world).last(), Some(&false));
    let workers = [workers[0], world.join(None).unwrap()];
    world.pass(6, &workers);
    assert_eq!(waits(&world).last(), Some(&true));
}

#[test]
fn process_that_comes_back_on_a_new_stream_is_a_newcomer() {
    let mut world = World::new(config(1));
    let old = world.hello(Some(0), 5, 0).unwrap();
    world.ready(old);
    world.bootstrap(old);
    let new = world.hello(Some(0), 5, 1).unwrap();
    assert_ne!(old, new);
    assert!(matches!(world.say(old, FromWorker::Leaving { reason: String::new() }), Err(CoreError::StaleStream)));
    assert!(matches!(world.hello(Some(0), 5, 1), Err(CoreError::StaleStream)), "an attempt is not repeated");
    world.ready(new);
    assert_eq!(world.core.generation(), Generation(2));
}

#[test]
fn leases_of_a_worker_that_leaves_while_a_generation_forms_go_to_others() {
    let (mut world, workers) = World::running(2);
    world.lease(workers[1], 1);
    let cause = StopCause::Aborted;
    workers.iter().for_each(|&worker| world.stopped_with(worker, 0, cause, vec![], "a collective failed", None));
    assert_eq!(world.core.state(), "forming");
    world.event(Event::Drain { rank: Rank(1) }).unwrap();
    assert!(world.core.leases.holders().is_empty());
}

#[test]
fn newcomer_that_leaves_while_the_others_regroup_takes_nothing_along() {
    let (mut world, workers) = World::running(2);
    let (leases, _) = world.lease(workers[0], 1);
    world.report(workers[0], 1, Some(&names(0, leases[0].shard, 0..2)));
    world.report(workers[1], 1, None);
    world.die(workers[1]);
    let newcomer = world.join(None).unwrap();
    world.event(Event::Drain { rank: Rank(1) }).unwrap();
    assert!(matches!(world.sent(newcomer).last(), Some(ToWorker::Stop { reason: StopReason::Drained, .. })));
    assert_eq!((world.core.final_step(), world.core.ledger().totals().committed), (Step(1), 2));
    world.stopped(workers[0], 1, StopCause::Aborted, vec![]);
    assert_eq!((world.core.final_step(), world.outcome()), (Step(1), None));
}

#[test]
fn member_that_leaves_while_the_others_regroup_says_first_what_it_holds() {
    let (mut world, workers) = World::running(2);
    world.die(workers[1]);
    world.say(workers[0], FromWorker::Leaving { reason: "SIGTERM".into() }).unwrap();
    assert!(!world.sent(workers[0]).iter().any(|message| matches!(message, ToWorker::Stop { .. })));
    let record = world.record(1, &[]);
    world.stopped(workers[0], 1, StopCause::Aborted, vec![record]);
    assert_eq!(world.core.final_step(), Step(1));
}

#[test]
fn spare_that_leaves_while_a_generation_forms_does_not_disturb_it() {
    let mut world = World::new(config(2));
    let workers = [world.join(None).unwrap(), world.join(None).unwrap()];
    workers.iter().for_each(|&worker| world.ready(worker));
    let spare = world.join(None).unwrap();
    world.event(Event::Drain { rank: Rank(2) }).unwrap();
    assert!(matches!(world.sent(spare).last(), Some(ToWorker::Stop { reason: StopReason::Drained, .. })));
    assert_eq!((world.core.state().as_str(), world.core.generation()), ("forming", Generation(1)));
    world.bootstrap(workers[0]);
    assert_eq!(world.core.state(), "training");
}

#[test]
fn word_of_an_older_generation_says_nothing_of_the_current_one() {
    let (mut world, workers) = World::running(2);
    workers.iter().for_each(|&worker| world.stopped(worker, 0, StopCause::Aborted, vec![]));
    world.bootstrap(workers[0]);
    assert_eq!(world.core.generation(), Generation(2));
    let old = Stopped { generation: Generation(1), ..Stopped::empty_handed(Generation(1)) };
    let error = world.say(workers[0], FromWorker::Stopped(old)).unwrap_err();
    assert_eq!(error, CoreError::StaleGeneration { got: Generation(1), current: Generation(2) });
    // Not while they regroup either, of a generation that has not been.
    world.die(workers[1]);
    let future = Stopped::empty_handed(Generation(3));
    let error = world.say(workers[0], FromWorker::Stopped(future)).unwrap_err();
    assert_eq!(error, CoreError::StaleGeneration { got: Generation(3), current: Generation(2) });
    assert_eq!(world.core.state(), "regrouping");
}

#[test]
fn drained_worker_leaves_after_the_step_and_the_others_wait() {
    let (mut world, workers) = World::running(2);
    world.event(Event::Drain { rank: Rank(1) }).unwrap();
    let record = world.record(1, &[]);
    world.stopped(workers[0], 1, StopCause::Planned, vec![record]);
    world.stopped(workers[1], 1, StopCause::Planned, vec![]);
    assert!(matches!(world.sent(workers[1]).last(), Some(ToWorker::Stop { reason: StopReason::Drained, .. })));
    assert_eq!((world.core.state().as_str(), world.core.first_failure()), ("waiting for rank 1", None));
    assert_eq!(world.event(Event::Drain { rank: Rank(1) }), Err(CoreError::NobodyHasRank(Rank(1))));
}

#[test]
fn missing_ranks_that_follow_each_other_are_named_as_a_span() {
    for (present, text) in
        [(&[1][..], "waiting for ranks 0, 2-4"), (&[0, 1, 2, 4], "waiting for rank 3"), (&[1, 3], "waiting for ranks 0, 2, 4")]
    {
        let mut world = World::new(config(5));
        present.iter().for_each(|&rank| {
            let worker = world.join(Some(rank)).unwrap();
            world.ready(worker);
        });
        assert_eq!(world.core.waiting_for(), text);
    }
}

#[test]
fn worker_that_comes_back_for_the_rank_of_another_is_refused_and_stays_what_it_was() {
    let (mut world, workers) = World::running(2);
    assert!(matches!(world.hello(Some(1), 1000, 1), Err(CoreError::RankTaken { .. })));
    assert!(world.core.workers.contains_key(&workers[0]) && world.core.state() == "training");
}

#[test]
fn times_beyond_what_the_wire_takes_are_the_longest_it_takes() {
    let forever = Duration::from_secs(u64::from(u32::MAX));
    let mut world = World::new(Config { heartbeat_timeout: forever, join_timeout: forever, ..config(1) });
    let worker = world.join(None).unwrap();
    let Some(ToWorker::Welcome { heartbeat_timeout_ms, heartbeat_interval_ms, .. }) = world.sent(worker).pop() else { panic!() };
    assert_eq!((heartbeat_timeout_ms, heartbeat_interval_ms), (u32::MAX, u32::MAX));
}
