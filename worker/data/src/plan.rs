//! Which samples are trained together: pure rules over what is buffered, without threads, clock or I/O.
//!
//! [`Pool`] is the shuffle buffer: it gathers samples and gives single-bucket batches. [`Cuts`] says how large the next batch is to be.
//! Given the same samples in the same order, the same batches come out: a draw's generator is keyed by the job's seed and the samples in
//! the pool.

use std::collections::VecDeque;

use peapod_proto::ids::SampleName;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use crate::draws::{below, key, name_bytes};

/// Shares that may be planned and not yet handed out: the one that is awaited and two more.
pub const LOOKAHEAD: usize = 3;

/// What the pool must know of a sample.
pub trait Pooled {
    /// Its name.
    fn name(&self) -> SampleName;
    /// The bucket it goes to.
    fn bucket(&self) -> usize;
    /// Memory it holds.
    fn num_bytes(&self) -> u64;
}

/// Samples among which batches are drawn, in order of arrival.
pub struct Pool<T> {
    seed: u64,
    /// Samples to gather before drawing.
    target_len: usize,
    /// Bytes beyond which nothing more is gathered.
    max_bytes: u64,
    samples: Vec<T>,
    bytes: u64,
    bucket_lens: Vec<usize>,
}

impl<T: Pooled> Pool<T> {
    pub fn new(seed: u64, num_buckets: usize, target_len: usize, max_bytes: u64) -> Self {
        Self { seed, target_len, max_bytes, samples: Vec::new(), bytes: 0, bucket_lens: vec![0; num_buckets] }
    }

    pub fn len(&self) -> usize {
        self.samples.len()
    }

    pub fn is_empty(&self) -> bool {
        self.samples.is_empty()
    }

    pub fn num_bytes(&self) -> u64 {
        self.bytes
    }

    /// Whether there is room for more, whatever is to be drawn next.
    pub fn is_filling(&self) -> bool {
        self.samples.len() < self.target_len && self.bytes < self.max_bytes
    }

    /// Whether to gather more before a batch of `want` is drawn: while the pool is filling, or no bucket can fill the batch.
    ///
    /// When the bytes are used up the batch is taken from what there is.
    pub fn wants_more_for(&self, want: usize) -> bool {
        self.is_filling() || (self.bytes < self.max_bytes && self.bucket_lens.iter().all(|&len| len < want))
    }

    pub fn push(&mut self, sample: T) {
        self.bytes += sample.num_bytes();
        if let Some(len) = self.bucket_lens.get_mut(sample.bucket()) {
            *len += 1;
        }
        self.samples.push(sample);
    }

    /// Draws up to `want` samples of one bucket, in order of arrival; none only if the pool is empty.
    ///
    /// The bucket is drawn among those that can fill the batch, each weighted by what it holds; if none can, it is the fullest.
    pub fn draw(&mut self, want: usize) -> Vec<T> {
        let mut rng = self.rng();
        let bucket = self.draw_bucket(want, &mut rng);
        let mut positions: Vec<usize> = (0..self.samples.len()).filter(|&position| self.samples[position].bucket() == bucket).collect();
        let count = want.min(positions.len());
        for place in 0..count {
            let other = place + below(&mut rng, (positions.len() - place) as u64) as usize;
            positions.swap(place, other);
        }
        positions.truncate(count);
        let mut chosen = vec![false; self.samples.len()];
        positions.iter().for_each(|&position| chosen[position] = true);
        let mut chosen = chosen.into_iter();
        self.extract(|_| chosen.next().unwrap_or(false))
    }

    /// Drops the samples that `keep` refuses.
    pub fn retain(&mut self, keep: impl Fn(&T) -> bool) {
        self.extract(|sample| !keep(sample));
    }

    /// Takes out the samples that `take` asks for; both parts keep their order.
    fn extract(&mut self, mut take: impl FnMut(&T) -> bool) -> Vec<T> {
        let (taken, kept): (Vec<T>, Vec<T>) = std::mem::take(&mut self.samples).into_iter().partition(|sample| take(sample));
        self.samples = kept;
        for sample in &taken {
            self.bytes -= sample.num_bytes();
            if let Some(len) = self.bucket_lens.get_mut(sample.bucket()) {
                *len -= 1;
            }
        }
        taken
    }

    fn draw_bucket(&self, want: usize, rng: &mut ChaCha8Rng) -> usize {
        let able = |len: usize| if len >= want { len as u64 } else { 0 };
        let total: u64 = self.bucket_lens.iter().copied().map(able).sum();
        if total == 0 {
            // `max_by_key` keeps the last of equals; the first is wanted.
            return self.bucket_lens.iter().enumerate().rev().max_by_key(|&(_, len)| len).map_or(0, |(bucket, _)| bucket);
        }
        let mut left = below(rng, total);
        for (bucket, &len) in self.bucket_lens.iter().enumerate() {
            match left.checked_sub(able(len)) {
                Some(rest) => left = rest,
                None => return bucket,
            }
        }
        0
    }

    /// The generator of the next draw. Oldest, newest and number of samples change from draw to draw, and are all that it depends on.
    fn rng(&self) -> ChaCha8Rng {
        let names = self.samples.first().zip(self.samples.last()).map(|(oldest, newest)| (oldest.name(), newest.name()));
        let seed = names.map_or_else(Default::default, |(oldest, newest)| key(self.seed, oldest, name_bytes(newest)));
        let mut rng = ChaCha8Rng::from_seed(seed);
        rng.set_stream(self.samples.len() as u64);
        rng
    }
}

/// Cuts the sequence of batches into shares, a bounded number of them ahead.
///
/// Each share handed out allows one more to be cut, [`LOOKAHEAD`] later. A share that had to make up for samples which did not decode has
/// taken them from the next one's batches; the share cut for it is larger by as many, so that cuts and shares meet again. All of this
/// depends on what was handed out, not on when: the batches of a run do not depend on the speed of its threads.
#[derive(Debug, Default)]
pub struct Cuts {
    share: usize,
    /// Samples missing in the cut that is being planned.
    left: usize,
    /// One entry for each cut that may begin: by how much it is larger than a share.
    credits: VecDeque<usize>,
    /// Shares that must be handed out before credits are given again: too much is planned already.
    overdrawn: usize,
    /// Failures that no credit makes up for yet.
    owed: usize,
}

impl Cuts {
    /// Starts over for shares of this size while `planned` samples are already waiting to be handed out; the first cut completes the last
    /// share that they make up. For whatever disturbs the sequence: another size, a share that came back, a lease lost.
    pub fn restart(&mut self, share: usize, planned: usize) {
        let ahead = planned.div_ceil(share.max(1));
        *self = Self {
            share,
            left: (share - planned % share.max(1)) % share.max(1),
            credits: vec![0; LOOKAHEAD.saturating_sub(ahead)].into(),
            overdrawn: ahead.saturating_sub(LOOKAHEAD),
            owed: 0,
        };
    }

    /// Samples in a share.
    pub fn share(&self) -> usize {
        self.share
    }

    /// Samples that are still to be planned in the current cut; begins the next one if it may. 0: enough is planned.
    pub fn left(&mut self) -> usize {
        while self.left == 0 {
            match self.credits.pop_front() {
                Some(more) => self.left = self.share + more,
                None => break,
            }
        }
        self.left
    }

    /// Notes that this many samples were planned.
    pub fn planned(&mut self, samples: usize) {
        self.left = self.left.saturating_sub(samples);
    }

    /// Notes that a share was handed out for which `failed` samples did not decode.
    pub fn handed_out(&mut self, failed: usize) {
        self.owed += failed;
        match self.overdrawn.checked_sub(1) {
            Some(fewer) => self.overdrawn = fewer,
            None => self.credits.push_back(std::mem::take(&mut self.owed)),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use peapod_proto::ids::{Epoch, ShardId};
    use proptest::prelude::*;

    use super::*;

    #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
    struct Item {
        index: u32,
        bucket: usize,
    }

    impl Pooled for Item {
        fn name(&self) -> SampleName {
            SampleName { epoch: Epoch(0), shard: ShardId(0), index: self.index }
        }
        fn bucket(&self) -> usize {
            self.bucket
        }
        fn num_bytes(&self) -> u64 {
            10
        }
    }

    fn pool(seed: u64, buckets: &[usize]) -> Pool<Item> {
        let mut pool = Pool::new(seed, 4, 1000, u64::MAX);
        for (index, &bucket) in buckets.iter().enumerate() {
            pool.push(Item { index: index as u32, bucket });
        }
        pool
    }

    #[test]
    fn a_batch_is_of_one_bucket_and_full_where_one_can_fill_it() {
        let buckets = [0, 1, 0, 2, 0, 1, 0, 1, 3];
        for seed in 0..50 {
            let batch = pool(seed, &buckets).draw(3);
            assert_eq!(batch.len(), 3);
            assert!(batch.iter().all(|item| item.bucket == batch[0].bucket));
            assert!(batch.is_sorted(), "order of arrival");
        }
    }

    #[test]
    fn buckets_are_drawn_by_what_they_hold() {
        let buckets: Vec<usize> = (0..100).map(|index| usize::from(index % 4 == 0)).collect();
        let drawn = (0..2000).filter(|&seed| pool(seed, &buckets).draw(5)[0].bucket == 1).count();
        // A quarter: 500, give or take five standard deviations.
        assert!((400..600).contains(&drawn), "{drawn} of 2000");
    }

    #[test]
    fn without_a_bucket_that_can_fill_the_batch_the_fullest_gives_all() {
        let mut pool = pool(1, &[3, 1, 2, 1, 2]);
        let batch = |pool: &mut Pool<Item>| pool.draw(9).iter().map(|item| item.bucket).collect::<Vec<_>>();
        assert_eq!(batch(&mut pool), [1, 1]);
        assert_eq!(batch(&mut pool), [2, 2]);
        assert_eq!(batch(&mut pool), [3]);
        assert!(pool.is_empty() && pool.num_bytes() == 0 && batch(&mut pool).is_empty());
    }

    #[test]
    fn more_is_gathered_until_the_pool_is_full_and_a_bucket_can_fill_the_batch() {
        let mut pool = Pool::new(1, 2, 2, 50);
        let push = |pool: &mut Pool<Item>, index, bucket| pool.push(Item { index, bucket });
        assert!(pool.wants_more_for(1));
        push(&mut pool, 0, 0);
        assert!(pool.wants_more_for(1), "one of two");
        push(&mut pool, 1, 1);
        assert!(!pool.wants_more_for(1) && pool.wants_more_for(2), "neither bucket holds two");
        push(&mut pool, 2, 0);
        assert!(!pool.wants_more_for(2) && pool.wants_more_for(3));
        push(&mut pool, 3, 0);
        push(&mut pool, 4, 1);
        assert!(!pool.wants_more_for(9), "50 bytes are used up");
    }

    #[test]
    fn a_pool_of_one_gives_tar_order() {
        let mut pool = Pool::new(5, 2, 1, u64::MAX);
        let mut order = Vec::new();
        for index in 0..20 {
            pool.push(Item { index, bucket: index as usize % 2 });
            order.extend(pool.draw(1).iter().map(|item| item.index));
        }
        assert!(order.is_sorted() && order.len() == 20);
    }

    #[test]
    fn retain_keeps_the_books() {
        let mut pool = pool(1, &[0, 0, 1]);
        pool.retain(|item| item.index != 1);
        assert_eq!((pool.len(), pool.num_bytes()), (2, 20));
        assert!(pool.wants_more_for(2));
    }

    #[test]
    fn cuts_run_two_shares_ahead() {
        let mut cuts = Cuts::default();
        assert_eq!(cuts.left(), 0, "nothing is asked yet");
        cuts.restart(4, 0);
        let mut planned = 0;
        let mut plan = |cuts: &mut Cuts| {
            while cuts.left() > 0 {
                cuts.planned(1);
                planned += 1;
            }
            planned
        };
        assert_eq!(plan(&mut cuts), 12);
        cuts.handed_out(0);
        assert_eq!(plan(&mut cuts), 16);
        // A share that came back is already planned: nothing more until it is handed out again.
        cuts.restart(4, 16);
        assert_eq!(plan(&mut cuts), 16);
        cuts.handed_out(0);
        assert_eq!(plan(&mut cuts), 16);
        cuts.handed_out(0);
        assert_eq!(plan(&mut cuts), 20);
    }

    #[test]
    fn a_share_that_had_failures_is_followed_by_a_larger_cut() {
        let mut cuts = Cuts::default();
        cuts.restart(4, 0);
        for _ in 0..3 {
            assert_eq!(cuts.left(), 4);
            cuts.planned(4);
        }
        cuts.handed_out(1);
        assert_eq!(cuts.left(), 5);
    }

    #[test]
    fn a_restart_completes_the_share_that_was_begun() {
        let mut cuts = Cuts::default();
        cuts.restart(4, 6);
        assert_eq!(cuts.left(), 2);
        cuts.planned(2);
        assert_eq!(cuts.left(), 4, "the third share");
        cuts.planned(4);
        assert_eq!(cuts.left(), 0);
        cuts.restart(2, 11);
        assert_eq!(cuts.left(), 1, "the sixth share of two");
        cuts.planned(1);
        for _ in 0..3 {
            cuts.handed_out(0);
            assert_eq!(cuts.left(), 0, "still too many ahead");
        }
        cuts.handed_out(0);
        assert_eq!(cuts.left(), 2);
    }

    proptest! {
        #[test]
        fn every_sample_is_drawn_exactly_once(
            buckets in proptest::collection::vec(0_usize..4, 0..300), seed in any::<u64>(), want in 1_usize..12, target_len in 1_usize..80
        ) {
            let mut pool = Pool::new(seed, 4, target_len, 2000);
            let mut stream = buckets.iter().enumerate().map(|(index, &bucket)| Item { index: index as u32, bucket });
            let mut drawn = BTreeMap::new();
            loop {
                while pool.wants_more_for(want) {
                    match stream.next() {
                        Some(item) => pool.push(item),
                        None => break,
                    }
                }
                let batch = pool.draw(want);
                if batch.is_empty() {
                    break;
                }
                prop_assert!(batch.len() <= want && batch.iter().all(|item| item.bucket == batch[0].bucket));
                for item in batch {
                    prop_assert!(drawn.insert(item.index, item.bucket).is_none());
                }
            }
            prop_assert_eq!(drawn.into_values().collect::<Vec<_>>(), buckets);
        }
    }
}
