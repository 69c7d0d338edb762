"""Tensors of models and of files as one table, in the layout of a file that is to be written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from library.files import DTYPES, LazyTensors, TensorInfo, atomic_write, save_safetensors
from library.models.keymaps import Recipe, Recipes
from library.models.scaled_files import ScaledTensors
from library.pickles import PickledTensors


@dataclass(frozen=True)
class _Entry:
    recipe: Recipe
    tensors: Mapping[str, Tensor]
    like: Mapping[str, Tensor]
    """As `tensors`, without data."""
    dtype: torch.dtype | None

    def made(self, sources: Mapping[str, Tensor]) -> Tensor:
        tensor = self.recipe([sources[name] for name in self.recipe.sources]).detach()
        return tensor.to(self.dtype) if self.dtype is not None and tensor.is_floating_point() else tensor


@dataclass
class Joined(Mapping[str, Tensor]):
    """Tensors, each made and converted when it is asked for; nothing is kept."""

    _entries: dict[str, _Entry] = field(default_factory=dict)

    def add(
        self,
        tensors: Mapping[str, Tensor] | LazyTensors | PickledTensors,
        recipes: Recipes,
        prefix: str = "",
        dtype: torch.dtype | None = None,
    ) -> None:
        """Add what `recipes` make of `tensors`, with `prefix` before the names.

        Args:
            dtype: what floating-point numbers are converted to; None: they stay.
        """
        like = without_data(tensors)
        self._entries |= {prefix + name: _Entry(recipe, tensors, like, dtype) for name, recipe in recipes.items()}

    @property
    def like(self) -> dict[str, Tensor]:
        """The types and shapes of all, without data."""
        return {name: entry.made(entry.like) for name, entry in self._entries.items()}

    def __getitem__(self, name: str) -> Tensor:
        entry = self._entries[name]
        return entry.made(entry.tensors)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def save_safetensors(self, path: Path, metadata: Mapping[str, str] | None) -> None:
        """Write a safetensors file, a tensor at a time. Errors: see `library.files.save_safetensors`."""
        save_safetensors(self, path, metadata, self.like)

    def save_pickled(self, path: Path, more: Mapping[str, int] | None = None) -> None:
        """Write a PyTorch file; it needs room for all tensors in main memory.

        Args:
            more: numbers to put beside the tensors, which then are below `state_dict`.

        Raises:
            ResourceError: see `library.files.atomic_write`.
        """
        tensors = {name: _alone(tensor) for name, tensor in self.items()}
        with atomic_write(path, sync=True) as temporary, temporary.open("wb") as file:
            torch.save(tensors if more is None else {"state_dict": tensors, **more}, file)


def same(names: Mapping[str, object]) -> Recipes:
    """Each tensor as it is."""
    return {name: Recipe((name,)) for name in names}


def without_data(tensors: Mapping[str, Tensor] | LazyTensors | PickledTensors) -> dict[str, Tensor]:
    """Tensors of the same types and shapes on the meta device."""
    if isinstance(tensors, LazyTensors | PickledTensors | ScaledTensors):
        return {name: _empty(info) for name, info in tensors.infos.items()}
    return {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}


def _empty(info: TensorInfo) -> Tensor:
    return torch.empty(info.shape, dtype=getattr(torch, DTYPES[info.dtype]), device="meta")


def _alone(tensor: Tensor) -> Tensor:
    """A tensor whose data are its own: the whole storage of a view would be written."""
    tensor = tensor.cpu().contiguous()
    own = tensor.numel() * tensor.element_size()
    return tensor if tensor.untyped_storage().nbytes() == own else tensor.clone()
