"""Pixels in another size, and the part of them that a sample shows."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from library.types import Size

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
"""(H, W, 3) colours, or (H, W) of one channel."""

LARGEST_EXCESS = 8
"""An image that is resized to more than this many times its bucket is cropped first."""


def fitted(pixels: Bytes, resized: Size, left: int, top: int, bucket: Size, interpolation: str | None) -> Bytes:
    """What lies in the bucket, whose corner is at (`left`, `top`) of the resized pixels."""
    height, width = pixels.shape[:2]
    if (width, height) == resized:
        return pixels[top : top + bucket.height, left : left + bucket.width]
    if resized.area > LARGEST_EXCESS * bucket.area:
        by_x, by_y = width / resized.width, height / resized.height
        columns = slice(int(left * by_x), math.ceil((left + bucket.width) * by_x))
        rows = slice(int(top * by_y), math.ceil((top + bucket.height) * by_y))
        return resize(np.ascontiguousarray(pixels[rows, columns]), bucket, interpolation)
    return resize(pixels, resized, interpolation)[top : top + bucket.height, left : left + bucket.width]


def resize(pixels: Bytes, size: Size, interpolation: str | None = None) -> Bytes:
    """Pixels in another size; by default averaged when both sides shrink, else by Lanczos."""
    height, width = pixels.shape[:2]
    if interpolation is None:
        interpolation = "area" if size.width < width and size.height < height else "lanczos"
    return _RESIZERS[interpolation](np.ascontiguousarray(pixels), size)


def _with_pillow(method: Image.Resampling) -> Callable[[Bytes, Size], Bytes]:
    def resized(pixels: Bytes, size: Size) -> Bytes:
        return np.asarray(Image.fromarray(pixels).resize((size.width, size.height), method))

    return resized


def _with_opencv(method: str) -> Callable[[Bytes, Size], Bytes]:
    def resized(pixels: Bytes, size: Size) -> Bytes:
        import cv2

        return np.asarray(cv2.resize(pixels, tuple(size), interpolation=getattr(cv2, method)), dtype=np.uint8)

    return resized


_RESIZERS: dict[str, Callable[[Bytes, Size], Bytes]] = {
    "lanczos": _with_pillow(Image.Resampling.LANCZOS),
    "box": _with_pillow(Image.Resampling.BOX),
    "nearest": _with_opencv("INTER_NEAREST_EXACT"),
    "bilinear": _with_opencv("INTER_LINEAR"),
    "linear": _with_opencv("INTER_LINEAR"),
    "bicubic": _with_opencv("INTER_CUBIC"),
    "cubic": _with_opencv("INTER_CUBIC"),
    "area": _with_opencv("INTER_AREA"),
    "lanczos4": _with_opencv("INTER_LANCZOS4"),
}
