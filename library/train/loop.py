"""The training loop: one for every family, method and objective."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from library import bands
from library.randomness import Draws
from library.types import Batch, Cond, Noised

if TYPE_CHECKING:
    from torch import Tensor, nn

    from library.families.base import Family
    from library.methods.base import Method
    from library.objectives import Objective
    from library.train.state import RunState
    from library.train.steppers import AnyStepper


class Observer(Protocol):
    """Somebody who watches the run: logs, checkpoints, previews."""

    def after_step(self, state: RunState) -> None:
        """Called after each optimizer step."""

    def after_epoch(self, state: RunState) -> None:
        """Called after each finished epoch."""


@dataclass(kw_only=True)
class Run:
    """Everything that `fit` needs; `library.app` assembles it."""

    accelerator: Any
    family: Family
    method: Method
    objective: Objective
    denoiser: nn.Module
    batches: Callable[[int, int], Iterable[Batch]]
    """The micro-batches of this process in an epoch (from 1), from a position on."""
    cond: Callable[[Batch], Cond]
    """The text outputs of a batch, cached or live."""
    latents: Callable[[Batch], Tensor]
    """The latents of a batch, cached or live."""
    stepper: AnyStepper
    state: RunState
    observers: Sequence[Observer]


class BatchLoss(NamedTuple):
    """The loss of a micro-batch."""

    share: Tensor
    """0-d, so weighted that the sum over a step's batches is the mean over its samples."""
    bands: Tensor
    """Losses by noise level, see `bands.sums`."""


def fit(run: Run) -> None:
    """Trains until the state says that the run is finished or has been asked to stop."""
    state = run.state
    while not state.finished:
        for batch in run.batches(state.epoch, state.batch):
            loss = batch_loss(run, batch.to(run.accelerator.device))
            run.accelerator.backward(loss.share)
            state.saw(batch, loss.share.detach(), loss.bands)
            if not batch.completes_step:
                continue
            state.stepped(run.stepper.step(state.step + 1))
            for observer in run.observers:
                observer.after_step(state)
            if state.finished:
                break
        if state.completes_epoch():
            for observer in run.observers:
                observer.after_epoch(state)


def batch_loss(run: Run, batch: Batch) -> BatchLoss:
    """The loss of a micro-batch, of the weights of now."""
    run.method.before_batch(batch)
    with run.accelerator.autocast():
        draws = Draws(batch.draws, run.accelerator.device)
        cond = run.family.vary(run.cond(batch), batch.size, draws)
        noised = run.objective.noise(run.latents(batch), draws)
    losses, weights = sample_losses(run, batch, noised, cond), batch.loss_weights
    return BatchLoss(share=(losses * weights).sum(), bands=bands.sums(losses, noised.timesteps, weights))


def sample_losses(run: Run, batch: Batch, noised: Noised, cond: Cond) -> Tensor:
    """(B,): how wrong the denoiser is about each sample of a batch."""
    objective = run.objective

    def predict(noised: Noised, cond: Cond) -> Tensor:
        with run.accelerator.autocast():
            prediction = run.family.predict(run.denoiser, noised.input, noised.timesteps, cond)
        return prediction.float()

    prediction = predict(noised, cond)
    noised = run.method.target(noised, batch, cond, lambda part, of: objective.estimate(predict(part, of), part))
    return objective.loss(prediction, noised, batch.mask)
