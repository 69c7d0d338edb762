"""Room on the disk: one disk for all, or the images on another one."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from library.train import room
from library.train.plan import Plan
from library.train.room import Room, check_cache_room, check_disk

MB = 1_000_000


def plan(model: int, saves: int, caches: int) -> Plan:
    found = SimpleNamespace(model_bytes=model, save_bytes=saves, cache_bytes=caches, bytes_needed=saves + caches)
    return cast("Plan", found)


@pytest.mark.parametrize(
    ("model", "saves", "caches", "found"),
    [
        (0, 0, 0, ""),
        (MB // 2, MB // 2, MB // 4, ""),
        (MB // 2, 2 * MB, 0, "warning"),
        (MB // 2, 3 * MB // 4, MB // 2, "warning"),
        (MB // 2, MB // 2, 3 * MB // 4, "error"),
        (2 * MB, 2 * MB, 0, "error"),
    ],
)
def test_models_and_caches_on_one_disk(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: int, saves: int, caches: int, found: str
) -> None:
    monkeypatch.setattr(room.shutil, "disk_usage", lambda path: SimpleNamespace(free=MB))
    findings = check_disk(plan(model, saves, caches), tmp_path / "not" / "yet", tmp_path)
    assert ["error" if finding.error else "warning" for finding in findings] == ([found] if found else [])
    assert all("1.0 MB are free" in finding.what for finding in findings)


def test_images_on_a_disk_of_their_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    images, output = tmp_path / "images", tmp_path / "output"
    images.mkdir()
    output.mkdir()
    monkeypatch.setattr(room.shutil, "disk_usage", lambda path: SimpleNamespace(free=MB if path == images else 9 * MB))
    monkeypatch.setattr(room, "_device", lambda path: path.name)
    assert check_disk(plan(MB, 8 * MB, MB // 2), output, images) == []
    findings = check_disk(plan(MB, 8 * MB, 2 * MB), output, images)
    assert [(finding.where, finding.code) for finding in findings] == [(str(images), "E-DISK-FULL")]
    assert check_cache_room(MB, images) == []


def test_sizes_of_a_training() -> None:
    assert Room.of_training(10, 4, 2, 7) == Room(model=20, state=120, caches=7)
    assert Room.of_training(10, 4, 2, 7, written=35) == Room(model=70, state=120, caches=7)
