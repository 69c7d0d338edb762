"""The scripts for SD and SDXL on tiny models and five small images, as users start them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from library.models.checkpoints_sd import V_MARK, ZERO_MARK
from tests import tiny, tiny_sd
from tests.cells import Cell

SIZES = [(64, 64), (64, 64), (128, 64), (64, 128), (64, 64)]
"""Sides are multiples of the bucket steps of both families."""


class SdCell(Cell):
    """A script with the options that its tests share."""

    def __init__(self, script: str, model: Path, tokenizers: Path, images: Path, output: Path, more: Sequence[str]):
        self.script, self.output = script, output
        self.argv = [
            *("--pretrained_model_name_or_path", str(model), "--tokenizer_cache_dir", str(tokenizers)),
            *("--train_data_dir", str(images), "--caption_extension", ".txt", "--resolution", "96,96"),
            *("--enable_bucket", "--min_bucket_reso", "64", "--max_bucket_reso", "128", "--bucket_reso_steps", "64"),
            *("--output_dir", str(output), "--output_name", "run", "--learning_rate", "1e-3", "--seed", "7"),
            *("--max_data_loader_n_workers", "0", *more),
        ]


MakeSdCell = Callable[..., SdCell]
"""Makes a cell of a script, the name of a model, the name of its output folder, and further options."""


def write_models(folder: Path) -> dict[str, Path]:
    """Tiny checkpoints by name, and `tokenizers`."""
    marks = {V_MARK: torch.zeros(0), ZERO_MARK: torch.zeros(0)}
    tiny.write_clip_tokenizer(folder / "tokenizers" / tiny.CLIP_FOLDER)
    for name in tiny_sd.OPEN_CLIP_FOLDER.values():
        tiny.write_clip_tokenizer(folder / "tokenizers" / name)
    return {
        "sd1": tiny_sd.write_single(folder / "sd1.safetensors", "1"),
        "sd2": tiny_sd.write_single(folder / "sd2.safetensors", "2"),
        "sdxl": tiny_sd.write_single(folder / "sdxl.safetensors", "xl"),
        "sdxl v": tiny_sd.write_single(folder / "sdxl_v.safetensors", "xl", more=marks),
        "sd1 folder": tiny_sd.write_folder(folder / "sd1_folder", "1"),
        "sdxl folder": tiny_sd.write_folder(folder / "sdxl_folder", "xl"),
        "tokenizers": folder / "tokenizers",
    }


LORA = ("--network_module", "networks.lora", "--network_dim", "2")
CACHED = ("--cache_latents", "--cache_text_encoder_outputs")
