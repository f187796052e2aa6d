//! What of a text does not reach the encoder.

use super::TextTokenizer;
use crate::{Error, Result};

/// What stands for words that a vocabulary lacks, by what it is called where there is such a token. Byte pairs spell every text.
const UNKNOWN: [&str; 2] = ["[UNK]", "<unk>"];

/// What of a text an encoder does not see.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Overlooked {
    /// The end of the text, where it has more tokens than the encoder takes.
    pub cut_off: String,
    /// Whether the vocabulary lacks every piece of the text.
    pub is_unknown: bool,
}

impl Overlooked {
    /// What several encoders that read the same text leave out between them: the most that one of them cuts off, and that all know none of
    /// it.
    pub(in crate::text) fn of_all(all: impl IntoIterator<Item = Result<Self>>) -> Result<Self> {
        let joined = |one: Self, other: Self| Self {
            is_unknown: one.is_unknown && other.is_unknown,
            cut_off: if one.cut_off.len() < other.cut_off.len() { other.cut_off } else { one.cut_off },
        };
        let mut all = all.into_iter();
        let first = all.next().unwrap_or_else(|| Ok(Self::default()))?;
        all.try_fold(first, |so_far, next| Ok(joined(so_far, next?)))
    }
}

impl TextTokenizer {
    /// Says what of a text [`TextTokenizer::encode`] leaves out.
    ///
    /// Errors: as [`TextTokenizer::encode`].
    pub fn overlooked(&self, text: &str) -> Result<Overlooked> {
        let failed = |error: tokenizers::Error| Error::Invalid { path: self.path.clone(), reason: error.to_string() };
        // Not the fast way: it does not know where in the text a piece is from.
        let encoding = self.inner.encode(text, true).map_err(failed)?;
        let pieces = || {
            let real = encoding.get_special_tokens_mask().iter().zip(encoding.get_attention_mask());
            encoding.get_offsets().iter().zip(encoding.get_ids()).zip(real).filter(|(_, (special, seen))| **special == 0 && **seen == 1)
        };
        let mut cut_off = "";
        if !encoding.get_overflowing().is_empty() {
            let end = pieces().map(|(((_, end), _), _)| *end).max().unwrap_or_default();
            // A byte pair may end within a character, which is then not seen as a whole.
            let end = (0..=end.min(text.len())).rev().find(|at| text.is_char_boundary(*at)).unwrap_or_default();
            cut_off = text[end..].trim();
        }
        let unknown = UNKNOWN.iter().find_map(|token| self.inner.token_to_id(token));
        let is_unknown = pieces().next().is_some() && unknown.is_some_and(|unknown| pieces().all(|((_, id), _)| *id == unknown));
        Ok(Overlooked { cut_off: cut_off.to_owned(), is_unknown })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn end_of_a_long_text_is_cut_off_and_a_short_one_is_whole() {
        // Start, end and four characters.
        let tokenizer = TextTokenizer::chinese_characters(6).unwrap();
        let of = |text: &str| tokenizer.overlooked(text).unwrap();
        assert_eq!(of("红色圆形"), Overlooked::default());
        assert_eq!(of("红色 圆形，白色 背景").cut_off, "，白色 背景");
        assert_eq!(of(""), Overlooked::default());
        let clip = TextTokenizer::clip_published(49407, 6).unwrap();
        assert_eq!(clip.overlooked("A big red circle on white").unwrap().cut_off, "on white");
        assert_eq!(clip.overlooked("a big red circle").unwrap(), Overlooked::default());
    }

    #[test]
    fn text_without_a_known_piece_is_told_and_one_with_any_is_not() {
        let tokenizer = TextTokenizer::chinese_characters(12).unwrap();
        let is_unknown = |text: &str| tokenizer.overlooked(text).unwrap().is_unknown;
        assert!(is_unknown("a red circle") && is_unknown("สวัสดี"));
        assert!(!is_unknown("a 红 circle") && !is_unknown(""));
        assert!(!TextTokenizer::clip_published(49407, 12).unwrap().overlooked("สวัสดี").unwrap().is_unknown, "bytes spell it");
    }

    #[test]
    fn several_encoders_leave_out_the_most_that_one_does() {
        let of = |cut_off: &str, is_unknown| Ok(Overlooked { cut_off: cut_off.into(), is_unknown });
        let both = Overlooked::of_all([of("b", true), of("ab", false)]).unwrap();
        assert_eq!(both, Overlooked { cut_off: "ab".into(), is_unknown: false });
        assert_eq!(Overlooked::of_all([]).unwrap(), Overlooked::default());
    }
}
