"""What all cases share: the list of cases, seeds and sizes, and how a case is written."""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent.parent
DEMO = HERE.parent / "demo" / "model"
# How a case names the demo's model: it may lie anywhere.
DEMO_IN_CASE = "$DEMO"
CONTEXT_LENGTH = 24

KERNELS = "f32 on both sides; sums are taken in another order by other kernels"
EXACT = "token ids are equal or wrong"
NOTHING = "nothing is computed"

REGISTRY = {}


@dataclass
class Options:
    """What the command line says; set before the first case runs."""

    out: Path = HERE / "cases"
    seed: int = 0
    size: int = 1


OPTIONS = Options()


def case(name, run, tolerance, why=KERNELS):
    """Registers a function `folder -> (inputs, outputs, settings)` as the case `name`."""

    def register(function):
        REGISTRY[name] = (function, {"run": run, "about": " ".join(function.__doc__.split()), "tolerance": tolerance, "why": why})
        return function

    return register


def seeded(seed):
    return torch.Generator().manual_seed(seed + OPTIONS.seed)


def normal(seed, *shape):
    return torch.randn(*shape, generator=seeded(seed))


def wide(*widths):
    """Widths of a random model at the size asked for: multiples of those of the committed cases."""
    scaled = [width * OPTIONS.size for width in widths]
    return scaled[0] if len(scaled) == 1 else tuple(scaled)


def deep(layers):
    """A number of layers, or of levels, at the size asked for: one more for every size."""
    return layers + OPTIONS.size - 1


def frozen(model):
    return model.eval().requires_grad_(False)


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


def to_toml(settings):
    """Settings as TOML: plain values first, then one level of tables."""
    # JSON's strings, numbers, booleans and arrays of them are TOML's too.
    lines = [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in settings.items() if not isinstance(value, dict)]
    for name, table in settings.items():
        if isinstance(table, dict):
            lines += ["", f"[{name}]"] + [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in table.items()]
    return "\n".join(lines) + "\n"


def write(name):
    """Makes a case anew and prints its size."""
    function, header = REGISTRY[name]
    folder = OPTIONS.out / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    inputs, outputs, settings = function(folder)
    contiguous = lambda tensors: {key: value.detach().clone().contiguous() for key, value in tensors.items()}
    save_file(contiguous(inputs), folder / "inputs.safetensors")
    save_file(contiguous(outputs), folder / "outputs.safetensors")
    (folder / "case.toml").write_text(to_toml({**header, **settings}), encoding="utf-8")
    print(f"{name}: {sum(path.stat().st_size for path in folder.rglob('*') if path.is_file()) / 1024:.0f} KiB")
