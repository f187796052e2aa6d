//! Whole clusters in virtual time, from one seed: the real rules of the coordinator and of its workers, everything around them simulated.
//!
//! [`Core`](peapod_coordinator::core::Core), its facts and their replay, [`Lifecycle`](peapod_worker::lifecycle::Lifecycle),
//! [`Control`](peapod_worker::trainer::Control) and the tail of the all-reduce are the real ones. The shells around them do here what they
//! do in `driver.rs`, `run.rs`, `supervisor.rs` and `trainer/mod.rs`, in the same order. Weights are the list of their steps with the names
//! of their samples, so that what is in them can be compared with the ledger whenever a generation begins, a checkpoint is made, or the job
//! ends.
//!
//! No sockets, no threads, no clock. [`run`] of a seed always does the same; [`trace`] says what.

mod check;
mod collective;
mod coordinator;
mod journal;
mod loader;
mod network;
mod operator;
mod plan;
mod queue;
mod trainer;
mod uploads;
mod weights;
mod worker;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use peapod_coordinator::core::Outcome;

use check::Checks;
use collective::Group;
use coordinator::{Answer, Coordinator};
use journal::{Journal, Store};
use network::{Down, Stream, StreamKey, Up};
use operator::Operator;
use plan::{Fault, Plan};
use queue::{Queue, Random, Time};
use trainer::Wake;
use uploads::{Stage, Upload};
use worker::Process;

/// A worker process by its place among all of a simulation.
type ProcessId = usize;

/// Seeds from here on are elastic jobs: fewer workers may be enough, others stand by, trainers may hang.
pub const ELASTIC: u64 = 1_000_000;
/// How much longer than without faults a job may take after the last of them.
const PATIENCE: Duration = Duration::from_secs(200);
/// Events after which a simulation goes round in circles.
const MOST_EVENTS: u64 = 2_000_000;
/// Lines of a trace that are shown with a failure.
const SHOWN: usize = 60;

/// What happens.
enum Event {
    Hello {
        process: ProcessId,
        attempt: u64,
    },
    Refused {
        process: ProcessId,
        attempt: u64,
        answer: Answer,
    },
    Up {
        stream: StreamKey,
        up: Up,
    },
    Down {
        stream: StreamKey,
        down: Down,
    },
    Beat {
        process: ProcessId,
        beat: u64,
    },
    Output {
        process: ProcessId,
    },
    Serve {
        process: ProcessId,
    },
    Trainer {
        process: ProcessId,
        token: u64,
        wake: Wake,
    },
    Read {
        process: ProcessId,
    },
    Close {
        process: ProcessId,
    },
    Tick {
        term: u64,
        at: Time,
    },
    Flush {
        term: u64,
    },
    Upload {
        upload: usize,
        stage: Stage,
    },
    Crash {
        term: u64,
    },
    StartCoordinator,
    StartWorker {
        slot: usize,
    },
    Fault {
        fault: Fault,
    },
    /// The coordinator goes on after it stood still for so long.
    Thaw {
        term: u64,
        stood_still: Duration,
    },
}

/// A cluster.
struct World {
    plan: Plan,
    random: Random,
    now: Time,
    queue: Queue<Event>,
    streams: Vec<Stream>,
    processes: Vec<Process>,
    groups: Vec<Group>,
    uploads: Vec<Upload>,
    coordinator: Option<Coordinator>,
    /// Starts of the coordinator so far.
    terms: u64,
    journal: Journal,
    store: Store,
    /// The stream whose hello is being answered.
    arriving: Option<StreamKey>,
    operator: Operator,
    checks: Checks,
    outcome: Option<Outcome>,
    failure: Option<String>,
    trace: Option<Vec<String>>,
    glitch: bool,
    fail_store: bool,
    cut_upload: bool,
    restart_after: Duration,
}

/// What a simulation came to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Summary {
    /// Events in it.
    pub events: u64,
    /// Virtual time it took.
    pub took: Duration,
    /// Faults in its plan.
    pub faults: usize,
    /// Starts of the coordinator.
    pub terms: u64,
    /// Worker processes.
    pub processes: usize,
    /// Times the job went back to a checkpoint, as everybody who held more was gone.
    pub rollbacks: u32,
    /// Times it ended for the same reason.
    pub failures: u32,
}

/// Simulates a seed.
///
/// # Errors
/// What did not hold, with the seed, its plan and the end of its trace.
pub fn run(seed: u64) -> Result<Summary, String> {
    let simulate = |traced| {
        let result = catch_unwind(AssertUnwindSafe(|| {
            let mut world = World::new(seed, traced);
            let result = world.run();
            (result, world.trace.take().unwrap_or_default(), format!("{:?}", world.plan))
        }));
        result.unwrap_or_else(|panic| {
            let text = panic.downcast_ref::<String>().cloned().or_else(|| panic.downcast_ref::<&str>().map(|&text| text.to_owned()));
            (Err(format!("panicked: {}", text.unwrap_or_default())), Vec::new(), String::new())
        })
    };
    let (result, _, _) = simulate(false);
    result.map_err(|problem| {
        let (_, trace, plan) = simulate(true);
        let end = trace[trace.len().saturating_sub(SHOWN)..].join("\n");
        format!("seed {seed}: {problem}\n{plan}\n... {end}\nPEAPOD_SIM_SEED={seed} shows all of it")
    })
}

/// Simulates a seed and tells what happens in it, line by line; the last line is how it ended.
#[must_use]
pub fn trace(seed: u64) -> Vec<String> {
    let mut world = World::new(seed, true);
    let result = world.run();
    let mut lines = vec![format!("{:?}", world.plan)];
    lines.extend(world.trace.take().unwrap_or_default());
    lines.push(format!("{result:?}"));
    lines
}

impl World {
    fn new(seed: u64, traced: bool) -> Self {
        let mut random = Random::new(seed);
        Self {
            plan: Plan::of(&mut random, seed >= ELASTIC),
            random,
            now: Time::ZERO,
            queue: Queue::default(),
            streams: Vec::new(),
            processes: Vec::new(),
            groups: Vec::new(),
            uploads: Vec::new(),
            coordinator: None,
            terms: 0,
            journal: Journal::default(),
            store: Store::default(),
            arriving: None,
            operator: Operator::default(),
            checks: Checks::default(),
            outcome: None,
            failure: None,
            trace: traced.then(Vec::new),
            glitch: false,
            fail_store: false,
            cut_upload: false,
            restart_after: Duration::ZERO,
        }
    }

    /// Runs to the end of the job.
    fn run(&mut self) -> Result<Summary, String> {
        self.set_up();
        let ample = self.plan.ample_time() + PATIENCE;
        let mut events = 0;
        while self.outcome.is_none() {
            let Some((at, event)) = self.queue.pop() else { return Err("nothing happens any more, and the job is not done".into()) };
            self.now = at;
            events += 1;
            if at > self.operator.quiet_from + ample || events > MOST_EVENTS {
                let state = self.coordinator.as_ref().map_or_else(|| "away".into(), |coordinator| coordinator.core.state());
                return Err(format!("the job is not done {ample:?} after the last fault; the coordinator is {state}"));
            }
            match self.held_up(&event) {
                Some(until) => self.queue.push(until, event),
                None => self.handle(event),
            }
            if let Some(failure) = self.failure.take() {
                return Err(failure);
            }
        }
        self.check_end()?;
        Ok(Summary {
            events,
            took: self.now,
            faults: self.plan.faults.len(),
            terms: self.terms,
            processes: self.processes.len(),
            rollbacks: self.checks.rollbacks,
            failures: self.operator.failures,
        })
    }

    /// Until when what would happen waits, for a process that is stopped.
    fn held_up(&self, event: &Event) -> Option<Time> {
        let process = match *event {
            Event::Refused { process, .. }
            | Event::Beat { process, .. }
            | Event::Output { process }
            | Event::Serve { process }
            | Event::Trainer { process, .. }
            | Event::Read { process }
            | Event::Close { process } => Some(process),
            Event::Down { stream, .. } => Some(self.streams[stream].process),
            _ => None,
        };
        if let Some(process) = process {
            let hangs = self.processes[process].hangs && matches!(event, Event::Serve { .. } | Event::Trainer { .. });
            return if hangs { Some(Time::MAX) } else { Some(self.processes[process].paused_until).filter(|&until| until > self.now) };
        }
        let coordinator = self.coordinator.as_ref()?;
        let (until, wait) = coordinator.paused_until;
        match event {
            Event::Tick { .. } => Some(until).filter(|&until| until > self.now),
            // Whether the clock or the messages that have come meanwhile are looked at first is chance.
            Event::Hello { .. } | Event::Up { .. } | Event::Flush { .. } | Event::Upload { .. } => {
                Some(until + wait).filter(|&until| until > self.now)
            }
            _ => None,
        }
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Hello { process, attempt } => {
                self.hello_arrives(process, attempt);
                self.set_alarms();
            }
            Event::Refused { process, attempt, answer } => self.refused(process, attempt, answer),
            Event::Up { stream, up } if !self.is_lost_up(stream, &up) => self.up_arrives(stream, up),
            Event::Down { stream, down } if !self.is_lost_down(stream, &down) => self.down_arrives(stream, down),
            Event::Up { .. } | Event::Down { .. } => {}
            Event::Beat { process, beat } => self.beat(process, beat),
            Event::Output { process } => self.take_output(process),
            Event::Serve { process } => self.serve(process),
            Event::Trainer { process, token, wake } => self.wake(process, token, wake),
            Event::Read { process } => self.read(process),
            Event::Close { process } => self.close(process),
            Event::Tick { term, at } => self.tick(term, at),
            Event::Flush { term } => self.flush(term),
            Event::Upload { upload, stage } => self.upload_is_at(upload, stage),
            Event::Crash { term } => {
                if self.coordinator.as_ref().is_some_and(|coordinator| coordinator.term == term && coordinator.crash_after.is_some()) {
                    self.crash();
                }
            }
            Event::StartCoordinator => self.start_coordinator(),
            Event::StartWorker { slot } => self.start_worker(slot),
            Event::Fault { fault } => self.strike(fault),
            Event::Thaw { term, stood_still } => self.thaw(term, stood_still),
        }
    }

    fn fail(&mut self, problem: String) {
        self.failure.get_or_insert(problem);
    }

    /// Notes something for the trace.
    fn say(&mut self, text: impl FnOnce() -> String) {
        if let Some(lines) = &mut self.trace {
            lines.push(format!("{:9.3} {}", self.now.as_secs_f64(), text()));
        }
    }
}
