"""The installed package runs from anywhere, also beside folders that are called like its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

from library.option_groups import SCRIPTS
from tests.cells import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("pip") is None or find_spec("setuptools") is None, reason="nothing to build with"),
]
COMMANDS = [Path(script.name).stem for script in SCRIPTS]
SHIPPED = ("library", "networks", "tools", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package, built from a copy of the source."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for path in [*(ROOT / name for name in SHIPPED), *ROOT.glob("*.py")]:
        if path.is_dir():
            shutil.copytree(path, source / path.name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, source / path.name)
    command = ("pip", "wheel", str(source), "--no-deps", "--no-build-isolation", "-q", "-w", str(folder))
    subprocess.run([sys.executable, "-m", *command], check=True, timeout=120, capture_output=True)
    [built] = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def target(wheel: Path) -> Path:
    """A folder with the installed package."""
    folder = wheel.parent / "target"
    command = ("pip", "install", str(wheel), "--no-deps", "--no-index", "-q", "--target", str(folder))
    subprocess.run([sys.executable, "-m", *command], check=True, timeout=120, capture_output=True)
    return folder


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A folder of the user's with packages of the same names."""
    for name in ("library", "networks", "tools"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise ImportError('not this one')\n", encoding="utf-8")
    return tmp_path


def run(command: list[str], target: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(target), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, encoding="utf-8", timeout=120, check=False
    )


def executable(target: Path, name: str) -> str:
    """The command that was installed."""
    [found] = [path for path in (target / "bin").iterdir() if path.stem == name]
    return str(found)


def test_the_wheel_holds_all_modules_and_no_tests(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = [
        path.relative_to(ROOT).as_posix()
        for package in ("library", "networks", "tools")
        for path in (ROOT / package).rglob("*.py")
    ]
    assert set(modules) <= names
    assert {path.name for path in ROOT.glob("*.py")} <= names
    assert not any(name.startswith(("tests/", "benchmarks/", "examples/")) for name in names)


def test_each_script_is_a_command(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        [entries] = [name for name in archive.namelist() if name.endswith("entry_points.txt")]
        lines = archive.read(entries).decode("utf-8").splitlines()
    assert {line.split(" = ")[0] for line in lines if " = " in line} == set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_run_beside_packages_of_the_same_names(target: Path, elsewhere: Path, name: str) -> None:
    done = run([executable(target, name), "--help"], target, elsewhere)
    assert done.returncode == 0, done.stderr
    assert "show this help" in done.stdout


def test_modules_are_those_of_the_package(target: Path, tmp_path: Path) -> None:
    for name in ("library", "networks"):
        (tmp_path / name).mkdir()
    program = (
        "import flux_train_network, importlib.util\n"
        "print(flux_train_network.__file__)\n"
        "print(importlib.util.find_spec('networks.lora_flux').origin)"
    )
    done = run([sys.executable, "-c", program], target, tmp_path)
    assert done.returncode == 0, done.stderr
    assert all(Path(line).is_relative_to(target) for line in done.stdout.split())


def test_networks_are_found_by_name(target: Path, elsewhere: Path) -> None:
    """The network module is loaded before the data are looked for."""
    command = [executable(target, "flux_train_network"), "--network_module", "networks.lora_flux"]
    done = run(command, target, elsewhere)
    assert done.stderr.strip().splitlines()[-1].startswith("error[E-DATA-NONE]"), done.stderr
    assert done.returncode == 3
