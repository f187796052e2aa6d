//! From a tar's members to a sample that can be trained: which are kept, and what is known of them before their picture is decoded.

use std::fmt;

use peapod_proto::job::{DataSection, Filter};
use serde::Deserializer;
use serde::de::{DeserializeSeed, Error as _, IgnoredAny, MapAccess, Visitor};

use crate::bucket::{self, Bucket};
use crate::caption::{Caption, Cleaner};
use crate::format::{self, Turn};
use crate::shard::RawSample;
use crate::words::shown;
use crate::{Error, Result, cached, image};

/// Rules that are named where samples are missing.
const RULES_NAMED: usize = 3;

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
    /// Neither of the captions of a pair is in the json, nor a native one: mostly the job names other keys than the data have.
    NoCaption,
    /// No member `.jpg`, `.jpeg` or `.png`.
    NoJpg,
    /// No member `.json`.
    NoJson,
    /// The json is none, also where NaN and Infinity are taken for null, or a key that is read has a value of another type.
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
    /// What was computed of it before is damaged, or of another shape than the job's.
    BadCache,
    /// A name that is not UTF-8.
    BadName,
    /// A member whose bytes are not in the tar as they are.
    Sparse,
}

impl Rule {
    /// Every rule.
    pub const ALL: [Self; 20] = [
        Self::TooSmall,
        Self::NoAesthetic,
        Self::LowAesthetic,
        Self::Watermark,
        Self::Aspect,
        Self::OneSided,
        Self::Emptied,
        Self::NoCaption,
        Self::NoJpg,
        Self::NoJson,
        Self::BadJson,
        Self::BadPicture,
        Self::OtherFormat,
        Self::HugePicture,
        Self::HugeMember,
        Self::DuplicateMember,
        Self::DuplicateKey,
        Self::BadCache,
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
            Self::NoCaption => "no_caption",
            Self::NoJpg => "no_jpg",
            Self::NoJson => "no_json",
            Self::BadJson => "bad_json",
            Self::BadPicture => "bad_picture",
            Self::OtherFormat => "other_format",
            Self::HugePicture => "huge_picture",
            Self::HugeMember => "huge_member",
            Self::DuplicateMember => "duplicate_member",
            Self::DuplicateKey => "duplicate_key",
            Self::BadCache => "bad_cache",
            Self::BadName => "bad_name",
            Self::Sparse => "sparse",
        }
    }

    /// The rule of this name.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|rule| rule.as_str() == name)
    }

    /// What of a job file decides on it; none of a sample that is broken for any job.
    #[must_use]
    pub fn setting(self) -> Option<&'static str> {
        match self {
            Self::TooSmall => Some("data.min_pixels"),
            Self::NoAesthetic => Some("data.aesthetic_key, data.filter"),
            Self::LowAesthetic => Some("data.min_aesthetic"),
            Self::Watermark => Some("data.max_watermark"),
            Self::Aspect => Some("data.buckets"),
            Self::OneSided => Some("data.captions.parallel_key and english_key"),
            Self::Emptied => Some("data.captions.script and keep"),
            Self::NoCaption => Some("data.captions"),
            _ => None,
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

    /// The rule by which a sample is passed over whose picture, or what was made of it before, has this error.
    #[must_use]
    pub fn of_picture(error: &Error) -> Self {
        match error {
            Error::PictureSize { .. } => Self::HugePicture,
            Error::PictureFormat(_) => Self::OtherFormat,
            Error::Cached(_) => Self::BadCache,
            _ => Self::BadPicture,
        }
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The rules that left out most of some samples, with their counts and where to look: `too_small 30 (data.min_pixels), emptied 2 (...)`.
#[must_use]
pub fn most_often<'a>(counts: impl IntoIterator<Item = (&'a str, u64)>) -> String {
    let mut counts: Vec<(&str, u64)> = counts.into_iter().collect();
    counts.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
    let told = |&(rule, count): &(&str, u64)| match Rule::named(rule).and_then(Rule::setting) {
        Some(setting) => format!("{rule} {count} ({setting})"),
        None => format!("{rule} {count}"),
    };
    counts.iter().take(RULES_NAMED).map(told).collect::<Vec<_>>().join(", ")
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
    /// A skip whose key and words fit a report and a terminal, whatever stands in the data.
    #[must_use]
    pub fn new(index: u32, rule: Rule, key: &str, words: &str) -> Self {
        Self { index, rule, key: shown(key), words: shown(words) }
    }

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
    /// What it shows, as it lies in the shard.
    pub stored: Stored,
    /// Width and height of its picture, turned.
    pub size: (u32, u32),
    /// Index of the bucket it goes to.
    pub bucket: usize,
    /// What it trains with.
    pub caption: Caption,
}

/// What a sample shows, before it is decoded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Stored {
    /// A picture.
    Picture {
        /// The file.
        jpeg: Vec<u8>,
        /// How the decoded picture is turned.
        turn: Turn,
    },
    /// What the frozen encoders have made of it before: the bytes of a [`CachedSample`](crate::cached::CachedSample).
    Latents(Vec<u8>),
}

impl Stored {
    /// Bytes that it takes.
    #[must_use]
    pub fn num_bytes(&self) -> usize {
        match self {
            Self::Picture { jpeg, .. } => jpeg.len(),
            Self::Latents(bytes) => bytes.len(),
        }
    }
}

/// What is read of a sample's json. A key whose value is null counts as absent, as does one that is no number; of a key given twice the
/// last counts.
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
        Self::parse_strictly(json, rules).or_else(|error| {
            let numbers = peapod_json::without_not_numbers(json);
            let text = peapod_json::without_half_characters(numbers.as_deref().unwrap_or(json));
            text.or(numbers).map_or(Err(error), |json| Self::parse_strictly(&json, rules))
        })
    }

    fn parse_strictly(json: &[u8], rules: &Rules) -> Result<Self, serde_json::Error> {
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

/// Decides on a sample from its json and the size of its picture.
///
/// Errors: the report of a sample that is left out or broken.
pub fn examine(raw: RawSample, rules: &Rules, cleaner: &Cleaner) -> Result<Encoded, Skip> {
    let RawSample { index, key, jpg, json, latents, others, fault } = raw;
    let examine = move || -> Result<Encoded, (Rule, String)> {
        if let Some(fault) = fault {
            return Err(fault);
        }
        let stored = match (latents, jpg) {
            (Some(latents), _) => Stored::Latents(latents),
            (None, Some(jpeg)) => {
                let turn = if rules.exif_rotate { format::turn(&jpeg) } else { Turn::NONE };
                Stored::Picture { jpeg, turn }
            }
            (None, None) => return Err((Rule::NoJpg, format!("no member .jpg, .jpeg or .png{}", beside(json.is_some(), &others)))),
        };
        let captions = "; captions are read from the .json";
        let json = json.ok_or_else(|| (Rule::NoJson, format!("no member .json{}{captions}", beside(false, &others))))?;
        let metadata = Metadata::parse(&json, rules).map_err(|error| (Rule::BadJson, error.to_string()))?;
        let size = match &stored {
            Stored::Latents(latents) => cached::original_size(latents),
            Stored::Picture { jpeg, turn } => image::size(jpeg).map(|size| turn.size(size)),
        };
        let size = size.map_err(|error| (Rule::of_picture(&error), error.to_string()))?;
        if let Some(left_out) = rules.leaves_out(&metadata, size) {
            return Err(left_out);
        }
        let Some(bucket) = bucket::nearest(&rules.buckets, size) else {
            return Err((Rule::Aspect, format!("{} x {} is too wide for every bucket", size.0, size.1)));
        };
        let caption = cleaner.choose(|key| metadata.caption(key))?;
        Ok(Encoded { stored, size, bucket, caption })
    };
    examine().map_err(|(rule, words)| Skip::new(index, rule, &key, &words))
}

/// What there is of a sample that lacks something.
fn beside(has_json: bool, others: &[String]) -> String {
    let there: Vec<String> =
        has_json.then_some("json").into_iter().chain(others.iter().map(String::as_str)).map(|name| format!(".{name}")).collect();
    if there.is_empty() { String::new() } else { format!(", but {}", there.join(", ")) }
}

#[cfg(test)]
mod tests;
