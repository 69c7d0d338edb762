"""Stands for a copy stream of a GPU: each copy is made as late as the order of things allows, so that mistakes show."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from library.models import offloading, streaming


class LateCopies:
    """See `library.devices.CopyStream`."""

    def __init__(self, device: torch.device) -> None:
        self.asked: list[Callable[[], object]] = []
        self.made = 0

    def after_compute(self) -> None:
        """Nothing: what is computed here is computed at once."""

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Remembers the copy."""
        source = source.detach()
        self.asked.append(lambda: target.copy_(source))

    def mark(self) -> int:
        """How many copies were asked for."""
        return len(self.asked)

    def before_compute(self, mark: int) -> None:
        """Makes copies up to a mark."""
        for copy in self.asked[self.made : mark]:
            copy()
        self.asked[self.made : mark] = [lambda: None] * len(self.asked[self.made : mark])
        self.made = max(self.made, mark)

    def finish(self) -> None:
        """Makes all copies."""
        self.before_compute(len(self.asked))


@contextmanager
def moved(*, late: bool = True) -> Iterator[None]:
    """Tensors of all sizes are moved meanwhile; what is built here keeps making its copies late, if that is wanted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(offloading, "LEAST_BYTES", 1)
        if late:
            patch.setattr(offloading, "CopyStream", LateCopies)
            patch.setattr(streaming, "CopyStream", LateCopies)
        yield
