//! Shards made of pictures and a table, looked into, and trained on.

use std::path::Path;

use image::{ImageFormat, Rgb, RgbImage};
use peapod_tests::harness::{Cluster, Process};

/// Writes `num` pictures of different sizes, every fourth a PNG, one broken JPEG and one missing, and a table of them.
fn pictures_and_table(folder: &Path, num: u32) {
    let mut table = "image,caption_zh,caption_en,watermark\n".to_owned();
    for index in 0..num {
        let (extension, format) = if index % 4 == 3 { ("png", ImageFormat::Png) } else { ("jpg", ImageFormat::Jpeg) };
        let (width, height) = if index % 2 == 0 { (96, 64) } else { (64, 64) };
        let picture = RgbImage::from_fn(width, height, |x, y| Rgb([(7 * index + x) as u8, (3 * y) as u8, 90]));
        let name = format!("{index}.{extension}");
        picture.save_with_format(folder.join(&name), format).unwrap();
        table += &format!("{name},\"红色, 第{index}\",\"red, number {index}\",\n");
    }
    let whole = std::fs::read(folder.join("0.jpg")).unwrap();
    std::fs::write(folder.join("broken.jpg"), &whole[..whole.len() / 2]).unwrap();
    table += "broken.jpg,红,red,\nmissing.jpg,红,red,\n1.jpg,红,red,high\n";
    std::fs::write(folder.join("table.csv"), table).unwrap();
}

/// The answer of `worker shards inspect --json`, which ends with a code.
fn inspect(list: &str, arguments: &[&str], code: i32) -> serde_json::Value {
    let mut process = Process::start("inspect", "worker", &[&["shards", "inspect", list, "--json"], arguments].concat());
    process.expect_exit(code);
    // What is wrong with the shards stands on another stream.
    let lines: Vec<String> = process.lines().into_iter().filter(|line| !line.starts_with("worker: ")).collect();
    serde_json::from_str(&lines.join("\n")).unwrap()
}

#[test]
fn shards_are_made_inspected_and_trained_on() {
    let folder = tempfile::tempdir().unwrap();
    pictures_and_table(folder.path(), 40);
    let table = folder.path().join("table.csv");
    let out = |name: &str| format!("{}/{name}/{{00000..}}.tar", folder.path().display());
    let make_with = |out: &str, more: &[&str]| {
        let arguments = ["shards", "make", "--table", table.to_str().unwrap(), "--out", out, "--samples-per-shard", "16"];
        Process::start("make", "worker", &[&arguments, more].concat())
    };
    let make = |out: &str| make_with(out, &["--skip-bad"]);
    // What a look at the table shows is told before anything is written.
    let mut refused = make_with(&out("a"), &[]);
    refused.expect_exit(2);
    refused.assert_said("table.csv: 2 of 43 rows cannot be used (missing picture 1, no number 1); nothing was written. Mend them, or leave them out with --skip-bad:");
    refused.assert_said("  line 43: ");
    refused.assert_said("missing.jpg: No such file or directory");
    refused.assert_said("  line 44: watermark `high` is no number");
    assert!(!folder.path().join("a").exists());

    let mut first = make(&out("a"));
    first.expect_exit(0);
    first.assert_said("worker: left out: line 42: ");
    first.assert_said("broken.jpg: jpg: ");
    first.assert_said("worker: left out: line 43: ");
    first.assert_said("worker: left out: line 44: watermark `high` is no number");
    first.assert_said("samples    40, ");
    first.assert_said("left out   3");
    first.assert_said("1  unreadable picture");
    first.assert_said("a/{00000..00002}.tar");
    let files: Vec<_> = std::fs::read_dir(folder.path().join("a")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(files.len(), 3, "whole shards and nothing else: {files:?}");

    // Again, elsewhere: the same bytes. In the same place: refused.
    make(&out("b")).expect_exit(0);
    for shard in ["00000.tar", "00001.tar", "00002.tar"] {
        let [a, b] = ["a", "b"].map(|name| std::fs::read(folder.path().join(name).join(shard)).unwrap());
        assert!(a == b, "{shard} differs");
    }
    let mut again = make(&out("a"));
    again.expect_exit(2);
    again.assert_said("nothing is overwritten");

    let list = format!("{}/a/{{00000..00002}}.tar", folder.path().display());
    let summary = inspect(&list, &["--decode"], 0);
    assert_eq!((&summary["num_shards"], &summary["num_samples"], &summary["num_parallel"]), (&3.into(), &40.into(), &40.into()));
    assert_eq!((&summary["smallest"], &summary["largest"]), (&serde_json::json!([64, 64]), &serde_json::json!([96, 64])));
    assert_eq!((&summary["keys"]["caption_zh"], &summary["keys"]["watermark"]), (&40.into(), &serde_json::Value::Null));
    assert_eq!(summary["bad"], serde_json::json!({}));
    let of_bucket = |width: u32, height: u32| {
        let buckets = summary["buckets"].as_array().unwrap().iter();
        buckets.filter(|bucket| bucket["width"] == width && bucket["height"] == height).map(|bucket| bucket["num_samples"].clone()).next()
    };
    assert_eq!((of_bucket(768, 512), of_bucket(640, 640)), (Some(20.into()), Some(20.into())));

    let mut cluster = Cluster::new();
    cluster.job.set_steps(2).set("data.shards", vec![list]).set("train.global_batch", 8).set("train.micro_batch", 4);
    cluster.coordinator(1, &["--local"]).expect_exit(0);
    assert_eq!(cluster.trained_samples().len(), 16);
}

#[test]
fn what_is_wrong_in_shards_is_counted_and_named() {
    let folder = tempfile::tempdir().unwrap();
    let mut samples = peapod_tests::harness::demo_samples(6);
    samples[1].json = b"no json".to_vec();
    let half = samples[2].jpg.len() / 2;
    samples[2].jpg.truncate(half);
    let tar = peapod_tests::harness::tar_of(&samples);
    std::fs::write(folder.path().join("0.tar"), &tar).unwrap();
    std::fs::write(folder.path().join("1.tar"), &tar[..tar.len() / 2]).unwrap();
    let list = format!("{}/{{0..2}}.tar", folder.path().display());

    let summary = inspect(&list, &[], 1);
    assert_eq!(summary["num_shards"], 3);
    let unreadable = summary["unreadable"].as_array().unwrap();
    assert_eq!(unreadable.len(), 2, "one cut off, one missing: {unreadable:?}");
    assert!(unreadable[1]["shard"].as_str().unwrap().ends_with("2.tar"));
    let first = &summary["first_bad"][0];
    assert!(first["reason"].as_str().unwrap().contains("json") && first["shard"].as_str().unwrap().ends_with("0.tar"), "{first}");
    let whole = |summary: &serde_json::Value| summary["num_native"].as_u64().unwrap() + summary["num_parallel"].as_u64().unwrap();
    // Only decoding tells that a picture's second half is missing.
    let decoded = inspect(&list, &["--decode"], 1);
    assert!(whole(&decoded) < whole(&summary), "{decoded}");

    let mut text = Process::start("inspect", "worker", &["shards", "inspect", &list]);
    text.expect_exit(1);
    text.assert_said("worker: 2 of 3 shards cannot be used as they are");
    text.assert_said("shards     3, 2 unreadable");
    text.assert_said("first bad");
    let mut nothing = Process::start("inspect", "worker", &["shards", "inspect", "nowhere/*.tar"]);
    nothing.expect_exit(2);
    nothing.assert_said("matches no file");
}
