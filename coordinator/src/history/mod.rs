//! What happened to a job, for the page, the metrics and the commands: all its time in bounded memory.
//!
//! A value without clock or I/O, owned by the observer. The curves of earlier runs come from steps.jsonl; everything else is known since
//! the coordinator started.

mod goodput;
pub mod restore;
mod series;
mod told;

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use peapod_proto::ids::{Generation, Rank, Step, WorkerId};
use peapod_proto::message::{Memory, StepLosses, StepRecord, StepTimings, ValidationLosses};

use crate::core::{Activity, Notice, Timestamp, WorkerView};
pub use goodput::{Cause, Goodput};
pub use series::{Columns, Point, Series};
pub use told::{Level, told};

/// Events of a kind that are kept: what is frequent does not push out what matters.
const MAX_EVENTS: usize = 100;
/// Of checkpoints fewer: there is a list of them.
const MAX_CHECKPOINT_EVENTS: usize = 20;
/// Validations that are kept; beyond, every second one goes.
const MAX_VALIDATIONS: usize = 1024;
/// Checkpoints that are listed.
const MAX_CHECKPOINTS: usize = 20;
/// Upper bounds, in seconds, of the step histogram.
pub const STEP_BOUNDS: [f64; 12] = [0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 120.0, 300.0];

/// Something that happened.
#[derive(Debug, Clone, PartialEq)]
pub struct Happened {
    /// When, since the coordinator started.
    pub at: Timestamp,
    /// How much it matters.
    pub level: Level,
    /// In words.
    pub text: String,
    kind: Kind,
    /// Whether the next of its kind takes its place: it is said again and again while the job waits.
    is_repeated: bool,
}

/// Events that count together against how many are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// What went wrong.
    Error,
    /// What may.
    Warning,
    /// Checkpoints that are stored as they should be.
    Checkpoint,
    /// All else.
    Routine,
}

impl Kind {
    fn of(notice: &Notice, level: Level) -> Self {
        match (level, notice) {
            (Level::Error, _) => Self::Error,
            (Level::Warning, _) => Self::Warning,
            (Level::Info, Notice::Checkpoint { .. }) => Self::Checkpoint,
            (Level::Info, _) => Self::Routine,
        }
    }

    fn max(self) -> usize {
        match self {
            Self::Error | Self::Warning | Self::Routine => MAX_EVENTS,
            Self::Checkpoint => MAX_CHECKPOINT_EVENTS,
        }
    }
}

/// How a worker went.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Departure {
    /// As asked.
    Left,
    /// It was lost, for this reason.
    Lost(String),
}

impl Departure {
    /// The phase that the page shows for it.
    #[must_use]
    pub fn as_str(&self) -> &'static str {
        match self {
            Self::Left => "left",
            Self::Lost(_) => "lost",
        }
    }

    /// Why it went.
    #[must_use]
    pub fn reason(&self) -> &str {
        match self {
            Self::Left => "left as asked",
            Self::Lost(cause) => cause,
        }
    }
}

/// A rank's worker, the dead included.
#[derive(Debug, Clone, PartialEq)]
pub struct Seen {
    /// As it was last seen.
    pub view: WorkerView,
    /// When it went, and how.
    pub gone: Option<(Timestamp, Departure)>,
    /// Workers that have joined under this rank.
    pub starts: u32,
    /// Where the time of its last step went.
    pub timings: Option<StepTimings>,
    /// What it last said that it holds in memory.
    pub memory: Memory,
}

/// How often things happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counts {
    /// Workers that joined.
    pub joined: u64,
    /// Workers that were lost.
    pub lost: u64,
    /// Workers that left as asked.
    pub left: u64,
    /// Generations that were formed.
    pub formed: u64,
    /// Generations that were broken up by a failure.
    pub aborted: u64,
    /// Times the job went back behind final steps.
    pub rolled_back: u64,
    /// Steps that were not finite.
    pub skipped_steps: u64,
    /// Steps that became final.
    pub steps: u64,
    /// Samples in them.
    pub samples: u64,
    /// Checkpoints stored.
    pub checkpoints: u64,
    /// Checkpoints that were not.
    pub checkpoints_failed: u64,
}

/// Seconds of final steps, as a histogram.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct StepSeconds {
    /// Steps up to each of [`STEP_BOUNDS`], not counting those of the bound before; the last is of all beyond.
    pub counts: [u64; STEP_BOUNDS.len() + 1],
    /// Seconds of all.
    pub sum: f64,
}

/// What happened so far.
#[derive(Debug, Clone, Default)]
pub struct History {
    /// Seconds since 1970 at which the coordinator started.
    pub started_unix: f64,
    /// Now, since then.
    pub now: Timestamp,
    /// When the job ended, if it ended under this coordinator.
    pub ended: Option<Timestamp>,
    /// The curves.
    pub series: Series,
    /// The first step that this coordinator saw become final itself.
    pub known_since: Option<u64>,
    /// Losses on the validation samples, with their total.
    pub validations: Vec<(ValidationLosses, f64)>,
    /// Where the time went.
    pub goodput: Goodput,
    /// The newest of what happened, oldest first.
    pub events: VecDeque<Happened>,
    /// Workers by rank.
    pub workers: BTreeMap<Rank, Seen>,
    /// How often things happened.
    pub counts: Counts,
    /// How long steps take.
    pub step_seconds: StepSeconds,
    /// The newest stored checkpoints, oldest first.
    pub checkpoints: VecDeque<(Step, Timestamp)>,
    /// The newest final step, and its numbers.
    pub newest: Option<(Step, StepLosses, StepTimings)>,
    /// Ranks of the workers in sight.
    ranks: BTreeMap<WorkerId, Rank>,
    last_final: Option<(Generation, Timestamp)>,
}

impl History {
    /// Of a coordinator that starts now, in seconds since 1970.
    #[must_use]
    pub fn starting(started_unix: f64) -> Self {
        Self { started_unix, ..Self::default() }
    }

    /// The job does something else from now on, or still the same.
    pub fn turn_to(&mut self, now: Timestamp, activity: Activity) {
        self.now = now;
        self.goodput.turn_to(now, activity);
    }

    /// The job has ended.
    pub fn ended(&mut self, now: Timestamp) {
        self.ended = Some(now);
    }

    /// A step of an earlier coordinator, from its log.
    pub fn restore(&mut self, point: &Point) {
        self.series.push(point);
    }

    /// A validation of an earlier coordinator, from its log.
    pub fn restore_validation(&mut self, losses: ValidationLosses, total: f64) {
        // A step that was trained again was validated again: the last word counts.
        self.validations.retain(|(known, _)| known.step < losses.step);
        self.validations.push((losses, total));
        if self.validations.len() > MAX_VALIDATIONS {
            let mut number = 0;
            self.validations.retain(|_| {
                number += 1;
                number % 2 == 1
            });
        }
    }

    /// A step is final.
    pub fn committed(&mut self, now: Timestamp, record: &StepRecord, timings: StepTimings) {
        self.now = now;
        self.goodput.committed(now, timings);
        let before = self.last_final.replace((record.generation, now)).filter(|(generation, _)| *generation == record.generation);
        let seconds = before.map(|(_, at)| now.saturating_sub(at).as_secs_f64());
        if let Some(seconds) = seconds {
            self.step_seconds.sum += seconds;
            self.step_seconds.counts[STEP_BOUNDS.partition_point(|&bound| bound < seconds)] += 1;
        }
        self.counts.steps += 1;
        self.counts.samples += record.names.len() as u64;
        self.known_since.get_or_insert(record.step.0);
        let losses = record.losses;
        // A step that was skipped has no losses worth a point: they are not finite.
        let shown = |value: f32| f64::from(value);
        if !record.skipped {
            self.series.push(&Point {
                step: record.step.0,
                task: shown(losses.task),
                logit: shown(losses.logit),
                feature: shown(losses.feature),
                grad_norm: shown(losses.grad_norm),
                learning_rate: shown(losses.learning_rate),
                samples: record.names.len() as f64,
                seconds,
                data: shown(timings.data),
            });
        }
        self.newest = Some((record.step, record.losses, timings));
    }

    /// The weights of a final step were validated.
    pub fn validated(&mut self, losses: ValidationLosses, total: f64) {
        self.restore_validation(losses, total);
    }

    /// A worker said where the time of its step went.
    pub fn timed(&mut self, worker: WorkerId, timings: StepTimings) {
        if let Some(seen) = self.ranks.get(&worker).and_then(|rank| self.workers.get_mut(rank)) {
            seen.timings = Some(timings);
        }
    }

    /// A worker said what it holds in memory.
    pub fn holds(&mut self, worker: WorkerId, memory: Memory) {
        if let Some(seen) = self.ranks.get(&worker).and_then(|rank| self.workers.get_mut(rank)) {
            seen.memory = memory;
        }
    }

    /// What is known of a worker that is connected.
    #[must_use]
    pub fn seen(&self, view: &WorkerView) -> Option<&Seen> {
        self.workers.get(&view.rank).filter(|seen| seen.view.id == view.id)
    }

    /// Something people want to read.
    pub fn notice(&mut self, now: Timestamp, notice: &Notice) {
        self.now = now;
        match notice {
            Notice::Joined(worker) => {
                self.counts.joined += 1;
                let starts = self.workers.get(&worker.rank).map_or(0, |seen| seen.starts) + 1;
                if let Some(before) = self.workers.get(&worker.rank) {
                    self.ranks.remove(&before.view.id);
                }
                self.ranks.insert(worker.id, worker.rank);
                self.workers
                    .insert(worker.rank, Seen { view: worker.clone(), gone: None, starts, timings: None, memory: Memory::default() });
            }
            Notice::Lost { worker, cause } => {
                self.counts.lost += 1;
                self.gone(now, worker, Departure::Lost(cause.clone()));
            }
            Notice::Left(worker) => {
                self.counts.left += 1;
                self.gone(now, worker, Departure::Left);
            }
            Notice::Formed { .. } => self.counts.formed += 1,
            Notice::Aborted { .. } => self.counts.aborted += 1,
            Notice::RolledBack { to, .. } => {
                self.counts.rolled_back += 1;
                self.series.go_back_to(*to);
                self.validations.retain(|(losses, _)| losses.step <= *to);
            }
            Notice::StepSkipped { .. } => self.counts.skipped_steps += 1,
            Notice::Checkpoint { step } => {
                self.counts.checkpoints += 1;
                self.checkpoints.push_back((*step, now));
                if self.checkpoints.len() > MAX_CHECKPOINTS {
                    self.checkpoints.pop_front();
                }
            }
            Notice::CheckpointFailed { .. } => self.counts.checkpoints_failed += 1,
            _ => {}
        }
        let is_repeated = matches!(notice, Notice::Waiting { .. });
        if is_repeated && self.events.back().is_some_and(|last| last.is_repeated) {
            self.events.pop_back();
        }
        let (level, text) = told(notice);
        let kind = Kind::of(notice, level);
        self.events.push_back(Happened { at: now, level, text, kind, is_repeated });
        if self.events.iter().filter(|event| event.kind == kind).count() > kind.max()
            && let Some(oldest) = self.events.iter().position(|event| event.kind == kind)
        {
            self.events.remove(oldest);
        }
    }

    fn gone(&mut self, now: Timestamp, worker: &WorkerView, departure: Departure) {
        if let Some(seen) = self.workers.get_mut(&worker.rank).filter(|seen| seen.view.id == worker.id) {
            (seen.view, seen.gone) = (worker.clone(), Some((now, departure)));
        }
    }

    /// Seconds since 1970 of a moment.
    #[must_use]
    pub fn unix(&self, at: Timestamp) -> f64 {
        self.started_unix + at.as_secs_f64()
    }

    /// Seconds since the coordinator started; of a job that is over, until its end.
    #[must_use]
    pub fn elapsed(&self) -> f64 {
        self.goodput.seconds(self.now).iter().map(|(_, seconds)| seconds).sum()
    }

    /// Seconds until `last_step` at the newest pace, once it is known.
    #[must_use]
    pub fn left(&self, step: Step, last_step: Option<u64>) -> Option<f64> {
        let (_, seconds) = self.series.pace()?;
        Some(last_step?.saturating_sub(step.0) as f64 * seconds)
    }

    /// The share of the time since the coordinator started that went into final steps.
    #[must_use]
    pub fn goodput_ratio(&self) -> f64 {
        let seconds = self.goodput.seconds(self.now);
        let all = self.elapsed();
        let good = seconds.first().map_or(0.0, |(_, seconds)| *seconds);
        if all > 0.0 { good / all } else { 0.0 }
    }

    /// A picture of it at `now`.
    #[must_use]
    pub fn at(&self, now: Duration) -> Self {
        Self { now, ..self.clone() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use peapod_proto::message::Phase;

    fn worker(rank: u32, id: u64) -> WorkerView {
        let (host, device) = ("host".into(), "cpu".into());
        WorkerView {
            id: WorkerId(id),
            rank: Rank(rank),
            host,
            pid: 7,
            device,
            phase: Phase::Compute,
            step: Step(3),
            silence: Duration::ZERO,
            member: true,
        }
    }

    #[test]
    fn a_dead_worker_stays_in_sight_until_another_has_its_rank() {
        let mut history = History::default();
        let at = Duration::from_secs;
        history.notice(at(1), &Notice::Joined(worker(1, 10)));
        history.timed(WorkerId(10), StepTimings { data: 0.5, ..StepTimings::default() });
        history.holds(WorkerId(10), Memory { resident_bytes: Some(1 << 30), gpu: None });
        history.notice(at(2), &Notice::Lost { worker: worker(1, 10), cause: "killed".into() });
        let seen = &history.workers[&Rank(1)];
        assert_eq!((seen.gone.clone(), seen.starts), (Some((at(2), Departure::Lost("killed".into()))), 1));
        history.notice(at(3), &Notice::Joined(worker(1, 11)));
        // A late word about the one before does not make the new one dead.
        history.notice(at(4), &Notice::Lost { worker: worker(1, 10), cause: "late".into() });
        let seen = &history.workers[&Rank(1)];
        assert_eq!((seen.gone.clone(), seen.starts, seen.timings, seen.memory), (None, 2, None, Memory::default()));
        history.holds(WorkerId(10), Memory { resident_bytes: Some(1), gpu: None });
        assert_eq!(history.workers[&Rank(1)].memory, Memory::default(), "a late word");
        assert_eq!((history.counts.joined, history.counts.lost), (2, 2));
        let last = history.events.back().unwrap();
        assert_eq!((last.level, last.text.as_str()), (Level::Error, "rank 1 (pid 7 on host) lost at step 3 in phase compute: late"));
    }

    #[test]
    fn events_are_few_and_a_long_wait_is_one() {
        let mut history = History::default();
        for second in 0..1000 {
            let left = Duration::from_secs(1000 - second);
            history.notice(
                Duration::from_secs(second),
                &Notice::Waiting { text: "waiting for rank 1".into(), left, is_usual: false, starts_in: None },
            );
        }
        assert_eq!(history.events.len(), 1);
        history.notice(Duration::from_secs(1000), &Notice::Lost { worker: worker(1, 10), cause: "killed".into() });
        for step in 0..1000 {
            history.notice(Duration::from_secs(1000 + step), &Notice::Checkpoint { step: Step(step) });
        }
        assert_eq!((history.events.len(), history.checkpoints.len()), (2 + MAX_CHECKPOINT_EVENTS, MAX_CHECKPOINTS));
        let levels: Vec<Level> = history.events.iter().map(|event| event.level).take(3).collect();
        assert_eq!(levels, [Level::Warning, Level::Error, Level::Info], "the loss is still there, and in its place");
        for number in 0..1000 {
            let skipped = Notice::StepSkipped { step: Step(number), in_a_row: 1 };
            history.notice(Duration::from_secs(2000 + number), &skipped);
            history.notice(Duration::from_secs(2000 + number), &Notice::Ready(worker(1, 10)));
        }
        assert_eq!(history.events.len(), 1 + 2 * MAX_EVENTS + MAX_CHECKPOINT_EVENTS);
        assert_eq!(history.events.front().map(|event| event.level), Some(Level::Error), "the loss, after a thousand warnings");
    }

    #[test]
    fn curves_go_back_with_the_job() {
        let mut history = History::default();
        for step in 1..=8 {
            history.restore(&Point { step, ..Point::default() });
            let losses = ValidationLosses { step: Step(step), samples: 1, task: 0.0, logit: 0.0, feature: 0.0 };
            history.validated(losses, 0.0);
        }
        history.notice(Duration::ZERO, &Notice::RolledBack { from: Step(8), to: Step(5) });
        assert_eq!((history.series.last_step(), history.validations.len()), (Some(5), 5));
    }
}
