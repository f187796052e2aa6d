//! Outlines of a picture, as ControlNets for edges want them.

use image::{GrayImage, Luma, RgbImage};

/// Gradients from here on always belong to an outline.
pub const HIGH: u16 = 200;
/// Gradients from here on belong to one if they touch it.
pub const LOW: u16 = 100;

/// tan 22.5 degrees: where a gradient's direction changes from along an axis to diagonal.
const DIAGONAL: f32 = 0.414_213_57;

/// Finds outlines after Canny 1986: Sobel gradients, thinned to their crests, kept where they are strong or touch what is kept.
///
/// As OpenCV's `Canny(picture, low, high)`: no smoothing, the gradient's size is `|dx| + |dy|`, and each pixel takes the channel where it
/// is largest. Outlines are white on black.
pub fn canny(picture: &RgbImage, low: u16, high: u16) -> GrayImage {
    let (width, height) = picture.dimensions();
    let (w, h) = (i64::from(width), i64::from(height));
    let index = |x: i64, y: i64| (y * w + x) as usize;
    let pixel = |x: i64, y: i64| picture.get_pixel(x.clamp(0, w - 1) as u32, y.clamp(0, h - 1) as u32).0.map(i32::from);

    // 1. Gradients; borders are repeated.
    let mut gradients = vec![(0i32, 0i32, 0i32); (w * h) as usize];
    for y in 0..h {
        for x in 0..w {
            let around = [-1, 0, 1].map(|dy| [-1, 0, 1].map(|dx| pixel(x + dx, y + dy)));
            for channel in [0, 1, 2] {
                let at = |row: usize, column: usize| around[row][column][channel];
                let dx = at(0, 2) + 2 * at(1, 2) + at(2, 2) - at(0, 0) - 2 * at(1, 0) - at(2, 0);
                let dy = at(2, 0) + 2 * at(2, 1) + at(2, 2) - at(0, 0) - 2 * at(0, 1) - at(0, 2);
                let size = dx.abs() + dy.abs();
                if size > gradients[index(x, y)].2 {
                    gradients[index(x, y)] = (dx, dy, size);
                }
            }
        }
    }

    // 2. Crests: no smaller than what lies along the gradient on one side, larger than on the other.
    let size = |x: i64, y: i64| if (0..w).contains(&x) && (0..h).contains(&y) { gradients[index(x, y)].2 } else { 0 };
    let mut outline = GrayImage::new(width, height);
    let mut strong = Vec::new();
    let mut weak = vec![false; gradients.len()];
    for y in 0..h {
        for x in 0..w {
            let (dx, dy, here) = gradients[index(x, y)];
            if here <= i32::from(low) {
                continue;
            }
            let (ax, ay) = (dx.abs() as f32, dy.abs() as f32);
            let crest = if ay < ax * DIAGONAL {
                here > size(x - 1, y) && here >= size(x + 1, y)
            } else if ax < ay * DIAGONAL {
                here > size(x, y - 1) && here >= size(x, y + 1)
            } else {
                let slope = if (dx < 0) == (dy < 0) { 1 } else { -1 };
                here > size(x - slope, y - 1) && here > size(x + slope, y + 1)
            };
            weak[index(x, y)] = crest;
            if crest && here > i32::from(high) {
                strong.push((x, y));
            }
        }
    }

    // 3. From the strong ones along the weak ones.
    while let Some((x, y)) = strong.pop() {
        if !std::mem::take(&mut weak[index(x, y)]) {
            continue;
        }
        outline.put_pixel(x as u32, y as u32, Luma([255]));
        let around = (-1..=1).flat_map(|dy| (-1..=1).map(move |dx| (x + dx, y + dy)));
        strong.extend(around.filter(|&(x, y)| (0..w).contains(&x) && (0..h).contains(&y) && weak[index(x, y)]));
    }
    outline
}

#[cfg(test)]
mod tests {
    use image::Rgb;

    use super::*;

    fn columns(outline: &GrayImage, row: u32) -> Vec<u32> {
        (0..outline.width()).filter(|&x| outline.get_pixel(x, row).0[0] == 255).collect()
    }

    #[test]
    fn a_step_gives_a_line_of_one_pixel_and_flat_areas_none() {
        let picture = RgbImage::from_fn(16, 8, |x, _| if x < 7 { Rgb([10, 10, 10]) } else { Rgb([10, 10, 200]) });
        let outline = canny(&picture, LOW, HIGH);
        for row in 0..8 {
            assert_eq!(columns(&outline, row), [6], "row {row}");
        }
        assert!(canny(&RgbImage::from_pixel(16, 8, Rgb([9, 200, 3])), LOW, HIGH).pixels().all(|pixel| pixel.0[0] == 0));
    }

    #[test]
    fn weak_edges_count_only_where_they_touch_strong_ones() {
        // A step of 30 (gradient 120) that grows to 60 (gradient 240) in the lower half.
        let picture = |strong: u8| {
            RgbImage::from_fn(16, 16, |x, y| {
                Rgb([if x < 8 {
                    0
                } else if y < 8 {
                    30
                } else {
                    strong
                }; 3])
            })
        };
        assert_eq!(columns(&canny(&picture(60), LOW, HIGH), 2), [7]);
        assert!(columns(&canny(&picture(30), LOW, HIGH), 2).is_empty());
    }

    #[test]
    fn a_circle_is_closed() {
        let inside = |x: u32, y: u32| (f64::from(x) - 31.5).hypot(f64::from(y) - 31.5) < 20.0;
        let outline = canny(&RgbImage::from_fn(64, 64, |x, y| Rgb([if inside(x, y) { 255 } else { 0 }; 3])), LOW, HIGH);
        for y in 14..50 {
            assert!((2..=16).contains(&columns(&outline, y).len()), "row {y}: {:?}", columns(&outline, y));
        }
    }
}
