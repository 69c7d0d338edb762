"""LoHa on one module: the change is the elementwise product of two low-rank matrices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from library.models.memory import is_narrow, keep
from library.models.products import PRODUCTS, compute_dtype, stored
from networks.factored import Dropouts, covers_plain_linear, weight_shape
from networks.low_rank import LowRankAdapter, times

NAMES = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
CORES = ("hada_t1", "hada_t2")
"""Between the matrices of a pair, in files with Tucker's decomposition of convolutions."""


class HadamardAdapter(LowRankAdapter):
    """`W x + multiplier * alpha / r * ((A1 B1) o (A2 B2)) x`.

    The elementwise product of two matrices of rank r is one of rank r^2: its columns are all products of a column of
    the one and a column of the other. As long as that is cheaper it is applied as such, so that no gradient of the
    size of W is computed; beyond that the change is added to the weight.

    Source: Hyeon-Woo, Ye-Bin and Oh, "FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated
    Learning" (2022), proposition 1; names of the tensors as in LyCORIS.
    """

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
        tucker: bool = False,
    ) -> None:
        """A new adapter that changes nothing yet; alpha None or 0 means the rank."""
        super().__init__(name, module, component, rank=rank, alpha=alpha, multiplier=multiplier, dropouts=dropouts)
        out, inputs, *kernel = weight_shape(module)
        self.tucker = tucker
        if tucker:
            shapes = {"a": (rank, out), "b": (rank, inputs)}
            for key in CORES:
                self.register_parameter(key, nn.Parameter(torch.randn(rank, rank, *kernel) * 0.1))
        else:
            shapes = {"a": (out, rank), "b": (rank, inputs * torch.Size(kernel).numel())}
        for key in NAMES:
            self.register_parameter(key, nn.Parameter(torch.empty(shapes[key[-1]])))
        w1_a, w1_b, w2_a, w2_b = self.matrices()
        nn.init.normal_(w1_b)
        nn.init.normal_(w1_a, std=0.1)
        nn.init.normal_(w2_b)
        nn.init.zeros_(w2_a)

    def matrices(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A1, B1, A2, B2."""
        return cast("tuple[Tensor, Tensor, Tensor, Tensor]", tuple(getattr(self, key) for key in NAMES))

    def pair(self) -> tuple[Tensor, Tensor]:
        """The change over its scale as a product of two matrices of rank r^2."""
        w1_a, w1_b, w2_a, w2_b = self.matrices()
        up = (w2_a.unsqueeze(2) * w1_a.unsqueeze(1)).flatten(1)  # (out, r^2)
        down = (w2_b.unsqueeze(1) * w1_b.unsqueeze(0)).flatten(0, 1)  # (r^2, in)
        _, *rest = weight_shape(self.module)
        return down.view(-1, *rest), up.view(*up.shape, *[1] * (len(rest) - 1))

    @property
    def is_cheap_as_pair(self) -> bool:
        """Whether three products with each matrix of `pair` are less work than one with the weight."""
        out, *rest = weight_shape(self.module)
        inputs = torch.Size(rest).numel()
        return not self.tucker and 3 * self.rank**2 * (inputs + out) <= inputs * out

    def changed(self, x: Tensor) -> Tensor:
        """What the module would answer with its weight changed."""
        drops = self.training and bool(self.dropouts.neuron or self.dropouts.rank)
        if self.is_cheap_as_pair or (drops and not self.tucker):
            return super().changed(x)
        dtype = compute_dtype(x)
        if covers_plain_linear(self):
            flat = x.reshape(-1, x.shape[-1]).to(dtype)  # (T, in)
            weight, scale, product = stored(self.module)
            bias = cast("Tensor | None", self.module.bias)
            out = _summed(flat, weight, scale, product, bias, *self.matrices(), self.strength)
            return out.view(*x.shape[:-1], -1)
        change = self._change().to(dtype) * self.strength
        base: Tensor = self.original_forward(x)
        if isinstance(self.module, nn.Conv2d):
            added: Tensor = self.module._conv_forward(x.to(dtype), change, None)
            return base + added.to(base.dtype)
        return base + nn.functional.linear(x.to(dtype), change).to(base.dtype)

    def _change(self) -> Tensor:
        """The change over its scale, in the shape of the weight."""
        w1_a, w1_b, w2_a, w2_b = self.matrices()
        if self.tucker:
            t1, t2 = (cast("Tensor", getattr(self, key)) for key in CORES)
            return tucker_product(t1, w1_a, w1_b) * tucker_product(t2, w2_a, w2_b)
        return ((w1_a @ w1_b) * (w2_a @ w2_b)).view(weight_shape(self.module))

    @torch.no_grad()
    def delta(self) -> Tensor:
        """The change of the module's weight at multiplier 1, float32, in the shape of the weight."""
        return self._change().float() * self.scale

    @torch.no_grad()
    def delta_norm(self) -> Tensor:
        """Frobenius norm of `delta`, 0-d."""
        return super().delta_norm() if self.is_cheap_as_pair else self.delta().norm()

    @torch.no_grad()
    def scale_by(self, ratio: Tensor) -> None:
        """Multiplies one matrix of each pair by the root of `ratio`, and so the change by it."""
        w1_a, _, w2_a, _ = self.matrices()
        for matrix in (w1_a, w2_a):
            matrix.mul_(ratio.sqrt().to(matrix.dtype))


def tucker_product(core: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """The kernel (out, in, ...) of a core (r, s, ...) and matrices (r, out) and (s, in)."""
    return torch.einsum("rs...,ro,si->oi...", core, first, second)


class HadamardLinear(torch.autograd.Function):
    """`x (W + strength * (A1 B1) o (A2 B2))^T + b` for x (T, in) and a frozen W and b.

    One product with the sum instead of one with each summand. The sum is formed again in the backward pass: kept, it
    would be as much memory as the model.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        scale: Tensor | None,
        product: str,
        bias: Tensor | None,
        w1_a: Tensor,
        w1_b: Tensor,
        w2_a: Tensor,
        w2_b: Tensor,
        strength: float,
    ) -> Tensor:
        small = [matrix.to(x.dtype) for matrix in (w1_a, w1_b, w2_a, w2_b)]

        def result() -> Tensor:
            base = PRODUCTS[product].dense(weight, scale, x.dtype)
            total = torch.addcmul(base, small[0] @ small[1], small[2] @ small[3], value=strength)
            return nn.functional.linear(x, total, None if bias is None else bias.to(x.dtype))

        ctx.save_for_backward(x, weight, scale, *small)
        ctx.strength, ctx.product, ctx.dtype = strength, product, w1_a.dtype
        return keep(result) if is_narrow(len(w1_a), x.shape[1]) else result()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale, w1_a, w1_b, w2_a, w2_b = ctx.saved_tensors
        first, second = w1_a @ w1_b, w2_a @ w2_b
        grad_x = None
        if ctx.needs_input_grad[0]:
            base = PRODUCTS[ctx.product].dense(weight, scale, grad.dtype)
            grad_x = grad @ torch.addcmul(base, first, second, value=ctx.strength)
        grad_sum = times(grad.T, x, ctx.strength)  # (out, in)
        grad_first, grad_second = second.mul_(grad_sum), first.mul_(grad_sum)
        grads = (grad_first @ w1_b.T, w1_a.T @ grad_first, grad_second @ w2_b.T, w2_a.T @ grad_second)
        return grad_x, None, None, None, None, *(one.to(ctx.dtype) for one in grads), None


_summed = cast("Callable[..., Tensor]", HadamardLinear.apply)
