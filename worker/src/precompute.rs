//! `worker precompute`: shards that hold what a job's frozen encoders say of its samples, instead of pictures. Training reads them as it
//! reads others, without decoding, autoencoder or, where text was precomputed too, text encoders.
//!
//! ```text
//! shard -> read (rules, decode, crop) -> encoders (autoencoder, text) -> whole tar, by its stamp known as this job's
//!          on threads of its own         on the device
//! ```
//!
//! No coordinator is asked and nothing is sent: as many as there are machines may each do a part of the list.

mod encoders;
mod read;
pub mod recipe;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::Read;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use peapod_data::ShardEnd;
use peapod_data::cached::{CachedSample, LATENTS, Recipe, SKIPPED, STAMP, Stamp, TRUNCATED, skipped};
use peapod_data::shard::{Found, read_shard};
use peapod_proto::ids::{Bitmap, ShardId};
use peapod_proto::job::{Job, JobArgs};
use peapod_proto::program::{counted, say};
use tch::Device;

use self::encoders::{Encoders, Picture};
use self::read::{Item, Reader};
use crate::device::ComputeArgs;
use crate::hub;
use crate::numbers::{self, Numbers};
use crate::setup::{self, Source};
use crate::shards::whole::WholeTar;
use crate::shards::{Report, progress_bar, size};
use crate::trainer::guarded;

/// Batches that are read and decoded at once: of so many samples some fill a batch of each bucket.
const BATCHES_A_WINDOW: usize = 4;
/// Samples whose reason is told, of each shard; all are counted.
const NUM_NAMED: usize = 3;
/// Shards that the last line names among those that are not made. Each of them has had a line of its own.
const NUM_FAILED_NAMED: usize = 10;

/// What to make of which job.
#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// Which job
    #[command(flatten)]
    pub job: JobArgs,
    /// Folder to write into: a shard for each of the job's, numbered as in its list
    #[arg(long)]
    pub out: PathBuf,
    /// Precompute the states of captions too: several times larger, for a little less work in training
    #[arg(long)]
    pub text: bool,
    /// Numbers to store [default: those that the models compute in, so that nothing is lost]
    #[arg(long, value_enum)]
    pub numbers: Option<Numbers>,
    /// Shards to make, by their places in the job's list from 0: 0..99,120 [default: all]
    #[arg(long)]
    pub shards: Option<Places>,
    /// Where to compute
    #[command(flatten)]
    pub compute: ComputeArgs,
    /// Samples that are encoded at once
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub batch: u32,
}

/// Places in a list, as ranges that include their ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Places(Vec<(u32, u32)>);

impl FromStr for Places {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let range = |part: &str| {
            let (first, last) = part.split_once("..").unwrap_or((part, part));
            let range = first.trim().parse().ok().zip(last.trim().parse().ok());
            range.filter(|(first, last)| first <= last).ok_or_else(|| format!("`{part}` is no place and no range: write 0..99,120"))
        };
        text.split(',').map(range).collect::<Result<_, _>>().map(Self)
    }
}

/// A job whose arguments are checked.
pub struct Plan {
    options: Options,
    job: Job,
    shards: Vec<String>,
    sources: Vec<Source>,
    /// Places of the shards to make.
    places: Vec<usize>,
}

impl Plan {
    /// Reads the job file and expands its shard list.
    ///
    /// # Errors
    /// What is wrong with the job file or the arguments.
    pub fn new(options: &Options) -> Result<Self, String> {
        let out = options.out.display().to_string();
        if out.contains("://") {
            return Err(format!("--out {out} must be a local folder: what is in it can be copied to a store afterwards"));
        }
        let job = options.job.read()?.job;
        let (shards, sources) = setup::shards(&job)?;
        let places = match &options.shards {
            None => (0..shards.len()).collect(),
            Some(Places(ranges)) => {
                if let Some((_, last)) = ranges.iter().find(|(_, last)| *last as usize >= shards.len()) {
                    return Err(format!("--shards: there is no shard {last}: the job's list has {}, from 0", shards.len()));
                }
                let mut places: Vec<usize> = ranges.iter().flat_map(|&(first, last)| first as usize..=last as usize).collect();
                places.sort_unstable();
                places.dedup();
                places
            }
        };
        Ok(Self { options: options.clone(), job, shards, sources, places })
    }

    /// Makes the shards that are not there yet. What cannot be made is told, and the others are made.
    ///
    /// # Errors
    /// One line: models that cannot be loaded. Shards that could not be made are in the report.
    pub fn run(&self, device: Device) -> Result<Report, String> {
        let Options { text, numbers, compute, batch, .. } = &self.options;
        let threads = compute.settle_threads();
        hub::bring(setup::model_paths(&self.job), &hub::Log).map_err(|error| error.to_string())?;
        let encoders = Encoders::load(&self.job, device, *text, numbers.map(Numbers::kind)).map_err(|error| error.to_string())?;
        let misaligned = self.job.data.buckets.iter().find(|sides| sides.iter().any(|side| side % encoders.downscale() != 0));
        if let Some([width, height]) = misaligned {
            let downscale = encoders.downscale();
            return Err(format!("data.buckets: [{width}, {height}] must be multiples of {downscale}, which the model's VAE asks for"));
        }
        if *text && self.job.student.dropout {
            say(format_args!("worker: student.dropout is on: the student's states are others each time and are left to training"));
        }
        let maker = Maker {
            recipe: encoders.recipe(&self.job).map_err(|error| error.to_string())?,
            numbers: numbers.map_or("as computed".to_owned(), |numbers| numbers::name(numbers.kind())),
            reader: Reader::new(&self.job, threads).map_err(|error| error.to_string())?,
            encoders,
            batch: *batch as usize,
        };
        let bar = progress_bar(Some(self.places.len() as u64), "shards");
        let (mut total, mut failures) = (Made::default(), Vec::new());
        for &place in &self.places {
            let url = &self.shards[place];
            match maker.make(url, ShardId(place as u32), &self.target(place)) {
                Ok(made) => {
                    for warning in &made.warnings {
                        bar.suspend(|| say(format_args!("worker: {url}: {warning}")));
                    }
                    total.add(made);
                }
                Err(problem) => {
                    bar.suspend(|| say(format_args!("worker: shard {place} is not made: {problem}")));
                    failures.push((place, problem));
                }
            }
            bar.inc(1);
        }
        bar.finish_and_clear();
        Ok(Report { text: self.describe(&total, failures.len()), problem: self.problem(&failures) })
    }

    /// That shards are missing, which of them, and what to do.
    fn problem(&self, failures: &[(usize, String)]) -> Option<String> {
        let (_, first) = failures.first()?;
        let mut places: Vec<String> = failures.iter().take(NUM_FAILED_NAMED).map(|(place, _)| place.to_string()).collect();
        if failures.len() > places.len() {
            places.push(format!("and {} more", failures.len() - places.len()));
        }
        Some(format!(
            "{} of {} shards are not made ({}); the first: {first}. Put it right and start the same command again: only what is missing is made then",
            failures.len(),
            self.places.len(),
            places.join(", ")
        ))
    }

    /// Digits of a shard's number.
    fn width(&self) -> usize {
        self.shards.len().saturating_sub(1).to_string().len().max(5)
    }

    fn target(&self, place: usize) -> PathBuf {
        self.options.out.join(format!("{place:0width$}.tar", width = self.width()))
    }

    fn describe(&self, total: &Made, num_failed: usize) -> String {
        let Made { num_shards, num_partial, num_there, num_samples, num_bytes, ref skipped, .. } = *total;
        let mut text = String::new();
        let mut line = |name: &str, what: String| {
            let _ = writeln!(text, "{name:<11}{what}");
        };
        let partial = if num_partial > 0 { format!(" ({num_partial} in part)") } else { String::new() };
        let failed = if num_failed > 0 { format!(", {num_failed} failed") } else { String::new() };
        line("shards", format!("{num_shards} made{partial}, {num_there} were there{failed}"));
        line("samples", format!("{num_samples}, {}", size(num_bytes)));
        line("skipped", skipped.values().sum::<u64>().to_string());
        for (rule, count) in skipped {
            line("", format!("{count:>9}  {rule}"));
        }
        // The list would name shards that are not there, whether they failed or are left to another machine.
        let num_missing = (0..self.shards.len()).filter(|&place| !self.target(place).exists()).count();
        if num_missing > 0 {
            let all = counted(self.shards.len(), "shard");
            line("missing", format!("{num_missing} of {all}; once they are there, this command says how a job names them"));
            return text;
        }
        let mut first = 0;
        for Source { name, len } in &self.sources {
            let (from, to, width) = (first, first + len.saturating_sub(1), self.width());
            let list = self.options.out.join(format!("{{{from:0width$}..{to:0width$}}}.tar"));
            let source = if name.is_empty() { String::new() } else { format!(", in source {name:?}") };
            line("for a job", format!("shards = [{:?}]{source}", list.display().to_string()));
            first += len;
        }
        text
    }
}

/// What came of shards.
#[derive(Debug, Default)]
struct Made {
    num_shards: u64,
    /// Those among them that were made of what precedes a break.
    num_partial: u64,
    /// Shards that were there before.
    num_there: u64,
    /// Samples that train.
    num_samples: u64,
    num_bytes: u64,
    /// Samples that do not, by rule.
    skipped: BTreeMap<&'static str, u64>,
    /// What is wrong with the shard and with the first of its samples.
    warnings: Vec<String>,
}

impl Made {
    fn add(&mut self, other: Self) {
        self.num_shards += other.num_shards;
        self.num_partial += other.num_partial;
        self.num_there += other.num_there;
        self.num_samples += other.num_samples;
        self.num_bytes += other.num_bytes;
        other.skipped.into_iter().for_each(|(rule, count)| *self.skipped.entry(rule).or_default() += count);
    }
}

/// Makes one shard after the other.
struct Maker {
    reader: Reader,
    encoders: Encoders,
    recipe: Recipe,
    numbers: String,
    batch: usize,
}

impl Maker {
    /// Makes `target` of the shard at `url`, unless it is there.
    fn make(&self, url: &str, shard: ShardId, target: &Path) -> Result<Made, String> {
        let stamp = Stamp::new(url, &self.numbers, self.recipe.clone());
        if target.exists() {
            compare(target, &stamp)?;
            return Ok(Made { num_there: 1, ..Made::default() });
        }
        let mut tar = WholeTar::begin(target.to_owned())?;
        tar.append(STAMP, &stamp.to_bytes().map_err(|error| error.to_string())?)?;
        let mut made = Made { num_shards: 1, ..Made::default() };
        // The next window is read and decoded while one is encoded and the one before is written. Who stops takes its ends of the channels
        // with it.
        let (sender, windows) = sync_channel(1);
        let end = std::thread::scope(|scope| {
            let send = move |items| if sender.send(items).is_ok() { ControlFlow::Continue(()) } else { ControlFlow::Break(()) };
            let (reader, window) = (&self.reader, BATCHES_A_WINDOW * self.batch);
            let reading = scope.spawn(move || reader.read(url, shard, window, send));
            let (sender, to_write) = sync_channel(1);
            let writing = scope.spawn(|| write(to_write, &mut tar, &mut made));
            let encoded = self.encode_all(windows, sender);
            let written = writing.join().unwrap_or_else(|_| Err(format!("the thread that writes {} panicked", target.display())));
            let read = reading.join().unwrap_or_else(|_| Err(format!("the thread that reads {url} panicked")));
            written.and(encoded).and(read)
        })?;
        if let Some(ShardEnd { num_samples, truncated: Some(truncated) }) = end {
            // Made of nothing it would be taken for done by the next run, and by training for a shard without samples.
            if num_samples == 0 {
                return Err(format!("{url}: {truncated}"));
            }
            tar.append(TRUNCATED, truncated.as_bytes())?;
            made.num_partial = 1;
            made.warnings
                .push(format!("{truncated}; the rest of it is lost, unless you mend it, remove {} and start again", target.display()));
        }
        made.num_bytes = tar.num_bytes();
        tar.finish()?;
        Ok(made)
    }

    /// Encodes windows as they come, until there are no more or nobody takes them.
    fn encode_all(&self, windows: Receiver<Vec<Item>>, sender: SyncSender<Encoded>) -> Result<(), String> {
        for window in windows {
            let encoded = match guarded(|| self.encode(&window)) {
                Ok(encoded) => encoded.map_err(|error| error.to_string())?,
                Err(panic) => {
                    return Err(format!("{}; if memory is short, give a smaller --batch", panic.lines().next().unwrap_or_default()));
                }
            };
            if sender.send((window, encoded)).is_err() {
                break;
            }
        }
        Ok(())
    }

    /// Encodes the pictures of a window, a bucket at a time; the results in the samples' order.
    fn encode(&self, window: &[Item]) -> peapod_model::Result<Vec<Option<CachedSample>>> {
        let mut by_bucket: BTreeMap<(u32, u32), Vec<(usize, &Picture)>> = BTreeMap::new();
        for (at, item) in window.iter().enumerate() {
            if let Ok(picture) = &item.picture {
                by_bucket.entry(picture.bucket).or_default().push((at, picture));
            }
        }
        let mut encoded: Vec<Option<CachedSample>> = window.iter().map(|_| None).collect();
        for batch in by_bucket.values().flat_map(|pictures| pictures.chunks(self.batch)) {
            let pictures: Vec<&Picture> = batch.iter().map(|(_, picture)| *picture).collect();
            for ((at, _), sample) in batch.iter().zip(self.encoders.encode(&pictures)?) {
                encoded[*at] = Some(sample);
            }
        }
        Ok(encoded)
    }
}

/// A window, and what was made of its pictures.
type Encoded = (Vec<Item>, Vec<Option<CachedSample>>);

/// Writes windows as they come.
fn write(windows: Receiver<Encoded>, tar: &mut WholeTar, made: &mut Made) -> Result<(), String> {
    for (window, encoded) in windows {
        for (item, encoded) in window.iter().zip(encoded) {
            let member = |extension: &str| format!("{}.{extension}", item.key);
            if let Some(json) = &item.json {
                tar.append(&member("json"), json)?;
            }
            match (&item.picture, encoded) {
                (Ok(_), Some(sample)) => {
                    tar.append(&member(LATENTS), &sample.to_bytes().map_err(|error| error.to_string())?)?;
                    made.num_samples += 1;
                }
                (Ok(_), None) => return Err(format!("{} was not encoded", item.key)),
                (Err(skip), _) => {
                    tar.append(&member(SKIPPED), &skipped(skip))?;
                    *made.skipped.entry(skip.rule.as_str()).or_default() += 1;
                    if skip.rule.reason() == peapod_data::Reason::Bad && made.warnings.len() < NUM_NAMED {
                        made.warnings.push(format!("{}: {}", skip.key, skip.detail()));
                    }
                }
            }
        }
    }
    Ok(())
}

/// Checks that a shard which is there is the one that would be made.
fn compare(target: &Path, wanted: &Stamp) -> Result<(), String> {
    let named = |words: String| format!("{} is there, {words}: remove it or give another --out", target.display());
    let file = std::fs::File::open(target).map_err(|error| format!("open {}: {error}", target.display()))?;
    let mut found = None;
    read_shard(file.take(MAX_STAMP_READ), &Bitmap::default(), |first| {
        if let Found::Stamp(stamp) = first {
            found = Some(stamp);
        }
        ControlFlow::Break(())
    });
    let Some(found) = found else { return Err(named("and is no precomputed shard".into())) };
    let found = Stamp::parse(&target.display().to_string(), &found).map_err(|error| error.to_string())?;
    if found.shard != wanted.shard {
        return Err(named(format!("made of {} instead of {}", found.shard, wanted.shard)));
    }
    if found.numbers != wanted.numbers {
        return Err(named(format!("its numbers are {} instead of {}", found.numbers, wanted.numbers)));
    }
    let mut differences = found.recipe.differences(&wanted.recipe);
    if differences.is_empty() && !wanted.recipe.differences(&found.recipe).is_empty() {
        differences.push("it holds less text".into());
    }
    if differences.is_empty() { Ok(()) } else { Err(named(differences.join(", "))) }
}

/// The stamp lies within so many bytes of a shard.
const MAX_STAMP_READ: u64 = 2 << 20;
