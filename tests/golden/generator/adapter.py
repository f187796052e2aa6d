"""The adapter and its optimiser."""

import torch
import torch.nn as nn
from safetensors.torch import save_file

from .common import case, normal, randomised, wide
from .models import Adapter, LegacyAdapter, ShortAdapter


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
    return adapter_case(folder, Adapter(*wide(12, 16, 10, 14)), 70)


@case("adapter_half", run="adapter", tolerance=1e-5)
def adapter_half(folder):
    """The adapter of the method as the published trainer saves it: in fp16, widened on reading."""
    return adapter_case(folder, Adapter(*wide(12, 16, 10, 14)), 71, torch.float16)


@case("adapter_legacy", run="adapter", tolerance=1e-5)
def adapter_legacy(folder):
    """The layout of the first published checkpoints, in bf16."""
    return adapter_case(folder, LegacyAdapter(*wide(12, 16, 10, 14)), 72, torch.bfloat16)


@case("adapter_sd15", run="adapter", tolerance=1e-5)
def adapter_sd15(folder):
    """Five linears, no pooled text: SD1.5."""
    return adapter_case(folder, ShortAdapter(*wide(12, 16, 10)), 73)


@case("adamw", run="adamw", tolerance=1e-5)
def adamw(folder):
    """Ten steps of AdamW at changing rates, on gradients that are clipped now and then."""
    settings = {"beta1": 0.9, "beta2": 0.99, "eps": 1e-7, "weight_decay": 0.1, "max_norm": 6.0, "lr": [1e-2 * (1 - step / 15) for step in range(10)]}
    # Sizes spread over six orders of magnitude: eps must be where it belongs.
    inputs = {"parameters": normal(80, wide(40)), "gradients": normal(81, 10, wide(40)) * 10 ** torch.linspace(-6, 0, wide(40))}
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
