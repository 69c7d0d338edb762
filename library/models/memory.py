"""Less memory, from outside: activations of blocks recomputed in the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

_PRODUCTS = {torch.ops.aten.mm.default: 0, torch.ops.aten.addmm.default: 1}
"""Matrix products, and where their first matrix stands among the arguments."""
_NARROWING = 2


def blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The repeated blocks of a model: what its module lists hold, in order."""
    for child in model.children():
        if isinstance(child, nn.ModuleList):
            yield from child


def checkpoint_blocks(model: nn.Module, every: int = 1, *, offload: bool = False) -> None:
    """Let each `every`-th block keep only its inputs for the backward pass and run forward again there.

    Results of products that are much narrower than what goes in, such as those of the last layer of an MLP, are kept,
    too: they are most of the work for the least memory.

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
            return checkpoint(forward, *inputs, use_reentrant=False, context_fn=_keep_narrow_products)
        devices = [value.device if isinstance(value, Tensor) else None for value in inputs]

        def from_main_memory(*stored: Any) -> Any:
            return forward(*(_move(value, device) for value, device in zip(stored, devices, strict=True)))

        stored = [_move(value, torch.device("cpu")) for value in inputs]
        return checkpoint(from_main_memory, *stored, use_reentrant=False)

    return run


def _keep(_: Any, operation: Any, *args: Any, **__: Any) -> CheckpointPolicy:
    at = _PRODUCTS.get(operation)
    if at is not None:
        inner, width = args[at + 1].shape
        if inner >= _NARROWING * width:
            return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


_keep_narrow_products = partial(create_selective_checkpoint_contexts, _keep)


def _move(value: Any, device: torch.device | None) -> Any:
    """Tensors with a gradient go to the device; masks and tables, shared by all blocks, stay where they are."""
    return value.to(device) if isinstance(value, Tensor) and value.requires_grad else value
