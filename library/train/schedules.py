"""Learning-rate schedules: from the options to what the trainer steps."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from library.log import UserError
from library.train.plugins import literal_arguments, load_class
from library.train.shapes import SHAPES, WITHOUT_WARMUP, Course, multiplier

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from library.option_groups import ScheduleOptions

SCHEDULE_FREE = "schedule-free"
"""`override` of optimizers that need no schedule."""

# from options to a course


def resolved_steps(value: float, total: int, option: str) -> int:
    """A count of steps from a count, or from a share of the total (at most 1, rounded down) given as a float.

    Errors: UserError for a negative number or a float above 1 that isn't whole.
    """
    if value < 0 or (isinstance(value, float) and value > 1 and not value.is_integer()):
        raise UserError(
            f"{value} is neither a number of steps nor a share of the run",
            option,
            "give a whole number of steps, a number below 1, or a percentage such as 10%",
            code="E-LR-STEPS",
        )
    return int(value * total) if isinstance(value, float) and value <= 1 else int(value)


def resolved_warmup(options: ScheduleOptions, total: int) -> int:
    """Warm-up in optimizer steps."""
    return resolved_steps(options.lr_warmup_steps, total, "--lr_warmup_steps")


def course_of(options: ScheduleOptions, total: int) -> Course:
    """What the named schedule of the options depends on. Errors: UserError for options that contradict each other."""
    name = options.lr_scheduler
    arguments = literal_arguments(options.lr_scheduler_args, "--lr_scheduler_args")
    course = Course(
        total=total,
        warmup=resolved_warmup(options, total),
        decay=resolved_steps(options.lr_decay_steps, total, "--lr_decay_steps"),
        cycles=options.lr_scheduler_num_cycles,
        power=options.lr_scheduler_power,
        timescale=options.lr_scheduler_timescale,
        min_ratio=options.lr_scheduler_min_lr_ratio,
    )
    if name == "constant":
        _refuse_warmup(course.warmup, "--lr_scheduler constant", "choose --lr_scheduler constant_with_warmup")
    if name == "piecewise_constant":
        rules, rest = _step_rules(arguments.pop("step_rules", None))
        course = replace(course, rules=rules, rest=rest)
    if name == "cosine_with_min_lr" and course.min_ratio is None and "min_lr" not in arguments:
        raise UserError(
            "the lowest learning rate isn't given",
            "--lr_scheduler cosine_with_min_lr",
            "add --lr_scheduler_min_lr_ratio 0.1, for instance",
            code="E-LR-MIN",
        )
    if name == "warmup_stable_decay" and course.warmup + course.decay > total:
        raise UserError(
            f"warm-up ({course.warmup}) and decay ({course.decay}) are longer than the run ({total} steps)",
            "--lr_warmup_steps, --lr_decay_steps",
            "shorten them",
            code="E-LR-STEPS",
        )
    allowed = {"cosine_with_min_lr": {"min_lr"}}.get(name, set())
    for key in arguments:
        if key not in allowed:
            raise UserError(f"{name} has no argument {key}", "--lr_scheduler_args", "leave it out", code="E-LR-ARGS")
    return course


def _step_rules(text: object) -> tuple[tuple[tuple[int, float], ...], float]:
    """The rules of `1:10,0.1:20,0.01`: factor 1 before step 10, 0.1 before step 20, then 0.01."""
    try:
        *rules, rest = str(text).split(",")
        pairs = [rule.split(":") for rule in rules]
        return tuple(sorted((int(end), float(factor)) for factor, end in pairs)), float(rest)
    except ValueError:
        raise UserError(
            f"step_rules {text!r} can't be read",
            "--lr_scheduler piecewise_constant",
            """give --lr_scheduler_args 'step_rules="1:10,0.1:20,0.01"': factor 1 before step 10, and so on""",
            code="E-LR-ARGS",
        ) from None


def _refuse_warmup(warmup: float, where: str, hint: str) -> None:
    if warmup:
        raise UserError("this schedule has no warm-up", f"{where}, --lr_warmup_steps", hint, code="E-LR-WARMUP")


# what the trainer steps


class Scheduler(Protocol):
    """Sets the learning rates of an optimizer; stepped once after each optimizer step."""

    def step(self) -> None:
        """Goes on to the next step."""

    def last_lrs(self) -> list[float]:
        """Learning rate of each parameter group for the next step."""

    def state_dict(self) -> dict[str, Any]:
        """Where the schedule is, as JSON values."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state of `state_dict`; the rates of the optimizer are set."""


class NamedSchedule:
    """A schedule of this module."""

    def __init__(self, optimizer: Optimizer, name: str, course: Course, min_lr: float | None = None) -> None:
        self.optimizer, self.name, self.count = optimizer, name, 0
        self.base_lrs = [float(group["lr"]) for group in optimizer.param_groups]
        self.courses = [_for_peak(course, lr, min_lr) for lr in self.base_lrs]
        self._apply()

    def step(self) -> None:
        """Goes on to the next step."""
        self.count += 1
        self._apply()

    def last_lrs(self) -> list[float]:
        """Learning rate of each parameter group for the next step."""
        return [float(group["lr"]) for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """Steps done, and the full rates."""
        return {"step": self.count, "base_lrs": self.base_lrs}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on after so many steps, with the full rates of the state."""
        self.count, self.base_lrs = int(state["step"]), [float(lr) for lr in state["base_lrs"]]
        self.courses = [replace(course, peak=lr or 1.0) for course, lr in zip(self.courses, self.base_lrs, strict=True)]
        self._apply()

    def _apply(self) -> None:
        for group, lr, course in zip(self.optimizer.param_groups, self.base_lrs, self.courses, strict=True):
            group["lr"] = lr * multiplier(self.name, course, self.count)


def _for_peak(course: Course, lr: float, min_lr: float | None) -> Course:
    course = replace(course, peak=lr or 1.0)
    return course if min_lr is None else replace(course, min_ratio=min_lr / course.peak)


class FixedSchedule:
    """For optimizers that make their own schedule: leaves the rates alone."""

    def __init__(self, optimizer: Optimizer, initial_lr: float | None = None) -> None:
        """`initial_lr` is shown for groups that have no rate."""
        self.optimizer, self.initial_lr = optimizer, initial_lr

    def step(self) -> None:
        """Does nothing."""

    def last_lrs(self) -> list[float]:
        """Learning rate of each parameter group."""
        lrs = [group["lr"] for group in self.optimizer.param_groups]
        return [float(self.initial_lr or 0.0) if lr is None else float(lr) for lr in lrs]

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Does nothing."""


class ForeignSchedule:
    """A scheduler class of torch or of another package."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler

    def step(self) -> None:
        """Goes on to the next step."""
        self.scheduler.step()

    def last_lrs(self) -> list[float]:
        """Learning rate of each parameter group for the next step."""
        return [float(lr) for lr in self.scheduler.get_last_lr()]

    def state_dict(self) -> dict[str, Any]:
        """What the class saves."""
        return dict(self.scheduler.state_dict())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a saved state, and sets the rates, which these classes leave to the optimizer's own state."""
        self.scheduler.load_state_dict(dict(state))
        for group, lr in zip(self.scheduler.optimizer.param_groups, self.scheduler.get_last_lr(), strict=True):
            group["lr"] = lr


class LossSchedule(ForeignSchedule):
    """One that follows the validation loss, as torch's ReduceLROnPlateau does."""

    def step(self) -> None:
        """Does nothing: only a validation moves the rates."""

    def measured(self, state: object, loss: float) -> None:
        """Takes the loss of a validation; one that isn't finite counts as no gain, as the class has it."""
        self.scheduler.step(loss)


def create(
    options: ScheduleOptions,
    optimizer: Optimizer,
    total_steps: int,
    override: str | None = None,
    *,
    validates: bool = False,
) -> Scheduler:
    """The scheduler that the options ask for; `override` is the schedule that the optimizer insists on, if any.

    `validates` says whether a validation loss will be measured: then `LossSchedule.measured` must hear of it.
    Errors: UserError for an unknown name, and for options that contradict each other.
    """
    name = override or options.lr_scheduler
    if name == SCHEDULE_FREE:
        return FixedSchedule(optimizer)
    if options.lr_scheduler_type and override is None:
        _refuse_warmup(options.lr_warmup_steps, "--lr_scheduler_type", "leave --lr_warmup_steps out")
        return _foreign(options, optimizer, validates)
    if name.startswith("adafactor"):
        return _adafactor(name, options, optimizer)
    if name not in SHAPES:
        near = difflib.get_close_matches(name, SHAPES, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(
            f"there is no learning-rate schedule {name!r}",
            "--lr_scheduler",
            f"{hint}known are {', '.join(SHAPES)}; other classes go by --lr_scheduler_type",
            code="E-LR-NAME",
        )
    course = course_of(options, total_steps)
    min_lr = literal_arguments(options.lr_scheduler_args, "--lr_scheduler_args").get("min_lr")
    return NamedSchedule(optimizer, name, course, min_lr)


def _adafactor(name: str, options: ScheduleOptions, optimizer: Optimizer) -> FixedSchedule:
    _, _, rate = name.partition(":")
    try:
        initial = float(rate)
    except ValueError:
        raise UserError(
            "the schedule adafactor needs an initial rate",
            f"--lr_scheduler {name}",
            "write adafactor:1e-3, or leave it to --optimizer_type Adafactor, which sets it by itself",
            code="E-LR-ADAFACTOR",
        ) from None
    if type(optimizer).__name__ != "Adafactor":
        raise UserError(
            "the schedule adafactor goes with the optimizer Adafactor only",
            f"--lr_scheduler {name}",
            "choose another schedule",
            code="E-LR-ADAFACTOR",
        )
    _refuse_warmup(options.lr_warmup_steps, "--lr_scheduler adafactor", "leave --lr_warmup_steps out")
    return FixedSchedule(optimizer, initial)


def is_foreign(options: ScheduleOptions) -> bool:
    """Whether the options name a scheduler class outside torch, whose module would be imported."""
    return "." in options.lr_scheduler_type and not options.lr_scheduler_type.startswith("torch.optim.lr_scheduler.")


def _foreign(options: ScheduleOptions, optimizer: Optimizer, validates: bool) -> ForeignSchedule:
    scheduler_class = load_class(options.lr_scheduler_type, "torch.optim.lr_scheduler", "--lr_scheduler_type")
    arguments = literal_arguments(options.lr_scheduler_args, "--lr_scheduler_args")
    follows_loss = scheduler_class.__name__ == "ReduceLROnPlateau"
    if follows_loss and not validates:
        raise UserError(
            "this schedule follows a validation loss, which isn't measured",
            "--lr_scheduler_type ReduceLROnPlateau",
            "give --validation_split, or choose another schedule",
            code="E-LR-NAME",
        )
    try:
        scheduler = scheduler_class(optimizer, **arguments)
        return LossSchedule(scheduler) if follows_loss else ForeignSchedule(scheduler)
    except (TypeError, ValueError) as error:
        raise UserError(str(error), "--lr_scheduler_type, --lr_scheduler_args", code="E-LR-ARGS") from error


# for the eye


def preview(options: ScheduleOptions, total: int, lr: float, override: str | None = None) -> str:
    """One line on the schedule, such as `cosine: warm-up 100 steps, peak 1e-4, last 2e-8`."""
    name = override or options.lr_scheduler
    if options.lr_scheduler_type and override is None:
        return f"{options.lr_scheduler_type}: starts at {rate_text(lr)}"
    if name not in SHAPES:
        return f"{name}: the optimizer sets its own pace"
    min_lr = literal_arguments(options.lr_scheduler_args, "--lr_scheduler_args").get("min_lr")
    course = _for_peak(course_of(options, total), lr, min_lr)
    rates = [lr * multiplier(name, course, step) for step in range(total)] or [lr]
    warmup = 0 if name in WITHOUT_WARMUP else course.warmup
    start = f"warm-up {warmup} steps" if warmup else f"first {rate_text(rates[0])}"
    return f"{name}: {start}, peak {rate_text(max(rates))}, last {rate_text(rates[-1])}"


def rate_text(lr: float) -> str:
    """A learning rate, short: `1e-4`, `0.5`."""
    if lr == 0 or abs(lr) >= 0.01:
        return f"{lr:.3g}"
    mantissa, exponent = f"{lr:.2e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
