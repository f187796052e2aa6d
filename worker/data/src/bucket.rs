//! Aspect-ratio buckets: the few picture sizes that batches are made of.

/// A picture size a job trains at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Bucket {
    /// Pixels, a multiple of 8.
    pub width: u32,
    /// Pixels, a multiple of 8.
    pub height: u32,
}

/// A picture whose width / height differs by this much or more from every bucket's is dropped.
const MAX_ASPECT_ERROR: f64 = 2.0;

/// The bucket whose width / height is nearest to the picture's; the first of several equally near ones.
///
/// `None` if none is near: with the method's own buckets, a picture four times as wide as high. (Tall pictures always find one: their
/// width / height lies between 0 and the smallest bucket's.)
#[must_use]
pub fn nearest(buckets: &[Bucket], (width, height): (u32, u32)) -> Option<usize> {
    let aspect = |width: u32, height: u32| f64::from(width) / f64::from(height);
    let wanted = aspect(width, height);
    let errors = buckets.iter().map(|bucket| (aspect(bucket.width, bucket.height) - wanted).abs());
    // `min_by` keeps the first of equal minima.
    let (index, error) = errors.enumerate().min_by(|(_, a), (_, b)| a.total_cmp(b))?;
    (error < MAX_ASPECT_ERROR).then_some(index)
}

/// The size to which a picture is scaled so that it just covers the bucket.
///
/// Pixels as `(width, height)`; both at least the bucket's, one of them equal to it. `u64`, as a thin picture becomes very long.
#[must_use]
pub fn covering_size((width, height): (u32, u32), bucket: Bucket) -> (u64, u64) {
    let [width, height, wide, high] = [width, height, bucket.width, bucket.height].map(u64::from);
    let scaled_width = width * high / height.max(1);
    if scaled_width >= wide { (scaled_width, high) } else { (wide, height * wide / width.max(1)) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::testing::method_buckets;

    #[test]
    fn bucket_of_each_aspect() {
        let nearest = |aspect: f64| nearest(&method_buckets(), ((aspect * 1000.0).round() as u32, 1000));
        assert_eq!([0.4, 0.52, 0.6, 1.0, 1.11, 3.99].map(nearest), [0, 1, 1, 4, 4, 8].map(Some));
        assert_eq!(nearest(4.0), None);
    }

    #[test]
    fn very_tall_pictures_fall_into_the_tallest_bucket() {
        assert_eq!(nearest(&method_buckets(), (1, 60_000)), Some(0));
    }

    #[test]
    fn the_first_of_equally_near_buckets_wins() {
        let square = Bucket { width: 64, height: 64 };
        assert_eq!(nearest(&[square, square], (10, 10)), Some(0));
    }

    #[test]
    fn scaled_sizes_are_rounded_down() {
        let bucket = Bucket { width: 640, height: 640 };
        assert_eq!(covering_size((1000, 999), bucket), (640, 640));
        assert_eq!(covering_size((1000, 700), bucket), (914, 640));
        assert_eq!(covering_size((700, 1000), bucket), (640, 914));
    }

    proptest! {
        #[test]
        fn the_scaled_picture_covers_its_bucket(width in 1_u32..20_000, height in 1_u32..20_000, index in 0_usize..9) {
            let bucket = method_buckets()[index];
            let (scaled_width, scaled_height) = covering_size((width, height), bucket);
            prop_assert!(scaled_width >= u64::from(bucket.width) && scaled_height >= u64::from(bucket.height));
            prop_assert!(scaled_width == u64::from(bucket.width) || scaled_height == u64::from(bucket.height));
        }
    }
}
