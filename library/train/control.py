"""What people ask of a run from outside: signals, and a control file in the output folder."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from library.log import get_logger
from library.train.ranks import Later, Ranks
from library.train.state import Requests, RunState

logger = get_logger(__name__)

WORDS = ("save", "sample", "stop")
ECHO_SECONDS = 1.0
"""A launcher passes an interrupt on to its children; a second one within this time isn't meant as a second one."""
POLL_SECONDS = 1.0


@dataclass(kw_only=True)
class Control:
    """Listens while it is entered, and puts what was asked for into `RunState.requests` after each step.

    Ctrl-C, SIGTERM and SIGBREAK ask for a stop: the step is finished, weights and state are saved, the exit code is 0.
    Ctrl-C again ends the program at once. The file `<output_name>.control`, or `control`, may hold the words `save`,
    `sample` and `stop`; it is looked at once a second at most and removed when read. With several processes a request
    takes effect one step later, in all of them at the same step.
    """

    output_dir: Path
    output_name: str | None = None
    ranks: Ranks = field(default_factory=Ranks)
    clock: Callable[[], float] = time.monotonic
    _asked: set[str] = field(default_factory=set)
    _first_interrupt: float | None = None
    _last_poll: float = float("-inf")
    _handlers: dict[int, Any] = field(default_factory=dict)
    _votes: Later | None = None

    def __enter__(self) -> Control:
        for path in self._paths():
            if path.exists():
                logger.warning("%s was there before the run began; it is removed and not obeyed", path)
                _remove(path)
        if threading.current_thread() is threading.main_thread():
            for name in ("SIGINT", "SIGTERM", "SIGBREAK"):
                number = getattr(signal, name, None)
                if number is not None:
                    self._handlers[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._handlers.clear()

    def ask(self, word: str) -> None:
        """Asks for `save`, `sample` or `stop` from inside the program."""
        assert word in WORDS
        self._asked.add(word)

    def after_step(self, state: RunState) -> None:
        """Sets `state.requests`; must run before the other observers."""
        state.requests = self.poll()
        if state.requests.stop:
            logger.info("stopping after step %d, as asked", state.step)

    def after_epoch(self, state: RunState) -> None:
        """Nothing happens at ends of epochs."""

    def poll(self) -> Requests:
        """What has been asked for since the last call. All processes must call it equally often."""
        if self.ranks.is_main:
            self._read_file()
        asked, self._asked = self._asked, set()
        if self.ranks.world == 1:
            return Requests(**dict.fromkeys(asked, True))
        before, self._votes = self._votes, self.ranks.numbers_later([float(word in asked) for word in WORDS])
        if before is None:
            return Requests()
        return Requests(**{word: vote > 0 for word, vote in zip(WORDS, before.read(), strict=True)})

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = self.clock()
        interrupt = number != getattr(signal, "SIGTERM", None)
        if interrupt and self._first_interrupt is not None and now - self._first_interrupt > ECHO_SECONDS:
            raise KeyboardInterrupt
        if interrupt and self._first_interrupt is None:
            self._first_interrupt = now
        if "stop" not in self._asked:
            self._asked.add("stop")

    def _paths(self) -> list[Path]:
        names = ([f"{self.output_name}.control"] if self.output_name else []) + ["control"]
        return [self.output_dir / name for name in names]

    def _read_file(self) -> None:
        now = self.clock()
        if now - self._last_poll < POLL_SECONDS:
            return
        self._last_poll = now
        for path in self._paths():
            try:
                words = path.read_text(encoding="utf-8-sig").lower().split()
            except FileNotFoundError:
                continue
            except (OSError, UnicodeDecodeError) as error:
                logger.debug("can't read %s yet: %s", path, error)
                continue
            if not words:  # still being written
                continue
            _remove(path)
            unknown = [word for word in words if word not in WORDS]
            if unknown:
                logger.warning("%s: unknown word(s) %s; known are %s", path.name, ", ".join(unknown), ", ".join(WORDS))
            self._asked.update(word for word in words if word in WORDS)


def _remove(path: Path) -> None:
    try:
        path.unlink()
    except OSError as error:
        logger.warning("can't remove %s: %s", path, error)
