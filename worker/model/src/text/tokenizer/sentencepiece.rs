//! sentencepiece's model files, whose unigram model is run by the library `tokenizers`.

use std::path::{Path, PathBuf};

use prost::Message;
use serde::de::DeserializeOwned;
use serde_json::json;
use tokenizers::models::unigram::Unigram;
use tokenizers::normalizers::Precompiled;
use tokenizers::{PostProcessorWrapper, PreTokenizerWrapper, Tokenizer};

use super::not_a_tokenizer;
use crate::{Error, Result};

/// Number of pieces XLM-R leaves out of its file: fairseq numbers start, end and unknown in its own way.
const NUM_SENTENCEPIECE_SPECIAL: usize = 3;

/// A model file, checked.
pub(super) struct SentencePiece {
    path: PathBuf,
    pieces: Vec<(String, f64)>,
    unk_id: usize,
    byte_fallback: bool,
    charsmap: Vec<u8>,
    add_dummy_prefix: bool,
}

// The fields of sentencepiece_model.proto (google/sentencepiece) that bear on token ids, with its numbers and defaults.

#[derive(Clone, PartialEq, Message)]
struct ModelProto {
    #[prost(message, repeated, tag = "1")]
    pieces: Vec<PieceProto>,
    #[prost(message, optional, tag = "2")]
    trainer: Option<TrainerProto>,
    #[prost(message, optional, tag = "3")]
    normalizer: Option<NormalizerProto>,
}

#[derive(Clone, PartialEq, Message)]
struct PieceProto {
    #[prost(string, optional, tag = "1")]
    piece: Option<String>,
    #[prost(float, optional, tag = "2")]
    score: Option<f32>,
}

#[derive(Clone, PartialEq, Message)]
struct TrainerProto {
    #[prost(int32, optional, tag = "3", default = "1")]
    model_type: Option<i32>,
    #[prost(bool, optional, tag = "24")]
    treat_whitespace_as_suffix: Option<bool>,
    #[prost(bool, optional, tag = "35")]
    byte_fallback: Option<bool>,
    #[prost(int32, optional, tag = "40", default = "0")]
    unk_id: Option<i32>,
}

#[derive(Clone, PartialEq, Message)]
struct NormalizerProto {
    #[prost(bytes, optional, tag = "2")]
    precompiled_charsmap: Option<Vec<u8>>,
    #[prost(bool, optional, tag = "3", default = "true")]
    add_dummy_prefix: Option<bool>,
    #[prost(bool, optional, tag = "4", default = "true")]
    remove_extra_whitespaces: Option<bool>,
    #[prost(bool, optional, tag = "5", default = "true")]
    escape_whitespaces: Option<bool>,
}

/// The number of the unigram model among sentencepiece's algorithms.
const UNIGRAM: i32 = 1;

impl SentencePiece {
    /// Reads a model file.
    ///
    /// Errors: [`Error::Io`], [`Error::Invalid`] for a damaged file, [`Error::Unsupported`] for other algorithms than the unigram model and
    /// for ways of treating white space that none of the encoders here was trained with.
    pub(super) fn read(path: &Path) -> Result<Self> {
        Self::parse(path, &std::fs::read(path).map_err(|source| Error::Io { path: path.into(), source })?)
    }

    /// As [`SentencePiece::read`], of the bytes of the file at `path`.
    fn parse(path: &Path, bytes: &[u8]) -> Result<Self> {
        let invalid = |reason: String| Error::Invalid { path: path.into(), reason };
        let model = ModelProto::decode(bytes).map_err(|error| invalid(format!("not a sentencepiece model: {error}")))?;
        let (trainer, normalizer) = (model.trainer.unwrap_or_default(), model.normalizer.unwrap_or_default());

        let unsupported = [
            (trainer.model_type() != UNIGRAM, "an algorithm other than the unigram model"),
            (trainer.treat_whitespace_as_suffix(), "white space as suffix"),
            (!normalizer.remove_extra_whitespaces(), "white space kept as it is"),
            (!normalizer.escape_whitespaces(), "white space without a piece of its own"),
        ];
        if let Some((_, what)) = unsupported.iter().find(|(applies, _)| *applies) {
            return Err(Error::Unsupported {
                what: format!("{}: {what}", path.display()),
                hint: "put a tokenizer.json beside it, which is read instead".into(),
            });
        }

        let pieces: Vec<(String, f64)> =
            model.pieces.into_iter().map(|piece| (piece.piece.unwrap_or_default(), f64::from(piece.score.unwrap_or_default()))).collect();
        if let Some(at) = pieces.iter().position(|(piece, score)| piece.is_empty() || !score.is_finite()) {
            return Err(invalid(format!("piece {at} is empty or has no finite score")));
        }
        let unk_id = usize::try_from(trainer.unk_id()).ok().filter(|&id| id < pieces.len());
        let unk_id =
            unk_id.ok_or_else(|| invalid(format!("{} pieces, of which {} should be the unknown one", pieces.len(), trainer.unk_id())))?;
        let charsmap = normalizer.precompiled_charsmap().to_vec();
        check_charsmap(&charsmap).ok_or_else(|| invalid("the table of its normaliser is damaged".into()))?;
        let (byte_fallback, add_dummy_prefix) = (trainer.byte_fallback(), normalizer.add_dummy_prefix());
        Ok(Self { path: path.into(), pieces, unk_id, byte_fallback, charsmap, add_dummy_prefix })
    }

    /// XLM-R's tokenizer: fairseq's `[start, pad, end, unknown]` come first, then the file's pieces behind its own special ones, then the
    /// mask; start and end around every text.
    pub(super) fn xlm_roberta(mut self, special: [&str; 5]) -> Result<Tokenizer> {
        let [first @ .., mask] = special;
        if self.pieces.len() < NUM_SENTENCEPIECE_SPECIAL {
            return Err(Error::Invalid { path: self.path, reason: format!("only {} pieces", self.pieces.len()) });
        }
        let without_score = |token: &str| (token.to_owned(), 0.0);
        self.pieces.splice(..NUM_SENTENCEPIECE_SPECIAL, first.map(without_score));
        self.pieces.push(without_score(mask));
        // By their places above.
        self.unk_id = 3;
        let (start, end) = (special[0], special[2]);
        let around = json!({
            "type": "TemplateProcessing",
            "single": [{ "SpecialToken": { "id": start, "type_id": 0 } }, { "Sequence": { "id": "A", "type_id": 0 } }, { "SpecialToken": { "id": end, "type_id": 0 } }],
            "pair": [],
            "special_tokens": {
                start: { "id": start, "ids": [0], "tokens": [start] },
                end: { "id": end, "ids": [2], "tokens": [end] },
            },
        });
        self.tokenizer(around)
    }

    /// T5's tokenizer: the file's pieces, then `num_extra` markers of gaps, numbered backwards; `end` behind every text.
    pub(super) fn t5(mut self, end: &str, num_extra: usize) -> Result<Tokenizer> {
        let end_id = self.pieces.iter().position(|(piece, _)| piece == end);
        let end_id = end_id.ok_or_else(|| Error::Invalid { path: self.path.clone(), reason: format!("has no token {end:?}") })?;
        self.pieces.extend((0..num_extra).rev().map(|index| (format!("<extra_id_{index}>"), 0.0)));
        let around = json!({
            "type": "TemplateProcessing",
            "single": [{ "Sequence": { "id": "A", "type_id": 0 } }, { "SpecialToken": { "id": end, "type_id": 0 } }],
            "pair": [],
            "special_tokens": { end: { "id": end, "ids": [end_id], "tokens": [end] } },
        });
        self.tokenizer(around)
    }

    fn tokenizer(self, post_processor: serde_json::Value) -> Result<Tokenizer> {
        let broken = |error: &dyn std::fmt::Display| not_a_tokenizer(&self.path, &error.to_string());
        let model = Unigram::from(self.pieces, Some(self.unk_id), self.byte_fallback).map_err(|error| broken(&error))?;
        let mut tokenizer = Tokenizer::new(model);
        if !self.charsmap.is_empty() {
            tokenizer.with_normalizer(Some(Precompiled::from(&self.charsmap).map_err(|error| broken(&error))?));
        }
        let prepend = if self.add_dummy_prefix { "always" } else { "never" };
        let words = json!({ "type": "Sequence", "pretokenizers": [
            { "type": "WhitespaceSplit" },
            { "type": "Metaspace", "replacement": "\u{2581}", "prepend_scheme": prepend, "split": true },
        ]});
        tokenizer.with_pre_tokenizer(Some(part::<PreTokenizerWrapper>(&self.path, words)?)).with_post_processor(Some(part::<
            PostProcessorWrapper,
        >(
            &self.path,
            post_processor,
        )?));
        Ok(tokenizer)
    }
}

/// Reads bytes as a model file, makes both kinds of tokenizers of it and runs them. Errors are the reader's.
pub(crate) fn fuzz(bytes: &[u8]) -> Result<(), String> {
    let parse = || SentencePiece::parse(Path::new("model"), bytes).map_err(|error| error.to_string());
    for tokenizer in [parse()?.xlm_roberta(["<s>", "<pad>", "</s>", "<unk>", "<mask>"]), parse()?.t5("</s>", 2)] {
        let _ = tokenizer.map_err(|error| error.to_string())?.encode("ab  \u{ff41}\u{3000}\u{7ea2} e\u{301} \u{1f600}", true);
    }
    Ok(())
}

fn part<T: DeserializeOwned>(path: &Path, description: serde_json::Value) -> Result<T> {
    serde_json::from_value(description).map_err(|error| not_a_tokenizer(path, &error.to_string()))
}

/// Checks that no text can lead the library, which trusts the table, out of its bounds. `None` if one could.
///
/// The table is the size in bytes of a double-array trie, its units (little-endian `u32`), then the replacements, each ended by a zero. A
/// unit holds the byte that leads to it, where its own branches begin, and whether a replacement ends there: darts-clone's layout.
fn check_charsmap(table: &[u8]) -> Option<()> {
    if table.is_empty() {
        return Some(());
    }
    let (size, rest) = table.split_first_chunk::<4>()?;
    let (units, replacements) = rest.split_at_checked(usize::try_from(u32::from_le_bytes(*size)).ok()?)?;
    let replacements = std::str::from_utf8(replacements).ok()?;
    let (units, odd) = units.as_chunks::<4>();
    if !odd.is_empty() {
        return None;
    }
    let units: Vec<usize> = units.iter().map(|unit| u32::from_le_bytes(*unit) as usize).collect();
    let branches = |unit: usize| (unit >> 10) << ((unit & (1 << 9)) >> 6);
    let (mut seen, mut open) = (vec![false; units.len()], vec![branches(*units.first()?)]);
    while let Some(base) = open.pop() {
        for byte in 1..=usize::from(u8::MAX) {
            let at = base ^ byte;
            let unit = *units.get(at)?;
            if unit & ((1 << 31) | 0xFF) != byte || std::mem::replace(&mut seen[at], true) {
                continue;
            }
            let next = at ^ branches(unit);
            if unit >> 8 & 1 == 1 && !replacements.is_char_boundary(units.get(next)? & ((1 << 31) - 1)) {
                return None;
            }
            open.push(next);
        }
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn piece(piece: &str, score: f32) -> PieceProto {
        PieceProto { piece: Some(piece.into()), score: Some(score) }
    }

    fn model(trainer: TrainerProto, normalizer: NormalizerProto) -> ModelProto {
        let pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("\u{2581}", -3.0), ("\u{2581}ab", -1.0), ("a", -2.0), ("b", -2.0)];
        let pieces = pieces.map(|(text, score)| piece(text, score)).into();
        ModelProto { pieces, trainer: Some(trainer), normalizer: Some(normalizer) }
    }

    fn read(bytes: &[u8]) -> Result<SentencePiece> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("some.model");
        std::fs::write(&path, bytes).unwrap();
        SentencePiece::read(&path)
    }

    #[test]
    fn ids_are_those_of_fairseq_for_xlm_r_and_those_of_the_file_for_t5() {
        let bytes = model(TrainerProto::default(), NormalizerProto::default()).encode_to_vec();
        let ids = |tokenizer: Tokenizer, text: &str| tokenizer.encode(text, true).unwrap().get_ids().to_vec();
        let xlm_roberta = || read(&bytes).unwrap().xlm_roberta(["<s>", "<pad>", "</s>", "<unk>", "<mask>"]).unwrap();
        assert_eq!(ids(xlm_roberta(), "ab  ba"), [0, 5, 4, 7, 6, 2]);
        assert_eq!(ids(xlm_roberta(), "x"), [0, 4, 3, 2]);
        assert_eq!(xlm_roberta().token_to_id("<mask>"), Some(8));
        assert_eq!(ids(read(&bytes).unwrap().t5("</s>", 2).unwrap(), "ab  ba"), [4, 3, 6, 5, 2]);
        assert_eq!(read(&bytes).unwrap().t5("</s>", 2).unwrap().token_to_id("<extra_id_0>"), Some(8));
        assert!(read(&bytes).unwrap().t5("<end>", 0).is_err());
    }

    #[test]
    fn what_cannot_be_run_is_named() {
        let refuse = |trainer, normalizer| read(&model(trainer, normalizer).encode_to_vec()).err().unwrap();
        let error = refuse(TrainerProto { model_type: Some(2), ..Default::default() }, NormalizerProto::default());
        assert!(matches!(error, Error::Unsupported { .. }) && error.to_string().contains("unigram"), "{error}");
        let kept = NormalizerProto { remove_extra_whitespaces: Some(false), ..Default::default() };
        assert!(matches!(refuse(TrainerProto::default(), kept), Error::Unsupported { .. }));
    }

    #[test]
    fn damaged_files_are_refused() {
        let refuse = |model: &ModelProto| read(&model.encode_to_vec()).err().unwrap().to_string();
        let good = model(TrainerProto::default(), NormalizerProto::default());
        let mut bytes = good.encode_to_vec();
        bytes.truncate(bytes.len() - 1);
        bytes[0] = 0xFF;
        assert!(read(&bytes).err().unwrap().to_string().contains("not a sentencepiece model"));
        assert!(refuse(&ModelProto { pieces: Vec::new(), ..good.clone() }).contains("0 pieces"));
        assert!(refuse(&ModelProto { pieces: vec![piece("a", f32::NAN)], ..good.clone() }).contains("piece 0"));
        assert!(refuse(&model(TrainerProto { unk_id: Some(7), ..Default::default() }, NormalizerProto::default())).contains("unknown"));
        // A trie of one unit whose branches lie beyond it; one cut short; a size beyond the end.
        for table in [&[4, 0, 0, 0, 0, 4, 0, 0][..], &[3, 0, 0, 0, 0, 0, 0], &[255; 8], &[1]] {
            let normalizer = NormalizerProto { precompiled_charsmap: Some(table.to_vec()), ..Default::default() };
            assert!(refuse(&model(TrainerProto::default(), normalizer)).contains("normaliser"), "{table:?}");
        }
    }
}
