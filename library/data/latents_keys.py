"""What decides latents and masks: it is stored with them, and compared before they are used again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from library.data import shards
from library.data.arrays import DAMAGED, FORMAT_VERSION
from library.data.items import Item

_RECORDED_ONLY = ("orientation", "background")
"""Not known of an image that isn't there any more."""


class Digests:
    """Hashes, sizes and times of files, each asked for once."""

    def __init__(self) -> None:
        self._hashes: dict[str, str] = {}
        self._stamps: dict[str, tuple[int, int] | None] = {}

    def content(self, path: str) -> str:
        """The hash of a file's content. Errors: OSError."""
        if path not in self._hashes:
            self._hashes[path] = shards.sha256(path)
        return self._hashes[path]

    def stamp(self, path: str) -> tuple[int, int] | None:
        """Bytes and time of a file; None when it isn't there."""
        if path not in self._stamps:
            try:
                self._stamps[path] = shards.stamp(path)
            except OSError:
                self._stamps[path] = None
        return self._stamps[path]


def background(item: Item) -> list[int] | None:
    """The colour that shows through an image; None: nothing does."""
    colour = item.subset.background
    return list(colour) if item.transparent and colour is not None else None


def geometry(item: Item) -> dict[str, Any]:
    """What becomes of the image before it is encoded."""
    given = item.assignment
    return {
        "bucket": list(given.bucket),
        "resized": list(given.resized),
        "crop": [given.left, given.top],
        "orientation": item.orientation,
        "interpolation": item.subset.resize_interpolation,
        "background": background(item),
    }


def version(item: Item) -> str:
    """Text that differs for whatever must not share an entry, of one image."""
    parts = geometry(item)
    if parts["background"] is None:
        del parts["background"]
    if item.subset.mask:
        parts["mask"] = [item.subset.mask, item.conditioning if item.subset.mask == "conditioning" else None]
    return json.dumps(parts)


def versions(items: Sequence[Item]) -> list[str]:
    """The version of each item; written for speed, since there may be very many and few different ones."""
    known: dict[tuple[object, ...], str] = {}
    found = []
    for item in items:
        shown = item.conditioning if item.subset.mask else None
        key = (id(item.assignment), id(item.subset), item.orientation, item.transparent, shown)
        text = known.get(key)
        if text is None:
            text = known[key] = version(item)
        found.append(text)
    return found


class Keys:
    """Makes and compares the keys of one encoder's latents.

    The hash of a file is computed only when its size or time isn't the recorded one.
    """

    def __init__(self, encoder: str, dtype: str) -> None:
        self.encoder, self.dtype = encoder, dtype
        self._digests = Digests()

    def of(self, item: Item) -> str:
        """The key of an item's latents."""
        key = {
            **self._settings(item),
            "transparent": item.transparent,
            "image": self._digests.content(item.path),
            "bytes": item.file_bytes,
            "mtime_ns": item.mtime_ns,
        }
        if item.subset.mask:
            key["mask"] = self._mask(item)
        return json.dumps(key)

    def problem(self, stored: Any, item: Item) -> str | None:
        """Why latents with a key can't be those of an item."""
        try:
            key = json.loads(str(stored))
            for name, value in self._settings(item).items():
                known = not (item.gone and name in _RECORDED_ONLY)
                if known and key.get(name) != value:
                    return "other encoder" if name in ("encoder", "dtype") else "other resizing or crop"
            if item.gone:
                if key.get("background") != _behind(item, key):
                    return "other resizing or crop"
            elif not self._unchanged(key, item.path, (item.file_bytes, item.mtime_ns)):
                return "image changed"
            return self._problem_of_mask(key, item)
        except (ValueError, KeyError, AttributeError, TypeError):
            return DAMAGED

    def _settings(self, item: Item) -> dict[str, Any]:
        return {"version": FORMAT_VERSION, "encoder": self.encoder, "dtype": self.dtype, **geometry(item)}

    def _mask(self, item: Item) -> dict[str, Any]:
        source: dict[str, Any] = {"source": item.subset.mask}
        if item.subset.mask == "conditioning" and item.conditioning is not None:
            size, mtime_ns = self._digests.stamp(item.conditioning) or (0, 0)
            source |= {"image": self._digests.content(item.conditioning), "bytes": size, "mtime_ns": mtime_ns}
        return source

    def _problem_of_mask(self, key: dict[str, Any], item: Item) -> str | None:
        wanted, stored = item.subset.mask, key.get("mask") or {}
        if not wanted:
            return None
        if stored.get("source") != wanted:
            return "other mask" if stored else "no mask"
        if wanted == "alpha" or item.conditioning is None:
            return None if wanted == "alpha" or "image" not in stored else "other mask"
        stamp = self._digests.stamp(item.conditioning)
        if stamp is None:
            return None if item.gone else "mask changed"
        return None if self._unchanged(stored, item.conditioning, stamp) else "mask changed"

    def _unchanged(self, recorded: dict[str, Any], path: str, stamp: tuple[int, int]) -> bool:
        """Whether a file is the one that was recorded."""
        if (recorded["bytes"], recorded["mtime_ns"]) == stamp:
            return True
        try:
            return bool(recorded["image"] == self._digests.content(path))
        except OSError:
            return False


def _behind(item: Item, key: dict[str, Any]) -> list[int] | None:
    """The colour behind an image that isn't there any more, of which only the key knows whether it was transparent."""
    colour = item.subset.background
    return list(colour) if key.get("transparent") and colour is not None else None
