//! One model's tensors, read by name from memory-mapped files: safetensors, or what `torch.save` wrote.
//!
//! Models are built straight from the file: each layer asks its [`Scope`] for the tensors it needs, in the shapes it needs. Nothing is
//! drawn at random first, each tensor is copied once, and the set knows what was asked for in vain and what was never asked for, so
//! that one error tells all the differences between a file and a configuration.

mod addition;
mod entry;
mod frozen;
mod random;
mod safetensors_file;
mod single_file;
pub(crate) mod torch_file;

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::ops::Div;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memmap2::Mmap;
use peapod_kernels::Kernels;
use serde::Deserialize;
use tch::{Device, Kind, Tensor};

pub(crate) use self::addition::{Addition, Additions};
use self::entry::{Entries, Entry};
pub(crate) use self::frozen::Frozen;
use self::random::Random;
pub use self::single_file::{Marks, SingleFile};
use crate::{Error, Result};

/// Endings of weights, safer first, and how the names of the published ones begin.
const FORMATS: [(&str, [&str; 2]); 2] =
    [("safetensors", ["diffusion_pytorch_model", "model"]), ("bin", ["diffusion_pytorch_model", "pytorch_model"])];
/// What is put into the names of weights of fewer bits; the first keeps more of each number.
pub(crate) const VARIANTS: [&str; 2] = [".fp16", ".bf16"];
/// LoRAs, of diffusers and of peft.
const LORA_FILES: [&str; 2] = ["pytorch_lora_weights.safetensors", "adapter_model.safetensors"];

/// Names under which the published model folders hold their weights, in the order they are looked for.
fn file_names() -> Vec<String> {
    let mut names = Vec::new();
    for (format, stems) in FORMATS {
        for variant in [""].into_iter().chain(VARIANTS) {
            names.extend(stems.map(|stem| format!("{stem}{variant}.{format}")));
            names.extend(stems.map(|stem| format!("{stem}.{format}.index{variant}.json")));
        }
    }
    names.extend(LORA_FILES.map(str::to_owned));
    names
}

/// One model's tensors, by name, with an account of which were used.
///
/// The files stay mapped while the value lives. They must not be truncated meanwhile: reading beyond the new end would kill the process.
pub struct Weights {
    path: PathBuf,
    entries: BTreeMap<String, Stored>,
    /// Whether tensors are only checked, not copied.
    shapes_only: bool,
    /// What has the tensors that no file holds.
    random: Option<Random>,
    /// What is added to tensors as they are copied, by their keys.
    additions: Arc<Additions>,
    ledger: RefCell<Ledger>,
}

/// What a model took of its weights.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Survey {
    /// Elements of all tensors.
    pub num_parameters: i64,
    /// Bytes of each kind on disk, most bytes first.
    pub kinds: Vec<(Kind, u64)>,
}

/// A tensor and the file it lies in.
#[derive(Clone)]
pub(crate) struct Stored {
    map: Arc<Mmap>,
    entry: Entry,
}

impl Stored {
    /// The tensor's shape.
    pub(crate) fn shape(&self) -> &[i64] {
        self.entry.shape()
    }
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
    /// `path` is a safetensors file, a file of `torch.save` (`.bin`, `.pt`, `.ckpt`: the content decides, not the name), the
    /// `*.index.json` of a sharded one, or a folder that holds any of them under one of the names in use (`diffusion_pytorch_model.*`,
    /// `model.*`, `pytorch_model.*`, a LoRA's), or its only safetensors file; safetensors are preferred, and the most bits. No code in a
    /// torch file is run: what stands among the tensors and is none is an error that names it.
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
        let (path, entries, additions) = (PathBuf::new(), BTreeMap::new(), Arc::default());
        Self { path, entries, shapes_only: false, random: None, additions, ledger: RefCell::default() }
    }

    /// The set that has every tensor, drawn on its device from libtorch's generator when it is asked for: networks of any size without a
    /// file, for what does not depend on what they compute.
    ///
    /// Of the tensors that a model takes if they are there ([`Scope::has`]), it has those with the full names `optional`.
    pub(crate) fn random(optional: &'static [&'static str]) -> Self {
        Self { random: Some(Random { optional }), ..Self::none() }
    }

    /// Makes the set check names, shapes and kinds without reading a tensor: each one asked of it is a zero that occupies no memory.
    ///
    /// A model built on it and ended with [`Weights::finish`] has been compared with its files completely, in the time their headers take.
    #[must_use]
    pub fn shapes_only(self) -> Self {
        Self { shapes_only: true, ..self }
    }

    /// The same tensors with a new account, for another model built from them.
    pub(crate) fn anew(&self) -> Self {
        let Self { path, entries, shapes_only, random, additions, ledger: _ } = self;
        let (path, entries, additions) = (path.clone(), entries.clone(), Arc::clone(additions));
        Self { path, entries, shapes_only: *shapes_only, random: *random, additions, ledger: RefCell::default() }
    }

    /// Adds to tensors as they are copied. The caller has compared the shapes.
    pub(crate) fn with_additions(self, additions: Arc<Additions>) -> Self {
        Self { additions, ..self }
    }

    /// The tensor `key` in its file. Asking does not count as use.
    pub(crate) fn stored_entry(&self, key: &str) -> Option<Stored> {
        self.entries.get(key).cloned()
    }

    /// Hands over what tells these tensors from others, in the order of their keys: key, kind, shape and layout of each, and some of its
    /// bytes as they are stored. Few pages of the files are read. Training changes nearly all weights; what was changed in few places may
    /// look the same.
    pub fn sketch(&self, take: &mut dyn FnMut(&[u8])) {
        for (key, Stored { map, entry }) in &self.entries {
            let (description, samples) = entry.sketch(map);
            take(format!("{key} {description}").as_bytes());
            samples.for_each(&mut *take);
        }
    }

    /// How many elements were asked for so far, and in which kinds they lie on disk.
    pub fn survey(&self) -> Survey {
        let mut kinds: Vec<(Kind, u64)> = Vec::new();
        let ledger = self.ledger.borrow();
        for Stored { entry, .. } in ledger.used.iter().filter_map(|key| self.entries.get(key)) {
            let (kind, num_bytes) = (entry.kind(), entry.num_bytes());
            match kinds.iter_mut().find(|(known, _)| *known == kind) {
                Some((_, sum)) => *sum += num_bytes,
                None => kinds.push((kind, num_bytes)),
            }
        }
        kinds.sort_by_key(|&(_, num_bytes)| std::cmp::Reverse(num_bytes));
        Survey { num_parameters: ledger.num_elements, kinds }
    }

    /// Whether there is a key that begins with `start`.
    pub(crate) fn holds_any(&self, start: &str) -> bool {
        self.entries.range(start.to_owned()..).next().is_some_and(|(key, _)| key.starts_with(start))
    }

    /// The shape of the tensor `key`. Asking does not count as use.
    pub(crate) fn shape(&self, key: &str) -> Option<&[i64]> {
        self.entries.get(key).map(|stored| stored.entry.shape())
    }

    /// The scope of all keys. Tensors taken from it are converted to `kind` and copied to `device`, where fused operators of that kind are
    /// made ready if there are some.
    pub fn root(&self, kind: Kind, device: Device) -> Scope<'_> {
        Scope {
            weights: self,
            prefix: String::new(),
            kind,
            rounded: kind,
            device,
            kernels: peapod_kernels::of(device, kind),
            fp8_linears: false,
        }
    }

    /// A text of the metadata of a safetensors file; `None` without it, or in another kind of file.
    pub(crate) fn metadata(&self, name: &str) -> Option<String> {
        safetensors_file::metadata(&self.entries.values().next()?.map, name)
    }

    /// All keys, sorted.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    /// Copies the tensor `key` as it is stored, in its own kind, to the CPU. This does not count as use. `None` if there is none.
    pub fn stored(&self, key: &str) -> Option<Tensor> {
        self.entries.get(key).map(|Stored { map, entry }| entry.copy(map, entry.kind(), Device::Cpu))
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
        let (map, entries) = map_file(path)?;
        for (key, entry) in entries {
            if self.entries.contains_key(&key) {
                return Err(invalid(path, format!("{key} is there twice")));
            }
            self.entries.insert(key, Stored { map: Arc::clone(&map), entry });
        }
        Ok(())
    }

    /// Copies one tensor, or records why it cannot. None where only the shape is wanted, too.
    fn take(&self, key: String, shape: &[i64], kind: Kind, device: Device) -> Option<Tensor> {
        let mut ledger = self.ledger.borrow_mut();
        ledger.num_elements += shape.iter().product::<i64>();
        let Some(Stored { map, entry }) = self.entries.get(&key) else {
            match self.random {
                Some(_) if !self.shapes_only => return Some(random::draw(&key, shape, kind, device)),
                Some(_) => {}
                None => ledger.missing.push(format!("{key} {shape:?}")),
            }
            return None;
        };
        let problem = if entry.shape() != shape {
            Some(format!("{key} is {:?}, wanted {shape:?}", entry.shape()))
        } else if !is_float(entry.kind()) {
            Some(format!("{key} holds {:?}, wanted floating point", entry.kind()))
        } else {
            None
        };
        let fits = problem.is_none();
        ledger.misshapen.extend(problem);
        let additions = self.additions.get(&key);
        ledger.used.insert(key);
        if !fits || self.shapes_only {
            return None;
        }
        Some(match additions {
            None => entry.copy(map, kind, device),
            // In f32, whatever the file holds: a small addition would be lost in a half.
            Some(additions) => {
                let weight = entry.copy(map, Kind::Float, Device::Cpu);
                additions.iter().fold(weight, |sum, addition| sum + addition.compute(shape)).to_kind(kind).to_device(device)
            }
        })
    }
}

/// A key prefix in a [`Weights`] set: `&scope / "down_blocks" / 0 / "resnets"` stands for `down_blocks.0.resnets`.
#[derive(Clone)]
pub struct Scope<'a> {
    weights: &'a Weights,
    prefix: String,
    kind: Kind,
    /// The kind values pass through on their way.
    rounded: Kind,
    device: Device,
    kernels: Option<Kernels>,
    fp8_linears: bool,
}

impl Scope<'_> {
    /// The same scope with values rounded to `kind` before they are converted to the scope's own.
    pub fn rounded(self, kind: Kind) -> Self {
        Self { rounded: kind, ..self }
    }

    /// The same scope for a network whose transformers multiply in eight bits.
    pub(crate) fn with_fp8_linears(self) -> Self {
        Self { fp8_linears: true, ..self }
    }

    /// The tensor `name` below this prefix, of the scope's kind and on its device, without gradient.
    ///
    /// A missing or misshapen tensor is recorded, and zeros are returned: [`Weights::finish`] then reports all of them together.
    pub(crate) fn tensor(&self, name: &str, shape: &[i64]) -> Frozen {
        Frozen::new(self.take(name, shape).unwrap_or_else(|| self.placeholder(shape)))
    }

    /// The tensor `name` of a convolution, laid out in memory with its channels last, as [`Scope::tensor`] else.
    pub(crate) fn channels_last(&self, name: &str, shape: &[i64]) -> Frozen {
        let tensor = self.take(name, shape);
        Frozen::new(tensor.map_or_else(|| self.placeholder(shape), |tensor| channels_last(&tensor)))
    }

    /// The tensors `names`, all of the same shape, one below the other along their first dimension, as [`Scope::tensor`] else.
    pub(crate) fn stacked(&self, names: &[&str], shape: &[i64]) -> Frozen {
        // All are asked for, so that all that are missing are told.
        let parts: Vec<Option<Tensor>> = names.iter().map(|name| self.take(name, shape)).collect();
        let parts: Option<Vec<Tensor>> = parts.into_iter().collect();
        Frozen::new(match parts {
            Some(parts) => Tensor::cat(&parts, 0),
            None => {
                let mut stacked = shape.to_vec();
                stacked[0] *= names.len() as i64;
                self.placeholder(&stacked)
            }
        })
    }

    fn take(&self, name: &str, shape: &[i64]) -> Option<Tensor> {
        let tensor = self.weights.take(self.key(name), shape, self.rounded, self.device)?;
        Some(if self.rounded == self.kind { tensor } else { tensor.to_kind(self.kind) })
    }

    /// One zero seen through strides of 0: a model whose file lacks everything costs no memory before [`Weights::finish`] refuses it.
    fn placeholder(&self, shape: &[i64]) -> Tensor {
        Tensor::zeros([1], (self.kind, self.device)).expand(shape, false)
    }

    /// Whether the set holds the tensor `name` below this prefix. Asking does not count as use.
    pub fn has(&self, name: &str) -> bool {
        let key = self.key(name);
        self.weights.entries.contains_key(&key) || self.weights.random.is_some_and(|random| random.optional.contains(&key.as_str()))
    }

    /// The kind tensors are converted to.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// The device tensors are copied to.
    pub fn device(&self) -> Device {
        self.device
    }

    /// Fused operators of the scope's kind on its device.
    pub(crate) fn kernels(&self) -> Option<Kernels> {
        self.kernels.clone()
    }

    /// Whether transformers are to multiply in eight bits.
    pub(crate) fn has_fp8_linears(&self) -> bool {
        self.fp8_linears
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

/// `[A, B, H, W]` with B innermost in memory, then W, H and A.
pub(crate) fn channels_last(map: &Tensor) -> Tensor {
    map.permute([0, 2, 3, 1]).contiguous().permute([0, 3, 1, 2])
}

/// The first of the names in use that is there.
pub(crate) fn preferred(is_there: impl Fn(&str) -> bool) -> Option<String> {
    file_names().into_iter().find(|name| is_there(name))
}

/// The only safetensors file of those in a folder, under whatever name.
pub(crate) fn only_safetensors<'a>(files: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let mut found = files.into_iter().filter(|name| name.ends_with(".safetensors"));
    found.next().filter(|_| found.next().is_none())
}

fn find_in_folder(folder: &Path) -> Result<PathBuf> {
    let only = || {
        let names = std::fs::read_dir(folder).into_iter().flatten().filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        let names: Vec<String> = names.collect();
        only_safetensors(names.iter().map(String::as_str)).map(|name| folder.join(name))
    };
    preferred(|name| folder.join(name).is_file()).map(|name| folder.join(name)).or_else(only).ok_or_else(|| {
        let whole = FORMATS.iter().flat_map(|(format, stems)| stems.map(|stem| format!("{stem}.{format}")));
        let whole: Vec<String> = whole.collect();
        let (whole, variants, loras) = (whole.join(", "), VARIANTS.join(", "), LORA_FILES.join(", "));
        invalid(folder, format!("holds no weights; looked for {whole} (each also as {variants}, or in parts with an index), {loras}"))
    })
}

/// Maps a file and reads which tensors it holds.
fn map_file(path: &Path) -> Result<(Arc<Mmap>, Entries)> {
    let io = |source| Error::Io { path: path.to_path_buf(), source };
    let file = File::open(path).map_err(io)?;
    // SAFETY: read-only mapping; `Weights` documents that the file must not be truncated while it lives.
    let map = unsafe { Mmap::map(&file) }.map_err(io)?;
    let entries = if torch_file::is_torch_file(&map) {
        torch_file::read(&map).map_err(|fault| invalid(path, fault.to_string()))?
    } else {
        safetensors_file::read(&map).map_err(|reason| invalid(path, reason))?
    };
    Ok((Arc::new(map), entries))
}

/// Largest tensor that is copied while fuzzing: a small file may hold a big one that repeats its elements.
const MAX_FUZZED_ELEMENTS: i64 = 1 << 12;

/// Reads bytes as a file of weights, of torch's format or safetensors, and copies the tensors out that are small. Errors are the reader's.
pub(crate) fn fuzz_entries(bytes: &[u8], torch: bool) -> Result<(), String> {
    let entries = if torch { torch_file::read(bytes).map_err(|fault| fault.to_string()) } else { safetensors_file::read(bytes) };
    for (_, entry) in entries? {
        if entry.shape().iter().product::<i64>() <= MAX_FUZZED_ELEMENTS {
            let _ = entry.copy(bytes, entry.kind(), Device::Cpu);
        }
    }
    Ok(())
}

fn is_float(kind: Kind) -> bool {
    use Kind::{BFloat16, Double, Float, Float8e4m3fn, Float8e4m3fnuz, Float8e5m2, Float8e5m2fnuz, Half};
    matches!(kind, Half | BFloat16 | Float | Double | Float8e4m3fn | Float8e4m3fnuz | Float8e5m2 | Float8e5m2fnuz)
}

fn invalid(path: &Path, reason: String) -> Error {
    Error::Invalid { path: path.to_path_buf(), reason }
}

#[cfg(test)]
mod tests;
