"""Training steps of the distillation."""

import torch
from diffusers import DDPMScheduler
from safetensors.torch import save_file

from .common import CONTEXT_LENGTH, DEMO_IN_CASE, case, normal, randomised, seeded, wide
from .models import Adapter, demo_texts, demo_unet, demo_vae, hook_features


def distill_step(inputs, adapter, settings):
    """The training step, written out for the whole batch at once with masks: losses and gradients summed over samples."""
    unet, vae, (student, teacher) = demo_unet(), demo_vae(), demo_texts()
    options, captions, english = settings["distill"], settings["captions"], settings["english"]
    count = len(captions)
    drop, z = inputs["drop"].bool(), inputs["native"].float()
    if not options["hybrid"]:
        on_images, on_teacher = torch.ones(count), torch.ones(count)
    else:
        on_images, on_teacher = z, 1 - z

    pixels = inputs["pixels"].float() / 255
    moments = vae.encode((pixels - 0.5) / 0.5).latent_dist
    latents = (moments.mean + torch.exp(0.5 * moments.logvar) * inputs["posterior"]) * vae.config.scaling_factor
    noise = inputs["noise"] + options["noise_offset"] * inputs["offset"][:, :, None, None]
    schedule = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000)
    noised = schedule.add_noise(latents, noise, inputs["timesteps"])
    height, width = inputs["pixels"].shape[2:]
    order = (lambda w, h: [w, h]) if options["time_ids_order"] == "wh" else (lambda w, h: [h, w])
    sizes = zip(settings["original_size"], settings["crop"])
    time_ids = torch.tensor([[*order(*original), *crop, *order(width, height)] for original, crop in sizes]).float()

    def condition(prompts, empty):
        (pooled, sequence), (empty_pooled, empty_sequence) = prompts, empty
        if options["drop_pooled"]:
            pooled = torch.where(drop[:, None], empty_pooled, pooled)
        return pooled, torch.where(drop[:, None, None], empty_sequence, sequence)

    features = hook_features(unet)

    def predict(pooled, sequence):
        added = {"text_embeds": pooled, "time_ids": time_ids}
        sample = unet(noised, inputs["timesteps"], sequence, added_cond_kwargs=added).sample
        return sample, dict(features)

    predicted, studied = predict(*condition(adapter(student(captions)), adapter(student([""] * count))))
    with torch.no_grad():
        taught_sample, taught = predict(*condition(teacher(english), teacher([""] * count)))

    error = lambda left, right: (left - right).square().mean([1, 2, 3])
    task = (on_images * error(predicted, noise)).sum()
    logit = (on_teacher * error(predicted, taught_sample)).sum()
    feature = sum((on_teacher * error(studied[key], taught[key])).sum() for key in taught)
    (task + logit + options["feature_weight"] * feature).backward()
    losses = {"loss.task": task, "loss.logit": logit, "loss.feature": feature}
    gradients = {f"gradient.{name}": parameter.grad for name, parameter in adapter.named_parameters()}
    return {name: value.detach() for name, value in {**losses, **gradients}.items()}


def distill_case(folder, seed, native, drop, **options):
    """Inputs, outputs and settings of a step on as many samples as `native` and `drop` have flags."""
    count = len(native)
    captions = ["白色背景上的大红色圆形", "黑色背景上的小蓝色方块", "绿色的三角形", "黄色星形"]
    english = ["a big red circle on a white background", "a small blue square on a black background", "a green triangle", "a yellow star"]
    defaults = {"noise_offset": 0.5, "hybrid": True, "distill": True, "feature_weight": 0.1, "time_ids_order": "hw", "drop_pooled": False}
    settings = {
        "model": DEMO_IN_CASE,
        "student": f"{DEMO_IN_CASE}/text_encoder_zh",
        "context_length": CONTEXT_LENGTH,
        "captions": captions[:count],
        "english": english[:count],
        "original_size": [[200 + 13 * index, 150 + 29 * index] for index in range(count)],
        "crop": [[index, 5 * index] for index in range(count)],
        "distill": {**defaults, **options},
    }
    adapter = randomised(Adapter(64, wide(40), 48, 80), seed)
    save_file(adapter.state_dict(), folder / "adapter.safetensors")
    inputs = {
        "pixels": torch.randint(0, 256, (count, 3, 64, 48), generator=seeded(seed + 1), dtype=torch.uint8),
        "posterior": normal(seed + 2, count, 4, 8, 6),
        "noise": normal(seed + 3, count, 4, 8, 6),
        "offset": normal(seed + 4, count, 4),
        "timesteps": torch.tensor([12, 345, 678, 999][:count]),
        "drop": torch.tensor(drop, dtype=torch.uint8),
        "native": torch.tensor(native, dtype=torch.uint8),
    }
    return inputs, distill_step(inputs, adapter, settings), settings


GRADIENTS = "f32 on both sides; rounding grows through the backward pass, and the teacher runs on a subset here and on the whole batch there"


@case("distill_fixed", run="distill", tolerance=1e-3, why=GRADIENTS)
def distill_fixed(folder):
    """A training step in the preset `fixed`: parallel and native samples, with and without text; losses and gradients, summed over samples."""
    return distill_case(folder, 40, native=[0, 1, 0, 1], drop=[0, 0, 1, 1])


@case("distill_switches", run="distill", tolerance=1e-3, why=GRADIENTS)
def distill_switches(folder):
    """A training step with the switches the other way: not hybrid, pooled text dropped too, width before height, another weight and offset."""
    options = {"hybrid": False, "drop_pooled": True, "time_ids_order": "wh", "feature_weight": 0.3, "noise_offset": 0.0}
    return distill_case(folder, 50, native=[0, 1, 0], drop=[0, 1, 1], **options)
