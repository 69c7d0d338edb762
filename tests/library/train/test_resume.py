"""State folders: exact, whole or absent, never pickle."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter, OrderedDict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from library import files
from library.log import DataError, ResourceError, UserError
from library.train import resume
from library.train.ranks import Ranks
from library.train.resume import Parts, begin_at, changed_options, check_state, find_latest, load_state, save_state
from library.train.rng import rng_untouched
from library.train.state import LossWindow, RunState
from library.train.trees import read_tree, write_tree

BATCHES = 4


def build(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Dropout(0.2), nn.Linear(5, 3)).to(dtype)
    params = [
        {"params": list(model[0].parameters()), "lr": 1e-2},
        {"params": list(model[2].parameters()), "lr": 2e-2},
    ]
    return model, OPTIMIZERS[name](params)


def foreign(module: str, name: str, **arguments: object):
    def make(params):
        return getattr(pytest.importorskip(module), name)(params, **arguments)

    return make


OPTIMIZERS = {
    "AdamW": lambda params: torch.optim.AdamW(params, weight_decay=0.01),
    "AdamW foreach": lambda params: torch.optim.AdamW(params, foreach=True, amsgrad=True),
    "SGD": lambda params: torch.optim.SGD(params, momentum=0.9, nesterov=True),
    "Adafactor": foreign("transformers.optimization", "Adafactor", relative_step=False, scale_parameter=False),
    "Lion": foreign("lion_pytorch", "Lion"),
    "Prodigy": foreign("prodigyopt", "Prodigy"),
    "DAdaptAdam": foreign("dadaptation", "DAdaptAdam"),
    "DAdaptSGD": foreign("dadaptation", "DAdaptSGD"),
    "AdamWScheduleFree": foreign("schedulefree", "AdamWScheduleFree", warmup_steps=2),
    "SGDScheduleFree": foreign("schedulefree", "SGDScheduleFree"),
}
EQUAL_RATES = {"Prodigy", "DAdaptAdam", "DAdaptSGD"}


class TinyRun:
    """A run with a network that has dropout, so that the generators matter."""

    def __init__(self, optimizer: str = "AdamW", total: int = 20, dtype: torch.dtype = torch.float32) -> None:
        self.model, self.optimizer = build(optimizer, dtype)
        if optimizer in EQUAL_RATES:
            for group in self.optimizer.param_groups:
                group["lr"] = 1.0
        if hasattr(self.optimizer, "train"):
            self.optimizer.train()
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1 / (1 + step))
        self.state = RunState(seed=3, total_steps=total, batches_per_epoch=BATCHES, loss=LossWindow(BATCHES))
        self.losses: list[float] = []
        torch.manual_seed(5)
        random.seed(5)
        np.random.seed(5)

    @property
    def parts(self) -> Parts:
        return Parts(
            state=self.state,
            model=self.model.state_dict,
            load_model=lambda tensors: self.model.load_state_dict(dict(tensors)),
            optimizers=[self.optimizer],
            schedulers=[self.scheduler],
        )

    def run(self, until: int) -> TinyRun:
        state = self.state
        while state.step < until:
            for index in range(state.batch, BATCHES):
                seeded = torch.Generator().manual_seed(1000 * state.epoch + index)
                x = torch.randn(4, 6, generator=seeded).to(next(self.model.parameters()).dtype)
                loss = (self.model(x + random.random() + np.random.rand()) ** 2).mean().float()
                loss.backward()
                self.optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad()
                state.saw(SimpleNamespace(names=[], epoch=state.epoch, index=index), loss)
                state.stepped()
                self.losses += [(r.step, r.loss, r.average) for r in state.readings]
                if state.step == until:
                    break
            if state.completes_epoch():
                self.losses += [(r.step, r.loss, r.average) for r in state.readings]
        return self


def same(left: object, right: object) -> bool:
    if isinstance(left, torch.Tensor):
        return (
            isinstance(right, torch.Tensor)
            and left.dtype == right.dtype
            and left.shape == right.shape
            and torch.equal(left.nan_to_num(), right.nan_to_num())
        )
    if isinstance(left, dict):
        return isinstance(right, dict) and left.keys() == right.keys() and all(same(left[k], right[k]) for k in left)
    if isinstance(left, (list, tuple)):
        return type(left) is type(right) and len(left) == len(right) and all(map(same, left, right))
    return type(left) is type(right) and (left == right or left != left)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_run_in_three_parts_is_the_run_in_one(tmp_path, optimizer):
    straight = TinyRun(optimizer).run(20)
    parts, losses = None, []
    for stop in (7, 13, 20):
        run = TinyRun(optimizer)
        if parts is not None:
            load_state(parts, run.parts)
        run.run(stop)
        losses += run.losses
        parts = tmp_path / f"state-{stop}"
        save_state(parts, run.parts)
        saved = json.loads((parts / "run.json").read_text(encoding="utf-8"))
        assert saved["step"] == stop
    assert same(dict(straight.model.state_dict()), dict(run.model.state_dict()))
    assert same(straight.optimizer.state_dict(), run.optimizer.state_dict())
    assert same(straight.scheduler.state_dict(), run.scheduler.state_dict())
    assert losses == straight.losses
    assert run.state.loss.average == straight.state.loss.average


@pytest.mark.parametrize("optimizer", ["AdamW", "Adafactor", "Lion"])
def test_half_precision_is_exact_too(tmp_path, optimizer):
    straight = TinyRun(optimizer, dtype=torch.bfloat16).run(9)
    first = TinyRun(optimizer, dtype=torch.bfloat16).run(5)
    save_state(tmp_path / "s", first.parts)
    second = TinyRun(optimizer, dtype=torch.bfloat16)
    load_state(tmp_path / "s", second.parts)
    assert same(first.optimizer.state_dict(), second.optimizer.state_dict())
    second.run(9)
    assert same(dict(straight.model.state_dict()), dict(second.model.state_dict()))


def test_moments_keep_a_dtype_that_differs_from_that_of_the_weights(tmp_path):
    run = TinyRun(dtype=torch.bfloat16).run(2)
    for entry in run.optimizer.state.values():
        entry["exp_avg"] = torch.full_like(entry["exp_avg"], 1 / 3, dtype=torch.float32)
    save_state(tmp_path / "s", run.parts)
    other = TinyRun(dtype=torch.bfloat16)
    load_state(tmp_path / "s", other.parts)
    assert same(run.optimizer.state_dict(), other.optimizer.state_dict())


def test_states_hold_no_pickle_and_front_ends_find_their_file(tmp_path):
    run = TinyRun().run(5)
    save_state(tmp_path / "s", run.parts)
    names = sorted(path.name for path in (tmp_path / "s").iterdir())
    assert {Path(name).suffix for name in names} == {".json", ".safetensors"}
    front_end = json.loads((tmp_path / "s" / "train_state.json").read_text(encoding="utf-8"))
    assert front_end == {"current_epoch": 2, "current_step": 5}
    assert set(files.header(tmp_path / "s" / "model.safetensors").tensors) == set(run.model.state_dict())
    json.loads((tmp_path / "s" / "run.json").read_text(encoding="utf-8"), parse_constant=lambda text: pytest.fail(text))


def test_a_tree_comes_back_as_it_was(tmp_path):
    tree = {
        "none": None,
        "flags": [True, False],
        "numbers": (1, -3, 2**70, 0.1, float("inf"), float("nan"), -0.0),
        3: {"int key": "x", ("a", 1): b"\x00\xff"},
        "text": "日本語 ☃",
        "empty": [{}, [], (), ""],
        "set": {1, 2},
        "counter": Counter({5: 2}),
        "dtype": torch.bfloat16,
        "tensors": [
            torch.arange(6).reshape(2, 3).t(),
            torch.tensor(1.5, dtype=torch.float64),
            torch.zeros(0, 4),
            torch.tensor([1 + 2j]),
            torch.tensor([True]),
            torch.ones(3, dtype=torch.bfloat16),
            torch.ones(3).to(torch.float8_e5m2),
        ],
        "3": torch.tensor([7]),
        "array": np.arange(3, dtype=np.int16),
        "numpy number": np.float64(0.25),
    }
    write_tree(tree, tmp_path, "tree")
    back = read_tree(tmp_path, "tree")
    array, back_array = tree.pop("array"), back.pop("array")
    assert array.dtype == back_array.dtype
    assert array.tolist() == back_array.tolist()
    fp8, back_fp8 = tree["tensors"].pop(), back["tensors"].pop()
    assert back_fp8.dtype == fp8.dtype
    tree["numpy number"] = 0.25
    assert same(tree, back)


def test_tensors_that_share_memory_are_stored(tmp_path):
    base = torch.arange(4.0)
    write_tree({"a": base, "b": base[:2], "c": base.expand(2, 4)}, tmp_path, "tree")
    back = read_tree(tmp_path, "tree")
    assert same(back, {"a": base, "b": base[:2], "c": base.expand(2, 4)})


def test_ordered_dicts_become_dicts(tmp_path):
    write_tree(OrderedDict(b=1, a=2), tmp_path, "tree")
    assert list(read_tree(tmp_path, "tree").items()) == [("b", 1), ("a", 2)]


def test_what_is_not_plain_data_is_refused_with_its_place(tmp_path):
    with pytest.raises(UserError, match="function") as caught:
        write_tree({"groups": [{"hook": lambda: None}]}, tmp_path, "tree")
    assert caught.value.where == "groups/0/hook"


@pytest.mark.parametrize(
    "text", ["", "[", '{"dict": 3}', '{"unknown": []}', '{"tensor": "x", "on": "cpu"}', '{"dtype": "load"}']
)
def test_a_damaged_tree_is_a_data_error(tmp_path, text):
    (tmp_path / "tree.json").write_text(text)
    with pytest.raises(DataError):
        read_tree(tmp_path, "tree")


def saved(folder: Path, until: int = 5, **changes: object) -> Path:
    run = TinyRun().run(until)
    for name, value in changes.items():
        setattr(run.state, name, value)
    save_state(folder, run.parts)
    return folder


def test_changed_options_are_named_and_harmless_ones_are_not(tmp_path, caplog):
    saved(tmp_path / "s", options={"learning_rate": "1e-4", "output_dir": "a", "seed": "1"})
    run = TinyRun()
    run.state.options = {"learning_rate": "2e-4", "output_dir": "b", "seed": "1", "new": "x"}
    load_state(tmp_path / "s", run.parts)
    assert "learning_rate: 1e-4 -> 2e-4; new: - -> x" in caplog.text
    assert "output_dir" not in caplog.text
    assert changed_options({"a": "1"}, {"a": "1"}) == []


def test_another_dataset_starts_the_epoch_anew_at_the_right_step(tmp_path, caplog):
    saved(tmp_path / "s", until=6, dataset="old")
    run = TinyRun()
    run.state.dataset = "new"
    load_state(tmp_path / "s", run.parts)
    assert (run.state.step, run.state.epoch, run.state.batch) == (6, 2, 0)
    assert "dataset changed" in caplog.text


@pytest.mark.parametrize(("world", "accumulation", "batch"), [(1, 2, 4), (2, 1, 2), (1, 1, 0)])
def test_more_or_fewer_processes(tmp_path, caplog, world, accumulation, batch):
    state = RunState(seed=1, total_steps=20, batches_per_epoch=4, loss=LossWindow(2), step=4, epoch=2, batch=4)
    before = {"processes": 1, "accumulation": 2}
    parts = Parts(state=state, model=dict, load_model=lambda _: None, accumulation=accumulation, ranks=Ranks(0, world))
    resume._find_position(state, before, parts, True)
    assert state.batch == batch
    assert ("starts anew" in caplog.text) == (batch == 0)


def test_a_rank_without_saved_generators_gets_its_own(tmp_path):
    saved(tmp_path / "s")
    drawn = []
    for rank in (1, 1, 2):
        run = TinyRun()
        parts = run.parts
        parts.ranks = Ranks(rank, 1)
        load_state(tmp_path / "s", parts)
        drawn.append((random.random(), float(torch.rand(())), float(np.random.rand())))
    assert drawn[0] == drawn[1]
    assert len({*drawn[0], *drawn[2]}) == 6


def test_a_run_that_has_reached_its_end_says_so(tmp_path, caplog):
    saved(tmp_path / "s")
    run = TinyRun(total=5)
    with caplog.at_level("INFO"):
        load_state(tmp_path / "s", run.parts)
    assert run.state.complete
    assert "nothing left to do" in caplog.text


def test_states_of_other_programs_are_refused_with_the_way_out(tmp_path):
    folder = tmp_path / "my-state"
    folder.mkdir()
    for name in ("model.safetensors", "optimizer.bin", "random_states_0.pkl"):
        (folder / name).write_bytes(b"\x80\x04")
    (folder / "train_state.json").write_text('{"current_epoch": 3, "current_step": 123}')
    with pytest.raises(UserError, match="pickle") as caught:
        load_state(folder, TinyRun().parts)
    assert "--network_weights" in caught.value.hint
    assert "--initial_step 123" in caught.value.hint


def test_folders_that_are_no_states(tmp_path):
    with pytest.raises(UserError, match="doesn't exist"):
        check_state(tmp_path / "none")
    with pytest.raises(UserError, match="not a saved state"):
        check_state(tmp_path)


@pytest.mark.parametrize("harm", ["truncate", "remove", "unfinished", "nonsense"])
def test_damaged_states_are_refused(tmp_path, harm):
    folder = saved(tmp_path / "s")
    if harm == "truncate":
        (folder / "optimizer.safetensors").write_bytes(b"")
    if harm == "remove":
        (folder / "rng_0.json").unlink()
    if harm == "unfinished":
        text = (folder / "run.json").read_text(encoding="utf-8").replace('"complete": true', '"complete": false')
        (folder / "run.json").write_text(text, encoding="utf-8")
    if harm == "nonsense":
        (folder / "run.json").write_text("{")
    with pytest.raises(DataError):
        load_state(folder, TinyRun().parts)


def test_a_state_that_does_not_fit_is_refused_with_the_way_out(tmp_path):
    saved(tmp_path / "s")
    run = TinyRun()
    run.optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(2))])
    for options, way in (({}, "from the model"), ({"network_module": "networks.lora"}, "--initial_step 5")):
        run.state.options = options
        with pytest.raises(UserError, match="doesn't fit") as caught:
            load_state(tmp_path / "s", run.parts)
        assert way in caught.value.hint
        assert ("--network_weights" in caught.value.hint) == bool(options)
    other = TinyRun()
    parts = other.parts
    parts.scaler = other.scheduler
    with pytest.raises(UserError, match="no scaler"):
        load_state(tmp_path / "s", parts)


def test_a_failing_save_leaves_the_old_state(tmp_path, monkeypatch):
    folder = saved(tmp_path / "s", until=5)
    run = TinyRun().run(7)
    for breaks in ("write_tree", "rng_state"):
        with monkeypatch.context() as patch:
            patch.setattr(resume, breaks, lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
            with pytest.raises(ResourceError, match="No space left"):
                save_state(folder, run.parts)
        assert check_state(folder)["step"] == 5
        assert [path.name for path in tmp_path.iterdir()] == ["s"]
    save_state(folder, run.parts)
    assert check_state(folder)["step"] == 7
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def bare(step: int) -> Parts:
    state = RunState(seed=3, total_steps=20, batches_per_epoch=BATCHES, loss=LossWindow(BATCHES), step=step)
    return Parts(state=state, model=lambda: {"w": torch.zeros(1)}, load_model=lambda _: None)


class Killed(BaseException):
    """The process ends here and now."""


def test_a_run_killed_at_any_moment_of_a_save_finds_a_complete_state(tmp_path, monkeypatch):
    """Every change of names or folders is a moment to die at, before or after it."""
    early, late = (bare(step) for step in (5, 7))
    moments = 0
    for moment in range(100):
        output = tmp_path / str(moment)
        save_state(output / "my-state", early)
        left = [moment]

        def mortal(act, left=left):
            def call(*arguments, **more):
                if left[0] == 0:
                    raise Killed
                result = act(*arguments, **more)
                left[0] -= 2
                if left[0] == -1:
                    raise Killed
                return result

            return call

        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", mortal(Path.replace))
            patch.setattr(Path, "mkdir", mortal(Path.mkdir))
            patch.setattr(resume.shutil, "rmtree", mortal(shutil.rmtree))
            try:
                save_state(output / "my-state", late)
            except Killed:
                moments += 1
            else:
                break
        found = find_latest(output, "my")
        assert found is not None
        assert check_state(found)["step"] in (5, 7)
        save_state(output / "my-state", late)
        assert [path.name for path in output.iterdir()] == ["my-state"]
    assert moments > 10


def test_the_newest_complete_state_is_found(tmp_path):
    assert find_latest(tmp_path / "none", "my") is None
    assert find_latest(tmp_path, "my") is None
    for number, name in enumerate(
        ["my-step00000003-state", "my-000002-state", "my-state", "my-2-state", "my-step00000009"]
    ):
        folder = saved(tmp_path / name)
        text = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        (folder / "run.json").write_text(json.dumps(text | {"saved_at": 100 + number}), encoding="utf-8")
    assert find_latest(tmp_path, "my") == tmp_path / "my-state"
    (tmp_path / "my-state" / "model.safetensors").unlink()
    assert find_latest(tmp_path, "my") == tmp_path / "my-000002-state"
    shutil.move(tmp_path / "my-000002-state", tmp_path / "my-000002-state.old")
    assert find_latest(tmp_path, "my") == tmp_path / "my-000002-state.old"
    assert find_latest(tmp_path, "my-2") == tmp_path / "my-2-state"
    assert find_latest(tmp_path, None) is None


@pytest.mark.parametrize(
    ("initial_step", "initial_epoch", "skip", "wanted"),
    [
        (None, None, False, (0, 1, 0)),
        (7, None, False, (7, 3, 0)),
        (7, None, True, (7, 3, 2)),
        (None, 3, True, (6, 3, 0)),
        (4, 3, True, (4, 2, 2)),
    ],
)
def test_beginning_at_a_step_or_epoch(initial_step, initial_epoch, skip, wanted):
    state = RunState(seed=1, total_steps=20, batches_per_epoch=6, loss=LossWindow(3))
    begin_at(state, initial_step, initial_epoch, skip, 2)
    assert (state.step, state.epoch, state.batch) == wanted


@pytest.mark.parametrize(("step", "epoch"), [(20, None), (-1, None), (None, 99), (None, 0)])
def test_beginning_behind_the_end_is_an_error(step, epoch):
    state = RunState(seed=1, total_steps=20, batches_per_epoch=6, loss=LossWindow(3))
    with pytest.raises(UserError, match="begin at step"):
        begin_at(state, step, epoch, False, 2)


def draw_and_fail() -> None:
    with rng_untouched():
        torch.rand(3), random.random(), np.random.rand()
        raise ValueError("in between")


def test_generators_are_left_as_they_were():
    torch.manual_seed(1)
    with pytest.raises(ValueError, match="in between"):
        draw_and_fail()
    first = torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(first, torch.rand(3))
