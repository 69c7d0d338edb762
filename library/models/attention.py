"""The one attention call of all models written here, and who computes it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from library.log import UserError, get_logger

logger = get_logger(__name__)

TORCH = "torch"
_UNKNOWN_DEVICES = ("cpu", "mps")
"""Of all packages."""
_WIDEST_HEAD = 256
"""Of flash-attn."""

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(B, L, H, d) from q, k, v of this shape."""


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Scaled dot-product attention with the heads merged: (B, L, H*d) from q, k, v (B, L, H, d).

    Computed by the package that `use` chose, or by torch where that can't.

    Args:
        mask: boolean, True where a key may be seen, broadcast to (B, H, L, L).
    """
    if _chosen.package is not None:
        obstacle = _obstacle(_chosen.package, q, mask)
        if obstacle is None:
            return _chosen.attend(q, k.to(q.dtype), v.to(q.dtype)).flatten(2)
        _tell(_chosen.package, obstacle)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, L, d)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


@dataclass(frozen=True)
class _Package:
    """Where attention can come from besides torch."""

    name: str
    """As it is installed."""
    module: str
    function: str
    halves_only: bool
    """Whether it knows float16 and bfloat16 only."""


_PACKAGES: Mapping[str, _Package] = {
    "xformers": _Package("xformers", "xformers.ops", "memory_efficient_attention", halves_only=False),
    "flash": _Package("flash-attn", "flash_attn", "flash_attn_func", halves_only=True),
}


def _none(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    raise AssertionError("torch computes")


@dataclass
class _Chosen:
    package: _Package | None = None
    attend: Attend = _none
    told: frozenset[str] = frozenset()


_chosen = _Chosen()


def use(name: str | None, option: str = "--attn_mode") -> None:
    """Chooses what computes the attention of all models from now on: `torch` (None, `sdpa`), `xformers` or `flash`.

    Errors: UserError for another name, or when its package isn't installed.
    """
    if name in (None, TORCH, "sdpa"):
        _chosen.package, _chosen.attend = None, _none
        return
    package = _PACKAGES.get(str(name))
    if package is None:
        hint = f"use one of {', '.join((TORCH, 'sdpa', *_PACKAGES))}"
        raise UserError(f"nothing called {name!r} computes attention", option, hint, code="E-OPTION")
    try:
        attend: Attend = getattr(importlib.import_module(package.module), package.function)
    except (ImportError, OSError, AttributeError, RuntimeError) as error:
        reason = next(iter(str(error).splitlines()), "")
        what = f"the package {package.name} isn't installed, or not for this torch ({reason})"
        hint = f"pip install {package.name}, or leave the option out: torch's own attention is about as fast"
        raise UserError(what, f"{option} {name}", hint, code="E-PACKAGE") from None
    _chosen.package, _chosen.attend, _chosen.told = package, attend, frozenset()


def _obstacle(package: _Package, q: Tensor, mask: Tensor | None) -> str | None:
    """Why a package can't compute this; None: it can."""
    if mask is not None:
        return "it has no masks"
    if q.device.type in _UNKNOWN_DEVICES:
        return "it needs a GPU"
    if package.halves_only and q.dtype not in (torch.float16, torch.bfloat16):
        return "it knows float16 and bfloat16 only"
    if package.halves_only and q.shape[-1] > _WIDEST_HEAD:
        return f"its heads have at most {_WIDEST_HEAD} features"
    return None


def _tell(package: _Package, obstacle: str) -> None:
    """Says once why torch's attention is used instead."""
    if obstacle not in _chosen.told and not torch.compiler.is_compiling():
        _chosen.told |= {obstacle}
        logger.warning("attention of %s: %s; torch's own is used there", package.name, obstacle)
