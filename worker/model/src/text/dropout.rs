//! Dropout inside the frozen student encoders, as the published trainer left it on.

use std::cell::{Cell, RefCell};

use tch::{Device, Kind, Tensor};

use crate::Result;
use crate::transfer::send;

/// Dropout of the rows of one batch, each by a seed of its own.
///
/// Whether an element is dropped is a hash of its row's seed, of the site (which of the network's dropouts it is, in the order they are
/// reached) and of its place in the row. So a row's masks depend neither on its neighbours nor on the size of the batch, are the same on
/// every device, and no generator's state is read or changed: libtorch's own is left to others.
pub(super) struct Dropout {
    /// The halves of each row's mixed seed, int64 `[B, 1]` with values below 2^32; `None` if nothing is dropped.
    keys: Option<[Tensor; 2]>,
    next_site: Cell<u32>,
    /// The places of a row, scrambled, of each length that was asked for: a network has few of them and many sites.
    places: RefCell<Vec<Tensor>>,
}

/// The hash is computed on numbers of 32 bits, held in int64, of which libtorch has all operations.
const MASK_32: i64 = 0xffff_ffff;

impl Dropout {
    /// Drops nothing.
    pub(super) fn off() -> Self {
        Self { keys: None, next_site: Cell::new(0), places: RefCell::default() }
    }

    /// Drops elements of a batch on `device` that has one row for each of `seeds`.
    pub(super) fn by_row(seeds: &[u64], device: Device) -> Result<Self> {
        let half = |shift: u32| -> Result<Tensor> {
            let halves: Vec<i64> = seeds.iter().map(|&seed| (mix(seed) >> shift) as i64 & MASK_32).collect();
            send(&Tensor::f_from_slice(&halves)?.f_view([seeds.len() as i64, 1])?, device)
        };
        Ok(Self { keys: Some([half(0)?, half(32)?]), ..Self::off() })
    }

    /// Zeroes each element with probability `rate`, in [0, 1), and divides the others by `1 - rate`. Shapes: `[B, ..]`, kept.
    pub(super) fn apply(&self, input: Tensor, rate: f64) -> Tensor {
        let Some(keys) = &self.keys else { return input };
        let site = self.next_site.get();
        self.next_site.set(site.wrapping_add(1));
        if rate == 0.0 {
            return input;
        }
        let size = input.size();
        let kept = kept(keys, site, &self.places(size[1..].iter().product(), keys[0].device()), rate).view(size.as_slice());
        &input * kept.to_kind(input.kind()) / (1.0 - rate)
    }

    fn places(&self, length: i64, device: Device) -> Tensor {
        let mut known = self.places.borrow_mut();
        if let Some(places) = known.iter().find(|places| places.size() == [length]) {
            return places.shallow_clone();
        }
        let places = scramble(Tensor::arange(length, (Kind::Int64, device)));
        known.push(places.shallow_clone());
        places
    }

    /// Scaled dot-product attention whose weights are dropped with probability `rate`.
    ///
    /// Shapes: `query`, `key`, `value` `[B, heads, L, width]`; `bias`, added to the scores, is broadcast to `[B, heads, L, L]`; returns
    /// `[B, heads, L, width]`. The scores are multiplied by `scale`; `None` is one over the square root of the width.
    pub(super) fn attention(&self, [query, key, value]: [&Tensor; 3], bias: &Tensor, scale: Option<f64>, rate: f64) -> Tensor {
        if self.keys.is_none() {
            return Tensor::scaled_dot_product_attention(query, key, value, Some(bias), 0.0, false, scale, false);
        }
        // The fused attention draws its masks from libtorch's generator: these are the same steps one by one.
        let scale = scale.unwrap_or_else(|| (query.size()[3] as f64).sqrt().recip());
        let scores = (query * scale).matmul(&key.transpose(-2, -1)) + bias;
        // In f32 whatever the kind, as there.
        let weights = scores.softmax(-1, Kind::Float).to_kind(value.kind());
        self.apply(weights, rate).matmul(value)
    }
}

/// Which elements of each row are kept, by their scrambled places `[length]`: bool `[B, length]`.
fn kept([low, high]: &[Tensor; 2], site: u32, places: &Tensor, rate: f64) -> Tensor {
    // Neighbouring sites must not differ in low bits only, which would merely exchange elements between them.
    let site = scramble(Tensor::from(i64::from(site))).int64_value(&[]);
    let hash = scramble(places.bitwise_xor_tensor(low));
    let hash = scramble(hash.bitwise_xor_tensor(&high.bitwise_xor(site)));
    hash.ge((rate * (1_i64 << 32) as f64) as i64)
}

/// A permutation of the numbers of 32 bits that changes about half of the bits when one changes.
///
/// Source: "lowbias32" of C. Wellons, Prospecting for Hash Functions (2018).
fn scramble(mut numbers: Tensor) -> Tensor {
    let fold = |numbers: &mut Tensor, shift: i64| {
        let shifted = numbers.bitwise_right_shift_tensor_scalar(shift);
        let _ = numbers.bitwise_xor_tensor_(&shifted);
    };
    // The second factor is 0x846ca68b less 2^32: the same in the lower half, and too small for the product to overflow.
    for (shift, factor) in [(16, 0x7feb_352d), (15, -0x7b93_5975)] {
        fold(&mut numbers, shift);
        let _ = numbers.g_mul_scalar_(factor as i64).bitwise_and_(MASK_32);
    }
    fold(&mut numbers, 16);
    numbers
}

/// A permutation of the numbers of 64 bits, so that seeds counted up from one another share no half.
///
/// Source: one step of SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators").
fn mix(seed: u64) -> u64 {
    let seed = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let seed = (seed ^ (seed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let seed = (seed ^ (seed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    seed ^ (seed >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ones(shape: &[i64]) -> Tensor {
        tch::set_num_threads(1);
        Tensor::ones(shape, (Kind::Float, Device::Cpu))
    }

    fn by_row(seeds: &[u64]) -> Dropout {
        Dropout::by_row(seeds, Device::Cpu).unwrap()
    }

    fn values(tensor: &Tensor) -> Vec<f32> {
        Vec::try_from(tensor.flatten(0, -1)).unwrap()
    }

    /// Of 400 000 draws at 10 %: the standard deviation of the fraction is 0.00047, the bound five of them.
    #[test]
    fn a_tenth_is_dropped_and_the_rest_is_scaled() {
        let dropped = by_row(&[1, 2, 3, 4]).apply(ones(&[4, 100_000]), 0.1);
        let fraction = dropped.eq(0.0).to_kind(Kind::Float).mean(Kind::Float).double_value(&[]);
        assert!((fraction - 0.1).abs() < 0.0024, "{fraction}");
        let kept = dropped.masked_select(&dropped.ne(0.0));
        assert!((kept - 1.0 / 0.9).abs().max().double_value(&[]) < 1e-6);
    }

    /// Over seeds counted up and over the sites of one seed: the mean of an element of ones is 1 with a standard deviation of
    /// sqrt(0.1 / 0.9 / 4000) = 0.0053; the farthest of 64 elements stays within five of them.
    #[test]
    fn the_mean_over_many_masks_is_the_input() {
        let seeds: Vec<u64> = (0..4000).collect();
        let over_seeds = by_row(&seeds).apply(ones(&[4000, 64]), 0.1).mean_dim([0_i64].as_slice(), false, Kind::Float);
        let dropout = by_row(&[7]);
        let sites: Vec<Tensor> = (0..4000).map(|_| dropout.apply(ones(&[1, 64]), 0.1)).collect();
        let over_sites = Tensor::cat(&sites, 0).mean_dim([0_i64].as_slice(), false, Kind::Float);
        for mean in [over_seeds, over_sites] {
            let farthest = (mean - 1.0).abs().max().double_value(&[]);
            assert!(farthest < 0.0265, "{farthest}");
        }
    }

    /// Masks of two rows or of two sites agree in as many elements as independent ones: 82 % of 100 000, with a standard deviation of
    /// 0.12 %.
    #[test]
    fn rows_and_sites_have_masks_of_their_own() {
        let dropout = by_row(&[5, 6, 5]);
        let [first, second] = [(); 2].map(|()| dropout.apply(ones(&[3, 100_000]), 0.1));
        assert_eq!(values(&first.get(0)), values(&first.get(2)));
        for (mask, other) in [(first.get(0), first.get(1)), (first.get(0), second.get(0)), (first.get(1), second.get(0))] {
            let agreeing = mask.eq_tensor(&other).to_kind(Kind::Float).mean(Kind::Float).double_value(&[]);
            assert!((agreeing - 0.82).abs() < 0.006, "{agreeing}");
        }
    }

    /// A run that goes on under another build must drop what it would have dropped. The numbers were computed apart, in Python.
    #[test]
    fn the_masks_are_pinned() {
        let dropout = by_row(&[0, 1, u64::MAX]);
        let dropped = |mask: Tensor| -> Vec<Vec<usize>> {
            let rows = (0..3).map(|row| values(&mask.get(row)));
            rows.map(|row| row.iter().enumerate().filter(|&(_, &value)| value == 0.0).map(|(place, _)| place).collect()).collect()
        };
        assert_eq!(dropped(dropout.apply(ones(&[3, 5, 8]), 0.1)), FIRST_SITE);
        assert_eq!(dropped(dropout.apply(ones(&[3, 40]), 0.1)), SECOND_SITE);
    }

    const FIRST_SITE: [&[usize]; 3] = [&[8, 27, 32], &[2, 18], &[3, 12, 14, 15]];
    const SECOND_SITE: [&[usize]; 3] = [&[0, 19, 29], &[10, 24, 30, 33, 34], &[17, 25, 33]];

    #[test]
    fn nothing_is_dropped_at_rate_zero_or_when_off_and_the_site_is_counted_all_the_same() {
        let (dropout, other) = (by_row(&[3]), by_row(&[3]));
        assert_eq!(values(&dropout.apply(ones(&[1, 100]), 0.0)), [1.0; 100]);
        let _ = other.apply(ones(&[1, 7]), 0.5);
        assert_eq!(values(&dropout.apply(ones(&[1, 100]), 0.1)), values(&other.apply(ones(&[1, 100]), 0.1)));
        assert_eq!(values(&Dropout::off().apply(ones(&[1, 100]), 0.9)), [1.0; 100]);
    }

    /// With a rate of zero the steps one by one are the fused attention.
    #[test]
    fn attention_step_by_step_is_the_fused_one() {
        let [query, key, value] = [0.0, 1.0, 2.0].map(|start| (ones(&[2, 3, 5, 4]).cumsum(-2, Kind::Float) * (start + 0.7)).sin());
        let bias = Tensor::from_slice(&[0.0_f32, 0.5, 0.0, -1.0, f32::NEG_INFINITY]).view([1, 1, 1, 5]);
        for scale in [None, Some(1.0)] {
            let steps = by_row(&[1, 2]).attention([&query, &key, &value], &bias, scale, 0.0);
            let fused = Dropout::off().attention([&query, &key, &value], &bias, scale, 0.0);
            assert!((steps - fused).abs().max().double_value(&[]) < 1e-6);
        }
    }
}
