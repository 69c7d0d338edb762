"""Less memory, from outside: activations of blocks recomputed in the backward pass."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from library.models.offloading import Offload
from library.models.products import compute_dtype

_NARROWING = 2


def blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The repeated blocks of a model, in the order in which they compute.

    Those at the paths that the model names as its `block_paths`, or else what its outermost module lists hold.
    """
    if (paths := getattr(model, "block_paths", None)) is not None:
        yield from map(model.get_submodule, paths)
        return
    for child in model.children():
        yield from child if isinstance(child, nn.ModuleList) else blocks(child)


def checkpoint_blocks(model: nn.Module, every: int = 1, *, offload: bool = False, draws: bool = True) -> None:
    """Let each `every`-th block keep only its inputs for the backward pass and run forward again there.

    Results of products that are much narrower than what goes in, such as those of the last layer of an MLP, are kept,
    too: they are most of the work for the least memory. Best called when adapters are on: layers that have one keep
    their product themselves, see `keep`.

    Args:
        offload: keep the inputs, and nothing else, in main memory meanwhile.
        draws: whether a block draws random numbers, which are to be the same in the second pass. Generators are left
            alone otherwise, which takes less time, and is all that work can bear that is being recorded.
    """
    waiting = Offload() if offload else None
    for index, block in enumerate(blocks(model)):
        if index % every:
            continue
        block.forward = _recomputed(block.forward, waiting, draws)
        for layer in block.modules():
            if _keeps_its_product(layer):
                layer.forward = partial(_narrow, layer)


def is_narrow(rows: int, columns: int) -> bool:
    """Whether the product with a weight (rows, columns) is worth keeping: much work, and little that comes out."""
    return columns >= _NARROWING * rows


def _keeps_its_product(layer: nn.Module) -> bool:
    return type(layer) is nn.Linear and "forward" not in layer.__dict__ and is_narrow(*layer.weight.shape)


def _recomputed(forward: Callable[..., Any], offload: Offload | None, draws: bool) -> Callable[..., Any]:
    recompute = partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=draws)

    def run(*inputs: Any, **named: Any) -> Any:
        with without_cast_cache():
            if not torch.is_grad_enabled():
                return forward(*inputs, **named)
            if offload is None:
                return recompute(*inputs, context_fn=_two_passes, **named)
            with offload.of_inputs(inputs):
                return recompute(*inputs, **named)

    return run


@contextmanager
def without_cast_cache() -> Iterator[None]:
    """Autocast keeps no converted weights meanwhile: of weights that are used once per pass, a second copy of them all.

    Blocks use each weight once per pass, so that nothing is computed more often.
    """
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


# results that the second pass takes over

# torch.utils.checkpoint has policies for this, but they send every operation through Python: with FLUX.1 that takes
# longer than a fast GPU needs for the step.


def keep(compute: Callable[[], Tensor]) -> Tensor:
    """What `compute` gives; in the second pass through a block, what it gave in the first.

    Only for use inside the `forward` of a `torch.autograd.Function`, and in the same order in both passes.
    """
    entered = None if torch.compiler.is_compiling() else _here.now  # compiled blocks keep nothing
    return compute() if entered is None else entered.take(compute)


class _Pass:
    """A pass through a block, while it is entered."""

    def __init__(self, results: list[Tensor], *, repeats: bool) -> None:
        self._results, self._repeats = results, repeats
        self._left: Iterator[Tensor] = iter(())
        self._outer: _Pass | None = None

    def __enter__(self) -> None:
        self._left = iter(self._results)
        self._outer, _here.now = _here.now, self

    def __exit__(self, *_: object) -> None:
        _here.now = self._outer

    def take(self, compute: Callable[[], Tensor]) -> Tensor:
        """The next result; detached, so that it doesn't hold the graph that holds it."""
        if self._repeats:
            return next(self._left).detach()
        result = compute()
        self._results.append(result.detach())
        return result


class _Here(threading.local):
    """The pass that this thread is in; the second one happens in a thread of the backward pass."""

    now: _Pass | None = None


_here = _Here()


def _two_passes() -> tuple[_Pass, _Pass]:
    results: list[Tensor] = []
    return _Pass(results, repeats=False), _Pass(results, repeats=True)


class _KeptLinear(torch.autograd.Function):
    """`x W^T + b` for x (..., in), all of one type; the product is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return keep(lambda: F.linear(x, weight, bias))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        flat = grad.reshape(-1, grad.shape[-1])  # (T, out)
        return (
            grad @ weight if needs_x else None,
            flat.T @ x.reshape(-1, x.shape[-1]) if needs_weight else None,
            flat.sum(0) if needs_bias else None,
        )


_kept_linear = cast("Callable[..., Tensor]", _KeptLinear.apply)


def _narrow(layer: Any, x: Tensor) -> Tensor:
    """The answer of a linear layer, in the type in which it would compute."""
    if not torch.is_grad_enabled():
        return F.linear(x, layer.weight, layer.bias)
    dtype = compute_dtype(x)
    bias = None if layer.bias is None else layer.bias.to(dtype)
    return _kept_linear(x.to(dtype), layer.weight.to(dtype), bias)
