//! Ids are compared with those of transformers by the golden cases; here are the rules that hold for any vocabulary.

use std::path::PathBuf;

use super::*;

const TEXTS: [&str; 7] = [
    "",
    "a big red circle on a white background",
    "A BIG Red circle!!",
    "don't 12345  mixed 红色 😀 ｆｕｌｌ cafe\u{301}",
    "<|startoftext|> inside <|endoftext|> text",
    "tab\tnew\nline\u{3000}wide",
    "[CLS] literal [SEP] 圆形",
];

fn demo(folder: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/demo/model").join(folder)
}

/// A copy of `files` of a demo folder.
fn copy_of(folder: &str, files: &[&str]) -> tempfile::TempDir {
    let copy = tempfile::tempdir().unwrap();
    for file in files {
        std::fs::copy(demo(folder).join(file), copy.path().join(file)).unwrap();
    }
    copy
}

#[test]
fn vocabulary_files_alone_give_the_same_ids_as_tokenizer_json() {
    for folder in ["tokenizer", "tokenizer_2"] {
        let whole = TextTokenizer::clip(&demo(folder), 77).unwrap();
        let copy = copy_of(folder, &["vocab.json", "merges.txt", "tokenizer_config.json"]);
        let parts = TextTokenizer::clip(copy.path(), 77).unwrap();
        assert_eq!((whole.length(), whole.pad_id()), (24, parts.pad_id()));
        assert_eq!(whole.encode(&TEXTS).unwrap(), parts.encode(&TEXTS).unwrap(), "{folder}");
    }
}

/// The ids are those of open_clip 3.3.0 (`SimpleTokenizer().encode`), whose texts are free of what its cleaning or NFC would change.
const PUBLISHED: [(&str, &[i64]); 4] = [
    ("a photograph of an astronaut riding a horse", &[320, 8853, 539, 550, 18376, 6765, 320, 4558]),
    ("A BIG Red circle!!", &[320, 1205, 736, 7117, 748]),
    ("don't 12345 mixed 红色 😀 café", &[847, 713, 272, 273, 274, 275, 276, 6780, 163, 118, 95, 164, 231, 366, 7334, 15304]),
    ("wow !", &[2781, 256]),
];

#[test]
fn published_vocabulary_gives_the_published_ids() {
    let tokenizer = TextTokenizer::clip_published(49407, 77).unwrap();
    for (text, words) in PUBLISHED {
        let ids = [&[49406], words, &[49407]].concat().into_iter().chain(std::iter::repeat(49407)).take(77).collect::<Vec<_>>();
        assert_eq!(tokenizer.encode(&[text]).unwrap()[0], ids, "{text}");
    }
    // To bigG's tokenizer the exclamation mark is the pad, wherever it stands.
    let big_g = TextTokenizer::clip_published(0, 7).unwrap();
    assert_eq!(big_g.encode(&["wow!!"]).unwrap()[0], [49406, 2781, 0, 0, 49407, 0, 0]);
    assert!(TextTokenizer::clip_published(49408, 77).err().unwrap().to_string().contains("no token of id 49408"));
    assert!(TextTokenizer::clip_published(0, 2).is_err());
}

#[test]
fn empty_texts_of_the_published_tokenizers_are_start_end_and_padding() {
    for (pad, expected) in [(49407, [49406, 49407, 49407, 49407]), (0, [49406, 49407, 0, 0])] {
        let tokenizer = TextTokenizer::clip_published(pad, 77).unwrap();
        let ids = &tokenizer.encode(&[""]).unwrap()[0];
        assert_eq!((ids.len(), &ids[..4], tokenizer.pad_id()), (77, &expected[..], pad));
        assert!(ids[2..].iter().all(|&id| id == pad));
    }
}

#[test]
fn every_text_starts_ends_and_is_filled_up() {
    let clip = TextTokenizer::clip(&demo("tokenizer"), 77).unwrap();
    let bert = TextTokenizer::bert(&demo("text_encoder_zh"), 24).unwrap();
    for (tokenizer, start, end) in [(clip, 124, 125), (bert, 2, 3)] {
        assert_eq!(tokenizer.end_id(), Some(end));
        for ids in tokenizer.encode(&TEXTS).unwrap() {
            assert_eq!((ids.len(), ids[0]), (24, start));
            let end_at = ids.iter().position(|&id| id == end).unwrap();
            // A literal end in the text is followed by more text.
            let rest = &ids[end_at + 1..];
            assert!(rest.iter().all(|&id| id == tokenizer.pad_id()) || rest.contains(&end));
        }
        let empty = &tokenizer.encode(&[""]).unwrap()[0];
        assert_eq!(empty[..2], [start, end]);
        assert_eq!(empty[2..], [tokenizer.pad_id(); 22]);
        assert_eq!(tokenizer.encode(&["圆 circle ".repeat(30)]).unwrap()[0][23], end);
    }
}

#[test]
fn a_pad_token_in_the_text_is_the_pad_id() {
    let tokenizer = TextTokenizer::clip(&demo("tokenizer_2"), 77).unwrap();
    assert_eq!(tokenizer.pad_id(), 126);
    let ids = &tokenizer.encode(&["circle! circle"]).unwrap()[0];
    assert_eq!(ids[2], 126);
    assert_eq!((ids[1], ids[4]), (ids[3], 125));
}

#[test]
fn the_encoder_bounds_a_tokenizer_without_a_limit() {
    let copy = copy_of("tokenizer", &["vocab.json", "merges.txt"]);
    let config = r#"{"model_max_length": 1000000000000000019884624838656, "pad_token": {"content": "<|endoftext|>", "normalized": true}}"#;
    std::fs::write(copy.path().join("tokenizer_config.json"), config).unwrap();
    let tokenizer = TextTokenizer::clip(copy.path(), 10).unwrap();
    assert_eq!((tokenizer.length(), tokenizer.pad_id()), (10, 125));
}

#[test]
fn bert_isolates_chinese_characters_and_lowers_case_unless_told_otherwise() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("vocab.txt"), "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n红\n色\ncafe\n##s\nCafe\n").unwrap();
    let encode = |text: &str| TextTokenizer::bert(dir.path(), 8).unwrap().encode(&[text]).unwrap().remove(0);
    assert_eq!(encode("Cafés红色"), [2, 7, 8, 5, 6, 3, 0, 0]);
    assert_eq!(encode("red"), [2, 1, 3, 0, 0, 0, 0, 0]);
    std::fs::write(dir.path().join("tokenizer_config.json"), r#"{"do_lower_case": false}"#).unwrap();
    assert_eq!(encode("Cafes红"), [2, 9, 8, 5, 3, 0, 0, 0]);
}

/// A folder of BERT's vocabulary and the given files, and the ids that a tokenizer of the usual kind makes of a word.
fn open_bert(files: &[(&str, &str)]) -> Result<Vec<i64>> {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("vocab.txt"), "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\ncafe\n").unwrap();
    for (name, content) in files {
        std::fs::write(dir.path().join(name), content).unwrap();
    }
    TextTokenizer::open(dir.path(), TokenizerKind::Bert, 4)?.encode(&["Cafe"]).map(|mut ids| ids.remove(0))
}

#[test]
fn tokenizers_of_unknown_classes_are_refused_without_tokenizer_json() {
    let ids = [2, 5, 3, 0];
    let (own, models) = ("tokenizer_config.json", "config.json");
    for files in [
        &[][..],
        &[(own, r#"{"do_lower_case": true}"#), (models, r#"{"model_type": "bert"}"#)],
        &[(own, r#"{"tokenizer_class": "BertTokenizerFast", "word_tokenizer_type": "basic"}"#)],
        &[(own, r#"{"tokenizer_class": "ElectraTokenizer"}"#)],
        &[(models, r#"{"tokenizer_class": "BertTokenizer"}"#)],
        // What the tokenizer says of itself comes first.
        &[(own, r#"{"tokenizer_class": "BertTokenizer"}"#), (models, r#"{"tokenizer_class": "BertJapaneseTokenizer"}"#)],
        &[(models, r#"{"tokenizer_class": null, "text_config": {"tokenizer_class": "BertTokenizer"}}"#)],
    ] {
        assert_eq!(open_bert(files).unwrap(), ids, "{files:?}");
    }
    for (name, content, named) in [
        (own, r#"{"tokenizer_class": "BertJapaneseTokenizer"}"#, "BertJapaneseTokenizer"),
        (own, r#"{"tokenizer_class": "PreTrainedTokenizerFast"}"#, "PreTrainedTokenizerFast"),
        (own, r#"{"tokenizer_class": "BertTokenizer", "word_tokenizer_type": "mecab"}"#, "word_tokenizer_type \"mecab\""),
        (models, r#"{"tokenizer_class": "BertJapaneseTokenizer"}"#, "BertJapaneseTokenizer"),
        (models, r#"{"text_config": {"tokenizer_class": "AlbertTokenizer"}}"#, "AlbertTokenizer"),
    ] {
        let error = open_bert(&[(name, content)]).unwrap_err();
        let text = error.to_string();
        assert!(matches!(error, Error::Unsupported { .. }) && text.contains(named) && text.contains("to a tokenizer.json"), "{text}");
    }
}

#[test]
fn the_map_of_special_tokens_counts_unless_the_added_tokens_are_listed() {
    let own = |settings: &'static str| ("tokenizer_config.json", settings);
    let map = ("special_tokens_map.json", r#"{"pad_token": {"content": "[MASK]", "lstrip": false}, "unk_token": "[UNK]"}"#);
    let listed = r#"{"pad_token": "[PAD]", "added_tokens_decoder": {"0": {"content": "[PAD]", "special": true}}}"#;
    for (files, pad) in [
        (&[map][..], 4),
        (&[own(r#"{"pad_token": "[PAD]"}"#), map], 4),
        (&[own(r#"{"pad_token": "[UNK]"}"#), ("special_tokens_map.json", r#"{"pad_token": null}"#)], 1),
        (&[own(listed), map], 0),
    ] {
        assert_eq!(open_bert(files).unwrap(), [2, 5, 3, pad], "{files:?}");
    }
    // An added token is looked for in the text as BERT writes it, in lower case, unless either file calls it special.
    let added = ("added_tokens.json", r#"{"CAFE": 6}"#);
    let special = r#"{"additional_special_tokens": ["CAFE"]}"#;
    let others = ("special_tokens_map.json", r#"{"additional_special_tokens": ["a"], "extra_special_tokens": {"mark": "b"}}"#);
    for (files, id) in [
        (&[added][..], 6),
        (&[added, others], 6),
        (&[added, others, own(special)], 5),
        (&[added, ("special_tokens_map.json", special)], 5),
        (&[added, ("special_tokens_map.json", r#"{"extra_special_tokens": ["CAFE"]}"#)], 5),
    ] {
        assert_eq!(open_bert(files).unwrap(), [2, id, 3, 0], "{files:?}");
    }
}

#[test]
fn added_tokens_that_would_get_other_ids_are_refused() {
    let own = "tokenizer_config.json";
    for (name, content, wanted, other) in [
        ("added_tokens.json", r#"{"<cat>": 7}"#, "\"<cat>\" is 7", "would be 6"),
        ("added_tokens.json", r#"{"cafe": 6}"#, "\"cafe\" is 6", "would be 5"),
        (own, r#"{"added_tokens_decoder": {"6": {"content": "<cat>"}, "8": {"content": "<dog>"}}}"#, "\"<dog>\" is 8", "would be 7"),
        (own, r#"{"added_tokens_decoder": {"6": {"content": ""}}}"#, "\"\" is 6", "would be none"),
    ] {
        let error = open_bert(&[(name, content)]).unwrap_err().to_string();
        assert!(error.contains(wanted) && error.contains("a vocabulary of 6 tokens") && error.contains(other), "{error}");
    }
    let error = open_bert(&[(own, r#"{"added_tokens_decoder": {"six": {"content": "a"}}}"#)]).unwrap_err().to_string();
    assert!(error.contains(own), "{error}");
}

#[test]
fn a_sketch_covers_the_added_tokens() {
    let dir = copy_of("tokenizer", &["vocab.json", "merges.txt", "tokenizer_config.json"]);
    let sketch = || {
        let mut pieces = Vec::new();
        super::sketch(dir.path(), &mut |piece| pieces.push(piece.to_vec())).unwrap();
        pieces
    };
    let mut before = sketch();
    for file in ["added_tokens.json", "special_tokens_map.json"] {
        std::fs::write(dir.path().join(file), "{}").unwrap();
        let after = sketch();
        assert_ne!(before, after, "{file}");
        before = after;
    }
}

#[test]
fn a_tokenizer_json_is_read_whatever_its_class() {
    let dir = copy_of("tokenizer", &["tokenizer.json"]);
    let of = |config: &str| {
        std::fs::write(dir.path().join("tokenizer_config.json"), config).unwrap();
        TextTokenizer::open(dir.path(), TokenizerKind::Clip, 24).unwrap().encode(&TEXTS).unwrap()
    };
    assert_eq!(of(r#"{"tokenizer_class": "PreTrainedTokenizerFast"}"#), of(r#"{"tokenizer_class": "CLIPTokenizer"}"#));
}

#[test]
fn broken_folders_are_refused_by_file_name() {
    let refuse = |files: &[(&str, &str)], clip: bool, length: usize| {
        let dir = tempfile::tempdir().unwrap();
        for (name, content) in files {
            std::fs::write(dir.path().join(name), content).unwrap();
        }
        let result = if clip { TextTokenizer::clip(dir.path(), length) } else { TextTokenizer::bert(dir.path(), length) };
        result.err().unwrap().to_string()
    };
    let vocab = r#"{"<|startoftext|>": 0, "<|endoftext|>": 1, "a": 2, "b": 3}"#;
    assert!(refuse(&[], true, 8).contains("vocab.json"));
    assert!(refuse(&[("vocab.json", vocab)], true, 8).contains("merges.txt"));
    assert!(refuse(&[("vocab.json", "{}"), ("merges.txt", "")], true, 8).contains("<|startoftext|>"));
    assert!(refuse(&[("vocab.json", vocab), ("merges.txt", "#version: 0.2\nab\n")], true, 8).contains("line 2 is not a pair"));
    assert!(refuse(&[("vocab.json", vocab), ("merges.txt", "a c\n")], true, 8).contains("not a tokenizer"));
    assert!(refuse(&[("vocab.json", vocab), ("merges.txt", "")], true, 2).contains("no room for text"));
    assert!(refuse(&[("tokenizer.json", "{")], true, 8).contains("tokenizer.json"));
    assert!(refuse(&[("tokenizer_config.json", "[")], false, 8).contains("tokenizer_config.json"));
    assert!(refuse(&[("vocab.txt", "[PAD]\n[UNK]\n[CLS]\n")], false, 8).contains("[SEP]"));
}
