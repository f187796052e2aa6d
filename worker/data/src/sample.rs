//! From a tar's members to a sample that can be trained: which are kept, and what is known of them before their picture is decoded.

use peapod_proto::job::DataSection;
use serde::Deserialize;

use crate::bucket::{self, Bucket};
use crate::caption::{Caption, Cleaner, Found};
use crate::shard::RawSample;
use crate::{Result, image};

/// Why a sample is not trained.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Reason {
    /// A rule of the method leaves it out.
    Filtered,
    /// It is broken. Too many of these end the job.
    Bad,
}

/// A sample that is not trained.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Skip {
    /// Position in the shard, in tar order.
    pub index: u32,
    /// Why.
    pub reason: Reason,
    /// Its key in the tar.
    pub key: String,
    /// The rule or error.
    pub detail: String,
}

/// Which samples are kept.
#[derive(Debug, Clone, PartialEq)]
pub struct Rules {
    /// Sizes that are trained.
    pub buckets: Vec<Bucket>,
    min_pixels: u64,
    min_aesthetic: f64,
    max_watermark: f64,
}

impl Rules {
    /// The rules of a job.
    #[must_use]
    pub fn new(data: &DataSection) -> Self {
        Self {
            buckets: data.buckets.iter().map(|&[width, height]| Bucket { width, height }).collect(),
            min_pixels: data.min_pixels,
            min_aesthetic: data.min_aesthetic,
            max_watermark: data.max_watermark,
        }
    }

    /// Why the method leaves a sample out, if it does. Samples without a watermark score are all kept.
    fn leaves_out(&self, metadata: &Metadata, (width, height): (u32, u32)) -> Option<String> {
        let watermark = metadata.watermark?;
        if u64::from(width) * u64::from(height) < self.min_pixels {
            return Some(format!("{width} x {height} is less than {} pixels", self.min_pixels));
        }
        // Native captions are scarce: their pictures need not be beautiful.
        if metadata.caption_ori.is_some() || metadata.caption_ori_zh.is_some() {
            return None;
        }
        match metadata.aesthetic_score {
            None => return Some("aesthetic_score is missing".into()),
            Some(score) if score < self.min_aesthetic => return Some(format!("aesthetic_score {score} is below {}", self.min_aesthetic)),
            Some(_) => {}
        }
        (watermark > self.max_watermark).then(|| format!("watermark {watermark} is above {}", self.max_watermark))
    }
}

/// A sample before its picture is decoded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Encoded {
    /// The picture.
    pub jpeg: Vec<u8>,
    /// Width and height from its header.
    pub size: (u32, u32),
    /// Index of the bucket it goes to.
    pub bucket: usize,
    /// What it trains with.
    pub caption: Caption,
}

/// The keys of a sample's json that are read; a key whose value is null counts as absent.
#[derive(Debug, Deserialize)]
struct Metadata {
    caption_ori: Option<String>,
    caption_ori_zh: Option<String>,
    caption_ori_en: Option<String>,
    caption_zh: Option<String>,
    caption_en: Option<String>,
    watermark: Option<f64>,
    aesthetic_score: Option<f64>,
}

impl Metadata {
    fn captions(&self) -> Found<'_> {
        Found {
            original: self.caption_ori.as_deref(),
            original_zh: self.caption_ori_zh.as_deref(),
            original_en: self.caption_ori_en.as_deref(),
            zh: self.caption_zh.as_deref(),
            en: self.caption_en.as_deref(),
        }
    }
}

/// Decides on a sample from its json and its picture's header.
///
/// Errors: the report of a sample that is left out or broken.
pub fn examine(raw: RawSample, rules: &Rules, cleaner: &Cleaner) -> Result<Encoded, Skip> {
    let RawSample { index, key, jpg, json, fault } = raw;
    let examine = move || -> Result<Encoded, (Reason, String)> {
        let bad = |detail: String| (Reason::Bad, detail);
        let filtered = |detail: String| (Reason::Filtered, detail);
        if let Some(fault) = fault {
            return Err(bad(fault));
        }
        let jpeg = jpg.ok_or_else(|| bad("no member .jpg".into()))?;
        let json = json.ok_or_else(|| bad("no member .json".into()))?;
        let metadata: Metadata = serde_json::from_slice(&json).map_err(|error| bad(format!("json: {error}")))?;
        let size = image::size(&jpeg).map_err(|error| bad(error.to_string()))?;
        if let Some(rule) = rules.leaves_out(&metadata, size) {
            return Err(filtered(rule));
        }
        let Some(bucket) = bucket::nearest(&rules.buckets, size) else {
            return Err(filtered(format!("{} x {} is too wide for every bucket", size.0, size.1)));
        };
        let caption = cleaner.choose(&metadata.captions()).map_err(|reason| filtered(reason.into()))?;
        Ok(Encoded { jpeg, size, bucket, caption })
    };
    examine().map_err(|(reason, detail)| Skip { index, reason, key, detail })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::testing::{data_section, jpeg_of};

    /// Examines a picture of this size with this json.
    fn examine_json(size: (u32, u32), json: &str) -> Result<Encoded, Skip> {
        let jpg = Some(jpeg_of(size.0, size.1, [10, 20, 30]));
        let raw = RawSample { index: 4, key: "k".into(), jpg, json: Some(json.as_bytes().to_vec()), fault: None };
        examine(raw, &Rules::new(&data_section()), &Cleaner::new(true).unwrap())
    }

    fn skipped(size: (u32, u32), json: &str) -> (Reason, String) {
        let skip = examine_json(size, json).unwrap_err();
        assert_eq!((skip.index, skip.key.as_str()), (4, "k"));
        (skip.reason, skip.detail)
    }

    const LARGE: (u32, u32) = (640, 640);
    const SMALL: (u32, u32) = (64, 64);

    #[test]
    fn without_a_watermark_score_nothing_is_filtered() {
        let sample = examine_json(SMALL, r#"{"caption_zh": "红", "caption_en": "red", "aesthetic_score": 1, "other": [1]}"#).unwrap();
        assert_eq!((sample.size, sample.bucket), (SMALL, 4));
        assert_eq!(sample.caption, Caption { prompt: "红".into(), english: "red".into(), native: false });
    }

    #[test]
    fn with_a_watermark_score_size_beauty_and_watermark_count() {
        let json = |aesthetic: &str, watermark: &str| {
            format!(r#"{{"caption_zh": "红", "caption_en": "red", "watermark": {watermark} {aesthetic}}}"#)
        };
        assert!(examine_json(LARGE, &json(r#", "aesthetic_score": 6"#, "0.5")).is_ok());
        for (size, aesthetic, watermark, wanted) in [
            (SMALL, r#", "aesthetic_score": 9"#, "0.1", "less than 409600 pixels"),
            (LARGE, r#", "aesthetic_score": 5.9"#, "0.1", "aesthetic_score 5.9 is below 6"),
            (LARGE, r#", "aesthetic_score": 9"#, "0.51", "watermark 0.51 is above 0.5"),
            (LARGE, "", "0.1", "aesthetic_score is missing"),
            (LARGE, r#", "aesthetic_score": null"#, "0.1", "aesthetic_score is missing"),
        ] {
            let (reason, detail) = skipped(size, &json(aesthetic, watermark));
            assert_eq!(reason, Reason::Filtered);
            assert!(detail.contains(wanted), "{detail}");
        }
    }

    #[test]
    fn native_captions_need_only_the_size() {
        for key in ["caption_ori", "caption_ori_zh"] {
            let json = format!(r#"{{"{key}": "红", "watermark": 0.9}}"#);
            assert!(examine_json(LARGE, &json).unwrap().caption.native);
            assert_eq!(skipped(SMALL, &json).0, Reason::Filtered);
        }
    }

    #[test]
    fn pictures_too_wide_and_captions_of_one_side_are_filtered() {
        assert_eq!(skipped((400, 100), "{}").0, Reason::Filtered);
        assert_eq!(skipped(LARGE, r#"{"caption_zh": "", "caption_en": "red"}"#).0, Reason::Filtered);
    }

    #[test]
    fn broken_samples_say_what_is_broken() {
        for (json, wanted) in [
            ("not json", "json: expected"),
            ("[1]", "json: invalid"),
            (r#"{"caption_en": 3}"#, "json: invalid type: integer"),
            (r#"{"watermark": "0.1"}"#, "json: invalid type: string"),
        ] {
            let (reason, detail) = skipped(LARGE, json);
            assert!(reason == Reason::Bad && detail.starts_with(wanted), "{detail}");
        }
        let whole = RawSample { index: 0, key: String::new(), jpg: Some(vec![1, 2]), json: Some(b"{}".to_vec()), fault: None };
        for (raw, wanted) in [
            (RawSample { jpg: None, ..whole.clone() }, "no member .jpg"),
            (RawSample { json: None, ..whole.clone() }, "no member .json"),
            (RawSample { fault: Some("odd".into()), ..whole.clone() }, "odd"),
            (whole, "jpg: "),
        ] {
            let skip = examine(raw, &Rules::new(&data_section()), &Cleaner::new(true).unwrap()).unwrap_err();
            assert!(skip.reason == Reason::Bad && skip.detail.starts_with(wanted), "{skip:?}");
        }
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
