use std::sync::Arc;

use tch::{Device, Kind, Tensor};

use super::*;

const TO_Q: &str = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q";

fn save(dir: &tempfile::TempDir, name: &str, tensors: &[(String, Tensor)]) -> PathBuf {
    let path = dir.path().join(name);
    Tensor::write_safetensors(tensors, &path).unwrap();
    path
}

fn random(seed: i64, shape: &[i64]) -> Tensor {
    (Tensor::arange(shape.iter().product::<i64>(), (Kind::Float, Device::Cpu)) * 0.37 + seed as f64).sin().reshape(shape)
}

/// A model of two weights, and the same with `loras` merged.
fn merged(dir: &tempfile::TempDir, loras: &[Lora]) -> Result<(Tensor, Tensor)> {
    let model = save(
        dir,
        "model.safetensors",
        &[(format!("{TO_Q}.weight"), random(1, &[6, 4])), ("conv_in.weight".into(), random(2, &[5, 4, 3, 3]))],
    );
    let open = |part: Part| Ok((part == Part::Unet).then(|| Weights::open(&model).unwrap()));
    let mut additions = additions(loras, open)?;
    let weights = Weights::open(&model)?.with_additions(Arc::new(additions.remove(&Part::Unet).unwrap_or_default()));
    let root = weights.root(Kind::Float, Device::Cpu);
    let tensor = |name: &str, shape: &[i64]| root.tensor(name, shape).shallow_clone();
    Ok((tensor(&format!("{TO_Q}.weight"), &[6, 4]), tensor("conv_in.weight", &[5, 4, 3, 3])))
}

#[test]
fn layouts_agree_and_several_files_add_up() {
    tch::set_num_threads(1);
    let dir = tempfile::tempdir().unwrap();
    let (down, up) = (random(3, &[2, 4]), random(4, &[6, 2]));
    let (conv_down, conv_up) = (random(5, &[3, 4, 3, 3]), random(6, &[5, 3, 1, 1]));
    let peft = save(
        &dir,
        "peft.safetensors",
        &[(format!("unet.{TO_Q}.lora_A.weight"), down.copy()), (format!("unet.{TO_Q}.lora_B.weight"), up.copy())],
    );
    let flat = format!("lora_unet_{}", TO_Q.replace('.', "_"));
    let kohya = save(
        &dir,
        "kohya.safetensors",
        &[
            (format!("{flat}.lora_down.weight"), down.copy()),
            (format!("{flat}.lora_up.weight"), up.copy()),
            (format!("{flat}.alpha"), Tensor::from(1.0_f32)),
            ("lora_unet_input_blocks_0_0.lora_down.weight".into(), conv_down.copy()),
            ("lora_unet_input_blocks_0_0.lora_up.weight".into(), conv_up.copy()),
        ],
    );
    let lora = |path: &Path, scale: f64| Lora::open(path, scale).unwrap();
    let close = |got: &Tensor, wanted: &Tensor| assert!(got.allclose(wanted, 1e-6, 1e-6, false));
    let product = up.matmul(&down);
    close(&merged(&dir, &[lora(&peft, 0.5)]).unwrap().0, &(random(1, &[6, 4]) + &product * 0.5));
    // Alpha 1 at rank 2 halves; of two files both count.
    let (linear, conv) = merged(&dir, &[lora(&kohya, 1.0), lora(&peft, -2.0)]).unwrap();
    close(&linear, &(random(1, &[6, 4]) + &product * (0.5 - 2.0)));
    let wanted = conv_up.reshape([5, 3]).matmul(&conv_down.reshape([3, 36])).reshape([5, 4, 3, 3]) + random(2, &[5, 4, 3, 3]);
    close(&conv, &wanted);
}

#[test]
fn keys_that_fit_nothing_are_listed() {
    let dir = tempfile::tempdir().unwrap();
    let path = save(
        &dir,
        "odd.safetensors",
        &[
            ("lora_unet_conv_in.hada_w1_a".into(), random(1, &[2, 4])),
            ("unet.nowhere.to_q.lora_A.weight".into(), random(1, &[2, 4])),
            (format!("unet.{TO_Q}.lora_A.weight"), random(1, &[2, 5])),
            (format!("unet.{TO_Q}.lora_B.weight"), random(1, &[6, 2])),
            ("text_encoder_2.text_model.encoder.layers.0.mlp.fc1.lora_A.weight".into(), random(1, &[2, 4])),
        ],
    );
    let error = merged(&dir, &[Lora::open(&path, 1.0).unwrap()]).unwrap_err().to_string();
    for part in ["odd.safetensors", "4 keys", "hada_w1_a", "nowhere", "[2, 5] and [6, 2]", "[6, 4]", "the model has no text_encoder_2"] {
        assert!(error.contains(part), "{part} in {error}");
    }
}
