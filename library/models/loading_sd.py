"""The models of SD 1.x, 2.x and SDXL from their checkpoints; see `library.models.loading` for how they are filled."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from library.models import autoencoder, clip, keymaps, unet
from library.models.checkpoints_sd import OPTION, TEXT, UNET, VAE, Checkpoint, Part, Role, find_checkpoint, find_vae
from library.models.keymaps import Mapped, Shapes, mapped_shapes
from library.models.keymaps_sd import Version
from library.models.loading import Filling, Finished, filled

if TYPE_CHECKING:
    from torch import nn


def load_unet(
    path: Path | str,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    *,
    role: Role,
    mmap: bool = True,
    option: str = OPTION,
    finished: Finished | None = None,
    keep_float8: bool = False,
) -> nn.Module:
    """The U-Net of a single file (`.safetensors`, `.ckpt`) or a Diffusers folder.

    Args:
        dtype: of all weights; None keeps that of the file.
        role: what the script wants: `sd` (1.x and 2.x) or `sdxl`.
        option: the option that gave the path, for messages.
        finished, keep_float8: as `library.models.loading.load_flux`.

    Raises:
        DataError: the file is something else, damaged, incomplete, or stored in a way that isn't understood.
    """
    part = find_checkpoint(path, role, option, mmap=mmap).part(UNET)
    with part.opened() as tensors:
        return filled(
            lambda: unet.build_unet(part.shapes), tensors, part.shapes, Filling(dtype, device, finished, keep_float8)
        )


def load_encoders(
    path: Path | str,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    *,
    role: Role,
    names: Sequence[str] | None = None,
    mmap: bool = True,
    option: str = OPTION,
    finished: Finished | None = None,
    keep_float8: bool = False,
) -> dict[str, nn.Module]:
    """The text encoders by name, `text_encoder` and for SDXL `text_encoder_2`. As `load_unet`.

    The second of SDXL is a `CLIPTextModelWithProjection`, the others are `CLIPTextModel`s. That of SD 2.x has no last
    layer, which the U-Net was never shown; saving keeps it as it was in the file.

    Args:
        names: which; None: all.
    """
    checkpoint = find_checkpoint(path, role, option, mmap=mmap)
    wanted = [name for name in checkpoint.encoders if names is None or name in names]
    filling = Filling(dtype, device, finished, keep_float8)
    return {name: _encoder(checkpoint, name, filling) for name in wanted}


def load_vae(
    path: Path | str,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    *,
    role: Role,
    vae: Path | str | None = None,
    mmap: bool = True,
    option: str = OPTION,
) -> nn.Module:
    """The autoencoder of a checkpoint. As `load_unet`.

    Args:
        vae: what to take it from instead: a folder, its `vae` subfolder, a file with nothing else, a full checkpoint.
    """
    part = vae_part(path, role=role, vae=vae, mmap=mmap, option=option)
    with part.opened() as tensors:
        return filled(lambda: build_vae(part.shapes), tensors, part.shapes, Filling(dtype, device))


def vae_part(
    path: Path | str, *, role: Role, vae: Path | str | None = None, mmap: bool = True, option: str = OPTION
) -> Part:
    """Where the autoencoder that `load_vae` loads lies."""
    if vae is not None:
        return find_vae(vae, mmap=mmap)
    return find_checkpoint(path, role, option, mmap=mmap).part(VAE)


def part_shapes(path: Path | str, *, role: Role, option: str = OPTION) -> dict[str, Shapes]:
    """Shapes of the tensors of the U-Net and the text encoders by name, layout of the models, from the headers only."""
    checkpoint = find_checkpoint(path, role, option)
    return {name: checkpoint.part(name).shapes for name in (UNET, *checkpoint.encoders)}


def build_encoder(shapes: Shapes, name: str, version: Version) -> nn.Module:
    """The text encoder of this name and these shapes. Errors: DataError when a tensor that tells a size is missing."""
    return clip.build_clip(shapes, activation(name, version))


def activation(name: str, version: Version) -> str:
    """Of a text encoder: OpenAI trained CLIP-L with an approximation, OpenCLIP's encoders have the function itself."""
    return "quick_gelu" if name == TEXT and version != "2" else "gelu"


def build_vae(shapes: Shapes) -> nn.Module:
    """The autoencoder of these shapes, Diffusers names. Errors: DataError when one that tells a size is missing."""
    return autoencoder.build_autoencoder(mapped_shapes(shapes, keymaps.vae_from_diffusers(shapes)))


def _encoder(checkpoint: Checkpoint, name: str, filling: Filling) -> nn.Module:
    return load_clip(checkpoint.part(name), activation(name, checkpoint.version), filling)


def load_clip(part: Part, activation: str, filling: Filling) -> nn.Module:
    """The CLIP text encoder of a part with Hugging Face names, with a projection if there is one."""

    def build() -> nn.Module:
        return clip.build_clip(part.shapes, activation)

    with torch.device("meta"):
        keys = clip.clip_keys(build(), part.shapes)
    with part.opened() as tensors:
        source = Mapped(tensors.source, keymaps.chained(tensors.recipes, keys))
        model = filled(build, source, mapped_shapes(part.shapes, keys), filling)
    clip.restore_positions(model)
    return model
