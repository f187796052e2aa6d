"""Learning rates, noise schedules and the timesteps a sampler visits."""

import json

import torch
import torch.nn as nn
from diffusers import DPMSolverMultistepScheduler
from transformers import get_constant_schedule_with_warmup, get_polynomial_decay_schedule_with_warmup

from .common import case, normal

EXACT_RATES = "f64 on both sides"
CUMULATED = "the other side computes the noise schedule as a running product in f32"


def optimiser(lr):
    return torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=lr)


def lr_case(rates, steps, **settings):
    rates = torch.tensor(rates, dtype=torch.float64)
    return {"steps": torch.tensor(steps)}, {"rates": rates}, settings


def some_steps(warmup, total, seed):
    """The steps where something begins or ends, their neighbours, and some between."""
    between = (normal(seed, 12).abs() * 1e6).long() % total
    edges = [step + offset for step in (0, warmup // 2, warmup, total // 2, total) for offset in (-1, 0, 1)]
    return sorted({step for step in edges + between.tolist() + [3 * total] if step >= 0})


@case("lr_constant", run="lr_schedule", tolerance=1e-12, why=EXACT_RATES)
def lr_constant(folder):
    """A constant rate after warm-up, as transformers has it."""
    lr, warmup, total = 5e-5, 40, 1000
    steps = some_steps(warmup, total, 400)
    (factor,) = get_constant_schedule_with_warmup(optimiser(lr), warmup).lr_lambdas
    return lr_case([lr * factor(step) for step in steps], steps, decay="constant", lr=lr, warmup_steps=warmup, total_steps=total)


@case("lr_cosine", run="lr_schedule", tolerance=1e-9, why="torch computes its rates one from the other, and the error grows")
def lr_cosine(folder):
    """Half a cosine from step 0 times a linear warm-up whose first step moves: torch's CosineAnnealingLR and LinearLR."""
    lr, end_lr, warmup, total = 2e-3, 1e-4, 50, 800
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser(lr), T_max=total, eta_min=end_lr)
    ramp = torch.optim.lr_scheduler.LinearLR(optimiser(1.0), start_factor=1 / warmup, total_iters=warmup - 1)
    rates = []
    for _ in range(total + 1):
        rates.append(cosine.get_last_lr()[0] * ramp.get_last_lr()[0])
        for scheduler in (cosine, ramp):
            scheduler.optimizer.step()
            scheduler.step()
    steps = some_steps(warmup, total, 401)
    # torch's cosine would rise again; here the rate stays where it ends.
    wanted = [rates[min(step, total)] for step in steps]
    return lr_case(wanted, steps, decay="cosine", lr=lr, end_lr=end_lr, warmup_steps=warmup, total_steps=total)


def polynomial(seed, lr, end_lr, power, warmup, total):
    steps = some_steps(warmup, total, seed)
    (factor,) = get_polynomial_decay_schedule_with_warmup(optimiser(lr), warmup, total, lr_end=end_lr, power=power).lr_lambdas
    settings = {"decay": "polynomial", "lr": lr, "end_lr": end_lr, "power": power, "warmup_steps": warmup, "total_steps": total}
    return lr_case([lr * factor(step) for step in steps], steps, **settings)


@case("lr_polynomial", run="lr_schedule", tolerance=1e-12, why=EXACT_RATES)
def lr_polynomial(folder):
    """The published trainer's schedule at its own numbers: 100 steps of warm-up, then a straight line over two million."""
    return polynomial(402, lr=1e-5, end_lr=5e-8, power=1.0, warmup=100, total=2_232_142)


@case("lr_polynomial_squared", run="lr_schedule", tolerance=1e-12, why=EXACT_RATES)
def lr_polynomial_squared(folder):
    """A bent polynomial without warm-up."""
    return polynomial(403, lr=1e-3, end_lr=1e-6, power=2.0, warmup=0, total=500)


def noise_case(folder, num_steps=(30, 1, 4, 20, 50, 102), **config):
    """What diffusers makes of a scheduler_config.json: the signal left at every timestep, and the timesteps of DPM-Solver++."""
    config = {"_class_name": "EulerDiscreteScheduler", "num_train_timesteps": 1000, **config}
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config, indent=2), "utf-8")
    # Where the last step lands does not change the others; with squared cosines diffusers cannot end at the noise of timestep 0.
    scheduler = DPMSolverMultistepScheduler.from_config(config, final_sigmas_type="zero")
    outputs = {"alphas_cumprod": scheduler.alphas_cumprod}
    for count in num_steps:
        scheduler.set_timesteps(count)
        outputs[f"timesteps.{count}"] = scheduler.timesteps
    return {}, outputs, {"num_steps": num_steps}


@case("noise_like_sdxl", run="noise_schedule", tolerance=1e-5, why=CUMULATED)
def noise_like_sdxl(folder):
    """SDXL's schedule: roots of beta grow linearly; leading timesteps with an offset of one."""
    return noise_case(folder, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1)


@case("noise_like_sd15", run="noise_schedule", tolerance=1e-5, why=CUMULATED)
def noise_like_sd15(folder):
    """SD1.5's configuration, which names no spacing: linspaced timesteps, whatever the offset."""
    return noise_case(folder, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)


@case("noise_linear", run="noise_schedule", tolerance=1e-5, why=CUMULATED)
def noise_linear(folder):
    """Betas that grow linearly, the defaults of diffusers; trailing timesteps."""
    return noise_case(folder, num_steps=(7, 30), timestep_spacing="trailing")


@case("noise_cosine", run="noise_schedule", tolerance=1e-5, why=CUMULATED)
def noise_cosine(folder):
    """A squared cosine, betas capped at 0.999; fewer timesteps of training."""
    return noise_case(folder, num_steps=(12, 30), beta_schedule="squaredcos_cap_v2", num_train_timesteps=400, timestep_spacing="leading")


@case("noise_trained", run="noise_schedule", tolerance=1e-5, why=CUMULATED)
def noise_trained(folder):
    """Every beta given."""
    return noise_case(folder, num_steps=(5,), trained_betas=[round(0.01 + 0.002 * index**1.5, 6) for index in range(20)], num_train_timesteps=20)


@case("noise_zero_terminal", run="noise_schedule", tolerance=1e-5, why=CUMULATED)
def noise_zero_terminal(folder):
    """Stretched until no signal is left at the last timestep, as models that predict velocity are trained."""
    options = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}
    return noise_case(folder, num_steps=(20,), beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", **options)
