//! What people see of a job: log lines, a progress bar on a terminal, and the summary at the end.

use std::io::{self, IsTerminal, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use indicatif::{HumanDuration, ProgressBar, ProgressStyle};
use peapod_proto::ids::{Step, WorkerId};
use peapod_proto::job::Job;
use peapod_proto::message::{Memory, StepLosses, StepRecord, StepTimings, ValidationLosses};
use peapod_proto::program::{LogFormat, counted, log_format, rate};

use crate::core::{Activity, Notice};
use crate::history::{History, Level, restore, told};
use crate::logs::{Logs, unix_now};
use crate::losses::Losses;
use crate::tensorboard::EventFile;

/// Between two progress lines where there is no terminal.
const LINE_EVERY: Duration = Duration::from_secs(10);

/// The bar, if the job has one: shared with the log writer, so that lines and bar do not mix.
#[derive(Debug, Clone)]
pub struct Bar(ProgressBar);

impl Bar {
    /// A bar on a terminal; hidden elsewhere.
    #[must_use]
    pub fn new() -> Self {
        let bar = if io::stderr().is_terminal() { ProgressBar::no_length() } else { ProgressBar::hidden() };
        // Until it is known how long the job is.
        let style = ProgressStyle::with_template("{msg}").unwrap_or_else(|_| ProgressStyle::default_bar());
        Self(bar.with_style(style).with_message("starting"))
    }

    /// Takes the bar off the terminal while something else is printed there.
    pub fn aside(&self, print: impl FnOnce()) {
        self.0.suspend(print);
    }
}

impl Default for Bar {
    fn default() -> Self {
        Self::new()
    }
}

impl Write for &Bar {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.suspend(|| io::stderr().write(bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}

impl<'a> tracing_subscriber::fmt::MakeWriter<'a> for Bar {
    type Writer = &'a Bar;

    fn make_writer(&'a self) -> Self::Writer {
        self
    }
}

/// What of a job is needed to show its validation.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Validation {
    /// Weight of the feature loss.
    pub feature_weight: f64,
    /// Whether the moving average is validated, which is so where the job keeps one, or the trained weights themselves.
    pub of_average: bool,
}

impl From<&Job> for Validation {
    fn from(job: &Job) -> Self {
        Self { feature_weight: job.loss.feature_weight, of_average: job.train.ema_decay > 0.0 }
    }
}

/// What a job came to.
#[derive(Debug, Clone, PartialEq)]
pub struct Summary {
    /// Final steps of this run.
    pub steps: u64,
    /// The last of them.
    pub last_step: Step,
    /// Losses of the first one.
    pub first: StepLosses,
    /// Mean losses of the last tenth.
    pub last: StepLosses,
    /// Samples trained.
    pub samples: u64,
    /// Share of samples with a native caption, of those in the weights.
    pub native_share: f64,
    /// Samples a second, from the first final step to the last.
    pub samples_per_second: f64,
}

/// Watches a job.
pub struct Observer {
    bar: Bar,
    logs: Logs,
    validation: Validation,
    last_step: Option<u64>,
    losses: Losses,
    samples: u64,
    samples_after_first: u64,
    /// Samples of steps that were not skipped, and those among them with a native caption.
    applied: u64,
    native: u64,
    first_at: Option<Instant>,
    last_at: Option<Instant>,
    last_line: Instant,
    last_final: Step,
    shown: StepLosses,
    started: Instant,
    history: History,
    tensorboard: Option<EventFile>,
}

impl Observer {
    /// An observer of a job that ends with `last_step`, if it is given in steps, and stands at `step`.
    #[must_use]
    pub fn new(bar: Bar, logs: Logs, validation: Validation, step: Step, last_step: Option<u64>) -> Self {
        let template = match last_step {
            Some(_) => "{bar:30} step {pos}/{len}  {msg}",
            None => "{spinner} step {pos}  {msg}",
        };
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.0.set_style(style.progress_chars("━━╌"));
        }
        if let Some(last) = last_step {
            bar.0.set_length(last);
        }
        bar.0.set_position(step.0);
        bar.0.set_message("waiting for workers");
        Self {
            bar,
            logs,
            validation,
            last_step,
            losses: Losses::default(),
            samples: 0,
            samples_after_first: 0,
            applied: 0,
            native: 0,
            first_at: None,
            last_at: None,
            last_line: Instant::now(),
            last_final: step,
            shown: StepLosses::default(),
            started: Instant::now(),
            history: History::starting(unix_now()),
            tensorboard: None,
        }
    }

    /// With the curves of earlier runs, and event files for TensorBoard in this folder, for a job that goes on from `step`.
    ///
    /// # Errors
    /// Names the folder or the log.
    pub fn with_curves(mut self, state_dir: &Path, step: Step) -> anyhow::Result<Self> {
        let folder = state_dir.join("tensorboard");
        let events = EventFile::create(&folder, step).map_err(|error| anyhow::anyhow!("cannot write {}: {error}", folder.display()))?;
        self.tensorboard = Some(events);
        restore::from_logs(&mut self.history, state_dir, step)?;
        Ok(self)
    }

    /// A step is final.
    pub fn committed(&mut self, record: &StepRecord, timings: StepTimings) {
        let now = Instant::now();
        if self.first_at.is_some() {
            self.samples_after_first += record.names.len() as u64;
        }
        self.first_at.get_or_insert(now);
        self.last_at = Some(now);
        self.samples += record.names.len() as u64;
        self.last_final = record.step;
        if !record.skipped {
            self.applied += record.names.len() as u64;
            self.native += u64::from(record.native);
            self.losses.push(record.step, record.losses);
            self.shown = smooth(self.shown, record.losses, self.losses.num_steps());
        }
        self.logs.committed(record, timings);
        self.history.committed(self.started.elapsed(), record, timings);
        self.step_to_tensorboard(record);
        let line = self.line(record.step);
        self.bar.0.set_position(record.step.0);
        self.bar.0.set_message(line.clone());
        if self.bar.0.is_hidden() && (self.last_line.elapsed() >= LINE_EVERY || self.losses.num_steps() == 1) {
            self.last_line = now;
            let of = self.last_step.map_or_else(String::new, |last| format!("/{last}"));
            self.say_step(record.step, &format!("step {}{of}  {line}", record.step));
        }
    }

    /// Logs where the job stands: to machines with its numbers, which people read in the words.
    fn say_step(&self, step: Step, words: &str) {
        if log_format() == LogFormat::Pretty {
            return tracing::info!("{words}");
        }
        let StepLosses { task, logit, feature, learning_rate, .. } = self.shown;
        let pace = self.pace();
        tracing::info!(
            step = step.0,
            last_step = self.last_step,
            total = self.shown.total(self.validation.feature_weight),
            task = shortest(task),
            logit = shortest(logit),
            feature = shortest(feature),
            learning_rate = shortest(learning_rate),
            samples_per_s = pace.map(|(samples, _)| samples),
            left_s = pace.and(self.history.left(step, self.last_step)),
            "{words}"
        );
    }

    /// Samples a second and seconds a step; not of the first step, nor of those of an earlier run.
    fn pace(&self) -> Option<(f64, f64)> {
        self.history.series.pace().filter(|_| self.samples_after_first > 0)
    }

    /// Where the job stands, how fast it is, and how long it takes at that pace.
    fn line(&self, step: Step) -> String {
        let StepLosses { task, logit, feature, learning_rate, .. } = self.shown;
        let losses = format!("task {task:.4}  logit {logit:.4}  feature {feature:.3}  lr {learning_rate:.2e}");
        let Some((samples, _)) = self.pace() else { return losses };
        let left =
            self.history.left(step, self.last_step).and_then(|left| Duration::try_from_secs_f64(left).ok()).filter(|left| !left.is_zero());
        let left = left.map_or_else(String::new, |left| format!("  {} left", HumanDuration(left)));
        format!("{losses}  {} samples/s{left}", rate(samples))
    }

    fn step_to_tensorboard(&mut self, record: &StepRecord) {
        let StepLosses { task, logit, feature, grad_norm, learning_rate } = record.losses;
        let total = record.losses.total(self.validation.feature_weight);
        let mut scalars = vec![
            ("train/task", task.into()),
            ("train/logit", logit.into()),
            ("train/feature", feature.into()),
            ("train/total", total),
            ("train/grad_norm", grad_norm.into()),
            ("train/learning_rate", learning_rate.into()),
            ("generation", record.generation.0 as f64),
        ];
        if let Some((samples, seconds)) = self.history.series.pace() {
            scalars.extend([("speed/samples_per_second", samples), ("speed/step_seconds", seconds)]);
        }
        if record.skipped {
            scalars.retain(|(_, value)| value.is_finite());
        }
        self.tell_tensorboard(|events| events.scalars(record.step, &scalars));
    }

    /// The weights of a final step were validated.
    pub fn validated(&mut self, losses: &ValidationLosses) {
        let ValidationLosses { step, samples, task, logit, feature } = *losses;
        let total = losses.total(self.validation.feature_weight);
        let weights = if self.validation.of_average { "average" } else { "trained" };
        self.history.validated(*losses, total);
        let named = [("task", task.into()), ("logit", logit.into()), ("feature", feature.into()), ("total", total)];
        let scalars = named.map(|(name, value): (&str, f64)| (format!("validation/{name}"), value));
        self.tell_tensorboard(|events| events.scalars(step, &scalars.each_ref().map(|(name, value)| (name.as_str(), *value))));
        let words = format!(
            "validation at step {step}: total {total:.4}  task {task:.4}  logit {logit:.4}  feature {feature:.3}  ({}, {weights} weights)",
            counted(samples, "sample")
        );
        match log_format() {
            LogFormat::Pretty => tracing::info!("{words}"),
            LogFormat::Json => tracing::info!(
                step = step.0,
                samples,
                validation_total = total,
                validation_task = shortest(task),
                validation_logit = shortest(logit),
                validation_feature = shortest(feature),
                "{words}"
            ),
        }
        self.logs.validated(losses, total, weights);
    }

    fn samples_per_second(&self) -> f64 {
        match (self.first_at, self.last_at) {
            (Some(first), Some(last)) if last > first => self.samples_after_first as f64 / (last - first).as_secs_f64(),
            _ => 0.0,
        }
    }

    /// Something people want to read.
    pub fn notice(&mut self, notice: &Notice) {
        self.history.notice(self.started.elapsed(), notice);
        let (level, text) = told(notice);
        match level {
            Level::Info => tracing::info!("{text}"),
            Level::Warning => tracing::warn!("{text}"),
            Level::Error => tracing::error!("{text}"),
        }
        if let Notice::RolledBack { to, .. } = notice {
            self.losses.go_back_to(*to);
            if let Err(error) = self.logs.go_back_to(*to) {
                self.logs.stop(&error);
            }
            self.tell_tensorboard(|events| events.go_back_to(*to));
        }
    }

    /// The job does this, perhaps as before.
    pub fn activity(&mut self, activity: Activity) {
        self.history.turn_to(self.started.elapsed(), activity);
    }

    /// A worker said where the time of its step went.
    pub fn timed(&mut self, worker: WorkerId, timings: StepTimings) {
        self.history.timed(worker, timings);
    }

    /// A worker said what it holds in memory.
    pub fn holds(&mut self, worker: WorkerId, memory: Memory) {
        self.history.holds(worker, memory);
    }

    /// The job has ended.
    pub fn ended(&mut self) {
        self.history.ended(self.started.elapsed());
    }

    /// A picture was drawn for a prompt.
    pub fn drawn(&mut self, step: Step, index: u32, png: &[u8]) {
        self.tell_tensorboard(|events| events.picture(step, &format!("pictures/{index:02}"), png));
    }

    /// What happened so far.
    #[must_use]
    pub fn history(&self) -> History {
        self.history.at(self.started.elapsed())
    }

    fn tell_tensorboard(&mut self, write: impl FnOnce(&mut EventFile) -> io::Result<()>) {
        let Some(events) = &mut self.tensorboard else { return };
        if let Err(error) = write(events) {
            tracing::error!("the files for TensorBoard stop here: {error}");
            self.tensorboard = None;
        }
    }

    /// Ends the display; nothing if no step became final.
    #[must_use]
    pub fn finish(&self) -> Option<Summary> {
        self.bar.0.finish_and_clear();
        let (first, last) = self.losses.first_and_last()?;
        Some(Summary {
            steps: self.losses.num_steps(),
            last_step: self.last_final,
            first,
            last,
            samples: self.samples,
            native_share: self.native as f64 / self.applied.max(1) as f64,
            samples_per_second: self.samples_per_second(),
        })
    }
}

impl std::fmt::Display for Summary {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { steps, last_step, first, last, samples, native_share, samples_per_second } = self;
        write!(f, "steps       {steps}, up to step {last_step}, {}", counted(*samples, "sample"))?;
        // Not known of a single step.
        if *samples_per_second > 0.0 {
            write!(f, " at {} samples/s", rate(*samples_per_second))?;
        }
        writeln!(f)?;
        writeln!(f, "native      {:.1} % of the samples; the others are parallel", 100.0 * native_share)?;
        writeln!(f, "losses      first step -> mean of the last tenth")?;
        writeln!(f, "  task      {:.4} -> {:.4}", first.task, last.task)?;
        writeln!(f, "  logit     {:.4} -> {:.4}", first.logit, last.logit)?;
        write!(f, "  feature   {:.3} -> {:.3}", first.feature, last.feature)
    }
}

/// The number that a loss looks like: with the digits of its own kind, and no more.
fn shortest(value: f32) -> f64 {
    value.to_string().parse().unwrap_or(f64::NAN)
}

/// An average that follows the last twenty steps or so.
fn smooth(shown: StepLosses, new: StepLosses, count: u64) -> StepLosses {
    let share = (1.0 / count as f32).max(0.05);
    let mix = |old: f32, new: f32| old + share * (new - old);
    StepLosses {
        task: mix(shown.task, new.task),
        logit: mix(shown.logit, new.logit),
        feature: mix(shown.feature, new.feature),
        grad_norm: new.grad_norm,
        learning_rate: new.learning_rate,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::logs;
    use peapod_proto::ids::{Epoch, Generation, SampleName, ShardId};

    const PLAIN: Validation = Validation { feature_weight: 0.1, of_average: false };

    #[test]
    fn rates_have_two_digits_at_least() {
        assert_eq!([201.4, 10.0, 9.96, 1.0, 0.0318, 0.0].map(rate), ["201", "10", "10.0", "1.0", "0.032", "0"]);
    }

    #[test]
    fn summary_compares_the_first_step_with_the_last_tenth() {
        let folder = tempfile::tempdir().unwrap();
        let (steps, samples) = (folder.path().join(logs::STEPS), folder.path().join("samples.tsv"));
        let logs = Logs::open(folder.path(), Some(&samples), false).unwrap();
        let mut observer = Observer::new(Bar(ProgressBar::hidden()), logs, PLAIN, Step(0), Some(20));
        for step in 1..=20u32 {
            let record = StepRecord {
                step: Step(step.into()),
                generation: Generation(1),
                names: vec![SampleName { epoch: Epoch(0), shard: ShardId(1), index: step }],
                native: u32::from(step <= 5),
                skipped: step == 5,
                losses: StepLosses { feature: (21 - step) as f32, learning_rate: 1e-4, ..StepLosses::default() },
                validation: None,
            };
            observer.committed(&record, StepTimings::default());
        }
        let line = observer.line(Step(20));
        assert!(line.starts_with("task 0.0000  logit 0.0000  feature ") && line.contains("  lr 1.00e-4"), "{line}");
        let summary = observer.finish().unwrap();
        assert_eq!((summary.steps, summary.samples, summary.first.feature, summary.last.feature), (19, 20, 20.0, 1.5));
        assert!((summary.native_share - 4.0 / 19.0).abs() < 1e-12, "the native sample of the skipped step is in no weights");
        assert_eq!(std::fs::read_to_string(steps).unwrap().lines().count(), 20);
        let samples = std::fs::read_to_string(samples).unwrap();
        assert_eq!(samples.lines().next(), Some("1\t0\t1\t1"));
        assert_eq!(samples.lines().count(), 19, "samples of a skipped step were not trained");
    }
}
