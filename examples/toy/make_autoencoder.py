"""Trains the toy's image autoencoder: 8 times smaller in each direction, 16 channels, the names of the FLUX.1 file."""

from __future__ import annotations

import argparse
import math
import random
import re
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from examples.toy.draw import SIZE, clutter, creature, scene

CHANNELS = 16
WIDTHS = (64, 64, 64, 64)
"""Channels at 1, 1/2, 1/4 and 1/8 of the size."""
SOFTNESS = 0.03
"""Variance that every group norm adds in training. With 32 groups of only two channels, a hard norm would keep no more
than the sign of their difference, and a picture's colours could hardly pass it."""
NORM_EPSILON = 1e-6
"""Variance that the group norms of the published model add."""
SIZES, PIXELS = (32, 32, 48, 32, 48, SIZE), 4600
"""Sides of the pictures of the training's steps, in turn, and how many pixels a batch may have."""
SCALE, SHIFT = 0.3611, 0.1159
"""FLUX.1's constants: the denoiser sees (z - SHIFT) * SCALE."""
TRAINING_NOISE = 0.15
"""Noise added to the latents in training, in units of their spread: the decoder shall forgive small errors."""
POSTERIOR_NOISE = 0.05
"""Spread of the posterior that the finished encoder reports, in the same unit."""


def build() -> AutoencoderKL:
    """The autoencoder at the start: its residual branches are silent, and what changes the size only passes on."""
    levels = len(WIDTHS)
    vae = AutoencoderKL(
        block_out_channels=WIDTHS,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=1,
        latent_channels=CHANNELS,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=SCALE,
        shift_factor=SHIFT,
    )
    for name, module in vae.named_modules():
        if isinstance(module, nn.GroupNorm):
            module.eps = SOFTNESS
        elif name.endswith(("conv2", "to_out.0")):
            nn.init.zeros_(module.weight)
        elif name.endswith("samplers.0.conv"):
            with torch.no_grad():
                module.weight.mul_(0.3).add_(nn.init.dirac_(torch.empty_like(module.weight)))
    return vae


def batch(rng: random.Random, count: int, size: int) -> Tensor:
    """Pictures (count, 3, size, size) in [-1, 1]: half of the toy's world, half clutter."""
    images = [scene(rng)[0] if rng.random() < 0.5 else clutter(rng) for _ in range(count)]
    return torch.stack([pixels(image.resize((size, size), Image.Resampling.BOX)) for image in images])


def pixels(image: Image.Image) -> Tensor:
    """A picture as (3, H, W) in [-1, 1]."""
    raw = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return raw.view(image.height, image.width, 3).permute(2, 0, 1).float() / 127.5 - 1


def picture(values: Tensor) -> Image.Image:
    """(3, H, W) in [-1, 1] as a picture."""
    raw = ((values.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).contiguous()
    return Image.frombytes("RGB", (raw.shape[1], raw.shape[0]), bytes(raw.flatten().tolist()))


def distance(output: Tensor, wanted: Tensor) -> Tensor:
    """How far two batches of pictures are apart: levels, and edges."""
    error = output - wanted
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + error.square().mean() + edges


def noisy(latents: Tensor) -> Tensor:
    """Latents in units of their spread, with the noise of the training."""
    return latents + TRAINING_NOISE * torch.randn_like(latents)


def train(parameters: list[nn.Parameter], step: Callable[[int], Tensor], steps: int, lr: float) -> None:
    """Minimises `step(index)` with Adam, a short warm-up and a cosine."""
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min(1.0, (i + 1) / 50) * (0.01 + 0.99 * (1 + math.cos(math.pi * i / steps)) / 2)
    )
    mean = 0.0
    for index in range(steps):
        loss = step(index)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        mean = loss.item() if index == 0 else 0.95 * mean + 0.05 * loss.item()
        if index % 50 == 49:
            print(f"autoencoder {index + 1}/{steps} loss {mean:.4f}", flush=True)


def train_both(vae: AutoencoderKL, rng: random.Random, steps: int) -> None:
    """Trains encoder and decoder; latents are brought to unit power on the way, so that the noise has a meaning."""

    def step(index: int) -> Tensor:
        size = SIZES[index % len(SIZES)]
        images = batch(rng, max(1, PIXELS // size**2), size)
        latents = vae.encoder(images)[:, :CHANNELS]
        latents = latents / latents.square().mean().sqrt()
        return distance(vae.decoder(noisy(latents)), images)

    train(list(vae.parameters()), step, steps, 1e-3)


@torch.no_grad()
def standardise(vae: AutoencoderKL, rng: random.Random) -> None:
    """Folds an affine map into the encoder, so that (z - SHIFT) * SCALE has zero mean and unit variance."""
    latents = torch.cat([vae.encoder(batch(rng, 8, SIZE))[:, :CHANNELS] for _ in range(16)])
    mean = latents.mean(dim=(0, 2, 3))
    spread = (latents - mean[:, None, None]).square().mean().sqrt()
    last = vae.encoder.conv_out
    last.weight[:CHANNELS] /= spread * SCALE
    last.bias[:CHANNELS] = (last.bias[:CHANNELS] - mean) / (spread * SCALE) + SHIFT
    last.weight[CHANNELS:] = 0.0
    last.bias[CHANNELS:] = 2 * math.log(POSTERIOR_NOISE / SCALE)
    first = vae.decoder.conv_in
    first.bias += (first.weight.sum(dim=(2, 3)) * (mean / spread - SHIFT * SCALE)).sum(dim=1)
    first.weight *= SCALE


def train_decoder(vae: AutoencoderKL, rng: random.Random, steps: int) -> None:
    """Trains the decoder alone on the finished encoder, at the full size only."""

    def step(index: int) -> Tensor:
        images = batch(rng, 1, SIZE)
        with torch.no_grad():
            latents = (vae.encoder(images)[:, :CHANNELS] - SHIFT) * SCALE
        return distance(vae.decoder(noisy(latents) / SCALE + SHIFT), images)

    train(list(vae.decoder.parameters()), step, steps, 4e-4)


@torch.no_grad()
def harden(vae: AutoencoderKL) -> None:
    """Makes the group norms the published ones without changing what the model computes.

    (x - mean) / sqrt(variance + SOFTNESS) is the same number when x shrinks by sqrt(NORM_EPSILON / SOFTNESS) and the
    variance added by its square. So every layer that feeds a norm or the stream of residuals speaks that much more quietly.
    """
    factor = math.sqrt(NORM_EPSILON / SOFTNESS)
    for name, module in vae.named_modules():
        if isinstance(module, nn.GroupNorm):
            module.eps = NORM_EPSILON
        elif name.endswith(("conv_in", "conv1", "conv2", "to_out.0")):
            module.weight *= factor
            module.bias *= factor
        elif name.endswith("samplers.0.conv"):
            module.bias *= factor


def published_name(name: str) -> str:
    """The name of a tensor of Diffusers' autoencoder in the file of FLUX.1."""
    last = len(WIDTHS) - 1
    name = re.sub(r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2", name)
    name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"up.{last - int(m[1])}.block.{m[2]}", name)
    name = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{last - int(m[1])}.upsample", name)
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    for theirs, published in (
        ("mid_block.attentions.0.group_norm", "mid.attn_1.norm"),
        ("mid_block.attentions.0.to_out.0", "mid.attn_1.proj_out"),
        ("mid_block.attentions.0.to_", "mid.attn_1."),
        ("conv_norm_out", "norm_out"),
        ("conv_shortcut", "nin_shortcut"),
    ):
        name = name.replace(theirs, published)
    return name


def published(vae: AutoencoderKL) -> dict[str, Tensor]:
    """The tensors as the file of FLUX.1 has them; attention weights are 1x1 convolutions there."""
    tensors: dict[str, Tensor] = {}
    for name, value in vae.state_dict().items():
        name = published_name(name)
        pointwise = ".attn_1." in name and value.ndim == 2
        tensors[name] = (value[:, :, None, None] if pointwise else value).contiguous()
    return tensors


@torch.no_grad()
def show(vae: AutoencoderKL, path: Path) -> None:
    """Writes originals above their reconstructions, and prints the mean squared error."""
    rng = random.Random(99)
    images = [scene(rng)[0] for _ in range(5)] + [clutter(rng) for _ in range(2)] + [creature(rng, "yellow")]
    wanted = torch.stack([pixels(image) for image in images])
    latents = vae.encoder(wanted)[:, :CHANNELS]
    output = vae.decoder(latents)
    used = (latents - SHIFT) * SCALE
    print(f"mse {F.mse_loss(output, wanted):.5f} latents {used.mean():.3f} +- {used.std():.3f}", flush=True)
    picture(torch.cat([torch.cat(list(rows), dim=2) for rows in (wanted, output)], dim=1)).save(path)


def main() -> None:
    """Reads the command line, trains and saves."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path, help="the file to write, such as ae.safetensors")
    parser.add_argument("--steps", type=int, default=2500, help="steps of encoder and decoder together")
    parser.add_argument("--decoder_steps", type=int, default=800, help="steps of the decoder alone")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    rng = random.Random(arguments.seed)
    vae = build()
    train_both(vae, rng, arguments.steps)
    standardise(vae, rng)
    train_decoder(vae, rng, arguments.decoder_steps)
    harden(vae)
    save_file(published(vae), arguments.output)
    show(vae, arguments.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
