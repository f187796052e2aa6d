//! Members that live and do not get on, and a coordinator that stood still.

use super::*;

impl World {
    /// Says what a worker does, once a second, while `seconds` pass.
    fn spend(&mut self, seconds: u64, doing: &[(WorkerId, u64, Phase, u64)]) {
        for _ in 0..seconds {
            self.now += Duration::from_secs(1);
            for &(worker, step, phase, reads) in doing {
                let beat = Heartbeat { step: Step(step), phase, generation: self.core.generation(), reads, memory: Memory::default() };
                let _ = self.say(worker, FromWorker::Heartbeat(beat));
            }
            self.event(Event::Tick).unwrap();
        }
    }

    /// Steps of a second each, until the job's pace is known.
    fn learn(&mut self, workers: &[WorkerId]) {
        for step in 1..=5 {
            self.now += Duration::from_secs(1);
            for (index, &worker) in workers.iter().enumerate() {
                self.report(worker, step, (index == 0).then_some(&[][..]));
            }
        }
    }

    /// Who was lost first, and why.
    fn lost(&self) -> Option<String> {
        let lost = |effect: &Effect| match effect {
            Effect::Notice(Notice::Lost { worker, cause }) => Some(format!("{worker}: {cause}")),
            _ => None,
        };
        self.said.iter().find_map(lost)
    }
}

#[test]
fn member_that_the_others_wait_for_is_given_up_after_five_of_the_slowest_steps() {
    let (mut world, workers) = World::running(3);
    world.learn(&workers);
    let doing = [(workers[0], 5, Phase::Collective, 9), (workers[1], 5, Phase::Compute, 9), (workers[2], 5, Phase::Collective, 9)];
    world.spend(5, &doing);
    assert_eq!(world.core.state(), "training");
    world.spend(3, &doing);
    let lost = world.lost().expect("given up");
    assert!(lost.starts_with("rank 1 (pid 1 on host): it lives but has not got on in phase compute for "), "{lost}");
    assert!(lost.ends_with("s (5.0 s allowed); 2 others wait for it in the all-reduce of step 6"), "{lost}");
    assert!(world.core.first_failure().unwrap().contains("in phase compute"));
    // It is told, and those that waited leave their collective.
    assert!(matches!(world.sent(workers[1])[..], [.., ToWorker::Stop { reason: StopReason::GivenUp, .. }]));
    assert!(world.sent(workers[0]).iter().any(|message| matches!(message, ToWorker::Abort { .. })));
}

#[test]
fn limit_is_never_below_the_heartbeat_timeout_and_follows_the_slowest_step() {
    let (mut world, workers) = World::running(2);
    for step in 1..=5 {
        world.now += Duration::from_millis(10);
        world.report(workers[0], step, Some(&[]));
        world.report(workers[1], step, None);
    }
    let doing = [(workers[0], 5, Phase::Collective, 0), (workers[1], 5, Phase::Update, 0)];
    world.spend(3, &doing);
    assert_eq!(world.lost(), None, "50 ms would be less than three seconds");
    world.spend(3, &doing);
    assert!(world.lost().unwrap().contains("(3.0 s allowed)"));
}

#[test]
fn what_is_announced_may_take_ten_minutes() {
    for phase in [Phase::Validating, Phase::Sampling, Phase::Warming] {
        let (mut world, workers) = World::running(2);
        world.learn(&workers);
        let doing = [(workers[0], 5, Phase::Collective, 0), (workers[1], 5, phase, 0)];
        world.spend(595, &doing);
        assert_eq!(world.lost(), None, "{phase:?}");
        world.spend(10, &doing);
        assert!(world.lost().is_some(), "{phase:?}");
    }
}

#[test]
fn first_steps_may_take_ten_minutes_as_nothing_is_known_about_them() {
    let (mut world, workers) = World::running(2);
    let doing = [(workers[0], 0, Phase::Collective, 0), (workers[1], 0, Phase::Compute, 0)];
    world.spend(595, &doing);
    assert_eq!(world.lost(), None);
    world.spend(10, &doing);
    assert!(world.lost().unwrap().starts_with("rank 1"));
}

#[test]
fn validation_does_not_teach_how_long_a_step_takes() {
    let (mut world, workers) = World::running(2);
    world.learn(&workers);
    world.now += Duration::from_secs(100);
    for (index, &worker) in workers.iter().enumerate() {
        let timings = StepTimings { validation: 99.0, ..StepTimings::default() };
        let record = (index == 0).then(|| world.record(6, &[]));
        let generation = world.core.generation();
        let report = StepReport { generation, step: Step(6), record, timings, snapshot: None };
        world.say(worker, FromWorker::StepReport(report)).unwrap();
    }
    let doing = [(workers[0], 6, Phase::Collective, 0), (workers[1], 6, Phase::Compute, 0)];
    world.spend(8, &doing);
    assert!(world.lost().unwrap().contains("(5.0 s allowed)"));
}

#[test]
fn slow_source_is_not_a_stuck_one() {
    let (mut world, workers) = World::running(2);
    world.learn(&workers);
    for read in 0..10 {
        world.spend(20, &[(workers[0], 5, Phase::Collective, 0), (workers[1], 5, Phase::Data, read)]);
        assert_eq!(world.lost(), None);
    }
    // Nothing more comes, longer than the worker itself would wait for a store.
    world.spend(35, &[(workers[0], 5, Phase::Collective, 0), (workers[1], 5, Phase::Data, 10)]);
    assert!(world.lost().unwrap().contains("phase data"), "{:?}", world.lost());
}

#[test]
fn member_that_waits_for_shards_is_no_culprit() {
    let mut world = World::new(Config { epochs: Some(1), last_step: None, ..config(2) });
    let workers = [world.join(None).unwrap(), world.join(None).unwrap()];
    workers.iter().for_each(|&worker| world.ready(worker));
    world.bootstrap(workers[0]);
    world.learn(&workers);
    world.lease(workers[0], 2);
    world.lease(workers[1], 2);
    // All shards are given out; the other still reads, and has been asked for what it has not begun.
    let generation = world.core.generation();
    world.say(workers[1], FromWorker::LeaseRequest { generation, num_leases: 1, is_idle: true }).unwrap();
    world.spend(60, &[(workers[0], 5, Phase::Data, 0), (workers[1], 5, Phase::Data, 0)]);
    assert!(world.lost().unwrap().starts_with("rank 0"), "{:?}", world.lost());
}

#[test]
fn member_that_hangs_while_it_is_to_get_shards_later_is_a_culprit() {
    let mut world = World::new(Config { epochs: Some(1), last_step: None, ..config(2) });
    let workers = [world.join(None).unwrap(), world.join(None).unwrap()];
    workers.iter().for_each(|&worker| world.ready(worker));
    world.bootstrap(workers[0]);
    world.learn(&workers);
    let generation = world.core.generation();
    world.lease(workers[0], 2);
    world.lease(workers[1], 2);
    world.say(workers[1], FromWorker::LeaseRequest { generation, num_leases: 1, is_idle: true }).unwrap();
    assert!(world.core.lease_requests.contains_key(&workers[1]), "all shards are out");
    world.spend(9, &[(workers[0], 5, Phase::Collective, 9), (workers[1], 5, Phase::Compute, 9)]);
    assert!(world.lost().expect("given up").starts_with("rank 1"));
}

#[test]
fn only_member_waits_for_nobody_and_is_given_up() {
    let (mut world, workers) = World::running(1);
    world.learn(&workers);
    world.spend(9, &[(workers[0], 5, Phase::Collective, 9)]);
    assert!(world.lost().expect("given up").starts_with("rank 0"));
}

#[test]
fn first_all_reduce_of_a_generation_has_half_a_minute() {
    let (mut world, workers) = World::running(2);
    world.learn(&workers);
    workers.iter().for_each(|&worker| world.stopped(worker, 5, StopCause::Aborted, vec![]));
    world.bootstrap(workers[0]);
    let doing = [(workers[0], 5, Phase::Collective, 9), (workers[1], 5, Phase::Collective, 9)];
    world.spend(29, &doing);
    assert_eq!((world.core.state().as_str(), world.lost()), ("training", None));
    world.spend(4, &doing);
    let aborted =
        |effect: &Effect| matches!(effect, Effect::Notice(Notice::Aborted { reason, .. }) if reason.contains("all-reduce of step 6"));
    assert_eq!((world.core.state().as_str(), world.lost()), ("regrouping", None));
    assert!(world.said.iter().any(aborted));
}

#[test]
fn network_that_hangs_under_all_members_ends_the_generation_and_blames_none() {
    let (mut world, workers) = World::running(2);
    world.learn(&workers);
    let doing = [(workers[0], 5, Phase::Collective, 0), (workers[1], 5, Phase::Collective, 0)];
    world.spend(8, &doing);
    assert_eq!(world.lost(), None);
    let failure = world.core.first_failure().unwrap();
    assert!(failure.starts_with("all 2 members are in the all-reduce of step 6 and none has got on for"), "{failure}");
    for &worker in &workers {
        assert!(world.sent(worker).iter().any(|message| matches!(message, ToWorker::Abort { .. })));
        world.stopped(worker, 5, StopCause::Aborted, vec![]);
    }
    assert_eq!(world.core.state(), "forming");
}

#[test]
fn step_that_hung_does_not_teach_how_long_one_takes() {
    let (mut world, workers) = World::running(2);
    world.learn(&workers);
    world.spend(8, &[(workers[0], 5, Phase::Collective, 0), (workers[1], 5, Phase::Collective, 0)]);
    // It was done all the same, as those say who leave it.
    for &worker in &workers {
        let record = world.record(6, &[]);
        world.stopped(worker, 6, StopCause::Aborted, vec![record]);
    }
    assert_eq!(world.core.final_step(), Step(6));
    world.bootstrap(workers[0]);
    for step in 7..=8 {
        world.now += Duration::from_secs(1);
        world.report(workers[0], step, Some(&[]));
        world.report(workers[1], step, None);
    }
    world.spend(8, &[(workers[0], 8, Phase::Collective, 0), (workers[1], 8, Phase::Compute, 0)]);
    assert!(world.lost().expect("given up").contains("(5.0 s allowed)"), "{:?}", world.lost());
}

#[test]
fn member_that_does_not_come_to_meet_the_others_is_given_up_and_they_are_not() {
    let (mut world, workers) = World::running(3);
    // Nothing is known about the job's steps, and all have been at it for as long.
    world.spend(602, &[(workers[0], 0, Phase::Connecting, 0), (workers[1], 0, Phase::Waiting, 0), (workers[2], 0, Phase::Connecting, 0)]);
    assert!(world.lost().unwrap().starts_with("rank 1 "), "{:?}", world.lost());
    for &well in &[workers[0], workers[2]] {
        assert!(world.sent(well).iter().all(|message| !matches!(message, ToWorker::Stop { .. })));
        world.stopped(well, 0, StopCause::Aborted, vec![]);
    }
}

#[test]
fn network_through_which_nobody_can_connect_is_named_and_blames_none() {
    let (mut world, workers) = World::running(2);
    world.spend(602, &[(workers[0], 0, Phase::Connecting, 0), (workers[1], 0, Phase::Connecting, 0)]);
    assert_eq!(world.lost(), None);
    let failure = world.core.first_failure().unwrap();
    assert!(failure.starts_with("all 2 members are opening their connections for g000001 and none has got on for"), "{failure}");
}

#[test]
fn newcomer_that_loads_for_ever_is_given_up() {
    let mut world = World::new(Config { min_world_size: 1, ..config(2) });
    let first = world.join(None).unwrap();
    world.ready(first);
    world.pass(30, &[first]);
    world.bootstrap(first);
    let newcomer = world.join(None).unwrap();
    for minute in 0..10 {
        assert_eq!(world.lost(), None, "after {minute} minutes");
        world.report(first, minute + 1, Some(&[]));
        world.spend(60, &[(first, minute + 1, Phase::Compute, minute), (newcomer, 0, Phase::Loading, 0)]);
    }
    world.spend(3, &[(first, 10, Phase::Update, 9), (newcomer, 0, Phase::Loading, 0)]);
    assert!(world.lost().unwrap().starts_with("rank 1 (pid 1 on host): it lives but has not got on in phase loading for 60"));
    assert_eq!(world.core.state(), "training", "the others do not notice");
}

#[test]
fn coordinator_that_stood_still_takes_nobody_for_dead() {
    let (mut world, workers) = World::running(2);
    world.learn(&workers);
    let by = Duration::from_secs(40);
    world.now += by;
    world.event(Event::Stalled { by }).unwrap();
    world.event(Event::Tick).unwrap();
    assert_eq!((world.lost(), world.core.state().as_str()), (None, "training"));
    // From here on silence counts again.
    world.now += Duration::from_secs(3);
    world.event(Event::Tick).unwrap();
    assert!(world.lost().unwrap().contains("no sign of life"));
}

#[test]
fn end_of_a_process_explains_the_first_failure() {
    let (mut world, workers) = World::running(2);
    world.now += Duration::from_secs(7);
    world.die(workers[1]);
    let process = Process { host: "host".into(), pid: 1 };
    let log = vec!["last words".to_owned()];
    // The pid of the dead one only; in this table every worker has it, so the other is given another.
    let unknown = Process { pid: 2, ..process.clone() };
    world.event(Event::Exited { process: unknown, cause: "exited with code 9".into(), log: vec![] }).unwrap();
    assert!(!world.core.first_failure().unwrap().contains("code 9"));
    world.stopped(workers[0], 0, StopCause::Aborted, vec![]);
    world.die(workers[0]);
    world.event(Event::Exited { process, cause: "was killed by signal 11 (SIGSEGV)".into(), log: log.clone() }).unwrap();
    let failure = world.core.failure().unwrap();
    assert!(failure.text.starts_with("rank 1") && failure.text.ends_with("; the process was killed by signal 11 (SIGSEGV)"), "{failure:?}");
    assert_eq!((failure.at, &failure.log), (Some(Duration::from_secs(7)), &log));
}

#[test]
fn exit_of_a_process_is_its_death_before_its_stream_ends() {
    let (mut world, workers) = World::running(1);
    let process = Process { host: "host".into(), pid: 1 };
    world.event(Event::Exited { process, cause: "exited with code 1".into(), log: vec![] }).unwrap();
    assert_eq!(world.core.first_failure(), Some("rank 0 (pid 1 on host) lost at step 0 in phase waiting: exited with code 1"));
    assert!(world.core.workers(world.now).is_empty());
    let stream = world.stream_of[&workers[0]];
    world.event(Event::Closed { worker: workers[0], stream, cause: "late".into() }).unwrap();
}

#[test]
fn survivor_in_the_middle_of_something_long_has_the_time_that_it_may_take_to_leave() {
    for (phase, enough, too_long) in [
        (Phase::Compute, 595, 10),
        (Phase::Warming, 595, 10),
        (Phase::Validating, 595, 10),
        (Phase::Connecting, 29, 3),
        (Phase::Collective, 3, 2),
        (Phase::Data, 3, 2),
        (Phase::Waiting, 2, 2),
    ] {
        let (mut world, workers) = World::running(3);
        world.die(workers[2]);
        world.stopped(workers[0], 0, StopCause::Aborted, vec![]);
        let mut read = 0;
        let mut spend = |world: &mut World, seconds| {
            for _ in 0..seconds {
                read += 1;
                world.spend(1, &[(workers[0], 0, Phase::Waiting, 0), (workers[1], 0, phase, if phase == Phase::Data { read } else { 0 })]);
            }
        };
        spend(&mut world, enough);
        assert!(world.core.workers.contains_key(&workers[1]), "{phase:?}");
        spend(&mut world, too_long);
        assert!(!world.core.workers.contains_key(&workers[1]), "{phase:?}");
        assert!(world.core.workers.contains_key(&workers[0]), "{phase:?}: it has left");
    }
}

#[test]
fn survivor_that_says_nothing_is_lost_after_the_heartbeat_timeout_whatever_it_was_doing() {
    let (mut world, workers) = World::running(3);
    world.spend(1, &[(workers[0], 0, Phase::Collective, 0), (workers[1], 0, Phase::Compute, 0), (workers[2], 0, Phase::Compute, 0)]);
    world.die(workers[2]);
    world.stopped(workers[0], 0, StopCause::Aborted, vec![]);
    world.spend(3, &[(workers[0], 0, Phase::Waiting, 0)]);
    assert!(!world.core.workers.contains_key(&workers[1]));
}

#[test]
fn job_that_is_to_stop_does_not_wait_for_samples_that_do_not_come() {
    let (mut world, workers) = World::running(2);
    world.learn(&workers);
    world.event(Event::Stop { reason: "Ctrl-C".into() }).unwrap();
    for read in 0..10 {
        world.spend(1, &[(workers[0], 5, Phase::Collective, 0), (workers[1], 5, Phase::Data, read)]);
    }
    assert_eq!(world.core.state(), "training, to meet after this step");
    for read in 10..13 {
        world.spend(1, &[(workers[0], 5, Phase::Collective, 0), (workers[1], 5, Phase::Data, read)]);
    }
    assert!(workers.iter().all(|&worker| world.sent(worker).iter().any(|message| matches!(message, ToWorker::Abort { .. }))));
    workers.iter().for_each(|&worker| world.stopped(worker, 5, StopCause::Aborted, vec![]));
    world.event(Event::CheckpointStored { step: Step(5), generation: Generation(1) }).unwrap();
    assert_eq!(world.outcome(), Some(Outcome::Stopped { reason: "Ctrl-C".into() }));
}

#[test]
fn step_that_no_job_comes_to_is_said_without_harm() {
    let (mut world, workers) = World::running(2);
    world.learn(&workers);
    world.spend(8, &[(workers[0], 5, Phase::Collective, 9), (workers[1], u64::MAX, Phase::Compute, 9)]);
    assert!(world.lost().unwrap().starts_with("rank 1"));
}
