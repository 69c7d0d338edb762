"""Singular values: exact ones, those of products of small matrices, randomised ones, and how many of them to keep."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from library.log import DataError

TOLERANCE = 2e-4
"""How much larger the squared error of a randomised decomposition may be than the least possible one, in parts of it.

It is estimated from how fast the error falls from one pass to the next; see `svd`.
"""
LEAST = 1e-9
"""The same, in parts of the squared norm of the matrix, where hardly anything is left out."""
PASSES = 16
"""Most passes of the randomised decomposition over its matrix, each way."""
MARGIN = 8
"""Further directions that are looked at besides those that are wanted."""
SHARE = 4
"""Where more than one in so many singular values is wanted, all are computed."""
ZERO = 1e-6
"""Largest singular value of matrices that count as empty."""


@dataclass(frozen=True)
class Svd:
    """The largest singular values of a matrix A (out, in), and their vectors, float32; `A ~ (left * values) right`."""

    left: Tensor
    """(out, n), orthonormal columns."""
    values: Tensor
    """(n,), the largest first."""
    right: Tensor
    """(n, in), orthonormal rows."""
    rest: float = 0.0
    """What the n values leave out of the squared Frobenius norm of A; 0 where all were computed."""
    excess: float = 0.0
    """By how much the squared error is estimated to be above the least possible one, in parts of it; 0: exact."""

    @property
    def norm(self) -> float:
        """Frobenius norm of A."""
        return math.sqrt(float(self.values.double().square().sum()) + self.rest)

    def error(self, rank: int) -> float:
        """Frobenius norm of what the first `rank` values leave out, in parts of that of A; what it is, not a bound."""
        left_out = float(self.values[rank:].double().square().sum()) + self.rest
        return math.sqrt(left_out) / self.norm if self.norm else 0.0

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """Down (rank, in) and up (out, rank), up with the singular values: `up down` is the matrix of that rank."""
        return self.right[:rank].contiguous(), (self.left[:, :rank] * self.values[:rank]).contiguous()


def svd(matrix: Tensor, rank: int | None = None, *, exact: bool = False) -> Svd:
    """The singular values of a matrix, on its device.

    With rank None, or `exact`, all are computed. Otherwise the largest `rank` of them, where these are few against both
    sides by a randomised method: random vectors are multiplied by the matrix and its transpose again and again, and all
    directions that come out are kept, until the error that they leave has come down to `TOLERANCE` above the least
    possible one. The errors that `Svd` says are those of what it holds, whichever method it was.

    Source: Musco and Musco, "Randomized Block Krylov Methods for Stronger and Faster Approximate Singular Value
    Decomposition" (2015), algorithm 2, with orthogonal blocks.

    Errors: DataError when values aren't finite.
    """
    matrix = matrix.float()
    if not bool(torch.isfinite(matrix).all()):
        raise DataError("a matrix with values that aren't finite has no singular values", code="E-TENSOR-FINITE")
    if exact or rank is None or (rank + MARGIN) * SHARE > min(matrix.shape):
        return Svd(*_all_values(matrix))
    return _randomised(matrix, rank)


def svd_of_product(up: Tensor, down: Tensor) -> Svd:
    """The exact singular values of `up down` (out, r) (r, in), without forming the product: at most r of them.

    Both are divided into orthonormal and triangular matrices; the product of the triangular ones is small.
    """
    outer, outer_core = torch.linalg.qr(up.float())
    inner, inner_core = torch.linalg.qr(down.float().T)
    core = outer_core.to("cpu", torch.float64) @ inner_core.to("cpu", torch.float64).T
    left, values, right = _all_values(core)
    left, values, right = (part.to(up.device, torch.float32) for part in (left, values, right))
    return Svd(outer @ left, values, right @ inner.T)


def _all_values(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """On the CPU in double precision where the device's own method fails, as some do for matrices like zero."""
    try:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        if bool(torch.isfinite(values).all()):
            return left, values, right
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        pass
    found = torch.linalg.svd(matrix.to("cpu", torch.float64), full_matrices=False)
    left, values, right = (part.to(matrix.device, matrix.dtype) for part in found)
    return left, values, right


def _randomised(matrix: Tensor, rank: int) -> Svd:
    wide = matrix.shape[0] < matrix.shape[1]
    tall = matrix.T if wide else matrix
    total = _energy(matrix)
    count = rank + MARGIN
    start = torch.randn(tall.shape[1], count, generator=torch.Generator().manual_seed(0)).to(matrix.device)
    basis = torch.linalg.qr(tall @ start)[0]
    image = tall.T @ basis  # (short side, directions)
    captured, gain, excess = 0.0, math.inf, math.inf
    for _ in range(PASSES):
        energies = torch.linalg.eigvalsh((image.T @ image).to("cpu", torch.float64))
        now = float(energies[-rank:].sum())
        before, gain, captured = gain, now - captured, now
        excess = _excess(gain, before, total - captured)
        if gain <= LEAST * total or excess <= TOLERANCE or basis.shape[1] + count > tall.shape[1]:
            break
        block = _new_directions(tall @ torch.linalg.qr(image[:, -count:])[0], basis)
        basis, image = torch.cat([basis, block], 1), torch.cat([image, tall.T @ block], 1)
    inner, core = torch.linalg.qr(image)
    left, values, right = _all_values(core.T)
    long, short = basis @ left, right @ inner.T
    left, right = (short.T, long.T) if wide else (long, short)
    rest = max(total - float(values.double().square().sum()), 0.0)
    return Svd(left, values, right, rest, max(excess, 0.0))


def _energy(matrix: Tensor) -> float:
    """The squared Frobenius norm; rows are added up in double precision, which some devices don't have."""
    return float(matrix.square().sum(1).to("cpu", torch.float64).sum())


def _new_directions(block: Tensor, basis: Tensor) -> Tensor:
    """Orthonormal columns that are orthogonal to a basis; in two rounds, which rounding needs."""
    for _ in range(2):
        block = torch.linalg.qr(block - basis @ (basis.T @ block))[0]
    return block


def _excess(gain: float, before: float, left: float) -> float:
    """The gains of passes fall like a geometric series; what is left of it, in parts of the least error."""
    ratio = min(gain / before, 0.99) if 0 < before < math.inf else 0.99
    more = max(gain, 0.0) * ratio / (1 - ratio)
    least = left - more
    return more / least if least > 0 else math.inf


@dataclass(frozen=True)
class RankChoice:
    """How many singular values are kept."""

    largest: int
    """Never more than these."""
    method: str | None = None
    """sv_ratio, sv_cumulative, sv_fro; None: as many as `largest`."""
    parameter: float = 0.0
    """sv_ratio: largest over smallest kept value. sv_cumulative: part of the sum. sv_fro: part of the norm."""

    def rank(self, values: Tensor) -> int:
        """The number, of all singular values of a matrix in falling order.

        By the methods it is one more than what they ask for, as in the files of other tools.
        """
        values = values.double()
        if not len(values) or float(values[0]) <= ZERO:
            return 1
        most = min(self.largest, len(values))
        if self.method is None:
            return most
        wanted = min(max(self._wanted(values), 1), len(values) - 1)
        return min(wanted + 1, most)

    def _wanted(self, values: Tensor) -> int:
        if self.method == "sv_ratio":
            return int((values > values[0] / self.parameter).sum())
        squared = self.method == "sv_fro"
        parts = (values.square() if squared else values).cumsum(0)
        share = self.parameter**2 if squared else self.parameter
        return 1 + int((parts / parts[-1] < share).sum())


def clamped(down: Tensor, up: Tensor, quantile: float) -> tuple[Tensor, Tensor]:
    """Both with their outliers cut down to a quantile of all their absolute values; 1 changes nothing."""
    if quantile >= 1:
        return down, up
    sizes = torch.cat([down.flatten(), up.flatten()]).abs()
    place = quantile * (len(sizes) - 1)
    low = sizes.kthvalue(math.floor(place) + 1).values
    high = sizes.kthvalue(math.ceil(place) + 1).values
    most = float(low + (high - low) * (place - math.floor(place)))
    return down.clamp(-most, most), up.clamp(-most, most)
