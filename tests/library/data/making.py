"""Items of image files, made directly."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from library.data import buckets
from library.data.buckets import Assignment
from library.data.headers import read_header
from library.data.items import Item
from library.data.settings import DatasetSettings, SubsetSettings
from library.types import Size


def whole(size: Size) -> Assignment:
    """All of an image as it is."""
    return Assignment(size, size, 0, 0, 0.0)


def dataset(resolution: int = 64, **values: object) -> DatasetSettings:
    """Settings with small buckets."""
    given = {"enable_bucket": True, "min_bucket_reso": 32, "max_bucket_reso": 256, "bucket_reso_steps": 16}
    return DatasetSettings(resolution=Size(resolution, resolution), **{**given, **values})  # type: ignore[arg-type]


def item_of(
    path: Path,
    settings: DatasetSettings | None = None,
    *,
    conditioning: Path | None = None,
    face: tuple[int, int, int, int] | None = None,
    **values: object,
) -> Item:
    """The item of a file, as finding the data would make it; without settings the image is taken as it is."""
    header, status = read_header(str(path)), os.stat(path)  # noqa: PTH116
    subset = SubsetSettings(image_dir=str(path.parent), **values)  # type: ignore[arg-type]
    return Item(
        path=str(path),
        original=header.size,
        caption="",
        repeats=1,
        assignment=whole(header.size) if settings is None else buckets.assign(header.size, settings),
        dataset=0,
        subset=subset,
        orientation=header.orientation,
        file_bytes=status.st_size,
        mtime_ns=status.st_mtime_ns,
        transparent=header.transparent,
        conditioning=None if conditioning is None else str(conditioning),
        face=face,
    )


def with_subset(item: Item, **values: object) -> Item:
    """An item as another subset uses it."""
    return replace(item, subset=replace(item.subset, **values))  # type: ignore[arg-type]
