"""The demo's models, the adapters, and what is read off a UNet as it runs."""

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import BertModel, BertTokenizer, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from .common import CONTEXT_LENGTH, DEMO, frozen


def demo_unet():
    return frozen(UNet2DConditionModel.from_pretrained(DEMO, subfolder="unet", torch_dtype=torch.float32))


def demo_vae():
    return frozen(AutoencoderKL.from_pretrained(DEMO, subfolder="vae", torch_dtype=torch.float32))


def bert_student(tokenizer, bert, length):
    """A function from captions to token states and the mask of what is not padding."""

    def student(captions):
        tokens = tokenizer(captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
        mask = (tokens != 0).long()
        return bert(tokens, attention_mask=mask)[0], mask

    return student


def sdxl_teacher(tokenizers, clip, big, length):
    """A function from captions to what SDXL is told about them: pooled, sequence."""

    def teacher(captions):
        ids = [tokenizer(captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids for tokenizer in tokenizers]
        first, second = clip(ids[0], output_hidden_states=True), big(ids[1], output_hidden_states=True)
        return second.text_embeds, torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1)

    return teacher


def demo_texts():
    """Returns the demo's encoders as functions from captions: the student's to states and mask, the teacher's to (pooled, sequence)."""
    load = lambda model, folder, **options: frozen(model.from_pretrained(DEMO, subfolder=folder, dtype=torch.float32, **options))
    bert = load(BertModel, "text_encoder_zh", add_pooling_layer=False)
    tokenizers = [CLIPTokenizer.from_pretrained(DEMO, subfolder=folder) for folder in ("tokenizer", "tokenizer_2")]
    encoders = load(CLIPTextModel, "text_encoder"), load(CLIPTextModelWithProjection, "text_encoder_2")
    student = bert_student(BertTokenizer.from_pretrained(DEMO, subfolder="text_encoder_zh"), bert, CONTEXT_LENGTH)
    return student, sdxl_teacher(tokenizers, *encoders, CONTEXT_LENGTH)


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


class Adapter(nn.Module):
    """The adapter of the method, under the names of its published state dict."""

    def __init__(self, width, hidden, pooled, output):
        super().__init__()
        self.layernorm = nn.LayerNorm(width)
        linears = [nn.Linear(width, hidden, bias=False), nn.Linear(hidden, hidden, bias=False), nn.Linear(hidden, pooled, bias=False)]
        self.projector = nn.Sequential(linears[0], nn.GELU(), linears[1], nn.GELU(), linears[2])
        self.fc = nn.Linear(pooled, output)

    def forward(self, states, mask=None):
        projected = self.projector(self.layernorm(states))
        if mask is None:
            pooled = projected.mean(1)
        else:
            pooled = (projected * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
        return pooled, self.fc(F.gelu(projected))


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
    """The adapter for SD1.5: neither pooled text nor a last layer. The published test scripts have five linears, the trainer three."""

    def __init__(self, width, hidden, output, depth=5):
        super().__init__()
        self.layernorm = nn.LayerNorm(width)
        widths = [width, *[hidden] * (depth - 1), output]
        linears = [nn.Linear(*pair, bias=False) for pair in zip(widths, widths[1:])]
        self.projector = nn.Sequential(*[layer for linear in linears for layer in (nn.GELU(), linear)][1:])

    def forward(self, states, mask=None):
        return self.projector(self.layernorm(states))
