//! Words about foreign data, fit for a log, a report and a terminal.

/// Characters that are shown: enough for any reason, and too few to fill a report.
const MAX_CHARS: usize = 500;

/// Writes out what steers a terminal or a line, and leaves out what is behind the first few hundred characters: decoders quote what they
/// find, however long it is.
pub(crate) fn shown(text: &str) -> String {
    let mut shown = String::with_capacity(text.len().min(MAX_CHARS));
    let mut chars = text.chars();
    for c in chars.by_ref().take(MAX_CHARS) {
        match c {
            // Also those that turn the direction of writing, or end a line.
            c if c.is_control() || matches!(c, '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}') => {
                shown.extend(c.escape_default());
            }
            c => shown.push(c),
        }
    }
    if chars.next().is_some() {
        shown.push_str("...");
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ordinary_words_stay_and_others_are_cut_and_written_out() {
        for text in ["", "caption_zh: 红 is \"red\"", "C:\\x"] {
            assert_eq!(shown(text), text);
        }
        assert_eq!(shown("a\u{1b}[2J\r\n\u{202e}b"), "a\\u{1b}[2J\\r\\n\\u{202e}b");
        assert_eq!(shown(&"红".repeat(10_000)), "红".repeat(500) + "...");
        assert_eq!(shown(&"x".repeat(500)), "x".repeat(500));
    }
}
