"""Writes the golden cases: what the Python libraries compute on the demo's models and on small random ones.

usage: python generate.py [--out DIR] [--seed N] [--size N] [CASE ...]        (no CASE: all of them; README.md says more)
"""

import argparse
import importlib
import sys
from pathlib import Path

from generator import common

SUBJECTS = ["unet", "controlnet", "vae", "distill", "train", "text", "students", "adapter", "schedules", "sampling", "drawing", "weights"]


def main():
    parser = argparse.ArgumentParser(description="Writes golden cases.")
    parser.add_argument("--out", type=Path, default=common.OPTIONS.out, help="folder for the cases (default: the committed ones)")
    parser.add_argument("--seed", type=int, default=0, help="added to every seed: other weights and inputs, other results")
    parser.add_argument("--size", type=int, default=1, help="widens and deepens the random models: 2, 3, ..")
    parser.add_argument("cases", nargs="*", metavar="CASE", help="names of cases; without any, all of them")
    arguments = parser.parse_args()
    if arguments.size < 1:
        parser.error("--size must be at least 1")
    common.OPTIONS.out, common.OPTIONS.seed, common.OPTIONS.size = arguments.out.resolve(), arguments.seed, arguments.size

    import torch

    torch.set_num_threads(1)
    for subject in SUBJECTS:
        importlib.import_module(f"generator.{subject}")
    unknown = [name for name in arguments.cases if name not in common.REGISTRY]
    if unknown:
        parser.error(f"no case {', '.join(unknown)}; there are {', '.join(common.REGISTRY)}")
    for name in arguments.cases or common.REGISTRY:
        common.write(name)


if __name__ == "__main__":
    sys.exit(main())
