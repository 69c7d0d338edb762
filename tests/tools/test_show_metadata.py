"""`tools/show_metadata.py`."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from tools.show_metadata import main

TOOL = Path(__file__).resolve().parents[2] / "tools" / "show_metadata.py"


def write(path: Path, metadata: dict[str, str] | None) -> Path:
    header: dict[str, object] = {"weight": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
    if metadata is not None:
        header["__metadata__"] = metadata
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(8))
    return path


def test_prints_sorted_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metadata = {"ss_title": "日本", "modelspec.title": "a", "ss_network_args": '{"dim": 4}'}
    main(["--model", str(write(tmp_path / "a.safetensors", metadata))])
    lines = [
        "{",
        '    "modelspec.title": "a",',
        '    "ss_network_args": "{\\"dim\\": 4}",',
        '    "ss_title": "\\u65e5\\u672c"',
        "}",
    ]
    assert capsys.readouterr().out.splitlines() == lines


@pytest.mark.parametrize("metadata", [None, {}])
def test_file_without_metadata(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], metadata: dict[str, str] | None
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--model", str(write(tmp_path / "a.safetensors", metadata))])
    assert exit_.value.code == 3
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "no metadata found" in captured.err
    assert "a.safetensors" in captured.err


def test_runs_from_any_folder(tmp_path: Path) -> None:
    model = write(tmp_path / "ä b.safetensors", {"k": "v"})
    command = [sys.executable, str(TOOL), "--model", model.name]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
    assert json.loads(result.stdout) == {"k": "v"}


@pytest.mark.parametrize("content", [b"", b"no model", struct.pack("<Q", 1 << 40) + b"{}"])
def test_other_files_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(SystemExit) as exit_:
        main(["--model", str(path)])
    assert exit_.value.code == 3
    error = capsys.readouterr().err
    assert "a.safetensors" in error
    assert "Traceback" not in error
