"""Counts the bytes that live tensors hold, as they are made and dropped: forward, in the backward pass and after it."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only


class Allocations(TorchDispatchMode):
    """While it is entered, counts the storages of what operations give, each once, until nothing holds it.

    Works with tensors that have no data as well, see `without_data`, so that a model of any size can be measured.
    Doesn't see what a kernel allocates for itself and frees before it returns.
    """

    def __init__(self, held: Iterable[Tensor] = ()) -> None:
        """`held`: tensors that are there before; they count."""
        super().__init__()
        self.live = 0
        """Bytes held now."""
        self.peak = 0
        """Most bytes held at a time since the last `reset`."""
        self._seen: dict[int, weakref.ref[Any]] = {}
        for tensor in held:
            self._count(tensor)

    def reset(self) -> None:
        """Starts looking for the peak anew."""
        self.peak = self.live

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Runs an operation and counts its results."""
        return tree_map_only(Tensor, self._count, func(*args, **(kwargs or {})))

    def _count(self, tensor: Tensor) -> Tensor:
        if tensor.device.type == "meta":
            return tensor
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._seen:
            size = storage.nbytes()

            def gone(_: Any) -> None:
                del self._seen[key]
                self.live -= size

            self._seen[key] = weakref.ref(storage, gone)
            self.live += size
            self.peak = max(self.peak, self.live)
        return tensor


def without_data() -> Any:
    """A mode in which tensors have shapes and types but no data."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode()
