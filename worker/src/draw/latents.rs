//! Latents in files: safetensors with the noise that pictures began with, and the clean latents they were decoded from.

use std::path::Path;

use anyhow::{Context, ensure};
use peapod_model::weights::Weights;
use tch::{Kind, Tensor};

/// The tensor to begin with.
const INITIAL: &str = "initial";
/// The tensor that pictures were decoded from.
const FINAL: &str = "final";

/// Reads noise to begin with: the tensor `initial`, or the only one of the file. Shapes: `f32` `[N, C, h, w]`.
///
/// Errors: a file that cannot be read, or that holds neither.
pub fn read_latents(path: &Path) -> anyhow::Result<Tensor> {
    let weights = Weights::open(path)?;
    let keys: Vec<&str> = weights.keys().collect();
    let key = match keys.as_slice() {
        [only] => *only,
        keys if keys.contains(&INITIAL) => INITIAL,
        keys => anyhow::bail!("{} holds {}: wanted one tensor, or one named {INITIAL}", path.display(), keys.join(", ")),
    };
    let latents = weights.stored(key).with_context(|| format!("{} lost {key}", path.display()))?;
    ensure!(latents.dim() == 4, "{}: {key} is {:?}, wanted [N, C, h, w]", path.display(), latents.size());
    Ok(latents.to_kind(Kind::Float))
}

/// Writes the latents of all pictures.
///
/// Errors: a file that cannot be written.
pub fn write_latents(path: &Path, initial: &[Tensor], clean: &[Tensor]) -> anyhow::Result<()> {
    let joined = |parts: &[Tensor]| Ok::<_, tch::TchError>(Tensor::f_cat(parts, 0)?.to_device(tch::Device::Cpu).contiguous());
    let tensors = [(INITIAL, joined(initial)?), (FINAL, joined(clean)?)];
    Tensor::write_safetensors(&tensors, path).with_context(|| format!("cannot write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;

    #[test]
    fn what_was_written_begins_the_next_drawing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("latents.safetensors");
        let part = |start: i64| Tensor::arange(16, (Kind::Float, Device::Cpu)).reshape([1, 4, 2, 2]) + start as f64;
        write_latents(&path, &[part(0), part(5)], &[part(9), part(9)]).unwrap();
        let read = read_latents(&path).unwrap();
        assert_eq!(read.size(), [2, 4, 2, 2]);
        assert!(read.get(1).equal(&part(5).get(0)));
        Tensor::write_safetensors(&[("a", part(0)), ("b", part(0))], &path).unwrap();
        assert!(read_latents(&path).unwrap_err().to_string().contains("wanted one tensor"));
        Tensor::write_safetensors(&[("a", part(0).get(0))], &path).unwrap();
        assert!(read_latents(&path).unwrap_err().to_string().contains("[N, C, h, w]"));
    }
}
