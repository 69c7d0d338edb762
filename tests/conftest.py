"""What all tests share."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.cells import Cell, MakeCell
    from tests.cells_sd3 import MakeSd3Cell, Sd3Cell

for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):  # more threads than one only slow tiny models down
    os.environ.setdefault(variable, "1")

GOLDEN = Path(__file__).parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write what is found into tests/golden")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """What was printed travels between processes as UTF-8, which has no place for names that aren't text."""
    report = yield
    report.sections = [(name, text.encode("utf-8", "backslashreplace").decode()) for name, text in report.sections]
    return report


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
def _own_cache_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps what programs remember out of the user's folder."""
    folder = str(tmp_path_factory.getbasetemp() / "cache")
    for variable in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.setenv(variable, folder)


@pytest.fixture(autouse=True)
def _own_accelerator() -> Iterator[None]:
    """Lets each test choose its precision and processes, which accelerate otherwise keeps for the whole process."""
    yield
    if (state := sys.modules.get("accelerate.state")) is not None:
        state.AcceleratorState._reset_state(reset_partial_state=True)
        state.GradientState._shared_state.clear()


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


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny model files by name, see `tests.tiny.write_all`."""
    from tests import tiny

    return tiny.write_all(tmp_path_factory.mktemp("models"))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """The parent of a folder with five captioned images."""
    from tests.cells import write_images

    return write_images(tmp_path / "画像 data" / "3_thing").parent


@pytest.fixture
def make_cell(models: dict[str, Path], images: Path, tmp_path: Path) -> MakeCell:
    """Makes scripts with options that train on the images."""
    from tests.cells import CELLS, Cell

    def make(cell: str, folder: str = "out") -> Cell:
        script, more = CELLS[cell]
        return Cell(script, models, images, tmp_path / folder, more)

    return make


@pytest.fixture(scope="session")
def sd3_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny model files of SD3 by name, see `tests.cells_sd3.write_models`."""
    from tests.cells_sd3 import write_models

    return write_models(tmp_path_factory.mktemp("sd3_models"))


@pytest.fixture
def make_sd3(sd3_models: dict[str, Path], images: Path, tmp_path: Path) -> MakeSd3Cell:
    """Makes scripts for SD3, with options that train on the images."""
    from tests.cells_sd3 import LORA, NETWORK, Sd3Cell

    def make(script: str, model: str = "sd3", folder: str = "out", *more: str) -> Sd3Cell:
        given = (*(LORA if script == NETWORK else ()), *more)
        return Sd3Cell(script, sd3_models[model], sd3_models["tokenizers"], images, tmp_path / folder, given)

    return make
