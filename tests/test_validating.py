"""Validation through the scripts: it changes nothing, repeats itself, and decides what is kept and when to end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cells import MakeCell, assert_same, read_json

SPLIT = ("--validation_split", "0.4", "--validation_seed", "1")
BEST = ("--save_best", "--early_stop_patience", "2", "--validate_every_n_steps", "1", "--learning_rate", "0.5")


def logged(folder: Path) -> list[dict[str, Any]]:
    """What the logs in a folder say of validations."""
    lines = [
        json.loads(line) for file in sorted(folder.glob("*/log.jsonl")) for line in file.read_text("utf-8").splitlines()
    ]
    found = [line for line in lines if any(name.startswith("loss/validation/") for name in line)]
    return [{name: value for name, value in line.items() if name != "time"} for line in found]


@pytest.mark.parametrize("name", ["lora, all cached", "lora, nothing cached", "full, all cached"])
def test_training_goes_on_as_if_nothing_had_been(make_cell: MakeCell, tmp_path: Path, name: str) -> None:
    common = ("--max_train_steps", "13", *SPLIT)
    plain, watched, again = (make_cell(name, folder) for folder in ("plain", "watched", "again"))
    plain(*common, "--validate_every_n_steps", "100")
    for cell in (watched, again):
        logs = ("--logging_dir", str(tmp_path / f"log {cell.output.name}"))
        cell(*common, "--validate_every_n_steps", "5", "--validate_every_n_epochs", "1", *logs)
    assert_same(plain.weights(), watched.weights())
    lines = logged(tmp_path / "log watched")
    assert lines == logged(tmp_path / "log again")
    assert {"loss/validation/step_average", "loss/validation/epoch_average"} <= {tag for line in lines for tag in line}
    assert "loss/validation/timestep_800" in lines[0]


def test_the_best_is_kept_and_the_run_ends_early_also_in_two_parts(make_cell: MakeCell, tmp_path: Path) -> None:
    straight, parts = make_cell("lora, all cached", "straight"), make_cell("lora, all cached", "parts")
    straight("--max_train_steps", "60", *SPLIT, *BEST, "--logging_dir", str(tmp_path / "log"))
    losses = {line["step"]: line["loss/validation/step_average"] for line in logged(tmp_path / "log")}
    best, last = min(losses, key=lambda step: losses[step]), max(losses)
    assert last == best + 2 < 60
    assert {path.name for path in straight.output.glob("*.safetensors")} == {"run-best.safetensors", "run.safetensors"}
    first = ("--max_train_steps", str(best + 1), "--save_state_on_train_end")
    parts(*first, *SPLIT, *BEST)
    memory = read_json(parts.output / "run-state" / "run.json")["remembered"]
    assert memory["best"] == {"loss": losses[best], "step": best, "without_gain": 1}
    (parts.output / "run-best.safetensors").unlink()
    parts("--max_train_steps", "60", "--resume", str(parts.output / "run-state"), *SPLIT, *BEST)
    assert_same(straight.weights(), parts.weights())
    assert not (parts.output / "run-best.safetensors").exists(), "nothing was better than what is remembered"


def test_the_picture_of_the_timesteps_lies_beside_the_samples(make_cell: MakeCell) -> None:
    cell = make_cell("lora, all cached")
    cell("--max_train_steps", "1")
    assert (cell.output / "sample" / "run_timesteps.png").is_file()


@pytest.mark.slow
def test_two_processes_measure_what_one_does(make_cell: MakeCell, tmp_path: Path) -> None:
    found = []
    for processes in (1, 2):
        cell = make_cell("lora, all cached", str(processes))
        logs = ("--logging_dir", str(tmp_path / f"log {processes}"), "--unet_lr", "1e-12")
        cell.launch(processes, "--max_train_steps", "2", *SPLIT, "--validate_every_n_steps", "2", *logs)
        (line,) = logged(tmp_path / f"log {processes}")
        found.append(line)
    tags = [tag for tag in found[0] if tag.startswith("loss/validation/") and "divergence" not in tag]
    assert len(tags) == 5
    assert [found[0][tag] for tag in tags] == pytest.approx([found[1][tag] for tag in tags], rel=1e-5)
