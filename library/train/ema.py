"""An exponential moving average of what is trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from library.train.ranks import PINNING

BUNCH_ELEMENTS = 1 << 24
"""Most elements that are converted to float32 at a time (a larger tensor goes alone)."""


class StepCount(Protocol):
    """What is told of a step; only that there was one counts."""

    step: int


def ema_path(path: Path, extension: str | None = None) -> Path:
    """Where the average goes that belongs to a model of this extension; None: of the path's own, empty: a folder."""
    extension = path.suffix if extension is None else extension
    return path.with_name(f"{path.name.removesuffix(extension)}-ema{extension}")


class MovingAverage:
    """The average a of each trained tensor w, in float32: a_0 = w_0, and a_n = d a_(n-1) + (1 - d) w_n after step n.

    So a_n = d^n w_0 + (1 - d) sum_i d^(n-i) w_i: the plain closed form, without a warm-up of the decay d. After n steps
    the weights from before the training still have a share of d^n: about 1 / (1 - d) steps count.

    An average lies where its tensor does, or in main memory. Nothing waits for the device: what goes to main memory is
    sent after a step, and taken in after the next one. It is an observer of the run, and has to be the first one.
    """

    def __init__(
        self,
        tensors: Callable[[], Mapping[str, Tensor]],
        decay: float,
        *,
        on_cpu: bool = False,
        settle: Callable[[], None] | None = None,
    ) -> None:
        """Begins with the tensors as they are.

        Args:
            tensors: gives the trained tensors by name, always the same ones: `Method.state_dict`. Those that don't hold
                floating-point numbers are left alone.
            decay: d, 0 to 1.
            settle: called before the tensors are used, to bring home those that are on their way between memories.
        """
        self._tensors, self._settle = tensors, settle
        self.decay, self.on_cpu = decay, on_cpu
        self._averages: dict[str, Tensor] = {}
        self._sent: dict[str, Tensor] = {}  # copies in main memory
        self._arrival: Any = None
        """Event after which `_sent` holds what was sent; None: nothing is on the way."""
        self.restart()

    def restart(self) -> None:
        """Makes the tensors of now the average."""
        self._arrival = None
        self._averages = {name: self._start(value) for name, value in self._values().items()}

    def after_step(self, state: StepCount) -> None:
        """Takes in the tensors as they are after a step."""
        self.update()

    def after_epoch(self, state: StepCount) -> None:
        """Does nothing."""

    @torch.no_grad()
    def update(self) -> None:
        """Takes in the tensors as they are."""
        self._receive()
        values = self._values()
        sent = {name: value for name, value in values.items() if _apart(self._average(name), value)}
        self._blend({name: value for name, value in values.items() if name not in sent})
        if sent:
            self._send(sent)

    @contextmanager
    @torch.no_grad()
    def in_place(self) -> Iterator[None]:
        """The model has the averages for weights, for a while; afterwards it has its own, bit for bit.

        Float32 tensors and their averages change places, one after the other; tensors of other types wait in main
        memory.
        """
        self._receive()
        swapped: list[str] = []
        kept: dict[str, Tensor] = {}
        try:
            for name, value in self._values().items():
                self._take(name, value, kept)
                swapped.append(name)
            yield
        finally:
            values = self._values() if swapped else {}
            for name in reversed(swapped):  # a tensor with two names changes places twice
                if name in kept:
                    values[name].copy_(kept.pop(name))
                else:
                    _exchange(values[name], self._average(name))

    def state_dict(self) -> dict[str, Any]:
        """The averages by name; waits for what is on its way."""
        self._receive()
        return {"averages": dict(self._averages)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from averages of `state_dict`. Errors: ValueError when they are of other tensors."""
        saved = state["averages"]
        shapes, wanted = ({name: tuple(value.shape) for name, value in of.items()} for of in (saved, self._averages))
        if shapes != wanted:
            odd = sorted(name for name in shapes.keys() | wanted.keys() if shapes.get(name) != wanted.get(name))
            raise ValueError(f"the average is of other weights ({odd[0]})")
        self._arrival = None
        for name, average in self._averages.items():
            average.copy_(saved[name])

    # tensors

    def _values(self) -> dict[str, Tensor]:
        if self._settle is not None:
            self._settle()
        return {name: value.detach() for name, value in self._tensors().items() if value.is_floating_point()}

    def _average(self, name: str) -> Tensor:
        return self._averages[name]

    def _start(self, value: Tensor) -> Tensor:
        return value.to("cpu" if self.on_cpu else value.device, torch.float32, copy=True)

    def _blend(self, values: Mapping[str, Tensor]) -> None:
        """Takes in values that lie where their averages do."""
        for bunch in _bunches(values):
            averages = [self._average(name) for name in bunch]
            torch._foreach_lerp_(averages, [values[name].float() for name in bunch], 1 - self.decay)

    def _send(self, values: Mapping[str, Tensor]) -> None:
        """Starts the way of values to main memory."""
        device = next(iter(values.values())).device
        pinned = device.type in PINNING
        for name, value in values.items():
            if name not in self._sent:
                self._sent[name] = torch.empty(value.shape, dtype=value.dtype, pin_memory=pinned)
            self._sent[name].copy_(value, non_blocking=pinned)
        self._arrival = torch.Event(device=device)
        self._arrival.record()

    def _receive(self) -> None:
        """Takes in what was sent after the last step."""
        if self._arrival is not None:
            self._arrival.synchronize()
            self._arrival = None
            self._blend(self._sent)

    def _take(self, name: str, value: Tensor, kept: dict[str, Tensor]) -> None:
        average = self._average(name)
        if value.dtype == average.dtype:
            _exchange(value, average)
        else:
            kept[name] = value.to("cpu", copy=True)
            value.copy_(average)


def _apart(average: Tensor, value: Tensor) -> bool:
    return average.device != value.device


def _exchange(one: Tensor, other: Tensor) -> None:
    before = one.clone()
    one.copy_(other)
    other.copy_(before)


def _bunches(values: Mapping[str, Tensor]) -> Iterator[list[str]]:
    """Names of tensors of one device each, up to the size of a bunch."""
    bunch: list[str] = []
    size = 0
    for name in sorted(values, key=lambda name: str(values[name].device)):
        value = values[name]
        if bunch and (size + value.numel() > BUNCH_ELEMENTS or values[bunch[0]].device != value.device):
            yield bunch
            bunch, size = [], 0
        bunch.append(name)
        size += value.numel()
    if bunch:
        yield bunch
