"""Which modules of a transformer of blocks, and of its text encoders, get adapters of which rank."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

from library.log import get_logger
from library.types import DENOISER
from networks.arguments import Arguments
from networks.creating import Parts, Selection
from networks.plugin import Layers
from networks.reading import Rank
from networks.targets import Target

logger = get_logger(__name__)

T5 = "t5xxl"
"""The text encoder that gets adapters only with `train_t5xxl`."""
CONVOLUTIONS = ("conv_dim", "conv_alpha")
"""Arguments of other families, which mean nothing here."""


class TransformerLayers(Layers):
    """A rank for each sort of layer in the blocks that are trained, and one for each layer outside, at first none."""

    dims: ClassVar[Mapping[str, str]]
    """Arguments with a rank, and the paths of the modules in blocks that get it."""
    block: ClassVar[re.Pattern[str]]
    """The beginning of a path in a block."""
    outside: ClassVar[tuple[str, tuple[str, ...]]]
    """The argument with the ranks outside of blocks, and the beginnings of the paths that get them, in its order."""
    choices: ClassVar[tuple[str, ...]]
    """Arguments that choose blocks."""
    t5_component: ClassVar[str]
    no_convolutions: ClassVar[str]
    """Why `CONVOLUTIONS` have no effect."""

    def __init__(self, arguments: Arguments, default: Rank) -> None:
        """Reads the arguments but those of `choices`. Errors: UserError."""
        self._default = default
        self._dims = {name: arguments.integer(name) for name in self.dims}
        name, layers = self.outside
        self._outside = dict(zip(layers, arguments.integers(name, len(layers)) or [0] * len(layers), strict=True))
        self._trains_t5xxl = arguments.flag("train_t5xxl")
        self._idle = [name for name in CONVOLUTIONS if arguments.given(name)]
        names = (*self.choices, *self.dims, name, *CONVOLUTIONS)
        self.given = [name for name in names if arguments.given(name)]

    @abstractmethod
    def trains(self, path: str) -> bool:
        """Whether a path in a block is in one of those that are trained."""

    @abstractmethod
    def check_blocks(self, paths: Sequence[str]) -> None:
        """Errors: UserError for the choice of a block that a model with these paths hasn't got."""

    def encoders(self, names: Sequence[str]) -> list[str]:
        """All, but T5-XXL on request only."""
        if self._trains_t5xxl and T5 not in names:
            logger.warning("train_t5xxl has no effect: there is no T5")
        return [name for name in names if name != T5 or self._trains_t5xxl]

    def selection(self, parts: Parts) -> Selection:
        """See `Layers.selection`."""
        for name in self._idle:
            logger.warning("%s has no effect: %s", name, self.no_convolutions)
        paths = [target.path for target, component in parts.targets() if component == DENOISER]
        if paths:
            self.check_blocks(paths)
            self._warn(paths)
        return self._size

    def _warn(self, paths: Sequence[str]) -> None:
        trained = [path for path in paths if self.block.match(path) and self.trains(path)]
        for name, pattern in self.dims.items():
            if self._dims[name] and not any(re.fullmatch(pattern, path) for path in trained):
                logger.warning("%s has no effect: none of these blocks is trained", name)
        for layer, rank in self._outside.items():
            if rank and not any(f"{path}.".startswith(f"{layer}.") for path in paths):
                name, _ = self.outside
                logger.warning("the rank %d of %s has no effect: this model has no %s", rank, name, layer)

    def _size(self, target: Target, component: str) -> Rank | None:
        if component != DENOISER:
            return self._default if component != self.t5_component or self._trains_t5xxl else None
        rank = self._rank(target.path)
        return Rank(rank, self._default.alpha) if rank else None

    def _rank(self, path: str) -> int:
        if not self.block.match(path):
            return next(rank for layer, rank in self._outside.items() if f"{path}.".startswith(f"{layer}."))
        if not self.trains(path):
            return 0
        own = next((self._dims[name] for name, pattern in self.dims.items() if re.fullmatch(pattern, path)), None)
        return self._default.rank if own is None else own
