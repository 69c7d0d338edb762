"""The U-Nets of SD 1.x, SD 2.x and SDXL, and their text encoders, for networks: what modules are called in files.

Modules have the paths of Diffusers (`down_blocks.1.attentions.0`). Files for SD are named after them, files for SDXL
after the layout of the first checkpoints (`input_blocks.4.1`), whose numbers also are those of block-wise arguments.
Files for SDXL that are named after the paths of Diffusers are read, too.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, replace

from torch import nn

from networks.creating import Encoders, Parts
from networks.targets import SD, SDXL, FamilyTargets, another_family, find

PATH = re.compile(r"(down_blocks|up_blocks|mid_block)(?:\.(\d+))?\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)")
LAYERS = {
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
"""Modules of residual blocks, as the first checkpoints call them."""
SIZES = "add_embedding."
"""Beginning of paths that only SDXL has, which embeds sizes."""


@dataclass(frozen=True)
class Place:
    """Where a module lies in the layout of the first checkpoints."""

    side: str
    """input_blocks, middle_block or output_blocks."""
    number: int
    """From 0 on each side."""
    rest: str
    """The path below the block."""

    def __str__(self) -> str:
        return f"{self.side}.{self.number}.{self.rest}"


class UnetLayout:
    """The numbers of a U-Net's blocks, whatever its size."""

    def __init__(self, paths: Collection[str]) -> None:
        """`paths` are those of its modules."""
        self._members = {match.groups() for match in map(PATH.match, paths) if match}
        self.sizes = any(path.startswith(SIZES) for path in paths)
        """Whether it embeds sizes: it is SDXL's."""
        self._first = {"down_blocks": self._starts("down_blocks", 1), "up_blocks": self._starts("up_blocks", 0)}
        self.counts = (self._first["down_blocks"][-1], 3 if self.sizes else 1, self._first["up_blocks"][-1])
        """Blocks on the way down, the one before the first level included, in the middle, and on the way up.

        The middle counts as one block in SD, its three parts as three in SDXL.
        """

    @classmethod
    def of(cls, unet: nn.Module) -> UnetLayout:
        """The layout of a U-Net."""
        return cls([path.replace("_orig_mod.", "") for path, _ in unet.named_modules()])

    def _starts(self, side: str, first: int) -> list[int]:
        """The number of the first block of each level, and one more for the end."""
        starts = [first]
        while count := self._count(side, len(starts) - 1, "resnets"):
            # on the way down a block is left to the change of the resolution, on the way up it shares the last one
            starts.append(starts[-1] + count + self._count(side, len(starts) - 1, "downsamplers"))
        return starts

    def _count(self, side: str, level: int, kind: str) -> int:
        return sum(member[:3] == (side, str(level), kind) for member in self._members)

    def place(self, path: str) -> Place:
        """That of the module at a path, which `PATH` must match."""
        match = PATH.match(path)
        assert match, path
        side, level, kind, index = match.groups()
        rest = path[match.end() + 1 :]
        rest = LAYERS.get(rest, rest)
        if side == "mid_block":
            return Place("middle_block", 1 if kind == "attentions" else 2 * int(index), rest)
        number = self._first[side][int(level)]
        if kind in ("resnets", "attentions"):
            number, child = number + int(index), int(kind == "attentions")
        elif kind == "downsamplers":
            number, child, rest = self._first[side][int(level) + 1] - 1, 0, "op"
        else:
            number, child = self._first[side][int(level) + 1] - 1, 1 + bool(self._count(side, int(level), "attentions"))
        return Place("input_blocks" if side == "down_blocks" else "output_blocks", number, f"{child}.{rest}")

    def written(self, path: str) -> str:
        """The path of a module in the layout of the first checkpoints."""
        return str(self.place(path))

    def block(self, path: str) -> int:
        """The number of the block that a module counts to, of all; SDXL has one before the first, without modules."""
        down, middle, _ = self.counts
        place = self.place(path)
        if place.side == "input_blocks":
            number = place.number
        elif place.side == "middle_block":
            number = down + (place.number if self.sizes else 0)
        else:
            number = down + middle + place.number
        return number + self.sizes


def parts_of(text_encoders: Encoders | nn.Module | None, unet: nn.Module | None) -> Parts:
    """What plug-ins get of a model, as SD or SDXL: the U-Net decides, or else the number of text encoders.

    Errors: UserError when the denoiser is no U-Net.
    """
    several = text_encoders is not None and not isinstance(text_encoders, nn.Module) and len(text_encoders) > 1
    return Parts.of(family(unet, sdxl=several), text_encoders, unet)


def family(unet: nn.Module | None, *, sdxl: bool = False, prefix: str = "lora_unet") -> FamilyTargets:
    """The targets of a model.

    Args:
        unet: decides whether it is SD or SDXL.
        sdxl: what it is if the U-Net isn't loaded.
        prefix: of the U-Net in files.

    Errors: UserError when the denoiser is no U-Net.
    """
    base = SDXL if sdxl else SD
    if unet is None:
        return base
    layout = UnetLayout.of(unet)
    base = SDXL if layout.sizes else SD
    plain = [replace(part, prefix=prefix) for part in (base.denoiser, base.extras) if part is not None]
    own = [replace(part, written=layout.written) for part in plain] if layout.sizes else plain
    theirs, ours = ([target.name for part in parts for target in find(unet, part)] for parts in (plain, own))
    if not ours:
        raise another_family(path for path, _ in unet.named_modules())
    aliases = dict(zip(theirs, ours, strict=True)) if layout.sizes else {}
    return replace(base, denoiser=own[0], extras=own[1], aliases=aliases)
