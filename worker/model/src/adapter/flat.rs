//! Tensors in and out of safetensors bytes, as `f32`: what the adapter, the optimiser and the average are saved as.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;

use half::{bf16, f16};
use safetensors::{Dtype, SafeTensors, tensor::TensorInfo};
use serde::Serialize;
use tch::{Device, Kind, Tensor};

use crate::{Error, Result};

/// Checks that `tensor` is one row of `length` elements.
pub(crate) fn check_length(what: &'static str, tensor: &Tensor, length: usize) -> Result<()> {
    let size = tensor.size();
    if size == [length as i64] { Ok(()) } else { Err(Error::Shape { what, detail: format!("got {size:?}, wanted [{length}]") }) }
}

/// Copies a tensor into storage of its own.
pub(crate) fn copy(tensor: &Tensor) -> Result<Tensor> {
    let mut copy = tensor.f_empty_like()?;
    copy.f_copy_(tensor)?;
    Ok(copy)
}

/// The part of a safetensors file in front of its data, with the keys in order.
#[derive(Serialize)]
struct Header<'a> {
    #[serde(rename = "__metadata__")]
    metadata: &'a BTreeMap<String, String>,
    #[serde(flatten)]
    tensors: BTreeMap<&'a str, TensorInfo>,
}

/// Headers are filled up with spaces to a multiple of this, so that the data behind them is aligned.
const HEADER_ALIGNMENT: usize = 8;

/// Writes named tensors, no two of one name, as `f32` safetensors with string metadata. The same content gives the same bytes.
///
/// Written here because the crate keeps metadata in a hash map, whose order differs each time.
pub(crate) fn serialize(tensors: &[(String, Tensor)], metadata: &BTreeMap<String, String>) -> Result<Vec<u8>> {
    let sorted: BTreeMap<&str, &Tensor> = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    let mut data = Vec::new();
    let mut infos = BTreeMap::new();
    for (name, tensor) in sorted {
        let start = data.len();
        data.extend(to_bytes(tensor)?);
        infos.insert(name, TensorInfo { dtype: Dtype::F32, shape: to_shape(tensor)?, data_offsets: (start, data.len()) });
    }
    let header = Header { metadata, tensors: infos };
    let mut header = serde_json::to_vec(&header).map_err(|error| invalid("safetensors", format!("cannot be written: {error}")))?;
    header.resize(header.len().next_multiple_of(HEADER_ALIGNMENT), b' ');
    Ok([&(header.len() as u64).to_le_bytes(), header.as_slice(), &data].concat())
}

/// A parsed safetensors buffer.
pub(crate) struct FlatFile<'a> {
    what: &'static str,
    tensors: SafeTensors<'a>,
    metadata: HashMap<String, String>,
}

impl<'a> FlatFile<'a> {
    /// Parses `bytes`; `what` names them in errors.
    pub(crate) fn parse(what: &'static str, bytes: &'a [u8]) -> Result<Self> {
        let bad = |error: safetensors::SafeTensorError| invalid(what, format!("not a whole safetensors file: {error}"));
        let (_, header) = SafeTensors::read_metadata(bytes).map_err(bad)?;
        let metadata = header.metadata().clone().unwrap_or_default();
        Ok(Self { what, tensors: SafeTensors::deserialize(bytes).map_err(bad)?, metadata })
    }

    /// The shapes of all tensors, by name.
    pub(crate) fn shapes(&self) -> BTreeMap<String, Vec<i64>> {
        let signed = |shape: &[usize]| shape.iter().map(|&length| i64::try_from(length).unwrap_or(i64::MAX)).collect();
        self.tensors.iter().map(|(name, view)| (name.to_owned(), signed(view.shape()))).collect()
    }

    /// The elements of a tensor stored as f16, bf16 or f32, in row-major order.
    pub(crate) fn elements(&self, name: &str) -> Result<Vec<f32>> {
        let view = self.tensors.tensor(name).map_err(|error| invalid(self.what, error.to_string()))?;
        let data = view.data();
        match view.dtype() {
            Dtype::F32 => Ok(data.as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect()),
            Dtype::F16 => Ok(data.as_chunks().0.iter().map(|&bytes| f16::from_le_bytes(bytes).to_f32()).collect()),
            Dtype::BF16 => Ok(data.as_chunks().0.iter().map(|&bytes| bf16::from_le_bytes(bytes).to_f32()).collect()),
            other => Err(invalid(self.what, format!("{name} holds {other:?}; f16, bf16 and f32 can be read"))),
        }
    }

    /// The elements of a tensor as one row on `device`.
    pub(crate) fn flat(&self, name: &str, device: Device) -> Result<Tensor> {
        Ok(Tensor::f_from_slice(&self.elements(name)?)?.f_to_device(device)?)
    }

    /// A number kept as metadata.
    pub(crate) fn metadata_number<T: std::str::FromStr>(&self, key: &str) -> Result<T> {
        let text = self.metadata.get(key).ok_or_else(|| invalid(self.what, format!("has no metadata {key:?}")))?;
        text.parse().map_err(|_| invalid(self.what, format!("metadata {key:?} is {text:?}, wanted a number")))
    }
}

/// An error of bytes that came from no file in particular.
pub(crate) fn invalid(what: &str, reason: String) -> Error {
    Error::Invalid { path: PathBuf::from(what), reason }
}

fn to_shape(tensor: &Tensor) -> Result<Vec<usize>> {
    let size = tensor.size();
    let length = |&length: &i64| usize::try_from(length).map_err(|_| Error::Shape { what: "serialize", detail: format!("{size:?}") });
    size.iter().map(length).collect()
}

fn to_bytes(tensor: &Tensor) -> Result<Vec<u8>> {
    let host = tensor.f_detach()?.f_to_device(Device::Cpu)?.f_to_kind(Kind::Float)?.f_flatten(0, -1)?;
    Ok(Vec::<f32>::try_from(host)?.into_iter().flat_map(f32::to_le_bytes).collect())
}

#[cfg(test)]
mod tests {
    use safetensors::tensor::TensorView;

    use super::*;

    /// Eight entries have 40 320 orders, of which a hash map takes another each time.
    #[test]
    fn the_same_content_gives_the_same_bytes() {
        tch::set_num_threads(1);
        let metadata: BTreeMap<_, _> = (0..8).map(|number| (format!("key {number}"), format!("\"{number}\""))).collect();
        let tensors = [("b", 2.5), ("a", -1.0)].map(|(name, value)| (name.to_owned(), Tensor::from(value).expand([3, 1], false)));
        let bytes = serialize(&tensors, &metadata).unwrap();
        assert_eq!(bytes, serialize(&tensors, &metadata).unwrap());
        let header = usize::try_from(u64::from_le_bytes(bytes[..8].try_into().unwrap())).unwrap();
        assert_eq!((header % HEADER_ALIGNMENT, bytes.len()), (0, 8 + header + 2 * 12));
        let [first, last] = ["key 0", "key 7"].map(|key| bytes.windows(key.len()).position(|part| part == key.as_bytes()).unwrap());
        assert!(first < last);

        let file = FlatFile::parse("test", &bytes).unwrap();
        assert_eq!(file.metadata.into_iter().collect::<BTreeMap<_, _>>(), metadata);
        let file = FlatFile::parse("test", &bytes).unwrap();
        assert_eq!(file.shapes().into_iter().collect::<Vec<_>>(), [("a".to_owned(), vec![3, 1]), ("b".to_owned(), vec![3, 1])]);
        assert_eq!((file.elements("a").unwrap(), file.elements("b").unwrap()), (vec![-1.0; 3], vec![2.5; 3]));
    }

    /// Where the crate has no choice, with one entry of metadata, its bytes are ours.
    #[test]
    fn files_are_those_of_the_crate_byte_for_byte() {
        tch::set_num_threads(1);
        let metadata = BTreeMap::from([("step".to_owned(), "7".to_owned())]);
        let tensors = [("b", 2.5_f32), ("a", -1.0)].map(|(name, value)| (name.to_owned(), Tensor::from_slice(&[value; 3])));
        let rows = [("b", 2.5_f32), ("a", -1.0)].map(|(name, value)| (name, value.to_le_bytes().repeat(3)));
        let views = rows.iter().map(|(name, row)| (name, TensorView::new(Dtype::F32, vec![3], row).unwrap()));
        let expected = safetensors::serialize(views, Some(metadata.clone().into_iter().collect())).unwrap();
        assert_eq!(serialize(&tensors, &metadata).unwrap(), expected);
    }
}
