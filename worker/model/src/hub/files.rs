//! Which files of a repository a model is loaded from. Repositories hold the same weights several times over, for other programs.

use std::collections::{BTreeMap, BTreeSet};

use crate::adapter::ADAPTER_FILE;
use crate::text::own_weights;
use crate::weights::{VARIANTS, only_safetensors, preferred};

/// Folders of a model in the layout of diffusers; the last is a student encoder that a model comes with.
const MODEL_FOLDERS: [&str; 8] =
    ["scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet", "vae", "text_encoder_zh"];

/// Folders of a pair of student encoders.
const PAIR_FOLDERS: [&str; 2] = ["xlm_roberta", "chinese_clip"];

/// Endings of configurations, vocabularies and the like, which are small.
const SMALL: [&str; 3] = [".json", ".txt", ".model"];

/// What a tokenizer is made of, in the layouts that are read.
const VOCABULARIES: [&str; 5] = ["sentencepiece.bpe.model", "spiece.model", "tokenizer.json", "vocab.json", "vocab.txt"];

/// Picks, of the names of all files in a repository, those that loading it reads: configurations, vocabularies, and of each network's
/// weights those that [`Weights::open`](crate::weights::Weights::open) would take.
///
/// Where there is a `unet/config.json` it is a model in the layout of diffusers, and only its parts count; where there is a pair of student
/// encoders, only they; else what lies in no folder.
#[must_use]
pub fn files_to_load<'a>(names: &[&'a str]) -> Vec<&'a str> {
    let mut folders: BTreeMap<&str, BTreeSet<&'a str>> = BTreeMap::new();
    for name in names {
        let (folder, file) = name.rsplit_once('/').unwrap_or(("", name));
        folders.entry(folder).or_default().insert(file);
    }
    let configured = |folder: &str| folders.get(folder).is_some_and(|files| files.contains("config.json"));
    let wanted: &[&str] = match () {
        () if configured("unet") => &MODEL_FOLDERS,
        () if PAIR_FOLDERS.into_iter().all(configured) => &PAIR_FOLDERS,
        () => &[""],
    };
    let picked: Vec<(&str, BTreeSet<&str>)> =
        wanted.iter().filter_map(|folder| Some((*folder, files_of_folder(folders.get(folder)?)))).collect();
    let is_picked = |name: &&str| {
        let (folder, file) = name.rsplit_once('/').unwrap_or(("", name));
        // Not read here, but by Python's pipelines, which find the model in the same cache.
        let is_index = *name == "model_index.json" && configured("unet");
        is_index || picked.iter().any(|(wanted, files)| *wanted == folder && files.contains(file))
    };
    names.iter().copied().filter(is_picked).collect()
}

fn files_of_folder<'a>(files: &BTreeSet<&'a str>) -> BTreeSet<&'a str> {
    let is_index = |file: &str| file.ends_with(".json") && file.contains(".index.");
    let small = |file: &&str| SMALL.iter().any(|end| file.ends_with(end)) && !is_index(file);
    let mut wanted: BTreeSet<&str> = files.iter().copied().filter(small).collect();
    let weights = weights_of_folder(files);
    wanted.extend(weights);
    if let Some(index) = weights.filter(|file| is_index(file)) {
        let (stem, rest) = index.split_once('.').unwrap_or((index, ""));
        let kind = if rest.starts_with("bin") { ".bin" } else { ".safetensors" };
        let is_part =
            |file: &&str| file.starts_with(stem) && file.contains("-of-") && file.ends_with(kind) && variant_of(file) == variant_of(index);
        wanted.extend(files.iter().copied().filter(is_part));
    }
    wanted
}

/// The kind of numbers that a file's name speaks of, where it is not the usual one: `.fp16` of `model.fp16-00001-of-00002.safetensors`.
fn variant_of(file: &str) -> Option<&'static str> {
    VARIANTS.into_iter().find(|variant| file.contains(variant))
}

/// The weights that a folder's loader would take. An adapter of Peapod's is no network's, and never lies beside one.
fn weights_of_folder<'a>(files: &BTreeSet<&'a str>) -> Option<&'a str> {
    let known = || files.get(preferred(|name| files.contains(name))?.as_str()).copied();
    own_weights(files).or_else(|| files.get(ADAPTER_FILE).copied()).or_else(known).or_else(|| only_safetensors(files.iter().copied()))
}

/// Whether what a cache has of a repository can be a whole model: each network with its weights, and what reads texts with a vocabulary.
///
/// Other programs fetch parts: a tokenizer, an autoencoder. What this passes for whole and is not is found when it is loaded.
#[must_use]
pub fn is_whole<S: AsRef<str>>(names: &[S]) -> bool {
    let names: Vec<&str> = names.iter().map(AsRef::as_ref).collect();
    let files = |folder: &str| -> BTreeSet<&str> {
        let inside = |name: &&'_ str| name.rsplit_once('/').map_or(("", *name), |(of, file)| (of, file)).0 == folder;
        names.iter().filter(|name| inside(name)).map(|name| name.rsplit('/').next().unwrap_or(name)).collect()
    };
    let has_weights = |folder: &str| {
        let files = files(folder);
        weights_of_folder(&files).is_some_and(|weights| {
            let parts: Vec<&str> = files.iter().copied().filter(|file| file.contains("-of-")).collect();
            // As many as the first says there are.
            let count = parts.first().and_then(|part| part.split("-of-").nth(1)?.split('.').next()?.parse().ok());
            !weights.contains(".index.") || count.is_some_and(|count: usize| parts.len() >= count)
        })
    };
    let has_network = |folder: &str| files(folder).contains("config.json") && has_weights(folder);
    let has_vocabulary = |folder: &str| files(folder).iter().any(|file| VOCABULARIES.contains(file));
    if !files("unet").is_empty() || files("").contains("model_index.json") {
        let second = !files("text_encoder_2").is_empty() || !files("tokenizer_2").is_empty();
        let first = ["unet", "vae", "text_encoder"].into_iter().all(has_network) && has_vocabulary("tokenizer");
        return first && !files("scheduler").is_empty() && (!second || has_network("text_encoder_2") && has_vocabulary("tokenizer_2"));
    }
    if PAIR_FOLDERS.iter().any(|folder| !files(folder).is_empty()) {
        return PAIR_FOLDERS.into_iter().all(|folder| has_network(folder) && has_vocabulary(folder));
    }
    // A ControlNet has a configuration and reads no text, a LoRA has none.
    let root = files("");
    let reads_text = (root.contains("config.json") || root.contains("open_clip_config.json"))
        && !root.iter().any(|file| file.starts_with("diffusion_pytorch_model"));
    has_weights("") && (!reads_text || has_vocabulary(""))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn picks(names: &[&str], expected: &[&str]) {
        assert_eq!(files_to_load(names), expected);
    }

    #[test]
    fn of_a_model_the_parts_are_taken_and_of_each_part_one_set_of_weights() {
        picks(
            &[
                "README.md",
                "01.png",
                "model_index.json",
                "sd_xl_base_1.0.safetensors",
                "sd_xl_base_1.0_0.9vae.safetensors",
                "scheduler/scheduler_config.json",
                "text_encoder/config.json",
                "text_encoder/flax_model.msgpack",
                "text_encoder/model.fp16.safetensors",
                "text_encoder/model.onnx",
                "text_encoder/model.safetensors",
                "tokenizer/added_tokens.json",
                "tokenizer/merges.txt",
                "tokenizer/special_tokens_map.json",
                "tokenizer/vocab.json",
                "unet/config.json",
                "unet/diffusion_pytorch_model.bin",
                "unet/diffusion_pytorch_model.fp16.safetensors",
                "unet/diffusion_pytorch_model.safetensors",
                "unet/model.onnx_data",
                "vae/config.json",
                "vae/diffusion_pytorch_model.fp16.safetensors",
                "vae_1_0/config.json",
                "vae_1_0/diffusion_pytorch_model.safetensors",
            ],
            &[
                "model_index.json",
                "scheduler/scheduler_config.json",
                "text_encoder/config.json",
                "text_encoder/model.safetensors",
                "tokenizer/added_tokens.json",
                "tokenizer/merges.txt",
                "tokenizer/special_tokens_map.json",
                "tokenizer/vocab.json",
                "unet/config.json",
                "unet/diffusion_pytorch_model.safetensors",
                "vae/config.json",
                "vae/diffusion_pytorch_model.fp16.safetensors",
            ],
        );
    }

    #[test]
    fn what_other_programs_fetch_of_a_model_is_told_from_the_whole() {
        let model = [
            "scheduler/scheduler_config.json",
            "text_encoder/config.json",
            "text_encoder/model.safetensors",
            "tokenizer/vocab.json",
            "unet/config.json",
            "unet/diffusion_pytorch_model.fp16.safetensors",
            "vae/config.json",
            "vae/diffusion_pytorch_model.safetensors",
        ];
        assert!(is_whole(&model));
        for left_out in 0..model.len() {
            let names: Vec<&str> = (0..model.len()).filter(|at| *at != left_out).map(|at| model[at]).collect();
            assert!(!is_whole(&names), "without {}", model[left_out]);
        }
        let second = ["text_encoder_2/config.json", "text_encoder_2/model.safetensors", "tokenizer_2/vocab.json"];
        assert!(is_whole(&[&model[..], &second].concat()) && !is_whole(&[&model[..], &second[..1]].concat()));
        assert!(!is_whole(&["model_index.json"]));
        let encoder = ["config.json", "model.safetensors", "vocab.txt"];
        assert!(is_whole(&encoder) && !is_whole(&encoder[..2]) && !is_whole(&["config.json", "tokenizer.json"]));
        assert!(is_whole(&["config.json", "diffusion_pytorch_model.safetensors"]), "a ControlNet");
        assert!(is_whole(&["ink-style.safetensors"]) && is_whole(&["adapter.safetensors"]));
        let parts = ["config.json", "tokenizer.json", "model.safetensors.index.json", "model-00001-of-00002.safetensors"];
        assert!(!is_whole(&parts) && is_whole(&[&parts[..], &["model-00002-of-00002.safetensors"]].concat()));
        assert!(!is_whole::<&str>(&[]));
    }

    #[test]
    fn parts_of_weights_come_with_their_index() {
        let parts = |half: &str| {
            ["model.safetensors.index", "model-00001-of-00002", "model-00002-of-00002"]
                .map(|name| if name.ends_with("index") { format!("{name}{half}.json") } else { format!("{name}{half}.safetensors") })
        };
        let (whole, half, other_half) = (parts(""), parts(".fp16"), parts(".bf16"));
        let names: Vec<&str> = ["config.json", "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"]
            .into_iter()
            .chain(whole.iter().map(String::as_str))
            .chain(half.iter().map(String::as_str))
            .chain(other_half.iter().map(String::as_str))
            .collect();
        let without = |left_out: &[&[String; 3]]| -> Vec<&str> {
            names.iter().copied().filter(|name| !left_out.iter().any(|set| set.iter().any(|other| other == name))).collect()
        };
        picks(&names, &["config.json", &whole[0], &whole[1], &whole[2]]);
        picks(&without(&[&whole]), &["config.json", &half[0], &half[1], &half[2]]);
        picks(&without(&[&whole, &half]), &["config.json", &other_half[0], &other_half[1], &other_half[2]]);
    }

    #[test]
    fn of_an_encoder_what_its_loader_would_take_is_taken() {
        picks(
            &["README.md", "clip_cn_vit-h-14.pt", "config.json", "pytorch_model.bin", "vocab.txt", "onnx/model.onnx"],
            &["clip_cn_vit-h-14.pt", "config.json", "vocab.txt"],
        );
        picks(&["clip_cn_a.pt", "clip_cn_b.pt", "config.json", "pytorch_model.bin"], &["config.json", "pytorch_model.bin"]);
        picks(
            &["open_clip_config.json", "open_clip_pytorch_model.bin", "pytorch_model.bin", "sentencepiece.bpe.model"],
            &["open_clip_config.json", "open_clip_pytorch_model.bin", "sentencepiece.bpe.model"],
        );
        picks(
            &["chinese_clip/config.json", "chinese_clip/model.safetensors", "config.json", "xlm_roberta/config.json", "other/config.json"],
            &["chinese_clip/config.json", "chinese_clip/model.safetensors", "xlm_roberta/config.json"],
        );
        picks(&["pytorch_lora_weights.safetensors", "image.png"], &["pytorch_lora_weights.safetensors"]);
        picks(&["README.md", "ink-style.safetensors"], &["ink-style.safetensors"]);
        picks(&["a.safetensors", "b.safetensors"], &[]);
        picks(&["adapter.safetensors", "manifest.json", "pytorch_model.bin"], &["adapter.safetensors", "manifest.json"]);
        picks(&["data.csv", "nothing/config.json"], &[]);
    }
}
