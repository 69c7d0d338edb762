"""FLUX.1 as the tools know it, and networks for it as they open them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from library.log import DataError, get_logger
from library.models.locations import open_tensors
from networks import flux_layouts, places, reading
from networks.adapter_file import AdapterFile
from networks.model_files import ToolFamily, opened_network
from networks.places import Shapes

logger = get_logger(__name__)

DEV, SCHNELL = "flux-1-dev", "flux-1-schnell"
ALIASES = {"lora_te2_encoder_block_": "lora_te3_encoder_block_"}
"""Beginnings of names that other programs write, and those that they have here."""


def architecture(shapes: Shapes) -> str:
    """Of a transformer, as model specifications call it."""
    return DEV if any(name.endswith("guidance_in.in_layer.weight") for name in shapes) else SCHNELL


def architecture_of_network(file: AdapterFile) -> str:
    """What its metadata say, or else dev."""
    return file.metadata.get("modelspec.architecture", DEV).partition("/")[0]


def open_network(path: str, device: torch.device | str = "cpu") -> AdapterFile:
    """A network file in any layout that is known here, its modules under the names of sd-scripts.

    With another device than the CPU all of it is loaded there, otherwise what is asked for.

    Errors: DataError when it is none, or has keys without a counterpart.
    """
    where = Path(path)
    if not where.is_file():
        raise DataError("the network file isn't there", path, code="E-NETWORK-FILE")
    tensors: Mapping[str, Tensor] = open_tensors([where], mmap=False)
    if flux_layouts.is_diffusers(tensors):
        converted = flux_layouts.from_diffusers(tensors)
        refuse_unknown(converted.unknown, tensors, path)
        logger.info("%s: %d modules with the names of Diffusers", path, converted.modules)
        tensors = converted.tensors
    file = opened_network(path, device, tensors)
    return file.renamed({name: renamed for name in file if (renamed := _renamed(name)) != name})


def refuse_unknown(keys: Sequence[str], tensors: Mapping[str, Tensor], path: str) -> None:
    """Errors: DataError, naming three of the keys, when there are any."""
    if keys:
        some = ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "")
        what = f"{len(keys)} keys match nothing in FLUX.1: {some}; {reading.describe(tensors)}"
        raise DataError(what, path, "use a network for FLUX.1", code="E-MERGE-MISFIT")


def _renamed(key: str) -> str:
    for theirs, ours in ALIASES.items():
        if key.startswith(theirs):
            return ours + key.removeprefix(theirs)
    return key


FLUX = ToolFamily(
    title="FLUX.1",
    known_as="FLUX",
    role="flux",
    module="networks.lora_flux",
    blocks=re.compile(r"lora_unet_(double|single)_blocks_\d+_.+"),
    places=places.flux_places,
    architecture=architecture,
    architecture_of_network=architecture_of_network,
    base_version=lambda _: "flux1",
    open_network=open_network,
)
