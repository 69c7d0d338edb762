"""The headers of ordinary PNG, JPEG and WebP files, read without a decoder: a hundred thousand in a few seconds.

Whatever is unusual or looks damaged gives None: then a decoder has the word.
"""

from __future__ import annotations

import os
import struct
import zlib
from typing import NamedTuple

AT_ONCE = 1 << 16
"""Bytes read with the first look; few files need another one."""
MOST_PIXELS = 80_000_000
"""Larger ones are left to the decoder, which may find them too large to be true."""

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
"""Bits per channel by colour type."""
_PNG_ALPHA = (4, 6)
_PNG_TEXT = (b"tEXt", b"zTXt", b"iTXt")
_JPEG_READ = frozenset((0xC0, 0xC1, 0xC2, 0xDA, 0xDB, 0xE1))
"""Frames, pixels, tables and EXIF or XMP."""
_JPEG_MARKERS = _JPEG_READ | frozenset((0xC4, 0xDD, *range(0xE0, 0xF0), 0xFE))
_WEBP_ALPHA = 0x10
_WEBP_FLAGS = {b"ALPH": _WEBP_ALPHA, b"EXIF": 0x08, b"ICCP": 0x20}
"""What the header says when there are such parts; animations and XMP, which may turn a picture, are unusual."""
_EXIF_START = b"Exif\x00\x00"
_ORIENTATION = 0x0112
_EXIF_SHORT = 3


class Quick(NamedTuple):
    """What a header says of the pixels as they are stored."""

    width: int
    height: int
    transparent: bool
    orientation: int
    """As the file has it; 1 where it says nothing."""


class _UnusualError(Exception):
    """A file for the decoder."""


class _Window:
    """A file of which the beginning is in memory and the rest is read where it is needed."""

    def __init__(self, descriptor: int, start: bytes, size: int) -> None:
        self.start, self.size = start, size
        self._descriptor = descriptor

    def at(self, offset: int, length: int) -> bytes:
        """Some bytes; raises `_UnusualError` where the file ends before."""
        end = offset + length
        if end > self.size:
            raise _UnusualError
        if end <= len(self.start):
            return self.start[offset:end]
        os.lseek(self._descriptor, offset, os.SEEK_SET)
        data = os.read(self._descriptor, length)
        if len(data) != length:
            raise _UnusualError
        return data


def quick_header(descriptor: int, size: int, *, sums: bool = False, content: bytes | None = None) -> Quick | None:
    """The header of an open file of `size` bytes, or of its `content`; None where a decoder should look.

    Whole files only: the end of the file is looked at, too. With `sums` the checksums of all parts of a PNG agree.
    """
    try:
        start = os.read(descriptor, AT_ONCE) if content is None else content
        window = _Window(descriptor, start, size)
        if start.startswith(PNG_SIGNATURE):
            found = _png(window, sums)
        elif start.startswith(b"\xff\xd8\xff"):
            found = _jpeg(window)
        elif start[:4] == b"RIFF" and start[8:12] == b"WEBP":
            found = _webp(window)
        else:
            return None
    except (_UnusualError, struct.error, IndexError, OSError):
        return None
    return found if 0 < found.width * found.height <= MOST_PIXELS else None


def _png(window: _Window, sums: bool) -> Quick:
    """Goes from chunk to chunk up to the end mark; before the pixels checksums must agree."""
    content = window.at(8, 25)
    length, kind, width, height, depth, colours, *methods, checksum = struct.unpack(">I4sIIBBBBBI", content)
    if length != 13 or kind != b"IHDR" or depth not in _PNG_DEPTHS.get(colours, ()) or methods[:2] != [0, 0]:
        raise _UnusualError
    if zlib.crc32(content[4:21]) != checksum:
        raise _UnusualError
    transparent, orientation, pixels = colours in _PNG_ALPHA, 1, False
    at, start, known = 33, window.start, len(window.start)
    while True:
        head = start[at : at + 8] if at + 8 <= known else window.at(at, 8)
        length, kind = int.from_bytes(head[:4], "big"), head[4:]
        if kind == b"IDAT":
            pixels = True
        if sums or not pixels or kind == b"eXIf":
            body = _checked_chunk(window, at, length)
            if kind == b"tRNS":
                transparent = True
            elif kind == b"eXIf":
                orientation = _orientation(body)
            elif kind in _PNG_TEXT and b"exif" in body[:40].lower():
                raise _UnusualError
        at += length + 12
        if at > window.size or (kind == b"IEND" and not pixels):
            raise _UnusualError
        if kind == b"IEND":
            return Quick(width, height, transparent, orientation)


def _checked_chunk(window: _Window, at: int, length: int) -> bytes:
    """The content of a PNG's chunk, whose checksum must agree."""
    body = window.at(at + 4, length + 8)
    if zlib.crc32(body[:-4]) != int.from_bytes(body[-4:], "big"):
        raise _UnusualError
    return body[4:-4]


def _jpeg(window: _Window) -> Quick:
    """Goes from marker to marker up to the pixels; the file must end with the end mark."""
    tail = window.at(max(window.size - 64, 0), min(window.size, 64))
    if not tail.rstrip(b"\x00\r\n ").endswith(b"\xff\xd9"):
        raise _UnusualError
    frames: list[tuple[int, int]] = []
    exif: list[bytes] = []
    at = 2
    while True:
        head = window.at(at, 4)
        marker, length = head[1], int.from_bytes(head[2:], "big")
        if head[0] != 0xFF or length < 2 or marker not in _JPEG_MARKERS:
            raise _UnusualError
        if marker in _JPEG_READ:
            content = window.at(at + 4, length - 2)
            if marker == 0xDA:
                break
            if marker == 0xDB:
                _check_tables(content)
            elif marker != 0xE1:
                frames.append(_jpeg_frame(content))
            elif b"tiff:Orientation" in content:
                raise _UnusualError
            elif content.startswith(_EXIF_START):
                exif.append(content[6:])
        at += 2 + length
    if len(frames) != 1 or len(exif) > 1:
        raise _UnusualError
    return Quick(*frames[0], False, _orientation(exif[0]) if exif else 1)


def _jpeg_frame(content: bytes) -> tuple[int, int]:
    """Width and height."""
    bits, height, width, channels = struct.unpack_from(">BHHB", content)
    if bits != 8 or channels not in (1, 3, 4) or len(content) != 6 + 3 * channels:
        raise _UnusualError
    return width, height


def _check_tables(content: bytes) -> None:
    """Whether quantization tables are whole."""
    at = 0
    while at < len(content):
        at += 65 if content[at] < 16 else 129
    if at != len(content):
        raise _UnusualError


def _webp(window: _Window) -> Quick:
    """The size in the header, which the part with the pixels must confirm."""
    end = int.from_bytes(window.at(4, 4), "little") + 8
    kind = window.at(12, 4)
    if end > window.size or end < 30:
        raise _UnusualError
    if kind != b"VP8X":
        length = int.from_bytes(window.at(16, 4), "little")
        if 20 + length + (length & 1) != end:
            raise _UnusualError
        width, height, transparent = _webp_pixels(window, 12, end)
        return Quick(width, height, transparent, 1)
    flags, canvas = window.at(20, 1)[0], window.at(24, 6)
    size = int.from_bytes(canvas[:3], "little") + 1, int.from_bytes(canvas[3:], "little") + 1
    orientation, pixels, said, at = 1, None, 0, 12
    while at < end:
        kind, length = window.at(at, 4), int.from_bytes(window.at(at + 4, 4), "little")
        if at + 8 + length > end:
            raise _UnusualError
        if kind in (b"VP8 ", b"VP8L"):
            pixels = _webp_pixels(window, at, end)
            said |= _WEBP_ALPHA if pixels[2] else 0
        elif kind == b"EXIF":
            orientation = _orientation(window.at(at + 8, length).removeprefix(_EXIF_START))
        said |= _WEBP_FLAGS.get(kind, 0)
        at += 8 + length + (length & 1)
    if pixels is None or pixels[:2] != size or flags != said or at != end:
        raise _UnusualError
    return Quick(*size, bool(flags & _WEBP_ALPHA), orientation)


def _webp_pixels(window: _Window, at: int, end: int) -> tuple[int, int, bool]:
    """Width, height and whether there is transparency, from the start of a compressed picture."""
    kind, length = window.at(at, 4), int.from_bytes(window.at(at + 4, 4), "little")
    if at + 8 + length > end:
        raise _UnusualError
    data = window.at(at + 8, 10)
    if kind == b"VP8L" and data[0] == 0x2F:
        bits = int.from_bytes(data[1:5], "little")
        if bits >> 29:
            raise _UnusualError
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1, bool(bits >> 28 & 1)
    tag = int.from_bytes(data[:3], "little")
    is_key_frame, profile, is_shown, first_part = not tag & 1, tag >> 1 & 7, tag >> 4 & 1, tag >> 5
    if kind != b"VP8 " or not (is_key_frame and is_shown and profile <= 3 and first_part < length):
        raise _UnusualError
    if data[3:6] != b"\x9d\x01\x2a":
        raise _UnusualError
    width, height = struct.unpack("<HH", data[6:10])
    return width & 0x3FFF, height & 0x3FFF, False


def _orientation(exif: bytes) -> int:
    """The orientation in EXIF data, which begins with the mark of its byte order; 1 where the data breaks off."""
    order = {b"II*\x00": "<", b"MM\x00*": ">"}.get(exif[:4])
    if order is None:
        raise _UnusualError
    try:
        (first,) = struct.unpack_from(order + "I", exif, 4)
        (count,) = struct.unpack_from(order + "H", exif, first)
        for entry in range(first + 2, first + 2 + 12 * count, 12):
            tag, kind, values = struct.unpack_from(order + "HHI", exif, entry)
            if tag == _ORIENTATION:
                if kind != _EXIF_SHORT or values != 1:
                    raise _UnusualError
                return int(struct.unpack_from(order + "H", exif, entry + 8)[0])
    except struct.error:
        pass
    return 1
