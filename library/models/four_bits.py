"""NF4: sixteen values that are equally likely in normally distributed weights, scaled block by block.

The layout is that of bitsandbytes, whose kernel raises the weights where it is installed: two codes in a byte, the
first in the upper half; blocks lie within a row.

Source: Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs" (arXiv 2305.14314), appendix E for the values.
"""

from __future__ import annotations

import math
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 64
"""Weights with one scale, at most."""
SMALLEST_BLOCK = 16
"""Below that, scales would take as much room as is saved."""
VALUES = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
_HAS_KERNEL = find_spec("bitsandbytes") is not None


def block_of(width: int) -> int:
    """How many weights of a row of `width` share a scale."""
    return math.gcd(width, BLOCK)


def lowered(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (out, in / 2), uint8, and scales (out, in / block), float32, of a weight (out, in)."""
    blocks = weight.float().view(len(weight), -1, block_of(weight.shape[1]))
    scale = blocks.abs().amax(-1)
    values = torch.tensor(VALUES, device=weight.device)
    relative = blocks / scale.clamp(min=torch.finfo(torch.float32).tiny)[..., None]
    codes = torch.bucketize(relative, _middles(values), out_int32=True).to(torch.uint8).flatten(1)
    return codes[:, ::2] << 4 | codes[:, 1::2], scale


def raised(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight (out, in) of what `lowered` gave."""
    compiling = torch.compiler.is_compiling()  # compilers fuse what follows, but don't see through caches and kernels
    if codes.is_cuda and _HAS_KERNEL and not compiling:
        return _raised_by_kernel(codes, scale, dtype)
    table = (_pairs if compiling else _known_pairs)(codes.device, dtype)
    pairs = F.embedding(codes.int(), table)  # (out, in / 2, 2)
    return pairs.view(*scale.shape, -1).mul_(scale[..., None]).flatten(1)


def _raised_by_kernel(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    from bitsandbytes import functional  # type: ignore[import-not-found, unused-ignore]

    shape = torch.Size((len(codes), 2 * codes.shape[1]))
    state = functional.QuantState(
        absmax=scale.flatten(),
        shape=shape,
        code=_values(codes.device),
        blocksize=shape[1] // scale.shape[1],
        quant_type="nf4",
        dtype=dtype,
    )
    out: Any = functional.dequantize_4bit(codes.view(-1, 1), quant_state=state)
    weight: Tensor = out.view(shape)
    return weight


def _middles(values: Tensor) -> Tensor:
    return (values[1:] + values[:-1]) / 2


@lru_cache
def _values(device: torch.device) -> Tensor:
    return torch.tensor(VALUES, device=device)


def _pairs(device: torch.device, dtype: torch.dtype) -> Tensor:
    """What each byte stands for, (256, 2)."""
    values = torch.tensor(VALUES, dtype=dtype)
    return torch.cartesian_prod(values, values).to(device)


_known_pairs = lru_cache(_pairs)
