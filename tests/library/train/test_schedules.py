"""Learning-rate schedules, against reference numbers."""

import json
import re
from pathlib import Path

import pytest
import torch

from library.log import UserError
from library.option_groups import ScheduleOptions
from library.train import schedules
from library.train.optimizers import effective_lrs
from library.train.schedules import SCHEDULE_FREE, create, preview, resolved_steps, resolved_warmup

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "lr_schedules.json").read_text(encoding="utf-8"))
TOTAL = 100
SHORT = {"num_cycles": "lr_scheduler_num_cycles", "power": "lr_scheduler_power", "timescale": "lr_scheduler_timescale"}
SHORT["min_lr_ratio"] = "lr_scheduler_min_lr_ratio"


def optimizer_of(*lrs):
    return torch.optim.SGD([{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in lrs], lr=1.0)


def options_of(key):
    """The options that a golden key describes."""
    key = key.replace(" (ignored)", "").replace(",min_lr_ratio unset", "")
    if "step_rules" in key:
        rules = re.search(r"'(.*)'", key)[1]
        return ScheduleOptions(lr_scheduler="piecewise_constant", lr_scheduler_args=(f'step_rules="{rules}"',))
    name, *items = key.split(",")
    if name.startswith("lr_scheduler_type="):
        return ScheduleOptions(lr_scheduler_type=name.partition("=")[2], lr_scheduler_args=tuple(items))
    values = {}
    for item in items:
        option, _, text = item.partition("=")
        values[SHORT.get(option, option)] = float(text) if "." in text else int(text)
    return ScheduleOptions(lr_scheduler=name, **values)


def rates(scheduler, steps=TOTAL):
    """The rate of the first group before each step, and after the last."""
    result = [scheduler.last_lrs()[0]]
    for _ in range(steps):
        scheduler.step()
        result.append(scheduler.last_lrs()[0])
    return result


@pytest.mark.filterwarnings("ignore:.*optimizer.step:UserWarning")
@pytest.mark.parametrize("key", [key for key, value in GOLDEN.items() if isinstance(value, list)])
def test_as_elsewhere(key):
    optimizer = optimizer_of(1.0)
    assert rates(create(options_of(key), optimizer, TOTAL)) == pytest.approx(GOLDEN[key], abs=2e-7)


@pytest.mark.parametrize("key", [key for key, value in GOLDEN.items() if isinstance(value, dict)])
def test_errors_as_elsewhere(key):
    with pytest.raises(UserError):
        create(options_of(key), optimizer_of(1.0), TOTAL)


def test_all_golden_entries_are_used():
    assert sum(isinstance(value, list | dict) for value in GOLDEN.values()) == len(GOLDEN) - 2


def test_each_group_keeps_its_share():
    optimizer = optimizer_of(1e-3, 1e-4)
    scheduler = create(ScheduleOptions(lr_scheduler="linear"), optimizer, 10)
    for _ in range(4):
        scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([6e-4, 6e-5])
    assert scheduler.last_lrs() == effective_lrs(optimizer)


def test_polynomial_ends_at_the_same_rate_in_every_group():
    scheduler = create(ScheduleOptions(lr_scheduler="polynomial"), optimizer_of(1e-3, 1e-5), 10)
    for _ in range(10):
        scheduler.step()
    assert scheduler.last_lrs() == pytest.approx([1e-7, 1e-7])


def test_min_lr_is_a_rate():
    options = ScheduleOptions(lr_scheduler="cosine_with_min_lr", lr_scheduler_args=("min_lr=1e-5",))
    scheduler = create(options, optimizer_of(1e-3, 1e-4), 10)
    for _ in range(10):
        scheduler.step()
    assert scheduler.last_lrs() == pytest.approx([1e-5, 1e-5])


@pytest.mark.filterwarnings("ignore:.*optimizer.step:UserWarning")
@pytest.mark.parametrize(
    "options",
    [
        ScheduleOptions(lr_scheduler="cosine", lr_warmup_steps=3),
        ScheduleOptions(lr_scheduler_type="StepLR", lr_scheduler_args=("step_size=4", "gamma=0.5")),
        ScheduleOptions(lr_scheduler_type="torch.optim.lr_scheduler.CosineAnnealingLR", lr_scheduler_args=("T_max=9",)),
    ],
)
def test_resumed_schedules_go_on(options):
    straight = rates(create(options, optimizer_of(0.5), 20), 20)
    first = create(options, optimizer_of(0.5), 20)
    start = rates(first, 7)
    state = json.loads(json.dumps(first.state_dict()))
    optimizer = optimizer_of(0.5)
    second = create(options, optimizer, 20)
    second.load_state_dict(state)
    assert optimizer.param_groups[0]["lr"] == start[-1]
    assert start + rates(second, 13)[1:] == straight


def test_a_state_brings_its_own_full_rate():
    first = create(ScheduleOptions(lr_scheduler="linear"), optimizer_of(1e-3), 10)
    optimizer = optimizer_of(9.0)
    second = create(ScheduleOptions(lr_scheduler="linear"), optimizer, 10)
    first.step()
    second.load_state_dict(first.state_dict())
    assert optimizer.param_groups[0]["lr"] == pytest.approx(9e-4)


def test_steps_are_counts_or_shares():
    assert resolved_steps(7, 100, "--x") == 7
    assert resolved_steps(0.25, 30, "--x") == 7
    assert resolved_steps(1.0, 30, "--x") == 30
    assert resolved_steps(1, 30, "--x") == 1
    assert resolved_steps(2.0, 30, "--x") == 2
    assert resolved_warmup(ScheduleOptions(lr_warmup_steps=0.1), 1000) == 100
    for wrong in (-1, -0.5, 1.5):
        with pytest.raises(UserError, match="--x"):
            resolved_steps(wrong, 30, "--x")


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"lr_scheduler": "cosin"}, "did you mean cosine"),
        ({"lr_scheduler": "adafactor"}, "adafactor:1e-3"),
        ({"lr_scheduler": "adafactor:1e-3"}, "optimizer Adafactor only"),
        ({"lr_scheduler_type": "StepLR", "lr_warmup_steps": 1}, "no warm-up"),
        ({"lr_scheduler_type": "StepLR"}, "step_size"),
        ({"lr_scheduler_type": "StepLR", "lr_scheduler_args": ("step_size",)}, "key=value"),
        ({"lr_scheduler_type": "NoSuchLR"}, "NoSuchLR"),
        ({"lr_scheduler_type": "no_such_package.StepLR"}, "pip install no_such_package"),
        ({"lr_scheduler_type": "ReduceLROnPlateau"}, "validation"),
        ({"lr_scheduler": "linear", "lr_scheduler_args": ("a=1",)}, "no argument a"),
        ({"lr_scheduler": "piecewise_constant"}, "step_rules"),
        ({"lr_scheduler": "piecewise_constant", "lr_scheduler_args": ('step_rules="1:x,2"',)}, "step_rules"),
        ({"lr_scheduler": "warmup_stable_decay", "lr_warmup_steps": 80, "lr_decay_steps": 30}, "longer than"),
    ],
)
def test_what_cannot_be_is_refused(values, word):
    with pytest.raises(UserError, match=word):
        create(ScheduleOptions(**values), optimizer_of(1.0), TOTAL)


def test_optimizers_with_a_pace_of_their_own():
    optimizer = optimizer_of(0.5)
    scheduler = create(ScheduleOptions(lr_scheduler="cosine"), optimizer, 10, override=SCHEDULE_FREE)
    assert rates(scheduler, 10) == [0.5] * 11
    scheduler.load_state_dict(scheduler.state_dict())
    assert preview(ScheduleOptions(), 10, 0.5, SCHEDULE_FREE) == "schedule-free: the optimizer sets its own pace"


def test_a_schedule_that_follows_the_validation_loss():
    options = ScheduleOptions(
        lr_scheduler_type="ReduceLROnPlateau", lr_scheduler_args=("factor=0.5", "patience=1", "cooldown=0")
    )
    optimizer = optimizer_of(1.0)
    scheduler = create(options, optimizer, 10, validates=True)
    assert isinstance(scheduler, schedules.LossSchedule)
    scheduler.step()
    found = []
    for loss in (3.0, 2.0, 2.0, 2.0, 1.0):
        scheduler.measured(None, loss)
        found += scheduler.last_lrs()
    assert found == [1.0, 1.0, 1.0, 0.5, 0.5]
    resumed = create(options, optimizer_of(1.0), 10, validates=True)
    resumed.load_state_dict(scheduler.state_dict())
    assert resumed.last_lrs() == [0.5]
    assert resumed.scheduler.best == 1.0


def test_previews():
    warm = ScheduleOptions(lr_scheduler="linear", lr_warmup_steps=0.1)
    assert preview(warm, 1000, 1e-4) == "linear: warm-up 100 steps, peak 1e-4, last 1.11e-7"
    assert preview(ScheduleOptions(), 10, 0.02) == "constant: first 0.02, peak 0.02, last 0.02"
    typed = ScheduleOptions(lr_scheduler_type="StepLR")
    assert preview(typed, 10, 1e-4) == "StepLR: starts at 1e-4"


def test_classes_of_strangers_are_told_apart():
    assert schedules.is_foreign(ScheduleOptions(lr_scheduler_type="mine.Scheduler"))
    assert not schedules.is_foreign(ScheduleOptions(lr_scheduler_type="torch.optim.lr_scheduler.StepLR"))
    assert not schedules.is_foreign(ScheduleOptions(lr_scheduler_type="StepLR"))
