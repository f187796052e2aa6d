//! How alike two pictures are: what a comparison of student and teacher is judged by.

use crate::picture::Picture;

/// Side of the windows that are compared, in pixels.
const WINDOW: usize = 8;
/// Distance between two windows.
const STRIDE: usize = 4;
/// The stabilising constants for 8-bit pixels.
const C1: f64 = (0.01 * 255.0) * (0.01 * 255.0);
const C2: f64 = (0.03 * 255.0) * (0.03 * 255.0);

/// Structural similarity of two pictures, from -1 to 1, where 1 says that they are the same; `None` for pictures of different sizes.
///
/// The mean over all square windows and the three channels. Means, variances and the covariance are those of the window's pixels.
/// Source: Wang et al. 2004, eq. 13, with plain windows in place of Gaussian ones.
pub fn similarity(left: &Picture, right: &Picture) -> Option<f64> {
    if (left.width(), left.height()) != (right.width(), right.height()) {
        return None;
    }
    let (width, height) = (left.width() as usize, left.height() as usize);
    let (wide, high) = (WINDOW.min(width), WINDOW.min(height));
    let (mut sum, mut count) = (0.0, 0.0);
    for top in (0..=height - high).step_by(STRIDE) {
        for start in (0..=width - wide).step_by(STRIDE) {
            for channel in 0..3 {
                let pixels = (top..top + high).flat_map(|y| (start..start + wide).map(move |x| 3 * (y * width + x) + channel));
                sum += window(pixels.map(|index| [left.rgb()[index], right.rgb()[index]].map(f64::from)), (wide * high) as f64);
                count += 1.0;
            }
        }
    }
    Some(sum / count)
}

/// The similarity of one window of `count` pairs of pixels.
fn window(pairs: impl Iterator<Item = [f64; 2]>, count: f64) -> f64 {
    let sums = pairs.fold([0.0; 5], |[a, b, aa, bb, ab], [x, y]| [a + x, b + y, aa + x * x, bb + y * y, ab + x * y]);
    let [a, b, aa, bb, ab] = sums.map(|sum| sum / count);
    let (variances, covariance) = (aa - a * a + bb - b * b, ab - a * b);
    (2.0 * a * b + C1) * (2.0 * covariance + C2) / ((a * a + b * b + C1) * (variances + C2))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn picture(side: u32, value: impl Fn(u32, u32) -> u8) -> Picture {
        let pixels = (0..side).flat_map(|y| (0..side).map(move |x| (x, y)));
        Picture::new(side, side, pixels.flat_map(|(x, y)| [value(x, y); 3]).collect()).unwrap()
    }

    #[test]
    fn the_same_picture_is_as_alike_as_can_be_and_its_negative_the_opposite() {
        let stripes = picture(32, |x, _| if x % 4 < 2 { 0 } else { 255 });
        let negative = picture(32, |x, _| if x % 4 < 2 { 255 } else { 0 });
        assert!((similarity(&stripes, &stripes).unwrap() - 1.0).abs() < 1e-12);
        assert!(similarity(&stripes, &negative).unwrap() < -0.9);
        assert_eq!(similarity(&stripes, &picture(16, |_, _| 0)), None);
    }

    #[test]
    fn likeness_falls_with_the_difference() {
        let at = |shift: u32| picture(32, move |x, y| if (x + shift).abs_diff(16) + y.abs_diff(16) < 8 { 200 } else { 30 });
        let alike = |shift| similarity(&at(0), &at(shift)).unwrap();
        assert!(alike(1) > alike(3) && alike(3) > alike(8), "{} {} {}", alike(1), alike(3), alike(8));
        let tiny = picture(3, |x, y| (x * 40 + y) as u8);
        assert!((similarity(&tiny, &tiny).unwrap() - 1.0).abs() < 1e-12, "smaller than a window");
    }

    /// Two flat windows differ in their means alone: (2 a b + C1) / (a^2 + b^2 + C1).
    #[test]
    fn flat_pictures_are_compared_by_their_brightness() {
        let (a, b) = (100.0, 150.0);
        let wanted = (2.0 * a * b + C1) / (a * a + b * b + C1);
        let got = similarity(&picture(16, |_, _| 100), &picture(16, |_, _| 150)).unwrap();
        assert!((got - wanted).abs() < 1e-9, "{got}, wanted {wanted}");
    }
}
