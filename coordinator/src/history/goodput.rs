//! Where the job's time went: into final steps, or into what else.

use std::time::Duration;

use peapod_proto::message::StepTimings;

use crate::core::{Activity, Timestamp};

/// What a second was spent on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cause {
    /// Computing, exchanging and applying steps that became final: the good part.
    Steps,
    /// The slowest worker had no samples.
    Data,
    /// Losses on the validation samples.
    Validation,
    /// Pictures drawn while training.
    Pictures,
    /// Between steps: copies for checkpoints, a coordinator or a machine that is busy.
    Between,
    /// A step in flight that a failure made void.
    Void,
    /// Too few workers.
    Waiting,
    /// Workers read their models.
    Loading,
    /// Opening a collective and handing state to newcomers.
    Forming,
    /// Meeting for a planned change.
    Regrouping,
    /// Leaving a broken collective.
    Recovering,
    /// Waiting for workers to come back to a coordinator that was away.
    Returning,
    /// Storing the last checkpoint.
    Finishing,
}

impl Cause {
    /// All of them, the good one first.
    pub const ALL: [Self; 13] = [
        Self::Steps,
        Self::Data,
        Self::Validation,
        Self::Pictures,
        Self::Between,
        Self::Void,
        Self::Waiting,
        Self::Loading,
        Self::Forming,
        Self::Regrouping,
        Self::Recovering,
        Self::Returning,
        Self::Finishing,
    ];

    /// Its name in metrics and on the page.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Steps => "final_steps",
            Self::Data => "data",
            Self::Validation => "validation",
            Self::Pictures => "pictures",
            Self::Between => "between_steps",
            Self::Void => "void_step",
            Self::Waiting => "waiting_for_workers",
            Self::Loading => "loading_models",
            Self::Forming => "forming",
            Self::Regrouping => "regrouping",
            Self::Recovering => "recovering",
            Self::Returning => "workers_returning",
            Self::Finishing => "last_checkpoint",
        }
    }
}

/// Books every second since the coordinator started under exactly one cause.
///
/// Within a generation the time between two final steps is split by what the slowest member said of the later one. Words come in bursts, so
/// what a step claims beyond the time since the last one is paid later, and time that nobody claims waits for such a claim until the
/// generation ends.
#[derive(Debug, Clone)]
pub struct Goodput {
    seconds: [f64; Cause::ALL.len()],
    activity: Activity,
    /// Up to here everything is booked, or lies in `slack`.
    booked: Timestamp,
    /// Seconds of this generation that no step has claimed.
    slack: f64,
    /// Claims on steps, data, validation and pictures that are not paid yet.
    owed: [f64; 4],
}

impl Default for Goodput {
    fn default() -> Self {
        let seconds = [0.0; Cause::ALL.len()];
        Self { seconds, activity: Activity::Waiting, booked: Duration::ZERO, slack: 0.0, owed: [0.0; 4] }
    }
}

impl Goodput {
    /// The job does something else from `now` on.
    pub fn turn_to(&mut self, now: Timestamp, activity: Activity) {
        if activity == self.activity {
            return;
        }
        let passed = self.pass(now);
        let cause = match self.activity {
            Activity::Training => {
                self.seconds[Cause::Between as usize] += std::mem::take(&mut self.slack);
                self.owed = [0.0; 4];
                if activity == Activity::Recovering { Cause::Void } else { Cause::Between }
            }
            other => of(other),
        };
        self.seconds[cause as usize] += passed;
        self.activity = activity;
    }

    /// A step is final, whose slowest member took so long. One that is settled after its generation was left claims nothing.
    pub fn committed(&mut self, now: Timestamp, timings: StepTimings) {
        if self.activity != Activity::Training {
            return;
        }
        self.slack += self.pass(now);
        let StepTimings { data, compute, collective, update, validation, sampling } = timings;
        let claims = [compute + collective + update, data, validation, sampling];
        for ((owed, claim), seconds) in self.owed.iter_mut().zip(claims).zip(&mut self.seconds) {
            // From another machine: not a number is no claim.
            *owed += f64::from(claim).clamp(0.0, 86_400.0);
            let paid = owed.min(self.slack);
            (*owed, self.slack, *seconds) = (*owed - paid, self.slack - paid, *seconds + paid);
        }
    }

    /// Seconds by cause, up to `now`. The time of the step in flight counts as good until it says what it was for.
    #[must_use]
    pub fn seconds(&self, now: Timestamp) -> Vec<(Cause, f64)> {
        let mut seconds = self.settled(now);
        if self.activity == Activity::Training {
            seconds[Cause::Steps as usize].1 += now.saturating_sub(self.booked).as_secs_f64();
            seconds[Cause::Between as usize].1 += self.slack;
        }
        seconds
    }

    /// The same without what may yet turn out to have another cause: none of it ever falls.
    #[must_use]
    pub fn settled(&self, now: Timestamp) -> Vec<(Cause, f64)> {
        let mut seconds = self.seconds;
        if !matches!(self.activity, Activity::Training | Activity::Over) {
            seconds[of(self.activity) as usize] += now.saturating_sub(self.booked).as_secs_f64();
        }
        Cause::ALL.into_iter().zip(seconds).collect()
    }

    fn pass(&mut self, now: Timestamp) -> f64 {
        let passed = now.saturating_sub(self.booked);
        self.booked = self.booked.max(now);
        if self.activity == Activity::Over { 0.0 } else { passed.as_secs_f64() }
    }
}

fn of(activity: Activity) -> Cause {
    match activity {
        Activity::Waiting => Cause::Waiting,
        Activity::Loading => Cause::Loading,
        Activity::Returning => Cause::Returning,
        Activity::Forming => Cause::Forming,
        Activity::Training => Cause::Between,
        Activity::Regrouping => Cause::Regrouping,
        Activity::Recovering => Cause::Recovering,
        Activity::Finishing | Activity::Over => Cause::Finishing,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: f64) -> Timestamp {
        Duration::from_secs_f64(seconds)
    }

    fn of_cause(goodput: &Goodput, now: f64, cause: Cause) -> f64 {
        goodput.seconds(at(now)).into_iter().find(|(found, _)| *found == cause).unwrap().1
    }

    #[test]
    fn every_second_has_one_cause_and_a_void_step_is_not_good() {
        let mut goodput = Goodput::default();
        goodput.turn_to(at(4.0), Activity::Loading);
        goodput.turn_to(at(10.0), Activity::Forming);
        goodput.turn_to(at(11.0), Activity::Training);
        let timings = StepTimings { data: 0.25, compute: 0.5, collective: 0.125, update: 0.125, ..StepTimings::default() };
        goodput.committed(at(12.5), timings);
        goodput.turn_to(at(13.0), Activity::Recovering);
        goodput.turn_to(at(15.0), Activity::Waiting);
        let is = |cause, seconds: f64| assert!((of_cause(&goodput, 20.0, cause) - seconds).abs() < 1e-6, "{cause:?} {goodput:?}");
        is(Cause::Waiting, 4.0 + 5.0);
        is(Cause::Loading, 6.0);
        is(Cause::Forming, 1.0);
        is(Cause::Steps, 0.75);
        is(Cause::Data, 0.25);
        is(Cause::Between, 0.5);
        is(Cause::Void, 0.5);
        is(Cause::Recovering, 2.0);
        let all: f64 = goodput.seconds(at(20.0)).iter().map(|(_, seconds)| seconds).sum();
        assert!((all - 20.0).abs() < 1e-6, "nothing is lost or counted twice: {all}");
    }

    #[test]
    fn words_that_come_late_and_together_lose_no_good_second() {
        let mut goodput = Goodput::default();
        goodput.turn_to(at(0.0), Activity::Training);
        let step = StepTimings { compute: 1.0, ..StepTimings::default() };
        goodput.committed(at(2.0), step);
        goodput.committed(at(2.0), step);
        goodput.committed(at(2.5), step);
        goodput.committed(at(4.0), step);
        assert!((of_cause(&goodput, 4.0, Cause::Steps) - 4.0).abs() < 1e-6, "{goodput:?}");
        assert!(of_cause(&goodput, 4.0, Cause::Between).abs() < 1e-6);
        goodput.committed(at(5.0), StepTimings { compute: f32::NAN, ..StepTimings::default() });
        assert!(goodput.seconds(at(5.0)).iter().all(|(_, seconds)| seconds.is_finite()));
    }

    #[test]
    fn what_a_counter_has_shown_never_falls() {
        let mut goodput = Goodput::default();
        let timings = StepTimings { data: 0.3, compute: 0.5, ..StepTimings::default() };
        let mut shown = vec![0.0; Cause::ALL.len()];
        let mut look = |goodput: &Goodput, now: f64| {
            for ((cause, seconds), shown) in goodput.settled(at(now)).into_iter().zip(&mut shown) {
                assert!(seconds >= *shown, "{cause:?} at {now}");
                *shown = seconds;
            }
        };
        look(&goodput, 1.0);
        goodput.turn_to(at(2.0), Activity::Training);
        for step in 1..5 {
            look(&goodput, 1.9 + f64::from(step));
            goodput.committed(at(2.0 + f64::from(step)), timings);
        }
        look(&goodput, 6.9);
        goodput.turn_to(at(7.0), Activity::Recovering);
        look(&goodput, 7.5);
        goodput.turn_to(at(8.0), Activity::Over);
        look(&goodput, 9.0);
    }

    #[test]
    fn a_job_that_is_over_loses_no_time() {
        let mut goodput = Goodput::default();
        goodput.turn_to(at(1.0), Activity::Finishing);
        goodput.turn_to(at(2.0), Activity::Over);
        let all: f64 = goodput.seconds(at(50.0)).iter().map(|(_, seconds)| seconds).sum();
        assert!((all - 2.0).abs() < 1e-6);
    }
}
