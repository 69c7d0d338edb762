"""Whether two adapter files do the same: what each does to a weight is computed from its own tensors, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from networks import rotation_layouts
from networks.layout_files import Adapter, Place
from networks.layouts import FACTORS, LENGTHS, Row
from networks.regrouping import are_halves, sizes_of
from networks.rotation_layouts import Part
from networks.scaling import PAIRS, Tensors, kind_of, scale_of


def largest_error(one: Adapter, other: Adapter) -> tuple[float, float]:
    """The largest difference between what both do to a weight, and the largest change; inf: of another weight."""
    error = size = 0.0
    if one.modules.keys() != other.modules.keys():
        return float("inf"), size
    for place, units in one.modules.items():
        ours, theirs = _changes(units, one.row, place), _changes(other.modules[place], other.row, place)
        if ours.keys() != theirs.keys():
            return float("inf"), size
        for index, change in ours.items():
            error = max(error, float((change - theirs[index]).abs().max()))
            size = max(size, float(change.abs().max()))
    return error, size


def _changes(units: list[Tensors | None], row: Row, place: Place) -> dict[int, Tensor]:
    """By layer, as they are fused in the model of the authors; layers that aren't changed are left out."""
    count = len(place[1].diffusers)
    first = next(unit for unit in units if unit is not None)
    if kind_of(first) == "oft":
        parts = rotation_layouts.parts_of(units, row, count)
        turns = {index: _rotation(part) for index, part in enumerate(parts) if part is not None}
        return {index: turn for index, turn in turns.items() if count == 1 or turn.count_nonzero()}
    found = {index: delta(unit) for index, unit in enumerate(units) if unit is not None}
    if row.fused and count > 1:
        found = dict(enumerate(found[0].split_with_sizes(sizes_of(first, count))))
    elif place[1].swapped and not row.fused and are_halves(first):
        found = {0: torch.cat(found[0].chunk(2)[::-1])}
    return {index: change for index, change in found.items() if count == 1 or change.count_nonzero()}


def delta(unit: Tensors) -> Tensor:
    """The change of a weight (outputs, inputs), with lengths of rows as another column; those of columns multiplied."""
    kind = kind_of(unit)
    if kind == "lokr":
        change = _kronecker(unit)
    elif kind == "loha":
        products = [_product(unit, number) for number in (1, 2)]
        change = products[0] * products[1]
    else:
        up, down = (unit[name].double() for name in PAIRS[kind][0])
        middle = unit.get(FACTORS[2])
        if middle is not None:
            down = torch.einsum("ij...,jk->ik...", middle.double(), down.flatten(1))
        change = up.flatten(1) @ down.flatten(1)
    change = change.flatten(1) * scale_of(unit)
    lengths = unit.get(LENGTHS)
    if lengths is None:
        return change
    lengths = lengths.double()
    if lengths.shape[0] == change.shape[0]:
        return torch.cat([change, lengths.reshape(-1, 1)], dim=1)
    return change * lengths.reshape(1, -1).repeat_interleave(change.shape[1] // lengths.numel(), dim=1)


def _product(unit: Tensors, number: int) -> Tensor:
    left, right = (unit[f"hada_w{number}_{half}"].double() for half in "ab")
    core = unit.get(f"hada_t{number}")
    made: Tensor = left @ right if core is None else torch.einsum("ij...,jr,ip->pr...", core.double(), right, left)
    return made


def _kronecker(unit: Tensors) -> Tensor:
    first, second = (_factor(unit, number) for number in (1, 2))
    return torch.kron(first.reshape(*first.shape, *[1] * (second.ndim - 2)), second)


def _factor(unit: Tensors, number: int) -> Tensor:
    name = f"lokr_w{number}"
    if name in unit:
        return unit[name].double()
    left, right = unit[f"{name}_a"].double(), unit[f"{name}_b"].double()
    core = unit.get("lokr_t2") if number == 2 else None
    if core is not None:
        made: Tensor = torch.einsum("ij...,ip,jr->pr...", core.double(), left, right)
        return made
    return (left @ right.flatten(1)).reshape(left.shape[0], *right.shape[1:])


def _rotation(part: Part) -> Tensor:
    """What the rotation moves: `R - I`, and the scales of outputs beside it."""
    blocks = part.blocks.double()
    skew = blocks - blocks.transpose(1, 2)
    norm = float(skew.norm())
    if part.ratio is not None and norm > part.ratio * part.outputs:
        skew = skew * (part.ratio * part.outputs / norm)
    one = torch.eye(blocks.shape[1], dtype=torch.float64)
    turn: Tensor = (torch.linalg.solve(one - skew, one + skew) - one).flatten(1)
    if part.rescale is None:
        return turn
    return torch.cat([turn, part.rescale.double().reshape(len(turn), -1)], dim=1)
