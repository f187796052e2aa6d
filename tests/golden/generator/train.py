"""The distillation as a whole: ten updates of the adapter."""

import copy
import dataclasses

import torch
import torch.nn as nn
from safetensors.torch import save_file
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from .common import OPTIONS, case, normal
from .distill import FIXED, adapter_for, batch, distill_step, sizes_and_crops
from .pipelines import demo_models
from .vocabularies import CAPTIONS, ENGLISH

NUM_STEPS = 10
# Samples in the micro-batches of a step: not the same number, so that means of means would differ.
MICRO_BATCHES = [2, 1]
UPDATES = "where a gradient is next to nothing, rounding decides which way Adam goes; of a whole tensor's update that is less than a hundredth"


def train_case(folder, seed, models, **options):
    """Inputs, outputs and settings of training on the same pictures again and again, with other noise in every step."""
    count = sum(MICRO_BATCHES)
    models = dataclasses.replace(models, picture=(32, 32))
    settings = {
        **models.settings,
        "captions": CAPTIONS[:count],
        "english": ENGLISH[:count],
        **sizes_and_crops(count),
        "micro_batches": MICRO_BATCHES,
        "lr": 1e-3,
        "beta1": 0.9,
        "beta2": 0.999,
        "eps": 1e-8,
        "weight_decay": 0.01,
        "max_norm": 0.6,
        "ema_decay": 0.9,
        "distill": {**FIXED, **options},
    }
    adapter = adapter_for(models, seed)
    save_file(adapter.state_dict(), folder / "adapter.safetensors")
    steps = [batch(models, seed + 10 * step, count) for step in range(NUM_STEPS)]
    inputs = {name: torch.stack([step[name] for step in steps]) for name in ["posterior", "noise", "offset"]}
    flags = [[[0, 0, 1], [0, 1, 0], [1, 0, 0]][step % 3] for step in range(NUM_STEPS)]
    inputs |= {
        "pixels": steps[0]["pixels"],
        "timesteps": (normal(seed + 9, NUM_STEPS, count).abs() * 1e6).long() % 1000,
        "drop": torch.tensor([row[::-1] if step % 2 else [0, 0, 0] for step, row in enumerate(flags)], dtype=torch.uint8),
        "native": torch.tensor(flags, dtype=torch.uint8),
    }

    initial = copy.deepcopy(adapter.state_dict())
    betas = settings["beta1"], settings["beta2"]
    optimiser = torch.optim.AdamW(adapter.parameters(), lr=settings["lr"], betas=betas, eps=settings["eps"], weight_decay=settings["weight_decay"])
    average = AveragedModel(adapter, multi_avg_fn=get_ema_multi_avg_fn(settings["ema_decay"]))
    # The first call only copies: the average starts at the initial parameters.
    average.update_parameters(adapter)
    losses, norms = [], []
    for step in range(NUM_STEPS):
        sums, gradients, first = torch.zeros(3), [torch.zeros_like(parameter) for parameter in adapter.parameters()], 0
        for length in MICRO_BATCHES:
            part = slice(first, first + length)
            first += length
            micro = {name: value[part] if name == "pixels" else value[step, part] for name, value in inputs.items()}
            texts = {name: settings[name][part] for name in ["captions", "english", "original_size", "crop"]}
            outputs = distill_step(models, micro, adapter, {**settings, **texts})
            sums += torch.stack([outputs[f"loss.{name}"] for name in ["task", "logit", "feature"]])
            for total, (name, _) in zip(gradients, adapter.named_parameters()):
                total += outputs[f"gradient.{name}"]
        for parameter, gradient in zip(adapter.parameters(), gradients):
            parameter.grad = gradient / count
        norms.append(nn.utils.clip_grad_norm_(adapter.parameters(), settings["max_norm"]))
        optimiser.step()
        average.update_parameters(adapter)
        losses.append(sums / count)
    assert OPTIONS.seed or OPTIONS.size > 1 or min(norms) < settings["max_norm"] < max(norms), f"gradients of {min(norms)} to {max(norms)}"
    outputs = {"losses": torch.stack(losses), "norms": torch.stack(norms)}
    for kind, model in [("update", adapter), ("average", average.module)]:
        outputs |= {f"{kind}.{name}": value - initial[name] for name, value in model.state_dict().items()}
    return inputs, outputs, settings


@case("train", run="train", tolerance=1e-2, why=UPDATES)
def train(folder):
    """Ten updates of AdamW on clipped gradients of two micro-batches each, and the moving average: how far the parameters go, and all losses."""
    return train_case(folder, 310, demo_models())
