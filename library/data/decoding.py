"""Image files become arrays of 8 bits: colours, and how opaque each pixel is."""

from __future__ import annotations

import os
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import Image

from library.data import shards
from library.data.headers import TURNS, UNREADABLE, DamagedImageError, check_png, register_plugins
from library.log import DataError

Pixels = np.ndarray[Any, np.dtype[np.uint8]]
"""(H, W, 3), RGB."""
Plane = np.ndarray[Any, np.dtype[np.uint8]]
"""(H, W)"""
Colour = tuple[int, int, int]

_STEPS_TO_RGBA = {"RGBA": (), "LA": ("RGBA",), "PA": ("RGBA",), "RGBa": ("RGBA",), "La": ("LA", "RGBA")}
"""Modes with an alpha channel, and what they have to become one after the other."""
_ONE_COLOUR_TRANSPARENT = ("1", "L", "P", "RGB")
"""Modes of which colours may be declared transparent."""
_PNG_DEPTH_AT = 24


class Decoded(NamedTuple):
    """An upright picture."""

    colours: Pixels
    """Transparent parts show the colour stored under them."""
    opacity: Plane | None
    """0: transparent, 255: opaque; None: all is opaque."""

    def on(self, background: Colour | None) -> Pixels:
        """The picture as seen in front of a colour; None: the colours stored under transparent parts show."""
        if background is None or self.opacity is None:
            return self.colours
        opacity = self.opacity[..., None].astype(np.uint32)
        behind = np.array(background, dtype=np.uint32)
        return ((self.colours * opacity + behind * (255 - opacity) + 127) // 255).astype(np.uint8)


def decoded(path: str, orientation: int = 1) -> Decoded:
    """The first picture of a file, made upright.

    Errors: DataError naming the file when it can't be decoded, or when a checksum in a PNG is wrong.
    """
    register_plugins()
    try:
        with shards.opened(path) as file, Image.open(file) as image:
            depth = _checked_depth(file) if image.format == "PNG" else 8
            colours, opacity = _channels(image, depth)
            if orientation in TURNS:
                colours = colours.transpose(TURNS[orientation])
                opacity = None if opacity is None else opacity.transpose(TURNS[orientation])
            return Decoded(np.asarray(colours), None if opacity is None else np.asarray(opacity))
    except (*UNREADABLE, DamagedImageError, Image.DecompressionBombError) as error:
        raise DataError(f"can't decode the image: {error}", path, "mend or remove it", code="E-IMAGE") from error


def _checked_depth(file: BinaryIO) -> int:
    """Bits per channel of a PNG, whose checksums are compared first, since Pillow doesn't look at those of pixels."""
    position = file.tell()
    check_png(file, file.seek(0, os.SEEK_END), sums=True)
    file.seek(_PNG_DEPTH_AT)
    depth = file.read(1)[0]
    file.seek(position)
    return depth


def _channels(image: Image.Image, depth: int) -> tuple[Image.Image, Image.Image | None]:
    """RGB and opacity of an image of any mode."""
    transparent = image.info.get("transparency")
    if image.mode.startswith("I"):  # 16 bits; Pillow would clip instead of scaling
        values = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        opacity = None
        if isinstance(transparent, int):
            opacity = Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8))
        return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB"), opacity
    if image.mode == "F":
        values = np.clip(np.nan_to_num(np.asarray(image)) + 0.5, 0, 255)
        return Image.fromarray(values.astype(np.uint8)).convert("RGB"), None
    steps = _STEPS_TO_RGBA.get(image.mode)
    if steps is None:
        if transparent is None or image.mode not in _ONE_COLOUR_TRANSPARENT:
            return image.convert("RGB"), None
        image.info["transparency"] = _in_eight_bits(transparent, image.mode, depth)
        steps = ("RGBA",)
    image.load()
    for mode in steps:
        image = image.convert(mode)
    return image.convert("RGB"), image.getchannel("A")


def _in_eight_bits(transparent: Any, mode: str, depth: int) -> Any:
    """The colour that is transparent, on the scale of the decoded pixels; Pillow leaves it on that of the file."""
    if mode == "L" and depth < 8:
        return transparent * 255 // ((1 << depth) - 1)
    if mode == "RGB" and depth == 16:
        return tuple(value >> 8 for value in transparent)
    return transparent
