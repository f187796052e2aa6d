//! What is done to a text before it is cut into tokens, as the library a model comes from does it.

use std::borrow::Cow;

/// The clean-up of a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Cleaning {
    /// None.
    Keep,
    /// Curly double quotes become straight ones, which the Chinese vocabulary has, as in Chinese-CLIP's own training.
    StraightQuotes,
    /// open_clip's for the tokenizers of other libraries: repaired encoding, HTML entities replaced twice, runs of white space as one
    /// space.
    OpenClip,
}

impl Cleaning {
    /// Returns the text to be cut into tokens.
    pub(super) fn apply(self, text: &str) -> Cow<'_, str> {
        match self {
            Self::Keep => Cow::Borrowed(text),
            Self::StraightQuotes => Cow::Owned(text.replace(['“', '”'], "\"")),
            Self::OpenClip => {
                let repaired = plsfix::fix_text(&without_terminal_escapes(text), None);
                let plain = htmlize::unescape(htmlize::unescape(repaired));
                let words = plain.split(is_python_space).filter(|word| !word.is_empty());
                Cow::Owned(words.collect::<Vec<_>>().join(" "))
            }
        }
    }
}

/// Removes what colours text on a terminal, ESC `[` digits and semicolons, a letter: `plsfix` means to, but looks for a zero byte.
fn without_terminal_escapes(text: &str) -> String {
    let mut parts = text.split("\u{1b}[");
    let mut clean = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let rest = part.trim_start_matches(|letter: char| letter.is_ascii_digit() || letter == ';');
        match rest.strip_prefix(|letter: char| letter.is_ascii_alphabetic()) {
            Some(after) => clean.push_str(after),
            None => {
                clean.push_str("\u{1b}[");
                clean.push_str(part);
            }
        }
    }
    clean
}

/// What Python's `str.split` takes for white space: Unicode's, and the four separators of ASCII.
fn is_python_space(letter: char) -> bool {
    letter.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&letter)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What open_clip 3.3.0 (with ftfy 6.3.1) makes of texts: `open_clip.tokenizer._clean_whitespace`.
    const CLEANED: [(&str, &str); 14] = [
        (" ", ""),
        ("“引号” ‘单’ quotes", "\"引号\" '单' quotes"),
        ("Ｆｕｌｌ　ｗｉｄｔｈ　１２３！", "Full width 123!"),
        ("cafe\u{301} e\u{301} ﬁ", "café é fi"),
        (
            "tab\tnew\nline\r\u{a0}no-break\u{200b}zero\u{3000}wide\u{feff}\u{2028}separator",
            "tab new line no-break\u{200b}zero wide separator",
        ),
        ("\0\u{1}\u{fffd} control", "\u{fffd} control"),
        ("\u{1b}[1;31mred\u{1b}[0m \u{85} \u{93}quoted\u{94} ﾊﾝｶｸ", "red … \"quoted\" ハンカク"),
        ("schÃ¶ne GrÃ¼ÃŸe aus MÃ¼nchen", "schöne Grüße aus München"),
        ("The Mona Lisa doesnÃƒÂ¢Ã¢â€šÂ¬Ã¢â€žÂ¢t have eyebrows.", "The Mona Lisa doesn't have eyebrows."),
        ("âœ” no problems â€” lâ€™humanitÃ©", "✔ no problems — l'humanité"),
        ("&lt;b&gt; &amp;amp; &amp;lt; &amp;amp;amp;", "<b> & < &"),
        ("<p>1 &lt; 2</p>\nthen &lt; 3", "<p>1 < 2</p> then < 3"),
        ("  many   spaces \u{a0}\u{3000} \n\n and\u{1c}\u{1d}lines\u{85} ", "many spaces andlines…"),
        (
            "&copy 2020 &#8364; &#x4e2d;&#22269 &notit; &unknown; & &#0; &#128; &#xD800; &Eacute;&EACUTE;",
            "© 2020 € 中国 ¬it; &unknown; & \u{fffd} € \u{fffd} ÉÉ",
        ),
    ];

    #[test]
    fn texts_are_cleaned_as_open_clip_does() {
        let cleaned = CLEANED.map(|(text, wanted)| (wanted, Cleaning::OpenClip.apply(text).into_owned()));
        let differing: Vec<_> = cleaned.iter().filter(|(wanted, got)| got != wanted).collect();
        assert!(differing.is_empty(), "{differing:#?}");
    }
}
