//! In which order the shards of a job's sources are drawn.
//!
//! Each source is passed over in the order of a permutation of (seed, epoch), drawn anew for each of its epochs. Between sources the next
//! shard comes from the one with the smallest `(drawn + 1) / weight`, the first listed among equals: a source of weight 3 gives three
//! shards while one of weight 1 gives one, evenly spread. Weights count shards, not samples: how many samples a shard holds is learnt only
//! by reading it, and an order that followed what is learnt would depend on who reads fast. A source that has made all its epochs is left
//! out; the others go on.
//!
//! Every draw has a [`Position`], and both directions between positions and shards are computed, not stored: whoever knows which shards are
//! done can go on at any place, at any world size.

use std::collections::BTreeMap;

use peapod_proto::ids::{Epoch, SampleName, ShardId};

/// Place of a draw in the order of all draws of a job.
pub type Position = u64;

/// A set of shards that are passed over together. A job's shard list is its sources' lists, one after the other.
#[derive(Debug, Clone, PartialEq)]
pub struct Source {
    /// What people call it; empty for the only one of a job that names none.
    pub name: String,
    /// Number of its shards.
    pub num_shards: u32,
    /// How many shards are drawn from it for one of a source of weight 1.
    pub weight: f64,
}

impl Source {
    /// The only source of a job that names none.
    #[must_use]
    pub fn unnamed(num_shards: u32) -> Self {
        Self { name: String::new(), num_shards, weight: 1.0 }
    }
}

/// Weights are kept as integers, the largest as this one: sums of them are exact on every machine.
const MAX_WEIGHT: u64 = 1 << 20;
/// Orders of epochs kept at once, for each source: one epoch that ends, one that runs, one that is read ahead.
const ORDERS_KEPT: usize = 3;

#[derive(Debug, Clone)]
struct Drawn {
    first_shard: u32,
    num_shards: u32,
    weight: u64,
    /// Draws that are made of it at all.
    end: u64,
}

impl Drawn {
    /// When its draw `count` is due, in units of a draw of the heaviest source.
    fn time_of(&self, count: u64) -> u128 {
        (u128::from(count) + 1) * u128::from(MAX_WEIGHT) / u128::from(self.weight)
    }

    /// How many of its draws are due by `time`.
    fn count_by(&self, time: u128) -> u64 {
        let due = ((time + 1) * u128::from(self.weight)).div_ceil(u128::from(MAX_WEIGHT)) - 1;
        u64::try_from(due).unwrap_or(u64::MAX).min(self.end)
    }
}

/// The order of all draws.
#[derive(Debug, Clone)]
pub struct Order {
    seed: u64,
    sources: Vec<Drawn>,
    orders: BTreeMap<(usize, Epoch), Vec<u32>>,
}

impl Order {
    /// The order over `sources` for `epochs` passes over each; without end if none.
    #[must_use]
    pub fn new(seed: u64, sources: &[Source], epochs: Option<u32>) -> Self {
        let heaviest = sources.iter().map(|source| source.weight).fold(f64::MIN_POSITIVE, f64::max);
        let epochs = u64::from(epochs.unwrap_or(SampleName::LIMIT).min(SampleName::LIMIT));
        let mut first_shard = 0;
        let drawn = sources.iter().map(|source| {
            let first = first_shard;
            first_shard += source.num_shards;
            let weight = ((source.weight / heaviest * MAX_WEIGHT as f64).round() as u64).clamp(1, MAX_WEIGHT);
            Drawn { first_shard: first, num_shards: source.num_shards, weight, end: epochs * u64::from(source.num_shards) }
        });
        Self { seed, sources: drawn.collect(), orders: BTreeMap::new() }
    }

    /// Number of draws.
    #[must_use]
    pub fn end(&self) -> Position {
        self.sources.iter().map(|source| source.end).sum()
    }

    /// The first position at which a shard of `epoch` of a source is drawn.
    #[must_use]
    pub fn start_of(&self, source: usize, epoch: Epoch) -> Position {
        self.sources.get(source).map_or(self.end(), |drawn| self.position(source, u64::from(epoch.0) * u64::from(drawn.num_shards)))
    }

    /// The position at which a shard is drawn in an epoch of its source. Takes time in the number of shards.
    pub fn position_of(&mut self, epoch: Epoch, shard: ShardId) -> Option<Position> {
        let source = self.sources.partition_point(|source| source.first_shard <= shard.0).checked_sub(1)?;
        let Drawn { first_shard, num_shards, .. } = self.sources[source];
        let place = self.permutation(source, epoch).iter().position(|&local| first_shard + local == shard.0)?;
        Some(self.position(source, u64::from(epoch.0) * u64::from(num_shards) + place as u64))
    }

    /// The position of a source's draw `count`.
    fn position(&self, source: usize, count: u64) -> Position {
        let drawn = &self.sources[source];
        if count >= drawn.end {
            return self.end();
        }
        let time = drawn.time_of(count);
        let before: Position = self.sources.iter().map(|other| other.count_by(time - 1)).sum();
        let beside = self.sources[..source].iter().filter(|other| other.count_by(time) > other.count_by(time - 1)).count();
        before + beside as u64
    }

    /// The shard at a position below [`end`](Self::end), and the epoch of its source.
    pub fn place(&mut self, position: Position) -> (Epoch, ShardId) {
        let (source, count) = self.draw(position);
        let Drawn { first_shard, num_shards, .. } = self.sources[source];
        let epoch = Epoch((count / u64::from(num_shards)) as u32);
        let place = (count % u64::from(num_shards)) as usize;
        (epoch, ShardId(first_shard + self.permutation(source, epoch)[place]))
    }

    fn permutation(&mut self, source: usize, epoch: Epoch) -> &[u32] {
        if !self.orders.contains_key(&(source, epoch)) {
            let of_source = (source, Epoch(0))..=(source, Epoch(u32::MAX));
            let kept: Vec<_> = self.orders.range(of_source).map(|(&key, _)| key).collect();
            for oldest in kept.iter().take((kept.len() + 1).saturating_sub(ORDERS_KEPT)) {
                self.orders.remove(oldest);
            }
        }
        let (seed, num_shards) = (self.seed, self.sources[source].num_shards);
        self.orders.entry((source, epoch)).or_insert_with(|| permutation(seed, source, epoch, num_shards))
    }

    /// Which source a position draws from, and how many draws of it came before.
    fn draw(&self, position: Position) -> (usize, u64) {
        if let [_] = self.sources[..] {
            return (0, position);
        }
        let due = |time: u128| -> Position { self.sources.iter().map(|source| source.count_by(time)).sum() };
        // The earliest time by which the draw has been made.
        let (mut low, mut high) = (0_u128, (u128::from(position) + 1) * u128::from(MAX_WEIGHT));
        while high - low > 1 {
            let middle = (low + high) / 2;
            if due(middle) > position { high = middle } else { low = middle }
        }
        let mut left = position - due(low);
        for (index, source) in self.sources.iter().enumerate() {
            let count = source.count_by(low);
            // A source has at most one draw at a time, as none is heavier than the unit.
            if source.count_by(high) > count {
                match left.checked_sub(1) {
                    Some(fewer) => left = fewer,
                    None => return (index, count),
                }
            }
        }
        (0, position)
    }
}

/// The shards of an epoch in the order they are drawn: a Fisher-Yates shuffle driven by SplitMix64 over (seed, source, epoch).
///
/// Fixed here rather than taken from a library: a resumed job must find the order it was started with.
fn permutation(seed: u64, source: usize, epoch: Epoch, num_shards: u32) -> Vec<u32> {
    let mut state = seed ^ u64::from(epoch.0).wrapping_mul(0xd1b5_4a32_d192_ed03) ^ (source as u64).wrapping_mul(0x8cb9_2ba7_2f3d_8dd7);
    let mut next = move || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    };
    let mut shards: Vec<u32> = (0..num_shards).collect();
    for last in (1..shards.len()).rev() {
        let pick = ((u128::from(next()) * (last as u128 + 1)) >> 64) as usize;
        shards.swap(last, pick);
    }
    shards
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(num_shards: u32, weight: f64) -> Source {
        Source { name: format!("{num_shards} at {weight}"), num_shards, weight }
    }

    #[test]
    fn each_epoch_is_a_permutation_and_epochs_differ() {
        let mut first = permutation(7, 0, Epoch(0), 100);
        assert_ne!(first, permutation(7, 0, Epoch(1), 100));
        assert_ne!(first, permutation(8, 0, Epoch(0), 100));
        assert_ne!(first, permutation(7, 1, Epoch(0), 100));
        first.sort_unstable();
        assert_eq!(first, (0..100).collect::<Vec<_>>());
    }

    #[test]
    fn sources_are_drawn_evenly_by_their_weights() {
        let order = Order::new(1, &[source(5, 3.0), source(50, 1.0)], None);
        let drawn: String = (0..12).map(|position| if order.draw(position).0 == 0 { 'a' } else { 'b' }).collect();
        assert_eq!(drawn, "aaabaaabaaab");
        let order = Order::new(1, &[source(5, 0.1), source(5, 0.1)], None);
        let drawn: Vec<usize> = (0..6).map(|position| order.draw(position).0).collect();
        assert_eq!(drawn, [0, 1, 0, 1, 0, 1], "the first listed among equals");
    }

    #[test]
    fn without_end_a_small_source_comes_round_while_a_large_one_is_in_its_first_epoch() {
        let mut order = Order::new(1, &[source(2, 1.0), source(100, 1.0)], None);
        let (epoch, shard) = order.place(40);
        assert_eq!((epoch, shard.0 < 2), (Epoch(10), true));
        assert_eq!(order.place(41).0, Epoch(0));
    }

    #[test]
    fn with_epochs_each_source_is_passed_over_as_often_whatever_its_weight() {
        for weights in [[1.0, 1.0], [7.3, 0.4], [0.001, 1.0]] {
            let mut order = Order::new(9, &[source(3, weights[0]), source(11, weights[1])], Some(4));
            assert_eq!(order.end(), 56);
            let mut places: Vec<_> = (0..order.end()).map(|position| order.place(position)).collect();
            places.sort();
            let expected: Vec<_> = (0..4).flat_map(|epoch| (0..14).map(move |shard| (Epoch(epoch), ShardId(shard)))).collect();
            assert_eq!(places, expected, "{weights:?}");
        }
    }

    #[test]
    fn the_start_of_an_epoch_is_where_its_first_shard_is_drawn() {
        let mut order = Order::new(2, &[source(3, 2.0), source(4, 3.0), source(2, 0.7)], Some(3));
        let places: Vec<_> = (0..order.end()).map(|position| order.place(position)).collect();
        for (source, shards) in [(0, 0..3), (1, 3..7), (2, 7..9)] {
            for epoch in 0..3 {
                let first = places.iter().position(|(at, shard)| *at == Epoch(epoch) && shards.contains(&shard.0)).unwrap();
                assert_eq!(order.start_of(source, Epoch(epoch)), first as u64, "source {source}, epoch {epoch}");
            }
            assert_eq!(order.start_of(source, Epoch(3)), order.end());
        }
        for (position, &(epoch, shard)) in (0..).zip(&places) {
            assert_eq!(order.position_of(epoch, shard), Some(position));
        }
    }
}
