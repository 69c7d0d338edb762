"""Models with one transformer, such as FLUX.1 and SD3, as the tools open them, and what tools know of such a family."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from library import metadata
from library.log import DataError, get_logger
from library.models import keymaps, keymaps_sd3
from library.models.detect import ROLES, refusal
from library.models.keymaps import Mapped, Recipes, mapped_shapes
from library.models.locations import joint_header, locate, open_tensors
from library.models.scaled_files import ScaledTensors, without_scales
from networks.adapter_file import AdapterFile
from networks.places import Places, Shapes

logger = get_logger(__name__)

STALE = ("modelspec.", "sshs_", "ss_")
"""Beginnings of metadata that don't hold for what is made of a file."""

DIFFUSERS: Mapping[str, tuple[str, Callable[[Shapes], Recipes]]] = {
    "flux": ("transformer_blocks.0.attn.add_k_proj.weight", keymaps.flux_from_diffusers),
    "sd3": ("pos_embed.proj.weight", keymaps_sd3.mmdit_from_file),
}
"""By role: a tensor that only the layout of Diffusers has, and the recipes that make the authors' layout of it."""


@dataclass(frozen=True)
class ToolFamily:
    """What the tools have to know of a family of models."""

    title: str
    known_as: str
    """As `reading.LORA_FAMILIES` calls it."""
    role: str
    """Of the transformer, a key of `detect.ROLES`."""
    module: str
    """The network module for it."""
    blocks: re.Pattern[str]
    """Modules that a LoRA has by default, and so those that are looked at for one."""
    places: Callable[[Shapes], Places]
    """Where the modules lie in the file of a transformer."""
    architecture: Callable[[Shapes], str]
    """Of a transformer, as model specifications call it."""
    architecture_of_network: Callable[[AdapterFile], str]
    """What a network is for, in the same words."""
    base_version: Callable[[str], str]
    """`ss_base_model_version`, from the architecture."""
    open_network: Callable[[str, torch.device | str], AdapterFile]
    """A network file in any layout that is known here, on a device."""


@dataclass(frozen=True)
class ModelFile:
    """The tensors of a model, lazily, in the layout in which they are written again."""

    tensors: Mapping[str, Tensor]
    shapes: Mapping[str, tuple[int, ...]]
    metadata: Mapping[str, str]
    dtype: torch.dtype | None
    """What must be written where none is asked for: files with scales hold something else than it seems. None: any."""
    converted: bool = False
    """Whether it was in the layout of Diffusers."""


def input_files(path: Path | str, role: str, option: str) -> list[str]:
    """The files that a path to a model means. Errors: DataError when they aren't there."""
    return [str(file) for file in locate(path, option, ROLES[role].folders)]


@contextmanager
def opened_model(path: Path | str, role: str, option: str) -> Iterator[ModelFile]:
    """A model, read tensor by tensor. Diffusers folders and shards of a transformer come in its authors' layout.

    Files aren't mapped into memory, so that no more of them is there than what is worked on.

    Args:
        role: a key of `detect.ROLES`.
        option: the option that gave the path, for messages.

    Errors: DataError when it is something else, or damaged.
    """
    paths = locate(path, option, ROLES[role].folders)
    found = joint_header(paths, option)
    if problem := refusal(found, path, option, role):
        raise DataError(problem.what, problem.where, problem.hint, code=problem.code)
    scaled = len(without_scales(found.tensors)) < len(found.tensors)
    with open_tensors(paths, mmap=False) as opened:
        tensors: Mapping[str, Tensor] = ScaledTensors(opened) if scaled else opened
        shapes = without_scales(found.shapes)
        sign, recipes_of = DIFFUSERS.get(role, ("", keymaps.flux_from_diffusers))
        converted = sign in shapes
        if converted:
            recipes = recipes_of(shapes)
            tensors, shapes = Mapped(tensors, recipes), mapped_shapes(shapes, recipes)
        kept = {name: value for name, value in found.metadata.items() if not name.startswith(STALE)}
        if scaled:
            logger.info("%s has float8 weights with scales; without --save_precision it is written in bf16", path)
        yield ModelFile(tensors, shapes, kept, torch.bfloat16 if scaled else None, converted)


def opened_network(path: str, device: torch.device | str, tensors: Mapping[str, Tensor]) -> AdapterFile:
    """A network of tensors with the names of sd-scripts; with another device than the CPU all are loaded there.

    Errors: DataError when it is none.
    """
    values = joint_header([Path(path)], "--models").metadata
    if torch.device(device).type != "cpu":
        tensors = {name: tensors[name].to(device) for name in tensors}
    return AdapterFile(tensors, path, values)


def title_of(file: AdapterFile) -> str:
    """What a network is called: the title of its metadata, else the name of its file."""
    return file.metadata.get("modelspec.title") or Path(file.path).stem


def modelspec(
    architecture: str, kind: str, path: Path, merged_from: Sequence[str] = (), title: str | None = None
) -> dict[str, str]:
    """`modelspec.*` of a file that a tool makes; `kind` as for `metadata.build_modelspec`."""
    return metadata.build_modelspec(
        architecture=architecture,
        kind=kind,
        timestamp=time.time(),
        title=title or path.stem,
        merged_from=", ".join(map(metadata.private, merged_from)) or None,
    )
