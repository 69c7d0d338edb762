"""An image with its caption, as one subset uses it: what finding the data hands to caching, ordering and loading."""

from __future__ import annotations

import os
from dataclasses import dataclass

from library.data.buckets import Assignment
from library.data.settings import SubsetSettings
from library.types import Size


@dataclass(frozen=True, slots=True)
class Item:
    """One image of one subset."""

    path: str
    """Of the image; of an image that is gone: where it was, possibly without its extension."""
    original: Size
    """Upright."""
    caption: str
    """As read: one line, or several where wildcards may choose among them. See `captions` for what the model sees."""
    repeats: int
    assignment: Assignment
    dataset: int
    subset: SubsetSettings
    orientation: int = 1
    """EXIF orientation to undo."""
    file_bytes: int = 0
    mtime_ns: int = 0
    shares_stem: bool = False
    """Whether another image of the folder has the same name but for the extension."""
    transparent: bool = False
    """Whether the image has an alpha channel or a transparent colour."""
    conditioning: str | None = None
    """The image of the same name in `conditioning_data_dir`: a mask, or what a ControlNet is shown."""
    face: tuple[int, int, int, int] | None = None
    """Centre x, centre y, width and height of a face, from the file's name."""
    gone: bool = False
    """Whether the image isn't there any more, but its latents are cached on disk."""
    held_out: int | None = None
    """The number that decides the noise of an image that is kept for validation; None: it is trained on."""

    @property
    def stem(self) -> str:
        """Path without extension."""
        return self.path if self.gone else os.path.splitext(self.path)[0]  # noqa: PTH122 - many items
