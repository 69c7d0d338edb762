"""Work of a GPU that is recorded once and repeated: CUDA graphs, with what torch leaves to those who use them."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

_WAITS = "called a synchronizing"
"""What torch says, if it is asked to, when the host has to wait for the device."""


class Recorder:
    """Records what a GPU is asked to compute, so that it can be asked for all of it at once, again and again.

    A recording computes where its tensors lay when it was made: in what was there before, and in memory that belongs to
    all recordings together. So what a recording gives holds until any of them is repeated.
    """

    def __init__(self, device: torch.device) -> None:
        import torch

        self._stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._device: torch.device = self._stream.device  # with its number
        self._pool: Any = torch.cuda.graph_pool_handle()

    def rehearse(self, compute: Callable[[], T]) -> tuple[T, str]:
        """What is computed, and why that can't be recorded, in words; empty where nothing is known against it.

        It is computed where it will be recorded, so that libraries get ready for that.
        """
        import torch

        current, mode = torch.cuda.current_stream(self._device), torch.cuda.get_sync_debug_mode()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream), warnings.catch_warnings(record=True) as said:
            warnings.filterwarnings("always", _WAITS)
            torch.cuda.set_sync_debug_mode("warn")
            try:
                result = compute()
            finally:
                torch.cuda.set_sync_debug_mode(mode)
        current.wait_stream(self._stream)
        waits = (one for one in said if re.search(_WAITS, str(one.message)))
        places = (f"the host waits for the device ({Path(one.filename).name}, line {one.lineno})" for one in waits)
        return result, next(places, "")

    def record(self, compute: Callable[[], T]) -> tuple[Callable[[], None], T]:
        """What repeats the work on the stream of then, and what it gives. Nothing is computed yet.

        Errors: RuntimeError when it can't be recorded, after which the device is as before.
        """
        import torch

        graph = torch.cuda.CUDAGraph()
        drawn = torch.cuda.default_generators[self._device.index].clone_state()
        try:
            # other threads may do what they like; the outer context leaves the stream if the inner one fails to
            with (
                torch.cuda.stream(self._stream),
                torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"),
            ):
                result = compute()
        except BaseException:
            self._clear(drawn)
            raise
        return graph.replay, result

    def forget(self) -> None:
        """All recordings are gone: later ones get memory of their own."""
        import torch

        self._pool = torch.cuda.graph_pool_handle()

    def _clear(self, drawn: Any) -> None:
        """Ends what torch doesn't end when a recording breaks off."""
        import torch

        native: Any = torch._C
        for name in ("_cuda_endAllocateToPool", "_cuda_endAllocateCurrentStreamToPool"):  # the latter before torch 2.8
            with suppress(AttributeError, RuntimeError):  # the first of the two fails where nothing is left to end
                getattr(native, name)(self._device.index, self._pool)
                native._cuda_releasePool(self._device.index, self._pool)
        for _ in range(2):  # the next launch reports the failure once more, here and in the thread of backward passes
            with suppress(RuntimeError):
                probe = torch.zeros(1, device=self._device, requires_grad=True)
                probe.sum().backward()  # type: ignore[no-untyped-call]
        generator: Any = torch.cuda.default_generators[self._device.index]  # it believes that it is being recorded
        generator.graphsafe_set_state(drawn)
