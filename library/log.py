"""Logging, and the errors that users see."""

from __future__ import annotations

import errno
import faulthandler
import functools
import io
import logging
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, ParamSpec, TextIO

if TYPE_CHECKING:
    from library.option_groups import ConsoleOptions

    _StreamHandler = logging.StreamHandler[TextIO]
else:
    _StreamHandler = logging.StreamHandler  # has no parameters before Python 3.11

P = ParamSpec("P")

OWN_LOGGERS = ("library", "networks", "tools", "finetune", "__main__")
"""Loggers whose information lines are shown; others speak from warnings upwards."""


class UserError(Exception):
    """A mistake the user can mend: one line saying what is wrong, where, and what to do. Exit code 2 (usage)."""

    exit_code = 2

    def __init__(self, what: str, where: str = "", hint: str = "", *, code: str = "E-USAGE") -> None:
        self.what, self.where, self.hint, self.code = what, where, hint, code
        super().__init__(" - ".join(part for part in (what, where, hint) if part))

    def lines(self) -> list[str]:
        """What is shown on the screen; a mistake without a hint leads to the catalogue of codes."""
        hint = "" if self.hint else " - see docs/troubleshooting.md#error-codes"
        return [f"error[{self.code}]: {self}{hint}"]


class DataError(UserError):
    """Something is wrong with the user's images, captions, caches or model files. Exit code 3."""

    exit_code = 3


class ResourceError(UserError):
    """Disk, memory, device or network will not do. Exit code 4."""

    exit_code = 4


class CombinedError(UserError):
    """Several mistakes that were found at once, shown one a line."""

    def __init__(self, errors: Sequence[UserError]) -> None:
        super().__init__("\n".join(map(str, errors)), code=errors[0].code)
        self.errors = tuple(errors)
        self.exit_code = errors[0].exit_code

    def lines(self) -> list[str]:
        """What is shown on the screen."""
        return [line for error in self.errors for line in error.lines()]


class CombinedDataError(CombinedError, DataError):
    """Several data errors."""


def raise_all(errors: Sequence[UserError]) -> None:
    """Raises the error, or all of them as one; nothing when there are none."""
    if len(errors) == 1:
        raise errors[0]
    if errors:
        only_data = all(isinstance(error, DataError) for error in errors)
        raise CombinedDataError(errors) if only_data else CombinedError(errors)


def get_logger(name: str) -> logging.Logger:
    """The logger of a module; call with `__name__`."""
    return logging.getLogger(name)


def block(title: str, lines: Sequence[str]) -> str:
    """A titled list for a message."""
    return "\n".join((title, *(f"  {line}" for line in lines)))


def setup(console: ConsoleOptions) -> None:
    """Directs the log lines to the terminal or to a file, as the console options say; the last call counts.

    Of several processes only the first one logs; the others report errors. Errors: UserError for a file that can't be
    written.
    """
    root = logging.getLogger()
    earlier = [handler for handler in root.handlers if hasattr(handler, "console_options")]
    if any(handler.console_options == console for handler in earlier):
        return
    level = getattr(logging, console.console_log_level or "INFO")
    first = os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) == "0"
    handler = _handler(console) if first else _Terminal("stderr")
    handler.setFormatter(logging.Formatter("%(message)s", datefmt="%Y-%m-%d %H:%M:%S"))
    handler.console_options = console  # type: ignore[attr-defined]
    for old in earlier:
        root.removeHandler(old)
        old.close()
    root.addHandler(handler)
    if not first:
        level = max(level, logging.ERROR)
    root.setLevel(level if level == logging.DEBUG else max(level, logging.WARNING))
    for name in OWN_LOGGERS:
        logging.getLogger(name).setLevel(level)


class _Terminal(_StreamHandler):
    """Writes to whatever `sys.stdout` or `sys.stderr` is at the moment."""

    def __init__(self, name: str) -> None:
        super().__init__(getattr(sys, name))
        self._name_of_stream = name

    def emit(self, record: logging.LogRecord) -> None:
        """Writes a line; nothing where the process has no console."""
        self.stream = getattr(sys, self._name_of_stream)
        if self.stream is not None:
            super().emit(record)

    def flush(self) -> None:
        """Writes out what is held back, of a stream that is still open."""
        with suppress(ValueError):
            super().flush()


def _handler(console: ConsoleOptions) -> logging.Handler:
    if console.console_log_file:
        try:
            Path(console.console_log_file).parent.mkdir(parents=True, exist_ok=True)
            return logging.FileHandler(console.console_log_file, "w", encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            where, hint = (
                f"--console_log_file {console.console_log_file}",
                "name a file in a folder that can be written",
            )
            raise UserError(f"can't write the log file: {error.strerror}", where, hint, code="E-LOG-FILE") from error
    if console.console_log_simple:
        return _Terminal("stdout")
    if sys.stderr is None or not sys.stderr.isatty():  # wrapped lines and colours would hurt in files and pipes
        return _Terminal("stderr")
    try:
        from rich.console import Console
        from rich.logging import RichHandler
    except ImportError:
        return _Terminal("stdout")
    return RichHandler(console=Console(stderr=True), show_path=False)


def command(main: Callable[P, None]) -> Callable[P, None]:
    """Makes a function the entry of a script: UTF-8 output, and errors as lines at the end instead of tracebacks.

    A program that was started in a narrow locale, where names of files could not be in all scripts, is started anew in
    UTF-8. The process ends with the error's exit code, 130 after Ctrl+C. With the environment variable TRAINER_DEBUG=1
    the traceback of users' errors is shown, too.
    """

    @functools.wraps(main)
    def entry(*args: P.args, **kwargs: P.kwargs) -> None:
        if not args and not kwargs:
            _require_utf8()
        _prepare_streams()
        try:
            main(*args, **kwargs)
        except UserError as error:
            sys.exit(report(error, traceback=os.environ.get("TRAINER_DEBUG") == "1"))
        except KeyboardInterrupt:
            _show(["interrupted"])
            sys.exit(130)
        except Exception as error:
            known = _resource_error(error)
            if known is None:
                raise
            sys.exit(report(known, traceback=True))

    return entry


def report(error: UserError, *, traceback: bool = False) -> int:
    """Writes the error to stderr as the last thing there; gives the exit code."""
    if traceback:
        sys.excepthook(*sys.exc_info())
    _show(error.lines())
    return error.exit_code


def _show(lines: Sequence[str]) -> None:
    for handler in logging.getLogger().handlers:
        handler.flush()
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, OSError, ValueError):  # no console, or closed
            stream.flush()
    if sys.stderr is not None:
        sys.stderr.write("".join(line + "\n" for line in lines))
        sys.stderr.flush()


def _require_utf8() -> None:
    """Starts the program anew in Python's UTF-8 mode if the locale (C, or a one-byte one) gives files other names."""
    if sys.platform == "win32" or sys.getfilesystemencoding() == "utf-8" or os.environ.get("PYTHONUTF8") == "1":
        return
    os.environ["PYTHONUTF8"] = "1"
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _prepare_streams() -> None:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    with suppress(AttributeError, OSError, ValueError):  # stderr may have no file behind it
        faulthandler.enable()


def _resource_error(error: Exception) -> ResourceError | None:
    """The line for a failure whose cause is known whoever raises it."""
    if type(error).__name__ == "OutOfMemoryError":
        hint = "use --gradient_checkpointing, a smaller --train_batch_size or --resolution, and cache latents and text"
        return ResourceError("the GPU's memory is full", str(error).splitlines()[0], hint, code="E-MEMORY")
    if isinstance(error, MemoryError):
        return ResourceError("the computer's memory is full", "", "close other programs", code="E-MEMORY")
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        where = str(error.filename or "")
        return ResourceError("the disk is full", where, "free some space, then start again", code="E-DISK")
    return None
