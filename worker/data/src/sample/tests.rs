use std::ops::ControlFlow;

use peapod_proto::ids::Bitmap;
use proptest::prelude::*;

use super::*;
use crate::shard::{Found, read_shard};
use crate::testing::{data_section, jpeg_of, tar_of};

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
    examine_raw(
        RawSample { index: 4, key: "k".into(), jpg, json: Some(json.to_vec()), latents: None, others: Vec::new(), fault: None },
        data,
    )
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
    assert_eq!(skipped(LARGE, r#"{"caption": "a red circle", "caption_zh": null}"#).0, Rule::NoCaption);
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
        (br#"{"watermark": nan}"#, "watermark: expected"),
        (br#"{"watermark": NaNs}"#, "watermark: expected"),
        (br#"{"watermark": 1NaN}"#, "expected `,` or `}`"),
        (br#"{"watermark": --Infinity}"#, "watermark: invalid number"),
        (br#"{"watermark": +Infinity}"#, "watermark: expected value"),
        (br#"{"other": NaN, "caption_en": 3}"#, "caption_en: invalid type: integer `3`, expected a string"),
        (br#"{NaN: 1}"#, "key must be a string"),
        (br#"{"other": [NaN}"#, "expected `,` or `]`"),
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
fn numbers_that_are_none_count_as_absent() {
    for number in ["NaN", "Infinity", "-Infinity"] {
        let json = |scores: &str| {
            format!(
                r#"{{"a": {number}, "b": [1, {number},{{"c":{number}}}], "caption_zh": "红", "caption_en": "NaN, \"Infinity", {scores}}}"#
            )
        };
        let sample = examine_json(SMALL, &json(r#""other": NaN"#)).unwrap();
        assert_eq!(sample.caption.english, "NaN, \"Infinity", "strings stay as they are");
        let without = examine_json(SMALL, &json(&format!(r#""watermark": {number}, "aesthetic_score": 1"#)));
        assert!(without.is_ok(), "without a watermark score nothing is filtered: {without:?}");
        let (rule, words) = skipped(LARGE, &json(&format!(r#""watermark": 0.1, "aesthetic_score": {number}"#)));
        assert_eq!((rule, words.as_str()), (Rule::NoAesthetic, "aesthetic_score is missing"));
        // Python would make the text of a float of it.
        assert_eq!(skipped(LARGE, &format!(r#"{{"caption_ori": {number}, "caption_zh": null}}"#)).0, Rule::NoCaption);
    }
}

#[test]
fn json_may_hold_anything_under_other_keys_and_a_key_twice() {
    let nested =
        format!(r#"{{"other": {}1{}, "caption_zh": "绿", "caption_en": "red", "caption_zh": "红"}}"#, "[".repeat(60), "]".repeat(60));
    assert_eq!(examine_json(SMALL, &nested).unwrap().caption.prompt, "红");
    let null = r#"{"caption_ori": "红", "caption_ori": null, "caption_zh": "红", "caption_zh": null, "caption_en": ""}"#;
    assert_eq!(examine_json(SMALL, null).unwrap().caption, Caption { prompt: String::new(), english: String::new(), native: false });
    let with_mark = examine_json(SMALL, "\u{feff}{\"caption_ori\": \"红\"}").unwrap();
    assert!(with_mark.caption.native);
    let deep = format!(r#"{{"other": {}"#, "[".repeat(100_000));
    assert_eq!(skipped(SMALL, &deep).0, Rule::BadJson);
}

#[test]
fn broken_samples_say_what_is_broken() {
    let whole = RawSample {
        index: 0,
        key: String::new(),
        jpg: Some(vec![1, 2]),
        json: Some(b"{}".to_vec()),
        latents: None,
        others: Vec::new(),
        fault: None,
    };
    for (raw, wanted) in [
        (RawSample { jpg: None, ..whole.clone() }, "no_jpg: no member .jpg"),
        (RawSample { json: None, ..whole.clone() }, "no_json: no member .json; captions are read from the .json"),
        (RawSample { fault: Some((Rule::Sparse, "odd".into())), ..whole.clone() }, "sparse: odd"),
        (RawSample { jpg: Some(b"GIF89a".to_vec()), ..whole.clone() }, "other_format: jpg: this is GIF"),
        (whole, "bad_picture: jpg: "),
    ] {
        let skip = examine_raw(raw, &data_section()).unwrap_err();
        assert!(skip.rule.reason() == Reason::Bad && skip.detail().starts_with(wanted), "{skip:?}");
    }
}

#[test]
fn samples_that_lack_a_member_say_what_they_have() {
    let words = |members: &[(&str, &[u8])]| {
        let mut words = Vec::new();
        read_shard(&tar_of(members)[..], &Bitmap::default(), |found| {
            if let Found::Sample(raw) = found {
                words.push(examine_raw(raw, &data_section()).unwrap_err().detail());
            }
            ControlFlow::Continue(())
        });
        words.concat()
    };
    assert_eq!(words(&[("a.webp", b"x"), ("a.json", b"{}")]), "no_jpg: no member .jpg, .jpeg or .png, but .json, .webp");
    let text_alone: [(&str, &[u8]); 2] = [("a.jpg", b"x"), ("a.txt", b"a cat")];
    assert_eq!(words(&text_alone), "no_json: no member .json, but .txt; captions are read from the .json");
    assert_eq!(words(&[("a.cls", b"1")]), "no_jpg: no member .jpg, .jpeg or .png, but .cls");
}

#[test]
fn reports_hold_no_more_of_the_data_than_a_line() {
    let json = format!(r#"{{"watermark": "{}"}}"#, "x".repeat(1 << 20));
    let skip = examine_json(LARGE, &json).unwrap_err();
    assert!(skip.words.len() < 600 && skip.words.starts_with("watermark: invalid type: string \"xxx"), "{}", skip.words);
    let raw = RawSample {
        index: 0,
        key: "k\u{1b}[2J".repeat(1000),
        jpg: None,
        json: None,
        latents: None,
        others: vec!["\u{1b}".into(); 8],
        fault: None,
    };
    let skip = examine_raw(raw, &data_section()).unwrap_err();
    assert!(skip.key.len() < 5000 && !skip.key.contains('\u{1b}') && !skip.words.contains('\u{1b}'), "{skip:?}");
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

#[test]
fn rules_that_leave_out_most_are_told_with_what_sets_them() {
    let counts = [("watermark", 1), ("one_sided", 2), ("bad_json", 5), ("too_small", 9), ("of_another_release", 4)];
    assert_eq!(most_often(counts), "too_small 9 (data.min_pixels), bad_json 5, of_another_release 4");
    assert_eq!(most_often([("one_sided", 2)]), "one_sided 2 (data.captions.parallel_key and english_key)");
    // What a job filters by it can set.
    assert!(Rule::ALL.iter().all(|rule| rule.reason() == Reason::Bad || rule.setting().is_some()));
}
