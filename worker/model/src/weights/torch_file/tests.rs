use proptest::prelude::*;
use tch::{Device, Kind, Tensor};

use super::*;

/// A file with `a` [2, 3] and `b.c` [], both f32.
fn sample() -> Vec<u8> {
    tch::set_num_threads(1);
    let values = Tensor::arange(6, (Kind::Float, Device::Cpu)).view([2, 3]);
    serialize(&[("a".into(), values), ("b.c".into(), Tensor::from(7.0_f32))], Kind::Float, &BTreeMap::new()).unwrap()
}

/// A file around any pickle, with one storage of four floats.
fn around(program: &[u8]) -> Vec<u8> {
    let storage = (0..4).flat_map(|value| (value as f32).to_le_bytes()).collect();
    zip::write(&[("x/data.pkl".into(), program.to_vec()), ("x/data/0".into(), storage)]).unwrap()
}

/// A tensor of two elements, as a pickle writes it.
const TENSOR: &[u8] = b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x04tQK\x01K\x02\x85K\x01\x85\x89NtR";

fn values(file: &[u8], entry: &Entry) -> Vec<f32> {
    Vec::try_from(entry.copy(file, Kind::Float, Device::Cpu).flatten(0, -1)).unwrap()
}

#[test]
fn what_is_written_is_read_back() {
    tch::set_num_threads(1);
    for kind in [Kind::Float, Kind::Half, Kind::BFloat16] {
        let tensors = [("a", vec![2, 3]), ("b.c", vec![]), ("none", vec![0, 2])].map(|(name, shape)| {
            let length: i64 = shape.iter().product();
            (name.to_owned(), Tensor::arange(length, (Kind::Float, Device::Cpu)).view(shape.as_slice()))
        });
        let file = serialize(&tensors, kind, &BTreeMap::new()).unwrap();
        let entries = read(&file).unwrap();
        for ((name, tensor), (found, entry)) in tensors.iter().zip(&entries) {
            assert_eq!((name, entry.kind(), entry.shape()), (found, kind, tensor.size().as_slice()));
            assert_eq!(values(&file, entry), Vec::<f32>::try_from(tensor.flatten(0, -1)).unwrap());
        }
    }
    let error = serialize(&[], Kind::Int64, &BTreeMap::new()).unwrap_err();
    assert!(error.to_string().contains("f16, bf16 and f32"), "{error}");
}

#[test]
fn wrappers_and_prefixes_are_taken_off() {
    tch::set_num_threads(1);
    let inner = [b"}X\x08\0\0\0module.a", TENSOR, b"s"].concat();
    let wrapped = [&b"\x80\x02}(X\x05\0\0\0epochK\x07X\x0a\0\0\0state_dict"[..], &inner, b"u."].concat();
    let nested = [&b"\x80\x02}X\x03\0\0\0one}K\x05]"[..], TENSOR, b"ass."].concat();
    for (program, name) in [(wrapped, "a"), (nested, "one.5.0")] {
        let file = around(&program);
        let entries = read(&file).unwrap();
        assert_eq!(entries.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(), [name]);
        assert_eq!(values(&file, &entries[0].1), [1.0, 2.0]);
    }
}

#[test]
fn files_that_are_no_state_dict_say_why() {
    let refuse = |file: &[u8]| read(file).unwrap_err().to_string();
    assert!(refuse(&around(b"}.")).contains("no dict of tensors"));
    assert!(refuse(&around(&[TENSOR, b"."].concat())).contains("no dict of tensors"));
    assert!(refuse(&around(b"cposix\nsystem\nX\x02\0\0\0ls\x85R.")).contains("posix.system"));
    assert!(refuse(&zip::write(&[("x/y".into(), vec![])]).unwrap()).contains("without a data.pkl"));
    let old = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.";
    assert!(is_torch_file(old) && refuse(old).contains("torch.save(torch.load('OLD'"));
    let big = zip::write(&[("x/data.pkl".into(), b"}.".to_vec()), ("x/byteorder".into(), b"big".to_vec())]).unwrap();
    assert_eq!(read(&big).unwrap_err(), Fault::BigEndian);
    // A storage that claims more than is there.
    let lying = [b"}X\x01\0\0\0a", TENSOR, b"s."].concat();
    let at = lying.windows(3).position(|bytes| bytes == b"K\x04t").unwrap();
    let mut lying = lying;
    lying[at + 1] = 5;
    assert!(refuse(&around(&lying)).contains("a: its storage has 16 bytes instead of 5 elements of 4"));
}

/// An object of a class that is not known, with a state.
const OBJECT: &[u8] = b"cargparse\nNamespace\n)\x81}X\x01\0\0\0aK\x01sb";

#[test]
fn objects_may_lie_beside_the_weights_and_not_among_them() {
    tch::set_num_threads(1);
    let names = |program: &[u8]| read(&around(program)).map(|entries| entries.into_iter().map(|(name, _)| name).collect::<Vec<_>>());
    let weights = [b"}X\x01\0\0\0a", TENSOR, b"s"].concat();
    let callbacks = b"}cpytorch_lightning\nModelCheckpoint\n}ss";
    let state = [&b"}(X\x04\0\0\0args"[..], OBJECT, b"X\x0a\0\0\0state_dict", &weights, b"uX\x09\0\0\0callbacks", callbacks, b"."].concat();
    assert_eq!(names(&state).unwrap(), ["a"]);
    let bare = [&b"}(X\x01\0\0\0a"[..], TENSOR, b"X\x04\0\0\0args", OBJECT, b"u."].concat();
    assert_eq!(names(&bare).unwrap(), ["a"]);
    let among = [&b"}X\x0a\0\0\0state_dict}(X\x01\0\0\0a"[..], TENSOR, b"X\x01\0\0\0b", OBJECT, b"us."].concat();
    assert_eq!(names(&among).unwrap_err(), Fault::Global("argparse.Namespace".into()));
    // A whole model, which only its own classes could take apart.
    let model = [&b"cmodels\nUNet\n)\x81"[..], &weights, b"b."].concat();
    assert_eq!(names(&model).unwrap_err(), Fault::Global("models.UNet".into()));
}

#[test]
fn a_small_file_cannot_name_a_tensor_a_billion_times() {
    // Thirty lists, each holding the one before twice: 2^30 paths to the tensor.
    let mut program = [b"]", TENSOR, b"aq\0"].concat();
    for index in 0..30_u8 {
        program.extend_from_slice(&[b']', b'(', b'h', index, b'h', index, b'e', b'q', index + 1]);
    }
    program.push(b'.');
    assert!(matches!(read(&around(&program)), Err(Fault::TooMuch(_))));
    assert!(matches!(read(&around(b"]q\0h\0a.")), Err(Fault::TooMuch(_))));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever a file holds, it is read or refused; a tensor that is read lies inside the file.
    #[test]
    fn damaged_files_are_read_or_refused(changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6), cut in any::<prop::sample::Index>()) {
        let mut file = sample();
        for (at, byte) in changes {
            let at = at.index(file.len());
            file[at] = byte;
        }
        check(&file);
        check(&file[..cut.index(file.len())]);
    }

    /// The same for files that torch wrote, the damage mostly in the pickle and the directory, which are all that is parsed.
    #[test]
    fn damaged_files_of_torch_are_read_or_refused(which in 0..TORCH_FILES.len(), changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6)) {
        let mut file = TORCH_FILES[which].to_vec();
        prop_assert!(read(&file).is_ok());
        for (at, byte) in changes {
            let at = at.index(file.len());
            file[at] = byte;
        }
        check(&file);
    }

    #[test]
    fn any_bytes_as_a_pickle_are_read_or_refused(program in prop::collection::vec(any::<u8>(), 0..200)) {
        check(&around(&program));
    }

    /// Programs of opcodes that make sense get deeper into the machine than random bytes.
    #[test]
    fn any_sequence_of_known_opcodes_is_read_or_refused(steps in prop::collection::vec(0..PIECES.len(), 0..60)) {
        let program: Vec<u8> = steps.into_iter().flat_map(|step| PIECES[step].iter().copied()).chain([b'.']).collect();
        check(&around(&program));
    }

    #[test]
    fn any_bytes_after_a_zip_header_are_refused(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        check(&[b"PK\x03\x04", bytes.as_slice(), b"PK\x05\x06", &[0; 18]].concat());
    }
}

const TORCH_FILES: [&[u8]; 4] = [
    include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden/cases/torch_dict/weights.pt")),
    include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden/cases/torch_training_state/epoch_3.pt")),
    include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden/cases/torch_nested/nested.pt")),
    include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden/cases/torch_lightning/last.ckpt")),
];

const PIECES: &[&[u8]] = &[
    b"}",
    b"]",
    b")",
    b"(",
    b"t",
    b"u",
    b"s",
    b"a",
    b"e",
    b"R",
    b"b",
    b"Q",
    b"q\0",
    b"h\0",
    b"q\x01",
    b"h\x01",
    b"N",
    b"\x88",
    b"K\x02",
    b"J\xff\xff\xff\xff",
    b"\x85",
    b"\x86",
    b"\x87",
    b"0",
    b"\x94",
    b"X\x01\0\0\0a",
    b"X\x07\0\0\0storage",
    b"X\x01\0\0\x000",
    b"ctorch\nFloatStorage\n",
    b"ctorch.storage\nUntypedStorage\n",
    b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"ctorch._utils\n_rebuild_tensor_v3\n",
    b"ctorch\nfloat8_e5m2\n",
    b"ccollections\nOrderedDict\n",
    b"ctorch\nSize\n",
    b"cbuiltins\nset\n",
    b"(ibuiltins\nset\n",
    b"\x81",
    b"\x8f",
    b"\x90",
    b"\x91",
    b"\x92",
    b"o",
    b"1",
    OBJECT,
    TENSOR,
];

fn check(file: &[u8]) {
    tch::set_num_threads(1);
    if let Ok(entries) = read(file) {
        for (_, entry) in entries {
            let _ = entry.copy(file, entry.kind(), Device::Cpu);
        }
    }
}
