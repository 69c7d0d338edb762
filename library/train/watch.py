"""A watchdog that says where the program is when nothing has moved for a while."""

from __future__ import annotations

import sys
import threading
import time
import traceback
from dataclasses import dataclass, field

from library import devices
from library.log import get_logger

logger = get_logger(__name__)


@dataclass(kw_only=True)
class Watchdog:
    """Logs the stack of the main thread once when no heartbeat has come for `patience` seconds."""

    patience: float = 60.0
    phase: str = "start"
    """What the program is doing, for the message."""
    _last: float = field(default_factory=time.monotonic)
    _said: bool = False
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None
    _watched: int = field(default_factory=threading.get_ident)

    def __enter__(self) -> Watchdog:
        self._watched = threading.get_ident()
        self.heartbeat(self.phase)
        self._stop.clear()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=5)
            self._thread = None

    def heartbeat(self, phase: str | None = None) -> None:
        """Something has moved; `phase` names what the program does from now on."""
        if phase is not None:
            self.phase = phase
        if self._said:
            logger.info("%s: going on after %.0f s", self.phase, time.monotonic() - self._last)
        self._last, self._said = time.monotonic(), False

    def _watch(self) -> None:
        while not self._stop.wait(min(1.0, self.patience / 4)):
            silence = time.monotonic() - self._last
            if silence < self.patience or self._said:
                continue
            self._said = True
            logger.warning(
                "%s: no progress for %.0f s; %s; the program is here:\n%s",
                self.phase,
                silence,
                devices.memory_line(devices.best_device()),
                self._stack(),
            )

    def _stack(self) -> str:
        frame = sys._current_frames().get(self._watched)
        return "(ended)" if frame is None else "".join(traceback.format_stack(frame)).rstrip()


_current: Watchdog | None = None


def start(patience: float = 60.0) -> None:
    """Starts the watchdog of the program, once."""
    global _current
    if _current is None:
        _current = Watchdog(patience=patience)
        _current.__enter__()


def stop() -> None:
    """Ends the watchdog of the program."""
    global _current
    if _current is not None:
        _current.__exit__(None, None, None)
        _current = None


def heartbeat(phase: str | None = None) -> None:
    """Tells the watchdog, if one runs, that something has moved."""
    if _current is not None:
        _current.heartbeat(phase)
