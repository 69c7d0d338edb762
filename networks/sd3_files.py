"""SD3 and SD3.5 as the tools know them, and networks for them as they open them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from library import metadata
from library.log import DataError, get_logger
from library.models import keymaps_sd3
from library.models.keymaps import mapped_shapes
from library.models.locations import open_tensors
from library.models.mmdit import MMDiTConfig
from networks import places
from networks.adapter_file import AdapterFile
from networks.converting import converted
from networks.layout_files import PEFT_KEY, read, recognised, written
from networks.layouts import LAYOUTS, ROWS
from networks.model_files import ToolFamily, opened_network
from networks.places import Shapes

logger = get_logger(__name__)

VARIANTS = ("medium", "5-medium", "5-large")
"""As `MMDiTConfig.variant` calls them."""
LARGE_WIDTH = 2432
"""Of SD3.5-large, and of no other."""


def architecture(shapes: Shapes) -> str:
    """Of a transformer, as model specifications call it."""
    inner = mapped_shapes(shapes, keymaps_sd3.mmdit_from_file(shapes))
    return metadata.sd3_architecture(MMDiTConfig.from_shapes(inner).variant)


def architecture_of_network(file: AdapterFile) -> str:
    """What its metadata say, or else its modules: those that only one variant has, and their width."""
    said = file.metadata.get("modelspec.architecture", "").partition("/")[0]
    if said in map(metadata.sd3_architecture, VARIANTS):
        return said
    named = file.metadata.get("ss_base_model_version", "")
    return metadata.sd3_architecture(named if named in VARIANTS else _variant(file))


def _variant(file: AdapterFile) -> str:
    if any("_x_block_attn2_" in name for name in file):
        return "5-medium"
    shapes = (file.weight_shape(name) for name in file if name.endswith("_attn_qkv"))
    wide = any(shape is not None and len(shape) > 1 and shape[1] == LARGE_WIDTH for shape in shapes)
    return "5-large" if wide else "medium"


def base_version(architecture: str) -> str:
    """`ss_base_model_version`."""
    return next((name for name in VARIANTS if metadata.sd3_architecture(name) == architecture), architecture)


def open_network(path: str, device: torch.device | str = "cpu") -> AdapterFile:
    """A network file in any layout that `convert_lora` knows, its modules under the names of sd-scripts.

    Errors: DataError when it is none, or has keys without a counterpart.
    """
    where = Path(path)
    if not where.is_file():
        raise DataError("the network file isn't there", path, code="E-NETWORK-FILE")
    lazy = open_tensors([where], mmap=False)
    tensors: Mapping[str, Tensor] = lazy
    if not all(name.startswith(("lora_", "oft_")) for name in lazy.shapes):
        parsed = recognised(lazy.shapes, path, family="sd3")
        source = read(lazy, parsed, path, lazy.metadata.get(PEFT_KEY))
        result = converted(source, ROWS["kohya", "sd3"], lazy.metadata, path)
        logger.info("%s: %d modules with the names of %s", path, len(source.modules), LAYOUTS[parsed.row.layout])
        tensors = written(result.adapter)
    return opened_network(path, device, tensors)


SD3 = ToolFamily(
    title="SD3",
    known_as="SD3",
    role="sd3",
    module="networks.lora_sd3",
    blocks=re.compile(r"lora_unet_joint_blocks_\d+_.+"),
    places=places.sd3_places,
    architecture=architecture,
    architecture_of_network=architecture_of_network,
    base_version=base_version,
    open_network=open_network,
)
