//! Shards made from the demo's samples: small ones, and ones with faults.

use std::fs::File;
use std::io::Read;

use super::programs::workspace;

/// One sample of a shard, as its two files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RawSample {
    /// The files' common name.
    pub key: String,
    /// The picture.
    pub jpg: Vec<u8>,
    /// Its captions.
    pub json: Vec<u8>,
}

/// The first `count` samples of the demo's shards.
///
/// # Panics
/// If a shard cannot be read or they have fewer.
#[must_use]
pub fn demo_samples(count: usize) -> Vec<RawSample> {
    let mut samples = Vec::with_capacity(count);
    for shard in 0.. {
        if samples.len() >= count {
            break;
        }
        let path = workspace().join(format!("tests/demo/shards/{shard:05}.tar"));
        let file =
            File::open(&path).unwrap_or_else(|error| panic!("{} samples are more than there are: {}: {error}", count, path.display()));
        let mut archive = tar::Archive::new(file);
        let mut members = archive.entries().expect("a tar").map(|entry| {
            let mut entry = entry.expect("a member");
            let name = entry.path().expect("a name").display().to_string();
            let mut bytes = Vec::new();
            entry.read_to_end(&mut bytes).expect("a whole member");
            (name, bytes)
        });
        while let Some(((name, jpg), (_, json))) = members.next().zip(members.next()) {
            samples.push(RawSample { key: name.trim_end_matches(".jpg").to_owned(), jpg, json });
        }
    }
    samples.truncate(count);
    samples
}

/// A tar of these samples.
///
/// # Panics
/// If a key is no file name.
#[must_use]
pub fn tar_of(samples: &[RawSample]) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    for RawSample { key, jpg, json } in samples {
        for (extension, bytes) in [("jpg", jpg), ("json", json)] {
            let mut header = tar::Header::new_gnu();
            header.set_size(bytes.len() as u64);
            header.set_mode(0o644);
            tar.append_data(&mut header, format!("{key}.{extension}"), bytes.as_slice()).expect("a member in memory");
        }
    }
    tar.into_inner().expect("a tar in memory")
}
