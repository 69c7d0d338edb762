"""Tar files stand for folders: the same samples come from both."""

from __future__ import annotations

import gzip
import shutil
import tarfile
from pathlib import Path

import pytest
import torch

from library.data import config, folders, shards, sources
from tests.caches import fill_latents, fill_text

SIZES = {"a.png": (96, 64), "b.jpg": (64, 64), "deep/c.webp": (64, 96), "d.bmp": (80, 64), "deep/e.png": (64, 64)}
CAPTIONS = {"a": "one, thing", "b": "two", "deep/c": "three\nlines", "d": "häßlich"}


@pytest.fixture
def folder(make_images, tmp_path) -> Path:
    root = tmp_path / "images"
    for name, size in SIZES.items():
        make_images(root / Path(name).parent, {Path(name).name: size})
    for name, text in CAPTIONS.items():
        (root / f"{name}.txt").write_text(text, "utf-8")
    return root


def pack(folder: Path, shard: Path, mode: str = "w", root: str = ".") -> Path:
    with tarfile.open(shard, mode) as archive:
        archive.add(folder, arcname=root)
    return shard


def toml(place: Path, more: str = "") -> str:
    return (
        "[[datasets]]\nresolution = 64\nenable_bucket = true\nmin_bucket_reso = 32\nbucket_reso_steps = 16\n"
        f"batch_size = 2\n[[datasets.subsets]]\nimage_dir = '{place.as_posix()}'\nclass_tokens = 'cat'\n"
        f"caption_extension = '.txt'\nrecursive = true\n{more}"
    )


def seen(data) -> list[tuple[str, str, torch.Tensor, torch.Tensor | None]]:
    """Name, caption, and pixels or latents of each sample of an epoch, in their order."""
    found = []
    for batch in data.loader(1, 0, 0, 1, 1):
        for row, name in enumerate(batch.names):
            inner = Path(name).as_posix().partition("images")[2].partition("/")[2]
            tensor = batch.pixels if batch.latents is None else batch.latents
            found.append(
                (inner, batch.captions[row], tensor[row], None if batch.cond is None else batch.cond["pooled"][row])
            )
    return found


def assert_equal(one, other) -> None:
    assert [sample[:2] for sample in one] == [sample[:2] for sample in other]
    assert all(torch.equal(here[2], there[2]) for here, there in zip(one, other, strict=True))


def test_the_same_samples_from_folder_and_tar(training_data, folder, tmp_path):
    from_folder = seen(training_data(toml(folder)))
    shard = pack(folder, tmp_path / "images.tar")
    from_tar = seen(training_data(toml(shard)))
    assert len(from_folder) >= len(SIZES)
    assert_equal(from_folder, from_tar)


def test_a_folder_of_tar_files_is_searched_like_one_of_folders(training_data, folder, tmp_path):
    several = tmp_path / "several"
    several.mkdir()
    pack(folder, several / "images.tar", root="images")
    data = training_data(toml(several))
    assert {Path(item.path).name for item in data.items} == {Path(name).name for name in SIZES}


def test_caches_lie_beside_the_tar_file_and_are_found_again(training_data, folder, tmp_path, vae, encoder):
    shard = pack(folder, tmp_path / "images.tar")
    before = shard.read_bytes()
    data = training_data(toml(shard))
    fill_latents(data, vae)
    fill_text(data, encoder)
    once = vae.images
    assert once == len(SIZES)
    assert shard.read_bytes() == before
    assert list((tmp_path / "images.tar.cache").rglob("*.npz"))
    assert_equal(seen(data), seen(data))
    again = training_data(toml(shard))
    fill_latents(again, vae)
    assert vae.images == once
    uncached = training_data(toml(folder))
    fill_latents(uncached, vae)
    fill_text(uncached, encoder)
    assert_equal(seen(data), seen(uncached))


def test_the_layout_of_class_folders_holds_for_tar_files(options_of, traits, folder, tmp_path):
    root = tmp_path / "train"
    root.mkdir()
    pack(folder, root / "3_zog.tar")
    found = sources.scan(
        config.load(options_of(train_data_dir=str(root), resolution="64", caption_extension=".txt")),
        traits,
        visible=False,
    )
    assert not [finding for finding in found.findings if finding.error]
    assert {item.repeats for item in found.items} == {3}
    assert "zog" in {item.caption for item in found.items}


def test_damaged_pictures_in_a_tar_file_are_named(scan_toml, folder, tmp_path):
    (folder / "a.png").write_bytes((folder / "a.png").read_bytes()[:200])
    (folder / "b.jpg").write_bytes(b"")
    found = scan_toml(toml(pack(folder, tmp_path / "images.tar")))
    said = " ".join(f"{finding.what} {finding.where}" for finding in found.findings if finding.error)
    assert "images.tar/a.png" in said.replace("\\", "/")
    assert "images.tar/b.jpg" in said.replace("\\", "/")


@pytest.mark.parametrize("damage", ["cut", "compressed", "no tar"])
def test_a_tar_file_that_cannot_be_read_is_one_line(scan_toml, folder, tmp_path, damage):
    shard = pack(folder, tmp_path / "images.tar")
    content = shard.read_bytes()
    broken = {"cut": content[: len(content) // 2], "compressed": gzip.compress(content), "no tar": b"x" * 5000}
    shard.write_bytes(broken[damage])
    errors = [finding for finding in scan_toml(toml(shard)).findings if finding.error]
    assert any("tar file" in error.what and "images.tar" in error.what for error in errors)
    assert all("\n" not in error.what for error in errors)


def test_metadata_files_name_what_is_in_a_tar_file(scan_toml, folder, tmp_path):
    shard = pack(folder, tmp_path / "images.tar")
    listed = tmp_path / "meta.json"
    listed.write_text('{"a.png": {"caption": "from json"}, "deep/c": {"caption": "deep"}}', "utf-8")
    text = (
        f"[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = '{shard.as_posix()}'\n"
        f"metadata_file = '{listed.as_posix()}'\n"
    )
    found = scan_toml(text)
    assert not [finding for finding in found.findings if finding.error]
    assert [item.caption for item in found.items] == ["from json", "deep"]


def test_a_scan_remembers_tar_files_and_notices_changes(load_config, traits, folder, tmp_path):
    shard, memory = pack(folder, tmp_path / "images.tar"), tmp_path / "scan"

    def run() -> sources.Scan:
        return sources.scan(load_config(toml(shard)), traits, visible=False, scan_cache=memory)

    assert run().opened == len(SIZES) + len(CAPTIONS)
    assert run().opened == 0
    (folder / "a.txt").write_text("changed", "utf-8")
    pack(folder, shard)
    found = run()
    assert "changed" in {item.caption for item in found.items}


def test_paths_through_tar_files_are_told_from_others(tmp_path):
    odd = tmp_path / "a.tar.d" / "b.tar"
    odd.mkdir(parents=True)
    (odd / "c.png").write_bytes(b"c")
    assert shards.split(str(odd / "c.png")) is None
    assert shards.opened(str(odd / "c.png")).read() == b"c"
    shard = pack(odd, tmp_path / "a.tar.d" / "real.TAR")
    assert shards.split(f"{shard}/c.png") == (str(shard), "c.png")
    assert shards.opened(f"{shard}/c.png").read() == b"c"
    shutil.rmtree(odd)
    with pytest.raises(OSError, match="isn't in the tar"):
        shards.opened(f"{shard}/d.png")
    assert folders.class_folder(Path("3_a.b.tar")) == folders.ClassFolder(Path("3_a.b.tar"), 3, "a.b")
