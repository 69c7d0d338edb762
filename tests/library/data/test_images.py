"""Pixels: orientation, modes, resizing, cropping; headers agree with decoders."""

from __future__ import annotations

import io
import zlib

import numpy as np
import pytest
from PIL import Image

from library.data import buckets, images
from library.data.buckets import Assignment
from library.log import DataError
from library.types import Size

SQUARE = Assignment(Size(64, 64), Size(64, 64), 0, 0, 0.0)


def picture(width: int, height: int) -> Image.Image:
    y, x = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([x * 255 // width, y * 255 // height, (x + 2 * y) % 256], axis=-1).astype(np.uint8))


def whole(size: Size) -> Assignment:
    return Assignment(size, size, 0, 0, 0.0)


UNDO = {
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


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_eight_orientations_give_one_picture(tmp_path, suffix):
    upright = picture(96, 48)
    results = []
    for orientation, turn in UNDO.items():
        path = tmp_path / f"{orientation}.{suffix}"
        exif = Image.Exif()
        exif[images.EXIF_ORIENTATION] = orientation
        turned = upright if turn is None else upright.transpose(turn)
        turned.save(path, exif=exif, **({"lossless": True} if suffix == "webp" else {"quality": 100, "subsampling": 0}))
        header = images.read_header(str(path))
        assert header.size == (96, 48)
        assert header.orientation == orientation
        results.append(images.load_pixels(str(path), header.size, whole(header.size), orientation=header.orientation))
        ignoring = images.read_header(str(path), ignore_orientation=True)
        assert ignoring.size == turned.size
        assert ignoring.orientation == 1
    for result in results:
        assert np.abs(result.astype(int) - results[0].astype(int)).max() <= (0 if suffix != "jpg" else 3)
    assert np.abs(results[0].astype(int) - np.asarray(upright).astype(int)).max() <= (0 if suffix != "jpg" else 6)


def test_orientation_behind_the_pixels_of_a_png(tmp_path):
    exif = Image.Exif()
    exif[images.EXIF_ORIENTATION] = 6
    raw = exif.tobytes().removeprefix(b"Exif\x00\x00")
    buffer = io.BytesIO()
    picture(96, 48).save(buffer, "PNG")
    content = buffer.getvalue()
    chunk = b"eXIf" + raw
    late = len(raw).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")
    path = tmp_path / "a.png"
    path.write_bytes(content[:-12] + late + content[-12:])
    header = images.read_header(str(path))
    assert (header.size, header.orientation) == ((48, 96), 6)


def corpus() -> dict[str, tuple[Image.Image, str, dict]]:
    """Thirty kinds of files: name -> picture, format, options."""
    rgb = picture(60, 40)
    rgba = rgb.copy()
    rgba.putalpha(Image.linear_gradient("L").resize((60, 40)))
    grey = rgb.convert("L")
    grey16 = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    palette = rgb.quantize(32)
    see_through = palette.copy()
    see_through.info["transparency"] = 3
    return {
        "rgb.png": (rgb, "PNG", {}),
        "rgba.png": (rgba, "PNG", {}),
        "grey.png": (grey, "PNG", {}),
        "grey_alpha.png": (rgba.convert("LA"), "PNG", {}),
        "grey16.png": (grey16, "PNG", {}),
        "bit.png": (grey.convert("1"), "PNG", {}),
        "palette.png": (palette, "PNG", {}),
        "palette_transparent.png": (see_through, "PNG", {"transparency": 3}),
        "palette_bytes.png": (palette, "PNG", {"transparency": bytes(range(32))}),
        "rgb_transparent.png": (rgb, "PNG", {"transparency": (0, 0, 0)}),
        "interlaced.png": (rgb, "PNG", {"interlace": 1}),
        "animated.png": (rgb, "PNG", {"save_all": True, "append_images": [rgb.rotate(180)]}),
        "rgb.jpg": (rgb, "JPEG", {}),
        "progressive.jpg": (rgb, "JPEG", {"progressive": True}),
        "grey.jpg": (grey, "JPEG", {}),
        "cmyk.jpg": (rgb.convert("CMYK"), "JPEG", {}),
        "restart.jpg": (rgb, "JPEG", {"restart_marker_blocks": 2}),
        "two.jpg": (rgb, "MPO", {"save_all": True, "append_images": [rgb.rotate(180)]}),
        "lossy.webp": (rgb, "WEBP", {}),
        "lossless.webp": (rgb, "WEBP", {"lossless": True}),
        "alpha.webp": (rgba, "WEBP", {"lossless": True}),
        "animated.webp": (rgb, "WEBP", {"save_all": True, "append_images": [rgb.rotate(180)], "lossless": True}),
        "rgb.bmp": (rgb, "BMP", {}),
        "grey.bmp": (grey, "BMP", {}),
        "palette.bmp": (palette, "BMP", {}),
        "bit.bmp": (grey.convert("1"), "BMP", {}),
        "rgba.bmp": (rgba, "BMP", {}),
        "palette.gif": (palette, "GIF", {}),
        "animated.gif": (rgb, "GIF", {"save_all": True, "append_images": [rgb.rotate(180)]}),
        "transparent.gif": (see_through, "GIF", {"transparency": 3}),
        "rgb.avif": (rgb, "AVIF", {"quality": 100, "subsampling": "4:4:4"}),
        "tiff_inside.png": (rgb, "TIFF", {}),
        "png_inside.jpg": (rgb, "PNG", {}),
    }


TRANSPARENT = {
    "rgba.png",
    "grey_alpha.png",
    "palette_transparent.png",
    "palette_bytes.png",
    "rgb_transparent.png",
    "alpha.webp",
    "transparent.gif",
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", corpus())
def test_header_agrees_with_decoder(tmp_path, name):
    image, kind, how = corpus()[name]
    path = tmp_path / name
    image.save(path, kind, **how)
    header = images.read_header(str(path))
    assert header.size == (60, 40)
    assert header.transparent == (name in TRANSPARENT)
    pixels = images.load_pixels(str(path), header.size, whole(header.size))
    wanted = np.asarray(
        image.convert("RGBA").convert("RGB") if image.mode != "I;16" else picture(60, 40).convert("L").convert("RGB")
    )
    tolerance = 40 if name.endswith((".jpg", "lossy.webp", ".avif", "animated.gif")) else 0
    assert pixels.shape == (40, 60, 3)
    assert pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - wanted.astype(int)).mean() <= tolerance / 4
    if not tolerance:
        assert np.array_equal(pixels, wanted)


def test_hidden_colour_under_transparency_is_kept(tmp_path):
    image = Image.new("RGBA", (64, 64), (10, 200, 30, 0))
    image.save(tmp_path / "a.png")
    assert images.load_pixels(str(tmp_path / "a.png"), Size(64, 64), SQUARE)[0, 0].tolist() == [10, 200, 30]


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    Image.fromarray(np.full((64, 64), 32768, np.uint16)).save(tmp_path / "a.png")
    assert images.load_pixels(str(tmp_path / "a.png"), Size(64, 64), SQUARE)[0, 0].tolist() == [128, 128, 128]


class Settings:
    resolution = Size(128, 128)
    enable_bucket = True
    min_bucket_reso = 64
    max_bucket_reso = 256
    bucket_reso_steps = 16
    bucket_no_upscale = False


@pytest.mark.parametrize("size", [(128, 128), (300, 200), (90, 60), (200, 301), (127, 129), (30, 900), (500, 3)])
@pytest.mark.parametrize("interpolation", [None, "lanczos", "nearest", "bilinear", "bicubic", "area", "box", "linear"])
def test_result_has_the_size_of_the_bucket(tmp_path, size, interpolation):
    path = tmp_path / "a.png"
    picture(*size).save(path)
    given = buckets.assign(Size(*size), Settings())
    pixels = images.load_pixels(str(path), Size(*size), given, interpolation=interpolation)
    assert pixels.shape == (given.bucket.height, given.bucket.width, 3)


def test_crop_is_taken_from_the_middle_and_mirrored(tmp_path):
    path = tmp_path / "a.png"
    image = picture(100, 64)
    image.save(path)
    given = Assignment(Size(64, 64), Size(100, 64), 18, 0, 0.0)
    pixels = images.load_pixels(str(path), Size(100, 64), given)
    assert np.array_equal(pixels, np.asarray(image)[:, 18:82])
    assert np.array_equal(images.load_pixels(str(path), Size(100, 64), given, mirrored=True), pixels[:, ::-1])


def test_averages_when_shrinking_else_lanczos():
    pixels = np.asarray(picture(100, 80))
    assert np.array_equal(images.resize(pixels, Size(50, 40)), images.resize(pixels, Size(50, 40), "area"))
    for size in (Size(200, 160), Size(100, 40), Size(50, 90)):
        assert np.array_equal(images.resize(pixels, size), images.resize(pixels, size, "lanczos"))
    assert not np.array_equal(images.resize(pixels, Size(50, 40)), images.resize(pixels, Size(50, 40), "lanczos"))


def test_extreme_images_need_little_memory(tmp_path):
    path = tmp_path / "a.png"
    picture(4000, 3).save(path)
    given = buckets.assign(Size(4000, 3), Settings())
    assert given.resized.area > 8 * given.bucket.area
    pixels = images.load_pixels(str(path), Size(4000, 3), given)
    assert pixels.shape == (given.bucket.height, given.bucket.width, 3)
    assert abs(int(pixels[:, :, 0].mean()) - 127) < 4


def test_tensor_is_in_the_range_of_the_autoencoder():
    pixels = np.zeros((2, 3, 3), np.uint8)
    pixels[0, 0] = 255
    tensor = images.to_tensor(pixels)
    assert tensor.shape == (3, 2, 3)
    assert (tensor.min(), tensor.max()) == (-1, 1)


def test_image_that_changed_or_breaks_after_the_scan(tmp_path):
    path = tmp_path / "a.png"
    picture(64, 64).save(path)
    with pytest.raises(DataError, match=r"changed since the start.*a\.png"):
        images.load_pixels(str(path), Size(32, 64), SQUARE)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"can't decode.*a\.png"):
        images.load_pixels(str(path), Size(64, 64), SQUARE)
