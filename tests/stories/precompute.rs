//! Shards that `worker precompute` makes: trained in place of their pictures, refused by other jobs, gone on with after an interruption.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use peapod_tests::harness::{Cluster, Process, Signal, TrainedSample, demo_samples, poll, tar_of};

/// Starts `worker precompute` for a cluster's job.
pub fn precompute(cluster: &Cluster, out: &Path, arguments: &[&str]) -> Process {
    let job = cluster.folder().join("precompute.toml");
    fs::write(&job, cluster.job.to_string()).unwrap();
    let [job, out] = [&job, out].map(|path| path.to_str().unwrap());
    let all = ["precompute", "--job", job, "--out", out, "--device", "cpu", "--threads", "1"];
    Process::start("precompute", "worker", &[&all, arguments].concat())
}

/// Trains a cluster's job with one worker on these shards; returns what was trained in which step, and losses by step.
fn train(cluster: &mut Cluster, shards: &Path, num: usize) -> (Vec<TrainedSample>, Vec<[f64; 4]>) {
    cluster.job.set("data.shards", vec![format!("{}/{{00000..{:05}}}.tar", shards.display(), num - 1)]);
    cluster.coordinator(1, &["--local"]).expect_exit(0);
    let steps = cluster.steps();
    (cluster.trained_samples(), steps.iter().map(|step| [step.samples as f64, step.task, step.logit, step.feature]).collect())
}

/// The weights of a cluster's last checkpoint.
fn adapter(cluster: &Cluster) -> Vec<f32> {
    let checkpoint = cluster.newest_checkpoint();
    let floats = |bytes: &[u8]| bytes.chunks_exact(4).map(|four| f32::from_le_bytes(four.try_into().unwrap())).collect::<Vec<_>>();
    checkpoint.tensors("adapter.safetensors").values().flat_map(|tensor| floats(&tensor.bytes)).collect()
}

#[test]
fn precomputed_shards_train_to_the_adapter_of_their_pictures() {
    // One that is left out stays so.
    let mut samples = demo_samples(48);
    samples[20].json = br#"{"caption_en": "red"}"#.to_vec();
    let tars: Vec<Vec<u8>> = samples.chunks(16).map(tar_of).collect();
    let mut results = BTreeMap::new();
    let made = tempfile::tempdir().unwrap();
    for kind in ["pictures", "latents", "text"] {
        let mut cluster = Cluster::new();
        cluster.deal_tars(&tars);
        let mut shards = cluster.folder().join("shards");
        if kind != "pictures" {
            shards = made.path().join(kind);
            let mut process = precompute(&cluster, &shards, if kind == "text" { &["--text"] } else { &[] });
            process.expect_exit(0);
            process.assert_said("shards     3 made, 0 were there");
            process.assert_said("1  one_sided");
        }
        let (trained, losses) = train(&mut cluster, &shards, 3);
        let skipped = ["filtered", "bad"].map(|reason| cluster.newest_checkpoint().skipped_by_rule(reason));
        results.insert(kind, (trained, losses, adapter(&cluster), skipped));
    }
    let (trained, losses, weights, skipped) = &results["pictures"];
    assert_eq!((trained.len(), losses.len()), (47, 3));
    assert_eq!((skipped[0]["one_sided"], skipped[1].len()), (1, 0));
    for kind in ["latents", "text"] {
        let (other_trained, other_losses, other_weights, other_skipped) = &results[kind];
        assert_eq!((other_trained, other_skipped), (trained, skipped), "{kind}: the same samples in the same steps");
        for (got, wanted) in other_losses.iter().flatten().zip(losses.iter().flatten()) {
            assert!((got - wanted).abs() <= 1e-3 * wanted.abs(), "{kind}: {got} for {wanted}");
        }
        let length = |weights: &mut dyn Iterator<Item = f32>| weights.map(|weight| f64::from(weight).powi(2)).sum::<f64>().sqrt();
        let distance = length(&mut other_weights.iter().zip(weights).map(|(got, wanted)| got - wanted));
        assert!(distance < 1e-3 * length(&mut weights.iter().copied()), "{kind}: {distance}");
    }
}

#[test]
fn precomputed_shards_of_another_job_end_it_with_what_differs() {
    let mut cluster = Cluster::new();
    cluster.deal_samples(&[16, 16]);
    let made = cluster.folder().join("made");
    precompute(&cluster, &made, &[]).expect_exit(0);
    cluster.job.set("data.shards", vec![format!("{}/{{00000..00001}}.tar", made.display())]).set("data.min_aesthetic", 5.0);
    // An inspection needs no model to see it.
    let job = cluster.folder().join("other.toml");
    fs::write(&job, cluster.job.to_string()).unwrap();
    let mut inspect = Process::start("inspect", "worker", &["shards", "inspect", "--job", job.to_str().unwrap()]);
    inspect.expect_exit(1);
    inspect.assert_said("worker: 2 of 2 shards cannot be used as they are; the first is ");
    inspect.assert_said("data.min_aesthetic was `6`, is `5`");
    let mut coordinator = cluster.coordinator(1, &["--local"]);
    coordinator.expect_exit(1);
    for words in ["in phase data: ", "made/0000", "data.min_aesthetic was `6`, is `5`", "run `worker precompute` with this job"] {
        let said = coordinator.lines_with(words);
        assert!(!said.is_empty(), "{words}");
    }
    assert!(coordinator.lines_with("restart").is_empty(), "another worker would fail in the same way");
}

#[test]
fn precompute_goes_on_where_it_was_killed_and_shares_its_list() {
    let mut cluster = Cluster::new();
    cluster.deal_samples(&[64, 64, 64, 64]);
    let made = cluster.folder().join("made");
    let shard = |place: u32| made.join(format!("{place:05}.tar"));
    let mut process = precompute(&cluster, &made, &["--batch", "4"]);
    poll("the first shard", || shard(0).exists().then_some(()));
    process.signal(Signal::KILL);
    process.wait();
    let first = fs::read(shard(0)).unwrap();
    assert!(!shard(3).exists(), "it was killed before it was done");

    // Two more, each with a part of the list; what the first one left half done is in nobody's way.
    let mut parts = [["--shards", "0..1"], ["--shards", "2..3"]].map(|part| precompute(&cluster, &made, &part));
    parts.iter_mut().for_each(|part| part.expect_exit(0));
    assert!(parts[0].lines_with(" were there")[0] != "shards     2 made, 0 were there", "the first is not made anew");
    assert!(fs::read(shard(0)).unwrap() == first);
    let mut files: Vec<_> = fs::read_dir(&made).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    files.sort();
    assert_eq!(files, ["00000.tar", "00001.tar", "00002.tar", "00003.tar"]);
    let mut again = precompute(&cluster, &made, &[]);
    again.expect_exit(0);
    again.assert_said("shards     0 made, 4 were there");
    // The same job makes the same bytes, whole or in parts.
    let whole = cluster.folder().join("whole");
    precompute(&cluster, &whole, &[]).expect_exit(0);
    assert!((1..4).all(|place| fs::read(shard(place)).unwrap() == fs::read(whole.join(format!("{place:05}.tar"))).unwrap()));
}

#[test]
fn what_cannot_be_precomputed_is_named_and_the_rest_is_made() {
    let mut cluster = Cluster::new();
    cluster.deal_samples(&[4, 4, 4, 4]);
    let shards = cluster.folder().join("shards");
    fs::remove_file(shards.join("00001.tar")).unwrap();
    // Of the third what precedes the break is made, and training is told of it; the last is what a proxy sent in its place.
    let [whole, last] = ["00002.tar", "00003.tar"].map(|name| fs::read(shards.join(name)).unwrap());
    fs::write(shards.join("00002.tar"), &whole[..whole.len() / 2]).unwrap();
    fs::write(shards.join("00003.tar"), "<!DOCTYPE html>").unwrap();
    let made = cluster.folder().join("made");
    let mut process = precompute(&cluster, &made, &[]);
    process.expect_exit(1);
    process.assert_said("shard 1 is not made: open ");
    process.assert_said("shard 3 is not made: ");
    process.assert_said("00003.tar: it is no tar, or breaks off within the first header: it begins with `<!DOCTYPE html>`");
    process.assert_said("the rest of it is lost, unless you mend it, remove ");
    process.assert_said("shards     2 made (1 in part), 0 were there, 2 failed");
    process.assert_said("2 of 4 shards are not made (1, 3); the first: open ");
    process.assert_said("start the same command again: only what is missing is made then");
    process.assert_said("missing    2 of 4 shards; once they are there, ");
    assert!(process.lines_with("for a job").is_empty(), "there is no whole list yet");
    assert!(!made.join("00003.tar").exists());
    let list = format!("{}/*.tar", made.display());
    let mut inspect = Process::start("inspect", "worker", &["shards", "inspect", &list, "--json"]);
    inspect.expect_exit(1);
    inspect.assert_said("worker: 1 of 2 shards cannot be used as they are");
    let lines: Vec<String> = inspect.lines().into_iter().filter(|line| !line.starts_with("worker: ")).collect();
    let summary: serde_json::Value = serde_json::from_str(&lines.join("\n")).unwrap();
    assert_eq!((summary["num_shards"].as_u64(), summary["unreadable"].as_array().unwrap().len()), (Some(2), 1), "{summary}");

    // Once they are there, they alone are made.
    fs::write(shards.join("00001.tar"), &whole).unwrap();
    fs::write(shards.join("00003.tar"), &last).unwrap();
    let mut again = precompute(&cluster, &made, &[]);
    again.expect_exit(0);
    again.assert_said("shards     2 made, 2 were there");
    again.assert_said("{00000..00003}.tar");

    let mut bad = precompute(&cluster, &made, &["--shards", "9"]);
    bad.expect_exit(2);
    bad.assert_said("there is no shard 9: the job's list has 4, from 0");
}
