"""Images that aren't there any more, folders inside folders, and findings about very many files."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

import pytest

SIZE = (64, 64)


def toml(folder, more: str = "") -> str:
    text = f"[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = '{folder.as_posix()}'\n"
    return f'{text}caption_extension = ".txt"\n{more}'


@pytest.fixture
def folder(make_images, tmp_path):
    captions = {f"{name}.txt": f"of {name}" for name in ("here", "img1", "img10", "both")}
    folder = make_images(tmp_path / "a", {"here.png": SIZE, "both.png": SIZE}, captions)
    names = ["img1_0128x0096_flux.npz", "img10_10000x0064_flux.npz", "here_0064x0064_flux.npz"]
    for name in [*names, "img1_flux_te.npz", "uncaptioned_0064x0064_flux.npz", "both.jpg_0064x0064_flux.npz"]:
        (folder / name).write_bytes(b"")
    return folder


def test_cached_latents_stand_for_images(scan_toml, folder):
    found = scan_toml(toml(folder), use_gone=True)
    assert [(Path(item.path).name, item.gone, item.caption) for item in found.items] == [
        ("both.png", False, "of both"),
        ("here.png", False, "of here"),
        ("img1", True, "of img1"),
        ("img10", True, "of img10"),
    ]
    assert found.items[2].original == (128, 96)
    assert found.items[3].original == (10000, 64)
    assert found.items[2].stem == str(folder / "img1")
    assert found.gone == 2
    (finding,) = [finding for finding in found.findings if finding.code == "E-DATA-GONE"]
    assert not finding.error
    assert "2 images" in finding.what
    assert len(scan_toml(toml(folder)).items) == 2


def test_only_caches_and_captions(scan_toml, folder):
    for image in folder.glob("*.png"):
        image.unlink()
    found = scan_toml(toml(folder), use_gone=True)
    assert [item.caption for item in found.items] == ["of both", "of here", "of img1", "of img10"]
    assert not any(finding.error for finding in found.findings)


def test_metadata_without_images(scan_toml, folder, tmp_path):
    (tmp_path / "m.json").write_text(json.dumps({"img1": {"caption": "x"}, "img10.png": {"tags": "y"}}), "utf-8")
    text = toml(folder, f"metadata_file = '{(tmp_path / 'm.json').as_posix()}'\n").replace(
        'caption_extension = ".txt"\n', ""
    )
    found = scan_toml(text, use_gone=True)
    assert [(item.caption, item.original, item.gone) for item in found.items] == [
        ("x", (128, 96), True),
        ("y", (10000, 64), True),
    ]
    assert any(finding.error for finding in scan_toml(text).findings)


def test_strictly_warnings_are_errors(scan_toml, folder):
    assert not any(finding.error for finding in scan_toml(toml(folder), use_gone=True).findings)
    assert all(finding.error for finding in scan_toml(toml(folder), use_gone=True, strict=True).findings)


def test_folders_inside(scan_toml, make_images, tmp_path):
    root = make_images(tmp_path / "a", {"z.png": SIZE}, {"z.txt": "of z"})
    make_images(root / "b" / "c", {"z.png": SIZE}, {"z.txt": "of c"})
    make_images(root / "__MACOSX", {"z.png": SIZE})
    make_images(root / ".hidden", {"z.png": SIZE})
    with suppress(OSError):
        (root / "b" / "round").symlink_to(root, target_is_directory=True)
    found = scan_toml(toml(root, "recursive = true\n"))
    assert [item.caption for item in found.items] == ["of c", "of z"]
    assert [item.path for item in found.items] == [str(root / "b" / "c" / "z.png"), str(root / "z.png")]
    assert len(scan_toml(toml(root)).items) == 1


def test_findings_stay_few(load_config, scan_toml, make_images, tmp_path):
    text = "[[datasets]]\nresolution = 64\n"
    for number in range(40):
        folder = make_images(tmp_path / f"{number}", {"a.png": SIZE})
        (folder / "b.png").write_bytes(b"")
        text += f"[[datasets.subsets]]\nimage_dir = '{folder.as_posix()}'\n"
        text += f"[[datasets.subsets]]\nimage_dir = '{folder.as_posix()}none'\n"
    findings = scan_toml(text).findings
    assert sum(finding.code == "E-IMAGE" for finding in findings) == 40
    missing = [finding for finding in findings if finding.code == "E-DATA-FOLDER"]
    assert len(missing) == 11
    assert missing[-1].what == "and 30 more problems of the same kind"


def test_broken_links_and_folders_named_like_images(scan_toml, make_images, tmp_path):
    folder = make_images(tmp_path / "a", {"a.png": SIZE})
    (folder / "b.png").mkdir()
    found = scan_toml(toml(folder))
    assert len(found.items) == 1
    try:
        (folder / "c.png").symlink_to(folder / "nowhere.png")
    except OSError:
        return
    (finding,) = [finding for finding in scan_toml(toml(folder)).findings if finding.error]
    assert finding.where.endswith("c.png")


def test_transparency(load_config, traits, scan_toml, make_images, tmp_path):
    from PIL import Image

    from library.data import sources

    folder = make_images(tmp_path / "a", {"a.png": SIZE})
    assert any("no image has transparency" in f.what for f in scan_toml(toml(folder, "alpha_mask = true")).findings)
    Image.new("RGBA", SIZE).save(folder / "b.png")
    found = scan_toml(toml(folder))
    assert [item.transparent for item in found.items] == [False, True]
    assert any("1 images have transparency" in finding.what for finding in found.findings)
    for more, options in (("alpha_mask = true", {}), ("", {"alpha_background": "white"})):
        found = sources.scan(load_config(toml(folder, more), **options), traits, visible=False)
        assert found.transparent == 1
        assert not [finding for finding in found.findings if finding.code == "E-IMAGE-ALPHA"]
