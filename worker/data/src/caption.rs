//! Which caption a sample trains with, and its cleaning.

use ferrous_opencc::OpenCC;
use ferrous_opencc::config::BuiltinConfig;
use peapod_proto::job::{CaptionRules, NativeBy};

use crate::sample::Rule;
use crate::{Error, Result};

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

/// Chooses and cleans captions by a job's rules; holds the tables from traditional to simplified characters.
pub struct Cleaner {
    rules: CaptionRules,
    /// Where the rules ask for them.
    tables: Option<OpenCC>,
    /// Whether a prompt that cleaning empties is dropped, and a sample without captions is broken.
    strict: bool,
}

impl Cleaner {
    /// Loads the tables that are compiled in, OpenCC's `t2s`, if the rules need them. If `strict`, prompts of which cleaning leaves no
    /// character of the language are dropped, and samples in which no caption is found; the published trainer trains them as they are then,
    /// mostly empty.
    ///
    /// Errors: [`Error::Tables`] if they are damaged.
    pub fn new(rules: CaptionRules, strict: bool) -> Result<Self> {
        let load = || OpenCC::from_config(BuiltinConfig::T2s).map_err(|error| Error::Tables(error.to_string()));
        let tables = rules.simplify.then(load).transpose()?;
        Ok(Self { rules, tables, strict })
    }

    /// The rules.
    #[must_use]
    pub fn rules(&self) -> &CaptionRules {
        &self.rules
    }

    /// Deletes all but the characters that the rules keep, then turns traditional into simplified ones if they say so.
    ///
    /// Where they keep the space, words are told apart by it: any white space counts as one, and several in a row, or what deleting leaves
    /// of them, become one.
    #[must_use]
    pub fn clean(&self, text: &str) -> String {
        let keeps = |c: char| within(&self.rules.keep, c) || self.rules.keep_punctuation.contains(c);
        let kept: String = if self.rules.keep_punctuation.contains(' ') {
            let spaced = text.chars().map(|c| if c.is_whitespace() { ' ' } else { c }).filter(|&c| keeps(c)).collect::<String>();
            spaced.split(' ').filter(|word| !word.is_empty()).collect::<Vec<_>>().join(" ")
        } else {
            text.chars().filter(|&c| keeps(c)).collect()
        };
        match &self.tables {
            Some(tables) => tables.convert(&kept),
            None => kept,
        }
    }

    /// Chooses the prompt. Of each list of native keys the first that `find` has counts; the first caption among these that is native makes
    /// the sample native. Without one it is parallel data.
    ///
    /// Errors: the rule by which the sample is dropped, in words. That is a prompt of which cleaning left nothing of the language (if
    /// strict), parallel data of which neither side is there (if strict), or of which exactly one is empty: its two prompts do not mean the
    /// same. Two that are there and empty are honest data.
    pub fn choose<'a>(&self, find: impl Fn(&str) -> Option<&'a str>) -> Result<Caption, (Rule, String)> {
        let CaptionRules { native_keys, parallel_key, english_key, .. } = &self.rules;
        let (parallel, english) = (find(parallel_key), find(english_key));
        let is_bare = parallel.is_none() && english.is_none();
        let (prompt, english) = (parallel.unwrap_or_default(), english.unwrap_or_default());
        let candidates = native_keys.iter().filter_map(|keys| keys.iter().find_map(|key| Some((key, find(key)?))));
        if let Some((key, text)) = candidates.into_iter().find(|(_, text)| self.is_native(text)) {
            let prompt = self.clean(text);
            return if !self.strict || self.has_language(&prompt) {
                Ok(Caption { prompt, english: english.to_owned(), native: true })
            } else {
                Err((Rule::Emptied, format!("cleaning leaves no character of the language in {key}")))
            };
        }
        if self.strict && is_bare {
            return Err((Rule::NoCaption, format!("neither {parallel_key} nor {english_key} is in the json, nor a native caption")));
        }
        match (prompt.trim().is_empty(), english.trim().is_empty()) {
            (true, false) => Err((Rule::OneSided, format!("{parallel_key} is empty, {english_key} is not"))),
            (false, true) => Err((Rule::OneSided, format!("{english_key} is empty, {parallel_key} is not"))),
            _ => Ok(Caption { prompt: prompt.to_owned(), english: english.to_owned(), native: false }),
        }
    }

    fn is_native(&self, text: &str) -> bool {
        match self.rules.native_by {
            NativeBy::Script => text.contains(|c| within(&self.rules.script, c)),
            NativeBy::Key => !text.trim().is_empty(),
        }
    }

    /// Whether a cleaned prompt still says something.
    fn has_language(&self, prompt: &str) -> bool {
        if self.rules.script.is_empty() { !prompt.is_empty() } else { prompt.contains(|c| within(&self.rules.script, c)) }
    }
}

fn within(ranges: &[[u32; 2]], c: char) -> bool {
    ranges.iter().any(|&[from, to]| (from..=to).contains(&u32::from(c)))
}

#[cfg(test)]
mod tests {
    use peapod_proto::job::CaptionsSection;

    use super::*;

    fn cleaner(section: &str, strict: bool) -> Cleaner {
        Cleaner::new(toml::from_str::<CaptionsSection>(section).unwrap().rules(), strict).unwrap()
    }

    /// Captions by key.
    type Found<'a> = &'a [(&'a str, &'a str)];
    type Chosen = Result<(String, String, bool), (Rule, String)>;

    fn choose_with(cleaner: &Cleaner, found: Found<'_>) -> Chosen {
        let find = |key: &str| found.iter().find(|(name, _)| *name == key).map(|(_, text)| *text);
        cleaner.choose(find).map(|caption| (caption.prompt, caption.english, caption.native))
    }

    fn choose(found: Found<'_>) -> Chosen {
        choose_with(&cleaner("", true), found)
    }

    fn native(prompt: &str) -> Chosen {
        Ok((prompt.into(), String::new(), true))
    }

    #[test]
    fn caption_rule_1_original_with_chinese() {
        let found = [("caption_ori", "a 红 cat"), ("caption_ori_zh", "蓝"), ("caption_zh", "绿"), ("caption_en", "red")];
        assert_eq!(choose(&found), Ok(("红".into(), "red".into(), true)));
    }

    #[test]
    fn caption_rule_2_original_zh_only_where_original_is_absent() {
        assert_eq!(choose(&[("caption_ori_zh", "蓝 car")]), native("蓝"));
        // `caption_ori` is there, though without Chinese: rule 2 does not apply.
        let found = [("caption_ori", "car"), ("caption_ori_zh", "蓝"), ("caption_zh", "绿 car"), ("caption_en", "green")];
        assert_eq!(choose(&found), Ok(("绿 car".into(), "green".into(), false)));
    }

    #[test]
    fn caption_rule_3_original_en_with_chinese() {
        assert_eq!(choose(&[("caption_ori", "car"), ("caption_ori_en", "黄car")]), native("黄"));
    }

    #[test]
    fn caption_rule_4_parallel_captions_stay_as_they_are() {
        let found = [("caption_ori_en", "x"), ("caption_zh", "紅 car、"), ("caption_en", " Red")];
        assert_eq!(choose(&found), Ok(("紅 car、".into(), " Red".into(), false)));
        // Both empty: a sample without a prompt, which is honest data.
        let empty = Ok((String::new(), String::new(), false));
        assert_eq!(choose(&[("caption_zh", ""), ("caption_en", " ")]).map(|(prompt, _, native)| (prompt, String::new(), native)), empty);
        assert_eq!(choose(&[("caption_en", "")]), empty);
    }

    #[test]
    fn samples_without_captions_are_broken_but_for_the_published_trainer() {
        for found in [&[][..], &[("caption_ori", "car")], &[("caption", "a red circle")]] {
            let (rule, words) = choose(found).unwrap_err();
            assert_eq!((rule, rule.reason()), (Rule::NoCaption, crate::sample::Reason::Bad));
            assert_eq!(words, "neither caption_zh nor caption_en is in the json, nor a native caption");
            assert_eq!(choose_with(&cleaner("", false), found), Ok((String::new(), String::new(), false)));
        }
    }

    #[test]
    fn parallel_samples_with_one_side_empty_are_dropped() {
        let (rule, words) = choose(&[("caption_zh", "红")]).unwrap_err();
        assert!(rule == Rule::OneSided && words == "caption_en is empty, caption_zh is not", "{words}");
        let (rule, words) = choose(&[("caption_zh", " "), ("caption_en", "red")]).unwrap_err();
        assert!(rule == Rule::OneSided && words == "caption_zh is empty, caption_en is not", "{words}");
    }

    #[test]
    fn prompts_emptied_by_cleaning_are_dropped() {
        for text in ["龦", "鿿 3, 4!"] {
            let (rule, words) = choose(&[("caption_ori", text)]).unwrap_err();
            assert!(rule == Rule::Emptied && words.ends_with("in caption_ori"), "{words}");
        }
        assert_eq!(choose_with(&cleaner("", false), &[("caption_ori", "龦")]), native(""));
    }

    #[test]
    fn cleaning_keeps_chinese_digits_and_some_punctuation() {
        assert_eq!(cleaner("", true).clean("a1２ ,.!?:;，。！？：；“”、…龥龦（猫）"), "1,.!?:;，。！？：；“”龥猫");
    }

    #[test]
    fn keys_and_characters_are_the_jobs() {
        let section =
            "native_keys = [[\"alt\"]]\nparallel_key = \"zh\"\nenglish_key = \"en\"\nkeep = [\"cjk\", \"latin\"]\nsimplify = false";
        let cleaner = cleaner(section, true);
        assert_eq!(choose_with(&cleaner, &[("alt", "紅 Cat 9"), ("caption_ori", "蓝")]), native("紅Cat"));
        assert_eq!(choose_with(&cleaner, &[("zh", "红"), ("en", "red")]), Ok(("红".into(), "red".into(), false)));
    }

    /// Cases by testdata/make_caption_cases.py, which has the rules of each language in regular expressions over Unicode's own scripts.
    #[test]
    fn every_language_chooses_and_cleans_as_the_reference_in_python() {
        let cases: serde_json::Value = serde_json::from_str(include_str!("../testdata/caption_cases.json")).unwrap();
        let cases = cases.as_array().unwrap();
        assert!(cases.len() >= 60, "{}", cases.len());
        for case in cases {
            let cleaner = cleaner(&format!("language = {}", case["language"]), true);
            let find = |key: &str| case["found"].get(key).and_then(serde_json::Value::as_str);
            let chosen = match cleaner.choose(find) {
                Ok(caption) => serde_json::json!({ "prompt": caption.prompt, "english": caption.english, "native": caption.native }),
                Err((rule, _)) => serde_json::json!({ "dropped": rule.as_str() }),
            };
            assert_eq!(chosen, case["chosen"], "{case}");
        }
    }

    /// From OpenCC 1.2.0 (Python): `OpenCC("t2s").convert(text)`. The tables agree with it on every character that cleaning keeps.
    #[test]
    fn traditional_becomes_simplified_by_longest_match() {
        let cleaner = cleaner("", true);
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
