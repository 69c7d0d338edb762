"""The contact sheet: complete in itself, safe with anybody's text, readable pictures, honest numbers."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from library.data import sheet
from library.data.sheet import SheetRow, contact_sheet, histogram_lines
from library.log import ResourceError
from library.types import Size

VOID = {"meta", "img", "input", "br"}
COUNTS = {Size(832, 1216): 7, Size(1024, 1024): 120, Size(1216, 832): 1}


class Page(HTMLParser):
    """What a browser makes of the page: elements with their attributes and texts; complains of unbalanced ones."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text("utf-8")
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[tuple[str, str]] = []
        self._open: list[str] = []
        self.feed(self.source)
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.texts.append((self._open[-1] if self._open else "", data))

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def text(self) -> str:
        return "\n".join(data for tag, data in self.texts if tag != "style")

    def images(self) -> list[tuple[str, Image.Image]]:
        """Description and picture of each `img`."""
        found = []
        for attributes in self.all("img"):
            kind, data = re.fullmatch(r"data:image/(png|jpeg);base64,([A-Za-z0-9+/=]+)", attributes["src"]).groups()
            image = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
            image.load()
            assert image.format.lower() == kind
            assert image.size == (int(attributes["width"]), int(attributes["height"]))
            found.append((attributes["alt"], image))
        return found


def pixels(width: int, height: int) -> np.ndarray:
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x * 255 // width, y * 255 // height, (x + y) % 256], axis=-1).astype(np.uint8)


def row(width: int = 48, height: int = 32, **changes) -> SheetRow:
    usual = {
        "name": "/data/cats/a.png",
        "size": Size(width, height),
        "caption": "a cat",
        "pixels": pixels(width, height),
    }
    return SheetRow(**(usual | changes))


def drawn(tmp_path: Path, rows, histogram=None, facts=(), **options) -> Page:
    path = tmp_path / "run_dataset.html"
    contact_sheet(rows, histogram or {}, facts, path, **options)
    return Page(path)


def test_a_sample_is_shown_with_all_that_belongs_to_it(tmp_path: Path) -> None:
    page = drawn(
        tmp_path, [row(note="mirrored, regularisation")], {"dataset 1": {Size(48, 32): 1}}, ["12 images", "  deep"]
    )
    for text in (
        "a cat",
        "48x32",
        "cats/a.png",
        "mirrored",
        "regularisation",
        "12 images",
        "  deep",
        "1 sample in 1 bucket",
    ):
        assert text in page.text
    assert [name for name, _ in page.images()] == ["picture"]
    assert page.all("meta")[0] == {"charset": "utf-8"}


def test_text_of_others_is_never_markup(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>&amp; <!--"
    rows = [row(name=f"/x/{evil.replace('/', '')}.png", caption=evil, note=evil)]
    page = drawn(tmp_path, rows, {evil: COUNTS}, [evil])
    assert not page.all("script")
    assert len(page.all("img")) == 1
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    texts = [text for _, text in page.texts]
    assert evil in texts  # shown as it was written: neither run, nor escaped twice
    assert sum(text.endswith(evil) for text in texts) >= 4  # caption, note, fact, title of the dataset


def test_style_sheet_holds_no_text_of_others(tmp_path: Path) -> None:
    page = drawn(tmp_path, [row(note="</style>x{}"), row(32, 32, note="ä}*{display:none")], {"</style>": COUNTS})
    styles = "".join(text for tag, text in page.texts if tag == "style")
    assert "x{}" not in styles
    assert "ä" not in styles
    assert "*{display" not in styles


def test_the_page_needs_nothing_beside_it(tmp_path: Path) -> None:
    page = drawn(tmp_path, [row(), row(400, 300, mask=np.ones((300, 400), np.float32))], {"d": COUNTS}, ["f"])
    for word in ("http://", "https://", "url(", "@import", "<link", "<script", "<iframe"):
        assert word not in page.source
    assert "default-src 'none'" in page.all("meta")[1]["content"]
    assert all(attributes["src"].startswith("data:image/") for attributes in page.all("img"))
    assert all(attributes["loading"] == "lazy" for attributes in page.all("img"))
    assert "prefers-color-scheme: dark" in page.source
    assert any(attributes.get("name") == "viewport" for attributes in page.all("meta"))


@pytest.mark.parametrize(
    ("size", "thumbnail"),
    [
        ((48, 32), (48, 32)),
        ((256, 256), (256, 256)),
        ((1024, 512), (256, 128)),
        ((512, 1024), (128, 256)),
        ((2048, 2), (256, 1)),
    ],
)
def test_thumbnails_keep_the_shape_and_are_never_enlarged(tmp_path: Path, size, thumbnail) -> None:
    ((_, image),) = drawn(tmp_path, [row(*size)]).images()
    assert image.size == thumbnail
    assert image.mode == "RGB"


def test_small_pictures_are_kept_bit_by_bit_and_large_ones_nearly(tmp_path: Path) -> None:
    ((_, small),) = drawn(tmp_path, [row(48, 32)]).images()
    assert np.array_equal(np.asarray(small), pixels(48, 32))
    smooth = pixels(512, 512)
    smooth[..., 2] = 90
    ((_, large),) = drawn(tmp_path, [row(512, 512, pixels=smooth)]).images()
    exact = Image.fromarray(smooth).resize((256, 256), Image.Resampling.BOX)
    assert np.abs(np.asarray(large, int) - np.asarray(exact, int)).mean() < 3


def test_views_that_are_not_contiguous_are_shown(tmp_path: Path) -> None:
    mirrored = pixels(48, 32)[:, ::-1]
    ((_, image),) = drawn(tmp_path, [row(pixels=mirrored)]).images()
    assert np.array_equal(np.asarray(image), mirrored)


def test_a_mask_stands_beside_the_picture_and_dims_it(tmp_path: Path) -> None:
    mask = np.zeros((32, 48), np.float32)
    mask[:, 24:] = 1
    image, shown, dimmed = drawn(tmp_path, [row(mask=mask)]).images()
    assert shown[0] == "mask, 50 %"
    assert np.array_equal(np.asarray(shown[1]), (mask * 255).astype(np.uint8))
    before, after = (np.asarray(each[1], int) for each in (image, dimmed))
    assert np.array_equal(after[:, 24:], before[:, 24:])
    assert np.abs(after[:, :24] - before[:, :24] * 0.2).max() <= 0.5


@pytest.mark.parametrize(
    ("level", "said"), [(0.0, "0 %"), (0.001, "<1 %"), (1.0, "100 %"), (7.0, "100 %"), (np.nan, "0 %")]
)
def test_the_share_of_a_mask_is_told(tmp_path: Path, level: float, said: str) -> None:
    images = drawn(tmp_path, [row(mask=np.full((32, 48), level, np.float32))]).images()
    assert images[1][0] == f"mask, {said}"


def test_a_conditioning_image_has_its_own_size(tmp_path: Path) -> None:
    images = drawn(tmp_path, [row(conditioning=pixels(96, 64))]).images()
    assert [(name, image.size) for name, image in images] == [("picture", (48, 32)), ("conditioning", (96, 64))]


def test_empty_captions_are_said_to_be_empty(tmp_path: Path) -> None:
    page = drawn(tmp_path, [row(caption=" \n"), row(caption="a\nb")])
    assert "empty caption" in page.text
    assert "a\nb" in page.text


def test_any_characters_can_be_written(tmp_path: Path) -> None:
    odd = "日本語 Привет 😀 \ud83d \udcff \x00 \x1b[31m \t end"
    page = drawn(tmp_path, [row(name=f"/{odd}/{odd}.png", caption=odd, note=odd)], {odd: COUNTS}, [odd])
    assert "日本語 Привет 😀 \\ud83d \\udcff \\x00 \\x1b[31m \t end" in [text for tag, text in page.texts if tag == "p"]
    assert not re.search("[\x00-\x08\x0b-\x1f]", page.source)


def test_filters_hide_what_does_not_fit(tmp_path: Path) -> None:
    mask = np.ones((32, 48), np.float32)
    page = drawn(tmp_path, [row(note="mirrored"), row(note="mirrored, x 2", mask=mask), row(32, 32, caption="")])
    labels = [text for tag, text in page.texts if tag == "label"]
    assert [text.strip() for text in labels] == [
        "all",
        "mirrored",
        "x 2",
        "with mask",
        "empty caption",
        "all",
        "32x32",
        "48x32",
    ]
    assert [text for tag, text in page.texts if tag == "small"] == ["2", "1", "1", "1", "1", "2"]
    inputs, cards = page.all("input"), page.all("article")
    assert [choice["id"] for choice in inputs if "checked" in choice] == ["note-all", "bucket-all"]
    assert [label["for"] for label in page.all("label")] == [choice["id"] for choice in inputs]
    shown_by = {}
    for choice, name in re.findall(r"#(\S+):checked ~ \.cards > :not\(\.(\S+)\)", page.source):
        assert choice in {each["id"] for each in inputs}
        shown_by[choice] = [number for number, card in enumerate(cards) if name in card["class"].split()]
    assert list(shown_by.values()) == [[0, 1], [1], [1], [2], [2], [0, 1]]


def test_filters_stay_few(tmp_path: Path) -> None:
    page = drawn(tmp_path, [row(32, 32, size=Size(32, 16 * number), note=f"n{number}") for number in range(1, 100)])
    assert len(page.all("input")) == 2 * (sheet.FILTERS + 1)


def test_the_histogram_shows_each_bucket_in_its_shape_and_adds_up(tmp_path: Path) -> None:
    page = drawn(tmp_path, [], {"one": COUNTS, "two": {}})
    assert "128 samples in 3 buckets" in page.text
    assert "0 samples in 0 buckets" in page.text
    assert len(page.all("svg")) == 1
    shapes, bars = ([r for r in page.all("rect") if r["class"] == name] for name in ("shape", "bar"))
    wide = [float(shape["width"]) / float(shape["height"]) for shape in shapes]
    assert wide == pytest.approx([832 / 1216, 1, 1216 / 832], rel=0.1)
    assert [int(bar["width"]) for bar in bars] == [12, 200, 2]
    numbers = [int(text) for tag, text in page.texts if tag == "text" and text.isdigit()]
    assert sum(numbers) == sum(COUNTS.values())
    width, height = map(int, page.all("svg")[0]["viewbox"].split()[2:])
    for rectangle in shapes + bars:
        assert 0 <= float(rectangle["x"]) <= width - float(rectangle["width"])
        assert 0 <= float(rectangle["y"]) <= height - float(rectangle["height"])


def test_only_so_many_samples_are_shown_and_the_rest_is_counted(tmp_path: Path) -> None:
    same = row(32, 32)
    for rows in ([same] * 3000, (same for _ in range(3000))):
        page = drawn(tmp_path, rows, limit=20)
        assert len(page.all("article")) == 20
        assert "2,980 further samples left out." in page.text
    assert "left out." not in drawn(tmp_path, [same] * 20, limit=20).text


def test_of_a_list_what_is_left_out_is_not_looked_at(tmp_path: Path) -> None:
    broken = row(pixels=np.zeros((0, 0), np.uint8))
    assert "1 further sample left out." in drawn(tmp_path, [row(), broken], limit=1).text


def test_the_page_grows_with_its_samples_only(tmp_path: Path) -> None:
    sizes = {}
    for count in (0, 500, 1000):
        sizes[count] = len(drawn(tmp_path, [row(16, 16, note="mirrored")] * count).source)
    assert sizes[1000] - sizes[500] == pytest.approx(sizes[500] - sizes[0], rel=0.02)


def test_pictures_are_taken_one_at_a_time(tmp_path: Path) -> None:
    alive: list[int] = []

    class Watched(np.ndarray):
        def __del__(self) -> None:
            alive.remove(self.number) if hasattr(self, "number") else None

    def rows() -> Iterator[SheetRow]:
        for number in range(5):
            watched = pixels(32, 32).view(Watched)
            watched.number = number
            alive.append(number)
            assert len(alive) <= 2
            yield row(32, 32, pixels=watched)
            del watched

    assert len(drawn(tmp_path, rows()).all("article")) == 5


def test_a_page_that_fails_leaves_the_old_one(tmp_path: Path) -> None:
    before = drawn(tmp_path, [row()]).source

    def failing() -> Iterator[SheetRow]:
        yield row()
        raise ValueError("lost")

    with pytest.raises(ValueError, match="lost"):
        drawn(tmp_path, failing())
    assert [file.name for file in tmp_path.iterdir()] == ["run_dataset.html"]
    assert (tmp_path / "run_dataset.html").read_text("utf-8") == before


def test_a_page_that_cannot_be_written_is_said_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", "utf-8")
    with pytest.raises(ResourceError):
        contact_sheet([row()], {}, [], tmp_path / "file" / "page.html")


def test_console_histogram() -> None:
    lines = histogram_lines(COUNTS)
    assert lines == [
        " 832x1216    7    5 %  ##",
        f"1024x1024  120   94 %  {'#' * 40}",
        " 1216x832    1   <1 %  #",
    ]
    assert "".join(lines).isascii()
    assert sum(int(line.split()[1]) for line in lines) == 128
    assert histogram_lines({}) == ["no images"]
    assert histogram_lines({Size(64, 64): 0}) == ["64x64  0    0 %  "]
