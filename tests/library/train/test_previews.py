"""Sample pictures: when, under which names, and that nothing there harms the training."""

from __future__ import annotations

import random
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from PIL import Image

from library.sampling import SampleRequest
from library.train.previews import ERROR_BUDGET, Previews, sample_due
from library.train.ranks import Ranks
from library.train.state import LossWindow, Requests, RunState


@dataclass(frozen=True)
class Options:
    sample_prompts: str | None
    sample_every_n_steps: int | None = None
    sample_every_n_epochs: int | None = None
    sample_at_first: bool = False


def parse(path: Path) -> list[SampleRequest]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return [SampleRequest(prompt=line, seed=7 if index else None, index=index) for index, line in enumerate(lines)]


class Sampling:
    """Previews with a renderer that draws numbers, and fails on demand."""

    def __init__(self, tmp_path: Path, prompts: str = "a cat\na dog", **options: object) -> None:
        self.prompts = tmp_path / "prompts.txt"
        self.prompts.write_text(prompts, encoding="utf-8")
        self.broken, self.rendered, self.grads, self.pictures, self.evaluations = False, 0, [], [], []
        more = {name: options.pop(name) for name in ("ranks",) if name in options}
        self.previews = Previews(
            options=Options(str(self.prompts), **options),
            output_dir=tmp_path / "out",
            output_name="my",
            parse=parse,
            render=self.render,
            evaluating=self.evaluating,
            trackers=self,
            **more,
        )
        self.state = RunState(seed=1, total_steps=100, batches_per_epoch=4, loss=LossWindow(4))

    @contextmanager
    def evaluating(self):
        self.evaluations.append("in")
        yield
        self.evaluations.append("out")

    def picture(self, tag: str, picture: Image.Image, caption: str, step: int) -> None:
        self.pictures.append((tag, caption, step))

    def render(self, request: SampleRequest, index: int) -> Image.Image:
        torch.rand(3), random.random()
        self.rendered += 1
        self.grads.append(torch.is_grad_enabled())
        if self.broken:
            raise RuntimeError("out of memory")
        return Image.new("RGB", (32, 48), "red")

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.state.step += 1
            self.state.batch += 1
            self.state.requests = Requests()
            self.previews.after_step(self.state)
            if self.state.completes_epoch():
                self.previews.after_epoch(self.state)

    def names(self) -> list[str]:
        folder = self.previews.folder
        return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


@pytest.mark.parametrize(
    ("options", "steps", "epochs"),
    [
        ({}, [], []),
        ({"sample_at_first": True}, [0], []),
        ({"sample_every_n_steps": 4}, [4, 8], []),
        ({"sample_every_n_epochs": 2}, [], [2, 4]),
        ({"sample_every_n_epochs": 2, "sample_every_n_steps": 4}, [], [2, 4]),
        ({"sample_every_n_steps": 0, "sample_every_n_epochs": -1}, [], []),
    ],
)
def test_when(options, steps, epochs):
    group = Options("p", **options)
    assert [step for step in range(9) if sample_due(group, step=step)] == steps
    assert [epoch for epoch in range(1, 5) if sample_due(group, epoch=epoch)] == epochs


def test_names_trackers_and_overview(tmp_path):
    sampling = Sampling(tmp_path, sample_every_n_steps=4, sample_at_first=True)
    sampling.previews.begin(sampling.state)
    sampling.run(5)
    names = sampling.names()
    assert len(names) == 5
    assert [name[:13] for name in names[:4]] == ["my_000000_00_", "my_000000_01_", "my_000004_00_", "my_000004_01_"]
    assert [name.endswith("_7.png") for name in names[:4]] == [False, True, False, True]
    assert names[4] == "my_overview.png"
    assert sampling.pictures[2:] == [("sample_0", "a cat", 4), ("sample_1", "a dog", 4)]
    with Image.open(sampling.previews.folder / names[0]) as picture:
        assert picture.size == (32, 48)
    assert sampling.previews.problems == []


def test_names_by_epoch(tmp_path):
    sampling = Sampling(tmp_path, sample_every_n_epochs=1)
    sampling.run(4)
    assert sampling.names()[0].startswith("my_e000001_00_")


def test_a_resumed_run_makes_no_first_samples(tmp_path):
    sampling = Sampling(tmp_path, sample_at_first=True)
    sampling.state.step = 3
    sampling.previews.begin(sampling.state)
    assert sampling.names() == []


def test_on_request(tmp_path):
    sampling = Sampling(tmp_path)
    sampling.state.step = 3
    sampling.state.requests = Requests(sample=True)
    sampling.previews.after_step(sampling.state)
    assert len(sampling.names()) == 3


@pytest.mark.parametrize("broken", [False, True])
def test_the_training_does_not_notice(tmp_path, broken):
    sampling = Sampling(tmp_path)
    sampling.broken = broken
    torch.manual_seed(3)
    random.seed(3)
    wanted = (torch.rand(2).tolist(), random.random())
    torch.manual_seed(3)
    random.seed(3)
    sampling.previews.make(1)
    assert (torch.rand(2).tolist(), random.random()) == wanted
    assert sampling.rendered == 2
    assert sampling.grads == [False] * 2
    assert torch.is_grad_enabled()
    assert sampling.evaluations == ["in", "out"]


def test_one_failing_picture_does_not_stop_the_others(tmp_path, caplog):
    sampling = Sampling(tmp_path)
    render = sampling.previews.render
    sampling.previews.render = lambda request, index: render(request, index) if index else 1 / 0
    assert len(sampling.previews.make(1)) == 1
    assert "sample 0 at step 1 failed: ZeroDivisionError" in caplog.text
    sampling.previews.finish(sampling.state)
    assert "samples that failed" in caplog.text


def test_sampling_is_given_up_when_nothing_works(tmp_path, caplog):
    sampling = Sampling(tmp_path, sample_every_n_steps=1)
    sampling.broken = True
    sampling.run(10)
    assert sampling.rendered == 2 * ERROR_BUDGET
    assert "switched off" in caplog.text
    assert sampling.names() == []


def test_a_failing_evaluation_mode_does_not_stop_the_training(tmp_path):
    sampling = Sampling(tmp_path)
    sampling.previews.evaluating = lambda: 1 / 0
    assert sampling.previews.make(1) == []


def test_a_changed_prompt_file_is_read_again_and_a_broken_one_is_not(tmp_path, caplog):
    sampling = Sampling(tmp_path)
    sampling.previews.begin(sampling.state)
    sampling.prompts.write_text("a bird", encoding="utf-8")
    sampling.previews.make(1)
    assert [request.prompt for request in sampling.previews.requests] == ["a bird"]
    sampling.prompts.write_bytes(b"\x83\xff broken")
    assert len(sampling.previews.make(2)) == 1
    assert "going on with the 1 prompts from before" in caplog.text
    sampling.prompts.unlink()
    assert len(sampling.previews.make(3)) == 1
    sampling.prompts.write_text("one\ntwo\nthree", encoding="utf-8")
    assert len(sampling.previews.make(4)) == 3


def test_only_the_main_process_makes_pictures(tmp_path):
    sampling = Sampling(tmp_path, ranks=Ranks(1, 1), sample_at_first=True)
    sampling.previews.begin(sampling.state)
    assert sampling.previews.make(1) == []


def test_without_prompts_there_are_no_pictures(tmp_path):
    sampling = Sampling(tmp_path, prompts="", sample_every_n_steps=1)
    sampling.run(2)
    sampling.previews.options = Options(None, sample_every_n_steps=1)
    sampling.run(2)
    assert sampling.names() == []


def test_a_failing_overview_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr("library.train.previews.overview", lambda *_: 1 / 0)
    sampling = Sampling(tmp_path)
    assert len(sampling.previews.make(1)) == 2
    assert len(sampling.previews.make(2)) == 2
    assert len(sampling.previews.problems) == 1
