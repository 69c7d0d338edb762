"""Which images are held out for validation: decided by their names, so that further images move none of the others."""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from library.data.captions import plain
from library.data.items import Item
from library.data.order import Share
from library.data.scan_report import Scan
from library.data.settings import SubsetSettings
from library.randomness import mix
from library.types import Finding

_ALL = 1 << 64
_REPEATS = re.compile(r"^\d+_")


class _Place(NamedTuple):
    """An image, told apart from all others."""

    path: str
    """Absolute, without extension."""
    name: str
    """What its fate hangs on: the same wherever the dataset lies, however often it is repeated."""


def hold_out(scan: Scan, seed: int = 0) -> None:
    """Moves the images that are held out for validation from `scan.items` to `scan.held_out`.

    Each file gets a number, made of its name and the dataset's `validation_seed` (`seed` where there is none); those
    below `validation_split` of the highest possible one are held out. That is about the wanted share; of several images
    it is one at least, and not all. An image that is held out from one dataset is held out from all of them;
    regularization images never are. Nothing is left to chance in how a held-out image is shown and worded.
    """
    places = [None if item.subset.is_reg else _place(item) for item in scan.items] if _is_wanted(scan) else []
    chosen: set[str] = set()
    for index, settings in enumerate(scan.config.datasets):
        if settings.validation_split:
            own = seed if settings.validation_seed is None else settings.validation_seed
            numbers = {
                place.path: _number(place.name, own)
                for item, place in zip(scan.items, places, strict=True)
                if item.dataset == index and place is not None
            }
            found = _least(numbers, settings.validation_split)
            chosen |= found
            if not found:
                what = "nothing is held out for validation: the dataset has too few images"
                scan.findings.append(Finding(error=False, what=what, where=settings.where, code="E-VALIDATION"))
    if chosen:
        _move(scan, places, chosen, seed)


def _is_wanted(scan: Scan) -> bool:
    return any(settings.validation_split for settings in scan.config.datasets)


def _place(item: Item) -> _Place:
    path = os.path.abspath(item.stem)  # noqa: PTH100 - many items
    folder = os.path.abspath(item.subset.image_dir or os.path.dirname(path))  # noqa: PTH100, PTH120
    inside = path[len(folder) + 1 :] if path.startswith(folder + os.sep) else os.path.basename(path)  # noqa: PTH119
    name = f"{_REPEATS.sub('', os.path.basename(folder))}/{inside.replace(os.sep, '/')}"  # noqa: PTH119
    return _Place(os.path.normcase(path), unicodedata.normalize("NFC", name))


def _number(name: str, seed: int) -> int:
    """64 bits, unsigned."""
    return mix(seed, int(hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:16], 16))


def _least(numbers: Mapping[str, int], share: float) -> set[str]:
    """Those whose number is in the lowest `share` of what numbers can be; of several, one at least, and never all.

    Only a share of 1 means all: a dataset may be there for validation alone.
    """
    chosen = {path for path, number in numbers.items() if number < share * _ALL}
    if share < 1 and numbers:
        by_number = sorted(numbers, key=lambda path: (numbers[path], path))
        chosen = (chosen or {by_number[0]}) - {by_number[-1]}
    return chosen


def _move(scan: Scan, places: Sequence[_Place | None], chosen: set[str], seed: int) -> None:
    seeds = [settings.validation_seed for settings in scan.config.datasets]
    calm: dict[int, SubsetSettings] = {}
    held_out: dict[int, int] = {}
    kept = []
    for item, place in zip(scan.items, places, strict=True):
        if place is None or place.path not in chosen:
            kept.append(item)
            continue
        subset = calm.setdefault(id(item.subset), _calm(item.subset))
        own = seeds[item.dataset]
        number = _number(place.name, seed if own is None else own)
        caption = plain(item.caption, item.subset)
        scan.held_out.append(replace(item, subset=subset, caption=caption, repeats=1, held_out=number))
        held_out[id(item.subset)] = held_out.get(id(item.subset), 0) + 1
    scan.items = kept
    for report in scan.reports:
        report.held_out = held_out.get(id(report.settings), 0)


def _calm(subset: SubsetSettings) -> SubsetSettings:
    """Settings with nothing random, for captions that are worded already."""
    return replace(
        subset,
        num_repeats=1,
        flip_aug=False,
        color_aug=False,
        random_crop=False,
        face_crop_aug_range=None,
        caption_prefix=None,
        caption_suffix=None,
        secondary_separator=None,
        shuffle_caption=False,
        keep_tokens=0,
        keep_tokens_separator="",
        enable_wildcard=False,
        token_warmup_step=0,
        caption_dropout_rate=0.0,
        caption_dropout_every_n_epochs=0,
        caption_tag_dropout_rate=0.0,
    )


def validation_shares(items: Sequence[Item], batch_sizes: Sequence[int], most: int | None = None) -> list[Share]:
    """Batches of one size each of the held-out ones among `items`, always in the same order.

    `batch_sizes` are those of the datasets; with `most` only so many batches, of images of all sizes.
    """
    by_size: dict[tuple[int, int, int], list[int]] = {}
    for index, item in enumerate(items):
        if item.held_out is not None:
            by_size.setdefault((item.dataset, *item.assignment.bucket), []).append(index)
    batches: list[tuple[int, ...]] = []
    for (dataset, _, _), indices in by_size.items():
        indices.sort(key=lambda index: (items[index].held_out, items[index].path))
        size = batch_sizes[dataset]
        batches += [tuple(indices[start : start + size]) for start in range(0, len(indices), size)]
    batches.sort(key=lambda batch: (items[batch[0]].held_out, batch))
    return [
        Share(lane=0, entries=batch, position=0, weight=1.0, completes_step=False, epoch=1, index=number)
        for number, batch in enumerate(batches[:most])
    ]
