"""The model with the least validation loss is kept, and a run ends when that loss doesn't fall any more."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from library import files
from library.option_groups import SaveOptions, StateOptions
from library.train.best import Best
from library.train.checkpoints import Checkpoints
from library.train.state import LossWindow, RunState


def state_at(step: int = 0, total: int = 200) -> RunState:
    return RunState(seed=1, total_steps=total, batches_per_epoch=10, loss=LossWindow(10), step=step)


class Writer:
    """Checkpoints that write the step; told to, they fail."""

    def __init__(self, folder: Path, state: RunState, name: str | None = "my") -> None:
        self.state, self.broken = state, False
        self.checkpoints = Checkpoints(
            options=SaveOptions(output_dir=str(folder), output_name=name),
            state_options=StateOptions(),
            save_model=self.save,
            save_state=lambda path: None,
            epochs=10,
        )

    def save(self, path: Path) -> None:
        if self.broken:
            raise OSError("no room")
        files.save_safetensors({"step": torch.tensor(self.state.step)}, path, {"ss_steps": str(self.state.step)})


def kept(path: Path) -> int:
    with files.LazyTensors(path) as tensors:
        return int(tensors["step"])


def through(best: Best, state: RunState, losses: dict[int, float]) -> None:
    for step, loss in losses.items():
        if state.finished:
            return
        state.step = step
        best.judge(state, loss)


def curve(first: int, last: int) -> dict[int, float]:
    """Least at step 30."""
    return {step: abs(step - 30) / 30 + 1 for step in range(first, last, 5)}


@pytest.mark.parametrize("name", ["my", None])
def test_the_best_is_kept_also_over_a_resume(tmp_path: Path, name: str | None) -> None:
    path = tmp_path / ("my-best.safetensors" if name else "best.safetensors")
    state = state_at()
    writer = Writer(tmp_path, state, name)
    through(Best(save_as=writer.checkpoints.save_as, output_name=name), state, curve(5, 41))
    assert kept(path) == 30
    resumed = state_at()
    resumed.load_state_dict(json.loads(json.dumps(state.state_dict(), allow_nan=False)))
    writer = Writer(tmp_path, resumed, name)
    best = Best(save_as=writer.checkpoints.save_as, output_name=name)
    through(best, resumed, curve(45, 101))
    assert kept(path) == 30
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    through(best, resumed, {102: 0.9})
    assert kept(path) == 102


def test_a_state_from_before_has_nothing_to_remember() -> None:
    saved = state_at().state_dict()
    del saved["remembered"]
    state = state_at()
    state.load_state_dict(saved)
    assert state.remembered == {}


def test_patience_counts_validations_without_gain() -> None:
    state = state_at()
    best = Best(patience=3)
    through(best, state, {1: 2.0, 2: 2.5, 3: 2.0, 4: 1.9, 5: math.nan, 6: 1.9, 7: 3.0, 8: 1.0})
    assert (state.step, state.finished, state.complete) == (7, True, True)
    assert not state.requests.stop


def test_patience_goes_on_over_a_resume() -> None:
    state = state_at()
    through(Best(patience=3), state, {1: 1.0, 2: 2.0, 3: 2.0})
    resumed = state_at()
    resumed.load_state_dict(state.state_dict())
    through(Best(patience=3), resumed, {4: 2.0})
    assert resumed.finished


def test_the_final_model_is_saved_as_ever_after_an_early_end(tmp_path: Path) -> None:
    state = state_at()
    writer = Writer(tmp_path, state)
    through(Best(save_as=writer.checkpoints.save_as, output_name="my", patience=1), state, {5: 1.0, 10: 2.0})
    writer.checkpoints.after_step(state)
    writer.checkpoints.finish(state)
    assert {file.name: kept(file) for file in tmp_path.iterdir()} == {
        "my-best.safetensors": 5,
        "my.safetensors": 10,
    }


def test_what_could_not_be_saved_is_not_what_must_be_beaten(tmp_path: Path) -> None:
    state = state_at()
    writer = Writer(tmp_path, state)
    best = Best(save_as=writer.checkpoints.save_as, output_name="my", patience=2)
    through(best, state, {5: 3.0})
    writer.broken = True
    through(best, state, {10: 1.0})
    assert kept(tmp_path / "my-best.safetensors") == 5
    writer.broken = False
    through(best, state, {15: 2.0})
    assert kept(tmp_path / "my-best.safetensors") == 15
    assert not state.finished


def test_a_loss_that_is_not_finite_is_never_the_best(tmp_path: Path) -> None:
    state = state_at()
    writer = Writer(tmp_path, state)
    best = Best(save_as=writer.checkpoints.save_as, output_name="my")
    through(best, state, {1: math.nan, 2: math.inf, 3: -math.inf})
    assert not list(tmp_path.iterdir())
    json.dumps(state.state_dict(), allow_nan=False)
    through(best, state, {4: 5.0})
    assert kept(tmp_path / "my-best.safetensors") == 4
