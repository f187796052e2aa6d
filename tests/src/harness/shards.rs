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

/// The first `count` samples of the demo's first shard.
///
/// # Panics
/// If the shard cannot be read or has fewer.
#[must_use]
pub fn demo_samples(count: usize) -> Vec<RawSample> {
    let file = File::open(workspace().join("tests/demo/shards/00000.tar")).expect("the demo's first shard");
    let mut archive = tar::Archive::new(file);
    let mut entries = archive.entries().expect("a tar").map(|entry| {
        let mut entry = entry.expect("a member");
        let name = entry.path().expect("a name").display().to_string();
        let mut bytes = Vec::new();
        entry.read_to_end(&mut bytes).expect("a whole member");
        (name, bytes)
    });
    let sample = |_| {
        let ((name, jpg), (_, json)) = entries.next().zip(entries.next()).expect("enough samples");
        RawSample { key: name.trim_end_matches(".jpg").to_owned(), jpg, json }
    };
    (0..count).map(sample).collect()
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
