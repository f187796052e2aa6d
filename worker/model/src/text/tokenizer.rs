//! Text to token ids, for the two kinds of vocabulary the encoders here use.

use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::json;
use tokenizers::{AddedToken, PaddingDirection, PaddingParams, PaddingStrategy, Tokenizer, TruncationParams};

use crate::config::read_config;
use crate::{Error, Result};

/// A tokenizer that cuts and pads every text to the same number of ids.
///
/// It is read from `tokenizer.json` where there is one, else from the vocabulary files of its kind. A text too long keeps its first
/// pieces; start and end ids are always there.
pub struct TextTokenizer {
    path: PathBuf,
    inner: Tokenizer,
    pad_id: i64,
    length: usize,
}

/// The part of `tokenizer_config.json` that bears on token ids.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct TokenizerConfig {
    bos_token: Option<SpecialToken>,
    eos_token: Option<SpecialToken>,
    unk_token: Option<SpecialToken>,
    pad_token: Option<SpecialToken>,
    cls_token: Option<SpecialToken>,
    sep_token: Option<SpecialToken>,
    mask_token: Option<SpecialToken>,
    /// A float: "no limit" is written as 1e30.
    model_max_length: Option<f64>,
    do_lower_case: Option<bool>,
    strip_accents: Option<bool>,
    tokenize_chinese_chars: Option<bool>,
}

/// A special token as configurations write it: its text, or an object with matching options.
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
        #[serde(default)]
        normalized: bool,
    },
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
    /// Reads CLIP's byte-pair tokenizer from `tokenizer.json`, or from `vocab.json` and `merges.txt`.
    ///
    /// Texts are cut and padded to `model_max_length` of `tokenizer_config.json`, at most `max_length`, with the pad token it names.
    /// Errors: [`Error::Io`] and [`Error::Invalid`], naming the file.
    pub fn clip(dir: &Path, max_length: usize) -> Result<Self> {
        let config = TokenizerConfig::read(dir)?;
        let token = |token: &Option<SpecialToken>, default: &str| token.clone().unwrap_or_else(|| SpecialToken::Text(default.into()));
        let (bos, eos) = (token(&config.bos_token, "<|startoftext|>"), token(&config.eos_token, "<|endoftext|>"));
        let (unk, pad) = (token(&config.unk_token, "<|endoftext|>"), token(&config.pad_token, "<|endoftext|>"));
        let length = config.model_max_length.map_or(max_length, |length| (length as usize).min(max_length));
        Self::build(dir, length, &[bos.clone(), eos.clone(), unk.clone(), pad.clone()], &pad, || {
            let vocab: BTreeMap<String, u32> = read_config(&dir.join("vocab.json"), &[])?;
            let id = |token: &SpecialToken| vocab_id(&dir.join("vocab.json"), &vocab, token.content());
            Ok(json!({
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
                    "type": "RobertaProcessing", "trim_offsets": false, "add_prefix_space": false,
                    "cls": [bos.content(), id(&bos)?], "sep": [eos.content(), id(&eos)?],
                },
                "model": {
                    "type": "BPE", "unk_token": unk.content(), "continuing_subword_prefix": "", "end_of_word_suffix": "</w>",
                    "vocab": vocab, "merges": read_merges(&dir.join("merges.txt"))?,
                },
            }))
        })
    }

    /// Reads BERT's WordPiece tokenizer from `tokenizer.json`, or from `vocab.txt` (uncased unless `tokenizer_config.json` says
    /// otherwise: cleaned, lower case, accents stripped, every Chinese character and punctuation mark a piece of its own).
    ///
    /// Texts are cut and padded to `length`. Errors: [`Error::Io`] and [`Error::Invalid`], naming the file.
    pub fn bert(dir: &Path, length: usize) -> Result<Self> {
        let config = TokenizerConfig::read(dir)?;
        let token = |token: &Option<SpecialToken>, default: &str| token.clone().unwrap_or_else(|| SpecialToken::Text(default.into()));
        let (cls, sep) = (token(&config.cls_token, "[CLS]"), token(&config.sep_token, "[SEP]"));
        let (unk, pad) = (token(&config.unk_token, "[UNK]"), token(&config.pad_token, "[PAD]"));
        let special = [unk.clone(), sep.clone(), pad.clone(), cls.clone(), token(&config.mask_token, "[MASK]")];
        Self::build(dir, length, &special, &pad, || {
            let path = dir.join("vocab.txt");
            let vocab = read_vocab(&path)?;
            let id = |token: &SpecialToken| vocab_id(&path, &vocab, token.content());
            Ok(json!({
                "normalizer": {
                    "type": "BertNormalizer", "clean_text": true,
                    "handle_chinese_chars": config.tokenize_chinese_chars.unwrap_or(true),
                    "strip_accents": config.strip_accents, "lowercase": config.do_lower_case.unwrap_or(true),
                },
                "pre_tokenizer": { "type": "BertPreTokenizer" },
                "post_processor": { "type": "BertProcessing", "cls": [cls.content(), id(&cls)?], "sep": [sep.content(), id(&sep)?] },
                "model": {
                    "type": "WordPiece", "unk_token": unk.content(), "continuing_subword_prefix": "##",
                    "max_input_chars_per_word": 100, "vocab": vocab,
                },
            }))
        })
    }

    /// Reads `tokenizer.json` or, where there is none, what `describe` says in the same terms; then fixes the length.
    fn build(
        dir: &Path,
        length: usize,
        special: &[SpecialToken],
        pad: &SpecialToken,
        describe: impl FnOnce() -> Result<serde_json::Value>,
    ) -> Result<Self> {
        let path = dir.join("tokenizer.json");
        let (path, parsed) = if path.is_file() {
            let bytes = std::fs::read(&path).map_err(|source| Error::Io { path: path.clone(), source })?;
            (path, Tokenizer::from_bytes(bytes))
        } else {
            (dir.to_path_buf(), serde_json::from_value(with_defaults(describe()?)).map_err(Into::into))
        };
        let invalid = |reason: String| Error::Invalid { path: path.clone(), reason };
        let mut inner = parsed.map_err(|error| invalid(format!("not a tokenizer: {error}")))?;
        if length < 3 {
            return Err(invalid(format!("a context of {length} tokens has no room for text between start and end")));
        }

        // Special tokens are matched in the text before anything else, also those that are ordinary words of the vocabulary: SDXL's
        // second tokenizer pads with "!", so that a "!" in a prompt becomes the pad id. The published models were trained so.
        let known: HashSet<String> = inner.get_added_tokens_decoder().into_values().map(|token| token.content).collect();
        let new: Vec<_> = special.iter().filter(|token| !known.contains(token.content())).map(SpecialToken::to_added).collect();
        inner.add_special_tokens(&new);

        let pad_id = inner.token_to_id(pad.content()).ok_or_else(|| invalid(format!("has no pad token {:?}", pad.content())))?;
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
        Ok(Self { path, inner, pad_id: pad_id.into(), length })
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

    /// Returns the number of ids of every text.
    pub fn length(&self) -> usize {
        self.length
    }
}

/// What CLIP takes for a word before splitting it further.
const CLIP_WORDS: &str = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+";

impl TokenizerConfig {
    /// Reads `tokenizer_config.json`; a folder without one uses the defaults of its kind.
    fn read(dir: &Path) -> Result<Self> {
        let path = dir.join("tokenizer_config.json");
        if path.is_file() { read_config(&path, &[]) } else { Ok(Self::default()) }
    }
}

/// Adds the fields every tokenizer description has.
fn with_defaults(mut description: serde_json::Value) -> serde_json::Value {
    description["version"] = json!("1.0");
    description["added_tokens"] = json!([]);
    description
}

fn vocab_id(path: &Path, vocab: &BTreeMap<String, u32>, token: &str) -> Result<u32> {
    vocab.get(token).copied().ok_or_else(|| Error::Invalid { path: path.into(), reason: format!("has no token {token:?}") })
}

/// Reads `merges.txt`: a version line, then one pair a line, in order of rank.
fn read_merges(path: &Path) -> Result<Vec<[String; 2]>> {
    let text = read_text(path)?;
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
