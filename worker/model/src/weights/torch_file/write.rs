//! Writing a state dict as `torch.save` does.

use std::collections::BTreeMap;

use tch::{Device, Kind, Tensor};

use super::{METADATA, zip};
use crate::{Error, Result};

/// Name of the folder inside the zip file; torch takes any.
const ROOT: &str = "archive";
const PROTOCOL_2: &[u8] = b"\x80\x02";
const STOP: u8 = b'.';
const MARK: u8 = b'(';
const REDUCE: u8 = b'R';
const EMPTY_TUPLE: u8 = b')';
const TUPLE: u8 = b't';
const SET_ITEMS: u8 = b'u';
const PERSISTENT_ID: u8 = b'Q';
const NEW_FALSE: u8 = 0x89;
const ORDERED_DICT: &[u8] = b"ccollections\nOrderedDict\n";
const REBUILD_TENSOR: &[u8] = b"ctorch._utils\n_rebuild_tensor_v2\n";

/// Writes named tensors as a file that `torch.load(weights_only=True)` reads as an ordered dict, in their order. It passes over `metadata`.
///
/// The elements are converted to `kind`: f16, bf16 or f32. The same tensors and metadata give the same bytes.
/// Errors: [`Error::Unsupported`] for another kind, or beyond 4 GiB; [`Error::Torch`].
pub(crate) fn serialize(tensors: &[(String, Tensor)], kind: Kind, metadata: &BTreeMap<String, String>) -> Result<Vec<u8>> {
    let class = match kind {
        Kind::Half => "HalfStorage",
        Kind::BFloat16 => "BFloat16Storage",
        Kind::Float => "FloatStorage",
        other => return Err(Error::Unsupported { what: format!("writing {other:?}"), hint: "f16, bf16 and f32 can be written".into() }),
    };
    let shapes: Vec<(&str, Vec<i64>)> = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor.size())).collect();
    let mut entries = vec![(format!("{ROOT}/data.pkl"), pickle(&shapes, class)), (format!("{ROOT}/byteorder"), b"little".to_vec())];
    for (index, (_, tensor)) in tensors.iter().enumerate() {
        entries.push((format!("{ROOT}/data/{index}"), to_bytes(tensor, kind)?));
    }
    entries.push((format!("{ROOT}/version"), b"3\n".to_vec()));
    if !metadata.is_empty() {
        entries.push((format!("{ROOT}/{METADATA}"), serde_json::json!(metadata).to_string().into_bytes()));
    }
    zip::write(&entries)
        .map_err(|bytes| Error::Unsupported { what: format!("a torch file of {bytes} bytes"), hint: "write safetensors instead".into() })
}

/// The program that builds the ordered dict. Storage `data/I` is that of the I-th tensor.
fn pickle(tensors: &[(&str, Vec<i64>)], storage_class: &str) -> Vec<u8> {
    let mut program = PROTOCOL_2.to_vec();
    program.extend_from_slice(ORDERED_DICT);
    program.extend_from_slice(&[EMPTY_TUPLE, REDUCE, MARK]);
    for (index, (name, shape)) in tensors.iter().enumerate() {
        let strides = (1..=shape.len()).map(|from| shape[from..].iter().product()).collect::<Vec<i64>>();
        text(&mut program, name);
        program.extend_from_slice(REBUILD_TENSOR);
        program.push(MARK);
        // ("storage", class, key, device, length)
        program.push(MARK);
        text(&mut program, "storage");
        program.extend_from_slice(format!("ctorch\n{storage_class}\n").as_bytes());
        text(&mut program, &index.to_string());
        text(&mut program, "cpu");
        integer(&mut program, shape.iter().product());
        program.extend_from_slice(&[TUPLE, PERSISTENT_ID]);
        // offset, size, strides, requires_grad, hooks
        integer(&mut program, 0);
        integers(&mut program, shape);
        integers(&mut program, &strides);
        program.push(NEW_FALSE);
        program.extend_from_slice(ORDERED_DICT);
        program.extend_from_slice(&[EMPTY_TUPLE, REDUCE, TUPLE, REDUCE]);
    }
    program.extend_from_slice(&[SET_ITEMS, STOP]);
    program
}

fn text(program: &mut Vec<u8>, text: &str) {
    program.push(b'X');
    program.extend_from_slice(&(text.len() as u32).to_le_bytes());
    program.extend_from_slice(text.as_bytes());
}

/// An integer: of four bytes where they suffice, else of eight.
fn integer(program: &mut Vec<u8>, number: i64) {
    match i32::try_from(number) {
        Ok(short) => {
            program.push(b'J');
            program.extend_from_slice(&short.to_le_bytes());
        }
        Err(_) => {
            program.extend_from_slice(b"\x8a\x08");
            program.extend_from_slice(&number.to_le_bytes());
        }
    }
}

fn integers(program: &mut Vec<u8>, numbers: &[i64]) {
    program.push(MARK);
    for &number in numbers {
        integer(program, number);
    }
    program.push(TUPLE);
}

fn to_bytes(tensor: &Tensor, kind: Kind) -> Result<Vec<u8>> {
    let host = tensor.f_detach()?.f_to_device(Device::Cpu)?.f_to_kind(kind)?.f_contiguous()?;
    let mut bytes = vec![0; host.numel() * kind.elt_size_in_bytes()];
    host.f_copy_data_u8(&mut bytes, host.numel())?;
    Ok(bytes)
}
