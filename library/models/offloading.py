"""Tensors that wait in main memory for the backward pass, moved while the device computes."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from library.devices import CopyStream, host_memory
from library.models.packing import Layout, Place

LEAST_BYTES = 1 << 16
"""Smaller tensors stay on the device."""


class Offload:
    """Where the inputs of blocks wait. They leave while their block computes, and come back one block ahead of use.

    Memory is used again; there is never more of it than waited at the same time.
    """

    def __init__(self) -> None:
        self._copies: CopyStream | None = None
        self._free: list[Tensor] = []
        self._last: weakref.ref[_Parcel] | None = None

    @contextmanager
    def of_inputs(self, inputs: Sequence[Any]) -> Iterator[None]:
        """Inputs of a block that are saved for the backward pass meanwhile wait in main memory.

        Those without a gradient stay: they are masks and tables that all blocks share.
        """
        values = [value for value in inputs if isinstance(value, Tensor) and value.requires_grad and value.nbytes]
        moving = {value.data_ptr() for value in values if value.nbytes >= LEAST_BYTES}
        if not moving:
            yield
            return
        copies = self._copies = self._copies or CopyStream(values[0].device)
        before = None if self._last is None else self._last()
        if before is not None:
            before.leave()
        parcel = _Parcel(copies, self._free, self._last)
        self._last = weakref.ref(parcel)

        def pack(tensor: Tensor) -> Any:
            return parcel.take(tensor) if tensor.data_ptr() in moving else tensor

        with saved_tensors_hooks(pack, _unpack):
            yield


def _unpack(saved: Any) -> Tensor:
    return saved if isinstance(saved, Tensor) else saved.get()


class _Parcel:
    """The inputs of one block."""

    def __init__(self, copies: CopyStream, free: list[Tensor], before: weakref.ref[_Parcel] | None) -> None:
        self.copies, self._free, self._before = copies, free, before
        self._waiting: list[_Waiting] = []

    def take(self, tensor: Tensor) -> _Handle:
        """Sends a tensor to main memory."""
        (place,) = Layout.of([tensor]).places
        memory = _taken(self._free, place.bytes, self.copies, tensor.device)
        self.copies.after_compute()
        self.copies.copy(place.of(memory), tensor)
        waiting = _Waiting(tensor, place, memory, self._free)
        waiting.mark = self.copies.mark()
        self._waiting.append(waiting)
        return _Handle(self, waiting)

    def leave(self) -> None:
        """Lets memory of the device go as soon as the copies are made."""
        for waiting in self._waiting:
            if waiting.here is not None:
                self.copies.before_compute(waiting.mark)
                waiting.here = None

    def fetch(self) -> None:
        """Asks for what isn't on the device."""
        for waiting in self._waiting:
            waiting.fetch(self.copies)

    def fetch_before(self) -> None:
        """Asks for the inputs of the block before."""
        before = None if self._before is None else self._before()
        if before is not None:
            before.fetch()


class _Waiting:
    """A tensor in main memory; it may be on the device, too."""

    def __init__(self, here: Tensor, place: Place, memory: Tensor, free: list[Tensor]) -> None:
        self.here: Tensor | None = here
        self.mark: Any = None
        """When the last copy that was asked for is made."""
        self._device, self._place, self._memory, self._free = here.device, place, memory, free

    def fetch(self, copies: CopyStream) -> None:
        """Asks for a copy on the device if there is none."""
        if self.here is not None:
            return
        place = self._place
        self.here = torch.empty_strided(place.size, place.stride, dtype=place.dtype, device=self._device)
        copies.after_compute()  # which may use this memory still
        copies.copy(self.here, place.of(self._memory))
        self.mark = copies.mark()

    def give(self, copies: CopyStream) -> Tensor:
        """The tensor on the device; it isn't kept."""
        self.fetch(copies)
        copies.before_compute(self.mark)
        given, self.here = self.here, None
        assert given is not None
        return given

    def __del__(self) -> None:
        """Lets others use the memory: their copies are made after those that were asked for here."""
        self._free.append(self._memory)


class _Handle:
    """What the graph holds in place of a tensor."""

    def __init__(self, parcel: _Parcel, waiting: _Waiting) -> None:
        self._parcel, self._waiting = parcel, waiting

    def get(self) -> Tensor:
        """The tensor; what will be needed next is asked for."""
        given = self._waiting.give(self._parcel.copies)
        self._parcel.fetch_before()
        return given


def _taken(free: list[Tensor], size: int, copies: CopyStream, device: torch.device) -> Tensor:
    """The smallest free memory that suffices; else new memory in place of the largest that is free."""
    by_size = sorted(range(len(free)), key=lambda index: len(free[index]))
    for index in by_size:
        if len(free[index]) >= size:
            return free.pop(index)
    if free:
        copies.finish()
        del free[by_size[-1]]
    return host_memory(size, device)
