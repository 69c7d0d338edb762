"""Headers of image files: size, orientation and transparency, and whether the file is whole."""

from __future__ import annotations

import importlib
import importlib.util
import os
import struct
import zlib
from functools import cache
from typing import BinaryIO, NamedTuple

from PIL import Image, UnidentifiedImageError

from library.data import shards
from library.data.quick_headers import PNG_SIGNATURE, Quick, quick_header
from library.types import Size

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

UNREADABLE = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    LookupError,
    ArithmeticError,
    TypeError,
    RuntimeError,
    struct.error,
    zlib.error,
)
"""What Pillow raises for damaged files."""

_BINARY = os.O_RDONLY | getattr(os, "O_BINARY", 0)


class DamagedImageError(Exception):
    """A file that isn't a whole image; the message says why."""


class Header(NamedTuple):
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
    try:
        size, mtime_ns, quick = _first_look(path, thorough)
    except (OSError, ValueError) as error:
        raise DamagedImageError(getattr(error, "strerror", None) or str(error)) from error
    if size == 0:
        raise DamagedImageError("the file is empty")
    if quick is None:
        return _decoders_header(path, size, mtime_ns, ignore_orientation, thorough)
    width, height, transparent, orientation = quick
    if ignore_orientation or orientation not in TURNS:
        orientation = 1
    upright = Size(height, width) if orientation >= 5 else Size(width, height)
    return Header(upright, orientation, transparent, size, mtime_ns)


def _first_look(path: str, thorough: bool) -> tuple[int, int, Quick | None]:
    """Bytes, modification time, and what the quick way says. Errors: OSError, ValueError."""
    inside = shards.split(path)
    if inside is not None:
        data = shards.content(*inside)
        return len(data), os.stat(inside[0]).st_mtime_ns, quick_header(-1, len(data), sums=thorough, content=data)  # noqa: PTH116
    descriptor = os.open(path, _BINARY)
    try:
        status = os.fstat(descriptor)
        quick = quick_header(descriptor, status.st_size, sums=thorough) if status.st_size else None
        return status.st_size, status.st_mtime_ns, quick
    finally:
        os.close(descriptor)


def _decoders_header(path: str, size: int, mtime_ns: int, ignore_orientation: bool, thorough: bool) -> Header:
    """The header as Pillow reads it. Errors: DamagedImageError."""
    register_plugins()
    try:
        with shards.opened(path) as file:
            _check_riff(file, size)
            with Image.open(file) as image:
                late_exif = _check_whole(image, file, size, thorough)
                orientation = 1 if ignore_orientation else _orientation(image, late_exif)
                width, height = image.size[::-1] if orientation >= 5 else image.size
                transparent = image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info
        return Header(Size(width, height), orientation, transparent, size, mtime_ns)
    except UnidentifiedImageError:
        raise DamagedImageError(_not_an_image(path)) from None
    except Image.DecompressionBombError:
        raise DamagedImageError("it has too many pixels to be true") from None
    except UNREADABLE as error:
        raise DamagedImageError(str(error) or type(error).__name__) from error


@cache
def register_plugins() -> None:
    """Makes Pillow read JPEG XL where the plug-in is installed."""
    if importlib.util.find_spec("pillow_jxl") is not None:
        importlib.import_module("pillow_jxl")


def _not_an_image(path: str) -> str:
    with shards.opened(path) as file:
        start = file.read(512)
    if path.lower().endswith(".jxl") and start[:2] in (b"\xff\x0a", b"\x00\x00"):
        return "Pillow can't read JPEG XL here (pip install pillow-jxl-plugin)"
    if start.startswith((PNG_SIGNATURE, b"\xff\xd8\xff", b"GIF8", b"BM")) or start[8:12] == b"WEBP":
        return "its beginning is damaged, or the file is cut off"
    kind = next((name for magic, name in OTHER_KINDS.items() if start.lstrip().startswith(magic)), None)
    return f"it is no image but {kind}" if kind else "it is no image that Pillow knows"


def _check_whole(image: Image.Image, file: BinaryIO, size: int, thorough: bool) -> bytes | None:
    """Whether the end of the file is there, reading as little as possible; gives the EXIF data of a PNG."""
    position = file.tell()
    late_exif = None
    if image.format == "PNG":
        late_exif = check_png(file, size, sums=thorough)
    elif image.format != "WEBP" and not _ends_properly(image, file, size):
        file.seek(position)
        image.copy()
    file.seek(position)
    return late_exif


def _check_riff(file: BinaryIO, size: int) -> None:
    """Whether a WebP has the length it says."""
    start = file.read(12)
    file.seek(0)
    if start[:4] == b"RIFF" and int.from_bytes(start[4:8], "little") + 8 > size:
        raise DamagedImageError("the file is cut off")


def check_png(file: BinaryIO, size: int, *, sums: bool = False) -> bytes | None:
    """Goes from chunk to chunk up to the end mark, if wanted with checksums; gives the content of the EXIF chunk."""
    exif, pixels, at = None, False, 8
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
        pixels = pixels or kind == b"IDAT"
        at += length + 12
        if at > size:
            raise DamagedImageError("the file is cut off")
        if kind == b"IEND":
            if not pixels:
                raise DamagedImageError("it has no pixels")
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
    """The EXIF orientation; 1 where the data can't be read, which harms no pixel."""
    try:
        value = _exif(image, late_exif).get(EXIF_ORIENTATION, 1)
    except UNREADABLE:
        return 1
    return value if value in TURNS else 1


def _exif(image: Image.Image, late_exif: bytes | None) -> Image.Exif:
    if image.format == "PNG" and "exif" not in image.info and "Raw profile type exif" not in image.info:
        # asking Pillow would decode all pixels in search of data behind them
        exif = Image.Exif()
        exif.load(late_exif or b"")
        return exif
    return image.getexif()
