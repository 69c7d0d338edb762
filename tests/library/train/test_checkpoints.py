"""When things are saved, their names, what is removed, and that failures end nothing."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from library import files
from library.log import ResourceError, UserError
from library.train.checkpoints import (
    Checkpoints,
    epoch_stem,
    epoch_to_remove,
    first_nonfinite,
    last_stem,
    state_name,
    step_stem,
    step_to_remove,
)
from library.train.state import LossWindow, Requests, RunState

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "output_names.json").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Save:
    output_dir: str
    output_name: str | None = "my"
    save_every_n_steps: int | None = None
    save_last_n_epochs: int | None = None
    save_last_n_steps: int | None = None


@dataclass(frozen=True)
class State:
    save_state: bool = False
    save_state_on_train_end: bool = False
    save_last_n_epochs_state: int | None = None
    save_last_n_steps_state: int | None = None


@pytest.mark.parametrize("row", GOLDEN["names"], ids=lambda row: str(row["output_name"]))
def test_names(row):
    name = row["output_name"]
    assert epoch_stem(name, 3) + ".safetensors" == row["epoch 3 .safetensors"]
    assert step_stem(name, 500) + ".safetensors" == row["step 500 .safetensors"]
    assert last_stem(name) + ".safetensors" == row["last .safetensors"]
    assert state_name(epoch_stem(name, 3)) == row["epoch state"]
    assert state_name(step_stem(name, 500)) == row["step state"]
    assert state_name(last_stem(name)) == row["last state"]
    assert epoch_stem(name, 3) == row["epoch diffusers dir"]
    assert step_stem(name, 500) == row["step diffusers dir"]
    assert epoch_stem(name, 1234567) + ".safetensors" == row["epoch 1234567"]


@pytest.mark.parametrize("row", GOLDEN["remove_epoch"])
def test_which_epoch_goes(row):
    for epoch, removed in row["removed_when_saving_epoch"].items():
        assert epoch_to_remove(int(epoch), row["save_every_n_epochs"], row["save_last_n_epochs"]) == removed


@pytest.mark.parametrize("row", GOLDEN["remove_step"])
def test_which_step_goes(row):
    for step, removed in row["removed_when_saving_step"].items():
        assert step_to_remove(int(step), row["save_every_n_steps"], row["save_last_n_steps"]) == removed


def test_nothing_goes_without_a_limit():
    assert epoch_to_remove(9, 1, None) is None
    assert step_to_remove(90, 10, None) is None


class Folder:
    """A run with one weight, saved into a folder."""

    def __init__(
        self, folder: Path, total: int = 100, per_epoch: int = 10, epochs: int = 10, **changes: object
    ) -> None:
        self.folder, self.weight, self.broken, self.uploads = folder, torch.zeros(3), "", []
        groups = {name: changes.pop(name) for name in list(changes) if name.startswith("save_") and "state" in name}
        every_epochs = changes.pop("every_epochs", None)
        self.checkpoints = Checkpoints(
            options=replace(Save(str(folder)), **changes),
            state_options=State(**groups),
            save_model=self.save_model,
            save_state=self.save_state,
            every_epochs=every_epochs,
            epochs=epochs,
            weights=lambda: [("weight", self.weight)],
            upload=lambda path, *, final=False: self.uploads.append((path.name, final)),
            upload_states=True,
        )
        self.state = RunState(seed=1, total_steps=total, batches_per_epoch=per_epoch, loss=LossWindow(per_epoch))

    def save_model(self, path: Path) -> None:
        if "model" in self.broken:
            with files.atomic_write(path) as temporary:
                temporary.write_bytes(b"half")
                raise OSError(28, "No space left on device")
        files.save_safetensors({"weight": self.weight}, path)

    def save_state(self, path: Path) -> None:
        if "state" in self.broken:
            raise ResourceError("disk full")
        path.mkdir()
        (path / "step").write_text(str(self.state.step))

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.state.step += 1
            self.state.batch += 1
            self.state.requests = Requests()
            self.checkpoints.after_step(self.state)
            if self.state.completes_epoch():
                self.checkpoints.after_epoch(self.state)

    def names(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir())


def test_saves_by_step_and_at_the_end(tmp_path):
    run = Folder(tmp_path / "out", total=10, save_every_n_steps=4)
    run.run(10)
    run.checkpoints.finish(run.state)
    assert run.names() == ["my-step00000004.safetensors", "my-step00000008.safetensors", "my.safetensors"]
    assert run.state.last_saved == 10
    assert [name for name, _ in run.uploads] == [path.name for path in run.checkpoints.written]
    assert run.uploads[-1] == ("my.safetensors", True)


def test_saves_by_epoch_but_not_the_last(tmp_path):
    run = Folder(tmp_path, total=30, epochs=3, every_epochs=1)
    run.run(30)
    assert run.names() == ["my-000001.safetensors", "my-000002.safetensors"]


def test_old_models_and_states_go_independently(tmp_path):
    run = Folder(
        tmp_path, save_every_n_steps=10, save_last_n_steps=30, save_state=True, save_last_n_steps_state=10, total=90
    )
    run.run(80)
    models = [f"my-step{step:08d}.safetensors" for step in (50, 60, 70, 80)]
    states = [f"my-step{step:08d}-state" for step in (70, 80)]
    assert run.names() == sorted(models + states)


def test_old_epochs_go(tmp_path):
    run = Folder(tmp_path, every_epochs=1, save_last_n_epochs=2, save_state=True)
    run.run(60)
    assert run.names() == sorted(f"my-{epoch:06d}{end}" for epoch in (5, 6) for end in (".safetensors", "-state"))


def test_state_at_the_end_only(tmp_path):
    run = Folder(tmp_path, total=5, save_state_on_train_end=True, save_every_n_steps=2)
    run.run(5)
    run.checkpoints.finish(run.state)
    assert [name for name in run.names() if name.endswith("-state")] == ["my-state"]


def test_state_of_an_epoch_points_at_the_next_one(tmp_path):
    run = Folder(tmp_path, every_epochs=1, save_state=True)
    positions = []
    run.checkpoints.save_state = lambda path: positions.append((run.state.step, run.state.epoch, run.state.batch))
    run.run(10)
    assert positions == [(10, 2, 0)]


@pytest.mark.parametrize("broken", ["model", "state", "model state"])
def test_a_failing_save_is_made_up_for(tmp_path, broken, caplog):
    run = Folder(tmp_path, total=9, save_every_n_steps=2, save_last_n_steps=1, save_state=True)
    run.run(2)
    run.broken = broken
    run.run(2)
    assert "No space left" in caplog.text or "disk full" in caplog.text
    assert "my-step00000002.safetensors" in run.names()
    assert "my-step00000002-state" in run.names()
    run.broken = ""
    run.run(2)
    assert "my-step00000006.safetensors" in run.names()
    assert "my-step00000006-state" in run.names()
    run.run(3)
    run.checkpoints.finish(run.state)
    assert len(run.checkpoints.failures) == len(broken.split())
    assert not [name for name in run.names() if name.endswith(".tmp")]


def test_a_run_whose_last_save_fails_ends_with_an_error(tmp_path):
    run = Folder(tmp_path, total=4, save_every_n_steps=2)
    run.run(4)
    run.broken = "model"
    with pytest.raises(ResourceError, match="step00000004") as caught:
        run.checkpoints.finish(run.state)
    assert caught.value.exit_code == 4
    assert len(run.checkpoints.failures) == 2
    assert run.names() == ["my-step00000002.safetensors", "my-step00000004.safetensors"]


def test_the_second_attempt_at_the_end_may_succeed(tmp_path):
    run = Folder(tmp_path, total=1)
    run.run(1)
    attempts = []

    def save(path: Path) -> None:
        attempts.append(path)
        if len(attempts) == 1:
            raise MemoryError
        run.save_model(path)

    run.checkpoints.save_model = save
    run.checkpoints.finish(run.state)
    assert run.names() == ["my.safetensors"]


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    run = Folder(tmp_path, total=3, save_every_n_steps=1, save_state=True, save_last_n_steps=0)
    run.run(1)
    good = run.names()
    run.weight[1] = torch.nan
    run.run(2)
    with pytest.raises(UserError, match="not finite"):
        run.checkpoints.finish(run.state)
    assert run.names() == good
    assert run.state.last_saved == 1


def test_first_nonfinite():
    good, bad = torch.ones(2), torch.tensor([1.0, torch.inf])
    assert first_nonfinite([]) is None
    assert first_nonfinite([("a", good), ("n", torch.ones(2, dtype=torch.int64))]) is None
    assert first_nonfinite([("a", good), ("b", bad), ("c", bad)]) == "b"
    assert first_nonfinite([("a", torch.ones(2).to(torch.float8_e4m3fn))]) is None


def test_saving_on_request(tmp_path):
    run = Folder(tmp_path)
    run.run(2)
    run.state.requests = Requests(save=True)
    run.checkpoints.after_step(run.state)
    assert run.names() == ["my-step00000002-state", "my-step00000002.safetensors"]


def test_a_stopped_run_keeps_its_weights_and_state_under_a_marked_name(tmp_path):
    run = Folder(tmp_path, save_every_n_steps=3)
    run.run(3)
    run.state.requests = Requests(stop=True)
    run.checkpoints.after_step(run.state)
    assert run.state.finished
    run.checkpoints.finish(run.state)
    assert run.names() == ["my-step00000003-state", "my-step00000003.safetensors"]
    assert len(run.checkpoints.written) == 2


def test_a_stop_at_the_last_step_is_an_ordinary_end(tmp_path):
    run = Folder(tmp_path, total=3)
    run.run(3)
    run.state.requests = Requests(stop=True)
    run.checkpoints.after_step(run.state)
    run.checkpoints.finish(run.state)
    assert run.names() == ["my.safetensors"]
