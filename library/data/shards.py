"""Tar files as folders of images: what is in them is found and read without unpacking."""

from __future__ import annotations

import hashlib
import os
import tarfile
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, NamedTuple

from library import files

SUFFIX = ".tar"
_CACHES = ".cache"
"""What is added to a tar file's name for the folder of its images' cache files."""


class Member(NamedTuple):
    """A file inside a tar file."""

    offset: int
    bytes: int


def is_shard(path: str) -> bool:
    """Whether a path means a tar file that can stand for a folder."""
    return path.lower().endswith(SUFFIX) and os.path.isfile(path)  # noqa: PTH113 - asked for many folders


def without_suffix(name: str) -> str:
    """The name of the folder that a tar file stands for."""
    return name[: -len(SUFFIX)] if name.lower().endswith(SUFFIX) else name


def members(shard: str) -> dict[str, Member]:
    """All ordinary files of a tar file, by their path inside. Errors: OSError when it can't be read, or is damaged."""
    status = os.stat(shard)  # noqa: PTH116 - text
    return _members(shard, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=4096)
def _members(shard: str, size: int, mtime_ns: int) -> dict[str, Member]:
    found: dict[str, Member] = {}
    try:
        with tarfile.open(shard, "r:") as archive:
            for entry in archive:
                if entry.isfile() and not entry.issparse():
                    if entry.offset_data + entry.size > size:
                        raise OSError("the tar file is cut off")
                    found[entry.name.removeprefix("./")] = Member(entry.offset_data, entry.size)
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise OSError(f"not a whole tar file: {error}") from error
    return found


def split(path: str) -> tuple[str, str] | None:
    """The tar file and the path inside, of a path that leads through a tar file; None: it leads through none."""
    lower, start = path.lower(), 0
    while (at := lower.find(SUFFIX, start)) >= 0:
        start = at + len(SUFFIX)
        if lower[start : start + 1] in ("/", os.sep) and is_shard(path[:start]):
            return path[:start], path[start + 1 :].replace(os.sep, "/")
    return None


def content(shard: str, name: str) -> bytes:
    """A file inside a tar file. Errors: OSError."""
    member = members(shard).get(name)
    if member is None:
        raise FileNotFoundError(f"{name} isn't in the tar file")
    with Path(shard).open("rb") as file:
        file.seek(member.offset)
        data = file.read(member.bytes)
    if len(data) != member.bytes:
        raise OSError("the tar file is cut off")
    return data


def opened(path: str) -> BinaryIO:
    """A file on the disk or inside a tar file, for reading. Errors: OSError."""
    inside = split(path)
    return Path(path).open("rb") if inside is None else BytesIO(content(*inside))


def sha256(path: str) -> str:
    """SHA-256 of a file on the disk or inside a tar file, in hexadecimal. Errors: DataError, OSError."""
    inside = split(path)
    return files.sha256(path) if inside is None else hashlib.sha256(content(*inside)).hexdigest()


def stamp(path: str) -> tuple[int, int]:
    """Bytes and modification time of a file; inside a tar file the time is that of the whole. Errors: OSError."""
    inside = split(path)
    status = os.stat(path if inside is None else inside[0])  # noqa: PTH116 - many items
    if inside is None:
        return status.st_size, status.st_mtime_ns
    member = members(inside[0]).get(inside[1])
    if member is None:
        raise FileNotFoundError(inside[1])
    return member.bytes, status.st_mtime_ns


def beside(path: Path) -> Path:
    """Where a cache file may lie that belongs to an image at about this path: not inside a tar file."""
    inside = split(str(path))
    return path if inside is None else Path(inside[0] + _CACHES, inside[1])
