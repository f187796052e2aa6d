//! Small tars and pictures for the tests.

use std::io::Cursor;

use ::image::{ImageFormat, RgbImage};
use peapod_proto::job::DataSection;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use safetensors::tensor::Dtype;

use crate::bucket::Bucket;
use crate::cached::{Array, CachedSample, EnglishStates, StudentStates};

#[allow(dead_code, reason = "other tests use the rest")]
#[path = "../../../tests/src/harness/http.rs"]
pub mod http;

/// A tar with these members.
pub fn tar_of(members: &[(&str, &[u8])]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (name, bytes) in members {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        builder.append_data(&mut header, name, *bytes).unwrap();
    }
    builder.into_inner().unwrap()
}

/// A JPEG of one colour.
pub fn jpeg_of(width: u32, height: u32, colour: [u8; 3]) -> Vec<u8> {
    encode(&RgbImage::from_pixel(width, height, ::image::Rgb(colour)))
}

/// A JPEG of noise: every byte of it counts.
pub fn noisy_jpeg(width: u32, height: u32, seed: u64) -> Vec<u8> {
    let mut picture = RgbImage::new(width, height);
    ChaCha8Rng::seed_from_u64(seed).fill_bytes(&mut picture);
    encode(&picture)
}

/// A JPEG of the colours that `pixel` gives for each column and row.
pub fn jpeg_from(width: u32, height: u32, pixel: impl Fn(u32, u32) -> [u8; 3]) -> Vec<u8> {
    encode(&RgbImage::from_fn(width, height, |x, y| ::image::Rgb(pixel(x, y))))
}

fn encode(picture: &RgbImage) -> Vec<u8> {
    let mut jpeg = Cursor::new(Vec::new());
    picture.write_to(&mut jpeg, ImageFormat::Jpeg).unwrap();
    jpeg.into_inner()
}

/// A cached sample of numbers that count up, f32.
pub fn cached_sample(original_size: (u32, u32), latents: [usize; 3], with_text: bool) -> CachedSample {
    let array = |shape: &[usize], start: f32| {
        let len: usize = shape.iter().product();
        let bytes = (0..len).flat_map(|at| (start + at as f32).to_le_bytes()).collect();
        Array { dtype: Dtype::F32, shape: shape.to_vec(), bytes }
    };
    let mask = Array { dtype: Dtype::U8, shape: vec![3], bytes: vec![1, 1, 0] };
    CachedSample {
        original_size,
        crop: (1, 2),
        mean: array(&latents, 0.0),
        log_variance: array(&latents, -20.0),
        english: with_text.then(|| EnglishStates { sequence: array(&[5, 6], 1.0), pooled: Some(array(&[4], 2.0)) }),
        student: with_text.then(|| StudentStates { sequence: array(&[3, 7], 3.0), mask }),
    }
}

/// A job's data section with its defaults.
pub fn data_section() -> DataSection {
    serde_json::from_str(r#"{"shards": []}"#).unwrap()
}

/// The buckets of the method.
pub fn method_buckets() -> Vec<Bucket> {
    [(448, 896), (448, 832), (512, 768), (576, 704), (640, 640), (704, 576), (768, 512), (832, 448), (896, 448)]
        .map(|(width, height)| Bucket { width, height })
        .to_vec()
}
