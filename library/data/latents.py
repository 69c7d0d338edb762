"""Where latents and masks are kept: in files with a key of all that decides them, or in memory."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from sys import intern
from threading import Lock
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeVar

import numpy as np
import torch

from library.data import foreign_latents
from library.data.arrays import DAMAGED, KEY, NOT_CACHED, Arrays, DamagedCacheError, first_problem, write_arrays
from library.data.cache_names import CacheNames
from library.data.items import Item
from library.data.latents_format import Shape, array_name, lack, needed_arrays, packed, unpacked
from library.data.latents_keys import Keys, versions
from library.data.masks import from_bytes, to_bytes
from library.log import DataError, get_logger
from library.randomness import Draws, mix
from library.types import Posterior, Traits

if TYPE_CHECKING:
    from torch import Tensor

logger = get_logger(__name__)

KeyT = TypeVar("KeyT")

FOREIGN = "made by another program"
LEGACY_SUFFIXES = ("_sd.npz", "_sdxl.npz")
"""Beside files of these kinds there may be older ones with nothing but the image's name."""
_DISTRIBUTION = ("latents_mean", "latents_logvar")


class Drawn(NamedTuple):
    """An image's latents, and the distribution they were drawn from; each (C, h, w) float32."""

    sample: Tensor
    mean: Tensor
    deviation: Tensor


class Encoded(NamedTuple):
    """All that is kept of an image."""

    straight: Drawn
    mirrored: Drawn | None = None
    """Of the mirrored image."""
    mask: Tensor | None = None
    """(H, W) in [0, 1]: of the image as it is."""


class LoadedLatents(NamedTuple):
    """What a sample gets."""

    latents: Tensor
    """(C, h, w) float32"""
    mask: Tensor | None
    """(H, W) float32 in [0, 1], mirrored with the image; None: the subset has no masks."""


@dataclass(frozen=True, slots=True)
class LatentsEntry:
    """Latents that are computed once, however many items use them."""

    number: int
    item: Item
    """One of those that use them."""
    mirrored: bool
    """Whether those of the mirrored image are needed, too."""
    names: CacheNames = field(default_factory=CacheNames)
    tail: str = ""
    """End of the file's name."""
    version: str = ""
    """Tells several entries of one image apart; empty: it has only one."""
    legacy: bool = False
    """Whether older programs' files, named like the image alone, may be used."""

    @property
    def paths(self) -> tuple[Path, ...]:
        """Where to look for them, best place first; they are written to the first."""
        if self.version:
            return self.names.version(self.item, self.version, self.tail)
        paths = self.names.usual(self.item, self.tail)
        return (*paths, Path(self.item.stem + ".npz")) if self.legacy else paths


class LatentsStore(Protocol):
    """Latents by entry and by item."""

    @property
    def entries(self) -> Sequence[LatentsEntry]:
        """Everything that is to be kept."""

    def problem(self, entry: LatentsEntry) -> str | None:
        """Why an entry has to be computed; None: it is there and right."""

    def save(self, entry: LatentsEntry, encoded: Encoded) -> None:
        """Keeps an entry."""

    def load(self, index: int, mirrored: bool, seed: int) -> LoadedLatents:
        """What is kept of an item; where distributions are kept, `seed` decides what is drawn.

        Errors: DataError when it isn't there or isn't right.
        """


class LatentsMemory:
    """See `LatentsStore`; nothing outlives the process."""

    def __init__(self, items: Sequence[Item], *, posterior: bool = False) -> None:
        self.posterior = posterior
        keys = list(zip((item.path for item in items), versions(items), strict=True))
        groups, self._entry_of = _grouped(items, keys)
        self.entries = [LatentsEntry(number, *group[1:]) for number, group in enumerate(groups)]
        self._kept: dict[int, tuple[dict[bool, tuple[Tensor, ...]], Tensor | None]] = {}

    def problem(self, entry: LatentsEntry) -> str | None:
        """Why an entry has to be computed; None: it is there."""
        return None if entry.number in self._kept else NOT_CACHED

    def save(self, entry: LatentsEntry, encoded: Encoded) -> None:
        """Keeps an entry."""
        sides = {False: self._needed(encoded.straight)}
        if encoded.mirrored is not None:
            sides[True] = self._needed(encoded.mirrored)
        self._kept[entry.number] = sides, None if encoded.mask is None else to_bytes(encoded.mask)

    def _needed(self, drawn: Drawn) -> tuple[Tensor, ...]:
        wanted = (drawn.mean, drawn.deviation) if self.posterior else (drawn.sample,)
        return tuple(tensor.float().cpu().clone() for tensor in wanted)

    def load(self, index: int, mirrored: bool, seed: int) -> LoadedLatents:
        """What is kept of an item."""
        sides, stored = self._kept[self._entry_of[index]]
        tensors = sides[mirrored]
        mask = None if stored is None else from_bytes(stored)
        latents = _sampled(tensors[0], tensors[1], seed) if self.posterior else tensors[0]
        return _loaded(latents, mask, mirrored)


class LatentsFiles:
    """See `LatentsStore`; `.npz` files, which are right when their key agrees.

    The key tells the content of image and mask, bucket, resizing, crop, orientation, background, encoder, precision.
    Files of other programs have no key: they are used where all that can be seen fits, see `foreign_latents`, or
    where `skip_check` says that they are right.
    """

    def __init__(
        self,
        items: Sequence[Item],
        traits: Traits,
        identity: str,
        dtype: str = "",
        *,
        skip_check: bool = False,
        names: CacheNames | None = None,
        compact: bool = False,
        posterior: bool = False,
    ) -> None:
        self.traits, self.skip_check, self.compact, self.posterior = traits, skip_check, compact, posterior
        self._names, self._keys, self._noticed = names or CacheNames(), Keys(identity, dtype), _Noticed()
        slots = [(self._names.base(item), self._suffix(item)) for item in items]
        groups, self._entry_of = _grouped(items, list(zip(slots, versions(items), strict=True)))
        counts = Counter(slot for (slot, _), _, _ in groups)
        self.entries = [
            self._entry(number, item, mirrored, version if counts[slot] > 1 else "")
            for number, ((slot, version), item, mirrored) in enumerate(groups)
        ]

    def _entry(self, number: int, item: Item, mirrored: bool, version: str) -> LatentsEntry:
        suffix = self.traits.latents_suffix
        tail = intern(f"_{item.original.width:04d}x{item.original.height:04d}{suffix}")
        legacy = self.skip_check and suffix in LEGACY_SUFFIXES
        return LatentsEntry(number, item, mirrored, self._names, tail, version, legacy)

    def _suffix(self, item: Item) -> str:
        """End of the names of the arrays, latent height first."""
        if not self.traits.latents_keys_carry_size:
            return ""
        _, height, width = self._shape(item)
        return f"_{height}x{width}"

    def _shape(self, item: Item) -> tuple[int, int, int]:
        bucket, stride = item.assignment.bucket, self.traits.latent_stride
        return self.traits.latent_channels, bucket.height // stride, bucket.width // stride

    def problem(self, entry: LatentsEntry) -> str | None:
        """Why an entry has to be computed; None: it is there and right, checksums included."""
        if self.skip_check:
            return None if any(path.exists() for path in entry.paths) else NOT_CACHED
        needed = self._needed(entry.item, (False, True) if entry.mirrored else (False,), sample=True)
        return first_problem(self._read(path, entry.item, needed)[1] for path in entry.paths)

    def _needed(self, item: Item, sides: Sequence[bool], *, sample: bool) -> dict[str, Shape]:
        kinds = ("latents",) if sample or not self.posterior else ()
        bucket = item.assignment.bucket
        mask = (bucket.height, bucket.width) if item.subset.mask else None
        return needed_arrays((*kinds, *(_DISTRIBUTION if self.posterior else ())), sides, self._shape(item), mask)

    def _read(self, path: Path, item: Item, needed: dict[str, Shape]) -> tuple[Arrays, str | None]:
        """The needed arrays of a file, and why they can't be used."""
        try:
            arrays, narrow = unpacked(path, self._suffix(item), {*needed, KEY})
            if KEY not in arrays and not self.skip_check:
                return arrays, self._problem_of_foreign(path, item, needed)
        except FileNotFoundError:
            return {}, NOT_CACHED
        except DamagedCacheError:
            self._noticed.damaged(path)
            return {}, DAMAGED
        problem = None if self.skip_check else self._keys.problem(arrays[KEY], item)
        if problem == DAMAGED:
            self._noticed.damaged(path)
        if problem is None and narrow and not (self.compact or self.skip_check):
            problem = "stored compactly"
        return arrays, problem or lack(arrays, needed)

    def _problem_of_foreign(self, path: Path, item: Item, needed: dict[str, Shape]) -> str | None:
        """Why a file without a key can't be used."""
        names = {"latents", "latents_flipped", "alpha_mask", "original_size", "crop_ltrb"}
        arrays, _ = unpacked(path, self._suffix(item), names)
        if "latents" not in arrays:
            return NOT_CACHED
        mirrored = any(name.endswith("_flipped") for name in needed)
        written = path.stat().st_mtime_ns
        if self.posterior or not foreign_latents.fits(arrays, item, written, self._shape(item), mirrored=mirrored):
            return FOREIGN
        self._noticed.foreign(path)
        return None

    def save(self, entry: LatentsEntry, encoded: Encoded) -> None:
        """Writes an entry; other resolutions in the file stay. Errors: ResourceError."""
        item, suffix = entry.item, self._suffix(entry.item)
        given = item.assignment
        crop = (given.left, given.top, given.left + given.bucket.width, given.top + given.bucket.height)
        arrays = self._arrays(encoded)
        if self.compact:
            arrays = packed(arrays)
        arrays["original_size"] = np.array(item.original, dtype=np.int64)
        arrays["crop_ltrb"] = np.array(crop, dtype=np.float64)
        arrays[KEY] = np.array(self._keys.of(item))
        named = {name + suffix: array for name, array in arrays.items()}
        keep = (lambda name: not name.endswith(suffix)) if suffix else None
        write_arrays(entry.paths[0], named, keep, compressed=self.compact)

    def _arrays(self, encoded: Encoded) -> Arrays:
        parts: dict[str, Tensor] = {} if encoded.mask is None else {"alpha_mask": encoded.mask}
        for mirrored, drawn in ((False, encoded.straight), (True, encoded.mirrored)):
            if drawn is None:
                continue
            parts[array_name("latents", mirrored)] = drawn.sample
            if self.posterior:
                parts[array_name("latents_mean", mirrored)] = drawn.mean
                parts[array_name("latents_logvar", mirrored)] = 2 * drawn.deviation.float().log()
        return {name: part.float().cpu().numpy() for name, part in parts.items()}

    def load(self, index: int, mirrored: bool, seed: int) -> LoadedLatents:
        """What is kept of an item. Errors: DataError when it isn't there or isn't right."""
        entry = self.entries[self._entry_of[index]]
        needed = self._needed(entry.item, (mirrored,), sample=False)
        for path in entry.paths:
            arrays, problem = self._read(path, entry.item, needed)
            if problem is None:
                found = {name: torch.from_numpy(arrays[name].astype(np.float32, copy=False)) for name in needed}
                return _loaded(self._drawn(found, mirrored, seed), found.get("alpha_mask"), mirrored)
        hint = "leave --skip_cache_check out" if self.skip_check else "start again: it will be encoded anew"
        what = "cached latents are missing, damaged or of other settings"
        raise DataError(what, str(entry.paths[0]), hint, code="E-CACHE")

    def _drawn(self, found: dict[str, Tensor], mirrored: bool, seed: int) -> Tensor:
        if not self.posterior:
            return found[array_name("latents", mirrored)]
        deviation = found[array_name("latents_logvar", mirrored)].mul(0.5).exp()
        return _sampled(found[array_name("latents_mean", mirrored)], deviation, seed)

    def bytes_needed(self, entry: LatentsEntry) -> int:
        """Room on the disk for an entry."""
        channels, height, width = self._shape(entry.item)
        numbers = channels * height * width * (2 if entry.mirrored else 1) * (3 if self.posterior else 1)
        pixels = entry.item.assignment.bucket.area if entry.item.subset.mask else 0
        return numbers * (2 if self.compact else 4) + pixels * (1 if self.compact else 4) + 2048


class _Noticed:
    """Says once what holds for many files."""

    def __init__(self) -> None:
        self._said: set[str] = set()
        self._lock = Lock()

    def damaged(self, path: Path) -> None:
        """A file that can't be read."""
        self._say("damaged cache files are encoded anew; the first of them: %s", path)

    def foreign(self, path: Path) -> None:
        """A file of another program that is used."""
        what = "cached latents of another program are used, since their size, crop and age fit; with which autoencoder "
        self._say(what + "they were made can't be seen; the first of them: %s", path)

    def _say(self, text: str, path: Path) -> None:
        with self._lock:
            if text not in self._said:
                self._said.add(text)
                logger.warning(text, path)


def image_seed(item: Item, mirrored: bool = False) -> int:
    """Decides the autoencoder's sample for an image: the same whenever and in whatever order images are encoded."""
    return mix(int(hashlib.sha256(os.path.basename(item.path).encode()).hexdigest()[:16], 16), int(mirrored))  # noqa: PTH119


def _grouped(items: Sequence[Item], keys: Sequence[KeyT]) -> tuple[list[tuple[KeyT, Item, bool]], list[int]]:
    """Each different key, its first item, whether mirrored latents are wanted; and the place of each item's key."""
    places: dict[KeyT, int] = {}
    first: list[Item] = []
    mirrored: list[bool] = []
    place_of: list[int] = []
    for item, key in zip(items, keys, strict=True):
        place = places.setdefault(key, len(first))
        if place == len(first):
            first.append(item)
            mirrored.append(False)
        mirrored[place] |= item.subset.flip_aug
        place_of.append(place)
    return list(zip(places, first, mirrored, strict=True)), place_of


def _sampled(mean: Tensor, deviation: Tensor, seed: int) -> Tensor:
    noise = Draws([seed]).posterior(mean.shape)
    return Posterior(mean[None], deviation[None]).sample(noise)[0]


def _loaded(latents: Tensor, mask: Tensor | None, mirrored: bool) -> LoadedLatents:
    return LoadedLatents(latents, mask.flip(-1) if mirrored and mask is not None else mask)
