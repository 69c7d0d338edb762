"""`metadata_cache.json`: sizes and captions of a folder's images, as other trainers write and read it.

They trust it blindly, so it may be long out of date. Here a size in it counts when the file beside it hasn't changed
since, a caption where there is no caption file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from library.data.directories import Directory, Facts
from library.data.items import Item
from library.files import atomic_write
from library.log import ResourceError
from library.types import Finding

NAME = "metadata_cache.json"


class CacheInfo:
    """The file of one image folder."""

    def __init__(self, image_dir: str, where: str) -> None:
        self.path = Path(image_dir) / NAME
        self.where = where
        self._start = os.path.normcase(os.path.normpath(image_dir)) + os.sep
        self._entries: dict[str, dict[str, Any]] = {}
        self._written_ns = 0
        try:
            content = json.loads(self.path.read_bytes())
            self._written_ns = self.path.stat().st_mtime_ns
            self._entries = {self._inner(key): entry for key, entry in content.items() if isinstance(entry, dict)}
        except (OSError, ValueError, AttributeError, RecursionError):
            self._entries = {}

    def caption(self, path: str) -> str | None:
        """The caption of an image."""
        caption = self._entries.get(self._inner(path), {}).get("caption")
        return caption if isinstance(caption, str) else None

    def facts(self, directory: Directory, name: str, *, ignore_orientation: bool) -> Facts | None:
        """What it says of an image that hasn't changed; None: its header must be read."""
        entry = self._entries.get(self._inner(directory.prefix + name))
        if entry is None:
            return None
        stamp = directory.stamps[name]
        resolution = entry.get("resolution")
        if not isinstance(resolution, list) or len(resolution) != 2 or not all(map(_is_length, resolution)):
            return None
        if ignore_orientation:
            fresh = stamp[1] < self._written_ns if "stamp" not in entry else entry["stamp"] == list(stamp)
            return Facts(resolution[0], resolution[1], 1, bool(entry.get("transparent"))) if fresh else None
        orientation: Any = entry.get("orientation")
        if entry.get("stamp") != list(stamp) or not _is_length(orientation):
            return None  # written by another program, which knows nothing of orientation
        width, height = resolution[::-1] if orientation >= 5 else resolution
        return Facts(width, height, orientation, bool(entry.get("transparent")))

    def _inner(self, path: str) -> str:
        """The part of a path below the folder; its name where it was written for a folder named otherwise."""
        normal = os.path.normcase(os.path.normpath(path))
        return normal[len(self._start) :] if normal.startswith(self._start) else os.path.split(normal)[1]

    def write(self, items: Iterable[Item]) -> Finding | None:
        """Writes what is known of images that are there, if that is news; gives a warning when it can't."""
        content = {
            item.path: {
                "caption": item.caption,
                "resolution": list(item.original[::-1] if item.orientation >= 5 else item.original),
                "stamp": [item.file_bytes, item.mtime_ns],
                "orientation": item.orientation,
                "transparent": item.transparent,
            }
            for item in items
            if not item.gone
        }
        if {self._inner(key): entry for key, entry in content.items()} == self._entries:
            return None
        try:
            with atomic_write(self.path) as temporary:
                temporary.write_text(json.dumps(content, ensure_ascii=False, indent=2), "utf-8")
        except (ResourceError, OSError, UnicodeEncodeError) as error:
            what = f"cache_info: {NAME} can't be written ({error})"
            return Finding(error=False, what=what, where=self.where, code="E-DATA-SUBSET")
        return None


def _is_length(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
