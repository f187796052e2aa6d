"""UNets: one prediction and the features of all blocks."""

import torch
from diffusers import UNet2DConditionModel

from .common import DEMO_IN_CASE, case, deep, normal, randomised, save_as_half, wide
from .models import demo_unet, hook_features


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
        "sample": normal(1, 3, 4, 8, wide(12)),
        "timesteps": torch.tensor([0, 437, 999]),
        "text": normal(2, 3, 17, 80),
        "pooled": normal(3, 3, 48),
        "time_ids": torch.tensor([[96, 64, 0, 0, 64, 96], [500, 333, 7, 0, 64, 96], [1024, 2048, 0, 31, 64, 96]]).float(),
    }
    return inputs, run_unet(demo_unet(), inputs), {"model": f"{DEMO_IN_CASE}/unet"}


@case("unet_like_sd15", run="unet", tolerance=1e-4)
def unet_like_sd15(folder):
    """A random network wired as SD1.5: attention behind 1x1 convolutions, no added embedding, one number of heads for all levels; an odd height."""
    attending = deep(2)
    unet = UNet2DConditionModel(
        block_out_channels=wide(8, *[16] * attending),
        down_block_types=(*["CrossAttnDownBlock2D"] * attending, "DownBlock2D"),
        up_block_types=("UpBlock2D", *["CrossAttnUpBlock2D"] * attending),
        layers_per_block=deep(1),
        attention_head_dim=wide(2),
        cross_attention_dim=wide(12),
        norm_num_groups=4,
    )
    unet = save_as_half(randomised(unet, 10), folder / "model")
    inputs = {"sample": normal(11, 2, 4, 9, 8), "timesteps": torch.tensor([17, 801]), "text": normal(12, 2, 5, wide(12))}
    return inputs, run_unet(unet, inputs), {"model": "model"}


@case("unet_like_ssd1b", run="unet", tolerance=1e-4)
def unet_like_ssd1b(folder):
    """A random network wired as SSD-1B: other numbers of transformer layers down and up, no attention in the middle; nine input channels."""
    unet = UNet2DConditionModel(
        in_channels=9,
        block_out_channels=wide(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2D",
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=[1, wide(4)],
        cross_attention_dim=wide(12),
        norm_num_groups=4,
        use_linear_projection=True,
        transformer_layers_per_block=[1, [deep(2)]],
        reverse_transformer_layers_per_block=[[deep(2), 1], 1],
        addition_embed_type="text_time",
        addition_time_embed_dim=wide(4),
        projection_class_embeddings_input_dim=wide(30),
        flip_sin_to_cos=False,
    )
    unet = save_as_half(randomised(unet, 20), folder / "model")
    inputs = {
        "sample": normal(21, 2, 9, 6, 6),
        "timesteps": torch.tensor([250, 3]),
        "text": normal(22, 2, 5, wide(12)),
        "pooled": normal(23, 2, wide(6)),
        "time_ids": torch.tensor([[48, 48, 0, 0, 48, 48], [77, 99, 3, 0, 48, 48]]).float(),
    }
    return inputs, run_unet(unet, inputs), {"model": "model"}
