"""Numbers reach the trackers, secrets don't, and a broken tracker stops nothing."""

from __future__ import annotations

import json
import math
import sys
import time
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from library.log import UserError
from library.train.ranks import Ranks
from library.train.state import LossWindow, RunState
from library.train.trackers import (
    ProgressLine,
    Trackers,
    kinds_wanted,
    learning_rates,
    open_trackers,
    public_config,
    run_folder,
)


@dataclass(frozen=True)
class Options:
    logging_dir: str | None = None
    log_with: str | None = None
    log_prefix: str | None = None
    log_tracker_name: str | None = None
    log_tracker_config: str | None = None
    wandb_run_name: str | None = None
    wandb_api_key: str | None = None
    log_config: bool = False


class Kept:
    """A tracker that keeps what it gets, or fails."""

    name = "kept"

    def __init__(self, broken: bool = False) -> None:
        self.records: list[tuple[int, dict[str, float]]] = []
        self.pictures: list[tuple[str, str, int]] = []
        self.closed, self.broken = False, broken

    def log(self, values, step):
        if self.broken:
            raise ConnectionError("no network")
        self.records.append((step, dict(values)))

    def picture(self, tag, picture, caption, step):
        self.pictures.append((tag, caption, step))

    def close(self):
        self.closed = True


class Quiet(ProgressLine):
    def begin(self, step):
        self.updates = []

    def update(self, step, epoch, numbers):
        self.updates.append((step, epoch, dict(numbers)))


def train(trackers: Trackers, steps: int = 5, per_epoch: int = 2, step: int = 0) -> RunState:
    state = RunState(seed=1, total_steps=steps, batches_per_epoch=per_epoch, loss=LossWindow(per_epoch), step=step)
    trackers.begin(state)
    while not state.finished:
        batch = SimpleNamespace(names=[], epoch=state.epoch, index=state.batch)
        state.saw(batch, torch.tensor(float(state.step + 1)))
        state.stepped({"grad_norm": torch.tensor(0.5)})
        trackers.after_step(state)
        if state.completes_epoch():
            trackers.after_epoch(state)
    state.finish()
    trackers.finish(state)
    return state


def test_every_step_is_logged_once_with_its_own_numbers():
    kept, progress = Kept(), Quiet(total=5)
    calls = []

    def rates():
        calls.append(0)
        return {"lr/unet": float(len(calls))}

    train(Trackers(trackers=[kept], progress=progress, rates=rates))
    steps = [(step, values) for step, values in kept.records if "loss/current" in values]
    assert [step for step, _ in steps] == [1, 2, 3, 4, 5]
    assert [values["loss/current"] for _, values in steps] == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert [values["loss/average"] for _, values in steps] == [1.0, 1.5, 2.5, 3.5, 4.5]
    assert [values["lr/unet"] for _, values in steps] == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert [values["epoch"] for _, values in steps] == [1, 1, 2, 2, 3]
    assert all(values["grad_norm"] == 0.5 for _, values in steps)
    epochs = [(step, values) for step, values in kept.records if "loss/epoch_average" in values]
    assert epochs == [(2, {"loss/epoch_average": 1.5, "epoch": 1.0}), (4, {"loss/epoch_average": 3.5, "epoch": 2.0})]
    assert kept.closed
    assert progress.updates[-1][0] == 5


def test_a_broken_tracker_is_dropped_and_the_others_go_on(caplog):
    broken, kept = Kept(broken=True), Kept()
    trackers = Trackers(trackers=[broken, kept], progress=Quiet(total=5))
    train(trackers)
    assert len(kept.records) == 7
    assert trackers.dropped == ["kept (ConnectionError: no network)"]
    assert caplog.text.count("is switched off") == 1


def test_other_processes_log_nothing():
    kept = Kept()
    train(Trackers(trackers=[kept], progress=Quiet(total=5), ranks=Ranks(1, 1)))
    assert kept.records == []


def test_json_lines_and_tensorboard(tmp_path):
    folder = tmp_path / "ログ лог"
    options = Options(logging_dir=str(folder), log_prefix="run-", log_config=True)
    config = {"learning_rate": 1e-4, "output_dir": "/home/somebody/secret project"}
    opened = open_trackers(options, config=config, project="network_train")
    assert [tracker.name for tracker in opened] == ["log.jsonl", "tensorboard"]
    trackers = Trackers(trackers=opened, progress=Quiet(total=2))
    trackers.picture("sample_0", Image.new("RGB", (8, 8)), "a cat", 1)
    state = train(trackers, steps=2)
    assert not trackers.dropped
    assert state.complete
    (run,) = folder.iterdir()
    assert run.name.startswith("run-2")
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert lines[0] == {"config": {"learning_rate": 1e-4, "output_dir": "secret project"}}
    assert [(line["step"], line["loss/current"]) for line in lines[1:3]] == [(1, 1.0), (2, 2.0)]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "network_train"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss/current")] == [(1, 1.0), (2, 2.0)]
    assert events.Tags()["images"] == ["sample_0"]
    everything = b"".join(path.read_bytes() for path in run.rglob("*") if path.is_file())
    assert b"somebody" not in everything


def test_a_loss_that_is_not_finite_is_valid_json(tmp_path):
    (tracker, *_) = open_trackers(Options(logging_dir=str(tmp_path), log_with="wandb"), config={}, project="p")
    tracker.log({"loss": math.nan, "other": math.inf}, 1)
    tracker.close()
    (path,) = tmp_path.rglob("log.jsonl")
    line = json.loads(path.read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert (line["loss"], line["other"]) == (None, None)


class FakeWandb(SimpleNamespace):
    """What is used of wandb."""

    def __init__(self) -> None:
        super().__init__(logs=[], argv=None, arguments={}, key=None, finished=False)
        self.Settings = lambda **values: values
        self.Image = lambda picture, caption: ("image", caption)

    def login(self, key):
        self.key = key

    def init(self, **arguments):
        self.argv, self.arguments = list(sys.argv), arguments
        return SimpleNamespace(
            log=lambda values, commit=True: self.logs.append((values, commit)),
            finish=lambda: setattr(self, "finished", True),
        )

    def define_metric(self, name, step_metric):
        self.metric = (name, step_metric)


def test_wandb_sees_no_command_line(monkeypatch, tmp_path):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(sys, "argv", ["/home/me/train.py", "--wandb_api_key", "SECRET"])
    options = Options(log_with="wandb", wandb_api_key="SECRET", wandb_run_name="first", log_config=True)
    (tracker,) = open_trackers(options, config={"t5xxl": "C:\\Users\\me\\t5.safetensors"}, project="network_train")
    assert fake.argv == ["train.py"]
    assert sys.argv[-1] == "SECRET"
    assert fake.key == "SECRET"
    assert fake.arguments["project"] == "network_train"
    assert fake.arguments["name"] == "first"
    assert fake.arguments["settings"]["x_disable_meta"]
    assert fake.arguments["settings"]["console"] == "off"
    assert fake.arguments["config"] == {"t5xxl": "t5.safetensors"}
    trackers = Trackers(trackers=[tracker], progress=Quiet(total=3))
    trackers.picture("sample_0", Image.new("RGB", (8, 8)), "a cat", 3)
    train(trackers, steps=3)
    assert fake.logs[0] == ({"sample_0": ("image", "a cat"), "global_step": 3}, False)
    assert [values["global_step"] for values, _ in fake.logs if "loss/current" in values] == [1, 2, 3]
    assert fake.metric == ("*", "global_step")
    assert fake.finished


def test_a_tracker_that_cannot_be_opened_is_left_out(monkeypatch, tmp_path, caplog):
    fake = FakeWandb()
    fake.init = lambda **_: (_ for _ in ()).throw(RuntimeError("bad key SECRET"))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    options = Options(log_with="wandb", wandb_api_key="SECRET")
    assert open_trackers(options, config={}, project="p") == []
    assert "can't be opened" in caplog.text
    assert "SECRET" not in caplog.text


def test_tracker_settings_win_over_the_name_of_the_run(monkeypatch, tmp_path):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    settings = tmp_path / "tracker.toml"
    settings.write_text('[wandb]\nentity = "team"\n', encoding="utf-8")
    options = Options(
        log_with="wandb", wandb_run_name="used", log_tracker_config=str(settings), log_tracker_name="mine"
    )
    open_trackers(options, config={"a": 1}, project="network_train")
    assert fake.arguments["entity"] == "team"
    assert fake.arguments["name"] == "used"
    assert fake.arguments["project"] == "mine"
    assert fake.arguments["config"] == {}
    settings.write_text("[wandb", encoding="utf-8")
    with pytest.raises(UserError, match="tracker settings"):
        open_trackers(options, config={}, project="p")


@pytest.mark.parametrize(
    ("options", "kinds"),
    [
        (Options(), set()),
        (Options(logging_dir="x"), {"tensorboard"}),
        (Options(log_with="wandb"), {"wandb"}),
        (Options(logging_dir="x", log_with="all"), {"tensorboard", "wandb"}),
    ],
)
def test_which_trackers(options, kinds):
    assert kinds_wanted(options) == kinds


def test_the_folder_of_a_run():
    moment = time.struct_time((2026, 1, 2, 3, 4, 5, 0, 0, 0))
    assert run_folder(Options(logging_dir="logs", log_prefix="p_"), moment).name == "p_20260102030405"
    assert run_folder(Options()) is None


def test_what_trackers_may_see():
    seen = public_config(
        {
            "none": None,
            "number": 1,
            "flag": True,
            "path": "/home/me/out/",
            "windows": r"D:\me\my model.safetensors",
            "network_args": ["conv_dim=4", "path=/home/me/x.txt"],
            "table": {"root": "/home/me/y"},
        }
    )
    assert "none" not in seen
    assert seen["flag"] is True
    assert seen["path"] == "out"
    assert seen["windows"] == "my model.safetensors"
    assert seen["network_args"] == "conv_dim=4, path=x.txt"
    assert "home" not in str(seen)


def test_learning_rates():
    groups = [{"lr": 0.1}, {"lr": 1.0, "d": 0.01}, {"lr": None}, {"lr": 1.0, "scheduled_lr": 0.25}]
    assert learning_rates(groups, ["unet", "text", "auto", "free"], lambda: [0, 0, 0.125, 0]) == {
        "lr/unet": 0.1,
        "lr/text": 1.0,
        "lr/d*lr/text": 0.01,
        "lr/auto": 0.125,
        "lr/free": 0.25,
    }


def test_lines_instead_of_a_bar(caplog):
    from rich.console import Console

    clock = SimpleNamespace(now=0.0)
    line = ProgressLine(total=100, console=Console(force_terminal=False), every_seconds=30, clock=lambda: clock.now)
    with caplog.at_level("INFO"):
        line.begin(0)
        for step in range(1, 101):
            clock.now = step * 2.0
            line.update(step, 1, {"loss": 0.5, "lr": 1e-4})
    texts = [record.getMessage() for record in caplog.records]
    assert texts[0] == "step 1/100, epoch 1, 2.00 s/it, 0:03:18 left, loss 0.5, lr 0.0001"
    assert [text.split(",")[0] for text in texts[1:3]] == ["step 16/100", "step 31/100"]
    assert texts[-1].startswith("step 100/100")


def test_the_bar():
    import io

    from rich.console import Console

    screen = io.StringIO()
    line = ProgressLine(total=10, console=Console(file=screen, force_terminal=True, width=120))
    line.begin(3)
    line.update(4, 1, {"loss": 0.25})
    line.end()
    assert "4/10" in screen.getvalue()
    assert "loss 0.25" in screen.getvalue()
