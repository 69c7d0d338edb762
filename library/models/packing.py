"""The tensors of a module in one piece of memory, so that one copy moves them all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

_ALIGNMENT = 256
"""Bytes; what kernels like, and a multiple of the size of every type."""


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in a piece of memory."""

    offset: int
    """Bytes."""
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Without gaps."""
        return self.size.numel() * self.dtype.itemsize

    def of(self, memory: Tensor) -> Tensor:
        """The tensor in `memory` (bytes)."""
        return memory[self.offset : self.offset + self.bytes].view(self.dtype).as_strided(self.size, self.stride)


@dataclass(frozen=True)
class Layout:
    """Places of several tensors, one after the other."""

    places: tuple[Place, ...]
    bytes: int

    @classmethod
    def of(cls, tensors: Iterable[Tensor]) -> Layout:
        """Places for tensors of these types, shapes and, where they have no gaps, strides."""
        places, end = [], 0
        for tensor in tensors:
            place = Place(end, tensor.dtype, tensor.shape, torch.empty_like(tensor, device="meta").stride())
            places.append(place)
            end += -(-place.bytes // _ALIGNMENT) * _ALIGNMENT
        return cls(tuple(places), end)

    def views(self, memory: Tensor) -> list[Tensor]:
        """The tensors in `memory` (bytes)."""
        return [place.of(memory) for place in self.places]


class Packed:
    """The tensors of a module and their home: one piece of main memory, where their data are while they are not away.

    Gradients are where the data are. At home they have a piece of memory of their own, as soon as one comes.
    """

    def __init__(self, tensors: Sequence[Tensor], allocate: Callable[[int], Tensor]) -> None:
        """Moves the data of `tensors` to the new home."""
        self.tensors, self._allocate = list(tensors), allocate
        self.layout = Layout.of(tensors)
        self.home = allocate(self.layout.bytes)
        self._data = self.layout.views(self.home)
        self._gradients: list[Tensor] | None = None
        self._left: dict[int, Tensor] = {}
        """Gradients at home of tensors that are away, by position."""
        self._backward = False
        """Whether gradients have come since the tensors left."""
        for tensor, data in zip(self.tensors, self._data, strict=True):
            data.copy_(tensor.detach())
            tensor.data = data

    @property
    def is_trained(self) -> bool:
        """Whether any of the tensors gets gradients, as things are now."""
        return any(tensor.requires_grad for tensor in self.tensors)

    def leave(self, views: Sequence[Tensor]) -> None:
        """Lets the data be in `views`. Gradients stay."""
        for position, (tensor, view) in enumerate(zip(self.tensors, views, strict=True)):
            if tensor.grad is not None:
                self._left[position], tensor.grad = tensor.grad, None
            tensor.data = view

    def begin_backward(self) -> None:
        """Lets the gradients follow the data, so that new ones are added to them."""
        self._backward = True
        while self._left:
            position, gradient = self._left.popitem()
            tensor = self.tensors[position]
            tensor.grad = torch.empty_like(gradient, device=tensor.device).copy_(gradient, non_blocking=True)

    def come_home(self) -> tuple[bool, list[tuple[Tensor, Tensor]]]:
        """Lets data and gradients be at home again.

        Returns:
            Whether the data must be copied home: gradients are gone, so an optimizer has used them. And the copies
            (target, source) that bring the other gradients home.
        """
        changed, copies = False, []
        for position, tensor in enumerate(self.tensors):
            gradient = tensor.grad
            tensor.grad = None
            tensor.data = self._data[position]  # first, for a gradient must be on the device of its tensor
            if position in self._left:
                tensor.grad = self._left.pop(position)
            elif gradient is not None:
                tensor.grad = self._home_of_gradient(position)
                copies.append((tensor.grad, gradient))
            elif self._backward and tensor.requires_grad:
                changed = True
        self._backward = False
        return changed, copies

    def _home_of_gradient(self, position: int) -> Tensor:
        if self._gradients is None:
            self._gradients = self.layout.views(self._allocate(self.layout.bytes))
        return self._gradients[position]


def own_tensors(block: nn.Module, uses: dict[int, int]) -> dict[str, Tensor]:
    """Parameters and buffers by name that nobody outside the block uses, each once.

    Args:
        uses: how often each tensor of the whole model (by id) is there, from `count_uses`.
    """
    inside = count_uses(block)
    own: dict[str, Tensor] = {}
    for name, tensor in named_tensors(block):
        if inside[id(tensor)] == uses[id(tensor)] and all(tensor is not other for other in own.values()):
            own[name] = tensor
    return own


def count_uses(module: nn.Module) -> dict[int, int]:
    """How many names each parameter and buffer (by id) has."""
    uses: dict[int, int] = {}
    for _, tensor in named_tensors(module):
        uses[id(tensor)] = uses.get(id(tensor), 0) + 1
    return uses


def named_tensors(module: nn.Module) -> Iterable[tuple[str, Tensor]]:
    """Parameters and buffers, under each of their names."""
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)
