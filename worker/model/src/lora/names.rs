//! From the names that LoRA files give modules to those of the model.

use std::collections::{BTreeMap, BTreeSet};

use super::keys::Spelling;
use crate::source::Part;

/// The modules of a model's part under all names they go by.
pub(super) struct Names {
    dotted: BTreeSet<String>,
    /// Names with underscores, to the model's own.
    underscored: BTreeMap<String, String>,
}

/// What some exports put before every name of a text encoder, and others do not.
const TEXT_MODEL: &str = "text_model.";

impl Names {
    /// Reads the modules that have a weight off the keys of a model's part.
    pub(super) fn of<'a>(part: Part, keys: impl Iterator<Item = &'a str>) -> Self {
        let dotted: BTreeSet<String> = keys.filter_map(|key| key.strip_suffix(".weight")).map(str::to_owned).collect();
        let mut underscored: BTreeMap<String, String> = BTreeMap::new();
        for module in &dotted {
            underscored.insert(bare(module).replace('.', "_"), module.clone());
        }
        if part == Part::Unet {
            for (original, module) in originals(&dotted) {
                underscored.insert(original.replace('.', "_"), module);
            }
        }
        Self { dotted, underscored }
    }

    /// The module that a LoRA file calls `name`.
    pub(super) fn find(&self, name: &str, spelling: Spelling) -> Option<&str> {
        match spelling {
            Spelling::Dotted => {
                let other = format!("{TEXT_MODEL}{name}");
                [name, bare(name), &other].into_iter().find_map(|name| self.dotted.get(name)).map(String::as_str)
            }
            Spelling::Underscored => {
                let bare = name.strip_prefix("text_model_").unwrap_or(name);
                self.underscored.get(bare).map(String::as_str)
            }
        }
    }
}

fn bare(name: &str) -> &str {
    name.strip_prefix(TEXT_MODEL).unwrap_or(name)
}

/// Names of single modules in the original code.
const ENDS: &[(&str, &str)] = &[
    ("time_embedding.linear_1", "time_embed.0"),
    ("time_embedding.linear_2", "time_embed.2"),
    ("add_embedding.linear_1", "label_emb.0.0"),
    ("add_embedding.linear_2", "label_emb.0.2"),
    ("conv_in", "input_blocks.0.0"),
    ("conv_out", "out.2"),
];

/// Names within a residual block there.
const RESNET: &[(&str, &str)] =
    &[("conv1", "in_layers.2"), ("time_emb_proj", "emb_layers.1"), ("conv2", "out_layers.3"), ("conv_shortcut", "skip_connection")];

/// The names that the original code of SD and SDXL gives a UNet's modules, to diffusers' names. Its blocks lie in flat lists: each
/// residual block is an item, and so is each downsampler; upsamplers belong to the item before them.
fn originals(modules: &BTreeSet<String>) -> Vec<(String, String)> {
    let has = |name: &str| modules.contains(name);
    let count = |block: &str| (0..).take_while(|index| has(&format!("{block}.resnets.{index}.conv1"))).count();
    let mut names: Vec<(String, String)> =
        ENDS.iter().filter(|(name, _)| has(name)).map(|&(name, original)| (original.into(), name.into())).collect();
    let below = |prefix: &str, original: &str, renames: &[(&str, &str)], names: &mut Vec<(String, String)>| {
        for module in modules.iter().filter(|module| module.starts_with(prefix)) {
            let rest = &module[prefix.len()..];
            let rest = renames.iter().find(|(name, _)| *name == rest).map_or(rest, |(_, original)| original);
            names.push((format!("{original}{rest}"), module.clone()));
        }
    };

    // 1. Down; the first item is the input convolution.
    let mut item = 1;
    for block in (0..).map(|index| format!("down_blocks.{index}")).take_while(|block| count(block) > 0) {
        for layer in 0..count(&block) {
            below(&format!("{block}.resnets.{layer}."), &format!("input_blocks.{item}.0."), RESNET, &mut names);
            below(&format!("{block}.attentions.{layer}."), &format!("input_blocks.{item}.1."), &[], &mut names);
            item += 1;
        }
        let downsampler = format!("{block}.downsamplers.0.conv");
        if has(&downsampler) {
            names.push((format!("input_blocks.{item}.0.op"), downsampler));
            item += 1;
        }
    }

    // 2. Middle.
    below("mid_block.resnets.0.", "middle_block.0.", RESNET, &mut names);
    below("mid_block.attentions.0.", "middle_block.1.", &[], &mut names);
    below("mid_block.resnets.1.", "middle_block.2.", RESNET, &mut names);

    // 3. Up.
    let mut item = 0;
    for block in (0..).map(|index| format!("up_blocks.{index}")).take_while(|block| count(block) > 0) {
        for layer in 0..count(&block) {
            below(&format!("{block}.resnets.{layer}."), &format!("output_blocks.{item}.0."), RESNET, &mut names);
            below(&format!("{block}.attentions.{layer}."), &format!("output_blocks.{item}.1."), &[], &mut names);
            item += 1;
        }
        let upsampler = format!("{block}.upsamplers.0.conv");
        if has(&upsampler) {
            // Behind the transformer, where the level has one.
            let place = if has(&format!("{block}.attentions.0.proj_in")) { 2 } else { 1 };
            names.push((format!("output_blocks.{}.{place}.conv", item - 1), upsampler));
        }
    }
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Names of SDXL's blocks in the original code: two residual blocks a level on the way down, three on the way up.
    #[test]
    fn blocks_of_sdxl_are_found_under_the_names_of_the_original_code() {
        let mut keys = vec!["conv_in.weight".to_owned(), "add_embedding.linear_2.weight".into()];
        for block in 0..3 {
            for (way, layers) in [("down", 2), ("up", 3)] {
                for layer in 0..layers {
                    keys.push(format!("{way}_blocks.{block}.resnets.{layer}.conv1.weight"));
                    if (way == "down" && block > 0) || (way == "up" && block < 2) {
                        keys.push(format!("{way}_blocks.{block}.attentions.{layer}.proj_in.weight"));
                    }
                }
            }
        }
        keys.extend([0, 1].map(|block| format!("down_blocks.{block}.downsamplers.0.conv.weight")));
        keys.extend([0, 1].map(|block| format!("up_blocks.{block}.upsamplers.0.conv.weight")));
        let names = Names::of(Part::Unet, keys.iter().map(String::as_str));
        let find = |name: &str| names.find(name, Spelling::Underscored).unwrap_or("nothing");
        assert_eq!(find("input_blocks_0_0"), "conv_in");
        assert_eq!(find("label_emb_0_2"), "add_embedding.linear_2");
        assert_eq!(find("input_blocks_1_0_in_layers_2"), "down_blocks.0.resnets.0.conv1");
        assert_eq!(find("input_blocks_3_0_op"), "down_blocks.0.downsamplers.0.conv");
        assert_eq!(find("input_blocks_4_1_proj_in"), "down_blocks.1.attentions.0.proj_in");
        assert_eq!(find("input_blocks_8_1_proj_in"), "down_blocks.2.attentions.1.proj_in");
        assert_eq!(find("output_blocks_2_2_conv"), "up_blocks.0.upsamplers.0.conv");
        assert_eq!(find("output_blocks_5_1_proj_in"), "up_blocks.1.attentions.2.proj_in");
        assert_eq!(find("output_blocks_6_0_in_layers_2"), "up_blocks.2.resnets.0.conv1");
        assert_eq!(find("down_blocks_1_attentions_0_proj_in"), "down_blocks.1.attentions.0.proj_in");
        assert_eq!(find("input_blocks_9_1_proj_in"), "nothing");
    }

    #[test]
    fn text_encoders_are_found_with_and_without_their_prefix() {
        for stored in ["text_model.encoder.layers.0.mlp.fc1", "encoder.layers.0.mlp.fc1"] {
            let key = format!("{stored}.weight");
            let names = Names::of(Part::TextEncoder, std::iter::once(key.as_str()));
            assert_eq!(names.find("text_model_encoder_layers_0_mlp_fc1", Spelling::Underscored), Some(stored));
            assert_eq!(names.find("text_model.encoder.layers.0.mlp.fc1", Spelling::Dotted), Some(stored));
        }
    }
}
