"""What a sample shows of its image file: pixels as the autoencoder wants them, mask and conditioning image."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from library.data.decoding import Decoded, Pixels, decoded
from library.data.headers import DamagedImageError, read_header
from library.data.items import Item
from library.data.resizing import fitted
from library.data.views import View
from library.log import DataError
from library.types import Size

if TYPE_CHECKING:
    from torch import Tensor

Mask = np.ndarray[Any, np.dtype[np.float32]]
"""(H, W) in [0, 1]: the weight of each pixel."""


class Picture(NamedTuple):
    """What a sample shows, all of the size of its bucket."""

    pixels: Pixels
    """(H, W, 3) uint8"""
    mask: Mask | None
    """None: the subset has no masks."""
    conditioning: Pixels | None
    """(H, W, 3) uint8; None: not wanted, or there is none."""


def load_picture(item: Item, view: View, *, conditioning: bool = False) -> Picture:
    """Pixels, mask and, when wanted, the conditioning image of a sample.

    Errors: DataError naming the file when one can't be decoded, isn't the image any more whose header was read, or
    differs in size from its conditioning image.
    """
    if item.gone:
        what = "the image isn't there any more, and its cached latents aren't right for these settings"
        raise DataError(what, item.path, "restore the image, or the settings", code="E-IMAGE-GONE")
    subset = item.subset
    image = decoded(item.path, item.orientation)
    size = _size(image.colours)
    if size != item.original:
        seen = f"it was {item.original}, now it is {size}"
        raise DataError(f"the image has changed since the start: {seen}", item.path, "start again", code="E-IMAGE")
    pixels = _shown(image.on(subset.background), item, view, subset.resize_interpolation)
    if view.hue is not None:
        pixels = with_hue(pixels, view.hue)
    if view.gamma is not None:
        pixels = with_gamma(pixels, view.gamma)
    from_conditioning = subset.mask == "conditioning"
    shown = _conditioning(item, view) if conditioning or from_conditioning else None
    if from_conditioning:
        mask = _weights(shown[..., 0]) if shown is not None else None
    else:
        mask = _alpha_mask(image, item, view) if subset.mask == "alpha" else None
    return Picture(_owned(pixels), mask, shown if conditioning else None)


def load_conditioning(item: Item, view: View) -> Pixels:
    """The conditioning image of a sample, resized, cropped and mirrored like its image.

    Errors: DataError naming the file, or both when they differ in size.
    """
    shown = _conditioning(item, view)
    if shown is None:
        raise DataError("the image has no conditioning image", item.path, code="E-DATA-PAIR")
    return shown


def _alpha_mask(image: Decoded, item: Item, view: View) -> Mask:
    """How opaque each pixel is; 1 for an image without transparency."""
    if image.opacity is None:
        bucket = item.assignment.bucket
        return np.ones((bucket.height, bucket.width), dtype=np.float32)
    return _weights(_shown(image.opacity, item, view, item.subset.resize_interpolation))


def _conditioning(item: Item, view: View) -> Pixels | None:
    if item.conditioning is None:
        return None
    image = _upright_like(item, item.conditioning)
    size = _size(image.colours)
    if size != item.original:
        what = f"{item.conditioning} is {size}, but its image is {item.original}"
        raise DataError(what, item.path, "make both equally large", code="E-DATA-PAIR")
    shown: Pixels = _owned(_shown(image.colours, item, view, "area"))
    return shown


def _upright_like(item: Item, path: str) -> Decoded:
    """A conditioning image, turned by its own orientation; not where only the stored one has the image's size."""
    try:
        header = read_header(path)
    except DamagedImageError as error:
        what = f"can't decode the conditioning image: {error}"
        raise DataError(what, path, "mend or remove it", code="E-IMAGE") from error
    upright = header.size == item.original or header.size[::-1] != item.original
    return decoded(path, header.orientation if upright else 1)


def _shown(pixels: Any, item: Item, view: View, interpolation: str | None) -> Any:
    """The part of colours or of one channel that a view shows."""
    part = fitted(pixels, view.resized, view.left, view.top, item.assignment.bucket, interpolation)
    return part[:, ::-1] if view.mirrored else part


def _size(pixels: Pixels) -> Size:
    return Size(pixels.shape[1], pixels.shape[0])


def _weights(channel: Any) -> Mask:
    weights: Mask = _owned(channel.astype(np.float32) / np.float32(255))
    return weights


def _owned(array: Any) -> Any:
    """The array as tensors can share it."""
    return np.require(array, requirements=["C", "W"])


def with_hue(pixels: Pixels, degrees: float) -> Pixels:
    """Pixels with their hues turned on the colour circle."""
    import cv2

    colours = cv2.cvtColor(np.ascontiguousarray(pixels, dtype=np.float32) / 255, cv2.COLOR_RGB2HSV)
    colours[..., 0] = (colours[..., 0] + degrees) % 360
    turned = np.asarray(cv2.cvtColor(colours, cv2.COLOR_HSV2RGB))
    return np.clip(turned * 255 + 0.5, 0, 255).astype(np.uint8)


def with_gamma(pixels: Pixels, gamma: float) -> Pixels:
    """Pixels with their values, from 0 to 255, raised to a power."""
    table = np.clip(np.arange(256, dtype=np.float64) ** gamma + 0.5, 0, 255).astype(np.uint8)
    return table[pixels]


def to_tensor(pixels: Pixels) -> Tensor:
    """(3, H, W) float32 in [-1, 1] of (H, W, 3) pixels."""
    import torch

    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous().float().div(127.5).sub(1)
