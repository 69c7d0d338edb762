"""Blocks compiled one by one, so that adapters, recomputing and streaming can be put around and inside them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from library.log import get_logger
from library.models.memory import blocks

logger = get_logger(__name__)

_VARIANTS = 64
"""Most ways to compile one block: with and without gradients, of its inputs, too, training or not, …"""


def compile_blocks(model: nn.Module, backend: str | Callable[..., Any] = "inductor", device: str = "cpu") -> bool:
    """Compiles each block when it is first used; blocks that are alike share what is compiled.

    Called when adapters are attached, and before `checkpoint_blocks` and `stream`. Numbers of tokens may vary without
    compiling anew. Where something can't be compiled, it runs as before, and one line says so.

    Args:
        backend: as of `torch.compile`.
        device: where the model computes: the compiler is tried there first.

    Returns:
        Whether the compiler works.
    """
    _allow_variants()
    torch.compiler.reset()
    try:
        _try_out(backend, device)
    except Exception as error:  # noqa: BLE001 - compilers fail in many ways
        _say("the compiler doesn't work here, so nothing is compiled", backend, error)
        return False
    shared = _Failures()
    for block in blocks(model):
        block.forward = _Compiled(block, backend, shared)
    return True


def _allow_variants() -> None:
    config: Any = torch._dynamo.config
    name = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"
    setattr(config, name, max(getattr(config, name), _VARIANTS))


def _try_out(backend: str | Callable[..., Any], device: str) -> None:
    """Raises what goes wrong when a function is compiled, forward and backward."""
    compiled = torch.compile(lambda x: torch.sin(x) * x + 1, backend=backend)
    compiled(torch.ones(8, device=device, requires_grad=True)).sum().backward()


@dataclass
class _Failures:
    """What all blocks know."""

    kinds: set[type[nn.Module]] = field(default_factory=set)
    """Kinds of blocks that couldn't be compiled."""


class _Compiled:
    """The forward of a block, compiled if that works.

    A block that has worked stays compiled, so that its second pass in the backward pass does what the first one did.
    """

    def __init__(self, block: nn.Module, backend: str | Callable[..., Any], failures: _Failures) -> None:
        self._kind, self._backend, self._failures = type(block), backend, failures
        self._sees_images = any(isinstance(layer, nn.Conv2d) for layer in block.modules())
        self._plain = block.forward
        self._compiled: Callable[..., Any] | None = torch.compile(block.forward, backend=backend)
        self._worked = False

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        if self._compiled is None or (not self._worked and self._kind in self._failures.kinds):
            return self._plain(*inputs, **named)
        _mark_sizes((*inputs, *named.values()), images=self._sees_images)
        try:
            answer = self._compiled(*inputs, **named)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if self._worked and not isinstance(error, torch._dynamo.exc.TorchDynamoException):
                raise
            self._compiled = None
            answer = self._plain(*inputs, **named)  # raises the same again if it isn't the compiler's fault
            if self._kind not in self._failures.kinds:
                self._failures.kinds.add(self._kind)
                _say(f"{self._kind.__name__} can't be compiled and runs as it is", self._backend, error)
            return answer
        self._worked = True
        return answer


def _mark_sizes(values: Iterable[Any], *, images: bool) -> None:
    """Tells the compiler which sizes vary.

    Numbers of tokens: second axis of (B, L, …), last axis of masks (B, 1, 1, L); where blocks see images (B, C, h, w),
    their last two.
    """
    for value in values:
        if isinstance(value, tuple | list):
            _mark_sizes(value, images=images)
        elif isinstance(value, Tensor) and value.ndim >= 3:
            for axis in (2, 3) if images else (value.ndim - 1 if value.dtype == torch.bool else 1,):
                if value.shape[axis] > 1:
                    torch._dynamo.maybe_mark_dynamic(value, axis)


def _say(what: str, backend: object, error: Exception) -> None:
    cause = getattr(error, "inner_exception", error)
    reason = next((line.strip() for line in str(cause).splitlines() if line.strip()), type(cause).__name__)
    name = backend if isinstance(backend, str) else getattr(backend, "__name__", type(backend).__name__)
    logger.warning("--torch_compile: %s (%s: %s)", what, name, reason[:200])
