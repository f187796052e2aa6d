"""Tokenizers and text encoders of the models' own kinds."""

import gzip
import json
import shutil
import tempfile
from pathlib import Path

import cn_clip.clip
import open_clip
import torch
from transformers import BertConfig, BertForMaskedLM, BertModel, BertTokenizer, CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from .common import CONTEXT_LENGTH, DEMO, DEMO_IN_CASE, EXACT, case, deep, randomised, save_as_half, wide
from .models import demo_texts
from .vocabularies import CAPTIONS, CHINESE_TEXTS, DIRTY_TEXTS, ENGLISH, TEXTS, straight, write_bert_vocabulary, write_clip_tokenizer

CHINESE_CLIP_LENGTH = 52


def tokenizer_case(tokenizer, kind, path, length):
    ids = tokenizer(TEXTS, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
    return {}, {"ids": ids}, {"kind": kind, "tokenizer": path, "length": length, "texts": TEXTS}


@case("tokenizer_clip", run="tokenizer", tolerance=0, why=EXACT)
def tokenizer_clip(folder):
    """The demo's second CLIP tokenizer, from tokenizer.json: pads with "!", whose id lies above the end of text."""
    tokenizer = CLIPTokenizer.from_pretrained(DEMO, subfolder="tokenizer_2")
    return tokenizer_case(tokenizer, "clip", f"{DEMO_IN_CASE}/tokenizer_2", CONTEXT_LENGTH)


@case("tokenizer_clip_files", run="tokenizer", tolerance=0, why=EXACT)
def tokenizer_clip_files(folder):
    """A CLIP tokenizer as SDXL ships it: vocab.json and merges.txt only, special tokens as objects, padding with "!" of id 0."""
    write_clip_tokenizer(folder, "!", 77)
    return tokenizer_case(CLIPTokenizer.from_pretrained(folder), "clip", ".", 77)


def added(content, **flags):
    """A token beside the vocabulary as tokenizer_config.json lists it."""
    return {"content": content, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False, "special": False, **flags}


ADDED_TEXTS = ["", "a <cat>two <CAT>", "red <Dog> circle<Dog>", "red <dog> circle", "stars star star! a_star", "红色 <新词> 的<新词>圆", "red! [unused1] [PAD]"]


def added_case(tokenizer, kind):
    ids = tokenizer(ADDED_TEXTS, padding="max_length", max_length=24, truncation=True, return_tensors="pt").input_ids
    return {}, {"ids": ids}, {"kind": kind, "tokenizer": ".", "length": 24, "texts": ADDED_TEXTS}


@case("tokenizer_clip_added", run="tokenizer", tolerance=0, why=EXACT)
def tokenizer_clip_added(folder):
    """A CLIP tokenizer with tokens behind its vocabulary, each matched in a way of its own, and a map of special tokens that no longer counts."""
    size = write_clip_tokenizer(folder, "!", 77)
    path = folder / "tokenizer_config.json"
    ends = [added(content, normalized=False, special=True) for content in ["<|startoftext|>", "<|endoftext|>"]]
    new = [added("<cat>"), added("<Dog>", lstrip=True, rstrip=True, normalized=False), added("star", single_word=True)]
    vocabulary = json.loads((folder / "vocab.json").read_text("utf-8"))
    decoder = {vocabulary["!"]: added("!", special=True, normalized=False), **dict(enumerate(ends + new, size - 2))}
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), "added_tokens_decoder": decoder}), "utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps({"pad_token": "<|endoftext|>"}), "utf-8")
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    assert tokenizer.convert_tokens_to_ids("star") == size + 2 and tokenizer.pad_token == "!"
    return added_case(tokenizer, "clip")


@case("tokenizer_bert_added", run="tokenizer", tolerance=0, why=EXACT)
def tokenizer_bert_added(folder):
    """A BERT tokenizer as older versions write it: tokens behind the vocabulary in a file of their own, and a map of special tokens."""
    size = write_bert_vocabulary(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({"pad_token": "[PAD]"}), "utf-8")
    (folder / "added_tokens.json").write_text(json.dumps({"<Dog>": size + 1, "<新词>": size, "<cat>": size + 2}, ensure_ascii=False), "utf-8")
    special = {"pad_token": "[unused1]", "cls_token": {**added("[CLS]"), "normalized": False}, "extra_special_tokens": ["<Dog>"]}
    (folder / "special_tokens_map.json").write_text(json.dumps(special), "utf-8")
    tokenizer = BertTokenizer.from_pretrained(folder)
    assert tokenizer.pad_token_id == 1 and tokenizer.convert_tokens_to_ids("<Dog>") == size + 1
    return added_case(tokenizer, "bert")


@case("tokenizer_bert", run="tokenizer", tolerance=0, why=EXACT)
def tokenizer_bert(folder):
    """A BERT tokenizer from vocab.txt alone, uncased, with pieces of several scripts."""
    write_bert_vocabulary(folder)
    return tokenizer_case(BertTokenizer.from_pretrained(folder), "bert", ".", 52)


@case("tokenizer_clip_published", run="tokenizer_published", tolerance=0, why=EXACT)
def tokenizer_clip_published(folder):
    """The vocabulary all CLIP models are published with, which the program carries; padded as the first and as the second encoder of SDXL are."""
    lines = gzip.open(open_clip.tokenizer.default_bpe()).read().decode("utf-8").split("\n")
    # The file goes on; the published models have as many merges as make up a vocabulary of 49,408.
    merges = lines[1 : 49152 - 256 - 2 + 1]
    letters = list(bytes_to_unicode().values())
    words = letters + [letter + "</w>" for letter in letters] + [line.replace(" ", "") for line in merges] + ["<|startoftext|>", "<|endoftext|>"]
    assert len(words) == 49408
    texts, outputs = TEXTS + DIRTY_TEXTS + CAPTIONS + ENGLISH, {}
    with tempfile.TemporaryDirectory() as vocabulary:
        Path(vocabulary, "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(words)}), "utf-8")
        Path(vocabulary, "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", "utf-8")
        for pad, token in [(49407, "<|endoftext|>"), (0, "!")]:
            tokenizer = CLIPTokenizer.from_pretrained(vocabulary, pad_token=token)
            ids = tokenizer(texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
            assert ids[texts.index("")].tolist() == [49406, 49407] + [pad] * 75
            outputs[f"ids.{pad}"] = ids
    # open_clip cleans texts first, which must change nothing in plain ones.
    plain = ENGLISH + ["unaffable running", "1/2 don't they've"]
    theirs = open_clip.tokenizer.SimpleTokenizer()(plain)
    assert torch.equal(theirs, tokenizer(plain, padding="max_length", max_length=77, return_tensors="pt").input_ids)
    return {}, outputs, {"pads": [49407, 0], "length": 77, "texts": texts}


# Where cn_clip and transformers part: words above 100 letters (one cuts them, one does not know them), special tokens written out in a text.
DISPUTED = ["x" * 150, "[CLS] literal [SEP] [PAD] [UNK] [MASK]"]


def write_chinese_vocabulary(folder):
    """Writes the real vocabulary of the Chinese BERT, which Chinese-CLIP uses."""
    shutil.copy(Path(cn_clip.clip.__file__).parent / "vocab.txt", folder)


def chinese_clip_ids(folder, texts):
    """Ids by the library of Chinese-CLIP's authors; transformers must agree."""
    ids = cn_clip.clip.tokenize(texts, context_length=CHINESE_CLIP_LENGTH)
    other = BertTokenizer.from_pretrained(folder)(texts, padding="max_length", max_length=CHINESE_CLIP_LENGTH, truncation=True, return_tensors="pt")
    assert torch.equal(ids, other.input_ids)
    assert ids[texts.index("")].tolist() == [101, 102] + [0] * (CHINESE_CLIP_LENGTH - 2)
    return ids


def chinese_texts():
    return [text for text in TEXTS + DIRTY_TEXTS + CAPTIONS + CHINESE_TEXTS if text not in DISPUTED]


@case("tokenizer_chinese_clip", run="tokenizer", tolerance=0, why=EXACT)
def tokenizer_chinese_clip(folder):
    """Chinese-CLIP's tokenizer with its real vocabulary."""
    write_chinese_vocabulary(folder)
    texts = chinese_texts()
    return {}, {"ids": chinese_clip_ids(folder, texts)}, {"kind": "bert", "tokenizer": ".", "length": CHINESE_CLIP_LENGTH, "texts": texts}


@case("student_chinese_clip_ids", run="student_ids", tolerance=0, why=EXACT)
def student_chinese_clip_ids(folder):
    """The same through a student's encoder that straightens curly quotes, as Chinese-CLIP was trained."""
    write_chinese_vocabulary(folder)
    sizes = {"hidden_size": 2, "intermediate_size": 2, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = BertConfig(vocab_size=21128, max_position_embeddings=CHINESE_CLIP_LENGTH, **sizes)
    randomised(BertModel(config, add_pooling_layer=False), 63).half().save_pretrained(folder)
    texts = chinese_texts()
    settings = {"student": ".", "context_length": CHINESE_CLIP_LENGTH, "normalize_quotes": True, "texts": texts}
    return {}, {"ids": chinese_clip_ids(folder, straight(texts))}, settings


def run_clip(model, ids):
    with torch.no_grad():
        output = model(ids, output_hidden_states=True)
    pooled = output.text_embeds if hasattr(output, "text_embeds") else output.pooler_output
    return {"penultimate": output.hidden_states[-2], "last": output.last_hidden_state, "pooled": pooled}


@case("clip_text_like_big_g", run="clip_text", tolerance=1e-4)
def clip_text_like_big_g(folder):
    """A random encoder configured as SDXL's second: exact GELU, a projection, and the end of text found as the highest id (eos_token_id 2)."""
    config = CLIPTextConfig(
        vocab_size=60,
        hidden_size=wide(16),
        intermediate_size=wide(40),
        num_hidden_layers=deep(3),
        num_attention_heads=wide(4),
        max_position_embeddings=12,
        hidden_act="gelu",
        projection_dim=wide(10),
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=1,
    )
    model = save_as_half(randomised(CLIPTextModelWithProjection(config), 60), folder / "model")
    ids = torch.tensor([[58, 5, 2, 33, 59, 0, 0, 0, 0], [58, 59, 0, 0, 0, 0, 0, 0, 0], [58, 7, 8, 9, 10, 11, 2, 13, 59]])
    return {"ids": ids}, run_clip(model, ids), {"model": "model"}


@case("clip_text_like_l", run="clip_text", tolerance=1e-4)
def clip_text_like_l(folder):
    """A random encoder configured as CLIP-L: quick GELU, no projection, the first end of text counts though padding has a higher id."""
    config = CLIPTextConfig(
        vocab_size=60,
        hidden_size=wide(16),
        intermediate_size=wide(40),
        num_hidden_layers=deep(2),
        num_attention_heads=2,
        max_position_embeddings=12,
        hidden_act="quick_gelu",
        bos_token_id=57,
        eos_token_id=58,
        pad_token_id=59,
    )
    model = save_as_half(randomised(CLIPTextModel(config), 61), folder / "model")
    ids = torch.tensor([[57, 5, 33, 58, 59, 59], [57, 58, 59, 59, 59, 59], [57, 7, 8, 9, 10, 58], [57, 3, 58, 58, 58, 58]])
    return {"ids": ids}, run_clip(model, ids), {"model": "model"}


@case("bert_text_of_task_model", run="bert_text", tolerance=1e-4)
def bert_text_of_task_model(folder):
    """A random BERT under the prefix of a masked language model, with its head; rows padded to different lengths."""
    config = BertConfig(
        vocab_size=50,
        hidden_size=wide(16),
        intermediate_size=wide(40),
        num_hidden_layers=deep(3),
        num_attention_heads=wide(4),
        max_position_embeddings=12,
        type_vocab_size=2,
    )
    model = save_as_half(randomised(BertForMaskedLM(config), 62), folder / "model")
    ids = torch.tensor([[1, 5, 33, 2, 0, 0, 0], [1, 2, 0, 0, 0, 0, 0], [1, 7, 8, 9, 10, 11, 2]])
    with torch.no_grad():
        last = model.bert(ids, attention_mask=(ids != 0).long())[0]
    return {"ids": ids}, {"last": last}, {"model": "model", "pad_id": 0}


PROMPTS = {
    "english": ["a big red circle on a white background", "", "two blue stars! " * 5],
    "captions": ["白色背景上的大红色圆形", "", "蓝色的星形，unknown 词" * 5],
}


@case("prompts_demo", run="prompts", tolerance=1e-4)
def prompts_demo(folder):
    """What the demo's encoders say about prompts, with the empty one and others that are too long."""
    with torch.no_grad():
        student, teacher = demo_texts()
        pooled, sequence = teacher(PROMPTS["english"])
        outputs = {"english.sequence": sequence, "english.pooled": pooled, "student": student(PROMPTS["captions"])[0]}
    settings = {"model": DEMO_IN_CASE, "student": f"{DEMO_IN_CASE}/text_encoder_zh", "context_length": CONTEXT_LENGTH, **PROMPTS}
    return {}, outputs, settings
