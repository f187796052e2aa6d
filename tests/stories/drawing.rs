//! `sample` as users call it: from prompts, pictures and masks to files, on the demo's model with the committed adapter.

use std::path::Path;
use std::process::{Command, Output};

use image::{GrayImage, Luma, RgbImage};
use peapod_tests::harness::{program, workspace};

const RED: &str = "白色背景上的大红色圆形";

/// Runs `sample` with the committed adapter and eight steps.
fn sample(arguments: &[&str]) -> Output {
    let model = ["--model", "tests/demo/model", "--adapter", "tests/demo/adapter.safetensors", "--steps", "8", "--threads", "1"];
    Command::new(program("sample")).args(model).args(arguments).current_dir(workspace()).output().unwrap()
}

fn drawn(arguments: &[&str]) -> String {
    let output = sample(arguments);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{arguments:?}: {said}");
    said
}

fn refused(arguments: &[&str]) -> String {
    let output = sample(arguments);
    assert_eq!(output.status.code(), Some(2), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn open(path: &Path) -> RgbImage {
    image::open(path).unwrap().to_rgb8()
}

/// The mean difference of the pixels that `wanted` picks by their column, in grey levels.
fn difference(left: &RgbImage, right: &RgbImage, wanted: impl Fn(u32) -> bool) -> f64 {
    let pairs = left.enumerate_pixels().zip(right.pixels()).filter(|((x, ..), _)| wanted(*x));
    let channels = pairs.flat_map(|((_, _, left), right)| [0, 1, 2].map(|channel| f64::from(left.0[channel].abs_diff(right.0[channel]))));
    let (sum, count) = channels.fold((0.0, 0), |(sum, count), difference| (sum + difference, count + 1));
    sum / f64::from(count)
}

#[test]
fn the_same_latents_give_the_same_picture_whatever_the_seed() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (first, second, other, latents) = (path("first.png"), path("second.png"), path("other.png"), path("latents.safetensors"));
    let said = drawn(&["-p", RED, "--latents-out", &latents, "--out", &first]);
    assert!(said.contains("samples/s") && said.contains("peak memory"), "{said}");
    drawn(&["-p", RED, "--seed", "5", "--latents", &latents, "--out", &second]);
    drawn(&["-p", RED, "--seed", "5", "--out", &other]);
    let [first, second, other] = [first, second, other].map(|path| open(Path::new(&path)));
    assert_eq!(difference(&first, &second, |_| true), 0.0);
    assert!(difference(&first, &other, |_| true) > 1.0);
}

#[test]
fn prompts_and_captions_that_are_not_seen_as_a_whole_are_warned_of() {
    let folder = tempfile::tempdir().unwrap();
    let (prompts, out) = (folder.path().join("prompts.txt"), folder.path().join("sheet.png"));
    let long = RED.repeat(3);
    std::fs::write(&prompts, format!("{RED}\n{long}\nแมว\n")).unwrap();
    let said = drawn(&["--prompts", prompts.to_str().unwrap(), "--grid", "--out", out.to_str().unwrap()]);
    let lines = |words: &str| said.lines().filter(|line| line.contains(words)).collect::<Vec<_>>();
    let cut = lines("is longer than the 24 tokens that the text encoder takes; cut off: ");
    assert!(cut.len() == 1 && cut[0].starts_with(&format!("sample: {long:?} ")), "{said}");
    assert_eq!(
        lines("has no word or character that the text encoder knows"),
        ["sample: \"แมว\" has no word or character that the text encoder knows: is it in its language?"]
    );
    assert_eq!(lines("the built-in font lacks "), ["sample: the built-in font lacks ม ว แ, drawn as boxes: give --font FILE"]);
}

#[test]
fn a_picture_is_changed_below_its_mask_alone_and_as_far_as_strength_says() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (start, mask, narrow) = (path("start.png"), path("mask.png"), path("narrow.png"));
    drawn(&["-p", RED, "--out", &start]);
    GrayImage::from_fn(64, 64, |x, _| Luma([if x < 32 { 0 } else { 255 }])).save(&mask).unwrap();
    GrayImage::new(32, 64).save(&narrow).unwrap();
    let from = |name: &str, more: &[&str]| {
        let out = path(name);
        drawn(&[&["-p", "白色背景上的小绿色正方形", "--init-image", &start, "--out", &out], more].concat());
        open(Path::new(&out))
    };
    let begun = open(Path::new(&start));
    let inpainted = from("inpainted.png", &["--mask", &mask]);
    let (kept, anew) = (difference(&begun, &inpainted, |x| x < 24), difference(&begun, &inpainted, |x| x >= 40));
    // The latents stay to the bit, which a golden case checks; this small autoencoder lets each half tint the other.
    assert!(kept < anew / 2.0, "{kept} grey levels where it stays, {anew} where it is drawn");
    let [little, much] = ["0.2", "0.9"].map(|strength| from(&format!("{strength}.png"), &["--strength", strength, "--guidance", "2"]));
    let (little, much) = (difference(&begun, &little, |_| true), difference(&begun, &much, |_| true));
    assert!(little < much / 2.0, "{little} and {much} grey levels");
    let error = refused(&["-p", RED, "--init-image", &start, "--mask", &narrow, "--out", &path("no.png")]);
    assert!(error.contains("32x64 pixels") && error.contains("64x64"), "{error}");
}

#[test]
fn what_does_not_fit_the_model_is_refused_before_it_is_loaded() {
    let error = refused(&["-p", RED, "--out", "x.png", "--lora", "tests/golden/cases/draw_sdxl/kohya.safetensors:0.5"]);
    assert!(error.contains("kohya.safetensors") && error.contains("keys fit nothing in this model") && error.contains("to_q"), "{error}");
    let control = ["--controlnet", "tests/golden/cases/controlnet_like_sdxl/controlnet", "--control-image", "tests/demo/demo.png"];
    let error = refused(&[&["-p", RED, "--out", "x.png"], &control[..]].concat());
    assert!(error.contains("text of width 8") && error.contains("text of width 80"), "{error}");
    let error = refused(&["-p", RED, "--out", "x.png", "--width", "100"]);
    assert!(error.contains("100x64 pixels") && error.contains("multiples of 8"), "{error}");
}

#[test]
fn a_comparison_says_how_alike_student_and_teacher_draw() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("sheet.png");
    let arguments = ["-p", RED, "--teacher-prompt", "a big red circle on a white background", "--compare", "--out", out.to_str().unwrap()];
    // Given twice: two columns beside the teacher's.
    let twice = [&arguments[..], &["--adapter", "tests/demo/adapter.safetensors", "--clip", "tests/golden/cases/clip_score/clip"]].concat();
    let output = sample(&twice);
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let lines: Vec<&str> = said.lines().collect();
    assert_eq!((lines.len(), lines[1] == lines[2]), (3, true), "{said}");
    let number = |name: &str| lines[1].split_once(name).unwrap().1.split('\t').next().unwrap().parse::<f64>().unwrap();
    let alike = number("\tsimilarity ");
    assert!(alike > 0.5 && number("CLIP similarity ") > 0.5 && (0.0..=100.0).contains(&number("CLIPScore ")), "{said}");
    assert!(lines[0].starts_with("English teacher\tCLIPScore "), "{said}");
    assert!(open(&out).width() > 3 * 192);
}
