"""Log lines, and errors as the last lines on the screen."""

from __future__ import annotations

import errno
import io
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from library import log
from library.log import CombinedError, DataError, ResourceError, UserError, command, raise_all
from library.option_groups import ConsoleOptions

LINK = " - see docs/troubleshooting.md#error-codes"

ROOT = Path(__file__).resolve().parents[2]


def run(error: BaseException) -> int:
    @command
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as exit_:
        main()
    return int(exit_.value.code)


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("it is wrong", "here", "mend it"), 2, "error[E-USAGE]: it is wrong - here - mend it"),
        (UserError("it is wrong", hint="mend it", code="E-X"), 2, "error[E-X]: it is wrong - mend it"),
        (DataError("no caption", "a.png", code="E-CAPTION-NONE"), 3, "error[E-CAPTION-NONE]: no caption - a.png"),
        (ResourceError("full", "/disk", "free it", code="E-DISK"), 4, "error[E-DISK]: full - /disk - free it"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(errno.ENOSPC, "No space left", "/out/a"), 4, "error[E-DISK]: the disk is full - /out/a"),
        (MemoryError(), 4, "error[E-MEMORY]: the computer's memory is full"),
        (
            type("OutOfMemoryError", (RuntimeError,), {})("CUDA\nmore"),
            4,
            "error[E-MEMORY]: the GPU's memory is full - CUDA",
        ),
    ],
)
def test_errors_end_the_program(capsys: pytest.CaptureFixture[str], error: BaseException, code: int, line: str) -> None:
    assert run(error) == code
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(line)


def test_user_errors_have_no_traceback(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRAINER_DEBUG", raising=False)
    run(UserError("wrong"))
    assert "Traceback" not in capsys.readouterr().err
    monkeypatch.setenv("TRAINER_DEBUG", "1")
    run(UserError("wrong"))
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.splitlines()[-1] == "error[E-USAGE]: wrong - see docs/troubleshooting.md#error-codes"


def test_other_errors_pass(capsys: pytest.CaptureFixture[str]) -> None:
    @command
    def main() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        main()
    assert capsys.readouterr().err == ""


def test_several_mistakes_are_one_error(capsys: pytest.CaptureFixture[str]) -> None:
    raise_all([])
    first, second = UserError("a", "x:1", code="E-A"), DataError("b", "x:2", code="E-B")
    with pytest.raises(UserError) as alone:
        raise_all([first])
    assert alone.value is first
    with pytest.raises(CombinedError) as both:
        raise_all([first, second])
    assert not isinstance(both.value, DataError)
    with pytest.raises(DataError) as data:
        raise_all([second, second])
    assert data.value.exit_code == 3
    assert run(both.value) == 2
    assert capsys.readouterr().err.splitlines() == [
        f"error[E-A]: a - x:1{LINK}",
        f"error[E-B]: b - x:2{LINK}",
    ]


def test_arguments_and_name_are_kept() -> None:
    @command
    def main(argv: list[str] | None = None) -> None:
        """What it does."""
        seen.append(argv)

    seen: list[object] = []
    main(["a"])
    main()
    assert seen == [["a"], None]
    assert main.__doc__ == "What it does."


def test_log_file_holds_bare_messages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "logs" / "дневник.log"
    path.parent.mkdir()
    path.write_text("old", encoding="utf-8")
    console = ConsoleOptions(console_log_file=str(path))
    log.setup(console)
    log.get_logger("library.x").info("ja: 日本 %d", 3)
    log.get_logger("library.x").debug("hidden")
    log.get_logger("urllib3").info("hidden")
    log.get_logger("urllib3").warning("seen")
    log.setup(console)  # the same again must not empty the file
    log.get_logger("networks.y").info("end \udc80")
    assert path.read_text(encoding="utf-8") == "ja: 日本 3\nseen\nend \\udc80\n"
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("level", "shown"), [("DEBUG", "diwe"), (None, "iwe"), ("WARNING", "we"), ("CRITICAL", "")])
def test_levels(capsys: pytest.CaptureFixture[str], level: str | None, shown: str) -> None:
    log.setup(ConsoleOptions(console_log_simple=True, console_log_level=level))
    logger = log.get_logger("library.z")
    logger.debug("d")
    logger.info("i")
    logger.warning("w")
    logger.error("e")
    assert capsys.readouterr().out.replace("\n", "") == shown


@pytest.mark.parametrize("terminal", [True, False])
def test_lines_go_to_stderr(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    monkeypatch.setenv("NO_COLOR", "1")
    log.setup(ConsoleOptions())
    kinds = {type(handler).__name__ for handler in logging.getLogger().handlers}
    assert ("RichHandler" in kinds) == terminal
    log.get_logger("library.z").info("[red]no markup[/red] %s", "x")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "[red]no markup[/red] x" in re.sub(r"\x1b\[[0-9;]*m", "", captured.err)


def test_last_setup_counts(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    log.setup(ConsoleOptions(console_log_file=str(tmp_path / "a.log")))
    log.setup(ConsoleOptions(console_log_simple=True))
    log.get_logger("library.z").info("once")
    assert capsys.readouterr().out == "once\n"
    assert (tmp_path / "a.log").read_text(encoding="utf-8") == ""


def test_other_processes_report_errors_only(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RANK", "1")
    log.setup(ConsoleOptions(console_log_file=str(tmp_path / "a.log")))
    log.get_logger("library.z").warning("quiet")
    log.get_logger("library.z").error("loud")
    assert capsys.readouterr().err == "loud\n"
    assert not (tmp_path / "a.log").exists()


def test_log_file_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match="--console_log_file") as error:
        log.setup(ConsoleOptions(console_log_file=str(tmp_path / "file" / "a.log")))
    assert error.value.code == "E-LOG-FILE"


def test_handlers_of_others_stay() -> None:
    other = logging.NullHandler()
    logging.getLogger().addHandler(other)
    try:
        log.setup(ConsoleOptions(console_log_simple=True))
        log.setup(ConsoleOptions())
        assert other in logging.getLogger().handlers
    finally:
        logging.getLogger().removeHandler(other)


def test_a_stream_that_was_closed_meanwhile_hides_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    log.setup(ConsoleOptions())
    (handler,) = (one for one in logging.getLogger().handlers if hasattr(one, "console_options"))
    handler.stream = io.TextIOWrapper(io.BytesIO())
    handler.stream.close()
    assert log.report(UserError("wrong", "here")) == 2
    assert "wrong - here" in capsys.readouterr().err


@pytest.mark.parametrize("encoding", ["cp1252", "cp932", "ascii"])
def test_narrow_consoles(encoding: str) -> None:
    """Text that the console's code page lacks must not end the program."""
    program = (
        "from library.log import UserError, command, setup, get_logger\n"
        "from library.option_groups import ConsoleOptions\n"
        "@command\ndef main():\n"
        "    setup(ConsoleOptions(console_log_simple=True))\n"
        "    get_logger('library').info('学習 обучение 😀')\n"
        "    raise UserError('falsch', 'ä/学習.png')\n"
        "main()\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, capture_output=True, env=environment, check=False)
    assert result.returncode == 2
    assert result.stdout.decode("utf-8").strip() == "学習 обучение 😀"
    assert result.stderr.decode("utf-8").strip() == f"error[E-USAGE]: falsch - ä/学習.png{LINK}"
