"""What a scan finds: captions, damaged files, sizes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from library.data import config, sources
from library.data.reports import caption_table

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "dataset_scan.json").read_text("utf-8"))


def toml(folder: Path, more: str = "", dataset: str = "") -> str:
    return f"[[datasets]]\nresolution = 64\n{dataset}[[datasets.subsets]]\nimage_dir = '{folder.as_posix()}'\n{more}"


def errors(found: sources.Scan) -> list[str]:
    return [f"{finding.what} {finding.where} {finding.hint}" for finding in found.findings if finding.error]


def warnings_of(found: sources.Scan) -> list[str]:
    return [finding.what for finding in found.findings if not finding.error]


TEN = {f"{number}.png": (64, 64) for number in range(10)}


@pytest.fixture
def golden_tree(make_images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path, size in GOLDEN["files"].items():
        make_images(Path(path).parent, {Path(path).name: tuple(size)})
    for path, text in GOLDEN["caption_files"].items():
        Path(path).write_text(text, "utf-8")


GOLDEN_OPTIONS = {
    "train_data_dir": "train",
    "reg_data_dir": "reg",
    "resolution": "512",
    "enable_bucket": True,
    "caption_extension": ".txt",
}


@pytest.mark.usefixtures("golden_tree")
def test_scan_equals_the_reference(options_of, traits):
    found = sources.scan(config.load(options_of(**GOLDEN_OPTIONS)), traits, visible=False)
    wanted = GOLDEN["cases"][0]["result"][0]["images"]
    assert [item.path.replace("\\", "/") for item in found.items] == list(wanted)
    for item in found.items:
        image = wanted[item.path.replace("\\", "/")]
        assert item.caption == image["caption"]
        assert item.repeats == image["num_repeats"]
        assert item.subset.is_reg == image["is_reg"]
        assert list(item.original) == image["size"]
        assert list(item.assignment.bucket) == image["bucket"]
        assert list(item.assignment.resized) == image["resized"]
    assert not found.reg_slots
    errors_of_aspect = [abs(item.assignment.ar_error) for item in found.items]
    wanted_error = GOLDEN["cases"][0]["result"][0]["bucket_info"]["mean_img_ar_error"]
    assert sum(errors_of_aspect) / len(errors_of_aspect) == pytest.approx(wanted_error)


@pytest.mark.usefixtures("golden_tree")
def test_lines_for_wildcards_equal_the_reference(options_of, traits):
    found = sources.scan(config.load(options_of(**GOLDEN_OPTIONS, enable_wildcard=True)), traits, visible=False)
    assert {item.path.replace("\\", "/"): item.caption for item in found.items} == GOLDEN["cases"][1]["captions"]


def test_text_files_that_nobody_would_read_stop_the_run(scan_toml, make_images, tmp_path):
    make_images(tmp_path / "a", TEN, {f"{number}.txt": "x" for number in range(10)})
    (error,) = errors(scan_toml(toml(tmp_path / "a", 'class_tokens = "cat"\n')))
    assert "10 files *.txt" in error
    assert "--caption_extension .txt" in error
    found = scan_toml(toml(tmp_path / "a"), allow_missing_captions=True)
    assert not errors(found)
    assert any("10 files *.txt" in what for what in warnings_of(found))


def test_one_of_ten_captions_missing_is_named(scan_toml, make_images, tmp_path):
    make_images(tmp_path / "a", TEN, {f"{number}.txt": "x" for number in range(9)})
    found = scan_toml(toml(tmp_path / "a", 'caption_extension = "txt"\n'))
    assert not errors(found)
    (warning,) = warnings_of(found)
    assert "1 of 10 images" in warning
    assert "9.png" in warning
    assert "9/10 captioned, 1 without a caption" in caption_table(found.items, found.reports)[0]


def test_class_tokens_stand_in_for_captions_without_a_word(scan_toml, make_images, tmp_path):
    make_images(tmp_path / "a", TEN)
    found = scan_toml(toml(tmp_path / "a", 'class_tokens = "sks cat"\nnum_repeats = 3\n'))
    assert not found.findings
    assert {item.caption for item in found.items} == {"sks cat"}
    assert found.reports[0].from_class_tokens == 10
    assert caption_table(found.items, found.reports)[0].endswith("a x 3: 0/10 captioned, 10 from class tokens")


def test_kinds_of_captions(scan_toml, make_images, tmp_path):
    texts = {
        "0.txt": "  one  \n",
        "1.txt": "first\r\nsecond\r\n",
        "2.txt": "",
        "3.txt": "\n\nlater",
        "4.txt": "\ufefftag, 画像 😀",
    }
    make_images(tmp_path / "a", {f"{number}.png": (64, 64) for number in range(5)}, texts)
    more = 'caption_extension = ".txt"\ncaption_prefix = "a photo of"\ncaption_suffix = "now"\n'
    found = scan_toml(toml(tmp_path / "a", more))
    captions = ["one", "first", "", "", "tag, 画像 😀"]
    assert [item.caption for item in found.items] == captions
    (report,) = found.reports
    assert (report.images, report.captioned, report.empty, report.missing, report.multi_line) == (5, 3, 2, 0, 2)
    table = caption_table(found.items, found.reports)
    assert [line for line in table if "caption: " in line] == [
        f"  caption: a photo of {text} now" for text in ("one", "first", "")
    ]


def test_names_of_face_files(scan_toml, make_images, tmp_path):
    """A picture of a face shares the caption of what it was cut from, but not that of another image."""
    names = {"d.png": (64, 64), "d_1_2_3_4.png": (64, 64), "e_1_2_30_40.png": (64, 64), "f_x_1_2_3.png": (64, 64)}
    make_images(tmp_path / "a", names, {"d.txt": "of d", "e.txt": "of e", "f.txt": "of f"})
    found = scan_toml(toml(tmp_path / "a", 'caption_extension = ".txt"\nface_crop_aug_range = [1.0, 2.0]\n'))
    assert [item.caption for item in found.items] == ["of d", "", "of e", ""]
    assert [item.face for item in found.items] == [None, (1, 2, 3, 4), (1, 2, 30, 40), None]
    found = scan_toml(toml(make_images(tmp_path / "b", TEN), "face_crop_aug_range = [1.0, 2.0]\n"))
    assert any("face_crop_aug_range does nothing" in what for what in warnings_of(found))


def damage(folder: Path) -> set[str]:
    """Seven sorts of damaged images."""
    good_png, good_jpg = (folder / "good.png").read_bytes(), (folder / "good.jpg").read_bytes()
    good_webp = (folder / "good.webp").read_bytes()
    files = {
        "empty.png": b"",
        "cut.png": good_png[: len(good_png) * 2 // 3],
        "cut.jpg": good_jpg[: len(good_jpg) * 2 // 3],
        "cut.webp": good_webp[:-20],
        "page.jpg": b"<!DOCTYPE html><html></html>",
        "noise.bmp": bytes(range(256)) * 4,
        "head.png": good_png[:20],
        "archive.png": b"PK\x03\x04" + bytes(100),
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return set(files)


def test_all_damaged_images_at_once(scan_toml, make_images, tmp_path):
    folder = make_images(tmp_path / "a", {"good.png": (64, 64), "good.jpg": (64, 64), "good.webp": (64, 64)})
    bad = damage(folder)
    (folder / "._good.png").write_bytes(b"resource fork")
    (folder / "liar.png").write_bytes((folder / "good.jpg").read_bytes())
    found = scan_toml(toml(folder))
    named = {Path(finding.where).name for finding in found.findings if finding.error}
    assert named == bad
    assert any("a web page" in error and "page.jpg" in error for error in errors(found))
    found = scan_toml(toml(folder), skip_bad_images=True)
    assert not errors(found)
    assert {Path(path).name for path in found.skipped} == bad
    assert {Path(item.path).name for item in found.items} == {"good.png", "good.jpg", "good.webp", "liar.png"}
    assert any(f"{len(bad)} damaged images are skipped" in what for what in warnings_of(found))


def test_jpeg_with_something_behind_it_is_whole(scan_toml, make_images, tmp_path):
    folder = make_images(tmp_path / "a", {"a.jpg": (64, 64)})
    (folder / "a.jpg").write_bytes((folder / "a.jpg").read_bytes() + b"a film")
    assert not errors(scan_toml(toml(folder)))


def test_extensions_in_any_case(scan_toml, make_images, tmp_path):
    make_images(tmp_path / "a", {"a.PNG": (64, 64), "b.Jpg": (64, 64), "c.jpeg": (64, 64), "d.bmp": (64, 64)})
    (tmp_path / "a" / "notes.md").write_text("x", "utf-8")
    assert len(scan_toml(toml(tmp_path / "a")).items) == 4


@pytest.mark.parametrize(
    ("dataset", "words"),
    [
        ("enable_bucket = true\nmin_bucket_reso = 64\nbucket_reso_steps = 24\n", "multiple of 16"),
        ("resolution = 72\n", "isn't a multiple of 16"),
    ],
)
def test_sides_that_the_model_cannot_take(scan_toml, make_images, tmp_path, dataset, words):
    make_images(tmp_path / "a", {"a.png": (64, 64)})
    text = toml(tmp_path / "a", dataset=dataset).replace("resolution = 64\nresolution", "resolution")
    (error,) = errors(scan_toml(text))
    assert words in error


def test_sizes_worth_a_warning(scan_toml, make_images, tmp_path):
    make_images(tmp_path / "a", {"tiny.png": (20, 20), "long.png": (40, 800), "ok.png": (64, 64)})
    found = scan_toml(toml(tmp_path / "a"))
    whats = warnings_of(found)
    assert any("cropped by more than 30%" in what and "long.png" in what and "ok.png" not in what for what in whats)
    assert any("enlarged to more than 2 times" in what and "tiny.png" in what for what in whats)


def test_one_folder_in_two_datasets(scan_toml, make_images, tmp_path):
    make_images(tmp_path / "a", {"a.png": (128, 64)})
    second = toml(tmp_path / "a").replace("resolution = 64", "resolution = 128")
    found = scan_toml(toml(tmp_path / "a") + second)
    assert [(item.dataset, item.assignment.bucket) for item in found.items] == [(0, (64, 64)), (1, (128, 128))]
