//! What has been trained on: for each epoch, which samples of which shard are in the weights.
//!
//! The ledger follows the weights: it is changed only by steps that are final, or that the source of a new generation
//! holds. What is skipped is a property of the data (or of a step all ranks agreed to skip) and never trained again.

use std::collections::BTreeMap;

use peapod_proto::ids::{Bitmap, Epoch, SampleName, ShardId, Step};
use peapod_proto::message::{ShardReport, SkipReason, SkippedSample};
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

impl LedgerError {
    /// The shard that it is about.
    #[must_use]
    pub fn shard(&self) -> ShardId {
        match self {
            Self::TrainedTwice { name, .. } | Self::TrainedSkipped(name) | Self::NoSuchShard { name, .. } => name.shard,
            Self::SizeChanged { shard, .. } => *shard,
        }
    }
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

    fn add(&mut self, other: &Self) {
        for (mine, theirs) in [(&mut self.filtered, &other.filtered), (&mut self.bad, &other.bad)] {
            for (rule, count) in theirs {
                *mine.entry(rule.clone()).or_default() += count;
            }
        }
    }

    /// The rules by which most samples were passed over, filtered or broken, and how many each.
    #[must_use]
    pub fn most_often(&self, num: usize) -> Vec<(&str, u64)> {
        let mut rules: Vec<(&str, u64)> = self.filtered.iter().chain(&self.bad).map(|(rule, count)| (rule.as_str(), *count)).collect();
        rules.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
        rules.truncate(num);
        rules
    }

    /// What most of the broken samples have, and how many that are.
    #[must_use]
    pub fn most_often_bad(&self) -> Option<(&str, u64)> {
        // The first by name of equally frequent ones.
        self.bad.iter().rev().max_by_key(|(_, count)| **count).map(|(rule, count)| (rule.as_str(), *count))
    }
}

impl Totals {
    /// Trained or not, whatever became of them.
    #[must_use]
    pub fn seen(&self) -> u64 {
        self.committed + self.filtered + self.bad + self.not_finite
    }
}

impl std::ops::AddAssign for Totals {
    fn add_assign(&mut self, other: Self) {
        self.committed += other.committed;
        self.filtered += other.filtered;
        self.bad += other.bad;
        self.not_finite += other.not_finite;
    }
}

/// Samples of one shard that were skipped, by reason: filtered, bad, not finite.
type Skips = [u32; 3];

/// One shard in one epoch, until it is done.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
struct OpenShard {
    committed: Bitmap,
    num_committed: u32,
    skipped: Bitmap,
    skips: Skips,
    /// Known once a reader has reached the end of the tar.
    num_samples: Option<u32>,
}

impl OpenShard {
    /// Samples that are trained or skipped.
    fn num_seen(&self) -> u32 {
        self.num_committed + self.skips.iter().sum::<u32>()
    }

    fn is_done(&self) -> bool {
        self.num_samples.is_some_and(|num| self.num_seen() >= num)
    }
}

/// One epoch of a source. A shard that is done is a bit, and what of it was skipped.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
struct EpochLedger {
    /// A bit a shard, counted from the source's first.
    done: Bitmap,
    num_done: u32,
    /// Of those that are done, where anything was.
    #[serde(with = "pairs")]
    skips: BTreeMap<ShardId, Skips>,
    #[serde(with = "pairs")]
    open: BTreeMap<ShardId, OpenShard>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct SourceLedger {
    first_shard: u32,
    num_shards: u32,
    /// Epochs before this one are complete.
    first_open: Epoch,
    epochs: BTreeMap<Epoch, EpochLedger>,
    totals: Totals,
    rules: Rules,
}

/// What is known of one shard in one epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ShardCounts {
    /// Whether every sample of it is accounted for.
    pub done: bool,
    /// Samples in it, once it has been read to its end in any epoch.
    pub num_samples: Option<u32>,
    /// What became of them. Of an epoch that is complete, only the trained are still known apart, as all that were not skipped.
    pub counts: Totals,
}

/// The ledger of a job at one step. Serialised into each checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ledger {
    num_shards: u32,
    sources: Vec<SourceLedger>,
    sizes: Sizes,
}

impl Ledger {
    /// An empty ledger for one source of `num_shards` shards.
    #[must_use]
    pub fn new(num_shards: u32) -> Self {
        Self::of_sources([num_shards])
    }

    /// An empty ledger for sources of so many shards, whose shards follow each other.
    #[must_use]
    pub fn of_sources(sources: impl IntoIterator<Item = u32>) -> Self {
        let mut num_all = 0;
        let source = |num_shards| {
            let first_shard = num_all;
            num_all += num_shards;
            SourceLedger {
                first_shard,
                num_shards,
                first_open: Epoch(0),
                epochs: BTreeMap::new(),
                totals: Totals::default(),
                rules: Rules::default(),
            }
        };
        let sources = sources.into_iter().map(source).collect();
        Self { num_shards: num_all, sources, sizes: Sizes::default() }
    }

    /// Counts a sample as trained in `step`; says whether its shard is now done.
    pub fn commit(&mut self, name: SampleName, step: Step) -> Result<bool, LedgerError> {
        let Some((source, shard)) = self.open_shard(name)? else { return Err(LedgerError::TrainedTwice { name, step }) };
        if shard.skipped.contains(name.index) {
            return Err(LedgerError::TrainedSkipped(name));
        }
        if !shard.committed.insert(name.index) {
            return Err(LedgerError::TrainedTwice { name, step });
        }
        shard.num_committed += 1;
        let done = shard.is_done();
        self.sources[source].totals.committed += 1;
        self.sources[source].close_if(done, name);
        Ok(done)
    }

    /// Counts a sample as skipped; says whether it was new. A sample that is skipped again stays as it is.
    pub fn skip(&mut self, name: SampleName, reason: Skip) -> Result<bool, LedgerError> {
        let Some((source, shard)) = self.open_shard(name)? else { return Ok(false) };
        if shard.committed.contains(name.index) || !shard.skipped.insert(name.index) {
            return Ok(false);
        }
        let totals = &mut self.sources[source].totals;
        let (at, total) = match reason {
            Skip::Data(SkipReason::Filtered) => (0, &mut totals.filtered),
            Skip::Data(SkipReason::Bad) => (1, &mut totals.bad),
            Skip::NotFinite => (2, &mut totals.not_finite),
        };
        *total += 1;
        let Some((_, shard)) = self.open_shard(name)? else { return Ok(true) };
        shard.skips[at] += 1;
        let done = shard.is_done();
        self.sources[source].close_if(done, name);
        Ok(true)
    }

    /// As [`skip`](Self::skip), of a sample of a shard's data, whose rule is counted too.
    ///
    /// # Errors
    /// As [`skip`](Self::skip).
    pub fn skip_data(&mut self, name: SampleName, sample: &SkippedSample) -> Result<bool, LedgerError> {
        let is_new = self.skip(name, Skip::Data(sample.reason))?;
        if is_new && let Some(source) = self.source_with(name.shard) {
            self.sources[source].rules.count(sample.reason, sample.rule());
        }
        Ok(is_new)
    }

    /// Counts of skipped samples over all sources and epochs, by rule.
    #[must_use]
    pub fn rules(&self) -> Rules {
        let mut rules = Rules::default();
        self.sources.iter().for_each(|source| rules.add(&source.rules));
        rules
    }

    /// Counts of a source's skipped samples over all its epochs, by rule.
    #[must_use]
    pub fn rules_of(&self, source: usize) -> Rules {
        self.sources.get(source).map_or_else(Rules::default, |source| source.rules.clone())
    }

    /// What a reader found in a shard, a call of `on_bad` for each broken sample that is new.
    ///
    /// # Errors
    /// [`LedgerError::SizeChanged`]; [`LedgerError::NoSuchShard`].
    pub fn take_report(
        &mut self,
        epoch: Epoch,
        shard: ShardId,
        report: &ShardReport,
        mut on_bad: impl FnMut(&SkippedSample),
    ) -> Result<(), LedgerError> {
        for sample in &report.skipped {
            let name = SampleName { epoch, shard, index: sample.index };
            if self.skip_data(name, sample)? && sample.reason == SkipReason::Bad {
                on_bad(sample);
            }
        }
        match report.num_samples {
            Some(_) if report.is_unreadable() => self.pass_over(epoch, shard)?,
            Some(num_samples) => drop(self.set_size(epoch, shard, num_samples)?),
            None => {}
        }
        Ok(())
    }

    /// Ends a shard for this epoch of which nothing could be read. In the next one it may be there again: its size stays unknown.
    fn pass_over(&mut self, epoch: Epoch, shard: ShardId) -> Result<(), LedgerError> {
        let name = SampleName { epoch, shard, index: 0 };
        let known = self.sizes.get(shard).unwrap_or_default();
        let Some((source, open)) = self.open_shard(name)? else { return Ok(()) };
        // Samples of it were there before: passed over, the others would be lost.
        let before = known.max(open.num_seen());
        if before > 0 {
            return Err(LedgerError::SizeChanged { shard, before, now: 0 });
        }
        open.num_samples = Some(0);
        self.sources[source].close_if(true, name);
        Ok(())
    }

    /// Learns a shard's size from a reader that reached its end; says whether the shard is now done.
    pub fn set_size(&mut self, epoch: Epoch, shard: ShardId, num_samples: u32) -> Result<bool, LedgerError> {
        let name = SampleName { epoch, shard, index: 0 };
        self.source_of(name)?;
        let before = self.sizes.learn(shard, num_samples);
        if before != num_samples {
            return Err(LedgerError::SizeChanged { shard, before, now: num_samples });
        }
        let Some((source, open)) = self.open_shard(name)? else { return Ok(true) };
        if open.num_seen() > num_samples {
            return Err(LedgerError::SizeChanged { shard, before: open.num_seen(), now: num_samples });
        }
        open.num_samples = Some(num_samples);
        let done = open.is_done();
        self.sources[source].close_if(done, name);
        Ok(done)
    }

    /// Whether every sample of a shard is trained or skipped in `epoch`.
    #[must_use]
    pub fn is_done(&self, epoch: Epoch, shard: ShardId) -> bool {
        self.source_with(shard).is_some_and(|source| self.sources[source].is_done(epoch, shard))
    }

    /// Samples of a shard that the next reader passes over.
    #[must_use]
    pub fn done_samples(&self, epoch: Epoch, shard: ShardId) -> Bitmap {
        self.open_part(epoch, shard).map(|open| open.committed.union(&open.skipped)).unwrap_or_default()
    }

    /// What became of a shard's samples in an epoch.
    #[must_use]
    pub fn shard_counts(&self, epoch: Epoch, shard: ShardId) -> ShardCounts {
        let num_samples = self.sizes.get(shard);
        let totals = |committed: u32, [filtered, bad, not_finite]: Skips| Totals {
            committed: committed.into(),
            filtered: filtered.into(),
            bad: bad.into(),
            not_finite: not_finite.into(),
        };
        if let Some(open) = self.open_part(epoch, shard) {
            return ShardCounts { done: false, num_samples, counts: totals(open.num_committed, open.skips) };
        }
        if !self.is_done(epoch, shard) {
            return ShardCounts { done: false, num_samples, counts: Totals::default() };
        }
        let ledger = self.source_with(shard).and_then(|source| self.sources[source].epochs.get(&epoch));
        let skips = ledger.and_then(|ledger| ledger.skips.get(&shard)).copied().unwrap_or_default();
        let committed = num_samples.unwrap_or_default().saturating_sub(skips.iter().sum());
        ShardCounts { done: true, num_samples, counts: totals(committed, skips) }
    }

    /// Number of sources.
    #[must_use]
    pub fn num_sources(&self) -> usize {
        self.sources.len()
    }

    /// The shards of a source.
    #[must_use]
    pub fn shards_of(&self, source: usize) -> std::ops::Range<u32> {
        self.sources.get(source).map_or(0..0, |source| source.first_shard..source.first_shard + source.num_shards)
    }

    /// First epoch of a source in which a shard is not done.
    #[must_use]
    pub fn open_epoch_of(&self, source: usize) -> Epoch {
        self.sources.get(source).map_or(Epoch(0), |source| source.first_open)
    }

    /// Number of a source's shards done in `epoch`.
    #[must_use]
    pub fn num_done_of(&self, source: usize, epoch: Epoch) -> u32 {
        self.sources.get(source).map_or(0, |source| source.num_done(epoch))
    }

    /// Counts of a source over all its epochs.
    #[must_use]
    pub fn totals_of(&self, source: usize) -> Totals {
        self.sources.get(source).map_or_else(Totals::default, |source| source.totals)
    }

    /// First epoch in which a shard of any source is not done.
    #[must_use]
    pub fn first_open_epoch(&self) -> Epoch {
        self.sources.iter().map(|source| source.first_open).min().unwrap_or_default()
    }

    /// Number of shards done in `epoch`.
    #[must_use]
    pub fn num_done(&self, epoch: Epoch) -> u32 {
        self.sources.iter().map(|source| source.num_done(epoch)).sum()
    }

    /// Number of shards the ledger was made for.
    #[must_use]
    pub fn num_shards(&self) -> u32 {
        self.num_shards
    }

    /// Counts over all sources and epochs.
    #[must_use]
    pub fn totals(&self) -> Totals {
        let mut totals = Totals::default();
        self.sources.iter().for_each(|source| totals += source.totals);
        totals
    }

    /// Samples that readers have come past: those that are accounted for, and those before them in the shards that are open. What is broken
    /// is told as it is read, what is whole when it is trained. Takes time in the number of open shards.
    #[must_use]
    pub fn num_read(&self) -> u64 {
        let ahead = |open: &OpenShard| {
            let end = open.num_samples.unwrap_or_else(|| open.committed.end().max(open.skipped.end()));
            u64::from(end.saturating_sub(open.num_seen()))
        };
        let open = self.sources.iter().flat_map(|source| source.epochs.values()).flat_map(|epoch| epoch.open.values());
        self.totals().seen() + open.map(ahead).sum::<u64>()
    }

    /// Whether no sample of a source has come to a step in `epoch` so far, as all that were read of it were passed over. Of an epoch that
    /// is complete nothing is known any more. Takes time in the number of its shards.
    #[must_use]
    pub fn is_barren(&self, source: usize, epoch: Epoch) -> bool {
        let Some(source) = self.sources.get(source).filter(|source| epoch >= source.first_open) else { return false };
        let Some(ledger) = source.epochs.get(&epoch) else { return true };
        let is_passed_over = |local: u32| {
            let shard = ShardId(source.first_shard + local);
            let [filtered, bad, _] = ledger.skips.get(&shard).copied().unwrap_or_default();
            // The size of one that could not be read is not known.
            self.sizes.get(shard).is_none_or(|size| size == filtered + bad)
        };
        ledger.open.values().all(|open| open.num_committed == 0 && open.skips[2] == 0)
            && (0..source.num_shards).filter(|&local| ledger.done.contains(local)).all(is_passed_over)
    }

    /// The source that a shard is of.
    #[must_use]
    pub fn source_with(&self, shard: ShardId) -> Option<usize> {
        if shard.0 >= self.num_shards {
            return None;
        }
        self.sources.partition_point(|source| source.first_shard <= shard.0).checked_sub(1)
    }

    fn source_of(&self, name: SampleName) -> Result<usize, LedgerError> {
        self.source_with(name.shard).ok_or(LedgerError::NoSuchShard { name, num_shards: self.num_shards })
    }

    fn open_part(&self, epoch: Epoch, shard: ShardId) -> Option<&OpenShard> {
        self.sources[self.source_with(shard)?].epochs.get(&epoch)?.open.get(&shard)
    }

    /// The shard's entry with its source, or nothing if it is done.
    fn open_shard(&mut self, name: SampleName) -> Result<Option<(usize, &mut OpenShard)>, LedgerError> {
        let index = self.source_of(name)?;
        let source = &mut self.sources[index];
        if source.is_done(name.epoch, name.shard) {
            return Ok(None);
        }
        Ok(Some((index, source.epochs.entry(name.epoch).or_default().open.entry(name.shard).or_default())))
    }
}

impl SourceLedger {
    fn is_done(&self, epoch: Epoch, shard: ShardId) -> bool {
        epoch < self.first_open || self.epochs.get(&epoch).is_some_and(|ledger| ledger.done.contains(shard.0 - self.first_shard))
    }

    fn num_done(&self, epoch: Epoch) -> u32 {
        if epoch < self.first_open { self.num_shards } else { self.epochs.get(&epoch).map_or(0, |ledger| ledger.num_done) }
    }

    fn close_if(&mut self, done: bool, name: SampleName) {
        if !done {
            return;
        }
        if let Some(epoch) = self.epochs.get_mut(&name.epoch) {
            let skips = epoch.open.remove(&name.shard).map(|open| open.skips).unwrap_or_default();
            if skips != Skips::default() {
                epoch.skips.insert(name.shard, skips);
            }
            epoch.num_done += u32::from(epoch.done.insert(name.shard.0 - self.first_shard));
        }
        while self.epochs.get(&self.first_open).is_some_and(|epoch| epoch.num_done == self.num_shards) {
            self.epochs.remove(&self.first_open);
            self.first_open = Epoch(self.first_open.0 + 1);
        }
    }
}

/// Sizes of shards learnt so far; 0 stands for one that is not known, as it is one more than the size.
///
/// Serialises as runs of equal entries: shards are mostly cut to one size.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
struct Sizes(Vec<u32>);

impl Sizes {
    fn get(&self, shard: ShardId) -> Option<u32> {
        self.0.get(shard.0 as usize)?.checked_sub(1)
    }

    /// Keeps a size where none is known; the one that is known from then on.
    fn learn(&mut self, shard: ShardId, size: u32) -> u32 {
        let at = shard.0 as usize;
        if at >= self.0.len() {
            self.0.resize(at + 1, 0);
        }
        if self.0[at] == 0 {
            self.0[at] = size + 1;
        }
        self.0[at] - 1
    }
}

impl Serialize for Sizes {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        // Collected first: the journal's format wants the number of runs before them.
        let runs: Vec<(u32, u32)> = self.0.chunk_by(|a, b| a == b).map(|run| (run.len() as u32, run[0])).collect();
        runs.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Sizes {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let mut sizes = Vec::new();
        for (len, entry) in Vec::<(u32, u32)>::deserialize(deserializer)? {
            if sizes.len() + len as usize > SampleName::LIMIT as usize || entry > SampleName::LIMIT + 1 {
                return Err(serde::de::Error::custom("sizes of more shards than a job can have, or of more samples than one"));
            }
            sizes.resize(sizes.len() + len as usize, entry);
        }
        Ok(Self(sizes))
    }
}

/// Maps as lists of pairs: half the text of an object with quoted keys.
mod pairs {
    use std::collections::BTreeMap;

    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub fn serialize<K: Serialize, V: Serialize, S: Serializer>(map: &BTreeMap<K, V>, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(map)
    }

    pub fn deserialize<'de, K, V, D>(deserializer: D) -> Result<BTreeMap<K, V>, D::Error>
    where
        K: Deserialize<'de> + Ord,
        V: Deserialize<'de>,
        D: Deserializer<'de>,
    {
        Ok(Vec::<(K, V)>::deserialize(deserializer)?.into_iter().collect())
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
mod tests;
