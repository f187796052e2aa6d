//! Which captions of a sample count, and what cleaning leaves of them: a language's defaults, each of which a job file may replace.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::checks::Checks;

/// A language whose defaults are known.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Language {
    /// Chinese: the rules of the published trainer, to the letter.
    #[default]
    Zh,
    /// Japanese. Kana make a caption native, as Chinese captions have none.
    Ja,
    /// Korean.
    Ko,
    /// Russian.
    Ru,
    /// Italian. No script tells it from English, so the key does.
    It,
}

/// How a native caption is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum NativeBy {
    /// By a character of the language's script in it.
    Script,
    /// By its key: it is there and more than white space.
    Key,
}

/// Some characters: a script's name, or the first and the last of a range of code points.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum Script {
    /// One of [`Script::NAMES`].
    Name(#[schemars(extend("enum" = Script::NAMES))] String),
    /// Code points, both ends included.
    Range([u32; 2]),
}

/// Ranges of code points, both ends included.
pub type Ranges = Vec<[u32; 2]>;

/// The captions of a job's samples. A field that is left out is the language's.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct CaptionsSection {
    /// Whose defaults the other fields have.
    pub language: Language,
    /// Keys of captions written in the language, tried list by list; of each list the first key that a sample has counts.
    pub native_keys: Option<Vec<Vec<String>>>,
    /// How such a caption is known to be in the language.
    pub native_by: Option<NativeBy>,
    /// Characters of which one makes a caption native: scripts by name, or the first and the last of some code points.
    pub script: Option<Vec<Script>>,
    /// Key of the caption that says the same as `english_key`, mostly translated by machine.
    pub parallel_key: Option<String>,
    /// Key of the English caption.
    pub english_key: Option<String>,
    /// Characters of a native caption that cleaning keeps, as in `script`.
    pub keep: Option<Vec<Script>>,
    /// Further characters that it keeps. With a space among them, white space is one space wherever it stands between words.
    pub keep_punctuation: Option<String>,
    /// Whether cleaning turns traditional Chinese characters into simplified ones.
    pub simplify: Option<bool>,
}

/// The rules that a [`CaptionsSection`] comes to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CaptionRules {
    /// Keys of native captions: of each list the first that is there counts, and the first list whose caption is native wins.
    pub native_keys: Vec<Vec<String>>,
    /// How a native caption is known.
    pub native_by: NativeBy,
    /// Characters of which one makes a caption native, where the script tells.
    pub script: Ranges,
    /// Key of the parallel caption.
    pub parallel_key: String,
    /// Key of the English caption.
    pub english_key: String,
    /// Characters that cleaning keeps.
    pub keep: Ranges,
    /// Further ones.
    pub keep_punctuation: String,
    /// Whether traditional characters become simplified.
    pub simplify: bool,
}

/// Letters with and without accents, and ligatures.
const LATIN: &[[u32; 2]] = &[
    [0x41, 0x5A],
    [0x61, 0x7A],
    [0xAA, 0xAA],
    [0xBA, 0xBA],
    [0xC0, 0xD6],
    [0xD8, 0xF6],
    [0xF8, 0x24F],
    [0x1E00, 0x1EFF],
    [0xFB00, 0xFB06],
];
const CYRILLIC: &[[u32; 2]] = &[[0x400, 0x52F], [0x1C80, 0x1C8A], [0x2DE0, 0x2DFF], [0xA640, 0xA69F]];
const HAN: &[[u32; 2]] = &[
    [0x2E80, 0x2FD5],
    [0x3005, 0x3007],
    [0x3021, 0x3029],
    [0x3038, 0x303B],
    [0x3400, 0x4DBF],
    [0x4E00, 0x9FFF],
    [0xF900, 0xFAD9],
    [0x2_0000, 0x3_FFFD],
];
/// With the signs of a long vowel and of voicing; without the middle dot, which Chinese texts use too.
const KANA: &[[u32; 2]] = &[
    [0x3041, 0x3096],
    [0x3099, 0x309F],
    [0x30A1, 0x30FA],
    [0x30FC, 0x30FF],
    [0x31F0, 0x31FF],
    [0x32D0, 0x32FE],
    [0x3300, 0x3357],
    [0xFF66, 0xFF9F],
];
const HANGUL: &[[u32; 2]] = &[
    [0x1100, 0x11FF],
    [0x302E, 0x302F],
    [0x3131, 0x318E],
    [0x3200, 0x321E],
    [0x3260, 0x327E],
    [0xA960, 0xA97C],
    [0xAC00, 0xD7A3],
    [0xD7B0, 0xD7FB],
    [0xFFA0, 0xFFDC],
];

const NAMED: &[(&str, &[[u32; 2]])] = &[
    // The block that the published trainer looks for.
    ("cjk", &[[0x4E00, 0x9FFF]]),
    ("han", HAN),
    ("kana", KANA),
    ("hangul", HANGUL),
    ("cyrillic", CYRILLIC),
    ("latin", LATIN),
    ("digits", &[[0x30, 0x39]]),
    // Of texts that have an accent as a character of its own; no script by themselves.
    ("accents", &[[0x300, 0x36F]]),
];

impl Script {
    /// Names that stand for ranges.
    pub const NAMES: [&'static str; 8] = ["cjk", "han", "kana", "hangul", "cyrillic", "latin", "digits", "accents"];

    fn named(name: &str) -> Self {
        Self::Name(name.to_owned())
    }

    fn ranges(&self) -> &[[u32; 2]] {
        match self {
            Self::Name(name) => NAMED.iter().find(|(known, _)| known == name).map_or(&[], |(_, ranges)| ranges),
            Self::Range(range) => std::slice::from_ref(range),
        }
    }

    fn problem(&self) -> Option<String> {
        match self {
            Self::Name(name) if !Self::NAMES.contains(&name.as_str()) => Some(format!(
                "`{name}` is no script known here: give one of {}, or code points as [0x4E00, 0x9FFF]",
                Self::NAMES.join(", ")
            )),
            Self::Range([from, to]) if from > to || *to > u32::from(char::MAX) => {
                Some(format!("[0x{from:X}, 0x{to:X}] must be two code points up to 0x10FFFF, the smaller first"))
            }
            _ => None,
        }
    }
}

impl Language {
    /// The language's own rules.
    fn defaults(self) -> CaptionRules {
        let code = match self {
            Self::Zh => "zh",
            Self::Ja => "ja",
            Self::Ko => "ko",
            Self::Ru => "ru",
            Self::It => "it",
        };
        let own = |key: &str| format!("{key}_{code}");
        let ranges = |names: &[&str]| resolve(&names.iter().map(|name| Script::named(name)).collect::<Vec<_>>());
        let (script, keep, keep_punctuation) = match self {
            // Cleaning keeps less than makes a caption Chinese, as in the published trainer.
            Self::Zh => (ranges(&["cjk"]), [vec![[0x4E00, 0x9FA5]], ranges(&["digits"])].concat(), ",.!?:;，。！？：；“”"),
            Self::Ja => (ranges(&["kana"]), ranges(&["kana", "han", "digits"]), ",.!?:;、。，．！？：；「」『』・〜“”"),
            Self::Ko => (ranges(&["hangul"]), ranges(&["hangul", "digits"]), " ,.!?:;'\"“”‘’()~-·"),
            Self::Ru => (ranges(&["cyrillic"]), ranges(&["cyrillic", "accents", "digits"]), " ,.!?:;'\"«»„“”()-–—"),
            Self::It => (ranges(&["latin"]), ranges(&["latin", "accents", "digits"]), " ,.!?:;'’\"«»“”()-–—"),
        };
        CaptionRules {
            native_keys: match self {
                // `caption_ori` and `caption_ori_en` may be of any language: without a script that tells, they cannot be trusted.
                Self::It => vec![vec![own("caption_ori")]],
                _ => vec![vec!["caption_ori".into(), own("caption_ori")], vec!["caption_ori_en".into()]],
            },
            native_by: if self == Self::It { NativeBy::Key } else { NativeBy::Script },
            script,
            parallel_key: own("caption"),
            english_key: "caption_en".into(),
            keep,
            keep_punctuation: keep_punctuation.into(),
            simplify: self == Self::Zh,
        }
    }
}

fn resolve(scripts: &[Script]) -> Ranges {
    scripts.iter().flat_map(Script::ranges).copied().collect()
}

impl CaptionsSection {
    /// The rules: the language's, with what the section says in their place.
    #[must_use]
    pub fn rules(&self) -> CaptionRules {
        let own = self.language.defaults();
        CaptionRules {
            native_keys: self.native_keys.clone().unwrap_or(own.native_keys),
            native_by: self.native_by.unwrap_or(own.native_by),
            script: self.script.as_deref().map_or(own.script, resolve),
            parallel_key: self.parallel_key.clone().unwrap_or(own.parallel_key),
            english_key: self.english_key.clone().unwrap_or(own.english_key),
            keep: self.keep.as_deref().map_or(own.keep, resolve),
            keep_punctuation: self.keep_punctuation.clone().unwrap_or(own.keep_punctuation),
            simplify: self.simplify.unwrap_or(own.simplify),
        }
    }

    pub(super) fn check(&self, checks: &mut Checks) {
        for (field, scripts) in [("script", &self.script), ("keep", &self.keep)] {
            for problem in scripts.iter().flatten().filter_map(Script::problem) {
                checks.problem(format!("data.captions.{field}: {problem}"));
            }
        }
        let rules = self.rules();
        if rules.native_by == NativeBy::Script && rules.script.is_empty() && self.script.as_ref().is_some_and(Vec::is_empty) {
            checks.problem("data.captions.script is empty: no caption would be native; leave it out for the language's own, or set native_by = \"key\"");
        }
        if rules.keep.is_empty() && self.keep.as_ref().is_some_and(Vec::is_empty) {
            checks.problem("data.captions.keep is empty: cleaning would empty every native caption; leave it out for the language's own");
        }
        if rules.native_keys.iter().any(Vec::is_empty) {
            checks
                .problem("data.captions.native_keys has an empty list: name a key in each, as in [[\"caption_ori\", \"caption_ori_zh\"]]");
        }
        for (field, key) in [("parallel_key", &rules.parallel_key), ("english_key", &rules.english_key)] {
            if key.is_empty() {
                checks.problem(format!("data.captions.{field} is empty: name a key of the samples' json, or leave it out"));
            }
        }
        if rules.parallel_key == rules.english_key {
            let key = &rules.english_key;
            checks.problem(format!(
                "data.captions.parallel_key and english_key are both `{key}`: the teacher would read the student's caption"
            ));
        }
        if rules.native_by == NativeBy::Key && rules.native_keys.iter().flatten().any(|key| *key == rules.english_key) {
            let key = &rules.english_key;
            checks.problem(format!(
                "data.captions.native_keys has `{key}`, the English caption: with native_by = \"key\" it would count as native"
            ));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn section(text: &str) -> CaptionsSection {
        toml::from_str(text).unwrap()
    }

    fn problems(text: &str) -> Vec<String> {
        let mut checks = Checks::default();
        section(text).check(&mut checks);
        checks.problems
    }

    #[test]
    fn defaults_are_the_published_rules_for_chinese() {
        let rules = section("").rules();
        assert_eq!(rules.native_keys, [vec!["caption_ori", "caption_ori_zh"], vec!["caption_ori_en"]]);
        assert_eq!((rules.native_by, rules.script.as_slice(), rules.simplify), (NativeBy::Script, &[[0x4E00, 0x9FFF]][..], true));
        assert_eq!((rules.parallel_key.as_str(), rules.english_key.as_str()), ("caption_zh", "caption_en"));
        assert_eq!(rules.keep, [[0x4E00, 0x9FA5], [0x30, 0x39]]);
    }

    #[test]
    fn template_shows_the_rules_for_chinese() {
        let template = crate::job::TEMPLATE;
        let shown = template.split("[data.captions]").nth(1).and_then(|rest| rest.split("\n\n").next()).unwrap();
        let shown = section(&shown.replace("\n# ", "\n"));
        let CaptionsSection { language, native_keys, native_by, script, parallel_key, english_key, keep, keep_punctuation, simplify } =
            &shown;
        assert!(*language == Language::Zh && native_keys.is_some() && native_by.is_some() && script.is_some() && parallel_key.is_some());
        assert!(english_key.is_some() && keep.is_some() && keep_punctuation.is_some() && simplify.is_some());
        assert_eq!(shown.rules(), section("").rules());
    }

    #[test]
    fn what_the_section_says_replaces_the_languages_own() {
        let rules = section("language = \"ru\"\nparallel_key = \"russo\"\nkeep = [\"cyrillic\", [0x41, 0x5A]]").rules();
        assert_eq!((rules.parallel_key.as_str(), rules.simplify), ("russo", false));
        assert_eq!(rules.native_keys[0], ["caption_ori", "caption_ori_ru"]);
        assert!(rules.keep.contains(&[0x41, 0x5A]) && rules.script == CYRILLIC);
    }

    #[test]
    fn languages_hold_their_own_relations() {
        for language in ["zh", "ja", "ko", "ru", "it"] {
            let text = format!("language = \"{language}\"");
            assert!(problems(&text).is_empty(), "{language}");
            assert_eq!(section(&text).rules().parallel_key, format!("caption_{language}"));
        }
        assert!(Script::NAMES.iter().all(|name| !Script::named(name).ranges().is_empty()));
        assert_eq!(Script::NAMES.len(), NAMED.len());
    }

    #[test]
    fn what_cannot_work_is_named_with_what_to_do() {
        for (text, wanted) in [
            ("script = [\"hangull\"]", "data.captions.script: `hangull` is no script known here: give one of cjk, han"),
            ("keep = [[0x9FFF, 0x4E00]]", "data.captions.keep: [0x9FFF, 0x4E00] must be two code points"),
            ("keep = [[0, 0x110000]]", "up to 0x10FFFF"),
            ("script = []", "data.captions.script is empty"),
            ("keep = []", "data.captions.keep is empty"),
            ("native_keys = [[]]", "data.captions.native_keys has an empty list"),
            ("parallel_key = \"\"", "data.captions.parallel_key is empty"),
            ("parallel_key = \"caption_en\"", "are both `caption_en`"),
            ("language = \"it\"\nnative_keys = [[\"caption_en\"]]", "data.captions.native_keys has `caption_en`"),
        ] {
            let problems = problems(text);
            assert!(problems.len() == 1 && problems[0].contains(wanted), "{text}: {problems:?}");
        }
        assert!(problems("native_keys = []").is_empty(), "data without native captions");
    }
}
