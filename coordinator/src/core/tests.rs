//! The rules by table: a hand-made clock, workers that are no more than ids.

use peapod_proto::ids::{Epoch, Incarnation, LeaseId, Rank, SampleName};
use peapod_proto::message::{
    Assignment, Continuing, Heartbeat, Hello, Lease, Memory, Phase, ShardReport, SkipReason, SkippedSample, StepLosses, StepRecord,
    StepReport, StepTimings, StopCause, StopReason, ValidationLosses,
};
use peapod_proto::{PROGRAM_VERSION, PROTOCOL_VERSION};

use super::*;

mod checkpoints;
mod data;
mod elastic;
mod ending;
mod exactly_once;
mod explore;
mod found;
mod hangs;
mod membership;
mod replay;
mod setbacks;
mod steps;
mod validation;
mod views;

/// Four shards, and a hundred steps.
pub(crate) fn config(world_size: u32) -> Config {
    Config {
        world_size,
        min_world_size: world_size,
        heartbeat_timeout: Duration::from_secs(3),
        join_timeout: Duration::from_secs(60),
        data_patience: Duration::from_secs(30),
        job_id: "job".into(),
        job_toml: String::new(),
        seed: 1,
        shards: (0..4).map(|shard| format!("{shard}.tar")).collect(),
        sources: Arc::new([Source::unnamed(4)]),
        epochs: None,
        last_step: Some(Step(100)),
        workers_are_alike: false,
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
                self.check_deadline();
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

    /// The driver sleeps until the deadline: nothing may be due before it, and a tick at it has to move it, or the driver would never sleep
    /// again.
    fn check_deadline(&self) {
        let ticked = |at: Timestamp| {
            let mut core = self.core.clone();
            let effects = core.step(at, Event::Tick).unwrap();
            (core, effects)
        };
        let Some(deadline) = self.core.next_deadline() else {
            let (_, effects) = ticked(self.now + Duration::from_secs(86_400));
            assert!(effects.is_empty(), "due without a deadline: {effects:?}");
            return;
        };
        if let Some(before) = deadline.checked_sub(Duration::from_nanos(1)).filter(|before| *before > self.now) {
            let (core, effects) = ticked(before);
            assert!(effects.is_empty(), "due before the deadline {deadline:?}: {effects:?}");
            assert_eq!((core.state(), core.next_deadline()), (self.core.state(), Some(deadline)), "due before the deadline");
        }
        let (core, _) = ticked(deadline.max(self.now));
        let next = core.next_deadline();
        assert!(next.is_none_or(|next| next > deadline.max(self.now)), "the deadline {deadline:?} is {next:?} once it has come");
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
        let stopped = Stopped { generation, applied, cause, records, reason, validation, trained_in, lost_member, stalled: None };
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
        self.say(worker, FromWorker::LeaseRequest { generation, num_leases: num, is_idle: false }).unwrap();
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
                let beat =
                    Heartbeat { step: Step(0), phase: Phase::Waiting, generation: Generation::NONE, reads: 0, memory: Memory::default() };
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
