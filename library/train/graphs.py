"""`--cuda_graphs`: forward and backward are recorded once for each shape of batch, and repeated from then on.

With many small operations, as LoRA for SDXL has them, the device waits for Python. A recording is one call. It is made
of `loop.learn`, which takes tensors only: what the host draws and decides for a batch is in its `Task` before.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from library.log import get_logger
from library.option_groups import MemoryOptions
from library.recording import Recorder as DeviceRecorder
from library.train.combinations import against_graphs
from library.train.loop import BatchLoss, Run, Task, learn
from library.types import Chance

if TYPE_CHECKING:
    from library.methods.base import Method
    from library.options import Options

logger = get_logger(__name__)

REHEARSALS = 2
"""Batches of a shape that are computed as usual before one is recorded."""
MOST_MOVES = 3
"""How often weights may change their place until nothing is recorded any more."""

Learn = Callable[[Run, Task], BatchLoss]


class Recorder(Protocol):
    """See `library.recording.Recorder`."""

    def rehearse(self, compute: Callable[[], BatchLoss]) -> tuple[BatchLoss, str]:
        """What is computed, and why that can't be recorded; empty where nothing is known against it."""

    def record(self, compute: Callable[[], BatchLoss]) -> tuple[Callable[[], None], BatchLoss]:
        """What repeats it, and what it gives; nothing is computed yet. Errors: RuntimeError."""

    def forget(self) -> None:
        """All recordings are gone."""


def learner(options: Options, method: Method, device: torch.device) -> Learn:
    """What computes gradients: `Recorded` if it is asked for and can be, else `loop.learn`; a line says why not."""
    if not options[MemoryOptions].cuda_graphs or against_graphs(options) is not None:  # of which findings have told
        return learn
    obstacle = _obstacle(method, device, recomputes=options[MemoryOptions].gradient_checkpointing)
    if obstacle is None:
        return Recorded(DeviceRecorder(device))
    _say(obstacle)
    return learn


def _obstacle(method: Method, device: torch.device, *, recomputes: bool) -> str | None:
    """Why nothing can be recorded, in words; None: it can."""
    chance = method.chance()
    causes = (
        (device.type != "cuda", "it is for Nvidia GPUs"),
        (bool(method.trained_encoders()), "text encoders are trained, whose captions differ from batch to batch"),
        (chance == Chance.HOST, "the network decides by chance, batch by batch, what is computed"),
        (chance == Chance.DEVICE and recomputes, "dropouts have to be repeated for --gradient_checkpointing"),
    )
    return next((cause for applies, cause in causes if applies), None)


def _say(cause: str) -> None:
    logger.warning("--cuda_graphs: nothing is recorded from here on, and the training goes on as without it: %s", cause)


def signature(task: Task) -> Hashable:
    """Equal for tasks that one recording can compute."""
    tensors = sorted(task.tensors().items())
    return task.multiplier, tuple((name, tensor.shape, tensor.dtype) for name, tensor in tensors)


class Gradients:
    """Where recordings add their gradients up: one tensor for each parameter, whatever the number of recordings."""

    def __init__(self) -> None:
        self._own: dict[nn.Parameter, Tensor] = {}

    @torch.no_grad()
    def attach(self, parameters: Iterable[nn.Parameter]) -> None:
        """Makes them the gradients of parameters, with what these have by now: of earlier batches of the step, or 0."""
        fresh: list[Tensor] = []
        taken: list[tuple[Tensor, Tensor]] = []
        for parameter in parameters:
            own = self._own.get(parameter)
            if own is None:
                own = self._own[parameter] = torch.empty_like(parameter)
            if parameter.grad is own:
                continue
            if parameter.grad is None:
                fresh.append(own)
            else:
                taken.append((own, parameter.grad))
            parameter.grad = own
        if fresh:
            torch._foreach_zero_(fresh)
        if taken:
            torch._foreach_copy_([own for own, _ in taken], [before for _, before in taken])


@dataclass(frozen=True)
class _Recording:
    task: Task
    """Whose tensors it reads."""
    repeat: Callable[[], None]
    loss: BatchLoss
    """What it writes."""


class Recorded:
    """Does what `loop.learn` does, to the last bit where the device computes the same twice.

    The first batches of a shape are computed as usual, which gets libraries ready; then the shape is recorded. A
    parameter without a gradient keeps having none. Where recording fails, a line says why, and all is computed as
    usual from there on.
    """

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._recordings: dict[Hashable, _Recording] = {}
        self._rehearsals: Counter[Hashable] = Counter()
        self._touched: dict[Hashable, Sequence[nn.Parameter]] = {}
        """Parameters that get gradients from batches of a shape."""
        self._gradients = Gradients()
        self._weights: Sequence[nn.Parameter] = ()
        self._places: tuple[int, ...] = ()
        """Where the weights lay when the first recording was made."""
        self._moves = 0
        self._given_up = False

    def __call__(self, run: Run, task: Task) -> BatchLoss:
        """See `loop.learn`."""
        if self._given_up:
            return learn(run, task)
        key = signature(task)
        if self._rehearsals[key] < REHEARSALS:
            return self._rehearse(run, task, key)
        self._look_for_moves(run)
        if key not in self._recordings and not self._given_up:
            self._record(run, task, key)
        return learn(run, task) if self._given_up else self._repeat(task, key)

    def _rehearse(self, run: Run, task: Task, key: Hashable) -> BatchLoss:
        with _noting(run.method.parameters()) as touched:
            loss, obstacle = self._recorder.rehearse(lambda: learn(run, task))
        self._rehearsals[key] += 1
        self._touched[key] = touched
        if obstacle and self._rehearsals[key] == REHEARSALS:  # the first time libraries may wait for what they load
            self._give_up(obstacle)
        return loss

    def _record(self, run: Run, task: Task, key: Hashable) -> None:
        own = task.changed(torch.clone)
        self._gradients.attach(self._touched[key])
        try:
            repeat, loss = self._recorder.record(lambda: learn(run, own))
        except RuntimeError as error:  # also a lack of memory
            self._give_up(next(iter(str(error).splitlines()), type(error).__name__))
        else:
            self._recordings[key] = _Recording(own, repeat, loss)

    @torch.no_grad()
    def _repeat(self, task: Task, key: Hashable) -> BatchLoss:
        recording = self._recordings[key]
        given = task.tensors()
        for name, own in recording.task.tensors().items():
            own.copy_(given[name], non_blocking=True)
        self._gradients.attach(self._touched[key])
        recording.repeat()
        share, bands = recording.loss
        return BatchLoss(share.clone(), bands.clone())  # they are read when the next batch is computed

    def _look_for_moves(self, run: Run) -> None:
        """Drops the recordings if weights lie elsewhere than they did."""
        self._weights = self._weights or [*run.method.parameters(), *run.denoiser.parameters()]
        places = tuple(weight.data_ptr() for weight in self._weights)
        if places == self._places:
            return
        if self._recordings:
            self._moves += 1
            self._drop()
        self._places = places
        if self._moves > MOST_MOVES:
            self._give_up("the weights change their place again and again")

    def _give_up(self, cause: str) -> None:
        self._given_up = True
        self._drop()
        self._gradients = Gradients()
        _say(cause)

    def _drop(self) -> None:
        self._recordings.clear()
        self._recorder.forget()


@contextmanager
def _noting(parameters: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Those of the parameters that get gradients meanwhile."""
    touched: list[nn.Parameter] = []
    hooks = [
        parameter.register_post_accumulate_grad_hook(touched.append)  # type: ignore[no-untyped-call]
        for parameter in parameters
    ]
    try:
        yield touched
    finally:
        for hook in hooks:
            hook.remove()
