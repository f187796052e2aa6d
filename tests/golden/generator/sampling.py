"""The solver, and the road from prompt to picture."""

import json

import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionXLPipeline
from safetensors.torch import save_file

from .common import CONTEXT_LENGTH, DEMO, DEMO_IN_CASE, case, normal, randomised, wide
from .models import Adapter, demo_texts


def solver_case(folder, num_steps, seed, **config):
    """Random network outputs: where they lead depends on the coefficients alone."""
    config = {"_class_name": "EulerDiscreteScheduler", "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, **config}
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config, indent=2), "utf-8")
    scheduler = DPMSolverMultistepScheduler.from_config(config)
    scheduler.set_timesteps(num_steps)
    inputs = {"sample": normal(seed, 2, wide(8)), "outputs": normal(seed + 1, num_steps, 2, wide(8))}
    sample, samples = inputs["sample"], []
    for timestep, output in zip(scheduler.timesteps, inputs["outputs"]):
        sample = scheduler.step(output, timestep, sample).prev_sample
        samples.append(sample)
    return inputs, {"timesteps": scheduler.timesteps, "samples": torch.stack(samples)}, {"num_steps": num_steps}


SOLVER = "the other side computes the noise schedule as a running product in f32"


@case("solver_sdxl", run="solver", tolerance=1e-4, why=SOLVER)
def solver_sdxl(folder):
    """SDXL's configuration with 30 steps, ending at the noise of timestep 0 as in the published trainer's time."""
    return solver_case(folder, 30, 90, beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1, final_sigmas_type="sigma_min")


@case("solver_zero", run="solver", tolerance=1e-4, why=SOLVER)
def solver_zero(folder):
    """Trailing timesteps, ending without noise."""
    return solver_case(folder, 20, 91, beta_schedule="scaled_linear", timestep_spacing="trailing", final_sigmas_type="zero")


@case("solver_few_steps", run="solver", tolerance=1e-4, why=SOLVER)
def solver_few_steps(folder):
    """Seven steps over linspaced timesteps: the last is of first order though it ends in noise."""
    return solver_case(folder, 7, 92, beta_schedule="linear", timestep_spacing="linspace", final_sigmas_type="sigma_min")


@case("solver_velocity", run="solver", tolerance=1e-4, why=SOLVER)
def solver_velocity(folder):
    """A network that predicts velocity."""
    options = {"timestep_spacing": "leading", "steps_offset": 1, "prediction_type": "v_prediction", "final_sigmas_type": "zero"}
    return solver_case(folder, 16, 93, beta_schedule="scaled_linear", **options)


@case("solver_zero_terminal", run="solver", tolerance=1e-4, why=SOLVER)
def solver_zero_terminal(folder):
    """A network that predicts velocity, from noise without any signal to data without any noise."""
    options = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction", "final_sigmas_type": "zero"}
    return solver_case(folder, 12, 94, beta_schedule="scaled_linear", **options)


def picture_case(folder, seed, **options):
    """Pictures by diffusers' pipeline, of prompts encoded by either road."""
    settings = {
        "model": DEMO_IN_CASE,
        "student": f"{DEMO_IN_CASE}/text_encoder_zh",
        "adapter": "adapter.safetensors",
        "context_length": CONTEXT_LENGTH,
        "english": ["a big red circle on a white background", "a blue star"],
        "captions": ["白色背景上的大红色圆形", "蓝色的星形"],
        **options,
    }
    adapter = randomised(Adapter(64, wide(40), 48, 80), seed)
    save_file(adapter.state_dict(), folder / "adapter.safetensors")
    pipeline = StableDiffusionXLPipeline.from_pretrained(DEMO, torch_dtype=torch.float32)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    student, teacher = demo_texts()
    roads = {"english": lambda texts: teacher(texts), "student": lambda texts: adapter(student(texts)[0])}
    count, latents, outputs = len(settings["english"]), normal(seed + 1, 2, 4, options["height"] // 8, options["width"] // 8), {}
    for (name, encode), prompts in zip(roads.items(), [settings["english"], settings["captions"]]):
        with torch.no_grad():
            (pooled, sequence), (empty_pooled, empty_sequence) = encode(prompts), encode([""] * count)
            final = pipeline(
                prompt_embeds=sequence,
                pooled_prompt_embeds=pooled,
                negative_prompt_embeds=empty_sequence,
                negative_pooled_prompt_embeds=empty_pooled,
                latents=latents.clone(),
                height=options["height"],
                width=options["width"],
                num_inference_steps=options["num_steps"],
                guidance_scale=options["guidance"],
                guidance_rescale=options["guidance_rescale"],
                output_type="latent",
            ).images
            decoded = pipeline.vae.decode(final / pipeline.vae.config.scaling_factor).sample
        pixels = (decoded / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
        outputs |= {f"{name}.latents": final, f"{name}.pictures": (pixels * 255).round().to(torch.uint8)}
    return {"latents": latents}, outputs, settings


PICTURES = "f32 on both sides; rounding accumulates over the steps, and now and then a pixel by one grey level"


@case("pictures_guided", run="pictures", tolerance=1e-3, why=PICTURES)
def pictures_guided(folder):
    """The demo's way of sampling: 20 guided steps."""
    return picture_case(folder, 95, height=64, width=64, num_steps=20, guidance=5.0, guidance_rescale=0.0)


@case("pictures_rescaled", run="pictures", tolerance=1e-3, why=PICTURES)
def pictures_rescaled(folder):
    """Few steps, rescaled guidance, and a picture that is not square."""
    return picture_case(folder, 97, height=64, width=96, num_steps=6, guidance=7.5, guidance_rescale=0.7)


@case("pictures_unguided", run="pictures", tolerance=1e-3, why=PICTURES)
def pictures_unguided(folder):
    """Guidance 1 leaves the negative prompt out."""
    return picture_case(folder, 99, height=48, width=64, num_steps=5, guidance=1.0, guidance_rescale=0.0)
