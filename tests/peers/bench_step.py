"""Times a training step of `worker bench` against pea_diffusers.py: the same model, adapter, batch and threads, batches made before the clock.

usage: bench_step.py WORKER (MODEL_DIR | --published sdxl|sd15) [options]
Runs them in turn and prints the medians, the memory that each took, and the ratios. MODEL_DIR has text_encoder_zh/ beside the usual folders;
--published stands for networks of the published sizes with random weights in both. Numbers that are not asked for are each program's own: on
a GPU the worker encodes pictures in bf16 where the peer takes f32, and the peer with --reference computes in f16.
"""
import argparse
import json
import pathlib
import statistics
import subprocess
import sys

PEER = pathlib.Path(__file__).with_name("pea_diffusers.py")
WARMUP = 3
SIZES = {"sdxl": ["640", "640"], "sd15": ["512", "512"]}


def parse():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("worker")
    parser.add_argument("model", nargs="?", default="none")
    parser.add_argument("--published", choices=list(SIZES))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype")
    parser.add_argument("--vae-dtype")
    parser.add_argument("--batch", default="16")
    parser.add_argument("--native", default="0", help="samples with a native caption, which our teacher does not see")
    parser.add_argument("--size", nargs=2, metavar=("WIDTH", "HEIGHT"), help="default: 64 64; of a published model 640 640 (sdxl) or 512 512 (sd15)")
    parser.add_argument("--hidden", help="width of the adapter's hidden layers (default: 256; of a published model 1024)")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", default="2")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--reference", action="store_true", help="the peer as the published trainer does it")
    parser.add_argument("--fp8-linears", action="store_true", help="the worker with FP8 in its UNet's transformers")
    parser.add_argument("--encode-ahead", action="store_true", help="the worker with the next step's pictures and captions encoded on a second stream")
    parser.add_argument("--precomputed", action="store_true", help="the worker with latents and text from its cache, which the peer has not")
    parser.add_argument("--compile", action="store_true", help="the peer under torch.compile")
    return parser.parse_args()


def run(command):
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


def main():
    options = parse()
    size = options.size or SIZES.get(options.published, ["64", "64"])
    hidden = options.hidden or ("1024" if options.published else "256")
    alike = ["--device", options.device, "--threads", options.threads, "--hidden", hidden, "--native", options.native]
    wanted = [("--dtype", options.dtype), ("--vae-dtype", options.vae_dtype), ("--published", options.published)]
    alike += [word for option, value in wanted if value for word in (option, value)]
    # The peer times the second half of its steps.
    peer = [sys.executable, str(PEER), options.model, "none", str(2 * options.steps), options.batch, *alike, "--synthetic", *size]
    peer += [flag for flag, wanted in [("--reference", options.reference), ("--compile", options.compile)] if wanted]
    worker = [options.worker, "bench", *alike]
    worker += [] if options.published else ["--model", options.model, "--student", f"{options.model}/text_encoder_zh"]
    worker += ["--batch", options.batch, "--size", *size, "--steps", str(options.steps), "--warmup", str(WARMUP)]
    worker += [flag for flag, wanted in [("--fp8-linears", options.fp8_linears), ("--precomputed", options.precomputed), ("--encode-ahead", options.encode_ahead)] if wanted]
    worker += ["--peak-time", "0s", "--json"]

    rates, memory = {"worker": [], "diffusers": []}, {"worker": 0.0, "diffusers": 0.0}
    for _ in range(options.rounds):
        report, lines = json.loads(run(worker)), run(peer).splitlines()
        rates["worker"].append(report["samples_per_second"])
        rates["diffusers"].append(float(lines[-1].split()[0]))
        memory["worker"] = max(memory["worker"], report["memory_bytes"] / 1e9)
        memory["diffusers"] = max(memory["diffusers"], float(lines[-2].split()[1]))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    for name, values in rates.items():
        rounds = ", ".join(f"{value:.3g}" for value in values)
        print(f"{name:<10} {medians[name]:8.3g} samples/s  ({rounds}), {memory[name]:.2f} GB of memory")
    print(f"ratio {medians['worker'] / medians['diffusers']:.2f}, of memory {memory['worker'] / memory['diffusers']:.2f}")


if __name__ == "__main__":
    main()
