"""Times a training step of `worker bench` against pea_diffusers.py: the same model, adapter, batch and threads, batches made before the clock.

usage: bench_step.py WORKER MODEL_DIR [options]
Runs them in turn and prints the medians and their ratio. MODEL_DIR has text_encoder_zh/ beside the usual folders.
"""
import argparse
import json
import pathlib
import statistics
import subprocess
import sys

PEER = pathlib.Path(__file__).with_name("pea_diffusers.py")
WARMUP = 3


def parse():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("worker")
    parser.add_argument("model")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="f32")
    parser.add_argument("--batch", default="16")
    parser.add_argument("--size", nargs=2, default=["64", "64"], metavar=("WIDTH", "HEIGHT"))
    parser.add_argument("--hidden", default="256", help="width of the adapter's hidden layers")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", default="2")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--reference", action="store_true", help="the peer as the published trainer does it")
    parser.add_argument("--compile", action="store_true", help="the peer under torch.compile")
    return parser.parse_args()


def run(command):
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def main():
    options = parse()
    alike = ["--device", options.device, "--dtype", options.dtype, "--threads", options.threads, "--hidden", options.hidden]
    # The peer times the second half of its steps.
    peer = [sys.executable, str(PEER), options.model, "none", str(2 * options.steps), options.batch, *alike, "--synthetic", *options.size]
    peer += [flag for flag, wanted in [("--reference", options.reference), ("--compile", options.compile)] if wanted]
    worker = [options.worker, "bench", "--model", options.model, "--student", f"{options.model}/text_encoder_zh", *alike, "--vae-dtype", "f32"]
    worker += ["--batch", options.batch, "--size", *options.size, "--steps", str(options.steps), "--warmup", str(WARMUP)]
    worker += ["--peak-time", "0s", "--json"]

    rates = {"worker": [], "diffusers": []}
    for _ in range(options.rounds):
        rates["worker"].append(json.loads(run(worker))["samples_per_second"])
        rates["diffusers"].append(float(run(peer).splitlines()[-1].split()[0]))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    for name, values in rates.items():
        print(f"{name:<10} {medians[name]:8.2f} samples/s  ({', '.join(f'{value:.2f}' for value in values)})")
    print(f"ratio {medians['worker'] / medians['diffusers']:.2f}")


if __name__ == "__main__":
    main()
