//! What the configuration files of text encoders and the token ids fed to them have in common.

use std::path::Path;

use tch::{Device, Tensor};

use crate::{Error, Result};

/// Checks the widths of a transformer: `width` divides evenly into `heads`, and nothing is zero or negative.
pub(super) fn check_transformer(path: &Path, width: i64, heads: i64, others: &[i64]) -> Result<()> {
    if heads >= 1 && width >= 1 && width % heads == 0 && others.iter().all(|&size| size >= 1) {
        return Ok(());
    }
    let reason = format!("{heads} heads of a width of {width}: sizes must be positive and the width a multiple of the heads");
    Err(Error::Invalid { path: path.into(), reason })
}

/// Moves token ids to a device.
///
/// Shapes: equally long rows, to int64 `[B, L]`.
/// Errors: [`Error::Shape`] if there is no row, rows differ in length or exceed `max_length`, or an id is outside `0..vocab_size`
/// (libtorch would abort the device over it).
pub(super) fn ids_to_tensor(ids: &[Vec<i64>], max_length: i64, vocab_size: i64, device: Device) -> Result<Tensor> {
    let shape_error = |detail: String| Error::Shape { what: "token ids", detail };
    let length = ids.first().map(Vec::len).ok_or_else(|| shape_error("no rows".into()))?;
    if let Some(other) = ids.iter().find(|row| row.len() != length) {
        return Err(shape_error(format!("rows of {length} and of {}", other.len())));
    }
    if length == 0 || length as i64 > max_length {
        return Err(shape_error(format!("rows of {length}, the encoder has {max_length} positions")));
    }
    let flat = ids.concat();
    if let Some(id) = flat.iter().find(|id| !(0..vocab_size).contains(*id)) {
        return Err(shape_error(format!("id {id}, the encoder's vocabulary has {vocab_size}")));
    }
    Ok(Tensor::f_from_slice(&flat)?.f_view([ids.len() as i64, length as i64])?.f_to_device(device)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_that_would_abort_the_device_are_refused() {
        let convert = |rows: &[Vec<i64>]| ids_to_tensor(rows, 4, 10, Device::Cpu);
        assert_eq!(convert(&[vec![1, 2], vec![3, 9]]).unwrap().size(), [2, 2]);
        for rows in [vec![], vec![vec![]], vec![vec![1], vec![1, 2]], vec![vec![0; 5]], vec![vec![10]], vec![vec![-1]]] {
            assert!(matches!(convert(&rows), Err(Error::Shape { .. })), "{rows:?}");
        }
    }
}
