"""ControlNets: what one makes of an image, and what the UNet makes of that."""

import torch
from diffusers import ControlNetModel, UNet2DConditionModel

from .common import case, deep, normal, randomised, save_as_half, seeded, wide


def control_case(folder, seed, inputs, hint, unet_options, **config):
    """A UNet and a ControlNet of the same configuration, random both; the control image is brought to latents by as many layers as `hint` has."""
    unet = save_as_half(randomised(UNet2DConditionModel(**config, **unet_options), seed), folder / "unet")
    control = ControlNetModel(**config, conditioning_embedding_out_channels=hint)
    control = save_as_half(randomised(control, seed + 1), folder / "controlnet")
    count, _, height, width = inputs["sample"].shape
    enlarged = 2 ** (len(hint) - 1)
    inputs["image"] = torch.rand(count, 3, enlarged * height, enlarged * width, generator=seeded(seed + 2))
    added = {"text_embeds": inputs["pooled"], "time_ids": inputs["time_ids"]} if "pooled" in inputs else None
    asked, scale = (inputs["sample"], inputs["timesteps"], inputs["text"]), 0.7
    with torch.no_grad():
        down, mid = control(*asked, inputs["image"], conditioning_scale=scale, added_cond_kwargs=added, return_dict=False)
        residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
        sample = unet(*asked, added_cond_kwargs=added, **residuals).sample
    outputs = {"sample": sample, "mid": mid, **{f"down.{index}": residual for index, residual in enumerate(down)}}
    return inputs, outputs, {"unet": "unet", "controlnet": "controlnet", "scale": scale}


@case("controlnet_like_sd15", run="controlnet", tolerance=1e-4)
def controlnet_like_sd15(folder):
    """A random ControlNet wired as those of SD1.5: four levels, two layers each, so twelve residuals besides that of the middle."""
    inputs = {"sample": normal(500, 2, 4, 8, 8), "timesteps": torch.tensor([17, 801]), "text": normal(501, 2, 5, wide(8))}
    config = {
        "block_out_channels": wide(4, 4, 8, 8),
        "layers_per_block": deep(2),
        "attention_head_dim": 2,
        "cross_attention_dim": wide(8),
        "norm_num_groups": 2,
    }
    return control_case(folder, 502, inputs, wide(2, 4, 4, 6), {}, **config)


@case("controlnet_like_sdxl", run="controlnet", tolerance=1e-4)
def controlnet_like_sdxl(folder):
    """A random ControlNet wired as those of SDXL: pooled text and sizes beside the timestep, several transformer layers; an image twice as wide."""
    attending = deep(2)
    config = {
        "block_out_channels": wide(*[4] * attending, 8),
        "down_block_types": ("DownBlock2D", *["CrossAttnDownBlock2D"] * attending),
        "layers_per_block": 1,
        "attention_head_dim": [*[1] * attending, 2],
        "cross_attention_dim": wide(8),
        "norm_num_groups": 2,
        "use_linear_projection": True,
        "transformer_layers_per_block": [*[1] * attending, 2],
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": wide(4),
        "projection_class_embeddings_input_dim": wide(30),
    }
    inputs = {
        "sample": normal(510, 2, 4, 8, 16),
        "timesteps": torch.tensor([250, 3]),
        "text": normal(511, 2, 5, wide(8)),
        "pooled": normal(512, 2, wide(6)),
        "time_ids": torch.tensor([[48, 48, 0, 0, 48, 48], [77, 99, 3, 0, 48, 48]]).float(),
    }
    ups = {"up_block_types": (*["CrossAttnUpBlock2D"] * attending, "UpBlock2D")}
    return control_case(folder, 513, inputs, wide(2, 4, 6), ups, **config)
