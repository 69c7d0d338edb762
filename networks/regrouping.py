"""One adapter for several layers that lie one below the other, and one for each of them: the same change, exactly.

Parts that share their down matrix have their up matrices one below the other. Else the down matrices are stacked, and
the up matrices make a block-diagonal one. The second comes apart again by its blocks; any other up matrix by its rows,
each part with the whole down matrix. So it is for each of LoHa's two products; of LoKr the rows of the first factor are
parted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from library.log import DataError
from networks.layouts import LENGTHS
from networks.scaling import PAIRS, Tensors, alpha_like, kind_of, same, scale_of, scaled

MLP_RATIO = 4
"""Width of the MLP over that of the model, for files that don't show it."""


def rows_of(tensors: Tensors) -> int:
    """The outputs of a module."""
    kind = kind_of(tensors)
    if kind == "lokr":
        return _factor_rows(tensors, 1) * _factor_rows(tensors, 2)
    return tensors[PAIRS[kind][0][0]].shape[0]


def inputs_of(tensors: Tensors) -> int:
    """The inputs of a module."""
    kind = kind_of(tensors)
    if kind == "lokr":
        return math.prod(_factor(tensors, number)[1].shape[1] for number in (1, 2))
    return tensors[PAIRS[kind][0][1]].shape[1]


def sizes_of(tensors: Tensors, count: int) -> list[int]:
    """The outputs of the layers that are fused in one. Errors: DataError when they don't come out even."""
    rows, width = rows_of(tensors), inputs_of(tensors)
    sizes = [rows // 3] * 3 if count == 3 else [width] * 3 + [rows - 3 * width]
    if sum(sizes) != rows or min(sizes) < 1:
        raise DataError(f"{rows} outputs don't make {count} layers", code="E-NETWORK-SHAPE")
    return sizes


# apart


def split(tensors: Tensors, sizes: Sequence[int], ranks: Sequence[int] | None = None) -> list[Tensors]:
    """An adapter for each layer.

    Args:
        tensors: of one module.
        sizes: numbers of outputs of the layers.
        ranks: of the parts where they are known to differ; 0s in all places: they share the down matrix.

    Errors: DataError when this kind can't be split so.
    """
    kind = kind_of(tensors)
    if kind == "lokr":
        parts = _split_factor(tensors, sizes)
    else:
        found = _block_ranks(tensors, kind, sizes) if ranks is None else ranks
        parts = _split_pairs(tensors, kind, sizes, found if found and any(found) else None)
    if LENGTHS in tensors:
        lengths = tensors[LENGTHS]
        if lengths.shape[0] != sum(sizes):
            raise DataError("the lengths of DoRA are those of columns, of all layers at once", code="E-NETWORK-KIND")
        for part, rows in zip(parts, lengths.split_with_sizes(list(sizes)), strict=True):
            part[LENGTHS] = rows
    return parts


def _block_ranks(tensors: Tensors, kind: str, sizes: Sequence[int]) -> list[int] | None:
    """The ranks of equal blocks, if there is nothing beside them."""
    count, rank = len(sizes), tensors[PAIRS[kind][0][1]].shape[0]
    if rank % count:
        return None
    ranks = [rank // count] * count
    for up, _ in PAIRS[kind]:
        filled = (tensors[up] != 0) | torch.signbit(tensors[up])
        if sum(int(block.count_nonzero()) for block in _diagonal(filled, sizes, ranks)) != int(filled.count_nonzero()):
            return None
    return ranks


def _diagonal(up: Tensor, sizes: Sequence[int], ranks: Sequence[int]) -> list[Tensor]:
    rows, columns = up.split_with_sizes(list(sizes)), accumulate(ranks, initial=0)
    return [row[:, start : start + rank] for row, start, rank in zip(rows, columns, ranks, strict=False)]


def _split_pairs(tensors: Tensors, kind: str, sizes: Sequence[int], ranks: Sequence[int] | None) -> list[Tensors]:
    parts: list[Tensors] = [{} for _ in sizes]
    for up, down in PAIRS[kind]:
        if ranks is None:
            ups, downs = tensors[up].split_with_sizes(list(sizes)), [tensors[down]] * len(sizes)
        else:
            ups = tuple(_diagonal(tensors[up], sizes, ranks))
            downs = list(tensors[down].split_with_sizes(list(ranks)))
        for part, own_up, own_down in zip(parts, ups, downs, strict=True):
            part |= {down: own_down, up: own_up}
    alpha = tensors.get("alpha")
    if alpha is not None:
        whole = tensors[PAIRS[kind][0][1]].shape[0]
        for part, rank in zip(parts, ranks or [whole] * len(sizes), strict=True):
            part["alpha"] = alpha if rank == whole else alpha_like(alpha, float(alpha) * rank / whole)
    return parts


def _split_factor(tensors: Tensors, sizes: Sequence[int]) -> list[Tensors]:
    """LoKr: rows of the first factor, each of which stands for a row of blocks."""
    name, factor = _factor(tensors, 1)[0], _factor_rows(tensors, 2)
    if any(size % factor for size in sizes):
        what = f"LoKr with blocks of {factor} rows isn't one of layers of {', '.join(map(str, sizes))} rows"
        raise DataError(what, code="E-NETWORK-KIND")
    rows = tensors[name].split_with_sizes([size // factor for size in sizes])
    rest = {other: tensor for other, tensor in tensors.items() if other not in (name, LENGTHS)}
    return [{**rest, name: part} for part in rows]


def _factor(tensors: Tensors, number: int) -> tuple[str, Tensor]:
    """The tensor whose rows are those of a factor of LoKr, and the one whose columns are its."""
    whole = f"lokr_w{number}"
    if whole in tensors:
        return whole, tensors[whole]
    return f"{whole}_a", tensors[f"{whole}_b"]


def _factor_rows(tensors: Tensors, number: int) -> int:
    return tensors[_factor(tensors, number)[0]].shape[0]


# together


def fuse(parts: Sequence[Tensors | None], sizes: Sequence[int], *, shared: bool | None = None) -> Tensors:
    """One adapter for layers that lie one below the other; None: a layer that isn't changed.

    Args:
        parts: of one kind.
        sizes: numbers of outputs of the layers.
        shared: whether the down matrix is to be one for all; None: if it is the same.

    Errors: DataError when this kind can't be fused so.
    """
    present = [part for part in parts if part is not None]
    kinds = {kind_of(part) for part in present}
    if len(kinds) > 1 or len({inputs_of(part) for part in present}) > 1:
        raise DataError("the layers that are one there are changed in different ways", code="E-NETWORK-KIND")
    (kind,) = kinds
    if LENGTHS in present[0] and len(present) < len(parts):
        raise DataError("DoRA of a part of the layers that are one there can't be written", code="E-NETWORK-KIND")
    if kind == "lokr":
        result = _fuse_factors(parts, present[0], sizes)
    else:
        result = _fuse_pairs(parts, kind, sizes, _may_share(parts, kind, sizes) if shared is None else shared)
    if LENGTHS in present[0]:
        if any(part[LENGTHS].shape[0] != size for part, size in zip(present, sizes, strict=True)):
            raise DataError("the lengths of DoRA are those of columns, of each layer", code="E-NETWORK-KIND")
        result[LENGTHS] = torch.cat([part[LENGTHS] for part in present])
    return result


def _may_share(parts: Sequence[Tensors | None], kind: str, sizes: Sequence[int]) -> bool:
    """Whether the down matrices are the same and the up matrices would come apart by rows again."""
    first, *others = parts
    if first is None or any(part is None for part in others):
        return False
    for other in others:
        assert other is not None
        if not all(same(first[down], other[down]) for _, down in PAIRS[kind]) or scale_of(first) != scale_of(other):
            return False
    return _block_ranks(_fuse_pairs(parts, kind, sizes, shared=True), kind, sizes) is None


def _fuse_pairs(parts: Sequence[Tensors | None], kind: str, sizes: Sequence[int], shared: bool) -> Tensors:
    present = [part for part in parts if part is not None]
    first = present[0]
    scales = [scale_of(part) for part in present]
    ups = {up: _evened([part[up] for part in present], scales, even=up == PAIRS[kind][0][0]) for up, _ in PAIRS[kind]}
    result: Tensors = {}
    for up, down in PAIRS[kind]:
        if shared:
            result |= {down: first[down], up: torch.cat(ups[up])}
        else:
            matrices = iter(ups[up])
            blocks = [None if part is None else next(matrices) for part in parts]
            result |= {down: torch.cat([part[down] for part in present]), up: _block_diagonal(blocks, sizes)}
    alpha = next((part["alpha"] for part in present if "alpha" in part), None)
    if alpha is not None:
        own, rank = first[PAIRS[kind][0][1]].shape[0], result[PAIRS[kind][0][1]].shape[0]
        value = float(first.get("alpha", own)) * rank / own
        result["alpha"] = alpha_like(alpha, value)
    return result


def _evened(ups: list[Tensor], scales: Sequence[float], *, even: bool) -> list[Tensor]:
    """The matrices of parts whose scales differ, as if all had that of the first; all of one type."""
    made = [scaled(up, scale / scales[0]) for up, scale in zip(ups, scales, strict=True)] if even else ups
    dtype = made[0].dtype
    for tensor in made[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return [tensor.to(dtype) for tensor in made]


def _block_diagonal(blocks: Sequence[Tensor | None], sizes: Sequence[int]) -> Tensor:
    present = [block for block in blocks if block is not None]
    whole = present[0].new_zeros(sum(sizes), sum(block.shape[1] for block in present))
    row = column = 0
    for block, size in zip(blocks, sizes, strict=True):
        if block is not None:
            whole[row : row + size, column : column + block.shape[1]] = block
            column += block.shape[1]
        row += size
    return whole


def _fuse_factors(parts: Sequence[Tensors | None], first: Tensors, sizes: Sequence[int]) -> Tensors:
    """LoKr: only parts that share everything but the rows of the first factor."""
    name, factor = _factor(first, 1)[0], _factor_rows(first, 2)
    rest = {other: tensor for other, tensor in first.items() if other not in (name, LENGTHS)}
    for part in parts:
        if part is not None and not _agree(part, rest, name):
            raise DataError("LoKr that differs between layers that are one there", code="E-NETWORK-KIND")
    if any(size % factor for size in sizes):
        raise DataError(f"LoKr with blocks of {factor} rows can't be part of a larger one", code="E-NETWORK-KIND")
    rows = [
        first[name].new_zeros(size // factor, *first[name].shape[1:]) if part is None else part[name]
        for part, size in zip(parts, sizes, strict=True)
    ]
    return {**rest, name: torch.cat(rows)}


def _agree(part: Tensors, rest: Tensors, name: str) -> bool:
    return part.keys() - {name, LENGTHS} == rest.keys() and all(same(part[other], rest[other]) for other in rest)


# halves in the other order


def are_halves(tensors: Tensors) -> bool:
    """Whether a layer has twice as many outputs as inputs."""
    return rows_of(tensors) == 2 * inputs_of(tensors)


def swapped(tensors: Tensors) -> Tensors:
    """The adapter of a layer whose halves of outputs have changed places. Errors: DataError for an odd number."""
    kind = kind_of(tensors)
    names = [_factor(tensors, 1)[0]] if kind == "lokr" else [up for up, _ in PAIRS[kind]]
    if LENGTHS in tensors and tensors[LENGTHS].shape[0] == rows_of(tensors):
        names.append(LENGTHS)
    if any(tensors[name].shape[0] % 2 for name in names):
        raise DataError(f"{rows_of(tensors)} outputs have no halves", code="E-NETWORK-SHAPE")
    return {**tensors, **{name: torch.cat(tensors[name].chunk(2)[::-1]) for name in names}}
