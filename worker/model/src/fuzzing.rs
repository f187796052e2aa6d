//! The readers of files from elsewhere, each as a function of bytes alone: what `fuzz/` throws at them.
//!
//! Whatever the bytes are, a reader answers or refuses; the tests here run the corpus that lies in `fuzz/corpus`, one folder a reader.

use std::collections::BTreeMap;
use std::path::Path;

use tch::{Device, Kind};

use crate::adapter::Adapter;
use crate::text::fuzz_sentencepiece;
use crate::weights::fuzz_entries;

/// What a reader says: nothing, or why it refuses.
type Verdict = Result<(), String>;

/// Reads a file of `torch.save` and copies its tensors out.
pub fn torch_file(bytes: &[u8]) -> Verdict {
    fuzz_entries(bytes, true)
}

/// Reads a safetensors file and copies its tensors out.
pub fn safetensors_file(bytes: &[u8]) -> Verdict {
    fuzz_entries(bytes, false)
}

/// Reads a `.model` of sentencepiece, makes both kinds of tokenizers of it and runs them.
pub fn sentencepiece(bytes: &[u8]) -> Verdict {
    fuzz_sentencepiece(bytes)
}

/// Reads an adapter of either format and writes it again.
pub fn adapter_file(bytes: &[u8]) -> Verdict {
    let adapter = Adapter::from_bytes(Path::new("adapter"), bytes, Device::Cpu).map_err(|error| error.to_string())?;
    adapter.to_pytorch(Kind::Half, &BTreeMap::new()).map(drop).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    type Reader = fn(&[u8]) -> Verdict;

    const READERS: [(&str, Reader); 4] = [
        ("torch_file", torch_file),
        ("safetensors_file", safetensors_file),
        ("sentencepiece", sentencepiece),
        ("adapter_file", adapter_file),
    ];

    /// A file's name says what is wanted: `ok-*` is read, all others are refused, and `hostile-NAME` with an error that names NAME: what it
    /// would have run.
    #[test]
    fn the_corpus_is_read_or_refused_as_its_names_say() {
        tch::set_num_threads(1);
        for (reader, read) in READERS {
            let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(reader);
            let mut files: Vec<_> = folder.read_dir().unwrap().map(|entry| entry.unwrap().path()).collect();
            files.sort();
            assert!(files.len() >= 4, "{reader} has {} files", files.len());
            for file in files {
                let (name, verdict) = (file.file_name().unwrap().to_str().unwrap(), read(&std::fs::read(&file).unwrap()));
                match (name.split_once('-'), verdict) {
                    (Some(("ok", _)), verdict) => assert_eq!(verdict, Ok(()), "{reader}/{name}"),
                    (_, Ok(())) => panic!("{reader}/{name} was read"),
                    (Some(("hostile", wanted)), Err(error)) => {
                        assert!(error.contains(&format!("wants to run {wanted},")), "{reader}/{name}: {error}");
                    }
                    (_, Err(_)) => {}
                }
            }
        }
    }

    /// Every part of every file alone, and every file with each of its bytes changed: the fuzzer's first steps, on every machine.
    #[test]
    fn what_is_next_to_the_corpus_is_read_or_refused() {
        tch::set_num_threads(1);
        for (reader, read) in READERS {
            let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(reader);
            for entry in folder.read_dir().unwrap() {
                let bytes = std::fs::read(entry.unwrap().path()).unwrap();
                for at in 0..bytes.len() {
                    let _ = read(&bytes[..at]);
                    let mut changed = bytes.clone();
                    changed[at] ^= 1 << (at % 8);
                    let _ = read(&changed);
                }
            }
        }
    }
}
