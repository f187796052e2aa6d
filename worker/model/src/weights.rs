//! One model's tensors, read by name from memory-mapped safetensors.
//!
//! Models are built straight from the file: each layer asks its [`Scope`] for the tensors it needs, in the shapes it needs. Nothing is
//! drawn at random first, each tensor is copied once, and the set knows what was asked for in vain and what was never asked for, so
//! that one error tells all the differences between a file and a configuration.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::ops::Div;
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use safetensors::{Dtype, SafeTensors};
use serde::Deserialize;
use tch::{Device, Kind, Tensor};

use crate::{Error, Result};

/// Names under which the published model folders hold their weights, in the order they are looked for.
const FILE_NAMES: [&str; 6] = [
    "diffusion_pytorch_model.safetensors",
    "model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "model.safetensors.index.json",
    "diffusion_pytorch_model.fp16.safetensors",
    "model.fp16.safetensors",
];

/// One model's tensors, by name, with an account of which were used.
///
/// The files stay mapped while the value lives. They must not be truncated meanwhile: reading beyond the new end would kill the process.
pub struct Weights {
    path: PathBuf,
    maps: Vec<Mmap>,
    entries: BTreeMap<String, Entry>,
    ledger: RefCell<Ledger>,
}

/// Where one tensor lies, as its file's header says (checked against the file's length).
struct Entry {
    map: usize,
    range: std::ops::Range<usize>,
    dtype: Dtype,
    shape: Vec<i64>,
}

/// What was asked of a weight set so far.
#[derive(Default)]
struct Ledger {
    used: BTreeSet<String>,
    missing: Vec<String>,
    misshapen: Vec<String>,
    num_elements: i64,
}

/// The part of a sharded checkpoint's index that matters here: which file holds which key.
#[derive(Deserialize)]
struct ShardIndex {
    weight_map: BTreeMap<String, String>,
}

impl Weights {
    /// Maps the weights of one model.
    ///
    /// `path` is a `.safetensors` file, the `*.safetensors.index.json` of a sharded one, or a folder that holds either under one of
    /// the names in use (`diffusion_pytorch_model.*`, `model.*`).
    ///
    /// Errors: [`Error::Io`] if a file cannot be opened; [`Error::Invalid`] if the folder holds none, if a header is damaged or does
    /// not describe exactly the bytes that follow it (a truncated download), or if a sharded index names keys that its files lack.
    pub fn open(path: &Path) -> Result<Self> {
        let file = if path.is_dir() { find_in_folder(path)? } else { path.to_path_buf() };
        let mut weights = Self { path: path.to_path_buf(), ..Self::none() };
        if file.extension().is_some_and(|extension| extension == "json") {
            weights.map_shards(&file)?;
        } else {
            weights.map_file(&file)?;
        }
        Ok(weights)
    }

    /// The empty set. Every tensor asked of it counts as missing and is a zero that occupies no memory: what a model built on it asks
    /// for can be counted ([`Weights::num_requested`]) without allocating the model.
    pub(crate) fn none() -> Self {
        Self { path: PathBuf::new(), maps: Vec::new(), entries: BTreeMap::new(), ledger: RefCell::default() }
    }

    /// The scope of all keys. Tensors taken from it are converted to `kind` and copied to `device`.
    pub fn root(&self, kind: Kind, device: Device) -> Scope<'_> {
        Scope { weights: self, prefix: String::new(), kind, device }
    }

    /// All keys, sorted.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    /// Number of elements in the tensors asked for so far, missing ones included.
    pub(crate) fn num_requested(&self) -> i64 {
        self.ledger.borrow().num_elements
    }

    /// Ends the loading of a model: every key asked for must have been there in the right shape, and every key must have been used.
    ///
    /// Keys that start or end with one of `ignore` (such as `position_ids`, which old exports contain) may be left over.
    ///
    /// Errors: one [`Error::Weights`] with all differences.
    pub fn finish(&self, ignore: &[&str]) -> Result<()> {
        let ledger = self.ledger.borrow();
        let ignored = |key: &str| ignore.iter().any(|part| key.starts_with(part) || key.ends_with(part));
        let extra: Vec<String> = self.keys().filter(|key| !ledger.used.contains(*key) && !ignored(key)).map(String::from).collect();
        if ledger.missing.is_empty() && ledger.misshapen.is_empty() && extra.is_empty() {
            return Ok(());
        }
        Err(Error::Weights { path: self.path.clone(), missing: ledger.missing.clone(), misshapen: ledger.misshapen.clone(), extra })
    }

    fn map_shards(&mut self, index: &Path) -> Result<()> {
        let bytes = std::fs::read(index).map_err(|source| Error::Io { path: index.to_path_buf(), source })?;
        let ShardIndex { weight_map } =
            serde_json::from_slice(&bytes).map_err(|error| invalid(index, format!("not a shard index: {error}")))?;
        let folder = index.parent().unwrap_or(Path::new(""));
        for name in weight_map.values().collect::<BTreeSet<_>>() {
            if Path::new(name).file_name().is_none_or(|plain| plain != name.as_str()) {
                return Err(invalid(index, format!("shard {name:?} is not a plain file name")));
            }
            self.map_file(&folder.join(name))?;
        }
        let lacking: Vec<&String> = weight_map.keys().filter(|key| !self.entries.contains_key(*key)).collect();
        match lacking.first() {
            Some(first) => Err(invalid(index, format!("the shards lack {} of the keys it lists, the first is {first}", lacking.len()))),
            None => Ok(()),
        }
    }

    fn map_file(&mut self, path: &Path) -> Result<()> {
        let file = File::open(path).map_err(|source| Error::Io { path: path.to_path_buf(), source })?;
        // SAFETY: read-only mapping; `Weights` documents that the file must not be truncated while it lives.
        let map = unsafe { Mmap::map(&file) }.map_err(|source| Error::Io { path: path.to_path_buf(), source })?;
        let (header_bytes, header) = SafeTensors::read_metadata(&map)
            .map_err(|error| invalid(path, format!("not a whole safetensors file ({} bytes): {error}", map.len())))?;
        // The data begins after the header and its 8-byte length; `read_metadata` has checked that the offsets fill the file exactly.
        let data = header_bytes + size_of::<u64>();
        for (key, info) in header.tensors() {
            let (start, end) = info.data_offsets;
            let shape = info
                .shape
                .iter()
                .map(|&length| i64::try_from(length))
                .collect::<Result<_, _>>()
                .map_err(|_| invalid(path, format!("{key} has a dimension beyond 2^63")))?;
            let entry = Entry { map: self.maps.len(), range: data + start..data + end, dtype: info.dtype, shape };
            if self.entries.insert(key.clone(), entry).is_some() {
                return Err(invalid(path, format!("{key} is in two shards")));
            }
        }
        self.maps.push(map);
        Ok(())
    }

    /// Copies one tensor, or records why it cannot.
    fn take(&self, key: String, shape: &[i64], kind: Kind, device: Device) -> Tensor {
        let mut ledger = self.ledger.borrow_mut();
        ledger.num_elements += shape.iter().product::<i64>();
        // One zero seen through strides of 0: a model whose file lacks everything costs no memory before `finish` refuses it.
        let placeholder = || Tensor::zeros([1], (kind, device)).expand(shape, false);
        let Some(entry) = self.entries.get(&key) else {
            ledger.missing.push(format!("{key} {shape:?}"));
            return placeholder();
        };
        let problem = match float_kind(entry.dtype) {
            _ if entry.shape != shape => Some(format!("{key} is {:?}, wanted {shape:?}", entry.shape)),
            None => Some(format!("{key} holds {:?}, wanted floating point", entry.dtype)),
            Some(stored) => {
                ledger.used.insert(key);
                return copy_from_bytes(&self.maps[entry.map][entry.range.clone()], shape, stored, kind, device);
            }
        };
        ledger.misshapen.extend(problem);
        ledger.used.insert(key);
        placeholder()
    }
}

/// A key prefix in a [`Weights`] set: `&scope / "down_blocks" / 0 / "resnets"` stands for `down_blocks.0.resnets`.
#[derive(Clone)]
pub struct Scope<'a> {
    weights: &'a Weights,
    prefix: String,
    kind: Kind,
    device: Device,
}

impl Scope<'_> {
    /// The tensor `name` below this prefix, of the scope's kind and on its device, without gradient.
    ///
    /// A missing or misshapen tensor is recorded, and zeros are returned: [`Weights::finish`] then reports all of them together.
    pub fn tensor(&self, name: &str, shape: &[i64]) -> Tensor {
        self.weights.take(self.key(name), shape, self.kind, self.device)
    }

    /// Whether the set holds the tensor `name` below this prefix. Asking does not count as use.
    pub fn has(&self, name: &str) -> bool {
        self.weights.entries.contains_key(&self.key(name))
    }

    /// The kind tensors are converted to.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// The device tensors are copied to.
    pub fn device(&self) -> Device {
        self.device
    }

    fn key(&self, name: &str) -> String {
        if self.prefix.is_empty() { name.to_owned() } else { format!("{}.{name}", self.prefix) }
    }
}

impl<'a> Div<&str> for &Scope<'a> {
    type Output = Scope<'a>;

    fn div(self, name: &str) -> Scope<'a> {
        Scope { prefix: self.key(name), ..self.clone() }
    }
}

impl<'a> Div<usize> for &Scope<'a> {
    type Output = Scope<'a>;

    fn div(self, index: usize) -> Scope<'a> {
        self / index.to_string().as_str()
    }
}

impl<'a> Div<&str> for Scope<'a> {
    type Output = Scope<'a>;

    fn div(self, name: &str) -> Scope<'a> {
        &self / name
    }
}

impl<'a> Div<usize> for Scope<'a> {
    type Output = Scope<'a>;

    fn div(self, index: usize) -> Scope<'a> {
        &self / index
    }
}

fn find_in_folder(folder: &Path) -> Result<PathBuf> {
    FILE_NAMES
        .iter()
        .map(|name| folder.join(name))
        .find(|path| path.is_file())
        .ok_or_else(|| invalid(folder, format!("holds no weights; looked for {}", FILE_NAMES.join(", "))))
}

/// Copies `bytes` (little-endian `stored` elements) into a new tensor, converting on the way.
fn copy_from_bytes(bytes: &[u8], shape: &[i64], stored: Kind, kind: Kind, device: Device) -> Tensor {
    let mut copy = Tensor::empty(shape, (kind, device));
    // A safetensors file may place a tensor off its natural alignment; torch must not read through such a pointer.
    if bytes.as_ptr().align_offset(stored.elt_size_in_bytes()) == 0 {
        // SAFETY: `bytes` holds exactly `shape` elements of `stored` (the header was checked), outlives the view, and is only read.
        let view = unsafe { Tensor::from_blob(bytes.as_ptr(), shape, &[], stored, Device::Cpu) };
        copy.copy_(&view);
    } else {
        copy.copy_(&Tensor::from_data_size(bytes, shape, stored));
    }
    copy
}

fn float_kind(dtype: Dtype) -> Option<Kind> {
    match dtype {
        Dtype::F16 => Some(Kind::Half),
        Dtype::BF16 => Some(Kind::BFloat16),
        Dtype::F32 => Some(Kind::Float),
        Dtype::F64 => Some(Kind::Double),
        _ => None,
    }
}

fn invalid(path: &Path, reason: String) -> Error {
    Error::Invalid { path: path.to_path_buf(), reason }
}

#[cfg(test)]
mod tests {
    use safetensors::tensor::{TensorView, serialize};

    use super::*;

    fn half_bytes(values: &[f32]) -> Vec<u8> {
        values.iter().flat_map(|&value| half::f16::from_f32(value).to_le_bytes()).collect()
    }

    /// A file with `a.0.weight` [2, 3] and `a.bias` [2], both f16.
    fn sample_file() -> Vec<u8> {
        let (weight, bias) = (half_bytes(&[0.0, 1.0, 2.0, 3.0, 4.0, 5.0]), half_bytes(&[0.5, -0.5]));
        let tensors = [
            ("a.0.weight", TensorView::new(Dtype::F16, vec![2, 3], &weight).unwrap()),
            ("a.bias", TensorView::new(Dtype::F16, vec![2], &bias).unwrap()),
        ];
        serialize(tensors, None).unwrap()
    }

    fn open_bytes(bytes: &[u8]) -> Result<Weights> {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("model.safetensors"), bytes).unwrap();
        Weights::open(folder.path())
    }

    #[test]
    fn tensors_are_converted_and_carry_no_gradient() {
        let weights = open_bytes(&sample_file()).unwrap();
        let root = weights.root(Kind::Float, Device::Cpu);
        let weight = (&root / "a" / 0).tensor("weight", &[2, 3]);
        assert_eq!(weight.kind(), Kind::Float);
        assert!(!weight.requires_grad());
        assert_eq!(Vec::<f32>::try_from(weight.flatten(0, 1)).unwrap(), [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]);
        let _ = (root / "a").tensor("bias", &[2]);
        weights.finish(&[]).unwrap();
        assert_eq!(weights.num_requested(), 8);
    }

    #[test]
    fn one_error_lists_missing_misshapen_and_unused_keys() {
        let weights = open_bytes(&sample_file()).unwrap();
        let root = weights.root(Kind::Float, Device::Cpu);
        assert!((&root / "a").has("bias"));
        assert_eq!((&root / "a" / 0).tensor("weight", &[3, 2]).size(), [3, 2]);
        assert_eq!(root.tensor("gone", &[4]).size(), [4]);
        let text = weights.finish(&[]).unwrap_err().to_string();
        for part in ["1 missing, 1 misshapen, 1 unknown", "missing gone [4]", "a.0.weight is [2, 3], wanted [3, 2]", "unknown a.bias"] {
            assert!(text.contains(part), "{text}");
        }
        assert!(!weights.finish(&["bias"]).unwrap_err().to_string().contains("unknown a.bias"));
    }

    #[test]
    fn truncated_and_lying_files_are_refused() {
        let whole = sample_file();
        let mut overlong_header = whole.clone();
        overlong_header[..8].copy_from_slice(&u64::MAX.to_le_bytes());
        // The same length, but the shape claims more elements than the offsets hold.
        let lying = String::from_utf8_lossy(&whole[8..]).find("[2,3]").map(|at| {
            let mut bytes = whole.clone();
            bytes[8 + at + 1] = b'9';
            bytes
        });
        for bytes in [&whole[..whole.len() - 1], &whole[..20], &whole[..0], &overlong_header, &lying.unwrap()] {
            let error = open_bytes(bytes).err().unwrap();
            assert!(matches!(error, Error::Invalid { .. }), "{error}");
        }
    }

    #[test]
    fn sharded_sets_are_joined_and_must_hold_what_their_index_lists() {
        let folder = tempfile::tempdir().unwrap();
        let index = folder.path().join("model.safetensors.index.json");
        std::fs::write(folder.path().join("one.safetensors"), sample_file()).unwrap();
        std::fs::write(&index, r#"{"metadata": {}, "weight_map": {"a.0.weight": "one.safetensors", "a.bias": "one.safetensors"}}"#)
            .unwrap();
        assert_eq!(Weights::open(folder.path()).unwrap().keys().collect::<Vec<_>>(), ["a.0.weight", "a.bias"]);

        std::fs::write(&index, r#"{"weight_map": {"b": "one.safetensors"}}"#).unwrap();
        assert!(Weights::open(folder.path()).err().unwrap().to_string().contains("the first is b"));
        std::fs::write(&index, r#"{"weight_map": {"b": "../one.safetensors"}}"#).unwrap();
        assert!(Weights::open(folder.path()).err().unwrap().to_string().contains("plain file name"));
    }

    #[test]
    fn a_folder_without_weights_says_what_was_looked_for() {
        let folder = tempfile::tempdir().unwrap();
        let error = Weights::open(folder.path()).err().unwrap();
        assert!(error.to_string().contains("diffusion_pytorch_model.safetensors"), "{error}");
    }
}
