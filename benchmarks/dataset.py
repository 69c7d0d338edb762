"""Times how long it takes to find the images of a dataset, and how that grows. See README.md beside this file."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from library.types import Size, Traits

TRAITS = Traits(
    name="flux",
    latent_channels=16,
    latent_stride=8,
    bucket_step=16,
    latents_suffix="_flux.npz",
    latents_keys_carry_size=True,
    text_suffix="_flux_te.npz",
    base_model_version="flux1",
)
SIZES = (Size(64, 64), Size(96, 64), Size(64, 96), Size(128, 64))


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--images", type=int, default=100_000, help="image files, each with a caption file")
    parser.add_argument("--folders", type=int, default=1000, help="folders that they lie in")
    parser.add_argument("--simulated", type=int, default=1_000_000, help="images without files; 0 leaves them out")
    parser.add_argument("--copies", action="store_true", help="copy the images instead of linking them")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    args = parser.parse_args(argv)
    result: dict[str, dict[str, Any]] = {}
    with TemporaryDirectory() as folder:
        tree = Path(folder) / "train"
        build_tree(tree, args.images, args.folders, copies=args.copies)
        cache = Path(folder) / "scan.json"
        for name, path in (("scan, nothing remembered", None), ("scan, remembering", cache), ("scan again", cache)):
            result[name] = alone(scan, str(tree), path)
    for part in (4, 2, 1) if args.simulated else ():
        result[f"{args.simulated // part} simulated images"] = alone(simulate, args.simulated // part)
    show(result, as_json=args.json)


def show(result: dict[str, dict[str, Any]], *, as_json: bool) -> None:
    """Prints a line for each measurement, or JSON."""
    if as_json:
        print(json.dumps(result, indent=2))
        return
    width = max(map(len, result))
    for name, row in result.items():
        print(f"{name:<{width}}  " + "  ".join(f"{key} {value}" for key, value in row.items()))


def build_tree(tree: Path, images: int, folders: int, *, copies: bool = False) -> None:
    """Writes folders of tiny images with captions; all images of a size share one file unless copies are wanted."""
    from PIL import Image

    tree.mkdir(parents=True)
    originals = []
    for number, size in enumerate(SIZES):
        originals.append(tree / f"{number}.original")
        Image.new("RGB", size, (40 * number, 80, 120)).save(originals[-1], "PNG")
    for number in range(images):
        folder = tree / f"1_thing {number % folders}"
        if number < folders:
            folder.mkdir()
        original = originals[number % len(originals)]
        image = folder / f"{number:07}.png"
        try:
            if copies:
                raise OSError
            os.link(original, image)
        except OSError:  # a disk without links, or a file that has as many as it can have
            shutil.copyfile(original, image)
            originals[number % len(originals)] = image
        (folder / f"{number:07}.txt").write_bytes(b"a photo of thing %d, tag, another tag\n" % number)


def alone(function: Callable[..., dict[str, Any]], *arguments: object) -> dict[str, Any]:
    """What a function gives in a process of its own, with that process's peak memory."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_measured, function, *arguments).result()


def _measured(function: Callable[..., dict[str, Any]], *arguments: object) -> dict[str, Any]:
    before = peak_memory()
    result = function(*arguments)
    after = peak_memory()
    if after is not None and before is not None:
        result |= {"peak MB": round(after), "of that for modules MB": round(before)}
    return result


def peak_memory() -> float | None:
    """Most memory that this process has had, in MB; None where nobody knows."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak / 1e3


def scan(tree: str, cache: Path | None) -> dict[str, Any]:
    """One scan of a --train_data_dir."""
    from library.data import config, sources
    from library.option_groups import FLUX_TRAIN_NETWORK
    from library.options import parse

    start, cpu = time.perf_counter(), time.process_time()
    words = ["--train_data_dir", tree, "--resolution", "64", "--caption_extension", ".txt", "--enable_bucket"]
    words += ["--min_bucket_reso", "32"]
    loaded = config.load(parse(FLUX_TRAIN_NETWORK, words))
    configured = time.perf_counter()
    found = sources.scan(loaded, TRAITS, scan_cache=cache, visible=False)
    end = time.perf_counter()
    return {
        "seconds": round(end - start, 2),
        "of that for folders": round(configured - start, 2),
        "processor": round(time.process_time() - cpu, 2),
        "images": len(found.items),
        "opened": found.opened,
    }


def simulate(images: int) -> dict[str, Any]:
    """Items without files, put into buckets and into the order of an epoch."""
    from library.data import buckets
    from library.data.dataset import TrainingData
    from library.data.items import Item
    from library.data.settings import DatasetConfig, DatasetSettings, SubsetSettings
    from library.data.sources import Scan

    subset = SubsetSettings(image_dir="nowhere")
    settings = DatasetSettings(resolution=Size(1024, 1024), enable_bucket=True, batch_size=4, subsets=(subset,))
    sizes = [Size(512 + 64 * (step % 17), 512 + 32 * (step % 29)) for step in range(493)]
    assigned = [buckets.assign(size, settings) for size in sizes]
    start = time.perf_counter()
    items = [
        Item(
            path=f"nowhere/{number:07}.png",
            original=sizes[number % len(sizes)],
            caption=f"a photo of thing {number}",
            repeats=1,
            assignment=assigned[number % len(sizes)],
            dataset=0,
            subset=subset,
        )
        for number in range(images)
    ]
    made = time.perf_counter()
    data = TrainingData(Scan(DatasetConfig(datasets=(settings,)), items), TRAITS, 1)
    batches = len(data.epoch_batches(1))
    end = time.perf_counter()
    return {"items s": round(made - start, 2), "order s": round(end - made, 2), "batches": batches}


if __name__ == "__main__":
    main()
