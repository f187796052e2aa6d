//! From a tar's members to a sample that can be trained: which are kept, and what is known of them before their picture is decoded.

use std::fmt;

use peapod_proto::job::{DataSection, Filter};
use serde::Deserializer;
use serde::de::{DeserializeSeed, Error as _, IgnoredAny, MapAccess, Visitor};

use crate::bucket::{self, Bucket};
use crate::caption::{Caption, Cleaner};
use crate::format::{self, Turn};
use crate::shard::RawSample;
use crate::{Error, Result, image};

/// Whether a sample that is not trained counts towards the broken ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Reason {
    /// A rule of the method leaves it out.
    Filtered,
    /// It is broken. Too many of these end the job.
    Bad,
}

/// Why a sample is not trained. The names stay what they are from one release to the next: reports are counted by them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Rule {
    /// Fewer pixels than `data.min_pixels`.
    TooSmall,
    /// No aesthetic score beside its watermark score.
    NoAesthetic,
    /// An aesthetic score below `data.min_aesthetic`.
    LowAesthetic,
    /// A watermark score above `data.max_watermark`.
    Watermark,
    /// Too wide for every bucket.
    Aspect,
    /// Parallel captions of which exactly one is empty.
    OneSided,
    /// A native caption of which cleaning leaves nothing.
    Emptied,
    /// No member `.jpg`.
    NoJpg,
    /// No member `.json`.
    NoJson,
    /// The json is none, or a key that is read has a value of another type.
    BadJson,
    /// The picture is damaged or of a kind that is not read.
    BadPicture,
    /// The picture is in another format than JPEG or PNG.
    OtherFormat,
    /// The picture's header claims more pixels than are decoded.
    HugePicture,
    /// A member is too large to be read.
    HugeMember,
    /// Two members with the same extension.
    DuplicateMember,
    /// A key that the tar had before, with other samples between.
    DuplicateKey,
    /// A name that is not UTF-8.
    BadName,
    /// A member whose bytes are not in the tar as they are.
    Sparse,
}

impl Rule {
    /// Every rule.
    pub const ALL: [Self; 18] = [
        Self::TooSmall,
        Self::NoAesthetic,
        Self::LowAesthetic,
        Self::Watermark,
        Self::Aspect,
        Self::OneSided,
        Self::Emptied,
        Self::NoJpg,
        Self::NoJson,
        Self::BadJson,
        Self::BadPicture,
        Self::OtherFormat,
        Self::HugePicture,
        Self::HugeMember,
        Self::DuplicateMember,
        Self::DuplicateKey,
        Self::BadName,
        Self::Sparse,
    ];

    /// Its name in reports: what stands before the first colon of a skipped sample's detail.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::TooSmall => "too_small",
            Self::NoAesthetic => "no_aesthetic",
            Self::LowAesthetic => "low_aesthetic",
            Self::Watermark => "watermark",
            Self::Aspect => "aspect",
            Self::OneSided => "one_sided",
            Self::Emptied => "emptied",
            Self::NoJpg => "no_jpg",
            Self::NoJson => "no_json",
            Self::BadJson => "bad_json",
            Self::BadPicture => "bad_picture",
            Self::OtherFormat => "other_format",
            Self::HugePicture => "huge_picture",
            Self::HugeMember => "huge_member",
            Self::DuplicateMember => "duplicate_member",
            Self::DuplicateKey => "duplicate_key",
            Self::BadName => "bad_name",
            Self::Sparse => "sparse",
        }
    }

    /// Whether it is a rule of the method or says that the sample is broken.
    #[must_use]
    pub fn reason(self) -> Reason {
        match self {
            Self::TooSmall | Self::NoAesthetic | Self::LowAesthetic | Self::Watermark | Self::Aspect | Self::OneSided | Self::Emptied => {
                Reason::Filtered
            }
            _ => Reason::Bad,
        }
    }

    /// The rule by which a picture with this error is passed over.
    #[must_use]
    pub fn of_picture(error: &Error) -> Self {
        match error {
            Error::PictureSize { .. } => Self::HugePicture,
            Error::PictureFormat(_) => Self::OtherFormat,
            _ => Self::BadPicture,
        }
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A sample that is not trained.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Skip {
    /// Position in the shard, in tar order.
    pub index: u32,
    /// Why.
    pub rule: Rule,
    /// Its key in the tar.
    pub key: String,
    /// The same in words.
    pub words: String,
}

impl Skip {
    /// Rule and words, as reports have them: `rule: words`.
    #[must_use]
    pub fn detail(&self) -> String {
        format!("{}: {}", self.rule, self.words)
    }
}

/// Which samples are kept.
#[derive(Debug, Clone, PartialEq)]
pub struct Rules {
    /// Sizes that are trained.
    pub buckets: Vec<Bucket>,
    filter: Filter,
    min_pixels: u64,
    min_aesthetic: f64,
    max_watermark: f64,
    watermark_key: String,
    aesthetic_key: String,
    /// Keys of which one exempts a sample from the scores.
    exempting_keys: Vec<String>,
    /// Keys whose values are captions.
    caption_keys: Vec<String>,
    exif_rotate: bool,
}

impl Rules {
    /// The rules of a job.
    #[must_use]
    pub fn new(data: &DataSection) -> Self {
        let captions = data.captions.rules();
        let mut caption_keys: Vec<String> = captions.native_keys.concat();
        caption_keys.extend([captions.parallel_key, captions.english_key]);
        Self {
            buckets: data.buckets.iter().map(|&[width, height]| Bucket { width, height }).collect(),
            filter: data.filter,
            min_pixels: data.min_pixels,
            min_aesthetic: data.min_aesthetic,
            max_watermark: data.max_watermark,
            watermark_key: data.watermark_key.clone(),
            aesthetic_key: data.aesthetic_key.clone(),
            // `caption_ori` and `caption_ori_zh`, though not `caption_ori_en`.
            exempting_keys: captions.native_keys.into_iter().next().unwrap_or_default(),
            caption_keys,
            exif_rotate: data.exif_rotate,
        }
    }

    /// Why the method leaves a sample out, if it does. Samples without a watermark score are all kept.
    fn leaves_out(&self, metadata: &Metadata, (width, height): (u32, u32)) -> Option<(Rule, String)> {
        let watermark = metadata.watermark?;
        match self.filter {
            Filter::None => return None,
            Filter::Sd15 => {}
            Filter::Sdxl => {
                if u64::from(width) * u64::from(height) < self.min_pixels {
                    return Some((Rule::TooSmall, format!("{width} x {height} is less than {} pixels", self.min_pixels)));
                }
                // Native captions are scarce: their pictures need not be beautiful.
                if self.exempting_keys.iter().any(|key| metadata.caption(key).is_some()) {
                    return None;
                }
            }
        }
        let (aesthetic_key, watermark_key) = (&self.aesthetic_key, &self.watermark_key);
        match metadata.aesthetic {
            None => return Some((Rule::NoAesthetic, format!("{aesthetic_key} is missing"))),
            Some(score) if score < self.min_aesthetic => {
                return Some((Rule::LowAesthetic, format!("{aesthetic_key} {score} is below {}", self.min_aesthetic)));
            }
            Some(_) => {}
        }
        (watermark > self.max_watermark).then(|| (Rule::Watermark, format!("{watermark_key} {watermark} is above {}", self.max_watermark)))
    }
}

/// A sample before its picture is decoded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Encoded {
    /// The picture.
    pub jpeg: Vec<u8>,
    /// How the decoded picture is turned.
    pub turn: Turn,
    /// Width and height from its header, turned.
    pub size: (u32, u32),
    /// Index of the bucket it goes to.
    pub bucket: usize,
    /// What it trains with.
    pub caption: Caption,
}

/// What is read of a sample's json. A key whose value is null counts as absent; of a key given twice the last counts.
#[derive(Debug, Default)]
struct Metadata {
    captions: Vec<(String, String)>,
    watermark: Option<f64>,
    aesthetic: Option<f64>,
}

impl Metadata {
    /// Errors: what is wrong, with the key.
    fn parse(json: &[u8], rules: &Rules) -> Result<Self, serde_json::Error> {
        // Some programs begin UTF-8 with a mark of byte order.
        let json = json.strip_prefix(b"\xef\xbb\xbf").unwrap_or(json);
        let mut deserializer = serde_json::Deserializer::from_slice(json);
        let metadata = MetadataOf(rules).deserialize(&mut deserializer)?;
        deserializer.end()?;
        Ok(metadata)
    }

    fn caption(&self, key: &str) -> Option<&str> {
        self.captions.iter().rev().find(|(name, _)| name == key).map(|(_, text)| text.as_str())
    }
}

/// Reads the keys that rules name and passes over the rest, however large that is.
struct MetadataOf<'a>(&'a Rules);

impl<'de> DeserializeSeed<'de> for MetadataOf<'_> {
    type Value = Metadata;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Metadata, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for MetadataOf<'_> {
    type Value = Metadata;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object with captions")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Metadata, A::Error> {
        let Self(rules) = self;
        let mut metadata = Metadata::default();
        while let Some(key) = map.next_key::<String>()? {
            let named = |error: A::Error| A::Error::custom(format!("{key}: {error}"));
            if key == rules.watermark_key {
                metadata.watermark = map.next_value().map_err(named)?;
            } else if key == rules.aesthetic_key {
                metadata.aesthetic = map.next_value().map_err(named)?;
            } else if rules.caption_keys.contains(&key) {
                let text: Option<String> = map.next_value().map_err(named)?;
                metadata.captions.retain(|(name, _)| *name != key);
                metadata.captions.extend(text.map(|text| (key, text)));
            } else {
                map.next_value::<IgnoredAny>()?;
            }
        }
        Ok(metadata)
    }
}

/// Decides on a sample from its json and its picture's header.
///
/// Errors: the report of a sample that is left out or broken.
pub fn examine(raw: RawSample, rules: &Rules, cleaner: &Cleaner) -> Result<Encoded, Skip> {
    let RawSample { index, key, jpg, json, fault } = raw;
    let examine = move || -> Result<Encoded, (Rule, String)> {
        if let Some(fault) = fault {
            return Err(fault);
        }
        let jpeg = jpg.ok_or_else(|| (Rule::NoJpg, "no member .jpg".into()))?;
        let json = json.ok_or_else(|| (Rule::NoJson, "no member .json".into()))?;
        let metadata = Metadata::parse(&json, rules).map_err(|error| (Rule::BadJson, error.to_string()))?;
        let size = image::size(&jpeg).map_err(|error| (Rule::of_picture(&error), error.to_string()))?;
        let turn = if rules.exif_rotate { format::turn(&jpeg) } else { Turn::NONE };
        let size = turn.size(size);
        if let Some(left_out) = rules.leaves_out(&metadata, size) {
            return Err(left_out);
        }
        let Some(bucket) = bucket::nearest(&rules.buckets, size) else {
            return Err((Rule::Aspect, format!("{} x {} is too wide for every bucket", size.0, size.1)));
        };
        let caption = cleaner.choose(|key| metadata.caption(key))?;
        Ok(Encoded { jpeg, turn, size, bucket, caption })
    };
    examine().map_err(|(rule, words)| Skip { index, rule, key, words })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::testing::{data_section, jpeg_of};

    /// A job's data section with these fields.
    fn section(fields: &str) -> DataSection {
        toml::from_str(&format!("shards = []\n{fields}")).unwrap()
    }

    fn examine_raw(raw: RawSample, data: &DataSection) -> Result<Encoded, Skip> {
        examine(raw, &Rules::new(data), &Cleaner::new(data.captions.rules(), data.strict_clean).unwrap())
    }

    /// Examines a picture of this size with this json.
    fn examine_by(data: &DataSection, size: (u32, u32), json: &[u8]) -> Result<Encoded, Skip> {
        let jpg = Some(jpeg_of(size.0, size.1, [10, 20, 30]));
        examine_raw(RawSample { index: 4, key: "k".into(), jpg, json: Some(json.to_vec()), fault: None }, data)
    }

    fn examine_json(size: (u32, u32), json: &str) -> Result<Encoded, Skip> {
        examine_by(&data_section(), size, json.as_bytes())
    }

    fn skipped(size: (u32, u32), json: &str) -> (Rule, String) {
        let skip = examine_json(size, json).unwrap_err();
        assert_eq!((skip.index, skip.key.as_str()), (4, "k"));
        (skip.rule, skip.words)
    }

    const LARGE: (u32, u32) = (640, 640);
    const SMALL: (u32, u32) = (64, 64);

    #[test]
    fn without_a_watermark_score_nothing_is_filtered() {
        let sample = examine_json(SMALL, r#"{"caption_zh": "红", "caption_en": "red", "aesthetic_score": 1, "other": [1]}"#).unwrap();
        assert_eq!((sample.size, sample.bucket), (SMALL, 4));
        assert_eq!(sample.caption, Caption { prompt: "红".into(), english: "red".into(), native: false });
    }

    /// Json of a parallel sample with these scores.
    fn scored(aesthetic: &str, watermark: &str) -> String {
        format!(r#"{{"caption_zh": "红", "caption_en": "red", "watermark": {watermark} {aesthetic}}}"#)
    }

    #[test]
    fn with_a_watermark_score_size_beauty_and_watermark_count() {
        assert!(examine_json(LARGE, &scored(r#", "aesthetic_score": 6"#, "0.5")).is_ok());
        for (size, aesthetic, watermark, rule, wanted) in [
            (SMALL, r#", "aesthetic_score": 9"#, "0.1", Rule::TooSmall, "64 x 64 is less than 409600 pixels"),
            (LARGE, r#", "aesthetic_score": 5.9"#, "0.1", Rule::LowAesthetic, "aesthetic_score 5.9 is below 6"),
            (LARGE, r#", "aesthetic_score": 9"#, "0.51", Rule::Watermark, "watermark 0.51 is above 0.5"),
            (LARGE, "", "0.1", Rule::NoAesthetic, "aesthetic_score is missing"),
            (LARGE, r#", "aesthetic_score": null"#, "0.1", Rule::NoAesthetic, "aesthetic_score is missing"),
        ] {
            assert_eq!(skipped(size, &scored(aesthetic, watermark)), (rule, wanted.into()));
            assert_eq!(rule.reason(), Reason::Filtered);
        }
    }

    #[test]
    fn native_captions_need_only_the_size() {
        for key in ["caption_ori", "caption_ori_zh"] {
            let json = format!(r#"{{"{key}": "红", "watermark": 0.9}}"#);
            assert!(examine_json(LARGE, &json).unwrap().caption.native);
            assert_eq!(skipped(SMALL, &json).0, Rule::TooSmall);
        }
        // The key exempts, whatever the caption says; Chinese under `caption_ori_en` does not.
        assert!(examine_json(LARGE, r#"{"caption_ori": "x", "caption_zh": "红", "caption_en": "red", "watermark": 0.9}"#).is_ok());
        assert_eq!(skipped(LARGE, r#"{"caption_ori_en": "红", "watermark": 0.9}"#).0, Rule::NoAesthetic);
    }

    #[test]
    fn filter_of_sd15_looks_at_the_scores_of_every_sample_and_at_no_size() {
        let data = section("filter = \"sd15\"");
        let rule = |size, json: &str| examine_by(&data, size, json.as_bytes()).map(|_| ()).map_err(|skip| skip.rule);
        assert_eq!(rule(SMALL, &scored(r#", "aesthetic_score": 6"#, "0.5")), Ok(()));
        assert_eq!(rule(LARGE, r#"{"caption_ori": "红", "aesthetic_score": 7, "watermark": 0.9}"#), Err(Rule::Watermark));
        assert_eq!(rule(LARGE, r#"{"caption_ori_zh": "红", "watermark": 0.1}"#), Err(Rule::NoAesthetic));
        assert_eq!(rule(SMALL, r#"{"caption_ori": "红"}"#), Ok(()));
        let data = section("filter = \"none\"");
        assert!(examine_by(&data, SMALL, scored(r#", "aesthetic_score": 0"#, "1").as_bytes()).is_ok());
    }

    #[test]
    fn keys_of_the_scores_are_the_jobs() {
        let data = section("watermark_key = \"pwatermark\"\naesthetic_key = \"beauty\"");
        let words = |json: &str| examine_by(&data, LARGE, json.as_bytes()).unwrap_err().detail();
        assert_eq!(words(r#"{"caption_zh": "红", "caption_en": "red", "pwatermark": 0.1}"#), "no_aesthetic: beauty is missing");
        assert_eq!(words(r#"{"pwatermark": 0.7, "beauty": 8}"#), "watermark: pwatermark 0.7 is above 0.5");
        assert!(examine_by(&data, SMALL, scored("", "1").as_bytes()).is_ok(), "the method's own keys say nothing then");
    }

    #[test]
    fn other_languages_have_their_own_keys() {
        let data = section("[captions]\nlanguage = \"it\"");
        let json = r#"{"caption_ori_it": "un gatto", "caption_en": "a cat", "watermark": 0.9}"#;
        assert_eq!(
            examine_by(&data, LARGE, json.as_bytes()).unwrap().caption,
            Caption { prompt: "un gatto".into(), english: "a cat".into(), native: true }
        );
        let parallel = examine_by(&data, LARGE, r#"{"caption_it": "un cane", "caption_en": "a dog"}"#.as_bytes()).unwrap().caption;
        assert!(!parallel.native && parallel.prompt == "un cane");
    }

    #[test]
    fn pictures_too_wide_and_captions_of_one_side_are_filtered_and_told_apart() {
        assert_eq!(skipped((400, 100), "{}"), (Rule::Aspect, "400 x 100 is too wide for every bucket".into()));
        assert_eq!(skipped(LARGE, r#"{"caption_zh": "", "caption_en": "red"}"#).0, Rule::OneSided);
        assert_eq!(skipped(LARGE, r#"{"caption_ori": "鿋"}"#).0, Rule::Emptied);
    }

    #[test]
    fn broken_json_says_what_is_broken() {
        for (json, wanted) in [
            (&b"not json"[..], "expected "),
            (b"[1]", "invalid type: sequence, expected an object with captions"),
            (br#"{"caption_en": 3}"#, "caption_en: invalid type: integer `3`, expected a string"),
            (br#"{"caption_ori_zh": ["a"]}"#, "caption_ori_zh: invalid type: sequence, expected a string"),
            (br#"{"watermark": "0.1"}"#, "watermark: invalid type: string"),
            (br#"{"aesthetic_score": true}"#, "aesthetic_score: invalid type: boolean"),
            (br#"{"watermark": NaN}"#, "watermark: expected"),
            (b"{} {}", "trailing characters"),
            (b"{\"caption_en\": \"\xff\"}", "caption_en: invalid unicode"),
            (b"", "EOF"),
        ] {
            let skip = examine_by(&data_section(), LARGE, json).unwrap_err();
            assert!(skip.rule == Rule::BadJson && skip.words.starts_with(wanted), "{}", skip.detail());
            assert_eq!(skip.words.matches(" at line ").count(), 1, "{}", skip.words);
        }
    }

    #[test]
    fn json_may_hold_anything_under_other_keys_and_a_key_twice() {
        let nested =
            format!(r#"{{"other": {}1{}, "caption_zh": "绿", "caption_en": "red", "caption_zh": "红"}}"#, "[".repeat(60), "]".repeat(60));
        assert_eq!(examine_json(SMALL, &nested).unwrap().caption.prompt, "红");
        let null = r#"{"caption_ori": "红", "caption_ori": null, "caption_zh": null}"#;
        assert_eq!(examine_json(SMALL, null).unwrap().caption, Caption { prompt: String::new(), english: String::new(), native: false });
        let with_mark = examine_json(SMALL, "\u{feff}{\"caption_ori\": \"红\"}").unwrap();
        assert!(with_mark.caption.native);
        let deep = format!(r#"{{"other": {}"#, "[".repeat(100_000));
        assert_eq!(skipped(SMALL, &deep).0, Rule::BadJson);
    }

    #[test]
    fn broken_samples_say_what_is_broken() {
        let whole = RawSample { index: 0, key: String::new(), jpg: Some(vec![1, 2]), json: Some(b"{}".to_vec()), fault: None };
        for (raw, wanted) in [
            (RawSample { jpg: None, ..whole.clone() }, "no_jpg: no member .jpg"),
            (RawSample { json: None, ..whole.clone() }, "no_json: no member .json"),
            (RawSample { fault: Some((Rule::Sparse, "odd".into())), ..whole.clone() }, "sparse: odd"),
            (RawSample { jpg: Some(b"GIF89a".to_vec()), ..whole.clone() }, "other_format: jpg: this is GIF"),
            (whole, "bad_picture: jpg: "),
        ] {
            let skip = examine_raw(raw, &data_section()).unwrap_err();
            assert!(skip.rule.reason() == Reason::Bad && skip.detail().starts_with(wanted), "{skip:?}");
        }
    }

    #[test]
    fn rules_have_names_of_their_own_that_fit_a_report() {
        let names: std::collections::BTreeSet<&str> = Rule::ALL.iter().map(|rule| rule.as_str()).collect();
        assert_eq!(names.len(), Rule::ALL.len());
        assert!(names.iter().all(|name| name.bytes().all(|byte| byte == b'_' || byte.is_ascii_lowercase())), "{names:?}");
    }

    proptest! {
        #[test]
        fn any_json_is_kept_or_reported(text in "[ -~\u{4e00}-\u{9fff}]{0,40}", watermark in any::<f64>()) {
            let json = serde_json::json!({ "caption_ori": text, "caption_en": text, "watermark": watermark }).to_string();
            let _ = examine_json(SMALL, &json);
            let _ = examine_json(SMALL, &text);
        }
    }
}
