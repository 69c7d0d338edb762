"""The scripts for SD3 on tiny models and five small images, as users start them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from library.families.sd3_files import Sd3Model
from library.models.keymaps_sd3 import ENCODERS
from tests import tiny_sd3
from tests.cells import Cell

NETWORK, FULL = "sd3_train_network", "sd3_train"
LORA = ("--network_module", "networks.lora_sd3", "--network_dim", "2")
LATENTS = ("--cache_latents",)
CACHED = (*LATENTS, "--cache_text_encoder_outputs")


class Sd3Cell(Cell):
    """A script with the options that its tests share."""

    def __init__(self, script: str, model: Path, tokenizers: Path, images: Path, output: Path, more: Sequence[str]):
        self.script, self.output = script, output
        self.argv = [
            *("--pretrained_model_name_or_path", str(model), "--tokenizer_cache_dir", str(tokenizers)),
            *("--t5xxl_max_token_length", "16", "--max_data_loader_n_workers", "0"),
            *("--train_data_dir", str(images), "--caption_extension", ".txt", "--resolution", "64,64"),
            *("--enable_bucket", "--min_bucket_reso", "32", "--max_bucket_reso", "128", "--bucket_reso_steps", "32"),
            *("--output_dir", str(output), "--output_name", "run", "--learning_rate", "1e-3", "--seed", "7"),
            *more,
        ]


MakeSd3Cell = Callable[..., Sd3Cell]
"""Makes a cell of a script, the name of a model, the name of its output folder, and further options."""


def write_models(folder: Path) -> dict[str, Path]:
    """Tiny checkpoints by name, files of single parts, and `tokenizers`."""
    files = tiny_sd3.write_all(folder)
    bare = ("vae",)
    return {
        **files,
        "sd3.5": tiny_sd3.write_single(folder / "sd3.5.safetensors", "5-medium"),
        "sd3 without t5": tiny_sd3.write_single(folder / "no_t5.safetensors", parts=("vae", "clip_l", "clip_g")),
        "sd3 without encoders": tiny_sd3.write_single(folder / "bare.safetensors", parts=bare),
        "sd3 folder": tiny_sd3.write_folder(folder / "sd3_folder"),
    }


def parts_of(path: Path, **separate: Path) -> dict[str, dict[str, Tensor]]:
    """All weights of a model by part, read by what also loads base models."""
    model, cpu = Sd3Model(str(path), {name: str(file) for name, file in separate.items()}), torch.device("cpu")
    parts: dict[str, nn.Module] = {"unet": model.load_denoiser(cpu, None, None, False)}
    model.encoder_names = tuple(name for name in ENCODERS if model.files.find(name) is not None)
    parts |= model.load_encoders(ENCODERS, cpu, torch.float32, None, False)
    parts["vae"] = model.load_vae(cpu, torch.float32)
    return {name: part.state_dict() for name, part in parts.items()}


def moved(before: Mapping[str, Mapping[str, Tensor]], after: Mapping[str, Mapping[str, Tensor]]) -> set[str]:
    """Parts of the model after training of which anything is another."""
    assert all(before[part].keys() == after[part].keys() for part in after)
    return {
        part
        for part, tensors in after.items()
        if any(not tensor.equal(before[part][name]) for name, tensor in tensors.items())
    }
