//! The readers of foreign bytes, each as a function of bytes alone: what `fuzz/` throws at them.
//!
//! Whatever the bytes are, a reader answers or refuses; the tests here run the corpus that lies in `fuzz/corpus`, one folder a reader.

use std::ops::ControlFlow;
use std::sync::LazyLock;

use fast_image_resize::Resizer;
use peapod_proto::ids::{Bitmap, Epoch, SampleName, ShardId};
use peapod_proto::job::{CaptionsSection, DataSection, Language};

use crate::bucket::Bucket;
use crate::cached::{self, CachedSample, Stamp};
use crate::caption::Cleaner;
use crate::draws::SampleRng;
use crate::sample::{Rules, examine};
use crate::shard::{Found, RawSample, read_shard};
use crate::{expand_shards, format, image, source};

/// What a reader says: nothing, or why it refuses.
type Verdict = Result<(), String>;

/// Pictures with more pixels are not decoded here: their time goes into pixels, not into reading.
const MAX_DECODED: u64 = 1 << 20;
/// Longer lists are not expanded here.
const MAX_SHARDS: u64 = 10_000;

/// A picture that is in order, for samples whose json is not.
const PICTURE: &[u8] = include_bytes!("../testdata/turn1.jpg");

/// Reads a tar to its end: every sample has the next index, and the end counts them all.
pub fn tar(bytes: &[u8]) -> Verdict {
    let (mut num, mut fault) = (0, None);
    let end = read_shard(bytes, &Bitmap::default(), |found| {
        let Found::Sample(sample) = found else { return ControlFlow::Continue(()) };
        assert_eq!(sample.index, num, "samples come in order");
        num += 1;
        fault = fault.take().or(sample.fault);
        ControlFlow::Continue(())
    });
    let end = end.ok_or("the reader broke off by itself")?;
    assert_eq!(end.num_samples, num, "the end counts what was given");
    match (end.truncated, fault) {
        (Some(reason), _) => Err(reason),
        (None, Some((rule, words))) => Err(format!("{rule}: {words}")),
        (None, None) => Ok(()),
    }
}

/// Reads a picture's header, decodes it, turns it and cuts a bucket out of it.
pub fn picture(bytes: &[u8]) -> Verdict {
    let refuse = |error: crate::Error| error.to_string();
    let (width, height) = image::size(bytes).map_err(refuse)?;
    let turn = format::turn(bytes);
    if u64::from(width) * u64::from(height) > MAX_DECODED {
        return Ok(());
    }
    let picture = image::decode(bytes).map_err(refuse)?;
    assert_eq!((picture.width, picture.height), (width, height), "the header tells the picture's size");
    let picture = turn.apply(picture);
    assert_eq!((picture.width, picture.height), turn.size((width, height)), "a turn tells the turned size");
    let bucket = Bucket { width: 24, height: 16 };
    let rng = SampleRng::new(0, SampleName { epoch: Epoch(0), shard: ShardId(0), index: 0 });
    let crop = image::cover(&mut Resizer::new(), &picture, bucket, &rng).map_err(refuse)?;
    assert_eq!(crop.pixels.len(), 24 * 16 * 3, "a crop fills its bucket");
    Ok(())
}

/// Examines a sample with this json by the rules of two languages, one known by its script and one by its key.
pub fn json_sample(bytes: &[u8]) -> Verdict {
    static LANGUAGES: LazyLock<Vec<(Rules, Cleaner)>> = LazyLock::new(|| {
        let of = |language| {
            let captions = CaptionsSection { language, ..CaptionsSection::default() };
            let cleaner = Cleaner::new(captions.rules(), true).ok()?;
            let mut data: DataSection = serde_json::from_str(r#"{"shards": []}"#).ok()?;
            data.captions = captions;
            Some((Rules::new(&data), cleaner))
        };
        [Language::Zh, Language::It].into_iter().filter_map(of).collect()
    });
    let mut refused = Ok(());
    for (rules, cleaner) in LANGUAGES.iter() {
        let raw = RawSample {
            index: 0,
            key: "k".into(),
            jpg: Some(PICTURE.to_vec()),
            json: Some(bytes.to_vec()),
            latents: None,
            others: Vec::new(),
            fault: None,
        };
        match examine(raw, rules, cleaner) {
            Ok(sample) => assert_eq!(sample.size, (16, 8), "the picture is always the same"),
            Err(skip) => refused = Err(skip.detail()),
        }
    }
    refused
}

/// Expands an entry of `data.shards`. Wildcards are refused here: they look at the disk.
pub fn shard_list(bytes: &[u8]) -> Verdict {
    let text = std::str::from_utf8(bytes).map_err(|error| error.to_string())?;
    if text.contains(['*', '?']) {
        return Err("a wildcard".into());
    }
    let mut len = 0_u64;
    for part in text.split("::") {
        len = len.saturating_add(source::expand::check_braces(part)?);
    }
    if len > MAX_SHARDS {
        return Err(format!("{len} shards"));
    }
    let shards = expand_shards(&[text.to_owned()]).map_err(|error| error.to_string())?;
    assert_eq!(shards.len() as u64, len, "the list is as long as its braces say");
    Ok(())
}

/// Reads a cached sample, or a cached shard's stamp if it begins as one.
pub fn cached(bytes: &[u8]) -> Verdict {
    if bytes.starts_with(b"{") {
        return Stamp::parse("a.tar", bytes).map(|_| ()).map_err(|error| error.to_string());
    }
    let refuse = |error: crate::Error| error.to_string();
    let size = cached::original_size(bytes).map_err(refuse)?;
    let sample = CachedSample::parse(bytes, [4, 2, 3]).map_err(refuse)?;
    assert_eq!(sample.original_size, size, "the size is told alike");
    let again = CachedSample::parse(&sample.to_bytes().map_err(refuse)?, [4, 2, 3]).map_err(refuse)?;
    assert_eq!(again, sample, "what is written is read");
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    type Reader = fn(&[u8]) -> Verdict;

    const READERS: [(&str, Reader); 5] =
        [("tar", tar), ("picture", picture), ("json_sample", json_sample), ("shard_list", shard_list), ("cached", cached)];

    fn corpus(reader: &str) -> Vec<(String, Vec<u8>)> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(reader);
        let mut files: Vec<_> = folder.read_dir().unwrap().map(|entry| entry.unwrap().path()).collect();
        files.sort();
        files.iter().map(|file| (file.file_name().unwrap().to_str().unwrap().to_owned(), std::fs::read(file).unwrap())).collect()
    }

    /// A file's name says what is wanted: `ok-*` is read, all others are refused.
    #[test]
    fn the_corpus_is_read_or_refused_as_its_names_say() {
        for (reader, read) in READERS {
            let files = corpus(reader);
            assert!(files.len() >= 6, "{reader} has {} files", files.len());
            for (name, bytes) in files {
                let verdict = read(&bytes);
                assert_eq!(verdict.is_ok(), name.starts_with("ok-"), "{reader}/{name}: {verdict:?}");
            }
        }
    }

    /// A short run of what the fuzzer does at length: cut off, one byte changed, a piece said twice.
    #[test]
    fn what_is_next_to_the_corpus_is_read_or_refused() {
        for (reader, read) in READERS {
            for (_, bytes) in corpus(reader) {
                let steps = (bytes.len() / 40).max(1);
                for at in (0..bytes.len()).step_by(steps) {
                    let _ = read(&bytes[..at]);
                    for byte in [0, 0xff, bytes[at] ^ 1] {
                        let mut changed = bytes.clone();
                        changed[at] = byte;
                        let _ = read(&changed);
                    }
                    let _ = read(&[&bytes[..at], &bytes[at / 2..]].concat());
                }
            }
        }
    }
}
