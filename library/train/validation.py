"""The loss of images that aren't trained on: a curve that tells learning from learning by heart."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from library.log import UserError, get_logger
from library.randomness import Draws, mix
from library.train import watch
from library.train.loop import Run, sample_losses, targeted
from library.train.ranks import Ranks
from library.train.rng import rng_untouched
from library.train.state import RunState
from library.types import Batch, Finding

if TYPE_CHECKING:
    from torch import Tensor

    from library.option_groups import ValidationOptions

logger = get_logger(__name__)

LEVELS = 4
"""Noise levels at which each image is looked at."""
ERROR_BUDGET = 3
"""Failures in a row after which validation is given up."""
MEMORY = "validation"
"""Name of what the state remembers: the `loss` of the last validation and its `step`."""

Listener = Callable[[RunState, float], None]
"""Hears of each validation, with the mean loss; the same in all processes."""


@dataclass(frozen=True)
class Measured:
    """What a validation has found."""

    loss: float
    """Mean over all images and noise levels."""
    by_timestep: Mapping[float, float]
    """Mean over all images."""


def no_numbers(values: Mapping[str, float], step: int) -> None:
    """Takes numbers and forgets them."""


def validation_due(options: ValidationOptions, *, step: int | None = None, epoch: int | None = None) -> bool:
    """Whether it is time after this step, or at the end of this epoch; by default after each epoch."""
    every_steps, every_epochs = options.validate_every_n_steps or 0, options.validate_every_n_epochs or 0
    if step is not None:
        return every_steps > 0 and step % every_steps == 0
    every_epochs = every_epochs if every_epochs > 0 or every_steps > 0 else 1
    return epoch is not None and every_epochs > 0 and epoch % every_epochs == 0


def findings(options: ValidationOptions, *, held_out: bool) -> Iterator[Finding]:
    """Warns of options that need a validation loss where no image is held out."""
    if held_out:
        return
    names = ("validate_every_n_steps", "validate_every_n_epochs", "max_validation_steps", "save_best")
    what, hint = "it has no effect: no image is held out for validation", "give --validation_split"
    for name in (*names, "early_stop_patience"):
        if getattr(options, name):
            yield Finding(error=False, what=what, where=f"--{name}", hint=hint, code="E-VALIDATION")


@dataclass(kw_only=True)
class Validation:
    """Measures the loss of held-out images. All processes must call it; each takes its share of the images.

    An image has the same noise at the same noise levels each time, whatever else is held out; nothing of it is dropped,
    cropped or mirrored at random, and the training's random numbers stay untouched. So equal weights have equal
    losses, and the training goes on as if nothing had been. Nothing that fails here ends the training.
    """

    options: ValidationOptions
    run: Run
    batches: Callable[[], Iterable[Batch]]
    """The held-out images of this process, the same each time."""
    evaluating: Callable[[], AbstractContextManager[Any]] = nullcontext
    """Puts what is trained into the state in which it is used, meanwhile."""
    log: Callable[[Mapping[str, float], int], None] = no_numbers
    """Gives numbers to the trackers; called in the main process."""
    listeners: Sequence[Listener] = ()
    ranks: Ranks = field(default_factory=Ranks)
    problems: list[str] = field(default_factory=list)
    """What went wrong, in words."""
    _failures: int = 0

    def after_step(self, state: RunState) -> None:
        """Validates when the step is due."""
        if validation_due(self.options, step=state.step):
            self._validate(state, "step")

    def after_epoch(self, state: RunState) -> None:
        """Validates when the epoch is due."""
        if validation_due(self.options, epoch=state.epochs_done):
            self._validate(state, "epoch")

    def finish(self, state: RunState) -> None:
        """Says what went wrong."""
        if self.problems:
            logger.warning("validations that failed: %s", "; ".join(dict.fromkeys(self.problems)))

    def measure(self) -> Measured | None:
        """The loss with the weights of now; None when that fails in any process."""
        watch.heartbeat("validating")
        problem: Exception | None = None
        sums = torch.zeros(LEVELS + 1)
        try:
            with rng_untouched(self.ranks.device), self.evaluating(), torch.no_grad():
                sums = self._sums()
        except Exception as error:  # noqa: BLE001 - side work must never end the training
            problem = error
        watch.heartbeat("training")
        if self.ranks.any(problem is not None):
            self._complain(problem)
            return None
        self._failures = 0
        *losses, count = self.ranks.mean_later(sums.to(self.ranks.device)).read()
        levels = self.run.objective.even_sigmas(LEVELS)
        by_timestep = {round(1000 * level, 1): loss / count for level, loss in zip(levels, losses, strict=True)}
        return Measured(sum(by_timestep.values()) / LEVELS, by_timestep)

    def _sums(self) -> Tensor:
        """(LEVELS + 1,) float32 on the CPU: the losses of this process's images at each level, and their number."""
        device, levels = self.run.accelerator.device, self.run.objective.even_sigmas(LEVELS)
        losses, count = [torch.zeros(LEVELS, device=device)], 0
        for batch in self.batches():
            losses.append(_losses(self.run, batch.to(device), levels).sum(dim=1))
            count += len(batch.names)
            watch.heartbeat("validating")
        total = torch.stack(losses).cpu().double().sum(dim=0)
        return torch.cat([total, torch.tensor([float(count)])]).float()

    def _validate(self, state: RunState, when: str) -> None:
        memory = state.remembered.get(MEMORY)
        if memory is not None and memory["step"] == state.step:  # after the step, and now at the end of its epoch
            self._show(state, when, Measured(memory["loss"], {}))
            return
        if self._failures >= ERROR_BUDGET:
            return
        measured = self.measure()
        if measured is None:
            return
        if math.isfinite(measured.loss):
            state.remembered[MEMORY] = {"loss": measured.loss, "step": state.step}
        self._show(state, when, measured)
        for listener in self.listeners:
            listener(state, measured.loss)

    def _show(self, state: RunState, when: str, measured: Measured) -> None:
        """Gives the numbers to trackers and log; `divergence` is how much higher the loss is than the training's."""
        if not self.ranks.is_main:
            return
        values = {f"loss/validation/{when}_average": measured.loss}
        if math.isfinite(state.loss.average):
            values[f"loss/validation/{when}_divergence"] = measured.loss - state.loss.average
        values |= {f"loss/validation/timestep_{timestep:g}": loss for timestep, loss in measured.by_timestep.items()}
        self.log(values, state.step)
        if measured.by_timestep:
            parts = ", ".join(f"{timestep:g}: {loss:.4g}" for timestep, loss in measured.by_timestep.items())
            logger.info("validation loss %.6g at step %d (by timestep %s)", measured.loss, state.step, parts)

    def _complain(self, problem: Exception | None) -> None:
        self._failures += 1
        reason = str(problem) if isinstance(problem, UserError) else f"{type(problem).__name__}: {problem}"
        reason = "in another process" if problem is None else reason
        self.problems.append(reason)
        logger.warning("validation failed: %s - the training goes on", reason)
        if self._failures >= ERROR_BUDGET:
            logger.warning("validation failed %d times in a row: it is switched off", ERROR_BUDGET)


def _losses(run: Run, batch: Batch, levels: Sequence[float]) -> Tensor:
    """(levels, B): the losses of a batch's images at noise levels, each with noise of its own."""
    device = run.accelerator.device
    run.method.before_batch(batch)
    with run.accelerator.autocast():
        cond, latents = run.cond(batch), run.latents(batch)
    losses = []
    for number, level in enumerate(levels):
        draws = Draws([mix(seed, number) for seed in batch.draws], device)
        noised = run.objective.noise_at(latents, torch.full((len(batch.names),), level, device=device), draws)
        losses.append(sample_losses(run, targeted(run, batch, noised, cond), cond, batch.mask))
    return torch.stack(losses)
