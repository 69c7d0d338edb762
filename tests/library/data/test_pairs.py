"""Images with conditioning images: which belong together, and what is said when they don't."""

from __future__ import annotations

import pytest

from library.data import sources

SIZE = (64, 64)


@pytest.fixture
def scan_pairs(load_config, traits, tmp_path):
    def run(more: str = "", **flags):
        images, masks = (tmp_path / "images").as_posix(), (tmp_path / "masks").as_posix()
        text = f"[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = '{images}'\n"
        loaded = load_config(f"{text}conditioning_data_dir = '{masks}'\n{more}", masked_loss=True)
        return sources.scan(loaded, traits, visible=False, **flags)

    return run


def errors(found) -> list[str]:
    return [f"{finding.what} {finding.hint}" for finding in found.findings if finding.error]


def test_pairs_by_name(scan_pairs, make_images, tmp_path):
    make_images(tmp_path / "images", {"a.png": SIZE, "b.jpg": SIZE}, {"a.txt": "of a", "b.txt": "of b"})
    make_images(tmp_path / "masks", {"a.jpg": SIZE, "b.png": SIZE, "more.png": SIZE})
    found = scan_pairs('caption_extension = ".txt"\n')
    assert [item.caption for item in found.items] == ["of a", "of b"]
    assert [item.conditioning for item in found.items] == [
        str(tmp_path / "masks" / "a.jpg"),
        str(tmp_path / "masks" / "b.png"),
    ]
    assert not errors(found)
    assert any("1 images in" in finding.what and "belong to no image" in finding.what for finding in found.findings)


def test_missing_ones_are_all_named_at_once(scan_pairs, make_images, tmp_path):
    make_images(tmp_path / "images", {f"{number}.png": SIZE for number in range(12)})
    make_images(tmp_path / "masks", {"0.png": SIZE})
    (error,) = errors(scan_pairs())
    assert error.startswith("11 images have no conditioning image")
    assert all(f"{number}.png" in error for number in range(1, 12))
    found = scan_pairs(skip_bad_images=True)
    assert not errors(found)
    assert len(found.items) == 1


def test_folders_inside(scan_pairs, make_images, tmp_path):
    for folder in ("images", "masks"):
        make_images(tmp_path / folder, {"a.png": SIZE})
        make_images(tmp_path / folder / "x" / "y", {"a.png": SIZE})
    found = scan_pairs("recursive = true\n")
    assert not errors(found)
    assert [item.conditioning for item in found.items] == [
        str(tmp_path / "masks" / "a.png"),
        str(tmp_path / "masks" / "x" / "y" / "a.png"),
    ]


def test_damaged_and_unlike_ones(scan_pairs, make_images, tmp_path):
    make_images(tmp_path / "images", {"a.png": (128, 64), "b.png": (128, 64), "c.png": (128, 64)})
    masks = make_images(tmp_path / "masks", {"a.png": (64, 64), "b.png": (64, 32), "c.png": (8, 8)})
    (masks / "c.png").write_bytes(b"")
    found = scan_pairs()
    assert len(errors(found)) == 2
    assert any("1 conditioning images have another shape" in error and "a.png" in error for error in errors(found))
    assert any("empty" in error for error in errors(found))


def test_no_folder_of_masks(scan_pairs, make_images, tmp_path):
    make_images(tmp_path / "images", {"a.png": SIZE})
    (tmp_path / "mask").mkdir()
    (error,) = errors(scan_pairs())
    assert f"did you mean {tmp_path / 'mask'}?" in error


def test_the_same_images_with_other_masks(load_config, traits, make_images, tmp_path):
    text = "[[datasets]]\nresolution = 64\n"
    for folder in ("images", "one", "two"):
        make_images(tmp_path / folder, {"a.png": SIZE})
    for folder in ("one", "two", "two"):
        text += f"[[datasets.subsets]]\nimage_dir = '{(tmp_path / 'images').as_posix()}'\n"
        text += f"conditioning_data_dir = '{(tmp_path / folder).as_posix()}'\n"
    found = sources.scan(load_config(text, masked_loss=True), traits, visible=False)
    assert len(found.items) == 2
    assert sum("has it already" in finding.what for finding in found.findings) == 1
