use super::*;
use peapod_proto::ids::MemberIndex;
use peapod_proto::message::{Memory, StopCause};

fn welcome(job: &str) -> Input {
    welcome_to(job, Generation::NONE)
}

fn welcome_to(job: &str, continues: Generation) -> Input {
    Input::Said(ToWorker::Welcome {
        worker: WorkerId(1),
        rank: Rank(0),
        world_size: 2,
        job_id: job.into(),
        job_toml: "toml".into(),
        heartbeat_interval_ms: 500,
        heartbeat_timeout_ms: 3000,
        join_timeout_ms: 600_000,
        continues,
    })
}

fn loaded() -> Input {
    Input::Trainer(TrainerEvent::Loaded { model_digest: vec![1], num_parameters: 5 })
}

fn ready() -> Action {
    Action::Send(FromWorker::Ready { model_digest: vec![1], num_parameters: 5 })
}

fn assignment(generation: u64) -> Assignment {
    Assignment {
        generation: Generation(generation),
        member_index: MemberIndex(0),
        num_members: 2,
        bootstrap: vec![1],
        base_step: Step(0),
        base_generation: Generation(0),
        source_index: MemberIndex(0),
        broadcast_state: true,
        checkpoint_step: None,
        held_leases: vec![],
        global_batch: 16,
    }
}

fn training(generation: u64) -> Lifecycle {
    let mut life = Lifecycle::new();
    life.handle(welcome("a"));
    life.handle(loaded());
    life.handle(Input::Said(ToWorker::Assignment(assignment(generation))));
    life
}

#[test]
fn worker_loads_once_and_says_ready() {
    let mut life = Lifecycle::new();
    assert!(life.handle(welcome("a")).contains(&Action::Load { job_toml: "toml".into(), rank: Rank(0) }));
    assert_eq!(life.handle(loaded()), [ready()]);
}

fn stopped(generation: u64, applied: u64) -> Stopped {
    Stopped { applied: Step(applied), trained_in: Generation(generation), ..Stopped::empty_handed(Generation(generation)) }
}

fn report(lease: u64, skipped: &[u32], num_samples: Option<u32>) -> ShardReport {
    let skip =
        |&index: &u32| SkippedSample { index, reason: peapod_proto::message::SkipReason::Bad, key: String::new(), detail: String::new() };
    ShardReport { lease: LeaseId(lease), skipped: skipped.iter().map(skip).collect(), num_samples, truncated: String::new() }
}

fn record(step: u64) -> StepRecord {
    StepRecord {
        step: Step(step),
        generation: Generation(3),
        names: vec![],
        native: 0,
        skipped: false,
        losses: Default::default(),
        validation: None,
    }
}

fn step(step: u64) -> Input {
    Input::Trainer(TrainerEvent::Step(step_report(step)))
}

fn step_report(step: u64) -> StepReport {
    let timings = Default::default();
    StepReport { generation: Generation(3), step: Step(step), record: Some(record(step)), timings, snapshot: None }
}

#[test]
fn first_member_tells_the_samples_of_a_step_and_every_member_keeps_them_until_they_are_on_disk() {
    let mut first = training(3);
    assert_eq!(first.handle(step(1)), [Action::Send(FromWorker::StepReport(step_report(1)))]);
    let mut other = Lifecycle::new();
    other.handle(welcome("a"));
    other.handle(loaded());
    other.handle(Input::Said(ToWorker::Assignment(Assignment { member_index: MemberIndex(1), ..assignment(3) })));
    let wordless = StepReport { record: None, ..step_report(1) };
    assert_eq!(other.handle(step(1)), [Action::Send(FromWorker::StepReport(wordless))]);
    other.handle(step(2));
    let durable = |generation| Input::Said(ToWorker::Durable { generation: Generation(generation), step: Step(1) });
    other.handle(durable(2));
    other.handle(durable(3));
    let said = other.handle(Input::Trainer(TrainerEvent::Stopped(stopped(3, 2))));
    assert_eq!(said, [Action::Send(FromWorker::Stopped(Stopped { records: vec![record(2)], ..stopped(3, 2) }))]);
    // Those of an older generation are no longer anybody's concern.
    other.handle(Input::Said(ToWorker::Assignment(assignment(4))));
    let said = other.handle(Input::Trainer(TrainerEvent::Stopped(stopped(4, 2))));
    assert_eq!(said, [Action::Send(FromWorker::Stopped(stopped(4, 2)))]);
}

#[test]
fn worker_stays_in_its_generation_when_a_coordinator_that_was_started_again_takes_it_up() {
    let mut life = training(3);
    life.handle(step(1));
    life.handle(Input::StreamLost { cause: "reset".into() });
    assert!(life.handle(step(2)).is_empty());
    let actions = life.handle(welcome_to("a", Generation(3)));
    let continuing = Continuing { generation: Generation(3), applied: Step(2), records: vec![record(1), record(2)] };
    let said = [ready(), Action::Send(FromWorker::Continuing(continuing)), Action::AskForLeases];
    assert_eq!(actions[1..], said);
    assert_eq!(life.handle(step(3)), [Action::Send(FromWorker::StepReport(step_report(3)))]);
    assert_eq!(life.handle(Input::NeedLeases { num: 1, is_idle: false }).len(), 1);
}

#[test]
fn spare_is_told_that_it_is_one() {
    let mut life = Lifecycle::new();
    let Input::Said(ToWorker::Welcome { worker, world_size, job_id, job_toml, continues, .. }) = welcome("a") else { unreachable!() };
    let actions = life.welcome((worker, Rank(2)), world_size, job_id, job_toml, continues);
    let text = "joined as a spare, rank 2: stands in when one of the 2 workers is lost".into();
    assert_eq!(actions[0], Action::Log { text });
}

#[test]
fn worker_trains_on_without_its_coordinator_and_says_what_it_holds_when_that_is_back() {
    let mut life = training(3);
    let actions = life.handle(Input::StreamLost { cause: "reset".into() });
    assert!(matches!(&actions[..], [Action::Log { .. }, Action::Reconnect]));
    assert!(life.handle(Input::NeedLeases { num: 1, is_idle: false }).is_empty(), "nobody to ask");
    // Back, and no model is loaded again. This coordinator has gone on without it: it leaves its generation before it says what it holds.
    let actions = life.handle(welcome("a"));
    assert!(matches!(actions.last(), Some(Action::Abort { generation: Generation(3), .. })), "{actions:?}");
    let actions = life.handle(Input::Trainer(TrainerEvent::Stopped(stopped(3, 8))));
    assert_eq!(actions, [Action::Send(FromWorker::Stopped(stopped(3, 8))), ready()]);
}

#[test]
fn generation_that_ends_while_the_coordinator_is_away_is_told_when_it_is_back() {
    let mut life = training(3);
    life.handle(Input::StreamLost { cause: "reset".into() });
    assert!(life.handle(Input::Trainer(TrainerEvent::Stopped(stopped(3, 8)))).is_empty());
    let actions = life.handle(welcome("a"));
    assert_eq!(actions[1..], [Action::Send(FromWorker::Stopped(stopped(3, 8))), ready()]);
    // And again on every further stream: this one may have been too short.
    life.handle(Input::StreamLost { cause: "reset".into() });
    assert!(life.handle(welcome("a")).contains(&Action::Send(FromWorker::Stopped(stopped(3, 8)))));
}

#[test]
fn worker_that_never_trained_comes_back_with_empty_hands() {
    let mut life = Lifecycle::new();
    life.handle(welcome("a"));
    life.handle(loaded());
    life.handle(Input::StreamLost { cause: "reset".into() });
    let empty = FromWorker::Stopped(Stopped::empty_handed(Generation::NONE));
    assert_eq!(life.handle(welcome("a"))[1..], [Action::Send(empty), ready()]);
}

#[test]
fn what_was_read_of_held_shards_is_said_again_to_a_coordinator_that_comes_back() {
    let mut life = training(1);
    life.handle(Input::Read(report(4, &[2], None)));
    life.handle(Input::Read(report(5, &[], Some(9))));
    life.handle(Input::StreamLost { cause: "reset".into() });
    life.handle(Input::Read(report(4, &[7], Some(10))));
    let reports = |actions: Vec<Action>| -> Vec<ShardReport> {
        let report = |action| match action {
            Action::Send(FromWorker::ShardReport(report)) => Some(report),
            _ => None,
        };
        actions.into_iter().filter_map(report).collect()
    };
    assert_eq!(reports(life.handle(welcome("a"))), [report(4, &[2, 7], Some(10)), report(5, &[], Some(9))]);
    // What the next generation does not hold any more is done.
    life.handle(Input::Said(ToWorker::Assignment(Assignment { held_leases: vec![LeaseId(5)], ..assignment(2) })));
    life.handle(Input::StreamLost { cause: "reset".into() });
    assert_eq!(reports(life.handle(welcome("a"))), [report(5, &[], Some(9))]);
}

fn beat(life: &mut Lifecycle) {
    let heartbeat = Heartbeat {
        step: Step(1),
        phase: peapod_proto::message::Phase::Compute,
        generation: Generation(3),
        reads: 0,
        memory: Memory::default(),
    };
    assert_eq!(life.handle(Input::Beat(heartbeat)), [Action::Send(FromWorker::Heartbeat(heartbeat))]);
}

/// The coordinator answers a heartbeat, and says in which generation steps are on disk.
fn answer(life: &mut Lifecycle, durable_in: u64) {
    life.handle(Input::Said(ToWorker::HeartbeatReply { generation: Generation(3), running: true, waiting_for: String::new() }));
    life.handle(Input::Said(ToWorker::Durable { generation: Generation(durable_in), step: Step(9) }));
}

#[test]
fn what_was_read_is_forgotten_once_a_heartbeat_after_it_is_answered_and_what_was_heard_is_on_disk() {
    let mut life = training(3);
    life.handle(Input::Read(report(4, &[2], None)));
    beat(&mut life);
    life.handle(Input::Read(report(4, &[7], Some(9))));
    life.handle(Input::Read(report(5, &[3], Some(9))));
    // However far the steps are: the reports may still be on their way.
    answer(&mut life, 3);
    assert_eq!(life.read.len(), 2);
    beat(&mut life);
    beat(&mut life);
    life.handle(Input::Read(report(6, &[], None)));
    life.handle(Input::Said(ToWorker::HeartbeatReply { generation: Generation(3), running: true, waiting_for: String::new() }));
    assert_eq!(life.read.len(), 3, "heard, and not on disk");
    answer(&mut life, 3);
    assert_eq!(life.read.keys().collect::<Vec<_>>(), [&LeaseId(6)]);
}

#[test]
fn what_is_said_again_waits_for_a_heartbeat_of_the_new_stream() {
    let mut life = training(3);
    for _ in 0..5 {
        beat(&mut life);
        answer(&mut life, 3);
    }
    life.handle(Input::Read(report(4, &[2], None)));
    life.handle(Input::StreamLost { cause: "reset".into() });
    // One that was sent before the welcome, and so before what is said again.
    beat(&mut life);
    assert!(life.handle(welcome_to("a", Generation(3))).contains(&Action::Send(FromWorker::ShardReport(report(4, &[2], None)))));
    answer(&mut life, 3);
    assert_eq!(life.read.len(), 1);
    beat(&mut life);
    answer(&mut life, 2);
    assert_eq!(life.read.len(), 1, "word of another generation");
    beat(&mut life);
    answer(&mut life, 3);
    assert!(life.read.is_empty());
}

#[test]
fn one_that_has_to_leave_its_generation_keeps_what_it_has_read() {
    let mut life = training(3);
    life.handle(Input::Read(report(4, &[2], None)));
    life.handle(Input::StreamLost { cause: "reset".into() });
    // This coordinator knows it by a new name, under which it holds no lease. Started again it may know it by the old one.
    life.handle(welcome("a"));
    beat(&mut life);
    answer(&mut life, 3);
    life.handle(Input::StreamLost { cause: "reset".into() });
    assert!(life.handle(welcome("a")).contains(&Action::Send(FromWorker::ShardReport(report(4, &[2], None)))));
}

#[test]
fn what_was_given_back_is_said_again_to_a_coordinator_that_comes_back() {
    let mut life = training(1);
    life.handle(Input::StreamLost { cause: "reset".into() });
    life.handle(Input::GaveBack { lease: LeaseId(4), from: 7 });
    let gave_back = Action::Send(FromWorker::GaveBack { lease: LeaseId(4), from: 7 });
    assert!(life.handle(welcome("a")).contains(&gave_back), "or the rest would be waited for in vain");
    life.handle(Input::Said(ToWorker::Assignment(Assignment { held_leases: vec![LeaseId(5)], ..assignment(2) })));
    life.handle(Input::StreamLost { cause: "reset".into() });
    assert!(!life.handle(welcome("a")).contains(&gave_back));
}

#[test]
fn models_that_finish_loading_while_the_stream_is_down_are_announced_on_the_next() {
    let mut life = Lifecycle::new();
    life.handle(welcome("a"));
    life.handle(Input::StreamLost { cause: "reset".into() });
    assert!(life.handle(loaded()).is_empty());
    assert!(life.handle(welcome("a")).contains(&ready()));
}

#[test]
fn coordinator_that_lost_the_run_ends_the_worker_with_try_again() {
    let mut life = training(1);
    life.handle(Input::StreamLost { cause: "reset".into() });
    assert!(matches!(life.handle(welcome("b"))[..], [Action::Exit { code: TRY_AGAIN, .. }]));
}

#[test]
fn lost_abort_is_noticed_in_a_heartbeat_reply() {
    let mut life = training(2);
    let reply = |generation, running| {
        Input::Said(ToWorker::HeartbeatReply { generation: Generation(generation), running, waiting_for: String::new() })
    };
    assert!(life.handle(reply(2, true)).is_empty());
    assert!(matches!(life.handle(reply(2, false))[..], [Action::Abort { generation: Generation(2), .. }]));
    assert!(matches!(life.handle(reply(3, true))[..], [Action::Abort { generation: Generation(2), .. }]));
    life.handle(Input::Trainer(TrainerEvent::Stopped(Stopped {
        generation: Generation(2),
        applied: Step(1),
        cause: StopCause::Aborted,
        records: vec![],
        reason: String::new(),
        validation: None,
        trained_in: Generation(2),
        lost_member: None,
        stalled: None,
    })));
    assert!(life.handle(reply(3, true)).is_empty(), "outside of a generation there is nothing to abort");
}

#[test]
fn grant_of_an_older_generation_keeps_its_leases_but_not_its_end() {
    let mut life = training(2);
    let grant = |generation| {
        Input::Said(ToWorker::LeaseGrant { generation: Generation(generation), leases: vec![], none_left: true, ask_when_idle: false })
    };
    assert_eq!(life.handle(grant(2)), [Action::Grant { leases: vec![], none_left: true, ask_when_idle: false }]);
    assert_eq!(life.handle(grant(1)), [Action::Grant { leases: vec![], none_left: false, ask_when_idle: false }]);
}

#[test]
fn leases_are_asked_for_in_a_generation_only() {
    let mut life = training(2);
    assert_eq!(
        life.handle(Input::NeedLeases { num: 2, is_idle: false }),
        [Action::Send(FromWorker::LeaseRequest { generation: Generation(2), num_leases: 2, is_idle: false })]
    );
    assert!(Lifecycle::new().handle(Input::NeedLeases { num: 2, is_idle: false }).is_empty());
}

#[test]
fn first_signal_leaves_in_order_and_the_second_at_once() {
    let mut life = training(1);
    assert!(life.handle(Input::Signal(StopSignal::Terminated)).contains(&Action::Send(FromWorker::Leaving { reason: "SIGTERM".into() })));
    let message = "Ctrl-C: left at once, without what was in flight".into();
    assert_eq!(life.handle(Input::Signal(StopSignal::Interrupted)), [Action::Exit { code: 130, message }]);
    assert!(!life.left_in_order());
    assert!(life.handle(welcome("a")).is_empty(), "who has left does nothing more");
}

#[test]
fn exit_code_tells_how_the_job_ended() {
    for (reason, expected) in [
        (StopReason::Finished, 0),
        (StopReason::Stopped, 0),
        (StopReason::Drained, 0),
        (StopReason::Failed, 1),
        (StopReason::GivenUp, TRY_AGAIN),
    ] {
        let actions = training(1).handle(Input::Said(ToWorker::Stop { reason, message: "m".into() }));
        assert!(matches!(actions[..], [Action::Exit { code, .. }] if code == expected), "{reason:?}");
    }
}

#[test]
fn one_that_a_signal_sent_away_has_not_finished() {
    let drained = || Input::Said(ToWorker::Stop { reason: StopReason::Drained, message: "m".into() });
    let lost = || Input::StreamLost { cause: "m".into() };
    use StopSignal::{HungUp, Interrupted, Terminated};
    for (signal, last, expected) in
        [(Terminated, drained(), 143), (Interrupted, drained(), 130), (HungUp, drained(), 129), (Terminated, lost(), 143)]
    {
        let mut life = training(1);
        life.handle(Input::Signal(signal));
        let actions = life.handle(last);
        assert!(matches!(actions[..], [Action::Exit { code, .. }] if code == expected), "{signal:?}: {actions:?}");
        assert!(life.left_in_order());
    }
}

#[test]
fn terminal_that_goes_twice_makes_nobody_leave_at_once() {
    let mut life = training(1);
    assert!(!life.handle(Input::Signal(StopSignal::HungUp)).is_empty());
    assert_eq!(life.handle(Input::Signal(StopSignal::HungUp)), []);
    assert!(matches!(life.handle(Input::Signal(StopSignal::Terminated))[..], [Action::Exit { code: 143, .. }]));
}
