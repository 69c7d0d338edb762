"""Recorded batches train as plain ones do; a recorder that repeats on the CPU stands in for that of a GPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from library import bands, options
from library.option_groups import FLUX_TRAIN, FLUX_TRAIN_NETWORK
from library.train import graphs
from library.train.graphs import MOST_MOVES, REHEARSALS, Recorded, signature
from library.train.loop import BatchLoss, Run, Task, learn
from library.types import Chance, Noised
from tests.cells import MakeCell, assert_same
from tests.test_cells import StopAt, _stop_at

__all__ = ["_stop_at"]

Compute = Callable[[], BatchLoss]


class Repeating:
    """Computes again what was recorded. What earlier repetitions gave is overwritten, as on a GPU."""

    def __init__(self) -> None:
        self.rehearsed = self.recorded = self.repeated = self.forgotten = 0
        self._given: list[BatchLoss] = []

    def rehearse(self, compute: Compute) -> tuple[BatchLoss, str]:
        self.rehearsed += 1
        return compute(), ""

    def record(self, compute: Compute) -> tuple[Callable[[], None], BatchLoss]:
        self.recorded += 1
        given = BatchLoss(torch.zeros(()), torch.zeros(bands.NUMBERS))
        self._given.append(given)

        def repeat() -> None:
            self.repeated += 1
            for tensor in (tensor for loss in self._given for tensor in loss):
                tensor.fill_(torch.nan)
            with torch.enable_grad():
                found = compute()
            given.share.copy_(found.share)
            given.bands.copy_(found.bands)

        return repeat, given

    def forget(self) -> None:
        self.forgotten += 1
        self._given.clear()


class Broken(Repeating):
    """Fails at some recording."""

    def __init__(self, error: RuntimeError, at: int = 1) -> None:
        super().__init__()
        self.error, self.at = error, at

    def record(self, compute: Compute) -> tuple[Callable[[], None], BatchLoss]:
        if self.recorded + 1 == self.at:
            raise self.error
        return super().record(compute)


class Waiting(Repeating):
    """Finds something against recording."""

    def rehearse(self, compute: Compute) -> tuple[BatchLoss, str]:
        return super().rehearse(compute)[0], "the host waits"


class Denoiser(nn.Module):
    """One weight that always counts, one that counts for wide images only, and one that never does."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.always, self.wide, self.never = (nn.Parameter(torch.randn(4, 4)) for _ in range(3))

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        weight = self.always + self.wide if x.shape[-1] > 2 else self.always
        return torch.einsum("oc,bchw->bohw", weight, x) * torch.sin(timesteps)[:, None, None, None]


class Training:
    """A tiny model and what trains it."""

    def __init__(self, learns: Callable[[Run, Task], BatchLoss] = learn) -> None:
        self.model, self.learn = Denoiser(), learns
        self.params = list(self.model.parameters())
        self.optimizer = torch.optim.AdamW(self.params, lr=0.1, weight_decay=0.5)
        self.run: Any = SimpleNamespace(
            accelerator=SimpleNamespace(autocast=nullcontext, backward=lambda loss: loss.backward()),
            family=SimpleNamespace(predict=lambda model, x, timesteps, cond: model(x + cond["shift"], timesteps)),
            objective=SimpleNamespace(loss=self._loss),
            method=SimpleNamespace(parameters=lambda: self.params),
            denoiser=self.model,
        )

    @staticmethod
    def _loss(prediction: Tensor, noised: Noised, mask: Tensor | None) -> Tensor:
        difference = (prediction - noised.target) ** 2
        return (difference if mask is None else difference * mask).mean((1, 2, 3)) * noised.weight

    def steps(self, tasks: Iterable[Task], every: int = 1) -> list[BatchLoss]:
        """What the batches lost; an optimizer step after so many of them."""
        losses = []
        for number, task in enumerate(tasks, start=1):
            losses.append(self.learn(self.run, task))
            if number % every == 0:
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
        return losses


def task(number: int, width: int = 2, *, masked: bool = False, multiplier: float = 1.0) -> Task:
    generator = torch.Generator().manual_seed(number)
    latents, noise, shift = torch.randn(3, 2, 4, 2, width, generator=generator).unbind()
    timesteps, weight = torch.rand(2, 2, generator=generator).unbind()
    noised = Noised(latents=latents, input=noise, target=latents, timesteps=timesteps * 1000, weight=weight)
    mask = torch.rand(2, 1, 2, width, generator=generator) if masked else None
    weights = torch.full((2,), 0.5)
    return Task(noised=noised, cond={"shift": shift}, weights=weights, mask=mask, multiplier=multiplier)


WIDTHS = [2, 2, 3, 2, 3, 2, 3, 3, 2, 2, 3, 2, 4, 2, 3, 4, 2, 4, 4, 2, 3, 4, 4, 2]
"""Sizes of batches: rehearsed, recorded and repeated ones in every order."""


def tasks() -> list[Task]:
    return [task(number, width, masked=number % 3 == 0) for number, width in enumerate(WIDTHS)]


def same(one: Training, other: Training) -> bool:
    return all(map(torch.equal, one.params, other.params))


@pytest.mark.parametrize("every", [1, 2, 3])
def test_recorded_batches_train_the_same_to_the_last_bit(every: int) -> None:
    recorder = Repeating()
    plain, recorded = Training(), Training(Recorded(recorder))
    wanted, found = plain.steps(tasks(), every), recorded.steps(tasks(), every)
    assert same(plain, recorded)
    assert all(torch.equal(*pair) for losses in zip(wanted, found, strict=True) for pair in zip(*losses, strict=True))
    batches = Counter(map(signature, tasks()))
    assert recorder.recorded == sum(count > REHEARSALS for count in batches.values()) > 2
    assert recorder.repeated == sum(max(count - REHEARSALS, 0) for count in batches.values())


def test_a_parameter_without_a_gradient_keeps_having_none() -> None:
    recorded = Training(Recorded(Repeating()))
    recorded.steps([task(number) for number in range(REHEARSALS + 2)], every=100)
    always, wide, never = recorded.params
    assert always.grad is not None
    assert wide.grad is never.grad is None


def test_gradients_lie_in_one_place_whatever_the_shape() -> None:
    recorded = Training(Recorded(Repeating()))
    places = set()
    for number, width in enumerate([3] * 4 + [4] * 4):
        recorded.learn(recorded.run, task(number, width))
        if number % 4 >= REHEARSALS:
            places.add(tuple(parameter.grad.data_ptr() for parameter in recorded.params[:2]))  # type: ignore[union-attr]
        recorded.optimizer.zero_grad(set_to_none=True)
    assert len(places) == 1


@pytest.mark.parametrize("at", [1, 2])
@pytest.mark.parametrize("kind", [RuntimeError, torch.OutOfMemoryError])
def test_where_recording_fails_all_is_computed_as_usual(
    kind: type[RuntimeError], at: int, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = Broken(kind("operation not permitted\nmore"), at)
    plain, recorded = Training(), Training(Recorded(recorder))
    plain.steps(tasks(), 2)
    recorded.steps(tasks(), 2)
    assert same(plain, recorded)
    assert (recorder.recorded, recorder.forgotten) == (at - 1, 1)
    (line,) = caplog.messages
    assert line.startswith("--cuda_graphs: nothing is recorded")
    assert line.endswith("operation not permitted")


def test_what_waits_is_not_recorded(caplog: pytest.LogCaptureFixture) -> None:
    recorder = Waiting()
    plain, recorded = Training(), Training(Recorded(recorder))
    plain.steps(tasks())
    recorded.steps(tasks())
    assert same(plain, recorded)
    assert (recorder.recorded, len(caplog.messages)) == (0, 1)


def test_weights_that_lie_elsewhere_are_recorded_anew(caplog: pytest.LogCaptureFixture) -> None:
    recorder = Repeating()
    plain, recorded = Training(), Training(Recorded(recorder))
    for number in range(REHEARSALS + MOST_MOVES + 3):
        for training in (plain, recorded):
            training.steps([task(number)])
        if number >= REHEARSALS:
            recorded.params[0].data = recorded.params[0].data.clone()
    assert same(plain, recorded)
    assert recorder.recorded == 1 + MOST_MOVES
    assert len(caplog.messages) == 1
    assert "change their place" in caplog.text


def test_the_signature_is_all_that_a_recording_depends_on() -> None:
    one = task(1)
    assert signature(one) == signature(task(2))
    doubled = one.changed(lambda tensor: tensor.double())
    others = [task(1, 3), task(1, masked=True), task(1, multiplier=0.5), doubled, replace(one, cond={})]
    assert len({signature(one), *map(signature, others)}) == 6


# who records


def method(chance: Chance = Chance.NOWHERE, *encoders: str) -> Any:
    return SimpleNamespace(chance=lambda: chance, trained_encoders=lambda: set(encoders))


@pytest.mark.parametrize(
    ("words", "method", "device", "said"),
    [
        ((), method(), "cuda", None),
        (("--cuda_graphs",), method(), "cpu", "Nvidia"),
        (("--cuda_graphs",), method(Chance.NOWHERE, "clip_l"), "cuda", "text encoders"),
        (("--cuda_graphs",), method(Chance.HOST), "cuda", "by chance"),
        (("--cuda_graphs", "--gradient_checkpointing"), method(Chance.DEVICE), "cuda", "dropouts"),
        (("--cuda_graphs", "--blocks_to_swap", "1"), method(), "cuda", None),  # which was said before
    ],
)
def test_what_cannot_be_recorded_is_said_in_one_line(
    words: tuple[str, ...], method: Any, device: str, said: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    found = graphs.learner(options.parse(FLUX_TRAIN_NETWORK, [*words]), method, torch.device(device))
    assert found is learn
    assert len(caplog.messages) == (said is not None)
    assert said is None or said in caplog.text


@pytest.mark.parametrize("words", [(), ("--gradient_checkpointing",)])
@pytest.mark.parametrize("script", [FLUX_TRAIN_NETWORK, FLUX_TRAIN])
def test_all_else_is_recorded(script: Any, words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "DeviceRecorder", lambda device: Repeating())
    given = options.parse(script, ["--cuda_graphs", *words])
    chance = Chance.NOWHERE if words else Chance.DEVICE
    assert isinstance(graphs.learner(given, method(chance), torch.device("cuda")), Recorded)


# the scripts


@pytest.fixture
def recorders(monkeypatch: pytest.MonkeyPatch) -> list[Repeating]:
    """Those of the runs with `--cuda_graphs`."""
    made: list[Repeating] = []

    def make(given: Any, *_: object) -> Callable[[Run, Task], BatchLoss]:
        if not given.value("cuda_graphs"):
            return learn
        made.append(Repeating())
        return Recorded(made[-1])

    monkeypatch.setattr(graphs, "learner", make)
    return made


STEPS = ("--max_train_steps", "9", "--gradient_accumulation_steps", "2")


@pytest.mark.parametrize("cell", ["lora, all cached", "full, all cached"])
def test_a_script_trains_the_same_and_resumes_exactly(
    make_cell: MakeCell, recorders: list[Repeating], cell: str
) -> None:
    """With dropouts, whose numbers are drawn in the same order, and an average that takes the weights' place."""
    more = (*STEPS, "--ema_decay", "0.5", "--save_every_n_steps", "6", "--save_state")
    plain, recorded, broken = (make_cell(cell, name) for name in ("plain", "recorded", "broken"))
    plain(*more)
    recorded(*more, "--cuda_graphs")
    StopAt.step = 6
    broken(*more, "--cuda_graphs")
    StopAt.step = -1
    broken(*more, "--cuda_graphs", "--resume", "auto")
    assert_same(plain.weights(), recorded.weights())
    assert_same(plain.weights(), broken.weights())
    assert_same(plain.weights("run-ema"), recorded.weights("run-ema"))
    assert all(recorder.repeated > recorder.recorded for recorder in recorders[:2])
    assert not any(recorder.forgotten for recorder in recorders)
