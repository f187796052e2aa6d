use std::path::{Path, PathBuf};

use peapod_model::adapter::{ADAPTER_FILE, AdapterConfig, PYTORCH_FILE};
use tch::Kind;

use super::setup::Files;
use super::student::adapter_file;
use super::*;

/// The demo's model: 64x64 pixels, UNet of three levels, cross-attention 80, pooled 48, student encoder 64.
fn demo() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/demo/model")
}

fn files(dir: &tempfile::TempDir, config: AdapterConfig) -> Files {
    let path = dir.path().join(ADAPTER_FILE);
    let metadata = AdapterMetadata { context_length: Some(24), ..AdapterMetadata::default() }.to_map();
    std::fs::write(&path, Adapter::fresh(config, 0, Device::Cpu).unwrap().to_safetensors(&metadata).unwrap()).unwrap();
    Files { model: demo(), adapters: vec![path], ..Files::default() }
}

const FITTING: AdapterConfig = AdapterConfig { input: 64, hidden: 16, depth: 3, pooled: 48, output: Some(80) };

#[test]
fn demo_model_and_a_fitting_adapter_pass() {
    let dir = tempfile::tempdir().unwrap();
    let setup = Setup::check(&files(&dir, FITTING)).unwrap();
    assert_eq!((setup.native_side(), setup.inpaints()), (64, false));
    let student = &setup.students[0];
    assert_eq!((student.context_length, student.options.normalize_quotes), (24, true));
    assert_eq!(student.encoder, demo().join("text_encoder_zh"));
}

#[test]
fn misfitting_adapters_are_refused_with_both_widths() {
    let dir = tempfile::tempdir().unwrap();
    let cases = [
        (AdapterConfig { input: 1024, ..FITTING }, "its input has width 1024", "text_encoder_zh asks for width 64"),
        (AdapterConfig { output: Some(2048), ..FITTING }, "its output has width 2048", "tests/demo/model asks for width 80"),
        (AdapterConfig { pooled: 1280, ..FITTING }, "its pooled output has width 1280", "tests/demo/model asks for width 48"),
        (AdapterConfig { pooled: 80, output: None, ..FITTING }, "its pooled output has no width", "tests/demo/model asks for width 48"),
    ];
    for (config, got, expected) in cases {
        let error = Setup::check(&files(&dir, config)).unwrap_err().to_string();
        assert!(error.contains(got) && error.contains(expected), "{error}");
    }
}

#[test]
fn missing_files_are_named_before_anything_loads() {
    let dir = tempfile::tempdir().unwrap();
    let nowhere = Files { model: dir.path().join("nowhere"), ..Files::default() };
    assert!(Setup::check(&nowhere).unwrap_err().to_string().contains("nowhere"));
    let no_adapter = Files { model: demo(), adapters: vec![dir.path().join("a.safetensors")], ..Files::default() };
    assert!(Setup::check(&no_adapter).unwrap_err().to_string().contains("the adapter is missing"));
    let no_student = Files { student: Some(dir.path().into()), ..files(&dir, FITTING) };
    assert!(Setup::check(&no_student).unwrap_err().to_string().contains("holds no text encoder"));
}

/// What the published trainer leaves behind: a folder for each step it saved, named in either of two ways.
#[test]
fn adapters_of_the_published_trainer_are_found_by_their_highest_step() {
    let root = tempfile::tempdir().unwrap();
    let bytes = Adapter::fresh(FITTING, 0, Device::Cpu).unwrap().to_pytorch(Kind::Half, &Default::default()).unwrap();
    for folder in ["proj_9", "proj_0_41999", "proj_1009", "projector"] {
        std::fs::create_dir(root.path().join(folder)).unwrap();
        std::fs::write(root.path().join(folder).join(PYTORCH_FILE), &bytes).unwrap();
    }
    std::fs::create_dir(root.path().join("proj_50000")).unwrap();
    let newest = root.path().join("proj_0_41999").join(PYTORCH_FILE);
    assert_eq!(adapter_file(root.path()).unwrap(), newest);
    assert_eq!(adapter_file(&root.path().join("proj_9")).unwrap(), root.path().join("proj_9").join(PYTORCH_FILE));
    let files = Files { model: demo(), adapters: vec![root.path().into()], context_length: Some(24), ..Files::default() };
    assert_eq!(Setup::check(&files).unwrap().students[0].adapter, newest);
    assert!(adapter_file(&root.path().join("proj_50000")).unwrap_err().to_string().contains("an adapter in that folder is missing"));
}

#[test]
fn an_adapter_in_the_published_format_says_how_its_prompts_are_encoded() {
    let dir = tempfile::tempdir().unwrap();
    let metadata = AdapterMetadata {
        job: Some("demo".into()),
        step: Some(7),
        context_length: Some(12),
        normalize_quotes: Some(false),
        mask_pads: Some(true),
        ..AdapterMetadata::default()
    };
    let path = dir.path().join(PYTORCH_FILE);
    std::fs::write(&path, Adapter::fresh(FITTING, 0, Device::Cpu).unwrap().to_pytorch(Kind::Half, &metadata.to_map()).unwrap()).unwrap();
    let setup = Setup::check(&Files { model: demo(), adapters: vec![dir.path().into()], ..Files::default() }).unwrap();
    let student = &setup.students[0];
    assert_eq!((&student.adapter, student.origin.as_deref()), (&path, Some("demo, step 7")));
    assert_eq!((student.context_length, student.options.normalize_quotes, student.mask_pads), (12, false, true));
}

/// A folder with these files, each an adapter drawn from another seed.
fn checkpoint(folder: &Path, names: &[&str]) {
    std::fs::create_dir(folder).unwrap();
    for (seed, name) in (0..).zip(names) {
        let bytes = Adapter::fresh(FITTING, seed, Device::Cpu).unwrap().to_safetensors(&Default::default()).unwrap();
        std::fs::write(folder.join(name), bytes).unwrap();
    }
}

#[test]
fn the_moving_average_of_a_checkpoint_is_drawn_with_where_there_is_one() {
    let root = tempfile::tempdir().unwrap();
    let (with, without) = (root.path().join("step-2"), root.path().join("step-1"));
    checkpoint(&without, &["adapter.safetensors", "manifest.json"]);
    assert_eq!(adapter_file(root.path()).unwrap(), without.join("adapter.safetensors"));
    checkpoint(&with, &["adapter.safetensors", "adapter_ema.safetensors", "manifest.json"]);
    let average = with.join("adapter_ema.safetensors");
    assert_eq!((adapter_file(root.path()).unwrap(), adapter_file(&with).unwrap()), (average.clone(), average.clone()));
    assert_eq!(adapter_file(&without).unwrap(), without.join("adapter.safetensors"));
    assert_eq!(adapter_file(&with.join("adapter.safetensors")).unwrap(), with.join("adapter.safetensors"), "a file is the file itself");
    let setup = |adapter: &Path| {
        let files = Files { model: demo(), adapters: vec![adapter.into()], context_length: Some(24), ..Files::default() };
        Setup::check(&files).unwrap()
    };
    assert_eq!(setup(root.path()).averages().collect::<Vec<_>>(), [average.as_path()]);
    assert_eq!(setup(&without).averages().count(), 0);
    // Half a checkpoint, which the published trainer has not saved either.
    std::fs::remove_file(&average).unwrap();
    std::fs::remove_file(with.join("adapter.safetensors")).unwrap();
    assert!(adapter_file(root.path()).unwrap_err().to_string().contains("an adapter in that folder is missing"));
}

/// A student encoder need not have a config.json at its root: its own layout decides.
#[test]
fn pairs_of_encoders_are_students_too() {
    let dir = tempfile::tempdir().unwrap();
    let pair = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/cases/student_pair/student");
    let options = StudentOptions::new(Kind::Float, Device::Cpu);
    let width = StudentEncoder::check(&pair, 8, options).unwrap().width();
    let student = Files { student: Some(pair), context_length: Some(8), ..files(&dir, AdapterConfig { input: width, ..FITTING }) };
    assert!(Setup::check(&student).is_ok());
    let misfit = Files { adapters: files(&dir, FITTING).adapters, ..student };
    assert!(Setup::check(&misfit).unwrap_err().to_string().contains(&format!("asks for width {width}")));
}

#[test]
fn adapter_without_a_context_length_asks_for_one() {
    let dir = tempfile::tempdir().unwrap();
    let files = files(&dir, FITTING);
    let bare = Adapter::fresh(FITTING, 0, Device::Cpu).unwrap().to_safetensors(&Default::default()).unwrap();
    std::fs::write(&files.adapters[0], bare).unwrap();
    assert!(Setup::check(&files).unwrap_err().to_string().contains("give --context-length"));
    assert!(Setup::check(&Files { context_length: Some(24), ..files }).is_ok());
}

#[test]
fn impossible_options_are_refused() {
    let setup = Setup::check(&Files { model: demo(), english: true, ..Files::default() }).unwrap();
    let good = SampleOptions { width: 96, height: 64, num_steps: 20, ..SampleOptions::default() };
    let inputs = Inputs::default();
    setup.check_options(&good, &inputs).unwrap();
    let bad = |options: SampleOptions| setup.check_options(&options, &inputs).unwrap_err().to_string();
    assert!(bad(SampleOptions { width: 68, ..good.clone() }).contains("multiples of 8 between 32"));
    assert!(bad(SampleOptions { height: 0, ..good.clone() }).contains("96x0 pixels"));
    assert!(bad(SampleOptions { guidance: f64::NAN, ..good.clone() }).contains("guidance NaN"));
    assert!(bad(SampleOptions { num_steps: 1000, ..good }).contains("between 1 and 999"));
}
