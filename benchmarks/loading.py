"""Times how fast images are cached and batches made, against what waits for them. See README.md beside this file."""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.dataset import TRAITS, alone, show

ENCODER_SECONDS = 0.010
"""What a stand-in for the autoencoder takes for a batch."""
STEP_SECONDS = 0.15
"""What a stand-in for the training takes for a batch: a step of the quickstart on two cores."""


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--images", type=int, default=400, help="JPEG files")
    parser.add_argument("--side", type=int, default=512, help="their width in pixels; the height is 3/4 of it")
    parser.add_argument("--resolution", type=int, default=256, help="what they are trained at")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    args = parser.parse_args(argv)
    result: dict[str, dict[str, Any]] = {}
    with TemporaryDirectory() as folder:
        write_images(Path(folder) / "train" / "1_thing", args.images, args.side)
        words = (folder, args.resolution)
        result["caching"] = alone(cache_latents, *words)
        for workers in (0, 2):
            for start in ("fork", "spawn") if workers else ("fork",):
                if start in multiprocessing.get_all_start_methods():
                    name = f"decoding, {workers} workers" + (f", {start}" if workers else "")
                    result[name] = alone(decode, *words, workers, start)
        result["from the cache"] = alone(read_cache, *words)
    show(result, as_json=args.json)


def write_images(folder: Path, images: int, side: int) -> None:
    """Noisy gradients, each with a caption."""
    import numpy as np
    from PIL import Image

    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    height = side * 3 // 4
    ramp = np.linspace(0, 200, side)[None, :, None] + np.zeros((height, 1, 3))
    for number in range(images):
        pixels = (ramp + generator.integers(0, 55, (height, side, 3))).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:05}.jpg", quality=92)
        (folder / f"{number:05}.txt").write_text(f"thing {number}", encoding="utf-8")


def training_data(folder: str, resolution: int) -> Any:
    """The images as a source of batches."""
    from library.data import config, sources
    from library.data.dataset import TrainingData
    from library.option_groups import FLUX_TRAIN_NETWORK
    from library.options import parse

    words = ["--train_data_dir", f"{folder}/train", "--resolution", str(resolution), "--caption_extension", ".txt"]
    words += ["--enable_bucket", "--min_bucket_reso", "64", "--train_batch_size", "4"]
    scan = sources.scan(config.load(parse(FLUX_TRAIN_NETWORK, words)), TRAITS, visible=False)
    return TrainingData(scan, TRAITS, 1)


def fill(data: Any, batch_size: int) -> tuple[float, float]:
    """Seconds that it takes to cache the latents on the disk, and what the encoder alone took of that."""
    import torch

    from library.data import cache
    from library.types import Posterior

    encoding = 0.0

    def encode(pixels: torch.Tensor) -> Posterior:
        nonlocal encoding
        begun = time.perf_counter()
        time.sleep(ENCODER_SECONDS)
        shape = (len(pixels), TRAITS.latent_channels, pixels.shape[2] // 8, pixels.shape[3] // 8)
        latents = Posterior(torch.zeros(shape), torch.ones(shape))
        encoding += time.perf_counter() - begun
        return latents

    start = time.perf_counter()
    check = cache.check_latents(data, cache.CacheSettings(visible=False))
    cache.fill_latents(data, encode, check, batch_size=batch_size, visible=False)
    return time.perf_counter() - start, encoding


def cache_latents(folder: str, resolution: int) -> dict[str, Any]:
    """Caching beside an encoder of fixed speed."""
    data = training_data(folder, resolution)
    seconds, encoding = fill(data, 1)
    return {"images/s": round(data.images / seconds), "times the encoder alone": round(seconds / encoding, 2)}


def decode(folder: str, resolution: int, workers: int, start: str) -> dict[str, Any]:
    """Batches of decoded images."""
    multiprocessing.set_start_method(start, force=True)
    return walked(training_data(folder, resolution), workers)


def read_cache(folder: str, resolution: int) -> dict[str, Any]:
    """Batches of cached latents."""
    data = training_data(folder, resolution)
    fill(data, 4)
    return walked(data, 0)


def walked(data: Any, workers: int) -> dict[str, Any]:
    """Two epochs as fast as can be, and one with a step after each batch."""

    def through(epoch: int, after: Callable[[], None]) -> tuple[float, float]:
        waited, start = 0.0, time.perf_counter()
        batches = iter(data.loader(epoch, workers=workers, persistent=True))
        while True:
            asked = time.perf_counter()
            batch = next(batches, None)
            waited += time.perf_counter() - asked
            if batch is None:
                return waited, time.perf_counter() - start
            after()

    first, _ = through(1, lambda: None)
    second, _ = through(2, lambda: None)
    waited, total = through(3, lambda: time.sleep(STEP_SECONDS))
    return {
        "first epoch images/s": round(data.repeated / first),
        "second epoch images/s": round(data.repeated / second),
        "waiting beside steps": f"{100 * waited / total:.1f} %",
    }


if __name__ == "__main__":
    main()
