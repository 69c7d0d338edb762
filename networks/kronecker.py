"""LoKr on one module: the change is a Kronecker product of two small matrices."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from library.log import DataError
from library.models.memory import is_narrow, keep
from library.models.products import PRODUCTS, compute_dtype, stored
from networks.factored import Dropouts, FactoredAdapter, covers_plain_linear, weight_shape
from networks.hadamard import tucker_product

NAMES = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Splitting:
    """How a weight is divided into the two matrices."""

    factor: int = -1
    """Largest size of the smaller matrix; -1: as close to a square division as it goes."""
    decompose_both: bool = False
    """The smaller matrix is a low-rank product, too, where that saves something."""
    full_matrix: bool = False
    """Neither is a low-rank product."""
    tucker: bool = False
    """Tucker's decomposition of the kernels of convolutions."""
    unbalanced: bool = False
    """The smaller matrix gets the larger part of the outputs."""

    def shapes(self, module: nn.Module, rank: int) -> Shapes:
        """The tensors of a new adapter of this rank, by name."""
        out, inputs, *kernel = weight_shape(module)
        (c, d), (a, b) = divide(inputs, self.factor), divide(out, self.factor)
        if self.unbalanced:
            a, b = b, a
        found: Shapes = {}
        if self.decompose_both and rank < max(a, c) / 2 and not self.full_matrix:
            found |= {"lokr_w1_a": (a, rank), "lokr_w1_b": (rank, c)}
        else:
            found |= {"lokr_w1": (a, c)}
        if rank >= max(b, d) / 2 or self.full_matrix:
            return found | {"lokr_w2": (b, d, *kernel)}
        if self.tucker and math.prod(kernel) > 1:
            return found | {"lokr_t2": (rank, rank, *kernel), "lokr_w2_a": (rank, b), "lokr_w2_b": (rank, d)}
        return found | {"lokr_w2_a": (b, rank), "lokr_w2_b": (rank, d * math.prod(kernel))}


def divide(size: int, factor: int) -> tuple[int, int]:
    """Two numbers whose product is `size`, the smaller one first, and no larger than `factor` (-1: than the root).

    Where `factor` divides `size`, it is one of them, as in LyCORIS.
    """
    if factor > 0 and size % factor == 0:
        smaller = min(factor, size // factor)
    else:
        most = math.isqrt(size) if factor < 0 else min(factor, math.isqrt(size))
        smaller = next(number for number in range(most, 0, -1) if size % number == 0)
    return smaller, size // smaller


def shapes_of(tensors: Mapping[str, Tensor]) -> Shapes | None:
    """The shapes of a module's tensors in a file; None: they aren't those of a Kronecker product."""
    shapes = {key: tuple(tensors[key].shape) for key in NAMES if key in tensors}
    complete = all(f"lokr_{w}" in shapes or {f"lokr_{w}_a", f"lokr_{w}_b"} <= shapes.keys() for w in ("w1", "w2"))
    return shapes if complete else None


def rank_of(shapes: Shapes) -> int:
    """The rank of the low-rank products; 1 without any, where it has no meaning."""
    return shapes.get("lokr_w2_b", shapes.get("lokr_w1_b", (1,)))[0]


class KroneckerAdapter(FactoredAdapter):
    """`W x + multiplier * alpha / rank * (W1 (x) W2) x`; W1 (a, c) and W2 (b, d) may be low-rank products themselves.

    The Kronecker product is never formed: with x as a matrix X (c, d), `(W1 (x) W2) x` is `W1 X W2^T`.

    Source: Yeh et al., "Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation" (2024),
    section 3.2; names of the tensors as there.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        component: str,
        *,
        shapes: Shapes,
        rank: int,
        alpha: float | None,
        multiplier: float = 1.0,
        dropouts: Dropouts | None = None,
    ) -> None:
        """A new adapter that changes nothing yet, with tensors of the names and shapes of `Splitting.shapes`.

        alpha None or 0 means the rank; without a low-rank product there is no rank, and the scale is 1.

        Errors: DataError when the shapes don't go with those of the module.
        """
        self.is_full = "lokr_w1" in shapes and "lokr_w2" in shapes
        alpha = rank if self.is_full else alpha
        super().__init__(name, module, component, rank=rank, alpha=alpha, multiplier=multiplier, dropouts=dropouts)
        self._check(shapes)
        for key, shape in shapes.items():
            matrix = torch.zeros(shape)
            if key not in ("lokr_w2", "lokr_w2_b"):
                nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))
            self.register_parameter(key, nn.Parameter(matrix))

    def _check(self, shapes: Shapes) -> None:
        out, inputs, *kernel = weight_shape(self.module)
        a, c = shapes["lokr_w1"] if "lokr_w1" in shapes else (shapes["lokr_w1_a"][0], shapes["lokr_w1_b"][1])
        if "lokr_w2" in shapes:
            (b, d), window = shapes["lokr_w2"][:2], math.prod(shapes["lokr_w2"][2:])
        elif "lokr_t2" in shapes:
            (b, d), window = (shapes["lokr_w2_a"][1], shapes["lokr_w2_b"][1]), math.prod(shapes["lokr_t2"][2:])
        else:
            b, (d, rest) = shapes["lokr_w2_a"][0], divmod(math.prod(shapes["lokr_w2_b"][1:]), math.prod(kernel))
            window = math.prod(kernel) if not rest else 0
        if (a * b, c * d, window) != (out, inputs, math.prod(kernel)):
            what = f"{self.name}: the file's change is {a * b} x {c * d}, the weight {out} x {inputs}"
            raise DataError(what, "network weights", "use it with the model it was made for", code="E-NETWORK-SHAPE")

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """See `FactoredAdapter.load`; where nothing is low-rank the file's alpha has no meaning."""
        super().load(tensors)
        if self.is_full:
            self.alpha.fill_(self.rank)
            self.scale = 1.0

    def first(self) -> Tensor:
        """W1 (a, c)."""
        full, left, right = (self._parameters.get(f"lokr_w1{end}") for end in ("", "_a", "_b"))
        return full if full is not None else cast("Tensor", left) @ cast("Tensor", right)

    def second(self) -> tuple[Tensor | None, Tensor]:
        """W2 as outer (b, r) and inner (r, d), or None and (b, d); inner with the kernel of a convolution."""
        full, left, right, core = (self._parameters.get(f"lokr_{end}") for end in ("w2", "w2_a", "w2_b", "t2"))
        if full is not None:
            return None, full
        assert left is not None
        assert right is not None
        if core is not None:
            return None, tucker_product(core, left, right)
        _, _, *kernel = weight_shape(self.module)
        return left, right.view(len(right), -1, *kernel)

    def changed(self, x: Tensor) -> Tensor:
        """What the module would answer with its weight changed."""
        dtype = compute_dtype(x)
        if isinstance(self.module, nn.Conv2d):
            base: Tensor = self.original_forward(x)
            return base + self._convolve(self.module, x.to(dtype)).to(base.dtype)
        first, (outer, inner) = self.first(), self.second()
        a, c = first.shape
        middle = (*x.shape[:-1], a, len(inner))
        gate = self.gate(middle, x.device, dtype)
        if covers_plain_linear(self):
            flat = x.reshape(-1, x.shape[-1]).to(dtype)  # (T, in)
            if gate is not None:
                gate = gate.expand(middle).reshape(-1, *middle[-2:])
            bias = cast("Tensor | None", self.module.bias)
            out = _fused(flat, *stored(self.module), bias, first, outer, inner, gate, self.strength)
            return out.view(*x.shape[:-1], -1)
        parts = F.linear(x.to(dtype).view(*x.shape[:-1], c, -1), inner.to(dtype))
        mixed = torch.matmul(first.to(dtype), parts)
        mixed = mixed * self.strength if gate is None else mixed * (gate * self.strength)
        base = self.original_forward(x)
        return base + (mixed if outer is None else F.linear(mixed, outer.to(dtype))).flatten(-2).to(base.dtype)

    def _convolve(self, module: nn.Conv2d, x: Tensor) -> Tensor:
        """The change of the answer to x (N, in, height, width): each part of the channels on its own, then mixed."""
        first, (outer, inner) = self.first().to(x.dtype), self.second()
        c = first.shape[1]
        parts = x.reshape(len(x) * c, -1, *x.shape[2:])
        parts = module._conv_forward(parts, inner.to(x.dtype), None)
        mixed = torch.einsum("ac,ncrhw->narhw", first, parts.view(len(x), c, *parts.shape[1:])) * self.strength
        gate = self.gate(tuple(mixed.shape), x.device, x.dtype, channels=2)
        if gate is not None:
            mixed = mixed * gate
        if outer is not None:
            mixed = torch.einsum("br,narhw->nabhw", outer.to(x.dtype), mixed)
        return mixed.flatten(1, 2)

    @torch.no_grad()
    def delta(self) -> Tensor:
        """The change of the module's weight at multiplier 1, float32, in the shape of the weight."""
        first, (outer, inner) = self.first().float(), self.second()
        second = inner.float() if outer is None else torch.einsum("br,r...->b...", outer.float(), inner.float())
        product = torch.einsum("ac,bd...->abcd...", first, second) * self.scale
        return product.reshape(weight_shape(self.module))

    @torch.no_grad()
    def delta_norm(self) -> Tensor:
        """Frobenius norm of `delta`, 0-d: the product of those of the two matrices."""
        outer, inner = self.second()
        squares = inner.float().flatten(1) @ inner.float().flatten(1).T
        if outer is not None:
            squares = squares * (outer.float().T @ outer.float())
        second = squares.sum() if outer is not None else squares.trace()
        norm: Tensor = self.first().float().norm() * second.clamp(min=0).sqrt() * self.scale
        return norm

    @torch.no_grad()
    def scale_by(self, ratio: Tensor) -> None:
        """Multiplies one matrix on each side by the root of `ratio`, and so the change by it."""
        for key in ("lokr_w1", "lokr_w1_a", "lokr_w2", "lokr_w2_a"):
            matrix = self._parameters.get(key)
            if matrix is not None:
                matrix.mul_(ratio.sqrt().to(matrix.dtype))


class KroneckerLinear(torch.autograd.Function):
    """`x W^T + b + strength * (W1 (x) W2) x` for x (T, in), a frozen W and b, W1 (a, c), W2 = outer inner (b, d).

    Without `outer` inner is W2. Of the activations only x is kept; what lies between is little work, and done again.
    The last small product is added in place to the result of the big one.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        scale: Tensor | None,
        product: str,
        bias: Tensor | None,
        first: Tensor,
        outer: Tensor | None,
        inner: Tensor,
        gate: Tensor | None,
        strength: float,
    ) -> Tensor:
        small_first, small_inner = first.to(x.dtype), inner.to(x.dtype)
        small_outer = None if outer is None else outer.to(x.dtype)

        def big() -> Tensor:
            return PRODUCTS[product].forward(x, weight, scale, bias)  # (T, out)

        parts = _parts(x, small_first, small_inner)
        b = len(inner) if outer is None else len(outer)
        narrow = is_narrow(len(first) * b, x.shape[1])
        out = (keep(big) if narrow else big()).view(len(x), -1, b)  # (T, a, b)
        if small_outer is None and gate is None:
            left = small_first.expand(len(x), *first.shape)
            add = out.baddbmm if narrow else out.baddbmm_
            out = add(left, parts, alpha=strength)
        else:
            mixed = torch.matmul(small_first, parts)
            mixed = mixed if gate is None else mixed * gate
            out = _plus(out, mixed, small_outer, strength, in_place=not narrow)
        ctx.save_for_backward(x, weight, scale, small_first, small_outer, small_inner, gate)
        ctx.strength, ctx.product, ctx.dtype = strength, product, first.dtype
        return out.view(len(x), -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale, first, outer, inner, gate = ctx.saved_tensors
        parts = _parts(x, first, inner)  # (T, c, r)
        grad_outer = None
        if outer is None:
            grad_mixed = grad.reshape(len(x), len(first), -1)  # (T, a, r)
        else:
            rows = grad.reshape(-1, len(outer))  # (T a, b)
            mixed = torch.matmul(first, parts)
            mixed = mixed if gate is None else mixed * gate
            grad_outer = (rows.T @ mixed.view(-1, len(inner))).mul_(ctx.strength).to(ctx.dtype)
            grad_mixed = (rows @ outer).view_as(mixed)
        if gate is not None:
            grad_mixed = grad_mixed * gate
        # one small product for each token, then their sum: einsum would copy both into another order
        grad_first = torch.matmul(grad_mixed, parts.mT).sum(0, dtype=torch.float32).mul_(ctx.strength).to(ctx.dtype)
        grad_parts = torch.matmul(first.T * ctx.strength, grad_mixed).view(-1, len(inner))  # (T c, r)
        grad_inner = (grad_parts.T @ x.reshape(-1, inner.shape[1])).to(ctx.dtype)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = PRODUCTS[ctx.product].back(grad, weight, scale)
            grad_x.view(-1, inner.shape[1]).addmm_(grad_parts, inner)
        return grad_x, None, None, None, None, grad_first, grad_outer, grad_inner, None, None


def _parts(x: Tensor, first: Tensor, inner: Tensor) -> Tensor:
    """Each of the c parts of x times inner: (T, c, r)."""
    return F.linear(x.view(len(x), first.shape[1], -1), inner)


def _plus(out: Tensor, mixed: Tensor, outer: Tensor | None, strength: float, *, in_place: bool) -> Tensor:
    """out (T, a, b) plus `strength` times mixed (T, a, r), or that times outer (b, r)."""
    if outer is None:
        return out.add_(mixed, alpha=strength) if in_place else out.add(mixed, alpha=strength)
    rows, terms = out.view(-1, len(outer)), mixed.view(-1, mixed.shape[-1])
    add = rows.addmm_ if in_place else rows.addmm
    return add(terms, outer.T, alpha=strength).view_as(out)


_fused = cast("Callable[..., Tensor]", KroneckerLinear.apply)
