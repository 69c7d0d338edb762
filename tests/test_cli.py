"""The command lines: ours are frozen, and accept everything that the reference accepts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from library.option_docs import documents, render, renew
from library.option_groups import SCRIPTS
from library.option_types import Option, Script
from library.options import build_parser

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = ROOT / "tests" / "golden" / "cli" / "reference"
HEAVY = ("torch", "transformers", "diffusers", "accelerate", "numpy", "PIL", "cv2", "rich", "toml")

OWN = (
    "networks/convert_lora.py",
    "sd3_train_network.py",
    "networks/sd3_merge_lora.py",
    "networks/sd3_extract_lora.py",
    "tools/merge_sd3_safetensors.py",
)
"""Scripts that the reference doesn't have, or not in the state that is frozen here."""

each_script = pytest.mark.parametrize("script", SCRIPTS, ids=[Path(script.name).stem for script in SCRIPTS])


def reference(script: Script) -> list[dict]:
    if script.name in OWN:
        return []
    path = REFERENCE / f"{Path(script.name).stem}.json"
    return json.loads(path.read_text(encoding="utf-8"))["options"]


@each_script
def test_command_line_is_frozen(script: Script, golden: Callable[[str, object], None]) -> None:
    found = sorted((option.describe() for option in script.options()), key=lambda entry: str(entry["dest"]))
    golden(f"cli/{Path(script.name).stem}.json", found)


@each_script
def test_reference_options_are_accepted(script: Script) -> None:
    assert reference(script) or script.name in OWN
    for theirs in reference(script):
        option = script.option(theirs["dest"])
        assert option is not None, theirs["dest"]
        ours = json.loads(json.dumps(option.describe()))
        for key in ("flags", "action", "type", "nargs", "default", "required"):
            assert ours[key] == theirs[key], (theirs["dest"], key)
        assert ours.get("position") == theirs.get("position"), theirs["dest"]
        if theirs["choices"] is None:
            assert ours["choices"] is None, theirs["dest"]
        else:
            assert set(theirs["choices"]) <= set(ours["choices"]), theirs["dest"]


@each_script
def test_reference_command_lines_parse(script: Script) -> None:
    """Every option, every choice, as text through argparse."""
    parser = build_parser(script)
    placed = sorted((entry for entry in reference(script) if "position" in entry), key=lambda entry: entry["position"])
    words = [f"word {entry['position']}" for entry in placed]
    base = {entry["dest"]: word for entry, word in zip(placed, words, strict=True)}
    assert vars(parser.parse_args(words)) == base
    for theirs in reference(script):
        for flag in theirs["flags"]:
            if theirs["action"] == "store_true":
                assert vars(parser.parse_args([*words, flag])) == {**base, theirs["dest"]: True}
                continue
            for text, value in samples(theirs):
                found = vars(parser.parse_args([*words, flag, text]))
                expected = [value] if theirs["nargs"] else value
                assert found == {**base, theirs["dest"]: expected}
                assert type(found[theirs["dest"]]) is type(expected)


def samples(entry: dict) -> list[tuple[str, object]]:
    """Texts for an option, and the values they mean."""
    if entry["choices"]:
        return [(str(choice), choice) for choice in entry["choices"] if choice is not None]
    return {
        "str": [("a b", "a b"), ("", "")],
        "int": [("3", 3), ("-1", -1)],
        "float": [("3", 3.0), ("1e-4", 1e-4), ("-2.5", -2.5)],
        "int_or_float": [("100", 100), ("0.25", 0.25), ("10%", 0.1)],
        "Path": [("a/b c", Path("a/b c"))],
    }[entry["type"]]


@each_script
def test_no_option_is_declared_twice(script: Script) -> None:
    names = [option.name for option in script.options()]
    assert len(names) == len(set(names))


@each_script
def test_tables_name_options(script: Script) -> None:
    """A table's key names an option of the script, and for `name=value` one of its choices."""
    for table in (script.pending, script.refused, script.ignored):
        for key in table:
            name, separator, value = key.partition("=")
            option = script.option(name)
            assert option is not None, key
            if separator:
                assert option.choices is not None, key
                assert value in option.choices, key
    assert not set(script.pending) & set(script.refused)


def test_every_option_is_explained() -> None:
    options: set[Option] = {option for script in SCRIPTS for option in script.options()}
    for option in options:
        assert 6 <= len(option.help) <= 420, option.name
        assert not option.help.endswith("."), option.name


@pytest.mark.parametrize(
    "script", [script for script in SCRIPTS if (ROOT / script.name).exists()], ids=lambda s: s.name
)
def test_help_is_quick_and_light(script: Script, tmp_path: Path) -> None:
    watch = "import sys, runpy\nsys.argv = [{0!r}, '--help']\ntry: runpy.run_path({0!r}, run_name='__main__')\n" + (
        "finally: print('HEAVY:', [name for name in {1!r} if name in sys.modules])"
    )
    start = time.perf_counter()
    result = subprocess.run(
        [sys.executable, "-c", watch.format(str(ROOT / script.name), HEAVY)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        cwd=tmp_path,
        env=environment(),
        check=False,
    )
    seconds = time.perf_counter() - start
    assert result.returncode == 0, result.stderr
    assert "HEAVY: []" in result.stdout
    assert all(option.flag in result.stdout for option in script.options())
    assert seconds < 2


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}


def test_documents_hold_current_tables() -> None:
    for path in documents():
        text = path.read_text(encoding="utf-8")
        assert renew(text) == text, f"{path} is out of date: python -m library.option_docs"


@each_script
def test_tables_hold_every_option(script: Script) -> None:
    text = render(script)
    assert all(f"| `{option.flag}` |" in text for option in script.options())
    widths = {line.replace("\\|", "").count("|") for line in text.splitlines() if line.startswith("|")}
    assert widths == {5}


def test_renewing_replaces_only_what_is_marked() -> None:
    text = "before\n<!-- options:show_metadata:begin -->\nstale\n<!-- options:show_metadata:end -->\nafter\n"
    new = renew(text)
    assert new.startswith("before\n<!--")
    assert new.endswith("end -->\nafter\n")
    assert "stale" not in new
    assert "| `--model` | text | required | Safetensors file. |" in new
    assert renew(new) == new
