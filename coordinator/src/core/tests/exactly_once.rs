//! The promise of the data rules, in random worlds: each epoch of each source has each sample in the weights exactly once, or skipped.
//!
//! Workers are modelled: a reader at its own pace, a buffer, shares, and the shares of a step that broke off. Messages keep their order and
//! take their time. The weights are the list of what each step trained; where a new generation starts from an older step, the list is cut.
//!
//! A job is disturbed by deaths, drains, joins, restarts of all of it from its checkpoint, and restarts of the coordinator alone, which
//! goes on from what of its journal was on disk and hears from its workers again what they hold and have read.
//!
//! `PROPTEST_CASES=20000 cargo test -p peapod-coordinator --lib exactly_once` looks at more worlds.

use std::collections::{HashMap, HashSet, VecDeque};

use peapod_proto::ids::{Epoch, Incarnation, LeaseId, Rank, SampleName};
use peapod_proto::message::{
    Assignment, Heartbeat, Hello, Lease, Memory, Phase, ShardReport, SkipReason, SkippedSample, StepLosses, StepRecord, StepReport,
    StepTimings, StopCause,
};
use peapod_proto::{PROGRAM_VERSION, PROTOCOL_VERSION};
use proptest::prelude::*;

use super::*;

/// A job and the misfortunes it has.
#[derive(Debug, Clone)]
struct Case {
    seed: u64,
    /// Weight and sizes of the shards of each source.
    sources: Vec<(f64, Vec<u32>)>,
    epochs: u32,
    world_size: u32,
    /// In thousandths of all steps: deaths, drains, restarts of the whole job, of the coordinator.
    deaths: u64,
    drains: u64,
    restarts: u64,
    away: u64,
    share: usize,
}

fn case() -> impl Strategy<Value = Case> {
    let source = (prop_oneof![Just(1.0), 0.01..50.0_f64], prop::collection::vec(prop_oneof![0..4_u32, 3..30_u32], 1..7));
    let sources = prop::collection::vec(source, 1..4);
    let troubles = (0..120_u64, 0..120_u64, 0..40_u64, 0..80_u64);
    (any::<u64>(), sources, 1..4_u32, 1..6_u32, troubles, 1..5_usize).prop_map(
        |(seed, sources, epochs, world_size, (deaths, drains, restarts, away), share)| Case {
            seed,
            sources,
            epochs,
            world_size,
            deaths,
            drains,
            restarts,
            away,
            share,
        },
    )
}

fn is_filtered(name: SampleName) -> bool {
    (name.shard.0 * 7 + name.index * 5).is_multiple_of(9)
}

impl Case {
    fn trains_something(&self) -> bool {
        let sizes = self.sources.iter().flat_map(|(_, sizes)| sizes);
        let mut names = (0..).zip(sizes).flat_map(|(shard, &size)| names(0, ShardId(shard), 0..size));
        names.any(|name| !is_filtered(name))
    }
}

#[derive(Debug)]
struct Reading {
    lease: Lease,
    next: u32,
}

#[derive(Debug)]
struct Model {
    stream: StreamId,
    incarnation: u64,
    attempt: u32,
    /// Leases it has heard of.
    known: HashSet<LeaseId>,
    /// Those that it gave back before it heard of them.
    refused: HashSet<LeaseId>,
    /// What it said that it has read or given back, lease by lease, for a coordinator that has not heard of it.
    said: Vec<(LeaseId, FromWorker)>,
    /// What it said last that it holds.
    stopped: Stopped,
    /// The generation that trained what it holds.
    trained_in: Generation,
    inbox: VecDeque<ToWorker>,
    reading: VecDeque<Reading>,
    buffer: Vec<(LeaseId, SampleName)>,
    /// What it gave to a step that it did not see the end of, or is not known to stand.
    in_flight: Option<(Step, Vec<(LeaseId, SampleName)>)>,
    assignment: Option<Assignment>,
    is_asked: bool,
    none_left: bool,
    ask_when_idle: bool,
    plan: bool,
    applied: Step,
    records: Vec<StepRecord>,
}

struct Sim {
    case: Case,
    rng: u64,
    core: Core,
    now: Timestamp,
    workers: BTreeMap<WorkerId, Model>,
    streams: u64,
    /// What the weights were trained on: step 1 first.
    weights: Vec<Vec<SampleName>>,
    /// A checkpoint: its step, the ledger and the weights.
    kept: (Step, Ledger, Vec<Vec<SampleName>>),
    /// The checkpoint that the core knows.
    resumed_from: Option<Resume>,
    /// What everything journalled comes to, and what of it is on disk for sure.
    state: State,
    on_disk: State,
    outcome: Option<Outcome>,
    splits: u32,
    /// How much may still go wrong: a world of one that dies early for ever would never end.
    troubles_left: u32,
    /// What each worker was given, in order.
    given: BTreeMap<WorkerId, Vec<(Epoch, ShardId)>>,
}

impl Sim {
    fn new(case: Case) -> Self {
        let core = Core::new(config(&case, case.world_size), None);
        let kept = (Step(0), core.ledger().clone(), Vec::new());
        let rng = case.seed;
        let (workers, weights) = (BTreeMap::new(), Vec::new());
        Self {
            case,
            rng,
            state: core.durable(),
            on_disk: core.durable(),
            core,
            now: Duration::ZERO,
            workers,
            streams: 0,
            weights,
            resumed_from: None,
            kept,
            outcome: None,
            splits: 0,
            troubles_left: 60,
            given: BTreeMap::new(),
        }
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.rng = self.rng.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.rng >> 33) % limit.max(1)
    }

    fn chance(&mut self, thousandths: u64) -> bool {
        self.below(1000) < thousandths
    }

    /// Whether something goes wrong now.
    fn trouble(&mut self, thousandths: u64) -> bool {
        // Who dies with the only copy of the last step ends the job, which is another test's story.
        let can_be = self.outcome.is_none() && self.troubles_left > 0 && !matches!(self.core.phase, JobPhase::Finishing { .. });
        let now = can_be && self.chance(thousandths);
        self.troubles_left -= u32::from(now);
        now
    }

    fn size(&self, shard: ShardId) -> u32 {
        self.case.sources.iter().flat_map(|(_, sizes)| sizes).copied().nth(shard.0 as usize).unwrap()
    }

    fn event(&mut self, event: Event) {
        match self.core_event(event) {
            // What crosses a change of the membership is refused, as it should be.
            Ok(()) | Err(CoreError::StaleGeneration { .. } | CoreError::StaleStream | CoreError::Unexpected { .. }) => {}
            Err(error) => panic!("{error}"),
        }
    }

    fn core_event(&mut self, event: Event) -> Result<(), CoreError> {
        for effect in self.core.step(self.now, event)? {
            match effect {
                Effect::Persist(fact) => self.journal(fact),
                Effect::Send { worker, message } => {
                    if matches!(message, ToWorker::Durable { .. }) {
                        self.on_disk = self.state.clone();
                    }
                    if let Some(model) = self.workers.get_mut(&worker) {
                        model.inbox.push_back(message);
                    }
                }
                Effect::Attach { worker, stream } => {
                    let model = Model {
                        stream,
                        incarnation: stream.0,
                        attempt: 0,
                        known: HashSet::new(),
                        refused: HashSet::new(),
                        said: Vec::new(),
                        stopped: Stopped::empty_handed(Generation::NONE),
                        trained_in: Generation::NONE,
                        inbox: VecDeque::new(),
                        reading: VecDeque::new(),
                        buffer: Vec::new(),
                        in_flight: None,
                        assignment: None,
                        is_asked: false,
                        none_left: false,
                        ask_when_idle: false,
                        plan: false,
                        applied: Step(0),
                        records: Vec::new(),
                    };
                    self.workers.insert(worker, model);
                }
                Effect::Detach { worker } => drop(self.workers.remove(&worker)),
                Effect::Finish(outcome) => self.outcome = Some(outcome),
                _ => {}
            }
        }
        Ok(())
    }

    fn journal(&mut self, fact: Fact) {
        if let Fact::GaveBack { from, .. } = fact {
            self.splits += u32::from(from > 0);
        }
        let is_urgent = !fact.may_be_late();
        let bytes = postcard::to_stdvec(&fact).unwrap();
        self.state.apply(postcard::from_bytes(&bytes).unwrap()).unwrap();
        if is_urgent {
            self.on_disk = self.state.clone();
        }
    }

    fn say(&mut self, worker: WorkerId, message: FromWorker) {
        if let Some(model) = self.workers.get_mut(&worker) {
            match &message {
                FromWorker::ShardReport(report) => model.said.push((report.lease, message.clone())),
                FromWorker::GaveBack { lease, .. } => model.said.push((*lease, message.clone())),
                _ => {}
            }
            let stream = model.stream;
            self.event(Event::Message { worker, stream, message });
        }
    }

    fn join(&mut self) {
        self.streams += 1;
        let stream = StreamId(self.streams);
        if self.core_event(Event::Hello { stream, hello: hello(self.streams, 0) }).is_err() {
            // All ranks are kept for those who may come back.
            return;
        }
        let worker = *self.workers.iter().find(|(_, model)| model.stream == stream).unwrap().0;
        self.say(worker, FromWorker::Ready { model_digest: vec![], num_parameters: 1 });
    }

    fn ids(&self) -> Vec<WorkerId> {
        self.workers.keys().copied().collect()
    }

    /// One message to a worker.
    fn deliver(&mut self, id: WorkerId) {
        let Some(model) = self.workers.get_mut(&id) else { return };
        let Some(message) = model.inbox.pop_front() else { return };
        match message {
            ToWorker::MakeBootstrap { generation, .. } => self.say(id, FromWorker::Bootstrap { generation, bytes: vec![] }),
            ToWorker::Assignment(assignment) => {
                if let Some((step, share)) = model.in_flight.take()
                    && step > assignment.base_step
                {
                    model.buffer.extend(share);
                }
                model.buffer.retain(|(lease, _)| assignment.held_leases.contains(lease));
                model.reading.retain(|reading| assignment.held_leases.contains(&reading.lease.id));
                (model.is_asked, model.none_left, model.ask_when_idle, model.plan) = (false, false, false, false);
                model.said.retain(|(lease, _)| assignment.held_leases.contains(lease));
                model.known.retain(|lease| assignment.held_leases.contains(lease));
                (model.applied, model.trained_in) = (assignment.base_step, assignment.base_generation);
                model.records.clear();
                self.weights.truncate(assignment.base_step.0 as usize);
                assert_eq!(self.weights.len() as u64, assignment.base_step.0, "the weights of the base step are known");
                model.assignment = Some(assignment);
            }
            ToWorker::Abort { .. } => self.stop(id, StopCause::Aborted),
            ToWorker::PlanChange { .. } => model.plan = true,
            ToWorker::LeaseGrant { leases, none_left, ask_when_idle, generation } => {
                let is_current = model.assignment.as_ref().is_some_and(|assignment| assignment.generation == generation);
                let new: Vec<Lease> =
                    leases.into_iter().filter(|lease| !model.refused.contains(&lease.id) && model.known.insert(lease.id)).collect();
                self.given.entry(id).or_default().extend(new.iter().map(|lease| (lease.epoch, lease.shard)));
                model.reading.extend(new.into_iter().map(|lease| Reading { lease, next: 0 }));
                model.is_asked = false;
                model.none_left = none_left && is_current;
                model.ask_when_idle = ask_when_idle;
            }
            ToWorker::GiveBack { leases, .. } => {
                let mut left = Vec::new();
                for lease in leases {
                    if !model.known.contains(&lease) {
                        model.refused.insert(lease);
                        left.push((lease, 0));
                    }
                    let Some(place) = model.reading.iter().position(|reading| reading.lease.id == lease) else { continue };
                    // A lease is read in the order it came: only the first is begun.
                    let from = if place == 0 { model.reading[0].next } else { 0 };
                    model.reading.remove(place);
                    left.push((lease, from));
                }
                for (lease, from) in left {
                    self.say(id, FromWorker::GaveBack { lease, from });
                }
            }
            ToWorker::TakeSnapshot { generation } => {
                if matches!(self.core.phase, JobPhase::Finishing { .. }) {
                    self.outcome = Some(Outcome::Finished);
                } else {
                    // The last holder wants to leave, and first sends what it holds.
                    let (step, ledger) = (self.core.final_step(), self.core.ledger().clone());
                    self.kept = (step, ledger.clone(), self.weights.clone());
                    self.resumed_from = Some(Resume { step, ledger: Arc::new(ledger), generation });
                    self.event(Event::CheckpointStored { step, generation });
                }
            }
            _ => {}
        }
    }

    /// The reader goes on by a few samples.
    fn read(&mut self, id: WorkerId, num: u64) {
        for _ in 0..num {
            let Some(reading) = self.workers.get_mut(&id).and_then(|model| model.reading.front_mut()) else { return };
            let (index, Lease { id: lease, epoch, shard, end, .. }) = (reading.next, reading.lease.clone());
            reading.next += 1;
            let is_passed_over = reading.lease.done.contains(index);
            let report = |skipped, num_samples| ShardReport { lease, skipped, num_samples, truncated: String::new() };
            let size = self.size(shard);
            let model = self.workers.get_mut(&id).unwrap();
            if index >= size {
                model.reading.pop_front();
                self.say(id, FromWorker::ShardReport(report(vec![], Some(size))));
            } else if let Some(end) = end.filter(|&end| index >= end) {
                model.reading.pop_front();
                self.say(id, FromWorker::GaveBack { lease, from: end });
            } else if !is_passed_over {
                let name = SampleName { epoch, shard, index };
                if is_filtered(name) {
                    let skip = SkippedSample { index, reason: SkipReason::Filtered, key: String::new(), detail: String::new() };
                    self.say(id, FromWorker::ShardReport(report(vec![skip], None)));
                } else {
                    model.buffer.push((lease, name));
                }
            }
        }
    }

    fn ask(&mut self, id: WorkerId) {
        let share = self.case.share;
        let Some(model) = self.workers.get_mut(&id) else { return };
        let Some(generation) = model.assignment.as_ref().map(|assignment| assignment.generation) else { return };
        let is_idle = model.none_left && model.ask_when_idle && model.reading.is_empty() && model.buffer.len() < share;
        if !model.is_asked && (is_idle || (!model.none_left && model.reading.len() < 2)) {
            model.is_asked = true;
            let num_leases = if is_idle { 1 } else { 2 - model.reading.len() as u32 };
            self.say(id, FromWorker::LeaseRequest { generation, num_leases, is_idle });
        }
    }

    fn stop(&mut self, id: WorkerId, cause: StopCause) {
        let Some(model) = self.workers.get_mut(&id) else { return };
        let Some(assignment) = model.assignment.take() else { return };
        let (applied, trained_in, records) = (model.applied, model.trained_in, std::mem::take(&mut model.records));
        let reason = if cause == StopCause::Aborted { "a peer is gone" } else { "" }.to_owned();
        let stopped = Stopped {
            generation: assignment.generation,
            applied,
            cause,
            records,
            reason,
            validation: None,
            trained_in,
            lost_member: None,
            stalled: None,
        };
        model.stopped = stopped.clone();
        self.say(id, FromWorker::Stopped(stopped));
    }

    fn apply(&mut self, id: WorkerId, record: &StepRecord, is_first: bool) {
        let Some(model) = self.workers.get_mut(&id) else { return };
        (model.in_flight, model.applied, model.trained_in) = (None, record.step, record.generation);
        model.records.push(record.clone());
        let (generation, step) = (record.generation, record.step);
        let record = is_first.then(|| record.clone());
        self.say(id, FromWorker::StepReport(StepReport { generation, step, record, timings: StepTimings::default(), snapshot: None }));
    }

    /// A step of all members, if each has its share.
    fn step(&mut self) {
        let JobPhase::Running { members, .. } = self.core.phase.clone() else { return };
        let (generation, share) = (self.core.generation(), self.case.share);
        let can_step = |model: &Model| {
            let is_current = model.assignment.as_ref().is_some_and(|assignment| assignment.generation == generation);
            let is_dry = model.none_left && !model.ask_when_idle && model.reading.is_empty();
            is_current && (model.buffer.len() >= share || is_dry)
        };
        if !members.iter().all(|id| self.workers.get(id).is_some_and(can_step)) {
            return;
        }
        let step = Step(self.weights.len() as u64 + 1);
        let mut names = Vec::new();
        for &id in &members {
            for _ in 0..share {
                let len = self.workers[&id].buffer.len() as u64;
                let at = self.below(len.min(6)) as usize;
                let model = self.workers.get_mut(&id).unwrap();
                if len > 0 {
                    let sample = model.buffer.remove(at);
                    names.push(sample.1);
                    model.in_flight.get_or_insert((step, vec![])).1.push(sample);
                }
            }
        }
        if names.is_empty() {
            members.iter().for_each(|&id| self.stop(id, StopCause::DataDone));
            return;
        }
        let record = StepRecord {
            step,
            generation,
            names: names.clone(),
            native: 0,
            skipped: false,
            losses: StepLosses::default(),
            validation: None,
        };
        self.weights.push(names);
        if self.trouble(self.case.deaths) {
            // It may have seen the step through and even said so; of the others, any may have.
            let dead = members[self.below(members.len() as u64) as usize];
            for &id in &members {
                if self.chance(500) {
                    self.apply(id, &record, id == members[0]);
                }
            }
            self.die(dead);
            return;
        }
        let planned = members.iter().any(|id| self.workers[id].plan);
        for &id in &members {
            self.apply(id, &record, id == members[0]);
        }
        if planned {
            members.iter().for_each(|&id| self.stop(id, StopCause::Planned));
        } else if self.chance(100) {
            let ledger = serde_json::from_str(&serde_json::to_string(self.core.ledger()).unwrap()).unwrap();
            self.kept = (step, ledger, self.weights.clone());
        }
    }

    fn die(&mut self, id: WorkerId) {
        let Some(model) = self.workers.remove(&id) else { return };
        self.event(Event::Closed { worker: id, stream: model.stream, cause: "killed".into() });
    }

    /// Everybody dies; the job goes on from its checkpoint, in a world of another size.
    fn restart(&mut self) {
        let world_size = 1 + self.below(6) as u32;
        let (step, ledger, weights) = self.kept.clone();
        let resume = Resume { step, ledger: Arc::new(ledger), generation: self.core.generation() };
        self.core = Core::new(config(&self.case, world_size), Some(resume.clone()));
        self.resumed_from = Some(resume);
        (self.state, self.on_disk, self.now) = (self.core.durable(), self.core.durable(), Duration::ZERO);
        self.workers.clear();
        self.weights = weights;
    }

    /// The coordinator dies and is started again. Its workers find it and say what they hold.
    fn coordinator_restart(&mut self) {
        assert_eq!(self.state, self.core.durable(), "the journal says something else than the core is");
        let state = if self.chance(500) { self.on_disk.clone() } else { self.state.clone() };
        let bytes = postcard::to_stdvec(&state).unwrap();
        assert_eq!(postcard::from_bytes::<State>(&bytes).unwrap(), state, "a snapshot is the state");
        self.core = Core::restore(self.core.config.clone(), self.resumed_from.clone(), state);
        (self.state, self.on_disk, self.now) = (self.core.durable(), self.core.durable(), Duration::ZERO);
        // Who must be awaited comes before who asks for any rank.
        let mut old: Vec<Model> = std::mem::take(&mut self.workers).into_values().collect();
        old.sort_by_key(|model| !self.core.last_members.iter().any(|member| member.incarnation == Incarnation(model.incarnation)));
        for model in old {
            self.come_back(model);
        }
        self.let_time_pass();
    }

    /// Where the job waits for what only time brings: who is waited for was killed and is missed, or a pause is over.
    fn let_time_pass(&mut self) {
        let pauses = |core: &Core| matches!(core.phase, JobPhase::Gathering { .. }) && core.setbacks.pause().is_some();
        while matches!(self.core.phase, JobPhase::Returning { .. }) || pauses(&self.core) {
            self.now += Duration::from_secs(1);
            for id in self.ids() {
                let beat = Heartbeat {
                    generation: self.core.generation(),
                    step: Step(0),
                    phase: Phase::Waiting,
                    reads: 0,
                    memory: Memory::default(),
                };
                self.say(id, FromWorker::Heartbeat(beat));
            }
            if self.core.next_deadline().is_some_and(|deadline| deadline <= self.now) {
                self.event(Event::Tick);
            }
            if self.outcome.is_some() {
                return;
            }
            if (self.workers.len() as u32) < self.core.config.world_size {
                self.join();
            }
        }
    }

    fn come_back(&mut self, old: Model) {
        self.streams += 1;
        let (stream, attempt) = (StreamId(self.streams), old.attempt + 1);
        if self.core_event(Event::Hello { stream, hello: hello(old.incarnation, attempt) }).is_err() {
            // Its rank is another's by now.
            return;
        }
        let id = *self.workers.iter().find(|(_, model)| model.stream == stream).unwrap().0;
        let said: Vec<FromWorker> = old.said.iter().map(|(_, message)| message.clone()).collect();
        let is_training = old.assignment.is_some();
        let stopped = old.stopped.clone();
        let inbox = std::mem::take(&mut self.workers.get_mut(&id).unwrap().inbox);
        self.workers.insert(id, Model { stream, attempt, inbox, said: Vec::new(), ..old });
        for message in said {
            self.say(id, message);
        }
        if is_training {
            self.stop(id, StopCause::Aborted);
        } else {
            self.say(id, FromWorker::Stopped(stopped));
        }
        self.say(id, FromWorker::Ready { model_digest: vec![], num_parameters: 1 });
    }

    fn run(&mut self) {
        for _ in 0..200_000 {
            if self.outcome.is_some() {
                return;
            }
            if (self.workers.len() as u32) < self.core.config.world_size && self.chance(500) {
                self.join();
            }
            for id in self.ids() {
                for _ in 0..self.below(3) {
                    self.deliver(id);
                }
                // Some read fast, others slowly.
                let pace = 2 + (id.0 * 5) % 9;
                let num = self.below(pace);
                self.read(id, num);
                self.ask(id);
            }
            self.step();
            self.let_time_pass();
            if self.trouble(self.case.deaths / 20) {
                let ids = self.ids();
                let dead = ids.get(self.below(ids.len() as u64) as usize).copied();
                dead.into_iter().for_each(|dead| self.die(dead));
            }
            if self.trouble(self.case.drains / 4) {
                let rank = Rank(self.below(self.core.config.world_size.into()) as u32);
                let _ = self.core_event(Event::Drain { rank });
            }
            if self.trouble(self.case.restarts / 10) {
                self.restart();
            }
            if self.trouble(self.case.away / 10) {
                self.coordinator_restart();
            }
        }
        let waits = self.workers.values().map(|model| (model.reading.len(), model.buffer.len(), model.is_asked, model.none_left));
        panic!("stuck: {}, {:?}", self.core.state(), waits.collect::<Vec<_>>());
    }

    fn verify(&self) {
        if !self.case.trains_something() {
            let failed =
                matches!(&self.outcome, Some(Outcome::Failed { reason }) if reason.contains("none of its samples could be trained"));
            return assert!(failed, "{:?}", self.outcome);
        }
        assert_eq!(self.outcome, Some(Outcome::Finished), "still held: {:?}", self.core.leases.held());
        let mut seen: HashMap<SampleName, u32> = HashMap::new();
        self.weights.iter().flatten().for_each(|&name| *seen.entry(name).or_default() += 1);
        let twice: Vec<_> = seen.iter().filter(|&(_, &times)| times != 1).collect();
        assert!(twice.is_empty(), "trained more than once: {twice:?}");
        let mut expected = HashSet::new();
        let mut filtered = 0;
        let sizes: Vec<u32> = self.case.sources.iter().flat_map(|(_, sizes)| sizes).copied().collect();
        for epoch in (0..self.case.epochs).map(Epoch) {
            for (shard, &size) in (0..).map(ShardId).zip(&sizes) {
                for name in (0..size).map(|index| SampleName { epoch, shard, index }) {
                    if is_filtered(name) {
                        filtered += 1;
                    } else {
                        expected.insert(name);
                    }
                }
            }
        }
        assert_eq!(seen.into_keys().collect::<HashSet<_>>(), expected);
        let totals = self.core.ledger().totals();
        assert_eq!((totals.committed, totals.filtered), (expected.len() as u64, filtered));
    }
}

fn hello(incarnation: u64, attempt: u32) -> Hello {
    Hello {
        protocol_version: PROTOCOL_VERSION,
        program_version: PROGRAM_VERSION.into(),
        incarnation: Incarnation(incarnation),
        attempt,
        requested_rank: None,
        host: String::new(),
        pid: 0,
        device: String::new(),
    }
}

fn config(case: &Case, world_size: u32) -> Config {
    let source = |(weight, sizes): &(f64, Vec<u32>)| Source { name: "source".into(), num_shards: sizes.len() as u32, weight: *weight };
    let num_shards: usize = case.sources.iter().map(|(_, sizes)| sizes.len()).sum();
    Config {
        world_size,
        min_world_size: world_size,
        workers_are_alike: false,
        global_batch: 65536,
        scale_batch: false,
        heartbeat_timeout: Duration::from_secs(3),
        join_timeout: Duration::from_secs(60),
        data_patience: Duration::from_secs(30),
        job_id: "job".into(),
        job_toml: String::new(),
        seed: case.seed,
        shards: (0..num_shards).map(|shard| format!("{shard}.tar")).collect(),
        sources: case.sources.iter().map(source).collect(),
        epochs: Some(case.epochs),
        last_step: None,
        checkpoint_every: Duration::from_secs(300),
        max_bad_fraction: 0.05,
        max_skipped_steps: 2,
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_sample_of_every_epoch_is_in_the_weights_once(case in case()) {
        let mut sim = Sim::new(case);
        sim.run();
        sim.verify();
    }

    #[test]
    fn an_undisturbed_world_deals_by_its_seed_alone(case in case(), paces in any::<u64>()) {
        prop_assume!(case.trains_something());
        // Which shards each member is given until the deal runs out, whatever its pace.
        let dealt = |rng: u64| {
            let mut sim = Sim::new(Case { deaths: 0, drains: 0, restarts: 0, away: 0, ..case.clone() });
            sim.core.config.epochs = None;
            sim.core.leases = leases::Leases::new(case.seed, &sim.core.config.sources, None, &sim.core.ledger);
            sim.rng = rng;
            for _ in 0..case.world_size {
                sim.join();
            }
            while sim.ids().iter().any(|id| sim.given.get(id).is_none_or(|places| places.len() < 12)) {
                for id in sim.ids() {
                    for _ in 0..sim.below(3) {
                        sim.deliver(id);
                    }
                    let num = sim.below(9);
                    sim.read(id, num);
                    sim.ask(id);
                }
            }
            sim.given.values_mut().for_each(|places| places.truncate(12));
            sim.given
        };
        prop_assert_eq!(dealt(paces), dealt(!paces));
    }
}

#[test]
fn worlds_in_which_idle_members_help_are_among_those_looked_at() {
    let case = Case {
        seed: 3,
        sources: vec![(1.0, vec![29, 3, 27]), (2.0, vec![28])],
        epochs: 1,
        world_size: 5,
        deaths: 0,
        drains: 0,
        restarts: 0,
        away: 0,
        share: 2,
    };
    let mut splits = 0;
    for seed in 0..20 {
        let mut sim = Sim::new(Case { seed, ..case.clone() });
        sim.run();
        sim.verify();
        splits += sim.splits;
    }
    assert!(splits > 5, "a shard that was begun is shared in {splits} of 20 runs only");
}
