//! Tensors in and out of safetensors bytes, as `f32`: what the adapter, the optimiser and the average are saved as.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;

use half::{bf16, f16};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
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

/// Writes named tensors as `f32` safetensors with string metadata.
pub(crate) fn serialize(tensors: &[(String, Tensor)], metadata: &BTreeMap<String, String>) -> Result<Vec<u8>> {
    let host = tensors.iter().map(|(name, tensor)| Ok((name, to_shape(tensor)?, to_bytes(tensor)?))).collect::<Result<Vec<_>>>()?;
    let views = host
        .iter()
        .map(|(name, shape, bytes)| Ok((name, TensorView::new(Dtype::F32, shape.clone(), bytes).map_err(writing)?)))
        .collect::<Result<Vec<_>>>()?;
    let metadata: HashMap<_, _> = metadata.clone().into_iter().collect();
    safetensors::serialize(views, Some(metadata)).map_err(writing)
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

fn writing(error: safetensors::SafeTensorError) -> Error {
    invalid("safetensors", format!("cannot be written: {error}"))
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
