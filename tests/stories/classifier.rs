//! The classifier that judges demo runs is itself right: it must name what the demo's own pictures show.

use std::{collections::HashSet, fs::File, io::Read, path::Path};

use peapod_tests::classifier::{Classifier, Picture, prompts};

/// The first `count` samples of a demo shard: the decoded picture, and the classes its JSON names (colour, shape, background, size).
fn samples(count: usize) -> Vec<(Picture, [String; 4])> {
    let shard = Path::new(env!("CARGO_MANIFEST_DIR")).join("demo/shards/00000.tar");
    let mut archive = tar::Archive::new(File::open(shard).unwrap());
    let members: Vec<Vec<u8>> = archive
        .entries()
        .unwrap()
        .take(2 * count)
        .map(|entry| {
            let mut bytes = Vec::new();
            entry.unwrap().read_to_end(&mut bytes).unwrap();
            bytes
        })
        .collect();
    let sample = |pair: &[Vec<u8>]| {
        let decoded = image::load_from_memory(&pair[0]).unwrap().into_rgb8();
        let json: serde_json::Value = serde_json::from_slice(&pair[1]).unwrap();
        let class = |key: &str| json["shape"][key].as_str().unwrap().to_owned();
        let picture = Picture { width: decoded.width() as usize, height: decoded.height() as usize, rgb: decoded.into_raw() };
        (picture, ["color", "shape", "background", "size"].map(class))
    };
    members.chunks(2).map(sample).collect()
}

#[test]
fn classifier_names_what_the_demo_shards_show() {
    let (pictures, wanted): (Vec<_>, Vec<_>) = samples(60).into_iter().unzip();
    let seen = Classifier::load().unwrap().classify(&pictures).unwrap();
    for (i, (seen, wanted)) in seen.iter().zip(&wanted).enumerate() {
        assert_eq!([seen.colour.en(), seen.shape.en()], [&wanted[0], &wanted[1]].map(String::as_str), "sample {i}");
        assert_eq!(seen.background.en(), wanted[2], "sample {i}");
    }
}

#[test]
fn classifier_refuses_a_picture_whose_bytes_do_not_fit() {
    let error = Classifier::load().unwrap().classify(&[Picture { width: 8, height: 8, rgb: vec![0; 7] }]).unwrap_err();
    assert_eq!(error.to_string(), "a picture of 8x8 needs 192 bytes of RGB, not 7");
}

#[test]
fn the_hundred_prompts_cover_every_colour_with_every_shape() {
    let prompts = prompts();
    assert_eq!(prompts.len(), 100);
    assert_eq!(prompts.iter().map(|p| (p.wanted.colour, p.wanted.shape)).collect::<HashSet<_>>().len(), 8 * 5);
    assert_eq!(prompts.iter().map(|p| &p.zh).collect::<HashSet<_>>().len(), 100);
    assert_eq!(prompts[0].en, "a big red circle on a white background");
    assert_eq!(prompts[0].zh, "白色背景上的大红色圆形");
    assert_eq!(prompts[3].en, "small yellow circle, white background");
    assert_eq!(prompts[3].zh, "小黄色圆形，白色背景");
}
