"""Applies gradients: reduce, unscale, clip, guard, step."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

from library.train.optimizers import effective_lrs, evaluating

if TYPE_CHECKING:
    from torch import Tensor, nn

    from library.train.schedules import Scheduler


class GradientHooks(Protocol):
    """What a method does around an optimizer step."""

    def reduce_gradients(self, accelerator: Any) -> None:
        """Averages the gradients over the processes."""

    def after_step(self, step: int) -> dict[str, Tensor | float]:
        """Called after the weights have moved in the step of this number; gives values worth logging."""


class Stepper:
    """One optimizer over all trained parameters.

    Gradients of the micro-batches of a step are summed, so losses must be weighted for that. A step whose gradients
    aren't finite moves nothing by gradient: they are set to zero on the device, and the norm that is given back tells.
    Nothing here waits for the device, except a gradient scaler.
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
    ) -> None:
        """`optimizer` may be plain or what `accelerator.prepare` makes of it; `max_grad_norm` 0 doesn't clip."""
        self.accelerator, self.optimizer, self.scheduler, self.hooks = accelerator, optimizer, scheduler, hooks
        self.params = list(params)
        self.max_grad_norm = max_grad_norm
        self.number = 0
        """Of the last step."""

    def step(self, number: int | None = None) -> dict[str, Tensor | float]:
        """Steps the optimizer and the schedule, drops the gradients, and gives values worth logging.

        `grad_norm` (0-d) is the norm before clipping. `number` is that of the step, counted from 1; None counts on.
        """
        self.number = self.number + 1 if number is None else number
        self.hooks.reduce_gradients(self.accelerator)
        norm = self._clip()
        self._guard(norm)
        self.optimizer.step()
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
        import torch

        if self.max_grad_norm:
            norm: Tensor = self.accelerator.clip_grad_norm_(self.params, self.max_grad_norm)
            return norm
        self.accelerator.unscale_gradients(self.optimizer)
        return torch.nn.utils.get_total_norm(self._gradients())

    def _guard(self, norm: Tensor) -> None:
        """Sets all gradients to zero if their norm isn't finite, without asking whether it is."""
        broken = ~norm.isfinite()
        for gradient in self._gradients():
            gradient.masked_fill_(broken.to(gradient.device), 0)

    def _gradients(self) -> list[Tensor]:
        return [parameter.grad for parameter in self.params if parameter.grad is not None]
