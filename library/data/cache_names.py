"""Where the cache files of an image lie: beside it, under the names that all programs use, or in another folder."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from library.data import shards
from library.data.items import Item


@dataclass(frozen=True)
class CacheNames:
    """Names of cache files."""

    folder: Path | None = None
    """Folder for all files (`--cache_dir`); None: beside the images."""

    def base(self, item: Item) -> str:
        """Begin of the name of an item's own files: two items of equal base share them."""
        return item.path if item.shares_stem else item.stem

    def usual(self, item: Item, tail: str) -> tuple[Path, ...]:
        """Where to look for a file with one version per image, best place first; it is written to the first."""
        plain, named = self._placed(item.stem + tail), self._placed(item.path + tail)
        return (named, plain) if item.shares_stem else (plain, named)

    def version(self, item: Item, what: str, tail: str) -> tuple[Path, ...]:
        """Where a file of one of several versions of an image lies; `what` tells the versions apart."""
        return (self._placed(f"{item.path}_{_digest(what)}{tail}"),)

    def shared(self, item: Item, what: str, tail: str) -> tuple[Path, ...]:
        """Where a file lies that all images of a folder share, told apart by `what`."""
        return (self._placed(str(Path(item.path).parent / f"shared_{_digest(what, 16)}{tail}")),)

    def _placed(self, beside: str) -> Path:
        path = Path(beside)
        if self.folder is None:
            return shards.beside(path)
        parent = path.parent.absolute()
        return self.folder / f"{parent.name}_{_digest(str(parent))}" / path.name


def _digest(text: str, length: int = 8) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:length]
