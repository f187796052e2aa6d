"""The peer of `sample`: diffusers' SDXL pipeline on the CPU, in f32.

usage: draw_diffusers.py MODEL PICTURES BATCH STEPS THREADS
Draws PICTURES in batches of BATCH with DPM-Solver++ 2M and guidance 5, after a warm-up of one batch that is not counted; prints samples per second."""
import sys, time
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionXLPipeline

model, (pictures, batch, steps, threads) = sys.argv[1], map(int, sys.argv[2:6])
torch.set_num_threads(threads)
pipeline = StableDiffusionXLPipeline.from_pretrained(model, torch_dtype=torch.float32)
pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
pipeline.set_progress_bar_config(disable=True)
draw = lambda count, steps: pipeline(["a big red circle on a white background"] * count, num_inference_steps=steps, guidance_scale=5.0, height=64, width=64)
draw(batch, 2)
started = time.perf_counter()
for first in range(0, pictures, batch):
    draw(min(batch, pictures - first), steps)
print(f"{pictures / (time.perf_counter() - started):.3f} samples/s")
