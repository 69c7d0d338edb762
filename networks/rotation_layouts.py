"""OFT in other layouts: rotations of layers that lie one below the other, and how alpha limits them.

In files of sd-scripts layers that are fused are rotated apart, and alpha times their outputs is the largest norm. In
LyCORIS alpha 0 means that there is no limit; ComfyUI takes alpha for the norm itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from library.log import DataError
from networks.layouts import BLOCKS, Row
from networks.regrouping import MLP_RATIO
from networks.rotation import DEFAULT_ALPHA
from networks.scaling import Tensors, alpha_like

RESCALE = "rescale"


class Part(NamedTuple):
    """The rotation of one layer."""

    blocks: Tensor
    """(number, size, size)"""
    ratio: float | None
    """Largest norm over the number of outputs; None: any."""
    rescale: Tensor | None = None

    @property
    def outputs(self) -> int:
        """Of the layer."""
        return self.blocks.shape[0] * self.blocks.shape[1]

    @property
    def norm(self) -> float:
        """Of the skew-symmetric matrices."""
        blocks = self.blocks.double()
        return float((blocks - blocks.transpose(1, 2)).norm())

    @property
    def limited(self) -> bool:
        """Whether the limit has an effect."""
        return self.ratio is not None and self.norm > self.ratio * self.outputs


def regrouped(units: Sequence[Tensors | None], source: Row, target: Row, count: int) -> list[Tensors | None]:
    """The units of a module in another layout.

    Args:
        units: one, or one for each of the layers that it is in Diffusers.
        count: the number of these.

    Errors: DataError when it can't be said there.
    """
    parts = parts_of(units, source, count)
    alpha = next((unit["alpha"] for unit in units if unit is not None and "alpha" in unit), torch.tensor(0.0))
    if not target.fused:
        return [None if part is None else _unit([part], alpha, target) for part in parts]
    whole = [part or _still(parts, index) for index, part in enumerate(parts)]
    if target.layout != "kohya" and len(whole) > 1:
        whole = [_joined(whole)]
    return [_unit(whole, alpha, target)]


def parts_of(units: Sequence[Tensors | None], source: Row, count: int) -> list[Part | None]:
    """The rotations of the layers of a module. Errors: DataError when the file's don't fit to them."""
    if not source.fused or count == 1:
        return [None if unit is None else _parts(unit, source)[0] for unit in units]
    (unit,) = units
    assert unit is not None
    found = _parts(unit, source)
    if len(found) == count:
        return list(found)
    if len(found) > 1 or found[0].limited:
        raise DataError("one rotation with a limit for several layers", code="E-NETWORK-KIND")
    return list(_parted(found[0], count))


def _parts(unit: Tensors, source: Row) -> list[Part]:
    blocks = [unit[name] for name in BLOCKS if name in unit]
    alpha, rescale = unit.get("alpha"), unit.get(RESCALE)
    value = 0.0 if alpha is None else float(alpha)
    if source.layout == "kohya" and alpha is not None and not value:
        raise DataError("alpha is 0, so that it does nothing", code="E-NETWORK-FILE")
    if source.layout == "kohya" and alpha is None:
        value = DEFAULT_ALPHA
    outputs = [each.shape[0] * each.shape[1] for each in blocks]
    ratios = [value / size if source.limit == "norm" else value for size in outputs]
    return [Part(each, ratio or None, rescale) for each, ratio in zip(blocks, ratios, strict=True)]


def _parted(part: Part, count: int) -> list[Part]:
    shares = [1, 1, 1] if count == 3 else [1, 1, 1, MLP_RATIO]
    number = part.blocks.shape[0]
    if number % sum(shares):
        raise DataError(f"{number} blocks of outputs aren't those of {count} layers", code="E-NETWORK-KIND")
    counts = [number // sum(shares) * share for share in shares]
    rows = [size * part.blocks.shape[1] for size in counts]
    rescales = [None] * count if part.rescale is None else part.rescale.split_with_sizes(rows)
    return [Part(blocks, None, own) for blocks, own in zip(part.blocks.split_with_sizes(counts), rescales, strict=True)]


def _still(parts: Sequence[Part | None], index: int) -> Part:
    """A layer that isn't rotated, among others that are."""
    first, at = next((part, at) for at, part in enumerate(parts) if part is not None)
    number, size, _ = first.blocks.shape
    size = size * MLP_RATIO if index == 3 else size // MLP_RATIO if at == 3 else size
    return Part(first.blocks.new_zeros(number, size, size), first.ratio)


def _joined(parts: Sequence[Part]) -> Part:
    if len({part.blocks.shape[1] for part in parts}) > 1 or any(part.limited for part in parts):
        raise DataError("rotations of several layers that aren't one of the whole", code="E-NETWORK-KIND")
    rescales = [part.rescale for part in parts if part.rescale is not None]
    if len(rescales) not in (0, len(parts)):
        raise DataError("some layers are scaled, others aren't", code="E-NETWORK-KIND")
    return Part(torch.cat([part.blocks for part in parts]), None, torch.cat(rescales) if rescales else None)


def _unit(parts: Sequence[Part], alpha: Tensor, target: Row) -> Tensors:
    ratios = {part.ratio for part in parts}
    if len(ratios) > 1:
        raise DataError("rotations with different limits", code="E-NETWORK-KIND")
    (ratio,) = ratios
    unit = dict(zip(BLOCKS, (part.blocks for part in parts), strict=False))
    if target.layout == "kohya":
        if parts[0].rescale is not None:
            raise DataError("OFT that also scales outputs", code="E-NETWORK-KIND")
        if ratio is None:  # a limit that isn't reached
            ratio = float(max(1, *(math.ceil(part.norm / part.outputs) for part in parts)))
    elif parts[0].rescale is not None:
        unit[RESCALE] = parts[0].rescale
    value = (ratio or 0.0) * (parts[0].outputs if target.limit == "norm" else 1)
    return {**unit, "alpha": alpha_like(alpha, value)}
