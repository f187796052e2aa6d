//! What has been trained on: for each epoch, which samples of which shard are in the weights.
//!
//! The ledger follows the weights: it is changed only by steps that are final, or that the source of a new generation
//! holds. What is skipped is a property of the data (or of a step all ranks agreed to skip) and never trained again.

use std::collections::BTreeMap;

use peapod_proto::ids::{Bitmap, Epoch, SampleName, ShardId, Step};
use peapod_proto::message::{SkipReason, SkippedSample};
use serde::{Deserialize, Serialize};

/// Why the ledger refuses an entry. Each of them means that a worker broke the protocol or that the data changed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LedgerError {
    /// A sample would be counted twice.
    #[error("sample {name} was trained twice (the second time in step {step}); the run is no longer exact")]
    TrainedTwice {
        /// The sample.
        name: SampleName,
        /// The step of the second time.
        step: Step,
    },
    /// A sample was trained although it had been skipped.
    #[error("sample {0} was trained after it had been skipped")]
    TrainedSkipped(SampleName),
    /// A shard does not exist.
    #[error("sample {name} is of a shard that the job does not have (it has {num_shards})")]
    NoSuchShard {
        /// The sample.
        name: SampleName,
        /// Number of shards.
        num_shards: u32,
    },
    /// A shard's size differs from an earlier reading.
    #[error("shard {shard} now holds {now} samples and held {before} when it was read before: the data changed under the job")]
    SizeChanged {
        /// The shard.
        shard: ShardId,
        /// Earlier size.
        before: u32,
        /// Present size.
        now: u32,
    },
}

/// Number of samples by what became of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Totals {
    /// Trained.
    pub committed: u64,
    /// Kept out by the job's rules.
    pub filtered: u64,
    /// Broken.
    pub bad: u64,
    /// In a step that was skipped because it was not finite.
    pub not_finite: u64,
}

/// Number of samples passed over, by the name of the rule.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Rules {
    /// Kept out by the job's rules.
    pub filtered: BTreeMap<String, u64>,
    /// Broken.
    pub bad: BTreeMap<String, u64>,
}

impl Rules {
    /// More names than there are rules: a worker of another release may have some of its own, but not any number of them.
    const MAX_NAMES: usize = 64;

    fn count(&mut self, reason: SkipReason, rule: &str) {
        let counts = match reason {
            SkipReason::Filtered => &mut self.filtered,
            SkipReason::Bad => &mut self.bad,
        };
        let is_name = (1..=32).contains(&rule.len()) && rule.bytes().all(|byte| byte == b'_' || byte.is_ascii_lowercase());
        let rule = if is_name && (counts.len() < Self::MAX_NAMES || counts.contains_key(rule)) { rule } else { "other" };
        *counts.entry(rule.to_owned()).or_default() += 1;
    }

    /// What most of the broken samples have, and how many that are.
    #[must_use]
    pub fn most_often_bad(&self) -> Option<(&str, u64)> {
        // The first by name of equally frequent ones.
        self.bad.iter().rev().max_by_key(|(_, count)| **count).map(|(rule, count)| (rule.as_str(), *count))
    }
}

/// One shard in one epoch, until it is done.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
struct OpenShard {
    committed: Bitmap,
    skipped: Bitmap,
    /// Known once a reader has reached the end of the tar.
    num_samples: Option<u32>,
}

impl OpenShard {
    fn is_done(&self) -> bool {
        self.num_samples.is_some_and(|num| self.committed.count() + self.skipped.count() >= num)
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
struct EpochLedger {
    /// A bit a shard.
    done: Bitmap,
    open: BTreeMap<ShardId, OpenShard>,
}

/// The ledger of a job at one step. Serialised into each checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ledger {
    num_shards: u32,
    /// Epochs before this one are complete.
    first_open: Epoch,
    epochs: BTreeMap<Epoch, EpochLedger>,
    /// Sizes learnt so far.
    sizes: BTreeMap<ShardId, u32>,
    totals: Totals,
    #[serde(default)]
    rules: Rules,
}

impl Ledger {
    /// An empty ledger for `num_shards` shards.
    #[must_use]
    pub fn new(num_shards: u32) -> Self {
        Self {
            num_shards,
            first_open: Epoch(0),
            epochs: BTreeMap::new(),
            sizes: BTreeMap::new(),
            totals: Totals::default(),
            rules: Rules::default(),
        }
    }

    /// Counts a sample as trained in `step`; says whether its shard is now done.
    pub fn commit(&mut self, name: SampleName, step: Step) -> Result<bool, LedgerError> {
        self.check(name)?;
        let Some(shard) = self.open_shard(name.epoch, name.shard) else { return Err(LedgerError::TrainedTwice { name, step }) };
        if shard.skipped.contains(name.index) {
            return Err(LedgerError::TrainedSkipped(name));
        }
        if !shard.committed.insert(name.index) {
            return Err(LedgerError::TrainedTwice { name, step });
        }
        let done = shard.is_done();
        self.totals.committed += 1;
        self.close_if(done, name);
        Ok(done)
    }

    /// Counts a sample as skipped; says whether it was new. A sample that is skipped again stays as it is.
    pub fn skip(&mut self, name: SampleName, reason: Skip) -> Result<bool, LedgerError> {
        self.check(name)?;
        let Some(shard) = self.open_shard(name.epoch, name.shard) else { return Ok(false) };
        if shard.committed.contains(name.index) || !shard.skipped.insert(name.index) {
            return Ok(false);
        }
        let done = shard.is_done();
        match reason {
            Skip::Data(SkipReason::Filtered) => self.totals.filtered += 1,
            Skip::Data(SkipReason::Bad) => self.totals.bad += 1,
            Skip::NotFinite => self.totals.not_finite += 1,
        }
        self.close_if(done, name);
        Ok(true)
    }

    /// As [`skip`](Self::skip), of a sample of a shard's data, whose rule is counted too.
    ///
    /// # Errors
    /// As [`skip`](Self::skip).
    pub fn skip_data(&mut self, name: SampleName, sample: &SkippedSample) -> Result<bool, LedgerError> {
        let is_new = self.skip(name, Skip::Data(sample.reason))?;
        if is_new {
            self.rules.count(sample.reason, sample.rule());
        }
        Ok(is_new)
    }

    /// Counts of skipped samples over all epochs, by rule.
    #[must_use]
    pub fn rules(&self) -> &Rules {
        &self.rules
    }

    /// Learns a shard's size from a reader that reached its end; says whether the shard is now done.
    pub fn set_size(&mut self, epoch: Epoch, shard: ShardId, num_samples: u32) -> Result<bool, LedgerError> {
        let name = SampleName { epoch, shard, index: 0 };
        self.check(name)?;
        let before = *self.sizes.entry(shard).or_insert(num_samples);
        if before != num_samples {
            return Err(LedgerError::SizeChanged { shard, before, now: num_samples });
        }
        let Some(open) = self.open_shard(epoch, shard) else { return Ok(true) };
        open.num_samples = Some(num_samples);
        let done = open.is_done();
        self.close_if(done, name);
        Ok(done)
    }

    /// Whether every sample of a shard is trained or skipped in `epoch`.
    #[must_use]
    pub fn is_done(&self, epoch: Epoch, shard: ShardId) -> bool {
        epoch < self.first_open || self.epochs.get(&epoch).is_some_and(|ledger| ledger.done.contains(shard.0))
    }

    /// Samples of a shard that the next reader passes over.
    #[must_use]
    pub fn done_samples(&self, epoch: Epoch, shard: ShardId) -> Bitmap {
        let open = self.epochs.get(&epoch).and_then(|ledger| ledger.open.get(&shard));
        open.map(|open| open.committed.union(&open.skipped)).unwrap_or_default()
    }

    /// First epoch in which a shard is not done.
    #[must_use]
    pub fn first_open_epoch(&self) -> Epoch {
        self.first_open
    }

    /// Number of shards done in `epoch`.
    #[must_use]
    pub fn num_done(&self, epoch: Epoch) -> u32 {
        if epoch < self.first_open { self.num_shards } else { self.epochs.get(&epoch).map_or(0, |ledger| ledger.done.count()) }
    }

    /// Number of shards the ledger was made for.
    #[must_use]
    pub fn num_shards(&self) -> u32 {
        self.num_shards
    }

    /// Counts over all epochs.
    #[must_use]
    pub fn totals(&self) -> Totals {
        self.totals
    }

    fn check(&self, name: SampleName) -> Result<(), LedgerError> {
        if name.shard.0 < self.num_shards { Ok(()) } else { Err(LedgerError::NoSuchShard { name, num_shards: self.num_shards }) }
    }

    /// The shard's entry, or nothing if it is done.
    fn open_shard(&mut self, epoch: Epoch, shard: ShardId) -> Option<&mut OpenShard> {
        if self.is_done(epoch, shard) {
            return None;
        }
        Some(self.epochs.entry(epoch).or_default().open.entry(shard).or_default())
    }

    fn close_if(&mut self, done: bool, name: SampleName) {
        if !done {
            return;
        }
        if let Some(epoch) = self.epochs.get_mut(&name.epoch) {
            epoch.open.remove(&name.shard);
            epoch.done.insert(name.shard.0);
        }
        while self.epochs.get(&self.first_open).is_some_and(|epoch| epoch.done.count() == self.num_shards) {
            self.epochs.remove(&self.first_open);
            self.first_open = Epoch(self.first_open.0 + 1);
        }
    }
}

/// Why a sample is not trained in an epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Skip {
    /// The data.
    Data(SkipReason),
    /// The step it was in was not finite.
    NotFinite,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(epoch: u32, shard: u32, index: u32) -> SampleName {
        SampleName { epoch: Epoch(epoch), shard: ShardId(shard), index }
    }

    #[test]
    fn rules_are_counted_by_name_and_odd_names_together() {
        let mut next = 0..;
        let mut skip = |reason, rule: &str, ledger: &mut Ledger| {
            let index = next.next().unwrap();
            let name = SampleName { epoch: Epoch(0), shard: ShardId(0), index };
            let sample = SkippedSample { index, reason, key: String::new(), detail: format!("{rule}: words") };
            assert!(ledger.skip_data(name, &sample).unwrap());
            assert!(!ledger.skip_data(name, &sample).unwrap(), "a second reader's word is no news");
        };
        let mut ledger = Ledger::new(1);
        for rule in ["no_jpg", "bad_json", "bad_json", "Bad JSON", "", &"x".repeat(33)] {
            skip(SkipReason::Bad, rule, &mut ledger);
        }
        skip(SkipReason::Filtered, "too_small", &mut ledger);
        assert_eq!(ledger.rules().filtered, BTreeMap::from([("too_small".into(), 1)]));
        assert_eq!(ledger.rules().most_often_bad(), Some(("other", 3)));
        assert_eq!(ledger.rules().bad["bad_json"], 2);
        for number in 0..200_u8 {
            let name: String = [number / 26, number % 26].map(|digit| char::from(b'a' + digit)).iter().collect();
            skip(SkipReason::Bad, &name, &mut ledger);
        }
        assert!(ledger.rules().bad.len() <= Rules::MAX_NAMES + 1);
        assert_eq!(ledger.rules().bad.values().sum::<u64>(), 206);
    }

    #[test]
    fn shard_is_done_when_every_sample_is_trained_or_skipped() {
        let mut ledger = Ledger::new(2);
        assert_eq!(ledger.commit(name(0, 0, 0), Step(1)), Ok(false));
        assert_eq!(ledger.skip(name(0, 0, 2), Skip::Data(SkipReason::Bad)), Ok(true));
        assert_eq!(ledger.set_size(Epoch(0), ShardId(0), 3), Ok(false));
        assert!(!ledger.is_done(Epoch(0), ShardId(0)));
        assert_eq!(ledger.commit(name(0, 0, 1), Step(2)), Ok(true));
        assert!(ledger.is_done(Epoch(0), ShardId(0)) && !ledger.is_done(Epoch(1), ShardId(0)));
        assert_eq!(ledger.totals(), Totals { committed: 2, bad: 1, ..Totals::default() });
    }

    #[test]
    fn epoch_closes_with_its_last_shard_and_an_empty_shard_counts() {
        let mut ledger = Ledger::new(2);
        assert_eq!(ledger.set_size(Epoch(0), ShardId(1), 0), Ok(true));
        ledger.set_size(Epoch(0), ShardId(0), 1).unwrap();
        assert_eq!(ledger.first_open_epoch(), Epoch(0));
        ledger.commit(name(0, 0, 0), Step(1)).unwrap();
        assert_eq!((ledger.first_open_epoch(), ledger.num_done(Epoch(0))), (Epoch(1), 2));
    }

    #[test]
    fn refusals_name_what_happened() {
        let mut ledger = Ledger::new(1);
        ledger.commit(name(0, 0, 0), Step(1)).unwrap();
        assert!(matches!(ledger.commit(name(0, 0, 0), Step(2)), Err(LedgerError::TrainedTwice { .. })));
        ledger.skip(name(0, 0, 1), Skip::NotFinite).unwrap();
        assert!(matches!(ledger.commit(name(0, 0, 1), Step(2)), Err(LedgerError::TrainedSkipped(_))));
        assert!(matches!(ledger.commit(name(0, 7, 1), Step(2)), Err(LedgerError::NoSuchShard { .. })));
        ledger.set_size(Epoch(0), ShardId(0), 5).unwrap();
        assert!(matches!(ledger.set_size(Epoch(1), ShardId(0), 6), Err(LedgerError::SizeChanged { .. })));
        // A sample of a shard that is done was trained before.
        let mut done = Ledger::new(1);
        done.set_size(Epoch(0), ShardId(0), 1).unwrap();
        done.commit(name(0, 0, 0), Step(1)).unwrap();
        assert!(matches!(done.commit(name(0, 0, 0), Step(2)), Err(LedgerError::TrainedTwice { .. })));
    }

    #[test]
    fn next_reader_passes_over_what_is_done() {
        let mut ledger = Ledger::new(1);
        ledger.commit(name(3, 0, 4), Step(1)).unwrap();
        ledger.skip(name(3, 0, 1), Skip::Data(SkipReason::Filtered)).unwrap();
        assert_eq!(ledger.done_samples(Epoch(3), ShardId(0)).iter().collect::<Vec<_>>(), [1, 4]);
    }

    #[test]
    fn ledger_survives_its_checkpoint() {
        let mut ledger = Ledger::new(3);
        ledger.commit(name(0, 2, 9), Step(1)).unwrap();
        ledger.set_size(Epoch(0), ShardId(1), 0).unwrap();
        let text = serde_json::to_string(&ledger).unwrap();
        assert_eq!(serde_json::from_str::<Ledger>(&text).unwrap(), ledger);
    }
}
