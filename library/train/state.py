"""The state of a run: everything that decides its next step and isn't a tensor."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Protocol

from library import bands
from library.log import UserError, get_logger
from library.train.ranks import Later, Ranks

if TYPE_CHECKING:
    from torch import Tensor

    from library.train.plan import Plan

logger = get_logger(__name__)


class SeenBatch(Protocol):
    """What the state wants to know of a batch."""

    @property
    def names(self) -> Sequence[str]:
        """Image paths."""

    @property
    def epoch(self) -> int:
        """Counted from 1."""

    @property
    def index(self) -> int:
        """Position in the epoch."""


@dataclass(frozen=True)
class Reading:
    """The numbers of one optimizer step, known one step later."""

    step: int
    loss: float
    """Mean over all samples of the step, in all processes."""
    average: float
    """Mean of the last loss of each step of the epoch."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Other values of the step, such as `grad_norm`."""
    names: tuple[str, ...] = ()
    """Images that this process had in the step."""
    smoothed: float = math.nan
    """Exponential moving average of the loss over the whole run."""
    by_band: Mapping[str, float] = field(default_factory=dict)
    """Mean losses by noise level, under the names of `bands.tag`; only levels that the step had."""


@dataclass(kw_only=True)
class _Pending:
    step: int
    numbers: Later | list[float]
    """The loss, the metrics, and what `bands.sums` gave."""
    metric_names: tuple[str, ...]
    names: tuple[str, ...]

    def read(self) -> list[float]:
        return self.numbers if isinstance(self.numbers, list) else self.numbers.read()

    def named(self) -> dict[str, float]:
        """The loss and the metrics."""
        return dict(zip(("loss", *self.metric_names), self.read(), strict=False))

    def by_band(self) -> list[float]:
        """What `bands.sums` gave."""
        return self.read()[1 + len(self.metric_names) :]


SMOOTHING = 0.99
"""Share of the smoothed loss that stays with each step."""


class LossWindow:
    """The moving average of the loss over one epoch, fed with tensors and read one step late.

    It keeps one slot for each optimizer step of an epoch: during the first epoch the average is the mean so far, later
    each loss replaces the one of the same place in the epoch before. A loss that isn't finite stays out of the average.
    """

    def __init__(self, length: int, ranks: Ranks | None = None) -> None:
        """`length` is the number of optimizer steps in an epoch."""
        self.length = max(length, 1)
        self.ranks = ranks or Ranks()
        self._slots: list[float] = []
        self._total, self._finite = Fraction(0), 0  # of the finite slots; exact, so that a resumed run has the same
        self._smoothed, self._steps = 0.0, 0
        self._sum: Tensor | None = None
        self._bands: Tensor | None = None
        self._names: list[str] = []
        self._pending: deque[_Pending] = deque()

    @property
    def average(self) -> float:
        """The moving average; NaN before the first finite loss."""
        return float(self._total / self._finite) if self._finite else math.nan

    @property
    def smoothed(self) -> float:
        """The exponential moving average over all steps; NaN before the first finite loss."""
        return self._smoothed / (1 - SMOOTHING**self._steps) if self._steps else math.nan

    def add(self, loss: Tensor, names: Sequence[str] = (), by_band: Tensor | None = None) -> None:
        """Takes the (0-d) loss of a micro-batch, its share of the loss of the step, and what `bands.sums` gave."""
        loss = loss.detach().float()
        self._sum = loss if self._sum is None else self._sum + loss
        if by_band is not None:
            self._bands = by_band if self._bands is None else self._bands + by_band
        self._names.extend(names)

    def close(self, step: int, metrics: Mapping[str, Tensor | float] | None = None) -> list[Reading]:
        """Ends the optimizer step with this number and gives the readings of the steps before it."""
        import torch

        device = self._sum.device if self._sum is not None else self.ranks.device
        loss = self._sum if self._sum is not None else torch.zeros((), device=device)
        metrics = metrics or {}
        values = [
            torch.as_tensor(value, dtype=torch.float32).to(device, non_blocking=True) for value in metrics.values()
        ]
        numbers = torch.stack([loss.reshape(()), *(value.detach().reshape(()) for value in values)])
        by_band = torch.zeros(bands.NUMBERS, device=device) if self._bands is None else self._bands
        later = self.ranks.mean_later(torch.cat((numbers, by_band)))
        earlier = self.drain()
        self._pending.append(_Pending(step=step, numbers=later, metric_names=tuple(metrics), names=tuple(self._names)))
        self._sum, self._bands, self._names = None, None, []
        return earlier

    def peek(self) -> list[Mapping[str, float]]:
        """The loss and the metrics of the steps that are still unread, which stay unread; waits for the device."""
        for pending in self._pending:
            pending.numbers = pending.read()
        return [pending.named() for pending in self._pending]

    def drain(self) -> list[Reading]:
        """Gives all readings that are left; waits for the device."""
        readings = [self._read(pending) for pending in self._pending]
        self._pending.clear()
        return readings

    def _read(self, pending: _Pending) -> Reading:
        metrics = pending.named()
        loss = metrics.pop("loss")
        slot = (pending.step - 1) % self.length
        self._slots.extend([math.nan] * (slot + 1 - len(self._slots)))
        self._count(self._slots[slot], -1)
        self._slots[slot] = loss
        self._count(loss, 1)
        if math.isfinite(loss):
            self._smoothed, self._steps = SMOOTHING * self._smoothed + (1 - SMOOTHING) * loss, self._steps + 1
        return Reading(
            pending.step, loss, self.average, metrics, pending.names, self.smoothed, bands.means(pending.by_band())
        )

    def _count(self, loss: float, sign: int) -> None:
        """Adds a loss to the sum, or takes it out."""
        if math.isfinite(loss):
            self._total += sign * Fraction(loss)
            self._finite += sign

    def state_dict(self) -> dict[str, Any]:
        """The window as JSON values; a step that hasn't been read yet stays unread."""
        self.peek()
        return {
            "length": self.length,
            "slots": _writable(self._slots),
            "smoothed": [self._smoothed, self._steps],
            "pending": [
                {"step": item.step, "numbers": _writable(item.read()), "metrics": list(item.metric_names)}
                for item in self._pending
            ],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a window of `state_dict`; slots of an epoch of another length are left out."""
        self._slots = [float(value) for value in state["slots"]] if state["length"] == self.length else []
        self._smoothed, self._steps = state.get("smoothed", (0.0, 0))
        self._total, self._finite = Fraction(0), 0
        for loss in self._slots:
            self._count(loss, 1)
        self._pending = deque(
            _Pending(
                step=int(item["step"]),
                numbers=[float(number) for number in item["numbers"]],
                metric_names=tuple(item["metrics"]),
                names=(),
            )
            for item in state["pending"]
        )


def _writable(numbers: Sequence[float]) -> list[float | str]:
    """JSON knows no NaN and no infinity; they become words that `float` understands."""
    return [number if math.isfinite(number) else str(number) for number in numbers]


@dataclass(frozen=True)
class Requests:
    """What has been asked of the run from outside."""

    save: bool = False
    sample: bool = False
    stop: bool = False


@dataclass(kw_only=True)
class RunState:
    """Where the run is. `epoch` and `batch` always point at the next micro-batch."""

    seed: int
    total_steps: int
    batches_per_epoch: int
    """Micro-batches of each process in an epoch."""
    loss: LossWindow
    step: int = 0
    """Optimizer steps done."""
    epoch: int = 1
    """Epoch of the next micro-batch, counted from 1."""
    batch: int = 0
    """Micro-batches done in this epoch; equal to `batches_per_epoch` until the epoch is closed."""
    last_saved: int = 0
    """Step of the newest weights on disk."""
    nonfinite_in_a_row: int = 0
    nonfinite_limit: int = 3
    """Non-finite steps in a row that stop the run; 0 never stops."""
    watched: tuple[str, ...] = ("grad_norm",)
    """Metrics that count as non-finite like the loss; empty with a gradient scaler, which handles its own overflow."""
    dataset: str = ""
    """Fingerprint of the dataset."""
    options: Mapping[str, str] = field(default_factory=dict)
    """Options of the run as text, without secrets."""
    ended: bool = False
    """Whether the run is over before its last step, since nothing improves any more; not saved."""
    remembered: dict[str, dict[str, float]] = field(default_factory=dict)
    """What observers must not forget, by their name; finite numbers."""
    requests: Requests = Requests()
    """What was asked for since the last step; not saved."""
    readings: list[Reading] = field(default_factory=list)
    """Numbers that became known with the last step; not saved."""

    @classmethod
    def begin(cls, plan: Plan, seed: int, ranks: Ranks | None = None, **more: Any) -> RunState:
        """The state before the first step of a plan."""
        return cls(
            seed=seed,
            total_steps=plan.total_steps,
            batches_per_epoch=plan.batches_per_process,
            loss=LossWindow(plan.steps_per_epoch, ranks),
            **more,
        )

    @property
    def finished(self) -> bool:
        """Whether the run has reached its end or has been asked to stop."""
        return self.complete or self.requests.stop

    @property
    def complete(self) -> bool:
        """Whether the run has made all its steps, or needs no more."""
        return self.ended or self.step >= self.total_steps

    @property
    def epochs_done(self) -> int:
        """Number of the last finished epoch."""
        return self.epoch - 1

    @property
    def current_epoch(self) -> int:
        """Number of the epoch that the last step belongs to, counted from 1."""
        return self.epoch if self.batch or self.epoch == 1 else self.epoch - 1

    def saw(self, batch: SeenBatch, loss: Tensor, by_band: Tensor | None = None) -> None:
        """A micro-batch has gone backward; `loss` is its (0-d) share of the step's, `by_band` see `bands.sums`."""
        self.epoch, self.batch = batch.epoch, batch.index + 1
        self.loss.add(loss, batch.names, by_band)

    def stepped(self, metrics: Mapping[str, Tensor | float] | None = None) -> None:
        """The optimizer has stepped. Errors: UserError when too many steps in a row weren't finite."""
        self.step += 1
        self.requests = Requests()
        self.readings = self.loss.close(self.step, metrics)
        for reading in self.readings:
            self._judge(reading)

    def completes_epoch(self) -> bool:
        """Whether all micro-batches of the epoch are done; then `epoch` moves on to the next one."""
        if self.batch < self.batches_per_epoch:
            return False
        self.epoch, self.batch = self.epoch + 1, 0
        self._settle()
        return True

    def finish(self) -> None:
        """Reads what is still unread, at the end of the run."""
        self._settle()

    def is_sound(self) -> bool:
        """Whether the newest step was finite; waits for the device."""
        unread = self.loss.peek()
        watched = ("loss", *self.watched)
        return all(math.isfinite(numbers[name]) for numbers in unread for name in watched if name in numbers) and (
            bool(unread) or not self.nonfinite_in_a_row
        )

    def _settle(self) -> None:
        self.readings = self.loss.drain()
        for reading in self.readings:
            self._judge(reading)

    def _judge(self, reading: Reading) -> None:
        watched = {"loss": reading.loss} | {
            name: reading.metrics[name] for name in self.watched if name in reading.metrics
        }
        bad = [f"{name} {value}" for name, value in watched.items() if not math.isfinite(value)]
        if not bad:
            self.nonfinite_in_a_row = 0
            return
        self.nonfinite_in_a_row += 1
        where = f"step {reading.step}, {', '.join(reading.names) or 'batch unknown'}"
        logger.warning("%s is not finite at %s", " and ".join(bad), where)
        if self.nonfinite_limit and self.nonfinite_in_a_row >= self.nonfinite_limit:
            raise UserError(
                f"{self.nonfinite_in_a_row} steps in a row were not finite ({' and '.join(bad)})",
                where,
                "lower the learning rate, use --mixed_precision bf16 instead of fp16, or check these images; "
                f"the newest good weights are of step {self.last_saved}",
                code="E-NONFINITE",
            )

    def state_dict(self) -> dict[str, Any]:
        """The state as JSON values."""
        return {
            "step": self.step,
            "epoch": self.epoch,
            "batch": self.batch,
            "batches_per_epoch": self.batches_per_epoch,
            "total_steps": self.total_steps,
            "seed": self.seed,
            "last_saved": self.last_saved,
            "nonfinite_in_a_row": self.nonfinite_in_a_row,
            "dataset": self.dataset,
            "options": dict(self.options),
            "remembered": {name: dict(values) for name, values in self.remembered.items()},
            "loss": self.loss.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state of `state_dict`; length and fingerprints stay those of this run."""
        self.step, self.epoch, self.batch = int(state["step"]), int(state["epoch"]), int(state["batch"])
        self.seed = int(state["seed"])
        self.last_saved = int(state["last_saved"])
        self.nonfinite_in_a_row = int(state["nonfinite_in_a_row"])
        self.remembered = {name: dict(values) for name, values in state.get("remembered", {}).items()}
        self.loss.load_state_dict(state["loss"])
