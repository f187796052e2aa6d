//! What a seed stands for: a job, a cluster, and what goes wrong in it.

use std::time::Duration;

use peapod_proto::ids::Step;

use super::queue::{Random, ms};

/// The largest world.
const MOST_WORKERS: u32 = 5;

/// What a sample is like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// To be trained on.
    Good,
    /// Kept out by a rule, as the reader finds.
    Filtered,
    /// Broken, as the reader finds.
    Bad,
    /// Broken, as is found later, when its picture is decoded.
    Undecodable,
    /// Trained on, with a loss that is no number.
    NotFinite,
}

/// Something that goes wrong, or that somebody wants.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Fault {
    /// A worker's process dies; its connections break.
    Kill(usize),
    /// A worker's host vanishes: no connection breaks.
    Vanish(usize),
    /// A worker's process is stopped and goes on (SIGSTOP, SIGCONT).
    Pause(usize, Duration),
    /// Nothing passes between a worker and the coordinator for a while.
    Stall(usize, Duration),
    /// A worker's trainer stands still for good, while its process gives signs of life.
    Hang(usize),
    /// A worker's stream breaks.
    Break(usize),
    /// All workers' streams break.
    BreakAll,
    /// Somebody sends a worker SIGTERM.
    Term(usize),
    /// Somebody has the coordinator drain a worker.
    Drain(usize),
    /// The next message that tells a worker to abort is lost.
    LoseAbort(usize),
    /// The next collective finishes on some ranks and fails on others, though nobody dies.
    Glitch,
    /// The coordinator is killed after so many more effects, and started again later.
    Crash(u32, Duration),
    /// The coordinator leaves in order (SIGTERM) and is started again later.
    GoAway(Duration),
    /// The coordinator's process is stopped and goes on.
    Freeze(Duration),
    /// The job is stopped and resumed later with this many workers.
    Resize(u32, Duration),
    /// The next checkpoint cannot be written.
    FailStore,
    /// The next checkpoint is cut off on its way.
    CutUpload,
}

/// When it happens.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum When {
    /// At a time.
    At(Duration),
    /// Once this step is final.
    Step(Step),
}

/// What a seed stands for.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Workers at the start.
    pub world_size: u32,
    /// Workers that are enough.
    pub min_world_size: u32,
    /// Workers beyond the world that stand by.
    pub spares: u32,
    /// Whether a smaller world takes smaller steps.
    pub scale_batch: bool,
    /// Whether each worker is started with its rank.
    pub asks_for_ranks: bool,
    /// The samples of each shard.
    pub shards: Vec<Vec<Kind>>,
    /// Passes over the data, for a job that is given in them.
    pub epochs: Option<u32>,
    /// Last step, for a job that is given in steps.
    pub last_step: Option<Step>,
    /// Samples in a step.
    pub global_batch: u32,
    /// Steps between checkpoints.
    pub checkpoint_steps: u64,
    /// Time between checkpoints.
    pub checkpoint_every: Duration,
    /// Checkpoints that are kept.
    pub keep: usize,
    /// Silence after which a worker is dead.
    pub heartbeat_timeout: Duration,
    /// How long the coordinator waits for missing workers.
    pub join_timeout: Duration,
    /// How long a message takes, mostly.
    pub latency: (Duration, Duration),
    /// How long a share takes.
    pub compute: (Duration, Duration),
    /// How long a few samples take to read.
    pub reading: (Duration, Duration),
    /// How long models take to load.
    pub loading: (Duration, Duration),
    /// What goes wrong, and when.
    pub faults: Vec<(When, Fault)>,
}

impl Plan {
    /// The plan of a seed: a fifth of them are variants of one long story, the others are drawn freely. Where it `is_elastic` fewer workers
    /// may be enough, others stand by, and trainers may hang.
    pub fn of(random: &mut Random, is_elastic: bool) -> Self {
        let story = random.one_in(5);
        let world_size = if story { 3 } else { random.pick(&[1, 2, 2, 3, 3, 4, MOST_WORKERS]) };
        let (low, high) = random.pick(&[(3, 12), (8, 24), (20, 60)]);
        let num_shards = random.within(2, 7);
        let odd = random.one_in(3);
        let kind = |random: &mut Random| match random.below(40) {
            0 if odd => Kind::Filtered,
            1 if odd => Kind::Bad,
            2 if odd => Kind::Undecodable,
            3 if odd && random.one_in(2) => Kind::NotFinite,
            _ => Kind::Good,
        };
        let mut shards: Vec<Vec<Kind>> = (0..num_shards)
            .map(|_| {
                let len = if odd && random.one_in(8) { 0 } else { random.within(low, high) };
                (0..len).map(|_| kind(random)).collect()
            })
            .collect();
        // A job without a single good sample would never end.
        shards[0].extend([Kind::Good; 3]);
        // Every worker must have a part of it, also after the job was resumed with more of them.
        let global_batch = (random.within(1, 3) as u32 * world_size + random.below(3) as u32).max(MOST_WORKERS);
        let num_samples: u64 = shards.iter().map(|shard| shard.len() as u64).sum();
        let epochs = if story { 2 } else { random.within(1, 3) as u32 };
        let steps = num_samples * u64::from(epochs) / u64::from(global_batch);
        let in_steps = !story && random.one_in(4);
        let step_time = random.pick(&[10, 40, 120]);
        let mut plan = Self {
            world_size,
            min_world_size: world_size,
            spares: 0,
            scale_batch: false,
            asks_for_ranks: random.one_in(2),
            shards,
            epochs: (!in_steps).then_some(epochs),
            last_step: in_steps.then_some(Step(steps.max(3))),
            global_batch,
            checkpoint_steps: random.pick(&[2, 5, 5, 9, 1000]),
            checkpoint_every: random.pick(&[ms(1500), ms(6000), Duration::from_secs(300)]),
            keep: random.pick(&[1, 2, 3]),
            heartbeat_timeout: random.pick(&[ms(1200), ms(3000)]),
            join_timeout: Duration::from_secs(60),
            latency: random.pick(&[(ms(0), ms(2)), (ms(1), ms(20)), (ms(20), ms(80))]),
            compute: (ms(step_time), ms(step_time * random.within(1, 3))),
            reading: random.pick(&[(ms(0), ms(2)), (ms(2), ms(40))]),
            loading: (ms(100), ms(random.pick(&[200, 1500, 6000]))),
            faults: Vec::new(),
        };
        plan.faults = if story { plan.story(random, steps) } else { plan.free(random, steps) };
        if is_elastic {
            plan.stretch(random, steps);
        }
        plan
    }

    /// What an elastic job has beside a fixed one.
    fn stretch(&mut self, random: &mut Random, steps: u64) {
        self.min_world_size = random.within(1, self.world_size.into()) as u32;
        // With ranks given out by hand, one that stands by without a rank would take that of a worker that comes late.
        self.spares = if self.asks_for_ranks { 0 } else { random.pick(&[0, 1, 1, 2]) };
        self.scale_batch = random.one_in(3);
        // Longer than it can take to notice a hang.
        self.join_timeout = Duration::from_secs(1200);
        for _ in 0..random.pick(&[0, 0, 1, 2]) {
            let worker = random.below(u64::from(self.world_size + self.spares)) as usize;
            self.faults.push((When::Step(Step(random.within(1, steps.max(1)))), Fault::Hang(worker)));
        }
    }

    /// One worker killed twice and replaced, the coordinator stopped and started, the job stopped and resumed with one worker and then with
    /// four.
    fn story(&self, random: &mut Random, steps: u64) -> Vec<(When, Fault)> {
        let victim = random.below(u64::from(self.world_size)) as usize;
        let at = |part: u64| When::Step(Step((steps * part / 100).max(1)));
        let away = random.between((ms(50), ms(2500)));
        let crash = random.below(60) as u32;
        let coordinator = random.pick(&[Fault::GoAway(away), Fault::Crash(crash, away)]);
        let mut faults = vec![
            (at(15), Fault::Kill(victim)),
            (at(30), Fault::Kill(victim)),
            (at(45), coordinator),
            (at(60), Fault::Resize(1, ms(300))),
            (at(70), Fault::Resize(4, ms(300))),
        ];
        if random.one_in(2) {
            let step = random.within(1, steps.max(1));
            faults.push((When::Step(Step(step)), self.fault(random)));
        }
        faults
    }

    fn free(&self, random: &mut Random, steps: u64) -> Vec<(When, Fault)> {
        let num = random.pick(&[0, 1, 2, 3, 5, 8, 12]);
        let horizon = random.pick(&[ms(2000), ms(8000), ms(25_000)]);
        let mut faults = Vec::new();
        for _ in 0..num {
            let when = if random.one_in(2) {
                When::At(random.between((ms(0), horizon)))
            } else {
                When::Step(Step(random.within(1, steps.max(1))))
            };
            faults.push((when, self.fault(random)));
            // Troubles come in company.
            if random.one_in(3) {
                faults.push((when, self.fault(random)));
            }
        }
        faults
    }

    fn fault(&self, random: &mut Random) -> Fault {
        let worker = random.below(u64::from(self.world_size)) as usize;
        let short = random.between((ms(20), ms(2000)));
        let long = random.between((ms(500), ms(5000)));
        match random.below(24) {
            0..=3 => Fault::Kill(worker),
            4 => Fault::Vanish(worker),
            5 | 6 => Fault::Pause(worker, long),
            7 => Fault::Stall(worker, long),
            8 | 9 => Fault::Break(worker),
            10 => Fault::BreakAll,
            11 => Fault::Term(worker),
            12 => Fault::Drain(worker),
            13 => Fault::LoseAbort(worker),
            14..=16 => Fault::Glitch,
            17..=19 => Fault::Crash(random.below(80) as u32, random.pick(&[short, long])),
            20 => Fault::GoAway(random.pick(&[short, long])),
            21 => Fault::Freeze(long),
            22 => Fault::Resize(random.within(1, u64::from(MOST_WORKERS)) as u32, short),
            _ => random.pick(&[Fault::FailStore, Fault::CutUpload]),
        }
    }

    /// Far more time than the job takes when nothing goes wrong.
    pub fn ample_time(&self) -> Duration {
        let num_samples: u64 = self.shards.iter().map(|shard| shard.len() as u64).sum();
        let smallest = if self.scale_batch { 1 } else { u64::from(self.global_batch) };
        let from_epochs = self.epochs.map_or(0, |epochs| num_samples * u64::from(epochs) / smallest * 2 + 20);
        let steps = from_epochs.max(self.last_step.map_or(0, |step| step.0)) as u32;
        let step = self.compute.1 + self.latency.1 * 4 + self.reading.1 * (self.global_batch + 2) + ms(150);
        step * steps + self.loading.1
    }
}
