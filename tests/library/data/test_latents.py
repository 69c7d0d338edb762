"""Cached latents: only what fits and is fresh is used; masks, distributions, compact files, files of other programs."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from library.data.cache_names import CacheNames
from library.data.foreign_latents import recorded_crop
from library.data.images import load_picture, to_tensor
from library.data.items import Item
from library.data.latents import Drawn, Encoded, LatentsFiles, LatentsMemory, LatentsStore, image_seed
from library.data.views import still
from library.log import DataError
from library.types import Size, Traits
from tests.library.data.image_corpus import picture
from tests.library.data.making import dataset, item_of, with_subset


def traits(name: str, channels: int, *, sized: bool) -> Traits:
    return Traits(
        name=name,
        latent_channels=channels,
        latent_stride=8,
        bucket_step=16,
        latents_suffix=f"_{name}.npz",
        latents_keys_carry_size=sized,
        text_suffix=None,
        base_model_version="",
    )


FLUX, SD, SDXL, SD3 = (
    traits("flux", 16, sized=True),
    traits("sd", 4, sized=False),
    traits("sdxl", 4, sized=False),
    traits("sd3", 16, sized=True),
)
SIZES = [(96, 64), (64, 96), (64, 64), (128, 64)]


@pytest.fixture
def items(tmp_path):
    """Four images with an alpha channel and conditioning images."""
    for number, size in enumerate(SIZES):
        image = picture(*size)
        image.putalpha(Image.linear_gradient("L").resize(size))
        image.save(tmp_path / f"{number}.png")
        (tmp_path / "masks").mkdir(exist_ok=True)
        picture(*size).transpose(Image.Transpose.ROTATE_180).save(tmp_path / "masks" / f"{number}.png")
        for path in (tmp_path / f"{number}.png", tmp_path / "masks" / f"{number}.png"):
            os.utime(path, ns=(10**18, 10**18 + number))
    return reread(tmp_path)


def reread(folder: Path, resolution: int = 64, **values: object) -> list[Item]:
    settings = dataset(resolution)
    return [
        item_of(path, settings, conditioning=folder / "masks" / path.name, **values)
        for path in sorted(folder.glob("*.png"))
    ]


def every(items: Sequence[Item], **values: object) -> list[Item]:
    return [with_subset(item, **values) for item in items]


def files(items: Sequence[Item], of: Traits = FLUX, identity: str = "vae 1", **values: object) -> LatentsFiles:
    return LatentsFiles(items, of, identity, "float32", **values)


def encode(pixels: torch.Tensor, seed: int, channels: int) -> Drawn:
    small = torch.nn.functional.avg_pool2d(pixels[None], 8)[0]
    mean = small.repeat(6, 1, 1)[:channels]
    deviation = 0.1 + small.abs().repeat(6, 1, 1)[:channels]
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(seed % 2**63))
    return Drawn(mean + deviation * noise, mean, deviation)


def fill(store: LatentsStore, channels: int = 16) -> Counter[str]:
    """Encodes what is missing; why."""
    reasons: Counter[str] = Counter()
    for entry in store.entries:
        problem = store.problem(entry)
        if problem is None:
            continue
        reasons[problem] += 1
        found = load_picture(entry.item, still(entry.item))
        pixels = to_tensor(found.pixels)
        store.save(
            entry,
            Encoded(
                encode(pixels, image_seed(entry.item), channels),
                encode(pixels.flip(-1), image_seed(entry.item, True), channels) if entry.mirrored else None,
                None if found.mask is None else torch.from_numpy(found.mask),
            ),
        )
    return reasons


def assert_equal(store: LatentsStore, other: LatentsStore, count: int = 4, tolerance: float = 0.0) -> None:
    for index in range(count):
        one, two = store.load(index, False, index), other.load(index, False, index)
        assert torch.allclose(one.latents, two.latents, atol=tolerance, rtol=tolerance)
        assert (one.mask is None) == (two.mask is None)
        assert one.mask is None or torch.equal(one.mask, two.mask)


def in_memory(items: Sequence[Item], **values: object) -> LatentsMemory:
    store = LatentsMemory(items, **values)
    fill(store)
    return store


# masks


@pytest.mark.parametrize("source", ["alpha", "conditioning"])
@pytest.mark.parametrize("compact", [False, True])
def test_masks_lie_beside_the_latents_and_are_mirrored(items, source, compact):
    items = every(items, mask=source, flip_aug=True)
    store = files(items, compact=compact)
    assert fill(store) == {"not cached yet": 4}
    assert not fill(files(items, compact=compact))
    memory = in_memory(items)
    for index, item in enumerate(items):
        wanted = torch.from_numpy(load_picture(item, still(item)).mask)
        for kept in (store, memory):
            assert torch.allclose(kept.load(index, False, 0).mask, wanted, atol=1e-6)
            assert torch.allclose(kept.load(index, True, 0).mask, wanted.flip(-1), atol=1e-6)
    assert_equal(store, memory, tolerance=0.02 if compact else 0)
    if not compact:
        with np.load(store.entries[0].paths[0]) as archive:
            mask = archive["alpha_mask_6x10"]
        assert (mask.dtype, mask.shape) == (np.float32, (48, 80))


def test_mask_edited(items, tmp_path):
    items = every(items, mask="conditioning")
    fill(files(items))
    Image.new("RGB", SIZES[1], "red").save(tmp_path / "masks" / "1.png")
    items = every(reread(tmp_path), mask="conditioning")
    store = files(items)
    assert fill(store) == {"mask changed": 1}
    assert store.load(1, False, 0).mask.min() == 1
    assert_equal(files(items), in_memory(items))
    os.utime(tmp_path / "masks" / "2.png", ns=(5, 5))
    assert not fill(files(items))
    (tmp_path / "masks" / "2.png").unlink()
    assert files(items).problem(files(items).entries[2]) == "mask changed"


def test_mask_wanted_unwanted_and_from_elsewhere(items):
    plain, alpha, pair = (every(items, mask=source) for source in ("", "alpha", "conditioning"))
    fill(files(plain))
    assert fill(files(alpha)) == {"no mask": 4}
    assert fill(files(pair)) == {"other mask": 4}
    store = files(plain)
    assert not fill(store)
    assert store.load(0, False, 0).mask is None  # one is left in the file
    assert fill(files(alpha)) == {"other mask": 4}


def test_background(items):
    fill(files(items))
    white = every(items, background=(255, 255, 255))
    assert fill(files(white)) == {"other resizing or crop": 4}
    assert_equal(files(white), in_memory(white))
    assert not fill(files(white))
    assert fill(files(every(items, background=(0, 0, 0)))) == {"other resizing or crop": 4}
    fill(files(items))
    opaque = [replace(item, transparent=False) for item in white]
    assert not fill(files(opaque))


def test_one_image_with_two_masks(items):
    both = [*every(items, mask="alpha"), *every(items, mask="conditioning"), *every(items, mask="alpha")]
    store = files(both)
    assert len(store.entries) == 8
    fill(store)
    assert not fill(files(both))
    assert_equal(files(both), in_memory(both), 12)


# what is kept


def test_distributions_are_drawn_from_anew(items):
    items = every(items, flip_aug=True)
    fill(files(items))
    store = files(items, posterior=True)
    assert fill(store) == {"no mean and variance": 4}
    assert not fill(files(items))  # the sample is still there
    assert_equal(files(items), in_memory(items))
    memory = in_memory(items, posterior=True)
    assert_equal(store, memory, tolerance=1e-5)
    for mirrored in (False, True):
        pixels = to_tensor(load_picture(items[0], still(items[0])).pixels)
        wanted = encode(pixels.flip(-1) if mirrored else pixels, 0, 16)
        for kept, count in ((memory, 1000), (store, 50)):
            seen = torch.stack([kept.load(0, mirrored, seed).latents for seed in range(count)])
            error = (seen.mean(0) - wanted.mean) / wanted.deviation * math.sqrt(count)
            assert error.abs().max() < 5
            assert ((seen.std(0) / wanted.deviation) ** 2 - 1).mul(math.sqrt(count / 2)).abs().max() < 6
    assert torch.equal(store.load(1, False, 3).latents, store.load(1, False, 3).latents)
    assert not torch.equal(store.load(1, False, 3).latents, store.load(1, False, 4).latents)


def test_a_distribution_without_width(items):
    store = files(items[:1], posterior=True)
    mean = torch.randn(16, 6, 10)
    store.save(store.entries[0], Encoded(Drawn(mean, mean, torch.zeros_like(mean))))
    assert torch.equal(store.load(0, False, 1).latents, mean)


@pytest.mark.parametrize("posterior", [False, True])
def test_compact_files(items, posterior):
    items = every(items, mask="alpha", flip_aug=True)
    full, small = files(items, posterior=posterior), files(items, compact=True, posterior=posterior)
    fill(full)
    before = sum(path.stat().st_size for path in Path(items[0].path).parent.glob("*.npz"))
    assert not fill(small)  # more exact than needed
    for path in Path(items[0].path).parent.glob("*.npz"):
        path.unlink()
    fill(small)
    after = sum(path.stat().st_size for path in Path(items[0].path).parent.glob("*.npz"))
    assert after < 0.6 * before
    assert_equal(small, in_memory(items, posterior=posterior), tolerance=0.02)
    with np.load(small.entries[0].paths[0]) as archive:
        assert "latents_6x10" not in archive.files  # nobody must take bits for numbers
    assert fill(files(items, posterior=posterior)) == {"stored compactly": 4}
    assert_equal(files(items, posterior=posterior), in_memory(items, posterior=posterior), tolerance=1e-5)


def test_room_on_the_disk_is_known_in_advance(items):
    for values in ({}, {"mask": "alpha"}, {"flip_aug": True}):
        for how in ({}, {"posterior": True}):
            store = files(every(items, **values), names=CacheNames(Path(items[0].path).parent / "c"), **how)
            needed = sum(store.bytes_needed(entry) for entry in store.entries)
            fill(store)
            written = sum(entry.paths[0].stat().st_size for entry in store.entries)
            assert 0.8 * needed < written < 1.2 * needed
            shutil.rmtree(Path(items[0].path).parent / "c")


def test_another_folder(items, tmp_path):
    elsewhere = tmp_path / "caches" / "deep"
    store = files(items, names=CacheNames(elsewhere))
    fill(store)
    assert len(list(elsewhere.rglob("*_flux.npz"))) == 4
    assert not list(tmp_path.glob("*.npz"))
    assert not fill(files(items, names=CacheNames(elsewhere)))
    assert fill(files(items)) == {"not cached yet": 4}
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(Exception, match="can't make the folder"):
        fill(files(items, names=CacheNames(tmp_path / "file")))


# images that are gone


def gone(items: Sequence[Item]) -> list[Item]:
    """As they are found when the images were removed."""
    return [
        replace(item, path=str(Path(item.path).with_suffix("")), gone=True, transparent=False, file_bytes=0, mtime_ns=0)
        for item in items
    ]


@pytest.mark.parametrize("values", [{}, {"mask": "alpha"}, {"mask": "conditioning"}, {"background": (1, 2, 3)}])
def test_images_may_go_once_they_are_cached(items, tmp_path, values):
    items = every(items, **values)
    memory = in_memory(items)
    fill(files(items))
    for path in tmp_path.rglob("*.png"):
        path.unlink()
    left = gone(items)
    store = files(left)
    assert not fill(store)
    assert_equal(store, memory)
    other = files(left, identity="vae 2")
    assert other.problem(other.entries[0]) == "other encoder"
    with pytest.raises(DataError, match="isn't there any more"):
        fill(other)


def test_images_that_are_gone_keep_their_background(items):
    white = every(items, background=(255, 255, 255))
    fill(files(items))
    assert all(files(gone(white)).problem(entry) == "other resizing or crop" for entry in files(gone(white)).entries)
    fill(files(white))
    assert all(files(gone(items)).problem(entry) == "other resizing or crop" for entry in files(gone(items)).entries)


def test_orientation_of_an_image_that_is_gone_is_not_known(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(64, 96).save(tmp_path / "a.jpg", exif=exif)
    item = item_of(tmp_path / "a.jpg", dataset())
    assert (item.original, item.orientation) == (Size(96, 64), 6)
    fill(files([item]))
    assert not fill(files([replace(gone([item])[0], orientation=1)]))


# what has changed, and what is damaged


def test_images_and_encoders_that_changed(items, tmp_path):
    assert fill(files(items)) == {"not cached yet": 4}
    assert not fill(files(items))
    Image.new("RGB", SIZES[1], (1, 2, 3)).save(tmp_path / "1.png")
    items = reread(tmp_path)
    assert fill(files(items)) == {"image changed": 1}
    assert_equal(files(items), in_memory(items))
    assert fill(files(items, identity="vae 2")) == {"other encoder": 4}
    assert fill(files(every(items, resize_interpolation="box"), identity="vae 2")) == {"other resizing or crop": 4}
    larger = reread(tmp_path, 128)
    assert fill(files(larger)) == {"not cached yet": 4}
    assert not fill(files(every(items, resize_interpolation="box"), identity="vae 2"))
    with pytest.raises(DataError, match=r"0_0096x0064_flux\.npz.*start again"):
        files(items).load(0, False, 0)


def test_mirrored_images_are_added(items):
    fill(files(items))
    mirrored = every(items, flip_aug=True)
    assert fill(files(mirrored)) == {"no mirrored latents": 4}
    store, memory = files(mirrored), in_memory(mirrored)
    for index in range(4):
        assert torch.equal(store.load(index, True, 0).latents, memory.load(index, True, 0).latents)
        assert not torch.equal(store.load(index, True, 0).latents, store.load(index, False, 0).latents)


@pytest.mark.parametrize("kind", ["cut", "flip", "zero", "empty", "text", "key"])
def test_damaged_files_are_encoded_again_with_one_warning(items, tmp_path, kind, caplog):
    fill(files(items))
    for path in sorted(tmp_path.glob("*_flux.npz"))[1:]:
        content = bytearray(path.read_bytes())
        if kind == "flip":
            content[200] ^= 1
        if kind == "key":
            with np.load(path) as archive:
                arrays = dict(archive)
            np.savez(path, **{name: np.array("{") if name.startswith("cache_key") else arrays[name] for name in arrays})
            continue
        damaged = {"cut": content[: len(content) // 2], "flip": content, "zero": bytes(len(content))}
        path.write_bytes({**damaged, "empty": b"", "text": b"no archive"}[kind])
    store = files(items)
    with pytest.raises(DataError, match="damaged"):
        files(items).load(2, False, 0)
    caplog.clear()
    assert fill(store) == {"damaged file": 3}
    assert len(caplog.records) == 1
    assert "damaged cache files are encoded anew" in caplog.text
    assert not fill(files(items))
    assert_equal(files(items), in_memory(items))


# files of other programs

NEWER = 2 * 10**18


def foreign(item: Item, of: Traits, *, suffix: str | None = None, name: str = "", **changes: object) -> Path:
    """Writes a file in the documented layout."""
    bucket = item.assignment.bucket
    shape = (of.latent_channels, bucket.height // 8, bucket.width // 8)
    rng = np.random.default_rng(1)
    arrays = {
        "latents": rng.standard_normal(shape).astype(np.float32),
        "original_size": np.array(item.original),
        "crop_ltrb": np.array(recorded_crop(item)),
        "latents_flipped": rng.standard_normal(shape).astype(np.float32),
        "alpha_mask": rng.random((bucket.height, bucket.width)).astype(np.float32),
        **changes,
    }
    if suffix is None:
        suffix = f"_{shape[1]}x{shape[2]}" if of.latents_keys_carry_size else ""
    size = f"{item.original.width:04d}x{item.original.height:04d}"
    path = Path(name or f"{item.stem}_{size}{of.latents_suffix}")
    np.savez(path, **{key + suffix: array for key, array in arrays.items() if array is not None})
    os.utime(path, ns=(NEWER, NEWER))
    return path


@pytest.mark.parametrize("of", [FLUX, SD, SDXL, SD3], ids=lambda of: of.name)
@pytest.mark.parametrize("values", [{}, {"mask": "alpha"}, {"flip_aug": True}], ids=str)
def test_files_of_other_programs_are_read(items, of, values, caplog):
    items = every(items, **values)
    lacking = {} if "mask" in values else {"alpha_mask": None}
    lacking |= {} if "flip_aug" in values else {"latents_flipped": None}
    for item in items:
        foreign(item, of, **lacking)
    store = files(items, of)
    assert not fill(store, of.latent_channels)
    for index, entry in enumerate(store.entries):
        with np.load(entry.paths[0]) as archive:
            arrays = {name.partition("_6x")[0].partition("_8x")[0]: archive[name] for name in archive.files}
        found = store.load(index, False, 0)
        straight = next(value for name, value in arrays.items() if "latents" in name and "flip" not in name)
        assert np.array_equal(found.latents.numpy(), straight)
        assert (found.mask is not None) == ("mask" in values)
        if "flip_aug" in values:
            assert not torch.equal(store.load(index, True, 0).latents, found.latents)
    assert caplog.text.count("of another program are used") == 1


def test_older_files_of_sd3_have_no_sizes_in_their_names(items):
    for item in items:
        foreign(item, SD3, suffix="", alpha_mask=None)
    assert not fill(files(items, SD3))


WRONG = {
    "other image size": ({"original_size": np.array([95, 64])}, {}),
    "no image size": ({"original_size": None}, {}),
    "other crop": ({"crop_ltrb": np.array([8.0, 0, 88, 48])}, {}),
    "other bucket": ({"latents": np.zeros((4, 6, 9), np.float32)}, {}),
    "no numbers": ({"latents": np.full((4, 6, 10), np.nan, np.float32)}, {}),
    "left mask": ({"alpha_mask": np.ones((48, 80), np.float32)}, {}),
    "no mask": ({}, {"mask": "alpha"}),
    "mask of another size": ({"alpha_mask": np.ones((40, 80), np.float32)}, {"mask": "alpha"}),
    "masks of pairs": ({}, {"mask": "conditioning"}),
    "not mirrored": ({}, {"flip_aug": True}),
    "interpolation": ({}, {"resize_interpolation": "box"}),
    "background": ({}, {"background": (0, 0, 0)}),
}


@pytest.mark.parametrize("case", WRONG)
def test_files_of_other_programs_that_may_be_wrong(items, case):
    changes, values = WRONG[case]
    item = with_subset(items[0], **values)
    foreign(item, SD, **{"alpha_mask": None, "latents_flipped": None, **changes})
    store = files([item], SD)
    assert fill(store, 4) == {"made by another program": 1}
    assert not fill(files([item], SD), 4)


def test_files_of_other_programs_older_than_the_image(items, tmp_path):
    path = foreign(items[0], SD, alpha_mask=None)
    for time in (items[0].mtime_ns - 1, items[0].mtime_ns):
        os.utime(path, ns=(time, time))
        store = files(items[:1], SD)
        assert store.problem(store.entries[0]) == "made by another program"
        with pytest.raises(DataError, match=r"0_0096x0064_sd\.npz"):
            store.load(0, False, 0)
    left = gone(items[:1])
    assert not fill(files(left, SD), 4)
    turned = replace(items[0], orientation=3, mtime_ns=0)
    assert files([turned], SD).problem(files([turned], SD).entries[0]) == "made by another program"


def test_other_programs_know_nothing_of_distributions(items):
    foreign(items[0], FLUX, alpha_mask=None)
    assert fill(files(items[:1], posterior=True)) == {"made by another program": 1}


def test_other_resolutions_of_other_programs_stay(items):
    path = foreign(items[0], FLUX, suffix="_99x99", alpha_mask=None)
    fill(files(items[:1]))
    with np.load(path) as archive:
        assert {"latents_99x99", "original_size_99x99", "latents_6x10"} <= set(archive.files)


def test_everything_is_trusted_on_demand(items):
    for item in items:
        foreign(item, SD, original_size=np.array([1, 2]), name=f"{item.stem}.npz")  # as old programs named them
    store = files(items, SD, identity="vae 9", skip_check=True)
    assert not fill(store, 4)
    assert store.load(0, True, 0).latents.shape == (4, 6, 10)
    foreign(items[1], SD, latents=np.zeros((4, 2, 2), np.float32), name=f"{items[1].stem}.npz")
    with pytest.raises(DataError, match="leave --skip_cache_check out"):
        store.load(1, False, 0)


def test_recorded_crops_are_those_of_the_reference(items):
    for image, bucket, crop in (
        ((1920, 1080), (1344, 768), (0, 6, 1344, 762)),
        ((1080, 1920), (768, 1344), (6, 0, 762, 1344)),
        ((3000, 2000), (1216, 832), (0, 10, 1216, 820.67)),
        ((2500, 2600), (1024, 1024), (19, 0, 1003.62, 1024)),
        ((64, 4000), (256, 2048), (111, 0, 143.77, 2048)),
    ):
        item = replace(items[0], original=Size(*image))
        item = replace(item, assignment=item.assignment._replace(bucket=Size(*bucket)))
        assert np.allclose(recorded_crop(item), crop, atol=0.005)


def test_our_files_are_as_other_programs_know_them(items):
    store = files(every(items, flip_aug=True, mask="alpha"))
    fill(store)
    with np.load(store.entries[3].paths[0], allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    key = json.loads(str(arrays.pop("cache_key_6x10")))
    assert (key["bucket"], key["resized"], key["crop"], key["mask"]) == (
        [80, 48],
        [96, 48],
        [8, 0],
        {"source": "alpha"},
    )
    assert {name: (array.dtype.str[1:], array.shape) for name, array in arrays.items()} == {
        "latents_6x10": ("f4", (16, 6, 10)),
        "latents_flipped_6x10": ("f4", (16, 6, 10)),
        "original_size_6x10": ("i8", (2,)),
        "crop_ltrb_6x10": ("f8", (4,)),
        "alpha_mask_6x10": ("f4", (48, 80)),
    }
    assert arrays["crop_ltrb_6x10"].tolist() == [8, 0, 88, 48]


def test_names_that_nearly_agree(tmp_path):
    for name in ("a.png", "a.jpg", "a.b.png", "a1.png"):
        picture(64, 64).rotate(len(name) * 7).save(tmp_path / name)
    names = sorted(tmp_path.glob("*.*g"))
    items = [replace(item_of(path, dataset()), shares_stem=path.name in ("a.png", "a.jpg")) for path in names]
    store = files(items)
    assert len({entry.paths[0] for entry in store.entries}) == len(names)
    fill(store)
    assert not fill(files(items))
    assert_equal(files(items), in_memory(items), len(names))
