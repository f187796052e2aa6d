use safetensors::Dtype;
use safetensors::tensor::{TensorView, serialize};

use super::*;

fn half_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|&value| half::f16::from_f32(value).to_le_bytes()).collect()
}

/// A file with `a.0.weight` [2, 3] and `a.bias` [2], both f16.
fn sample_file() -> Vec<u8> {
    let (weight, bias) = (half_bytes(&[0.0, 1.0, 2.0, 3.0, 4.0, 5.0]), half_bytes(&[0.5, -0.5]));
    let tensors = [
        ("a.0.weight", TensorView::new(Dtype::F16, vec![2, 3], &weight).unwrap()),
        ("a.bias", TensorView::new(Dtype::F16, vec![2], &bias).unwrap()),
    ];
    serialize(tensors, None).unwrap()
}

fn open_bytes(bytes: &[u8]) -> Result<Weights> {
    tch::set_num_threads(1);
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("model.safetensors"), bytes).unwrap();
    Weights::open(folder.path())
}

#[test]
fn tensors_are_converted_and_carry_no_gradient() {
    let weights = open_bytes(&sample_file()).unwrap();
    let root = weights.root(Kind::Float, Device::Cpu);
    let weight = (&root / "a" / 0).tensor("weight", &[2, 3]);
    assert_eq!(weight.kind(), Kind::Float);
    assert!(!weight.requires_grad());
    assert_eq!(Vec::<f32>::try_from(weight.flatten(0, 1)).unwrap(), [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]);
    let _ = (root / "a").tensor("bias", &[2]);
    weights.finish(&[]).unwrap();
    assert_eq!(weights.num_requested(), 8);
}

#[test]
fn one_error_lists_missing_misshapen_and_unused_keys() {
    let weights = open_bytes(&sample_file()).unwrap();
    let root = weights.root(Kind::Float, Device::Cpu);
    assert!((&root / "a").has("bias"));
    assert_eq!((&root / "a" / 0).tensor("weight", &[3, 2]).size(), [3, 2]);
    assert_eq!(root.tensor("gone", &[4]).size(), [4]);
    let text = weights.finish(&[]).unwrap_err().to_string();
    for part in ["1 missing, 1 misshapen, 1 unknown", "missing gone [4]", "a.0.weight is [2, 3], wanted [3, 2]", "unknown a.bias"] {
        assert!(text.contains(part), "{text}");
    }
    assert!(!weights.finish(&["bias"]).unwrap_err().to_string().contains("unknown a.bias"));
}

#[test]
fn shapes_are_checked_as_strictly_without_reading_a_tensor() {
    let check = |shape: &[i64], name: &str| {
        let weights = open_bytes(&sample_file()).unwrap().shapes_only();
        let root = weights.root(Kind::Float, Device::Cpu);
        let tensor = (&root / "a" / 0).tensor("weight", shape);
        assert_eq!((tensor.size().as_slice(), tensor.sum(Kind::Float).double_value(&[])), (shape, 0.0));
        let _ = (&root / "a").tensor(name, &[2]);
        assert!(weights.anew().keys().eq(weights.keys()) && weights.anew().num_requested() == 0);
        (weights.survey(), weights.finish(&[]).map_err(|error| error.to_string()))
    };
    assert_eq!(check(&[2, 3], "bias"), (Survey { num_parameters: 8, kinds: vec![(Kind::Half, 16)] }, Ok(())));
    assert!(check(&[3, 2], "bias").1.unwrap_err().contains("a.0.weight is [2, 3], wanted [3, 2]"));
    assert!(check(&[2, 3], "scale").1.unwrap_err().contains("missing a.scale [2]"));
}

#[test]
fn a_sketch_tells_names_shapes_and_numbers_apart_at_both_ends_and_in_the_middle() {
    let sketch = |name: &str, shape: Vec<usize>, changed: Option<usize>| {
        let mut bytes: Vec<u8> = half_bytes(&[0.5; 300]);
        changed.into_iter().for_each(|at| bytes[2 * at] ^= 1);
        let tensors = [(name, TensorView::new(Dtype::F16, shape, &bytes).unwrap())];
        let mut pieces = Vec::new();
        open_bytes(&serialize(tensors, None).unwrap()).unwrap().sketch(&mut |piece| pieces.push(piece.to_vec()));
        assert!(pieces.len() == 4 && pieces.iter().all(|piece| piece.len() <= 64));
        pieces
    };
    let same = sketch("a", vec![3, 100], None);
    assert_eq!(sketch("a", vec![3, 100], None), same);
    for other in [sketch("b", vec![3, 100], None), sketch("a", vec![100, 3], None)] {
        assert_ne!(other, same);
    }
    for changed in [0, 150, 299] {
        assert_ne!(sketch("a", vec![3, 100], Some(changed)), same, "number {changed}");
    }
    assert_eq!(sketch("a", vec![3, 100], Some(70)), same, "it is a sample");
}

#[test]
fn truncated_and_lying_files_are_refused() {
    let whole = sample_file();
    let mut overlong_header = whole.clone();
    overlong_header[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    // The same length, but the shape claims more elements than the offsets hold.
    let lying = String::from_utf8_lossy(&whole[8..]).find("[2,3]").map(|at| {
        let mut bytes = whole.clone();
        bytes[8 + at + 1] = b'9';
        bytes
    });
    for bytes in [&whole[..whole.len() - 1], &whole[..20], &whole[..0], &overlong_header, &lying.unwrap()] {
        let error = open_bytes(bytes).err().unwrap();
        assert!(matches!(error, Error::Invalid { .. }), "{error}");
    }
}

#[test]
fn sharded_sets_are_joined_and_must_hold_what_their_index_lists() {
    tch::set_num_threads(1);
    let folder = tempfile::tempdir().unwrap();
    let index = folder.path().join("model.safetensors.index.json");
    std::fs::write(folder.path().join("one.safetensors"), sample_file()).unwrap();
    std::fs::write(&index, r#"{"metadata": {}, "weight_map": {"a.0.weight": "one.safetensors", "a.bias": "one.safetensors"}}"#).unwrap();
    assert_eq!(Weights::open(folder.path()).unwrap().keys().collect::<Vec<_>>(), ["a.0.weight", "a.bias"]);

    std::fs::write(&index, r#"{"weight_map": {"b": "one.safetensors"}}"#).unwrap();
    assert!(Weights::open(folder.path()).err().unwrap().to_string().contains("the first is b"));
    std::fs::write(&index, r#"{"weight_map": {"b": "../one.safetensors"}}"#).unwrap();
    assert!(Weights::open(folder.path()).err().unwrap().to_string().contains("plain file name"));
}

#[test]
fn of_several_files_the_one_of_most_bits_is_read() {
    tch::set_num_threads(1);
    let folder = tempfile::tempdir().unwrap();
    // From the last to the first.
    for name in [
        "diffusion_pytorch_model.bf16.bin",
        "diffusion_pytorch_model.fp16.bin",
        "diffusion_pytorch_model.bin",
        "model.bf16.safetensors",
        "model.fp16.safetensors",
        "model.safetensors",
    ] {
        let tensors = [(name.to_owned(), Tensor::ones([1], (Kind::Float, Device::Cpu)))];
        std::fs::write(folder.path().join(name), torch_file::serialize(&tensors, Kind::Float, &BTreeMap::new()).unwrap()).unwrap();
        assert_eq!(Weights::open(folder.path()).unwrap().keys().collect::<Vec<_>>(), [name]);
    }
    for (format, shard) in [("bin", "diffusion_pytorch_model.bf16.bin"), ("safetensors", "model.bf16.safetensors")] {
        let folder_of_parts = tempfile::tempdir().unwrap();
        std::fs::copy(folder.path().join(shard), folder_of_parts.path().join("part")).unwrap();
        let index = folder_of_parts.path().join(format!("diffusion_pytorch_model.{format}.index.bf16.json"));
        std::fs::write(index, format!(r#"{{"weight_map": {{"{shard}": "part"}}}}"#)).unwrap();
        assert_eq!(Weights::open(folder_of_parts.path()).unwrap().keys().collect::<Vec<_>>(), [shard]);
    }
}

#[test]
fn torch_files_are_read_by_their_content_and_safetensors_are_preferred() {
    tch::set_num_threads(1);
    let folder = tempfile::tempdir().unwrap();
    let save = |name: &str, key: &str| {
        let tensors = [(key.to_owned(), Tensor::ones([2, 3], (Kind::Float, Device::Cpu)))];
        std::fs::write(folder.path().join(name), torch_file::serialize(&tensors, Kind::Half, &BTreeMap::new()).unwrap()).unwrap();
    };
    let keys = || Weights::open(folder.path()).unwrap().keys().map(String::from).collect::<Vec<_>>();
    save("one.bin", "a");
    save("two.bin", "b");
    std::fs::write(folder.path().join("pytorch_model.bin.index.json"), r#"{"weight_map": {"a": "one.bin", "b": "two.bin"}}"#).unwrap();
    assert_eq!(keys(), ["a", "b"]);
    save("pytorch_model.bin", "c");
    assert_eq!(keys(), ["c"]);
    let weights = Weights::open(folder.path()).unwrap();
    let tensor = weights.root(Kind::Float, Device::Cpu).tensor("c", &[2, 3]);
    assert_eq!((tensor.kind(), tensor.sum(Kind::Float).double_value(&[])), (Kind::Float, 6.0));
    assert_eq!(weights.stored("c").unwrap().kind(), Kind::Half);
    assert!(weights.stored("d").is_none());
    weights.finish(&[]).unwrap();
    std::fs::write(folder.path().join("model.safetensors"), sample_file()).unwrap();
    assert_eq!(keys(), ["a.0.weight", "a.bias"]);
}

#[test]
fn a_folder_without_weights_says_what_was_looked_for() {
    let folder = tempfile::tempdir().unwrap();
    let error = Weights::open(folder.path()).err().unwrap();
    let error = error.to_string();
    for name in ["diffusion_pytorch_model.safetensors, model.safetensors", "as .fp16, .bf16", "adapter_model.safetensors"] {
        assert!(error.contains(name), "{error}");
    }
}
