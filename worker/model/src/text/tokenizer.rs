//! Text to token ids, for the kinds of vocabulary the encoders here use.

mod overlooked;
mod published;
mod sentencepiece;

use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::json;
use tokenizers::{AddedToken, PaddingDirection, PaddingParams, PaddingStrategy, Tokenizer, TruncationParams};

pub use self::overlooked::Overlooked;
use self::sentencepiece::SentencePiece;
pub(crate) use self::sentencepiece::fuzz as fuzz_sentencepiece;
use crate::config::read_config;
use crate::{Error, Result};

/// A tokenizer that cuts and pads every text to the same number of ids.
///
/// It is read from `tokenizer.json` where there is one, else from the vocabulary files of its kind. A text too long keeps its first
/// pieces; the ids its kind puts at start and end are always there.
pub struct TextTokenizer {
    path: PathBuf,
    inner: Tokenizer,
    pad_id: i64,
    end_id: Option<i64>,
    length: usize,
}

/// What makes a tokenizer of its own, whatever its kind.
const WHOLE_FILE: &str = "tokenizer.json";
/// What says how the others are meant.
const CONFIG_FILE: &str = "tokenizer_config.json";
/// Where older versions of transformers keep the special tokens, and tokens beside the vocabulary, whose flags they do not keep.
const SPECIAL_TOKENS_FILE: &str = "special_tokens_map.json";
const ADDED_TOKENS_FILE: &str = "added_tokens.json";
/// What a tokenizer is read from where there is no [`WHOLE_FILE`], of all kinds.
const VOCABULARY_FILES: [&str; 6] = [ADDED_TOKENS_FILE, "merges.txt", "sentencepiece.bpe.model", "spiece.model", "vocab.json", "vocab.txt"];

/// Hands over name and content of the files in a folder that decide token ids, always in the same order.
///
/// Errors: [`Error::Io`], naming the file.
pub(crate) fn sketch(dir: &Path, take: &mut dyn FnMut(&[u8])) -> Result<()> {
    let vocabulary: &[&str] = if dir.join(WHOLE_FILE).is_file() { &[WHOLE_FILE] } else { &VOCABULARY_FILES };
    sketch_files(dir, &[vocabulary, &[CONFIG_FILE, SPECIAL_TOKENS_FILE]].concat(), take)
}

/// Hands over name and content of those of the files that a folder has.
///
/// Errors: [`Error::Io`], naming the file.
pub(super) fn sketch_files(dir: &Path, names: &[&str], take: &mut dyn FnMut(&[u8])) -> Result<()> {
    for name in names {
        let path = dir.join(name);
        if path.is_file() {
            take(name.as_bytes());
            take(&std::fs::read(&path).map_err(|source| Error::Io { path, source })?);
        }
    }
    Ok(())
}

/// The part of `tokenizer_config.json` that bears on token ids; its special tokens may stand in `special_tokens_map.json` instead.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct TokenizerConfig {
    /// Tokens that are matched before a text is cut into the vocabulary's pieces, by their ids; those the vocabulary has may be among them.
    added_tokens_decoder: Option<BTreeMap<u32, SpecialToken>>,
    bos_token: Option<SpecialToken>,
    eos_token: Option<SpecialToken>,
    unk_token: Option<SpecialToken>,
    pad_token: Option<SpecialToken>,
    cls_token: Option<SpecialToken>,
    sep_token: Option<SpecialToken>,
    mask_token: Option<SpecialToken>,
    /// Special tokens of no usual role; the second is the newer name. Version 5 of transformers passes over the first in the older files,
    /// but whoever wrote those trained with version 4, which reads it.
    additional_special_tokens: Option<Vec<SpecialToken>>,
    extra_special_tokens: Option<ExtraTokens>,
    /// A float: "no limit" is written as 1e30.
    model_max_length: Option<f64>,
    /// The class of transformers that reads the folder; "Fast" at its end means the same ids.
    tokenizer_class: Option<String>,
    add_prefix_space: Option<bool>,
    /// How many pieces T5's tokenizer adds behind those of its file.
    extra_ids: Option<usize>,
    do_lower_case: Option<bool>,
    strip_accents: Option<bool>,
    tokenize_chinese_chars: Option<bool>,
    /// What cuts a text into words before BERT's pieces; absent or "basic": spaces and punctuation.
    word_tokenizer_type: Option<String>,
}

/// The part of a model's `config.json` that bears on its tokenizer.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct ModelConfig {
    tokenizer_class: Option<String>,
    /// Of a model of texts and images.
    text_config: Option<Box<ModelConfig>>,
}

/// The one [`TokenizerConfig::word_tokenizer_type`] that is computed.
const BASIC: &str = "basic";

/// A token that is matched before all others as configurations write it: its text, or an object with matching options.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
enum SpecialToken {
    Text(String),
    Object {
        content: String,
        #[serde(default)]
        lstrip: bool,
        #[serde(default)]
        rstrip: bool,
        #[serde(default)]
        single_word: bool,
        /// Whether it is looked for in the text as the normaliser makes it: lower case, say.
        #[serde(default)]
        normalized: bool,
    },
}

/// Special tokens of no usual role: a list, or named by what a class of transformers calls them.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
enum ExtraTokens {
    List(Vec<SpecialToken>),
    Named(BTreeMap<String, SpecialToken>),
}

/// The kinds of tokenizers, by how they cut a text and what they put around it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TokenizerKind {
    /// CLIP's byte pairs: `vocab.json` and `merges.txt`.
    Clip,
    /// BERT's WordPiece: `vocab.txt`.
    Bert,
    /// RoBERTa's byte pairs: `vocab.json` and `merges.txt`.
    Roberta,
    /// XLM-R's sentencepiece: `sentencepiece.bpe.model`, its ids behind those of fairseq's special tokens.
    XlmRoberta,
    /// T5's and mT5's sentencepiece: `spiece.model`.
    T5,
}

impl TokenizerKind {
    /// What reads the files of a class of transformers; `None` for the classes that can be read from a `tokenizer.json` alone.
    fn of_class(class: &str) -> Option<Self> {
        Some(match class.strip_suffix("Fast").unwrap_or(class) {
            "CLIPTokenizer" => Self::Clip,
            // The others are copies of the first.
            "BertTokenizer" | "DistilBertTokenizer" | "ElectraTokenizer" | "MobileBertTokenizer" => Self::Bert,
            "RobertaTokenizer" => Self::Roberta,
            "XLMRobertaTokenizer" => Self::XlmRoberta,
            "T5Tokenizer" | "MT5Tokenizer" => Self::T5,
            _ => return None,
        })
    }
}

impl SpecialToken {
    fn content(&self) -> &str {
        match self {
            Self::Text(content) | Self::Object { content, .. } => content,
        }
    }

    fn to_added(&self) -> AddedToken {
        match self {
            Self::Text(content) => AddedToken::from(content.as_str(), true).normalized(false),
            Self::Object { content, lstrip, rstrip, single_word, normalized } => {
                AddedToken::from(content.as_str(), true).lstrip(*lstrip).rstrip(*rstrip).single_word(*single_word).normalized(*normalized)
            }
        }
    }
}

impl TextTokenizer {
    /// Reads the tokenizer of a folder: of the kind that `tokenizer_config.json` names, or an older `config.json`; else `usual`.
    ///
    /// Models are not tied to the tokenizer of their own kind: Korean RoBERTas, say, use BERT's.
    /// Errors: [`Error::Io`] and [`Error::Invalid`], naming the file; [`Error::Unsupported`] for a sentencepiece of another algorithm, and
    /// for a kind that is not known here (MeCab's words, say) where there is no `tokenizer.json`.
    pub fn open(dir: &Path, usual: TokenizerKind, length: usize) -> Result<Self> {
        match TokenizerConfig::read(dir)?.kind(dir)?.unwrap_or(usual) {
            TokenizerKind::Clip => Self::clip(dir, length),
            TokenizerKind::Bert => Self::bert(dir, length),
            TokenizerKind::Roberta => Self::roberta(dir, length),
            TokenizerKind::XlmRoberta => Self::xlm_roberta(dir, length),
            TokenizerKind::T5 => Self::t5(dir, length),
        }
    }

    /// Reads CLIP's byte-pair tokenizer from `tokenizer.json`, or from `vocab.json` and `merges.txt`.
    ///
    /// Texts are cut and padded to `model_max_length` of `tokenizer_config.json`, at most `max_length`, with the pad token it names.
    /// Errors: [`Error::Io`] and [`Error::Invalid`], naming the file.
    pub fn clip(dir: &Path, max_length: usize) -> Result<Self> {
        let config = TokenizerConfig::read(dir)?;
        let (bos, eos) = (token(&config.bos_token, "<|startoftext|>"), token(&config.eos_token, "<|endoftext|>"));
        let (unk, pad) = (token(&config.unk_token, "<|endoftext|>"), token(&config.pad_token, "<|endoftext|>"));
        let length = config.model_max_length.map_or(max_length, |length| (length as usize).min(max_length));
        Self::build(dir, &config, length, &[bos.clone(), eos.clone(), unk.clone(), pad.clone()], &pad, || {
            let path = dir.join("vocab.json");
            let (vocab, merges) = (read_config(&path, &[])?, read_merges(&dir.join("merges.txt"))?);
            clip_words(&path, &vocab, &merges, [&bos, &eos, &unk].map(SpecialToken::content))
        })
    }

    /// Makes CLIP's published tokenizer, whose vocabulary is part of this program: for checkpoints that come without one.
    ///
    /// Texts are cut and padded to `length`; OpenAI's CLIP pads with 49407, the end of a text, OpenCLIP's bigG with 0, an exclamation mark.
    /// Errors: [`Error::Invalid`] if no token has the id `pad_id`, or if `length` leaves no room for text.
    pub fn clip_published(pad_id: i64, length: usize) -> Result<Self> {
        let path = Path::new(published::NAME);
        let (vocab, merges) = published::clip()?;
        let [bos, eos] = published::ENDS.map(|end| SpecialToken::Text(end.to_owned()));
        let pad = vocab.iter().find(|&(_, &id)| i64::from(id) == pad_id).map(|(token, _)| SpecialToken::Text(token.clone()));
        let pad = pad.ok_or_else(|| Error::Invalid { path: path.into(), reason: format!("has no token of id {pad_id}") })?;
        let inner = clip_words(path, &vocab, &merges, [&bos, &eos, &eos].map(SpecialToken::content))?;
        Self::finish(path, inner, length, &[bos, eos, pad.clone()], &pad)
    }

    /// Reads BERT's WordPiece tokenizer from `tokenizer.json`, or from `vocab.txt` (uncased unless `tokenizer_config.json` says
    /// otherwise: cleaned, lower case, accents stripped, every Chinese character and punctuation mark a piece of its own).
    ///
    /// Texts are cut and padded to `length`. Errors: [`Error::Io`] and [`Error::Invalid`], naming the file.
    pub fn bert(dir: &Path, length: usize) -> Result<Self> {
        let config = TokenizerConfig::read(dir)?;
        let (cls, sep) = (token(&config.cls_token, "[CLS]"), token(&config.sep_token, "[SEP]"));
        let (unk, pad) = (token(&config.unk_token, "[UNK]"), token(&config.pad_token, "[PAD]"));
        let special = [unk.clone(), sep.clone(), pad.clone(), cls.clone(), token(&config.mask_token, "[MASK]")];
        Self::build(dir, &config, length, &special, &pad, || {
            let path = dir.join("vocab.txt");
            bert_words(&path, &read_vocab(&path)?, &config, [&cls, &sep, &unk].map(SpecialToken::content))
        })
    }

    /// Makes a tokenizer like BERT's Chinese one where its vocabulary is not at hand: as in that, each Chinese character is a piece, but
    /// all else is unknown, and the ids are others. Encoders whose weights are drawn do not mind.
    ///
    /// Its ids are below 20,906. Texts are cut and padded to `length`. Errors: [`Error::Invalid`] if `length` leaves no room for text.
    pub fn chinese_characters(length: usize) -> Result<Self> {
        let path = Path::new("the Chinese characters");
        let special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"];
        let characters = special.into_iter().map(str::to_owned).chain(('\u{4e00}'..='\u{9fa5}').map(String::from));
        let inner = bert_words(path, &characters.zip(0..).collect(), &TokenizerConfig::default(), ["[CLS]", "[SEP]", "[UNK]"])?;
        let special = special.map(|token| SpecialToken::Text(token.to_owned()));
        Self::finish(path, inner, length, &special, &special[0])
    }

    /// Reads RoBERTa's byte-pair tokenizer from `tokenizer.json`, or from `vocab.json` and `merges.txt`.
    ///
    /// Texts are cut and padded to `length`. Errors: [`Error::Io`] and [`Error::Invalid`], naming the file.
    pub fn roberta(dir: &Path, length: usize) -> Result<Self> {
        let config = TokenizerConfig::read(dir)?;
        let special = config.fairseq_tokens();
        let [cls, pad, sep, unk, _] = &special;
        Self::build(dir, &config, length, &special, pad, || {
            let path = dir.join("vocab.json");
            let vocab: BTreeMap<String, u32> = read_config(&path, &[])?;
            let id = |token: &SpecialToken| vocab_id(&path, &vocab, token.content());
            let add_prefix_space = config.add_prefix_space.unwrap_or(false);
            from_description(
                dir,
                json!({
                    "pre_tokenizer": { "type": "ByteLevel", "add_prefix_space": add_prefix_space, "trim_offsets": true, "use_regex": true },
                    "post_processor": {
                        "type": "RobertaProcessing", "trim_offsets": true, "add_prefix_space": add_prefix_space,
                        "cls": [cls.content(), id(cls)?], "sep": [sep.content(), id(sep)?],
                    },
                    "model": { "type": "BPE", "unk_token": unk.content(), "vocab": vocab, "merges": read_merges(&dir.join("merges.txt"))? },
                }),
            )
        })
    }

    /// Reads XLM-R's tokenizer from `tokenizer.json`, or from `sentencepiece.bpe.model`.
    ///
    /// Texts are cut and padded to `length`. Errors: [`Error::Io`] and [`Error::Invalid`], naming the file; [`Error::Unsupported`] if the
    /// file's algorithm is not the unigram model.
    pub fn xlm_roberta(dir: &Path, length: usize) -> Result<Self> {
        let config = TokenizerConfig::read(dir)?;
        let special = config.fairseq_tokens();
        let pad = &special[1];
        Self::build(dir, &config, length, &special, pad, || {
            SentencePiece::read(&dir.join("sentencepiece.bpe.model"))?.xlm_roberta(special.each_ref().map(SpecialToken::content))
        })
    }

    /// Reads T5's or mT5's tokenizer from `tokenizer.json`, or from `spiece.model`.
    ///
    /// Texts are cut and padded to `length`. Errors: [`Error::Io`] and [`Error::Invalid`], naming the file; [`Error::Unsupported`] if the
    /// file's algorithm is not the unigram model.
    pub fn t5(dir: &Path, length: usize) -> Result<Self> {
        let config = TokenizerConfig::read(dir)?;
        let pad = token(&config.pad_token, "<pad>");
        let special = [token(&config.eos_token, "</s>"), token(&config.unk_token, "<unk>"), pad.clone()];
        Self::build(dir, &config, length, &special, &pad, || {
            SentencePiece::read(&dir.join("spiece.model"))?.t5(special[0].content(), config.extra_ids.unwrap_or(0))
        })
    }

    /// Reads `tokenizer.json` or, where there is none, makes the tokenizer that `other` reads, with the tokens that are added to its
    /// vocabulary; then fixes the length.
    fn build(
        dir: &Path,
        config: &TokenizerConfig,
        length: usize,
        special: &[SpecialToken],
        pad: &SpecialToken,
        other: impl FnOnce() -> Result<Tokenizer>,
    ) -> Result<Self> {
        let path = dir.join(WHOLE_FILE);
        let (path, inner) = if path.is_file() {
            let bytes = std::fs::read(&path).map_err(|source| Error::Io { path: path.clone(), source })?;
            let inner = Tokenizer::from_bytes(bytes).map_err(|error| not_a_tokenizer(&path, &error.to_string()))?;
            (path, inner)
        } else {
            let mut inner = other()?;
            add_tokens(dir, &mut inner, config.added_tokens_decoder.as_ref().unwrap_or(&BTreeMap::new()))?;
            (dir.to_path_buf(), inner)
        };
        Self::finish(&path, inner, length, &[special, &config.extra_tokens()].concat(), pad)
    }

    /// Fixes the length of a tokenizer that was read from `path`.
    fn finish(path: &Path, mut inner: Tokenizer, length: usize, special: &[SpecialToken], pad: &SpecialToken) -> Result<Self> {
        let invalid = |reason: String| Error::Invalid { path: path.into(), reason };
        if length < 3 {
            return Err(invalid(format!("a context of {length} tokens has no room for text between start and end")));
        }

        // Special tokens are matched in the text before anything else, also those that are ordinary words of the vocabulary: SDXL's
        // second tokenizer pads with "!", so that a "!" in a prompt becomes the pad id. The published models were trained so.
        let known: HashSet<String> = inner.get_added_tokens_decoder().into_values().map(|token| token.content).collect();
        // Those that the vocabulary lacks would get ids beyond the encoder's.
        let new = special.iter().filter(|token| !known.contains(token.content()) && inner.token_to_id(token.content()).is_some());
        let new: Vec<_> = new.map(SpecialToken::to_added).collect();
        inner.add_special_tokens(&new);

        let pad_id = inner.token_to_id(pad.content()).ok_or_else(|| invalid(format!("has no pad token {:?}", pad.content())))?;
        inner.with_padding(None);
        let empty = inner.encode_fast("", true).map_err(|error| invalid(error.to_string()))?;
        let end_id = empty.get_ids().last().copied().map(i64::from);
        inner
            .with_truncation(Some(TruncationParams { max_length: length, ..TruncationParams::default() }))
            .map_err(|error| invalid(error.to_string()))?
            .with_padding(Some(PaddingParams {
                strategy: PaddingStrategy::Fixed(length),
                direction: PaddingDirection::Right,
                pad_to_multiple_of: None,
                pad_id,
                pad_type_id: 0,
                pad_token: pad.content().into(),
            }));
        Ok(Self { path: path.into(), inner, pad_id: pad_id.into(), end_id, length })
    }

    /// Returns the ids of each text, all of [`TextTokenizer::length`].
    ///
    /// Errors: [`Error::Invalid`] if the tokenizer fails, as one without an unknown token may.
    pub fn encode<S: AsRef<str>>(&self, texts: &[S]) -> Result<Vec<Vec<i64>>> {
        // One by one: the library's batch call starts a thread pool of its own, and the cores are taken.
        texts
            .iter()
            .map(|text| {
                let failed = |error: tokenizers::Error| Error::Invalid { path: self.path.clone(), reason: error.to_string() };
                let encoding = self.inner.encode_fast(text.as_ref(), true).map_err(failed)?;
                Ok(encoding.get_ids().iter().copied().map(i64::from).collect())
            })
            .collect()
    }

    /// Returns the id that fills up short texts.
    pub fn pad_id(&self) -> i64 {
        self.pad_id
    }

    /// Returns the id behind the last piece of every text; `None` if the tokenizer puts none there.
    pub fn end_id(&self) -> Option<i64> {
        self.end_id
    }

    /// Returns the number of ids of every text.
    pub fn length(&self) -> usize {
        self.length
    }
}

/// What CLIP takes for a word before splitting it further.
const CLIP_WORDS: &str = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+";

/// CLIP's tokenizer of a vocabulary, its merges, and the tokens that begin a text, end it and stand for what is unknown.
fn clip_words(path: &Path, vocab: &BTreeMap<String, u32>, merges: &[[String; 2]], [bos, eos, unk]: [&str; 3]) -> Result<Tokenizer> {
    let id = |token: &str| vocab_id(path, vocab, token);
    from_description(
        path,
        json!({
            "normalizer": { "type": "Sequence", "normalizers": [
                { "type": "NFC" },
                { "type": "Replace", "pattern": { "Regex": r"\s+" }, "content": " " },
                { "type": "Lowercase" },
            ]},
            "pre_tokenizer": { "type": "Sequence", "pretokenizers": [
                { "type": "Split", "pattern": { "Regex": CLIP_WORDS }, "behavior": "Removed", "invert": true },
                { "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true },
            ]},
            "post_processor": {
                "type": "RobertaProcessing", "trim_offsets": false, "add_prefix_space": false, "cls": [bos, id(bos)?], "sep": [eos, id(eos)?],
            },
            "model": {
                "type": "BPE", "unk_token": unk, "continuing_subword_prefix": "", "end_of_word_suffix": "</w>",
                "vocab": vocab, "merges": merges,
            },
        }),
    )
}

/// BERT's tokenizer of a vocabulary, and the tokens that begin a text, end it and stand for what is unknown.
fn bert_words(path: &Path, vocab: &BTreeMap<String, u32>, config: &TokenizerConfig, [cls, sep, unk]: [&str; 3]) -> Result<Tokenizer> {
    let id = |token: &str| vocab_id(path, vocab, token);
    from_description(
        path,
        json!({
            "normalizer": {
                "type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": config.tokenize_chinese_chars.unwrap_or(true),
                "strip_accents": config.strip_accents, "lowercase": config.do_lower_case.unwrap_or(true),
            },
            "pre_tokenizer": { "type": "BertPreTokenizer" },
            "post_processor": { "type": "BertProcessing", "cls": [cls, id(cls)?], "sep": [sep, id(sep)?] },
            "model": {
                "type": "WordPiece", "unk_token": unk, "continuing_subword_prefix": "##", "max_input_chars_per_word": 100, "vocab": vocab,
            },
        }),
    )
}

impl TokenizerConfig {
    /// Reads `tokenizer_config.json`; a folder without one uses the defaults of its kind. Where it does not list the added tokens, as
    /// transformers did not before version 4.34, the older files are read over it.
    fn read(dir: &Path) -> Result<Self> {
        let mut config: Self = read_if_there(&dir.join(CONFIG_FILE))?.unwrap_or_default();
        if config.added_tokens_decoder.is_some() {
            return Ok(config);
        }
        if let Some(map) = read_if_there::<Self>(&dir.join(SPECIAL_TOKENS_FILE))? {
            config = config.overlaid_with(map);
        }
        if let Some(ids) = read_if_there::<BTreeMap<String, u32>>(&dir.join(ADDED_TOKENS_FILE))? {
            let special = config.special_contents();
            let token = |content: String| {
                let normalized = !special.contains(content.as_str());
                SpecialToken::Object { content, lstrip: false, rstrip: false, single_word: false, normalized }
            };
            config.added_tokens_decoder = Some(ids.into_iter().map(|(content, id)| (id, token(content))).collect());
        }
        Ok(config)
    }

    /// The same with the special tokens that `map` names, and with those of no usual role that either names.
    fn overlaid_with(self, map: Self) -> Self {
        Self {
            additional_special_tokens: Some([self.extra_tokens(), map.extra_tokens()].concat()),
            bos_token: map.bos_token.or(self.bos_token),
            eos_token: map.eos_token.or(self.eos_token),
            unk_token: map.unk_token.or(self.unk_token),
            pad_token: map.pad_token.or(self.pad_token),
            cls_token: map.cls_token.or(self.cls_token),
            sep_token: map.sep_token.or(self.sep_token),
            mask_token: map.mask_token.or(self.mask_token),
            extra_special_tokens: None,
            ..self
        }
    }

    /// The special tokens of no usual role.
    fn extra_tokens(&self) -> Vec<SpecialToken> {
        let newer: Vec<SpecialToken> = match &self.extra_special_tokens {
            Some(ExtraTokens::List(tokens)) => tokens.clone(),
            Some(ExtraTokens::Named(tokens)) => tokens.values().cloned().collect(),
            None => Vec::new(),
        };
        self.additional_special_tokens.iter().flatten().cloned().chain(newer).collect()
    }

    /// The texts of all special tokens that are named.
    fn special_contents(&self) -> HashSet<String> {
        let Self { bos_token, eos_token, unk_token, pad_token, cls_token, sep_token, mask_token, .. } = self;
        let named = [bos_token, eos_token, unk_token, pad_token, cls_token, sep_token, mask_token].into_iter().flatten().cloned();
        named.chain(self.extra_tokens()).map(|token| token.content().to_owned()).collect()
    }

    /// The kind of a folder's tokenizer; `None` if none is named, or one that is read from its `tokenizer.json` alone.
    ///
    /// Errors: as [`TextTokenizer::open`].
    fn kind(&self, dir: &Path) -> Result<Option<TokenizerKind>> {
        let class = match &self.tokenizer_class {
            Some(class) => Some(class.clone()),
            None => ModelConfig::read(dir)?.class(),
        };
        let kind = class.as_deref().and_then(TokenizerKind::of_class);
        if dir.join(WHOLE_FILE).is_file() {
            return Ok(kind);
        }
        let words =
            self.word_tokenizer_type.as_deref().filter(|&words| words != BASIC).map(|words| format!("word_tokenizer_type {words:?}"));
        let class = class.filter(|_| kind.is_none()).map(|class| format!("tokenizer_class {class:?}"));
        match words.or(class) {
            None => Ok(kind),
            Some(what) => {
                // The usual kind would read the vocabulary, too, and make other ids of the same texts.
                let hint = format!("convert the tokenizer of {} to a {WHOLE_FILE}, or take an encoder that has one", dir.display());
                Err(Error::Unsupported { what, hint })
            }
        }
    }

    /// RoBERTa's and XLM-R's special tokens, in the order of XLM-R's ids: start, pad, end, unknown, mask.
    fn fairseq_tokens(&self) -> [SpecialToken; 5] {
        let mask = SpecialToken::Object { content: "<mask>".into(), lstrip: true, rstrip: false, single_word: false, normalized: false };
        [
            token(&self.cls_token, "<s>"),
            token(&self.pad_token, "<pad>"),
            token(&self.sep_token, "</s>"),
            token(&self.unk_token, "<unk>"),
            self.mask_token.clone().unwrap_or(mask),
        ]
    }
}

impl ModelConfig {
    /// Reads `config.json`; a folder without one says nothing.
    fn read(dir: &Path) -> Result<Self> {
        Ok(read_if_there(&dir.join("config.json"))?.unwrap_or_default())
    }

    /// The class it names for the whole model, or for its texts.
    fn class(self) -> Option<String> {
        self.tokenizer_class.or_else(|| self.text_config?.class())
    }
}

/// Reads a configuration; `None` if there is no such file.
fn read_if_there<T: DeserializeOwned>(path: &Path) -> Result<Option<T>> {
    if path.is_file() { read_config(path, &[]).map(Some) } else { Ok(None) }
}

/// Adds tokens to what a tokenizer of the folder `dir` matches before all else: some of its vocabulary, and some that follow it.
///
/// Errors: [`Error::Invalid`] if one would get another id than it was trained with.
fn add_tokens(dir: &Path, inner: &mut Tokenizer, tokens: &BTreeMap<u32, SpecialToken>) -> Result<()> {
    let vocabulary = inner.get_vocab_size(false);
    // In the order of their ids, as the library counts on behind the vocabulary.
    inner.add_tokens(&tokens.values().map(SpecialToken::to_added).collect::<Vec<_>>());
    for (&wanted, token) in tokens {
        let (content, id) = (token.content(), inner.token_to_id(token.content()));
        if id != Some(wanted) {
            let id = id.map_or("none".to_owned(), |id| id.to_string());
            let reason = format!(
                "the id of the added token {content:?} is {wanted}, and behind a vocabulary of {vocabulary} tokens it would be {id}: are these the \
                 files of one tokenizer? A {WHOLE_FILE} would be read instead"
            );
            return Err(Error::Invalid { path: dir.into(), reason });
        }
    }
    Ok(())
}

/// The token a configuration names, or the usual one.
fn token(configured: &Option<SpecialToken>, usual: &str) -> SpecialToken {
    configured.clone().unwrap_or_else(|| SpecialToken::Text(usual.into()))
}

/// Makes a tokenizer of the fields of a `tokenizer.json` in which its kind differs from others.
fn from_description(path: &Path, mut description: serde_json::Value) -> Result<Tokenizer> {
    description["version"] = json!("1.0");
    description["added_tokens"] = json!([]);
    serde_json::from_value(description).map_err(|error| not_a_tokenizer(path, &error.to_string()))
}

fn not_a_tokenizer(path: &Path, reason: &str) -> Error {
    Error::Invalid { path: path.into(), reason: format!("not a tokenizer: {reason}") }
}

fn vocab_id(path: &Path, vocab: &BTreeMap<String, u32>, token: &str) -> Result<u32> {
    vocab.get(token).copied().ok_or_else(|| Error::Invalid { path: path.into(), reason: format!("has no token {token:?}") })
}

/// Reads `merges.txt`: a version line, then one pair a line, in order of rank.
fn read_merges(path: &Path) -> Result<Vec<[String; 2]>> {
    parse_merges(path, &read_text(path)?)
}

/// As [`read_merges`], of the text of the file at `path`.
fn parse_merges(path: &Path, text: &str) -> Result<Vec<[String; 2]>> {
    let pairs = text.lines().enumerate().filter(|(_, line)| !line.starts_with("#version") && !line.trim().is_empty());
    pairs
        .map(|(index, line)| match line.trim_end().split_once(' ') {
            Some((left, right)) => Ok([left.to_owned(), right.to_owned()]),
            None => Err(Error::Invalid { path: path.into(), reason: format!("line {} is not a pair: {line:?}", index + 1) }),
        })
        .collect()
}

/// Reads `vocab.txt`: one token a line, whose number is its id.
fn read_vocab(path: &Path) -> Result<BTreeMap<String, u32>> {
    Ok(read_text(path)?.lines().map(str::to_owned).zip(0..).collect())
}

fn read_text(path: &Path) -> Result<String> {
    std::fs::read_to_string(path).map_err(|source| Error::Io { path: path.into(), source })
}

#[cfg(test)]
mod tests;
