"""Every kind of dataset through the scripts: trained, resumed exactly, looked at; workers and processes alike."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from library.families.flux import Flux
from library.train import loop
from tests.cells import Cell, MakeCell, assert_same, write_images

AUGMENTED = """
enable_wildcard = true
shuffle_caption = true
keep_tokens = 1
caption_dropout_rate = 0.2
caption_tag_dropout_rate = 0.3
flip_aug = true
random_crop = true
color_aug = true
"""


def write_config(folder: Path, text: str) -> str:
    path = folder / "data.toml"
    head = "[general]\nresolution = 64\nenable_bucket = true\nmin_bucket_reso = 32\nmax_bucket_reso = 128\n"
    path.write_text(f"{head}bucket_reso_steps = 32\ncaption_extension = '.txt'\n{text}", encoding="utf-8")
    return str(path)


def folders_of_captions(root: Path) -> str:
    """DreamBooth folders with everything random, and regularization images that take turns."""
    images = write_images(root / "cats")
    for number in range(5):
        (images / f"i{number}.txt").write_text("cat, {red|blue}, a, b, c\ncat, d, e, f", encoding="utf-8")
    write_images(root / "reg", [(64, 64)] * 9)
    return f"""
[[datasets]]
batch_size = 2
  [[datasets.subsets]]
  image_dir = '{images.as_posix()}'
  {AUGMENTED}
  [[datasets.subsets]]
  image_dir = '{(root / "reg").as_posix()}'
  is_reg = true
  class_tokens = "thing"
"""


def metadata_file(root: Path) -> str:
    """A metadata file with captions and tags."""
    images = write_images(root / "meta")
    entries = {f"i{number}": {"caption": f"a thing {number}", "tags": "a, b, c"} for number in range(5)}
    (root / "meta.json").write_text(json.dumps(entries), encoding="utf-8")
    return f"""
[[datasets]]
batch_size = 2
  [[datasets.subsets]]
  image_dir = '{images.as_posix()}'
  metadata_file = '{(root / "meta.json").as_posix()}'
  shuffle_caption = true
  caption_dropout_rate = 0.3
  flip_aug = true
"""


def masks(root: Path) -> str:
    """Pairs of images and masks: the left half counts."""
    images = write_images(root / "pairs")
    (root / "masks").mkdir()
    for path in images.glob("*.png"):
        with Image.open(path) as image:
            mask = np.zeros((image.height, image.width), np.uint8)
        mask[:, : mask.shape[1] // 2] = 255
        Image.fromarray(mask).save(root / "masks" / path.name)
    return f"""
[[datasets]]
batch_size = 2
  [[datasets.subsets]]
  image_dir = '{images.as_posix()}'
  conditioning_data_dir = '{(root / "masks").as_posix()}'
  flip_aug = true
"""


Kind = tuple[Callable[[Path], str], str, tuple[str, ...]]
KINDS: dict[str, Kind] = {
    "folders, random in everything": (folders_of_captions, "lora, nothing cached", ("--prior_loss_weight", "0.5")),
    "metadata file, cached wordings": (metadata_file, "lora, all cached", ("--text_cache_variants", "3")),
    "masks, cached": (masks, "lora, all cached", ("--masked_loss", "--masked_loss_normalize")),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture
def make(make_cell: MakeCell, tmp_path: Path) -> Callable[[str, str], Cell]:
    """Makes cells for a kind of dataset."""
    written: dict[str, str] = {}

    def make(kind: str, folder: str = "out") -> Cell:
        write, cell, more = KINDS[kind]
        if kind not in written:
            written[kind] = write_config(tmp_path, write(tmp_path))
        made = make_cell(cell, folder)
        given = made.argv.index("--train_data_dir")
        made.argv[given : made.argv.index("--output_dir")] = ["--dataset_config", written[kind]]
        made.argv += more
        return made

    return make


class Seen:
    """Notes the batches that are trained on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.batches: list[Any] = []
        prepare = loop.task_of

        def noting(run: Any, batch: Any) -> loop.Task:
            self.batches.append(batch)
            return prepare(run, batch)

        monkeypatch.setattr(loop, "task_of", noting)

    def take(self) -> list[tuple[Any, ...]]:
        """What was noted since the last time, in a form that can be compared."""
        found, self.batches = self.batches, []
        return [(batch.names, batch.captions, batch.draws, batch.crops, batch.loss_weights.tolist()) for batch in found]


@each_kind
def test_resuming_restores_the_order_and_everything_random(make, kind: str) -> None:
    straight, parts = make(kind, "straight"), make(kind, "parts")
    straight("--max_train_steps", "11")
    parts("--max_train_steps", "4", "--save_state_on_train_end")
    parts("--max_train_steps", "11", "--resume", str(parts.output / "run-state"))
    assert_same(straight.weights(), parts.weights())


@each_kind
def test_workers_change_nothing(make, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Seen(monkeypatch)
    alone, helped = make(kind, "alone"), make(kind, "helped")
    alone("--max_train_steps", "9")
    first = seen.take()
    helped("--max_train_steps", "9", "--max_data_loader_n_workers", "2", "--persistent_data_loader_workers")
    assert seen.take() == first
    assert_same(alone.weights(), helped.weights())


@pytest.mark.slow
@each_kind
def test_two_processes_see_what_one_does(make, kind: str) -> None:
    one, two = make(kind, "one"), make(kind, "two")
    common = ("--optimizer_type", "SGD", "--max_train_steps", "5", "--learning_rate", "1.0", "--network_dropout", "0")
    one(*common)
    config = Path(two.argv[two.argv.index("--dataset_config") + 1])
    config.write_text(config.read_text(encoding="utf-8").replace("batch_size = 2", "batch_size = 1"), encoding="utf-8")
    two.launch(2, *common)
    left, right = one.weights(), two.weights()
    counts = {name: (tensor - right[name]).abs().max().item() for name, tensor in left.items()}
    assert max(counts.values()) < 1e-6, counts


def test_regularization_images_count_half_and_are_all_seen(make, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    seen = Seen(monkeypatch)
    make("folders, random in everything")("--max_train_epochs", "2")
    names: dict[str, float] = {}
    for batch in seen.batches:
        names |= dict(zip(batch.names, batch.loss_weights.tolist(), strict=True))
    assert sum("/reg/" in Path(name).as_posix() for name in names) == 9
    for batch in seen.batches:
        kinds = {
            ("/reg/" in Path(name).as_posix()): weight
            for name, weight in zip(batch.names, batch.loss_weights, strict=True)
        }
        assert len(kinds) < 2 or kinds[True] == kinds[False] / 2
    assert "9 regularization images found, 5 samples of them per epoch; they take turns" in caplog.text


def test_masked_parts_get_no_gradient(make, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[tuple[Tensor, Tensor]] = []
    predict = Flux.predict

    def noting(self: Flux, *arguments: Any, **named: Any) -> Tensor:
        prediction = predict(self, *arguments, **named)
        if prediction.requires_grad:
            prediction.register_hook(lambda gradient: found.append(gradient.clone()))
        return prediction

    monkeypatch.setattr(Flux, "predict", noting)
    seen = Seen(monkeypatch)
    for more in ((), ("--cache_latents_to_disk",)):
        cell = make("masks, cached", f"out{len(more)}")
        cell("--max_train_epochs", "2", *more)
    assert len(found) == len(seen.batches) > 6
    flipped = 0
    for gradient, batch in zip(found, seen.batches, strict=True):
        hidden = (batch.mask == 0).expand_as(gradient)
        assert torch.count_nonzero(gradient[hidden]) == 0
        assert torch.count_nonzero(gradient[~hidden]) > 0.9 * (~hidden).sum()
        flipped += int((batch.mask[:, 0, 0, 0] == 0).sum())
    assert 0 < flipped < sum(len(batch.names) for batch in seen.batches)


def test_images_may_go_once_they_are_cached(make, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    before, after = make("metadata file, cached wordings", "before"), make("metadata file, cached wordings", "after")
    more = ("--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk", "--max_train_steps", "5")
    before(*more)
    begun = make("metadata file, cached wordings", "begun")
    begun(*more[:-1], "2", "--save_state_on_train_end")
    for path in (tmp_path / "meta").glob("*.png"):
        path.unlink()
    after(*more)
    assert_same(before.weights(), after.weights())
    begun(*more, "--resume", str(begun.output / "run-state"))
    assert_same(before.weights(), begun.weights())
    assert "the dataset changed" not in caplog.text


@each_kind
@pytest.mark.parametrize("option", ["--dry_run", "--debug_dataset"])
def test_looking_at_the_data_loads_nothing(
    make, kind: str, option: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("nothing must be loaded")

    for name in ("load_encoders", "load_vae", "load_denoiser"):
        monkeypatch.setattr(Flux, name, refuse)
    cell = make(kind)
    cell(option)
    page = (cell.output / "run_dataset.html").read_text(encoding="utf-8")
    assert len(re.findall("<img", page)) >= 5
    assert ("a thing 3" if "metadata" in kind else "i3.png") in page
    assert not list(cell.output.glob("*.safetensors"))
    for words in ("plan", "memory", "buckets of dataset 1", "captioned"):
        assert words in caplog.text


def test_strict_stops_at_warnings(make_cell: MakeCell, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (images / "3_thing" / "i1.txt").write_text("cat " * 40, encoding="utf-8")
    cell = make_cell("lora, all cached")
    cell("--max_train_steps", "1")
    with pytest.raises(SystemExit) as ended:
        make_cell("lora, all cached", "strict")("--max_train_steps", "1", "--strict")
    assert ended.value.code not in (0, None)
    assert "longer than 16 tokens" in capsys.readouterr().err


def test_a_cache_folder_elsewhere_leaves_the_images_alone(make, tmp_path: Path) -> None:
    cell = make("metadata file, cached wordings")
    caches = tmp_path / "caches"
    more = ("--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk", "--cache_dir", str(caches))
    shutil.rmtree(caches, ignore_errors=True)
    cell("--max_train_steps", "2", *more)
    assert not list((tmp_path / "meta").glob("*.npz"))
    assert len(list(caches.rglob("*_flux.npz"))) == 5
    first = cell.weights()
    cell("--max_train_steps", "2", *more)
    assert_same(first, cell.weights())


def test_captions_that_a_cache_cannot_hold_are_refused(make, capsys: pytest.CaptureFixture[str]) -> None:
    cell = make("metadata file, cached wordings")
    with pytest.raises(SystemExit):
        cell("--max_train_steps", "1", "--text_cache_variants", "0")
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "shuffle_caption changes captions each time" in line
    assert "--text_cache_variants 4" in line
    assert "data.toml:" in line
