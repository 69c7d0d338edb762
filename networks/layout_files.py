"""Adapter files of any layout, read into modules and written from them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

from library.log import DataError
from networks import reading
from networks.adapter_file import check_finite
from networks.layouts import DENOISER, FACTORS, FAMILIES, LAYOUTS, LENGTHS, ROWS, Module, Row, Unit, blocks_of, modern
from networks.scaling import Tensors, rank_of

PEFT_KEY = "lora_adapter_metadata"
"""Where Diffusers keeps what PEFT has to know of a file, alpha among it."""
_TEXT_WIDTHS = {768: "sd1", 1024: "sd2", 2048: "sdxl"}
_WIDTHS = {1536: "sd3", 2432: "sd3", 3072: "flux"}
"""Of transformers whose layers have the same names in Diffusers."""

Place = tuple[str, Module]
"""A module and its component."""


@dataclass
class Spelled:
    """Which of the names that a layout knows a file uses, where it isn't those that are written by default."""

    starts: dict[str, str] = field(default_factory=dict)
    """By component."""
    tensors: dict[str, str] = field(default_factory=dict)


@dataclass
class Adapter:
    """The tensors of a file by what they belong to."""

    row: Row
    modules: dict[Place, list[Tensors | None]] = field(default_factory=dict)
    """One unit, or one for each of the layers that a module is in Diffusers; None: it isn't changed."""
    spelled: Spelled = field(default_factory=Spelled)

    def layer(self, place: Place, index: int) -> str:
        """What a layer is called in the file."""
        component, module = place
        return self.row.name(component, self.row.paths(module)[index], start=self.spelled.starts.get(component))


class Parsed(dict[str, tuple[Unit, str]]):
    """Keys of a file, and what they mean: a layer, and which of its tensors; `unknown`: keys without a meaning."""

    def __init__(self, row: Row, keys: Iterable[str]) -> None:
        super().__init__()
        keys = list(keys)
        names, ends = _names(row, blocks_of(keys)), _ends(row)
        self.row = row
        self.unknown: list[str] = []
        self.spelled = Spelled()
        for key in keys:
            found = _parse(modern(key), names, ends)
            if found is None:
                self.unknown.append(key)
                continue
            name, end, unit = found
            self[key] = unit, ends[end]
            self._note(name, end, unit)

    def _note(self, name: str, end: str, unit: Unit) -> None:
        path = self.row.paths(unit.module)[unit.layer].replace(".", self.row.joiner)
        start, usual = name.removesuffix(path), self.row.starts[unit.component]
        if start != usual[0] and start in usual:
            self.spelled.starts[unit.component] = start
        tensor = _ends(self.row)[end]
        if end != self.row.spelling[tensor][0]:
            self.spelled.tensors[tensor] = end


def _parse(key: str, names: Mapping[str, Unit], ends: Mapping[str, str]) -> tuple[str, str, Unit] | None:
    at = len(key)
    for _ in range(4):  # names of tensors have up to four parts
        at = key.rfind(".", 0, at)
        if at < 0:
            return None
        if key[at + 1 :] in ends and key[:at] in names:
            return key[:at], key[at + 1 :], names[key[:at]]
    return None


@cache
def _rows() -> dict[str, Row]:
    return {f"{row.layout} {row.family}": row for row in ROWS.values()}


def _names(row: Row, blocks: int) -> dict[str, Unit]:
    return _cached_names(f"{row.layout} {row.family}", blocks)


@cache
def _cached_names(row: str, blocks: int) -> dict[str, Unit]:
    return _rows()[row].names(blocks)


def _ends(row: Row) -> dict[str, str]:
    return {end: tensor for tensor, ends in row.spelling.items() for end in ends}


# reading


def recognised(
    shapes: Mapping[str, tuple[int, ...]], where: str, *, layout: str | None = None, family: str | None = None
) -> Parsed:
    """What the keys of a file mean.

    Args:
        shapes: of the tensors.
        where: the file, for messages.
        layout: the only one to try.
        family: the only one to try.

    Errors: DataError when there are keys that belong to no module of a layout.
    """
    if not shapes:
        raise DataError("there are no tensors in it", where, "give an adapter file", code="E-NETWORK-FILE")
    order = [(each, of) for each in LAYOUTS for of in FAMILIES]
    wanted = [pair for pair in order if layout in (None, pair[0]) and family in (None, pair[1])]
    tried = [Parsed(ROWS[pair], shapes) for pair in wanted]
    fitting = [parsed for parsed in tried if not parsed.unknown]
    likely = [parsed for parsed in fitting if _widths_fit(parsed, shapes)] or fitting
    if likely:
        return likely[0]
    best = min(tried, key=lambda parsed: len(parsed.unknown))
    raise _unknown(best, shapes, where)


def _widths_fit(parsed: Parsed, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether the text that layers look at, or the model, is as wide as in the family, where that shows."""
    for key, (unit, tensor) in parsed.items():
        width = shapes[key][1] if tensor in (FACTORS[0], "hada_w1_b") and len(shapes[key]) > 1 else 0
        path = unit.module.diffusers[0]
        text = path.endswith(("attn2.to_k", "attn2.to_v")) or (unit.component == "clip" and ".self_attn." in path)
        if text and width in _TEXT_WIDTHS:
            return _TEXT_WIDTHS[width] == parsed.row.family
        if unit.component == DENOISER and path.endswith((".attn.to_q", ".attn.add_q_proj")) and width in _WIDTHS:
            return _WIDTHS[width] == parsed.row.family
    return True


def _unknown(best: Parsed, shapes: Mapping[str, tuple[int, ...]], where: str) -> DataError:
    named = ", ".join(best.unknown[:3])
    empty = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    if not best:
        what = f"no layout has keys such as {named}"
        return DataError(what, where, reading.describe(empty), code="E-NETWORK-FILE")
    more = "" if len(best.unknown) <= 3 else f" and {len(best.unknown) - 3} more"
    what = f"{len(best)} of {len(shapes)} keys are those of {_title(best.row)}, but not {named}{more}"
    return DataError(what, where, reading.describe(empty), code="E-NETWORK-FILE")


def _title(row: Row) -> str:
    return f"{LAYOUTS[row.layout]} for {FAMILIES[row.family]}"


def read(tensors: Mapping[str, Tensor], parsed: Parsed, where: str, peft: str | None = None) -> Adapter:
    """The modules of a file.

    Args:
        tensors: those of the file.
        parsed: from `recognised`.
        where: the file, for messages.
        peft: value of `PEFT_KEY` in its metadata.

    Errors: DataError for a value that isn't finite, and for two names of one tensor.
    """
    adapter = Adapter(parsed.row, spelled=parsed.spelled)
    for key, (unit, name) in parsed.items():
        tensor = tensors[key]
        check_finite(tensor, key, where)
        units = adapter.modules.setdefault((unit.component, unit.module), [None] * _count(parsed.row, unit.module))
        found = units[unit.layer] or {}
        units[unit.layer] = found
        if name in found:
            raise DataError(f"{key} is there twice, under two names", where, code="E-NETWORK-FILE")
        found[name] = tensor
    if parsed.row.peft:
        for unit_of_file in _units(adapter):
            _set_lengths(unit_of_file, peft=False)
    if peft is not None and parsed.row.folded:
        for (place, index), unit_of_file in _layers(adapter):
            part = parsed.row.starts[place[0]][0].partition(".")[0]
            alpha = peft_alpha(peft, part, parsed.row.paths(place[1])[index], rank_of(unit_of_file))
            if alpha is not None:
                unit_of_file.setdefault("alpha", alpha)
    return adapter


def _count(row: Row, module: Module) -> int:
    return len(row.paths(module))


def _units(adapter: Adapter) -> Iterator[Tensors]:
    for _, unit in _layers(adapter):
        yield unit


def _layers(adapter: Adapter) -> Iterator[tuple[tuple[Place, int], Tensors]]:
    for place, units in adapter.modules.items():
        for index, unit in enumerate(units):
            if unit is not None:
                yield (place, index), unit


def _set_lengths(unit: Tensors, *, peft: bool) -> None:
    """Lengths in the shape that PEFT has them in: without axes for a matrix, or in LyCORIS."""
    lengths = unit.get(LENGTHS)
    if lengths is None:
        return
    down = unit.get(FACTORS[0])
    axes = lengths.ndim if down is None else down.ndim
    if not peft:
        unit[LENGTHS] = lengths.reshape(-1, *[1] * (axes - 1))
    elif lengths.shape[0] == lengths.numel():
        unit[LENGTHS] = lengths.reshape(-1) if axes == 2 else lengths.reshape(1, -1, *[1] * (axes - 2))
    else:
        raise DataError("the lengths of DoRA are those of columns, which PEFT doesn't know", code="E-NETWORK-KIND")


def peft_alpha(text: str, part: str, path: str, rank: int | None) -> Tensor | None:
    """The alpha of a layer by what Diffusers wrote of its part of the pipeline; None: it says nothing."""
    try:
        facts = json.loads(text)
        own = {key.partition(".")[2]: value for key, value in facts.items() if key.startswith(f"{part}.")}
        alpha = own.get("lora_alpha")
        for pattern, value in (own.get("alpha_pattern") or {}).items():
            if re.fullmatch(rf"(.*\.)?({pattern})", path):
                alpha = value
                break
        if alpha is None or not rank:
            return None
        return torch.tensor(float(alpha) * math.sqrt(rank) if own.get("use_rslora") else float(alpha))
    except (ValueError, TypeError, AttributeError, re.error):
        return None


# writing


def keys_of(adapter: Adapter, layer: str, unit: Tensors) -> dict[str, Tensor]:
    """The tensors of a layer under their keys in the file. Errors: DataError when the layout has no name for one."""
    made = dict(unit)
    if adapter.row.peft:
        _set_lengths(made, peft=True)
    spelling = {**{name: ends[0] for name, ends in adapter.row.spelling.items() if ends}, **adapter.spelled.tensors}
    if missing := sorted(made.keys() - spelling.keys()):
        raise DataError(f"{missing[0]} has no name there", code="E-NETWORK-KIND")
    return {f"{layer}.{spelling[name]}": tensor for name, tensor in made.items()}


def written(adapter: Adapter) -> dict[str, Tensor]:
    """All tensors of a file. Errors: DataError when the layout has no name for one."""
    tensors: dict[str, Tensor] = {}
    for (place, index), unit in _layers(adapter):
        layer = adapter.layer(place, index)
        if adapter.row.layout == "kohya" and any(name.startswith("oft_") for name in unit):
            layer = adapter.row.name(place[0], adapter.row.paths(place[1])[index], oft=True)
        tensors |= keys_of(adapter, layer, unit)
    return tensors
