"""What all tests share."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write what is found into tests/golden")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, object], None]:
    """Compares data with a JSON file below `tests/golden`; with `--update-golden` writes it instead."""

    def compare(name: str, found: object) -> None:
        path = GOLDEN / name
        found = json.loads(json.dumps(found))
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(_dumps(found), encoding="utf-8", newline="\n")
        assert path.exists(), f"{path} is missing; run pytest --update-golden"
        assert json.loads(path.read_text(encoding="utf-8")) == found

    return compare


def _dumps(data: object) -> str:
    """One line per element of a list of objects, for readable diffs."""
    if isinstance(data, list) and data and all(isinstance(item, dict) for item in data):
        return "[\n" + ",\n".join(json.dumps(item, ensure_ascii=False) for item in data) + "\n]\n"
    return json.dumps(data, indent=1, ensure_ascii=False) + "\n"


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    """Undoes what `log.setup` did."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    for handler in [handler for handler in root.handlers if handler not in handlers]:
        root.removeHandler(handler)
        handler.close()
    root.setLevel(level)
