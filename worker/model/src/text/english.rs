//! The English side of a model, whichever it is.

use tch::{Kind, Tensor};

use super::clip::ClipTextEncoder;
use super::sdxl::{SdxlTextEncoders, TextStates};
use super::tokenizer::{Overlooked, TextTokenizer};
use crate::Result;

/// What a UNet is told about each prompt, by either road.
#[derive(Debug)]
pub struct Conditioning {
    /// Token states, `[B, L, D]`.
    pub sequence: Tensor,
    /// Embedding of the whole text, `[B, P]`; `None` for models without one (SD1.5).
    pub pooled: Option<Tensor>,
    /// The token states that cross-attention sees, bool `[B, L]`; `None`: all of them.
    pub mask: Option<Tensor>,
}

/// SD1.5's text encoder with its tokenizer: CLIP-L, whose last states go through the final norm.
pub struct Sd15TextEncoder {
    tokenizer: TextTokenizer,
    encoder: ClipTextEncoder,
}

impl Sd15TextEncoder {
    /// Joins the two.
    pub fn new(tokenizer: TextTokenizer, encoder: ClipTextEncoder) -> Self {
        Self { tokenizer, encoder }
    }

    /// Encodes prompts. Shapes: `[B, L, width]`, `f32`.
    ///
    /// Errors: [`crate::Error::Shape`] if there is no prompt.
    pub fn encode<S: AsRef<str>>(&self, prompts: &[S]) -> Result<Tensor> {
        Ok(self.encoder.forward(&self.tokenizer.encode(prompts)?)?.last.f_to_kind(Kind::Float)?)
    }
}

/// The English text encoders of an SDXL or an SD1.5.
pub enum EnglishEncoders {
    /// Two encoders, and pooled text.
    Sdxl(Box<SdxlTextEncoders>),
    /// One.
    Sd15(Box<Sd15TextEncoder>),
}

impl EnglishEncoders {
    /// Encodes prompts, without gradient. Nothing is hidden from cross-attention: the models were trained so.
    ///
    /// Errors: [`crate::Error::Shape`] if there is no prompt.
    pub fn encode<S: AsRef<str>>(&self, prompts: &[S]) -> Result<Conditioning> {
        Ok(match self {
            Self::Sdxl(encoders) => {
                let TextStates { sequence, pooled } = encoders.encode(prompts)?;
                Conditioning { sequence, pooled: Some(pooled), mask: None }
            }
            Self::Sd15(encoder) => Conditioning { sequence: encoder.encode(prompts)?, pooled: None, mask: None },
        })
    }

    /// Says what of a prompt no encoder sees.
    ///
    /// Errors: [`crate::Error::Invalid`] if a tokenizer fails.
    pub fn overlooked(&self, prompt: &str) -> Result<Overlooked> {
        match self {
            Self::Sdxl(encoders) => encoders.overlooked(prompt),
            Self::Sd15(encoder) => encoder.tokenizer.overlooked(prompt),
        }
    }

    /// Returns the width of the token states.
    pub fn width(&self) -> i64 {
        match self {
            Self::Sdxl(encoders) => encoders.width(),
            Self::Sd15(encoder) => encoder.encoder.width(),
        }
    }

    /// Returns the width of the pooled text; `None` for models without one.
    pub fn pooled_width(&self) -> Option<i64> {
        match self {
            Self::Sdxl(encoders) => Some(encoders.pooled_width()),
            Self::Sd15(_) => None,
        }
    }

    /// Returns the number of tokens every prompt has.
    pub fn context_length(&self) -> i64 {
        match self {
            Self::Sdxl(encoders) => encoders.context_length(),
            Self::Sd15(encoder) => encoder.tokenizer.length() as i64,
        }
    }
}
