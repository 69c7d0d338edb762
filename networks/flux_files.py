"""Models and networks for FLUX.1, as the tools open them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from library import metadata
from library.log import DataError, get_logger
from library.models import keymaps
from library.models.detect import ROLES, refusal
from library.models.keymaps import Mapped, mapped_shapes
from library.models.locations import joint_header, locate, open_tensors
from library.models.scaled_files import ScaledTensors, without_scales
from networks import flux_layouts, reading
from networks.adapter_file import AdapterFile

logger = get_logger(__name__)

DEV, SCHNELL = "flux-1-dev", "flux-1-schnell"
ALIASES = {"lora_te2_encoder_block_": "lora_te3_encoder_block_"}
"""Beginnings of names that other programs write, and those that they have here."""
STALE = ("modelspec.", "sshs_", "ss_")
"""Beginnings of metadata that don't hold for what is made of a file."""


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

    @property
    def architecture(self) -> str:
        """As model specifications call it; of a transformer."""
        return DEV if any(name.endswith("guidance_in.in_layer.weight") for name in self.shapes) else SCHNELL


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
        converted = role == "flux" and "transformer_blocks.0.attn.add_k_proj.weight" in shapes
        if converted:
            recipes = keymaps.flux_from_diffusers(shapes)
            tensors, shapes = Mapped(tensors, recipes), mapped_shapes(shapes, recipes)
        kept = {name: value for name, value in found.metadata.items() if not name.startswith(STALE)}
        if scaled:
            logger.info("%s has float8 weights with scales; without --save_precision it is written in bf16", path)
        yield ModelFile(tensors, shapes, kept, torch.bfloat16 if scaled else None, converted)


def open_network(path: str, device: torch.device | str = "cpu") -> AdapterFile:
    """A network file in any layout that is known here, its modules under the names of sd-scripts.

    With another device than the CPU all of it is loaded there, otherwise what is asked for.

    Errors: DataError when it is none, or has keys without a counterpart.
    """
    where = Path(path)
    if not where.is_file():
        raise DataError("the network file isn't there", path, code="E-NETWORK-FILE")
    tensors: Mapping[str, Tensor] = open_tensors([where], mmap=False)
    values = joint_header([where], "--models").metadata
    if flux_layouts.is_diffusers(tensors):
        converted = flux_layouts.from_diffusers(tensors)
        refuse_unknown(converted.unknown, tensors, path)
        logger.info("%s: %d modules with the names of Diffusers", path, converted.modules)
        tensors = converted.tensors
    if torch.device(device).type != "cpu":
        tensors = {name: tensors[name].to(device) for name in tensors}
    file = AdapterFile(tensors, path, values)
    return file.renamed({name: renamed for name in file if (renamed := _renamed(name)) != name})


def title_of(file: AdapterFile) -> str:
    """What a network is called: the title of its metadata, else the name of its file."""
    return file.metadata.get("modelspec.title") or Path(file.path).stem


def refuse_unknown(keys: Sequence[str], tensors: Mapping[str, Tensor], path: str) -> None:
    """Errors: DataError, naming three of the keys, when there are any."""
    if keys:
        some = ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "")
        what = f"{len(keys)} keys match nothing in FLUX.1: {some}; {reading.describe(tensors)}"
        raise DataError(what, path, "use a network for FLUX.1", code="E-MERGE-MISFIT")


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


def _renamed(key: str) -> str:
    for theirs, ours in ALIASES.items():
        if key.startswith(theirs):
            return ours + key.removeprefix(theirs)
    return key
