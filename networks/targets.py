"""Which modules of which family get adapters, and what they are called in files."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn


@dataclass(frozen=True)
class Part:
    """A component of a model: its prefix in files, and the paths of its modules that can have an adapter.

    Modules are found by path, so the classes that a version of transformers happens to use don't matter.
    """

    prefix: str
    pattern: str
    """Regular expression on the module path; the group `path` is what file names are made of."""
    root: str = ""
    """Levels that file names have before the group `path`, whether the module tree has them or not."""

    def file_name(self, path: str) -> str | None:
        """Name in files of the module at a path; None: not a target."""
        match = re.fullmatch(self.pattern, path)
        return None if match is None else f"{self.prefix}_{self.root}{match['path']}".replace(".", "_")


class Target(NamedTuple):
    """A module that can have an adapter."""

    name: str
    """As in files: prefix and path with underscores."""
    path: str
    """In the module tree."""
    module: nn.Module


@dataclass(frozen=True)
class FamilyTargets:
    """The parts of a model family."""

    denoiser: Part
    """What gets adapters by default."""
    extras: Part | None
    """Modules of the denoiser that get an adapter only on request, or when a file has one."""
    encoders: Sequence[Part]
    """Text encoders, in the family's order."""


CLIP_PATHS = r"(.*\.)?(?P<path>encoder\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12]))"
T5_PATHS = r"(.*\.)?(?P<path>encoder\.block\.\d+\.layer\.\d+\.(SelfAttention\.[qkvo]|DenseReluDense\.(wi_0|wi_1|wo)))"

FLUX = FamilyTargets(
    denoiser=Part("lora_unet", r"(?P<path>(double|single)_blocks\.\d+\..+)"),
    extras=Part("lora_unet", r"(?P<path>(img_in|txt_in|(time|vector|guidance)_in\.(in|out)_layer))"),
    encoders=(
        Part("lora_te1", CLIP_PATHS, root="text_model."),
        Part("lora_te3", T5_PATHS),
    ),
)


def find(model: nn.Module, part: Part) -> Iterator[Target]:
    """The linear and convolution modules of a model that belong to a part, in the order of the model."""
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            name = part.file_name(path.replace("_orig_mod.", ""))  # torch.compile puts a level of its own in between
            if name is not None:
                yield Target(name, path, module)
