"""Files that lie under the names of images: every mode and format, all orientations, and damage of every sort."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageCms, features

WIDTH, HEIGHT = 60, 40
ORIENTATION = 0x0112


@dataclass(frozen=True)
class Good:
    """A file that has to be read."""

    content: bytes
    colours: np.ndarray | None
    """(H, W, 3), upright; None: only the size is compared."""
    alpha: np.ndarray | None = None
    """(H, W): what is left of it is compared within the tolerance, too."""
    size: tuple[int, int] = (WIDTH, HEIGHT)
    tolerance: float = 0
    """Mean difference of the values that the format costs."""


def picture(width: int = WIDTH, height: int = HEIGHT) -> Image.Image:
    """A picture without symmetry."""
    y, x = np.mgrid[0:height, 0:width]
    channels = [x * 255 // max(width - 1, 1), y * 255 // max(height - 1, 1), (x + 2 * y) * 2 % 256]
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    """The content of a file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


def chunk(kind: bytes, content: bytes) -> bytes:
    """A part of a PNG."""
    return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")


def png(width: int, height: int, depth: int, colours: int, rows: list[bytes], *extra: bytes) -> bytes:
    """A PNG of raw rows, for what no library writes."""
    head = struct.pack(">IIBBBBB", width, height, depth, colours, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    return b"\x89PNG\r\n\x1a\n" + b"".join([chunk(b"IHDR", head), *extra, chunk(b"IDAT", pixels), chunk(b"IEND", b"")])


def _alpha() -> np.ndarray:
    return np.linspace(0, 255, WIDTH * HEIGHT).astype(np.uint8).reshape(HEIGHT, WIDTH)


def _grey(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("L").convert("RGB"))


def modes() -> Iterator[tuple[str, Good]]:
    """All modes that files can have."""
    rgb = picture()
    colours, alpha = np.asarray(rgb), _alpha()
    grey, grey_array = rgb.convert("L"), np.asarray(rgb.convert("L"))
    rgba, grey_alpha = rgb.copy(), grey.convert("LA")
    rgba.putalpha(Image.fromarray(alpha))
    grey_alpha.putalpha(Image.fromarray(alpha))
    bits = grey.convert("1")
    palette = rgb.quantize(32)
    seen = np.asarray(palette.convert("RGB"))
    indices = np.asarray(palette)
    yield "1.png", Good(saved(bits, "PNG"), _grey(bits))
    yield "l.png", Good(saved(grey, "PNG"), _grey(grey))
    yield "la.png", Good(saved(grey_alpha, "PNG"), _grey(grey), alpha)
    yield "p.png", Good(saved(palette, "PNG"), seen)
    yield (
        "p one transparent.png",
        Good(saved(palette, "PNG", transparency=3), seen, np.where(indices == 3, 0, 255).astype(np.uint8)),
    )
    levels = bytes(range(0, 256, 8))
    yield (
        "p levels.png",
        Good(saved(palette, "PNG", transparency=levels), seen, np.frombuffer(levels, np.uint8)[indices]),
    )
    yield "rgb.png", Good(saved(rgb, "PNG"), colours)
    key = tuple(map(int, colours[5, 7]))
    opaque = np.where((colours == key).all(-1), 0, 255).astype(np.uint8)
    yield "rgb one transparent.png", Good(saved(rgb, "PNG", transparency=key), colours, opaque)
    key_grey = int(grey_array[3, 3])
    opaque = np.where(grey_array == key_grey, 0, 255).astype(np.uint8)
    yield "l one transparent.png", Good(saved(grey, "PNG", transparency=key_grey), _grey(grey), opaque)
    yield "rgba.png", Good(saved(rgba, "PNG"), colours, alpha)
    grey16 = Image.fromarray(grey_array.astype(np.uint16) * 257)
    yield "i16.png", Good(saved(grey16, "PNG"), _grey(grey))
    yield "i.tiff.png", Good(saved(Image.fromarray(grey_array.astype(np.int32) * 257), "TIFF"), _grey(grey))
    yield "f.tiff.png", Good(saved(grey.convert("F"), "TIFF"), _grey(grey))
    yield "cmyk.tiff.png", Good(saved(rgb.convert("CMYK"), "TIFF"), colours)
    yield "ycbcr.tiff.png", Good(saved(rgb.convert("YCbCr"), "TIFF"), colours, tolerance=2)
    yield "rgba.tiff.png", Good(saved(rgba, "TIFF"), colours, alpha)
    srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    in_lab = ImageCms.profileToProfile(rgb, srgb, lab, outputMode="LAB")
    yield "lab.tiff.png", Good(saved(in_lab, "TIFF"), None)


def by_hand() -> Iterator[tuple[str, Good]]:
    """PNGs of few and of many bits, with a transparent colour in their own scale."""
    five, ten = b"\x5a", np.array([[85, 170]])
    yield (
        "4 bits.png",
        Good(
            png(2, 1, 4, 0, [five], chunk(b"tRNS", b"\0\5")),
            np.repeat(ten[..., None], 3, -1),
            ten * 0 + [[0, 255]],
            (2, 1),
        ),
    )
    wide = struct.pack(">6H", 1000, 2000, 3000, 60000, 5, 6)
    yield (
        "48 bits.png",
        Good(
            png(2, 1, 16, 2, [wide], chunk(b"tRNS", wide[:6])),
            np.array([[[3, 7, 11], [234, 0, 0]]]),
            np.array([[0, 255]]),
            (2, 1),
        ),
    )
    yield (
        "16 bits.png",
        Good(
            png(2, 1, 16, 0, [struct.pack(">2H", 257 * 9, 257 * 200)], chunk(b"tRNS", struct.pack(">H", 257 * 9))),
            np.array([[[9] * 3, [200] * 3]]),
            np.array([[0, 255]]),
            (2, 1),
        ),
    )
    yield (
        "1 bit.png",
        Good(
            png(2, 1, 1, 0, [b"\x40"], chunk(b"tRNS", b"\0\1")),
            np.array([[[0] * 3, [255] * 3]]),
            np.array([[255, 0]]),
            (2, 1),
        ),
    )
    yield (
        "64 bits.png",
        Good(
            png(1, 1, 16, 6, [struct.pack(">4H", 257 * 1, 257 * 2, 257 * 3, 257 * 4)]),
            np.array([[[1, 2, 3]]]),
            np.array([[4]]),
            (1, 1),
        ),
    )
    yield (
        "32 bits grey.png",
        Good(
            png(1, 1, 16, 4, [struct.pack(">2H", 257 * 7, 257 * 8)]), np.array([[[7, 7, 7]]]), np.array([[8]]), (1, 1)
        ),
    )


def formats() -> Iterator[tuple[str, Good]]:
    """All formats, with what is special in each."""
    rgb = picture()
    colours, alpha = np.asarray(rgb), _alpha()
    rgba = rgb.copy()
    rgba.putalpha(Image.fromarray(alpha))
    shown = np.where(alpha[..., None] > 0, colours, 0)
    grey, palette, turned = rgb.convert("L"), rgb.quantize(64), rgb.rotate(180)
    seen = np.asarray(palette.convert("RGB"))
    good = {"quality": 98, "subsampling": 0}
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    several = {"save_all": True, "append_images": [turned]}
    yield "interlaced.png", Good(saved(rgb, "PNG", interlace=1), colours)
    yield "animated.png", Good(saved(rgb, "PNG", **several), colours)
    yield "icc.png", Good(saved(rgb, "PNG", icc_profile=profile), colours)
    yield "bad icc.png", Good(saved(rgb, "PNG", icc_profile=b"nothing of the sort"), colours)
    yield "rgb.jpg", Good(saved(rgb, "JPEG", **good), colours, tolerance=3)
    yield "progressive.jpg", Good(saved(rgb, "JPEG", progressive=True, **good), colours, tolerance=3)
    yield "grey.jpg", Good(saved(grey, "JPEG", **good), _grey(grey), tolerance=3)
    yield "cmyk.jpg", Good(saved(rgb.convert("CMYK"), "JPEG", quality=98), colours, tolerance=6)
    yield "icc.jpg", Good(saved(rgb, "JPEG", icc_profile=profile, **good), colours, tolerance=3)
    yield "restarts.jpg", Good(saved(rgb, "JPEG", restart_marker_blocks=2, **good), colours, tolerance=3)
    yield "two.jpg", Good(saved(rgb, "MPO", **several, **good), colours, tolerance=3)
    yield "rubbish behind.jpg", Good(saved(rgb, "JPEG", **good) + bytes(40), colours, tolerance=3)
    yield "much behind.jpg", Good(saved(rgb, "JPEG", **good) + b"a video" * 100, colours, tolerance=3)
    yield "lossy.webp", Good(saved(rgb, "WEBP", quality=100), colours, tolerance=8)
    yield "lossless.webp", Good(saved(rgb, "WEBP", lossless=True), colours)
    yield "alpha.webp", Good(saved(rgba, "WEBP", lossless=True), shown, alpha)
    yield "hidden.webp", Good(saved(rgba, "WEBP", lossless=True, exact=True), colours, alpha)
    yield "icc.webp", Good(saved(rgb, "WEBP", lossless=True, icc_profile=profile), colours)
    yield "animated.webp", Good(saved(rgb, "WEBP", lossless=True, **several), colours)
    yield "rgb.bmp", Good(saved(rgb, "BMP"), colours)
    yield "grey.bmp", Good(saved(grey, "BMP"), _grey(grey))
    yield "palette.bmp", Good(saved(palette, "BMP"), seen)
    yield "bits.bmp", Good(saved(grey.convert("1"), "BMP"), _grey(grey.convert("1")))
    yield "palette.gif", Good(saved(palette, "GIF"), seen)
    yield "animated.gif", Good(saved(palette, "GIF", save_all=True, append_images=[turned]), seen)
    clear = np.where(np.asarray(palette) == 3, 0, 255).astype(np.uint8)
    yield "clear.gif", Good(saved(palette, "GIF", transparency=3), None, clear)
    yield "png named.jpg", Good(saved(rgb, "PNG"), colours)
    yield "jpg named.png", Good(saved(rgb, "JPEG", **good), colours, tolerance=3)
    yield "webp named.bmp", Good(saved(rgb, "WEBP", lossless=True), colours)
    yield "gif named.webp", Good(saved(palette, "GIF"), seen)
    if features.check("avif"):
        yield "rgb.avif", Good(saved(rgb, "AVIF", quality=100, subsampling="4:4:4"), colours, tolerance=4)
    for size in ((1, 1), (1, 57), (57, 1), (1, 4000), (4000, 1)):
        small = picture(*size)
        yield f"{size[0]}x{size[1]}.png", Good(saved(small, "PNG"), np.asarray(small), size=size)


UNDO: dict[int, Image.Transpose | None] = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
"""What was done to a picture that says it has this orientation."""


def orientations(kind: str) -> Iterator[tuple[int, Good]]:
    """One picture stored in all eight ways."""
    upright = picture()
    for orientation, turn in UNDO.items():
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        stored = upright if turn is None else upright.transpose(turn)
        options = {"PNG": {}, "WEBP": {"lossless": True}, "JPEG": {"quality": 98, "subsampling": 0}}[kind]
        content = saved(stored, kind, exif=exif, **options)
        yield orientation, Good(content, np.asarray(upright), tolerance=3 if kind == "JPEG" else 0)


def odd_orientations() -> Iterator[tuple[str, Good]]:
    """Orientations that are said in unusual places, or that make no sense."""
    upright = picture()
    turned = upright.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    raw = exif.tobytes().removeprefix(b"Exif\x00\x00")
    content = saved(turned, "PNG")
    yield "behind the pixels.png", Good(content[:-12] + chunk(b"eXIf", raw) + content[-12:], np.asarray(upright))
    jpeg = saved(turned, "JPEG", quality=98, subsampling=0)
    xmp = b'http://ns.adobe.com/xap/1.0/\0<x:xmpmeta><r tiff:Orientation="6"/></x:xmpmeta>'
    part = b"\xff\xe1" + (len(xmp) + 2).to_bytes(2, "big") + xmp
    yield "in xmp.jpg", Good(jpeg[:2] + part + jpeg[2:], np.asarray(upright), tolerance=3)
    for value in (0, 9, 700):
        exif[ORIENTATION] = value
        yield (
            f"orientation {value}.jpg",
            Good(saved(upright, "JPEG", exif=exif, quality=98, subsampling=0), np.asarray(upright), tolerance=3),
        )
    big = b"MM\x00*\x00\x00\x00\x08\x00\x01\x01\x12\x00\x03\x00\x00\x00\x01\x00\x06\x00\x00\x00\x00\x00\x00"
    part = b"\xff\xe1" + (len(big) + 8).to_bytes(2, "big") + b"Exif\0\0" + big
    yield "big endian.jpg", Good(jpeg[:2] + part + jpeg[2:], np.asarray(upright), tolerance=3)
    noise = b"\xff\xe1\x00\x14Exif\0\0II*\0\xff\xff\xff\xffabcd"
    yield (
        "broken exif.jpg",
        Good(
            saved(upright, "JPEG", quality=98, subsampling=0)[:2] + noise + saved(upright, "JPEG", quality=98)[2:], None
        ),
    )


def good() -> dict[str, Good]:
    """All files that have to be read, by name."""
    found = dict([*modes(), *by_hand(), *formats(), *odd_orientations()])
    for kind, suffix in (("PNG", "png"), ("JPEG", "jpg"), ("WEBP", "webp")):
        found |= {f"orientation {number}.{suffix}": file for number, file in orientations(kind)}
    return found


def damaged() -> dict[str, bytes]:
    """Files whose header already shows that they are no whole images, by name."""
    rng = np.random.default_rng(5)
    noisy = Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    whole = {kind: saved(noisy, kind) for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")}
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("a.txt", "nothing")
    found = {
        "empty.png": b"",
        "zeros.jpg": bytes(3000),
        "one byte.webp": b"\x89",
        "page.jpg": b"<!DOCTYPE html><html><body>404</body></html>",
        "page after a line.jpg": b"\n<html>403 Forbidden</html>",
        "archive.png": archive.getvalue(),
        "text.png": b"this is no image",
        "json.webp": b'{"error": "not found"}',
        "document.png": b"%PDF-1.4 and so on",
        "pointer.png": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n",
        "leftover.jpg": b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        " + bytes(64),
        "signature.png": whole["PNG"][:8],
        "no pixels.png": whole["PNG"][:33] + chunk(b"IEND", b""),
        "wrong sum of the header.png": whole["PNG"][:29] + b"\0\0\0\0" + whole["PNG"][33:],
        "no width.png": png(0, 4, 8, 2, [b""] * 4),
        "impossible bits.png": png(1, 1, 3, 2, [b"\0\0\0"]),
        "huge.png": png(60000, 60000, 8, 2, [b"\0"]),
        "no end mark.png": whole["PNG"][:-12],
        "jpeg start.jpg": whole["JPEG"][:20],
        "no pixels.webp": whole["WEBP"][:16],
        "vp8x without pixels.webp": b"RIFF" + (22).to_bytes(4, "little") + b"WEBPVP8X" + struct.pack("<I10x", 10),
        "gif start.gif": whole["GIF"][:9],
        "bmp start.bmp": whole["BMP"][:20],
    }
    for kind, content in whole.items():
        for part in (25, 50, 90):
            found[f"{part} percent.{kind.lower()}"] = content[: len(content) * part // 100]
    if features.check("avif"):
        avif = saved(noisy, "AVIF")
        found["half.avif"] = avif[: len(avif) // 2]
        found["start.avif"] = avif[:20]
    return found


def damaged_inside() -> dict[str, bytes]:
    """Files with whole headers that only decoding, or a checksum, shows to be damaged."""
    rng = np.random.default_rng(5)
    noisy = Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    content = bytearray(saved(noisy, "PNG"))
    content[len(content) // 2] ^= 255
    lossless = bytearray(saved(noisy, "WEBP", lossless=True))
    lossless[60:400] = bytes(340)
    return {"flipped bits.png": bytes(content), "zeros inside.webp": bytes(lossless)}
