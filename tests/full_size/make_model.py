"""Write an SDXL and a Chinese-CLIP of the published sizes with random f16 weights, in the layouts in which they are published.
usage: make_model.py OUT      makes OUT/sdxl (6.9 GB) and OUT/chinese-clip (0.6 GB)

Architectures are those of diffusers and transformers, by their own configuration classes; so names, shapes and configuration files are what
a download of the real models gives, but for what the weights know."""

import json
import math
import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import BertConfig, BertModel, CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

OUT = Path(sys.argv[1])
torch.manual_seed(0)


def weights_of(model, rename=lambda key: key):
    """Random f16 weights for a model that lies on the meta device: gains 1, offsets 0, all else by its fan-in."""
    made = {}
    for key, value in model.state_dict().items():
        if not value.is_floating_point():
            continue
        if value.dim() == 1:
            made[rename(key)] = torch.full(value.shape, float(key.endswith("weight")), dtype=torch.float16)
        else:
            fan_in = value.shape[1:].numel() if "embed" not in key else 2500
            made[rename(key)] = (torch.randn(value.shape, dtype=torch.float32) / math.sqrt(fan_in)).half()
    return made


def save(folder, name, model, config):
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights_of(model), folder / name, metadata={"format": "pt"})
    config(folder)
    print(f"{folder}: {sum(value.numel() for value in model.state_dict().values()) / 1e6:.0f}M parameters", flush=True)


def clip_tokenizer(folder, pad):
    """CLIP's own merges, from which its vocabulary follows."""
    import gzip

    folder.mkdir(parents=True, exist_ok=True)
    assets = Path(__file__).resolve().parents[2] / "worker/model/assets"
    merges = gzip.decompress((assets / "clip_merges.txt.gz").read_bytes()).decode()
    lines = [line for line in merges.splitlines() if len(line.split()) == 2][-(49408 - 512 - 2):]
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(byte) for byte in printable] + [chr(256 + at) for at in range(256 - len(printable))]
    words = letters + [letter + "</w>" for letter in letters] + ["".join(line.split()) for line in lines]
    words += ["<|startoftext|>", "<|endoftext|>"]
    assert len(words) == 49408, len(words)
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(lines) + "\n")
    (folder / "vocab.json").write_text(json.dumps({word: at for at, word in enumerate(words)}, ensure_ascii=False))
    config = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": pad, "model_max_length": 77, "tokenizer_class": "CLIPTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "special_tokens_map.json").write_text(json.dumps({key: config[key] for key in ("bos_token", "eos_token", "pad_token")}))


def sdxl(root):
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=128, block_out_channels=(320, 640, 1280), layers_per_block=2, cross_attention_dim=2048, attention_head_dim=(5, 10, 20),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10), use_linear_projection=True, addition_embed_type="text_time",
            addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
        )
        vae = AutoencoderKL(
            sample_size=1024, block_out_channels=(128, 256, 512, 512), layers_per_block=2, scaling_factor=0.13025,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        )
        sizes = dict(vocab_size=49408, max_position_embeddings=77, bos_token_id=0, eos_token_id=2, pad_token_id=1)
        first = CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
                                             hidden_act="quick_gelu", projection_dim=768, **sizes))
        second = CLIPTextModelWithProjection(CLIPTextConfig(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32,
                                                            num_attention_heads=20, hidden_act="gelu", projection_dim=1280, **sizes))
    for name, model in (("unet", unet), ("vae", vae)):
        save(root / name, "diffusion_pytorch_model.fp16.safetensors", model, model.save_config)
    for name, model in (("text_encoder", first), ("text_encoder_2", second)):
        save(root / name, "model.fp16.safetensors", model, model.config.save_pretrained)
    EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1,
                           use_karras_sigmas=False).save_config(root / "scheduler")
    clip_tokenizer(root / "tokenizer", "<|endoftext|>")
    clip_tokenizer(root / "tokenizer_2", "!")
    parts = {"scheduler": ["diffusers", "EulerDiscreteScheduler"], "text_encoder": ["transformers", "CLIPTextModel"],
             "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"], "tokenizer": ["transformers", "CLIPTokenizer"],
             "tokenizer_2": ["transformers", "CLIPTokenizer"], "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"]}
    index = {"_class_name": "StableDiffusionXLPipeline", "_diffusers_version": "0.19.0", "force_zeros_for_empty_prompt": True, **parts}
    (root / "model_index.json").write_text(json.dumps(index, indent=2))


def chinese_clip(root):
    """The text half of OFA-Sys/chinese-clip-vit-huge-patch14, whose other half is never read."""
    text = dict(vocab_size=21128, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096,
                max_position_embeddings=512, type_vocab_size=2, layer_norm_eps=1e-12, pad_token_id=0)
    with torch.device("meta"):
        model = BertModel(BertConfig(**text), add_pooling_layer=False)
    root.mkdir(parents=True, exist_ok=True)
    weights = weights_of(model, lambda key: f"text_model.{key}")
    weights["text_projection.weight"] = (torch.randn(1024, 1024) / 32).half()
    save_file(weights, root / "model.safetensors", metadata={"format": "pt"})
    config = {"model_type": "chinese_clip", "projection_dim": 1024, "text_config": {"model_type": "chinese_clip_text_model", **text}}
    (root / "config.json").write_text(json.dumps(config, indent=2))
    words = ["[PAD]"] + [f"[unused{at}]" for at in range(1, 100)] + ["[UNK]", "[CLS]", "[SEP]", "[MASK]", "<S>", "<T>"]
    words += [chr(code) for code in range(33, 127)] + list("，。！？：；“”、") + [chr(code) for code in range(0x4E00, 0x9FA6)]
    (root / "vocab.txt").write_text("\n".join(words[:21128]) + "\n")


sdxl(OUT / "sdxl")
chinese_clip(OUT / "chinese-clip")
