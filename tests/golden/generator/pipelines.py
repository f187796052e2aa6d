"""Small random models of whole pipelines, in the folders of diffusers."""

import json
import shutil
from dataclasses import dataclass
from typing import Callable

import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import BertTokenizer, CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from .common import CONTEXT_LENGTH, DEMO_IN_CASE, deep, frozen, randomised, wide
from .models import bert_student, demo_texts, demo_unet, demo_vae, sdxl_teacher
from .students import small_chinese_clip
from .vocabularies import CAPTIONS, write_clip_tokenizer

# Tokens of an English prompt, and of one of the student's.
TEACHER_LENGTH, STUDENT_LENGTH = 20, 16


@dataclass
class Models:
    """The frozen models of a distillation, and how a case names their folders."""

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    student: Callable
    teacher: Callable
    schedule: DDPMScheduler
    settings: dict
    # Height and width of the pictures, and how much smaller the latents are.
    picture: tuple
    downscale: int
    # Widths of the states the adapter reads, of the pooled text (None for SD1.5) and of the text states it writes.
    widths: tuple
    # Between which values pixels lie.
    brightness: tuple = (0, 256)


def scaled_linear(**options):
    return {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000, **options}


def demo_models():
    student, teacher = demo_texts()
    settings = {"model": DEMO_IN_CASE, "student": f"{DEMO_IN_CASE}/text_encoder_zh", "context_length": CONTEXT_LENGTH}
    return Models(demo_unet(), demo_vae(), student, teacher, DDPMScheduler(**scaled_linear()), settings, (64, 48), 8, (64, 48, 80))


# Brightness of pictures with so little contrast that halves tell, and of the grey that `small_vae` then takes them relative to.
PALE, PALE_GREY = (208, 224), 215.5


def small_vae(seed, scaling_factor, pale=False, widths=(4, 8, 8)):
    """A random autoencoder; `pale`: it looks at each pixel's difference from a grey, so that roundings of pixels and weights come through."""
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=wide(*widths),
        layers_per_block=deep(1),
        norm_num_groups=2,
        sample_size=64,
        scaling_factor=scaling_factor,
    )
    randomised(vae, seed)
    if pale:
        first = vae.encoder.conv_in
        first.weight.data[:, :, [0, 0, 0, 1, 1, 2, 2, 2], [0, 1, 2, 0, 2, 0, 1, 2]] = 0
        first.bias.data = -(PALE_GREY / 127.5 - 1) * first.weight.data.sum([1, 2, 3])
        # What is drawn from the latents' distribution would drown them.
        vae.quant_conv.bias.data[4:] -= 20
    return vae


def small_clip(model, seed, vocabulary, width, **options):
    # The ids of start and end as the configurations of the published models have them, which are not those of the vocabulary.
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=wide(width),
        intermediate_size=wide(2 * width),
        num_hidden_layers=deep(2),
        num_attention_heads=2,
        max_position_embeddings=TEACHER_LENGTH,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=1,
        **options,
    )
    return randomised(model(config), seed)


def write_tokenizer(folder, pad):
    """Writes a CLIP tokenizer in the files of the published models; returns it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    vocabulary = write_clip_tokenizer(folder, pad, TEACHER_LENGTH)
    return CLIPTokenizer.from_pretrained(folder), vocabulary


def save(pipeline, folder, tokenizers):
    """Saves a pipeline in fp16, its tokenizers in the files given, and reads the models back as they will be read."""
    for name, component in pipeline.components.items():
        if isinstance(component, torch.nn.Module) and name != "vae":
            component.half()
    pipeline.save_pretrained(folder)
    for name, pad in tokenizers.items():
        write_tokenizer(folder / name, pad)
    load = lambda model, name: frozen(model.from_pretrained(folder, subfolder=name, torch_dtype=torch.float32))
    return {name: load(type(part), name) for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}


def chinese_student(folder, seed):
    """A small Chinese-CLIP in the folder `student`, as a function from captions."""
    (folder / "student").mkdir()
    model = small_chinese_clip(folder / "student", seed, vocabulary=CAPTIONS)
    return bert_student(BertTokenizer.from_pretrained(folder / "student"), model.text_model, STUDENT_LENGTH)


def small_sdxl(folder, seed, prediction="epsilon", pale=False, voice=1.0):
    """A random SDXL in the folder `sdxl`, and a Chinese-CLIP in `student`.

    `pale`: for pictures of little contrast, with an autoencoder in f32; `voice`: how much the UNet makes of a text.
    """
    levels = deep(3)
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=wide(*[8] * (levels - 1), 16),
        down_block_types=("DownBlock2D", *["CrossAttnDownBlock2D"] * (levels - 1)),
        up_block_types=(*["CrossAttnUpBlock2D"] * (levels - 1), "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=[*[2] * (levels - 1), 4],
        cross_attention_dim=wide(20),
        norm_num_groups=4,
        use_linear_projection=True,
        transformer_layers_per_block=[*[1] * (levels - 1), 2],
        addition_embed_type="text_time",
        addition_time_embed_dim=wide(4),
        projection_class_embeddings_input_dim=wide(34),
    )
    randomised(unet, seed + 3)
    for name, parameter in unet.named_parameters():
        if "attn2.to_out.0" in name or "add_embedding.linear_2" in name:
            parameter.data *= voice
    pads = {"tokenizer": "<|endoftext|>", "tokenizer_2": "!"}
    tokenizers = {name: write_tokenizer(folder / "sdxl" / name, pad) for name, pad in pads.items()}
    vocabulary = tokenizers["tokenizer"][1]
    pipeline = StableDiffusionXLPipeline(
        vae=small_vae(seed, 2.0 if pale else 0.13025, pale).to(torch.float32 if pale else torch.float16),
        text_encoder=small_clip(CLIPTextModel, seed + 1, vocabulary, 8),
        text_encoder_2=small_clip(CLIPTextModelWithProjection, seed + 2, vocabulary, 12, hidden_act="gelu", projection_dim=wide(10)),
        tokenizer=tokenizers["tokenizer"][0],
        tokenizer_2=tokenizers["tokenizer_2"][0],
        unet=unet,
        scheduler=EulerDiscreteScheduler(**scaled_linear(prediction_type=prediction, timestep_spacing="leading", steps_offset=1)),
    )
    models = save(pipeline, folder / "sdxl", pads)
    teacher = sdxl_teacher([tokenizers[name][0] for name in pads], models["text_encoder"], models["text_encoder_2"], TEACHER_LENGTH)
    schedule = DDPMScheduler(**scaled_linear(prediction_type=prediction))
    settings = {"model": "sdxl", "student": "student", "context_length": STUDENT_LENGTH}
    student, downscale = chinese_student(folder, seed + 4), 4
    picture = (downscale * 2 ** (levels - 1) * 2, downscale * 2 ** (levels - 1) * 3)
    return Models(models["unet"], models["vae"], student, teacher, schedule, settings, picture, downscale, wide(16, 10, 20), PALE if pale else (0, 256))


def small_sd15(folder, seed, loud=False):
    """A random SD1.5 in the folder `sd15`, and a Chinese-CLIP in `student`. `loud`: the last feature is, beyond what a half can square."""
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=wide(4, 8, 8, 8),
        layers_per_block=deep(1),
        attention_head_dim=2,
        cross_attention_dim=wide(8),
        norm_num_groups=4,
    )
    randomised(unet, seed + 3)
    if loud:
        # A norm follows: the prediction stays what it is.
        unet.up_blocks[-1].attentions[-1].proj_out.weight.data *= 2000
    tokenizer, vocabulary = write_tokenizer(folder / "sd15" / "tokenizer", "<|endoftext|>")
    pipeline = StableDiffusionPipeline(
        vae=small_vae(seed, 0.18215).half(),
        text_encoder=small_clip(CLIPTextModel, seed + 1, vocabulary, 8),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=PNDMScheduler(**scaled_linear(steps_offset=1, skip_prk_steps=True)),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    models = save(pipeline, folder / "sd15", {"tokenizer": "<|endoftext|>"})
    # The published configuration is older than these keys.
    path = folder / "sd15" / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps({key: value for key, value in config.items() if key not in ("timestep_spacing", "prediction_type")}, indent=2), "utf-8")

    def teacher(captions):
        ids = tokenizer(captions, padding="max_length", max_length=TEACHER_LENGTH, truncation=True, return_tensors="pt").input_ids
        return None, models["text_encoder"](ids).last_hidden_state

    settings = {"model": "sd15", "student": "student", "context_length": STUDENT_LENGTH}
    student = chinese_student(folder, seed + 4)
    schedule = DDPMScheduler(**scaled_linear())
    return Models(models["unet"], models["vae"], student, teacher, schedule, settings, (64, 32), 4, (wide(16), None, wide(8)))
