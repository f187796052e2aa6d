"""Training steps of the distillation, and ten of them with the optimiser."""

import math

import torch
from safetensors.torch import save_file

from .common import OPTIONS, case, normal, randomised, seeded, wide
from .models import Adapter, ShortAdapter, hook_features
from .pipelines import demo_models, small_sd15, small_sdxl
from .vocabularies import CAPTIONS, ENGLISH

# The preset `fixed`. What a case does not set otherwise of the second part is not written in its settings.
FIXED = {"noise_offset": 0.5, "hybrid": True, "distill": True, "feature_weight": 0.1, "time_ids_order": "hw", "drop_pooled": False}
UNSAID = {
    "min_snr_gamma": 0.0,
    "loss_dtype": "f32",
    "schedule_dtype": "f32",
    "vae_round_fp16": False,
    "feature_guard": False,
    "mask_pads": False,
}


def adapter_for(models, seed):
    width, pooled, output = models.widths
    hidden = wide(40)
    return randomised(ShortAdapter(width, hidden, output, depth=3) if pooled is None else Adapter(width, hidden, pooled, output), seed)


def noised_latents(models, inputs, options):
    """Latents of the pictures with noise, and what the network must say about them."""
    pixels = (inputs["pixels"].float() / 255 - 0.5) / 0.5
    vae = models.vae
    if options["vae_round_fp16"]:
        pixels, vae = pixels.half().float(), vae.half().float()
    moments = vae.encode(pixels).latent_dist
    latents = (moments.mean + torch.exp(0.5 * moments.logvar) * inputs["posterior"]) * vae.config.scaling_factor
    noise = inputs["noise"] + options["noise_offset"] * inputs["offset"][:, :, None, None]
    alpha_bar = models.schedule.alphas_cumprod
    if options["schedule_dtype"] == "f16":
        alpha_bar = alpha_bar.half()
    at = alpha_bar[inputs["timesteps"]][:, None, None, None]
    # The roots in the schedule's kind, the rest in f32.
    signal, spread = at.sqrt().float(), (1 - at).sqrt().float()
    noised = signal * latents + spread * noise
    velocity = models.schedule.config.prediction_type == "v_prediction"
    target = signal * noise - spread * latents if velocity else noise
    if options["schedule_dtype"] == "f32":
        assert torch.equal(noised, models.schedule.add_noise(latents, noise, inputs["timesteps"]))
        assert not velocity or torch.equal(target, models.schedule.get_velocity(latents, noise, inputs["timesteps"]))
    snr = (at / (1 - at)).float().flatten()
    gamma = options["min_snr_gamma"]
    weight = torch.clamp(snr, max=gamma) / (snr + velocity) if gamma else torch.ones_like(snr)
    return noised, target, weight


def distill_step(models, inputs, adapter, settings):
    """The training step, written out for the whole batch at once with masks: losses and gradients summed over samples."""
    options, captions, english = {**UNSAID, **settings["distill"]}, settings["captions"], settings["english"]
    count = len(captions)
    drop, z = inputs["drop"].bool(), inputs["native"].float()
    if options["hybrid"] and options["distill"]:
        on_images, on_teacher = z, 1 - z
    else:
        on_images, on_teacher = torch.ones(count), torch.ones(count)

    noised, target, weight = noised_latents(models, inputs, options)
    height, width = inputs["pixels"].shape[2:]
    order = (lambda w, h: [w, h]) if options["time_ids_order"] == "wh" else (lambda w, h: [h, w])
    sizes = zip(settings["original_size"], settings["crop"])
    time_ids = torch.tensor([[*order(*original), *crop, *order(width, height)] for original, crop in sizes]).float()

    def condition(prompts, empty):
        """Pooled text, sequence and mask of what the UNet listens to; those of the empty prompt where the text is dropped."""
        (pooled, sequence, mask), (empty_pooled, empty_sequence, empty_mask) = prompts, empty
        if options["drop_pooled"]:
            pooled = torch.where(drop[:, None], empty_pooled, pooled)
        if mask is not None:
            mask = torch.where(drop[:, None], empty_mask, mask)
        return pooled, torch.where(drop[:, None, None], empty_sequence, sequence), mask

    def study(texts):
        states, mask = models.student(texts)
        mask = mask if options["mask_pads"] else None
        output = adapter(states, mask)
        return (*output, mask) if isinstance(output, tuple) else (None, output, mask)

    features = hook_features(models.unet)

    def predict(pooled, sequence, mask):
        added = None if pooled is None else {"text_embeds": pooled, "time_ids": time_ids}
        sample = models.unet(noised, inputs["timesteps"], sequence, encoder_attention_mask=mask, added_cond_kwargs=added).sample
        return sample, dict(features)

    kind = torch.float16 if options["loss_dtype"] == "f16" else torch.float32
    # Squares in the losses' kind; their mean in f32, also where torch would round that of halves to half.
    squares = lambda left, right: (left.to(kind) - right.to(kind)).square()
    error = lambda left, right: squares(left, right).float().mean([1, 2, 3])

    adapter.zero_grad()
    predicted, studied = predict(*condition(study(captions), study([""] * count)))
    task = (on_images * weight * error(predicted, target)).sum()
    logit, feature = torch.zeros(()), torch.zeros(())
    guarded = 0
    if options["distill"]:
        with torch.no_grad():
            taught_sample, taught = predict(*condition((*models.teacher(english), None), (*models.teacher([""] * count), None)))
        logit = (on_teacher * weight * error(predicted, taught_sample)).sum()
        feature = 0
        for key in taught:
            masked = on_teacher[:, None, None, None] * squares(studied[key], taught[key])
            if options["feature_guard"] and not masked.isfinite().all():
                # Those that run on the taught samples alone must come to the same conclusion.
                assert not masked[on_teacher.bool()].isfinite().all()
                guarded += 1
                continue
            feature = feature + (on_teacher * error(studied[key], taught[key])).sum()
    assert not options["feature_guard"] or options["loss_dtype"] == "f32" or 0 < guarded < len(taught), f"{guarded} features overflow"
    (task + logit + options["feature_weight"] * feature).backward()
    losses = {"loss.task": task, "loss.logit": logit, "loss.feature": feature}
    gradients = {f"gradient.{name}": parameter.grad for name, parameter in adapter.named_parameters()}
    return {name: value.detach().clone() for name, value in {**losses, **gradients}.items()}


def check_switches(models, inputs, adapter, settings, outputs, tolerance):
    """Fails if one of the committed case's settings could be ignored without anybody noticing."""
    if OPTIONS.seed != 0 or OPTIONS.size != 1:
        return
    options = settings["distill"]
    for name, usual in {**FIXED, **UNSAID}.items():
        if options.get(name, usual) == usual:
            continue
        other = distill_step(models, inputs, adapter, {**settings, "distill": {**options, name: usual}})
        distances = [((other[key] - outputs[key]).norm() / outputs[key].norm()).item() for key in outputs if outputs[key].norm() > 0]
        # An overflow says enough.
        effect = max(float("inf") if math.isnan(distance) else distance for distance in distances)
        print(f"    {name} changes the results by {effect:.1e}")
        assert effect > 2 * tolerance, f"{name} changes the results by {effect:.1e} only"


def batch(models, seed, count):
    height, width = models.picture
    latents = count, 4, height // models.downscale, width // models.downscale
    return {
        "pixels": torch.randint(*models.brightness, (count, 3, height, width), generator=seeded(seed + 1), dtype=torch.uint8),
        "posterior": normal(seed + 2, *latents),
        "noise": normal(seed + 3, *latents),
        "offset": normal(seed + 4, count, 4),
    }


def sizes_and_crops(count):
    return {
        "original_size": [[200 + 13 * index, 150 + 29 * index] for index in range(count)],
        "crop": [[index, 5 * index] for index in range(count)],
    }


def distill_case(folder, seed, models, native, drop, tolerance, timesteps=(12, 345, 678, 999), **options):
    """Inputs, outputs and settings of a step on as many samples as `native` and `drop` have flags."""
    count = len(native)
    texts = {"captions": CAPTIONS[:count], "english": ENGLISH[:count]}
    settings = {**models.settings, **texts, **sizes_and_crops(count), "distill": {**FIXED, **options}}
    adapter = adapter_for(models, seed)
    save_file(adapter.state_dict(), folder / "adapter.safetensors")
    inputs = {
        **batch(models, seed, count),
        "timesteps": torch.tensor(timesteps[:count]),
        "drop": torch.tensor(drop, dtype=torch.uint8),
        "native": torch.tensor(native, dtype=torch.uint8),
    }
    outputs = distill_step(models, inputs, adapter, settings)
    check_switches(models, inputs, adapter, settings, outputs, tolerance)
    return inputs, outputs, settings


GRADIENTS = "f32 on both sides; rounding grows through the backward pass, and the teacher runs on a subset here and on the whole batch there"


@case("distill_fixed", run="distill", tolerance=1e-3, why=GRADIENTS)
def distill_fixed(folder):
    """A training step in the preset `fixed`: parallel and native samples, with and without text; losses and gradients, summed over samples."""
    return distill_case(folder, 40, demo_models(), native=[0, 1, 0, 1], drop=[0, 0, 1, 1], tolerance=1e-3)


@case("distill_switches", run="distill", tolerance=1e-3, why=GRADIENTS)
def distill_switches(folder):
    """A training step with the switches the other way: not hybrid, pooled text dropped too, width before height, another weight and offset."""
    options = {"hybrid": False, "drop_pooled": True, "time_ids_order": "wh", "feature_weight": 0.3, "noise_offset": 0.0}
    return distill_case(folder, 50, demo_models(), native=[0, 1, 0], drop=[0, 1, 1], tolerance=1e-3, **options)


@case("distill_no_teacher", run="distill", tolerance=1e-3, why=GRADIENTS)
def distill_no_teacher(folder):
    """A training step without a teacher: native and parallel samples alike learn from the pictures."""
    return distill_case(folder, 300, demo_models(), native=[0, 1, 0, 1], drop=[0, 0, 1, 1], tolerance=1e-3, distill=False)


# The last bits of a prediction decide which way a half goes.
HALVES = "as above, and now and then a difference is rounded the other way to a half"


@case("distill_sd15", run="distill", tolerance=1e-3, why=GRADIENTS)
def distill_sd15(folder):
    """A training step on a random SD1.5: nine features, no pooled text, no noise offset; the teacher's states after CLIP's final norm."""
    return distill_case(folder, 320, small_sd15(folder, 321), native=[0, 1, 0], drop=[0, 1, 1], tolerance=1e-3, noise_offset=0.0)


@case("distill_sd15_guarded", run="distill", tolerance=1e-3, why=HALVES)
def distill_sd15_guarded(folder):
    """The same with losses in halves and a feature whose squares are beyond them: it is left out."""
    models = small_sd15(folder, 330, loud=True)
    options = {"noise_offset": 0.0, "loss_dtype": "f16", "feature_guard": True}
    return distill_case(folder, 335, models, native=[0, 0, 1], drop=[0, 1, 0], tolerance=1e-3, **options)


@case("distill_velocity_min_snr", run="distill", tolerance=1e-3, why=GRADIENTS)
def distill_velocity_min_snr(folder):
    """A training step on a random SDXL that predicts velocity, weighted by the signal-to-noise ratio bounded at 5."""
    models = small_sdxl(folder, 340, prediction="v_prediction")
    return distill_case(folder, 345, models, native=[0, 1, 0, 1], drop=[0, 0, 1, 1], tolerance=1e-3, min_snr_gamma=5.0)


@case("distill_min_snr", run="distill", tolerance=1e-3, why=GRADIENTS)
def distill_min_snr(folder):
    """The weights for predictions of the noise, on the demo's model."""
    return distill_case(folder, 350, demo_models(), native=[0, 1, 0, 1], drop=[0, 0, 1, 1], tolerance=1e-3, min_snr_gamma=2.5)


@case("distill_reference", run="distill", tolerance=1e-3, why=HALVES)
def distill_reference(folder):
    """A training step with the published trainer's quirks: width before height, schedule and losses in halves, and so pictures and autoencoder.

    The first timesteps, where halves tell; a UNet that makes little of texts, so that student and teacher differ by little.
    """
    options = {"time_ids_order": "wh", "loss_dtype": "f16", "schedule_dtype": "f16", "vae_round_fp16": True}
    models = small_sdxl(folder, 360, pale=True, voice=0.03)
    return distill_case(folder, 365, models, native=[1, 0, 0, 1], drop=[0, 0, 1, 1], tolerance=1e-3, timesteps=(0, 1, 7, 800), **options)


@case("distill_vae_rounded", run="distill", tolerance=5e-4, why="f32 on both sides; more would hide the rounding")
def distill_vae_rounded(folder):
    """Pictures and the autoencoder's weights rounded to halves, all else in f32: pale pictures on an autoencoder that sees the difference."""
    models = small_sdxl(folder, 380, pale=True, voice=0.03)
    return distill_case(folder, 385, models, native=[0, 1, 1], drop=[0, 0, 1], tolerance=5e-4, timesteps=(0, 1, 7), vae_round_fp16=True)


@case("distill_recomputed", run="distill", tolerance=1e-3, why=GRADIENTS)
def distill_recomputed(folder):
    """A training step whose activations are computed again on the way back: the numbers of a step that keeps them."""
    options = {"drop_pooled": True, "gradient_checkpointing": True}
    return distill_case(folder, 390, demo_models(), native=[0, 1, 0], drop=[0, 0, 1], tolerance=1e-3, **options)


@case("distill_mask_pads", run="distill", tolerance=1e-3, why=GRADIENTS)
def distill_mask_pads(folder):
    """Padding left out of the pooled mean and hidden from the student's attention, of the empty prompt too."""
    return distill_case(folder, 370, demo_models(), native=[0, 1, 0, 1], drop=[0, 0, 1, 1], tolerance=1e-3, mask_pads=True)
