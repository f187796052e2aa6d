"""Writes the golden cases: what the Python libraries compute on the demo's models and on small random ones.

usage: pip install -r requirements.txt; python generate.py [CASE ...]        (no CASE: all of them)

A case is a folder cases/NAME/ with
    case.toml              what is run (`run` names a function of ../stories/golden.rs), with which settings; tolerance and its reason
    inputs.safetensors     what goes in
    outputs.safetensors    what must come out, tensor by tensor, within the tolerance (relative L2 distance)
and, where the demo's models do not serve, weights of its own. Paths in case.toml are relative to the case's folder.

To add a case, write a function below under `@case(...)` that returns inputs, outputs and settings.
"""

import io
import json
import os
import shutil
import sys
import unicodedata
from collections import OrderedDict
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import open_clip
import sentencepiece
import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, DPMSolverMultistepScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.loaders import single_file_utils
from open_clip.hf_model import HFTextEncoder
from safetensors.torch import load_file, save_file
from transformers import (
    AltCLIPConfig,
    AltCLIPModel,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    BertTokenizer,
    ChineseCLIPConfig,
    ChineseCLIPModel,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
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

HERE = Path(__file__).resolve().parent
CASES = HERE / "cases"
DEMO = HERE.parent / "demo" / "model"
DEMO_FROM_CASE = "../../../demo/model"
CONTEXT_LENGTH = 24

KERNELS = "f32 on both sides; sums are taken in another order by other kernels"

REGISTRY = {}


def case(name, run, tolerance, why=KERNELS):
    """Registers a function `folder -> (inputs, outputs, settings)` as the case `name`."""

    def register(function):
        REGISTRY[name] = (function, {"run": run, "about": function.__doc__, "tolerance": tolerance, "why": why})
        return function

    return register


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def normal(seed, *shape):
    return torch.randn(*shape, generator=seeded(seed))


def frozen(model):
    return model.eval().requires_grad_(False)


def demo_unet():
    return frozen(UNet2DConditionModel.from_pretrained(DEMO, subfolder="unet", torch_dtype=torch.float32))


def demo_vae():
    return frozen(AutoencoderKL.from_pretrained(DEMO, subfolder="vae", torch_dtype=torch.float32))


def save_as_half(model, folder):
    """Saves a model in fp16 and returns it as it will be read back: in f32, with rounded weights."""
    model.half().save_pretrained(folder)
    return frozen(type(model).from_pretrained(folder, torch_dtype=torch.float32))


def randomised(model, seed):
    """Draws all weights again, norms included, so that no layer is an identity and no bias is zero."""
    generator = seeded(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        fan_in = parameter[0].numel() if parameter.dim() > 1 else 4
        centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        parameter.data = centre + noise * (0.8 / fan_in**0.5)
    return model


# ------------------------------------------------------------------------------------------------------------------------- UNet


def hook_features(unet):
    """Returns a dict that holds the outputs of the blocks d0.., mid, u0.. after each forward pass."""
    features = {}
    for index, block in enumerate(unet.down_blocks):
        block.register_forward_hook(lambda module, inputs, output, key=f"d{index}": features.__setitem__(key, output[0]))
    if unet.mid_block is not None:
        unet.mid_block.register_forward_hook(lambda module, inputs, output: features.__setitem__("mid", output))
    for index, block in enumerate(unet.up_blocks):
        block.register_forward_hook(lambda module, inputs, output, key=f"u{index}": features.__setitem__(key, output))
    return features


def run_unet(unet, inputs):
    features = hook_features(unet)
    added = {"text_embeds": inputs["pooled"], "time_ids": inputs["time_ids"]} if "pooled" in inputs else None
    with torch.no_grad():
        sample = unet(inputs["sample"], inputs["timesteps"], inputs["text"], added_cond_kwargs=added).sample
    return {"sample": sample, **{f"feature.{key}": value for key, value in features.items()}}


@case("unet_demo", run="unet", tolerance=1e-4)
def unet_demo(folder):
    """The demo's UNet, an SDXL in small: prediction and all seven features, for pictures that are not square."""
    inputs = {
        "sample": normal(1, 3, 4, 8, 12),
        "timesteps": torch.tensor([0, 437, 999]),
        "text": normal(2, 3, 17, 80),
        "pooled": normal(3, 3, 48),
        "time_ids": torch.tensor([[96, 64, 0, 0, 64, 96], [500, 333, 7, 0, 64, 96], [1024, 2048, 0, 31, 64, 96]]).float(),
    }
    return inputs, run_unet(demo_unet(), inputs), {"model": f"{DEMO_FROM_CASE}/unet"}


@case("unet_like_sd15", run="unet", tolerance=1e-4)
def unet_like_sd15(folder):
    """A random network wired as SD1.5: attention behind 1x1 convolutions, no added embedding, one number of heads for all levels; an odd height."""
    unet = UNet2DConditionModel(
        block_out_channels=(8, 16, 16),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        attention_head_dim=2,
        cross_attention_dim=12,
        norm_num_groups=4,
    )
    unet = save_as_half(randomised(unet, 10), folder / "model")
    inputs = {"sample": normal(11, 2, 4, 9, 8), "timesteps": torch.tensor([17, 801]), "text": normal(12, 2, 5, 12)}
    return inputs, run_unet(unet, inputs), {"model": "model"}


@case("unet_like_ssd1b", run="unet", tolerance=1e-4)
def unet_like_ssd1b(folder):
    """A random network wired as SSD-1B: other numbers of transformer layers down and up, no attention in the middle; nine input channels."""
    unet = UNet2DConditionModel(
        in_channels=9,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2D",
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=[1, 4],
        cross_attention_dim=12,
        norm_num_groups=4,
        use_linear_projection=True,
        transformer_layers_per_block=[1, [2]],
        reverse_transformer_layers_per_block=[[2, 1], 1],
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=30,
        flip_sin_to_cos=False,
    )
    unet = save_as_half(randomised(unet, 20), folder / "model")
    inputs = {
        "sample": normal(21, 2, 9, 6, 6),
        "timesteps": torch.tensor([250, 3]),
        "text": normal(22, 2, 5, 12),
        "pooled": normal(23, 2, 6),
        "time_ids": torch.tensor([[48, 48, 0, 0, 48, 48], [77, 99, 3, 0, 48, 48]]).float(),
    }
    return inputs, run_unet(unet, inputs), {"model": "model"}


# -------------------------------------------------------------------------------------------------------------------------- VAE


def run_vae(vae, inputs):
    with torch.no_grad():
        moments = vae.encode(inputs["images"]).latent_dist
        decoded = vae.decode(inputs["latents"] / vae.config.scaling_factor).sample
    return {"mean": moments.mean, "log_variance": moments.logvar, "decoded": decoded}


@case("vae_demo", run="vae", tolerance=1e-4)
def vae_demo(folder):
    """The demo's autoencoder: moments of pictures, pictures of scaled latents."""
    inputs = {"images": torch.rand(2, 3, 64, 48, generator=seeded(30)) * 2 - 1, "latents": normal(31, 2, 4, 5, 4)}
    return inputs, run_vae(demo_vae(), inputs), {"model": f"{DEMO_FROM_CASE}/vae"}


@case("vae_old_names", run="vae", tolerance=1e-4)
def vae_old_names(folder):
    """A random autoencoder whose attention has the key names of old files (`query`, `proj_attn`)."""
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        sample_size=16,
    )
    vae = save_as_half(randomised(vae, 32), folder / "model")
    path = folder / "model" / "diffusion_pytorch_model.safetensors"
    old = {"to_q.": "query.", "to_k.": "key.", "to_v.": "value.", "to_out.0.": "proj_attn."}

    def renamed(key):
        for new, name in old.items():
            key = key.replace(f"attentions.0.{new}", f"attentions.0.{name}")
        return key

    save_file({renamed(key): value for key, value in load_file(path).items()}, path)
    inputs = {"images": torch.rand(1, 3, 16, 12, generator=seeded(33)) * 2 - 1, "latents": normal(34, 1, 4, 4, 6)}
    return inputs, run_vae(vae, inputs), {"model": "model"}


# ----------------------------------------------------------------------------------------------------------------- distillation


class Adapter(nn.Module):
    """The adapter of the method, under the names of its published state dict."""

    def __init__(self, width, hidden, pooled, output):
        super().__init__()
        self.layernorm = nn.LayerNorm(width)
        linears = [nn.Linear(width, hidden, bias=False), nn.Linear(hidden, hidden, bias=False), nn.Linear(hidden, pooled, bias=False)]
        self.projector = nn.Sequential(linears[0], nn.GELU(), linears[1], nn.GELU(), linears[2])
        self.fc = nn.Linear(pooled, output)

    def forward(self, states):
        projected = self.projector(self.layernorm(states))
        return projected.mean(1), self.fc(F.gelu(projected))


def demo_texts():
    """Returns the demo's encoders as functions from captions to states: the student's, and the teacher's (pooled, sequence)."""
    load = lambda model, folder, **options: frozen(model.from_pretrained(DEMO, subfolder=folder, dtype=torch.float32, **options))
    clip, big = load(CLIPTextModel, "text_encoder"), load(CLIPTextModelWithProjection, "text_encoder_2")
    bert = load(BertModel, "text_encoder_zh", add_pooling_layer=False)
    tokenizers = [CLIPTokenizer.from_pretrained(DEMO, subfolder=folder) for folder in ("tokenizer", "tokenizer_2")]
    characters = BertTokenizer.from_pretrained(DEMO, subfolder="text_encoder_zh")

    def ids(tokenizer, captions):
        return tokenizer(captions, padding="max_length", max_length=CONTEXT_LENGTH, truncation=True, return_tensors="pt").input_ids

    def student(captions):
        tokens = ids(characters, captions)
        return bert(tokens, attention_mask=(tokens != 0).long())[0]

    def teacher(captions):
        first = clip(ids(tokenizers[0], captions), output_hidden_states=True)
        second = big(ids(tokenizers[1], captions), output_hidden_states=True)
        return second.text_embeds, torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1)

    return student, teacher


def distill_step(inputs, adapter, settings):
    """The training step, written out for the whole batch at once with masks: losses and gradients summed over samples."""
    unet, vae, (student, teacher) = demo_unet(), demo_vae(), demo_texts()
    options, captions, english = settings["distill"], settings["captions"], settings["english"]
    count = len(captions)
    drop, z = inputs["drop"].bool(), inputs["native"].float()
    if not options["hybrid"]:
        on_images, on_teacher = torch.ones(count), torch.ones(count)
    else:
        on_images, on_teacher = z, 1 - z

    pixels = inputs["pixels"].float() / 255
    moments = vae.encode((pixels - 0.5) / 0.5).latent_dist
    latents = (moments.mean + torch.exp(0.5 * moments.logvar) * inputs["posterior"]) * vae.config.scaling_factor
    noise = inputs["noise"] + options["noise_offset"] * inputs["offset"][:, :, None, None]
    schedule = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000)
    noised = schedule.add_noise(latents, noise, inputs["timesteps"])
    height, width = inputs["pixels"].shape[2:]
    order = (lambda w, h: [w, h]) if options["time_ids_order"] == "wh" else (lambda w, h: [h, w])
    sizes = zip(settings["original_size"], settings["crop"])
    time_ids = torch.tensor([[*order(*original), *crop, *order(width, height)] for original, crop in sizes]).float()

    def condition(prompts, empty):
        (pooled, sequence), (empty_pooled, empty_sequence) = prompts, empty
        if options["drop_pooled"]:
            pooled = torch.where(drop[:, None], empty_pooled, pooled)
        return pooled, torch.where(drop[:, None, None], empty_sequence, sequence)

    features = hook_features(unet)

    def predict(pooled, sequence):
        added = {"text_embeds": pooled, "time_ids": time_ids}
        sample = unet(noised, inputs["timesteps"], sequence, added_cond_kwargs=added).sample
        return sample, dict(features)

    predicted, studied = predict(*condition(adapter(student(captions)), adapter(student([""] * count))))
    with torch.no_grad():
        taught_sample, taught = predict(*condition(teacher(english), teacher([""] * count)))

    error = lambda left, right: (left - right).square().mean([1, 2, 3])
    task = (on_images * error(predicted, noise)).sum()
    logit = (on_teacher * error(predicted, taught_sample)).sum()
    feature = sum((on_teacher * error(studied[key], taught[key])).sum() for key in taught)
    (task + logit + options["feature_weight"] * feature).backward()
    losses = {"loss.task": task, "loss.logit": logit, "loss.feature": feature}
    gradients = {f"gradient.{name}": parameter.grad for name, parameter in adapter.named_parameters()}
    return {name: value.detach() for name, value in {**losses, **gradients}.items()}


def distill_case(folder, seed, native, drop, **options):
    """Inputs, outputs and settings of a step on as many samples as `native` and `drop` have flags."""
    count = len(native)
    captions = ["白色背景上的大红色圆形", "黑色背景上的小蓝色方块", "绿色的三角形", "黄色星形"]
    english = ["a big red circle on a white background", "a small blue square on a black background", "a green triangle", "a yellow star"]
    defaults = {"noise_offset": 0.5, "hybrid": True, "distill": True, "feature_weight": 0.1, "time_ids_order": "hw", "drop_pooled": False}
    settings = {
        "model": DEMO_FROM_CASE,
        "student": f"{DEMO_FROM_CASE}/text_encoder_zh",
        "context_length": CONTEXT_LENGTH,
        "captions": captions[:count],
        "english": english[:count],
        "original_size": [[200 + 13 * index, 150 + 29 * index] for index in range(count)],
        "crop": [[index, 5 * index] for index in range(count)],
        "distill": {**defaults, **options},
    }
    adapter = randomised(Adapter(64, 40, 48, 80), seed)
    save_file(adapter.state_dict(), folder / "adapter.safetensors")
    inputs = {
        "pixels": torch.randint(0, 256, (count, 3, 64, 48), generator=seeded(seed + 1), dtype=torch.uint8),
        "posterior": normal(seed + 2, count, 4, 8, 6),
        "noise": normal(seed + 3, count, 4, 8, 6),
        "offset": normal(seed + 4, count, 4),
        "timesteps": torch.tensor([12, 345, 678, 999][:count]),
        "drop": torch.tensor(drop, dtype=torch.uint8),
        "native": torch.tensor(native, dtype=torch.uint8),
    }
    return inputs, distill_step(inputs, adapter, settings), settings


GRADIENTS = "f32 on both sides; rounding grows through the backward pass, and the teacher runs on a subset here and on the whole batch there"


@case("distill_fixed", run="distill", tolerance=1e-3, why=GRADIENTS)
def distill_fixed(folder):
    """A training step in the preset `fixed`: parallel and native samples, with and without text; losses and gradients, summed over samples."""
    return distill_case(folder, 40, native=[0, 1, 0, 1], drop=[0, 0, 1, 1])


@case("distill_switches", run="distill", tolerance=1e-3, why=GRADIENTS)
def distill_switches(folder):
    """A training step with the switches the other way: not hybrid, pooled text dropped too, width before height, another weight and offset."""
    options = {"hybrid": False, "drop_pooled": True, "time_ids_order": "wh", "feature_weight": 0.3, "noise_offset": 0.0}
    return distill_case(folder, 50, native=[0, 1, 0], drop=[0, 1, 1], **options)


# -------------------------------------------------------------------------------------------------------- tokenizers, text encoders

EXACT = "token ids are equal or wrong"

# One of everything that tokenizers treat in a way of their own.
TEXTS = [
    "",
    " ",
    "a big red circle on a white background",
    "A Big RED Circle!! two!stars",
    "hello world \"it's\" 12345 don't we'll they've I'm",
    "word " * 60,
    "x" * 150,
    "红色的大圆形在白色背景上",
    "红" * 60,
    "“引号” ‘单’ quotes",
    "Ｆｕｌｌ　ｗｉｄｔｈ　１２３！",
    "emoji 😀 👨‍👩‍👧 ❤️ 🇨🇳 done",
    "café naïve Ångström ÉCOLE İstanbul ẞ ﬁ",
    "cafe\u0301 e\u0301",
    "日本語のテキスト カタカナ 한국어 русский العربية עברית ไทย हिन्दी",
    "tab\tnew\nline\r\u00a0no-break\u200bzero\u3000wide\ufeff\u2028separator",
    "\u0000\u0001\ufffd control",
    "<|startoftext|> inside <|endoftext|> text <|STARTOFTEXT|>",
    "[CLS] literal [SEP] [PAD] [UNK] [MASK]",
    "𠀀𪛖 extension B 㐀 豈",
    "a_b-c/d\\e@f#g$h%i^j&k*l(m)n don’t …—–",
    "1/2 ½ ² Ⅻ ①",
    "unaffable running 测试abc混合123文字 ##ing",
]


def tokenizer_case(tokenizer, kind, path, length):
    ids = tokenizer(TEXTS, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
    return {}, {"ids": ids}, {"kind": kind, "tokenizer": path, "length": length, "texts": TEXTS}


@case("tokenizer_clip", run="tokenizer", tolerance=0, why=EXACT)
def tokenizer_clip(folder):
    """The demo's second CLIP tokenizer, from tokenizer.json: pads with "!", whose id lies above the end of text."""
    tokenizer = CLIPTokenizer.from_pretrained(DEMO, subfolder="tokenizer_2")
    return tokenizer_case(tokenizer, "clip", f"{DEMO_FROM_CASE}/tokenizer_2", CONTEXT_LENGTH)


def write_clip_vocabulary(folder):
    """Writes the files of a CLIP tokenizer that joins a few English words; returns the size of its vocabulary."""
    letters = list(bytes_to_unicode().values())
    merges = "t h,th e</w>,i n,r e,o n</w>,in g</w>,w o,wo r,wor d</w>,a b,l e</w>,ab le</w>,u n,r u,ru n,run n,e d</w>,re d</w>"
    merges = [pair.split() for pair in merges.split(",")]
    vocabulary = letters + [letter + "</w>" for letter in letters] + ["".join(pair) for pair in merges] + ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(vocabulary)}, ensure_ascii=False), "utf-8")
    (folder / "merges.txt").write_text("".join(["#version: 0.2\n"] + [" ".join(pair) + "\n" for pair in merges]), "utf-8")
    return len(vocabulary)


@case("tokenizer_clip_files", run="tokenizer", tolerance=0, why=EXACT)
def tokenizer_clip_files(folder):
    """A CLIP tokenizer as SDXL ships it: vocab.json and merges.txt only, special tokens as objects, padding with "!" of id 0."""
    write_clip_vocabulary(folder)
    special = lambda content: {"__type": "AddedToken", "content": content, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    config = {
        "bos_token": special("<|startoftext|>"),
        "eos_token": special("<|endoftext|>"),
        "unk_token": special("<|endoftext|>"),
        "pad_token": "!",
        "model_max_length": 77,
        "tokenizer_class": "CLIPTokenizer",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), "utf-8")
    return tokenizer_case(CLIPTokenizer.from_pretrained(folder), "clip", ".", 77)


def write_bert_vocabulary(folder):
    """Writes the vocab.txt of a BERT tokenizer with pieces of several scripts; returns its size."""
    characters = {part for text in TEXTS for part in unicodedata.normalize("NFD", text.lower()) if part.isprintable() and part != " "}
    # A few are left out, so that some words are unknown.
    letters = sorted(characters - set("ØøÅ^混") | set("abcdefghijklmnopqrstuvwxyz0123456789"))
    words = ["un", "##aff", "##able", "run", "##ning", "circle", "red", "hello", "##ing"] + ["##" + letter for letter in "abcdefgh0123日本語のテй"]
    vocabulary = ["[PAD]", "[unused1]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"] + letters + words
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n", "utf-8")
    return len(vocabulary)


@case("tokenizer_bert", run="tokenizer", tolerance=0, why=EXACT)
def tokenizer_bert(folder):
    """A BERT tokenizer from vocab.txt alone, uncased, with pieces of several scripts."""
    write_bert_vocabulary(folder)
    return tokenizer_case(BertTokenizer.from_pretrained(folder), "bert", ".", 52)


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
        hidden_size=16,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=12,
        hidden_act="gelu",
        projection_dim=10,
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
        hidden_size=16,
        intermediate_size=40,
        num_hidden_layers=2,
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
        hidden_size=16,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=4,
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
        outputs = {"english.sequence": sequence, "english.pooled": pooled, "student": student(PROMPTS["captions"])}
    settings = {"model": DEMO_FROM_CASE, "student": f"{DEMO_FROM_CASE}/text_encoder_zh", "context_length": CONTEXT_LENGTH, **PROMPTS}
    return {}, outputs, settings


# ------------------------------------------------------------------------------------------------------------- student encoders

SIZES = {"hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = {**SIZES, "num_hidden_layers": 1, "image_size": 4, "patch_size": 2}
STUDENT_LENGTH = 24

# What open_clip's clean-up changes: broken encodings, entities, white space.
DIRTY_TEXTS = [
    "schÃ¶ne GrÃ¼ÃŸe aus MÃ¼nchen",
    "The Mona Lisa doesnÃƒÂ¢Ã¢â€šÂ¬Ã¢â€žÂ¢t have eyebrows.",
    "âœ” no problems â€” lâ€™humanitÃ©",
    "&lt;b&gt; &amp;amp; &amp;lt; &amp;amp;amp;",
    "&copy 2020 &#8364; &#x4e2d;&#22269 &notit; &unknown; & &#0; &#128; &#xD800; &#1114112; &Eacute;&EACUTE;",
    "<p>1 &lt; 2</p>\nthen &lt; 3",
    "  many   spaces \u00a0\u3000 \n\n and\x1c\x1dlines\x85 ",
    "\x1b[31mred\x1b[0m \u0085 \x93quoted\x94 \ufb01sh ﾊﾝｶｸ ｶﾞ",
    "ＬＯＵＤ　ＮＯＩＳＥＳ ｡｢｣",
]


def write_sentencepiece(path, **options):
    """Trains a small unigram model on the texts and writes it; returns the number of its pieces."""
    model = io.BytesIO()
    lines = [line for text in TEXTS + DIRTY_TEXTS for line in text.replace("\0", "").splitlines() if line.strip()]
    settings = {"model_type": "unigram", "vocab_size": 400, "hard_vocab_limit": False, "num_threads": 1, "minloglevel": 2, **options}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=model, **settings)
    path.write_bytes(model.getvalue())
    return sentencepiece.SentencePieceProcessor(model_file=str(path)).get_piece_size()


def write_xlm_roberta_vocabulary(folder, **options):
    """Writes sentencepiece.bpe.model; returns the number of ids, which are shifted by one and end with the mask."""
    return write_sentencepiece(folder / "sentencepiece.bpe.model", **options) + 2


def padded_ids(tokenizer, texts, length=STUDENT_LENGTH):
    return tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids


def student_folder(folder, name="student"):
    (folder / name).mkdir()
    return folder / name


def student_case(states, texts=TEXTS, length=STUDENT_LENGTH, normalize_quotes=False):
    return {}, {"states": states}, {"student": "student", "context_length": length, "normalize_quotes": normalize_quotes, "texts": texts}


def small_xlm_roberta(vocabulary, **options):
    return XLMRobertaConfig(vocab_size=vocabulary, max_position_embeddings=30, type_vocab_size=1, layer_norm_eps=1e-5, **SIZES, **options)


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
    text = {**SIZES, "vocab_size": vocabulary, "max_position_embeddings": 30, "project_dim": 12}
    vision = {**VISION, "hidden_size": 12, "projection_dim": 12}
    config = AltCLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
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
    sizes = {"d_model": 16, "d_kv": 6, "d_ff": 40, "num_layers": 2, "num_decoder_layers": 1, "num_heads": 2}
    model = randomised(MT5Model(MT5Config(vocab_size=vocabulary + 12, **sizes)), 203)
    model = save_as_half(model, student).encoder
    processor = sentencepiece.SentencePieceProcessor(model_file=str(student / "spiece.model"))
    rows = [processor.encode(text)[: length - 1] + [1] for text in TEXTS]
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    return student_case(without_pads(model, ids, 0), length=length)


def small_chinese_clip(folder, seed, positions=30):
    """A random Chinese-CLIP and its vocabulary, saved to `folder` in transformers' layout."""
    text = {**SIZES, "vocab_size": write_bert_vocabulary(folder), "max_position_embeddings": positions}
    config = ChineseCLIPConfig(text_config=text, vision_config={**VISION, "projection_dim": 12}, projection_dim=12)
    model = save_as_half(randomised(ChineseCLIPModel(config), seed), folder)
    # transformers 5 clears the pad's row on loading; its older versions and the authors' library take it as it is in the file.
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    return model


def chinese_states(model, folder, texts, length=STUDENT_LENGTH):
    return without_pads(model.text_model, padded_ids(BertTokenizer.from_pretrained(folder), texts, length), 0)


def straight(texts):
    return [text.replace("“", '"').replace("”", '"') for text in texts]


@case("student_chinese_clip", run="student", tolerance=1e-4)
def student_chinese_clip(folder):
    """A random Chinese-CLIP in transformers' layout: token states without the projection, curly quotes straightened."""
    student = student_folder(folder)
    states = chinese_states(small_chinese_clip(student, 204), student, straight(TEXTS))
    return student_case(states, normalize_quotes=True)


@case("student_chinese_clip_authors", run="student", tolerance=1e-4)
def student_chinese_clip_authors(folder):
    """The same in the layout of Chinese-CLIP's authors, whose keys begin with module.bert; curly quotes are unknown tokens."""
    student = student_folder(folder)
    states = chinese_states(small_chinese_clip(student, 205), student, TEXTS)
    saved = load_file(student / "model.safetensors")
    text = {f"module.bert.{key.removeprefix('text_model.')}": value for key, value in saved.items() if key.startswith("text_model.")}
    others = {"module.text_projection": torch.zeros(16, 12).half(), "module.logit_scale": torch.ones(1).half(), "module.visual.proj": torch.zeros(2).half()}
    checkpoint = {"epoch": 15, "step": 1, "name": "small", "state_dict": text | others}
    torch.save(checkpoint, student / "clip_cn_small.pt")
    config = json.loads((student / "config.json").read_text("utf-8"))
    (student / "config.json").write_text(json.dumps(config["text_config"]), "utf-8")
    (student / "model.safetensors").unlink()
    return student_case(states)


@case("student_roberta", run="student", tolerance=1e-4)
def student_roberta(folder):
    """A random RoBERTa under the prefix of a masked language model, with byte pairs from vocab.json and merges.txt."""
    student = student_folder(folder)
    letters = list(bytes_to_unicode().values())
    merges = [pair.split() for pair in "t h,th e,i n,r e,Ġ w,o r,Ġw or,Ġwor d,re d,Ġ c,Ġ re,Ġre d,Ġ Ġ".split(",")]
    vocabulary = ["<s>", "<pad>", "</s>", "<unk>"] + letters + ["".join(pair) for pair in merges] + ["<mask>"]
    (student / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(vocabulary)}, ensure_ascii=False), "utf-8")
    (student / "merges.txt").write_text("".join(["#version: 0.2\n"] + [" ".join(pair) + "\n" for pair in merges]), "utf-8")
    config = RobertaConfig(vocab_size=len(vocabulary), max_position_embeddings=30, type_vocab_size=1, layer_norm_eps=1e-5, **SIZES)
    model = save_as_half(randomised(RobertaForMaskedLM(config), 206), student).roberta
    return student_case(without_pads(model, padded_ids(RobertaTokenizer.from_pretrained(student), TEXTS), 1))


@case("student_clip", run="student", tolerance=1e-4)
def student_clip(folder):
    """A random whole CLIP, whose text half serves as student: the states after the final norm."""
    student = student_folder(folder)
    text = {**SIZES, "vocab_size": write_clip_vocabulary(student), "max_position_embeddings": 30}
    config = CLIPConfig(text_config=text, vision_config=VISION, projection_dim=12)
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


# ----------------------------------------------------------------------------------------------------------- adapter and optimiser


class LegacyAdapter(nn.Module):
    """The adapter of the first published checkpoints."""

    def __init__(self, width, hidden, pooled, output):
        super().__init__()
        self.layernorm = nn.LayerNorm(width)
        self.fc1, self.fc2, self.fc3 = nn.Linear(width, hidden), nn.Linear(hidden, pooled), nn.Linear(pooled, output)

    def forward(self, states):
        projected = self.fc2(F.gelu(self.fc1(self.layernorm(states))))
        return projected.mean(1), self.fc3(F.gelu(projected))


class ShortAdapter(nn.Module):
    """The adapter for SD1.5 of the published test scripts: five linears and neither pooled text nor a last layer."""

    def __init__(self, width, hidden, output):
        super().__init__()
        self.layernorm = nn.LayerNorm(width)
        widths = [width, hidden, hidden, hidden, hidden, output]
        linears = [nn.Linear(*pair, bias=False) for pair in zip(widths, widths[1:])]
        self.projector = nn.Sequential(*[layer for linear in linears for layer in (nn.GELU(), linear)][1:])

    def forward(self, states):
        return self.projector(self.layernorm(states))


def adapter_case(folder, adapter, seed, dtype=torch.float32):
    adapter = randomised(adapter, seed).to(dtype)
    save_file(adapter.state_dict(), folder / "adapter.safetensors")
    states = normal(seed + 1, 2, 5, adapter.layernorm.weight.numel())
    with torch.no_grad():
        output = adapter.float()(states)
    outputs = dict(zip(["pooled", "sequence"], output)) if isinstance(output, tuple) else {"sequence": output}
    return {"states": states}, outputs, {"adapter": "adapter.safetensors"}


@case("adapter_sdxl", run="adapter", tolerance=1e-5)
def adapter_sdxl(folder):
    """The adapter of the method."""
    return adapter_case(folder, Adapter(12, 16, 10, 14), 70)


@case("adapter_half", run="adapter", tolerance=1e-5)
def adapter_half(folder):
    """The adapter of the method as the published trainer saves it: in fp16, widened on reading."""
    return adapter_case(folder, Adapter(12, 16, 10, 14), 71, torch.float16)


@case("adapter_legacy", run="adapter", tolerance=1e-5)
def adapter_legacy(folder):
    """The layout of the first published checkpoints, in bf16."""
    return adapter_case(folder, LegacyAdapter(12, 16, 10, 14), 72, torch.bfloat16)


@case("adapter_sd15", run="adapter", tolerance=1e-5)
def adapter_sd15(folder):
    """Five linears, no pooled text: SD1.5."""
    return adapter_case(folder, ShortAdapter(12, 16, 10), 73)


@case("adamw", run="adamw", tolerance=1e-5)
def adamw(folder):
    """Ten steps of AdamW at changing rates, on gradients that are clipped now and then."""
    settings = {"beta1": 0.9, "beta2": 0.99, "eps": 1e-7, "weight_decay": 0.1, "max_norm": 6.0, "lr": [1e-2 * (1 - step / 15) for step in range(10)]}
    # Sizes spread over six orders of magnitude: eps must be where it belongs.
    inputs = {"parameters": normal(80, 40), "gradients": normal(81, 10, 40) * 10 ** torch.linspace(-6, 0, 40)}
    inputs["gradients"][::3] *= 4
    parameters = inputs["parameters"].clone()
    optimiser = torch.optim.AdamW([parameters], betas=(settings["beta1"], settings["beta2"]), eps=settings["eps"], weight_decay=settings["weight_decay"])
    norms = []
    for lr, gradient in zip(settings["lr"], inputs["gradients"]):
        parameters.grad = gradient.clone()
        norms.append(nn.utils.clip_grad_norm_([parameters], settings["max_norm"]))
        optimiser.param_groups[0]["lr"] = lr
        optimiser.step()
    state = optimiser.state[parameters]
    outputs = {"parameters": parameters, "exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"], "norms": torch.stack(norms)}
    return inputs, outputs, settings


# --------------------------------------------------------------------------------------------------------------------- sampling


def solver_case(folder, num_steps, seed, **config):
    """Random network outputs: where they lead depends on the coefficients alone."""
    config = {"_class_name": "EulerDiscreteScheduler", "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, **config}
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config, indent=2), "utf-8")
    scheduler = DPMSolverMultistepScheduler.from_config(config)
    scheduler.set_timesteps(num_steps)
    inputs = {"sample": normal(seed, 2, 8), "outputs": normal(seed + 1, num_steps, 2, 8)}
    sample, samples = inputs["sample"], []
    for timestep, output in zip(scheduler.timesteps, inputs["outputs"]):
        sample = scheduler.step(output, timestep, sample).prev_sample
        samples.append(sample)
    return inputs, {"timesteps": scheduler.timesteps, "samples": torch.stack(samples)}, {"num_steps": num_steps}


SOLVER = "the other side computes the noise schedule as a running product in f32"


@case("solver_sdxl", run="solver", tolerance=1e-4, why=SOLVER)
def solver_sdxl(folder):
    """SDXL's configuration with 30 steps, ending at the noise of timestep 0 as in the published trainer's time."""
    return solver_case(folder, 30, 90, beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1, final_sigmas_type="sigma_min")


@case("solver_zero", run="solver", tolerance=1e-4, why=SOLVER)
def solver_zero(folder):
    """Trailing timesteps, ending without noise."""
    return solver_case(folder, 20, 91, beta_schedule="scaled_linear", timestep_spacing="trailing", final_sigmas_type="zero")


@case("solver_few_steps", run="solver", tolerance=1e-4, why=SOLVER)
def solver_few_steps(folder):
    """Seven steps over linspaced timesteps: the last is of first order though it ends in noise."""
    return solver_case(folder, 7, 92, beta_schedule="linear", timestep_spacing="linspace", final_sigmas_type="sigma_min")


@case("solver_velocity", run="solver", tolerance=1e-4, why=SOLVER)
def solver_velocity(folder):
    """A network that predicts velocity."""
    options = {"timestep_spacing": "leading", "steps_offset": 1, "prediction_type": "v_prediction", "final_sigmas_type": "zero"}
    return solver_case(folder, 16, 93, beta_schedule="scaled_linear", **options)


def picture_case(folder, seed, **options):
    """Pictures by diffusers' pipeline, of prompts encoded by either road."""
    settings = {
        "model": DEMO_FROM_CASE,
        "student": f"{DEMO_FROM_CASE}/text_encoder_zh",
        "adapter": "adapter.safetensors",
        "context_length": CONTEXT_LENGTH,
        "english": ["a big red circle on a white background", "a blue star"],
        "captions": ["白色背景上的大红色圆形", "蓝色的星形"],
        **options,
    }
    adapter = randomised(Adapter(64, 40, 48, 80), seed)
    save_file(adapter.state_dict(), folder / "adapter.safetensors")
    pipeline = StableDiffusionXLPipeline.from_pretrained(DEMO, torch_dtype=torch.float32)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    student, teacher = demo_texts()
    roads = {"english": lambda texts: teacher(texts), "student": lambda texts: adapter(student(texts))}
    count, latents, outputs = len(settings["english"]), normal(seed + 1, 2, 4, options["height"] // 8, options["width"] // 8), {}
    for (name, encode), prompts in zip(roads.items(), [settings["english"], settings["captions"]]):
        with torch.no_grad():
            (pooled, sequence), (empty_pooled, empty_sequence) = encode(prompts), encode([""] * count)
            final = pipeline(
                prompt_embeds=sequence,
                pooled_prompt_embeds=pooled,
                negative_prompt_embeds=empty_sequence,
                negative_pooled_prompt_embeds=empty_pooled,
                latents=latents.clone(),
                height=options["height"],
                width=options["width"],
                num_inference_steps=options["num_steps"],
                guidance_scale=options["guidance"],
                guidance_rescale=options["guidance_rescale"],
                output_type="latent",
            ).images
            decoded = pipeline.vae.decode(final / pipeline.vae.config.scaling_factor).sample
        pixels = (decoded / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
        outputs |= {f"{name}.latents": final, f"{name}.pictures": (pixels * 255).round().to(torch.uint8)}
    return {"latents": latents}, outputs, settings


PICTURES = "f32 on both sides; rounding accumulates over the steps, and now and then a pixel by one grey level"


@case("pictures_guided", run="pictures", tolerance=1e-3, why=PICTURES)
def pictures_guided(folder):
    """The demo's way of sampling: 20 guided steps."""
    return picture_case(folder, 95, height=64, width=64, num_steps=20, guidance=5.0, guidance_rescale=0.0)


@case("pictures_rescaled", run="pictures", tolerance=1e-3, why=PICTURES)
def pictures_rescaled(folder):
    """Few steps, rescaled guidance, and a picture that is not square."""
    return picture_case(folder, 97, height=64, width=96, num_steps=6, guidance=7.5, guidance_rescale=0.7)


@case("pictures_unguided", run="pictures", tolerance=1e-3, why=PICTURES)
def pictures_unguided(folder):
    """Guidance 1 leaves the negative prompt out."""
    return picture_case(folder, 99, height=48, width=64, num_steps=5, guidance=1.0, guidance_rescale=0.0)


# ------------------------------------------------------------------------------------------------------------------ weight files


def stored(tensors):
    """What a file holds, as outputs of a case."""
    return {name: value.detach() for name, value in tensors.items()}


@case("torch_dict", run="weights", tolerance=0.0, why="nothing is computed")
def torch_dict(folder):
    """A dict of all sorts of tensors: views with strides and offsets, shared storage, no elements, no dimensions, every common dtype."""
    base = torch.arange(24, dtype=torch.float32).view(4, 6)
    tensors = {
        "base": base,
        "transposed": base.T,
        "part": base[1:3, 1:5:2],
        "repeated": base[0, 0].expand(3, 2),
        "shared": base,
        "alone": base[2].clone(),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "parameter": nn.Parameter(normal(200, 2, 3)),
        "half": normal(201, 5).half(),
        "bfloat16": normal(202, 5).bfloat16(),
        "float8_e4m3": normal(203, 5).to(torch.float8_e4m3fn),
        "float8_e5m2": normal(204, 5).to(torch.float8_e5m2),
        "bool": torch.tensor([True, False, True]),
        "uint8": torch.tensor([0, 255], dtype=torch.uint8),
        "int64": torch.tensor([-(2**40), 2**40]),
        "int16": torch.tensor([[-3, 7]], dtype=torch.int16),
        "channels_last": normal(205, 1, 3, 2, 2).to(memory_format=torch.channels_last),
    }
    torch.save(tensors, folder / "weights.pt")
    wide = {name: value.float() if "float8" in name else value for name, value in tensors.items()}
    return {}, stored(wide), {"file": "weights.pt"}


@case("torch_module", run="weights", tolerance=0.0, why="nothing is computed")
def torch_module(folder):
    """A module's own state dict, in fp16, with a counter among its buffers."""
    module = randomised(nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)), 210).half()
    torch.save(module.state_dict(), folder / "pytorch_model.bin")
    return {}, stored(module.state_dict()), {"file": "."}


@case("torch_training_state", run="weights", tolerance=0.0, why="nothing is computed")
def torch_training_state(folder):
    """A whole training state of a data-parallel run: only the weights are of interest, without the wrapper's prefix."""
    module = randomised(nn.Linear(3, 2), 211)
    optimiser = torch.optim.AdamW(module.parameters(), lr=1e-3)
    module(normal(212, 1, 3)).sum().backward()
    optimiser.step()
    wrapped = nn.ModuleDict({"module": module}).state_dict()
    state = {"epoch": 3, "step": 2**40, "name": "run", "lr": 1e-3, "best": None, "optimizer": optimiser.state_dict(), "state_dict": wrapped}
    torch.save(state, folder / "epoch_3.pt")
    return {}, stored(module.state_dict()), {"file": "epoch_3.pt"}


@case("torch_nested", run="weights", tolerance=0.0, why="nothing is computed")
def torch_nested(folder):
    """Dicts in dicts and lists, written with another version of the pickle protocol."""
    one, two = normal(213, 2), normal(214, 3)
    torch.save({"encoder": {"layers": [{"weight": one}, {"weight": two}]}, "sizes": torch.Size([2, 3])}, folder / "nested.pt", pickle_protocol=4)
    return {}, {"encoder.layers.0.weight": one, "encoder.layers.1.weight": two}, {"file": "nested.pt"}


@case("torch_sharded", run="weights", tolerance=0.0, why="nothing is computed")
def torch_sharded(folder):
    """Two shards and their index."""
    tensors = {f"layers.{index}.weight": normal(215 + index, 2, 2) for index in range(3)}
    names = {key: f"pytorch_model-0000{1 + index // 2}-of-00002.bin" for index, key in enumerate(tensors)}
    for name in set(names.values()):
        torch.save({key: tensors[key] for key in tensors if names[key] == name}, folder / name)
    index = {"metadata": {"total_size": 48}, "weight_map": names}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index, indent=2), "utf-8")
    return {}, tensors, {"file": "."}


def as_torch_file(result, folder):
    """Turns an adapter's case into one that reads `pytorch_model.bin`."""
    inputs, outputs, settings = result
    torch.save(OrderedDict(load_file(folder / "adapter.safetensors")), folder / "pytorch_model.bin")
    (folder / "adapter.safetensors").unlink()
    return inputs, outputs, {**settings, "adapter": "pytorch_model.bin"}


@case("adapter_torch", run="adapter", tolerance=1e-5)
def adapter_torch(folder):
    """The adapter of the method as the published trainer saves it: fp16, by torch.save."""
    return as_torch_file(adapter_case(folder, Adapter(12, 16, 10, 14), 230, torch.float16), folder)


@case("adapter_torch_legacy", run="adapter", tolerance=1e-5)
def adapter_torch_legacy(folder):
    """The layout of the first published checkpoints, by torch.save."""
    return as_torch_file(adapter_case(folder, LegacyAdapter(12, 16, 10, 14), 231, torch.float16), folder)


@case("adapter_torch_sd15", run="adapter", tolerance=1e-5)
def adapter_torch_sd15(folder):
    """Five linears, no pooled text, by torch.save."""
    return as_torch_file(adapter_case(folder, ShortAdapter(12, 16, 10), 232), folder)


def original_unet_keys(state):
    """Renames a UNet's tensors as the original training code had them, whose blocks lie in flat lists."""
    ends = {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "conv_in": "input_blocks.0.0",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }
    resnet = {
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "time_emb_proj": "emb_layers.1",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
        "conv_shortcut": "skip_connection",
    }
    count = lambda block: len({key.split(".")[3] for key in state if key.startswith(f"{block}.resnets.")})
    levels = len({key.split(".")[1] for key in state if key.startswith("down_blocks.")})
    firsts = {}
    for side, first in [("down_blocks", 1), ("up_blocks", 0)]:
        for level in range(levels):
            firsts[f"{side}.{level}"] = first
            # Down, the change of resolution is an item of its own.
            first += count(f"{side}.{level}") + (side == "down_blocks" and level + 1 < levels)

    def renamed(key):
        for new, old in ends.items():
            if key.startswith(new + "."):
                return old + key[len(new) :]
        block, kind, index, rest = key.split(".", 3) if key.startswith("mid") else (".".join(key.split(".")[:2]), *key.split(".", 4)[2:])
        name, tail = rest.split(".", 1)
        inner = f"{resnet[name]}.{tail}" if kind == "resnets" else rest
        if block == "mid_block":
            return f"middle_block.{2 * int(index) + (kind == 'attentions')}.{inner}"
        list_name = "input_blocks" if block.startswith("down") else "output_blocks"
        if kind == "downsamplers":
            return f"input_blocks.{firsts[block] + count(block)}.0.op.{tail}"
        if kind == "upsamplers":
            attends = any(other.startswith(f"{block}.attentions.") for other in state)
            return f"output_blocks.{firsts[block] + count(block) - 1}.{1 + attends}.conv.{tail}"
        return f"{list_name}.{firsts[block] + int(index)}.{int(kind == 'attentions')}.{inner}"

    return {f"model.diffusion_model.{renamed(key)}": value for key, value in state.items()}


def original_vae_keys(state):
    """Renames an autoencoder's tensors likewise: attention by 1x1 convolutions, the decoder's levels counted from the picture."""
    levels = len({key.split(".")[2] for key in state if key.startswith("decoder.up_blocks.")})
    parts = {
        "conv_norm_out": "norm_out",
        "conv_shortcut": "nin_shortcut",
        "mid_block.resnets.0": "mid.block_1",
        "mid_block.resnets.1": "mid.block_2",
        "mid_block.attentions.0.group_norm": "mid.attn_1.norm",
        "mid_block.attentions.0.to_out.0": "mid.attn_1.proj_out",
        "mid_block.attentions.0.to_": "mid.attn_1.",
        "down_blocks": "down",
        "downsamplers.0": "downsample",
        "upsamplers.0": "upsample",
        "resnets": "block",
    }
    original = {}
    for key, value in state.items():
        if ".attentions." in key and value.dim() == 2:
            value = value[:, :, None, None]
        if key.startswith("decoder.up_blocks."):
            half, _, level, rest = key.split(".", 3)
            key = f"{half}.up.{levels - 1 - int(level)}.{rest}"
        for new, old in parts.items():
            key = key.replace(new, old)
        original[f"first_stage_model.{key}"] = value
    return original


def original_open_clip_keys(state):
    """Renames and fuses a text encoder's tensors as OpenCLIP has them."""
    ends = {
        "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
        "text_model.embeddings.position_embedding.weight": "positional_embedding",
        "text_model.final_layer_norm.weight": "ln_final.weight",
        "text_model.final_layer_norm.bias": "ln_final.bias",
    }
    parts = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "self_attn.out_proj": "attn.out_proj", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    original = {"logit_scale": torch.tensor(4.6), "text_projection": state["text_projection.weight"].T.contiguous()}
    for key, value in state.items():
        if key in ends:
            original[ends[key]] = value
        elif ".layers." in key:
            index, rest = key.split(".layers.")[1].split(".", 1)
            layer = f"transformer.resblocks.{index}"
            if "q_proj" in rest:
                fused = torch.cat([state[key.replace("q_proj", name)] for name in ("q_proj", "k_proj", "v_proj")])
                original[f"{layer}.attn.in_proj_{rest.rsplit('.', 1)[1]}"] = fused
            elif "k_proj" not in rest and "v_proj" not in rest:
                for new, old in parts.items():
                    rest = rest.replace(new, old)
                original[f"{layer}.{rest}"] = value
    return {f"conditioner.embedders.1.model.{key}": value for key, value in original.items()}


def single_file_case(folder, unet, vae, clip, clip_prefix, big, save, name):
    """One file of all models, and what diffusers reads in it; the original names are checked by the way back."""
    whole = lambda state: {key if key.startswith("text_") else f"text_model.{key}": value for key, value in state.items()}
    models = {"unet": unet.state_dict(), "vae": vae.state_dict(), "text_encoder": whole(clip.state_dict())}
    original = original_unet_keys(models["unet"]) | original_vae_keys(models["vae"])
    original |= {clip_prefix + key: value for key, value in models["text_encoder"].items()}
    converted = {
        "unet": single_file_utils.convert_ldm_unet_checkpoint(original, unet.config),
        "vae": single_file_utils.convert_ldm_vae_checkpoint(original, vae.config),
        "text_encoder": single_file_utils.convert_ldm_clip_checkpoint(original),
    }
    if big is not None:
        models["text_encoder_2"] = whole(big.state_dict())
        original |= original_open_clip_keys(models["text_encoder_2"])
        converted["text_encoder_2"] = single_file_utils.convert_open_clip_checkpoint(big, original, prefix="conditioner.embedders.1.model.")
    for model, state in models.items():
        assert state.keys() == converted[model].keys(), (model, state.keys() ^ converted[model].keys())
        assert all(torch.equal(value, converted[model][key]) for key, value in state.items()), model
    save({**original, "model_ema.decay": torch.tensor(0.999), "alphas_cumprod": torch.linspace(1, 0, 5)}, folder / name)
    outputs = {f"{model}.{key}": value for model, state in converted.items() for key, value in state.items()}
    return {}, outputs, {"file": name}


def tiny_vae(seed):
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(4, 4, 8),
        norm_num_groups=2,
        layers_per_block=2,
    )
    return randomised(vae, seed).half()


def tiny_clip(model, seed):
    config = CLIPTextConfig(
        vocab_size=9, hidden_size=4, intermediate_size=6, projection_dim=4, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=5
    )
    return randomised(model(config), seed).half()


@case("single_file_sdxl", run="single_file", tolerance=0.0, why="nothing is computed")
def single_file_sdxl(folder):
    """SDXL's levels in small, in the key layout of community checkpoints: safetensors."""
    unet = UNet2DConditionModel(
        block_out_channels=(4, 4, 8),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=[1, 1, 2],
        cross_attention_dim=8,
        norm_num_groups=2,
        use_linear_projection=True,
        transformer_layers_per_block=[1, 1, 2],
        addition_embed_type="text_time",
        addition_time_embed_dim=2,
        projection_class_embeddings_input_dim=16,
    )
    texts = tiny_clip(CLIPTextModel, 222), "conditioner.embedders.0.transformer.", tiny_clip(CLIPTextModelWithProjection, 223)
    save = lambda tensors, path: save_file({key: value.contiguous() for key, value in tensors.items()}, path)
    return single_file_case(folder, randomised(unet, 220).half(), tiny_vae(221), *texts, save, "model.safetensors")


@case("single_file_sd15", run="single_file", tolerance=0.0, why="nothing is computed")
def single_file_sd15(folder):
    """SD1.5's levels in small, in the key layout of community checkpoints: a pickled training state."""
    unet = UNet2DConditionModel(
        block_out_channels=(4, 4, 4, 8), attention_head_dim=2, cross_attention_dim=6, norm_num_groups=2, layers_per_block=2
    )
    save = lambda tensors, path: torch.save({"global_step": 7, "state_dict": tensors}, path)
    clip = tiny_clip(CLIPTextModel, 226)
    return single_file_case(folder, randomised(unet, 224).half(), tiny_vae(225), clip, "cond_stage_model.transformer.", None, save, "model.ckpt")


# ---------------------------------------------------------------------------------------------------------------------- writing


def to_toml(settings):
    """Settings as TOML: plain values first, then one level of tables."""
    # JSON's strings, numbers, booleans and arrays of them are TOML's too.
    lines = [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in settings.items() if not isinstance(value, dict)]
    for name, table in settings.items():
        if isinstance(table, dict):
            lines += ["", f"[{name}]"] + [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in table.items()]
    return "\n".join(lines) + "\n"


def write(name):
    function, header = REGISTRY[name]
    folder = CASES / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    inputs, outputs, settings = function(folder)
    contiguous = lambda tensors: {key: value.detach().clone().contiguous() for key, value in tensors.items()}
    save_file(contiguous(inputs), folder / "inputs.safetensors")
    save_file(contiguous(outputs), folder / "outputs.safetensors")
    (folder / "case.toml").write_text(to_toml({**header, **settings}), encoding="utf-8")
    print(f"{name}: {sum(path.stat().st_size for path in folder.rglob('*') if path.is_file()) / 1024:.0f} KiB")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for chosen in sys.argv[1:] or REGISTRY:
        write(chosen)
