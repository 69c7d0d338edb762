"""Ranks, alphas and learning rates by block of a U-Net: `block_dims`, `down_lr_weight` and others.

A list has one number for each block, in the order of the model: the way down, the middle, the way up, for SD 12, 1 and
12. SDXL has 9, 3 and 9, and the lists of ranks and alphas one more at both ends, for layers that have no adapters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from library.log import get_logger
from networks.arguments import Arguments, error
from networks.reading import Rank
from networks.unet import UnetLayout

logger = get_logger(__name__)

SHAPES: Mapping[str, Callable[[float], float]] = {
    "sine": lambda x: math.sin(x * math.pi / 2),
    "cosine": lambda x: math.sin((1 - x) * math.pi / 2),
    "linear": lambda x: x,
    "reverse_linear": lambda x: 1 - x,
    "zeros": lambda x: 0.0,
}
"""Presets of weights, from 0 for the first block to 1 for the last one."""

LR_WEIGHTS = ("down_lr_weight", "mid_lr_weight", "up_lr_weight")
LISTS = ("block_dims", "block_alphas", "conv_block_dims", "conv_block_alphas")

Weights = Callable[[int], "list[float]"]
"""Gives the weights for a number of blocks."""


@dataclass(frozen=True)
class BlockSizes:
    """What the modules of each block get."""

    linear: Sequence[Rank]
    """Rank 0: no adapter."""
    conv: Sequence[Rank] | None
    """Of convolutions with kernels larger than 1; None: they and what is around them get none."""
    weights: Sequence[float] | None
    """What the learning rate is multiplied by; None: it is the same for all."""


class BlockArguments:
    """The arguments, for a U-Net of any size."""

    def __init__(self, arguments: Arguments, default: Rank, conv: Rank | None, conv_alpha: float) -> None:
        """Reads them.

        Args:
            arguments: `--network_args`.
            default: size where no list says one.
            conv: that of convolutions; None: they get none.
            conv_alpha: alpha of convolutions where no list says one.

        Errors: UserError.
        """
        self._default, self._conv, self._conv_alpha = default, conv, conv_alpha
        self._dims = {name: _numbers(arguments, name, int) for name in ("block_dims", "conv_block_dims")}
        self._alphas = {name: _numbers(arguments, name, float) for name in ("block_alphas", "conv_block_alphas")}
        down, middle, up = LR_WEIGHTS
        self._weights = (
            _weights(arguments, down, presets=True),
            _weights(arguments, middle, presets=False),
            _weights(arguments, up, presets=True),
        )
        self._threshold = arguments.number("block_lr_zero_threshold") or 0.0
        self.given = [name for name in LISTS if arguments.given(name)]
        """Those of the lists of ranks and alphas that were given."""
        self.weighted = any(self._weights)
        """Whether blocks have learning rates of their own."""
        self.on = self.weighted or self._dims["block_dims"] is not None
        """Whether blocks are told apart."""
        idle = [] if self.on else self.given
        if not self.weighted and arguments.given("block_lr_zero_threshold"):
            logger.warning("block_lr_zero_threshold has no effect: there is none of %s", ", ".join(LR_WEIGHTS))
        for name in idle:
            logger.warning("%s has no effect without block_dims or one of %s", name, ", ".join(LR_WEIGHTS))

    def sizes(self, layout: UnetLayout) -> BlockSizes | None:
        """What the blocks of a U-Net get; None: they aren't told apart. Errors: UserError for a list too long or short.

        Those with a weight of 0 get no adapters.
        """
        if not self.on:
            return None
        count = sum(layout.counts) + 2 * layout.sizes
        weights = self.weights(layout)
        default, conv = self._default, self._conv
        linear = self._ranks("block_dims", "block_alphas", count, default)
        convs = None
        if conv is not None or self._dims["conv_block_dims"] is not None:
            base = conv or Rank(0, self._conv_alpha)
            convs = self._ranks("conv_block_dims", "conv_block_alphas", count, base)
        if weights is not None:
            linear, convs = _without(linear, weights), convs and _without(convs, weights)
        return BlockSizes(linear, convs, weights)

    def weights(self, layout: UnetLayout) -> list[float] | None:
        """What the learning rate of each block is multiplied by; None: nothing was said.

        Weights not above `block_lr_zero_threshold` are 0. Where one of the sides has none, they are 1.
        """
        if not self.weighted:
            return None
        sides = zip(self._weights, layout.counts, strict=True)
        found = [weight for side, count in sides for weight in (side(count) if side else [1.0] * count)]
        ends = [1.0] * layout.sizes
        return [*ends, *(weight if weight > self._threshold else 0.0 for weight in found), *ends]

    def _ranks(self, dims: str, alphas: str, count: int, default: Rank) -> list[Rank]:
        ranks = _of_length(self._dims[dims], dims, count) or [default.rank] * count
        scales = _of_length(self._alphas[alphas], alphas, count) or [default.alpha] * count
        return [Rank(int(rank), alpha) for rank, alpha in zip(ranks, scales, strict=True)]


def _without(ranks: Sequence[Rank], weights: Sequence[float]) -> list[Rank]:
    """The ranks, 0 where the weight is 0."""
    return [rank if weight else Rank(0, rank.alpha) for rank, weight in zip(ranks, weights, strict=True)]


def _of_length(numbers: list[float] | None, name: str, count: int) -> list[float] | None:
    if numbers is not None and len(numbers) != count:
        raise error(f"{len(numbers)} numbers, for {count} blocks", name, f"give {count} of them, 0 for no adapter")
    return numbers


def _numbers(arguments: Arguments, name: str, kind: Callable[[str], float]) -> list[float] | None:
    text = arguments.text(name)
    return None if text is None else [_number(item, name, kind) for item in text.split(",")]


def _number(text: str, name: str, kind: Callable[[str], float], hint: str = "numbers with commas between") -> float:
    whole = "whole " if kind is int else ""
    try:
        value = kind(text)
    except ValueError:
        raise error(f"{text.strip()!r} is no {whole}number", name, hint) from None
    if not 0 <= value < math.inf:
        raise error(f"{text.strip()} is out of range", name, "it must be at least 0")
    return value


def _weights(arguments: Arguments, name: str, *, presets: bool) -> Weights | None:
    """One number or several, an empty one meaning 0, or a preset, with a number added to it or not."""
    text = arguments.text(name)
    if text is None:
        return None
    if "," not in text and presets:
        return _preset(text, name)
    numbers = [_number(item.strip() or "0", name, float) for item in text.split(",")]
    return lambda count: _fitted(numbers, name, count)


def _preset(text: str, name: str) -> Weights:
    word, plus, base = text.partition("+")
    shape = SHAPES.get(word.strip().lower())
    if shape is None:
        same = _number(text, name, float, f"numbers, or one of {', '.join(SHAPES)}, such as sine+0.25")
        return lambda count: [same] * count
    added = _number(base, name, float) if plus else 0.0
    return lambda count: [added + shape(index / max(count - 1, 1)) for index in range(count)]


def _fitted(numbers: Sequence[float], name: str, count: int) -> list[float]:
    """As many as there are blocks: cut, or filled up with 1."""
    if len(numbers) > count:
        logger.warning("%s: %d numbers for %d blocks; the last ones are left out", name, len(numbers), count)
    elif len(numbers) < count:
        logger.warning("%s: %d numbers for %d blocks; the others get 1", name, len(numbers), count)
    return [*numbers[:count], *[1.0] * (count - len(numbers))]
