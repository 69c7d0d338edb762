"""The training scripts on tiny models and five small images, as users start them."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

ROOT = Path(__file__).parent.parent
SIZES = [(64, 64), (64, 64), (96, 64), (64, 96), (64, 64)]


def write_images(folder: Path, sizes: Sequence[tuple[int, int]] = SIZES) -> Path:
    """A folder with images of noise and their captions."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for number, (width, height) in enumerate(sizes):
        pixels = generator.integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"i{number}.png")
        (folder / f"i{number}.txt").write_text(f"thing number {number}", encoding="utf-8-sig")
    return folder


class Cell:
    """A script with the options that its tests share."""

    def __init__(self, script: str, models: dict[str, Path], images: Path, output: Path, more: Sequence[str]) -> None:
        self.script, self.output = script, output
        self.argv = [
            *("--pretrained_model_name_or_path", str(models["flux"]), "--clip_l", str(models["clip_l"])),
            *("--t5xxl", str(models["t5xxl"]), "--ae", str(models["ae"])),
            *("--tokenizer_cache_dir", str(models["tokenizers"]), "--t5xxl_max_token_length", "16"),
            *("--train_data_dir", str(images), "--caption_extension", ".txt", "--resolution", "64,64"),
            *("--enable_bucket", "--min_bucket_reso", "32", "--max_bucket_reso", "128", "--bucket_reso_steps", "32"),
            *("--output_dir", str(output), "--output_name", "run", "--learning_rate", "1e-3", "--seed", "7"),
            *("--timestep_sampling", "sigmoid", "--model_prediction_type", "raw", "--max_data_loader_n_workers", "0"),
            *more,
        ]

    def __call__(self, *more: str) -> None:
        """Runs the script in this process."""
        importlib.import_module(self.script).main([*self.argv, *more])

    def weights(self, name: str = "run") -> dict[str, Tensor]:
        """A saved file."""
        return load_file(self.output / f"{name}.safetensors")

    def start(self, processes: int, *more: str) -> subprocess.Popen[str]:
        """Starts the script in several processes, as the launcher does on machines with several GPUs."""
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        command += [str(ROOT / f"{self.script}.py"), *self.argv, *more]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUTF8": "0", "ACCELERATE_USE_CPU": "true"}
        return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)

    def launch(self, processes: int, *more: str) -> None:
        """Runs the script in several processes to its end."""
        process = self.start(processes, *more)
        errors = process.communicate(timeout=300)[1]
        assert process.returncode == 0, errors[-3000:]


LORA = ("--network_module", "networks.lora_flux", "--network_dim", "4", "--network_dropout", "0.1")
CACHED = ("--cache_latents", "--cache_text_encoder_outputs")
CELLS = {
    "lora, all cached": ("flux_train_network", (*LORA, *CACHED, "--network_train_unet_only")),
    "lora with clip, t5 cached": ("flux_train_network", (*LORA, *CACHED)),
    "lora, nothing cached": ("flux_train_network", LORA),
    "full, all cached": ("flux_train", CACHED),
    "full, nothing cached": ("flux_train", ()),
}

MakeCell = Callable[..., Cell]
"""Makes a cell of its key in `CELLS` and the name of its output folder."""


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    different = [name for name, tensor in left.items() if not tensor.equal(right[name])]
    assert not different, different[:5]


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))
