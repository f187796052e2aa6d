"""Drawing in all ways: every scheduler, from noise, from a picture, below a mask, along an image, with LoRA; final latents of diffusers' pipelines."""

import json
from contextlib import contextmanager
from dataclasses import dataclass, field

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    UNet2DConditionModel,
)
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from .common import case, deep, normal, randomised, save_as_half, seeded, wide
from .pipelines import scaled_linear, small_vae
from .vocabularies import ENGLISH, write_clip_tokenizer

SCHEDULERS = {
    "dpm++": DPMSolverMultistepScheduler,
    "euler": EulerDiscreteScheduler,
    "euler-a": EulerAncestralDiscreteScheduler,
    "ddim": DDIMScheduler,
    "lcm": LCMScheduler,
}
# Height and width of pictures and of latents, and pictures in a batch.
PICTURE, LATENTS, COUNT = (32, 48), (8, 12), 2
LENGTH = 5
WHY = "f32 on both sides; rounding accumulates over the steps"


@dataclass
class Way:
    """One way of drawing with a case's model. What is not said is the pipelines' default, or the schedule's."""

    scheduler: str
    steps: int
    guidance: float = 4.0
    # "text", "image", "inpaint" or "control"
    task: str = "text"
    # Beyond what the schedule says.
    options: dict = field(default_factory=dict)
    rescale: float = 0.0
    strength: float = 1.0
    schedule: str = "plain"
    # Names of LoRA files and how strongly each acts.
    loras: dict = field(default_factory=dict)


@contextmanager
def noise_from(noises):
    """Lets diffusers take its noise from a list, and latents at the mean of their distribution."""
    given = iter(noises)
    names = ["diffusers.schedulers.scheduling_euler_ancestral_discrete", "diffusers.schedulers.scheduling_lcm"]
    names += [f"diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion{kind}" for kind in ("", "_img2img", "_inpaint")]
    names += [f"diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl{kind}" for kind in ("", "_img2img", "_inpaint")]
    names += [f"diffusers.pipelines.controlnet.pipeline_controlnet{kind}" for kind in ("", "_sd_xl")]
    modules = [__import__(name, fromlist=["randn_tensor"]) for name in names]
    kept, sample = [module.randn_tensor for module in modules], DiagonalGaussianDistribution.sample
    for module in modules:
        module.randn_tensor = lambda shape, **_: next(given).reshape(shape).clone()
    DiagonalGaussianDistribution.sample = lambda self, generator=None: self.mode()
    try:
        yield
    finally:
        for module, function in zip(modules, kept):
            module.randn_tensor = function
        DiagonalGaussianDistribution.sample = sample


def attention_modules(unet):
    """Linear layers that LoRA files usually have something for, and two convolutions."""
    names = [name for name, module in unet.named_modules() if isinstance(module, torch.nn.Linear) and "transformer_blocks" in name]
    return [name for name in names if name.endswith(("to_q", "to_out.0", "ff.net.2"))] + ["down_blocks.0.resnets.0.conv1", "up_blocks.0.upsamplers.0.conv"]


def lora_tensors(unet, seed, rank):
    """Random factors of a LoRA by module: down, up."""
    tensors = {}
    for index, name in enumerate(attention_modules(unet)):
        weight = unet.get_submodule(name).weight
        down = normal(seed + 2 * index, rank, *weight.shape[1:]) * 0.3
        up = normal(seed + 2 * index + 1, weight.shape[0], rank, *[1] * (weight.dim() - 2)) * 0.1
        tensors[name] = (down, up)
    return tensors


def original_names(unet):
    """What the original code calls the modules of a UNet, as kohya's scripts for SDXL write them."""
    names, item = {}, 1
    resnet = {"conv1": "in_layers_2", "conv2": "out_layers_3", "time_emb_proj": "emb_layers_1", "conv_shortcut": "skip_connection"}

    def block(ours, theirs, renames):
        for name, _ in unet.get_submodule(ours).named_modules():
            names[f"{ours}.{name}"] = f"{theirs}_{renames.get(name, name.replace('.', '_'))}"

    for way, blocks in (("down", unet.down_blocks), ("up", unet.up_blocks)):
        item = 1 if way == "down" else 0
        for index, part in enumerate(blocks):
            for layer in range(len(part.resnets)):
                start, list_name = f"{way}_blocks.{index}", "input_blocks" if way == "down" else "output_blocks"
                block(f"{start}.resnets.{layer}", f"{list_name}_{item}_0", resnet)
                if getattr(part, "attentions", None):
                    block(f"{start}.attentions.{layer}", f"{list_name}_{item}_1", {})
                item += 1
            if getattr(part, "downsamplers", None):
                names[f"down_blocks.{index}.downsamplers.0.conv"] = f"input_blocks_{item}_0_op"
                item += 1
            if getattr(part, "upsamplers", None):
                names[f"up_blocks.{index}.upsamplers.0.conv"] = f"output_blocks_{item - 1}_{2 if getattr(part, 'attentions', None) else 1}_conv"
    block("mid_block.resnets.0", "middle_block_0", resnet)
    block("mid_block.attentions.0", "middle_block_1", {})
    block("mid_block.resnets.1", "middle_block_2", resnet)
    return names


def write_loras(folder, unet, seed, original):
    """Writes two LoRA files: `peft.safetensors` in the layout of diffusers, `kohya.safetensors` in that of kohya's scripts, with alphas."""
    first, second = lora_tensors(unet, seed, 2), lora_tensors(unet, seed + 500, 3)
    tensors = {}
    for name, (down, up) in first.items():
        tensors |= {f"unet.{name}.lora_A.weight": down, f"unet.{name}.lora_B.weight": up}
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / "peft.safetensors")
    names = original_names(unet) if original else {name: name.replace(".", "_") for name in second}
    tensors = {}
    for name, (down, up) in second.items():
        key = f"lora_unet_{names[name]}"
        tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(1.5)}
    save_file({key: value.half().contiguous() for key, value in tensors.items()}, folder / "kohya.safetensors")


def write_schedule(folder, name, class_name, config):
    path = folder / ("scheduler" if name == "plain" else f"{name}/scheduler")
    path.mkdir(parents=True)
    (path / "scheduler_config.json").write_text(json.dumps({"_class_name": class_name, **config}, indent=2), "utf-8")


class Drawer:
    """A case's models, and its pipelines: of `kind` "sdxl" or "sd15"."""

    def __init__(self, folder, kind, unet, seed, schedules, control=False, loras=False):
        self.folder, self.kind, self.seed, self.schedules = folder, kind, seed, schedules
        self.unet = save_as_half(randomised(unet, seed), folder / "unet")
        self.vae = save_as_half(small_vae(seed + 1, 0.13025 if kind == "sdxl" else 0.18215, widths=(4, 4, 4)), folder / "vae")
        for name, config in schedules.items():
            write_schedule(folder, name, "EulerDiscreteScheduler" if kind == "sdxl" else "PNDMScheduler", config)
        self.control = None
        if control:
            network = ControlNetModel.from_unet(self.unet, conditioning_embedding_out_channels=wide(2, 4, 4))
            self.control = save_as_half(randomised(network, seed + 2), folder / "controlnet")
        if loras:
            write_loras(folder, self.unet, seed + 3000, original=kind == "sdxl")
        width, pooled = self.unet.config.cross_attention_dim, wide(10)
        self.inputs = {
            "text": normal(seed + 3, COUNT, LENGTH, width),
            "negative": normal(seed + 4, 1, LENGTH, width),
            "latents": normal(seed + 5, COUNT, 4, *LATENTS),
            "noise": normal(seed + 6, 8, COUNT, 4, *LATENTS),
            "image": torch.rand(1, 3, *PICTURE, generator=seeded(seed + 7)),
            "mask": torch.rand(1, 1, *PICTURE, generator=seeded(seed + 8)),
        }
        if control:
            self.inputs["control"] = torch.rand(1, 3, *PICTURE, generator=seeded(seed + 9))
        if kind == "sdxl":
            self.inputs |= {"pooled": normal(seed + 10, COUNT, pooled), "negative_pooled": normal(seed + 11, 1, pooled)}

    def scheduler(self, way):
        config = {**self.schedules[way.schedule], **way.options}
        return SCHEDULERS[way.scheduler].from_config(config)

    def pipeline(self, way):
        name = {"text": "Pipeline", "image": "Img2ImgPipeline", "inpaint": "InpaintPipeline", "control": "ControlNetPipeline"}[way.task]
        model = getattr(diffusers, f"StableDiffusion{'XL' if self.kind == 'sdxl' else ''}{name}")
        parts = {"vae": self.vae, "unet": self.unet, "scheduler": self.scheduler(way), "text_encoder": None, "tokenizer": None}
        if self.kind == "sdxl":
            parts |= {"text_encoder_2": None, "tokenizer_2": None, "add_watermarker": False}
        else:
            parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        if way.task == "control":
            parts["controlnet"] = self.control
        pipeline = model(**parts)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def draw(self, way):
        """Final latents of one way."""
        pipeline, inputs = self.pipeline(way), self.inputs
        for index, (name, scale) in enumerate(way.loras.items()):
            pipeline.load_lora_weights(self.folder, weight_name=name, adapter_name=f"lora{index}")
        if way.loras:
            pipeline.set_adapters([f"lora{index}" for index in range(len(way.loras))], list(way.loras.values()))
        asked = {
            "prompt_embeds": inputs["text"],
            "negative_prompt_embeds": inputs["negative"].expand(COUNT, -1, -1),
            "num_inference_steps": way.steps,
            "guidance_scale": way.guidance,
            "output_type": "latent",
        }
        if self.kind == "sdxl":
            asked |= {"pooled_prompt_embeds": inputs["pooled"], "negative_pooled_prompt_embeds": inputs["negative_pooled"].expand(COUNT, -1)}
        if way.task in ("text", "inpaint", "control"):
            asked |= {"height": PICTURE[0], "width": PICTURE[1]}
        if way.task == "text":
            asked["guidance_rescale"] = way.rescale
        if way.task in ("image", "inpaint"):
            asked |= {"image": inputs["image"].expand(COUNT, -1, -1, -1), "strength": way.strength}
        if way.task == "inpaint":
            asked["mask_image"] = inputs["mask"].expand(COUNT, -1, -1, -1)
        if way.task == "control":
            asked |= {"image": inputs["control"], "controlnet_conditioning_scale": 0.7}
        with noise_from([inputs["latents"], *inputs["noise"]]), torch.no_grad():
            latents = pipeline(**asked).images
        if way.loras:
            pipeline.unload_lora_weights()
        return latents

    def case(self, ways):
        outputs = {f"{name}.latents": self.draw(way) for name, way in ways.items()}
        settings = {"height": PICTURE[0], "width": PICTURE[1], "control_scale": 0.7}
        for name, way in ways.items():
            table = {"scheduler": way.scheduler, "steps": way.steps, "guidance": way.guidance, "task": way.task, "schedule": way.schedule}
            table |= {"rescale": way.rescale, "strength": way.strength, "loras": [f"{name}:{scale}" for name, scale in way.loras.items()]}
            table |= {key: value for key, value in (("spacing", way.options.get("timestep_spacing")), ("karras", way.options.get("use_karras_sigmas"))) if value is not None}
            settings[name] = table
        return self.inputs, outputs, settings


def sdxl_unet(in_channels=4):
    levels = deep(3)
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=in_channels,
        block_out_channels=wide(*[4] * (levels - 1), 8),
        down_block_types=("DownBlock2D", *["CrossAttnDownBlock2D"] * (levels - 1)),
        up_block_types=(*["CrossAttnUpBlock2D"] * (levels - 1), "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=[*[1] * (levels - 1), 2],
        cross_attention_dim=wide(12),
        norm_num_groups=2,
        use_linear_projection=True,
        transformer_layers_per_block=[*[1] * (levels - 1), 2],
        addition_embed_type="text_time",
        addition_time_embed_dim=wide(4),
        projection_class_embeddings_input_dim=wide(34),
    )


def sd15_unet(in_channels=4):
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=in_channels,
        block_out_channels=wide(4, 8, 8),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=deep(1),
        attention_head_dim=2,
        cross_attention_dim=wide(12),
        norm_num_groups=4,
    )


# SDXL's published schedule, and one for networks that predict the velocity.
SDXL_SCHEDULES = {
    "plain": scaled_linear(timestep_spacing="leading", steps_offset=1, clip_sample=False, set_alpha_to_one=False, final_sigmas_type="zero"),
    "velocity": scaled_linear(
        timestep_spacing="trailing", prediction_type="v_prediction", rescale_betas_zero_snr=True, clip_sample=False, final_sigmas_type="zero"
    ),
}
SD15_SCHEDULES = {
    "plain": scaled_linear(steps_offset=1, clip_sample=False, set_alpha_to_one=False, final_sigmas_type="sigma_min"),
    "velocity": scaled_linear(steps_offset=1, prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False, final_sigmas_type="zero"),
}
SPACINGS = ("leading", "trailing", "linspace")


def every_scheduler():
    """Each scheduler with each spacing, and with what else changes its course."""
    ways = {"lcm": Way("lcm", 4, guidance=0.0), "lcm_guided": Way("lcm", 5)}
    for name in ("dpm++", "euler", "euler-a", "ddim"):
        for spacing in SPACINGS:
            ways[f"{name}_{spacing}".replace("++", "")] = Way(name, 7, options={"timestep_spacing": spacing})
    for name in ("dpm++", "euler"):
        ways[f"{name}_karras".replace("++", "")] = Way(name, 6, options={"use_karras_sigmas": True})
    for name in ("dpm++", "euler", "euler-a", "ddim", "lcm"):
        ways[f"{name}_velocity".replace("++", "")] = Way(name, 5, schedule="velocity", rescale=0.6)
    return ways


def downstream():
    """A picture to start from, with each scheduler; a mask that an ordinary UNet draws below; a control image; LoRA files."""
    ways = {f"image_{name}".replace("++", ""): Way(name, 6, task="image", strength=0.6) for name in SCHEDULERS}
    ways |= {f"inpaint_{name}".replace("++", ""): Way(name, 5, task="inpaint", strength=0.7) for name in SCHEDULERS}
    ways["image_karras"] = Way("euler", 6, task="image", strength=0.5, options={"use_karras_sigmas": True})
    ways["inpaint_from_noise"] = Way("dpm++", 5, task="inpaint", strength=1.0)
    ways["control"] = Way("dpm++", 6, guidance=5.0, task="control")
    ways["control_unguided"] = Way("euler", 4, guidance=1.0, task="control")
    ways["lora"] = Way("euler", 5, loras={"peft.safetensors": 0.8})
    ways["loras"] = Way("dpm++", 5, loras={"peft.safetensors": 1.0, "kohya.safetensors": -0.6})
    ways["lcm_lora"] = Way("lcm", 4, guidance=0.0, loras={"kohya.safetensors": 1.0})
    return ways


@case("draw_sdxl", run="draw", tolerance=1e-3, why=WHY)
def draw_sdxl(folder):
    """A random SDXL drawn with in all ways; and as Turbo is: trailing timesteps, one step and four, no guidance."""
    drawer = Drawer(folder, "sdxl", sdxl_unet(), 6000, SDXL_SCHEDULES, control=True, loras=True)
    trailing = {"timestep_spacing": "trailing"}
    turbo = {f"turbo_{steps}": Way("euler-a", steps, guidance=0.0, options=trailing) for steps in (1, 4)}
    return drawer.case({**every_scheduler(), **downstream(), **turbo})


@case("draw_sdxl_inpainting", run="draw", tolerance=1e-3, why=WHY)
def draw_sdxl_inpainting(folder):
    """A random SDXL whose UNet sees mask and masked picture; 0.9999 leaves out the first step."""
    drawer = Drawer(folder, "sdxl", sdxl_unet(in_channels=9), 6100, SDXL_SCHEDULES)
    inpaint = lambda scheduler, **options: Way(scheduler, 6, task="inpaint", **options)
    return drawer.case({"almost": inpaint("dpm++", strength=0.9999), "whole": inpaint("euler", strength=1.0), "part": inpaint("ddim", strength=0.5)})


@case("draw_like_ssd1b", run="draw", tolerance=1e-3, why=WHY)
def draw_like_ssd1b(folder):
    """A random UNet pruned as SSD-1B: the middle is one residual block, and layers of attention are counted block by block."""
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=wide(4, 8, 8),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2D",
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=[1, 2, 2],
        cross_attention_dim=wide(12),
        norm_num_groups=4,
        use_linear_projection=True,
        transformer_layers_per_block=[1, [2], [2]],
        reverse_transformer_layers_per_block=[[2, 1], [2, 1], 1],
        addition_embed_type="text_time",
        addition_time_embed_dim=wide(4),
        projection_class_embeddings_input_dim=wide(34),
    )
    drawer = Drawer(folder, "sdxl", unet, 6200, {"plain": SDXL_SCHEDULES["plain"]})
    return drawer.case({"dpm": Way("dpm++", 6), "image": Way("euler", 6, task="image", strength=0.5)})


@case("draw_sd15", run="draw", tolerance=1e-3, why=WHY)
def draw_sd15(folder):
    """A random SD1.5 drawn with in all ways."""
    drawer = Drawer(folder, "sd15", sd15_unet(), 6300, SD15_SCHEDULES, control=True, loras=True)
    return drawer.case({**every_scheduler(), **downstream()})


@case("draw_sd15_inpainting", run="draw", tolerance=1e-3, why=WHY)
def draw_sd15_inpainting(folder):
    """A random SD1.5 whose UNet sees mask and masked picture."""
    drawer = Drawer(folder, "sd15", sd15_unet(in_channels=9), 6400, {"plain": SD15_SCHEDULES["plain"]})
    inpaint = lambda scheduler, **options: Way(scheduler, 6, task="inpaint", **options)
    return drawer.case({"whole": inpaint("dpm++", strength=1.0), "part": inpaint("euler-a", strength=0.6)})


@case("vae_tiled", run="vae_tiled", tolerance=1e-4)
def vae_tiled(folder):
    """A picture decoded in tiles that overlap, whose last row and column are cut short."""
    vae: AutoencoderKL = save_as_half(small_vae(6500, 0.13025, widths=(4, 4, 4)), folder / "model")
    vae.enable_tiling()
    vae.tile_latent_min_size, vae.tile_sample_min_size = 8, 32
    latents = normal(6501, 1, 4, 10, 13)
    with torch.no_grad():
        decoded = vae.decode(latents).sample
    return {"latents": latents}, {"decoded": decoded}, {"model": "model", "tile": 8}


@case("clip_score", run="clip_score", tolerance=2e-3, why="pixels are resized in integers on one side, in floats that are rounded on the other")
def clip_score(folder):
    """A random CLIP judges pictures that are wider than what it sees: its image processor, both embeddings, and a hundred times their cosine."""
    clip = folder / "clip"
    clip.mkdir()
    vocabulary = write_clip_tokenizer(clip, "<|endoftext|>", 20)
    sizes = {"hidden_size": wide(8), "intermediate_size": wide(16), "num_hidden_layers": deep(2), "num_attention_heads": 2}
    text = {**sizes, "vocab_size": vocabulary, "max_position_embeddings": 20, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1, "projection_dim": wide(6)}
    config = CLIPConfig(text_config=text, vision_config={**sizes, "image_size": 32, "patch_size": 8}, projection_dim=wide(6))
    model = save_as_half(randomised(CLIPModel(config), 6600), clip)
    pictures = (torch.rand(2, 40, 56, 3, generator=seeded(6601)) * 255).round().to(torch.uint8)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    pixels = processor([Image.fromarray(picture.numpy()) for picture in pictures], return_tensors="pt").pixel_values
    tokens = CLIPTokenizer.from_pretrained(clip)(ENGLISH[:2], padding="max_length", max_length=20, truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        output = model(input_ids=tokens, pixel_values=pixels)
    images, texts = output.image_embeds, output.text_embeds
    scores = (100 * (images * texts).sum(-1)).clamp(min=0)
    return {"pictures": pictures}, {"images": images, "texts": texts, "scores": scores}, {"clip": "clip", "prompts": ENGLISH[:2]}
