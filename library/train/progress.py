"""How far a run is: a bar in a terminal, lines elsewhere."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from library.log import get_logger

logger = get_logger(__name__)


@dataclass(kw_only=True)
class ProgressLine:
    """How far the run is: a bar in a terminal, otherwise a line of the log every now and then."""

    total: int
    console: Any = None
    """A rich console; None: that of standard error."""
    every_seconds: float = 30.0
    """Distance of the lines where there is no terminal."""
    clock: Callable[[], float] = time.monotonic
    _times: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=100))
    _bar: Any = None
    _task: Any = None
    _last_line: float = float("-inf")

    def begin(self, step: int) -> None:
        """Starts at a step."""
        console = self.console if self.console is not None else _console_of_the_log()
        self._times.append((self.clock(), step))
        if not console.is_terminal:
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        self._bar = Progress(
            TextColumn("steps"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[numbers]}"),
            console=console,
            refresh_per_second=4,
        )
        self._task = self._bar.add_task("steps", total=self.total, completed=step, numbers="")
        self._bar.start()

    def update(self, step: int, epoch: int, numbers: Mapping[str, float]) -> None:
        """A step is done; `numbers` are shown behind it."""
        now = self.clock()
        self._times.append((now, step))
        if self._bar is not None:
            self._bar.update(self._task, completed=step, numbers=self._text(step, numbers))
        elif now - self._last_line >= self.every_seconds or step >= self.total:
            self._last_line = now
            logger.info("step %d/%d, epoch %d, %s", step, self.total, epoch, self._text(step, numbers))

    def end(self) -> None:
        """Takes the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def seconds_per_step(self) -> float | None:
        """Mean over the last hundred steps."""
        (begin, first), (end, last) = self._times[0], self._times[-1]
        return (end - begin) / (last - first) if last > first else None

    def _text(self, step: int, numbers: Mapping[str, float]) -> str:
        seconds = self.seconds_per_step()
        parts = []
        if seconds is not None:
            speed = f"{seconds:.2f} s/it" if seconds >= 1 else f"{1 / max(seconds, 1e-9):.2f} it/s"
            parts += [speed, f"{timedelta(seconds=round(seconds * (self.total - step)))} left"]
        return ", ".join([*parts, *(f"{name} {value:.4g}" for name, value in numbers.items())])


def _console_of_the_log() -> Any:
    """The console that log lines go to, so that they and the bar don't tear each other apart."""
    from rich.console import Console

    found = (getattr(handler, "console", None) for handler in logging.getLogger().handlers)
    return next((console for console in found if console is not None), None) or Console(stderr=True)
