"""Autoencoders."""

import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from .common import DEMO_IN_CASE, case, deep, normal, randomised, save_as_half, seeded, wide
from .models import demo_vae


def run_vae(vae, inputs):
    with torch.no_grad():
        moments = vae.encode(inputs["images"]).latent_dist
        decoded = vae.decode(inputs["latents"] / vae.config.scaling_factor).sample
    return {"mean": moments.mean, "log_variance": moments.logvar, "decoded": decoded}


@case("vae_demo", run="vae", tolerance=1e-4)
def vae_demo(folder):
    """The demo's autoencoder: moments of pictures, pictures of scaled latents."""
    inputs = {"images": torch.rand(2, 3, 64, wide(48), generator=seeded(30)) * 2 - 1, "latents": normal(31, 2, 4, 5, 4)}
    return inputs, run_vae(demo_vae(), inputs), {"model": f"{DEMO_IN_CASE}/vae"}


@case("vae_old_names", run="vae", tolerance=1e-4)
def vae_old_names(folder):
    """A random autoencoder whose attention has the key names of old files (`query`, `proj_attn`)."""
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=wide(8, 16),
        layers_per_block=deep(1),
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
