"""Weighted sums of networks, module by module, as LoRA."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from library.log import DataError, get_logger
from library.types import DENOISER
from networks import algebra
from networks.algebra import LowRank, Source
from networks.base import encoder_component
from networks.report import Report

logger = get_logger(__name__)


@dataclass(frozen=True)
class Share:
    """One module of one file, and how much of it counts."""

    name: str
    source: Source
    ratio: float

    @property
    def is_low_rank(self) -> bool:
        """Whether it is plain LoRA."""
        return self.source.file.kind(self.name) == "lora"

    def low_rank(self) -> LowRank:
        """It as LoRA. Errors: DataError when it is something else."""
        return LowRank.of(self.source.file[self.name], self.name)

    def change(self, shape: Sequence[int] | None, device: torch.device | str) -> Tensor:
        """The change of the weight, without the ratio."""
        return algebra.change(self.source.file[self.name], name=self.name, shape=shape, device=device)


Joining = Callable[[Sequence[Share]], LowRank]
"""Makes the sum of the modules of one name."""


def concatenated(shares: Sequence[Share]) -> LowRank:
    """The exact sum; the ranks add up."""
    return algebra.concatenated([share.low_rank() for share in shares], [share.ratio for share in shares])


def added(shares: Sequence[Share]) -> LowRank:
    """Matrix by matrix, which mixes them; the rank stays."""
    return algebra.added([share.low_rank() for share in shares], [share.ratio for share in shares])


class Nearest:
    """The LoRA of a rank that is nearest to the exact sum."""

    KINDS = ("lora", "loha", "lokr")

    def __init__(self, rank: int, conv_rank: int, clamp_quantile: float, device: torch.device | str) -> None:
        """`conv_rank` is that on convolutions with kernels larger than 1."""
        self._ranks, self._quantile, self._device = (rank, conv_rank), clamp_quantile, device
        self._left_out = self._whole = 0.0

    @property
    def error(self) -> float:
        """The norm of what was left out so far, in parts of that of the sums."""
        return math.sqrt(self._left_out / self._whole) if self._whole else 0.0

    def __call__(self, shares: Sequence[Share]) -> LowRank:
        """The sum of the modules of one name."""
        if all(share.is_low_rank for share in shares):
            modules = [share.low_rank() for share in shares]
            ratios = [share.ratio for share in shares]
            rank = self._ranks[modules[0].is_window]
            found, error = algebra.nearest(modules, ratios, rank, clamp_quantile=self._quantile, device=self._device)
            norm = algebra.concatenated(modules, ratios).norm()
        else:
            shape = _shape(shares)
            deltas = [share.ratio * share.change(shape, self._device) for share in shares]
            total = sum(deltas[1:], start=deltas[0]).reshape(shape)
            rank = self._ranks[math.prod(total.shape[2:]) > 1]
            found, error = algebra.nearest_to(total, rank, clamp_quantile=self._quantile)
            norm = float(torch.linalg.vector_norm(total))
        self._whole += norm**2
        self._left_out += (error * norm) ** 2
        return found


def merged(sources: Sequence[Source], joining: Joining, *, shuffle: bool = False) -> dict[str, LowRank]:
    """The weighted sum of networks, by module; logs what came from where.

    Errors: DataError when a file has something that can't be added so, shapes differ, or nothing is left.
    """
    kinds = Nearest.KINDS if isinstance(joining, Nearest) else ("lora",)
    for source in sources:
        if source.file.keys_left:
            named = ", ".join(source.file.keys_left[:3])
            what = f"{len(source.file.keys_left)} keys belong to no module: {named}"
            raise DataError(what, source.file.path, "use a network file", code="E-NETWORK-FILE")
        source.file.require(kinds, "merging networks with each other")
    report, found = Report("merged"), {}
    for source in sources:
        report.expect(source.file.path)
    for name in dict.fromkeys(name for source in sources for name in source.file):
        shares = [Share(name, source, source.ratio_of(name)) for source in sources if name in source.file]
        for share in shares:
            norm = share.low_rank().norm() if share.is_low_rank else _norm(share.change(None, "cpu"))
            report.add(share.source.file.path, name, component_of(name), abs(share.ratio) * norm)
        module = joining(shares)
        found[name] = algebra.shuffled(module) if shuffle else module
    report.check()
    for line in report.lines():
        logger.info("%s", line)
    return found


COMPONENTS: Mapping[str, str] = {
    "lora_te_": encoder_component(0),
    "lora_te1_": encoder_component(0),
    "lora_te2_": encoder_component(1),
    "lora_te3_": encoder_component(2),
}
"""By beginnings of names in files."""


def component_of(name: str) -> str:
    """The part of the model that a module belongs to, by its name in files."""
    return next((part for start, part in COMPONENTS.items() if name.startswith(start)), DENOISER)


WINDOWS: Mapping[int, re.Pattern[str]] = {
    3: re.compile(r".*_(in_layers_2|out_layers_3|conv[12]?|0_op)"),
    2: re.compile(r"lora_unet_x_embedder_proj"),
}
"""Names of convolutions, by the side of their kernels."""


def _shape(shares: Sequence[Share]) -> tuple[int, ...]:
    """Of the weight; LoHa and LoKr may have it as a matrix only."""
    shapes = [shape for share in shares if (shape := share.source.file.weight_shape(share.name))]
    longest = max(shapes, key=len)
    side = next((side for side, names in WINDOWS.items() if names.fullmatch(shares[0].name)), 1)
    if side > 1 and len(longest) == 2 and longest[1] % side**2 == 0:
        return (longest[0], longest[1] // side**2, side, side)
    return longest


def _norm(change: Tensor) -> float:
    return float(torch.linalg.vector_norm(change))
