"""Latents files that other programs wrote: used only where all that they record, and their age, fits."""

from __future__ import annotations

import numpy as np

from library.data.arrays import Arrays
from library.data.items import Item
from library.types import Size


def fits(arrays: Arrays, item: Item, written_ns: int, shape: tuple[int, int, int], *, mirrored: bool) -> bool:
    """Whether arrays without a key are an item's: newer than the image, of its size, crop and settings.

    Only the autoencoder that made them remains unknown.
    """
    if not item.gone and written_ns <= item.mtime_ns:
        return False
    return _made_alike(item) and _same_place(arrays, item) and _complete(arrays, item, shape, mirrored)


def _made_alike(item: Item) -> bool:
    """Whether other programs treat the image as we do: as stored, resized by the usual rule, without a background."""
    subset = item.subset
    behind = subset.background is not None and (item.transparent or item.gone)
    return not (behind or item.orientation != 1 or subset.resize_interpolation or item.assignment.too_small)


def _same_place(arrays: Arrays, item: Item) -> bool:
    size, crop = arrays.get("original_size"), arrays.get("crop_ltrb")
    if size is None or not np.array_equal(size, item.original):
        return False
    return crop is None or (crop.shape == (4,) and np.allclose(crop, recorded_crop(item), rtol=0, atol=1e-3))


def recorded_crop(item: Item) -> tuple[float, float, float, float]:
    """Left, top, right and bottom as other programs record them: the image fitted inside the bucket."""
    bucket, image = item.assignment.bucket, item.original
    aspect = image.width / image.height
    if bucket.width / bucket.height > aspect:
        width, height = bucket.height * aspect, float(bucket.height)
    else:
        width, height = float(bucket.width), bucket.width / aspect
    left, top = (bucket.width - width) // 2, (bucket.height - height) // 2
    return left, top, left + width, top + height


def _complete(arrays: Arrays, item: Item, shape: tuple[int, int, int], mirrored: bool) -> bool:
    names = ["latents", "latents_flipped"] if mirrored else ["latents"]
    for name in names:
        array = arrays.get(name)
        if array is None or array.dtype.kind != "f" or array.shape != shape or not np.isfinite(array).all():
            return False
    return _mask_fits(arrays, item.subset.mask, item.assignment.bucket)


def _mask_fits(arrays: Arrays, source: str, bucket: Size) -> bool:
    """Whether there is a mask where one is wanted, and none where none is: then alpha was not a colour."""
    mask = arrays.get("alpha_mask")
    if source == "alpha":
        return mask is not None and mask.dtype.kind == "f" and mask.shape == (bucket.height, bucket.width)
    return source == "" and mask is None
