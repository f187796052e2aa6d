//! Prompts to what the UNet is conditioned on, by either road.

use crate::Result;
use crate::adapter::Adapter;
use crate::text::{Conditioning, EnglishEncoders, StudentEncoder};

/// The road from a prompt to the UNet.
#[derive(Clone, Copy)]
pub enum Prompter<'a> {
    /// The model's own English encoders: the teacher's road.
    English(&'a EnglishEncoders),
    /// Another language's encoder and the adapter. The empty prompt takes the same road.
    Student {
        /// The frozen encoder.
        encoder: &'a StudentEncoder,
        /// The adapter trained for it.
        adapter: &'a Adapter,
        /// Whether it was trained with padding left out of the pooled mean and hidden from cross-attention.
        mask_pads: bool,
    },
}

impl Prompter<'_> {
    /// Encodes prompts, without gradient.
    ///
    /// Errors: [`crate::Error::Shape`] if there is no prompt, or if the adapter does not fit the encoder.
    pub fn encode<S: AsRef<str>>(&self, prompts: &[S]) -> Result<Conditioning> {
        match self {
            Self::English(encoders) => encoders.encode(prompts),
            Self::Student { encoder, adapter, mask_pads } => {
                let (has, wants) = (encoder.width(), adapter.config().input);
                if has != wants {
                    let detail = format!("the text encoder's states are {has} wide, the adapter was made for {wants}");
                    return Err(crate::Error::Shape { what: "student conditioning", detail });
                }
                let _guard = tch::no_grad_guard();
                let mask = mask_pads.then(|| encoder.token_mask(prompts)).transpose()?;
                let output = adapter.forward_masked(&encoder.encode(prompts)?, mask.as_ref());
                Ok(Conditioning { sequence: output.sequence, pooled: output.pooled, mask })
            }
        }
    }
}
