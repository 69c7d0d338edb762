"""Less memory, from outside: activations of blocks recomputed in the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The repeated blocks of a model: what its module lists hold, in order."""
    for child in model.children():
        if isinstance(child, nn.ModuleList):
            yield from child


def checkpoint_blocks(model: nn.Module, every: int = 1, *, offload: bool = False) -> None:
    """Let each `every`-th block keep only its inputs for the backward pass and run forward again there.

    Args:
        offload: keep the inputs in main memory meanwhile.
    """
    for index, block in enumerate(blocks(model)):
        if index % every == 0:
            block.forward = _recomputed(block.forward, offload)


def _recomputed(forward: Callable[..., Any], offload: bool) -> Callable[..., Any]:
    def run(*inputs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*inputs)
        if not offload:
            return checkpoint(forward, *inputs, use_reentrant=False)
        devices = [value.device if isinstance(value, Tensor) else None for value in inputs]

        def from_main_memory(*stored: Any) -> Any:
            return forward(*(_move(value, device) for value, device in zip(stored, devices, strict=True)))

        stored = [_move(value, torch.device("cpu")) for value in inputs]
        return checkpoint(from_main_memory, *stored, use_reentrant=False)

    return run


def _move(value: Any, device: torch.device | None) -> Any:
    """Tensors with a gradient go to the device; masks and tables, shared by all blocks, stay where they are."""
    return value.to(device) if isinstance(value, Tensor) and value.requires_grad else value
