//! `worker shards inspect`: every sample of a shard list, judged by a job's rules as training would judge it.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use peapod_data::bucket::Bucket;
use peapod_data::cached::{self, Recipe, Stamp};
use peapod_data::caption::Cleaner;
use peapod_data::sample::{Rules, Stored, examine, most_often};
use peapod_data::shard::RawSample;
use peapod_data::{Reason, Rule, Skip, Sources, expand_shards, image};
use peapod_model::text::{Overlooked, StudentEncoder, StudentTokenizers};
use peapod_proto::ids::Bitmap;
use peapod_proto::job::{CaptionRules, DataSection, Job, OptionalJobArgs};
use serde::Serialize;
use tch::{Device, Kind};

use super::{Report, progress_bar, size};
use crate::precompute::recipe;
use crate::setup;
use crate::trainer::guarded;

/// Broken samples that are named; all are counted.
const NUM_NAMED: usize = 10;

/// Different json keys that are counted. Shards with more of them have names for keys.
const MAX_KEYS: usize = 100;

/// Keys of the json that are named where the job's is missing.
const KEYS_NAMED: usize = 10;

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
    /// Prompts of which the end is cut off, by `student.context_length`; none where the job's encoder is not at hand.
    pub num_too_long: Option<u64>,
    /// Prompts of which the encoder's vocabulary has no piece; none likewise.
    pub num_unknown: Option<u64>,
    /// Samples with a value under each key of their json.
    pub keys: BTreeMap<String, u64>,
    /// Samples that the rules leave out, by rule.
    pub filtered: BTreeMap<String, u64>,
    /// Broken samples, by the name of what is wrong with them.
    pub bad: BTreeMap<String, u64>,
    /// The first broken samples, in the list's order.
    pub first_bad: Vec<BadSample>,
    /// In what the samples do not fit the job, where one was given.
    pub warnings: Vec<String>,
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
/// One line: the list, the job file or the tables that captions are cleaned with cannot be read. What is wrong with a shard is in the
/// report.
pub fn report(options: &Options) -> Result<Report, String> {
    let job = options.job.job().map(|job| job.read()).transpose()?.map(|read| read.job);
    let shards = match &job {
        Some(job) if options.list.is_empty() => setup::shards(job)?.0,
        _ => expand(&options.list)?,
    };
    let summary = summarise(&shards, job.as_ref(), options.decode)?;
    let text =
        if options.json { serde_json::to_string_pretty(&summary).map_err(|error| error.to_string())? + "\n" } else { describe(&summary) };
    Ok(Report { text, problem: summary.problem() })
}

fn expand(list: &[String]) -> Result<Vec<String>, String> {
    expand_shards(list).map_err(|error| error.to_string())
}

/// Reads all these shards, several at once, by a job's rules or those of one that sets none.
///
/// # Errors
/// If the tables that captions are cleaned with cannot be read.
pub fn summarise(shards: &[String], job: Option<&Job>, decode: bool) -> Result<Summary, String> {
    let data = match job {
        Some(job) => job.data.clone(),
        None => serde_json::from_str::<DataSection>(r#"{"shards": []}"#).map_err(|error| error.to_string())?,
    };
    let cleaner = Cleaner::new(data.captions.rules(), data.strict_clean).map_err(|error| error.to_string())?;
    let (tokenizers, unread) = match job.map(tokenizers).transpose() {
        Ok(tokenizers) => (tokenizers, None),
        Err(reason) => (None, Some(format!("prompts are not compared with what the student takes: {reason}"))),
    };
    let recipe = job.map(recipe::of_job);
    let look = Look { sources: Sources::default(), rules: Rules::new(&data), cleaner, recipe, tokenizers, decode };
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
    let mut total = Summary::new(&look);
    for part in parts.into_inner().unwrap_or_else(PoisonError::into_inner).into_values() {
        total.add(part);
    }
    if let Some(job) = job {
        total.warnings = warnings(&total, look.cleaner.rules(), job.student.context_length);
        total.warnings.extend(unread);
    }
    Ok(total)
}

/// The tokenizers of a job's encoder. Shards can be looked at without them: a model that is not here is no error.
fn tokenizers(job: &Job) -> Result<StudentTokenizers, String> {
    // What it computes in does not matter: no tensor is read.
    let options = setup::student_options(job, Kind::Float, Device::Cpu);
    let encoder = guarded(|| StudentEncoder::check(&job.student.path, job.student.context_length.into(), options));
    encoder?.map(StudentEncoder::into_tokenizers).map_err(|error| error.to_string())
}

/// In what samples do not fit a job that has these rules for captions: it would train on without complaint.
fn warnings(summary: &Summary, captions: &CaptionRules, context_length: u32) -> Vec<String> {
    let mut warnings = Vec::new();
    let (num_samples, num_filtered) = (summary.num_samples, summary.filtered.values().sum::<u64>());
    if 2 * num_filtered > num_samples {
        let most = most_often(summary.filtered.iter().map(|(rule, &count)| (rule.as_str(), count)));
        warnings.push(format!("{num_filtered} of {num_samples} samples are filtered out by the job's rules, most often {most}"));
    }
    let num_trained = summary.num_native + summary.num_parallel;
    if let Some(count) = summary.num_too_long.filter(|&count| count > 0) {
        warnings.push(format!(
            "the end of {count} of {num_trained} prompts is cut off: they have more tokens than student.context_length ({context_length})"
        ));
    }
    if let Some(count) = summary.num_unknown.filter(|&count| count > 0) {
        warnings.push(format!(
            "{count} of {num_trained} prompts have nothing in them that the vocabulary of student.path knows: they teach it nothing"
        ));
    }
    // Where all are native nobody misses the others' keys.
    let of_rule = |counts: &BTreeMap<String, u64>, rule: Rule| counts.get(rule.as_str()).copied().unwrap_or_default();
    let num_pairs = summary.num_parallel + of_rule(&summary.filtered, Rule::OneSided) + of_rule(&summary.bad, Rule::NoCaption);
    for (setting, key) in [("parallel_key", &captions.parallel_key), ("english_key", &captions.english_key)] {
        if num_pairs > 0 && !summary.keys.contains_key(key) {
            let keys: Vec<&str> = summary.keys.keys().take(KEYS_NAMED).map(String::as_str).collect();
            let keys = if keys.is_empty() { "nothing".into() } else { keys.join(", ") };
            warnings.push(format!(
                "no sample has `{key}` (data.captions.{setting}), which {num_pairs} need that have no native caption; in their json is {keys}"
            ));
        }
    }
    warnings
}

/// How shards are looked at.
struct Look {
    sources: Sources,
    rules: Rules,
    cleaner: Cleaner,
    /// What the job's file says of how shards were to be precomputed, if there is a job.
    recipe: Option<Recipe>,
    /// Those of the job's encoder, if there is a job and its encoder is at hand.
    tokenizers: Option<StudentTokenizers>,
    /// Whether pictures are decoded.
    decode: bool,
}

impl Summary {
    fn new(look: &Look) -> Self {
        let count = |bucket: &Bucket| BucketCount { width: bucket.width, height: bucket.height, num_samples: 0 };
        let counted = look.tokenizers.as_ref().map(|_| 0);
        let buckets = look.rules.buckets.iter().map(count).collect();
        Self { buckets, num_too_long: counted, num_unknown: counted, ..Self::default() }
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
        let mut summary = Self { num_shards: 1, ..Self::new(look) };
        // Whether its models are those that a shard was precomputed with is for them to say.
        let check = |stamp: &[u8]| -> peapod_data::Result<()> {
            look.recipe.as_ref().map_or(Ok(()), |job| Stamp::check_within(shard, stamp, job))?;
            Ok(())
        };
        let end = look.sources.read(
            shard,
            &Bitmap::default(),
            || false,
            check,
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
        let CaptionRules { parallel_key, english_key, .. } = look.cleaner.rules();
        for (key, value) in sample.json.as_deref().and_then(object).into_iter().flatten() {
            let is_asked_for = || self.keys.contains_key(&key) || [parallel_key, english_key].contains(&&key);
            if !value.is_null() && (self.keys.len() < MAX_KEYS || is_asked_for()) {
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
                // A tokenizer that fails on a prompt fails in training, and says so there.
                let overlooked = look.tokenizers.as_ref().and_then(|tokenizers| tokenizers.overlooked(&encoded.caption.prompt).ok());
                if let Some(Overlooked { cut_off, is_unknown }) = overlooked {
                    add(&mut self.num_too_long, Some(u64::from(!cut_off.is_empty())));
                    add(&mut self.num_unknown, Some(u64::from(is_unknown)));
                }
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
        add(&mut self.num_too_long, part.num_too_long);
        add(&mut self.num_unknown, part.num_unknown);
        for (total, counts) in [(&mut self.keys, part.keys), (&mut self.filtered, part.filtered), (&mut self.bad, part.bad)] {
            for (name, count) in counts {
                *total.entry(name).or_default() += count;
            }
        }
        self.first_bad.extend(part.first_bad);
        self.first_bad.truncate(NUM_NAMED);
    }
}

/// Adds to what is counted.
fn add(total: &mut Option<u64>, more: Option<u64>) {
    if let (Some(total), Some(more)) = (total, more) {
        *total += more;
    }
}

/// The json of a sample, read as generously as training reads it.
fn object(json: &[u8]) -> Option<serde_json::Map<String, serde_json::Value>> {
    let json = json.strip_prefix(b"\xef\xbb\xbf").unwrap_or(json);
    serde_json::from_slice(json).ok().or_else(|| serde_json::from_slice(&peapod_json::without_not_numbers(json)?).ok())
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
    if let (Some(num_too_long), Some(num_unknown)) = (summary.num_too_long, summary.num_unknown) {
        line("prompts", format!("{num_too_long} longer than the student's context, {num_unknown} with nothing that its vocabulary has"));
    }
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
    for warning in &summary.warnings {
        line("warning", warning.clone());
    }
    text
}

#[cfg(test)]
mod tests;
