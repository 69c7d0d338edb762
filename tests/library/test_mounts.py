"""Network disks are recognised."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from library import mounts


@pytest.mark.parametrize(
    ("kind", "remote"),
    [
        ("ext4", False),
        ("overlay", False),
        ("fuseblk", False),
        ("9p", True),
        ("nfs4", True),
        ("fuse.sshfs", True),
        ("cifs", True),
    ],
)
def test_kinds_of_file_systems(monkeypatch: pytest.MonkeyPatch, kind: str, remote: bool) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(mounts, "_mounted_as", lambda path: kind)
    assert mounts.is_remote("/some/file") is remote


def test_innermost_mount_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    table = "root / ext4 rw 0 0\nserver:/x /mnt nfs4 rw 0 0\ndisk /mnt/my\\040disk xfs rw 0 0\n"
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: table)
    assert mounts._mounted_as("/home/file") == "ext4"
    assert mounts._mounted_as("/mnt/file") == "nfs4"
    assert mounts._mounted_as("/mnt/my disk/file") == "xfs"
    assert mounts._mounted_as("/mntx/file") == "ext4"


def test_no_table_of_mounts(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", missing)
    assert mounts._mounted_as("/home/file") == ""
