"""Matrix products in eight bits: rows are quantised by their largest value, results are rescaled.

A product takes x (T, K), and a matrix (K, N) in eight bits whose columns lie adjacent in memory, with a scale (1, N) or
none; it gives (T, N). Rows of zeros and what isn't finite stay so. Nothing waits for the device.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

INT8_MOST = 127
FP8_MOST = 448.0
FP8 = torch.float8_e4m3fn
STEP = 16
"""Both sizes of a weight have to be multiples of this, else the hardware doesn't multiply in eight bits."""
_FEWEST_ROWS = 32
_TINY = torch.finfo(torch.float32).tiny * 1024
"""Smaller largest values than this count as this: their inverse, times 448, must be finite."""


class Multiply(Protocol):
    """See above."""

    def __call__(
        self, x: Tensor, columns: Tensor, scale: Tensor | None, bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """`x columns * scale + bias`, in `dtype`."""


def lowered(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The weight (out, in) in int8 or float8_e4m3fn, and scales (out, 1), float32, for each row."""
    most = INT8_MOST if dtype == torch.int8 else FP8_MOST
    scale = _largest(weight) / most
    values = weight / scale  # float32
    return (values.round_() if dtype == torch.int8 else values.clamp_(-most, most)).to(dtype), scale


def cast(weight: Tensor) -> tuple[Tensor, None]:
    """The weight in float8_e4m3fn without scales."""
    return weight.clamp(-FP8_MOST, FP8_MOST).to(FP8), None


def times(x: Tensor, scale: Tensor) -> Tensor:
    """x (T, N) with a float32 scale (1, N) multiplied in; in float32 unless the type of x has its range."""
    return x * (scale.to(x.dtype) if x.dtype == torch.bfloat16 else scale)


def int8(x: Tensor, columns: Tensor, scale: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """As above, for a matrix in int8; sums are exact."""
    row_scale = _largest(x) / INT8_MOST
    rows = (x * row_scale.reciprocal()).round_().to(torch.int8)
    count = len(rows)
    if count < _FEWEST_ROWS:  # CUDA wants more than sixteen
        rows = F.pad(rows, (0, 0, 0, _FEWEST_ROWS - count))
    product: Tensor = torch._int_mm(rows, columns)
    return _rescaled(product[:count], row_scale, scale, bias, dtype)


def fp8(x: Tensor, columns: Tensor, scale: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """As above, for a matrix in float8_e4m3fn; scales are applied to the product."""
    rows, row_scale = _fp8_rows(x)
    wide = dtype if dtype == torch.bfloat16 else torch.float32
    one = torch.ones((), device=x.device)
    product = _scaled_mm(rows, columns, one, one, None, wide, fast=scale is not None)
    return _rescaled(product, row_scale, scale, bias, dtype)


def fp8_by_rows(x: Tensor, columns: Tensor, scale: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """As above, for a matrix in float8_e4m3fn; the product itself applies the scales. For bfloat16 only."""
    if dtype != torch.bfloat16:
        return fp8(x, columns, scale, bias, dtype)
    rows, row_scale = _fp8_rows(x)
    ones = torch.ones((1, columns.shape[1]), device=x.device) if scale is None else scale.contiguous()
    return _scaled_mm(rows, columns, row_scale, ones, bias, dtype, fast=scale is not None)


def _largest(x: Tensor) -> Tensor:
    """The largest absolute value of each row, (T, 1), float32."""
    largest: Tensor = torch.linalg.vector_norm(x, torch.inf, dim=-1, keepdim=True)
    return largest.float().clamp(min=_TINY)


def _fp8_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x in float8_e4m3fn and its scale (T, 1).

    In bfloat16 factor and product are rounded up by less than what float8 rounds down to its largest value.
    """
    factor = _largest(x).reciprocal() * FP8_MOST
    if x.dtype == torch.bfloat16:
        factor = factor.to(x.dtype)
    return (x * factor).to(FP8), factor.float().reciprocal()


def _scaled_mm(
    rows: Tensor,
    columns: Tensor,
    row_scale: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    *,
    fast: bool,
) -> Tensor:
    """The scaled product; `fast` sums with fewer bits, which forward passes can do with and gradients can't."""
    if rows.is_cuda:
        out: Tensor = torch._scaled_mm(
            rows, columns, scale_a=row_scale, scale_b=scale, bias=bias, out_dtype=dtype, use_fast_accum=fast
        )
        return out
    with torch.autocast(rows.device.type, enabled=False):  # the same numbers, multiplied in float32
        product = rows.float() @ columns.float() * row_scale * scale
    out = product if bias is None else product + bias
    return out.to(dtype)


def _rescaled(
    product: Tensor, row_scale: Tensor, scale: Tensor | None, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The product with scales and bias, (T, N)."""
    if dtype == torch.bfloat16:  # it has the range of float32, so that large temporary tensors can be spared
        out = torch.mul(product, row_scale, out=torch.empty_like(product, dtype=dtype))
    else:
        out = product * row_scale
    if scale is not None:
        out.mul_(scale)
    if bias is not None:
        out.add_(bias)
    return out.to(dtype)
