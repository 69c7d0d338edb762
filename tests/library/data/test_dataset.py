"""Batches: what is in them, the same with one process and two, with and without caches, and no pause between epochs."""

from __future__ import annotations

import math
import pickle
import time
from collections import Counter
from itertools import islice

import pytest
import torch

from library.data import reports
from library.data.loading import Clock, PixelDataset, samples_of
from library.log import DataError
from library.types import Size
from tests.caches import fill_latents, fill_text


def toml(folder, batch_size: int = 2, more: str = "", resolution: int = 64, dataset: str = "") -> str:
    return (
        f"[[datasets]]\nresolution = {resolution}\nenable_bucket = true\nmin_bucket_reso = 32\nbucket_reso_steps = 16\n"
        f"batch_size = {batch_size}\n{dataset}[[datasets.subsets]]\nimage_dir = '{folder.as_posix()}'\n"
        f"class_tokens = 'cat'\n{more}"
    )


@pytest.fixture
def folder(make_images, tmp_path):
    sizes = {f"{number}.png": (96, 64) if number % 3 else (64, 64) for number in range(9)}
    return make_images(tmp_path / "images", sizes)


@pytest.mark.parametrize(
    ("images", "repeats", "batch", "world", "accumulation", "batches", "steps"),
    [
        (10, 1, 1, 1, 1, 10, 10),
        (10, 3, 4, 1, 1, 8, 8),
        (10, 3, 4, 1, 3, 8, 3),
        (10, 3, 4, 2, 1, 4, 4),
        (10, 3, 4, 2, 3, 4, 2),
        (44, 1, 1, 1, 4, 44, 11),
        (45, 1, 1, 1, 4, 45, 12),
        (3, 1, 2, 4, 1, 1, 1),
    ],
)
def test_counts(training_data, make_images, tmp_path, images, repeats, batch, world, accumulation, batches, steps):
    make_images(tmp_path / "a", {f"{number}.png": (64, 64) for number in range(images)})
    data = training_data(toml(tmp_path / "a", batch, f"num_repeats = {repeats}\n"))
    assert (data.images, data.repeated) == (images, images * repeats)
    assert data.batches_in_epoch(world) == batches
    assert data.steps_in_epoch(world, accumulation) == steps
    epoch = data.epoch_batches(1, world, accumulation)
    assert len(epoch) == batches
    assert sum(group.shares[0].completes_step for group in epoch) == steps
    got = list(data.loader(1, 0, world - 1, world, accumulation))
    assert len(got) == batches
    assert sum(one.completes_step for one in got) == steps


def test_numbers_for_the_metadata(training_data, folder):
    data = training_data(toml(folder, more="num_repeats = 2\n"))
    assert data.bucket_counts(0) == {Size(64, 64): 6, Size(80, 48): 12}
    assert data.mean_aspect_error(0) == pytest.approx((80 / 48 - 1.5) * 6 / 9)
    assert data.mean_aspect_error(1) == 0


def test_content_of_a_batch_without_caches(training_data, folder):
    data = training_data(toml(folder, more="custom_attributes = {a = 1}\n", dataset="network_multiplier = 0.5\n"))
    tokenize = lambda captions: {"ids": torch.tensor([[len(caption)] for caption in captions])}  # noqa: E731
    batches = list(data.loader(1, tokenize=tokenize))
    assert Counter(name for batch in batches for name in batch.names) == Counter(item.path for item in data.items)
    draws = [draw for batch in batches for draw in batch.draws]
    assert len(set(draws)) == 9
    for number, batch in enumerate(batches):
        count = len(batch.names)
        assert batch.latents is None
        assert batch.cond is None
        assert batch.pixels.shape == (count, 3, batch.size.height, batch.size.width)
        assert batch.pixels.dtype == torch.float32
        assert -1 <= batch.pixels.min() < batch.pixels.max() <= 1
        assert batch.captions == ["cat"] * count
        assert batch.tokens["ids"].shape == (count, 1)
        assert batch.loss_weights.tolist() == pytest.approx([1 / count] * count)
        assert (batch.multiplier, batch.attributes) == (0.5, [{"a": 1}] * count)
        assert (batch.epoch, batch.index, batch.completes_step) == (1, number, True)
        assert all(size in ((96, 64), (64, 64)) for size in batch.original_sizes)
        assert all(crop in ((0, 2), (0, 0)) for crop in batch.crops)


def test_cached_batches_equal_uncached_ones(training_data, folder, vae, encoder):
    plain = training_data(toml(folder))
    wanted = list(plain.loader(2))
    for to_disk in (True, False):
        data = training_data(toml(folder))
        fill_latents(data, vae, "v", to_disk=to_disk)
        fill_text(data, encoder, "t", to_disk=to_disk)
        for got, batch in zip(data.loader(2), wanted, strict=True):
            assert got.names == batch.names
            assert got.draws == batch.draws
            assert got.pixels is None
            latents = vae(batch.pixels).mean
            assert torch.allclose(got.latents, latents, atol=0.011)
            assert got.cond["pooled"].shape == (len(batch.names), 4)
            assert got.cond["flag"].shape == (len(batch.names),)


def test_two_processes_see_what_one_sees(training_data, folder):
    one = training_data(toml(folder, 2, "flip_aug = true\n"))
    two = training_data(toml(folder, 1, "flip_aug = true\n"))
    for epoch in (1, 2):
        seen: dict[int, tuple[str, torch.Tensor]] = {}
        for batch in one.loader(epoch):
            for row, draw in enumerate(batch.draws):
                seen[draw] = (batch.names[row], batch.pixels[row])
        ranks = [list(two.loader(epoch, rank=rank, world=2)) for rank in range(2)]
        assert [len(batches) for batches in ranks] == [one.batches_in_epoch()] * 2
        shown = {
            batch.draws[row]: (batch.names[row], batch.pixels[row])
            for batches in ranks
            for batch in batches
            for row in range(len(batch.names))
            if batch.loss_weights[row]
        }
        assert shown.keys() == seen.keys()
        for draw, (name, pixels) in seen.items():
            assert shown[draw][0] == name
            assert shown[draw][1].equal(pixels)


def test_one_bucket_two_processes_equal_one_with_double_batch(training_data, make_images, tmp_path):
    make_images(tmp_path / "a", {f"{number}.png": (64, 64) for number in range(7)})
    one = training_data(toml(tmp_path / "a", 4, "flip_aug = true\n"))
    two = training_data(toml(tmp_path / "a", 2, "flip_aug = true\n"))
    for epoch in (1, 2):
        ranks = [two.loader(epoch, rank=rank, world=2) for rank in range(2)]
        for whole, *parts in zip(one.loader(epoch), *ranks, strict=True):
            parts = [part for part in parts if part.loss_weights.sum() > 0]
            assert [draw for part in parts for draw in part.draws] == whole.draws
            assert torch.equal(torch.cat([part.pixels for part in parts]), whole.pixels)
            weights = torch.cat([part.loss_weights for part in parts]) / 2
            assert torch.allclose(weights, whole.loss_weights)


def test_start_in_the_middle(training_data, folder):
    data = training_data(toml(folder, more="flip_aug = true\n"))
    everything, rest = (
        list(data.loader(3)),
        list(training_data(toml(folder, more="flip_aug = true\n")).loader(3, start=2)),
    )
    assert len(rest) == len(everything) - 2
    for a, b in zip(everything[2:], rest, strict=True):
        assert (a.index, a.names, a.draws) == (b.index, b.names, b.draws)
        assert torch.equal(a.pixels, b.pixels)
    assert list(data.loader(3, start=99)) == []


def test_about_half_is_mirrored_and_the_crop_tells(training_data, make_images, tmp_path, vae):
    make_images(tmp_path / "a", {"a.png": (101, 64)})
    data = training_data(toml(tmp_path / "a", 1, "flip_aug = true\nnum_repeats = 400\n"))
    fill_latents(data, vae, "v", to_disk=False)
    crops = Counter(batch.crops[0] for batch in data.loader(1))
    given = data.items[0].assignment
    assert len(crops) == (1 if 2 * given.left == given.resized.width - given.bucket.width else 2)
    mirrored = sum(
        sample.view.mirrored
        for group in data.epoch_batches(1)
        for share in group.shares
        for sample in samples_of(data, share, Clock(0, 1))
    )
    assert abs(mirrored - 200) < 4 * math.sqrt(100)


def test_several_datasets_are_mixed(training_data, make_images, tmp_path):
    make_images(tmp_path / "a", {f"{number}.png": (64, 64) for number in range(20)})
    text = toml(tmp_path / "a", 2) + toml(tmp_path / "a", 4, resolution=128, dataset="network_multiplier = 2\n")
    data = training_data(text)
    assert data.batch_sizes == (2, 4)
    batches = list(data.loader(1))
    assert Counter((batch.size, len(batch.names), batch.multiplier) for batch in batches) == {
        ((64, 64), 2, 1.0): 10,
        ((128, 128), 4, 2.0): 5,
    }
    assert [batch.size.width for batch in batches] != sorted(batch.size.width for batch in batches)


@pytest.mark.parametrize("persistent", [True, False])
def test_worker_processes_give_the_same(training_data, folder, persistent):
    data, plain = (
        training_data(toml(folder, more="flip_aug = true\n")),
        training_data(toml(folder, more="flip_aug = true\n")),
    )
    for epoch in (1, 2):
        batches = data.loader(epoch, workers=1, persistent=persistent)
        for a, b in zip(batches, plain.loader(epoch), strict=True):
            assert (a.names, a.draws) == (b.names, b.draws)
            assert torch.equal(a.pixels, b.pixels)


def test_damage_in_a_worker_process_is_named(training_data, folder):
    data = training_data(toml(folder))
    (folder / "4.png").write_bytes(b"gone")
    with pytest.raises(DataError, match=r"4\.png") as caught:
        list(data.loader(1, workers=1, persistent=False))
    assert "Traceback" not in str(caught.value)


def test_what_goes_to_worker_processes_is_small(training_data, folder):
    data = training_data(toml(folder))
    dataset = pickle.loads(pickle.dumps(PixelDataset(8, False)))
    share = data.epoch_batches(1)[0].shares[0]
    jobs = pickle.dumps(samples_of(data, share, Clock(0, 1)))
    assert len(jobs) < 3000
    assert dataset[pickle.loads(jobs)].pixels.shape[0] == len(share.entries)


@pytest.mark.parametrize("to_disk", [True, False])
def test_no_pause_between_epochs(training_data, make_images, tmp_path, vae, to_disk):
    make_images(tmp_path / "a", {"a.png": (64, 64), "b.png": (64, 64)})
    data = training_data(toml(tmp_path / "a", 1, "num_repeats = 500\n"))
    fill_latents(data, vae, "v", to_disk=to_disk)
    gaps = []
    for epoch in (1, 2, 3):
        started = time.perf_counter()
        batches = data.loader(epoch)
        next(batches)
        gaps.append(time.perf_counter() - started)
        list(islice(batches, 20))
        batches.close()
    assert min(gaps[1:]) < 0.2


def test_captions_that_are_cut_are_reported(training_data, make_images, tmp_path):
    sizes = {f"{number}.png": (64, 64) for number in range(10)}
    texts = {f"{number}.txt": "word " * (9 if number < 3 else 2) + str(number) for number in range(10)}
    make_images(tmp_path / "a", sizes, texts)
    data = training_data(toml(tmp_path / "a", more="caption_extension = '.txt'\n"))

    def count(captions):
        return {"clip": [len(caption.split()) for caption in captions], "t5": [1] * len(captions)}

    (line,) = reports.token_report(data.items, count, {"clip": 8, "t5": 8})
    assert line.startswith("clip: 3 of 10 captions are longer than 8 tokens")
    assert all(f"{number}.png" in line for number in range(3))
    assert reports.token_report(data.items, count, {"clip": 10, "t5": 8}) == []
