//! Samples that are never trained: read once, the same on every worker, and computed with the same randomness each time.
//!
//! How noisy a loss is comes mostly from its timesteps, so these are not drawn. They are spread evenly over the diffusion: sample `i` of
//! `n` has timestep `floor((i + 1/2) T / n)`. Noise, posterior and crop are drawn as for a sample that is trained, under an epoch that no
//! training has; no prompt is dropped. So the loss of given weights is one number, whoever computes which part of it.

use std::ops::ControlFlow;

use fast_image_resize::Resizer;
use peapod_proto::ids::{Bitmap, Epoch, LeaseId, SampleName, ShardId};

use crate::cached::{Stamp, TextShapes};
use crate::caption::Cleaner;
use crate::loader::{Batch, LoaderConfig, Prepared, prepare};
use crate::sample::{Encoded, Reason, Rules, examine};
use crate::source::{SourceOptions, Sources, expand_shards, shown_url};
use crate::{Error, Result};

/// The epoch under which validation samples draw: names of trained samples stay below it.
pub const EPOCH: Epoch = Epoch(SampleName::LIMIT);

/// Encoded bytes that a worker holds for validation.
const MAX_BYTES: u64 = 1 << 30;

/// The samples of a job's validation.
pub struct ValidationSet {
    config: LoaderConfig,
    samples: Vec<Kept>,
    text_shapes: TextShapes,
}

/// A sample that is usable as far as its header tells.
struct Kept {
    name: SampleName,
    key: String,
    encoded: Encoded,
}

impl ValidationSet {
    /// Reads the first `limit` usable samples of the shards that `patterns` stand for, or all of them if it is 0.
    ///
    /// The rules of `config` hold as for training, but for the dropping of prompts. `warn` is told of broken samples, which are passed
    /// over, as are those that a rule leaves out: all workers read the same files and so keep the same samples.
    ///
    /// Errors: those of [`expand_shards`]; [`Error::Open`], [`Error::Store`] and [`Error::Recipe`] naming the shard; [`Error::Validation`]
    /// if no sample is usable, or they are too large to be held.
    pub fn load(patterns: &[String], limit: u32, config: &LoaderConfig, mut warn: impl FnMut(&str)) -> Result<Self> {
        let config = LoaderConfig { condition_dropout: 0.0, ..config.clone() };
        config.validate()?;
        let (rules, cleaner) = (Rules::new(&config.data), Cleaner::new(config.data.captions.rules(), config.data.strict_clean)?);
        let sources = Sources::new(SourceOptions::new(&config.data));
        let shards = expand_shards(patterns)?;
        let limit = if limit == 0 { usize::MAX } else { limit as usize };
        let mut samples: Vec<Kept> = Vec::new();
        let mut num_bytes = 0;
        for (shard, url) in (0..).map(ShardId).zip(&shards) {
            if samples.len() == limit || num_bytes > MAX_BYTES {
                break;
            }
            let check = |stamp: &[u8]| Ok(Stamp::check(url, stamp, &config.recipe)?);
            let end = sources.read(
                url,
                &Bitmap::default(),
                || false,
                check,
                |raw| {
                    if samples.len() == limit || num_bytes > MAX_BYTES {
                        return ControlFlow::Break(());
                    }
                    let (index, key) = (raw.index, raw.key.clone());
                    match examine(raw, &rules, &cleaner) {
                        Ok(encoded) => {
                            num_bytes += encoded.stored.num_bytes() as u64;
                            samples.push(Kept { name: SampleName { epoch: EPOCH, shard, index }, key, encoded });
                        }
                        Err(skip) if skip.rule.reason() == Reason::Bad => {
                            warn(&format!("validation sample {} in {}: {}", skip.key, shown_url(url), skip.detail()));
                        }
                        Err(_) => {}
                    }
                    ControlFlow::Continue(())
                },
            )?;
            if let Some(broken_off) = end.and_then(|end| end.truncated) {
                warn(&format!("validation shard {}: {broken_off}; the rest of it is lost", shown_url(url)));
            }
        }
        if num_bytes > MAX_BYTES {
            return Err(Error::Validation(format!(
                "the pictures of {} are more than {MAX_BYTES} bytes: each worker holds them all, so give fewer, or validation.samples",
                patterns.join(", ")
            )));
        }
        if samples.is_empty() {
            return Err(Error::Validation(format!("no sample of {} can be used", patterns.join(", "))));
        }
        Ok(Self { config, samples, text_shapes: TextShapes::default() })
    }

    /// Number of samples.
    #[must_use]
    pub fn len(&self) -> usize {
        self.samples.len()
    }

    /// A set is never empty.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        false
    }

    /// What tells one set from another: each sample's place, key and size of its picture.
    pub fn inventory(&self) -> impl Iterator<Item = (SampleName, &str, usize)> {
        self.samples.iter().map(|sample| (sample.name, sample.key.as_str(), sample.encoded.stored.num_bytes()))
    }

    /// The batches of one member's part, which is every sample `i` with `i mod num_members = member`; decoded as they are taken.
    ///
    /// A picture that cannot be decoded is told to `warn` and left out; the timesteps of the others stay as they are.
    pub fn part(&self, member: u32, num_members: u32, mut warn: impl FnMut(&str)) -> impl Iterator<Item = Batch> {
        let mut part: Vec<usize> = (member as usize..self.len()).step_by(num_members.max(1) as usize).collect();
        // Stable: within a bucket they stay in order.
        part.sort_by_key(|&at| self.samples[at].encoded.bucket);
        let batches: Vec<Vec<usize>> = part
            .chunk_by(|&left, &right| self.samples[left].encoded.bucket == self.samples[right].encoded.bucket)
            .flat_map(|bucket| bucket.chunks(self.config.micro_batch))
            .map(<[usize]>::to_vec)
            .collect();
        batches.into_iter().filter_map(move |batch| self.decode(&batch, &mut warn))
    }

    /// Decodes one batch, on as many threads as training uses; nothing if none of its pictures can be.
    fn decode(&self, batch: &[usize], warn: &mut impl FnMut(&str)) -> Option<Batch> {
        let each_takes = batch.len().div_ceil(self.config.num_decode_threads());
        let prepared: Vec<Result<Prepared>> = std::thread::scope(|scope| {
            let decode = |some: &[usize]| {
                let mut resizer = Resizer::new();
                some.iter().map(|&at| self.prepare(&mut resizer, at)).collect::<Vec<_>>()
            };
            let (first, others) = batch.split_at(each_takes.min(batch.len()));
            let others: Vec<_> = others.chunks(each_takes).map(|some| scope.spawn(move || decode(some))).collect();
            let first = decode(first);
            first
                .into_iter()
                .chain(others.into_iter().flat_map(|thread| thread.join().unwrap_or_else(|_| vec![Err(Error::ThreadPanicked)])))
                .collect()
        });
        let mut samples = Vec::with_capacity(batch.len());
        for (prepared, &at) in prepared.into_iter().zip(batch) {
            match prepared {
                Ok(prepared) => samples.push(prepared),
                Err(error) => warn(&format!("validation sample {}: {error}", self.samples[at].key)),
            }
        }
        let [width, height] = self.config.data.buckets.get(self.samples[*batch.first()?].encoded.bucket).copied()?;
        (!samples.is_empty()).then_some(Batch { bucket: (width, height), samples })
    }

    fn prepare(&self, resizer: &mut Resizer, at: usize) -> Result<Prepared> {
        let Kept { name, encoded, .. } = &self.samples[at];
        let mut prepared = prepare(resizer, *name, LeaseId(0), encoded.clone(), &self.config, &self.text_shapes)?;
        prepared.draws.timestep = timestep(at, self.len(), self.config.num_timesteps);
        Ok(prepared)
    }
}

/// The middle of the `at`-th of `len` equal parts of `0..num_timesteps`.
fn timestep(at: usize, len: usize, num_timesteps: u32) -> u32 {
    ((2 * at as u64 + 1) * u64::from(num_timesteps) / (2 * len as u64)) as u32
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::loader::Content;
    use crate::testing::{data_section, jpeg_of, noisy_jpeg, tar_of};

    const GOOD: &[u8] = r#"{"caption_zh": "红", "caption_en": "red"}"#.as_bytes();

    fn config() -> LoaderConfig {
        let mut data = data_section();
        (data.buckets, data.decode_threads) = (vec![[32, 32], [64, 32]], 2);
        LoaderConfig::new(data, 7, 2, 0.5)
    }

    fn write(folder: &Path, name: &str, members: &[(&str, &[u8])]) -> String {
        let path = folder.join(name);
        std::fs::write(&path, tar_of(members)).unwrap();
        path.to_str().unwrap().to_owned()
    }

    /// Five usable samples, every second one wide, behind a broken one.
    fn six(folder: &Path) -> String {
        let pictures: Vec<Vec<u8>> = (0..5).map(|index| noisy_jpeg(if index % 2 == 0 { 40 } else { 80 }, 40, index)).collect();
        let names: Vec<[String; 2]> = (0..5).map(|index| [format!("{index}.jpg"), format!("{index}.json")]).collect();
        let mut members: Vec<(&str, &[u8])> = vec![("broken.json", GOOD)];
        for (picture, [jpg, json]) in pictures.iter().zip(&names) {
            members.extend([(jpg.as_str(), picture.as_slice()), (json.as_str(), GOOD)]);
        }
        write(folder, "0.tar", &members)
    }

    fn load(patterns: &[String], limit: u32) -> (Result<ValidationSet>, Vec<String>) {
        let mut warnings = Vec::new();
        let set = ValidationSet::load(patterns, limit, &config(), |warning| warnings.push(warning.to_owned()));
        (set, warnings)
    }

    fn samples(set: &ValidationSet, member: u32, num_members: u32) -> Vec<Prepared> {
        let batches = set.part(member, num_members, |warning| panic!("{warning}"));
        batches
            .flat_map(|batch| {
                assert!(batch.samples.len() <= 2);
                let bytes = batch.bucket.0 as usize * batch.bucket.1 as usize * 3;
                let len = |sample: &Prepared| matches!(&sample.content, Content::Pixels(pixels) if pixels.len() == bytes);
                assert!(batch.samples.iter().all(len), "a batch is of one bucket");
                batch.samples
            })
            .collect()
    }

    #[test]
    fn samples_are_computed_alike_whoever_has_them() {
        let folder = tempfile::tempdir().unwrap();
        let (set, warnings) = load(&[six(folder.path())], 0);
        let set = set.unwrap();
        assert_eq!((set.len(), warnings.len()), (5, 1));
        assert!(warnings[0].contains("broken") && warnings[0].contains("no member .jpg"), "{warnings:?}");

        let mut alone = samples(&set, 0, 1);
        let mut shared: Vec<Prepared> = (0..3).flat_map(|member| samples(&set, member, 3)).collect();
        for samples in [&mut alone, &mut shared] {
            samples.sort_by_key(|sample| sample.name);
        }
        assert_eq!(alone, shared);
        assert_eq!(alone.iter().map(|sample| sample.name.index).collect::<Vec<_>>(), [1, 2, 3, 4, 5]);
        assert_eq!(alone.iter().map(|sample| sample.draws.timestep).collect::<Vec<_>>(), [100, 300, 500, 700, 900]);
        assert!(alone.iter().all(|sample| sample.name.epoch == EPOCH && !sample.draws.drop_condition), "half of them would be dropped");
        assert_eq!(samples(&set, 0, 8).len(), 1, "a member more than there are samples has none");
        assert!(samples(&set, 7, 8).is_empty());
    }

    #[test]
    fn limit_takes_the_first_samples() {
        let folder = tempfile::tempdir().unwrap();
        let path = six(folder.path());
        let (set, _) = load(&[path.clone(), path], 3);
        let set = set.unwrap();
        assert_eq!(
            set.inventory().map(|(name, key, _)| (name.shard.0, name.index, key)).collect::<Vec<_>>(),
            [(0, 1, "0"), (0, 2, "1"), (0, 3, "2")]
        );
    }

    #[test]
    fn picture_that_breaks_off_is_left_out_and_named() {
        let folder = tempfile::tempdir().unwrap();
        let whole = noisy_jpeg(40, 40, 1);
        let members: [(&str, &[u8]); 4] =
            [("half.jpg", &whole[..whole.len() * 3 / 4]), ("half.json", GOOD), ("whole.jpg", &whole), ("whole.json", GOOD)];
        let (set, warnings) = load(&[write(folder.path(), "0.tar", &members)], 0);
        let set = set.unwrap();
        assert_eq!((set.len(), warnings.len()), (2, 0), "its header is whole");
        let mut warnings = Vec::new();
        let batches: Vec<Batch> = set.part(0, 1, |warning| warnings.push(warning.to_owned())).collect();
        assert_eq!(batches.iter().flat_map(|batch| &batch.samples).map(|sample| sample.draws.timestep).collect::<Vec<_>>(), [750]);
        assert!(warnings.len() == 1 && warnings[0].starts_with("validation sample half: jpg: "), "{warnings:?}");
    }

    #[test]
    fn set_without_a_usable_sample_is_an_error_that_names_it() {
        let folder = tempfile::tempdir().unwrap();
        let fails = |pattern: &str| load(&[pattern.to_owned()], 0).0.err().unwrap().to_string();
        assert!(fails("/no/such/shard.tar").starts_with("open /no/such/shard.tar: "));
        let picture = jpeg_of(40, 40, [1, 2, 3]);
        let filtered = write(folder.path(), "0.tar", &[("a.jpg", &picture), ("a.json", r#"{"caption_zh": "红"}"#.as_bytes())]);
        assert_eq!(fails(&filtered), format!("no sample of {filtered} can be used"));
    }

    #[test]
    fn timesteps_are_the_middles_of_equal_parts() {
        assert_eq!((0..4).map(|at| timestep(at, 4, 1000)).collect::<Vec<_>>(), [125, 375, 625, 875]);
        assert_eq!(timestep(0, 1, 1000), 500);
        assert!((0..5000).map(|at| timestep(at, 5000, 1000)).all(|step| step < 1000));
    }
}
