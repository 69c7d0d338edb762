"""Where text outputs are kept: in files with a key of all that decides them, or in memory."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from library.data.arrays import (
    DAMAGED,
    FORMAT_VERSION,
    KEY,
    NOT_CACHED,
    Array,
    Arrays,
    DamagedCacheError,
    first_problem,
    narrowed,
    read_arrays,
    widened,
    write_arrays,
)
from library.data.cache_names import CacheNames
from library.data.caption_cache import TEXT_SEED, texts_to_cache
from library.data.items import Item
from library.log import DataError
from library.types import Cond

if TYPE_CHECKING:
    from torch import Tensor

HIDDEN = (("t5_out", "t5_attn_mask", "apply_t5_attn_mask"),)
"""Outputs, the mask of their rows, and whether rows that it hides are never looked at."""


@dataclass(frozen=True, slots=True)
class TextEntry:
    """Text outputs that are kept once, however many items use them."""

    number: int
    text: str
    item: Item
    """One that has the text."""
    names: CacheNames = field(default_factory=CacheNames)
    suffix: str = ""
    own: bool = True
    """Whether they lie in the item's own file."""
    further: bool = False
    """Whether the item has another text that comes first."""

    @property
    def name(self) -> str:
        """The image, for messages."""
        return self.item.path

    @property
    def paths(self) -> tuple[Path, ...]:
        """Where to look for them, best place first; they are written to the first."""
        if self.own:
            return self.names.usual(self.item, self.suffix)
        shared = self.names.shared(self.item, self.text, self.suffix)
        return shared if self.further else (*shared, *self.names.usual(self.item, self.suffix))


class TextStore(Protocol):
    """Text outputs by entry, and by item and text; without a batch axis."""

    @property
    def entries(self) -> Sequence[TextEntry]:
        """Everything that is to be kept."""

    def problem(self, entry: TextEntry) -> str | None:
        """Why an entry has to be computed; None: it is there and right."""

    def save(self, entry: TextEntry, cond: Cond) -> None:
        """Keeps the outputs of an entry."""

    def load(self, index: int, text: str) -> Cond:
        """The outputs of one of an item's texts. Errors: DataError when they aren't there or aren't right."""


def _texts(items: Sequence[Item], variants: int) -> list[tuple[str, ...]]:
    """The texts of each item; those of equal captions of a subset are found once."""
    known: dict[tuple[int, str], tuple[str, ...]] = {}
    texts = []
    for item in items:
        key = (id(item.subset), item.caption)
        if key not in known:
            known[key] = texts_to_cache(item.caption, item.subset, variants, TEXT_SEED)
        texts.append(known[key])
    return texts


class TextMemory:
    """See `TextStore`; one entry for each different text."""

    def __init__(self, items: Sequence[Item], *, variants: int = 0) -> None:
        self._numbers: dict[str, int] = {}
        self.entries: list[TextEntry] = []
        for item, texts in zip(items, _texts(items, variants), strict=True):
            for text in texts:
                if text not in self._numbers:
                    self._numbers[text] = len(self.entries)
                    self.entries.append(TextEntry(len(self.entries), text, item))
        self._conds: dict[int, Cond] = {}

    def problem(self, entry: TextEntry) -> str | None:
        """Why an entry has to be computed; None: it is there."""
        return None if entry.number in self._conds else NOT_CACHED

    def save(self, entry: TextEntry, cond: Cond) -> None:
        """Keeps the outputs of an entry."""
        self._conds[entry.number] = {name: tensor.cpu().clone() for name, tensor in cond.items()}

    def load(self, index: int, text: str) -> Cond:
        """The outputs of a text."""
        return self._conds[self._numbers[text]]


class TextFiles:
    """See `TextStore`; `.npz` files, which are right when their key agrees: text, encoder, precision.

    The first text of an image lies in the image's own file; texts that images of a folder share, and all further
    texts, lie in files of their own, once each. Files of other programs have no key; only
    `skip_check` trusts them.
    """

    def __init__(
        self,
        items: Sequence[Item],
        suffix: str,
        identity: str,
        dtype: str = "",
        *,
        skip_check: bool = False,
        names: CacheNames | None = None,
        variants: int = 0,
        compact: bool = False,
    ) -> None:
        self.identity, self.dtype, self.skip_check, self.compact = identity, dtype, skip_check, compact
        names = names or CacheNames()
        self._numbers: dict[tuple[str, str], int] = {}
        self._places = [(os.path.dirname(item.path), names.base(item)) for item in items]  # noqa: PTH120 - many items
        self.entries: list[TextEntry] = []
        texts_of = _texts(items, variants)
        own = _own_texts(self._places, texts_of)
        for item, (folder, base), texts in zip(items, self._places, texts_of, strict=True):
            for text in texts:
                mine = own.get(base) == text
                place = base if mine else folder
                if (place, text) in self._numbers:
                    continue
                self._numbers[place, text] = len(self.entries)
                entry = TextEntry(len(self.entries), text, item, names, suffix, mine, text != texts[0])
                self.entries.append(entry)

    def problem(self, entry: TextEntry) -> str | None:
        """Why an entry has to be computed; None: it is there and right, checksums included."""
        if self.skip_check:
            return None if any(path.exists() for path in entry.paths) else NOT_CACHED
        return first_problem(self._read(path, entry)[1] for path in entry.paths)

    def _read(self, path: Path, entry: TextEntry) -> tuple[Arrays, str | None]:
        """The arrays of a file without its key, and why it can't be used."""
        try:
            arrays = read_arrays(path)
        except FileNotFoundError:
            return {}, NOT_CACHED
        except DamagedCacheError:
            return {}, DAMAGED
        stored = arrays.pop(KEY, None)
        if stored is None:
            return (arrays, None) if self.skip_check else ({}, "made by another program")
        try:
            key = json.loads(str(stored))
            same_arrays = sorted(arrays) == key["arrays"]
            changed = [name for name, value in self._expected(entry).items() if key.get(name) != value]
            narrow = key.get("bf16", [])
        except (ValueError, KeyError, AttributeError):
            return {}, DAMAGED
        if not same_arrays:
            return {}, DAMAGED
        if changed and not self.skip_check:
            return {}, "caption changed" if "caption" in changed else "other encoder"
        if narrow and not self.compact and not self.skip_check:
            return {}, "stored compactly"
        return {name: widened(array) if name in narrow else array for name, array in arrays.items()}, None

    def _expected(self, entry: TextEntry) -> dict[str, Any]:
        return {"version": FORMAT_VERSION, "encoder": self.identity, "dtype": self.dtype, "caption": entry.text}

    def save(self, entry: TextEntry, cond: Cond) -> None:
        """Writes the outputs of an entry; bfloat16 becomes float32. Errors: ResourceError."""
        arrays: Arrays = {name: _array(tensor) for name, tensor in cond.items()}
        key = {**self._expected(entry), "arrays": sorted(arrays)}
        if self.compact:
            _hide(arrays)
            key["bf16"] = sorted(name for name, array in arrays.items() if array.dtype.kind == "f")
            arrays = {name: narrowed(array) for name, array in arrays.items()}
        write_arrays(entry.paths[0], {**arrays, KEY: np.array(json.dumps(key))}, compressed=self.compact)

    def load(self, index: int, text: str) -> Cond:
        """The outputs of one of an item's texts. Errors: DataError when they aren't there or aren't right."""
        folder, base = self._places[index]
        number = self._numbers.get((base, text))
        entry = self.entries[self._numbers[folder, text] if number is None else number]
        for path in entry.paths:
            arrays, problem = self._read(path, entry)
            if problem is None:
                return {name: torch.from_numpy(array) for name, array in arrays.items()}
        hint = "leave --skip_cache_check out" if self.skip_check else "start again: it will be encoded anew"
        what = "cached text outputs are missing, damaged or of other settings"
        raise DataError(what, str(entry.paths[0]), hint, code="E-CACHE")


def _own_texts(places: Sequence[tuple[str, str]], texts_of: Sequence[tuple[str, ...]]) -> dict[str, str]:
    """The text that lies in an image's own file, by base; none where other images need it, too."""
    first: dict[str, str] = {}
    users: dict[tuple[str, str], str | None] = {}
    for (folder, base), texts in zip(places, texts_of, strict=True):
        first.setdefault(base, texts[0])
        for text in texts:
            if users.setdefault((folder, text), base) != base:
                users[folder, text] = None
    folders = {base: folder for folder, base in places}
    return {base: text for base, text in first.items() if users[folders[base], text] == base}


def stacked(rows: Sequence[Mapping[str, Tensor]]) -> Cond:
    """Outputs of several captions with a batch axis."""
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def _hide(arrays: Arrays) -> None:
    """Zeros what nobody looks at, which takes no room."""
    for name, mask, hides in HIDDEN:
        if name in arrays and bool(arrays.get(hides, np.array(False))):
            arrays[name] = np.where(arrays[mask][:, None] != 0, arrays[name], arrays[name].dtype.type(0))


def _array(tensor: Tensor) -> Array:
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
