"""Caches: only what changed is encoded again, nothing stale is ever used, files are as other programs know them."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from library.data import cache
from library.data.dataset import TrainingData
from library.log import DataError, UserError
from library.types import Posterior
from tests.caches import check_latents, fill_latents, fill_text

FOUR = {"a.png": (96, 64), "b.png": (64, 96), "c.png": (64, 64), "d.png": (128, 64)}
CAPTIONS = {f"{name}.txt": f"caption {name}" for name in "abcd"}


@pytest.fixture
def folder(make_images, tmp_path):
    return make_images(tmp_path / "images", FOUR, CAPTIONS)


def toml(folder: Path, resolution: int = 64, more: str = "", name: str = "datasets") -> str:
    return (
        f"[[{name}]]\nresolution = {resolution}\nenable_bucket = true\nmin_bucket_reso = 32\nbucket_reso_steps = 16\n"
        f"batch_size = 2\n[[datasets.subsets]]\nimage_dir = '{folder.as_posix()}'\ncaption_extension = '.txt'\n{more}"
    )


@pytest.fixture
def fill(training_data, vae, encoder):
    """Fills both caches of a configuration as a new run would; gives data and both summaries."""

    def run(text: str, identity: str = "vae 1", text_identity: str = "te 1", **arguments):
        data = training_data(text)
        latents = fill_latents(data, vae, identity, batch_size=2, **arguments)
        texts = fill_text(data, encoder, text_identity, batch_size=3, **arguments)
        return data, latents, texts

    return run


def assert_equals_uncached(data: TrainingData, fill, text: str, **identities) -> None:
    """What the model is fed from the disk is what it would be fed without a disk cache."""
    fresh, _, _ = fill(text, to_disk=False, **identities)
    for index in range(data.images):
        assert torch.equal(data.latents.load(index, False, 0).latents, fresh.latents.load(index, False, 0).latents)
        text = data.items[index].caption
        text = f"x {text}" if data.items[index].subset.caption_prefix else text
        cond, wanted = data.cond.load(index, text), fresh.cond.load(index, text)
        assert cond.keys() == wanted.keys()
        assert all(torch.equal(cond[name].float(), wanted[name].float()) for name in cond)


def test_nothing_changed_nothing_encoded(fill, folder, vae, encoder):
    _, latents, texts = fill(toml(folder))
    assert (latents.total, latents.encoded, texts.encoded) == (4, 4, 4)
    data, latents, texts = fill(toml(folder))
    assert (latents.encoded, latents.reused, texts.encoded, texts.reused) == (0, 4, 0, 4)
    assert (vae.images, len(encoder.captions)) == (4, 4)
    assert str(latents) == "latents: 4 in all, 4 reused, 0 encoded"
    assert_equals_uncached(data, fill, toml(folder))


def test_pixels_replaced_under_the_same_name_and_size(fill, folder):
    fill(toml(folder))
    Image.new("RGB", FOUR["b.png"], (1, 2, 3)).save(folder / "b.png")
    data, latents, texts = fill(toml(folder))
    assert latents.reasons == {"image changed": 1}
    assert texts.encoded == 0
    assert_equals_uncached(data, fill, toml(folder))


def test_touched_but_equal_image_is_not_encoded(fill, folder):
    fill(toml(folder))
    os.utime(folder / "a.png", ns=(1, 1))
    assert fill(toml(folder))[1].encoded == 0


def test_caption_edited(fill, folder):
    fill(toml(folder))
    (folder / "c.txt").write_text("another caption", "utf-8")
    data, latents, texts = fill(toml(folder))
    assert latents.encoded == 0
    assert texts.reasons == {"caption changed": 1}
    assert_equals_uncached(data, fill, toml(folder))


def test_caption_prefix_changes_all(fill, folder):
    fill(toml(folder))
    assert fill(toml(folder, more="caption_prefix = 'a photo of'\n"))[2].reasons == {"caption changed": 4}


def test_resolution_changed_keeps_the_other(fill, folder):
    fill(toml(folder))
    data, latents, texts = fill(toml(folder, 128))
    assert (latents.encoded, texts.encoded) == (4, 0)
    assert_equals_uncached(data, fill, toml(folder, 128))
    assert fill(toml(folder))[1].encoded == 0
    with np.load(folder / "d_0128x0064_flux.npz") as archive:
        assert len([name for name in archive.files if name.startswith("latents_")]) == 2


def test_other_encoders(fill, folder):
    fill(toml(folder))
    data, latents, texts = fill(toml(folder), "vae 2", "te 2")
    assert latents.reasons == texts.reasons == {"other encoder": 4}
    assert_equals_uncached(data, fill, toml(folder), identity="vae 2", text_identity="te 2")


def test_other_precision(fill, folder, training_data):
    fill(toml(folder), dtype="bfloat16")
    check = check_latents(training_data(toml(folder)), "vae 1", dtype="float32")
    assert check.summary.encoded == 4


def test_second_image_with_the_same_stem(fill, folder, make_images):
    fill(toml(folder))
    make_images(folder, {"a.jpg": (96, 64)})
    Image.new("RGB", (96, 64), (200, 30, 90)).save(folder / "a.jpg")
    data, latents, texts = fill(toml(folder))
    assert latents.encoded == 1
    assert latents.total == 5
    assert texts.encoded == 0  # both images have one caption file
    assert (folder / "a.jpg_0096x0064_flux.npz").exists()
    assert_equals_uncached(data, fill, toml(folder))
    assert fill(toml(folder))[1].encoded == 0


def test_flip_is_added_and_kept_apart(fill, folder, vae):
    fill(toml(folder))
    data, latents, _ = fill(toml(folder, more="flip_aug = true\n"))
    assert latents.reasons == {"no mirrored latents": 4}
    assert vae.images == 12
    straight, mirrored = data.latents.load(0, False, 0).latents, data.latents.load(0, True, 0).latents
    assert torch.allclose(straight, mirrored.flip(-1), atol=0.02)
    assert not torch.allclose(straight, mirrored, atol=0.02)
    assert fill(toml(folder))[1].encoded == 0


def test_crop_or_interpolation_changed(fill, folder):
    fill(toml(folder))
    _, latents, _ = fill(toml(folder, more="resize_interpolation = 'box'\n"))
    assert latents.reasons == {"other resizing or crop": 4}


def test_one_image_with_two_captions_and_two_crops(fill, folder):
    """Datasets that would write different content under one name get names of their own."""
    other = toml(folder, more="caption_prefix = 'x'\nresize_interpolation = 'nearest'\n")
    text = toml(folder) + other
    _, latents, texts = fill(text)
    assert (latents.total, texts.total) == (8, 8)
    data, latents, texts = fill(text)
    assert (latents.encoded, texts.encoded) == (0, 0)
    assert_equals_uncached(data, fill, text)


def test_two_datasets_share_what_is_equal(fill, folder, vae):
    _, latents, texts = fill(toml(folder) + toml(folder))
    assert (latents.total, texts.total, vae.images) == (4, 4, 4)


@pytest.mark.parametrize("kind", ["cut", "flip", "zero", "empty", "text"])
def test_damaged_files_are_encoded_again(fill, make_images, tmp_path, kind):
    names = {f"{number}.png": (64, 64) for number in range(8)}
    folder = make_images(tmp_path / "many", names, {f"{number}.txt": f"{number}" for number in range(8)})
    fill(toml(folder))
    for path in [*sorted(folder.glob("*_flux.npz"))[2:5], *sorted(folder.glob("*_te.npz"))[1:4]]:
        content = bytearray(path.read_bytes())
        if kind == "flip":  # in the data of the first array, behind both headers
            content[200] ^= 1
        damaged = {
            "cut": content[: len(content) // 2],
            "flip": content,
            "zero": bytes(len(content)),
            "empty": b"",
            "text": b"no archive",
        }
        path.write_bytes(damaged[kind])
    data, latents, texts = fill(toml(folder))
    assert latents.reasons == {"damaged file": 3}
    assert texts.reasons == {"damaged file": 3}
    assert_equals_uncached(data, fill, toml(folder))


def test_file_that_breaks_during_training_is_named(fill, folder):
    data, _, _ = fill(toml(folder))
    (folder / "a_0096x0064_flux.npz").write_bytes(b"x")
    (folder / "a_flux_te.npz").unlink()
    with pytest.raises(DataError, match=r"a_0096x0064_flux\.npz"):
        data.latents.load(0, False, 0)
    with pytest.raises(DataError, match=r"a_flux_te\.npz"):
        data.cond.load(0, "caption a")


def test_arrays_are_as_other_programs_know_them(fill, folder):
    fill(toml(folder, more="flip_aug = true\n"))
    with np.load(folder / "d_0128x0064_flux.npz", allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    key = json.loads(str(arrays.pop("cache_key_6x10")))  # height first, in latent units
    assert (key["bucket"], key["resized"], key["crop"]) == ([80, 48], [96, 48], [8, 0])
    assert {name: (array.dtype.str[1:], array.shape) for name, array in arrays.items()} == {
        "latents_6x10": ("f4", (16, 6, 10)),
        "latents_flipped_6x10": ("f4", (16, 6, 10)),
        "original_size_6x10": ("i8", (2,)),
        "crop_ltrb_6x10": ("f8", (4,)),
    }
    assert arrays["original_size_6x10"].tolist() == [128, 64]
    assert arrays["crop_ltrb_6x10"].tolist() == [8, 0, 88, 48]
    with np.load(folder / "d_flux_te.npz", allow_pickle=False) as archive:
        shapes = {name: (archive[name].dtype.str[1:], archive[name].shape) for name in archive.files}
    del shapes["cache_key"]
    assert shapes == {"pooled": ("f4", (4,)), "mask": ("i8", (6,)), "flag": ("b1", ())}


def test_files_of_other_programs_are_trusted_only_on_demand(fill, folder):
    fill(toml(folder))
    for path in folder.glob("*.npz"):
        with np.load(path) as archive:
            arrays = {name: archive[name] for name in archive.files if not name.startswith("cache_key")}
        np.savez(path, **arrays)
    data, latents, texts = fill(toml(folder), "vae 9", "te 9", skip_check=True)
    assert (latents.encoded, texts.encoded) == (0, 0)
    assert data.latents.load(0, False, 0).latents.shape == (16, 6, 10)
    assert set(data.cond.load(0, "caption a")) == {"pooled", "mask", "flag"}
    _, latents, texts = fill(toml(folder))
    assert latents.reasons == {"made by another program": 3}  # one has the crop that the others would record
    assert texts.reasons == {"made by another program": 4}


def test_similar_names_are_not_confused(fill, make_images, tmp_path):
    folder = make_images(tmp_path / "a", {"img10.png": (64, 64)}, {"img10.txt": "x"})
    fill(toml(folder))
    make_images(folder, {"img1.png": (64, 64)}, {"img1.txt": "y"})
    _, latents, texts = fill(toml(folder))
    assert (latents.encoded, texts.encoded) == (1, 1)


def test_equal_captions_are_encoded_once(training_data, make_images, tmp_path, encoder):
    names = {f"{number}.png": (64, 64) for number in range(50)}
    folder = make_images(tmp_path / "a", names)
    data = training_data(toml(folder, more="class_tokens = 'cat'\n"))
    fill_text(data, encoder, "te", to_disk=False)
    assert encoder.captions == ["cat"]
    fill_text(data, encoder, "te", to_disk=True)
    assert encoder.captions == ["cat", "cat"]


def test_nan_names_the_image_and_keeps_the_rest(training_data, folder, vae):
    data = training_data(toml(folder))

    def encode(pixels):
        latents = vae(pixels)
        if vae.images == 3:
            latents.mean[0, 0, 0, 0] = float("nan")
        return latents

    with pytest.raises(DataError, match=r"NaN.*\.png"):
        fill_latents(data, encode, "v")
    assert check_latents(data, "v").summary.encoded == 2
    with pytest.raises(DataError, match=r"NaN.*pooled.*\.png"):
        fill_text(data, lambda captions: {"pooled": torch.full((1, 2), float("inf"))}, "t")


def test_crash_keeps_what_is_done(training_data, folder, vae):
    data = training_data(toml(folder))

    def encode(pixels):
        if vae.images == 2:
            raise RuntimeError("power cut")
        return vae(pixels)

    with pytest.raises(RuntimeError):
        fill_latents(data, encode, "v")
    assert check_latents(data, "v").summary.reused == 2
    assert not [path for path in folder.iterdir() if path.suffix not in (".png", ".txt", ".npz")]


def test_all_images_that_break_while_decoding_are_named(training_data, make_images, tmp_path, vae):
    folder = make_images(tmp_path / "a", {f"{number}.png": (64, 64) for number in range(6)})
    data = training_data(toml(folder))
    for name in ("1.png", "4.png"):
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 255
        (folder / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        fill_latents(data, vae, "v", batch_size=4)
    assert len(caught.value.lines()) == 2
    assert "1.png" in str(caught.value)
    assert "4.png" in str(caught.value)
    assert vae.images == 4


def test_work_is_shared_by_file(training_data, folder, vae):
    text = toml(folder) + toml(folder, 128)
    data = training_data(text)
    summaries = [fill_latents(data, vae, "v", rank=rank, world=3) for rank in range(3)]
    assert sum(summary.encoded for summary in summaries) == 8
    assert all(summary.encoded % 2 == 0 for summary in summaries)  # both resolutions of a file
    assert check_latents(data, "v").summary.encoded == 0


def test_two_runs_in_one_folder(training_data, folder, vae):
    both = [training_data(toml(folder)), training_data(toml(folder, 128))]
    for data in both:
        data.items  # noqa: B018
    errors = []

    def run(data):
        try:
            for _ in range(3):
                fill_latents(data, vae, f"v {time.monotonic_ns()}")
        except Exception as error:  # noqa: BLE001
            errors.append(error)

    threads = [threading.Thread(target=run, args=[data]) for data in both]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for data in both:
        assert all(data.latents.load(index, False, 0).latents is not None for index in range(4))


def test_what_is_drawn_for_an_image_depends_on_no_batch(training_data, folder, vae):
    made = []
    for size in (1, 4):
        data = training_data(toml(folder, more="flip_aug = true\n"))
        fill_latents(data, vae, "v", batch_size=size, to_disk=False)
        made.append([data.latents.load(index, mirrored, 0).latents for index in range(4) for mirrored in (False, True)])
    assert all(torch.equal(one, other) for one, other in zip(*made, strict=True))
    assert len({float(latents.std()) for latents in made[0]}) == 8


def test_check_tells_what_a_run_will_need(training_data, folder, vae):
    data = training_data(toml(folder))
    check = check_latents(data, "v")
    assert check.summary.encoded == 4
    before = check.bytes_needed
    cache.fill_latents(data, vae, check, visible=False)
    written = sum(path.stat().st_size for path in folder.glob("*.npz"))
    assert 0.5 * written < before < 2 * written
    assert check_latents(data, "v").bytes_needed == 0


def test_encoder_is_kept_busy(training_data, make_images, tmp_path):
    folder = make_images(tmp_path / "a", {f"{number}.png": (256, 256) for number in range(30)})
    data = training_data(toml(folder))

    def encode(pixels):
        time.sleep(0.02)
        return Posterior(torch.zeros(len(pixels), 16, 8, 8), torch.ones(len(pixels), 16, 8, 8))

    started = time.perf_counter()
    fill_latents(data, encode, "v")
    assert time.perf_counter() - started < 30 * 0.02 * 2.5  # 1.2 on an idle machine
