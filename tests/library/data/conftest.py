"""Small folders of images, options, and a stand-in for an autoencoder and a text encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from library.data import config, sources
from library.data.dataset import TrainingData
from library.families.flux import Flux
from library.option_groups import FLUX_TRAIN_NETWORK
from library.options import Options, Origin
from library.types import Posterior

TRAITS = Flux.traits


@pytest.fixture(scope="session")
def traits():
    return TRAITS


def picture(size: tuple[int, int], seed: int = 0) -> Image.Image:
    """A smooth picture without symmetry."""
    width, height = size
    y, x = np.mgrid[0:height, 0:width]
    channels = [x * 255 // max(width - 1, 1), y * 255 // max(height - 1, 1), (x + 3 * y + 40 * seed) % 256]
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


@pytest.fixture
def make_images():
    """Writes pictures: folder, name -> size; captions: name -> text."""

    def make(folder: Path, sizes: Mapping[str, tuple[int, int]], captions: Mapping[str, str] | None = None) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        for number, (name, size) in enumerate(sizes.items()):
            picture(size, number).save(folder / name)
        for name, text in (captions or {}).items():
            (folder / name).write_text(text, "utf-8")
        return folder

    return make


@pytest.fixture
def options_of():
    """Options with some values given on the command line."""

    def build(**values: object) -> Options:
        origins = {name: Origin("command line", f"--{name}") for name in values}
        return Options(FLUX_TRAIN_NETWORK, values, origins)

    return build


@pytest.fixture
def load_config(options_of, tmp_path):
    """The configuration of a TOML text."""

    def load(text: str, name: str = "dataset.toml", **values: object):
        path = tmp_path / name
        path.write_text(text, "utf-8")
        return config.load(options_of(dataset_config=path, **values))

    return load


@pytest.fixture
def scan_toml(load_config):
    """The scan of a TOML text."""

    def run(text: str, **flags: bool):
        return sources.scan(load_config(text), TRAITS, visible=False, **flags)

    return run


@pytest.fixture
def training_data(scan_toml):
    """Training data of a TOML text."""

    def run(text: str, seed: int = 7, **flags: bool):
        found = scan_toml(text, **flags)
        assert not [finding for finding in found.findings if finding.error], found.findings
        return TrainingData(found, TRAITS, seed)

    return run


class CountingVae:
    """Gives latents that depend on the pixels; counts the images."""

    def __init__(self, factor: float = 1.0) -> None:
        self.factor, self.images, self.batches = factor, 0, []

    def __call__(self, pixels: torch.Tensor) -> Posterior:
        self.images += len(pixels)
        self.batches.append(tuple(pixels.shape))
        mean = self.factor * torch.nn.functional.avg_pool2d(pixels, 8).repeat(1, 6, 1, 1)[:, :16]
        return Posterior(mean, torch.full_like(mean, 0.002))


class CountingEncoder:
    """Gives text outputs that depend on the caption; counts the captions."""

    def __init__(self) -> None:
        self.captions: list[str] = []

    def __call__(self, captions: Sequence[str]) -> dict[str, torch.Tensor]:
        self.captions += captions
        numbers = torch.tensor([float(sum(map(ord, caption))) for caption in captions])
        return {
            "pooled": numbers.view(-1, 1).expand(-1, 4).bfloat16(),
            "mask": torch.ones(len(captions), 6, dtype=torch.int64),
            "flag": torch.zeros(len(captions), dtype=torch.bool),
        }


@pytest.fixture
def vae():
    return CountingVae()


@pytest.fixture
def encoder():
    return CountingEncoder()
