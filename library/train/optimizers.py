"""Optimizers: name -> class, arguments and habits."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING, Any

from library.log import UserError
from library.train.plugins import literal_arguments, load_class
from library.train.schedules import SCHEDULE_FREE

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from library.option_groups import OptimizerOptions


class Habit(Enum):
    """What needs attention with an optimizer."""

    FINDS_RATE = auto()
    """Multiplies the given rate, about 1, with one that it finds, the same for all parameters."""
    NO_SCHEDULE = auto()
    """Needs no schedule, and weights that differ between training and use."""
    RELATIVE_STEP = auto()
    """Sets its own rate unless told otherwise."""


@dataclass(frozen=True)
class Row:
    """One optimizer."""

    path: str
    """`package.module.Class`."""
    habit: Habit | None = None
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Arguments that make it what its name says."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Arguments that the user may replace; recorded like the user's own."""


def _nesterov(path: str) -> Row:
    return Row(path, fixed={"nesterov": True}, defaults={"momentum": 0.9})


ROWS: Mapping[str, Row] = {
    "AdamW": Row("torch.optim.AdamW"),
    "SGDNesterov": _nesterov("torch.optim.SGD"),
    "AdamW8bit": Row("bitsandbytes.optim.AdamW8bit"),
    "PagedAdamW": Row("bitsandbytes.optim.PagedAdamW"),
    "PagedAdamW8bit": Row("bitsandbytes.optim.PagedAdamW8bit"),
    "PagedAdamW32bit": Row("bitsandbytes.optim.PagedAdamW32bit"),
    "SGDNesterov8bit": _nesterov("bitsandbytes.optim.SGD8bit"),
    "Lion8bit": Row("bitsandbytes.optim.Lion8bit"),
    "PagedLion8bit": Row("bitsandbytes.optim.PagedLion8bit"),
    "Lion": Row("lion_pytorch.Lion"),
    "DAdaptation": Row("dadaptation.experimental.DAdaptAdamPreprint", Habit.FINDS_RATE),
    "DAdaptAdamPreprint": Row("dadaptation.experimental.DAdaptAdamPreprint", Habit.FINDS_RATE),
    "DAdaptAdaGrad": Row("dadaptation.DAdaptAdaGrad", Habit.FINDS_RATE),
    "DAdaptAdam": Row("dadaptation.DAdaptAdam", Habit.FINDS_RATE),
    "DAdaptAdan": Row("dadaptation.DAdaptAdan", Habit.FINDS_RATE),
    "DAdaptAdanIP": Row("dadaptation.experimental.DAdaptAdanIP", Habit.FINDS_RATE),
    "DAdaptLion": Row("dadaptation.DAdaptLion", Habit.FINDS_RATE),
    "DAdaptSGD": Row("dadaptation.DAdaptSGD", Habit.FINDS_RATE),
    "Prodigy": Row("prodigyopt.Prodigy", Habit.FINDS_RATE),
    "Adafactor": Row("transformers.optimization.Adafactor", Habit.RELATIVE_STEP, defaults={"relative_step": True}),
    "AdamWScheduleFree": Row("schedulefree.AdamWScheduleFree", Habit.NO_SCHEDULE),
    "RAdamScheduleFree": Row("schedulefree.RAdamScheduleFree", Habit.NO_SCHEDULE),
    "SGDScheduleFree": Row("schedulefree.SGDScheduleFree", Habit.NO_SCHEDULE),
}
"""Optimizers by name (any case); others go by a name of torch.optim or a dotted path."""

SIMPLE_PACKAGES = ("torch", "transformers", "bitsandbytes", "lion_pytorch")
"""Packages whose optimizers treat each parameter alone."""

KNOWN_RATE = 0.1
"""Rates up to here are meant for ordinary optimizers, not for those that find their own."""


@dataclass
class Recipe:
    """An optimizer before it has parameters."""

    row: Row
    optimizer_class: Any
    arguments: dict[str, Any]
    """The user's, and the defaults of the row."""


@dataclass(frozen=True)
class Built:
    """An optimizer, ready for training."""

    optimizer: Optimizer
    name: str
    """For the metadata: `module.Class(key=value,…)`."""
    schedule_override: str | None
    """The schedule that the optimizer insists on, see `library.train.schedules.create`."""
    warnings: list[str]
    alone: bool
    """Whether a parameter's update depends on no other parameter, so that each can be stepped alone."""


def resolve(options: OptimizerOptions) -> Recipe:
    """What the options ask for; imports the optimizer's package.

    Errors: UserError for an unknown name or for arguments that can't be read; ResourceError when the package isn't
    installed.
    """
    name = _name(options)
    arguments = literal_arguments(options.optimizer_args, "--optimizer_args")
    if "lr" in arguments:
        raise UserError("lr is no argument here", "--optimizer_args", "give --learning_rate", code="E-OPTIMIZER-ARGS")
    row = _row(name)
    optimizer_class = load_class(row.path, "torch.optim", "--optimizer_type")
    return Recipe(row, optimizer_class, {**row.defaults, **arguments})


def is_foreign(options: OptimizerOptions) -> bool:
    """Whether the options name a class of a package that isn't in the table, whose module would be imported."""
    packages = {row.path.partition(".")[0] for row in ROWS.values()}
    return "." in options.optimizer_type and options.optimizer_type.partition(".")[0] not in packages


def create(
    options: OptimizerOptions, param_groups: Sequence[Mapping[str, Any]], lr_scheduler: str | None = None
) -> Built:
    """The optimizer over parameter groups, each with `params` and maybe a rate `lr` of its own.

    `lr_scheduler` is the schedule that the user chose, for advice only. Errors: as `resolve`, and UserError for
    arguments that the optimizer refuses.
    """
    recipe = resolve(options)
    groups = [dict(group) for group in param_groups]
    rate = abs(options.learning_rate)  # where it is negative, the method has turned the gradients
    lr: float | None = rate
    override, warnings = None, []
    match recipe.row.habit:
        case Habit.FINDS_RATE:
            warnings = _share_rate(groups, rate)
        case Habit.NO_SCHEDULE:
            override = SCHEDULE_FREE
        case Habit.RELATIVE_STEP:
            warnings = _settle_relative_step(recipe.arguments, options, lr_scheduler)
            if recipe.arguments["relative_step"]:
                override, lr = f"adafactor:{rate}", None
                warnings += _drop_rates(groups)
        case None if recipe.row.path == "torch.optim.AdamW":
            defaults = _wide_epsilon(groups)
            recipe.row = Row(recipe.row.path, fixed=_fused(groups, recipe.arguments))
            recipe.arguments = {**defaults, **recipe.arguments}
    try:
        optimizer = recipe.optimizer_class(groups, lr=lr, **recipe.row.fixed, **recipe.arguments)
    except (TypeError, ValueError) as error:
        raise UserError(
            str(error), "--optimizer_type, --optimizer_args, --learning_rate", code="E-OPTIMIZER-ARGS"
        ) from error
    getattr(optimizer, "train", lambda: None)()
    alone = _steps_alone(recipe, lr)
    if not alone and _holds(groups, "bfloat16"):
        warnings.append("this optimizer rounds bf16 weights to the nearest, which loses small changes; others don't")
    return Built(optimizer, _recorded_name(recipe), override, warnings, alone)


def _name(options: OptimizerOptions) -> str:
    switches = {"AdamW8bit": options.use_8bit_adam, "Lion": options.use_lion_optimizer}
    chosen = [name for name, given in switches.items() if given]
    if len(chosen) > 1 or (chosen and options.optimizer_type):
        raise UserError(
            "more than one optimizer is chosen",
            "--use_8bit_adam, --use_lion_optimizer, --optimizer_type",
            "keep --optimizer_type only",
            code="E-OPTIMIZER",
        )
    return chosen[0] if chosen else options.optimizer_type or "AdamW"


def _row(name: str) -> Row:
    """The row of a name. Errors: UserError for a name that neither the table nor torch knows."""
    rows = {known.lower(): row for known, row in ROWS.items()}
    if name.lower() in rows:
        return rows[name.lower()]
    if "." in name:
        by_path = {row.path: row for row in ROWS.values() if not row.fixed}
        return by_path.get(name, Row(name))
    import torch

    if isinstance(getattr(torch.optim, name, None), type) and name != "Optimizer":
        return Row(f"torch.optim.{name}")
    near = difflib.get_close_matches(name.lower(), rows, 1)
    known = {known.lower(): known for known in ROWS}
    hint = f"did you mean {known[near[0]]}? " if near else ""
    raise UserError(
        f"there is no optimizer {name!r}",
        "--optimizer_type",
        f"{hint}known are {', '.join(ROWS)}, the classes of torch.optim as spelled there, and package.module.Class",
        code="E-OPTIMIZER",
    )


def _recorded_name(recipe: Recipe) -> str:
    arguments = ",".join(f"{key}={value}" for key, value in recipe.arguments.items())
    name = f"{recipe.optimizer_class.__module__}.{recipe.optimizer_class.__name__}"
    return f"{name}({arguments})" if arguments else name


# habits


def _share_rate(groups: list[dict[str, Any]], lr: float) -> list[str]:
    """Gives all groups the first one's rate, the only one that these optimizers can follow."""
    rates = [group.get("lr", lr) for group in groups]
    warnings = []
    if rates[0] <= KNOWN_RATE:
        warnings.append(f"the learning rate {rates[0]} is small for this optimizer, which finds its own; 1.0 is usual")
    if len(set(rates)) > 1:
        warnings.append(f"this optimizer has one rate for everything: {rates[0]} is taken, {rates[1:]} are ignored")
    for group in groups:
        group["lr"] = rates[0]
    return warnings


def _settle_relative_step(arguments: dict[str, Any], options: OptimizerOptions, lr_scheduler: str | None) -> list[str]:
    if arguments.get("warmup_init") and not arguments["relative_step"]:
        arguments["relative_step"] = True
        return ["Adafactor's warmup_init needs relative_step, which is switched on"]
    if arguments["relative_step"]:
        same = lr_scheduler is None or lr_scheduler.startswith("adafactor")
        return (
            [] if same else [f"Adafactor sets its own pace (relative_step); --lr_scheduler {lr_scheduler} is ignored"]
        )
    warnings = []
    if options.max_grad_norm:
        warnings.append("Adafactor clips by itself; --max_grad_norm 0 is recommended with it")
    if lr_scheduler not in (None, "constant_with_warmup"):
        warnings.append("--lr_scheduler constant_with_warmup is recommended for Adafactor with a given rate")
    if arguments.get("clip_threshold", 1.0) != 1.0:
        warnings.append("clip_threshold=1.0 is recommended for Adafactor with a given rate")
    return warnings


def _steps_alone(recipe: Recipe, lr: float | None) -> bool:
    """See `Built.alone`; optimizers of packages that aren't known are tried out."""
    from library.train.updates import depends_on_no_other

    if recipe.row.habit in (Habit.FINDS_RATE, Habit.NO_SCHEDULE) or recipe.optimizer_class.__name__ == "LBFGS":
        return False
    if recipe.optimizer_class.__module__.partition(".")[0] in SIMPLE_PACKAGES:
        return True
    return depends_on_no_other(recipe.optimizer_class, {**recipe.row.fixed, **recipe.arguments}, lr)


def _drop_rates(groups: list[dict[str, Any]]) -> list[str]:
    given = [group.pop("lr") for group in groups if "lr" in group]
    return ["Adafactor sets its own pace (relative_step); learning rates of parts are ignored"] if given else []


def _fused(groups: list[dict[str, Any]], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The one-kernel variant where it exists, unless the user says something about it."""
    if arguments.keys() & {"fused", "foreach", "capturable", "differentiable"}:
        return {}
    kinds = {parameter.device.type for group in groups for parameter in _parameters(group)}
    return {"fused": True} if kinds == {"cuda"} else {}


def _wide_epsilon(groups: list[dict[str, Any]]) -> dict[str, Any]:
    """An epsilon that float16 can hold, where weights are kept in it: the usual 1e-8 is 0 there, and divides by it."""
    return {"eps": 1e-4} if _holds(groups, "float16") else {}


def _holds(groups: list[dict[str, Any]], dtype: str) -> bool:
    """Whether any parameter is of the type of torch that has this name."""
    return any(str(parameter.dtype) == f"torch.{dtype}" for group in groups for parameter in _parameters(group))


def _parameters(group: dict[str, Any]) -> list[Any]:
    """The parameters of a group, which may be an iterator that can be read once."""
    params = group["params"]
    group["params"] = [params] if hasattr(params, "device") else list(params)
    return list(group["params"])


# while training


def effective_lrs(optimizer: Any) -> list[float]:
    """What multiplies the update of each parameter group, whoever decided it; asks the device where it must."""
    plain = _plain(optimizer)
    return [_effective_lr(plain, group) for group in plain.param_groups]


def _effective_lr(optimizer: Any, group: Mapping[str, Any]) -> float:
    if "effective_lr" in group:
        return float(group["effective_lr"])
    if "d" in group:
        return float(group["d"] * group["lr"])
    if "scheduled_lr" in group and group.get("k"):
        return float(group["scheduled_lr"])
    if "relative_step" in group and "scale_parameter" in group:
        state = optimizer.state.get(group["params"][0], {})
        return float(optimizer._get_lr(group, state)) if "RMS" in state and state.get("step") else group["lr"] or 0.0
    return float(group["lr"])


@contextmanager
def evaluating(optimizer: Any) -> Iterator[None]:
    """Puts the weights of schedule-free optimizers into the state in which they are used and saved, for a while.

    Afterwards the weights are those from before, bit for bit: going there and back by the optimizer's own formula would
    round them, and a run would depend on when it was saved.
    """
    plain = _plain(optimizer)
    switches = callable(getattr(plain, "eval", None)) and callable(getattr(plain, "train", None))
    if not switches or not all(group.get("train_mode", True) for group in plain.param_groups):
        yield
        return
    params = [param.data for group in plain.param_groups for param in group["params"]]
    before = [param.to("cpu", copy=True) for param in params]
    plain.eval()
    try:
        yield
    finally:
        plain.train()
        for param, value in zip(params, before, strict=True):
            param.copy_(value)


def _plain(optimizer: Any) -> Any:
    """The optimizer inside accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)
