//! The rules by table: a hand-made clock, workers that are no more than ids.

use peapod_proto::ids::{Epoch, Incarnation, LeaseId, Rank, SampleName};
use peapod_proto::message::{
    Assignment, Heartbeat, Hello, Lease, Phase, ShardReport, SkipReason, SkippedSample, StepLosses, StepRecord, StepReport, StepTimings,
    StopCause, StopReason, ValidationLosses,
};
use peapod_proto::{PROGRAM_VERSION, PROTOCOL_VERSION};

use super::*;

mod elastic;
mod replay;

fn config(world_size: u32) -> Config {
    Config {
        world_size,
        min_world_size: world_size,
        heartbeat_timeout: Duration::from_secs(3),
        join_timeout: Duration::from_secs(60),
        job_id: "job".into(),
        job_toml: String::new(),
        seed: 1,
        shards: (0..4).map(|shard| format!("{shard}.tar")).collect(),
        epochs: None,
        last_step: Some(Step(100)),
        global_batch: 16,
        scale_batch: false,
        checkpoint_every: Duration::from_secs(300),
        max_bad_fraction: 0.05,
        max_skipped_steps: 2,
    }
}

/// A core with a clock and a memory of what it said.
struct World {
    core: Core,
    now: Timestamp,
    streams: u64,
    said: Vec<Effect>,
    stream_of: BTreeMap<WorkerId, StreamId>,
}

impl World {
    fn new(config: Config) -> Self {
        Self { core: Core::new(config, None), now: Duration::ZERO, streams: 0, said: Vec::new(), stream_of: BTreeMap::new() }
    }

    /// A world of `size` ready workers in generation 1.
    fn running(size: u32) -> (Self, Vec<WorkerId>) {
        let mut world = Self::new(config(size));
        let workers: Vec<WorkerId> = (0..size).map(|rank| world.join(Some(rank)).unwrap()).collect();
        for &worker in &workers {
            world.ready(worker);
        }
        world.bootstrap(workers[0]);
        (world, workers)
    }

    fn event(&mut self, event: Event) -> Result<(), CoreError> {
        let before = format!("{:?}", self.core);
        match self.core.step(self.now, event) {
            Ok(effects) => {
                self.said.extend(effects);
                Ok(())
            }
            Err(error) => {
                // A refused message is still a sign of life, but nothing else may have moved.
                let strip = |text: &str| {
                    text.split("last_seen").map(|part| part.split_once(',').map_or(part, |(_, rest)| rest).to_owned()).collect::<Vec<_>>()
                };
                assert_eq!(strip(&before), strip(&format!("{:?}", self.core)), "refused with {error}, yet changed");
                Err(error)
            }
        }
    }

    fn hello(&mut self, rank: Option<u32>, incarnation: u64, attempt: u32) -> Result<WorkerId, CoreError> {
        self.streams += 1;
        let stream = StreamId(self.streams);
        let hello = Hello {
            protocol_version: PROTOCOL_VERSION,
            program_version: PROGRAM_VERSION.into(),
            incarnation: Incarnation(incarnation),
            attempt,
            requested_rank: rank.map(Rank),
            host: "host".into(),
            pid: 1,
            device: "cpu".into(),
        };
        self.event(Event::Hello { stream, hello })?;
        let attached = self.said.iter().rev().find_map(|effect| match effect {
            Effect::Attach { worker, stream: attached } if *attached == stream => Some(*worker),
            _ => None,
        });
        let worker = attached.expect("a welcome worker is attached");
        self.stream_of.insert(worker, stream);
        Ok(worker)
    }

    fn join(&mut self, rank: Option<u32>) -> Result<WorkerId, CoreError> {
        let incarnation = 1000 + self.streams;
        self.hello(rank, incarnation, 0)
    }

    fn say(&mut self, worker: WorkerId, message: FromWorker) -> Result<(), CoreError> {
        let stream = self.stream_of[&worker];
        self.event(Event::Message { worker, stream, message })
    }

    fn ready(&mut self, worker: WorkerId) {
        self.say(worker, FromWorker::Ready { model_digest: vec![7], num_parameters: 10 }).unwrap();
    }

    fn bootstrap(&mut self, worker: WorkerId) {
        let generation = self.core.generation();
        self.say(worker, FromWorker::Bootstrap { generation, bytes: vec![1] }).unwrap();
    }

    fn record(&self, step: u64, names: &[SampleName]) -> StepRecord {
        StepRecord {
            step: Step(step),
            generation: self.core.generation(),
            names: names.to_vec(),
            native: 0,
            skipped: false,
            losses: StepLosses::default(),
            validation: None,
        }
    }

    /// A report; with names it is member 0's.
    fn report(&mut self, worker: WorkerId, step: u64, names: Option<&[SampleName]>) {
        self.report_with(worker, step, names, None).unwrap();
    }

    fn report_with(&mut self, worker: WorkerId, step: u64, names: Option<&[SampleName]>, snapshot: Option<u64>) -> Result<(), CoreError> {
        let record = names.map(|names| self.record(step, names));
        let generation = self.core.generation();
        self.say(
            worker,
            FromWorker::StepReport(StepReport { generation, step: Step(step), record, timings: StepTimings::default(), snapshot }),
        )
    }

    fn stopped(&mut self, worker: WorkerId, applied: u64, cause: StopCause, records: Vec<StepRecord>) {
        let reason = if cause == StopCause::Aborted { "peer lost" } else { "" };
        self.stopped_with(worker, applied, cause, records, reason, None);
    }

    fn stopped_with(
        &mut self,
        worker: WorkerId,
        applied: u64,
        cause: StopCause,
        records: Vec<StepRecord>,
        reason: &str,
        validation: Option<ValidationLosses>,
    ) {
        let generation = self.core.generation();
        let (base, base_generation) = (self.core.truth.step, self.core.truth.generation);
        let trained_in = if Step(applied) == base { base_generation } else { generation };
        let (applied, reason, lost_member) = (Step(applied), reason.into(), None);
        let stopped = Stopped { generation, applied, cause, records, reason, validation, trained_in, lost_member };
        self.say(worker, FromWorker::Stopped(stopped)).unwrap();
    }

    /// The steps whose validation was said, in order.
    fn validated(&self) -> Vec<u64> {
        let step = |effect: &Effect| match effect {
            Effect::Validated(losses) => Some(losses.step.0),
            _ => None,
        };
        self.said.iter().filter_map(step).collect()
    }

    fn die(&mut self, worker: WorkerId) {
        let stream = self.stream_of[&worker];
        self.event(Event::Closed { worker, stream, cause: "connection reset".into() }).unwrap();
    }

    fn lease(&mut self, worker: WorkerId, num: u32) -> (Vec<Lease>, bool) {
        let generation = self.core.generation();
        self.say(worker, FromWorker::LeaseRequest { generation, num_leases: num }).unwrap();
        match self.sent(worker).pop() {
            Some(ToWorker::LeaseGrant { leases, none_left, .. }) => (leases, none_left),
            other => panic!("expected a grant, got {other:?}"),
        }
    }

    fn sent(&self, to: WorkerId) -> Vec<ToWorker> {
        let message = |effect: &Effect| match effect {
            Effect::Send { worker, message } if *worker == to => Some(message.clone()),
            _ => None,
        };
        self.said.iter().filter_map(message).collect()
    }

    fn assignment(&self, to: WorkerId) -> Assignment {
        let assignment = |message: ToWorker| match message {
            ToWorker::Assignment(assignment) => Some(assignment),
            _ => None,
        };
        self.sent(to).into_iter().rev().find_map(assignment).expect("an assignment")
    }

    fn outcome(&self) -> Option<Outcome> {
        self.said.iter().find_map(|effect| match effect {
            Effect::Finish(outcome) => Some(outcome.clone()),
            _ => None,
        })
    }

    /// Lets time pass with heartbeats from `alive`.
    fn pass(&mut self, seconds: u64, alive: &[WorkerId]) {
        for _ in 0..seconds {
            self.now += Duration::from_secs(1);
            for &worker in alive {
                let beat = Heartbeat { step: Step(0), phase: Phase::Waiting, generation: Generation::NONE };
                let _ = self.say(worker, FromWorker::Heartbeat(beat));
            }
            self.event(Event::Tick).unwrap();
        }
    }
}

fn losses(step: u64) -> ValidationLosses {
    ValidationLosses { step: Step(step), samples: 8, task: 0.5, logit: 0.5, feature: 0.5 }
}

fn names(epoch: u32, shard: ShardId, indices: std::ops::Range<u32>) -> Vec<SampleName> {
    indices.map(|index| SampleName { epoch: Epoch(epoch), shard, index }).collect()
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
fn step_is_final_when_all_reported_it_or_one_reported_the_next() {
    let (mut world, workers) = World::running(2);
    let (leases, _) = world.lease(workers[0], 1);
    let shard = leases[0].shard;
    world.report(workers[0], 1, Some(&names(0, shard, 0..2)));
    assert_eq!(world.core.final_step(), Step(0));
    world.report(workers[1], 1, None);
    assert_eq!((world.core.final_step(), world.core.ledger().totals().committed), (Step(1), 2));
    world.report(workers[0], 2, Some(&names(0, shard, 2..3)));
    world.report(workers[0], 3, Some(&names(0, shard, 3..4)));
    assert_eq!(world.core.final_step(), Step(2), "step 3 was entered, so all had applied 2");
}

#[test]
fn final_step_waits_for_its_record() {
    let (mut world, workers) = World::running(2);
    world.report(workers[1], 1, None);
    world.report(workers[1], 2, None);
    assert_eq!(world.core.final_step(), Step(0), "member 0's names of step 1 are still on their way");
    world.report(workers[0], 1, Some(&[]));
    assert_eq!(world.core.final_step(), Step(1));
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
fn source_decides_an_all_reduce_that_finished_on_some_ranks_only() {
    // Members 0 and 1 applied step 2 and reported it; member 2 failed in it and member 0 died. What member 1 holds is the truth.
    let (mut world, workers) = World::running(3);
    let (leases, _) = world.lease(workers[0], 1);
    let (first, second) = (names(0, leases[0].shard, 0..1), names(0, leases[0].shard, 1..2));
    world.report(workers[0], 1, Some(&first));
    world.report(workers[0], 2, Some(&second));
    world.report(workers[1], 1, None);
    world.die(workers[0]);
    let (step1, step2) = (world.record(1, &first), world.record(2, &second));
    world.stopped(workers[1], 2, StopCause::Aborted, vec![step1, step2]);
    world.stopped(workers[2], 1, StopCause::Aborted, vec![]);
    assert_eq!((world.core.final_step(), world.core.ledger().totals().committed), (Step(2), 2));
    let newcomer = world.join(None).unwrap();
    world.ready(newcomer);
    world.bootstrap(newcomer);
    let assignment = world.assignment(workers[2]);
    assert_eq!((assignment.base_step, assignment.source_index, assignment.broadcast_state), (Step(2), MemberIndex(1), true));
    // The next holder of the dead member's shard passes over both samples.
    let (again, _) = world.lease(newcomer, 1);
    assert_eq!(again[0].done.iter().collect::<Vec<_>>(), [0, 1]);
}

#[test]
fn step_that_only_the_dead_applied_is_void() {
    let (mut world, workers) = World::running(2);
    let (leases, _) = world.lease(workers[0], 1);
    let shard = leases[0].shard;
    world.report(workers[0], 1, Some(&names(0, shard, 0..1)));
    world.report(workers[1], 1, None);
    world.report(workers[0], 2, Some(&names(0, shard, 1..2)));
    world.die(workers[0]);
    world.stopped(workers[1], 1, StopCause::Aborted, vec![]);
    assert_eq!((world.core.final_step(), world.core.ledger().totals().committed), (Step(1), 1));
    assert!(world.said.contains(&Effect::Void { generation: Generation(1), after: Step(1) }));
}

#[test]
fn failed_collective_without_a_death_regroups_the_same_members() {
    let (mut world, workers) = World::running(2);
    world.stopped(workers[1], 0, StopCause::Aborted, vec![]);
    assert!(matches!(world.sent(workers[0]).last(), Some(ToWorker::Abort { .. })));
    world.stopped(workers[0], 0, StopCause::Aborted, vec![]);
    assert_eq!(world.core.generation(), Generation(2));
    world.bootstrap(workers[0]);
    assert!(world.assignment(workers[0]).broadcast_state, "at step 0 the fresh weights may have reached nobody");
}

#[test]
fn work_of_an_older_generation_is_void() {
    let (mut world, workers) = World::running(2);
    world.die(workers[1]);
    world.stopped(workers[0], 0, StopCause::Aborted, vec![]);
    let newcomer = world.join(None).unwrap();
    world.ready(newcomer);
    let stale = StepReport { generation: Generation(1), step: Step(1), record: None, timings: StepTimings::default(), snapshot: None };
    let error = world.say(workers[0], FromWorker::StepReport(stale)).unwrap_err();
    assert!(matches!(error, CoreError::StaleGeneration { .. }));
    assert!(matches!(
        world.say(workers[0], FromWorker::LeaseRequest { generation: Generation(1), num_leases: 1 }),
        Err(CoreError::StaleGeneration { .. })
    ));
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
    let waits = world.said.iter().filter(|effect| matches!(effect, Effect::Notice(Notice::Waiting { .. }))).count();
    assert!((10..=14).contains(&waits), "said every five seconds, not {waits} times");
    world.pass(2, &workers[..1]);
    let Some(Outcome::Failed { reason }) = world.outcome() else { panic!("{:?}", world.outcome()) };
    assert!(reason.contains("rank 1 (pid 1 on host) lost") && reason.contains("waiting for rank 1 for 60 s (--join-timeout)"), "{reason}");
    assert!(matches!(world.sent(workers[0]).last(), Some(ToWorker::Stop { reason: StopReason::Failed, .. })));
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
fn ranks_with_different_weights_end_the_job() {
    let (mut world, workers) = World::running(2);
    world.report_with(workers[0], 1, Some(&[]), Some(5)).unwrap();
    world.report_with(workers[1], 1, None, Some(6)).unwrap();
    let Some(Outcome::Failed { reason }) = world.outcome() else { panic!() };
    assert_eq!(reason, "rank 1 holds other weights than rank 0 after step 1: the ranks have diverged");
}

#[test]
fn checkpoint_is_asked_for_by_time() {
    let (mut world, workers) = World::running(2);
    world.pass(301, &workers);
    let asked = world.sent(workers[0]).iter().filter(|message| matches!(message, ToWorker::TakeSnapshot { .. })).count();
    assert_eq!(asked, 1);
}

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
    assert!(matches!(world.join(None), Err(CoreError::Ending(_))));
}

#[test]
fn heartbeats_do_not_break_a_meeting_that_is_under_way() {
    let (mut world, workers) = World::running(3);
    world.event(Event::Drain { rank: Rank(2) }).unwrap();
    let record = world.record(1, &[]);
    world.stopped(workers[0], 1, StopCause::Planned, vec![record]);
    let beat = Heartbeat { step: Step(0), phase: Phase::Collective, generation: Generation(1) };
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
        for lease in &leases[..if complete { 4 } else { 3 }] {
            let report = ShardReport { lease: lease.id, skipped: vec![], num_samples: Some(0), truncated: String::new() };
            world.say(worker, FromWorker::ShardReport(report)).unwrap();
        }
        world.stopped(worker, 0, StopCause::DataDone, vec![]);
        match world.outcome() {
            Some(Outcome::Finished) => assert!(complete),
            Some(Outcome::Failed { reason }) => assert!(!complete && reason.contains("1 shards of epoch 0"), "{reason}"),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn last_checkpoint_that_cannot_be_stored_fails_the_job_after_three_tries() {
    let (mut world, workers) = World::running(1);
    world.report(workers[0], 1, Some(&[]));
    world.stopped(workers[0], 1, StopCause::StepsDone, vec![]);
    for _ in 0..3 {
        assert_eq!(world.outcome(), None);
        world.event(Event::CheckpointFailed { step: Step(1), generation: Generation(1), error: "disk full".into() }).unwrap();
    }
    let Some(Outcome::Failed { reason }) = world.outcome() else { panic!() };
    assert!(reason.contains("disk full") && reason.contains("3 attempts"), "{reason}");
}

#[test]
fn death_of_the_sender_of_the_last_checkpoint_asks_the_next_holder() {
    let (mut world, workers) = World::running(2);
    let record = world.record(1, &[]);
    world.stopped(workers[0], 1, StopCause::StepsDone, vec![record]);
    world.stopped(workers[1], 1, StopCause::StepsDone, vec![]);
    world.die(workers[0]);
    assert!(matches!(world.sent(workers[1]).last(), Some(ToWorker::TakeSnapshot { .. })));
    world.die(workers[1]);
    assert!(matches!(world.outcome(), Some(Outcome::Failed { .. })), "nobody holds the last step");
}

#[test]
fn validation_is_believed_when_the_step_that_carried_it_is_final() {
    let (mut world, workers) = World::running(2);
    world.report(workers[0], 1, Some(&[]));
    world.report(workers[1], 1, None);
    let mut record = world.record(2, &[]);
    record.validation = Some(losses(1));
    let report =
        StepReport { generation: Generation(1), step: Step(2), record: Some(record), timings: StepTimings::default(), snapshot: None };
    world.say(workers[0], FromWorker::StepReport(report)).unwrap();
    assert_eq!((world.validated(), world.core.validation()), (vec![], None), "step 2 may still be void");
    world.report(workers[1], 2, None);
    assert_eq!((world.validated(), world.core.validation()), (vec![1], Some(losses(1))));
}

#[test]
fn validation_that_a_death_made_the_members_repeat_is_said_once() {
    // Member 0 held the sum that carries it and died; what member 1 holds decides.
    let (mut world, workers) = World::running(2);
    world.report(workers[0], 1, Some(&[]));
    world.report(workers[1], 1, None);
    let mut record = world.record(2, &[]);
    record.validation = Some(losses(1));
    let report =
        StepReport { generation: Generation(1), step: Step(2), record: Some(record), timings: StepTimings::default(), snapshot: None };
    world.say(workers[0], FromWorker::StepReport(report)).unwrap();
    world.die(workers[0]);
    world.stopped(workers[1], 1, StopCause::Aborted, vec![]);
    assert_eq!(world.validated(), [0; 0]);
    let newcomer = world.join(None).unwrap();
    world.ready(newcomer);
    world.bootstrap(newcomer);
    let mut record = world.record(2, &[]);
    record.validation = Some(losses(1));
    world.stopped(newcomer, 2, StopCause::Planned, vec![record.clone()]);
    world.stopped(workers[1], 2, StopCause::Planned, vec![record]);
    assert_eq!(world.validated(), [1]);
}

#[test]
fn validation_of_the_last_step_comes_with_the_word_of_whoever_holds_it() {
    let (mut world, workers) = World::running(2);
    let record = world.record(100, &[]);
    let records: Vec<StepRecord> = (1..100).map(|step| world.record(step, &[])).chain([record]).collect();
    world.stopped_with(workers[0], 100, StopCause::StepsDone, records, "", None);
    world.stopped_with(workers[1], 100, StopCause::StepsDone, vec![], "", Some(losses(100)));
    assert_eq!(world.validated(), [100]);
    world.event(Event::CheckpointStored { step: Step(100), generation: Generation(1) }).unwrap();
    assert_eq!(world.outcome(), Some(Outcome::Finished));
}

#[test]
fn death_in_the_exchange_after_the_last_data_does_not_lose_the_job() {
    let mut world = World::new(Config { last_step: None, ..config(3) });
    let workers: Vec<WorkerId> = (0..3).map(|rank| world.join(Some(rank)).unwrap()).collect();
    for &worker in &workers {
        world.ready(worker);
    }
    world.bootstrap(workers[0]);
    for &worker in &workers {
        world.report(worker, 1, (worker == workers[0]).then_some(&[]));
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
fn validation_of_steps_that_are_lost_is_forgotten_and_said_again() {
    let (mut world, workers) = World::running(1);
    world.report_with(workers[0], 1, Some(&[]), Some(1)).unwrap();
    world.event(Event::CheckpointStored { step: Step(1), generation: Generation(1) }).unwrap();
    world.report(workers[0], 2, Some(&[]));
    let validated = |world: &mut World, worker: WorkerId, step: u64| {
        let mut record = world.record(step + 1, &[]);
        record.validation = Some(losses(step));
        let (generation, timings) = (world.core.generation(), StepTimings::default());
        let report = StepReport { generation, step: Step(step + 1), record: Some(record), timings, snapshot: None };
        world.say(worker, FromWorker::StepReport(report)).unwrap();
    };
    validated(&mut world, workers[0], 2);
    world.die(workers[0]);
    assert_eq!(world.core.validation(), None, "step 2 is void");
    let newcomer = world.join(None).unwrap();
    world.ready(newcomer);
    world.bootstrap(newcomer);
    world.report(newcomer, 2, Some(&[]));
    validated(&mut world, newcomer, 2);
    assert_eq!(world.validated(), [2, 2]);
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
fn all_dead_go_back_to_the_checkpoint_and_its_ledger() {
    let (mut world, workers) = World::running(1);
    let (leases, _) = world.lease(workers[0], 1);
    let shard = leases[0].shard;
    world.report_with(workers[0], 1, Some(&names(0, shard, 0..1)), Some(1)).unwrap();
    world.event(Event::CheckpointStored { step: Step(1), generation: Generation(1) }).unwrap();
    world.report(workers[0], 2, Some(&names(0, shard, 1..2)));
    assert_eq!(world.core.ledger().totals().committed, 2);
    world.die(workers[0]);
    assert!(world.said.contains(&Effect::Notice(Notice::RolledBack { from: Step(2), to: Step(1) })));
    assert_eq!(world.core.ledger().totals().committed, 1);
    let newcomer = world.join(None).unwrap();
    world.ready(newcomer);
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
fn too_much_bad_data_ends_the_job_and_the_first_are_shown() {
    let (mut world, workers) = World::running(1);
    let (leases, _) = world.lease(workers[0], 1);
    let bad = |index| SkippedSample { index, reason: SkipReason::Bad, key: format!("k{index}"), detail: "no_jpg: no member .jpg".into() };
    let report =
        |skipped| FromWorker::ShardReport(ShardReport { lease: leases[0].id, skipped, num_samples: None, truncated: String::new() });
    world.say(workers[0], report((0..5).map(bad).collect())).unwrap();
    assert_eq!(world.outcome(), None);
    world.say(workers[0], report((5..30).map(bad).collect())).unwrap();
    let Some(Outcome::Failed { reason }) = world.outcome() else { panic!() };
    assert!(reason.contains("broken, most often no_jpg (30), more than data.max_bad_fraction"), "{reason}");
    let shown = world.said.iter().filter(|effect| matches!(effect, Effect::Notice(Notice::BadData { .. }))).count();
    assert_eq!(shown, 10);
}

#[test]
fn truncated_shard_is_shown_and_one_that_cannot_be_read_counts_as_a_share_of_all() {
    let (mut world, workers) = World::running(1);
    let (leases, _) = world.lease(workers[0], 2);
    let report = |lease: &Lease, num, why: &str| {
        FromWorker::ShardReport(ShardReport { lease: lease.id, skipped: vec![], num_samples: Some(num), truncated: why.into() })
    };
    world.say(workers[0], report(&leases[0], 7, "unexpected end")).unwrap();
    assert!(world.said.iter().any(|effect| matches!(effect, Effect::Notice(Notice::BadData { key, .. }) if key.is_empty())));
    assert_eq!(world.outcome(), None);
    world.say(workers[0], report(&leases[1], 0, "open 3.tar: no such file")).unwrap();
    let Some(Outcome::Failed { reason }) = world.outcome() else { panic!() };
    assert!(reason.starts_with("1 of 4 shards cannot be read at all") && reason.contains("no such file"), "{reason}");
}

#[test]
fn sample_trained_twice_ends_the_job() {
    let (mut world, workers) = World::running(1);
    let twice = names(0, ShardId(0), 0..1);
    world.report(workers[0], 1, Some(&twice));
    world.report(workers[0], 2, Some(&twice));
    let Some(Outcome::Failed { reason }) = world.outcome() else { panic!() };
    assert!(reason.contains("0/0/0 was trained twice"), "{reason}");
}

#[test]
fn skipped_steps_count_their_samples_and_a_row_of_them_ends_the_job() {
    let (mut world, workers) = World::running(1);
    for step in 1..=3 {
        let index = step as u32;
        let mut record = world.record(step, &names(0, ShardId(0), index..index + 1));
        record.skipped = true;
        let report = StepReport {
            generation: Generation(1),
            step: Step(step),
            record: Some(record),
            timings: StepTimings::default(),
            snapshot: None,
        };
        world.say(workers[0], FromWorker::StepReport(report)).unwrap();
        assert_eq!(world.outcome().is_some(), step == 3);
    }
    assert_eq!(world.core.ledger().totals().not_finite, 3);
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
fn grant_says_when_no_lease_is_left() {
    let mut with_epochs = config(1);
    with_epochs.epochs = Some(1);
    let mut world = World::new(with_epochs);
    let worker = world.join(None).unwrap();
    world.ready(worker);
    world.bootstrap(worker);
    let (leases, none_left) = world.lease(worker, 3);
    assert_eq!((leases.len(), none_left), (3, false));
    let (leases, none_left) = world.lease(worker, 3);
    assert_eq!((leases.len(), none_left), (1, true));
}

#[test]
fn request_that_cannot_be_answered_yet_is_answered_when_it_can() {
    let mut with_epochs = config(2);
    with_epochs.epochs = Some(1);
    let mut world = World::new(with_epochs);
    let (a, b) = (world.join(None).unwrap(), world.join(None).unwrap());
    world.ready(a);
    world.ready(b);
    world.bootstrap(a);
    let (own, _) = world.lease(a, 2);
    let asks = FromWorker::LeaseRequest { generation: Generation(1), num_leases: 1 };
    let grants = |world: &World| world.sent(a).iter().filter(|message| matches!(message, ToWorker::LeaseGrant { .. })).count();
    world.say(a, asks).unwrap();
    assert_eq!(grants(&world), 1, "what is left is dealt to the other");
    world.lease(b, 1);
    for lease in &own {
        let report = ShardReport { lease: lease.id, skipped: vec![], num_samples: Some(3), truncated: String::new() };
        world.say(a, FromWorker::ShardReport(report)).unwrap();
    }
    assert_eq!(grants(&world), 2, "it has read its own: it helps out");
}

#[test]
fn durable_steps_are_told_with_the_next_heartbeat() {
    let (mut world, workers) = World::running(1);
    world.report(workers[0], 1, Some(&[]));
    world.pass(1, &workers);
    assert_eq!(world.sent(workers[0]).pop(), Some(ToWorker::Durable { generation: Generation(1), step: Step(1) }));
}
