"""What the last scan read of each folder, so that the next one only opens files that have changed.

One line of text for each folder: checksum, path and content, separated by tabs. A line that isn't whole counts as
missing, and so does the whole file when it was written by another version or for another reading of images.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from library.files import atomic_write
from library.log import ResourceError, get_logger

logger = get_logger(__name__)

FORMAT = 1


@dataclass
class Remembered:
    """What is known of the files of a folder; size in bytes and modification time tell whether it still holds."""

    images: dict[str, list[int]] = field(default_factory=dict)
    """Name -> bytes, time, width, height, orientation, transparency (0 or 1)."""
    texts: dict[str, Sequence[Any]] = field(default_factory=dict)
    """Name of a caption file -> bytes, time, text."""


class ScanCache:
    """The remembered folders; without a file nothing is remembered."""

    def __init__(self, path: Path | None, *, ignore_orientation: bool = False, thorough: bool = False) -> None:
        self._path = path
        self._reading = {"format": FORMAT, "ignore_orientation": ignore_orientation}
        self._thorough = thorough
        self._lines: dict[bytes, bytes] = {}
        if path is not None:
            with suppress(OSError):
                self._load(path.read_bytes())

    def _load(self, content: bytes) -> None:
        lines = content.split(b"\n")
        try:
            head = json.loads(_checked(lines[0]))
            fits = head["reading"] == self._reading and (head["thorough"] or not self._thorough)
        except (ValueError, TypeError, KeyError):
            return
        for line in lines[1:] if fits else ():
            with suppress(ValueError):
                self._lines[_checked(line).partition(b"\t")[0]] = line

    def of(self, folder: str) -> Remembered:
        """What is remembered of a folder, given its absolute path."""
        line = self._lines.get(_key(folder))
        if line is None:
            return Remembered()
        try:
            content: dict[str, Any] = json.loads(_checked(line).partition(b"\t")[2])
            return Remembered(content["images"], content["texts"])
        except (ValueError, TypeError, KeyError):
            return Remembered()

    def save(self, folders: Iterable[tuple[str, Remembered | None]]) -> None:
        """Keeps what is known of folders now, None: as it was; all others are forgotten. A full disk is no error."""
        if self._path is None:
            return
        head = json.dumps({"reading": self._reading, "thorough": self._thorough}).encode()
        try:
            with atomic_write(self._path) as temporary, temporary.open("wb") as file:
                file.write(_with_sum(head))
                for path, known in folders:
                    key = _key(path)
                    if known is None:
                        file.write(b"\n" + self._lines.get(key, b""))
                    else:
                        content = json.dumps({"images": known.images, "texts": known.texts}, separators=(",", ":"))
                        file.write(b"\n" + _with_sum(key + b"\t" + content.encode()))
        except (ResourceError, OSError) as error:
            logger.warning("the scan of the dataset can't be remembered: %s", error)


def _key(folder: str) -> bytes:
    return json.dumps(folder).encode()


def _with_sum(line: bytes) -> bytes:
    return b"%08x\t" % zlib.crc32(line) + line


def _checked(line: bytes) -> bytes:
    """A line without its checksum. Errors: ValueError when it doesn't fit."""
    if len(line) < 10 or int(line[:8], 16) != zlib.crc32(memoryview(line)[9:]):
        raise ValueError("not as it was written")
    return line[9:]
