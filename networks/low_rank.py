"""LoRA on one module: a product of two small matrices beside the module's own weight."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from library.models.memory import is_narrow, keep
from library.models.products import PRODUCTS, compute_dtype, stored
from networks.factored import Dropouts, FactoredAdapter, covers_plain_linear, weight_shape


class Factor(nn.Module):
    """Holds one of the two matrices, so that its key in files ends in `.weight`."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)


class LowRankAdapter(FactoredAdapter):
    """`W x + multiplier * alpha / rank * up down x`, for any two matrices that `pair` gives."""

    @abstractmethod
    def pair(self) -> tuple[Tensor, Tensor]:
        """Down (r, in) and up (out, r); for a convolution (r, in, height, width) and (out, r, 1, 1)."""

    def changed(self, x: Tensor) -> Tensor:
        """What the module would answer with its weight changed."""
        module = self.module
        if isinstance(module, nn.Conv2d):
            return self._convolve(module, x)
        down, up = self.pair()
        dtype = compute_dtype(x)
        if covers_plain_linear(self):
            flat = x.reshape(-1, x.shape[-1]).to(dtype)  # (T, in)
            gate = self.gate((*x.shape[:-1], len(down)), x.device, dtype)
            if gate is not None:
                gate = gate.expand(*x.shape[:-1], len(down)).reshape(-1, len(down))
            return fused(flat, *stored(module), module.bias, down, up, gate, self.strength).view(*x.shape[:-1], -1)
        middle = F.linear(x.to(dtype), down.to(dtype))
        return self._added(x, middle, self.gate(middle.shape, x.device, dtype), up.to(dtype))

    def _convolve(self, module: nn.Conv2d, x: Tensor) -> Tensor:
        dtype = compute_dtype(x)
        down, up = (matrix.to(dtype) for matrix in self.pair())
        middle: Tensor = module._conv_forward(x.to(dtype), down, None)  # with the way it pads
        return self._added(x, middle, self.gate(middle.shape, x.device, dtype, channels=1), up)

    def _added(self, x: Tensor, middle: Tensor, gate: Tensor | None, up: Tensor) -> Tensor:
        """The module's own answer with the low-rank term added."""
        middle = middle * self.strength if gate is None else middle * (gate * self.strength)
        out: Tensor = self.original_forward(x)
        return out + (F.conv2d(middle, up) if up.ndim == 4 else F.linear(middle, up)).to(out.dtype)

    @torch.no_grad()
    def delta(self) -> Tensor:
        """The change of the module's weight at multiplier 1, float32, in the shape of the weight."""
        down, up = (matrix.float().flatten(1) for matrix in self.pair())
        return (up @ down * self.scale).view(weight_shape(self.module))

    @torch.no_grad()
    def delta_norm(self) -> Tensor:
        """Frobenius norm of `delta`, 0-d, from two rank x rank matrices."""
        down, up = (matrix.float().flatten(1) for matrix in self.pair())
        squared = ((up.T @ up) * (down @ down.T)).sum()
        return squared.clamp(min=0).sqrt() * self.scale


class LoraAdapter(LowRankAdapter):
    """Two matrices.

    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (2021), section 4.1.
    """

    lora_down: Factor
    lora_up: Factor

    def __init__(
        self,
        name: str,
        module: nn.Module,
        component: str,
        *,
        rank: int,
        alpha: float | None,
        multiplier: float = 1.0,
        dropouts: Dropouts | None = None,
    ) -> None:
        """A new adapter that changes nothing yet; alpha None or 0 means the rank."""
        super().__init__(name, module, component, rank=rank, alpha=alpha, multiplier=multiplier, dropouts=dropouts)
        down_shape, up_shape = _factor_shapes(module, rank)
        down = torch.empty(down_shape)
        nn.init.kaiming_uniform_(down, a=math.sqrt(5))
        self.lora_down = Factor(down)
        self.lora_up = Factor(torch.zeros(up_shape))

    def pair(self) -> tuple[Tensor, Tensor]:
        """See `LowRankAdapter.pair`."""
        return self.lora_down.weight, self.lora_up.weight

    @torch.no_grad()
    def scale_by(self, ratio: Tensor) -> None:
        """Multiplies both matrices by the root of `ratio`, and so the change by it."""
        root = ratio.sqrt()
        for factor in (self.lora_down.weight, self.lora_up.weight):
            factor.mul_(root.to(factor.dtype))


class LowRankLinear(torch.autograd.Function):
    """`x W^T + b + strength * (gate * x down^T) up^T` for x (T, in) and a frozen W and b.

    The low-rank terms are added in place to the results of the big products, forward and backward, which saves two
    passes over the activations each way; only a product that checkpointing may keep stays as it is. W is stored in
    any of the ways of `library.models.products`: weight, scale and product are what `stored` gives.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        scale: Tensor | None,
        product: str,
        bias: Tensor | None,
        down: Tensor,
        up: Tensor,
        gate: Tensor | None,
        strength: float,
    ) -> Tensor:
        small_down, small_up = down.to(x.dtype), up.to(x.dtype)
        middle = x @ small_down.T  # (T, r)
        if gate is not None:
            middle = middle * gate

        def forward() -> Tensor:
            return PRODUCTS[product].forward(x, weight, scale, bias)  # (T, out)

        if is_narrow(len(up), down.shape[1]):
            out = torch.addmm(keep(forward), middle, small_up.T, alpha=strength)
        else:
            out = forward().addmm_(middle, small_up.T, alpha=strength)
        ctx.save_for_backward(x, weight, scale, small_down, small_up, middle, gate)
        ctx.product, ctx.strength, ctx.dtypes = product, strength, (down.dtype, up.dtype)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale, down, up, middle, gate = ctx.saved_tensors
        needs_x, *_, needs_down, needs_up, _, _ = ctx.needs_input_grad
        down_dtype, up_dtype = ctx.dtypes
        grad_middle = grad @ up  # (T, r)
        if gate is not None:
            grad_middle *= gate
        grad_x = grad_down = grad_up = None
        if needs_x:
            grad_x = PRODUCTS[ctx.product].back(grad, weight, scale).addmm_(grad_middle, down, alpha=ctx.strength)
        if needs_down:
            grad_down = times(grad_middle.T, x, ctx.strength).to(down_dtype)
        if needs_up:
            grad_up = times(grad.T, middle, ctx.strength).to(up_dtype)
        return grad_x, None, None, None, None, grad_down, grad_up, None, None


def times(a: Tensor, b: Tensor, factor: float) -> Tensor:
    """`factor * a b` in one call."""
    return torch.addmm(a.new_empty(()), a, b, beta=0, alpha=factor)


fused = cast("Callable[..., Tensor]", LowRankLinear.apply)


def _factor_shapes(module: nn.Module, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if isinstance(module, nn.Conv2d):
        assert module.groups == 1, "grouped convolutions have no adapter"
        return (rank, module.in_channels, *module.kernel_size), (module.out_channels, rank, 1, 1)
    assert isinstance(module, nn.Linear)
    return (rank, module.in_features), (module.out_features, rank)
