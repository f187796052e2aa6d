//! The sheet a grid is painted on.

use crate::picture::{Picture, PictureError};

/// An sRGB colour.
pub(super) type Colour = [u8; 3];

/// Pixels being painted. Everything outside the sheet is clipped.
pub(super) struct Canvas {
    width: u32,
    height: u32,
    rgb: Vec<u8>,
}

impl Canvas {
    /// A sheet of one colour.
    pub(super) fn new(width: u32, height: u32, paper: Colour) -> Self {
        Self { width, height, rgb: paper.repeat(width as usize * height as usize) }
    }

    /// Lays `colour` over a pixel; `coverage` (0..=1) is how much of the pixel it hides.
    pub(super) fn blend(&mut self, x: i64, y: i64, colour: Colour, coverage: f32) {
        let (Ok(x), Ok(y)) = (u32::try_from(x), u32::try_from(y)) else { return };
        if x >= self.width || y >= self.height {
            return;
        }
        let at = 3 * (y as usize * self.width as usize + x as usize);
        for (under, over) in self.rgb[at..at + 3].iter_mut().zip(colour) {
            let (low, high) = (f32::from(*under), f32::from(over));
            *under = (low + (high - low) * coverage.clamp(0.0, 1.0)).round() as u8;
        }
    }

    /// Lays a picture down with its top left corner at (x, y), its corners rounded and a line of one pixel in `border` around it.
    pub(super) fn place(&mut self, picture: &Picture, x: u32, y: u32, radius: f32, border: Colour) {
        let size = [picture.width() as f32, picture.height() as f32];
        let rows = picture.rgb().chunks_exact(3 * picture.width() as usize);
        for (row, j) in rows.zip(0u32..) {
            for (pixel, i) in row.chunks_exact(3).zip(0u32..) {
                let distance = rounded_rectangle(size, radius, [i as f32 + 0.5, j as f32 + 0.5]);
                let (px, py) = (i64::from(x) + i64::from(i), i64::from(y) + i64::from(j));
                let inside = coverage(distance);
                self.blend(px, py, [pixel[0], pixel[1], pixel[2]], inside);
                self.blend(px, py, border, inside - coverage(distance + 1.0));
            }
        }
    }

    /// Outlines a rectangle, one pixel wide.
    pub(super) fn outline(&mut self, [left, top, right, bottom]: [i64; 4], colour: Colour) {
        for x in left..=right {
            self.blend(x, top, colour, 1.0);
            self.blend(x, bottom, colour, 1.0);
        }
        for y in top + 1..bottom {
            self.blend(left, y, colour, 1.0);
            self.blend(right, y, colour, 1.0);
        }
    }

    /// The finished picture.
    pub(super) fn finish(self) -> Result<Picture, PictureError> {
        Picture::new(self.width, self.height, self.rgb)
    }
}

/// The signed distance, in pixels, of a point from the edge of a rounded rectangle of `size` at the origin; negative inside.
fn rounded_rectangle(size: [f32; 2], radius: f32, point: [f32; 2]) -> f32 {
    let beyond = |axis: usize| (point[axis] - size[axis] / 2.0).abs() - size[axis] / 2.0 + radius;
    let (x, y) = (beyond(0), beyond(1));
    x.max(0.0).hypot(y.max(0.0)) + x.max(y).min(0.0) - radius
}

/// How much of a pixel lies inside a shape whose edge is `distance` away from its centre.
fn coverage(distance: f32) -> f32 {
    (0.5 - distance).clamp(0.0, 1.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn placed_pictures_keep_their_middle_and_lose_their_corners() {
        let mut canvas = Canvas::new(24, 24, [250; 3]);
        canvas.place(&Picture::new(20, 20, vec![10; 1200]).unwrap(), 2, 2, 6.0, [200; 3]);
        let sheet = canvas.finish().unwrap();
        let at = |x: usize, y: usize| sheet.rgb()[3 * (y * 24 + x)];
        assert_eq!(at(12, 12), 10, "middle");
        assert_eq!(at(2, 2), 250, "corner shows the paper");
        assert_eq!(at(12, 2), 200, "edge is the border");
    }

    #[test]
    fn painting_outside_the_sheet_is_clipped() {
        let mut canvas = Canvas::new(2, 2, [0; 3]);
        canvas.outline([-5, -5, 9, 9], [255; 3]);
        canvas.blend(i64::MAX, 0, [255; 3], 1.0);
        assert_eq!(canvas.finish().unwrap().rgb(), [0; 12]);
    }
}
