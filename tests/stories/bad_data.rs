//! Data as it is found: every way in which a sample can be broken or left out, in one job. It finishes, and says what it passed over and
//! why.

use std::collections::BTreeMap;
use std::io::Cursor;

use image::{DynamicImage, ImageFormat};
use peapod_tests::harness::{Cluster, RawSample, demo_samples, tar_of, workspace};

use crate::precompute::precompute;

/// A member of a tar: its name and content.
type Member = (Vec<u8>, Vec<u8>);

/// A sample made from one of the demo's, and the rule by which it is passed over; none if it is trained.
struct Case {
    rule: Option<&'static str>,
    members: Vec<Member>,
}

fn encoded(picture: &DynamicImage, format: ImageFormat) -> Vec<u8> {
    let mut bytes = Cursor::new(Vec::new());
    picture.write_to(&mut bytes, format).unwrap();
    bytes.into_inner()
}

/// A file of worker/data/testdata.
fn testdata(name: &str) -> Vec<u8> {
    std::fs::read(workspace().join("worker/data/testdata").join(name)).unwrap()
}

/// Adds a member whose name need not be text.
fn add(tar: &mut Vec<u8>, (name, bytes): &Member) {
    let mut header = tar::Header::new_gnu();
    header.set_size(bytes.len() as u64);
    header.set_mode(0o644);
    header.as_gnu_mut().unwrap().name[..name.len()].copy_from_slice(name);
    header.set_cksum();
    tar.extend(header.as_bytes());
    tar.extend(bytes);
    tar.extend(vec![0; bytes.len().next_multiple_of(512) - bytes.len()]);
}

fn tar_of_cases(cases: &[Case]) -> Vec<u8> {
    let mut tar = Vec::new();
    cases.iter().flat_map(|case| &case.members).for_each(|member| add(&mut tar, member));
    tar.extend([0; 1024]);
    tar
}

/// Every kind of bad, filtered and odd sample, each made from a sample of its own.
fn all_kinds(samples: &mut impl Iterator<Item = RawSample>) -> Vec<Case> {
    let mut cases = Vec::new();
    let mut case = |rule: Option<&'static str>, change: &dyn Fn(RawSample) -> Vec<Member>| {
        cases.push(Case { rule, members: change(samples.next().unwrap()) });
    };
    let jpg = |sample: &RawSample| (format!("{}.jpg", sample.key).into_bytes(), sample.jpg.clone());
    let json = |sample: &RawSample| (format!("{}.json", sample.key).into_bytes(), sample.json.clone());
    let both = |sample: RawSample| vec![jpg(&sample), json(&sample)];
    let with_jpg = |bytes: Vec<u8>| move |sample: RawSample| both(RawSample { jpg: bytes.clone(), ..sample });
    let with_json = |text: &str| {
        let text = text.as_bytes().to_vec();
        move |sample: RawSample| both(RawSample { json: text.clone(), ..sample })
    };
    let scored = |scores: &str| with_json(&format!(r#"{{"caption_zh": "红色", "caption_en": "red", {scores}}}"#));

    // Broken.
    case(Some("no_jpg"), &|sample| vec![json(&sample)]);
    case(Some("no_json"), &|sample| vec![jpg(&sample)]);
    case(Some("bad_json"), &with_json("not json"));
    case(Some("bad_json"), &with_json(r#"{"caption_zh": 5}"#));
    case(Some("bad_json"), &with_json(r#"{"watermark": "0.1"}"#));
    case(Some("bad_json"), &|sample| both(RawSample { json: b"{\"caption_zh\": \"\xff\"}".to_vec(), ..sample }));
    case(Some("bad_picture"), &with_jpg(b"not a picture".to_vec()));
    case(Some("bad_picture"), &|sample| {
        let half = sample.jpg[..sample.jpg.len() / 2].to_vec();
        both(RawSample { jpg: half, ..sample })
    });
    case(Some("bad_picture"), &with_jpg(encoded(&DynamicImage::new_rgb16(64, 64), ImageFormat::Png)));
    case(Some("other_format"), &with_jpg(b"GIF89a".to_vec()));
    case(Some("other_format"), &with_jpg(b"RIFF\x10\0\0\0WEBPVP8 ".to_vec()));
    case(Some("huge_picture"), &|sample| {
        let mut bytes = sample.jpg.clone();
        let frame = bytes.windows(2).position(|marker| marker == [0xff, 0xc0]).unwrap();
        bytes[frame + 5..frame + 9].copy_from_slice(&[0xff; 4]);
        both(RawSample { jpg: bytes, ..sample })
    });
    case(Some("duplicate_member"), &|sample| vec![jpg(&sample), jpg(&sample), json(&sample)]);
    case(Some("bad_name"), &|sample| vec![(b"\xe9.jpg".to_vec(), sample.jpg), (b"\xe9.json".to_vec(), sample.json)]);
    // Left out by the method.
    case(Some("too_small"), &|sample| {
        let json = r#"{"caption_ori": "红色", "watermark": 0.1}"#.as_bytes().to_vec();
        both(RawSample { jpg: encoded(&DynamicImage::new_rgb8(20, 20), ImageFormat::Jpeg), json, ..sample })
    });
    case(Some("no_aesthetic"), &scored(r#""watermark": 0.1"#));
    case(Some("low_aesthetic"), &scored(r#""watermark": 0.1, "aesthetic_score": 5"#));
    case(Some("watermark"), &scored(r#""watermark": 0.6, "aesthetic_score": 7"#));
    case(Some("aspect"), &with_jpg(encoded(&DynamicImage::new_rgb8(400, 40), ImageFormat::Jpeg)));
    case(Some("one_sided"), &with_json(r#"{"caption_zh": "红色"}"#));
    case(Some("one_sided"), &with_json(r#"{"caption_en": "red"}"#));
    case(Some("emptied"), &with_json(r#"{"caption_ori": "鿋 red"}"#));
    // Odd, and trained: the last two are native.
    for name in ["gray.jpg", "cmyk.jpg", "cmyk_plain.jpg", "ycck.jpg", "progressive.jpg", "turn1.jpg"] {
        case(None, &with_jpg(testdata(name)));
    }
    case(None, &with_jpg(encoded(&DynamicImage::new_rgba8(64, 64), ImageFormat::Png)));
    case(None, &scored(r#""watermark": 0.5, "aesthetic_score": 6"#));
    case(None, &with_json(r#"{"caption_ori": "紅色的 cat", "watermark": 0.9}"#));
    case(None, &with_json(r#"{"caption_ori_zh": "蓝色"}"#));
    cases
}

#[test]
fn every_kind_of_bad_data_is_passed_over_by_name_and_the_rest_is_trained() {
    train_bad_data(false);
}

#[test]
fn every_kind_of_bad_data_is_passed_over_alike_where_it_was_precomputed() {
    train_bad_data(true);
}

fn train_bad_data(is_precomputed: bool) {
    let mut samples = demo_samples(200).into_iter();
    let mut cases = all_kinds(&mut samples);
    // The key of the first sample once more, behind the others.
    let again = samples.next().unwrap();
    let key = String::from_utf8(cases[0].members[0].0.clone()).unwrap().replace(".json", ".jpg");
    cases.push(Case { rule: Some("duplicate_key"), members: vec![(key.into_bytes(), again.jpg)] });
    let num_good = cases.iter().filter(|case| case.rule.is_none()).count();

    let mut plain = |count: usize| tar_of(&samples.by_ref().take(count).collect::<Vec<_>>());
    let whole = plain(20);
    let mut truncated = plain(16);
    let part = truncated.len() / 2;
    truncated.truncate(part / 512 * 512 + 300);
    let mut corrupt = plain(16);
    // The checksum of a header in the middle: the one that follows the eighth sample.
    let headers: Vec<usize> = (0..corrupt.len()).step_by(512).filter(|&at| corrupt[at + 257..at + 262] == *b"ustar").collect();
    corrupt[headers[16] + 148] ^= 1;

    let mut cluster = Cluster::new();
    cluster.deal_tars(&[tar_of_cases(&cases), whole, truncated, corrupt]);
    cluster.job.set("data.min_pixels", 1000).set("data.max_bad_fraction", 1.0);
    if is_precomputed {
        let made = cluster.folder().join("made");
        precompute(&cluster, &made, &[]).expect_exit(0);
        cluster.job.set("data.shards", vec![format!("{}/*.tar", made.display())]);
    }
    let mut coordinator = cluster.coordinator(2, &["--local"]);
    coordinator.expect_exit(0);

    // Counts by rule, whoever read the shard.
    let checkpoint = cluster.newest_checkpoint();
    let (mut filtered, mut bad) = (checkpoint.skipped_by_rule("filtered"), checkpoint.skipped_by_rule("bad"));
    let mut wanted: BTreeMap<&str, u64> = BTreeMap::new();
    cases.iter().filter_map(|case| case.rule).for_each(|rule| *wanted.entry(rule).or_default() += 1);
    // The sample in which the third tar breaks off lacks its picture or its json.
    let broken_off: u64 = ["no_jpg", "no_json"].iter().map(|rule| bad.get(*rule).copied().unwrap_or_default()).sum();
    assert!((2..=3).contains(&broken_off), "{bad:?}");
    for rule in ["no_jpg", "no_json"] {
        bad.insert(rule.into(), 1);
    }
    let all: BTreeMap<String, u64> = filtered.iter().chain(&bad).map(|(rule, count)| (rule.clone(), *count)).collect();
    assert_eq!(all, wanted.into_iter().map(|(rule, count)| (rule.to_owned(), count)).collect());
    assert_eq!((checkpoint.ledger_total("filtered"), checkpoint.ledger_total("bad")), (8, 15 + broken_off - 2));
    assert_eq!((filtered.remove("one_sided"), bad.remove("bad_json")), (Some(2), Some(4)));
    coordinator
        .assert_said("samples filtered: 8 (aspect 1, emptied 1, low_aesthetic 1, no_aesthetic 1, one_sided 2, too_small 1, watermark 1)");
    coordinator.assert_said("samples broken: ");
    coordinator.assert_said("bad_json 4, bad_name 1, bad_picture 3, duplicate_key 1, duplicate_member 1, huge_picture 1");

    // The first ten are shown with shard and key, and only they.
    let shown = coordinator.lines_with("bad sample ").len() + coordinator.lines_with("; the rest of it is lost").len();
    assert_eq!(shown, 10);
    assert!(coordinator.lines_with("bad sample ").iter().all(|line| line.contains(".tar: ")));

    // What is left is trained once, the odd pictures among it.
    let trained = cluster.trained_samples();
    let of = |shard| trained.iter().filter(|sample| sample.shard == shard).count();
    assert_eq!((of(0), of(1)), (num_good, 20));
    assert!((6..=8).contains(&of(2)) && (6..=8).contains(&of(3)), "{} and {} before the break", of(2), of(3));
    assert_eq!(trained.len() as u64, checkpoint.ledger_total("committed"));
    let native: u64 = cluster.steps().iter().map(|step| step.native).sum();
    let native_of_plain = trained.iter().filter(|sample| sample.shard > 0).count();
    assert!(native >= 2 && native <= 2 + native_of_plain as u64, "{native}");
    coordinator.assert_said(&format!("native      {:.1} % of the samples", 100.0 * native as f64 / trained.len() as f64));
}

#[test]
fn job_with_too_much_bad_data_stops_and_names_what_is_most_often_wrong() {
    let mut samples = demo_samples(200).into_iter();
    let cases = all_kinds(&mut samples);
    let rest: Vec<RawSample> = samples.collect();
    let mut cluster = Cluster::new();
    cluster.deal_tars(&[tar_of_cases(&cases), tar_of(&rest)]);
    cluster.job.set("data.min_pixels", 1000).set("data.max_bad_fraction", 0.1);
    let mut coordinator = cluster.coordinator(2, &["--local"]);
    coordinator.expect_exit(1);
    let reason = coordinator.lines_with("coordinator: ").pop().unwrap();
    assert!(
        reason.contains("samples are broken, most often bad_json (4), more than data.max_bad_fraction = 0.1; the last in "),
        "{reason}"
    );
    assert!(reason.contains("00000.tar"), "{reason}");
}

#[test]
fn share_of_native_captions_is_reported_exactly() {
    let mut samples = demo_samples(32);
    for sample in &mut samples[..12] {
        sample.json = r#"{"caption_ori": "红色的圆形"}"#.as_bytes().to_vec();
    }
    for sample in &mut samples[12..] {
        sample.json = r#"{"caption_zh": "红色的圆形", "caption_en": "a red circle"}"#.as_bytes().to_vec();
    }
    let mut cluster = Cluster::new();
    cluster.deal_tars(&[tar_of(&samples[..16]), tar_of(&samples[16..])]);
    let mut coordinator = cluster.coordinator(2, &["--local"]);
    coordinator.expect_exit(0);
    let steps = cluster.steps();
    assert_eq!(steps.iter().map(|step| (step.samples, step.native)).fold((0, 0), |sum, step| (sum.0 + step.0, sum.1 + step.1)), (32, 12));
    assert!(steps.iter().all(|step| step.native <= step.samples));
    coordinator.assert_said("native      37.5 % of the samples; the others are parallel");
}

#[test]
fn filters_that_leave_out_most_samples_are_said_while_training_goes_on() {
    let mut cluster = Cluster::new();
    cluster.deal_samples(&[256]);
    cluster.job.set_steps(2).set("data.captions.parallel_key", "caption_ja").set("train.global_batch", 8).set("train.micro_batch", 4);
    let mut coordinator = cluster.coordinator(1, &["--local"]);
    coordinator.expect_exit(0);
    let said = coordinator.lines_with("samples read so far are filtered out by the job's rules, most often one_sided ");
    assert_eq!(said.len(), 1, "{said:?}");
    assert!(said[0].contains("WARN") && said[0].ends_with("(data.captions.parallel_key and english_key)"), "{said:?}");
    assert_eq!(cluster.trained_samples().len(), 16, "native ones");
}
