"""Gradients are applied once per step, clipped, and never when they aren't finite."""

import copy
from typing import ClassVar

import accelerate
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

from library.option_groups import OptimizerOptions, ScheduleOptions
from library.train.optimizers import ROWS
from library.train.optimizers import create as create_optimizer
from library.train.rounding import Rounding
from library.train.schedules import create as create_scheduler
from library.train.steppers import Stepper
from library.train.updates import Updates


class Hooks:
    """Writes down what is called."""

    def __init__(self):
        self.calls = []

    def reduce_gradients(self, accelerator, parameters=None):
        self.calls.append("reduce")

    def after_step(self, step):
        self.calls.append(f"after {step}")
        return {"value": 7.0}


@pytest.fixture
def accelerator():
    yield accelerate.Accelerator(cpu=True)
    for state in (AcceleratorState, GradientState, PartialState):
        state._shared_state.clear()


def make(
    accelerator,
    parameter,
    *,
    prepared=True,
    max_grad_norm=1.0,
    lr=0.1,
    optimizer_type="torch.optim.SGD",
    optimizer_args=None,
    rounding=None,
    **schedule,
):
    options = OptimizerOptions(optimizer_type=optimizer_type, optimizer_args=optimizer_args, learning_rate=lr)
    built = create_optimizer(options, [{"params": [parameter]}])
    scheduler = create_scheduler(ScheduleOptions(**schedule), built.optimizer, 10, built.schedule_override)
    return Stepper(
        accelerator=accelerator,
        optimizer=accelerator.prepare(built.optimizer) if prepared else built.optimizer,
        scheduler=scheduler,
        params=iter([parameter]),
        max_grad_norm=max_grad_norm,
        hooks=Hooks(),
        alone=built.alone,
        rounding=rounding,
    )


def pull(accelerator, parameter, factor):
    """A backward pass whose gradient is `factor` everywhere."""
    accelerator.backward((parameter * factor).sum())


@pytest.mark.parametrize("prepared", [True, False])
def test_gradients_of_micro_batches_are_summed_and_dropped(accelerator, prepared):
    parameter = torch.nn.Parameter(torch.zeros(4))
    stepper = make(accelerator, parameter, prepared=prepared, max_grad_norm=0)
    pull(accelerator, parameter, 1.0)
    pull(accelerator, parameter, 2.0)
    metrics = stepper.step()
    torch.testing.assert_close(parameter.detach(), torch.full((4,), -0.3))
    assert metrics["grad_norm"].item() == pytest.approx(6.0)
    assert parameter.grad is None
    assert metrics["value"] == 7.0
    stepper.step()
    stepper.step(12)
    assert stepper.hooks.calls == ["reduce", "after 1", "reduce", "after 2", "reduce", "after 12"]


def test_clipping(accelerator):
    parameter = torch.nn.Parameter(torch.zeros(4))
    stepper = make(accelerator, parameter, max_grad_norm=1.0)
    pull(accelerator, parameter, 5.0)
    assert stepper.step()["grad_norm"].item() == pytest.approx(10.0)
    torch.testing.assert_close(parameter.detach(), torch.full((4,), -0.05))
    pull(accelerator, parameter, 0.25)
    stepper.step()
    torch.testing.assert_close(parameter.detach(), torch.full((4,), -0.075))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
def test_a_step_that_is_not_finite_moves_nothing(accelerator, bad, max_grad_norm):
    parameter = torch.nn.Parameter(torch.ones(4))
    stepper = make(accelerator, parameter, max_grad_norm=max_grad_norm)
    accelerator.backward((parameter * torch.tensor([1.0, bad, 1.0, 1.0])).sum())
    assert not torch.isfinite(stepper.step()["grad_norm"])
    torch.testing.assert_close(parameter.detach(), torch.ones(4))
    pull(accelerator, parameter, 0.1)
    stepper.step()
    assert (parameter < 1).all()


@pytest.fixture
def on_a_device(monkeypatch):
    """Everything is done as if the norm lay on an accelerator, where looking at it takes time."""
    monkeypatch.setattr(Updates, "_looks", lambda updates, norm, parameters: not updates.alone)


ALONE = [
    ("AdamW", ()),
    ("AdamW", ("fused=True",)),
    ("AdamW", ("foreach=True",)),
    ("torch.optim.SGD", ("momentum=0.9",)),
    ("torch.optim.Adamax", ()),
    ("Adafactor", ("relative_step=False",)),
    ("Adafactor", ("relative_step=False", "beta1=0.9", "weight_decay=0.1", "scale_parameter=False")),
]


def tensors_of(stepper):
    """All that the optimizer holds for its parameters, without its counts on the host."""
    state = stepper.optimizer.optimizer.state
    return {name: value for of in state.values() for name, value in of.items() if name != "step"}


@pytest.mark.parametrize(("name", "arguments"), ALONE)
@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
def test_a_broken_step_moves_no_weight_and_no_moment_without_looking(
    accelerator, on_a_device, name, arguments, max_grad_norm
):
    parameter = torch.nn.Parameter(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    stepper = make(
        accelerator, parameter, optimizer_type=name, optimizer_args=arguments, max_grad_norm=max_grad_norm, lr=0.01
    )
    for _ in range(3):
        pull(accelerator, parameter, 0.5)
        stepper.step()
    weights, moments = parameter.detach().clone(), copy.deepcopy(tensors_of(stepper))
    accelerator.backward((parameter * torch.tensor([1.0, float("nan")])).sum())
    assert not stepper.step()["grad_norm"].isfinite()
    assert torch.equal(parameter, weights)
    assert tensors_of(stepper).keys() == moments.keys()
    for key, moment in tensors_of(stepper).items():
        assert not isinstance(moment, torch.Tensor) or torch.equal(moment, moments[key]), key
    pull(accelerator, parameter, 0.5)
    stepper.step()
    assert (parameter < weights).all()


@pytest.mark.parametrize(("name", "arguments"), [*ALONE, ("AdamWScheduleFree", ()), ("Prodigy", ())])
def test_a_first_step_that_is_broken_leaves_nothing_bad(accelerator, on_a_device, name, arguments):
    pytest.importorskip(ROWS[name].path.partition(".")[0] if name in ROWS else "torch")
    parameter = torch.nn.Parameter(torch.ones(2, 2))
    stepper = make(accelerator, parameter, optimizer_type=name, optimizer_args=arguments)
    pull(accelerator, parameter, float("nan"))
    stepper.step()
    assert torch.equal(parameter, torch.ones(2, 2))
    pull(accelerator, parameter, 1.0)
    stepper.step()
    assert parameter.isfinite().all()
    values = [value for value in tensors_of(stepper).values() if isinstance(value, torch.Tensor)]
    assert all(value.isfinite().all() for value in values)


@pytest.mark.parametrize(("name", "arguments"), ALONE)
def test_on_the_cpu_a_broken_step_leaves_no_trace_at_all(accelerator, name, arguments):
    ends = []
    for broken in (False, True):
        parameter = torch.nn.Parameter(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        stepper = make(accelerator, parameter, optimizer_type=name, optimizer_args=arguments)
        for step in range(3):
            if broken and step:
                pull(accelerator, parameter, float("inf"))
                stepper.step()
            pull(accelerator, parameter, 0.5)
            stepper.step()
        ends.append(parameter.detach())
    assert torch.equal(*ends)


@pytest.mark.parametrize(("name", "arguments"), [*ALONE[:5]])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_the_guard_never_asks_the_device(accelerator, on_a_device, monkeypatch, name, arguments, kind):
    parameter = torch.nn.Parameter(torch.ones(4, dtype=kind))
    rounding = Rounding([parameter], seed=0)
    stepper = make(accelerator, parameter, optimizer_type=name, optimizer_args=arguments, rounding=rounding)
    for _ in range(2):
        pull(accelerator, parameter, 1.0)
        norm = stepper._clip()
        asked = []
        # optimizers look at numbers that they count on the CPU, so only the norm is watched
        monkeypatch.setattr(Watched, "asked", asked)
        stepper._apply(norm.as_subclass(Watched))
        assert asked == []


def test_on_the_cpu_looking_costs_nothing(accelerator, monkeypatch):
    parameter = torch.nn.Parameter(torch.ones(4))
    stepper = make(accelerator, parameter)
    pull(accelerator, parameter, 1.0)
    monkeypatch.setattr(Watched, "asked", asked := [])
    stepper._apply(stepper._clip().as_subclass(Watched))
    assert asked == ["__bool__"]


class Watched(torch.Tensor):
    """A tensor that writes down when somebody looks at it, and so do those that are made of it."""

    asked: ClassVar[list[str]] = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", str(func))
        if name in ("item", "__bool__", "__float__", "cpu", "tolist", "nonzero"):
            cls.asked.append(name)
        return super().__torch_function__(func, types, args, kwargs or {})


def test_the_schedule_steps_once_per_step(accelerator):
    parameter = torch.nn.Parameter(torch.zeros(4))
    stepper = make(accelerator, parameter, lr_scheduler="linear", lr_warmup_steps=2)
    seen = []
    for _ in range(4):
        seen.append(stepper.learning_rates()[0])
        pull(accelerator, parameter, 1.0)
        pull(accelerator, parameter, 1.0)
        stepper.step()
    assert seen == pytest.approx([0.0, 0.05, 0.1, 0.0875])


def test_parameters_without_gradient_are_left_alone(accelerator):
    used, unused = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.ones(2))
    stepper = make(accelerator, used)
    stepper.params.append(unused)
    pull(accelerator, used, 1.0)
    stepper.step()
    assert torch.equal(unused, torch.ones(2))


def test_evaluation_of_schedule_free_optimizers_through_accelerate(accelerator):
    pytest.importorskip("schedulefree")
    parameter = torch.nn.Parameter(torch.ones(4))
    stepper = make(accelerator, parameter, optimizer_type="AdamWScheduleFree")
    for _ in range(4):
        pull(accelerator, parameter, 1.0)
        stepper.step()
    training = parameter.detach().clone()
    with stepper.evaluating():
        assert not torch.allclose(parameter, training)
    torch.testing.assert_close(parameter.detach(), training)


class Scaled:
    """Stands for an accelerator with a gradient scaler, which needs a device of its own kind."""

    def __init__(self, scaler):
        self.scaler = scaler

    def unscale_gradients(self, optimizer=None):
        self.scaler.unscale_(self.optimizer)

    def clip_grad_norm_(self, parameters, max_norm):
        self.unscale_gradients()
        return torch.nn.utils.clip_grad_norm_(parameters, max_norm)


@pytest.mark.parametrize("max_grad_norm", [0.0, 1e9])
def test_gradients_are_unscaled_before_the_norm_is_taken(max_grad_norm):
    parameter = torch.nn.Parameter(torch.zeros(4))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    fake = Scaled(scaler)
    stepper = make(type("Plain", (), {"prepare": staticmethod(lambda it: it)}), parameter, max_grad_norm=max_grad_norm)
    stepper.accelerator, fake.optimizer = fake, stepper.optimizer
    scaler.scale(parameter.sum()).backward()
    assert stepper.step()["grad_norm"].item() == pytest.approx(2.0)
    torch.testing.assert_close(parameter.detach(), torch.full((4,), -0.1))
