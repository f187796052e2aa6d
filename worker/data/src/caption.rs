//! Which caption a sample trains with, and its cleaning.

use std::ops::RangeInclusive;

use ferrous_opencc::OpenCC;
use ferrous_opencc::config::BuiltinConfig;

use crate::{Error, Result};

/// Characters that make a caption count as Chinese.
const CHINESE: RangeInclusive<char> = '\u{4E00}'..='\u{9FFF}';

/// Chinese characters that cleaning keeps. It ends before [`CHINESE`] does, as in the original trainer.
const KEPT_CHINESE: RangeInclusive<char> = '\u{4E00}'..='\u{9FA5}';

/// Punctuation that cleaning keeps.
const KEPT_PUNCTUATION: &[char] = &[',', '.', '!', '?', ':', ';', '，', '。', '！', '？', '：', '；', '“', '”'];

/// A sample's captions as found; `None` where the key is absent.
#[derive(Debug, Clone, Copy, Default)]
pub struct Found<'a> {
    /// `caption_ori`: written for the picture, in any language.
    pub original: Option<&'a str>,
    /// `caption_ori_zh`
    pub original_zh: Option<&'a str>,
    /// `caption_ori_en`
    pub original_en: Option<&'a str>,
    /// `caption_zh`: often translated by machine.
    pub zh: Option<&'a str>,
    /// `caption_en`
    pub en: Option<&'a str>,
}

/// What a sample trains with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Caption {
    /// For the student.
    pub prompt: String,
    /// For the teacher; may be empty.
    pub english: String,
    /// Whether the prompt is a native caption without trusted English beside it: it trains by the diffusion loss, others by distillation.
    pub native: bool,
}

/// Cleans captions; holds the tables from traditional to simplified characters.
pub struct Cleaner {
    tables: OpenCC,
    /// Whether a prompt that cleaning empties is dropped.
    strict: bool,
}

impl Cleaner {
    /// Loads the tables that are compiled in: OpenCC's `t2s`. If `strict`, prompts of which cleaning leaves no Chinese are dropped; the
    /// published trainer trains them as they are then, mostly empty.
    ///
    /// Errors: [`Error::Tables`] if they are damaged.
    pub fn new(strict: bool) -> Result<Self> {
        let tables = OpenCC::from_config(BuiltinConfig::T2s).map_err(|error| Error::Tables(error.to_string()))?;
        Ok(Self { tables, strict })
    }

    /// Deletes all but Chinese characters, digits and a few marks of punctuation, then turns traditional into simplified characters.
    #[must_use]
    pub fn clean(&self, text: &str) -> String {
        let kept: String =
            text.chars().filter(|&c| KEPT_CHINESE.contains(&c) || c.is_ascii_digit() || KEPT_PUNCTUATION.contains(&c)).collect();
        self.tables.convert(&kept)
    }

    /// Chooses the prompt. The first of the original captions that holds Chinese makes the sample native; without one it is parallel data.
    ///
    /// Errors: the reason why the sample is to be dropped. That is a prompt of which cleaning left no Chinese (if strict), or parallel data of
    /// which exactly one side is empty: its two prompts do not mean the same.
    pub fn choose(&self, found: &Found<'_>) -> Result<Caption, &'static str> {
        // `caption_ori_zh` counts only where `caption_ori` is absent; `caption_ori_en` counts either way.
        let translated = found.original_zh.filter(|_| found.original.is_none());
        let native = [found.original, translated, found.original_en].into_iter().flatten().find(|text| has_chinese(text));
        let english = found.en.unwrap_or_default();
        if let Some(native) = native {
            let prompt = self.clean(native);
            return if !self.strict || prompt.contains(|c| CHINESE.contains(&c)) {
                Ok(Caption { prompt, english: english.to_owned(), native: true })
            } else {
                Err("cleaning leaves no Chinese in the caption")
            };
        }
        let prompt = found.zh.unwrap_or_default();
        match (prompt.trim().is_empty(), english.trim().is_empty()) {
            (true, false) => Err("caption_zh is empty, caption_en is not"),
            (false, true) => Err("caption_en is empty, caption_zh is not"),
            _ => Ok(Caption { prompt: prompt.to_owned(), english: english.to_owned(), native: false }),
        }
    }
}

fn has_chinese(text: &str) -> bool {
    text.contains(|c| CHINESE.contains(&c))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn choose(found: Found<'_>) -> Result<(String, String, bool), &'static str> {
        let caption = Cleaner::new(true).unwrap().choose(&found)?;
        Ok((caption.prompt, caption.english, caption.native))
    }

    fn native(prompt: &str) -> Result<(String, String, bool), &'static str> {
        Ok((prompt.into(), String::new(), true))
    }

    #[test]
    fn caption_rule_1_original_with_chinese() {
        let found = Found { original: Some("a 红 cat"), original_zh: Some("蓝"), zh: Some("绿"), en: Some("red"), ..Found::default() };
        assert_eq!(choose(found), Ok(("红".into(), "red".into(), true)));
    }

    #[test]
    fn caption_rule_2_original_zh_only_where_original_is_absent() {
        assert_eq!(choose(Found { original_zh: Some("蓝 car"), ..Found::default() }), native("蓝"));
        // `caption_ori` is there, though without Chinese: rule 2 does not apply.
        let found = Found { original: Some("car"), original_zh: Some("蓝"), zh: Some("绿 car"), en: Some("green"), ..Found::default() };
        assert_eq!(choose(found), Ok(("绿 car".into(), "green".into(), false)));
    }

    #[test]
    fn caption_rule_3_original_en_with_chinese() {
        assert_eq!(choose(Found { original: Some("car"), original_en: Some("黄car"), ..Found::default() }), native("黄"));
    }

    #[test]
    fn caption_rule_4_parallel_captions_stay_as_they_are() {
        let found = Found { original_en: Some("x"), zh: Some("紅 car、"), en: Some(" Red"), ..Found::default() };
        assert_eq!(choose(found), Ok(("紅 car、".into(), " Red".into(), false)));
        // Both empty: a sample without a prompt, which is honest data.
        assert_eq!(choose(Found::default()), Ok((String::new(), String::new(), false)));
    }

    #[test]
    fn parallel_samples_with_one_side_empty_are_dropped() {
        assert!(choose(Found { zh: Some("红"), ..Found::default() }).unwrap_err().contains("caption_en is empty"));
        assert!(choose(Found { zh: Some(" "), en: Some("red"), ..Found::default() }).unwrap_err().contains("caption_zh is empty"));
    }

    #[test]
    fn prompts_emptied_by_cleaning_are_dropped() {
        assert!(choose(Found { original: Some("龦"), ..Found::default() }).is_err());
        assert!(choose(Found { original: Some("鿿 3, 4!"), ..Found::default() }).is_err());
        let lenient = Cleaner::new(false).unwrap();
        let caption = lenient.choose(&Found { original: Some("龦"), ..Found::default() }).unwrap();
        assert!(caption.native && caption.prompt.is_empty());
    }

    #[test]
    fn cleaning_keeps_chinese_digits_and_some_punctuation() {
        let cleaner = Cleaner::new(true).unwrap();
        assert_eq!(cleaner.clean("a1２ ,.!?:;，。！？：；“”、…龥龦（猫）"), "1,.!?:;，。！？：；“”龥猫");
    }

    /// From OpenCC 1.2.0 (Python): `OpenCC("t2s").convert(text)`. The tables agree with it on every character that cleaning keeps.
    #[test]
    fn traditional_becomes_simplified_by_longest_match() {
        let cleaner = Cleaner::new(true).unwrap();
        for (traditional, simplified) in T2S {
            assert_eq!(cleaner.clean(traditional), *simplified);
        }
    }

    const T2S: &[(&str, &str)] = &[
        ("漢字轉換：乾燥乾隆，後天皇后，頭髮發財", "汉字转换：干燥乾隆，后天皇后，头发发财"),
        ("覆蓋著雪的屋頂，天翻地覆", "覆盖著雪的屋顶，天翻地覆"),
        ("藉口與憑藉，著名的著作", "借口与凭借，著名的著作"),
        ("瞭解一目瞭然，瞭望塔", "了解一目了然，瞭望塔"),
        ("沈默的瀋陽，徵求長征", "沉默的沈阳，征求长征"),
        ("於是樊於期，餘下閒餘", "于是樊於期，余下闲余"),
        ("甚麼？這麼多麵條！裏面有鐘", "甚么？这么多面条！里面有钟"),
        ("已是简体的句子，不变。", "已是简体的句子，不变。"),
    ];
}
