//! Text on a [`Canvas`]: fonts with a fallback, lines broken to a width.
//!
//! Glyphs are set one after the other from left to right with kerning. That is right for Latin, Greek, Cyrillic, Chinese, Japanese and
//! Korean; scripts whose letters join or reorder (Arabic, Devanagari) are shown, but not shaped.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use ab_glyph::{Font, FontArc, GlyphId, PxScale, ScaleFont, point};

use super::canvas::{Canvas, Colour};

/// Noto Sans CJK SC cut down to Latin, Cyrillic, punctuation and some 530 Chinese characters (assets/subset.sh, licence in assets/OFL.txt).
const BUNDLED: &[u8] = include_bytes!("../../assets/NotoSansSC-subset.otf");

/// The outline of the box that stands for a character no font has.
const MISSING: Colour = [0xC4, 0xC8, 0xCE];

/// Punctuation that must not begin a line.
const CLOSING: &str = "，。、；：？！）》」』】”’…,.;:?!)]}";

/// Characters that are named where fonts lack them; all are counted.
const NUM_NAMED: usize = 10;

/// Why a font could not be used.
#[derive(Debug, thiserror::Error)]
pub enum FontError {
    /// The file cannot be read.
    #[error("cannot read the font {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The file is no TrueType or OpenType font with outlines.
    #[error("{} is no TrueType or OpenType font (.ttf, .otf, .ttc)", path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
    },
}

/// The fonts of a grid: the user's, if there is one, then the bundled one.
#[derive(Debug)]
pub struct Typeface {
    fonts: Vec<FontArc>,
}

/// How a piece of text looks.
#[derive(Clone, Copy, Debug)]
pub(super) struct Style {
    /// The em size in pixels.
    pub(super) size: f32,
    pub(super) colour: Colour,
}

impl Style {
    /// The distance between two lines, in pixels.
    pub(super) fn line_height(self) -> f32 {
        (self.size * 1.4).round()
    }
}

impl Typeface {
    /// Loads `font`, if any, in front of the bundled font, which knows Latin, Cyrillic and the more frequent Chinese characters.
    ///
    /// Errors: [`FontError`] if the file cannot be read or is no font.
    pub fn load(font: Option<&Path>) -> Result<Self, FontError> {
        let mut fonts = Vec::new();
        if let Some(path) = font {
            let bytes = std::fs::read(path).map_err(|source| FontError::Read { path: path.into(), source })?;
            fonts.push(FontArc::try_from_vec(bytes).map_err(|_| FontError::Invalid { path: path.into() })?);
        }
        fonts.push(FontArc::try_from_slice(BUNDLED).map_err(|_| FontError::Invalid { path: "the bundled font".into() })?);
        Ok(Self { fonts })
    }

    /// What to say where characters of these texts are in no font, so that boxes are drawn in their place.
    pub fn complaint<'a>(&self, texts: impl IntoIterator<Item = &'a str>) -> Option<String> {
        let drawn = texts.into_iter().flat_map(str::chars).filter(|&c| !is_invisible(c));
        let lacking: BTreeSet<char> = drawn.filter(|&c| self.glyph(c).is_none()).collect();
        let named: Vec<String> = lacking.iter().take(NUM_NAMED).map(char::to_string).collect();
        let more = if lacking.len() > named.len() { format!(" and {} more", lacking.len() - named.len()) } else { String::new() };
        let (fonts, remedy) = match self.fonts.len() {
            0 | 1 => ("the built-in font lacks", "give --font FILE"),
            _ => ("the font of --font and the built-in one lack", "give a --font that has them"),
        };
        (!named.is_empty()).then(|| format!("{fonts} {}{more}, drawn as boxes: {remedy}", named.join(" ")))
    }

    /// The first font that has `c`, and its glyph there.
    fn glyph(&self, c: char) -> Option<(&FontArc, GlyphId)> {
        self.fonts.iter().map(|font| (font, font.glyph_id(c))).find(|(_, id)| id.0 != 0)
    }

    /// The width of `text` on one line, in pixels.
    pub(super) fn width(&self, text: &str, size: f32) -> f32 {
        self.set(text, size).1
    }

    /// Breaks `text` into lines no wider than `width` pixels: at spaces, and between any two Chinese characters. What goes beyond
    /// `max_lines` is left out behind an ellipsis.
    pub(super) fn wrap(&self, text: &str, size: f32, width: f32, max_lines: usize) -> Vec<String> {
        let fits = |line: &str| self.width(line.trim_end(), size) <= width;
        let mut lines = vec![String::new()];
        for piece in pieces(text) {
            let mut rest = piece;
            while !rest.is_empty() {
                let line = lines.last_mut().map_or("", |line| line.as_str());
                if fits(&format!("{line}{rest}")) {
                    push(&mut lines, rest);
                    break;
                }
                if !line.is_empty() {
                    lines.push(String::new());
                    continue;
                }
                // A piece wider than a line is cut where it fits, one character at the least.
                let cut = rest.char_indices().map(|(at, c)| at + c.len_utf8()).take_while(|&end| fits(&rest[..end])).last();
                let cut = cut.or_else(|| rest.chars().next().map(char::len_utf8)).unwrap_or(rest.len());
                push(&mut lines, &rest[..cut]);
                rest = &rest[cut..];
                if !rest.is_empty() {
                    lines.push(String::new());
                }
            }
        }
        if lines.len() > max_lines {
            lines.truncate(max_lines);
            if let Some(last) = lines.last_mut() {
                while !last.is_empty() && !fits(&format!("{}…", last.trim_end())) {
                    last.pop();
                }
                *last = format!("{}…", last.trim_end());
            }
        }
        lines.iter().map(|line| line.trim_end().to_owned()).filter(|line| !line.is_empty()).collect()
    }

    /// Paints one line whose box of [`Style::line_height`] begins at (x, y).
    pub(super) fn draw(&self, canvas: &mut Canvas, text: &str, [x, y]: [f32; 2], style: Style) {
        // The baseline lies where the middle of capitals and of Chinese characters is the middle of the line.
        let baseline = (y + style.line_height() / 2.0 + 0.37 * style.size).round();
        for (c, left) in self.set(text, style.size).0 {
            match self.glyph(c) {
                Some((font, id)) => {
                    let glyph = id.with_scale_and_position(scale(font, style.size), point(x + left, baseline));
                    // A space has no outline.
                    let Some(outlined) = font.outline_glyph(glyph) else { continue };
                    let corner = outlined.px_bounds().min;
                    let (cx, cy) = (corner.x as i64, corner.y as i64);
                    outlined.draw(|i, j, coverage| canvas.blend(cx + i64::from(i), cy + i64::from(j), style.colour, coverage));
                }
                None => {
                    let inset = 0.08 * style.size;
                    let right = x + left + missing_advance(c, style.size) - inset;
                    let edges = [x + left + inset, baseline - 0.8 * style.size, right, baseline + 0.06 * style.size];
                    canvas.outline(edges.map(|edge| edge.round() as i64), MISSING);
                }
            }
        }
    }

    /// Where each visible character of a line begins, and the line's width, in pixels.
    fn set(&self, text: &str, size: f32) -> (Vec<(char, f32)>, f32) {
        let mut pen = 0.0;
        let mut before: Option<(&FontArc, GlyphId)> = None;
        let mut placed = Vec::new();
        for c in text.chars().filter(|&c| !is_invisible(c)) {
            let found = self.glyph(c);
            if let (Some((font, id)), Some((last_font, last))) = (found, before)
                && std::ptr::eq(font, last_font)
            {
                pen += font.as_scaled(scale(font, size)).kern(last, id);
            }
            placed.push((c, pen));
            pen += found.map_or_else(|| missing_advance(c, size), |(font, id)| font.as_scaled(scale(font, size)).h_advance(id));
            before = found;
        }
        (placed, pen)
    }
}

/// Appends to the last line.
fn push(lines: &mut [String], text: &str) {
    if let Some(line) = lines.last_mut() {
        line.push_str(if line.is_empty() { text.trim_start() } else { text });
    }
}

/// Cuts text into pieces between which a line may end; spaces stay at the end of their piece.
fn pieces(text: &str) -> Vec<&str> {
    let mut starts = vec![0];
    let mut before: Option<char> = None;
    for (at, c) in text.char_indices() {
        let may_break = before.is_some_and(|b| (b.is_whitespace() && !c.is_whitespace()) || is_wide(b) || is_wide(c));
        if may_break && !CLOSING.contains(c) && !c.is_whitespace() {
            starts.push(at);
        }
        before = Some(c);
    }
    starts.push(text.len());
    starts.windows(2).map(|ends| &text[ends[0]..ends[1]]).filter(|piece| !piece.is_empty()).collect()
}

/// Whether a character takes a full square, so that a line may end beside it.
fn is_wide(c: char) -> bool {
    matches!(c, '\u{2E80}'..='\u{D7AF}' | '\u{F900}'..='\u{FAFF}' | '\u{FE30}'..='\u{FE4F}' | '\u{FF00}'..='\u{FF60}' | '\u{1F300}'..='\u{3FFFF}')
}

/// Whether a character leaves no mark of its own: controls, joiners, variation selectors.
fn is_invisible(c: char) -> bool {
    c.is_control() || matches!(c, '\u{200B}'..='\u{200F}' | '\u{2060}' | '\u{FE00}'..='\u{FE0F}' | '\u{FEFF}')
}

/// The width given to a character that no font has, in pixels.
fn missing_advance(c: char, size: f32) -> f32 {
    if is_wide(c) { size } else { 0.6 * size }
}

/// The scale at which `font` has an em of `size` pixels (ab_glyph scales by ascent + descent, which differs from font to font).
fn scale(font: &FontArc, size: f32) -> PxScale {
    PxScale::from(size * font.height_unscaled() / font.units_per_em().unwrap_or(1000.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn typeface() -> Typeface {
        Typeface::load(None).unwrap()
    }

    #[test]
    fn bundled_font_has_every_character_of_the_demo_captions() {
        let captions = "a big small red green blue yellow purple orange pink brown circle square triangle star heart on white black gray \
                        background, 三上五圆大小形心方星景棕橙正灰白的粉紫红绿背色蓝角黄黑，";
        let missing: Vec<char> = captions.chars().filter(|&c| typeface().glyph(c).is_none()).collect();
        assert!(missing.is_empty(), "{missing:?}");
    }

    #[test]
    fn latin_breaks_at_spaces_and_chinese_between_characters() {
        let t = typeface();
        assert_eq!(t.wrap("a big red circle", 10.0, t.width("a big red", 10.0), 9), ["a big red", "circle"]);
        assert_eq!(t.wrap("白色背景上的圆形", 10.0, 40.0, 9), ["白色背景", "上的圆形"]);
        assert_eq!(t.wrap("红色圆形，白色背景", 10.0, 40.0, 9), ["红色圆", "形，白色", "背景"], "a comma never begins a line");
    }

    #[test]
    fn lines_that_do_not_fit_end_in_an_ellipsis_or_are_cut() {
        let t = typeface();
        let lines = t.wrap("白色背景上的圆形", 10.0, 40.0, 1);
        assert_eq!(lines, ["白色背…"]);
        let width = t.width("mmmm", 10.0);
        assert_eq!(t.wrap("mmmmmm", 10.0, width, 9), ["mmmm", "mm"]);
        assert_eq!(t.wrap("", 10.0, 40.0, 9), Vec::<String>::new());
        assert_eq!(t.wrap("圆形", 10.0, 1.0, 9), ["圆", "形"], "narrower than one character");
    }

    #[test]
    fn unknown_characters_become_boxes_and_take_room() {
        let t = typeface();
        let text = "龘😀\u{FE0F}\u{E000}";
        assert_eq!(t.width(text, 10.0), 10.0 + 10.0 + 6.0);
        let mut canvas = Canvas::new(40, 20, [255; 3]);
        t.draw(&mut canvas, text, [2.0, 2.0], Style { size: 10.0, colour: [0; 3] });
        assert!(canvas.finish().unwrap().rgb().contains(&MISSING[0]));
    }

    #[test]
    fn characters_that_no_font_has_are_told_with_what_to_do() {
        let bundled = typeface();
        assert_eq!(bundled.complaint(["a red circle · Euler", "红色\u{200B}"]), None);
        let complaint = bundled.complaint(["แมว", "a cat แมว 😀"]).unwrap();
        assert_eq!(complaint, "the built-in font lacks ม ว แ 😀, drawn as boxes: give --font FILE");
        let alphabet: String = ('ก'..='ฮ').collect();
        assert!(bundled.complaint([alphabet.as_str()]).unwrap().contains(" ช and 36 more, "));
        let with_another = Typeface { fonts: [bundled.fonts.clone(), bundled.fonts.clone()].concat() };
        let complaint = with_another.complaint(["แ"]).unwrap();
        assert_eq!(complaint, "the font of --font and the built-in one lack แ, drawn as boxes: give a --font that has them");
    }

    #[test]
    fn font_errors_name_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("font.ttf");
        assert!(Typeface::load(Some(&path)).unwrap_err().to_string().contains("cannot read the font"));
        std::fs::write(&path, b"not a font").unwrap();
        assert!(Typeface::load(Some(&path)).unwrap_err().to_string().contains("no TrueType"));
    }
}
