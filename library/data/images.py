"""Image files: what their headers say, whether they are whole, and their pixels as the model wants them."""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from library.data.buckets import Assignment
from library.log import DataError
from library.types import Size

if TYPE_CHECKING:
    from torch import Tensor

Pixels = np.ndarray[Any, np.dtype[np.uint8]]
"""(H, W, 3), RGB."""

EXIF_ORIENTATION = 0x0112
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes an image upright, by EXIF orientation."""

OTHER_KINDS = {b"PK": "a zip archive", b"<": "a web page or XML", b"{": "JSON", b"%PDF": "a PDF"}
"""What is found under the names of images, by its first bytes."""

UNREADABLE = (OSError, ValueError, SyntaxError, struct.error, EOFError, IndexError, KeyError)
"""What Pillow raises for damaged files."""

LARGEST_EXCESS = 8
"""An image that is resized to more than this many times its bucket is cropped first."""


class DamagedImageError(Exception):
    """A file that isn't a whole image; the message says why."""


@dataclass(frozen=True)
class Header:
    """What is known of an image file without its pixels."""

    size: Size
    """Upright."""
    orientation: int
    """EXIF orientation to undo; 1: upright already."""
    transparent: bool
    """Whether it has an alpha channel or a transparent colour."""
    file_bytes: int
    mtime_ns: int


def read_header(path: str, *, ignore_orientation: bool = False, thorough: bool = False) -> Header:
    """Size, orientation and transparency of an image file, whatever its extension says.

    `thorough` reads the whole of a PNG and compares its checksums. Errors: DamagedImageError.
    """
    _register_plugins()
    try:
        with Path(path).open("rb") as file:
            status = os.fstat(file.fileno())
            if status.st_size == 0:
                raise DamagedImageError("the file is empty")
            with Image.open(file) as image:
                late_exif = _check_whole(image, file, status.st_size, thorough)
                orientation = 1 if ignore_orientation else _orientation(image, late_exif)
                width, height = image.size[::-1] if orientation >= 5 else image.size
                transparent = image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info
        return Header(Size(width, height), orientation, transparent, status.st_size, status.st_mtime_ns)
    except UnidentifiedImageError:
        raise DamagedImageError(_not_an_image(path)) from None
    except Image.DecompressionBombError:
        raise DamagedImageError("it has too many pixels to be true") from None
    except UNREADABLE as error:
        raise DamagedImageError(str(error) or type(error).__name__) from error


@cache
def _register_plugins() -> None:
    """Makes Pillow read JPEG XL where the plug-in is installed."""
    if importlib.util.find_spec("pillow_jxl") is not None:
        importlib.import_module("pillow_jxl")


def _not_an_image(path: str) -> str:
    with Path(path).open("rb") as file:
        start = file.read(512)
    if path.lower().endswith(".jxl") and start[:2] in (b"\xff\x0a", b"\x00\x00"):
        return "Pillow can't read JPEG XL here (pip install pillow-jxl-plugin)"
    kind = next((name for magic, name in OTHER_KINDS.items() if start.startswith(magic)), None)
    return f"it is no image but {kind}" if kind else "it is no image that Pillow knows"


def _check_whole(image: Image.Image, file: BinaryIO, size: int, thorough: bool) -> bytes | None:
    """Whether the end of the file is there, reading as little as possible; gives the EXIF data of a PNG."""
    position = file.tell()
    late_exif = None
    if image.format == "PNG":
        late_exif = _check_png(file, size, sums=thorough)
    elif image.format == "WEBP":
        file.seek(4)
        if int.from_bytes(file.read(4), "little") + 8 > size:
            raise DamagedImageError("the file is cut off")
    elif not _ends_properly(image, file, size):
        file.seek(position)
        image.copy()
    file.seek(position)
    return late_exif


def _check_png(file: BinaryIO, size: int, *, sums: bool = False) -> bytes | None:
    """Goes from chunk to chunk up to the end mark, if wanted with checksums; gives the content of the EXIF chunk."""
    exif, at = None, 8
    while True:
        file.seek(at)
        head = file.read(8)
        if len(head) < 8:
            raise DamagedImageError("the file is cut off")
        length, kind = int.from_bytes(head[:4], "big"), head[4:]
        if kind == b"eXIf":
            exif = file.read(length)
        if sums:
            file.seek(at + 4)
            content = file.read(4 + length)
            if zlib.crc32(content) != int.from_bytes(file.read(4), "big"):
                raise DamagedImageError("a checksum is wrong")
        at += length + 12
        if at > size:
            raise DamagedImageError("the file is cut off")
        if kind == b"IEND":
            return exif


def _ends_properly(image: Image.Image, file: BinaryIO, size: int) -> bool:
    """Whether the last bytes show that nothing is missing; otherwise only decoding can tell."""
    if image.format in ("JPEG", "MPO", "GIF"):
        file.seek(max(size - 64, 0))
        tail = file.read().rstrip(b"\x00\r\n ")
        return tail.endswith(b"\x3b" if image.format == "GIF" else b"\xff\xd9")
    tiles = getattr(image, "tile", None)
    if image.format in ("BMP", "DIB") and tiles and tiles[0][0] == "raw":
        _, _, offset, arguments = tiles[0]
        stride = arguments[1] if isinstance(arguments, tuple) else 0
        return bool(stride) and offset + stride * image.height <= size
    return False


def _orientation(image: Image.Image, late_exif: bytes | None) -> int:
    if image.format == "PNG" and "exif" not in image.info and "Raw profile type exif" not in image.info:
        # asking Pillow would decode all pixels in search of data behind them
        exif = Image.Exif()
        exif.load(late_exif or b"")
    else:
        exif = image.getexif()
    value = exif.get(EXIF_ORIENTATION, 1)
    return value if value in TURNS else 1


def load_pixels(
    path: str,
    original: Size,
    assignment: Assignment,
    *,
    orientation: int = 1,
    interpolation: str | None = None,
    mirrored: bool = False,
) -> Pixels:
    """The pixels of an image, upright, resized and cropped to its bucket.

    Errors: DataError when it can't be decoded or isn't the image any more whose header was read.
    """
    _register_plugins()
    try:
        with Path(path).open("rb") as file, Image.open(file) as image:
            if image.format == "PNG":  # Pillow doesn't look at the checksums of pixels
                position = file.tell()
                _check_png(file, os.fstat(file.fileno()).st_size, sums=True)
                file.seek(position)
            upright = _rgb(image)
            if orientation in TURNS:
                upright = upright.transpose(TURNS[orientation])
    except (*UNREADABLE, DamagedImageError, Image.DecompressionBombError) as error:
        raise DataError(f"can't decode the image: {error}", path, "mend or remove it", code="E-IMAGE") from error
    if upright.size != tuple(original):
        seen = f"it was {original}, now it is {Size(*upright.size)}"
        raise DataError(f"the image has changed since the start: {seen}", path, "start again", code="E-IMAGE")
    pixels = _fitted(np.asarray(upright), assignment, interpolation)
    return np.require(pixels[:, ::-1] if mirrored else pixels, requirements=["C", "W"])


def _rgb(image: Image.Image) -> Image.Image:
    """An image as 8-bit RGB; transparent parts show the colour stored under them."""
    if image.mode.startswith("I"):  # 16 bits; Pillow would clip instead of scaling
        values = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        return Image.fromarray(np.clip(np.nan_to_num(np.asarray(image)) + 0.5, 0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("P", "PA", "RGBa", "La"):
        return image.convert("RGBA").convert("RGB")
    return image.convert("RGB")


def _fitted(pixels: Pixels, assignment: Assignment, interpolation: str | None) -> Pixels:
    """Resized and cropped to the bucket."""
    bucket, resized = assignment.bucket, assignment.resized
    left, top = assignment.left, assignment.top
    height, width = pixels.shape[:2]
    if (width, height) == resized:
        return pixels[top : top + bucket.height, left : left + bucket.width]
    if resized.area > LARGEST_EXCESS * bucket.area:
        by_x, by_y = width / resized.width, height / resized.height
        columns = slice(int(left * by_x), math.ceil((left + bucket.width) * by_x))
        rows = slice(int(top * by_y), math.ceil((top + bucket.height) * by_y))
        return resize(np.ascontiguousarray(pixels[rows, columns]), bucket, interpolation)
    return resize(pixels, resized, interpolation)[top : top + bucket.height, left : left + bucket.width]


def resize(pixels: Pixels, size: Size, interpolation: str | None = None) -> Pixels:
    """Pixels in another size; by default averaged when both sides shrink, else by Lanczos."""
    height, width = pixels.shape[:2]
    if interpolation is None:
        interpolation = "area" if size.width < width and size.height < height else "lanczos"
    return _RESIZERS[interpolation](pixels, size)


def _with_pillow(method: Image.Resampling) -> Callable[[Pixels, Size], Pixels]:
    def resized(pixels: Pixels, size: Size) -> Pixels:
        return np.asarray(Image.fromarray(pixels).resize((size.width, size.height), method))

    return resized


def _with_opencv(method: str) -> Callable[[Pixels, Size], Pixels]:
    def resized(pixels: Pixels, size: Size) -> Pixels:
        import cv2

        return np.asarray(cv2.resize(pixels, tuple(size), interpolation=getattr(cv2, method)), dtype=np.uint8)

    return resized


_RESIZERS: dict[str, Callable[[Pixels, Size], Pixels]] = {
    "lanczos": _with_pillow(Image.Resampling.LANCZOS),
    "box": _with_pillow(Image.Resampling.BOX),
    "nearest": _with_opencv("INTER_NEAREST_EXACT"),
    "bilinear": _with_opencv("INTER_LINEAR"),
    "linear": _with_opencv("INTER_LINEAR"),
    "bicubic": _with_opencv("INTER_CUBIC"),
    "cubic": _with_opencv("INTER_CUBIC"),
    "area": _with_opencv("INTER_AREA"),
}


def to_tensor(pixels: Pixels) -> Tensor:
    """(3, H, W) float32 in [-1, 1] of (H, W, 3) pixels."""
    import torch

    return torch.from_numpy(pixels).permute(2, 0, 1).float().div(127.5).sub(1)
