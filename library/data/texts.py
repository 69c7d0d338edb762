"""Where text outputs are kept: in files beside the images, with a key of all that decides them, or in memory."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from library.data.arrays import DamagedCacheError, read_arrays, write_arrays
from library.data.items import Item
from library.data.latents import FORMAT_VERSION, KEY, base_name, stem_of
from library.log import DataError
from library.types import Cond

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class TextEntry:
    """Text outputs that are kept once, however many items use them."""

    number: int
    caption: str
    name: str
    """An image that has the caption, for messages."""
    paths: tuple[Path, ...] = ()
    """Where to look for them, best place first; they are written to the first."""


class TextStore(Protocol):
    """Text outputs by entry and by item; without a batch axis."""

    @property
    def entries(self) -> Sequence[TextEntry]:
        """Everything that is to be kept."""

    def problem(self, entry: TextEntry) -> str | None:
        """Why an entry has to be computed; None: it is there and right."""

    def save(self, entry: TextEntry, cond: Cond) -> None:
        """Keeps the outputs of an entry."""

    def load(self, index: int) -> Cond:
        """The outputs of an item. Errors: DataError when they aren't there or aren't right."""


class TextMemory:
    """See `TextStore`; one entry for each different caption."""

    def __init__(self, items: Sequence[Item]) -> None:
        numbers: dict[str, int] = {}
        self.entries: list[TextEntry] = []
        for item in items:
            if item.caption not in numbers:
                numbers[item.caption] = len(numbers)
                self.entries.append(TextEntry(numbers[item.caption], item.caption, item.path))
        self._entry_of = [numbers[item.caption] for item in items]
        self._conds: dict[int, Cond] = {}

    def problem(self, entry: TextEntry) -> str | None:
        """Why an entry has to be computed; None: it is there."""
        return None if entry.number in self._conds else "not cached yet"

    def save(self, entry: TextEntry, cond: Cond) -> None:
        """Keeps the outputs of an entry."""
        self._conds[entry.number] = {name: tensor.cpu().clone() for name, tensor in cond.items()}

    def load(self, index: int) -> Cond:
        """The outputs of an item."""
        return self._conds[self._entry_of[index]]


class TextFiles:
    """See `TextStore`; an `.npz` file for each image, which is right when its key agrees: caption, encoder, precision.

    Files of other programs have no key; only `skip_check` trusts them.
    """

    def __init__(
        self, items: Sequence[Item], suffix: str, identity: str, dtype: str = "", *, skip_check: bool = False
    ) -> None:
        self.identity, self.dtype, self.skip_check = identity, dtype, skip_check
        captions: dict[str, set[str]] = defaultdict(set)
        for item in items:
            captions[base_name(item)].add(item.caption)
        numbers: dict[tuple[Path, ...], int] = {}
        self.entries: list[TextEntry] = []
        self._entry_of: list[int] = []
        for item in items:
            paths = _paths(item, suffix, alone=len(captions[base_name(item)]) == 1)
            if paths not in numbers:
                numbers[paths] = len(numbers)
                self.entries.append(TextEntry(numbers[paths], item.caption, item.path, paths))
            self._entry_of.append(numbers[paths])

    def problem(self, entry: TextEntry) -> str | None:
        """Why an entry has to be computed; None: it is there and right, checksums included."""
        if self.skip_check:
            return None if any(path.exists() for path in entry.paths) else "not cached yet"
        problems = [self._read(path, entry)[1] for path in entry.paths]
        if None in problems:
            return None
        return next((problem for problem in problems if problem != "not cached yet"), "not cached yet")

    def _read(self, path: Path, entry: TextEntry) -> tuple[dict[str, Any], str | None]:
        """The arrays of a file without its key, and why it can't be used."""
        try:
            arrays = read_arrays(path)
        except FileNotFoundError:
            return {}, "not cached yet"
        except DamagedCacheError:
            return {}, "damaged file"
        stored = arrays.pop(KEY, None)
        if self.skip_check:
            return dict(arrays), None
        if stored is None:
            return {}, "made by another program"
        try:
            key = json.loads(str(stored))
            same_arrays = sorted(arrays) == key["arrays"]
            changed = [name for name, value in self._expected(entry).items() if key.get(name) != value]
        except (ValueError, KeyError, AttributeError):
            return {}, "damaged file"
        if not same_arrays:
            return {}, "damaged file"
        if changed:
            return {}, "caption changed" if "caption" in changed else "other encoder"
        return dict(arrays), None

    def _expected(self, entry: TextEntry) -> dict[str, Any]:
        return {"version": FORMAT_VERSION, "encoder": self.identity, "dtype": self.dtype, "caption": entry.caption}

    def save(self, entry: TextEntry, cond: Cond) -> None:
        """Writes the outputs of an entry; bfloat16 becomes float32. Errors: ResourceError."""
        arrays = {name: _array(tensor) for name, tensor in cond.items()}
        key = {**self._expected(entry), "arrays": sorted(arrays)}
        write_arrays(entry.paths[0], {**arrays, KEY: np.array(json.dumps(key))})

    def load(self, index: int) -> Cond:
        """The outputs of an item. Errors: DataError when they aren't there or aren't right."""
        entry = self.entries[self._entry_of[index]]
        for path in entry.paths:
            arrays, problem = self._read(path, entry)
            if problem is None:
                return {name: torch.from_numpy(array) for name, array in arrays.items()}
        hint = "leave --skip_cache_check out" if self.skip_check else "start again: it will be encoded anew"
        what = "cached text outputs are missing, damaged or of other settings"
        raise DataError(what, str(entry.paths[0]), hint, code="E-CACHE")


def stacked(rows: Sequence[Mapping[str, Tensor]]) -> Cond:
    """Outputs of several captions with a batch axis."""
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def _paths(item: Item, suffix: str, *, alone: bool) -> tuple[Path, ...]:
    if not alone:
        digest = hashlib.sha256(item.caption.encode()).hexdigest()[:8]
        return (Path(f"{item.path}_{digest}{suffix}"),)
    plain, named = Path(stem_of(item.path) + suffix), Path(item.path + suffix)
    return (named, plain) if item.shares_stem else (plain, named)


def _array(tensor: Tensor) -> np.ndarray[Any, np.dtype[Any]]:
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
