"""Where latents are kept: in files beside the images, with a key of all that decides them, or in memory."""

from __future__ import annotations

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from library.data.arrays import DamagedCacheError, read_arrays, write_arrays
from library.data.items import Item
from library.files import sha256
from library.log import DataError
from library.randomness import mix
from library.types import Traits

if TYPE_CHECKING:
    from torch import Tensor

FORMAT_VERSION = 1
KEY = "cache_key"


@dataclass(frozen=True, slots=True)
class LatentsEntry:
    """Latents that are computed once, however many items use them."""

    number: int
    item: Item
    """One of those that use them."""
    mirrored: bool
    """Whether those of the mirrored image are needed, too."""
    paths: tuple[Path, ...] = ()
    """Where to look for them, best place first; they are written to the first."""


class LatentsStore(Protocol):
    """Latents by entry and by item."""

    @property
    def entries(self) -> Sequence[LatentsEntry]:
        """Everything that is to be kept."""

    def problem(self, entry: LatentsEntry) -> str | None:
        """Why an entry has to be computed; None: it is there and right."""

    def save(self, entry: LatentsEntry, latents: Tensor, mirrored: Tensor | None) -> None:
        """Keeps the latents (C, h, w) of an entry."""

    def load(self, index: int, mirrored: bool) -> Tensor:
        """The latents (C, h, w) of an item. Errors: DataError when they aren't there or aren't right."""

    def digest(self, entry: LatentsEntry) -> str:
        """The hash of the content of the entry's image."""


class _Digests:
    """Hashes of image files, each computed once."""

    def __init__(self) -> None:
        self._known: dict[str, str] = {}

    def __call__(self, path: str) -> str:
        if path not in self._known:
            self._known[path] = sha256(path)
        return self._known[path]


def _geometry(item: Item) -> dict[str, Any]:
    """What becomes of the image before it is encoded."""
    given = item.assignment
    return {
        "bucket": list(given.bucket),
        "resized": list(given.resized),
        "crop": [given.left, given.top],
        "orientation": item.orientation,
        "interpolation": item.subset.resize_interpolation,
    }


class LatentsMemory:
    """See `LatentsStore`; nothing outlives the process."""

    def __init__(self, items: Sequence[Item]) -> None:
        groups: dict[tuple[str, str], list[int]] = defaultdict(list)
        for index, item in enumerate(items):
            groups[item.path, json.dumps(_geometry(item))].append(index)
        self.entries, self._entry_of = _entries(items, [((), members) for members in groups.values()])
        self._latents: dict[int, tuple[Tensor, Tensor | None]] = {}
        self._digests = _Digests()

    def problem(self, entry: LatentsEntry) -> str | None:
        """Why an entry has to be computed; None: it is there."""
        return None if entry.number in self._latents else "not cached yet"

    def save(self, entry: LatentsEntry, latents: Tensor, mirrored: Tensor | None) -> None:
        """Keeps the latents (C, h, w) of an entry."""
        self._latents[entry.number] = (latents.clone(), None if mirrored is None else mirrored.clone())

    def load(self, index: int, mirrored: bool) -> Tensor:
        """The latents (C, h, w) of an item."""
        latents = self._latents[self._entry_of[index]][mirrored]
        assert latents is not None
        return latents

    def digest(self, entry: LatentsEntry) -> str:
        """The hash of the content of the entry's image."""
        return self._digests(entry.item.path)


class LatentsFiles:
    """See `LatentsStore`; `.npz` files beside the images.

    An entry is right when its key agrees: content of the image, bucket, resizing, crop, orientation, encoder,
    precision. Files of other programs have no key; only `skip_check` trusts them. The hash of an image is computed
    again only when its size or time has changed.
    """

    def __init__(
        self, items: Sequence[Item], traits: Traits, identity: str, dtype: str = "", *, skip_check: bool = False
    ) -> None:
        self.traits, self.identity, self.dtype, self.skip_check = traits, identity, dtype, skip_check
        self._digests = _Digests()
        variants: dict[tuple[str, str], set[str]] = defaultdict(set)
        for item in items:
            variants[self._slot(item)].add(json.dumps(_geometry(item)))
        groups: dict[tuple[tuple[Path, ...], str], list[int]] = defaultdict(list)
        for index, item in enumerate(items):
            paths = self._paths(item, alone=len(variants[self._slot(item)]) == 1)
            groups[paths, self._suffix(item)].append(index)
        self.entries, self._entry_of = _entries(items, [(key[0], members) for key, members in groups.items()])

    def _slot(self, item: Item) -> tuple[str, str]:
        """File and array name that an item would use by itself; several variants of an image must not share one."""
        return base_name(item), self._suffix(item)

    def _suffix(self, item: Item) -> str:
        """End of the names of the arrays, latent height first."""
        if not self.traits.latents_keys_carry_size:
            return ""
        height, width = self._latent_size(item)
        return f"_{height}x{width}"

    def _latent_size(self, item: Item) -> tuple[int, int]:
        bucket, stride = item.assignment.bucket, self.traits.latent_stride
        return bucket.height // stride, bucket.width // stride

    def _paths(self, item: Item, *, alone: bool) -> tuple[Path, ...]:
        tail = f"_{item.original.width:04d}x{item.original.height:04d}{self.traits.latents_suffix}"
        if not alone:
            digest = hashlib.sha256(json.dumps(_geometry(item)).encode()).hexdigest()[:8]
            return (Path(f"{item.path}_{digest}{tail}"),)
        plain, named = Path(stem_of(item.path) + tail), Path(item.path + tail)
        return (named, plain) if item.shares_stem else (plain, named)

    def problem(self, entry: LatentsEntry) -> str | None:
        """Why an entry has to be computed; None: it is there and right, checksums included."""
        problems = []
        for path in entry.paths:
            if self.skip_check:
                problem = None if path.exists() else "not cached yet"
            else:
                problem = self._problem_of_file(path, entry.item, entry.mirrored)
            if problem is None:
                return None
            problems.append(problem)
        return next((problem for problem in problems if problem != "not cached yet"), "not cached yet")

    def _problem_of_file(self, path: Path, item: Item, mirrored: bool) -> str | None:
        suffix = self._suffix(item)
        wanted = {f"latents{suffix}", f"latents_flipped{suffix}", f"{KEY}{suffix}"}
        try:
            arrays = read_arrays(path, wanted.__contains__)
        except FileNotFoundError:
            return "not cached yet"
        except DamagedCacheError:
            return "damaged file"
        if f"latents{suffix}" not in arrays:
            return "not cached yet"
        shape = (self.traits.latent_channels, *self._latent_size(item))
        if any(arrays[name].shape != shape for name in arrays if name.startswith("latents")):
            return "other size"
        problem = self._problem_of_key(arrays.get(f"{KEY}{suffix}"), item)
        return problem or ("no mirrored latents" if mirrored and f"latents_flipped{suffix}" not in arrays else None)

    def _problem_of_key(self, stored: Any, item: Item) -> str | None:
        if stored is None:
            return "made by another program"
        try:
            key = json.loads(str(stored))
            for name, value in self._expected(item).items():
                if key.get(name) != value:
                    return "other encoder" if name in ("encoder", "dtype") else "other resizing or crop"
            unchanged = (key["bytes"], key["mtime_ns"]) == (item.file_bytes, item.mtime_ns)
            return None if unchanged or key["image"] == self._digests(item.path) else "image changed"
        except (ValueError, KeyError, AttributeError):
            return "damaged file"

    def _expected(self, item: Item) -> dict[str, Any]:
        return {"version": FORMAT_VERSION, "encoder": self.identity, "dtype": self.dtype, **_geometry(item)}

    def save(self, entry: LatentsEntry, latents: Tensor, mirrored: Tensor | None) -> None:
        """Writes the latents (C, h, w) of an entry; other resolutions in the file stay. Errors: ResourceError."""
        item = entry.item
        given, suffix = item.assignment, self._suffix(item)
        key = {
            **self._expected(item),
            "image": self._digests(item.path),
            "bytes": item.file_bytes,
            "mtime_ns": item.mtime_ns,
        }
        crop = (given.left, given.top, given.left + given.bucket.width, given.top + given.bucket.height)
        arrays = {
            f"latents{suffix}": latents.float().cpu().numpy(),
            f"original_size{suffix}": np.array(item.original, dtype=np.int64),
            f"crop_ltrb{suffix}": np.array(crop, dtype=np.float64),
            f"{KEY}{suffix}": np.array(json.dumps(key)),
        }
        if mirrored is not None:
            arrays[f"latents_flipped{suffix}"] = mirrored.float().cpu().numpy()
        keep = (lambda name: not name.endswith(suffix)) if suffix else None
        write_arrays(entry.paths[0], arrays, keep)

    def load(self, index: int, mirrored: bool) -> Tensor:
        """The latents (C, h, w) of an item, float32. Errors: DataError when they aren't there or aren't right."""
        entry = self.entries[self._entry_of[index]]
        suffix = self._suffix(entry.item)
        name = f"latents_flipped{suffix}" if mirrored else f"latents{suffix}"
        for path in entry.paths:
            try:
                arrays = read_arrays(path, {name, f"{KEY}{suffix}"}.__contains__)
            except (FileNotFoundError, DamagedCacheError):
                continue
            trusted = self.skip_check or self._problem_of_key(arrays.get(f"{KEY}{suffix}"), entry.item) is None
            if name in arrays and trusted:
                return torch.from_numpy(arrays[name].astype(np.float32, copy=False))
        hint = "leave --skip_cache_check out" if self.skip_check else "start again: it will be encoded anew"
        what = "cached latents are missing, damaged or of other settings"
        raise DataError(what, str(entry.paths[0]), hint, code="E-CACHE")

    def digest(self, entry: LatentsEntry) -> str:
        """The hash of the content of the entry's image."""
        return self._digests(entry.item.path)

    def bytes_needed(self, entry: LatentsEntry) -> int:
        """Room on the disk for an entry."""
        height, width = self._latent_size(entry.item)
        return self.traits.latent_channels * height * width * 4 * (2 if entry.mirrored else 1) + 2048


def image_seed(item: Item, mirrored: bool = False) -> int:
    """Decides the autoencoder's sample for an image: the same whenever and in whatever order images are encoded."""
    return mix(int(hashlib.sha256(Path(item.path).name.encode()).hexdigest()[:16], 16), int(mirrored))


def _entries(
    items: Sequence[Item], groups: Sequence[tuple[tuple[Path, ...], list[int]]]
) -> tuple[list[LatentsEntry], list[int]]:
    """The entries for groups of items, and the entry of each item."""
    entries, entry_of = [], [0] * len(items)
    for number, (paths, members) in enumerate(groups):
        mirrored = any(items[index].subset.flip_aug for index in members)
        entries.append(LatentsEntry(number, items[members[0]], mirrored, paths))
        for index in members:
            entry_of[index] = number
    return entries, entry_of


def base_name(item: Item) -> str:
    """Begin of the name of an item's cache files."""
    return item.path if item.shares_stem else stem_of(item.path)


def stem_of(path: str) -> str:
    return os.path.splitext(path)[0]  # noqa: PTH122 - many items
