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

#[test]
fn two_loras_of_one_file_are_not_taken_for_one() {
    let dir = tempfile::tempdir().unwrap();
    let halves = |name: &str| {
        let key = |half: &str| format!("unet.{TO_Q}.lora_{half}{name}.weight");
        [(key("A"), random(3, &[2, 4])), (key("B"), random(4, &[6, 2]))]
    };
    let one = save(&dir, "one.safetensors", &halves(".one"));
    let plain = save(&dir, "plain.safetensors", &halves(""));
    let linear = |path: &Path| merged(&dir, &[Lora::open(path, 1.0).unwrap()]).map(|(linear, _)| linear);
    assert_eq!(linear(&one).unwrap(), linear(&plain).unwrap());
    let both = save(&dir, "both.safetensors", &halves(".one").into_iter().chain(halves(".two")).collect::<Vec<_>>());
    let error = linear(&both).unwrap_err().to_string();
    assert!(error.contains("2 keys") && error.contains(&format!("lora_A.two.weight (the second of {TO_Q})")), "{error}");
}

/// A folder of one module as PEFT saves it, and what is added to its weight at full strength.
fn peft_folder(config: Option<serde_json::Value>) -> (tempfile::TempDir, Tensor) {
    tch::set_num_threads(1);
    let dir = tempfile::tempdir().unwrap();
    let (down, up) = (random(3, &[4, 4]), random(4, &[6, 4]));
    let product = up.matmul(&down);
    let key = |half: &str| format!("base_model.model.{TO_Q}.lora_{half}.weight");
    save(&dir, "adapter_model.safetensors", &[(key("A"), down), (key("B"), up)]);
    if let Some(config) = config {
        std::fs::write(dir.path().join("adapter_config.json"), config.to_string()).unwrap();
    }
    (dir, product)
}

/// What PEFT's `LoraLayer.update_layer` has in `scaling`: alpha / r, or alpha / sqrt(r) with rsLoRA; here r is 4.
#[test]
fn the_strength_of_a_peft_folder_is_that_of_its_configuration() {
    let config = |changes: serde_json::Value| {
        let mut config = serde_json::json!({
            "peft_type": "LORA", "r": 4, "lora_alpha": 8, "alpha_pattern": {}, "rank_pattern": {}, "use_rslora": false, "use_dora": false,
            "init_lora_weights": "gaussian", "target_modules": ["to_q"],
        });
        config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        Some(config)
    };
    for (changes, factor) in [
        (serde_json::json!({}), 2.0),
        (serde_json::json!({ "use_rslora": true }), 4.0),
        (serde_json::json!({ "alpha_pattern": { "attn1.to_q": 2 } }), 0.5),
        (serde_json::json!({ "alpha_pattern": { "q": 2, "^attn1.to_q": 3, "to_q": 16 }, "use_rslora": true }), 8.0),
        // The rank of the factors counts, whatever the others have.
        (serde_json::json!({ "r": 64, "rank_pattern": { "to_q": 4 } }), 2.0),
    ] {
        let (dir, product) = peft_folder(config(changes.clone()));
        let wanted = random(1, &[6, 4]) + product * factor;
        for path in [dir.path().to_owned(), dir.path().join("adapter_model.safetensors")] {
            let (linear, _) = merged(&dir, &[Lora::open(&path, 1.0).unwrap()]).unwrap();
            assert!(linear.allclose(&wanted, 1e-6, 1e-6, false), "{changes}");
        }
    }
    for (changes, named) in [
        (serde_json::json!({ "use_dora": true }), "use_dora = true"),
        (serde_json::json!({ "peft_type": "LOHA" }), "LOHA"),
        (serde_json::json!({ "init_lora_weights": "pissa_niter_16" }), "pissa_niter_16"),
        (serde_json::json!({ "alpha_pattern": { ".*to_(q|k)": 2 } }), "alpha_pattern \".*to_(q|k)\""),
        (serde_json::json!({ "alpha_pattern": { "to_q": 2, "attn1.to_q": 3 } }), "both 3 and 2"),
    ] {
        let (dir, _) = peft_folder(config(changes));
        let error = Lora::open(dir.path(), 1.0).err().unwrap();
        assert!(matches!(error, Error::Unsupported { .. }) && error.to_string().contains(named), "{error}");
    }
}

#[test]
fn a_peft_file_without_its_strength_is_refused() {
    let (dir, _) = peft_folder(None);
    let error = Lora::open(dir.path(), 1.0).err().unwrap().to_string();
    assert!(error.contains("adapter_config.json") && error.contains("put that file beside it"), "{error}");
    let (dir, _) = peft_folder(Some(serde_json::json!({ "r": 4 })));
    assert!(Lora::open(dir.path(), 1.0).err().unwrap().to_string().contains("lora_alpha"));
    // Of other layouts it is none of the business.
    let key = |half: &str| format!("unet.{TO_Q}.lora_{half}.weight");
    let (down, up) = (random(3, &[4, 4]), random(4, &[6, 4]));
    let path = save(&dir, "diffusers.safetensors", &[(key("A"), down), (key("B"), up)]);
    assert!(Lora::open(&path, 1.0).is_ok());
}

/// A file whose metadata are diffusers': one JSON text with the settings of all parts.
#[test]
fn diffusers_metadata_say_the_same_part_by_part() {
    tch::set_num_threads(1);
    let dir = tempfile::tempdir().unwrap();
    let (down, up) = (random(3, &[4, 4]), random(4, &[6, 4]));
    let product = up.matmul(&down);
    let bytes =
        |tensor: &Tensor| Vec::<f32>::try_from(tensor.flatten(0, -1)).unwrap().iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<_>>();
    let open = |metadata: &str| {
        let halves =
            [(&down, "A"), (&up, "B")].map(|(tensor, half)| (format!("unet.{TO_Q}.lora_{half}.weight"), bytes(tensor), tensor.size()));
        let views = halves.iter().map(|(key, bytes, size)| {
            let shape = size.iter().map(|&side| side as usize).collect();
            (key, safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape, bytes).unwrap())
        });
        let metadata = [("lora_adapter_metadata".to_owned(), metadata.to_owned())].into();
        let path = dir.path().join("lora.safetensors");
        std::fs::write(&path, safetensors::serialize(views, Some(metadata)).unwrap()).unwrap();
        Lora::open(&path, 1.0)
    };
    for (metadata, factor) in [
        (r#"{"unet.lora_alpha": 2, "text_encoder.lora_alpha": 7}"#, 0.5),
        (r#"{"unet.lora_alpha": 2, "unet.use_rslora": true}"#, 1.0),
        (r#"{"text_encoder.lora_alpha": 7}"#, 1.0),
        (r#"{"lora_alpha": 12}"#, 3.0),
    ] {
        let (linear, _) = merged(&dir, &[open(metadata).unwrap()]).unwrap();
        assert!(linear.allclose(&(random(1, &[6, 4]) + &product * factor), 1e-6, 1e-6, false), "{metadata}");
    }
    assert!(
        open(r#"{"text_encoder.use_dora": true, "text_encoder.lora_alpha": 7}"#).err().unwrap().to_string().contains("use_dora = true")
    );
    assert!(open("{").err().unwrap().to_string().contains("lora_adapter_metadata"));
}
