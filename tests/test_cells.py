"""Every script on tiny models, as users start it: files load back, resuming is exact, processes agree."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from tests import tiny

ROOT = Path(__file__).parent.parent
SIZES = [(64, 64), (64, 64), (96, 64), (64, 96), (64, 64)]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return tiny.write_all(tmp_path_factory.mktemp("models"))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """The parent of a folder with five captioned images."""
    folder = tmp_path / "画像 data" / "3_thing"
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for number, (width, height) in enumerate(SIZES):
        pixels = generator.integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"i{number}.png")
        (folder / f"i{number}.txt").write_text(f"thing number {number}", encoding="utf-8-sig")
    return folder.parent


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

    def launch(self, processes: int, *more: str) -> None:
        """Runs the script in several processes, as the launcher does."""
        command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", str(processes)]
        command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        command += ["--main_process_port", "0", str(ROOT / f"{self.script}.py"), *self.argv, *more]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUTF8": "0", "ACCELERATE_USE_CPU": "true"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
        assert done.returncode == 0, done.stderr[-3000:]


LORA = ("--network_module", "networks.lora_flux", "--network_dim", "4", "--network_dropout", "0.1")
CACHED = ("--cache_latents", "--cache_text_encoder_outputs")
CELLS = {
    "lora, all cached": ("flux_train_network", (*LORA, *CACHED, "--network_train_unet_only")),
    "lora with clip, t5 cached": ("flux_train_network", (*LORA, *CACHED)),
    "lora, nothing cached": ("flux_train_network", LORA),
    "full, all cached": ("flux_train", CACHED),
    "full, nothing cached": ("flux_train", ()),
}

MakeCell = Callable[[str, str], Cell]


@pytest.fixture
def make_cell(models: dict[str, Path], images: Path, tmp_path: Path) -> MakeCell:
    def make(cell: str, folder: str = "out") -> Cell:
        script, more = CELLS[cell]
        return Cell(script, models, images, tmp_path / folder, more)

    return make


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    different = [name for name, tensor in left.items() if not tensor.equal(right[name])]
    assert not different, different[:5]


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("accumulation", [1, 3])
def test_resuming_twice_is_the_same_as_running_straight(make_cell: MakeCell, cell: str, accumulation: int) -> None:
    common = ("--gradient_accumulation_steps", str(accumulation), "--lr_scheduler", "cosine", "--lr_warmup_steps", "3")
    straight, broken = make_cell(cell, "straight"), make_cell(cell, "broken")
    straight(*common, "--max_train_steps", "20", "--save_state_on_train_end")
    for steps in (7, 13, 20):
        stopped_at = ("--save_every_n_steps", str(steps), "--save_state")
        StopAt.step = steps
        broken(*common, "--max_train_steps", "20", *stopped_at, *(("--resume", "auto") if steps > 7 else ()))
    assert_same(straight.weights(), broken.weights())
    one, other = (cell.output / "run-state" for cell in (straight, broken))
    assert_same(load_file(one / "optimizer.safetensors"), load_file(other / "optimizer.safetensors"))
    assert json.loads((one / "scheduler.json").read_text("utf-8")) == json.loads((other / "scheduler.json").read_text("utf-8"))
    for steps in (7, 13, 20):
        name = "run-state" if steps == 20 else f"run-step{steps:08d}-state"
        assert json.loads((broken.output / name / "train_state.json").read_text("utf-8"))["current_step"] == steps
    assert json.loads((one / "run.json").read_text("utf-8"))["loss"] == json.loads((other / "run.json").read_text("utf-8"))["loss"]


class StopAt:
    """Asks a run to stop after a step, as Ctrl-C does."""

    step = 0


@pytest.fixture(autouse=True)
def _stop_at(monkeypatch: pytest.MonkeyPatch) -> None:
    from library.train.control import Control

    listen = Control.after_step

    def after_step(self: Control, state: object) -> None:
        if state.step == StopAt.step:  # type: ignore[attr-defined]
            self.ask("stop")
        listen(self, state)  # type: ignore[arg-type]

    StopAt.step = -1
    monkeypatch.setattr(Control, "after_step", after_step)
