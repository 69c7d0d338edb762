"""Validation measures the same for the same weights, touches nothing, and fails without harm."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from library.objectives import Flow, FlowSettings
from library.option_groups import ValidationOptions
from library.randomness import Draws
from library.train.state import LossWindow, RunState
from library.train.validation import ERROR_BUDGET, LEVELS, Validation, findings, validation_due
from library.types import Batch, Size

DEVICE = torch.device("cpu")


class Denoiser(nn.Module):
    """A convolution behind a dropout; notes what it is asked."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Dropout(0.5), nn.Conv2d(4, 4, 3, padding=1))
        self.asked: list[tuple[float, Tensor]] = []

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        self.asked += [(float(timestep), row) for timestep, row in zip(timesteps, x, strict=True)]
        return self.net(x)  # type: ignore[no-any-return]


def batch(draws: list[int], side: int = 8) -> Batch:
    size = Size(8 * side, 8 * side)
    return Batch(
        names=[f"{draw}.png" for draw in draws],
        captions=[""] * len(draws),
        latents=Draws(draws).posterior((4, side, side)),
        loss_weights=torch.ones(len(draws)),
        draws=draws,
        image_seeds=draws,
        size=size,
        original_sizes=[size] * len(draws),
        crops=[(0, 0)] * len(draws),
    )


BATCHES = [batch([1, 2]), batch([3]), batch([4, 5, 6], 4)]


def run_of(denoiser: Denoiser, settings: FlowSettings | None = None) -> Any:
    return SimpleNamespace(
        accelerator=SimpleNamespace(device=DEVICE, autocast=nullcontext),
        method=SimpleNamespace(before_batch=lambda _: None, target=lambda noised, *_: noised),
        family=SimpleNamespace(predict=lambda model, x, timesteps, cond: model(x, timesteps)),
        objective=Flow(settings or FlowSettings(model_prediction_type="raw", timestep_sampling="sigmoid")),
        denoiser=denoiser,
        cond=lambda _: {},
        latents=lambda one: one.latents,
    )


def validation(
    denoiser: Denoiser | None = None,
    batches: list[Batch] | None = None,
    settings: FlowSettings | None = None,
    **more: Any,
) -> Validation:
    model = Denoiser() if denoiser is None else denoiser

    @contextmanager
    def evaluating() -> Iterator[None]:
        model.eval()
        yield
        model.train()

    more = {"options": ValidationOptions(validate_every_n_steps=1), **more}
    return Validation(
        run=run_of(model, settings),
        batches=lambda: BATCHES if batches is None else batches,
        evaluating=evaluating,
        **more,
    )


def state_at(step: int) -> RunState:
    return RunState(seed=1, total_steps=100, batches_per_epoch=10, loss=LossWindow(10), step=step)


@pytest.mark.parametrize(
    ("options", "steps", "epochs"),
    [
        ({}, [], [1, 2, 3, 4]),
        ({"validate_every_n_epochs": 2}, [], [2, 4]),
        ({"validate_every_n_steps": 3}, [3, 6], []),
        ({"validate_every_n_steps": 3, "validate_every_n_epochs": 4}, [3, 6], [4]),
        ({"validate_every_n_steps": 0, "validate_every_n_epochs": 0}, [], [1, 2, 3, 4]),
    ],
)
def test_when(options: dict[str, int], steps: list[int], epochs: list[int]) -> None:
    chosen = ValidationOptions(**options)
    assert [step for step in range(1, 8) if validation_due(chosen, step=step)] == steps
    assert [epoch for epoch in range(1, 5) if validation_due(chosen, epoch=epoch)] == epochs


def test_options_without_a_loss_to_go_by() -> None:
    chosen = ValidationOptions(save_best=True, early_stop_patience=3)
    assert [finding.where for finding in findings(chosen, held_out=False)] == ["--save_best", "--early_stop_patience"]
    assert not list(findings(chosen, held_out=True))
    assert not list(findings(ValidationOptions(), held_out=False))


def test_equal_weights_have_equal_losses_and_nothing_random_is_touched() -> None:
    denoiser = Denoiser().train()
    once = validation(denoiser)
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)
    expected = torch.rand(3), random.random(), np.random.rand()
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)
    first = once.measure()
    assert denoiser.training
    assert torch.equal(torch.rand(3), expected[0])
    assert (random.random(), np.random.rand()) == expected[1:]
    assert once.measure() == first
    assert all(parameter.grad is None for parameter in denoiser.parameters())
    with torch.no_grad():
        denoiser.net[1].bias += 0.1
    assert once.measure() != first


@pytest.mark.parametrize(
    ("limits", "timesteps"),
    [({}, [200, 400, 600, 800]), ({"min_timestep": 500, "max_timestep": 502}, [500.4, 500.8, 501.2, 501.6])],
)
def test_every_image_is_seen_at_fixed_timesteps_with_noise_of_its_own(
    limits: dict[str, int], timesteps: list[float]
) -> None:
    denoiser = Denoiser()
    settings = FlowSettings(model_prediction_type="raw", timestep_sampling="sigmoid", ip_noise_gamma=0.5, **limits)
    measured = validation(denoiser, settings=settings).measure()
    assert measured is not None
    assert list(measured.by_timestep) == timesteps
    assert measured.loss == pytest.approx(sum(measured.by_timestep.values()) / LEVELS)
    assert sorted(round(timestep, 1) for timestep, _ in denoiser.asked) == sorted(6 * timesteps)
    latents = {1: BATCHES[0].latents[0], 3: BATCHES[1].latents[0]}  # type: ignore[index]
    noises = []
    for timestep, seen in (denoiser.asked[0], denoiser.asked[2], denoiser.asked[8]):
        sigma = timestep / 1000
        clean = latents[3] if len(noises) == 2 else latents[1]
        noises.append((seen - (1 - sigma) * clean) / sigma)
    assert all(abs(float(noise.std()) - 1) < 0.2 for noise in noises), "without perturbation"
    assert not any(torch.allclose(noises[i], noises[j], atol=0.1) for i, j in ((0, 1), (0, 2), (1, 2)))


def test_the_mean_is_over_images_however_they_lie_in_batches_and_processes() -> None:
    model = Denoiser().eval()
    whole = validation(model)._sums()
    alone = validation(model, batches=[batch([1]), batch([2]), batch([3]), batch([4], 4), batch([5, 6], 4)])._sums()
    assert torch.allclose(whole, alone, rtol=1e-5)
    shares = [validation(model, batches=BATCHES[rank::2])._sums() for rank in range(2)]
    assert torch.allclose(shares[0] + shares[1], whole, rtol=1e-5)
    assert whole[-1] == 6


def test_what_is_logged_and_told(caplog: pytest.LogCaptureFixture) -> None:
    told: list[tuple[int, float]] = []
    lines: list[tuple[int, dict[str, float]]] = []
    made = validation(
        options=ValidationOptions(validate_every_n_steps=10, validate_every_n_epochs=1),
        log=lambda values, step: lines.append((step, dict(values))),
        listeners=[lambda state, loss: told.append((state.step, loss))],
    )
    asked = made.run.denoiser.asked
    state = state_at(9)
    made.after_step(state)
    assert not asked
    state.step = 10
    state.loss.add(torch.tensor(0.25))
    state.loss.close(10)
    state.loss.drain()
    made.after_step(state)
    count = len(asked)
    state.epoch = 2
    made.after_epoch(state)
    assert len(asked) == count, "the weights are the same"
    assert [step for step, _ in lines] == [10, 10]
    loss = told[0][1]
    assert told == [(10, loss)]
    assert lines[0][1] == {
        "loss/validation/step_average": loss,
        "loss/validation/step_divergence": loss - 0.25,
        **{f"loss/validation/timestep_{t}": lines[0][1][f"loss/validation/timestep_{t}"] for t in (200, 400, 600, 800)},
    }
    assert lines[1][1] == {"loss/validation/epoch_average": loss, "loss/validation/epoch_divergence": loss - 0.25}
    resumed = state_at(0)
    resumed.load_state_dict(state.state_dict())
    made.after_epoch(resumed)
    assert len(asked) == count
    assert len(told) == 1


def test_failing_ends_nothing(caplog: pytest.LogCaptureFixture) -> None:
    told: list[float] = []
    made = validation(listeners=[lambda state, loss: told.append(loss)])
    good = made.batches

    def broken() -> list[Batch]:
        raise OSError("no image")

    made.batches = broken
    made.after_step(state_at(1))
    made.batches = good
    made.after_step(state_at(2))
    made.batches = broken
    for step in range(3, 4 + ERROR_BUDGET):
        made.after_step(state_at(step))
    made.batches = good
    made.after_step(state_at(9))
    made.finish(state_at(9))
    assert len(told) == 1
    assert len(made.problems) == 1 + ERROR_BUDGET
    assert "no image" in caplog.text
    assert "switched off" in caplog.text


def test_a_loss_that_is_not_finite_can_be_saved(caplog: pytest.LogCaptureFixture) -> None:
    denoiser = Denoiser()
    with torch.no_grad():
        denoiser.net[1].bias += float("nan")
    told: list[float] = []
    made, state = validation(denoiser, listeners=[lambda state, loss: told.append(loss)]), state_at(1)
    made.after_step(state)
    assert math.isnan(told[0])
    assert state.remembered == {}
