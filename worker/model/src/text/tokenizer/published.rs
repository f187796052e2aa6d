//! The vocabulary of CLIP, which is part of this program: checkpoints that are one file bring none.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::Path;

use flate2::read::GzDecoder;

use super::parse_merges;
use crate::{Error, Result};

/// What the vocabulary is called in errors.
pub(super) const NAME: &str = "CLIP's vocabulary";
/// The tokens that begin and end a text: the last two of the vocabulary.
pub(super) const ENDS: [&str; 2] = ["<|startoftext|>", "<|endoftext|>"];

/// `merges.txt` of openai/clip-vit-large-patch14, compressed.
const MERGES: &[u8] = include_bytes!("../../../assets/clip_merges.txt.gz");
/// What marks a piece that ends a word.
const END_OF_WORD: &str = "</w>";

/// A vocabulary's ids by token, and the pairs that are merged, most urgent first.
pub(super) type BytePairs = (BTreeMap<String, u32>, Vec<[String; 2]>);

/// Returns CLIP's vocabulary. It follows from the merges: the bytes, the bytes that end a word, what each merge makes, and the two ends.
///
/// Errors: none but for a damaged program.
pub(super) fn clip() -> Result<BytePairs> {
    let path = Path::new(NAME);
    let mut text = String::new();
    GzDecoder::new(MERGES).read_to_string(&mut text).map_err(|source| Error::Io { path: path.into(), source })?;
    let merges = parse_merges(path, &text)?;
    let bytes = byte_letters().map(String::from);
    let word_ends = byte_letters().map(|letter| format!("{letter}{END_OF_WORD}"));
    let tokens = bytes.chain(word_ends).chain(merges.iter().map(|pair| pair.concat())).chain(ENDS.map(str::to_owned));
    Ok((tokens.zip(0..).collect(), merges))
}

/// The letters that stand for bytes, in the order of their ids: first the bytes that are visible in Latin-1, which stand for themselves.
fn byte_letters() -> impl Iterator<Item = char> {
    let is_visible = |byte: &u8| matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    let visible = (0..=u8::MAX).filter(is_visible).map(char::from);
    let num_others = (0..=u8::MAX).filter(move |byte| !is_visible(byte)).count() as u32;
    visible.chain((0..num_others).filter_map(|number| char::from_u32(0x100 + number)))
}
