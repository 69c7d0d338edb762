"""Where the run is, and the loss that is read one step late."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch

from library.log import UserError
from library.train.state import LossWindow, Requests, RunState


def batch(index: int, epoch: int = 1, names: tuple[str, ...] = ("a.png",)) -> SimpleNamespace:
    return SimpleNamespace(index=index, epoch=epoch, names=names)


def begin(**more: object) -> RunState:
    return RunState(**{"seed": 1, "total_steps": 100, "batches_per_epoch": 4, "loss": LossWindow(4), **more})


def test_a_loss_is_known_one_step_late():
    window = LossWindow(3)
    window.add(torch.tensor(1.0))
    assert window.close(1) == []
    window.add(torch.tensor(2.0))
    (reading,) = window.close(2)
    assert (reading.step, reading.loss, reading.average) == (1, 1.0, 1.0)
    assert [reading.step for reading in window.drain()] == [2]
    assert window.drain() == []


def test_the_shares_of_a_step_add_up():
    window = LossWindow(3)
    window.add(torch.tensor(1.0), ["a"])
    window.add(torch.tensor(0.5), ["b"])
    window.close(1, {"grad_norm": torch.tensor(7.0), "max_norm/keys_scaled": 3})
    (reading,) = window.drain()
    assert reading.loss == 1.5
    assert reading.metrics == {"grad_norm": 7.0, "max_norm/keys_scaled": 3.0}
    assert reading.names == ("a", "b")


def test_the_average_is_one_epoch_long():
    losses, window = [float(n * n) for n in range(1, 10)], LossWindow(3)
    for step, loss in enumerate(losses, start=1):
        window.add(torch.tensor(loss))
        window.close(step)
        window.drain()
        last = losses[max(0, step - 3) : step]
        assert window.average == pytest.approx(sum(last) / len(last))


def test_the_average_neither_drifts_nor_depends_on_resuming():
    generator = torch.Generator().manual_seed(0)
    losses = (10 ** (8 * torch.randn(500, generator=generator))).float()
    straight, resumed = LossWindow(50), LossWindow(50)
    for step, loss in enumerate(losses, start=1):
        for window in (straight, resumed):
            window.add(loss)
            window.close(step)
        if step % 70 == 0:
            saved = json.loads(json.dumps(resumed.state_dict()))
            resumed = LossWindow(50)
            resumed.load_state_dict(saved)
    straight.drain()
    resumed.drain()
    assert straight.average == resumed.average
    assert straight.average == pytest.approx(math.fsum(losses[-50:].tolist()) / 50, rel=1e-15)


def test_a_loss_that_is_not_finite_stays_out_of_the_average():
    window = LossWindow(4)
    for step, loss in enumerate([1.0, math.nan, 3.0, math.inf], start=1):
        window.add(torch.tensor(loss))
        window.close(step)
    window.drain()
    assert window.average == 2.0
    assert math.isnan(LossWindow(4).average)


def test_a_loss_tensor_may_be_changed_afterwards():
    window, loss = LossWindow(4), torch.tensor(1.0)
    window.add(loss)
    window.close(1)
    loss.fill_(9.0)
    assert window.drain()[0].loss == 1.0


def test_the_window_survives_json():
    window = LossWindow(3)
    for step, loss in enumerate([1.0, math.nan, 3.0, 4.0], start=1):
        window.add(torch.tensor(loss))
        window.close(step, {"grad_norm": math.inf})
    text = json.dumps(window.state_dict(), allow_nan=False)
    other = LossWindow(3)
    other.load_state_dict(json.loads(text))
    ours, theirs = window.drain(), other.drain()
    assert [(r.step, r.loss, r.average, dict(r.metrics)) for r in ours] == [
        (r.step, r.loss, r.average, dict(r.metrics)) for r in theirs
    ]
    assert window.average == other.average


def test_a_window_of_another_length_starts_empty():
    window = LossWindow(3)
    window.add(torch.tensor(1.0))
    window.close(1)
    window.drain()
    other = LossWindow(5)
    other.load_state_dict(window.state_dict())
    assert math.isnan(other.average)


def test_position():
    state = begin()
    for index in range(3):
        state.saw(batch(index), torch.tensor(1.0))
        state.stepped()
        assert not state.completes_epoch()
        assert (state.epoch, state.batch, state.current_epoch) == (1, index + 1, 1)
    state.saw(batch(3), torch.tensor(1.0))
    state.stepped()
    assert (state.epoch, state.batch, state.current_epoch) == (1, 4, 1)
    assert state.completes_epoch()
    assert (state.epoch, state.batch, state.epochs_done, state.current_epoch) == (2, 0, 1, 1)
    state.saw(batch(0, epoch=2), torch.tensor(1.0))
    assert state.current_epoch == 2


def test_the_end():
    state = begin(total_steps=2)
    assert not state.finished
    state.stepped()
    state.requests = Requests(stop=True)
    assert state.finished
    assert not state.complete
    state.stepped()
    assert state.requests == Requests()
    assert state.complete


def test_the_average_of_an_epoch_holds_all_its_steps():
    state = begin(batches_per_epoch=2, loss=LossWindow(2))
    for index in range(2):
        state.saw(batch(index), torch.tensor(float(index)))
        state.stepped()
    assert state.completes_epoch()
    assert state.loss.average == 0.5
    assert [reading.step for reading in state.readings] == [2]


def step(state: RunState, loss: float, **metrics: float) -> None:
    state.saw(batch(state.step % 4), torch.tensor(loss))
    state.stepped(metrics)


def test_three_steps_in_a_row_that_are_not_finite_stop_the_run(caplog):
    state = begin(last_saved=4)
    for loss in (1.0, math.nan, 1.0, math.nan, math.nan):
        step(state, loss)
    assert state.nonfinite_in_a_row == 1
    step(state, math.nan)
    with pytest.raises(UserError, match=r"step 6, a\.png") as caught:
        step(state, 1.0)
    assert caught.value.code == "E-NONFINITE"
    assert "step 4" in str(caught.value)
    assert "loss nan" in caplog.text


def test_the_gradient_counts_unless_a_scaler_cares_for_it():
    state, scaled = begin(nonfinite_limit=1), begin(nonfinite_limit=1, watched=())
    for one in (state, scaled):
        step(one, 1.0, grad_norm=math.inf)
    step(scaled, 1.0)
    with pytest.raises(UserError, match="grad_norm inf"):
        step(state, 1.0)


def test_a_limit_of_zero_never_stops():
    state = begin(nonfinite_limit=0)
    for _ in range(10):
        step(state, math.nan)
    assert state.nonfinite_in_a_row == 9


def test_the_last_step_is_judged_too():
    state = begin(nonfinite_limit=1)
    step(state, math.nan)
    with pytest.raises(UserError):
        state.finish()
