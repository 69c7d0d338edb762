"""Products with a frozen weight, however it is stored: the only place that multiplies with one outside `nn.Linear`.

A weight (out, in) is held as a tensor, a scale or none, and the name of the way to multiply with them, a key of
`PRODUCTS`. Tensors and a name instead of an object, so that the functions below can be traced and that whoever moves
the data of parameters and buffers moves all there is. What is dequantised is dequantised for one product and dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from library.models import eight_bits, four_bits

Keep = Callable[[Callable[[], Tensor]], Tensor]
"""Makes a result, or has it, see `library.models.memory.keep`."""


class Stored(NamedTuple):
    """The weight of a module as it is held."""

    weight: Tensor
    scale: Tensor | None
    product: str


def stored(module: nn.Module) -> Stored:
    """How a linear layer or a convolution holds its weight."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return Stored(weight, getattr(module, "weight_scale", None), getattr(module, "product", "plain"))


def dense(module: nn.Module, dtype: torch.dtype) -> Tensor:
    """The weight of a linear layer or a convolution in `dtype` and its usual shape; no copy where it is that already.

    Not to be kept: the memory that few bits save is lost as long as this lives.
    """
    weight, scale, product = stored(module)
    return PRODUCTS[product].dense(weight, scale, dtype)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The type that products of x have: that of autocast where it is on."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def frozen_linear(module: nn.Module, x: Tensor, keep: Keep | None = None) -> Tensor:
    """`x W^T + b` (..., out) for the frozen weight of a module and x (..., in), in the type in which it is computed.

    Args:
        keep: makes the product.
    """
    weight, scale, product = stored(module)
    bias = cast("Tensor | None", module.bias)
    flat = x.reshape(-1, x.shape[-1]).to(compute_dtype(x))
    return _frozen_linear(flat, weight, scale, bias, product, keep).view(*x.shape[:-1], -1)


class Product(Protocol):
    """A way to multiply with a stored weight W (out, in). Results have the type of x or grad; nothing is recorded."""

    def dense(self, weight: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
        """W in `dtype`."""

    def forward(self, x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
        """`x W^T + b` (T, out), for x (T, in)."""

    def back(self, grad: Tensor, weight: Tensor, scale: Tensor | None) -> Tensor:
        """`grad W` (T, in), for grad (T, out)."""


class Plain:
    """A weight that only needs a cast, if at all."""

    def dense(self, weight: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
        """See `Product`."""
        return weight.to(dtype)

    def forward(self, x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
        """See `Product`."""
        return F.linear(x, self.dense(weight, scale, x.dtype), None if bias is None else bias.to(x.dtype))

    def back(self, grad: Tensor, weight: Tensor, scale: Tensor | None) -> Tensor:
        """See `Product`."""
        return grad @ self.dense(weight, scale, grad.dtype)


class Scaled(Plain):
    """A weight in eight bits with a scale (out, 1) in float32."""

    def dense(self, weight: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
        """See `Product`."""
        assert scale is not None
        return weight.to(dtype).mul_(scale)  # eight bits fit each type exactly, so that it is rounded once


class FourBits(Plain):
    """A weight in four bits, see `four_bits`."""

    def dense(self, weight: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
        """See `Product`."""
        assert scale is not None
        return four_bits.raised(weight, scale, dtype)


class EightBits(Scaled):
    """As `Scaled`, multiplied in eight bits: each row of the activations or gradients is quantised on the way.

    In the forward pass the scale of the weight belongs to the columns of the result. In the backward pass its rows are
    summed over, so that it goes into the gradient before that is quantised.
    """

    def __init__(self, multiply: eight_bits.Multiply) -> None:
        self._multiply = multiply

    def forward(self, x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
        """See `Product`."""
        assert scale is not None
        return self._multiply(x, weight.T, scale.T, None if bias is None else bias.to(x.dtype), x.dtype)

    def back(self, grad: Tensor, weight: Tensor, scale: Tensor | None) -> Tensor:
        """See `Product`."""
        assert scale is not None
        columns = weight.T.contiguous().T  # the hardware wants what is summed over to be adjacent
        return self._multiply(eight_bits.times(grad, scale.T), columns, None, None, grad.dtype)


PRODUCTS: Mapping[str, Product] = {
    "plain": Plain(),
    "scaled": Scaled(),
    "four bits": FourBits(),
    "int8": EightBits(eight_bits.int8),
    "fp8": EightBits(eight_bits.fp8),
    "fp8 by rows": EightBits(eight_bits.fp8_by_rows),
}


class _FrozenLinear(torch.autograd.Function):
    """`x W^T + b` for x (T, in) and a frozen W."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        scale: Tensor | None,
        bias: Tensor | None,
        product: str,
        keep: Keep | None,
    ) -> Tensor:
        ctx.save_for_backward(weight, scale)
        ctx.product, ctx.bias_dtype = product, None if bias is None else bias.dtype

        def forward() -> Tensor:
            return PRODUCTS[product].forward(x, weight, scale, bias)

        return forward() if keep is None else keep(forward)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, scale = ctx.saved_tensors
        needs_x, _, _, needs_bias, *_ = ctx.needs_input_grad
        grad_x = PRODUCTS[ctx.product].back(grad, weight, scale) if needs_x else None
        return grad_x, None, None, grad.sum(0).to(ctx.bias_dtype) if needs_bias else None, None, None


_frozen_linear = cast("Callable[..., Tensor]", _FrozenLinear.apply)
