//! What is journalled comes to the same state, again and again, and a coordinator that goes on from it contradicts none of it.

use proptest::prelude::*;

use super::*;

/// A worker as it is itself: its process, and what it holds.
#[derive(Debug, Clone)]
struct Holder {
    id: WorkerId,
    incarnation: u64,
    attempt: u32,
    rank: u32,
    applied: Step,
    trained_in: Generation,
    /// Where it is or was a member.
    generation: Generation,
    /// Steps of that generation.
    records: Vec<StepRecord>,
    /// Everything in its weights.
    trained: BTreeSet<SampleName>,
}

/// A world beside what its journal says.
struct Rig {
    world: World,
    holders: Vec<Holder>,
    /// All facts.
    state: State,
    /// Those that are on disk for sure.
    on_disk: State,
    num_read: usize,
    next_incarnation: u64,
}

const WORLD_SIZE: u32 = 2;
const SAMPLES: u32 = 6;

impl Rig {
    fn new() -> Self {
        let config = Config { epochs: Some(2), last_step: None, ..config(WORLD_SIZE) };
        let world = World::new(config);
        let state = world.core.durable();
        Self { on_disk: state.clone(), state, world, holders: Vec::new(), num_read: 0, next_incarnation: 1 }
    }

    /// Replays what was said since the last look.
    fn follow(&mut self) {
        for effect in self.world.said[self.num_read..].iter().cloned() {
            let fact = match effect {
                Effect::Persist(fact) => fact,
                // Written down before it is said: a worker forgets names at this word.
                Effect::Send { message: ToWorker::Durable { .. }, .. } => {
                    self.on_disk = self.state.clone();
                    continue;
                }
                _ => continue,
            };
            let urgent = !fact.may_be_late();
            let bytes = postcard::to_stdvec(&fact).unwrap();
            self.state.apply(postcard::from_bytes(&bytes).unwrap()).unwrap();
            if urgent {
                self.on_disk = self.state.clone();
            }
        }
        self.num_read = self.world.said.len();
        assert_eq!(self.state, self.world.core.durable(), "the journal says something else than the core is");
    }

    fn tell(&mut self, worker: WorkerId, message: FromWorker) {
        let _ = self.world.say(worker, message);
        self.follow();
    }

    fn join(&mut self) {
        let incarnation = self.next_incarnation;
        self.next_incarnation += 1;
        let Ok(id) = self.world.hello(None, incarnation, 0) else { return };
        let (applied, trained_in, generation) = (Step(0), Generation::NONE, Generation::NONE);
        let (records, trained) = (Vec::new(), BTreeSet::new());
        let rank = self.world.core.workers[&id].rank.0;
        self.holders.push(Holder { id, incarnation, attempt: 0, rank, applied, trained_in, generation, records, trained });
        self.tell(id, FromWorker::Ready { model_digest: vec![7], num_parameters: 10 });
    }

    fn members(&self) -> Vec<usize> {
        let place = |id: &WorkerId| self.holders.iter().position(|holder| holder.id == *id);
        match &self.world.core.phase {
            JobPhase::Running { members, .. } => members.iter().filter_map(place).collect(),
            _ => Vec::new(),
        }
    }

    fn bootstrap(&mut self) {
        let JobPhase::Forming { members, .. } = self.world.core.phase.clone() else { return };
        let generation = self.world.core.generation();
        let truth = self.world.core.truth.clone();
        self.tell(members[0], FromWorker::Bootstrap { generation, bytes: vec![1] });
        // Whoever lacks the base gets it from one who has it, or from the checkpoint: there is none, so these are fresh weights.
        let source =
            truth.holders.iter().find_map(|id| self.holders.iter().find(|holder| holder.id == *id)).map(|holder| holder.trained.clone());
        let trained = source.unwrap_or_default();
        assert_eq!(trained.len() as u64, self.world.core.ledger().totals().committed, "the ledger is that of the weights");
        for holder in self.holders.iter_mut().filter(|holder| members.contains(&holder.id)) {
            (holder.generation, holder.applied, holder.trained_in) = (generation, truth.step, truth.generation);
            holder.trained.clone_from(&trained);
            holder.records.clear();
        }
    }

    /// All members apply a step; `num_reports` of them say so.
    fn train(&mut self, num_reports: usize) {
        let members = self.members();
        let generation = self.world.core.generation();
        if members.len() < WORLD_SIZE as usize || members.iter().any(|&member| self.holders[member].generation != generation) {
            return;
        }
        let step = self.holders[members[0]].applied.next();
        let held = self.world.core.leases.held();
        let name = held.iter().find_map(|held| {
            let done = self.world.core.ledger().done_samples(held.epoch, held.shard);
            let name = |index| SampleName { epoch: held.epoch, shard: held.shard, index };
            let is_free = |index: &u32| !done.contains(*index) && !self.holders[members[0]].trained.contains(&name(*index));
            (held.part.from..held.part.to.min(SAMPLES)).find(is_free).map(name)
        });
        let Some(name) = name else { return };
        let record = StepRecord {
            step,
            generation,
            names: vec![name],
            native: 0,
            skipped: false,
            losses: StepLosses { task: f32::NAN, ..StepLosses::default() },
            validation: None,
        };
        for (place, &member) in members.iter().enumerate() {
            let holder = &mut self.holders[member];
            (holder.applied, holder.trained_in) = (step, generation);
            holder.trained.insert(name);
            holder.records.push(record.clone());
            let id = holder.id;
            if place < num_reports {
                let record = (place == 0).then(|| record.clone());
                let report = StepReport { generation, step, record, timings: StepTimings::default(), snapshot: None };
                self.tell(id, FromWorker::StepReport(report));
            }
        }
    }

    fn stop(&mut self, holder: usize) {
        let Holder { id, applied, trained_in, generation, records, .. } = self.holders[holder].clone();
        let stopped = Stopped { applied, trained_in, records, reason: "lost".into(), ..Stopped::empty_handed(generation) };
        self.tell(id, FromWorker::Stopped(stopped));
    }

    fn go_on(&mut self, holder: usize) {
        let Holder { id, applied, generation, records, .. } = self.holders[holder].clone();
        self.tell(id, FromWorker::Continuing(Continuing { generation, applied, records }));
    }

    fn lease(&mut self, holder: usize, is_idle: bool) {
        let (generation, id) = (self.world.core.generation(), self.holders[holder].id);
        self.tell(id, FromWorker::LeaseRequest { generation, num_leases: 1, is_idle });
    }

    /// The holder leaves to others what it has handed nothing on of, from `more` samples after the last that it has.
    fn give_back(&mut self, holder: usize, more: u32) {
        let id = self.holders[holder].id;
        let Some(held) = self.world.core.leases.held().into_iter().find(|held| held.holder == id) else { return };
        let of_it = |name: &&SampleName| (name.epoch, name.shard) == (held.epoch, held.shard) && name.index < held.part.to;
        let trained = self.holders.iter().flat_map(|holder| &holder.trained).filter(of_it).map(|name| name.index + 1).max();
        let from = trained.unwrap_or(0).max(held.part.from) + more;
        self.tell(id, FromWorker::GaveBack { lease: held.id, from: from.min(held.part.to) });
    }

    fn read(&mut self, holder: usize) {
        let id = self.holders[holder].id;
        let Some(held) = self.world.core.leases.held().into_iter().find(|held| held.holder == id) else { return };
        self.tell(
            id,
            match held.part.end() {
                Some(from) => FromWorker::GaveBack { lease: held.id, from },
                None => FromWorker::ShardReport(ShardReport {
                    lease: held.id,
                    skipped: vec![],
                    num_samples: Some(SAMPLES),
                    truncated: String::new(),
                }),
            },
        );
    }

    fn die(&mut self, holder: usize) {
        let Holder { id, .. } = self.holders.remove(holder);
        self.world.die(id);
        self.follow();
    }

    /// The coordinator dies with what is not on disk, and another one goes on. `back` of the workers find it.
    ///
    /// Of those who are in its generation, `continues` says who trains on.
    fn restart(&mut self, lossy: bool, back: usize, continues: impl Fn(usize) -> bool) {
        let state = if lossy { self.on_disk.clone() } else { self.state.clone() };
        let config = self.world.core.config.clone();
        // Whom the core had given up, for not opening a collective say, is gone: somebody else may have its rank.
        let known = &self.world.core.workers;
        self.holders.retain(|holder| known.contains_key(&holder.id));
        let bytes = postcard::to_stdvec(&state).unwrap();
        assert_eq!(postcard::from_bytes::<State>(&bytes).unwrap(), state, "a snapshot is the state");
        self.world.core = Core::restore(config, None, state.clone());
        self.world.now = Duration::ZERO;
        self.world.said.clear();
        self.num_read = 0;
        let awaits = matches!(self.world.core.phase, JobPhase::Returning { .. });
        if awaits {
            assert_eq!(self.world.core.durable(), state, "nothing is forgotten");
        }
        (self.state, self.on_disk) = (self.world.core.durable(), self.world.core.durable());
        let finals = state.final_step();
        let holds_it = |holder: &Holder| holder.applied >= finals;
        self.holders.truncate(back);
        let mut any_holds_it = false;
        for mut holder in std::mem::take(&mut self.holders) {
            holder.attempt += 1;
            let was_member = self.world.core.last_members.iter().any(|member| member.worker == holder.id);
            let id = self.world.hello(Some(holder.rank), holder.incarnation, holder.attempt).unwrap();
            assert!(!was_member || id == holder.id, "a member keeps its id");
            any_holds_it |= was_member && holds_it(&holder);
            self.holders.push(Holder { id, ..holder });
            self.follow();
            let place = self.holders.len() - 1;
            self.tell(id, FromWorker::Ready { model_digest: vec![7], num_parameters: 10 });
            let generation = self.world.core.generation();
            if was_member && awaits && self.holders[place].generation == generation && continues(place) {
                self.go_on(place);
            } else {
                self.stop(place);
            }
        }
        // Who was told to leave, leaves.
        for place in 0..self.holders.len() {
            let generation = self.world.core.generation();
            let is_told = |message: &ToWorker| matches!(message, ToWorker::Abort { generation: over, .. } if *over == generation);
            if self.world.sent(self.holders[place].id).iter().any(is_told) {
                self.stop(place);
            }
        }
        let alive: Vec<WorkerId> = self.holders.iter().map(|holder| holder.id).collect();
        // Long enough for who stays away to be missed; not so long that a member asked to open the collective is given up.
        self.world.pass(8, &alive);
        self.follow();
        if any_holds_it {
            assert!(self.world.core.final_step() >= finals, "step {finals} was final and is not any more");
        }
    }
}

fn run(steps: &[(u8, u8)]) {
    let mut rig = Rig::new();
    for &(what, which) in steps {
        let holder = usize::from(which) % rig.holders.len().max(1);
        let any = !rig.holders.is_empty();
        match what % 14 {
            0 | 1 => rig.join(),
            2 | 3 => rig.bootstrap(),
            4 | 12 if any => rig.lease(holder, what % 14 == 12),
            13 if any => rig.give_back(holder, u32::from(which) % 3),
            5 | 6 => rig.train(2),
            7 => rig.train(usize::from(which % 2)),
            8 if any => rig.read(holder),
            9 if any => {
                if which % 3 == 0 {
                    rig.die(holder);
                }
                (0..rig.holders.len()).for_each(|place| rig.stop(place));
            }
            10 => rig.restart(which % 2 == 0, if which % 5 == 0 { 1 } else { 9 }, |place| which % 7 < 4 || which as usize % 7 == 4 + place),
            11 => {
                let alive: Vec<WorkerId> = rig.holders.iter().map(|holder| holder.id).collect();
                rig.world.pass(1, &alive);
                rig.follow();
            }
            _ => {}
        }
        if let Some(outcome) = rig.state.outcome() {
            // The data is done, or so few workers were left that the job gave up; never is a sample lost or doubled.
            let Outcome::Failed { reason } = outcome else { return };
            assert!(reason.contains("waiting for") || reason.contains("came back"), "{reason}");
            return;
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn journal_comes_to_the_state_of_the_core_and_a_restart_contradicts_nothing(
        steps in proptest::collection::vec((any::<u8>(), any::<u8>()), 1..120)
    ) {
        run(&steps);
    }
}

#[test]
fn replaying_twice_gives_the_same_state() {
    let (mut world, workers) = World::running(2);
    let before = Core::new(config(2), None).durable();
    let (leases, _) = world.lease(workers[0], 2);
    world.report(workers[0], 1, Some(&names(0, leases[0].shard, 0..3)));
    world.report(workers[1], 1, None);
    world.die(workers[1]);
    world.stopped(workers[0], 1, StopCause::Aborted, vec![]);
    let replay = || {
        let mut state = before.clone();
        for effect in &world.said {
            if let Effect::Persist(fact) = effect {
                state.apply(fact.clone()).unwrap();
            }
        }
        state
    };
    assert_eq!(replay(), replay());
    assert_eq!(replay(), world.core.durable());
}

#[test]
fn only_a_shard_of_which_nothing_could_be_read_is_unreadable_after_a_restart_too() {
    let mut rig = Rig::new();
    (0..WORLD_SIZE).for_each(|_| rig.join());
    rig.bootstrap();
    let worker = rig.holders[0].id;
    let (leases, _) = rig.world.lease(worker, 3);
    // Empty, cut off behind its fifth sample, not there.
    for (lease, (num, why)) in leases.iter().zip([(0, ""), (5, "it breaks off"), (0, "no such file")]) {
        let report = ShardReport { lease: lease.id, skipped: vec![], num_samples: Some(num), truncated: why.into() };
        rig.tell(worker, FromWorker::ShardReport(report));
    }
    let Some(Outcome::Failed { reason }) = rig.world.outcome() else { panic!("{}", rig.world.core.state()) };
    assert!(reason.starts_with("1 of 4 shards cannot be read at all"), "{reason}");
    assert_eq!(rig.state.outcome(), rig.world.outcome().as_ref(), "a coordinator that is started again has failed too");
}

#[test]
fn nothing_follows_the_end_that_a_row_of_skipped_steps_makes() {
    let mut rig = Rig::new();
    (0..WORLD_SIZE).for_each(|_| rig.join());
    rig.bootstrap();
    let worker = rig.holders[0].id;
    for step in 1..=3 {
        let losses = ValidationLosses { step: Step(step - 1), samples: 3, task: 0.5, logit: 0.1, feature: 2.0 };
        let record = Some(StepRecord { skipped: true, validation: Some(losses), ..rig.world.record(step, &[]) });
        let (generation, step, timings) = (rig.world.core.generation(), Step(step), StepTimings::default());
        let report = StepReport { generation, step, record, timings, snapshot: None };
        rig.tell(rig.holders[1].id, FromWorker::StepReport(StepReport { record: None, ..report.clone() }));
        rig.tell(worker, FromWorker::StepReport(report));
    }
    let ends = rig.world.said.iter().position(|effect| matches!(effect, Effect::Persist(Fact::Ended(_)))).unwrap();
    let later = rig.world.said[ends + 1..].iter().filter(|effect| matches!(effect, Effect::Persist(_)));
    assert_eq!(later.count(), 0);
}

#[test]
fn facts_that_cannot_follow_are_refused() {
    let (mut world, workers) = World::running(1);
    world.lease(workers[0], 1);
    let state = world.core.durable();
    let refused = |fact: Fact| state.clone().apply(fact).unwrap_err().to_string();
    assert_eq!(refused(Fact::Generation { generation: Generation(1), members: vec![], base_step: Step(0) }), "g000001 follows g000001");
    let held = world.core.leases.held()[0];
    let again = leases::Granted { id: LeaseId(9), ..held.granted() };
    let error = refused(Fact::Leases { holder: WorkerId(5), leases: vec![again] });
    assert!(error.contains("is given to w5 under lease 9 while another reads it"), "{error}");
    let name = SampleName { epoch: Epoch(0), shard: ShardId(77), index: 0 };
    let error = refused(Fact::Commit { step: Step(1), generation: Generation(1), names: vec![name], skipped: false });
    assert!(error.contains("is of a shard that the job does not have"), "{error}");
    let mut ended = state.clone();
    ended.apply(Fact::Ended(Outcome::Finished)).unwrap();
    assert_eq!(ended.apply(Fact::Joined(WorkerId(9))), Err(ReplayError::Ended));
}

/// Two workers that have trained step 1, and a coordinator that is started again.
fn restarted() -> (World, Vec<WorkerId>) {
    let (mut world, workers) = World::running(2);
    let (leases, _) = world.lease(workers[0], 1);
    world.report(workers[0], 1, Some(&names(0, leases[0].shard, 0..3)));
    world.report(workers[1], 1, None);
    let state = world.core.durable();
    world.core = Core::restore(config(2), None, state);
    world.said.clear();
    (world, workers)
}

fn come_back(world: &mut World, incarnation: u64) -> WorkerId {
    world.hello(None, incarnation, 1).unwrap()
}

fn holds(world: &mut World, worker: WorkerId, step: u64, records: Vec<StepRecord>) {
    let stopped = Stopped { applied: Step(step), trained_in: Generation(1), records, ..Stopped::empty_handed(Generation(1)) };
    world.say(worker, FromWorker::Stopped(stopped)).unwrap();
    world.ready(worker);
}

#[test]
fn restarted_coordinator_takes_its_workers_back_and_goes_on_from_what_they_hold() {
    let (mut world, workers) = restarted();
    assert_eq!(world.core.state(), "waiting for the workers to come back");
    let first = come_back(&mut world, 1000);
    assert_eq!(first, workers[0]);
    // They trained on meanwhile: step 2 is news.
    let shard = world.core.leases.held()[0].shard;
    let second_step = world.record(2, &names(0, shard, 3..4));
    holds(&mut world, first, 2, vec![second_step]);
    assert_eq!(world.core.generation(), Generation(1), "the other may hold more");
    let second = come_back(&mut world, 1001);
    holds(&mut world, second, 2, vec![]);
    assert_eq!((world.core.generation(), world.core.final_step()), (Generation(2), Step(2)));
    assert_eq!(world.core.ledger().totals().committed, 4);
    world.bootstrap(first);
    let assignment = world.assignment(first);
    assert_eq!((assignment.base_step, assignment.base_generation, assignment.broadcast_state), (Step(2), Generation(1), false));
    // A lease that was on its way when the coordinator died is sent again: for the asking, so that there is one answer to each request.
    assert_eq!(assignment.held_leases.len(), 1);
    let (again, none_left) = world.lease(first, 1);
    assert_eq!((again.iter().map(|lease| lease.id).collect::<Vec<_>>(), none_left), (assignment.held_leases, false));
    assert_ne!(world.lease(first, 1).0, again);
}

#[test]
fn member_that_does_not_come_back_is_waited_for_no_longer_than_the_heartbeat_timeout() {
    let (mut world, _) = restarted();
    let first = come_back(&mut world, 1000);
    holds(&mut world, first, 1, vec![]);
    world.pass(2, &[first]);
    assert_eq!(world.core.leases.holders().len(), 1);
    assert_eq!(world.core.state(), "waiting for the workers to come back");
    world.pass(1, &[first]);
    assert_eq!(world.core.state(), "waiting for rank 1");
    let newcomer = world.join(None).unwrap();
    world.ready(newcomer);
    assert_eq!(world.core.generation(), Generation(2));
}

#[test]
fn rank_of_a_worker_that_is_awaited_is_given_only_to_who_asks_for_it() {
    let (mut world, _) = restarted();
    let error = world.join(None).unwrap_err();
    assert_eq!(error, CoreError::NotYet(2));
    let replacement = world.join(Some(1)).unwrap();
    world.ready(replacement);
    let first = come_back(&mut world, 1000);
    holds(&mut world, first, 1, vec![]);
    world.pass(1, &[first, replacement]);
    world.pass(3, &[first, replacement]);
    assert_eq!((world.core.generation(), world.core.final_step()), (Generation(2), Step(1)));
}

#[test]
fn nobody_back_means_the_checkpoint_with_its_ledger_but_not_before_others_could_train() {
    let (mut world, _) = restarted();
    world.pass(10, &[]);
    assert_eq!(world.core.final_step(), Step(1), "late is better than never");
    let late = come_back(&mut world, 1000);
    holds(&mut world, late, 1, vec![]);
    world.pass(3, &[late]);
    assert_eq!((world.core.state().as_str(), world.core.final_step()), ("waiting for rank 1", Step(1)));

    let (mut world, _) = restarted();
    world.pass(10, &[]);
    let newcomers = [world.join(None).unwrap(), world.join(None).unwrap()];
    newcomers.iter().for_each(|&worker| world.ready(worker));
    world.pass(3, &newcomers);
    assert_eq!((world.core.generation(), world.core.final_step()), (Generation(2), Step(0)));
    assert_eq!((world.core.ledger().totals().committed, world.core.leases.held().len()), (0, 0));
}

#[test]
fn weights_of_an_older_line_never_become_the_truth() {
    let (mut world, _) = restarted();
    let first = come_back(&mut world, 1000);
    holds(&mut world, first, 1, vec![]);
    let zombie = come_back(&mut world, 1001);
    let stopped = Stopped { applied: Step(9), trained_in: Generation(7), ..Stopped::empty_handed(Generation(0)) };
    world.say(zombie, FromWorker::Stopped(stopped)).unwrap();
    assert_eq!(world.core.final_step(), Step(1));
}

#[test]
fn stop_while_workers_are_awaited_ends_the_job_with_what_they_hold() {
    let (mut world, _) = restarted();
    world.event(Event::Stop { reason: "enough".into() }).unwrap();
    for incarnation in [1000, 1001] {
        let worker = come_back(&mut world, incarnation);
        let stopped = Stopped { applied: Step(1), trained_in: Generation(1), ..Stopped::empty_handed(Generation(1)) };
        world.say(worker, FromWorker::Stopped(stopped)).unwrap();
    }
    assert_eq!(world.core.state(), "storing the last checkpoint");
}

#[test]
fn one_that_goes_on_is_told_so_when_the_wait_for_the_others_is_over() {
    let (mut world, _) = restarted();
    let [first, late] = [1000, 1001].map(|incarnation| come_back(&mut world, incarnation));
    holds(&mut world, first, 1, vec![]);
    world.pass(11, &[first, late]);
    assert_ne!(world.core.state(), "waiting for the workers to come back");
    let said = FromWorker::Continuing(Continuing { generation: Generation(1), applied: Step(1), records: vec![] });
    world.say(late, said).unwrap();
    let sent = world.sent(late);
    assert!(matches!(&sent[..], [.., ToWorker::Abort { generation: Generation(1), reason }] if reason == "it is over"), "{sent:?}");
}

#[test]
fn stop_before_the_coordinator_died_is_carried_out_with_those_that_went_on() {
    let (mut world, _) = World::running(2);
    world.event(Event::Stop { reason: "enough".into() }).unwrap();
    world.core = Core::restore(config(2), None, world.core.durable());
    world.said.clear();
    let workers = [come_back(&mut world, 1000), come_back(&mut world, 1001)];
    for &worker in &workers {
        let said = Continuing { generation: Generation(1), applied: Step(0), records: vec![] };
        world.say(worker, FromWorker::Continuing(said)).unwrap();
    }
    assert_eq!(world.core.state(), "training, to meet after this step");
    for &worker in &workers {
        assert!(world.sent(worker).iter().any(|message| matches!(message, ToWorker::PlanChange { reason, .. } if reason == "enough")));
    }
}

#[test]
fn newcomer_may_leave_while_members_are_awaited_and_a_member_that_is_back_may_not() {
    let (mut world, _) = restarted();
    let newcomer = world.join(Some(1)).unwrap();
    let back = come_back(&mut world, 1000);
    let is_sent_away = |world: &World, worker| {
        world.sent(worker).iter().any(|message| matches!(message, ToWorker::Stop { reason: StopReason::Drained, .. }))
    };
    for worker in [newcomer, back] {
        world.say(worker, FromWorker::Leaving { reason: "SIGTERM".into() }).unwrap();
    }
    assert!(is_sent_away(&world, newcomer) && !is_sent_away(&world, back), "what the member holds is to be said first");
}

#[test]
fn job_that_has_ended_has_ended_for_a_coordinator_that_is_started_again() {
    let (mut world, _) = World::running(1);
    world.event(Event::GiveUp { reason: "no restart is left".into() }).unwrap();
    world.core = Core::restore(config(1), None, world.core.durable());
    assert_eq!(world.core.state(), "failed");
    assert!(matches!(world.join(None), Err(CoreError::Ending(_))), "nobody can join it any more");
}
