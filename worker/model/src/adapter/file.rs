//! The adapter's files: safetensors, and `pytorch_model.bin` as the Python implementation reads and writes it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use tch::{Device, Kind, Tensor};

use super::flat::{self, FlatFile};
use super::{Adapter, AdapterConfig, Entry, Layout, entries};
use crate::weights::torch_file;
use crate::{Error, Result};

/// What bytes that came from no file are called in errors.
pub(super) const ADAPTER: &str = "adapter";
/// What an adapter's file is called, in a checkpoint or a folder of its own.
pub const ADAPTER_FILE: &str = "adapter.safetensors";
/// What the Python implementation calls it.
pub const PYTORCH_FILE: &str = "pytorch_model.bin";
/// The order in which they are looked for.
const FILE_NAMES: [&str; 2] = [ADAPTER_FILE, PYTORCH_FILE];
/// No safetensors header is longer than this: the format's own limit.
const MAX_HEADER_BYTES: u64 = 100_000_000;
/// Most keys of a file that is no adapter which its error lists.
const LISTED_KEYS: usize = 12;

impl Adapter {
    /// Reads an adapter from safetensors of f16, bf16 or f32; everything else follows from names and shapes.
    ///
    /// Reads both layouts in use: `projector.*` of any depth, with or without `fc`, and the older `fc1`, `fc2`, `fc3`.
    /// Errors: [`Error::Invalid`] if the bytes are no safetensors or no adapter; [`Error::Weights`] if shapes do not fit together.
    pub fn from_safetensors(bytes: &[u8], device: Device) -> Result<Self> {
        let file = FlatFile::parse(ADAPTER, bytes)?;
        Self::from_state_dict(&file.shapes(), device, |name| file.elements(name))
    }

    /// Reads an adapter from the bytes of a file of `torch.save`, such as the published `pytorch_model.bin`, as
    /// [`Adapter::from_safetensors`] does. Nothing in the file is run.
    ///
    /// Errors: those of [`Adapter::from_safetensors`], naming what the file would have run.
    pub fn from_pytorch(bytes: &[u8], device: Device) -> Result<Self> {
        let tensors: BTreeMap<_, _> =
            torch_file::read(bytes).map_err(|fault| flat::invalid(ADAPTER, fault.to_string()))?.into_iter().collect();
        let shapes = tensors.iter().map(|(name, entry)| (name.clone(), entry.shape().to_vec())).collect();
        Self::from_state_dict(&shapes, device, |name| {
            let entry = tensors.get(name).ok_or_else(|| flat::invalid(ADAPTER, format!("has no {name}")))?;
            match entry.kind() {
                Kind::Float | Kind::Half | Kind::BFloat16 => {}
                other => return Err(flat::invalid(ADAPTER, format!("{name} holds {other:?}; f16, bf16 and f32 can be read"))),
            }
            // A view that repeats its storage could make a small file fill the memory; no adapter has one.
            if entry.shape().iter().product::<i64>() > bytes.len() as i64 {
                return Err(flat::invalid(ADAPTER, format!("{name} has more elements than the file has bytes")));
            }
            Ok(Vec::try_from(entry.copy(bytes, Kind::Float, Device::Cpu).f_flatten(0, -1)?)?)
        })
    }

    /// Reads an adapter from a file: safetensors, or what `torch.save` wrote; the content decides, not the name. Of a folder, as the
    /// Python implementation saves one each time, the file in it is read: `adapter.safetensors` or `pytorch_model.bin`.
    ///
    /// Errors: [`Error::Io`] if the file cannot be read, and those of [`Adapter::from_safetensors`], naming the file.
    pub fn load(path: &Path, device: Device) -> Result<Self> {
        let path = file_of(path)?;
        let path = path.as_path();
        let io = |source| Error::Io { path: path.into(), source };
        // Tens of megabytes. A mapping would end this process, should somebody cut the file short meanwhile.
        let bytes = std::fs::read(path).map_err(io)?;
        Self::from_bytes(path, &bytes, device)
    }

    /// As [`Adapter::load`], of the bytes of the file at `path`.
    pub(crate) fn from_bytes(path: &Path, bytes: &[u8], device: Device) -> Result<Self> {
        let read = if torch_file::is_torch_file(bytes) { Self::from_pytorch } else { Self::from_safetensors };
        read(bytes, device).map_err(|error| match error {
            Error::Invalid { reason, .. } => Error::Invalid { path: path.into(), reason },
            Error::Weights { missing, misshapen, extra, .. } => Error::Weights { path: path.into(), missing, misshapen, extra },
            other => other,
        })
    }

    /// Writes the parameters as f32 safetensors under the names of the Python implementation's state dict.
    pub fn to_safetensors(&self, metadata: &BTreeMap<String, String>) -> Result<Vec<u8>> {
        flat::serialize(&self.state_dict(), metadata)
    }

    /// Writes the parameters as the Python implementation's `pytorch_model.bin`: a file that `torch.load(weights_only=True)` reads and
    /// that passes a strict `load_state_dict`, with the keys in the module's order.
    ///
    /// The elements are rounded to `kind`: the published files hold f16. Python passes over `metadata`, [`metadata`] reads them.
    /// Errors: [`Error::Unsupported`] for another kind than f16, bf16 or f32.
    pub fn to_pytorch(&self, kind: Kind, metadata: &BTreeMap<String, String>) -> Result<Vec<u8>> {
        torch_file::serialize(&self.state_dict(), kind, metadata)
    }

    fn state_dict(&self) -> Vec<(String, Tensor)> {
        let names = entries(&self.config, self.layout).into_iter().map(|entry| entry.name);
        names.zip(self.parameters.iter().map(Tensor::detach)).collect()
    }

    /// Builds an adapter of the shape that a state dict has; `elements` reads one of its tensors, row by row.
    fn from_state_dict(shapes: &BTreeMap<String, Vec<i64>>, device: Device, elements: impl Fn(&str) -> Result<Vec<f32>>) -> Result<Self> {
        let (config, layout) = infer(shapes)?;
        let entries = entries(&config, layout);
        check_shapes(&entries, shapes)?;
        let mut all = Vec::new();
        for entry in &entries {
            all.extend(elements(&entry.name)?);
        }
        Self::from_elements(config, layout, &all, device)
    }
}

/// The file of an adapter: the path itself, or the file in it if it is a folder.
fn file_of(path: &Path) -> Result<PathBuf> {
    if !path.is_dir() {
        return Ok(path.to_path_buf());
    }
    FILE_NAMES
        .iter()
        .map(|name| path.join(name))
        .find(|file| file.is_file())
        .ok_or_else(|| Error::Invalid { path: path.into(), reason: format!("holds no adapter; looked for {}", FILE_NAMES.join(", ")) })
}

/// Reads the string metadata of an adapter's file; empty if it has none, as the files that Python saves.
///
/// Errors: [`Error::Io`] if the file cannot be read; [`Error::Invalid`] if it neither begins with a safetensors header nor is a whole file
/// of `torch.save`.
pub fn metadata(path: &Path) -> Result<BTreeMap<String, String>> {
    let io = |source| Error::Io { path: path.into(), source };
    let invalid = |reason: String| Error::Invalid { path: path.into(), reason };
    let path = &file_of(path)?;
    let mut file = File::open(path).map_err(io)?;
    let mut length = [0; 8];
    file.read_exact(&mut length).map_err(|error| invalid(format!("not a safetensors file: {error}")))?;
    if torch_file::is_torch_file(&length) {
        // They say it at the end.
        let bytes = std::fs::read(path).map_err(io)?;
        return torch_file::metadata(&bytes).map_err(|fault| invalid(fault.to_string()));
    }
    let length = u64::from_le_bytes(length);
    if length > MAX_HEADER_BYTES {
        return Err(invalid(format!("not a safetensors file: it claims a header of {length} bytes")));
    }
    let mut header = Vec::new();
    file.take(length).read_to_end(&mut header).map_err(io)?;

    #[derive(serde::Deserialize)]
    struct Header {
        #[serde(rename = "__metadata__", default)]
        metadata: BTreeMap<String, String>,
    }
    let header: Header = serde_json::from_slice(&header).map_err(|error| invalid(format!("not a safetensors header: {error}")))?;
    Ok(header.metadata)
}

/// Reads widths and layout off a state dict. Only what is needed for that is checked.
fn infer(shapes: &BTreeMap<String, Vec<i64>>) -> Result<(AdapterConfig, Layout)> {
    let size = |name: &str, dimension: usize| {
        let length = shapes.get(name).and_then(|shape| shape.get(dimension)).copied();
        length.filter(|&length| length > 0).ok_or_else(|| {
            let keys = shapes.keys().take(LISTED_KEYS).map(String::as_str).collect::<Vec<_>>().join(", ");
            flat::invalid(ADAPTER, format!("not an adapter: no usable {name} among its keys ({keys})"))
        })
    };
    let input = size("layernorm.weight", 0)?;
    if shapes.contains_key("fc1.weight") {
        let (hidden, pooled, output) = (size("fc1.weight", 0)?, size("fc2.weight", 0)?, Some(size("fc3.weight", 0)?));
        return Ok((AdapterConfig { input, hidden, depth: 2, pooled, output }, Layout::Legacy));
    }
    let depth = (0..).take_while(|index| shapes.contains_key(&format!("projector.{}.weight", 2 * index))).count();
    let pooled = size(&format!("projector.{}.weight", 2 * depth.saturating_sub(1)), 0)?;
    let hidden = size("projector.0.weight", 0)?;
    let output = if shapes.contains_key("fc.weight") { Some(size("fc.weight", 0)?) } else { None };
    Ok((AdapterConfig { input, hidden, depth, pooled, output }, Layout::Projector))
}

/// Checks a state dict against what its own widths ask for.
fn check_shapes(entries: &[Entry], shapes: &BTreeMap<String, Vec<i64>>) -> Result<()> {
    let known: BTreeSet<&str> = entries.iter().map(|entry| entry.name.as_str()).collect();
    let extra: Vec<String> = shapes.keys().filter(|name| !known.contains(name.as_str())).cloned().collect();
    let (mut missing, mut misshapen) = (Vec::new(), Vec::new());
    for Entry { name, shape, .. } in entries {
        match shapes.get(name) {
            None => missing.push(format!("{name} {shape:?}")),
            Some(got) if got != shape => misshapen.push(format!("{name} is {got:?}, wanted {shape:?}")),
            Some(_) => {}
        }
    }
    if missing.is_empty() && misshapen.is_empty() && extra.is_empty() {
        return Ok(());
    }
    Err(Error::Weights { path: ADAPTER.into(), missing, misshapen, extra })
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMALL: AdapterConfig = AdapterConfig { input: 6, hidden: 5, depth: 3, pooled: 4, output: Some(7) };

    fn values(tensor: &Tensor) -> Vec<f32> {
        Vec::try_from(tensor.detach().flatten(0, -1)).unwrap()
    }

    #[test]
    fn pytorch_files_of_every_layout_are_read_back() {
        tch::set_num_threads(1);
        for (config, layout) in [
            (SMALL, Layout::Projector),
            (AdapterConfig { depth: 5, output: None, ..SMALL }, Layout::Projector),
            (AdapterConfig { depth: 2, ..SMALL }, Layout::Legacy),
        ] {
            let num: usize = entries(&config, layout).iter().map(Entry::num_elements).sum();
            let elements: Vec<f32> = (0..num).map(|index| (index as f32 * 0.37).sin()).collect();
            let adapter = Adapter::from_elements(config, layout, &elements, Device::Cpu).unwrap();
            for kind in [Kind::Float, Kind::Half, Kind::BFloat16] {
                let bytes = adapter.to_pytorch(kind, &BTreeMap::new()).unwrap();
                let loaded = Adapter::from_pytorch(&bytes, Device::Cpu).unwrap();
                assert_eq!((loaded.layout, loaded.config), (layout, config));
                assert_eq!(values(&loaded.flat), values(&adapter.flat.to_kind(kind).to_kind(Kind::Float)));
            }
            assert_eq!(
                adapter.to_pytorch(Kind::Half, &BTreeMap::new()).unwrap(),
                adapter.to_pytorch(Kind::Half, &BTreeMap::new()).unwrap()
            );
        }
    }

    /// Python's torch 2.11 has read these very bytes with `weights_only=True`, mapped and not, and loaded them strictly, value by value.
    #[test]
    fn pytorch_files_are_the_bytes_that_python_has_read() {
        tch::set_num_threads(1);
        let adapter = Adapter::fresh(SMALL, 5, Device::Cpu).unwrap();
        let digest = |kind, metadata: &BTreeMap<String, String>| crc32fast::hash(&adapter.to_pytorch(kind, metadata).unwrap());
        assert_eq!([Kind::Float, Kind::Half, Kind::BFloat16].map(|kind| digest(kind, &BTreeMap::new())), PINNED);
        assert_eq!(digest(Kind::Half, &texts()), PINNED_WITH_METADATA);
    }

    const PINNED: [u32; 3] = [0x3b9434a1, 0xb28bba30, 0x1dfa225b];
    const PINNED_WITH_METADATA: u32 = 0x936040f6;

    fn texts() -> BTreeMap<String, String> {
        [("encoder", "org/\"编码器\""), ("mask_pads", "true")].map(|(key, value)| (key.to_owned(), value.to_owned())).into()
    }

    #[test]
    fn both_formats_keep_what_a_file_says_of_itself() {
        tch::set_num_threads(1);
        let adapter = Adapter::fresh(SMALL, 5, Device::Cpu).unwrap();
        let file = tempfile::NamedTempFile::new().unwrap();
        for bytes in [adapter.to_pytorch(Kind::Half, &texts()).unwrap(), adapter.to_safetensors(&texts()).unwrap()] {
            std::fs::write(file.path(), &bytes).unwrap();
            assert_eq!(metadata(file.path()).unwrap(), texts());
            assert_eq!(Adapter::load(file.path(), Device::Cpu).unwrap().config(), &SMALL);
            // The texts are damaged, and the file is cut off.
            let key = b"encoder\":";
            let colon = bytes.windows(key.len()).position(|window| window == key).unwrap() + key.len() - 1;
            for bytes in [[&bytes[..colon], b";", &bytes[colon + 1..]].concat(), bytes[..20].to_vec()] {
                std::fs::write(file.path(), bytes).unwrap();
                let error = metadata(file.path()).unwrap_err();
                assert!(matches!(&error, Error::Invalid { path, .. } if path == file.path()), "{error}");
            }
        }
    }

    #[test]
    fn the_content_of_a_file_decides_how_it_is_read() {
        tch::set_num_threads(1);
        let adapter = Adapter::fresh(SMALL, 5, Device::Cpu).unwrap();
        let file = tempfile::NamedTempFile::new().unwrap();
        for bytes in [adapter.to_pytorch(Kind::Float, &BTreeMap::new()).unwrap(), adapter.to_safetensors(&BTreeMap::new()).unwrap()] {
            std::fs::write(file.path(), bytes).unwrap();
            assert_eq!(values(&Adapter::load(file.path(), Device::Cpu).unwrap().flat), values(&adapter.flat));
            assert!(metadata(file.path()).unwrap().is_empty());
        }
        let folder = tempfile::tempdir().unwrap();
        assert!(Adapter::load(folder.path(), Device::Cpu).unwrap_err().to_string().contains("looked for adapter.safetensors"));
        std::fs::write(folder.path().join("pytorch_model.bin"), adapter.to_pytorch(Kind::Float, &BTreeMap::new()).unwrap()).unwrap();
        assert_eq!(Adapter::load(folder.path(), Device::Cpu).unwrap().config(), &SMALL);
        assert!(metadata(folder.path()).unwrap().is_empty());
        let other = torch_file::serialize(&[("unet.weight".into(), Tensor::from(1.0_f32))], Kind::Float, &BTreeMap::new()).unwrap();
        std::fs::write(file.path(), other).unwrap();
        let error = Adapter::load(file.path(), Device::Cpu).unwrap_err().to_string();
        assert!(error.contains(file.path().to_str().unwrap()) && error.contains("among its keys (unet.weight)"), "{error}");
    }
}
