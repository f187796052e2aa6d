//! SDXL's two English text encoders.

use std::path::Path;

use tch::{Device, Kind, Tensor};

use super::clip::ClipTextEncoder;
use super::tokenizer::{Overlooked, TextTokenizer};
use crate::{Error, Result};

/// What SDXL's UNet is told about prompts.
#[derive(Debug)]
pub struct TextStates {
    /// Token states of both encoders side by side, `[B, L, width_1 + width_2]`, `f32`.
    pub sequence: Tensor,
    /// The second encoder's projected embedding of the whole text, `[B, projection]`, `f32`.
    pub pooled: Tensor,
}

/// SDXL's text encoders with their tokenizers.
pub struct SdxlTextEncoders {
    tokenizer: TextTokenizer,
    encoder: ClipTextEncoder,
    tokenizer_2: TextTokenizer,
    encoder_2: ClipTextEncoder,
}

impl SdxlTextEncoders {
    /// Loads `text_encoder`, `text_encoder_2`, `tokenizer` and `tokenizer_2` of a model folder.
    ///
    /// Errors: [`Error::Invalid`] if the two tokenizers disagree on the length of a text, and what loading the parts may give.
    pub fn load(model_dir: &Path, kind: Kind, device: Device) -> Result<Self> {
        let load = |encoder: &str, tokenizer: &str| {
            let encoder = ClipTextEncoder::load(&model_dir.join(encoder), kind, device)?;
            let longest = usize::try_from(encoder.max_length()).unwrap_or(0);
            Ok::<_, Error>((TextTokenizer::clip(&model_dir.join(tokenizer), longest)?, encoder))
        };
        Self::new(model_dir, load("text_encoder", "tokenizer")?, load("text_encoder_2", "tokenizer_2")?)
    }

    /// Joins the loaded encoders of the model at `path`, each with its tokenizer.
    ///
    /// Errors: [`Error::Invalid`] if the two tokenizers disagree on the length of a text.
    pub fn new(
        path: &Path,
        (tokenizer, encoder): (TextTokenizer, ClipTextEncoder),
        (tokenizer_2, encoder_2): (TextTokenizer, ClipTextEncoder),
    ) -> Result<Self> {
        let (length, length_2) = (tokenizer.length(), tokenizer_2.length());
        if length != length_2 {
            let reason = format!("tokenizer gives {length} tokens and tokenizer_2 {length_2}: their states cannot be put side by side");
            return Err(Error::Invalid { path: path.into(), reason });
        }
        Ok(Self { tokenizer, encoder, tokenizer_2, encoder_2 })
    }

    /// Encodes prompts: the states entering each encoder's last layer, and the second one's pooled embedding.
    ///
    /// Errors: [`Error::Shape`] if there is no prompt.
    pub fn encode<S: AsRef<str>>(&self, prompts: &[S]) -> Result<TextStates> {
        let first = self.encoder.penultimate(&self.tokenizer.encode(prompts)?)?;
        let second = self.encoder_2.forward(&self.tokenizer_2.encode(prompts)?)?;
        let sequence = Tensor::f_cat(&[first, second.penultimate], -1)?.f_to_kind(Kind::Float)?;
        Ok(TextStates { sequence, pooled: second.pooled.f_to_kind(Kind::Float)? })
    }

    /// Says what of a prompt neither encoder sees.
    ///
    /// Errors: [`Error::Invalid`] if a tokenizer fails.
    pub fn overlooked(&self, prompt: &str) -> Result<Overlooked> {
        Overlooked::of_all([&self.tokenizer, &self.tokenizer_2].map(|tokenizer| tokenizer.overlooked(prompt)))
    }

    /// Returns the number of tokens every prompt has.
    pub fn context_length(&self) -> i64 {
        self.tokenizer.length() as i64
    }

    /// Returns the width of the token states, both encoders together.
    pub fn width(&self) -> i64 {
        self.encoder.width() + self.encoder_2.width()
    }

    /// Returns the width of the pooled embedding.
    pub fn pooled_width(&self) -> i64 {
        self.encoder_2.pooled_width()
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    fn demo() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/demo/model")
    }

    #[test]
    fn half_precision_encoders_return_single_precision_states() {
        let exact = SdxlTextEncoders::load(&demo(), Kind::Float, Device::Cpu).unwrap();
        let half = SdxlTextEncoders::load(&demo(), Kind::BFloat16, Device::Cpu).unwrap();
        assert_eq!((exact.context_length(), exact.width()), (24, 80));
        let (exact, half) = (exact.encode(&["a blue star"]).unwrap(), half.encode(&["a blue star"]).unwrap());
        for (exact, half) in [(exact.sequence, half.sequence), (exact.pooled, half.pooled)] {
            assert_eq!(half.kind(), Kind::Float);
            // bf16 keeps eight bits; three layers add up to a few times that.
            let distance = ((&half - &exact).norm() / exact.norm()).double_value(&[]);
            assert!(distance > 0.0 && distance < 0.05, "{distance}");
        }
    }

    #[test]
    fn tokenizers_of_different_lengths_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        for folder in ["text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"] {
            std::fs::create_dir(dir.path().join(folder)).unwrap();
            for entry in std::fs::read_dir(demo().join(folder)).unwrap() {
                let path = entry.unwrap().path();
                std::fs::copy(&path, dir.path().join(folder).join(path.file_name().unwrap())).unwrap();
            }
        }
        let config = r#"{"model_max_length": 16, "pad_token": "!"}"#;
        std::fs::write(dir.path().join("tokenizer_2/tokenizer_config.json"), config).unwrap();
        let error = SdxlTextEncoders::load(dir.path(), Kind::Float, Device::Cpu).err().unwrap();
        assert!(error.to_string().contains("24 tokens and tokenizer_2 16"), "{error}");
    }
}
