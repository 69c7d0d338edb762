"""Metadata files: what their keys mean, how captions and tags are joined, sizes to train at, and mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from library.data import metadata_file
from library.data.metadata_file import Entry, composed
from library.data.settings import SubsetSettings

SIZE = (64, 64)


@pytest.mark.parametrize(
    ("caption", "tags", "plain", "wild"),
    [
        ("a photo", "tag1, tag2", "a photo,tag1, tag2", "a photo,tag1, tag2"),
        ("l1\nl2", "t1\nt2", "l1\nl2,t1\nt2", "l1,t1,t2\nl2,t1,t2"),
        (None, "t1\nt2", "t1\nt2", "t1\nt2"),
        ("a photo", None, "a photo", "a photo"),
        ("", "tag", "tag", "tag"),
        (None, None, "", ""),
    ],
)
def test_caption_and_tags(caption, tags, plain, wild):
    entry = Entry("x", caption, tags)
    assert composed(entry, SubsetSettings(image_dir="")) == plain
    assert composed(entry, SubsetSettings(image_dir="", enable_wildcard=True)) == wild


@pytest.fixture
def scan_meta(scan_toml, tmp_path):
    def run(content: object, more: str = "", dataset: str = "resolution = 64", name: str = "m.json", **flags):
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
        text = f"[[datasets]]\n{dataset}\n[[datasets.subsets]]\nmetadata_file = '{path.as_posix()}'\n{more}"
        return scan_toml(text, **flags)

    return run


@pytest.fixture
def folder(make_images, tmp_path):
    folder = make_images(tmp_path / "画 像", {"a.png": SIZE, "b 😀.jpg": SIZE, "c.d.png": SIZE})
    make_images(folder / "deep", {"e.png": SIZE})
    return folder


def errors(found) -> list[str]:
    return [f"{finding.what} {finding.hint}" for finding in found.findings if finding.error]


def warnings_of(found) -> list[str]:
    return [finding.what for finding in found.findings if not finding.error]


def captions(found) -> dict[str, str]:
    return {Path(item.path).name: item.caption for item in found.items}


def test_keys(scan_meta, folder):
    content = {"a": {"caption": "of a"}, "b 😀.jpg": {"tags": "of, b"}, "c.d": {"caption": "c", "tags": "d"}}
    content["deep/e"] = {"caption": "deep"}
    found = scan_meta(content, f"image_dir = '{folder.as_posix()}'\n")
    assert not found.findings
    assert captions(found) == {"a.png": "of a", "b 😀.jpg": "of, b", "c.d.png": "c,d", "e.png": "deep"}


def test_keys_that_are_paths(scan_meta, folder, monkeypatch):
    content = {str(folder / "a.png"): {"caption": "whole"}}
    assert captions(scan_meta(content)) == {"a.png": "whole"}
    monkeypatch.chdir(folder.parent)
    content = {str(Path(folder.name, "a.png")): {"caption": "from here"}, "画 像/c.d": {"caption": "stem"}}
    assert captions(scan_meta(content)) == {"a.png": "from here", "c.d.png": "stem"}


def test_lines(scan_meta, folder):
    lines = [
        {"image_path": "a.png", "caption": "of a", "tags": "tag", "image_size": [64, 64], "train_resolution": [32, 32]},
        {"image_path": str(folder / "b 😀.jpg"), "caption": "", "tags": "tag", "image_size": [9, 9]},
    ]
    text = "\ufeff" + "\n\n".join(map(json.dumps, lines)) + "\n"
    found = scan_meta(text, f"image_dir = '{folder.as_posix()}'\n", name="m.JSONL")
    assert captions(found) == {"a.png": "of a,tag", "b 😀.jpg": "tag"}
    assert {item.assignment.bucket for item in found.items} == {SIZE}
    (warning,) = warnings_of(found)
    assert "1 entries" in warning
    assert "b 😀.jpg" in warning


def test_sizes_to_train_at(scan_meta, folder, traits):
    content = {
        "a": {"caption": "x", "train_resolution": [96, 64]},
        "c.d": {"caption": "x", "train_resolution": [64, 128]},
    }
    more = f"image_dir = '{folder.as_posix()}'\n"
    found = scan_meta(content, more, dataset="batch_size = 2")
    assert not errors(found)
    assert [item.assignment.bucket for item in found.items] == [(96, 64), (64, 128)]
    assert found.items[0].assignment.resized == (96, 96)
    assert found.items[0].original == SIZE
    (settings,) = found.config.datasets
    assert settings.enable_bucket
    assert settings.resolution == (64, 128)
    found = scan_meta(content, more, dataset="bucket_no_upscale = true\nenable_bucket = true")
    assert "bucket_no_upscale can't be used" in errors(found)[0]
    content["a"]["train_resolution"] = [72, 64]
    assert f"isn't a multiple of {traits.bucket_step}" in errors(scan_meta(content, more))[0]


def test_some_sizes_to_train_at(scan_meta, folder):
    content = {"a": {"caption": "x", "train_resolution": [96, 64]}, "c.d": {"caption": "x"}}
    more = f"image_dir = '{folder.as_posix()}'\n"
    assert "no resolution given" in errors(scan_meta(content, more, dataset=""))[0]
    found = scan_meta(content, more)
    assert {item.assignment.bucket for item in found.items} == {SIZE}


def test_what_is_missing_is_named_once(scan_meta, folder):
    content = {f"gone{number}": {"caption": "x"} for number in range(3000)} | {"a": {}, "a.png": {"caption": "y"}}
    more = f"image_dir = '{folder.as_posix()}'\n"
    (error,) = errors(scan_meta(content, more))
    assert error.startswith("3000 of 3002 entries")
    assert "gone0" in error
    assert len(error) < 500
    found = scan_meta(content, more, skip_bad_images=True)
    assert not errors(found)
    assert any("name an image that others name" in what for what in warnings_of(found))
    assert any("1 of 1 entries" in what and "neither caption nor tags" in what for what in warnings_of(found))
    assert found.reports[0].missing == 1


@pytest.mark.parametrize(
    ("content", "name", "words"),
    [
        ("[1]", "m.json", "isn't an object"),
        ("{", "m.json", "not a metadata file"),
        ("[" * 100_000, "m.json", "not a metadata file"),
        ({"a": 1, "b": {"caption": 1}, "": {}}, "m.json", "a: it isn't an object; b: caption isn't a text"),
        ({"a": {"train_resolution": [64]}}, "m.json", "train_resolution isn't [width, height]"),
        ({"a\u0000": {}}, "m.json", "no file can have this name"),
        ('{"image_path": 1}\n\n{\n', "m.jsonl", "line 1: it has no image_path; line 3: it isn't JSON"),
    ],
)
def test_mistakes(scan_meta, folder, content, name, words):
    found = scan_meta(content, f"image_dir = '{folder.as_posix()}'\n", name=name)
    assert words in errors(found)[0]


def test_a_missing_file(scan_toml):
    text = "[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nmetadata_file = 'none.json'\n"
    assert "none.json" in errors(scan_toml(text))[0]


def test_one_file_twice(scan_meta, folder):
    again = f"metadata_file = '{(folder.parent / 'm.json').as_posix()}'\nimage_dir = 'elsewhere'\n"
    found = scan_meta({"a": {"caption": "x"}}, f"image_dir = '{folder.as_posix()}'\n[[datasets.subsets]]\n{again}")
    assert any("has it already" in what for what in warnings_of(found))
    assert len(found.items) == 1


def test_entries_without_anything():
    assert metadata_file._entry("a", {}) == Entry("a", None, None)
