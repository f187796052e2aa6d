"""Times `sample` and diffusers' pipeline on the demo model, in alternation: same prompts, size, steps, guidance, kind (f32), batch and threads.

Loading is not counted on either side; the peer's warm-up is not either, ours is. Medians over the rounds are compared.

usage: bench_draw.py SAMPLE MODEL [--threads N] [--rounds N] [--pictures N] [--steps N] [--at-least RATIO]
exit: 1 if Peapod is less than RATIO times as fast at any batch size"""
import argparse, os, pathlib, re, statistics, subprocess, sys, tempfile

here = pathlib.Path(__file__).parent
parser = argparse.ArgumentParser()
parser.add_argument("sample", help="the program, built with --release")
parser.add_argument("model")
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--rounds", type=int, default=5)
parser.add_argument("--pictures", type=int, default=16)
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
parser.add_argument("--at-least", type=float, default=1.2)
options = parser.parse_args()
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])  # children inherit it


def run(*command):
    said = subprocess.run([str(word) for word in command], check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout
    return float(re.findall(r"([\d.]+) samples/s", said)[-1])


def ours(batch):
    with tempfile.TemporaryDirectory() as folder:
        prompts = pathlib.Path(folder) / "prompts.txt"
        prompts.write_text("a big red circle on a white background\n" * options.pictures, "utf-8")
        asked = ["--prompts", prompts, "--out", f"{folder}/out.png", "--scheduler", "dpm++", "--guidance", 5, "--width", 64, "--height", 64, "--dtype", "f32"]
        return run(options.sample, "--model", options.model, *asked, "--steps", options.steps, "--batch", batch, "--threads", options.threads)


def peer(batch):
    return run(sys.executable, here / "draw_diffusers.py", options.model, options.pictures, batch, options.steps, options.threads)


worst = float("inf")
for batch in options.batches:
    rates = {"diffusers": [], "peapod": []}
    for number in range(options.rounds):
        for name, measure in (("diffusers", peer), ("peapod", ours)):
            rates[name].append(measure(batch))
        print(f"batch {batch}, round {number + 1}: diffusers {rates['diffusers'][-1]:.2f}, peapod {rates['peapod'][-1]:.2f} samples/s", flush=True)
    medians = {name: statistics.median(measured) for name, measured in rates.items()}
    worst = min(worst, medians["peapod"] / medians["diffusers"])
    spans = ", ".join(f"{name} {medians[name]:.2f} samples/s ({min(measured):.2f} to {max(measured):.2f})" for name, measured in rates.items())
    print(f"batch {batch}, medians of {options.rounds} rounds: {spans}: {medians['peapod'] / medians['diffusers']:.2f} times")
sys.exit(worst < options.at_least)
