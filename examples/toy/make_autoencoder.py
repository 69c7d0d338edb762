"""Makes the toy's image autoencoder: 8 times smaller in each direction, 16 channels, the names of the FLUX.1 file.

The encoder isn't trained: it projects each patch of 8x8 pixels on the 16 directions in which patches differ most. The
decoder is trained to draw a sharp picture from that.
"""

from __future__ import annotations

import argparse
import math
import random
import re
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
"""Channels at 1, 1/2, 1/4 and 1/8 of the size; with 32 groups, two to a group."""
PATCH = 2 ** (len(WIDTHS) - 1)
"""Pixels per side of a latent."""
SCALE, SHIFT = 0.3611, 0.1159
"""FLUX.1's constants: the denoiser sees (z - SHIFT) * SCALE."""
NOISE = 0.05
"""Spread of the encoder's posterior, as the denoiser sees it; the decoder learns to forgive as much."""
NORM_EPSILON = 1e-6
"""Variance that the group norms of the published model add."""
SOFTNESS = 1.0
"""Variance that the decoder's group norms add in training: a hard norm of two channels would keep little more than the
sign of their difference, and a picture's colours could hardly pass it. See `harden`."""
QUIET = 1e-5
"""Size of the encoder's signals: so far below the root of NORM_EPSILON that its last norm is linear."""
CROPS, PIXELS = (48, 48, 64, 48, 64, SIZE), 7000
"""Sides of the crops of the training's steps, in turn, and how many pixels a batch may have."""
BLUR = torch.tensor([[1.0, 2.0, 1.0], [2.0, 4.0, 2.0], [1.0, 2.0, 1.0]]) / 16


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
            module.eps = SOFTNESS if name.startswith("decoder.") else NORM_EPSILON
        elif name.endswith(("conv2", "to_out.0")):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
        elif name.endswith("samplers.0.conv"):
            with torch.no_grad():
                module.weight.mul_(0.3).add_(nn.init.dirac_(torch.empty_like(module.weight)))
    return vae


# pictures


def batch(rng: random.Random, count: int) -> Tensor:
    """Pictures (count, 3, SIZE, SIZE) in [-1, 1]: half of the toy's world, half clutter."""
    images = [scene(rng)[0] if rng.random() < 0.5 else clutter(rng) for _ in range(count)]
    return torch.stack([pixels(image) for image in images])


def pixels(image: Image.Image) -> Tensor:
    """A picture as (3, H, W) in [-1, 1]."""
    raw = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return raw.view(image.height, image.width, 3).permute(2, 0, 1).float() / 127.5 - 1


def picture(values: Tensor) -> Image.Image:
    """(3, H, W) in [-1, 1] as a picture."""
    raw = ((values.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).contiguous()
    return Image.frombytes("RGB", (raw.shape[1], raw.shape[0]), bytes(raw.flatten().tolist()))


# the encoder: a projection of patches


def halved(values: Tensor) -> Tensor:
    """(B, 4C, H/2, W/2) of (B, C, H, W): four pixels become one with features ordered row, column, channel."""
    count, channels, height, width = values.shape
    split = values.reshape(count, channels, height // 2, 2, width // 2, 2)
    return split.permute(0, 3, 5, 1, 2, 4).reshape(count, 4 * channels, height // 2, width // 2)


def patches(images: Tensor) -> Tensor:
    """(B, 192, h, w): the pixels of each patch, ordered as three strided convolutions gather them, colour last."""
    for _ in WIDTHS[1:]:
        images = halved(images)
    return images


def principal_directions(images: Tensor) -> tuple[Tensor, Tensor]:
    """The mean patch (192,) and a projection (192, CHANNELS) whose results have unit power over all.

    Each result has the fourth root of its variance for a spread: what matters most stays largest, yet no channel
    drowns in noise.
    """
    rows = patches(images).permute(0, 2, 3, 1).flatten(0, 2)
    mean = rows.mean(dim=0)
    variances, directions = torch.linalg.eigh(torch.cov(rows.T))
    variances, directions = variances.flip(0)[:CHANNELS], directions.flip(1)[:, :CHANNELS]
    projection = directions * variances.pow(-0.25)
    return mean, projection / ((rows - mean) @ projection).square().mean().sqrt()


@torch.no_grad()
def set_encoder(vae: AutoencoderKL, mean: Tensor, projection: Tensor) -> None:
    """Makes the encoder compute the projection, as latents z with (z - SHIFT) * SCALE = (patch - mean) @ projection.

    The convolutions that halve the size only gather pixels; the last of them projects. Each result p travels as a pair
    +p, -p in one group of the last norm, and so quietly that this norm is a mere factor; silu(p) - silu(-p) = p.
    """
    encoder = vae.encoder
    strided = [block.downsamplers[0].conv for block in encoder.down_blocks[:-1]]
    for convolution in (encoder.conv_in, encoder.conv_out, *strided):
        convolution.weight.zero_()
        convolution.bias.zero_()
    for colour in range(3):
        encoder.conv_in.weight[colour, colour, 1, 1] = QUIET
    channels = 3
    for convolution in strided[:-1]:
        for corner in range(4):
            for channel in range(channels):
                convolution.weight[corner * channels + channel, channel, corner // 2, corner % 2] = 1.0
        channels *= 4
    pairs = torch.stack((projection, -projection), dim=-1).flatten(1)  # (192, 2 CHANNELS)
    last = strided[-1]
    for corner in range(4):
        rows = pairs[corner * channels : (corner + 1) * channels]
        last.weight[: 2 * CHANNELS, :channels, corner // 2, corner % 2] = rows.T
    last.bias[: 2 * CHANNELS] = -QUIET * (mean @ pairs)
    gain = math.sqrt(NORM_EPSILON) / QUIET / SCALE
    for channel in range(CHANNELS):
        encoder.conv_out.weight[channel, 2 * channel, 1, 1] = gain
        encoder.conv_out.weight[channel, 2 * channel + 1, 1, 1] = -gain
    encoder.conv_out.bias[:CHANNELS] = SHIFT
    encoder.conv_out.bias[CHANNELS:] = 2 * math.log(NOISE / SCALE)


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Latents (B, CHANNELS, h, w) as the denoiser sees them."""
    means: Tensor = vae.encoder(images)[:, :CHANNELS]
    return (means - SHIFT) * SCALE


# the decoder: trained


@torch.no_grad()
def start_decoder(vae: AutoencoderKL, mean: Tensor, projection: Tensor) -> None:
    """Gives the decoder a start: the mean colour of each patch, blurred, in pairs of channels of opposite sign."""
    decoder = vae.decoder
    area = PATCH * PATCH
    colours = torch.linalg.pinv(projection).reshape(CHANNELS, area, 3).mean(dim=1)  # (CHANNELS, 3)
    level = mean.reshape(area, 3).mean(dim=0)
    decoder.conv_in.weight *= 0.5
    decoder.conv_in.weight[:6] = 0.0
    for colour in range(3):
        for channel, sign in ((2 * colour, 1.0), (2 * colour + 1, -1.0)):
            decoder.conv_in.weight[channel, :, 1, 1] = sign * colours[:, colour]
            decoder.conv_in.bias[channel] = sign * level[colour]
    for block in decoder.up_blocks[:-1]:
        convolution = block.upsamplers[0].conv
        convolution.weight[:6] = 0.0
        convolution.bias[:6] = 0.0
        for channel in range(6):
            convolution.weight[channel, channel] = BLUR
    decoder.conv_out.weight *= 0.2
    decoder.conv_out.weight[:, :6] = 0.0
    decoder.conv_out.bias.zero_()
    for colour in range(3):
        decoder.conv_out.weight[colour, 2 * colour, 1, 1] = 1.0
        decoder.conv_out.weight[colour, 2 * colour + 1, 1, 1] = -1.0


def distance(output: Tensor, wanted: Tensor) -> Tensor:
    """How far two batches of pictures are apart: levels, and edges."""
    error = output - wanted
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + error.square().mean() + edges


def train_decoder(vae: AutoencoderKL, rng: random.Random, steps: int) -> None:
    """Trains the decoder on crops, with Adam, a short warm-up and a cosine."""
    parameters = list(vae.decoder.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min(1.0, (i + 1) / 50) * (0.01 + 0.99 * (1 + math.cos(math.pi * i / steps)) / 2)
    )
    mean = 0.0
    for index in range(steps):
        side = CROPS[index % len(CROPS)]
        whole = batch(rng, max(1, PIXELS // side**2))
        top, left = (PATCH * rng.randrange((SIZE - side) // PATCH + 1) for _ in range(2))
        images = whole[:, :, top : top + side, left : left + side]
        latents = encode(vae, images)
        loss = distance(vae.decoder(latents + NOISE * torch.randn_like(latents)), images)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        mean = loss.item() if index == 0 else 0.95 * mean + 0.05 * loss.item()
        if index % 50 == 49:
            print(f"autoencoder {index + 1}/{steps} loss {mean:.4f}", flush=True)


@torch.no_grad()
def harden(decoder: nn.Module) -> None:
    """Makes the decoder's group norms the published ones without changing what it computes.

    (x - mean) / sqrt(variance + SOFTNESS) is the same number when x shrinks by sqrt(NORM_EPSILON / SOFTNESS) and the
    variance added by its square. So every layer that feeds a norm or the stream of residuals speaks that much more
    quietly.
    """
    factor = math.sqrt(NORM_EPSILON / SOFTNESS)
    for name, module in decoder.named_modules():
        if isinstance(module, nn.GroupNorm):
            module.eps = NORM_EPSILON
        elif name.endswith(("conv_in", "conv1", "conv2", "to_out.0")):
            module.weight *= factor
            module.bias *= factor
        elif name.endswith("samplers.0.conv"):
            module.bias *= factor


@torch.no_grad()
def fold_scale(vae: AutoencoderKL) -> None:
    """Makes the decoder take z instead of (z - SHIFT) * SCALE."""
    first = vae.decoder.conv_in
    first.bias -= SHIFT * SCALE * first.weight.sum(dim=(1, 2, 3))
    first.weight *= SCALE


# the file


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


def published_tensors(vae: AutoencoderKL) -> dict[str, Tensor]:
    """The tensors as the file of FLUX.1 has them; attention weights are 1x1 convolutions there."""
    tensors: dict[str, Tensor] = {}
    for theirs, value in vae.state_dict().items():
        name = published_name(theirs)
        pointwise = ".attn_1." in name and value.ndim == 2
        tensors[name] = (value[:, :, None, None] if pointwise else value).contiguous()
    return tensors


@torch.no_grad()
def show(vae: AutoencoderKL, path: Path) -> None:
    """Writes originals above their reconstructions, and prints the mean squared error."""
    rng = random.Random(99)
    images = [scene(rng)[0] for _ in range(5)] + [clutter(rng) for _ in range(2)] + [creature(rng, "yellow")]
    wanted = torch.stack([pixels(image) for image in images])
    latents = encode(vae, wanted)
    output = vae.decoder(latents / SCALE + SHIFT)
    print(f"mse {F.mse_loss(output, wanted):.5f} latents {latents.mean():.3f} +- {latents.std():.3f}", flush=True)
    picture(torch.cat([torch.cat(list(rows), dim=2) for rows in (wanted, output)], dim=1)).save(path)


def main() -> None:
    """Reads the command line, trains and saves."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path, help="the file to write, such as ae.safetensors")
    parser.add_argument("--steps", type=int, default=2500, help="training steps of the decoder")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--show", type=Path, help="a picture to write: originals above reconstructions")
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    rng = random.Random(arguments.seed)
    vae = build()
    mean, projection = principal_directions(batch(rng, 600))
    set_encoder(vae, mean, projection)
    start_decoder(vae, mean, projection)
    train_decoder(vae, rng, arguments.steps)
    fold_scale(vae)
    harden(vae.decoder)
    save_file(published_tensors(vae), arguments.output)
    if arguments.show:
        show(vae, arguments.show)


if __name__ == "__main__":
    main()
