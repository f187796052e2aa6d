//! The frozen encoder of the student's language, whichever kind it is.

use std::path::Path;

use serde::Deserialize;
use tch::{Device, Kind, Tensor};

use super::bert::BertEncoder;
use super::tokenizer::TextTokenizer;
use crate::config::read_config;
use crate::{Error, Result};

/// How a student encoder is loaded.
#[derive(Debug, Clone, Copy)]
pub struct StudentOptions {
    /// Replaces the curly quotes, which are absent from the Chinese vocabulary and would become unknown tokens, by the straight one.
    pub normalize_quotes: bool,
    /// Where it runs.
    pub device: Device,
    /// The kind it computes in.
    pub kind: Kind,
}

/// A tokenizer and an encoder that turn prompts of the student's language into token states for the adapter.
pub struct StudentEncoder {
    tokenizer: TextTokenizer,
    model: Model,
    normalize_quotes: bool,
}

/// The architectures that can be loaded.
enum Model {
    Bert(BertEncoder),
}

impl StudentEncoder {
    /// Loads a folder with `config.json`, weights and tokenizer files; `model_type` of the configuration says which architecture it is.
    ///
    /// Every prompt is cut and padded to `context_length` tokens. The adapter sees the padding, so this must be the same in training
    /// and sampling.
    /// Errors: [`Error::Unsupported`] for another `model_type`, [`Error::Invalid`] if the encoder has fewer positions than
    /// `context_length`, and what loading the parts may give.
    pub fn load(dir: &Path, context_length: i64, options: StudentOptions) -> Result<Self> {
        #[derive(Deserialize)]
        struct Header {
            model_type: String,
        }
        let path = dir.join("config.json");
        let Header { model_type } = read_config(&path, &[])?;
        let model = match model_type.as_str() {
            "bert" => Model::Bert(BertEncoder::load(dir, options.kind, options.device)?),
            other => {
                return Err(Error::Unsupported {
                    what: format!("a student text encoder of model_type {other:?}"),
                    hint: "model_type \"bert\" (Chinese-CLIP's text half in transformers' BertModel layout) can be loaded".into(),
                });
            }
        };
        let longest = match &model {
            Model::Bert(bert) => bert.max_length(),
        };
        if context_length > longest {
            let reason = format!("the encoder has {longest} positions, the context length is {context_length}");
            return Err(Error::Invalid { path, reason });
        }
        let tokenizer = TextTokenizer::bert(dir, usize::try_from(context_length).unwrap_or(0))?;
        Ok(Self { tokenizer, model, normalize_quotes: options.normalize_quotes })
    }

    /// Encodes prompts. Shapes: `f32` `[B, context_length, width]`, without gradient.
    ///
    /// Errors: [`Error::Shape`] if there is no prompt.
    pub fn encode<S: AsRef<str>>(&self, prompts: &[S]) -> Result<Tensor> {
        let ids = self.token_ids(prompts)?;
        let states = match &self.model {
            Model::Bert(bert) => bert.forward(&ids, self.tokenizer.pad_id())?,
        };
        Ok(states.f_to_kind(Kind::Float)?)
    }

    /// Returns the token ids prompts are encoded from, each row of the context length.
    pub fn token_ids<S: AsRef<str>>(&self, prompts: &[S]) -> Result<Vec<Vec<i64>>> {
        if !self.normalize_quotes {
            return self.tokenizer.encode(prompts);
        }
        let straight: Vec<String> = prompts.iter().map(|prompt| prompt.as_ref().replace(['“', '”'], "\"")).collect();
        self.tokenizer.encode(&straight)
    }

    /// Returns the width of the token states.
    pub fn width(&self) -> i64 {
        match &self.model {
            Model::Bert(bert) => bert.width(),
        }
    }

    /// Returns the number of tokens every prompt has.
    pub fn context_length(&self) -> i64 {
        self.tokenizer.length() as i64
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    const OPTIONS: StudentOptions = StudentOptions { normalize_quotes: true, device: Device::Cpu, kind: Kind::Float };

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
            encoder.token_ids(&["“红”"]).unwrap().remove(0)
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
        std::fs::write(dir.path().join("config.json"), r#"{"model_type": "mt5"}"#).unwrap();
        let error = StudentEncoder::load(dir.path(), 24, OPTIONS).err().unwrap();
        assert!(matches!(error, Error::Unsupported { .. }) && error.to_string().contains("mt5"), "{error}");
    }
}
