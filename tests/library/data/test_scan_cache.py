"""What is remembered between scans: only what has changed is opened; nonsense in the file does no harm."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from PIL import Image

from library.data import directories, sources
from library.data.scan_cache import Remembered, ScanCache
from library.data.sources import Scan

SIZE = (64, 64)


@pytest.fixture
def folder(make_images, tmp_path):
    names = {f"{number}.png": SIZE for number in range(5)}
    return make_images(tmp_path / "画像 [x] %😀", names, {f"{number}.txt": f"of {number}" for number in range(5)})


@pytest.fixture
def scan_again(load_config, traits, folder, tmp_path):
    def run(more: str = "", cached: bool = True, **flags) -> Scan:
        text = f"[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = '{folder.as_posix()}'\n"
        loaded = load_config(f'{text}caption_extension = ".txt"\n{more}')
        cache = tmp_path / "deep" / "scan" if cached else None
        return sources.scan(loaded, traits, scan_cache=cache, visible=False, **flags)

    return run


def opened_names(monkeypatch) -> list[str]:
    """The names of the files that are opened from now on."""
    names: list[str] = []
    read_header, content = directories.read_header, directories._content

    def header(path, **flags):
        names.append(Path(path).name)
        return read_header(path, **flags)

    def text(path, size):
        names.append(Path(path).name)
        return content(path, size)

    monkeypatch.setattr(directories, "read_header", header)
    monkeypatch.setattr(directories, "_content", text)
    return names


def test_nothing_is_opened_twice(scan_again, monkeypatch):
    first = scan_again()
    assert first.opened == 10
    names = opened_names(monkeypatch)
    second = scan_again()
    assert second.items == first.items
    assert second.opened == 0
    assert not names
    assert scan_again(cached=False).items == first.items
    assert len(names) == 10


def test_what_has_changed_is_opened(scan_again, folder, monkeypatch):
    scan_again()
    Image.new("RGB", (128, 64)).save(folder / "1.png")
    (folder / "2.txt").write_text("edited", "utf-8")
    os.utime(folder / "3.txt", ns=(1, 1))
    (folder / "4.png").unlink()
    shutil.copy(folder / "0.png", folder / "9.png")
    names = opened_names(monkeypatch)
    found = scan_again()
    assert sorted(names) == ["1.png", "2.txt", "3.txt", "9.png"]
    assert [item.caption for item in found.items] == ["of 0", "of 1", "edited", "of 3", ""]
    assert found.items[1].original == (128, 64)
    names.clear()
    assert scan_again().items == found.items
    assert not names


def test_a_damaged_file_is_looked_at_again(scan_again, folder):
    good = (folder / "1.png").read_bytes()
    (folder / "1.png").write_bytes(good[:40])
    assert any(finding.error for finding in scan_again().findings)
    assert any(finding.error for finding in scan_again().findings)
    (folder / "1.png").write_bytes(good)
    assert not any(finding.error for finding in scan_again().findings)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda content: b"",
        lambda content: b"nonsense\n\x00\xff" * 9,
        lambda content: content[: len(content) // 2],
        lambda content: content.replace(b"64", b"65", 1),
        lambda content: content.replace(b"of 1", b"of 7"),
        lambda content: content[:-3] + b"\n\n\n",
    ],
)
def test_a_spoilt_file_is_not_believed(scan_again, tmp_path, spoil):
    first = scan_again()
    path = tmp_path / "deep" / "scan"
    path.write_bytes(spoil(path.read_bytes()))
    second = scan_again()
    assert second.items == first.items
    assert second.opened == 10
    assert scan_again().opened == 0


@pytest.mark.parametrize(
    "content", [{"images": [], "texts": 3}, {"images": {"0.png": 3}, "texts": {}}, {}, {"images": {"0.png": [1]}}, []]
)
def test_whole_lines_of_another_shape_are_not_believed(scan_again, folder, tmp_path, content):
    first = scan_again()
    path = tmp_path / "deep" / "scan"
    cache = ScanCache(path)
    cache.save([(str(folder), Remembered({"0.png": [1, 2, 3, 4, 5, 6]}, {}))])
    head, line = path.read_bytes().split(b"\n")
    from library.data import scan_cache

    key = line[9:].split(b"\t")[0]
    path.write_bytes(head + b"\n" + scan_cache._with_sum(key + b"\t" + json.dumps(content).encode()))
    assert scan_again().items == first.items


def test_another_way_of_reading_starts_anew(scan_again):
    scan_again()
    assert scan_again(ignore_exif_orientation=True).opened == 10
    assert scan_again(skip_bad_images=True).opened == 10
    assert scan_again(skip_bad_images=True).opened == 0
    assert scan_again().opened == 0, "what was read thoroughly needn't be read again"


def test_no_place_for_the_file_is_no_error(scan_again, tmp_path, caplog):
    (tmp_path / "deep").write_text("in the way", "utf-8")
    assert len(scan_again().items) == 5
    assert "can't be remembered" in caplog.text


def test_other_encodings_are_named_each_time(scan_again, folder):
    (folder / "1.txt").write_bytes("кошка на диване, рисунок".encode("cp1251"))
    for _ in range(2):
        found = scan_again()
        assert found.items[1].caption == "кошка на диване, рисунок"
        (finding,) = found.findings
        assert "cp1251" in finding.what
        assert "1.txt" in finding.what


def test_byte_order_marks(scan_again, folder):
    (folder / "1.txt").write_bytes("\ufeffof 1".encode())
    (folder / "2.txt").write_bytes("of 2, 画像".encode("utf-16"))
    captions = [item.caption for item in scan_again().items]
    assert captions == ["of 0", "of 1", "of 2, 画像", "of 3", "of 4"]
    assert [item.caption for item in scan_again().items] == captions


# metadata_cache.json


def test_cache_info_is_written_and_read(scan_again, folder, monkeypatch):
    first = scan_again("cache_info = true\n", cached=False)
    content = json.loads((folder / "metadata_cache.json").read_text("utf-8"))
    assert content[str(folder / "1.png")]["caption"] == "of 1"
    assert content[str(folder / "1.png")]["resolution"] == [64, 64]
    names = opened_names(monkeypatch)
    assert scan_again("cache_info = true\n", cached=False).items == first.items
    assert sorted(names) == [f"{number}.txt" for number in range(5)]
    Image.new("RGB", (128, 64)).save(folder / "1.png")
    assert scan_again("cache_info = true\n", cached=False).items[1].original == (128, 64)
    content = json.loads((folder / "metadata_cache.json").read_text("utf-8"))
    assert content[str(folder / "1.png")]["resolution"] == [128, 64]


def test_cache_info_of_another_program(scan_again, folder):
    lies = {
        f"elsewhere/{number}.png": {"caption": f"remembered {number}", "resolution": [999, 999]} for number in range(5)
    }
    (folder / "metadata_cache.json").write_text(json.dumps(lies), "utf-8")
    (folder / "3.txt").unlink()
    found = scan_again("cache_info = true\n")
    assert {item.original for item in found.items} == {SIZE}
    assert [item.caption for item in found.items] == ["of 0", "of 1", "of 2", "remembered 3", "of 4"]
    (folder / "metadata_cache.json").write_bytes(b"[\xff")
    assert [item.caption for item in scan_again("cache_info = true\n").items][3] == ""
