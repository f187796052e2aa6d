//! Reads a shard as training would, up to decoded pictures, some samples at a time.

use std::ops::ControlFlow;
use std::thread;

use fast_image_resize::Resizer;
use peapod_data::bucket::Bucket;
use peapod_data::caption::Cleaner;
use peapod_data::draws::SampleRng;
use peapod_data::sample::{Encoded, Rules, Stored, examine};
use peapod_data::shard::{Found, read_shard};
use peapod_data::{Rule, ShardEnd, Skip, SourceOptions, Sources, image};
use peapod_proto::ids::{Bitmap, Epoch, SampleName, ShardId};
use peapod_proto::job::Job;

use super::encoders::Picture;

/// The pass over the data whose crops are made.
const EPOCH: Epoch = Epoch(0);

/// A sample of a shard.
pub struct Item {
    /// Its key in the tar.
    pub key: String,
    /// The member `.json`, if it has one.
    pub json: Option<Vec<u8>>,
    /// What it shows, or why it is not trained.
    pub picture: Result<Picture, Skip>,
}

/// A job's rules, and how its shards are reached.
pub struct Reader {
    sources: Sources,
    rules: Rules,
    cleaner: Cleaner,
    fast_shrink: bool,
    seed: u64,
    num_threads: usize,
}

/// A sample whose picture is not decoded yet.
struct Waiting {
    index: u32,
    key: String,
    json: Option<Vec<u8>>,
    examined: Result<Encoded, Skip>,
}

impl Reader {
    /// The reader of a job, which decodes on this many threads.
    ///
    /// # Errors
    /// If the tables that captions are cleaned with cannot be read.
    pub fn new(job: &Job, num_threads: usize) -> peapod_data::Result<Self> {
        let data = &job.data;
        Ok(Self {
            sources: Sources::new(SourceOptions::new(data)),
            rules: Rules::new(data),
            cleaner: Cleaner::new(data.captions.rules(), data.strict_clean)?,
            fast_shrink: data.fast_shrink,
            seed: job.seed,
            num_threads: num_threads.max(1),
        })
    }

    /// Reads the shard at `url` to its end and gives all its samples to `take`, up to `window` at a time, until that breaks off.
    ///
    /// # Errors
    /// One line: the shard cannot be had, or is none of pictures.
    pub fn read(
        &self,
        url: &str,
        shard: ShardId,
        window: usize,
        mut take: impl FnMut(Vec<Item>) -> ControlFlow<()>,
    ) -> Result<Option<ShardEnd>, String> {
        let mut tar = self.sources.open(url, || false).map_err(|error| error.to_string())?;
        let halt = tar.halt();
        let mut waiting = Vec::with_capacity(window);
        let mut is_cached = false;
        let end = read_shard(&mut tar, &Bitmap::default(), |found| {
            let raw = match found {
                Found::Sample(raw) => raw,
                Found::Stamp(_) => {
                    is_cached = true;
                    return ControlFlow::Break(());
                }
            };
            // A sample that a failed read cut short is not a broken one.
            if halt.is_set() {
                return ControlFlow::Break(());
            }
            let (index, key, json) = (raw.index, raw.key.clone(), raw.json.clone());
            waiting.push(Waiting { index, key, json, examined: examine(raw, &self.rules, &self.cleaner) });
            if waiting.len() < window {
                return ControlFlow::Continue(());
            }
            take(self.decode(std::mem::take(&mut waiting), shard))
        });
        if is_cached {
            return Err(format!("{url} is precomputed already"));
        }
        halt.check().map_err(|error| error.to_string())?;
        if end.is_some() && !waiting.is_empty() && take(self.decode(waiting, shard)).is_break() {
            return Ok(None);
        }
        Ok(end)
    }

    /// Decodes pictures on all threads; the results in the samples' order.
    fn decode(&self, waiting: Vec<Waiting>, shard: ShardId) -> Vec<Item> {
        let part_len = waiting.len().div_ceil(self.num_threads).max(1);
        let mut parts = Vec::new();
        let mut waiting = waiting.into_iter();
        while waiting.len() > 0 {
            parts.push(waiting.by_ref().take(part_len).collect::<Vec<_>>());
        }
        thread::scope(|scope| {
            let decode = |part: Vec<Waiting>| {
                let mut resizer = Resizer::new();
                part.into_iter().map(|waiting| self.decode_one(&mut resizer, waiting, shard)).collect::<Vec<_>>()
            };
            let threads: Vec<_> = parts.into_iter().map(|part| scope.spawn(move || decode(part))).collect();
            // The decoders catch their panics; another one is this program's error and ends it.
            threads.into_iter().flat_map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))).collect()
        })
    }

    fn decode_one(&self, resizer: &mut Resizer, waiting: Waiting, shard: ShardId) -> Item {
        let Waiting { index, key, json, examined } = waiting;
        let decode = |Encoded { stored, size, bucket, caption }: Encoded| {
            let bucket = self.rules.buckets.get(bucket).copied().unwrap_or(Bucket { width: 0, height: 0 });
            let rng = SampleRng::new(self.seed, SampleName { epoch: EPOCH, shard, index });
            let cropped = match &stored {
                Stored::Picture { jpeg, turn } => image::cut(resizer, jpeg, *turn, size, bucket, self.fast_shrink, &rng),
                Stored::Latents(_) => Err(peapod_data::Error::Cached("in a shard of pictures".into())),
            };
            let skip = |error: peapod_data::Error| Skip::new(index, Rule::of_picture(&error), &key, &error.to_string());
            let image::Cropped { pixels, corner } = cropped.map_err(skip)?;
            Ok(Picture { pixels, bucket: (bucket.width, bucket.height), original_size: size, crop: corner, caption })
        };
        let picture = examined.and_then(decode);
        Item { key, json, picture }
    }
}
