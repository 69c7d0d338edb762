"""The training loop: one for every family, method and objective."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
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


@dataclass(kw_only=True, frozen=True)
class Task:
    """What the device computes for a micro-batch. All that the host draws, looks at and decides is in it already."""

    noised: Noised
    cond: Cond
    weights: Tensor
    """(B,): how much each sample counts."""
    mask: Tensor | None
    """(B, 1, h, w)"""
    multiplier: float
    """Strength of the network, which has been told of it."""

    def tensors(self) -> dict[str, Tensor]:
        """All tensors, by name."""
        noised = {field.name: getattr(self.noised, field.name) for field in fields(self.noised)}
        beside = {"weights": self.weights, **({} if self.mask is None else {"mask": self.mask})}
        return {**noised, **beside, **{f"cond.{name}": tensor for name, tensor in self.cond.items()}}

    def changed(self, change: Callable[[Tensor], Tensor]) -> Task:
        """This task with something done to each tensor."""
        noised = {field.name: change(getattr(self.noised, field.name)) for field in fields(self.noised)}
        return replace(
            self,
            noised=Noised(**noised),
            cond={name: change(tensor) for name, tensor in self.cond.items()},
            weights=change(self.weights),
            mask=None if self.mask is None else change(self.mask),
        )


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
    learn: Callable[[Run, Task], BatchLoss]
    """`learn` below, or what comes to the same, see `library.train.graphs`."""


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
            loss = run.learn(run, task_of(run, batch.to(run.accelerator.device)))
            state.saw(batch, loss.share, loss.bands)
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


def task_of(run: Run, batch: Batch) -> Task:
    """What is to be computed for a micro-batch."""
    run.method.before_batch(batch)
    with run.accelerator.autocast():
        draws = Draws(batch.draws, run.accelerator.device)
        cond = run.family.vary(run.cond(batch), batch.size, draws)
        noised = run.objective.noise(run.latents(batch), draws)
    return Task(
        noised=targeted(run, batch, noised, cond),
        cond=cond,
        weights=batch.loss_weights,
        mask=batch.mask,
        multiplier=batch.multiplier,
    )


def learn(run: Run, task: Task) -> BatchLoss:
    """Forward and backward: gradients are there, or more by these. Waits for nothing, and looks at no number."""
    loss = loss_of(run, task)
    run.accelerator.backward(loss.share)
    return BatchLoss(loss.share.detach(), loss.bands)


def loss_of(run: Run, task: Task) -> BatchLoss:
    """The loss of a task, of the weights of now."""
    losses = sample_losses(run, task.noised, task.cond, task.mask)
    return BatchLoss((losses * task.weights).sum(), bands.sums(losses, task.noised.timesteps, task.weights))


def sample_losses(run: Run, noised: Noised, cond: Cond, mask: Tensor | None) -> Tensor:
    """(B,): how wrong the denoiser is about each sample."""
    return run.objective.loss(_predict(run, noised, cond), noised, mask)


def targeted(run: Run, batch: Batch, noised: Noised, cond: Cond) -> Noised:
    """The task with the target that the method wants."""
    return run.method.target(
        noised, batch, cond, lambda part, of: run.objective.estimate(_predict(run, part, of), part)
    )


def _predict(run: Run, noised: Noised, cond: Cond) -> Tensor:
    with run.accelerator.autocast():
        prediction = run.family.predict(run.denoiser, noised.input, noised.timesteps, cond)
    return prediction.float()
