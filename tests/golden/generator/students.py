"""Encoders of the student's language, in the layouts they are published in."""

import json

import open_clip
import sentencepiece
import torch
from open_clip.hf_model import HFTextEncoder
from safetensors.torch import load_file, save_file
from transformers import (
    AltCLIPConfig,
    AltCLIPModel,
    BertTokenizer,
    ChineseCLIPConfig,
    ChineseCLIPModel,
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
    MT5Config,
    MT5Model,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaTokenizer,
    XLMRobertaConfig,
    XLMRobertaModel,
    XLMRobertaTokenizer,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

from .common import EXACT, case, deep, frozen, randomised, save_as_half, wide
from .vocabularies import DIRTY_TEXTS, TEXTS, straight, write_bert_vocabulary, write_clip_vocabulary, write_sentencepiece, write_xlm_roberta_vocabulary

STUDENT_LENGTH = 24


def sizes():
    return {"hidden_size": wide(16), "intermediate_size": wide(40), "num_hidden_layers": deep(2), "num_attention_heads": 2}


def vision():
    return {**sizes(), "num_hidden_layers": 1, "image_size": 4, "patch_size": 2}


def padded_ids(tokenizer, texts, length=STUDENT_LENGTH):
    return tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids


def student_folder(folder, name="student"):
    (folder / name).mkdir()
    return folder / name


def student_case(states, texts=TEXTS, length=STUDENT_LENGTH, normalize_quotes=False):
    return {}, {"states": states}, {"student": "student", "context_length": length, "normalize_quotes": normalize_quotes, "texts": texts}


def small_xlm_roberta(vocabulary, **options):
    return XLMRobertaConfig(vocab_size=vocabulary, max_position_embeddings=30, type_vocab_size=1, layer_norm_eps=1e-5, **sizes(), **options)


def without_pads(model, ids, pad):
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=(ids != pad).long())[0]


@case("student_xlm_roberta", run="student", tolerance=1e-4)
def student_xlm_roberta(folder):
    """A random XLM-R with a sentencepiece file: positions from behind the pad id, ids behind fairseq's special tokens."""
    student = student_folder(folder)
    config = small_xlm_roberta(write_xlm_roberta_vocabulary(student))
    model = save_as_half(randomised(XLMRobertaModel(config, add_pooling_layer=False), 200), student)
    return student_case(without_pads(model, padded_ids(XLMRobertaTokenizer.from_pretrained(student), TEXTS), 1))


@case("student_xlm_roberta_ids", run="tokenizer", tolerance=0, why=EXACT)
def student_xlm_roberta_ids(folder):
    """The ids that case student_xlm_roberta computes with, longer."""
    student = student_folder(folder)
    write_xlm_roberta_vocabulary(student)
    ids = padded_ids(XLMRobertaTokenizer.from_pretrained(student), TEXTS, 77)
    return {}, {"ids": ids}, {"kind": "xlm_roberta", "tokenizer": "student", "length": 77, "texts": TEXTS}


@case("student_open_clip", run="student", tolerance=1e-4)
def student_open_clip(folder):
    """A random XLM-R tower of open_clip: cleaned texts, its prefix and its neighbours in the file, all tokens unprojected."""
    student = student_folder(folder)
    config = small_xlm_roberta(write_xlm_roberta_vocabulary(student))
    tower = randomised(HFTextEncoder("xlm-roberta-tiny", 12, config=config, proj_type="mlp", output_tokens=True), 201).half()
    weights = {f"text.{key}": value for key, value in tower.state_dict().items()}
    weights |= {"visual.proj": torch.zeros(2, 2).half(), "logit_scale": torch.ones(1).half()}
    save_file(weights, student / "open_clip_model.safetensors")
    (student / "config.json").write_text(config.to_json_string(), "utf-8")
    text = {"hf_model_name": "xlm-roberta-tiny", "hf_pooler_type": "mean_pooler"}
    (student / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"embed_dim": 12, "text_cfg": text}}), "utf-8")
    texts = TEXTS + DIRTY_TEXTS
    ids = open_clip.tokenizer.HFTokenizer(str(student), context_length=STUDENT_LENGTH, clean="whitespace")(texts)
    with torch.no_grad():
        _, tokens = frozen(tower.float())(ids)
    return student_case(tokens, texts)


@case("student_alt_clip", run="student", tolerance=1e-4)
def student_alt_clip(folder):
    """A random AltCLIP as FlagAI runs it: tokens projected without pre_LN; a pad written out in a text is attended to."""
    student = student_folder(folder)
    vocabulary = write_xlm_roberta_vocabulary(student, normalization_rule_name="identity")
    text = {**sizes(), "vocab_size": vocabulary, "max_position_embeddings": 30, "project_dim": wide(12)}
    images = {**vision(), "hidden_size": wide(12), "projection_dim": wide(12)}
    config = AltCLIPConfig(text_config=text, vision_config=images, projection_dim=wide(12))
    model = save_as_half(randomised(AltCLIPModel(config), 202), student).text_model
    texts = TEXTS + ["red <pad> circle"]
    tokens = XLMRobertaTokenizer.from_pretrained(student)(texts, padding="max_length", max_length=STUDENT_LENGTH, truncation=True, return_tensors="pt")
    with torch.no_grad():
        last = model.roberta(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)[0]
        return student_case(model.transformation(last), texts)


@case("student_mt5", run="student", tolerance=1e-4)
def student_mt5(folder):
    """A random mT5 with its decoder in the file; rows so long that all buckets of distances occur; bytes for unknown characters."""
    student, length = student_folder(folder), 150
    ids_of = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, "byte_fallback": True, "character_coverage": 0.98, "vocab_size": 500}
    vocabulary = write_sentencepiece(student / "spiece.model", **ids_of)
    widths = {"d_model": wide(16), "d_kv": wide(6), "d_ff": wide(40), "num_layers": deep(2), "num_decoder_layers": 1, "num_heads": 2}
    model = randomised(MT5Model(MT5Config(vocab_size=vocabulary + 12, **widths)), 203)
    model = save_as_half(model, student).encoder
    processor = sentencepiece.SentencePieceProcessor(model_file=str(student / "spiece.model"))
    rows = [processor.encode(text)[: length - 1] + [1] for text in TEXTS]
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    return student_case(without_pads(model, ids, 0), length=length)


def small_chinese_clip(folder, seed, positions=30, vocabulary=TEXTS):
    """A random Chinese-CLIP and its vocabulary, saved to `folder` in transformers' layout."""
    text = {**sizes(), "vocab_size": write_bert_vocabulary(folder, vocabulary), "max_position_embeddings": positions}
    config = ChineseCLIPConfig(text_config=text, vision_config={**vision(), "projection_dim": wide(12)}, projection_dim=wide(12))
    model = save_as_half(randomised(ChineseCLIPModel(config), seed), folder)
    # transformers 5 clears the pad's row on loading; its older versions and the authors' library take it as it is in the file.
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    return model


def chinese_states(model, folder, texts, length=STUDENT_LENGTH):
    return without_pads(model.text_model, padded_ids(BertTokenizer.from_pretrained(folder), texts, length), 0)


@case("student_chinese_clip", run="student", tolerance=1e-4)
def student_chinese_clip(folder):
    """A random Chinese-CLIP in transformers' layout: token states without the projection, curly quotes straightened."""
    student = student_folder(folder)
    states = chinese_states(small_chinese_clip(student, 204), student, straight(TEXTS))
    return student_case(states, normalize_quotes=True)


def as_authors_file(student, projection):
    """Turns a Chinese-CLIP in transformers' layout into its authors', whose keys begin with module.bert."""
    saved = load_file(student / "model.safetensors")
    text = {f"module.bert.{key.removeprefix('text_model.')}": value for key, value in saved.items() if key.startswith("text_model.")}
    others = {
        "module.text_projection": projection.half(),
        "module.logit_scale": torch.ones(1).half(),
        "module.visual.proj": torch.zeros(2).half(),
    }
    checkpoint = {"epoch": 15, "step": 1, "name": "small", "state_dict": text | others}
    torch.save(checkpoint, student / "clip_cn_small.pt")
    config = json.loads((student / "config.json").read_text("utf-8"))
    (student / "config.json").write_text(json.dumps(config["text_config"]), "utf-8")
    (student / "model.safetensors").unlink()


@case("student_chinese_clip_authors", run="student", tolerance=1e-4)
def student_chinese_clip_authors(folder):
    """The same in the layout of Chinese-CLIP's authors, whose keys begin with module.bert; curly quotes are unknown tokens."""
    student = student_folder(folder)
    states = chinese_states(small_chinese_clip(student, 205), student, TEXTS)
    as_authors_file(student, torch.zeros(wide(16), wide(12)))
    return student_case(states)


def projected(result):
    inputs, outputs, settings = result
    return inputs, outputs, {**settings, "project": True}


@case("student_chinese_clip_projected", run="student", tolerance=1e-4)
def student_chinese_clip_projected(folder):
    """Every token state of a random Chinese-CLIP times the projection that is otherwise for the whole text's."""
    student = student_folder(folder)
    model = small_chinese_clip(student, 410)
    return projected(student_case(model.text_projection(chinese_states(model, student, TEXTS))))


@case("student_chinese_clip_authors_projected", run="student", tolerance=1e-4)
def student_chinese_clip_authors_projected(folder):
    """The same in the layout of Chinese-CLIP's authors, who store the projection the other way round; quotes straightened."""
    student = student_folder(folder)
    model = small_chinese_clip(student, 411)
    states = chinese_states(model, student, straight(TEXTS))
    projection = model.text_projection.weight.T.contiguous()
    as_authors_file(student, projection)
    return projected(student_case(states @ projection, normalize_quotes=True))


@case("student_roberta", run="student", tolerance=1e-4)
def student_roberta(folder):
    """A random RoBERTa under the prefix of a masked language model, with byte pairs from vocab.json and merges.txt."""
    student = student_folder(folder)
    letters = list(bytes_to_unicode().values())
    merges = [pair.split() for pair in "t h,th e,i n,r e,Ġ w,o r,Ġw or,Ġwor d,re d,Ġ c,Ġ re,Ġre d,Ġ Ġ".split(",")]
    vocabulary = ["<s>", "<pad>", "</s>", "<unk>"] + letters + ["".join(pair) for pair in merges] + ["<mask>"]
    (student / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(vocabulary)}, ensure_ascii=False), "utf-8")
    (student / "merges.txt").write_text("".join(["#version: 0.2\n"] + [" ".join(pair) + "\n" for pair in merges]), "utf-8")
    config = RobertaConfig(vocab_size=len(vocabulary), max_position_embeddings=30, type_vocab_size=1, layer_norm_eps=1e-5, **sizes())
    model = save_as_half(randomised(RobertaForMaskedLM(config), 206), student).roberta
    return student_case(without_pads(model, padded_ids(RobertaTokenizer.from_pretrained(student), TEXTS), 1))


@case("student_clip", run="student", tolerance=1e-4)
def student_clip(folder):
    """A random whole CLIP, whose text half serves as student: the states after the final norm."""
    student = student_folder(folder)
    text = {**sizes(), "vocab_size": write_clip_vocabulary(student), "max_position_embeddings": 30}
    config = CLIPConfig(text_config=text, vision_config=vision(), projection_dim=wide(12))
    model = save_as_half(randomised(CLIPModel(config), 207), student).text_model
    ids = padded_ids(CLIPTokenizer.from_pretrained(student), TEXTS)
    with torch.no_grad():
        return student_case(model(input_ids=ids).last_hidden_state)


@case("student_pair", run="student", tolerance=1e-4)
def student_pair(folder):
    """XLM-R and Chinese-CLIP side by side, XLM-R's states first, both of 64 tokens."""
    student, length = student_folder(folder), 64
    first, second = student_folder(student, "xlm_roberta"), student_folder(student, "chinese_clip")
    config = small_xlm_roberta(write_xlm_roberta_vocabulary(first, normalization_rule_name="identity"))
    config.max_position_embeddings = 66
    model = save_as_half(randomised(XLMRobertaModel(config), 208), first)
    states = without_pads(model, padded_ids(XLMRobertaTokenizer.from_pretrained(first), TEXTS, length), 1)
    chinese = small_chinese_clip(second, 209, positions=64)
    states = torch.cat([states, chinese_states(chinese, second, straight(TEXTS), length)], -1)
    return student_case(states, length=length, normalize_quotes=True)
