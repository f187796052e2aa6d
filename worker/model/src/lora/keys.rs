//! What the keys of a LoRA file say.

use std::borrow::Cow;

use crate::source::Part;

/// One of the tensors that make an addition.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Half {
    /// From inputs to the rank.
    Down,
    /// From the rank to outputs.
    Up,
    /// What the product is multiplied by, times the rank.
    Alpha,
}

/// How a module's name is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Spelling {
    /// As in the model's own keys.
    Dotted,
    /// With underscores for dots, after diffusers' names or after those of the original code.
    Underscored,
}

/// A key taken apart.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Key {
    pub part: Part,
    pub name: String,
    pub spelling: Spelling,
    pub half: Half,
}

/// How keys end.
const ENDS: &[(&str, Half)] = &[
    (".lora_down.weight", Half::Down),
    (".lora_up.weight", Half::Up),
    (".lora_A.weight", Half::Down),
    (".lora_B.weight", Half::Up),
    (".lora.down.weight", Half::Down),
    (".lora.up.weight", Half::Up),
    (".lora_linear_layer.down.weight", Half::Down),
    (".lora_linear_layer.up.weight", Half::Up),
    // The attention processors of older diffusers: `attn1.processor.to_q_lora.down.weight`, and `self_attn.to_q_lora.down.weight` of texts.
    ("_lora.down.weight", Half::Down),
    ("_lora.up.weight", Half::Up),
    (".alpha", Half::Alpha),
];

/// How PEFT calls the halves; in memory a name of the whole follows: `.lora_A.default.weight`.
const PEFT_HALVES: [&str; 2] = [".lora_A", ".lora_B"];

/// What the attention processors of older diffusers called the projections, and what text encoders call them.
const TEXT_PROJECTIONS: [(&str, &str); 4] = [("to_q", "q_proj"), ("to_k", "k_proj"), ("to_v", "v_proj"), ("to_out", "out_proj")];

/// How keys begin that PEFT wrote: it wraps a model twice.
pub(super) const PEFT_BEGINNING: &str = "base_model.model.";

/// How keys begin.
const BEGINNINGS: &[(&str, Part, Spelling)] = &[
    ("lora_unet_", Part::Unet, Spelling::Underscored),
    ("lora_te_", Part::TextEncoder, Spelling::Underscored),
    ("lora_te1_", Part::TextEncoder, Spelling::Underscored),
    ("lora_te2_", Part::TextEncoder2, Spelling::Underscored),
    ("unet.", Part::Unet, Spelling::Dotted),
    ("text_encoder.", Part::TextEncoder, Spelling::Dotted),
    ("text_encoder_2.", Part::TextEncoder2, Spelling::Dotted),
    (PEFT_BEGINNING, Part::Unet, Spelling::Dotted),
    ("diffusion_model.", Part::Unet, Spelling::Dotted),
];

impl Key {
    /// Takes a key apart; `None` if it is of no known layout.
    pub(super) fn parse(key: &str) -> Option<Self> {
        let key = without_adapter_name(key);
        let (stem, half) = ENDS.iter().find_map(|(end, half)| Some((key.strip_suffix(end)?, *half)))?;
        let begun = BEGINNINGS.iter().find_map(|(beginning, part, spelling)| Some((stem.strip_prefix(beginning)?, *part, *spelling)));
        let (name, part, spelling) = begun.unwrap_or((stem, Part::Unet, Spelling::Dotted));
        if name.is_empty() {
            return None;
        }
        let name = match spelling {
            Spelling::Underscored => name.to_owned(),
            Spelling::Dotted => dotted(name, part),
        };
        Some(Self { part, name, spelling, half })
    }
}

/// A key without the name that PEFT has for a LoRA in memory. Its own files leave that out, those of some trainers do not.
fn without_adapter_name(key: &str) -> Cow<'_, str> {
    let named = key.strip_suffix(".weight").and_then(|stem| stem.rsplit_once('.'));
    match named.filter(|(stem, _)| PEFT_HALVES.iter().any(|half| stem.ends_with(half))) {
        Some((stem, _)) => format!("{stem}.weight").into(),
        None => key.into(),
    }
}

/// A module's name without what older diffusers put into it.
fn dotted(name: &str, part: Part) -> String {
    let name = name.replace(".processor.", ".");
    let Some((module, projection)) = name.rsplit_once('.') else { return name };
    match (part, projection) {
        // The output projection is the first item of a list; the processors did not say so.
        (Part::Unet, "to_out") => format!("{name}.0"),
        (Part::TextEncoder | Part::TextEncoder2, _) => match TEXT_PROJECTIONS.iter().find(|(old, _)| *old == projection) {
            Some((_, new)) => format!("{module}.{new}"),
            None => name,
        },
        _ => name,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(key: &str) -> (Part, String, Half) {
        let Key { part, name, half, .. } = Key::parse(key).unwrap();
        (part, name, half)
    }

    #[test]
    fn every_layout_names_the_same_module() {
        let module = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0";
        for (key, half) in [
            (format!("unet.{module}.lora_A.weight"), Half::Down),
            (format!("unet.{module}.lora.up.weight"), Half::Up),
            (format!("{module}.lora_linear_layer.down.weight"), Half::Down),
            (format!("base_model.model.{module}.lora_B.weight"), Half::Up),
            ("unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora.up.weight".into(), Half::Up),
            (format!("unet.{module}.alpha"), Half::Alpha),
            (format!("base_model.model.{module}.lora_A.default.weight"), Half::Down),
            (format!("unet.{module}.lora_B.default_0.weight"), Half::Up),
        ] {
            assert_eq!(parsed(&key), (Part::Unet, module.into(), half), "{key}");
        }
        let attention = "text_model.encoder.layers.0.self_attn";
        for (old, new) in TEXT_PROJECTIONS {
            for key in [format!("text_encoder.{attention}.{old}_lora.down.weight"), format!("text_encoder.{attention}.{new}.lora_A.weight")]
            {
                assert_eq!(parsed(&key), (Part::TextEncoder, format!("{attention}.{new}"), Half::Down), "{key}");
            }
        }
        assert_eq!(parsed("lora_te2_text_model_encoder_layers_0_mlp_fc1.alpha").0, Part::TextEncoder2);
        assert_eq!(parsed("lora_unet_input_blocks_4_1_proj_in.lora_up.weight"), (Part::Unet, "input_blocks_4_1_proj_in".into(), Half::Up));
    }

    #[test]
    fn other_methods_are_unknown() {
        for key in [
            "lora_unet_conv_in.hada_w1_a",
            "unet.conv_in.lora_magnitude_vector",
            "lora_unet_out_2.diff",
            ".alpha",
            "a.lora_mid.weight",
            "a.lora_A.b.c.weight",
        ] {
            assert_eq!(Key::parse(key), None, "{key}");
        }
    }
}
