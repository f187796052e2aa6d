"""Times a training step of `worker bench` against pea_diffusers.py: the same model, batch and threads, batches made before the clock.

usage: bench_step.py WORKER MODEL_DIR [--device cpu] [--dtype f32] [--batch 16] [--size 64 64] [--steps 20] [--threads 2] [--rounds 3]
Runs them in turn and prints the medians and their ratio. MODEL_DIR has text_encoder_zh/ beside the usual folders.
"""
import argparse, json, pathlib, statistics, subprocess, sys

if __name__ == "__main__":
    a = argparse.ArgumentParser(); a.add_argument("worker"); a.add_argument("model"); a.add_argument("--device", default="cpu"); a.add_argument("--dtype", default="f32")
    a.add_argument("--batch", default="16"); a.add_argument("--size", nargs=2, default=["64", "64"]); a.add_argument("--steps", type=int, default=20)
    a.add_argument("--threads", default="2"); a.add_argument("--rounds", type=int, default=3); a.add_argument("--reference", action="store_true"); a.add_argument("--compile", action="store_true"); a = a.parse_args()
    peer = [sys.executable, str(pathlib.Path(__file__).with_name("pea_diffusers.py")), a.model, "none", str(2 * a.steps), a.batch, "--threads", a.threads, "--device", a.device, "--dtype", a.dtype, "--synthetic", *a.size]
    peer += [flag for flag, wanted in [("--reference", a.reference), ("--compile", a.compile)] if wanted]
    ours = [a.worker, "bench", "--model", a.model, "--student", f"{a.model}/text_encoder_zh", "--json", "--peak-time", "0s", "--vae-dtype", "f32", "--warmup", "3"]
    ours += ["--device", a.device, "--dtype", a.dtype, "--batch", a.batch, "--size", *a.size, "--steps", str(a.steps), "--threads", a.threads]
    run = lambda command: subprocess.run(command, check=True, capture_output=True, text=True).stdout
    rates = {"worker": [], "diffusers": []}
    for _ in range(a.rounds):
        rates["worker"].append(json.loads(run(ours))["samples_per_second"])
        rates["diffusers"].append(float(run(peer).splitlines()[-1].split()[0]))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    for name, values in rates.items(): print(f"{name:<10} {medians[name]:8.2f} samples/s  ({', '.join(f'{value:.2f}' for value in values)})")
    print(f"ratio {medians['worker'] / medians['diffusers']:.2f}")
