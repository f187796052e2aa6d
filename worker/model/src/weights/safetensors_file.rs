//! The tensors of a safetensors file.

use safetensors::{Dtype, SafeTensors};
use tch::Kind;

use super::entry::{Entries, Entry};

/// Reads which tensors a file holds and where. Errors are what is wrong, in words.
pub(super) fn read(file: &[u8]) -> Result<Entries, String> {
    let (header_bytes, header) =
        SafeTensors::read_metadata(file).map_err(|error| format!("not a whole safetensors file ({} bytes): {error}", file.len()))?;
    // The data begins after the header and its 8-byte length; `read_metadata` has checked that the offsets fill the file exactly.
    let data = header_bytes + size_of::<u64>();
    let entry = |(key, info): (String, &safetensors::tensor::TensorInfo)| {
        let (start, end) = info.data_offsets;
        let shape: Result<Vec<i64>, _> = info.shape.iter().map(|&length| i64::try_from(length)).collect();
        let shape = shape.map_err(|_| format!("{key} has a dimension beyond 2^63"))?;
        let kind = kind_of(info.dtype).ok_or_else(|| format!("{key} holds {:?}, which libtorch's interface does not have", info.dtype))?;
        let entry = Entry::contiguous(data + start..data + end, kind, shape).map_err(|reason| format!("{key}: {reason}"))?;
        Ok((key, entry))
    };
    header.tensors().into_iter().map(entry).collect()
}

/// A text of a file's metadata; `None` without it, or in another kind of file.
pub(super) fn metadata(file: &[u8], name: &str) -> Option<String> {
    let (_, header) = SafeTensors::read_metadata(file).ok()?;
    header.metadata().as_ref()?.get(name).cloned()
}

fn kind_of(dtype: Dtype) -> Option<Kind> {
    match dtype {
        Dtype::BOOL => Some(Kind::Bool),
        Dtype::U8 => Some(Kind::Uint8),
        Dtype::I8 => Some(Kind::Int8),
        Dtype::I16 => Some(Kind::Int16),
        Dtype::I32 => Some(Kind::Int),
        Dtype::I64 => Some(Kind::Int64),
        Dtype::F8_E5M2 => Some(Kind::Float8e5m2),
        Dtype::F8_E4M3 => Some(Kind::Float8e4m3fn),
        Dtype::F16 => Some(Kind::Half),
        Dtype::BF16 => Some(Kind::BFloat16),
        Dtype::F32 => Some(Kind::Float),
        Dtype::F64 => Some(Kind::Double),
        Dtype::C64 => Some(Kind::ComplexFloat),
        _ => None,
    }
}
