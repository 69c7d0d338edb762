"""Headers agree with what decoding gives; what isn't a whole image is found out, with a reason."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from library.data import headers, quick_headers
from library.data.decoding import decoded
from library.data.headers import DamagedImageError, read_header
from library.log import DataError
from tests.library.data import image_corpus
from tests.library.data.image_corpus import chunk, picture, png, saved

pytestmark = pytest.mark.filterwarnings("ignore:Corrupt EXIF")

GOOD, DAMAGED, INSIDE = image_corpus.good(), image_corpus.damaged(), image_corpus.damaged_inside()


def test_there_are_many():
    assert len(GOOD) >= 60
    assert len(DAMAGED) + len(INSIDE) >= 40


@pytest.mark.filterwarnings("error", "ignore:Corrupt EXIF")
@pytest.mark.parametrize("thorough", [False, True])
@pytest.mark.parametrize("name", GOOD)
def test_whole_files(tmp_path, name, thorough):
    file, path = GOOD[name], tmp_path / name
    path.write_bytes(file.content)
    header = read_header(str(path), thorough=thorough)
    image = decoded(str(path), header.orientation)
    assert header.size == file.size == image.colours.shape[1::-1]
    assert (header.file_bytes, header.mtime_ns) == (path.stat().st_size, path.stat().st_mtime_ns)
    assert header.transparent == (image.opacity is not None) == (file.alpha is not None)
    assert image.colours.dtype == np.uint8
    for found, wanted in ((image.colours, file.colours), (image.opacity, file.alpha)):
        if wanted is not None:
            difference = np.abs(found.astype(int) - wanted.astype(int))
            assert difference.mean() <= file.tolerance
            assert file.tolerance or difference.max() == 0


@pytest.mark.parametrize("name", GOOD)
def test_both_ways_to_read_a_header_agree(tmp_path, name, monkeypatch):
    path = tmp_path / name
    path.write_bytes(GOOD[name].content)
    for ignoring in (False, True):
        quick = read_header(str(path), ignore_orientation=ignoring)
        with monkeypatch.context() as patch:
            patch.setattr(headers, "quick_header", lambda *_, **__: None)
            assert quick == read_header(str(path), ignore_orientation=ignoring)
        assert quick.orientation == 1 or not ignoring


ORDINARY = ["rgb.png", "rgba.png", "p levels.png", "i16.png", "interlaced.png", "icc.png", "rgb.jpg", "grey.jpg"]
ORDINARY += ["cmyk.jpg", "progressive.jpg", "lossy.webp", "lossless.webp", "alpha.webp", "icc.webp"]
ORDINARY += [f"orientation {number}.{suffix}" for number in range(1, 9) for suffix in ("png", "jpg", "webp")]


@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_files_need_no_decoder(tmp_path, name, monkeypatch):
    path = tmp_path / name
    path.write_bytes(GOOD[name].content)
    monkeypatch.delattr(headers, "_decoders_header")
    read_header(str(path))


REASONS = {
    "empty.png": "empty",
    "page.jpg": "web page",
    "page after a line.jpg": "web page",
    "archive.png": "zip archive",
    "json.webp": "JSON",
    "document.png": "PDF",
    "text.png": "no image",
    "huge.png": "too many pixels",
    "no end mark.png": "cut off",
    "no pixels.png": "no pixels",
    "50 percent.png": "cut off",
    "50 percent.webp": "cut off",
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_files(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(DAMAGED[name])
    with pytest.raises(DamagedImageError, match=REASONS.get(name, r"\w{3}")):
        read_header(str(path))


@pytest.mark.parametrize("name", INSIDE)
def test_damage_that_only_decoding_shows(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(INSIDE[name])
    assert read_header(str(path)).size == (64, 64)
    with pytest.raises(DataError, match=rf"can't decode the image: .*{name.split()[0]}"):
        decoded(str(path))


def test_checksums_are_compared_on_demand(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(INSIDE["flipped bits.png"])
    with pytest.raises(DamagedImageError, match="checksum"):
        read_header(str(path), thorough=True)


def test_every_cut_of_a_file_is_noticed(tmp_path):
    image, path = picture(24, 16), tmp_path / "a"
    for content in (saved(image, "PNG"), saved(image, "WEBP"), saved(image, "JPEG", quality=20)):
        for length in range(0, len(content) - 1, 3):
            path.write_bytes(content[:length])
            with pytest.raises(DamagedImageError):
                read_header(str(path))


def test_no_byte_makes_the_quick_way_disagree(tmp_path, monkeypatch):
    """One byte after another is changed: what the quick way accepts, the decoder must accept alike."""
    rng = np.random.default_rng(3)
    exif = image_corpus.Image.Exif()
    exif[headers.EXIF_ORIENTATION] = 6
    path = tmp_path / "a"
    for kind in ("PNG", "JPEG", "WEBP"):
        content = saved(picture(24, 16), kind, exif=exif)
        for place in range(min(len(content), 700)):
            changed = bytearray(content)
            changed[place] ^= 1 << int(rng.integers(8))
            path.write_bytes(changed)
            with path.open("rb") as file:
                quick = quick_headers.quick_header(file.fileno(), len(changed))
            if quick is None:
                continue
            with monkeypatch.context() as patch:
                patch.setattr(headers, "quick_header", lambda *_, **__: None)
                try:
                    slow = read_header(str(path), ignore_orientation=True)
                except DamagedImageError as error:
                    raise AssertionError(f"{kind}, byte {place}: {quick}, but {error}") from error
            assert slow.size == quick[:2], (kind, place)


def test_large_parts_before_the_pixels(tmp_path):
    """Thumbnails and profiles may push the size far behind the first bytes that are read."""
    image = saved(picture(), "JPEG")
    part = b"\xff\xe2\xff\xff" + bytes(65533)
    path = tmp_path / "a.jpg"
    path.write_bytes(image[:2] + 5 * part + image[2:])
    assert read_header(str(path)).size == picture().size
    path.write_bytes(png(2, 1, 8, 0, [b"ab"], chunk(b"teST", bytes(200_000)), chunk(b"tRNS", b"\0a")))
    assert read_header(str(path))[:3] == ((2, 1), 1, True)


def test_files_that_cannot_be_opened(tmp_path):
    for path in (tmp_path / "none.png", tmp_path):
        with pytest.raises(DamagedImageError, match=r"\w{3}"):
            read_header(str(path))


def test_no_file_stays_open(tmp_path):
    opened = Path("/proc/self/fd")
    if not opened.is_dir():
        pytest.skip("open files can't be counted here")
    (tmp_path / "a.png").write_bytes(saved(picture(), "PNG"))
    (tmp_path / "b.png").write_bytes(b"nothing")
    before = len(list(opened.iterdir()))
    for _ in range(20):
        read_header(str(tmp_path / "a.png"))
        with pytest.raises(DamagedImageError):
            read_header(str(tmp_path / "b.png"))
    assert len(list(opened.iterdir())) == before
