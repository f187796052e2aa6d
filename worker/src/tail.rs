//! The end of the flat gradient: what all ranks learn in the same all-reduce.
//!
//! ```text
//! [ samples, task, logit, feature, change, not finite, step, native | validation | slot of member 0 | slot of member 1 | ... ]
//! ```
//!
//! `validation` is `[samples, task, logit, feature, not finite]` of the weights before this step, all zero where none was due.
//!
//! A slot is `[n, epoch, shard, index, ...]`, written by its own member and zero elsewhere, so the sum keeps its integers
//! exactly (all are below 2^24). Whoever holds the sum of a step therefore knows every sample in it. Each member adds the
//! step's number, so that one who skipped an all-reduce is found out: a collective cannot tell a sum of one step from another.

use peapod_proto::ids::{Epoch, MemberIndex, SampleName, ShardId, Step};

const HEADER: usize = 8 + VALIDATION;
const VALIDATION: usize = 5;
/// Places in the header.
const STEP: usize = 6;
const NATIVE: usize = 7;
/// Step numbers are added modulo this: their sum stays exact for any world that fits an `f32`.
const STEP_MODULUS: u64 = 256;
const NUMBERS_A_NAME: usize = 3;

/// Where everything lies in the tail of one generation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TailLayout {
    num_members: usize,
    names_a_slot: usize,
}

/// What one member adds.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Contribution {
    /// Samples of its share.
    pub names: Vec<SampleName>,
    /// Those among them with a native caption.
    pub native: u32,
    /// Loss sums over them.
    pub losses: LossTotals,
    /// It was asked for a meeting after this step.
    pub change: bool,
    /// A loss or gradient of its own is not finite.
    pub not_finite: bool,
    /// Its part of the validation of the weights before this step.
    pub validation: ValidationTotals,
}

/// Sums over samples.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct LossTotals {
    /// Diffusion loss.
    pub task: f32,
    /// Distance of the predictions.
    pub logit: f32,
    /// Distance of the features, unweighted.
    pub feature: f32,
}

/// Sums over validation samples; none of them where no validation was due.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct ValidationTotals {
    /// Number of samples.
    pub samples: u32,
    /// Loss sums over them.
    pub losses: LossTotals,
}

impl LossTotals {
    fn is_finite(&self) -> bool {
        [self.task, self.logit, self.feature].iter().all(|sum| sum.is_finite())
    }

    /// What is not finite is said by its flag: an infinity here would spoil the sums that carry the names of the step.
    fn to_wire(self) -> [f32; 3] {
        [self.task, self.logit, self.feature].map(|sum| if sum.is_finite() { sum } else { 0.0 })
    }

    fn from_wire(sums: &[f32]) -> Self {
        let at = |at: usize| sums.get(at).copied().unwrap_or_default();
        Self { task: at(0), logit: at(1), feature: at(2) }
    }
}

/// What the sum over all members says.
#[derive(Debug, Clone, PartialEq)]
pub struct Outcome {
    /// Every sample of the step, by member.
    pub names: Vec<SampleName>,
    /// Those among them with a native caption.
    pub native: u32,
    /// Loss sums over them.
    pub losses: LossTotals,
    /// Somebody asks for a meeting.
    pub change: bool,
    /// Somebody's loss or gradient is not finite.
    pub not_finite: bool,
    /// The whole validation of the weights before this step. Its losses are no numbers if anybody's part was not finite.
    pub validation: ValidationTotals,
}

/// The sum is not one of well-formed tails.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("the summed tail is damaged: {0}")]
pub struct DamagedTail(String);

impl TailLayout {
    /// The layout for a world in which `global_batch` samples are shared out among `num_members`.
    #[must_use]
    pub fn new(num_members: u32, global_batch: u32) -> Self {
        Self { num_members: num_members as usize, names_a_slot: global_batch.div_ceil(num_members) as usize }
    }

    /// Number of values.
    #[must_use]
    pub fn len(&self) -> usize {
        HEADER + self.num_members * self.slot()
    }

    /// A tail is never empty.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        false
    }

    fn slot(&self) -> usize {
        1 + NUMBERS_A_NAME * self.names_a_slot
    }

    /// Writes one member's contribution; `tail` has [`Self::len`] values.
    ///
    /// # Panics
    /// If the share is larger than a slot, or `tail` is of another length: both are set by the same layout.
    pub fn write(&self, tail: &mut [f32], step: Step, member: MemberIndex, contribution: &Contribution) {
        assert_eq!(tail.len(), self.len());
        assert!(
            contribution.names.len() <= self.names_a_slot,
            "a share of {} in a slot for {}",
            contribution.names.len(),
            self.names_a_slot
        );
        tail.fill(0.0);
        let flag = |set: bool| if set { 1.0 } else { 0.0 };
        let [task, logit, feature] = contribution.losses.to_wire();
        let validation = &contribution.validation;
        let [validation_task, validation_logit, validation_feature] = validation.losses.to_wire();
        tail[..HEADER].copy_from_slice(&[
            contribution.names.len() as f32,
            task,
            logit,
            feature,
            flag(contribution.change),
            flag(contribution.not_finite),
            (step.0 % STEP_MODULUS) as f32,
            contribution.native as f32,
            validation.samples as f32,
            validation_task,
            validation_logit,
            validation_feature,
            flag(!validation.losses.is_finite()),
        ]);
        let start = HEADER + member.0 as usize * self.slot();
        tail[start] = contribution.names.len() as f32;
        for (at, name) in contribution.names.iter().enumerate() {
            let place = start + 1 + at * NUMBERS_A_NAME;
            tail[place..place + NUMBERS_A_NAME].copy_from_slice(&[name.epoch.0 as f32, name.shard.0 as f32, name.index as f32]);
        }
    }

    /// Reads the sum over all members.
    ///
    /// # Errors
    /// [`DamagedTail`] if a count or a name is no integer in its range, or the counts disagree: the members were not in step.
    pub fn read(&self, tail: &[f32], step: Step) -> Result<Outcome, DamagedTail> {
        if tail.len() != self.len() {
            return Err(DamagedTail(format!("{} values instead of {}", tail.len(), self.len())));
        }
        let expected = (step.0 % STEP_MODULUS) as usize * self.num_members;
        if tail.get(STEP).is_none_or(|&sum| sum != expected as f32) {
            return Err(DamagedTail(format!("not all members are in step {step}")));
        }
        let integer = |value: f32, limit: u32| {
            if value.fract() == 0.0 && (0.0..limit as f32).contains(&value) {
                Ok(value as u32)
            } else {
                Err(DamagedTail(format!("{value} is no integer below {limit}")))
            }
        };
        let count = integer(tail[0], SampleName::LIMIT)? as usize;
        let mut names = Vec::with_capacity(count.min(self.num_members * self.names_a_slot));
        for slot in tail[HEADER..].chunks_exact(self.slot()) {
            let n = integer(slot[0], self.names_a_slot as u32 + 1)? as usize;
            for name in slot[1..=NUMBERS_A_NAME * n].chunks_exact(NUMBERS_A_NAME) {
                let [epoch, shard, index] = [name[0], name[1], name[2]].map(|value| integer(value, SampleName::LIMIT));
                names.push(SampleName { epoch: Epoch(epoch?), shard: ShardId(shard?), index: index? });
            }
        }
        if names.len() != count {
            return Err(DamagedTail(format!("{} names for {count} samples", names.len())));
        }
        let native = integer(tail[NATIVE], SampleName::LIMIT)?;
        if native as usize > names.len() {
            return Err(DamagedTail(format!("{native} native samples of {}", names.len())));
        }
        Ok(Outcome {
            names,
            native,
            losses: LossTotals::from_wire(&tail[1..4]),
            change: tail[4] > 0.0,
            not_finite: tail[5] > 0.0,
            validation: ValidationTotals {
                samples: integer(tail[NATIVE + 1], SampleName::LIMIT)?,
                losses: match tail[NATIVE + VALIDATION] > 0.0 {
                    false => LossTotals::from_wire(&tail[NATIVE + 2..NATIVE + VALIDATION]),
                    true => LossTotals { task: f32::NAN, logit: f32::NAN, feature: f32::NAN },
                },
            },
        })
    }
}

/// Samples that a member owes of each global batch.
#[must_use]
pub fn share_of(global_batch: u32, member: MemberIndex, num_members: u32) -> u32 {
    global_batch / num_members + u32::from(member.0 < global_batch % num_members)
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Step = Step(1000);

    fn name(epoch: u32, shard: u32, index: u32) -> SampleName {
        SampleName { epoch: Epoch(epoch), shard: ShardId(shard), index }
    }

    fn sum(layout: TailLayout, contributions: &[Contribution]) -> Vec<f32> {
        let mut total = vec![0.0; layout.len()];
        for (member, contribution) in contributions.iter().enumerate() {
            let mut tail = vec![f32::NAN; layout.len()];
            layout.write(&mut tail, NOW, MemberIndex(member as u32), contribution);
            for (total, value) in total.iter_mut().zip(&tail) {
                *total += value;
            }
        }
        total
    }

    #[test]
    fn sum_tells_every_sample_exactly() {
        let layout = TailLayout::new(3, 5);
        let last = SampleName::LIMIT - 1;
        let contributions = [
            Contribution { names: vec![name(0, 1, 2), name(last, last, last)], native: 2, change: true, ..Contribution::default() },
            Contribution::default(),
            Contribution {
                names: vec![name(0, 1, 3)],
                native: 1,
                losses: LossTotals { task: 1.5, ..LossTotals::default() },
                ..Contribution::default()
            },
        ];
        let outcome = layout.read(&sum(layout, &contributions), NOW).unwrap();
        assert_eq!(outcome.names, [name(0, 1, 2), name(last, last, last), name(0, 1, 3)]);
        assert_eq!(outcome.native, 3);
        assert!(outcome.change && !outcome.not_finite && outcome.losses.task == 1.5);
    }

    #[test]
    fn infinite_loss_is_a_flag_and_leaves_the_names_whole() {
        let layout = TailLayout::new(2, 2);
        let bad = Contribution {
            names: vec![name(0, 0, 1)],
            losses: LossTotals { task: f32::INFINITY, logit: f32::NAN, feature: 1.0 },
            not_finite: true,
            ..Contribution::default()
        };
        let outcome = layout.read(&sum(layout, &[bad, Contribution::default()]), NOW).unwrap();
        assert!(outcome.not_finite && outcome.names == [name(0, 0, 1)]);
        assert_eq!(outcome.validation, ValidationTotals::default(), "the step's losses are not those of the validation");
    }

    #[test]
    fn validation_of_the_weights_before_comes_with_the_step() {
        let layout = TailLayout::new(2, 2);
        let part = |samples, task| Contribution {
            names: vec![name(0, 0, samples)],
            losses: LossTotals { task: 100.0, ..LossTotals::default() },
            validation: ValidationTotals { samples, losses: LossTotals { task, logit: 0.5, feature: 2.0 } },
            ..Contribution::default()
        };
        let read = |tail: &[f32]| layout.read(tail, NOW);
        let outcome = read(&sum(layout, &[part(3, 1.0), part(2, 0.25)])).unwrap();
        assert_eq!(outcome.validation, ValidationTotals { samples: 5, losses: LossTotals { task: 1.25, logit: 1.0, feature: 4.0 } });
        assert_eq!((outcome.names.len(), outcome.losses.task), (2, 200.0));
        // A part that is not finite makes the whole no number, and neither the step nor its names suffer.
        let outcome = read(&sum(layout, &[part(3, f32::NAN), part(2, 0.25)])).unwrap();
        assert!(outcome.validation.samples == 5 && outcome.validation.losses.task.is_nan() && !outcome.not_finite);
        assert_eq!((outcome.names.len(), outcome.losses.task), (2, 200.0));
    }

    #[test]
    fn damage_is_an_error() {
        let layout = TailLayout::new(1, 2);
        let good = sum(layout, &[Contribution { names: vec![name(0, 0, 1)], ..Contribution::default() }]);
        for (at, value) in
            [(0, 2.0), (0, 0.5), (NATIVE, 0.5), (NATIVE, 2.0), (NATIVE + 1, 0.5), (HEADER, f32::NAN), (HEADER + 1, 1.5), (HEADER + 1, -1.0)]
        {
            let mut tail = good.clone();
            tail[at] = value;
            assert!(layout.read(&tail, NOW).is_err(), "{at}: {value}");
        }
        assert!(layout.read(&good[1..], NOW).is_err());
        assert!(layout.read(&good, NOW.next()).is_err(), "a member that is a step behind");
    }

    #[test]
    fn shares_add_up_to_the_batch() {
        for (batch, members) in [(32, 2), (33, 2), (7, 4), (3, 3)] {
            let shares: Vec<u32> = (0..members).map(|member| share_of(batch, MemberIndex(member), members)).collect();
            assert_eq!(shares.iter().sum::<u32>(), batch);
            assert!(shares.iter().all(|&share| share as usize <= TailLayout::new(members, batch).names_a_slot));
        }
    }
}
