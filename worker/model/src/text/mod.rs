//! Prompts to tensors: tokenizers, the English text encoders of SDXL and SD1.5 and the student's encoders of other languages.

mod alt_clip;
mod bert;
mod clean;
mod clip;
mod clip_score;
mod config;
mod dropout;
mod english;
mod sdxl;
mod source;
mod student;
mod t5;
mod tokenizer;
mod tower;

pub use bert::BertEncoder;
pub use clip::{ClipTextEncoder, ClipTextStates};
pub use clip_score::ClipScorer;
pub use english::{Conditioning, EnglishEncoders, Sd15TextEncoder};
pub use sdxl::{SdxlTextEncoders, TextStates};
pub(crate) use source::own_weights;
pub use student::{StudentEncoder, StudentOptions, StudentTokenizers};
pub use t5::T5Encoder;
pub use tokenizer::{Overlooked, TextTokenizer, TokenizerKind};
pub(crate) use tokenizer::{fuzz_sentencepiece, sketch as sketch_tokenizer};
