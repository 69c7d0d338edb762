"""Applies gradients: reduce, unscale, clip, guard, step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from library.train.optimizers import effective_lrs, evaluating
from library.train.rounding import Rounding
from library.train.schedules import Scheduler
from library.train.updates import Updates


class GradientHooks(Protocol):
    """What a method does around an optimizer step."""

    def reduce_gradients(self, accelerator: Any, parameters: Sequence[nn.Parameter] | None = None) -> None:
        """Averages the gradients over the processes, those of all parameters or of some."""

    def after_step(self, step: int) -> dict[str, Tensor | float]:
        """Called after the weights have moved in the step of this number; gives values worth logging."""


class AnyStepper(Protocol):
    """What the run and its observers want of a stepper: `Stepper` here, or one of `library.train.fused`."""

    number: int
    """Of the last step; after loading a state it has to be set."""

    @property
    def param_groups(self) -> Sequence[Mapping[str, Any]]:
        """The parameter groups as the optimizer holds them, one for each that was given."""

    def step(self, number: int | None = None) -> dict[str, Tensor | float]:
        """Ends the step of this number (None counts on): weights have moved, gradients are gone, the schedule went on.

        Gives values worth logging; `grad_norm` (0-d) is the norm before clipping.
        """

    def learning_rates(self) -> list[float]:
        """What multiplies the update of each parameter group."""

    def evaluating(self) -> AbstractContextManager[None]:
        """Puts the weights of schedule-free optimizers into the state in which they are used and saved, for a while."""


class Stepper:
    """One optimizer over all trained parameters.

    Gradients of the micro-batches of a step are summed, so losses must be weighted for that. A step whose gradients
    aren't finite moves nothing (`Updates` says how), and the norm that is given back tells. Nothing here waits for the
    device, except a gradient scaler, and optimizers that can't be stepped for each parameter alone.
    """

    def __init__(
        self,
        *,
        accelerator: Any,
        optimizer: Any,
        scheduler: Scheduler,
        params: Iterable[nn.Parameter],
        max_grad_norm: float,
        hooks: GradientHooks,
        alone: bool = False,
        rounding: Rounding | None = None,
    ) -> None:
        """`optimizer` may be plain or what `accelerator.prepare` makes of it; `max_grad_norm` 0 doesn't clip.

        `alone` and `rounding` are as `library.train.updates.Updates` wants them; a gradient scaler goes without them.
        """
        self.accelerator, self.optimizer, self.scheduler, self.hooks = accelerator, optimizer, scheduler, hooks
        self.params = list(params)
        self.max_grad_norm = max_grad_norm
        self.number = 0
        """Of the last step."""
        self._updates = Updates(optimizer, alone=alone, rounding=rounding)

    @property
    def param_groups(self) -> Sequence[Mapping[str, Any]]:
        """See `AnyStepper`."""
        groups: list[dict[str, Any]] = self.optimizer.param_groups
        return groups

    def step(self, number: int | None = None) -> dict[str, Tensor | float]:
        """Steps the optimizer and the schedule, drops the gradients, and gives values worth logging.

        `grad_norm` (0-d) is the norm before clipping. `number` is that of the step, counted from 1; None counts on.
        """
        self.number = self.number + 1 if number is None else number
        self.hooks.reduce_gradients(self.accelerator)
        norm = self._clip()
        self._apply(norm)
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {"grad_norm": norm, **self.hooks.after_step(self.number)}

    def learning_rates(self) -> list[float]:
        """What multiplies the update of each parameter group."""
        return effective_lrs(self.optimizer)

    def evaluating(self) -> AbstractContextManager[None]:
        """Puts the weights of schedule-free optimizers into the state in which they are used and saved, for a while."""
        return evaluating(self.optimizer)

    def _clip(self) -> Tensor:
        if self.max_grad_norm:
            norm: Tensor = self.accelerator.clip_grad_norm_(self.params, self.max_grad_norm)
            return norm
        self.accelerator.unscale_gradients(self.optimizer)
        return get_total_norm([parameter.grad for parameter in self.params if parameter.grad is not None])

    def _apply(self, norm: Tensor) -> None:
        if self.accelerator.scaler is not None:
            self.optimizer.step()  # the scaler knows whether the gradients were finite, and skips the step
        else:
            self._updates.apply(self.number, norm)
