//! The frozen encoder of the student's language, whichever kind it is.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};
use tch::{Device, Kind, Tensor};

use super::alt_clip::AltClipEncoder;
use super::bert::BertEncoder;
use super::clean::Cleaning;
use super::clip::ClipTextEncoder;
use super::config::{Architecture, TextSettings};
use super::dropout::Dropout;
use super::source::{CHINESE_CLIP_LAYERS, CONFIGURATIONS, Source, chinese_clip_sizes};
use super::t5::T5Encoder;
use super::tokenizer::{Overlooked, TextTokenizer, TokenizerKind, sketch as sketch_tokenizer, sketch_files};
use crate::hub::locate;
use crate::weights::{Frozen, Survey, Weights};
use crate::{Error, Result};

/// The folders of a pair of encoders whose states are put side by side, in that order.
const PAIR: [&str; 2] = ["xlm_roberta", "chinese_clip"];

/// How a student encoder is loaded.
#[derive(Debug, Clone, Copy)]
pub struct StudentOptions {
    /// Replaces the curly double quotes by the straight one for BERT vocabularies: they are absent from the Chinese one and would become
    /// unknown tokens. Other vocabularies have them.
    pub normalize_quotes: bool,
    /// Multiplies Chinese-CLIP's token states by its `text_projection`, which is otherwise applied to the state of the whole text alone.
    pub project: bool,
    /// Makes [`StudentEncoder::encode_training`] drop elements at the rates of the encoder's configuration.
    pub dropout: bool,
    /// Where it runs.
    pub device: Device,
    /// The kind it computes in.
    pub kind: Kind,
}

impl StudentOptions {
    /// The usual options: quotes normalised, states not projected, nothing dropped.
    pub const fn new(kind: Kind, device: Device) -> Self {
        Self { normalize_quotes: true, project: false, dropout: false, device, kind }
    }
}

/// Tokenizers and encoders that turn prompts of the student's language into token states for the adapter.
///
/// A folder is loaded by what lies in it:
///
/// | in the folder | encoder | states |
/// |---|---|---|
/// | `config.json` of model_type `bert`, `roberta`, `xlm-roberta` | BERT and its descendants | after the last layer |
/// | `config.json` of model_type `chinese_clip` | Chinese-CLIP's text half | after the last layer, projected on request |
/// | `clip_cn_*.pt` and `vocab.txt` | the same, in its authors' layout | the same |
/// | `open_clip_config.json` | an open_clip model whose text half is XLM-R, RoBERTa or mT5 | after the last layer, all tokens |
/// | `config.json` of model_type `altclip` | AltCLIP's XLM-R | each token projected, without `pre_LN` |
/// | `config.json` of model_type `mt5` | mT5's encoder | after the final norm |
/// | `config.json` of model_type `clip`, `clip_text_model` | CLIP's text half | after the final norm |
/// | folders `xlm_roberta` and `chinese_clip`, each one of the above | both | side by side, XLM-R's first |
///
/// A model of texts and images with another model_type is loaded by that of its `text_config`.
///
/// The published trainer left the dropout of its frozen encoders on: on request, [`StudentEncoder::encode_training`] does so too.
/// [`StudentEncoder::encode`] never drops anything.
pub struct StudentEncoder {
    /// One, or two whose states are put side by side.
    parts: Vec<Part>,
    context_length: i64,
    dropout: bool,
    device: Device,
}

/// One encoder with its tokenizer.
struct Part {
    cleaning: Cleaning,
    tokenizer: TextTokenizer,
    model: Model,
    /// What kind of encoder it is.
    name: &'static str,
    survey: Survey,
    /// What token states are multiplied by, `[model's width, width]`.
    projection: Option<Frozen>,
}

/// The architectures that can be loaded.
enum Model {
    Bert(BertEncoder),
    AltClip(AltClipEncoder),
    Clip(Box<ClipTextEncoder>),
    T5(T5Encoder),
}

impl StudentEncoder {
    /// Loads a folder as the table above says; `dir` may also be the name of a model on the hub (see [`locate`]).
    ///
    /// Every prompt is cut and padded to `context_length` tokens. The adapter sees the padding, so this must be the same in training
    /// and sampling.
    /// Errors: [`Error::Unsupported`] for another `model_type`, or for a projection of states that no Chinese-CLIP made; [`Error::Invalid`]
    /// if the encoder has fewer positions than `context_length`; and what loading the parts may give.
    pub fn load(dir: &Path, context_length: i64, options: StudentOptions) -> Result<Self> {
        Self::open(dir, context_length, options, false)
    }

    /// Compares the files of an encoder in all that [`StudentEncoder::load`] checks, without reading a tensor: the result's weights are
    /// zeros without memory; see [`Weights::shapes_only`](crate::weights::Weights::shapes_only).
    ///
    /// Errors: those of [`StudentEncoder::load`].
    pub fn check(dir: &Path, context_length: i64, options: StudentOptions) -> Result<Self> {
        Self::open(dir, context_length, options, true)
    }

    /// The encoder that the method was published with, Chinese-CLIP ViT-H/14's, with weights drawn on the device: what it costs, without
    /// any file. Its ids are not those of the real vocabulary; see [`TextTokenizer::chinese_characters`].
    ///
    /// Errors: [`Error::Invalid`] if the encoder has fewer positions than `context_length`.
    pub fn random(context_length: i64, options: StudentOptions) -> Result<Self> {
        let part = Part::random(chinese_clip_sizes(CHINESE_CLIP_LAYERS), context_length, options, false)?;
        Ok(Self { parts: vec![part], context_length, dropout: options.dropout, device: options.device })
    }

    /// Hands over what tells a folder's encoders from others, always in the same order: configurations, tokenizers, and samples of the
    /// weights (see [`Weights::sketch`]). It does not depend on where the folder lies.
    ///
    /// Errors: [`Error::Io`] and [`Error::Invalid`] for files that cannot be read, [`Error::Unsupported`] for models that cannot be loaded.
    pub fn sketch(dir: &Path, take: &mut dyn FnMut(&[u8])) -> Result<()> {
        for dir in folders(dir)? {
            sketch_files(&dir, &CONFIGURATIONS, take)?;
            sketch_tokenizer(&dir, take)?;
            Source::open(&dir)?.weights.sketch(take);
        }
        Ok(())
    }

    fn open(dir: &Path, context_length: i64, options: StudentOptions, shapes_only: bool) -> Result<Self> {
        let load = |dir: &PathBuf| Part::load(dir, context_length, options, shapes_only);
        let parts = folders(dir)?.iter().map(load).collect::<Result<_>>()?;
        Ok(Self { parts, context_length, dropout: options.dropout, device: options.device })
    }

    /// Encodes prompts. Shapes: `f32` `[B, context_length, width]`, without gradient.
    ///
    /// Errors: [`Error::Shape`] if there is no prompt.
    pub fn encode<S: AsRef<str>>(&self, prompts: &[S]) -> Result<Tensor> {
        self.run(prompts, &Dropout::off())
    }

    /// Encodes prompts as training does: with [`StudentOptions::dropout`] elements are dropped on the way, else it is
    /// [`StudentEncoder::encode`].
    ///
    /// What is dropped from a prompt's states depends on its seed alone, not on the other prompts nor on their number. CLIP has no dropout.
    /// Shapes: as [`StudentEncoder::encode`]. Errors: [`Error::Shape`] if there is no prompt, or not one seed for each.
    pub fn encode_training<S: AsRef<str>>(&self, prompts: &[S], seeds: &[u64]) -> Result<Tensor> {
        if prompts.len() != seeds.len() {
            let detail = format!("{} prompts and {} seeds", prompts.len(), seeds.len());
            return Err(Error::Shape { what: "StudentEncoder::encode_training", detail });
        }
        self.run(prompts, &if self.dropout { Dropout::by_row(seeds, self.device)? } else { Dropout::off() })
    }

    /// Returns which positions hold tokens of the prompt, start and end included, and not padding: those that the encoder itself attends
    /// to; for CLIP, which attends to all, those up to the first end of text. Of a pair, those where either encoder has a token.
    ///
    /// Shapes: bool `[B, context_length]`, on the encoder's device. Errors: [`Error::Shape`] if there is no prompt.
    pub fn token_mask<S: AsRef<str>>(&self, prompts: &[S]) -> Result<Tensor> {
        let masks: Vec<Tensor> = self.parts.iter().map(|part| part.token_mask(prompts)).collect::<Result<_>>()?;
        Ok(Tensor::f_stack(&masks, 0)?.f_any_dim(0, false)?)
    }

    fn run<S: AsRef<str>>(&self, prompts: &[S], dropout: &Dropout) -> Result<Tensor> {
        let states: Vec<Tensor> = self.parts.iter().map(|part| part.encode(prompts, dropout)).collect::<Result<_>>()?;
        Ok(Tensor::f_cat(&states, -1)?)
    }

    /// Returns the token ids prompts are encoded from: for each encoder (one, or two) a row of the context length for each prompt.
    pub fn token_ids<S: AsRef<str>>(&self, prompts: &[S]) -> Result<Vec<Vec<Vec<i64>>>> {
        self.parts.iter().map(|part| part.token_ids(prompts)).collect()
    }

    /// Says what of a prompt no encoder sees.
    ///
    /// Errors: [`Error::Invalid`] if a tokenizer fails.
    pub fn overlooked(&self, prompt: &str) -> Result<Overlooked> {
        Overlooked::of_all(self.parts.iter().map(|part| part.tokenizer.overlooked(&part.cleaning.apply(prompt))))
    }

    /// Keeps the tokenizers alone, which need no device.
    pub fn into_tokenizers(self) -> StudentTokenizers {
        StudentTokenizers(self.parts.into_iter().map(|part| (part.cleaning, part.tokenizer)).collect())
    }

    /// Returns the width of the token states.
    pub fn width(&self) -> i64 {
        self.parts.iter().map(Part::width).sum()
    }

    /// Returns the encoders it is made of: what each is called, and what it took of its weights.
    pub fn parts(&self) -> impl Iterator<Item = (&'static str, &Survey)> {
        self.parts.iter().map(|part| (part.name, &part.survey))
    }

    /// Returns whether [`StudentEncoder::encode_training`] drops elements.
    pub fn drops(&self) -> bool {
        self.dropout
    }

    /// Returns the number of tokens every prompt has.
    pub fn context_length(&self) -> i64 {
        self.context_length
    }
}

/// The tokenizers of a [`StudentEncoder`], which any number of threads may ask.
pub struct StudentTokenizers(Vec<(Cleaning, TextTokenizer)>);

impl StudentTokenizers {
    /// As [`StudentEncoder::overlooked`].
    ///
    /// Errors: [`Error::Invalid`] if a tokenizer fails.
    pub fn overlooked(&self, prompt: &str) -> Result<Overlooked> {
        Overlooked::of_all(self.0.iter().map(|(cleaning, tokenizer)| tokenizer.overlooked(&cleaning.apply(prompt))))
    }
}

/// The folders of the encoders that a path or a name on the hub stands for: one, or a pair.
fn folders(dir: &Path) -> Result<Vec<PathBuf>> {
    let dir = locate(dir)?;
    let pair = PAIR.map(|name| dir.join(name));
    Ok(if pair.iter().all(|part| part.is_dir()) { pair.into() } else { vec![dir] })
}

impl Part {
    fn load(dir: &Path, context_length: i64, options: StudentOptions, shapes_only: bool) -> Result<Self> {
        Self::build(Source::open(dir)?, context_length, options, shapes_only, |usual, length| TextTokenizer::open(dir, usual, length))
    }

    /// A BERT without a file, for Chinese.
    fn random(settings: Map<String, Value>, context_length: i64, options: StudentOptions, shapes_only: bool) -> Result<Self> {
        let tokenizer = |_, length| TextTokenizer::chinese_characters(length);
        Self::build(Source::random(settings), context_length, options, shapes_only, tokenizer)
    }

    /// Builds the encoder of a source, and lets `tokenizer` open the one of this usual kind and length.
    fn build(
        source: Source,
        context_length: i64,
        options: StudentOptions,
        shapes_only: bool,
        tokenizer: impl FnOnce(TokenizerKind, usize) -> Result<TextTokenizer>,
    ) -> Result<Self> {
        let StudentOptions { normalize_quotes, project, dropout: _, device, kind } = options;
        let Source { settings, weights, cleaning } = source;
        let weights = if shapes_only { weights.shapes_only() } else { weights };
        let (model, usual_tokenizer) = match settings.architecture() {
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
        let projection = if project { Some(Frozen::new(model.projection(&settings, &weights)?)) } else { None };
        let invalid = |reason: String| Error::Invalid { path: settings.path().into(), reason };
        let longest = model.max_length();
        if context_length > longest {
            return Err(invalid(format!("the encoder has {longest} positions, the context length is {context_length}")));
        }
        let tokenizer = tokenizer(usual_tokenizer, usize::try_from(context_length).unwrap_or(0))?;
        if tokenizer.length() as i64 != context_length {
            let reason = format!("the tokenizer cuts texts to {} tokens, the context length is {context_length}", tokenizer.length());
            return Err(invalid(reason));
        }
        let straighten = normalize_quotes && settings.architecture() == Architecture::Bert;
        let cleaning = if straighten { Cleaning::StraightQuotes } else { cleaning };
        Ok(Self { cleaning, tokenizer, model, projection, name: settings.architecture().name(), survey: weights.survey() })
    }

    fn encode<S: AsRef<str>>(&self, prompts: &[S], dropout: &Dropout) -> Result<Tensor> {
        let (ids, pad_id) = (self.token_ids(prompts)?, self.tokenizer.pad_id());
        let states = match &self.model {
            Model::Bert(bert) => bert.forward_dropping(&ids, pad_id, dropout)?,
            Model::AltClip(alt_clip) => alt_clip.forward(&ids, pad_id, dropout)?,
            Model::Clip(clip) => clip.forward(&ids)?.last,
            Model::T5(t5) => t5.forward_dropping(&ids, pad_id, dropout)?,
        };
        let states = self.projection.as_ref().map_or_else(|| states.shallow_clone(), |projection| states.matmul(projection));
        Ok(states.f_to_kind(Kind::Float)?)
    }

    fn token_mask<S: AsRef<str>>(&self, prompts: &[S]) -> Result<Tensor> {
        let (ids, pad_id) = (self.token_ids(prompts)?, self.tokenizer.pad_id());
        match &self.model {
            Model::Bert(bert) => bert.token_mask(&ids, pad_id),
            Model::AltClip(alt_clip) => alt_clip.token_mask(&ids, pad_id),
            Model::Clip(clip) => clip.token_mask(&ids, self.tokenizer.end_id()),
            Model::T5(t5) => t5.token_mask(&ids, pad_id),
        }
    }

    fn width(&self) -> i64 {
        self.projection.as_ref().map_or_else(|| self.model.width(), |projection| projection.size()[1])
    }

    fn token_ids<S: AsRef<str>>(&self, prompts: &[S]) -> Result<Vec<Vec<i64>>> {
        let texts: Vec<_> = prompts.iter().map(|prompt| self.cleaning.apply(prompt.as_ref())).collect();
        self.tokenizer.encode(&texts)
    }
}

impl Model {
    /// What Chinese-CLIP's token states are multiplied by. Errors: [`Error::Unsupported`] for any other encoder.
    fn projection(&self, settings: &TextSettings, weights: &Weights) -> Result<Tensor> {
        match self {
            Self::Bert(bert) => bert.chinese_clip_projection(settings, weights),
            Self::AltClip(_) | Self::Clip(_) | Self::T5(_) => Err(BertEncoder::not_chinese_clip(settings)),
        }
    }

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
    use super::*;

    const OPTIONS: StudentOptions = StudentOptions::new(Kind::Float, Device::Cpu);

    const PROMPTS: [&str; 2] = ["红色的圆形", ""];

    fn values(tensor: &Tensor) -> Vec<f32> {
        Vec::try_from(tensor.flatten(0, -1)).unwrap()
    }

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

    #[test]
    fn a_checked_encoder_has_the_shapes_of_a_loaded_one_and_no_weights() {
        let (checked, loaded) = (StudentEncoder::check(&demo(), 24, OPTIONS).unwrap(), StudentEncoder::load(&demo(), 24, OPTIONS).unwrap());
        assert!(checked.parts().eq(loaded.parts()) && checked.parts().all(|(name, _)| name == "BERT"));
        assert_eq!((checked.width(), checked.token_ids(&["红"]).unwrap()), (64, loaded.token_ids(&["红"]).unwrap()));
        assert_eq!(checked.encode(&["红"]).unwrap().abs().max().double_value(&[]), 0.0);
        assert!(StudentEncoder::check(&demo(), 65, OPTIONS).is_err());
    }

    /// The count is that of the published text model without its pooler.
    #[test]
    fn published_encoder_needs_no_file() {
        let shapes = Part::random(chinese_clip_sizes(CHINESE_CLIP_LAYERS), 52, OPTIONS, true).unwrap();
        assert_eq!((shapes.survey.num_parameters, shapes.width()), (324_472_832, 1024));
        let small = serde_json::json!({
            "vocab_size": 21_128, "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 1,
        });
        let small = Part::random(small.as_object().unwrap().clone(), 12, OPTIONS, false).unwrap();
        assert_eq!(small.token_ids(&["红色A"]).unwrap()[0][..6], [2, 12_454, 13_430, 1, 3, 0]);
        let states = small.encode(&["红色的圆形", "蓝色的方块"], &Dropout::off()).unwrap();
        let apart = (states.get(0) - states.get(1)).abs().max().double_value(&[]);
        assert!(apart > 0.1 && states.abs().max().double_value(&[]) < 10.0, "{apart}");
    }

    #[test]
    fn folders_without_an_encoder_say_what_was_looked_for() {
        let dir = tempfile::tempdir().unwrap();
        let refuse = |path: &Path| StudentEncoder::load(path, 24, OPTIONS).err().unwrap().to_string();
        assert!(refuse(dir.path()).contains("holds no text encoder; looked for open_clip_config.json"));
        assert!(refuse(&dir.path().join("nowhere")).contains("no ORG/NAME of the hub"));
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

    /// A folder of Chinese-CLIP in the layout of transformers or of its authors, made of the demo's encoder and a projection to 8.
    fn chinese_clip(by_authors: bool, projection: &Tensor) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        std::fs::copy(demo().join("vocab.txt"), dir.path().join("vocab.txt")).unwrap();
        let mut config: serde_json::Value = serde_json::from_slice(&std::fs::read(demo().join("config.json")).unwrap()).unwrap();
        let (prefix, key, file, projection) = if by_authors {
            ("module.bert.", "module.text_projection", "clip_cn_small.safetensors", projection.shallow_clone())
        } else {
            config = serde_json::json!({ "model_type": "chinese_clip", "text_config": config });
            ("text_model.", "text_projection.weight", "model.safetensors", projection.tr().contiguous())
        };
        std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
        let tensors = Tensor::read_safetensors(demo().join("model.safetensors")).unwrap();
        let renamed = tensors.into_iter().map(|(name, tensor)| (format!("{prefix}{name}"), tensor));
        let tensors: Vec<_> = renamed.chain([(key.to_owned(), projection)]).collect();
        Tensor::write_safetensors(&tensors, dir.path().join(file)).unwrap();
        dir
    }

    #[test]
    fn chinese_clips_states_are_projected_on_request_in_both_layouts() {
        let projection = Tensor::arange(64 * 8, (Kind::Float, Device::Cpu)).sin().view([64, 8]);
        for by_authors in [false, true] {
            let dir = chinese_clip(by_authors, &projection);
            let load = |project| StudentEncoder::load(dir.path(), 24, StudentOptions { project, ..OPTIONS }).unwrap();
            let (plain, projected) = (load(false), load(true));
            assert_eq!((plain.width(), projected.width()), (64, 8));
            let [states, projected] = [plain, projected].map(|encoder| encoder.encode(&["红色的圆形", ""]).unwrap());
            assert_eq!(projected.size(), [2, 24, 8]);
            assert!((states.matmul(&projection) - projected).abs().max().double_value(&[]) < 1e-5);
        }
        let misshapen = chinese_clip(true, &projection.narrow(0, 0, 63));
        let error = StudentEncoder::load(misshapen.path(), 24, StudentOptions { project: true, ..OPTIONS }).err().unwrap();
        assert!(error.to_string().contains("[63, 8] does not fit"), "{error}");
    }

    #[test]
    fn asking_for_the_projection_of_another_encoder_is_refused() {
        let options = StudentOptions { project: true, ..OPTIONS };
        // A dual encoder of other authors has such a layer, for the state of the whole text.
        let dir = chinese_clip(false, &Tensor::ones([64, 8], (Kind::Float, Device::Cpu)));
        let config = std::fs::read_to_string(dir.path().join("config.json")).unwrap();
        std::fs::write(dir.path().join("config.json"), config.replace("chinese_clip", "vision-text-dual-encoder")).unwrap();
        for folder in [dir.path(), &demo(), &golden("student_clip"), &golden("student_mt5"), &golden("student_alt_clip")] {
            let error = StudentEncoder::load(folder, 8, options).err().unwrap();
            assert!(matches!(error, Error::Unsupported { .. }) && error.to_string().contains("Chinese-CLIP"), "{error}");
        }
    }

    /// The folder of a student encoder among the golden cases.
    fn golden(case: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/cases").join(case).join("student")
    }

    /// Every architecture that has dropout.
    fn every_architecture() -> Vec<PathBuf> {
        let cases = ["student_alt_clip", "student_chinese_clip", "student_mt5", "student_pair", "student_roberta", "student_xlm_roberta"];
        cases.into_iter().map(golden).chain([demo()]).collect()
    }

    #[test]
    fn without_dropout_training_encodes_as_sampling_does() {
        for folder in every_architecture() {
            let encoder = StudentEncoder::load(&folder, 12, OPTIONS).unwrap();
            let (encoded, training) = (encoder.encode(&PROMPTS).unwrap(), encoder.encode_training(&PROMPTS, &[1, 2]).unwrap());
            assert_eq!(values(&encoded), values(&training), "{}", folder.display());
        }
        let encoder = StudentEncoder::load(&demo(), 12, OPTIONS).unwrap();
        assert!(matches!(encoder.encode_training(&PROMPTS, &[1]), Err(Error::Shape { .. })));
    }

    #[test]
    fn with_dropout_a_rows_states_follow_from_its_seed_alone() {
        for folder in every_architecture() {
            let options = StudentOptions { dropout: true, ..OPTIONS };
            let encoder = StudentEncoder::load(&folder, 12, options).unwrap();
            let encode = |prompts: &[&str], seeds: &[u64]| encoder.encode_training(prompts, seeds).unwrap();
            let plain = StudentEncoder::load(&folder, 12, OPTIONS).unwrap();
            let folder = folder.display();
            let both = encode(&PROMPTS, &[5, 6]);
            assert_eq!(values(&both), values(&encode(&PROMPTS, &[5, 6])), "{folder}");
            // Alone, or behind others: the same masks, up to the rounding of products of other sizes.
            for other in [encode(&PROMPTS[1..], &[6]).get(0), encode(&["圆", "红红红", PROMPTS[1]], &[5, 6, 6]).get(2)] {
                assert!((both.get(1) - other).abs().max().double_value(&[]) < 1e-4, "{folder}");
            }
            let again = encode(&PROMPTS, &[5, 7]);
            assert_eq!(values(&both.get(0)), values(&again.get(0)), "{folder}");
            assert!((both.get(1) - again.get(1)).abs().max().double_value(&[]) > 0.01, "{folder}");
            // Sampling drops nothing, whatever the options.
            assert_eq!(values(&encoder.encode(&PROMPTS).unwrap()), values(&plain.encode(&PROMPTS).unwrap()), "{folder}");
        }
    }

    /// CLIP has no dropout that could be on.
    #[test]
    fn dropout_leaves_clip_as_it_is() {
        let encoder = StudentEncoder::load(&golden("student_clip"), 12, StudentOptions { dropout: true, ..OPTIONS }).unwrap();
        assert_eq!(values(&encoder.encode(&PROMPTS).unwrap()), values(&encoder.encode_training(&PROMPTS, &[1, 2]).unwrap()));
    }

    #[test]
    fn tokens_are_told_from_padding() {
        let masked = |encoder: &StudentEncoder, prompts: &[&str]| {
            let mask = encoder.token_mask(prompts).unwrap();
            assert_eq!((mask.size(), mask.kind()), (vec![2, 12], Kind::Bool));
            Vec::<Vec<bool>>::try_from(mask).unwrap()
        };
        let first = |count: usize| (0..12).map(|place| place < count).collect::<Vec<_>>();
        // Five characters, or none, between start and end.
        let bert = StudentEncoder::load(&demo(), 12, OPTIONS).unwrap();
        assert_eq!(masked(&bert, &PROMPTS), [first(7), first(2)]);
        // CLIP pads with its end of text: the first one counts.
        let clip = StudentEncoder::load(&golden("student_clip"), 12, OPTIONS).unwrap();
        let prompts = ["red dot", ""];
        let ids = clip.token_ids(&prompts).unwrap().remove(0);
        let tokens = ids[0].iter().position(|id| id == ids[0].last().unwrap()).unwrap() + 1;
        assert!((3..12).contains(&tokens) && ids[0][tokens..].iter().all(|id| id == &ids[0][tokens - 1]));
        assert_eq!(masked(&clip, &prompts), [first(tokens), first(2)]);
        // Two tokenizers cut one text into different numbers: the longer one counts.
        let pair = StudentEncoder::load(&golden("student_pair"), 12, OPTIONS).unwrap();
        let lengths = PROMPTS.map(|prompt| {
            let real = |part: &Part| i64::try_from(part.token_mask(&[prompt]).unwrap().sum(Kind::Int64)).unwrap() as usize;
            let lengths: Vec<usize> = pair.parts.iter().map(real).collect();
            assert_eq!(lengths.len(), 2);
            lengths[0].max(lengths[1])
        });
        assert_eq!(masked(&pair, &PROMPTS), lengths.map(first));
    }

    /// A text that is the pad token itself, as users may write it, is padding to XLM-R and a token to AltCLIP.
    #[test]
    fn a_pad_token_in_the_text_counts_where_the_tokenizer_says_so() {
        let count = |case: &str| {
            let mask = StudentEncoder::load(&golden(case), 12, OPTIONS).unwrap().token_mask(&["a <pad> b"]).unwrap();
            Vec::<bool>::try_from(mask.get(0)).unwrap()
        };
        let (alt_clip, xlm_roberta) = (count("student_alt_clip"), count("student_xlm_roberta"));
        let last = alt_clip.iter().rposition(|&token| token).unwrap();
        assert!(alt_clip[..last].iter().all(|&token| token));
        assert!(xlm_roberta[..=last].iter().filter(|&&token| !token).count() == 1, "{xlm_roberta:?}");
    }

    #[test]
    fn a_sketch_covers_both_encoders_of_a_pair() {
        let folder = tempfile::tempdir().unwrap();
        let sketch = || {
            let mut pieces = Vec::new();
            StudentEncoder::sketch(folder.path(), &mut |piece| pieces.push(piece.to_vec())).unwrap();
            pieces
        };
        for part in PAIR {
            let (from, to) = (golden("student_pair").join(part), folder.path().join(part));
            std::fs::create_dir(&to).unwrap();
            for entry in std::fs::read_dir(from).unwrap() {
                let path = entry.unwrap().path();
                std::fs::copy(&path, to.join(path.file_name().unwrap())).unwrap();
            }
        }
        let same = sketch();
        for part in PAIR {
            for file in ["model.safetensors", "config.json"] {
                let path = folder.path().join(part).join(file);
                let bytes = std::fs::read(&path).unwrap();
                let mut other = bytes.clone();
                if file == "config.json" {
                    other.push(b' ')
                } else {
                    *other.last_mut().unwrap() ^= 1
                }
                std::fs::write(&path, other).unwrap();
                assert_ne!(sketch(), same, "{part}/{file}");
                std::fs::write(&path, bytes).unwrap();
            }
        }
        assert_eq!(sketch(), same);
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
