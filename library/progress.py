"""A sign of life for work that takes long: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from datetime import timedelta
from types import TracebackType
from typing import Any

from library.log import get_logger

logger = get_logger(__name__)

SECONDS_BETWEEN_LINES = 30.0


class Progress:
    """Counts finished units of work; a context manager."""

    def __init__(self, description: str, total: int, unit: str, *, visible: bool = True) -> None:
        self.description, self.total, self.unit = description, total, unit
        self.done = 0
        self._visible = visible and total > 0
        self._started = self._last_line = time.monotonic()
        self._bar: Any = None

    def __enter__(self) -> Progress:
        if self._visible:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            console = Console(stderr=True)
            if console.is_terminal:
                columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
                self._bar = Bar(*columns, TimeRemainingColumn(), console=console, transient=True)
                self._task = self._bar.add_task(self.description, total=self.total, rate="")
                self._bar.start()
        return self

    def advance(self, count: int = 1) -> None:
        """Notes that so much more is done."""
        self.done += count
        if self._bar is not None:
            self._bar.update(self._task, advance=count, rate=self.rate())
        elif self._visible and time.monotonic() - self._last_line > SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            left = (self.total - self.done) * (self._last_line - self._started) / max(self.done, 1)
            logger.info(
                "%s: %d of %d, %s, %s left",
                *(self.description, self.done, self.total, self.rate(), timedelta(seconds=round(left))),
            )

    def rate(self) -> str:
        """The speed so far."""
        return f"{self.done / max(time.monotonic() - self._started, 1e-9):.1f} {self.unit}/s"

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
