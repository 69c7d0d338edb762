"""Images that are held out: which, how they are shown, and that nothing else changes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from library.data import cache
from library.data.holdout import hold_out, validation_shares
from library.data.items import Item
from library.data.scan_report import Scan, SubsetReport
from library.data.settings import DatasetConfig, DatasetSettings, SubsetSettings
from library.types import Size
from tests.library.data.making import whole

RANDOM = """
shuffle_caption = true
caption_dropout_rate = 0.5
caption_tag_dropout_rate = 0.5
token_warmup_step = 10
flip_aug = true
enable_wildcard = true
caption_prefix = "photo of"
"""


def scan_of(*datasets: tuple[str, list[str]], share: float = 0.2, seed: int | None = 3, is_reg: bool = False) -> Scan:
    """A scan of files in folders, without any file: folder and names of each dataset."""
    scan = Scan(DatasetConfig(datasets=()))
    for number, (folder, names) in enumerate(datasets):
        subset = SubsetSettings(image_dir=folder, is_reg=is_reg)
        scan.reports.append(SubsetReport(subset, number, images=len(names)))
        made = DatasetSettings(resolution=Size(64, 64), subsets=(subset,), validation_split=share, validation_seed=seed)
        scan.config = replace(scan.config, datasets=(*scan.config.datasets, made))
        size = Size(64, 64)
        scan.items += [Item(f"{folder}/{name}", size, "a", 1, whole(size), number, subset) for name in names]
    return scan


def held_out(*datasets: tuple[str, list[str]], share: float = 0.2, seed: int | None = 3) -> set[str]:
    """The names of what is held out."""
    scan = scan_of(*datasets, share=share, seed=seed)
    before = {item.path for item in scan.items}
    hold_out(scan)
    chosen = {item.path for item in scan.held_out}
    assert {item.path for item in scan.items} | chosen == before
    assert not {item.path for item in scan.items} & chosen
    return {Path(path).name for path in chosen}


def names(count: int) -> list[str]:
    return [f"i{number}.png" for number in range(count)]


@settings(max_examples=30, deadline=None)
@given(st.sets(st.text("abcdefgh", min_size=1, max_size=6), min_size=30, max_size=60), st.integers(0, 9))
def test_a_further_image_moves_no_other(stems: set[str], seed: int) -> None:
    files = [f"{stem}.png" for stem in sorted(stems)]
    before = held_out(("data", files[:-1]), share=0.4, seed=seed)
    after = held_out(("data", files), share=0.4, seed=seed)
    assert after - {files[-1]} == before


def test_about_the_wanted_share_and_another_one_for_each_seed() -> None:
    chosen = {seed: held_out(("data", names(2000)), share=0.1, seed=seed) for seed in range(5)}
    assert all(150 < len(found) < 250 for found in chosen.values())
    assert len(chosen[0] & chosen[1]) < 60


def test_a_larger_share_holds_out_the_same_and_more() -> None:
    assert held_out(("data", names(200)), share=0.1) < held_out(("data", names(200)), share=0.3)


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("share", [0.001, 0.5, 0.999])
def test_of_several_images_one_at_least_and_not_all(count: int, share: float) -> None:
    for seed in range(20):
        assert 0 < len(held_out(("data", names(count)), share=share, seed=seed)) < count


def test_the_ends() -> None:
    assert held_out(("data", names(9)), share=0) == set()
    assert held_out(("data", names(9)), share=1) == set(names(9))
    scan = scan_of(("data", names(1)), share=0.5)
    hold_out(scan)
    assert not scan.held_out
    assert [finding.code for finding in scan.findings] == ["E-VALIDATION"]


def test_place_repeats_and_kind_of_file_decide_nothing(tmp_path: Path) -> None:
    there = held_out((f"{tmp_path}/a/10_cat", names(50)))
    assert held_out((f"{tmp_path}/b/3_cat", names(50))) == there
    assert {Path(name).stem for name in held_out(("10_cat", [f"i{n}.webp" for n in range(50)]))} == {
        Path(name).stem for name in there
    }
    assert held_out(("10_dog", names(50))) != there


def test_an_image_is_held_out_of_all_datasets() -> None:
    scan = scan_of(("x/data", names(60)), ("x/data/sub", names(5)), ("x/data", names(60)), seed=None)
    scan.config = replace(
        scan.config, datasets=(*scan.config.datasets[:2], replace(scan.config.datasets[2], validation_split=0.0))
    )
    hold_out(scan, 5)
    chosen = {number: {i.path for i in scan.held_out if i.dataset == number} for number in range(3)}
    assert chosen[0]
    assert chosen[0] == chosen[2]
    assert [report.held_out for report in scan.reports] == [len(chosen[number]) for number in range(3)]


def test_regularization_images_never() -> None:
    scan = scan_of(("data", names(50)), is_reg=True)
    hold_out(scan)
    assert len(scan.items) == 50
    assert not scan.held_out


def write(make_images, folder: Path, count: int = 6) -> Path:
    sizes = {f"i{number}.png": (64, 48 if number % 2 else 64) for number in range(count)}
    captions = {f"i{number}.txt": f"one {number}, two, {{three|four}}, five\nother line" for number in range(count)}
    return make_images(folder / "3_cat", sizes, captions)


def toml(folder: Path, more: str, split: float = 0.5) -> str:
    return f"""
[[datasets]]
resolution = 64
batch_size = 2
enable_bucket = true
min_bucket_reso = 32
bucket_reso_steps = 16
validation_split = {split}
validation_seed = 1
  [[datasets.subsets]]
  image_dir = '{folder.as_posix()}'
  caption_extension = ".txt"
  num_repeats = 3
  {more}
"""


@pytest.mark.parametrize("cached", [False, True])
def test_held_out_images_are_the_same_each_time(make_images, training_data, tmp_path, cached, vae, encoder) -> None:
    more = RANDOM.replace("token_warmup_step = 10\n", "") if cached else RANDOM
    data = training_data(toml(write(make_images, tmp_path), more))
    data.text_variants = 2
    count = len(data.scan.held_out)
    assert 0 < count < 6
    assert data.images == 6 - count
    assert data.repeated == 3 * (6 - count)
    assert data.validation_line() == f"{count} images held out for validation"
    if cached:
        same = cache.CacheSettings(identity="x", dtype="y", names=cache.CacheNames(tmp_path / "cache"))
        cache.fill_latents(data, vae, cache.check_latents(data, same), visible=False)
        cache.fill_text(data, encoder, cache.check_text(data, same), visible=False)
    first, second = list(data.validation_batches()), list(data.validation_batches())
    assert sum(len(batch.names) for batch in first) == count
    for one, other in zip(first, second, strict=True):
        assert (one.names, one.captions, one.draws, one.crops) == (
            other.names,
            other.captions,
            other.draws,
            other.crops,
        )
        pictures = (one.latents, other.latents) if cached else (one.pixels, other.pixels)
        assert torch.equal(*pictures)
        assert all(caption.startswith("photo of one ") for caption in one.captions)
        assert all(caption.endswith("two, three, five") for caption in one.captions)
        assert one.loss_weights.tolist() == [1.0] * len(one.names)
    trained = {name for batch in data.loader(1) for name in batch.names}
    assert len(trained) == 6 - count
    assert not trained & {name for batch in first for name in batch.names}


def test_processes_share_the_batches(make_images, training_data, tmp_path) -> None:
    data = training_data(toml(write(make_images, tmp_path, 24), ""))
    alone = [batch.names for batch in data.validation_batches()]
    assert len(alone) > 3
    shares = [[batch.names for batch in data.validation_batches(rank, 2)] for rank in range(2)]
    assert sorted(shares[0] + shares[1]) == sorted(alone)
    some = [[batch.names for batch in data.validation_batches(rank, 2, most=3)] for rank in range(2)]
    assert sorted(some[0] + some[1]) == sorted(alone[:3])
    assert all(len({data.all_items[i].assignment.bucket for i in share.entries}) == 1 for share in
               validation_shares(data.all_items, data.batch_sizes))  # fmt: skip


def test_an_image_keeps_its_noise_when_others_come(make_images, training_data, tmp_path) -> None:
    def noise(data) -> dict[str, int]:
        return {
            Path(name).name: draw
            for b in data.validation_batches()
            for name, draw in zip(b.names, b.draws, strict=True)
        }

    before = noise(training_data(toml(write(make_images, tmp_path / "a", 20), "")))
    after = noise(training_data(toml(write(make_images, tmp_path / "b", 30), "")))
    assert before.items() <= after.items()


def test_what_is_trained_on_without_a_split_is_as_ever(make_images, training_data, tmp_path) -> None:
    data = training_data(toml(write(make_images, tmp_path), "", split=0))
    assert data.all_items is data.items
    assert data.validation_line() is None
    assert not list(data.validation_batches())


def test_only_folders_can_be_split(options_of, make_images, tmp_path) -> None:
    from library.data import config

    (tmp_path / "m.json").write_text("{}", "utf-8")
    found = config.load(options_of(in_json=str(tmp_path / "m.json"), validation_split=0.1, resolution="64"))
    assert [finding.code for finding in found.findings] == ["E-VALIDATION"]
    write(make_images, tmp_path)
    found = config.load(options_of(train_data_dir=str(tmp_path), validation_split=0.1, resolution="64"))
    assert [settings.validation_split for settings in found.datasets] == [0.1]
    assert not found.findings
