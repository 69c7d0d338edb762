"""The processes of a run, and what they tell one another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

PINNING = ("cuda", "xpu")
"""Devices that exchange data with pinned memory while the host goes on."""


class Later:
    """Numbers that are on their way from the device to here; asking for them later costs no waiting."""

    def __init__(self, values: Tensor, work: Any = None) -> None:
        """Starts the way of `values` (1-d); `work` is the handle of a collective that is still writing them."""
        self._values, self._work, self._arrived = values.detach(), work, None
        if values.device.type == "cpu":
            return
        if work is not None:
            work.wait()  # on an accelerator this only orders streams, the host goes on
            self._work = None
        pinned = values.device.type in PINNING
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=pinned)
        self._values = host.copy_(self._values, non_blocking=pinned)
        if pinned:
            self._arrived = torch.Event(device=values.device)
            self._arrived.record()

    def read(self) -> list[float]:
        """The numbers, waiting for them where they haven't arrived."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        if self._arrived is not None:
            self._arrived.synchronize()
        return [float(value) for value in self._values.tolist()]


@dataclass(frozen=True)
class Ranks:
    """The place of this process among those of the run."""

    rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")  # noqa: RUF009 - a torch.device is immutable

    @classmethod
    def of_this_process(cls, device: torch.device | str = "cpu") -> Ranks:
        """As torch.distributed was initialised; alone where it wasn't."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size(), torch.device(device))
        return cls(device=torch.device(device))

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files and talks to the user."""
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Whether the flag is up in any process. All processes must call it; they wait for one another."""
        if self.world == 1:
            return flag
        votes = torch.tensor([1.0 if flag else 0.0], device=self.device)
        dist.all_reduce(votes, op=dist.ReduceOp.MAX)
        return bool(votes.item() > 0)

    def barrier(self) -> None:
        """Waits until all processes are here."""
        self.any(False)

    def mean_later(self, values: Tensor) -> Later:
        """The mean of `values` (1-d) over all processes, without waiting for it. All processes must call it."""
        if self.world == 1:
            return Later(values.clone())
        shared = values.detach().to(self.device) / self.world
        return Later(shared, dist.all_reduce(shared, async_op=True))

    def numbers_later(self, numbers: Sequence[float]) -> Later:
        """The mean of plain numbers over all processes, as `mean_later`."""
        values = torch.tensor(list(numbers), dtype=torch.float32, pin_memory=self.device.type in PINNING)
        return self.mean_later(values.to(self.device, non_blocking=True))
