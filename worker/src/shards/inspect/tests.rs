//! Shards of all kinds, looked at with a job and without.

use super::*;

fn options(list: &[String], job: Option<std::path::PathBuf>) -> Options {
    Options { list: list.to_vec(), job: OptionalJobArgs { job, set: Vec::new() }, decode: false, json: false }
}

/// A tar of the demo's, whose pictures and captions fit a job's defaults.
fn demo() -> String {
    concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/demo/shards/00000.tar").to_owned()
}

#[test]
fn shards_that_cannot_be_used_are_a_problem() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str, bytes: &[u8]| {
        let path = folder.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let problem = |shards: &[String]| report(&options(shards, None)).unwrap().problem;
    assert_eq!(problem(&[demo()]), None);
    for (name, bytes, words) in [
        ("nothing.tar", &b""[..], "it is no tar: it has no bytes"),
        ("page.tar", b"<!DOCTYPE html>", "it begins with `<!DOCTYPE html>`"),
        ("empty.tar", &[0; 1024], "it holds no sample"),
    ] {
        let problem = problem(&[demo(), path(name, bytes)]).unwrap();
        assert!(problem.starts_with("1 of 2 shards cannot be used") && problem.ends_with(words), "{problem}");
    }
    let mut tar = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_size(2);
    tar.append_data(&mut header, "a.json", &b"{}"[..]).unwrap();
    let broken = path("broken.tar", &tar.into_inner().unwrap());
    assert_eq!(problem(&[broken]).unwrap(), "no sample of these shards would be trained");
}

#[test]
fn list_is_the_jobs_where_none_is_given() {
    let folder = tempfile::tempdir().unwrap();
    let job = folder.path().join("job.toml");
    let text = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/demo/job.toml")).unwrap();
    std::fs::write(&job, text.replace("tests/demo/shards", concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/demo/shards"))).unwrap();
    let of_job = report(&options(&[], Some(job.clone()))).unwrap();
    assert!(of_job.problem.is_none() && of_job != report(&options(&[demo()], Some(job))).unwrap(), "{of_job:?}");
}

/// The demo's shards, looked at by its job with changes to its text.
fn with_job(changes: &[(&str, &str)]) -> Report {
    let folder = tempfile::tempdir().unwrap();
    let job = folder.path().join("job.toml");
    let mut text = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/demo/job.toml")).unwrap();
    for (from, to) in changes {
        assert!(text.contains(from), "{from}");
        text = text.replace(from, to);
    }
    std::fs::write(&job, text).unwrap();
    report(&options(&[demo()], Some(job))).unwrap()
}

#[test]
fn samples_that_do_not_fit_the_job_are_warned_of() {
    let warnings = |report: Report| -> Vec<String> {
        report.text.lines().filter_map(|line| line.strip_prefix("warning    ").map(str::to_owned)).collect()
    };
    let model = ("\"tests/demo/model", concat!("\"", env!("CARGO_MANIFEST_DIR"), "/../tests/demo/model"));
    assert_eq!(warnings(with_job(&[model])), [""; 0]);
    let other = warnings(with_job(&[model, ("[data]", "[data.captions]\nparallel_key = \"caption_ja\"\n\n[data]")]));
    assert_eq!(other.len(), 2, "{other:?}");
    assert!(other[0].contains(" of 256 samples are filtered out by the job's rules, most often one_sided "), "{other:?}");
    assert!(other[0].ends_with("(data.captions.parallel_key and english_key)"), "{other:?}");
    assert!(other[1].starts_with("no sample has `caption_ja` (data.captions.parallel_key), which "), "{other:?}");
    assert!(other[1].contains("in their json is ") && other[1].contains("caption_zh"), "{other:?}");
    // The same samples by the rules of no job in particular.
    assert_eq!(warnings(report(&options(&[demo()], None)).unwrap()), [""; 0]);

    // Room for a start, an end and four characters.
    let short = with_job(&[model, ("context_length = 24", "context_length = 6")]);
    assert!(
        short.text.contains("\nprompts    256 longer than the student's context, 0 with nothing that its vocabulary has\n"),
        "{short:?}"
    );
    let told = "the end of 256 of 256 prompts is cut off: they have more tokens than student.context_length (6)";
    assert_eq!(warnings(short), [told]);
    let english = warnings(with_job(&[
        model,
        ("[data]", "[data.captions]\nlanguage = \"it\"\nparallel_key = \"caption_en\"\nenglish_key = \"caption_zh\"\n\n[data]"),
    ]));
    // Those that have both captions.
    assert_eq!(english, ["187 of 187 prompts have nothing in them that the vocabulary of student.path knows: they teach it nothing"]);
    let absent = warnings(with_job(&[("\"tests/demo/model/text_encoder_zh", "\"/nowhere")]));
    assert!(absent.len() == 1 && absent[0].starts_with("prompts are not compared with what the student takes: /nowhere: "), "{absent:?}");
}

#[test]
fn keys_are_read_as_training_reads_them() {
    let keys = |json: &str| object(json.as_bytes()).map(|json| json.keys().cloned().collect::<Vec<_>>().join(" "));
    assert_eq!(keys("\u{feff}{\"caption_zh\": \"x\", \"watermark\": NaN}").as_deref(), Some("caption_zh watermark"));
    assert_eq!(keys("[]"), None);
}

#[test]
fn parts_add_up_in_the_order_of_the_list() {
    let bad = |shard: &str, count: usize| Summary {
        num_shards: 1,
        num_samples: count as u64,
        bad: [("x".to_owned(), count as u64)].into(),
        first_bad: (0..count).map(|key| BadSample { shard: shard.into(), key: key.to_string(), reason: "x".into() }).collect(),
        smallest: Some((count as u32, 1)),
        largest: Some((count as u32, 2)),
        num_pixels: 100,
        ..Summary::default()
    };
    let mut total = Summary::default();
    total.add(bad("a", 8));
    total.add(bad("b", 5));
    assert_eq!((total.num_shards, total.num_samples, total.num_pixels), (2, 13, 200));
    assert_eq!((total.smallest, total.largest, total.bad["x"]), (Some((5, 1)), Some((8, 2)), 13));
    assert_eq!((total.first_bad.len(), total.first_bad[9].shard.as_str()), (10, "b"));
}
