//! A job's curves over all its time, in bounded memory.

use peapod_proto::ids::Step;
use serde::Serialize;

/// Points of a curve: more than a screen has pixels across.
const MAX_POINTS: usize = 2048;

/// What is known of a final step.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Point {
    /// The step.
    pub step: u64,
    /// Mean diffusion loss.
    pub task: f64,
    /// Mean distance of the predictions.
    pub logit: f64,
    /// Mean distance of the features.
    pub feature: f64,
    /// Norm of the gradient.
    pub grad_norm: f64,
    /// Learning rate.
    pub learning_rate: f64,
    /// Number of its samples.
    pub samples: f64,
    /// Seconds since the step before, within a generation: none for a generation's first.
    pub seconds: Option<f64>,
    /// Seconds in which its slowest member waited for data.
    pub data: f64,
}

/// Steps that follow each other, as sums.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
struct Bucket {
    first: u64,
    last: u64,
    count: f64,
    sums: [f64; 6],
    /// Samples and seconds of the steps whose time is known.
    timed_samples: f64,
    timed: f64,
    timed_count: f64,
}

impl Bucket {
    fn of(point: &Point) -> Self {
        let seconds = point.seconds.unwrap_or_default();
        let is_timed = point.seconds.is_some();
        Self {
            first: point.step,
            last: point.step,
            count: 1.0,
            sums: [point.task, point.logit, point.feature, point.grad_norm, point.learning_rate, point.data],
            timed_samples: if is_timed { point.samples } else { 0.0 },
            timed: seconds,
            timed_count: f64::from(u8::from(is_timed)),
        }
    }

    fn add(&mut self, other: &Self) {
        self.last = other.last;
        self.count += other.count;
        self.sums.iter_mut().zip(other.sums).for_each(|(sum, other)| *sum += other);
        self.timed_samples += other.timed_samples;
        self.timed += other.timed;
        self.timed_count += other.timed_count;
    }
}

/// Curves of which each point stands for `stride` steps; the stride doubles when there are too many points.
#[derive(Debug, Clone, PartialEq)]
pub struct Series {
    stride: u64,
    buckets: Vec<Bucket>,
    /// Changes when points that were shown have changed, other than the last.
    edition: u32,
}

impl Default for Series {
    fn default() -> Self {
        Self { stride: 1, buckets: Vec::new(), edition: 0 }
    }
}

/// Curves by columns, as the page wants them. What is not finite is null.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Columns {
    /// To be sent back for what is new.
    pub edition: u32,
    /// Steps a point stands for.
    pub stride: u64,
    /// Whether these points replace all that the page has, rather than its last and those behind it.
    pub all: bool,
    /// Last step of each point.
    pub step: Vec<u64>,
    /// Mean diffusion loss.
    pub task: Vec<f64>,
    /// Mean distance of the predictions.
    pub logit: Vec<f64>,
    /// Mean distance of the features.
    pub feature: Vec<f64>,
    /// Norm of the gradient.
    pub grad_norm: Vec<f64>,
    /// Learning rate.
    pub learning_rate: Vec<f64>,
    /// Seconds a step in which the slowest member waited for data.
    pub data_s: Vec<f64>,
    /// Seconds a step; null where no time is known.
    pub step_s: Vec<f64>,
    /// Samples a second; null where no time is known.
    pub samples_per_s: Vec<f64>,
}

impl Series {
    /// Adds a step. One that is there already, or older, is passed over.
    pub fn push(&mut self, point: &Point) {
        let new = Bucket::of(point);
        match self.buckets.last_mut() {
            Some(last) if point.step <= last.last => {}
            Some(last) if point.step / self.stride == last.first / self.stride => last.add(&new),
            _ => self.buckets.push(new),
        }
        if self.buckets.len() > MAX_POINTS {
            self.stride *= 2;
            self.edition += 1;
            let stride = self.stride;
            let mut merged: Vec<Bucket> = Vec::with_capacity(MAX_POINTS);
            for bucket in self.buckets.drain(..) {
                match merged.last_mut() {
                    Some(last) if last.first / stride == bucket.first / stride => last.add(&bucket),
                    _ => merged.push(bucket),
                }
            }
            self.buckets = merged;
        }
    }

    /// Forgets the steps behind `last`; of a point that stands for both sides of it too.
    pub fn go_back_to(&mut self, last: Step) {
        self.buckets.retain(|bucket| bucket.last <= last.0);
        self.edition += 1;
    }

    /// The newest step, if there is any.
    #[must_use]
    pub fn last_step(&self) -> Option<u64> {
        self.buckets.last().map(|bucket| bucket.last)
    }

    /// The newest point's samples a second and seconds a step, where they are known.
    #[must_use]
    pub fn pace(&self) -> Option<(f64, f64)> {
        // Of several: a single step jumps about.
        let newest = self.buckets.iter().rev().take(10);
        let (samples, seconds, count) = newest.fold((0.0, 0.0, 0.0), |(samples, seconds, count), bucket| {
            (samples + bucket.timed_samples, seconds + bucket.timed, count + bucket.timed_count)
        });
        (seconds > 0.0).then(|| (samples / seconds, seconds / count))
    }

    /// All points, or those from the step of the caller's last one on, if what it has of `edition` is still true.
    #[must_use]
    pub fn columns(&self, edition: u32, from: u64) -> Columns {
        let all = edition != self.edition || from == 0;
        let skip = if all {
            0
        } else {
            self.buckets.partition_point(|bucket| bucket.last < from && bucket.first / self.stride != from / self.stride)
        };
        let buckets = &self.buckets[skip..];
        let mean = |at: usize| buckets.iter().map(|bucket| bucket.sums[at] / bucket.count).collect();
        let ratio = |over: fn(&Bucket) -> f64, under: fn(&Bucket) -> f64| {
            buckets.iter().map(|bucket| if under(bucket) > 0.0 { over(bucket) / under(bucket) } else { f64::NAN }).collect()
        };
        Columns {
            edition: self.edition,
            stride: self.stride,
            all,
            step: buckets.iter().map(|bucket| bucket.last).collect(),
            task: mean(0),
            logit: mean(1),
            feature: mean(2),
            grad_norm: mean(3),
            learning_rate: mean(4),
            data_s: mean(5),
            step_s: ratio(|bucket| bucket.timed, |bucket| bucket.timed_count),
            samples_per_s: ratio(|bucket| bucket.timed_samples, |bucket| bucket.timed),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn point(step: u64) -> Point {
        Point { step, task: step as f64, samples: 8.0, seconds: step.is_multiple_of(2).then_some(0.5), ..Point::default() }
    }

    #[test]
    fn a_million_steps_fit_and_their_means_are_right() {
        let mut series = Series::default();
        (1..=1_000_000).for_each(|step| series.push(&point(step)));
        let columns = series.columns(0, 0);
        assert!(columns.step.len() <= MAX_POINTS && columns.step.len() > MAX_POINTS / 2, "{}", columns.step.len());
        assert_eq!((columns.stride, columns.step.last()), (512, Some(&1_000_000)));
        // The second point stands for steps 512 to 1023.
        assert_eq!((columns.step[1], columns.task[1]), (1023, 767.5));
        assert_eq!((columns.samples_per_s[1], columns.step_s[1]), (16.0, 0.5));
    }

    #[test]
    fn page_gets_only_what_is_new_until_the_points_change() {
        let mut series = Series::default();
        (1..=10).for_each(|step| series.push(&point(step)));
        let first = series.columns(0, 0);
        series.push(&point(11));
        let more = series.columns(first.edition, 10);
        assert_eq!((more.all, more.step), (false, vec![10, 11]));
        series.go_back_to(Step(6));
        let after = series.columns(first.edition, 11);
        assert_eq!((after.all, after.step.last()), (true, Some(&6)));
        series.push(&point(7));
        series.push(&point(7));
        assert_eq!(series.last_step(), Some(7), "a step counts once");
    }
}
