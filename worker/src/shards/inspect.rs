//! `worker shards inspect`: every sample of a shard list, judged by a job's rules as training would judge it.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use peapod_data::bucket::Bucket;
use peapod_data::cached;
use peapod_data::caption::Cleaner;
use peapod_data::sample::{Rules, Stored, examine};
use peapod_data::shard::RawSample;
use peapod_data::{Reason, Rule, Skip, Sources, expand_shards, image};
use peapod_proto::ids::Bitmap;
use peapod_proto::job::{DataSection, OptionalJobArgs};
use serde::Serialize;

use super::{Report, progress_bar, size};
use crate::setup;

/// Broken samples that are named; all are counted.
const NUM_NAMED: usize = 10;

/// Different json keys that are counted. Shards with more of them have names for keys.
const MAX_KEYS: usize = 100;

/// What to look at, and how closely.
#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// Shards as in `data.shards` of a job: paths, {00000..00123} ranges, wildcards, joined by :: [default: those of --job]
    #[arg(required_unless_present = "job")]
    pub list: Vec<String>,
    /// The job whose buckets and rules to apply [default: those of a job that sets none]
    #[command(flatten)]
    pub job: OptionalJobArgs,
    /// Decode every picture: finds damaged ones that their header does not give away, and takes longer
    #[arg(long)]
    pub decode: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// What a shard list holds.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Summary {
    /// Shards in the list.
    pub num_shards: usize,
    /// Those that cannot be read to their end or hold nothing, and why; samples before a break are counted.
    pub unreadable: Vec<Unreadable>,
    /// Samples in all shards.
    pub num_samples: u64,
    /// Bytes of their pictures, or of what was precomputed of them, and captions.
    pub num_bytes: u64,
    /// Width and height of the picture with the fewest pixels.
    pub smallest: Option<(u32, u32)>,
    /// Width and height of the picture with the most pixels.
    pub largest: Option<(u32, u32)>,
    /// Pixels of all pictures.
    pub num_pixels: u64,
    /// Samples that would be trained, by bucket.
    pub buckets: Vec<BucketCount>,
    /// Samples that would train by their native caption.
    pub num_native: u64,
    /// Samples that would train by distillation from their English caption.
    pub num_parallel: u64,
    /// Samples with a value under each key of their json.
    pub keys: BTreeMap<String, u64>,
    /// Samples that the rules leave out, by rule.
    pub filtered: BTreeMap<String, u64>,
    /// Broken samples, by the name of what is wrong with them.
    pub bad: BTreeMap<String, u64>,
    /// The first broken samples, in the list's order.
    pub first_bad: Vec<BadSample>,
}

/// A shard that cannot be read to its end, or holds nothing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Unreadable {
    /// Where it lies.
    pub shard: String,
    /// Why not.
    pub reason: String,
}

/// Samples of one bucket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct BucketCount {
    /// Pixels.
    pub width: u32,
    /// Pixels.
    pub height: u32,
    /// How many.
    pub num_samples: u64,
}

/// A sample that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct BadSample {
    /// Where its shard lies.
    pub shard: String,
    /// Its key in the tar.
    pub key: String,
    /// What is wrong.
    pub reason: String,
}

/// Inspects a shard list; the report's text.
///
/// # Errors
/// As [`report`].
pub fn run(options: &Options) -> Result<String, String> {
    report(options).map(|report| report.text)
}

/// Inspects a shard list.
///
/// # Errors
/// One line: the list, the job file or the tables that captions are cleaned with cannot be read. What is wrong with a shard is in the report.
pub fn report(options: &Options) -> Result<Report, String> {
    let (shards, data) = match options.job.job() {
        Some(job) => {
            let job = job.read()?.job;
            (if options.list.is_empty() { setup::shards(&job)?.0 } else { expand(&options.list)? }, job.data)
        }
        None => (expand(&options.list)?, serde_json::from_str(r#"{"shards": []}"#).map_err(|error| error.to_string())?),
    };
    let summary = summarise(&shards, &data, options.decode)?;
    let text =
        if options.json { serde_json::to_string_pretty(&summary).map_err(|error| error.to_string())? + "\n" } else { describe(&summary) };
    Ok(Report { text, problem: summary.problem() })
}

fn expand(list: &[String]) -> Result<Vec<String>, String> {
    expand_shards(list).map_err(|error| error.to_string())
}

/// Reads all these shards, several at once.
///
/// # Errors
/// If the tables that captions are cleaned with cannot be read.
pub fn summarise(shards: &[String], data: &DataSection, decode: bool) -> Result<Summary, String> {
    let cleaner = Cleaner::new(data.captions.rules(), data.strict_clean).map_err(|error| error.to_string())?;
    let rules = Rules::new(data);
    let look = Look { sources: Sources::default(), rules, cleaner, decode };
    let bar = progress_bar(Some(shards.len() as u64), "shards");
    let (next, parts) = (AtomicUsize::new(0), Mutex::new(BTreeMap::new()));
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from).min(shards.len()) {
            scope.spawn(|| {
                loop {
                    let place = next.fetch_add(1, Ordering::Relaxed);
                    let Some(shard) = shards.get(place) else { return };
                    let part = Summary::of_shard(shard, &look);
                    parts.lock().unwrap_or_else(PoisonError::into_inner).insert(place, part);
                    bar.inc(1);
                }
            });
        }
    });
    bar.finish_and_clear();
    let mut total = Summary::new(&look.rules.buckets);
    for part in parts.into_inner().unwrap_or_else(PoisonError::into_inner).into_values() {
        total.add(part);
    }
    Ok(total)
}

/// How shards are looked at.
struct Look {
    sources: Sources,
    rules: Rules,
    cleaner: Cleaner,
    /// Whether pictures are decoded.
    decode: bool,
}

impl Summary {
    fn new(buckets: &[Bucket]) -> Self {
        let count = |bucket: &Bucket| BucketCount { width: bucket.width, height: bucket.height, num_samples: 0 };
        Self { buckets: buckets.iter().map(count).collect(), ..Self::default() }
    }

    /// Why nothing should be trained on what was looked at.
    fn problem(&self) -> Option<String> {
        match self.unreadable.first() {
            Some(Unreadable { shard, reason }) => Some(format!(
                "{} of {} shards cannot be used as they are; the first is {shard}: {reason}",
                self.unreadable.len(),
                self.num_shards
            )),
            None if self.num_native + self.num_parallel == 0 => Some("no sample of these shards would be trained".into()),
            None => None,
        }
    }

    fn of_shard(shard: &str, look: &Look) -> Self {
        let mut summary = Self { num_shards: 1, ..Self::new(&look.rules.buckets) };
        // Whether a job may train what was precomputed is for its models to say.
        let end = look.sources.read(
            shard,
            &Bitmap::default(),
            || false,
            |_| Ok(()),
            |sample| {
                summary.count(shard, sample, look);
                ControlFlow::Continue(())
            },
        );
        let reason = match end {
            Ok(end) => end.and_then(|end| end.truncated).or_else(|| (summary.num_samples == 0).then(|| "it holds no sample".into())),
            Err(error) => Some(error.to_string()),
        };
        summary.unreadable.extend(reason.map(|reason| Unreadable { shard: shard.to_owned(), reason }));
        summary
    }

    fn count(&mut self, shard: &str, sample: RawSample, look: &Look) {
        self.num_samples += 1;
        self.num_bytes += [&sample.jpg, &sample.json, &sample.latents].into_iter().flatten().map(|bytes| bytes.len() as u64).sum::<u64>();
        // What is wrong with either is for `examine` to say.
        if let Some(Ok(size)) = sample.latents.as_deref().map(cached::original_size).or(sample.jpg.as_deref().map(image::size)) {
            self.count_size(size);
        }
        let json = sample.json.as_deref().and_then(|json| serde_json::from_slice::<serde_json::Map<_, _>>(json).ok());
        for (key, value) in json.into_iter().flatten() {
            if !value.is_null() && (self.keys.len() < MAX_KEYS || self.keys.contains_key(&key)) {
                *self.keys.entry(key).or_default() += 1;
            }
        }
        let (index, key) = (sample.index, sample.key.clone());
        let examined = examine(sample, &look.rules, &look.cleaner).and_then(|encoded| {
            if look.decode
                && let Stored::Picture { jpeg, .. } = &encoded.stored
            {
                image::decode(jpeg).map_err(|error| Skip::new(index, Rule::of_picture(&error), &key, &error.to_string()))?;
            }
            Ok(encoded)
        });
        match examined {
            Ok(encoded) => {
                if let Some(bucket) = self.buckets.get_mut(encoded.bucket) {
                    bucket.num_samples += 1;
                }
                *(if encoded.caption.native { &mut self.num_native } else { &mut self.num_parallel }) += 1;
            }
            Err(skip) if skip.rule.reason() == Reason::Filtered => *self.filtered.entry(skip.rule.to_string()).or_default() += 1,
            Err(skip) => {
                *self.bad.entry(skip.rule.to_string()).or_default() += 1;
                if self.first_bad.len() < NUM_NAMED {
                    let reason = skip.detail();
                    self.first_bad.push(BadSample { shard: shard.to_owned(), key: skip.key, reason });
                }
            }
        }
    }

    fn count_size(&mut self, size: (u32, u32)) {
        let area = |(width, height): (u32, u32)| u64::from(width) * u64::from(height);
        self.num_pixels += area(size);
        if self.smallest.is_none_or(|smallest| area(size) < area(smallest)) {
            self.smallest = Some(size);
        }
        if self.largest.is_none_or(|largest| area(size) > area(largest)) {
            self.largest = Some(size);
        }
    }

    /// Adds the part of a later shard.
    fn add(&mut self, part: Self) {
        self.num_shards += part.num_shards;
        self.unreadable.extend(part.unreadable);
        self.num_samples += part.num_samples;
        self.num_bytes += part.num_bytes;
        let pixels = self.num_pixels + part.num_pixels;
        part.smallest.into_iter().chain(part.largest).for_each(|size| self.count_size(size));
        self.num_pixels = pixels;
        for (total, bucket) in self.buckets.iter_mut().zip(&part.buckets) {
            total.num_samples += bucket.num_samples;
        }
        self.num_native += part.num_native;
        self.num_parallel += part.num_parallel;
        for (total, counts) in [(&mut self.keys, part.keys), (&mut self.filtered, part.filtered), (&mut self.bad, part.bad)] {
            for (name, count) in counts {
                *total.entry(name).or_default() += count;
            }
        }
        self.first_bad.extend(part.first_bad);
        self.first_bad.truncate(NUM_NAMED);
    }
}

fn describe(summary: &Summary) -> String {
    let mut text = String::new();
    let mut line = |name: &str, what: String| {
        let _ = writeln!(text, "{name:<11}{what}");
    };
    let num_bad: u64 = summary.bad.values().sum();
    line("shards", format!("{}, {} unreadable", summary.num_shards, summary.unreadable.len()));
    line("samples", format!("{}, {}", summary.num_samples, size(summary.num_bytes)));
    if let (Some(smallest), Some(largest)) = (summary.smallest, summary.largest) {
        line("pictures", format!("{} x {} to {} x {} pixels", smallest.0, smallest.1, largest.0, largest.1));
    }
    let num_trained = summary.num_native + summary.num_parallel;
    line("trained", format!("{num_trained}: {} native, {} parallel", summary.num_native, summary.num_parallel));
    let most = summary.buckets.iter().map(|bucket| bucket.num_samples).max().unwrap_or_default().max(1);
    for bucket in &summary.buckets {
        let bar = "#".repeat((40 * bucket.num_samples).div_ceil(most) as usize);
        line("", format!("{:>4} x {:<4} {:>9}  {bar}", bucket.width, bucket.height, bucket.num_samples).trim_end().to_owned());
    }
    for (heading, counts) in [("keys", &summary.keys), ("filtered", &summary.filtered), ("bad", &summary.bad)] {
        line(heading, if heading == "keys" { counts.len().to_string() } else { counts.values().sum::<u64>().to_string() });
        for (name, count) in counts {
            line("", format!("{count:>9}  {name}"));
        }
    }
    if num_bad > 0 {
        line("first bad", String::new());
    }
    for BadSample { shard, key, reason } in &summary.first_bad {
        line("", format!("{shard} {key}: {reason}"));
    }
    for Unreadable { shard, reason } in &summary.unreadable {
        line("unreadable", format!("{shard}: {reason}"));
    }
    text
}

#[cfg(test)]
mod tests {
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
}
