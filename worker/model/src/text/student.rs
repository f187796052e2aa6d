//! The frozen encoder of the student's language, whichever kind it is.

use std::path::Path;

use tch::{Device, Kind, Tensor};

use super::alt_clip::AltClipEncoder;
use super::bert::BertEncoder;
use super::clean::Cleaning;
use super::clip::ClipTextEncoder;
use super::config::Architecture;
use super::source::Source;
use super::t5::T5Encoder;
use super::tokenizer::{TextTokenizer, TokenizerKind};
use crate::{Error, Result};

/// The folders of a pair of encoders whose states are put side by side, in that order.
const PAIR: [&str; 2] = ["xlm_roberta", "chinese_clip"];

/// How a student encoder is loaded.
#[derive(Debug, Clone, Copy)]
pub struct StudentOptions {
    /// Replaces the curly double quotes by the straight one for BERT vocabularies: they are absent from the Chinese one and would become
    /// unknown tokens. Other vocabularies have them.
    pub normalize_quotes: bool,
    /// Where it runs.
    pub device: Device,
    /// The kind it computes in.
    pub kind: Kind,
}

impl StudentOptions {
    /// The usual options: quotes normalised.
    pub const fn new(kind: Kind, device: Device) -> Self {
        Self { normalize_quotes: true, device, kind }
    }
}

/// Tokenizers and encoders that turn prompts of the student's language into token states for the adapter.
///
/// A folder is loaded by what lies in it:
///
/// | in the folder | encoder | states |
/// |---|---|---|
/// | `config.json` of model_type `bert`, `roberta`, `xlm-roberta` | BERT and its descendants | after the last layer |
/// | `config.json` of model_type `chinese_clip` | Chinese-CLIP's text half | after the last layer, not projected |
/// | `clip_cn_*.pt` and `vocab.txt` | the same, in its authors' layout | the same |
/// | `open_clip_config.json` | an open_clip model whose text half is XLM-R, RoBERTa or mT5 | after the last layer, all tokens |
/// | `config.json` of model_type `altclip` | AltCLIP's XLM-R | each token projected, without `pre_LN` |
/// | `config.json` of model_type `mt5` | mT5's encoder | after the final norm |
/// | `config.json` of model_type `clip`, `clip_text_model` | CLIP's text half | after the final norm |
/// | folders `xlm_roberta` and `chinese_clip`, each one of the above | both | side by side, XLM-R's first |
///
/// A model of texts and images with another model_type is loaded by that of its `text_config`. Dropout is always off; the published trainer
/// left it on in frozen encoders, which is not reproduced.
pub struct StudentEncoder {
    /// One, or two whose states are put side by side.
    parts: Vec<Part>,
    context_length: i64,
}

/// One encoder with its tokenizer.
struct Part {
    cleaning: Cleaning,
    tokenizer: TextTokenizer,
    model: Model,
}

/// The architectures that can be loaded.
enum Model {
    Bert(BertEncoder),
    AltClip(AltClipEncoder),
    Clip(Box<ClipTextEncoder>),
    T5(T5Encoder),
}

impl StudentEncoder {
    /// Loads a folder as the table above says.
    ///
    /// Every prompt is cut and padded to `context_length` tokens. The adapter sees the padding, so this must be the same in training
    /// and sampling.
    /// Errors: [`Error::Unsupported`] for another `model_type`, [`Error::Invalid`] if the encoder has fewer positions than
    /// `context_length`, and what loading the parts may give.
    pub fn load(dir: &Path, context_length: i64, options: StudentOptions) -> Result<Self> {
        let pair = PAIR.map(|name| dir.join(name));
        let parts = if pair.iter().all(|part| part.is_dir()) {
            pair.iter().map(|part| Part::load(part, context_length, options)).collect::<Result<_>>()?
        } else {
            vec![Part::load(dir, context_length, options)?]
        };
        Ok(Self { parts, context_length })
    }

    /// Encodes prompts. Shapes: `f32` `[B, context_length, width]`, without gradient.
    ///
    /// Errors: [`Error::Shape`] if there is no prompt.
    pub fn encode<S: AsRef<str>>(&self, prompts: &[S]) -> Result<Tensor> {
        let states: Vec<Tensor> = self.parts.iter().map(|part| part.encode(prompts)).collect::<Result<_>>()?;
        Ok(Tensor::f_cat(&states, -1)?)
    }

    /// Returns the token ids prompts are encoded from: for each encoder (one, or two) a row of the context length for each prompt.
    pub fn token_ids<S: AsRef<str>>(&self, prompts: &[S]) -> Result<Vec<Vec<Vec<i64>>>> {
        self.parts.iter().map(|part| part.token_ids(prompts)).collect()
    }

    /// Returns the width of the token states.
    pub fn width(&self) -> i64 {
        self.parts.iter().map(|part| part.model.width()).sum()
    }

    /// Returns the number of tokens every prompt has.
    pub fn context_length(&self) -> i64 {
        self.context_length
    }
}

impl Part {
    fn load(dir: &Path, context_length: i64, options: StudentOptions) -> Result<Self> {
        let StudentOptions { normalize_quotes, device, kind } = options;
        let Source { settings, weights, cleaning } = Source::open(dir)?;
        let (model, tokenizer) = match settings.architecture() {
            Architecture::Bert => (Model::Bert(BertEncoder::from_weights(&settings, &weights, kind, device)?), TokenizerKind::Bert),
            Architecture::Roberta => (Model::Bert(BertEncoder::from_weights(&settings, &weights, kind, device)?), TokenizerKind::Roberta),
            Architecture::XlmRoberta => {
                (Model::Bert(BertEncoder::from_weights(&settings, &weights, kind, device)?), TokenizerKind::XlmRoberta)
            }
            Architecture::AltClip => {
                (Model::AltClip(AltClipEncoder::from_weights(&settings, &weights, kind, device)?), TokenizerKind::XlmRoberta)
            }
            Architecture::Clip => {
                (Model::Clip(Box::new(ClipTextEncoder::from_weights(&settings, &weights, kind, device)?)), TokenizerKind::Clip)
            }
            Architecture::T5 => (Model::T5(T5Encoder::from_weights(&settings, &weights, kind, device)?), TokenizerKind::T5),
        };
        let invalid = |reason: String| Error::Invalid { path: settings.path().into(), reason };
        let longest = model.max_length();
        if context_length > longest {
            return Err(invalid(format!("the encoder has {longest} positions, the context length is {context_length}")));
        }
        let tokenizer = TextTokenizer::open(dir, tokenizer, usize::try_from(context_length).unwrap_or(0))?;
        if tokenizer.length() as i64 != context_length {
            let reason = format!("the tokenizer cuts texts to {} tokens, the context length is {context_length}", tokenizer.length());
            return Err(invalid(reason));
        }
        let straighten = normalize_quotes && settings.architecture() == Architecture::Bert;
        let cleaning = if straighten { Cleaning::StraightQuotes } else { cleaning };
        Ok(Self { cleaning, tokenizer, model })
    }

    fn encode<S: AsRef<str>>(&self, prompts: &[S]) -> Result<Tensor> {
        let (ids, pad_id) = (self.token_ids(prompts)?, self.tokenizer.pad_id());
        let states = match &self.model {
            Model::Bert(bert) => bert.forward(&ids, pad_id)?,
            Model::AltClip(alt_clip) => alt_clip.forward(&ids, pad_id)?,
            Model::Clip(clip) => clip.forward(&ids)?.last,
            Model::T5(t5) => t5.forward(&ids, pad_id)?,
        };
        Ok(states.f_to_kind(Kind::Float)?)
    }

    fn token_ids<S: AsRef<str>>(&self, prompts: &[S]) -> Result<Vec<Vec<i64>>> {
        let texts: Vec<_> = prompts.iter().map(|prompt| self.cleaning.apply(prompt.as_ref())).collect();
        self.tokenizer.encode(&texts)
    }
}

impl Model {
    fn width(&self) -> i64 {
        match self {
            Self::Bert(bert) => bert.width(),
            Self::AltClip(alt_clip) => alt_clip.width(),
            Self::Clip(clip) => clip.width(),
            Self::T5(t5) => t5.width(),
        }
    }

    fn max_length(&self) -> i64 {
        match self {
            Self::Bert(bert) => bert.max_length(),
            Self::AltClip(alt_clip) => alt_clip.max_length(),
            Self::Clip(clip) => clip.max_length(),
            Self::T5(t5) => t5.max_length(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    const OPTIONS: StudentOptions = StudentOptions::new(Kind::Float, Device::Cpu);

    fn demo() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/demo/model/text_encoder_zh")
    }

    #[test]
    fn prompts_become_states_of_the_context_length() {
        let encoder = StudentEncoder::load(&demo(), 24, OPTIONS).unwrap();
        assert_eq!((encoder.context_length(), encoder.width()), (24, 64));
        let states = encoder.encode(&["红色的圆形", ""]).unwrap();
        assert_eq!((states.size(), states.kind(), states.requires_grad()), (vec![2, 24, 64], Kind::Float, false));
        let none: [&str; 0] = [];
        assert!(matches!(encoder.encode(&none), Err(Error::Shape { .. })));
    }

    /// The batch a prompt is in must not matter: the conditional drop encodes "" apart from the prompts.
    #[test]
    fn a_prompt_does_not_see_its_neighbours() {
        let encoder = StudentEncoder::load(&demo(), 24, OPTIONS).unwrap();
        let together = encoder.encode(&["红色的圆形", ""]).unwrap();
        let alone = encoder.encode(&[""]).unwrap();
        assert!((together.get(1) - alone.get(0)).abs().max().double_value(&[]) < 1e-5);
    }

    #[test]
    fn curly_quotes_are_straightened_on_request() {
        let dir = tempfile::tempdir().unwrap();
        for file in ["config.json", "model.safetensors"] {
            std::fs::copy(demo().join(file), dir.path().join(file)).unwrap();
        }
        std::fs::write(dir.path().join("vocab.txt"), "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n\"\n红\n").unwrap();
        let ids = |normalize_quotes| {
            let encoder = StudentEncoder::load(dir.path(), 6, StudentOptions { normalize_quotes, ..OPTIONS }).unwrap();
            encoder.token_ids(&["“红”"]).unwrap().remove(0).remove(0)
        };
        assert_eq!(ids(true), [2, 5, 6, 5, 3, 0]);
        assert_eq!(ids(false), [2, 1, 6, 1, 3, 0]);
    }

    #[test]
    fn other_architectures_and_overlong_contexts_are_refused() {
        let error = StudentEncoder::load(&demo(), 65, OPTIONS).err().unwrap();
        assert!(error.to_string().contains("64 positions"), "{error}");
        assert!(StudentEncoder::load(&demo(), -1, OPTIONS).is_err());
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("config.json"), r#"{"model_type": "gpt2"}"#).unwrap();
        let error = StudentEncoder::load(dir.path(), 24, OPTIONS).err().unwrap();
        assert!(matches!(error, Error::Unsupported { .. }) && error.to_string().contains("gpt2"), "{error}");
    }
}
