//! The losses of a run in memory that does not grow with it.

use peapod_proto::ids::Step;
use peapod_proto::message::StepLosses;

/// Stretches that are kept; more become half as many, twice as long.
const MAX_STRETCHES: usize = 2000;

/// Steps in a row.
#[derive(Debug, Clone, Copy)]
struct Stretch {
    first: Step,
    num: u64,
    /// In the order of the losses' fields.
    sums: [f64; 5],
}

/// Losses of the steps that stand: the first one's, and the means of stretches, of a step each until there are many.
#[derive(Debug, Clone)]
pub struct Losses {
    first: Option<StepLosses>,
    stretches: Vec<Stretch>,
    num_in_stretch: u64,
    num_steps: u64,
}

impl Default for Losses {
    fn default() -> Self {
        Self { first: None, stretches: Vec::new(), num_in_stretch: 1, num_steps: 0 }
    }
}

impl Losses {
    /// Adds a step, which comes after all others.
    pub fn push(&mut self, step: Step, losses: StepLosses) {
        let StepLosses { task, logit, feature, grad_norm, learning_rate } = losses;
        let added = [task, logit, feature, grad_norm, learning_rate].map(f64::from);
        self.first.get_or_insert(losses);
        self.num_steps += 1;
        match self.stretches.last_mut().filter(|last| last.num < self.num_in_stretch) {
            Some(last) => {
                last.num += 1;
                last.sums.iter_mut().zip(added).for_each(|(sum, loss)| *sum += loss);
            }
            None => self.stretches.push(Stretch { first: step, num: 1, sums: added }),
        }
        if self.stretches.len() > MAX_STRETCHES {
            self.halve();
        }
    }

    fn halve(&mut self) {
        let join = |pair: &[Stretch]| {
            let mut joined = pair[0];
            for other in &pair[1..] {
                joined.num += other.num;
                joined.sums.iter_mut().zip(other.sums).for_each(|(sum, more)| *sum += more);
            }
            joined
        };
        self.stretches = self.stretches.chunks(2).map(join).collect();
        self.num_in_stretch *= 2;
    }

    /// Forgets the steps after `last`: they are trained again. Of a stretch that it lies in, the mean stays.
    pub fn go_back_to(&mut self, last: Step) {
        self.stretches.retain(|stretch| stretch.first <= last);
        if let Some(stretch) = self.stretches.last_mut() {
            let num = stretch.num.min(last.0 - stretch.first.0 + 1);
            stretch.sums.iter_mut().for_each(|sum| *sum *= num as f64 / stretch.num as f64);
            stretch.num = num;
        } else {
            self.first = None;
        }
        self.num_steps = self.stretches.iter().map(|stretch| stretch.num).sum();
    }

    /// How many steps they are of.
    #[must_use]
    pub fn num_steps(&self) -> u64 {
        self.num_steps
    }

    /// Of the first step, and the means over the last tenth; of more steps than there are stretches, over some more.
    #[must_use]
    pub fn first_and_last(&self) -> Option<(StepLosses, StepLosses)> {
        let first = self.first?;
        let (mut num, mut sums) = (0, [0.0; 5]);
        for stretch in self.stretches.iter().rev() {
            if num >= self.num_steps.div_ceil(10) {
                break;
            }
            num += stretch.num;
            sums.iter_mut().zip(stretch.sums).for_each(|(sum, more)| *sum += more);
        }
        let [task, logit, feature, grad_norm, learning_rate] = sums.map(|sum| (sum / num.max(1) as f64) as f32);
        Some((first, StepLosses { task, logit, feature, grad_norm, learning_rate }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(task: f32) -> StepLosses {
        StepLosses { task, ..StepLosses::default() }
    }

    #[test]
    fn many_steps_take_no_more_memory_and_tell_the_same() {
        let mut losses = Losses::default();
        (1..=100_000).for_each(|step| losses.push(Step(step), of(step as f32)));
        assert!(losses.stretches.len() <= MAX_STRETCHES);
        let (first, last) = losses.first_and_last().unwrap();
        assert_eq!((losses.num_steps(), first.task), (100_000, 1.0));
        assert!((last.task - 95_000.0).abs() < 100.0, "{last:?}");
    }

    #[test]
    fn steps_that_are_trained_again_count_once() {
        let mut losses = Losses::default();
        (1..=10).for_each(|step| losses.push(Step(step), of(1.0)));
        losses.go_back_to(Step(4));
        assert_eq!(losses.num_steps(), 4);
        (5..=10).for_each(|step| losses.push(Step(step), of(3.0)));
        let (first, last) = losses.first_and_last().unwrap();
        assert_eq!((losses.num_steps(), first.task, last.task), (10, 1.0, 3.0));
        losses.go_back_to(Step(0));
        assert!(losses.first_and_last().is_none() && losses.num_steps() == 0);
    }
}
