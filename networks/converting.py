"""Adapters from one layout into another without loss.

What the new layout can't say (the type of alpha, a matrix that two layers shared) is noted in the metadata, so that the
way back gives the same file to the bit. The note is believed only where converting again gives what it is read beside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from library.log import DataError
from library.progress import Progress
from networks import regrouping, rotation_layouts
from networks.conversion_notes import Note, metadata_of
from networks.layout_files import Adapter, Place, Spelled
from networks.layouts import DENOISER, FACTORS, KINDS, LAYOUTS, ROWS, Row
from networks.scaling import (
    PAIRS,
    Fact,
    Tensors,
    all_same,
    alpha_like,
    alpha_of,
    fact_of,
    folded,
    kind_of,
    rank_of,
    types_of,
    unfolded,
    unscaled,
    with_alpha,
)

Units = list[Tensors | None]


@dataclass
class Result:
    """A conversion that was done."""

    adapter: Adapter
    metadata: dict[str, str]
    counts: dict[tuple[str, str], int]
    """Modules by component and kind."""
    rounded: list[str]
    """Modules that the way back gives with other bits."""
    hashed: bool = True


def converted(source: Adapter, target: Row, metadata: Mapping[str, str], where: str) -> Result:
    """The adapter in another layout.

    Errors: DataError when a kind of network isn't known there, or a module can't be written.
    """
    note = Note.read(metadata)
    back = note if note and (note.layout, note.family) == (target.layout, target.family) else None
    result = Adapter(target)
    if back:
        result.spelled = Spelled(dict(back.starts), dict(back.tensors))
    mlp = _mlp_width(source)
    facts: dict[str, Fact] = {}
    counts: dict[tuple[str, str], int] = {}
    rounded = []
    require_known(source, target, where)
    for place, units in tracked("converting", source.modules, "modules"):
        step = _Step(source.row, target, place, mlp)
        fact = back.facts.get(place_key(place), back.facts.get("*")) if back else None
        try:
            made = (step.back(units, fact) if fact else None) or step.forward(units)
            plain = step.reverse().forward(made)
        except DataError as error:
            raise _placed(error, source, target, place, units, where) from error
        if not _same(plain, units):
            facts[place_key(place)] = step.fact(units)
            if not _same(step.reverse().back(made, facts[place_key(place)]) or plain, units):
                rounded.append(place_key(place))
        result.modules[place] = made
        kind = next(kind_of(unit) for unit in units if unit is not None)
        counts[place[0], kind] = counts.get((place[0], kind), 0) + 1
    kept, hashed = metadata_of(source, metadata, note, back, facts, map(place_key, result.modules))
    if back and back.peft:
        _drop_alpha(result)
    return Result(result, kept, counts, rounded, hashed)


def require_known(source: Adapter, target: Row, where: str) -> None:
    """Errors: DataError when the file has modules of a kind that a layout doesn't know."""
    for place, units in source.modules.items():
        for index, unit in enumerate(units):
            try:
                kind = kind_of(unit) if unit is not None else target.kinds[0]
            except DataError as error:
                raise DataError(f"{source.layer(place, index)}: {error.what}", where, code=error.code) from error
            if kind not in target.kinds:
                rows = [ROWS[layout, target.family] for layout in LAYOUTS]
                knowing = [row.layout for row in rows if kind in row.kinds and row != source.row]
                what = f"{LAYOUTS[target.layout]} knows no {KINDS[kind]}, as {source.layer(place, index)} is"
                raise DataError(what, where, f"give --to {' or '.join(knowing)}", code="E-NETWORK-KIND")


def _placed(error: DataError, source: Adapter, target: Row, place: Place, units: Units, where: str) -> DataError:
    index = next(index for index, unit in enumerate(units) if unit is not None)
    hint = error.hint
    if not hint and error.code == "E-NETWORK-KIND":
        kind = next(kind_of(unit) for unit in units if unit is not None)
        rows = [ROWS[layout, source.row.family] for layout in LAYOUTS]
        names = [row.layout for row in rows if kind in row.kinds and row not in (source.row, target)]
        hint = f"try --to {' or '.join(names)}"
    return DataError(f"{source.layer(place, index)}: {error.what}", where, hint, code=error.code)


def place_key(place: Place) -> str:
    """What notes call a module."""
    return f"{place[0]}.{place[1].own}"


def _same(one: Units, other: Units) -> bool:
    """Whether units are the same to the bit."""
    pairs = zip(one, other, strict=True)
    return len(one) == len(other) and all(a is b or (a and b and all_same(a, b)) for a, b in pairs)


def tracked(what: str, modules: Mapping[Place, Units], unit: str) -> Iterator[tuple[Place, Units]]:
    """The modules, with a sign of life."""
    with Progress(what, len(modules), unit) as progress:
        for item in modules.items():
            yield item
            progress.advance()


# one module


@dataclass(frozen=True)
class _Step:
    source: Row
    target: Row
    place: Place
    mlp: int | None

    @property
    def count(self) -> int:
        """The layers that the module is in Diffusers."""
        return len(self.place[1].diffusers)

    def reverse(self) -> _Step:
        return _Step(self.target, self.source, self.place, self.mlp)

    def forward(self, units: Units) -> Units:
        """The units in the other layout, by rules alone."""
        if self._turns(units):
            if self.place[1].swapped and self.source.fused != self.target.fused:
                what = "OFT of a layer whose outputs may be in another order there"
                raise DataError(what, code="E-NETWORK-KIND")
            return rotation_layouts.regrouped(units, self.source, self.target, self.count)
        made = self._grouped(units)
        if self.target.folded:
            return _each(made, folded)
        return _each(made, with_alpha) if self.target.needs_alpha else made

    def fact(self, units: Units) -> Fact:
        """What `back` has to know of them."""
        facts = [None if unit is None else fact_of(unit) for unit in units]
        shared = False
        if not self._turns(units) and self.count > 1 and kind_of(first := _first(units)) != "lokr":
            down = PAIRS[kind_of(first)][0][1]
            own = [unit[down] for unit in units if unit is not None]
            if self.source.fused:
                sizes = regrouping.sizes_of(first, self.count)
                parts = regrouping.split(first, sizes)
                shared = parts[0][down].shape == own[0].shape
            elif not self.target.fused:
                shared = False
            else:
                whole = regrouping.fuse(units, self._sizes(units))
                shared = whole[down].shape == own[0].shape and len(own) > 1
        return {"units": facts, **({"shared": True} if shared else {})}

    def back(self, units: Units, fact: Fact) -> Units | None:
        """The units as a fact tells that they were; None: they can't have been so."""
        try:
            made = self._turned_back(units, fact) if self._turns(units) else self._regrouped_back(units, fact)
            return made if _same(self.reverse().forward(made), units) else None
        except (DataError, KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError):
            return None  # the note isn't of this file

    def _turns(self, units: Units) -> bool:
        return kind_of(_first(units)) == "oft"

    def _grouped(self, units: Units, fact: Fact | None = None) -> Units:
        """As many units as the other layout has; the reverse order of halves in it."""
        if self.source.fused == self.target.fused:
            return list(units)
        if self.place[1].swapped and regrouping.are_halves(_first(units)):
            return _each(units, regrouping.swapped)
        if self.count == 1:
            return list(units)
        if self.source.fused:
            whole = _first(units)
            ranks = None if fact is None else [0 if fact.get("shared") else _rank(each) for each in fact["units"]]
            if ranks and not fact_is_regular(ranks, rank_of(whole)):
                ranks = None
            return list(regrouping.split(whole, regrouping.sizes_of(whole, self.count), ranks))
        return [regrouping.fuse(units, self._sizes(units), shared=None if fact is None else bool(fact.get("shared")))]

    def _sizes(self, units: Units) -> list[int]:
        """The outputs of each layer, from what there is of them."""
        width = regrouping.inputs_of(_first(units))
        usual = [width, width, width, self.mlp or regrouping.MLP_RATIO * width][: len(units)]
        return [usual[i] if unit is None else regrouping.rows_of(unit) for i, unit in enumerate(units)]

    def _regrouped_back(self, units: Units, fact: Fact) -> Units:
        facts = fact["units"]
        if self.source.folded:
            units = [unit and self._unfolded(unit, index, fact) for index, unit in enumerate(units)]
        made = self._grouped(units, fact)
        scales = [None if each is None else _scale(each) for each in facts]
        first = next(scale for scale in scales if scale)
        for index, (unit, own, scale) in enumerate(zip(made, facts, scales, strict=True)):
            if own is None or unit is None or scale is None:
                made[index] = None
                continue
            names = PAIRS.get(kind_of(unit), ((None, None),))[0]
            types, restored = types_of(own, unit), {}
            for name, tensor in unit.items():
                if name != "alpha":
                    factor = scale / first if name == names[0] and self.source.fused != self.target.fused else 1.0
                    restored[name] = unscaled(tensor, factor, types[name]) if factor != 1 else tensor.to(types[name])
            alpha = alpha_of(own)
            made[index] = restored if alpha is None else {**restored, "alpha": alpha}
        return made

    def _unfolded(self, unit: Tensors, index: int, fact: Fact) -> Tensors:
        """With the alpha that it had before it was folded."""
        own = fact["units"][index if len(fact["units"]) > 1 else 0]
        alpha = own and alpha_of(own)
        if own is None or alpha is None:
            return unit
        rank = unit[FACTORS[0]].shape[0]
        if rank != own["rank"]:
            alpha = alpha_like(alpha, float(alpha) * rank / own["rank"])
        return unfolded(unit, alpha, types_of(own, unit))

    def _turned_back(self, units: Units, fact: Fact) -> Units:
        made = rotation_layouts.regrouped(units, self.source, self.target, self.count)
        for index, (unit, own) in enumerate(zip(made, fact["units"], strict=True)):
            if unit is None or own is None:
                made[index] = None
                continue
            rest, alpha = {name: tensor for name, tensor in unit.items() if name != "alpha"}, alpha_of(own)
            made[index] = rest if alpha is None else {**rest, "alpha": alpha}
        return made


def fact_is_regular(ranks: list[int], whole: int | None) -> bool:
    """Whether parts of these ranks make up the whole, or share its matrices."""
    return not any(ranks) or sum(ranks) == whole


def _first(units: Units) -> Tensors:
    return next(unit for unit in units if unit is not None)


def _each(units: Units, change: Callable[[Tensors], Tensors]) -> Units:
    return [None if unit is None else change(unit) for unit in units]


def _rank(fact: Fact | None) -> int:
    return int(fact["rank"] or 0) if fact else 0


def _scale(fact: Fact) -> float:
    return fact["alpha"][0] / fact["rank"] if "alpha" in fact and fact["rank"] else 1.0


def _mlp_width(source: Adapter) -> int | None:
    """The width of FLUX's MLP in single blocks, where a file shows it; in that of Diffusers it may have to be known."""
    for (component, module), units in source.modules.items():
        if component != DENOISER or source.row.fused or not module.own.startswith("single_blocks."):
            continue
        unit = units[-1]
        if unit is None or kind_of(unit) == "oft":
            continue
        if module.own.endswith(".linear1"):
            return regrouping.rows_of(unit)
        if module.own.endswith(".linear2"):
            return regrouping.inputs_of(unit) - regrouping.rows_of(unit)
    return None


def _drop_alpha(adapter: Adapter) -> None:
    """Leaves to metadata what they say."""
    for units in adapter.modules.values():
        for unit in units:
            if unit is not None:
                unit.pop("alpha", None)
