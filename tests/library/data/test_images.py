"""What a sample shows of its image: pixels, backgrounds, masks and conditioning images, all cut alike."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from library.data import images, resizing
from library.data.buckets import Assignment
from library.data.images import load_conditioning, load_picture, with_gamma, with_hue
from library.data.views import View, still
from library.log import DataError
from library.types import Size
from tests.library.data import image_corpus
from tests.library.data.image_corpus import picture
from tests.library.data.making import dataset, item_of

GOOD = image_corpus.good()
PURPLE = (200, 10, 220)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_eight_orientations_give_one_picture(tmp_path, kind):
    results = []
    for orientation, file in image_corpus.orientations(kind):
        path = tmp_path / f"{orientation}.{kind.lower()}"
        path.write_bytes(file.content)
        item = item_of(path, dataset())
        assert item.orientation == orientation
        assert item.assignment.bucket == Size(80, 48)
        results.append(load_picture(item, still(item)).pixels.astype(int))
    for result in results:
        assert np.abs(result - results[0]).mean() <= (1 if kind == "JPEG" else 0)


@pytest.mark.filterwarnings("error", "ignore:Corrupt EXIF")
@pytest.mark.parametrize("name", GOOD)
def test_no_hidden_colour_shows_on_a_background(tmp_path, name):
    file, path = GOOD[name], tmp_path / name
    path.write_bytes(file.content)
    hidden = item_of(path)
    if file.colours is not None:
        shown = load_picture(hidden, still(hidden)).pixels.astype(int)
        assert np.abs(shown - file.colours).mean() <= file.tolerance
    item = item_of(path, background=PURPLE, mask="alpha")
    found = load_picture(item, still(item))
    height, width = found.pixels.shape[:2]
    alpha = np.full((height, width), 255) if file.alpha is None else file.alpha.astype(int)
    assert np.array_equal(np.rint(found.mask * 255), alpha)
    assert (found.pixels[alpha == 0] == PURPLE).all()
    if file.colours is not None:
        seen = (file.colours * alpha[..., None] + np.array(PURPLE) * (255 - alpha[..., None])) / 255
        assert np.abs(found.pixels - seen).mean() <= file.tolerance + 0.5


def test_background_is_laid_below_before_resizing(tmp_path):
    """Else the hidden colour would bleed over the edges."""
    pixels = np.zeros((128, 128, 4), np.uint8)
    pixels[:, :, 1] = 255  # green, hidden but for a white square
    pixels[40:90, 40:90] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    for size in (32, 256):
        item = item_of(tmp_path / "a.png", dataset(size), background=(255, 255, 255))
        assert load_picture(item, still(item)).pixels.min() == 255


@pytest.mark.parametrize("size", [(128, 128), (300, 200), (90, 60), (200, 301), (127, 129), (30, 900), (500, 3)])
@pytest.mark.parametrize("interpolation", [None, "lanczos", "nearest", "bilinear", "bicubic", "area", "box", "linear"])
def test_all_that_is_shown_has_the_size_of_the_bucket(tmp_path, size, interpolation):
    path = tmp_path / "a.png"
    image = picture(*size)
    image.putalpha(77)
    image.save(path)
    item = item_of(path, dataset(128), conditioning=path, mask="alpha", resize_interpolation=interpolation)
    found = load_picture(item, still(item), conditioning=True)
    bucket = item.assignment.bucket
    assert found.pixels.shape == found.conditioning.shape == (bucket.height, bucket.width, 3)
    assert found.mask.shape == (bucket.height, bucket.width)
    assert np.allclose(found.mask, 77 / 255, atol=1e-6)
    for array in found:
        assert array.flags.c_contiguous
        assert array.flags.writeable


def test_crop_and_mirror_fall_on_everything_alike(tmp_path):
    image, mask = picture(100, 64), picture(100, 64).transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    image.putalpha(Image.fromarray(np.asarray(mask)[..., 2]))
    image.save(tmp_path / "a.png")
    mask.save(tmp_path / "m.png")
    item = replace(
        item_of(tmp_path / "a.png", conditioning=tmp_path / "m.png"),
        assignment=Assignment(Size(64, 48), Size(100, 64), 18, 8, 0.0),
    )
    part = (slice(8, 56), slice(18, 82))
    weights = {"alpha": np.asarray(mask)[..., 2][part] / 255, "conditioning": np.asarray(mask)[..., 0][part] / 255}
    for source, wanted in weights.items():
        item = replace(item, subset=replace(item.subset, mask=source))
        straight = load_picture(item, still(item), conditioning=True)
        assert np.array_equal(straight.pixels, np.asarray(image)[..., :3][part])
        assert np.array_equal(straight.conditioning, np.asarray(mask)[part])
        assert np.allclose(straight.mask, wanted)
        turned = load_picture(item, replace(still(item), mirrored=True), conditioning=True)
        for one, other in zip(straight, turned, strict=True):
            assert np.array_equal(one[:, ::-1], other)
        assert np.array_equal(load_conditioning(item, replace(still(item), mirrored=True)), turned.conditioning)
        assert load_picture(item, still(item)).conditioning is None


def test_masks_stay_in_place_when_resized(tmp_path):
    """The left half counts, whatever becomes of the image."""
    for size in ((200, 120), (40, 24), (1000, 30)):
        half = np.zeros((size[1], size[0], 3), np.uint8)
        half[:, : size[0] // 2] = 255
        Image.fromarray(half).save(tmp_path / "a.png")
        item = item_of(tmp_path / "a.png", dataset(), conditioning=tmp_path / "a.png", mask="conditioning")
        found = load_picture(item, still(item))
        assert np.abs(found.pixels[..., 0] / 255 - found.mask).mean() < 0.05
        assert abs(found.mask.mean() - 0.5) < 0.05
        assert (found.mask[:, :4].min(), found.mask[:, -4:].max()) == (1, 0)


def test_mask_of_an_image_without_transparency(tmp_path):
    picture().save(tmp_path / "a.png")
    item = item_of(tmp_path / "a.png", dataset(), mask="alpha")
    assert load_picture(item, still(item)).mask.min() == 1
    item = item_of(tmp_path / "a.png", dataset())
    assert load_picture(item, still(item)).mask is None
    item = item_of(tmp_path / "a.png", dataset(), mask="conditioning")
    assert load_picture(item, still(item)).mask is None
    with pytest.raises(DataError, match=r"no conditioning image.*a\.png"):
        load_conditioning(item, still(item))


def test_conditioning_image_of_another_size(tmp_path):
    picture(60, 40).save(tmp_path / "a.png")
    picture(61, 40).save(tmp_path / "m.png")
    item = item_of(tmp_path / "a.png", dataset(), conditioning=tmp_path / "m.png", mask="conditioning")
    with pytest.raises(DataError, match=r"m\.png is 61x40, but its image is 60x40.*a\.png"):
        load_picture(item, still(item))
    (tmp_path / "m.png").write_bytes(b"<html>")
    with pytest.raises(DataError, match=r"conditioning image.*m\.png"):
        load_picture(item, still(item))


def test_conditioning_image_with_an_orientation(tmp_path):
    """It is turned like its image, however each of both is stored."""
    picture().save(tmp_path / "a.png")
    for number, file in image_corpus.orientations("PNG"):
        (tmp_path / f"{number}.png").write_bytes(file.content)
        for image in (tmp_path / "a.png", tmp_path / f"{number}.png"):
            item = item_of(image, conditioning=tmp_path / f"{number}.png")
            found = load_picture(item, still(item), conditioning=True)
            assert np.array_equal(found.conditioning, found.pixels)
    turned = picture().transpose(Image.Transpose.ROTATE_90)
    turned.save(tmp_path / "t.png")
    item = item_of(tmp_path / "t.png", conditioning=tmp_path / "6.png")  # as with --ignore_exif_orientation
    assert np.array_equal(load_conditioning(item, still(item)), np.asarray(turned))


def test_conditioning_is_always_averaged(tmp_path):
    checks = np.indices((96, 96)).sum(0) % 2 * 255
    Image.fromarray(np.stack([checks] * 3, -1).astype(np.uint8)).save(tmp_path / "a.png")
    item = item_of(tmp_path / "a.png", dataset(48), conditioning=tmp_path / "a.png", resize_interpolation="nearest")
    found = load_picture(item, still(item), conditioning=True)
    assert set(np.unique(found.pixels)) <= {0, 255}
    assert np.abs(found.conditioning.astype(int) - 128).max() <= 1


def test_averages_when_shrinking_else_lanczos():
    pixels, resize = np.asarray(picture(100, 80)), resizing.resize
    assert np.array_equal(resize(pixels, Size(50, 40)), resize(pixels, Size(50, 40), "area"))
    for size in (Size(200, 160), Size(100, 40), Size(50, 90)):
        assert np.array_equal(resize(pixels, size), resize(pixels, size, "lanczos"))
    assert not np.array_equal(resize(pixels, Size(50, 40)), resize(pixels, Size(50, 40), "lanczos"))


def test_extreme_images_need_little_memory(tmp_path):
    path = tmp_path / "a.png"
    picture(4000, 3).save(path)
    item = item_of(path, dataset(128), conditioning=path, mask="conditioning")
    assert item.assignment.resized.area > 8 * item.assignment.bucket.area
    found = load_picture(item, still(item))
    assert found.pixels.shape[:2] == found.mask.shape
    assert abs(int(found.pixels[:, :, 0].mean()) - 127) < 4


def test_tensor_is_in_the_range_of_the_autoencoder():
    pixels = np.zeros((2, 3, 3), np.uint8)
    pixels[0, 0] = 255
    tensor = images.to_tensor(pixels)
    assert tensor.shape == (3, 2, 3)
    assert (tensor.min(), tensor.max()) == (-1, 1)


def test_image_that_changed_breaks_or_goes_after_the_scan(tmp_path):
    path = tmp_path / "a.png"
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(path)
    item = item_of(path)
    with pytest.raises(DataError, match=r"changed since the start.*32x64.*a\.png"):
        load_picture(replace(item, original=Size(32, 64)), still(item))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"can't decode.*a\.png"):
        load_picture(item, still(item))
    path.unlink()
    with pytest.raises(DataError, match=r"can't decode.*a\.png"):
        load_picture(item, still(item))
    with pytest.raises(DataError, match=r"isn't there any more.*a\.png"):
        load_picture(replace(item, gone=True), still(item))


def test_hue_turns_and_gamma_bends():
    pure = np.array([[[255, 0, 0], [0, 255, 0], [128, 128, 128], [0, 0, 0]]], np.uint8)
    assert with_hue(pure, 120)[0, :2].tolist() == [[0, 255, 0], [0, 0, 255]]
    assert np.array_equal(with_hue(pure, 16)[0, 2:], pure[0, 2:])
    everything = np.random.default_rng(0).integers(0, 256, (50, 50, 3), dtype=np.uint8)
    assert np.abs(with_hue(everything, 0).astype(int) - everything).max() <= 1
    assert np.array_equal(with_gamma(everything, 1.0), everything)
    assert with_gamma(np.array([0, 1, 100, 255], np.uint8), 1.05).tolist() == [0, 1, 126, 255]
    assert with_gamma(np.array([0, 1, 100, 255], np.uint8), 0.95).tolist() == [0, 1, 79, 193]


def test_colours_change_the_image_alone(tmp_path):
    image = picture()
    image.putalpha(99)
    image.save(tmp_path / "a.png")
    item = item_of(tmp_path / "a.png", dataset(), conditioning=tmp_path / "a.png", mask="alpha")
    plain = load_picture(item, still(item), conditioning=True)
    for change in ({"hue": 12.0}, {"gamma": 1.04}):
        view = View(item.assignment.resized, item.assignment.left, item.assignment.top, **change)
        changed = load_picture(item, view, conditioning=True)
        assert not np.array_equal(changed.pixels, plain.pixels)
        assert np.abs(changed.pixels.astype(int) - plain.pixels).mean() < 40
        assert np.array_equal(changed.mask, plain.mask)
        assert np.array_equal(changed.conditioning, plain.conditioning)
