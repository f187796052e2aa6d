//! Hosts and workers that keep failing, and jobs that get nowhere.

use super::*;

fn set_aside(world: &World) -> Vec<String> {
    let what = |effect: &Effect| match effect {
        Effect::Notice(Notice::SetAside { what, .. }) => Some(what.clone()),
        _ => None,
    };
    world.said.iter().filter_map(what).collect()
}

impl World {
    fn join_on(&mut self, host: &str) -> WorkerId {
        let worker = self.load_on(host);
        self.ready(worker);
        worker
    }

    /// A worker that has joined and loads its models.
    fn load_on(&mut self, host: &str) -> WorkerId {
        self.streams += 1;
        let stream = StreamId(self.streams);
        let hello = Hello {
            protocol_version: PROTOCOL_VERSION,
            program_version: PROGRAM_VERSION.into(),
            incarnation: Incarnation(5000 + self.streams),
            attempt: 0,
            requested_rank: None,
            host: host.into(),
            pid: 1,
            device: "cpu".into(),
        };
        self.event(Event::Hello { stream, hello }).unwrap();
        let worker = self.core.workers.iter().find(|(_, worker)| worker.stream == stream).map(|(&id, _)| id).unwrap();
        self.stream_of.insert(worker, stream);
        worker
    }

    fn fail_for_good(&mut self, worker: WorkerId) {
        let failure = FromWorker::Failure { phase: "loading".into(), message: "no such file".into(), permanent: true };
        self.say(worker, failure).unwrap();
    }

    /// The generation forms and its first step is done by all.
    fn train_a_step(&mut self, step: u64) -> Vec<WorkerId> {
        let first = match &self.core.phase {
            JobPhase::Forming { members, .. } => members[0],
            _ => panic!("{}", self.core.state()),
        };
        self.bootstrap(first);
        let members = self.core.members().to_vec();
        for (index, &member) in members.iter().enumerate() {
            self.report(member, step, (index == 0).then_some(&[][..]));
        }
        members
    }
}

impl World {
    /// Two members lose each other in the step after `step`; whoever else is there names one of them.
    fn lose_each_other(&mut self, workers: &[WorkerId], step: u64, pair: [u32; 2]) {
        let record = self.record(step, &[]);
        let generation = self.core.generation();
        for (index, &worker) in workers.iter().enumerate() {
            // Whoever fails closes its connections: the others name one that is well.
            let lost = if index as u32 == pair[0] { pair[1] } else { pair[0] };
            let stopped = Stopped {
                applied: Step(step),
                records: vec![record.clone()],
                reason: format!("lost member {lost}"),
                trained_in: generation,
                lost_member: Some(MemberIndex(lost)),
                ..Stopped::empty_handed(generation)
            };
            self.say(worker, FromWorker::Stopped(stopped)).unwrap();
        }
    }

    /// How often somebody was to be let in.
    fn num_planned(&self) -> usize {
        self.said.iter().filter(|effect| matches!(effect, Effect::Notice(Notice::Planned { .. }))).count()
    }
}

#[test]
fn shard_whose_readers_keep_dying_is_left_for_later_and_its_samples_are_not_lost() {
    let mut world = World::new(config(2));
    let steady = world.join(Some(0)).unwrap();
    world.ready(steady);
    let mut held: Vec<BTreeSet<ShardId>> = Vec::new();
    for step in 1..=3 {
        let victim = world.join(Some(1)).unwrap();
        world.ready(victim);
        world.train_a_step(step);
        held.push(world.lease(victim, 2).0.iter().map(|lease| lease.shard).collect());
        assert!(set_aside(&world).is_empty());
        world.die(victim);
        let record = world.record(step, &[]);
        world.stopped(steady, step, StopCause::Aborted, vec![record]);
    }
    let always: BTreeSet<ShardId> = &(&held[0] & &held[1]) & &held[2];
    assert!(!always.is_empty(), "{held:?}: what was given back comes first");
    let what = set_aside(&world);
    assert!(what.len() == always.len() && what[0].ends_with("3 workers in a row died while they held it"), "{what:?}");
    // The next gets another one, and these after ten minutes.
    let next = world.join(Some(1)).unwrap();
    world.ready(next);
    world.train_a_step(4);
    assert!(!always.contains(&world.lease(next, 1).0[0].shard));
    world.pass(600, &[steady, next]);
    let (leases, _) = world.lease(next, 8);
    assert!(always.is_subset(&leases.iter().map(|lease| lease.shard).collect()), "{leases:?}");
}

#[test]
fn host_on_which_workers_keep_dying_is_left_out_for_ten_minutes() {
    let mut world = World::new(Config { min_world_size: 1, ..config(2) });
    world.join_on("good");
    let mut bad = world.join_on("bad");
    for step in 1..=3 {
        let members = world.train_a_step(step);
        assert_eq!(members.len(), 2);
        world.die(bad);
        let record = world.record(step, &[]);
        world.stopped(members[0], step, StopCause::Aborted, vec![record]);
        world.bootstrap(members[0]);
        bad = world.join_on("bad");
        if step < 3 {
            // Let in by a meeting.
            world.stopped(members[0], step, StopCause::Planned, vec![]);
        }
    }
    assert_eq!(set_aside(&world), ["host bad: its workers died in 3 generations within 10 minutes"]);
    assert_eq!((world.num_planned(), world.core.state().as_str()), (2, "training"), "it is not let in a third time");
    let alive: Vec<WorkerId> = world.core.workers.keys().copied().collect();
    world.pass(595, &alive);
    assert_eq!(world.num_planned(), 2, "nor before its time is over");
    world.pass(6, &alive);
    assert_eq!(world.num_planned(), 3, "its time is over");
}

#[test]
fn only_host_of_a_job_is_never_left_out() {
    let mut world = World::new(Config { min_world_size: 1, ..config(2) });
    world.join_on("only");
    let mut mortal = world.join_on("only");
    for step in 1..=4 {
        let members = world.train_a_step(step);
        world.die(mortal);
        let record = world.record(step, &[]);
        world.stopped(members[0], step, StopCause::Aborted, vec![record]);
        world.bootstrap(members[0]);
        mortal = world.join_on("only");
        world.stopped(members[0], step, StopCause::Planned, vec![]);
    }
    assert_eq!((world.num_planned(), set_aside(&world)), (4, vec![]), "who takes the place of the dead is let in each time");
}

#[test]
fn host_that_loses_all_its_workers_at_once_has_failed_once() {
    let mut world = World::new(Config { min_world_size: 1, ..config(4) });
    let workers: Vec<WorkerId> = ["one", "two", "two", "two"].iter().map(|host| world.join_on(host)).collect();
    world.train_a_step(1);
    workers[1..].iter().for_each(|&worker| world.die(worker));
    assert_eq!(set_aside(&world), [""; 0]);
}

#[test]
fn job_that_cannot_do_without_a_failing_host_uses_it() {
    let mut world = World::new(config(2));
    world.join_on("good");
    let mut bad = world.join_on("bad");
    for step in 1..=4 {
        let members = world.train_a_step(step);
        world.die(bad);
        let record = world.record(step, &[]);
        world.stopped(members[0], step, StopCause::Aborted, vec![record]);
        bad = world.join_on("bad");
        assert_eq!(world.core.state(), "forming");
    }
    assert_eq!(set_aside(&world).len(), 1);
}

#[test]
fn one_of_two_workers_that_keep_losing_each_other_is_left_out() {
    let mut world = World::new(Config { min_world_size: 1, ..config(3) });
    let workers: Vec<WorkerId> = ["a", "b", "c"].iter().map(|host| world.join_on(host)).collect();
    for step in 1..=3 {
        world.train_a_step(step);
        world.lose_each_other(&workers, step, [1, 2]);
    }
    let name = |rank| format!("rank {rank} (pid 1 on {})", ["a", "b", "c"][rank]);
    let expected = format!("{}: its connection with {} broke 3 times within 10 minutes though both live", name(2), name(1));
    assert_eq!(set_aside(&world), [expected]);
    assert_eq!(world.train_a_step(4), workers[..2], "the others go on without it");
    world.now += Duration::from_secs(1);
    for &worker in &workers {
        let beat = Heartbeat { step: Step(4), phase: Phase::Waiting, generation: Generation::NONE, reads: 0, memory: Memory::default() };
        world.say(worker, FromWorker::Heartbeat(beat)).unwrap();
    }
    world.event(Event::Tick).unwrap();
    workers[..2].iter().for_each(|&worker| world.stopped(worker, 4, StopCause::Aborted, vec![]));
    assert_eq!(world.train_a_step(5), workers[..2], "and still do a while later");
}

#[test]
fn one_of_two_workers_that_cannot_reach_each_other_is_left_out_though_all_four_fail() {
    let mut world = World::new(Config { min_world_size: 1, ..config(4) });
    let workers: Vec<WorkerId> = ["a", "b", "c", "d"].iter().map(|host| world.join_on(host)).collect();
    for round in 1..=3 {
        assert_eq!(set_aside(&world), [""; 0], "before round {round}");
        world.bootstrap(workers[0]);
        let generation = world.core.generation();
        // As `peapod_collective::Error` has it: who called in vain, who is told of it, and two that are told of the others.
        let said = [(1, Some(2), "could not reach member 2 at 10.0.0.3:7800"), (2, Some(1), ""), (0, None, ""), (3, None, "")];
        for (index, lost, reason) in said {
            let lost_member = lost.map(MemberIndex);
            let stopped = Stopped { lost_member, reason: reason.into(), ..Stopped::empty_handed(generation) };
            world.say(workers[index], FromWorker::Stopped(stopped)).unwrap();
        }
    }
    let expected = "rank 2 (pid 1 on c): its connection with rank 1 (pid 1 on b) broke 3 times within 10 minutes though both live";
    assert_eq!(set_aside(&world), [expected]);
    let first = world.core.first_failure().unwrap();
    assert_eq!(first, "rank 1 (pid 1 on b) at step 0: could not reach member 2 at 10.0.0.3:7800; member 2 is rank 2 (pid 1 on c)");
}

#[test]
fn host_is_left_out_where_the_others_are_just_enough() {
    let mut world = World::new(Config { min_world_size: 3, ..config(4) });
    let good = [world.join_on("one"), world.join_on("two"), world.join_on("three")];
    let mut bad = world.join_on("bad");
    for step in 1..=3 {
        assert_eq!(world.train_a_step(step).len(), 4, "step {step}");
        world.die(bad);
        let record = world.record(step, &[]);
        good.iter().for_each(|&worker| world.stopped(worker, step, StopCause::Aborted, vec![record.clone()]));
        world.bootstrap(good[0]);
        bad = world.join_on("bad");
        if step < 3 {
            good.iter().for_each(|&worker| world.stopped(worker, step, StopCause::Planned, vec![]));
        }
    }
    assert_eq!((set_aside(&world).len(), world.num_planned(), world.core.members()), (1, 2, &good[..]));
    // They meet again for another reason.
    good.iter().for_each(|&worker| world.stopped(worker, 3, StopCause::Aborted, vec![]));
    assert_eq!(world.train_a_step(4), good);
}

#[test]
fn who_loses_others_more_often_is_the_one_left_out() {
    let mut world = World::new(Config { min_world_size: 1, ..config(3) });
    let workers: Vec<WorkerId> = ["a", "b", "c"].iter().map(|host| world.join_on(host)).collect();
    for (step, pair) in [[0, 2], [0, 2], [0, 1], [0, 1], [0, 1]].into_iter().enumerate() {
        assert_eq!(set_aside(&world), [""; 0], "before round {step}");
        assert_eq!(world.train_a_step(step as u64 + 1), workers);
        world.lose_each_other(&workers, step as u64 + 1, pair);
    }
    let expected = "rank 0 (pid 1 on a): its connection with rank 1 (pid 1 on b) broke 3 times within 10 minutes though both live";
    assert_eq!(set_aside(&world), [expected]);
    assert_eq!(world.train_a_step(6), workers[1..]);
}

#[test]
fn what_failed_ten_minutes_ago_is_forgotten() {
    let mut world = World::new(Config { min_world_size: 1, ..config(2) });
    let workers = [world.join_on("a"), world.join_on("b")];
    for step in 1..=3 {
        world.train_a_step(step);
        if step == 3 {
            world.now += Duration::from_secs(600);
        }
        world.lose_each_other(&workers, step, [0, 1]);
    }
    assert_eq!(set_aside(&world), [""; 0], "twice then, and once now");
}

#[test]
fn members_that_received_little_are_not_blamed_where_nothing_hung() {
    let mut world = World::new(Config { min_world_size: 1, ..config(2) });
    let workers = [world.join_on("a"), world.join_on("b")];
    for step in 1..=4 {
        world.train_a_step(step);
        let (record, generation) = (world.record(step, &[]), world.core.generation());
        for (index, &worker) in workers.iter().enumerate() {
            let stalled = Some(peapod_proto::message::Stall { waiting_for: MemberIndex(1 - index as u32), received_bytes: index as u64 });
            let (applied, records) = (Step(step), vec![record.clone()]);
            let stopped = Stopped { applied, records, trained_in: generation, stalled, ..Stopped::empty_handed(generation) };
            world.say(worker, FromWorker::Stopped(stopped)).unwrap();
        }
    }
    assert_eq!(set_aside(&world), [""; 0]);
}

#[test]
fn link_under_an_all_reduce_that_hangs_is_the_one_to_whom_least_came() {
    let mut world = World::new(Config { min_world_size: 1, ..config(4) });
    let workers: Vec<WorkerId> = ["a", "b", "c", "d"].iter().map(|host| world.join_on(host)).collect();
    world.train_a_step(1);
    for step in 2..=8 {
        if step > 6 {
            world.train_a_step(step);
        } else {
            world.now += Duration::from_secs(1);
            workers.iter().enumerate().for_each(|(index, &worker)| world.report(worker, step, (index == 0).then_some(&[][..])));
        }
        if step < 6 {
            continue;
        }
        let generation = world.core.generation();
        for _ in 0..60 {
            world.now += Duration::from_secs(1);
            for &worker in &workers {
                let beat = Heartbeat { step: Step(step), phase: Phase::Collective, generation, reads: 0, memory: Memory::default() };
                world.say(worker, FromWorker::Heartbeat(beat)).unwrap();
            }
            world.event(Event::Tick).unwrap();
            if world.core.state() == "regrouping" {
                break;
            }
        }
        assert_eq!(world.core.state(), "regrouping");
        let record = world.record(step, &[]);
        for (index, received_bytes) in [(0, 900), (1, 700), (2, 10), (3, 400)] {
            let stalled = Some(peapod_proto::message::Stall { waiting_for: MemberIndex((index + 3) % 4), received_bytes });
            let (applied, records) = (Step(step), vec![record.clone()]);
            let stopped = Stopped { applied, records, trained_in: generation, stalled, ..Stopped::empty_handed(generation) };
            world.say(workers[index as usize], FromWorker::Stopped(stopped)).unwrap();
        }
    }
    let expected = "rank 2 (pid 1 on c): its connection with rank 1 (pid 1 on b) broke 3 times within 10 minutes though both live";
    assert_eq!(set_aside(&world), [expected]);
}

#[test]
fn job_of_which_no_generation_gets_anywhere_ends_and_says_why() {
    let (mut world, workers) = World::running(2);
    for round in 0..20 {
        assert_eq!(world.outcome(), None, "after {round} generations");
        world.stopped(workers[0], 0, StopCause::Aborted, vec![]);
        world.stopped(workers[1], 0, StopCause::Aborted, vec![]);
        if world.outcome().is_none() {
            // What goes wrong at once, time after time, may be over in a moment.
            let waits = if round < 2 { "forming" } else { "a pause, as " };
            assert!(world.core.state().starts_with(waits), "{round}: {}", world.core.state());
            world.pass(6, &workers);
            world.bootstrap(workers[0]);
        }
    }
    assert!(world.now > Duration::from_secs(60));
    let Some(Outcome::Failed { reason }) = world.outcome() else { panic!("{}", world.core.state()) };
    assert!(reason.starts_with("20 generations in a row broke before their first step was done; the first failure: rank 0"), "{reason}");
}

/// A deadline that lies in the past would keep the coordinator busy until the pause is over.
#[test]
fn pause_is_slept_through_where_enough_workers_are_there() {
    let mut world = World::new(Config { min_world_size: 1, ..config(2) });
    let workers = ["a", "b"].map(|host| world.join_on(host));
    world.bootstrap(workers[0]);
    world.pass(120, &workers);
    for round in 1..=3 {
        workers.iter().for_each(|&worker| world.stopped(worker, 0, StopCause::Aborted, vec![]));
        if round < 3 {
            world.bootstrap(workers[0]);
        }
    }
    assert!(world.core.state().contains("a pause, as 3 generations"), "{}", world.core.state());
    let deadline = world.core.next_deadline().unwrap();
    assert!(deadline > world.now, "{deadline:?} at {:?}", world.now);
    world.now += Duration::from_millis(100);
    world.event(Event::Tick).unwrap();
    assert_eq!(world.core.state(), "forming");
}

#[test]
fn spare_that_fails_for_good_is_left_out_with_its_host_and_the_job_goes_on() {
    let mut world = World::new(Config { min_world_size: 1, ..config(2) });
    let members = ["a", "b"].map(|host| world.join_on(host));
    world.train_a_step(1);
    let spare = world.load_on("bad");
    world.fail_for_good(spare);
    assert_eq!((world.outcome(), world.core.state().as_str()), (None, "training"));
    assert_eq!(set_aside(&world), ["host bad: rank 2 (pid 1 on bad) failed in phase loading: no such file"]);
    assert!(!world.core.workers.contains_key(&spare) && world.core.failure().is_none(), "it is nothing to the job");
    let again = world.load_on("bad");
    world.fail_for_good(again);
    assert_eq!(set_aside(&world).len(), 1, "said once");

    // A third one loads; it may not stand in for a member that dies while the other is enough.
    let third = world.join_on("bad");
    world.die(members[1]);
    let record = world.record(1, &[]);
    world.stopped(members[0], 1, StopCause::Aborted, vec![record]);
    assert_eq!(world.train_a_step(2), [members[0]]);
    world.pass(601, &[members[0], third]);
    let joins = |effect: &Effect| matches!(effect, Effect::Notice(Notice::Planned { reason }) if reason == "rank 2 joins");
    assert!(world.said.iter().any(joins), "its time is over");
}

#[test]
fn one_that_takes_a_dead_members_place_and_fails_for_good_does_not_end_the_job_of_the_others() {
    let (mut world, workers) = World::running(2);
    world.report(workers[0], 1, Some(&[]));
    world.die(workers[1]);
    let record = world.record(1, &[]);
    world.stopped(workers[0], 1, StopCause::Aborted, vec![record]);
    let newcomer = world.load_on("bad");
    world.fail_for_good(newcomer);
    assert_eq!((world.outcome(), world.core.state().as_str()), (None, "waiting for rank 1"));
    world.join_on("good");
    assert_eq!(world.core.state(), "forming");
}

#[test]
fn failure_that_leaves_too_few_to_begin_ends_the_job_where_workers_are_alike() {
    let mut world = World::new(Config { min_world_size: 2, workers_are_alike: true, ..config(3) });
    let workers = ["a", "b", "c"].map(|host| world.load_on(host));
    world.fail_for_good(workers[0]);
    assert_eq!(world.outcome(), None, "two are enough");
    world.fail_for_good(workers[1]);
    let Some(Outcome::Failed { reason }) = world.outcome() else { panic!("{}", world.core.state()) };
    assert_eq!(reason, "rank 1 (pid 1 on b) failed in phase loading: no such file");
}

#[test]
fn job_that_has_not_begun_waits_for_another_in_place_of_one_that_could_not_load() {
    let mut world = World::new(Config { min_world_size: 1, ..config(2) });
    // Twice the same mistake, on the same rank.
    for _ in 0..2 {
        let wrong = world.load_on("a");
        world.fail_for_good(wrong);
        assert_eq!((world.outcome(), world.core.workers.len()), (None, 0));
    }
    assert!(world.core.first_failure().unwrap().contains("failed in phase loading: no such file"));
    let right = world.join_on("a");
    world.pass(31, &[right]);
    assert_eq!(world.train_a_step(1), [right]);
}

#[test]
fn what_every_rank_fails_of_ends_the_job_and_so_does_a_wait_for_nobody() {
    let mut world = World::new(config(2));
    let workers = ["a", "b"].map(|host| world.load_on(host));
    world.fail_for_good(workers[0]);
    assert_eq!(world.outcome(), None);
    world.fail_for_good(workers[1]);
    assert_eq!(world.outcome(), Some(Outcome::Failed { reason: "rank 1 (pid 1 on b) failed in phase loading: no such file".into() }));

    let mut world = World::new(config(2));
    let worker = world.load_on("a");
    world.fail_for_good(worker);
    world.pass(61, &[]);
    let Some(Outcome::Failed { reason }) = world.outcome() else { panic!("{}", world.core.state()) };
    assert!(reason.starts_with("rank 0 (pid 1 on a) failed in phase loading: no such file; then waiting for "), "{reason}");
}

#[test]
fn host_on_which_another_worker_is_well_is_not_left_out_for_one_that_failed() {
    let mut world = World::new(config(1));
    world.join_on("host");
    world.train_a_step(1);
    let spare = world.load_on("host");
    world.fail_for_good(spare);
    assert_eq!((world.outcome(), set_aside(&world)), (None, vec![]));
}

#[test]
fn job_that_gets_a_step_on_now_and_then_goes_on() {
    let (mut world, workers) = World::running(2);
    for round in 1..=40 {
        let step = round / 19;
        if round % 19 == 0 {
            world.report(workers[0], step, Some(&[]));
            world.report(workers[1], step, None);
        }
        workers.iter().for_each(|&worker| world.stopped(worker, step, StopCause::Aborted, vec![]));
        assert_eq!(world.outcome(), None, "after {round} generations");
        world.pass(6, &workers);
        world.bootstrap(workers[0]);
    }
}
