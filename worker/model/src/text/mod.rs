//! Prompts to tensors: tokenizers, the English text encoders of SDXL and the student's encoder of another language.

mod bert;
mod clip;
mod config;
mod sdxl;
mod student;
mod tokenizer;

pub use bert::BertEncoder;
pub use clip::{ClipTextEncoder, ClipTextStates};
pub use sdxl::{SdxlTextEncoders, TextStates};
pub use student::{StudentEncoder, StudentOptions};
pub use tokenizer::TextTokenizer;
