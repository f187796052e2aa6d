"""Trains the small classifier that judges the demo's pictures: which colour, shape, background and size was drawn.

usage: train.py            trains on fresh renders and writes weights.safetensors beside this file (about four minutes, one thread)
       train.py --check    lets the demo's English teacher draw the 100 prompts and says how many the classifier agrees with

The network is four convolutions, a mean and a maximum over the picture, and one linear layer for the four answers together.
Batch normalisation is folded into the convolutions before saving, so whoever runs it needs convolution, ReLU and a product only.
Half of the pictures have passed through the demo's autoencoder, some with noise on the latent: drawn pictures look like that.
"""
import json, pathlib, random, sys, time
import numpy as np, torch, torch.nn as nn, torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file

HERE = pathlib.Path(__file__).resolve().parent
DEMO = HERE.parent / "demo"
sys.path.insert(0, str(DEMO))
import shapes as S

CLASSES = {"colour": list(S.COLORS), "shape": list(S.SHAPES), "background": list(S.BACKGROUNDS), "size": list(S.SIZES)}
WIDTHS, STRIDES = (16, 32, 48, 64), (2, 2, 2, 1)
NUM_PICTURES, EPOCHS, BATCH, LEARNING_RATE = 7680, 18, 64, 4e-3


class Classifier(nn.Module):
    """`[B, 3, H, W]` in -1..1 -> `[B, 18]`: the logits of all classes, in the order of CLASSES."""

    def __init__(self):
        super().__init__()
        ins = (3, *WIDTHS[:-1])
        self.convs = nn.ModuleList(nn.Conv2d(i, o, 3, s, 1) for i, o, s in zip(ins, WIDTHS, STRIDES))
        self.norms = nn.ModuleList(nn.BatchNorm2d(o) for o in WIDTHS)
        self.head = nn.Linear(2 * WIDTHS[-1], sum(map(len, CLASSES.values())))

    def forward(self, x):
        for conv, norm in zip(self.convs, self.norms):
            x = F.relu(norm(conv(x)))
        return self.head(torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1))

    def folded(self):
        """The weights as saved, normalisation folded in."""
        out = {"head.weight": self.head.weight, "head.bias": self.head.bias}
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms)):
            gain = norm.weight / (norm.running_var + norm.eps).sqrt()
            out[f"convs.{i}.weight"] = conv.weight * gain[:, None, None, None]
            out[f"convs.{i}.bias"] = (conv.bias - norm.running_mean) * gain + norm.bias
        return {k: v.detach().half().contiguous() for k, v in out.items()}


def run_folded(weights, x):
    """What the Rust side computes, on the saved weights."""
    for i, stride in enumerate(STRIDES):
        x = F.relu(F.conv2d(x, weights[f"convs.{i}.weight"].float(), weights[f"convs.{i}.bias"].float(), stride, 1))
    return F.linear(torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1), weights["head.weight"].float(), weights["head.bias"].float())


def verdicts(logits):
    """`[B, 18]` -> `[B, 4]` class indices."""
    return torch.stack([part.argmax(1) for part in logits.split([len(c) for c in CLASSES.values()], 1)], 1)


def prompts():
    """The 100 prompts (English, Chinese, class indices), as `peapod_tests::classifier::prompts` has them."""
    out = []
    for i in range(100):
        colour, shape, background, turn = i % 8, i // 8 % 5, i % 3, i // 40
        size, wording = (colour + shape + turn) % 2, (colour + background + turn) % 2
        c, h, b, s = (names[k] for names, k in zip(CLASSES.values(), (colour, shape, background, size)))
        en = (f"a {s} {c} {h} on a {b} background", f"{s} {c} {h}, {b} background")[wording]
        zs, zc, zh, zb = S.SIZES[s][0], S.COLORS[c][0], S.SHAPES[h], S.BACKGROUNDS[b][0]
        out.append((en, (f"{zb}背景上的{zs}{zc}{zh}", f"{zs}{zc}{zh}，{zb}背景")[wording], (colour, shape, background, size)))
    return out


def render(count, rng):
    """`count` fresh pictures `[N, 3, 64, 64]` in -1..1 and their class indices `[N, 4]`."""
    pictures, labels = [], []
    for _ in range(count):
        color, background, shape, size = S.pick(rng)
        pictures.append(np.asarray(S.draw(color, background, shape, size, (64, 64), rng)))
        labels.append([CLASSES["colour"].index(color), CLASSES["shape"].index(shape), CLASSES["background"].index(background), CLASSES["size"].index(size)])
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1, torch.tensor(labels)


def through_vae(pictures):
    """Encodes and decodes with the demo's VAE; every second picture gets noise on its latent, as imperfect sampling leaves it."""
    from diffusers import AutoencoderKL
    vae = AutoencoderKL.from_pretrained(DEMO / "model", subfolder="vae", torch_dtype=torch.float32).eval()
    out = []
    with torch.no_grad():
        for part in pictures.split(64):
            z = vae.encode(part).latent_dist.mean
            level = torch.rand(len(z), 1, 1, 1) * torch.tensor([0.0, 0.4]).repeat(len(z))[: len(z)].view(-1, 1, 1, 1) / vae.config.scaling_factor
            out.append(vae.decode(z + level * torch.randn_like(z)).sample.clamp(-1, 1))
    return torch.cat(out)


def augment(x):
    """Gain, an offset by channel, a blur, noise, a flip: what must not change the verdict."""
    n = len(x)
    x = x * (0.97 + 0.09 * torch.randn(n, 1, 1, 1)) + 0.06 * torch.randn(n, 3, 1, 1)
    # Small shapes come out of few sampling steps soft and faint.
    radius = random.choice((1, 1, 2))
    for _ in range(2):
        weight = torch.rand(n, 1, 1, 1) * (torch.rand(n, 1, 1, 1) < 0.5)
        x = x.lerp(F.avg_pool2d(F.pad(x, (radius,) * 4, "replicate"), 2 * radius + 1, 1), weight)
    x = x + 0.08 * torch.rand(n, 1, 1, 1) * torch.randn_like(x)
    return (x.flip(3) if random.random() < 0.5 else x).clamp(-1, 1)


def train():
    start = time.time()
    say = lambda *a: print(f"[{time.time() - start:6.1f}s]", *a, flush=True)
    pictures, labels = render(NUM_PICTURES, random.Random(1))
    half = NUM_PICTURES // 2
    pictures = torch.cat([pictures[:half], through_vae(pictures[half:])])
    held_out, held_labels = render(800, random.Random(2))
    held_out = torch.cat([held_out[:400], through_vae(held_out[400:])])
    say(NUM_PICTURES, "pictures")

    net = Classifier()
    say(sum(p.numel() for p in net.parameters()), "parameters")
    steps = EPOCHS * (NUM_PICTURES // BATCH)
    optimiser = torch.optim.AdamW(net.parameters(), LEARNING_RATE, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, LEARNING_RATE, steps + 1)
    widths = [len(c) for c in CLASSES.values()]
    for epoch in range(EPOCHS):
        total = 0.0
        for rows in torch.randperm(NUM_PICTURES).split(BATCH):
            logits = net(augment(pictures[rows]))
            loss = sum(F.cross_entropy(part, labels[rows, k]) for k, part in enumerate(logits.split(widths, 1)))
            optimiser.zero_grad(); loss.backward(); optimiser.step(); schedule.step()
            total += loss.item() / (NUM_PICTURES // BATCH)
        say("epoch", epoch, f"loss {total:.4f}")

    weights = net.eval().folded()
    with torch.no_grad():
        right = (verdicts(run_folded(weights, held_out)) == held_labels).float().mean(0)
    say("right of 800 held out:", {k: f"{100 * r:.2f} %" for k, r in zip(CLASSES, right.tolist())})
    save_file(weights, HERE / "weights.safetensors", {k: " ".join(v) for k, v in CLASSES.items()})
    (HERE / "weights.safetensors").chmod(0o644)


def check():
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionXLPipeline
    with safe_open(HERE / "weights.safetensors", "pt") as file:
        weights = {k: file.get_tensor(k) for k in file.keys()}
    pipe = StableDiffusionXLPipeline.from_pretrained(DEMO / "model", torch_dtype=torch.float32)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    wanted, seen = [], []
    for start in range(0, 100, 20):
        part = prompts()[start : start + 20]
        drawn = pipe([en for en, _, _ in part], width=64, height=64, num_inference_steps=20, guidance_scale=5.0, output_type="pt",
                     original_size=(128, 128), generator=torch.Generator().manual_seed(start)).images
        seen.append(verdicts(run_folded(weights, (drawn * 255).round() / 127.5 - 1)))
        wanted += [classes for _, _, classes in part]
    right = torch.cat(seen) == torch.tensor(wanted)
    print({k: f"{r} of 100" for k, r in zip(CLASSES, right.sum(0).tolist())}, "colour and shape:", right[:, :2].all(1).sum().item(), "of 100")


if __name__ == "__main__":
    torch.set_num_threads(1); torch.manual_seed(0); random.seed(0)
    check() if sys.argv[1:] == ["--check"] else train()
