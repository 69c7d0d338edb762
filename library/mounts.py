"""Which disk a file lies on, as far as it decides how to read it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

_REMOTE = (
    "9p",
    "afs",
    "ceph",
    "cifs",
    "drvfs",
    "fuse",
    "glusterfs",
    "lustre",
    "ncpfs",
    "nfs",
    "smb",
    "virtiofs",
    "vboxsf",
)
"""Beginnings of the names of file systems that fetch each page of a mapped file by itself."""
_NOT_REMOTE = ("fuseblk",)
_WINDOWS_REMOTE_DRIVE = 4


def is_remote(path: Path | str) -> bool:
    """Whether the file lies on a network disk or in another system's folder, where mapping it is slow."""
    real = os.path.realpath(path)
    if sys.platform == "win32":
        return real.startswith("\\\\") or _windows_drive(real) == _WINDOWS_REMOTE_DRIVE
    kind = _mounted_as(real)
    return kind.startswith(_REMOTE) and kind not in _NOT_REMOTE


def _windows_drive(path: str) -> int:
    import ctypes

    drive = os.path.splitdrive(path)[0] + "\\"
    return int(ctypes.windll.kernel32.GetDriveTypeW(drive))  # type: ignore[attr-defined,unused-ignore]


def _mounted_as(path: str) -> str:
    """Name of the file system of a path; empty where the system has no table of mounts."""
    try:
        lines = Path("/proc/self/mounts").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return ""
    best, kind = "", ""
    for line in lines:
        _, point, name, *_ = line.split(" ")
        point = point.replace("\\040", " ")
        inside = path == point or path.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best):
            best, kind = point, name
    return kind
