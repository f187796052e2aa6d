//! Everything that can happen in small worlds, in every order: deaths, wrong death notices, collectives that fail on one side, coordinators
//! that die between any two effects and lose what was not on disk.
//!
//! The core and its facts are the real ones. Workers are a few lines each: they hold weights as lists of steps, and their messages travel
//! in order, are delivered late, or are lost with their stream. States that were seen are not looked at again. A rule that is broken on
//! purpose is found within seconds: the last tests show it.

use std::collections::{HashSet, VecDeque};
use std::fmt::Write as _;

use super::*;
use crate::store::sha256;

mod hands;
use hands::Hand;

/// What may happen besides work.
#[derive(Debug, Clone, Copy, Default)]
struct Budget {
    deaths: u8,
    wrong_notices: u8,
    crashes: u8,
    glitches: u8,
    /// Members ask whether their steps are on disk.
    beats: u8,
}

/// A rule that does not hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Broken {
    Nothing,
    /// A step is final as soon as one member has reported it.
    FirstReport,
    /// Workers are told that their steps are on disk when they are not.
    AcksFromMemory,
    /// No fact is on disk before it is told.
    LateFacts,
}

/// A small job: `shards` of `samples` each, one sample a member and step.
#[derive(Debug, Clone, Copy)]
struct Job {
    workers: u32,
    shards: u32,
    samples: u32,
    budget: Budget,
    broken: Broken,
}

/// A world at one moment.
#[derive(Debug, Clone)]
struct Moment {
    core: Core,
    now: Timestamp,
    streams: u64,
    disk: State,
    pending: Vec<Fact>,
    hands: Vec<Hand>,
    /// Shares given to a step of a generation, by member.
    sums: BTreeMap<(Generation, Step), BTreeMap<u32, Vec<SampleName>>>,
    left: Budget,
    /// Final steps.
    log: Vec<Generation>,
    newest: Generation,
    frozen: Option<(Step, Generation, Arc<Ledger>)>,
    over: Option<Outcome>,
}

/// What happens next.
#[derive(Debug, Clone, Copy)]
enum Act {
    /// A worker's oldest message arrives. With a number: the coordinator dies after so many effects, with so many late facts written.
    Up(usize, Option<(usize, usize)>),
    /// The oldest message to a worker arrives. Told to leave a step that nobody has finished, it may not have entered it yet.
    Down(usize, bool),
    Finish(usize),
    Glitch(usize),
    Die(usize, bool),
    Notice(usize),
    Cut(usize),
    Back(usize),
    Join,
    Wait,
    Beat(usize),
    Crash(usize),
}

type Violation = String;

impl Moment {
    fn new(job: Job) -> Self {
        let core = Core::new(job.config(), None);
        let disk = core.durable();
        let mut moment = Self {
            core,
            now: Duration::ZERO,
            streams: 0,
            disk,
            pending: Vec::new(),
            hands: Vec::new(),
            sums: BTreeMap::new(),
            left: job.budget,
            log: Vec::new(),
            newest: Generation::NONE,
            frozen: None,
            over: None,
        };
        (0..job.workers).for_each(|_| moment.join(job).unwrap());
        moment
    }

    /// What tells it from other moments; `text` is room to write in.
    fn key(&self, text: &mut String) -> [u8; 32] {
        text.clear();
        write!(text, "{self:?}").unwrap();
        sha256(text.as_bytes())
    }

    fn hand_of(&self, id: WorkerId) -> Option<usize> {
        self.hands.iter().rposition(|hand| hand.id == Some(id))
    }

    // ---- the coordinator's shell ----

    /// Applies an event and carries out its effects; with `dies`, only so many of them.
    fn tell(&mut self, job: Job, event: Event, dies: Option<usize>) -> Result<Result<(), CoreError>, Violation> {
        let effects = match self.core.step(self.now, event) {
            Ok(effects) => effects,
            Err(error) => return Ok(Err(error)),
        };
        let mut assignments = Vec::new();
        for (number, effect) in effects.into_iter().enumerate() {
            if dies == Some(number) {
                return Ok(Ok(()));
            }
            match effect {
                Effect::Attach { worker, stream } => {
                    if let Some(hand) = self.hands.iter_mut().find(|hand| hand.stream == Some(stream)) {
                        hand.id = Some(worker);
                    }
                }
                Effect::Send { worker, message } => {
                    if matches!(message, ToWorker::Durable { .. }) && job.broken != Broken::AcksFromMemory {
                        self.flush(usize::MAX)?;
                    }
                    match &message {
                        ToWorker::MakeBootstrap { generation, .. } if *generation <= self.newest => {
                            return Err(format!("{generation} is begun again"));
                        }
                        ToWorker::MakeBootstrap { generation, .. } => self.newest = *generation,
                        ToWorker::Assignment(assignment) => assignments.push((worker, assignment.clone())),
                        _ => {}
                    }
                    if let Some(place) = self.hand_of(worker).filter(|&place| self.hands[place].stream.is_some()) {
                        self.hands[place].down.push_back(message);
                    }
                }
                Effect::Detach { worker } => {
                    if let Some(place) = self.hand_of(worker) {
                        self.hands[place].stream = None;
                    }
                }
                Effect::Persist(fact) => {
                    if let Fact::Commit { step, generation, .. } = &fact {
                        if step.0 != self.log.len() as u64 + 1 {
                            return Err(format!("step {step} becomes final after step {}", self.log.len()));
                        }
                        self.log.push(*generation);
                        // By reports alone: then no single death can take it away.
                        let lacks =
                            |id: &&WorkerId| self.hand_of(**id).is_none_or(|place| (self.hands[place].weights.len() as u64) < step.0);
                        if matches!(self.core.phase, JobPhase::Running { .. })
                            && let Some(id) = self.core.members().iter().find(lacks)
                        {
                            return Err(format!("step {step} is final, and {id} has not applied it"));
                        }
                    }
                    let may_be_late = fact.may_be_late() || job.broken == Broken::LateFacts;
                    self.pending.push(fact);
                    if !may_be_late {
                        self.flush(usize::MAX)?;
                    }
                }
                Effect::Freeze { step, generation, ledger } => {
                    self.flush(usize::MAX)?;
                    self.frozen = Some((step, generation, ledger));
                }
                Effect::Notice(Notice::RolledBack { from, to }) => {
                    let is_held = |hand: &&Hand| hand.alive && !hand.is_cut && hand.stream.is_some() && hand.weights.len() as u64 >= from.0;
                    if let Some(hand) = self.hands.iter().find(is_held) {
                        return Err(format!("step {from} is given up for {to}, though {:?} holds it", hand.id));
                    }
                    self.log.truncate(to.0 as usize);
                }
                Effect::Finish(outcome) => self.end(job, outcome)?,
                Effect::Committed { .. } | Effect::Validated(_) | Effect::Void { .. } | Effect::Notice(_) => {}
            }
        }
        if !assignments.is_empty() {
            self.begins(&assignments)?;
        }
        Ok(Ok(()))
    }

    /// Up to `num` of the facts that were late are on disk.
    fn flush(&mut self, num: usize) -> Result<(), Violation> {
        for fact in self.pending.drain(..num.min(self.pending.len())) {
            let text = format!("{fact:?}");
            self.disk.apply(fact).map_err(|error| format!("the journal cannot be replayed: {error}, at {text}"))?;
        }
        Ok(())
    }

    /// A generation begins: its source holds exactly the ledger, and every final step.
    fn begins(&mut self, assignments: &[(WorkerId, Assignment)]) -> Result<(), Violation> {
        let Some((source, assignment)) = assignments.iter().find(|(_, assignment)| assignment.member_index == assignment.source_index)
        else {
            return Err("a generation without a source".into());
        };
        let weights = match assignment.base_step {
            Step(0) => Vec::new(),
            _ => self.hand_of(*source).map(|place| self.hands[place].weights.clone()).unwrap_or_default(),
        };
        agrees(&weights, self.core.ledger()).map_err(|problem| format!("as {} begins: {problem}", assignment.generation))?;
        let made: Vec<Generation> = weights.iter().map(|(generation, _)| *generation).collect();
        match made.starts_with(&self.log) && made.len() as u64 == assignment.base_step.0 {
            true => Ok(()),
            false => Err(format!(
                "{} begins with step {}; its source holds steps of {made:?}, final were those of {:?}",
                assignment.generation, assignment.base_step, self.log
            )),
        }
    }

    fn end(&mut self, job: Job, outcome: Outcome) -> Result<(), Violation> {
        match &outcome {
            Outcome::Finished => {
                let committed = self.core.ledger().totals().committed;
                if committed != u64::from(job.shards * job.samples) {
                    return Err(format!("the job ends with {committed} samples"));
                }
            }
            Outcome::Failed { reason } if reason.starts_with("every worker that held") => {}
            other => return Err(format!("the job ends: {other:?}")),
        }
        self.over = Some(outcome);
        Ok(())
    }

    fn crash(&mut self, job: Job, written: usize) -> Result<(), Violation> {
        self.flush(written)?;
        self.pending.clear();
        self.left.crashes -= 1;
        self.core = Core::restore(job.config(), None, self.disk.clone());
        self.disk = self.core.durable();
        self.now = Duration::ZERO;
        // What the dead one knew and nobody else is not final any more.
        self.log.truncate(self.core.final_step().0 as usize);
        self.frozen = None;
        self.over = self.disk.outcome().cloned();
        for hand in &mut self.hands {
            hand.stream = None;
            hand.up.clear();
            hand.down.clear();
        }
        Ok(())
    }

    // ---- what can happen ----

    fn acts(&self, job: Job) -> Vec<Act> {
        let mut acts = Vec::new();
        if self.over.is_some() {
            return acts;
        }
        let crashes = self.left.crashes > 0;
        let num_alive = self.hands.iter().filter(|hand| hand.alive).count();
        for (place, hand) in self.hands.iter().enumerate() {
            let is_known = hand.id.is_some_and(|id| self.core.workers.contains_key(&id));
            if !hand.up.is_empty() && hand.stream.is_some() {
                acts.push(Act::Up(place, None));
                if crashes {
                    let (effects, pending) = self.would_say(place);
                    acts.extend((0..effects).map(|number| Act::Up(place, Some((number, usize::MAX)))));
                    if pending > 0 {
                        acts.extend((0..effects).map(|number| Act::Up(place, Some((number, 0)))));
                    }
                }
            }
            if !hand.alive {
                if is_known && hand.stream.is_some() {
                    acts.push(Act::Notice(place));
                }
                continue;
            }
            if !hand.down.is_empty() {
                acts.push(Act::Down(place, false));
                if hand.share.is_some() && !self.is_finished_by_another(place) {
                    acts.push(Act::Down(place, true));
                }
            }
            if self.sum(place).is_some() {
                acts.push(Act::Finish(place));
                if self.left.glitches > 0 {
                    acts.push(Act::Glitch(place));
                }
            }
            if hand.stream.is_none() {
                acts.push(Act::Back(place));
            }
            if self.left.deaths > 0 && num_alive > 1 {
                acts.push(Act::Die(place, false));
                if hand.share.is_some() && !self.is_finished_by_another(place) {
                    acts.push(Act::Die(place, true));
                }
            }
            if self.left.wrong_notices > 0 && is_known && hand.stream.is_some() {
                acts.push(Act::Cut(place));
            }
            if self.left.beats > 0 && hand.up.is_empty() && hand.stream.is_some() && hand.training.is_some() {
                acts.push(Act::Beat(place));
            }
        }
        if num_alive < job.workers as usize {
            acts.push(Act::Join);
        }
        // The wait for members ends when one of them is back, or when nobody else could come.
        let is_back = |member: &Member| self.core.workers.contains_key(&member.worker);
        let is_complete = num_alive == job.workers as usize && self.hands.iter().all(|hand| !hand.alive || hand.stream.is_some());
        let waits = is_complete || self.core.last_members.iter().any(is_back);
        let quiet = self.hands.iter().all(|hand| !hand.alive || hand.stream.is_none() || hand.up.is_empty());
        if matches!(self.core.phase, JobPhase::Returning { .. }) && waits && quiet {
            acts.push(Act::Wait);
        }
        if crashes {
            acts.push(Act::Crash(usize::MAX));
            acts.extend((0..self.pending.len()).map(Act::Crash));
        }
        acts
    }

    /// How many effects a worker's next message has, and how many facts are late by then.
    fn would_say(&self, place: usize) -> (usize, usize) {
        let hand = &self.hands[place];
        let (Some(message), Some(worker), Some(stream)) = (hand.up.front().cloned(), hand.id, hand.stream) else { return (0, 0) };
        let effects = self.core.clone().step(self.now, Event::Message { worker, stream, message }).unwrap_or_default();
        let late = effects.iter().filter(|effect| matches!(effect, Effect::Persist(fact) if fact.may_be_late())).count();
        (effects.len(), self.pending.len() + late)
    }

    fn act(&mut self, job: Job, act: Act) -> Result<(), Violation> {
        match act {
            Act::Up(place, None) => self.deliver(job, place, None)?,
            Act::Up(place, Some((effects, written))) => {
                self.deliver(job, place, Some(effects))?;
                self.crash(job, written)?;
            }
            Act::Down(place, withdraws) => self.hear(job, place, withdraws)?,
            Act::Finish(place) => self.finish(place),
            Act::Glitch(place) => {
                self.left.glitches -= 1;
                if let Some(assignment) = self.hands[place].training.clone() {
                    self.stop(place, &assignment, StopCause::Aborted, "connection reset");
                }
            }
            Act::Die(place, withdraws) => {
                self.left.deaths -= 1;
                if withdraws {
                    self.withdraw(place);
                }
                let hand = &mut self.hands[place];
                hand.alive = false;
                hand.down.clear();
            }
            Act::Notice(place) | Act::Cut(place) => {
                let hand = &mut self.hands[place];
                let (worker, stream) = (hand.id, hand.stream.take());
                hand.up.clear();
                hand.down.clear();
                hand.is_cut = true;
                if matches!(act, Act::Cut(_)) {
                    self.left.wrong_notices -= 1;
                }
                if let (Some(worker), Some(stream)) = (worker, stream) {
                    let _ = self.tell(job, Event::Closed { worker, stream, cause: "connection reset".into() }, None)?;
                }
            }
            Act::Back(place) => self.hello(job, place)?,
            Act::Join => {
                self.join(job)?;
                // Not yet: the place is somebody's who may come back.
                self.hands.pop_if(|hand| hand.stream.is_none());
            }
            Act::Wait => {
                let JobPhase::Returning { deadline, .. } = self.core.phase else { return Ok(()) };
                self.now = deadline;
                for place in 0..self.hands.len() {
                    let hand = &self.hands[place];
                    if let (true, Some(worker), Some(stream)) = (hand.alive, hand.id, hand.stream) {
                        let beat = Heartbeat {
                            step: Step(0),
                            phase: Phase::Waiting,
                            generation: Generation::NONE,
                            reads: 0,
                            memory: Memory::default(),
                        };
                        let _ = self.tell(job, Event::Message { worker, stream, message: FromWorker::Heartbeat(beat) }, None)?;
                    }
                }
                let _ = self.tell(job, Event::Tick, None)?;
            }
            Act::Beat(place) => {
                self.left.beats -= 1;
                let beat =
                    Heartbeat { step: Step(0), phase: Phase::Data, generation: Generation::NONE, reads: 0, memory: Memory::default() };
                self.hands[place].up.push_back(FromWorker::Heartbeat(beat));
            }
            Act::Crash(written) => self.crash(job, written)?,
        }
        self.settle(job)
    }
}

/// Whether the ledger holds exactly what is in some weights, once.
fn agrees(weights: &[(Generation, Vec<SampleName>)], ledger: &Ledger) -> Result<(), Violation> {
    let mut inside = BTreeSet::new();
    for &name in weights.iter().flat_map(|(_, names)| names) {
        if !inside.insert(name) {
            return Err(format!("sample {name} is in the weights twice"));
        }
        if !ledger.is_done(name.epoch, name.shard) && !ledger.done_samples(name.epoch, name.shard).contains(name.index) {
            return Err(format!("sample {name} is in the weights and not in the ledger"));
        }
    }
    let committed = ledger.totals().committed;
    if committed == inside.len() as u64 {
        Ok(())
    } else {
        Err(format!("{committed} samples are committed, {} are in the weights", inside.len()))
    }
}

impl Job {
    fn config(self) -> Config {
        Config {
            shards: (0..self.shards).map(|shard| format!("{shard}.tar")).collect(),
            sources: std::sync::Arc::new([Source::unnamed(self.shards)]),
            epochs: Some(1),
            last_step: None,
            ..config(self.workers)
        }
    }

    /// Looks at every state that can be reached; returns how many there are and how many of them are ends.
    fn explore(self) -> Result<(usize, usize), Violation> {
        let first = Moment::new(self);
        let mut text = String::new();
        let mut seen = HashSet::from([first.key(&mut text)]);
        let mut paths: Vec<(usize, Act)> = vec![(0, Act::Join)];
        let mut queue = VecDeque::from([(0, first)]);
        let mut ends = 0;
        let told = |paths: &[(usize, Act)], mut at: usize, problem: &str| {
            let mut acts = Vec::new();
            while at != 0 {
                acts.push(format!("{:?}", paths[at].1));
                at = paths[at].0;
            }
            acts.reverse();
            format!("{problem}, after {}", acts.join(", "))
        };
        while let Some((at, moment)) = queue.pop_front() {
            ends += usize::from(moment.over.is_some());
            let acts = moment.acts(self);
            let goes_on = |act: &Act| {
                !matches!(act, Act::Die(..) | Act::Cut(_) | Act::Crash(_) | Act::Up(_, Some(_)) | Act::Glitch(_) | Act::Beat(_))
            };
            if moment.over.is_none() && !acts.iter().any(goes_on) {
                return Err(told(
                    &paths,
                    at,
                    &format!(
                        "nothing happens any more while the job is {}\n{:?}\n{:?}\n{:?}",
                        moment.core.state(),
                        moment.hands,
                        moment.sums,
                        moment.core.leases
                    ),
                ));
            }
            for act in acts {
                let mut next = moment.clone();
                let result = next.act(self, act);
                paths.push((at, act));
                if let Err(problem) = result {
                    return Err(told(&paths, paths.len() - 1, &problem));
                }
                match seen.insert(next.key(&mut text)) {
                    true => queue.push_back((paths.len() - 1, next)),
                    false => drop(paths.pop()),
                }
            }
        }
        Ok((seen.len(), ends))
    }
}

const TWO: Job = Job {
    workers: 2,
    shards: 2,
    samples: 1,
    budget: Budget { deaths: 0, wrong_notices: 0, crashes: 0, glitches: 0, beats: 0 },
    broken: Broken::Nothing,
};

#[track_caller]
fn holds(job: Job) {
    let started = std::time::Instant::now();
    match job.explore() {
        Ok((states, ends)) => {
            println!("{states} states, {ends} ends in {:.2} s: {job:?}", started.elapsed().as_secs_f64());
            assert!(ends > 0, "the job never ends");
        }
        Err(violation) => panic!("{violation}"),
    }
}

#[test]
fn a_death_and_a_wrong_notice_lose_and_double_nothing() {
    holds(Job { budget: Budget { deaths: 1, wrong_notices: 1, ..TWO.budget }, ..TWO });
}

#[test]
fn a_collective_that_fails_on_one_side_loses_and_doubles_nothing() {
    holds(Job { budget: Budget { deaths: 1, glitches: 1, ..TWO.budget }, ..TWO });
    holds(Job { budget: Budget { wrong_notices: 1, glitches: 1, ..TWO.budget }, ..TWO });
}

#[test]
fn a_coordinator_that_dies_between_any_two_effects_loses_and_doubles_nothing() {
    holds(Job { samples: 2, budget: Budget { crashes: 1, beats: 1, ..TWO.budget }, ..TWO });
    holds(Job { budget: Budget { crashes: 2, ..TWO.budget }, ..TWO });
}

#[test]
fn a_coordinator_and_a_worker_that_die_lose_and_double_nothing() {
    holds(Job { budget: Budget { crashes: 1, deaths: 1, ..TWO.budget }, ..TWO });
}

#[test]
fn a_coordinator_that_dies_beside_a_wrong_notice_loses_and_doubles_nothing() {
    holds(Job { budget: Budget { crashes: 1, wrong_notices: 1, ..TWO.budget }, ..TWO });
}

#[test]
fn three_workers_one_of_them_dying_lose_and_double_nothing() {
    holds(Job { workers: 3, shards: 3, budget: Budget { deaths: 1, ..TWO.budget }, ..TWO });
}

#[track_caller]
fn is_caught(job: Job, what: &str) {
    let violation = job.explore().expect_err("a broken rule is found");
    assert!(violation.contains(what), "{violation}");
}

#[test]
fn committing_on_the_first_report_is_caught() {
    is_caught(Job { broken: Broken::FirstReport, budget: Budget { deaths: 1, ..TWO.budget }, ..TWO }, "has not applied it");
}

#[test]
fn acks_from_memory_are_caught() {
    is_caught(
        Job { samples: 2, broken: Broken::AcksFromMemory, budget: Budget { crashes: 1, beats: 2, ..TWO.budget }, ..TWO },
        "but not the names of step",
    );
}

#[test]
fn a_generation_that_is_told_before_it_is_on_disk_is_caught() {
    is_caught(Job { broken: Broken::LateFacts, budget: Budget { crashes: 1, ..TWO.budget }, ..TWO }, "begun again");
}
