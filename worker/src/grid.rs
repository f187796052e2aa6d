//! The sheet users look at: rows of prompts, columns of pictures to compare, captions in every language asked.
//!
//! Rows flow into as many panels side by side as bring the sheet near the shape of a screen, so two prompts and a hundred both stay
//! readable. Pictures are enlarged where they are small and never reduced.

mod canvas;
mod text;

use fast_image_resize::{self as fir, images::Image, images::ImageRef};

use self::{
    canvas::{Canvas, Colour},
    text::Style,
};
use crate::picture::{Picture, PictureError};

pub use self::text::{FontError, Typeface};

const PAPER: Colour = [0xFA, 0xFA, 0xF8];
const BORDER: Colour = [0xDD, 0xDF, 0xE2];
const INK: Colour = [0x22, 0x26, 0x2B];
const MUTED: Colour = [0x6E, 0x75, 0x7E];

const TITLE: Style = Style { size: 28.0, colour: INK };
const SUBTITLE: Style = Style { size: 15.0, colour: MUTED };
const COLUMN: Style = Style { size: 16.0, colour: MUTED };
const FIRST_CAPTION: Style = Style { size: 19.0, colour: INK };
const OTHER_CAPTION: Style = Style { size: 14.0, colour: MUTED };

/// Around the sheet, in pixels like all that follow.
const MARGIN: u32 = 44;
/// Between two pictures, and between captions and pictures.
const GAP: u32 = 20;
/// Between two panels.
const GUTTER: u32 = 56;
/// Pictures whose longer side is shorter than this are enlarged by a whole factor until it is not.
const SMALLEST_CELL: u32 = 192;
/// Captions wider than this are broken into lines.
const CAPTION_WIDTH: f32 = 276.0;
/// Lines shown of one caption.
const CAPTION_LINES: usize = 6;
const RADIUS: f32 = 10.0;
/// Width over height that the sheet should come near.
const ASPECT: f64 = 1.4;
/// The largest sheet: 800 MB of pixels.
const MAX_PIXELS: u64 = 1 << 28;

/// Why a grid could not be composed.
#[derive(Debug, thiserror::Error)]
pub enum GridError {
    /// There is nothing to show.
    #[error("a grid needs at least one row and one column")]
    Empty,
    /// A row has more or fewer pictures than there are columns.
    #[error("row {row} has {got} pictures for {expected} columns")]
    Row {
        /// The row, from 0.
        row: usize,
        /// Its pictures.
        got: usize,
        /// The columns.
        expected: usize,
    },
    /// The sheet would be too large to open anywhere.
    #[error("the grid would have {width}x{height} pixels: write the pictures to separate files instead")]
    TooLarge {
        /// Width in pixels.
        width: u64,
        /// Height in pixels.
        height: u64,
    },
    /// A picture could not be enlarged.
    #[error("cannot enlarge a picture: {0}")]
    Enlarge(String),
    /// The sheet could not be made into a picture.
    #[error(transparent)]
    Picture(#[from] PictureError),
}

/// Pictures to be shown together.
#[derive(Clone, Debug)]
pub struct Grid {
    /// The line above everything; may be empty.
    pub title: String,
    /// A smaller line below it (settings, for example); may be empty.
    pub subtitle: String,
    /// The columns' titles; empty ones are left out.
    pub columns: Vec<String>,
    /// What is shown.
    pub rows: Vec<Row>,
}

/// One prompt's pictures.
#[derive(Clone, Debug)]
pub struct Row {
    /// The prompt, first as it was asked, then in other languages.
    pub captions: Vec<String>,
    /// One picture a column.
    pub pictures: Vec<Picture>,
}

impl Grid {
    /// All that is written on the sheet.
    pub fn texts(&self) -> impl Iterator<Item = &str> {
        let captions = self.rows.iter().flat_map(|row| &row.captions);
        [&self.title, &self.subtitle].into_iter().chain(&self.columns).chain(captions).map(String::as_str)
    }

    /// Paints the sheet.
    ///
    /// Errors: [`GridError::Empty`] and [`GridError::Row`] for a grid without shape, [`GridError::TooLarge`].
    pub fn compose(&self, typeface: &Typeface) -> Result<Picture, GridError> {
        let layout = Layout::new(self, typeface)?;
        let mut canvas = Canvas::new(layout.width, layout.height, PAPER);

        // 1. The heading.
        let mut y = MARGIN as f32;
        for (lines, style) in &layout.heading {
            for line in lines {
                typeface.draw(&mut canvas, line, [MARGIN as f32, y], *style);
                y += style.line_height();
            }
        }

        // 2. Column titles, centred, above every panel.
        for panel in 0..layout.num_panels {
            for (column, title) in self.columns.iter().enumerate() {
                let slack = layout.cell[0] as f32 - typeface.width(title, COLUMN.size);
                let x = layout.cell_left(panel, column) as f32 + slack / 2.0;
                typeface.draw(&mut canvas, title, [x, layout.titles_top as f32], COLUMN);
            }
        }

        // 3. The rows: captions beside their pictures, both centred on the row's middle.
        for (i, (row, captions)) in self.rows.iter().zip(&layout.captions).enumerate() {
            let (panel, top) = (i / layout.rows_per_panel, layout.row_top(i % layout.rows_per_panel));
            let mut y = top as f32 + (layout.row_height as f32 - height_of(captions)) / 2.0;
            for (line, style) in captions {
                typeface.draw(&mut canvas, line, [layout.panel_left(panel) as f32, y], *style);
                y += style.line_height();
            }
            for (column, picture) in row.pictures.iter().enumerate() {
                let picture = enlarge(picture, layout.factor)?;
                let x = layout.cell_left(panel, column) + (layout.cell[0] - picture.width()) / 2;
                let y = top + (layout.row_height - picture.height()) / 2;
                canvas.place(&picture, x, y, RADIUS, BORDER);
            }
        }
        Ok(canvas.finish()?)
    }
}

/// Where everything goes, in pixels.
struct Layout {
    width: u32,
    height: u32,
    heading: Vec<(Vec<String>, Style)>,
    titles_top: u32,
    rows_top: u32,
    num_panels: usize,
    rows_per_panel: usize,
    panel_width: u32,
    caption_width: u32,
    /// Width and height of a cell.
    cell: [u32; 2],
    row_height: u32,
    /// How many times pictures are enlarged.
    factor: u32,
    /// Each row's caption lines.
    captions: Vec<Vec<(String, Style)>>,
}

impl Layout {
    fn new(grid: &Grid, typeface: &Typeface) -> Result<Self, GridError> {
        let num_columns = grid.columns.len();
        if num_columns == 0 || grid.rows.is_empty() {
            return Err(GridError::Empty);
        }
        if let Some((row, got)) = grid.rows.iter().map(|row| row.pictures.len()).enumerate().find(|&(_, got)| got != num_columns) {
            return Err(GridError::Row { row, got, expected: num_columns });
        }

        // 1. A cell holds the largest picture; a column is also as wide as its title.
        let pictures = || grid.rows.iter().flat_map(|row| &row.pictures);
        let largest = [pictures().map(Picture::width).max().unwrap_or(1), pictures().map(Picture::height).max().unwrap_or(1)];
        let factor = SMALLEST_CELL.div_ceil(largest[0].max(largest[1]));
        let title_width = grid.columns.iter().map(|title| typeface.width(title, COLUMN.size).ceil() as u32).max().unwrap_or(0);
        let cell = [largest[0].saturating_mul(factor).max(title_width), largest[1].saturating_mul(factor)];

        // 2. Captions, and with them the rows.
        let captions: Vec<_> = grid.rows.iter().map(|row| caption_lines(row, typeface)).collect();
        let widest = captions.iter().flatten().map(|(line, style)| typeface.width(line, style.size).ceil() as u32).max().unwrap_or(0);
        let tallest = captions.iter().map(|lines| height_of(lines).ceil() as u32).max().unwrap_or(0);
        let caption_width = if widest == 0 { 0 } else { widest + GAP };
        let row_height = cell[1].max(tallest);
        let panel_width = u64::from(caption_width) + num_columns as u64 * u64::from(cell[0]) + (num_columns as u64 - 1) * u64::from(GAP);

        // 3. As many panels as bring the sheet near its aspect.
        let row_pitch = u64::from(row_height) + u64::from(GAP);
        let num_rows = grid.rows.len();
        let sheet = |rows_per_panel: usize| {
            let num_panels = num_rows.div_ceil(rows_per_panel) as u64;
            (num_panels * panel_width + (num_panels - 1) * u64::from(GUTTER), rows_per_panel as u64 * row_pitch)
        };
        let off = |rows_per_panel: usize| {
            let (width, height) = sheet(rows_per_panel);
            (width as f64 / height as f64 / ASPECT).ln().abs()
        };
        // Panels of equal length only: eight rows are 8, 4 + 4 or 3 + 3 + 2, never 5 + 3.
        let choices = (1..=num_rows).map(|num_panels| num_rows.div_ceil(num_panels));
        let rows_per_panel = choices.min_by(|&a, &b| off(a).total_cmp(&off(b))).unwrap_or(num_rows);

        // 4. The heading, as wide as the panels below it.
        let (content_width, rows_height) = sheet(rows_per_panel);
        let heading: Vec<_> = [(&grid.title, TITLE), (&grid.subtitle, SUBTITLE)]
            .map(|(text, style)| (typeface.wrap(text, style.size, content_width as f32, 3), style))
            .into();
        let heading_height: f32 = heading.iter().map(|(lines, style)| lines.len() as f32 * style.line_height()).sum();
        let titles_top = MARGIN + heading_height as u32 + if heading_height > 0.0 { 3 * GAP / 2 } else { 0 };
        let rows_top = titles_top + if title_width > 0 { COLUMN.line_height() as u32 + GAP / 2 } else { 0 };
        let (width, height) = (content_width + 2 * u64::from(MARGIN), u64::from(rows_top) + rows_height + u64::from(MARGIN - GAP));
        match (u32::try_from(width), u32::try_from(height), u32::try_from(panel_width)) {
            (Ok(w), Ok(h), Ok(panel_width)) if width.saturating_mul(height) <= MAX_PIXELS => Ok(Self {
                width: w,
                height: h,
                heading,
                titles_top,
                rows_top,
                num_panels: num_rows.div_ceil(rows_per_panel),
                rows_per_panel,
                panel_width,
                caption_width,
                cell,
                row_height,
                factor,
                captions,
            }),
            _ => Err(GridError::TooLarge { width, height }),
        }
    }

    fn panel_left(&self, panel: usize) -> u32 {
        MARGIN + panel as u32 * (self.panel_width + GUTTER)
    }

    fn cell_left(&self, panel: usize, column: usize) -> u32 {
        self.panel_left(panel) + self.caption_width + column as u32 * (self.cell[0] + GAP)
    }

    fn row_top(&self, row_in_panel: usize) -> u32 {
        self.rows_top + row_in_panel as u32 * (self.row_height + GAP)
    }
}

/// A row's captions, broken into lines: the first in ink, the others smaller and lighter.
fn caption_lines(row: &Row, typeface: &Typeface) -> Vec<(String, Style)> {
    let styles = std::iter::once(FIRST_CAPTION).chain(std::iter::repeat(OTHER_CAPTION));
    let lines = |(text, style): (&String, Style)| {
        typeface.wrap(text, style.size, CAPTION_WIDTH, CAPTION_LINES).into_iter().map(move |line| (line, style)).collect::<Vec<_>>()
    };
    row.captions.iter().zip(styles).flat_map(lines).collect()
}

/// The height of a stack of lines.
fn height_of(lines: &[(String, Style)]) -> f32 {
    lines.iter().map(|(_, style)| style.line_height()).sum()
}

/// Enlarges a picture by a whole factor, smoothly (Catmull-Rom).
fn enlarge(picture: &Picture, factor: u32) -> Result<Picture, GridError> {
    if factor == 1 {
        return Ok(picture.clone());
    }
    let failed = |error: &dyn std::fmt::Display| GridError::Enlarge(error.to_string());
    let (width, height) = (picture.width() * factor, picture.height() * factor);
    let small = ImageRef::new(picture.width(), picture.height(), picture.rgb(), fir::PixelType::U8x3).map_err(|e| failed(&e))?;
    let mut large = Image::new(width, height, fir::PixelType::U8x3);
    let options = fir::ResizeOptions::new().resize_alg(fir::ResizeAlg::Convolution(fir::FilterType::CatmullRom));
    fir::Resizer::new().resize(&small, &mut large, &options).map_err(|e| failed(&e))?;
    Ok(Picture::new(width, height, large.into_vec())?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn grid(rows: usize, columns: usize, side: u32) -> Grid {
        let picture = Picture::new(side, side, vec![90; 3 * (side * side) as usize]).unwrap();
        let row = Row { captions: vec!["红色的圆形".into(), "a red circle".into()], pictures: vec![picture; columns] };
        Grid { title: "Peapod".into(), subtitle: String::new(), columns: vec!["English".into(); columns], rows: vec![row; rows] }
    }

    fn layout(grid: &Grid) -> Layout {
        Layout::new(grid, &Typeface::load(None).unwrap()).unwrap()
    }

    #[test]
    fn small_pictures_are_enlarged_by_a_whole_factor_and_large_ones_kept() {
        assert_eq!((layout(&grid(2, 2, 64)).factor, layout(&grid(2, 2, 64)).cell), (3, [192, 192]));
        assert_eq!((layout(&grid(2, 2, 512)).factor, layout(&grid(2, 2, 512)).cell), (1, [512, 512]));
    }

    #[test]
    fn rows_flow_into_panels_that_keep_the_sheet_near_a_screen() {
        for rows in [1, 6, 24, 100] {
            let layout = layout(&grid(rows, 2, 64));
            assert!(layout.num_panels * layout.rows_per_panel >= rows);
            assert!((layout.num_panels - 1) * layout.rows_per_panel < rows, "no empty panel");
            let aspect = f64::from(layout.width) / f64::from(layout.height);
            assert!((0.7..3.5).contains(&aspect), "{rows} rows: {aspect}");
        }
    }

    #[test]
    fn nothing_overlaps_and_everything_lies_on_the_sheet() {
        let layout = layout(&grid(7, 3, 64));
        assert!(layout.cell_left(0, 1) >= layout.cell_left(0, 0) + layout.cell[0] + GAP);
        let (last_panel, last_row) = (layout.num_panels - 1, layout.rows_per_panel - 1);
        assert_eq!(layout.cell_left(last_panel, 2) + layout.cell[0] + MARGIN, layout.width);
        assert_eq!(layout.row_top(last_row) + layout.row_height + MARGIN, layout.height);
    }

    #[test]
    fn composed_sheet_shows_the_pictures() {
        let grid = grid(1, 1, 64);
        let (layout, sheet) = (layout(&grid), grid.compose(&Typeface::load(None).unwrap()).unwrap());
        let (x, y) = (layout.cell_left(0, 0) + layout.cell[0] / 2, layout.row_top(0) + layout.row_height / 2);
        assert_eq!(sheet.rgb()[3 * (y * sheet.width() + x) as usize], 90);
    }

    #[test]
    fn ragged_and_empty_grids_are_refused() {
        let typeface = Typeface::load(None).unwrap();
        let mut ragged = grid(3, 2, 8);
        ragged.rows[1].pictures.pop();
        assert_eq!(ragged.compose(&typeface).unwrap_err().to_string(), "row 1 has 1 pictures for 2 columns");
        assert!(matches!(grid(0, 2, 8).compose(&typeface), Err(GridError::Empty)));
    }
}
