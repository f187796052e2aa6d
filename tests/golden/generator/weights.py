"""Files of weights: torch's pickles and single files of whole pipelines."""

import argparse
import collections
import json
import sys
import types
from collections import OrderedDict
from unittest import mock

import numpy as np
import torch
import torch.nn as nn
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders import single_file_utils
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from .adapter import adapter_case
from .common import NOTHING, case, deep, normal, randomised, wide
from .models import Adapter, LegacyAdapter, ShortAdapter


def stored(tensors):
    """What a file holds, as outputs of a case."""
    return {name: value.detach() for name, value in tensors.items()}


@case("torch_dict", run="weights", tolerance=0.0, why=NOTHING)
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


@case("torch_module", run="weights", tolerance=0.0, why=NOTHING)
def torch_module(folder):
    """A module's own state dict, in fp16, with a counter among its buffers."""
    module = randomised(nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)), 210).half()
    torch.save(module.state_dict(), folder / "pytorch_model.bin")
    return {}, stored(module.state_dict()), {"file": "."}


@case("torch_training_state", run="weights", tolerance=0.0, why=NOTHING)
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


@case("torch_lightning", run="weights", tolerance=0.0, why=NOTHING)
def torch_lightning(folder):
    """A training state as Lightning writes it: beside the weights lie classes, objects, numbers of numpy and sets, which are not made."""
    checkpoint = type("ModelCheckpoint", (), {"__module__": "pytorch_lightning.callbacks.model_checkpoint"})
    modules = {name: types.ModuleType(name) for name in ["pytorch_lightning", "pytorch_lightning.callbacks", checkpoint.__module__]}
    modules[checkpoint.__module__].ModelCheckpoint = checkpoint
    module = randomised(nn.Linear(3, 2), 230)
    state = {
        "callbacks": {checkpoint: {"monitor": "val/loss", "best_model_score": torch.tensor(0.5)}},
        "hyper_parameters": types.SimpleNamespace(lr=1e-3, classes={1, 2}),
        "lr_schedulers": [{"base_lrs": [np.float64(1e-3)], "seen": np.arange(3)}],
        "loops": argparse.Namespace(epoch=collections.defaultdict(int, {"current": 3}), seed=2**80, bytes=b"bytes"),
        "state_dict": module.state_dict(),
        "optimizer_states": [],
    }
    with mock.patch.dict(sys.modules, modules):
        torch.save(state, folder / "last.ckpt")
    return {}, stored(module.state_dict()), {"file": "last.ckpt"}


@case("torch_nested", run="weights", tolerance=0.0, why=NOTHING)
def torch_nested(folder):
    """Dicts in dicts and lists, written with another version of the pickle protocol."""
    one, two = normal(213, 2), normal(214, 3)
    torch.save({"encoder": {"layers": [{"weight": one}, {"weight": two}]}, "sizes": torch.Size([2, 3])}, folder / "nested.pt", pickle_protocol=4)
    return {}, {"encoder.layers.0.weight": one, "encoder.layers.1.weight": two}, {"file": "nested.pt"}


@case("torch_sharded", run="weights", tolerance=0.0, why=NOTHING)
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
    return as_torch_file(adapter_case(folder, Adapter(*wide(12, 16, 10, 14)), 230, torch.float16), folder)


@case("adapter_torch_legacy", run="adapter", tolerance=1e-5)
def adapter_torch_legacy(folder):
    """The layout of the first published checkpoints, by torch.save."""
    return as_torch_file(adapter_case(folder, LegacyAdapter(*wide(12, 16, 10, 14)), 231, torch.float16), folder)


@case("adapter_torch_sd15", run="adapter", tolerance=1e-5)
def adapter_torch_sd15(folder):
    """Five linears, no pooled text, by torch.save."""
    return as_torch_file(adapter_case(folder, ShortAdapter(*wide(12, 16, 10)), 232), folder)


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
        block_out_channels=wide(4, 4, 8),
        norm_num_groups=2,
        layers_per_block=deep(2),
    )
    return randomised(vae, seed).half()


def tiny_clip(model, seed):
    config = CLIPTextConfig(
        vocab_size=9,
        hidden_size=wide(4),
        intermediate_size=wide(6),
        projection_dim=wide(4),
        num_hidden_layers=deep(2),
        num_attention_heads=2,
        max_position_embeddings=5,
    )
    return randomised(model(config), seed).half()


@case("single_file_sdxl", run="single_file", tolerance=0.0, why=NOTHING)
def single_file_sdxl(folder):
    """SDXL's levels in small, in the key layout of community checkpoints: safetensors."""
    unet = UNet2DConditionModel(
        block_out_channels=wide(4, 4, 8),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=[1, 1, 2],
        cross_attention_dim=wide(8),
        norm_num_groups=2,
        use_linear_projection=True,
        transformer_layers_per_block=[1, 1, deep(2)],
        addition_embed_type="text_time",
        addition_time_embed_dim=2,
        projection_class_embeddings_input_dim=16,
    )
    texts = tiny_clip(CLIPTextModel, 222), "conditioner.embedders.0.transformer.", tiny_clip(CLIPTextModelWithProjection, 223)
    save = lambda tensors, path: save_file({key: value.contiguous() for key, value in tensors.items()}, path)
    return single_file_case(folder, randomised(unet, 220).half(), tiny_vae(221), *texts, save, "model.safetensors")


@case("single_file_sd15", run="single_file", tolerance=0.0, why=NOTHING)
def single_file_sd15(folder):
    """SD1.5's levels in small, in the key layout of community checkpoints: a pickled training state."""
    unet = UNet2DConditionModel(
        block_out_channels=wide(4, 4, 4, 8), attention_head_dim=2, cross_attention_dim=wide(6), norm_num_groups=2, layers_per_block=deep(2)
    )
    save = lambda tensors, path: torch.save({"global_step": 7, "state_dict": tensors}, path)
    clip = tiny_clip(CLIPTextModel, 226)
    return single_file_case(folder, randomised(unet, 224).half(), tiny_vae(225), clip, "cond_stage_model.transformer.", None, save, "model.ckpt")
