"""The optimizers, schedules and stepper that the options ask for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from library.log import get_logger
from library.methods.base import Method, ParamGroup
from library.models import memory
from library.option_groups import (
    OptimizerOptions,
    PrecisionOptions,
    ScheduleOptions,
)
from library.train import optimizers, schedules, setups
from library.train.fused import BlockwiseStepper, FusedStepper, by_blocks, by_number
from library.train.optimizers import Built
from library.train.rounding import Rounding
from library.train.schedules import Scheduler
from library.train.steppers import AnyStepper, Stepper

if TYPE_CHECKING:
    from torch import nn

    from library.options import Options

logger = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class Stepping:
    """A stepper, and what it is made of."""

    stepper: AnyStepper
    optimizers: list[Any]
    schedulers: list[Scheduler]
    groups: Sequence[ParamGroup]
    optimizer_name: str
    """For the metadata."""

    def skip(self, steps: int) -> None:
        """Moves the schedules on, where a run begins at a later step without a state."""
        for _ in range(steps):
            for scheduler in self.schedulers:
                scheduler.step()

    def begin_after(self, step: int) -> None:
        """Says which step was the last."""
        self.stepper.number = step


def create(
    options: Options,
    accelerator: Any,
    method: Method,
    denoiser: nn.Module,
    *,
    total_steps: int,
    seed: int,
    validates: bool = False,
) -> Stepping:
    """What steps the weights that a method trains; `validates` says whether a schedule can follow a validation loss.

    Errors: UserError for options that can't be followed.
    """
    groups = method.param_groups()
    wanted = [group.for_optimizer() for group in groups]
    cut = setups.cut_of(options)
    if cut == setups.BLOCKS:
        parts = by_blocks(wanted, memory.blocks(denoiser))
    else:
        parts = by_number(wanted, options.value(cut)) if cut == setups.NUMBER else [wanted]
    built = [_built(options, part) for part in parts]
    for warning in dict.fromkeys(warning for one in built for warning in one.warnings):
        logger.warning(warning)
    scheds = [
        schedules.create(
            options[ScheduleOptions], one.optimizer, total_steps, one.schedule_override, validates=validates
        )
        for one in built
    ]
    return Stepping(
        stepper=_stepper(options, accelerator, method, built, scheds, seed, cut=cut),
        optimizers=[one.optimizer for one in built],
        schedulers=scheds,
        groups=groups,
        optimizer_name=built[0].name,
    )


def _built(options: Options, groups: Sequence[Mapping[str, Any]]) -> Built:
    return optimizers.create(options[OptimizerOptions], groups, options[ScheduleOptions].lr_scheduler)


def _stepper(
    options: Options,
    accelerator: Any,
    method: Method,
    built: Sequence[Built],
    scheds: Sequence[Scheduler],
    seed: int,
    *,
    cut: str | None,
) -> AnyStepper:
    params = method.parameters()
    common: dict[str, Any] = {
        "accelerator": accelerator,
        "max_grad_norm": options[OptimizerOptions].max_grad_norm,
        "hooks": method,
        "alone": all(one.alone for one in built),
        "rounding": Rounding(params, seed) if options[PrecisionOptions].full_bf16 else None,
    }
    if cut:
        plain = [one.optimizer for one in built]
        return BlockwiseStepper(optimizers=plain, schedulers=scheds, option=f"--{cut}", **common)
    one = {"scheduler": scheds[0], "params": params, **common}
    if options[OptimizerOptions].fused_backward_pass:
        return FusedStepper(optimizer=built[0].optimizer, **one)
    return Stepper(optimizer=accelerator.prepare_optimizer(built[0].optimizer, device_placement=False), **one)
