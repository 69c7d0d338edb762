"""DoRA on one module: a low-rank change of the direction of each row of the weight, and a length of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from library.models.memory import is_narrow, keep
from library.models.products import PRODUCTS, compute_dtype, dense, stored
from networks.factored import Dropouts, covers_plain_linear, weight_shape
from networks.low_rank import LoraAdapter

EPSILON = torch.finfo(torch.float32).eps
"""Added to norms, as in LyCORIS."""


class DoraAdapter(LoraAdapter):
    """`m V / |V|` in the place of W, with `V = W + alpha / rank * up down`.

    |V| are the norms of the rows, and m learned lengths, at first those of W. Files may have them for the columns
    instead. No gradient goes through |V|, as the source recommends; it is computed from the small matrices and the
    norms of W, without V. A multiplier other than 1 moves the weight that part of the way from W to the new one; in
    LyCORIS it only acts on the lengths.

    Source: Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation" (2024), equations 5 and 11.
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
        by_rows: bool = True,
    ) -> None:
        """A new adapter that changes nothing yet; alpha None or 0 means the rank."""
        super().__init__(name, module, component, rank=rank, alpha=alpha, multiplier=multiplier, dropouts=dropouts)
        self.by_rows = by_rows
        self._squares: Tensor | None = None
        shape = [1] * len(weight_shape(module))
        shape[self._axis] = -1
        self.dora_scale = nn.Parameter(self._base_squares(torch.device("cpu")).sqrt().add(EPSILON).view(shape))

    @property
    def _axis(self) -> int:
        """That of the weight which the lengths belong to."""
        return 0 if self.by_rows else 1

    def hook(self) -> None:
        """See `ModuleAdapter.hook`; the weight is what it is from now on."""
        self._squares = None
        super().hook()

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """See `FactoredAdapter.load`."""
        super().load(tensors)
        self._squares = None

    # lengths

    def _base_squares(self, device: torch.device) -> Tensor:
        """The squared norms of the rows of W, or of its columns, float32."""
        if self._squares is None:
            with torch.no_grad():
                self._squares = _squares(dense(self.module, torch.float32), self._axis)
        if self._squares.device != device:
            self._squares = self._squares.to(device)
        return self._squares

    @torch.no_grad()
    def _norms(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """|V|, float32: `|w + d|^2 = |w|^2 + 2 w d + |d|^2` for each row w of W and d of the low-rank product."""
        down, up = (matrix.float().flatten(1) for matrix in self.pair())
        squares = self._base_squares(up.device) + 2 * self.scale * self._cross(down, up, dtype)
        return (squares + self.scale**2 * self._own(down, up)).clamp(min=0).sqrt() + EPSILON

    def _own(self, down: Tensor, up: Tensor) -> Tensor:
        """The squared norms of the rows, or columns, of `up down`."""
        if self.by_rows:
            return ((up @ (down @ down.T)) * up).sum(1)
        return _columns(((up.T @ up) @ down) * down, self.module)

    def _cross(self, down: Tensor, up: Tensor, dtype: torch.dtype) -> Tensor:
        """The products of the rows, or columns, of W with those of `up down`; the large product in `dtype`."""
        flat = dense(self.module, dtype).flatten(1)  # not in eight bits, where the module's own product is
        if self.by_rows:
            return ((flat @ down.T.to(dtype)).float() * up).sum(1)
        return _columns((up.T.to(dtype) @ flat).float() * down, self.module)

    def _growth(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """m / |V|, float32, differentiable with regard to m."""
        return self.dora_scale.float().flatten() / self._norms(dtype)

    # application

    def changed(self, x: Tensor) -> Tensor:
        """What the module would answer with its weight changed."""
        dtype = compute_dtype(x)
        growth = self._growth(dtype)
        if self.by_rows and covers_plain_linear(self):
            weight, scale, product = stored(self.module)
            bias = cast("Tensor | None", self.module.bias)
            down, up = self.pair()
            gate = self.gate((*x.shape[:-1], self.rank), x.device, dtype)
            if gate is not None:
                gate = gate.expand(*x.shape[:-1], self.rank).reshape(-1, self.rank)
            flat = x.reshape(-1, x.shape[-1]).to(dtype)  # (T, in)
            sizes = (self.scale, self.multiplier)
            out = _fused(flat, weight, scale, product, bias, down, up, growth, gate, sizes)
            return out.view(*x.shape[:-1], -1)
        base: Tensor = self.original_forward(x)
        return base + self._change(x.to(dtype), growth).to(base.dtype)

    def _change(self, x: Tensor, growth: Tensor) -> Tensor:
        """The change of the answer: (m / |V| - 1) times that of W, and m / |V| times the low-rank term."""
        down, up = (matrix.to(x.dtype) for matrix in self.pair())
        weight, module = dense(self.module, x.dtype), self.module
        channels = 1 if isinstance(module, nn.Conv2d) else -1
        along = [1] * x.ndim
        along[channels] = -1
        more, low = (growth - 1).view(along).to(x.dtype), (growth * self.scale).view(along).to(x.dtype)
        inner, outer = (x, x) if self.by_rows else (x * more, x * low)
        if isinstance(module, nn.Conv2d):
            full: Tensor = module._conv_forward(inner, weight, None)
            middle: Tensor = module._conv_forward(outer, down, None)
        else:
            full, middle = F.linear(inner, weight), F.linear(outer, down)
        gate = self.gate(tuple(middle.shape), x.device, x.dtype, channels=channels)
        if gate is not None:
            middle = middle * gate
        term: Tensor = F.conv2d(middle, up) if up.ndim == 4 else F.linear(middle, up)
        return self.multiplier * (full * more + term * low if self.by_rows else full + term)

    # as a change of the weight

    @torch.no_grad()
    def delta(self) -> Tensor:
        """The change of the module's weight at multiplier 1, float32, in the shape of the weight."""
        weight = dense(self.module, torch.float32)
        shape = [1] * weight.ndim
        shape[self._axis] = -1
        return (weight + super().delta()) * self._growth().view(shape) - weight

    @torch.no_grad()
    def delta_norm(self) -> Tensor:
        """Frobenius norm of `delta`, 0-d.

        With c = m / |V| the rows of the change are `(c - 1) w + c d`, whose squares are small where the change is.
        """
        down, up = (matrix.float().flatten(1) for matrix in self.pair())
        more = self._growth() - 1
        squares = self._base_squares(up.device)
        cross = self._cross(down, up, torch.float32) * self.scale
        own = self._own(down, up) * self.scale**2
        total = (more.square() * squares + 2 * more * (more + 1) * cross + (more + 1).square() * own).sum()
        return total.clamp(min=0).sqrt()

    @torch.no_grad()
    def scale_by(self, ratio: Tensor) -> None:
        """Multiplies the change by `ratio`: with q and c = m / |V| the new row is `w + q (c v - w)`.

        That is `e w + q c d` with `e = 1 - q + q c`: the low-rank product grows by `q c / e`, and the length is e
        times the norm that follows.
        """
        growth = self._growth()
        whole = 1 - ratio + ratio * growth
        part = torch.where(ratio == 1, torch.ones_like(growth), ratio * growth / whole)
        factor = self.lora_up.weight if self.by_rows else self.lora_down.weight
        shape = [1] * factor.ndim
        shape[self._axis] = -1
        factor.mul_(part.view(shape).to(factor.dtype))
        lengths = (whole * self._norms()).view_as(self.dora_scale).to(self.dora_scale.dtype)
        self.dora_scale.copy_(torch.where(ratio == 1, self.dora_scale, lengths))


class DoraLinear(torch.autograd.Function):
    """`x W'^T + b` for x (T, in), a frozen W and b, and `W' = (1 - n) W + n g (W + s up down)`.

    g (out,) are the lengths over the norms, s and n numbers. The gradient of g needs the answer before it is
    multiplied, which is found again from the answer itself, so that nothing more is kept than other layers keep.
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
        growth: Tensor,
        gate: Tensor | None,
        sizes: tuple[float, float],
    ) -> Tensor:
        size, multiplier = sizes
        small_down, small_up = down.to(x.dtype), up.to(x.dtype)
        whole = (1 - multiplier + multiplier * growth).to(x.dtype)  # of W, for each output
        part = (multiplier * size * growth).to(x.dtype)  # of the low-rank product
        middle = x @ small_down.T  # (T, r)
        if gate is not None:
            middle = middle * gate

        def big() -> Tensor:
            return PRODUCTS[product].forward(x, weight, scale, None)  # (T, out)

        out = keep(big) if is_narrow(len(up), x.shape[1]) else big()
        out = out * whole if bias is None else torch.addcmul(bias.to(x.dtype), out, whole)
        out.addmm_(middle, (small_up * part.unsqueeze(1)).T)
        ctx.save_for_backward(x, out, weight, scale, bias, small_down, small_up, middle, gate, whole, part)
        ctx.product, ctx.sizes, ctx.dtypes = product, sizes, (down.dtype, up.dtype)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, out, weight, scale, bias, down, up, middle, gate, whole, part = ctx.saved_tensors
        size, multiplier = ctx.sizes
        grad_middle = grad @ (up * part.unsqueeze(1))  # (T, r)
        if gate is not None:
            grad_middle *= gate
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = PRODUCTS[ctx.product].back(grad * whole, weight, scale).addmm_(grad_middle, down)
        grad_product = (grad.T @ middle).float()  # (out, r)
        # out = whole * (W x + s up down x) - (1 - n) s up down x + b
        before = (grad * out).sum(0, dtype=torch.float32)
        before += (1 - multiplier) * size * (grad_product * up).sum(1)
        if bias is not None:
            before -= bias.float() * grad.sum(0, dtype=torch.float32)
        whole = whole.float()
        grad_growth = torch.where(whole == 0, torch.zeros_like(before), multiplier * before / whole)
        grad_down = (grad_middle.T @ x).to(ctx.dtypes[0])
        grad_up = (grad_product * part.unsqueeze(1)).to(ctx.dtypes[1])
        return grad_x, None, None, None, None, grad_down, grad_up, grad_growth, None, None


_fused = cast("Callable[..., Tensor]", DoraLinear.apply)


def _squares(weight: Tensor, axis: int) -> Tensor:
    """The sums of squares of the rows (axis 0) or columns (axis 1)."""
    return weight.transpose(0, axis).flatten(1).square().sum(1)


def _columns(values: Tensor, module: nn.Module) -> Tensor:
    """Sums over the rows (r, in * kernel), and over the kernel, for each input."""
    return values.sum(0).view(weight_shape(module)[1], -1).sum(1)
