"""Named arrays in `.npz` files: read with their checksums, written so that half a file is never seen."""

from __future__ import annotations

import os
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from library.files import atomic_write
from library.log import ResourceError

Array = np.ndarray[Any, np.dtype[Any]]
Arrays = dict[str, Array]

FORMAT_VERSION = 1
KEY = "cache_key"
"""Name of the array that says, as JSON, what decided the others."""

NOT_CACHED, DAMAGED = "not cached yet", "damaged file"
"""Why something has to be computed, in words for the summary."""

STALE_LOCK_SECONDS = 60.0


class DamagedCacheError(Exception):
    """A cache file that can't be read."""


def read_arrays(path: Path, wanted: Callable[[str], bool] = lambda name: True) -> Arrays:
    """The arrays of a file whose names are wanted. Errors: FileNotFoundError; DamagedCacheError for everything else."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files if wanted(name)}
    except FileNotFoundError:
        raise
    except (
        OSError,
        ValueError,
        EOFError,
        KeyError,
        NotImplementedError,
        RuntimeError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise DamagedCacheError(str(error)) from error


def first_problem(problems: Iterable[str | None]) -> str | None:
    """None if one of several places is right; else what is wrong with the first that is there at all."""
    found = []
    for problem in problems:
        if problem is None:
            return None
        found.append(problem)
    return next((problem for problem in found if problem != NOT_CACHED), NOT_CACHED)


def write_arrays(
    path: Path, arrays: Mapping[str, Array], keep: Callable[[str], bool] | None = None, *, compressed: bool = False
) -> None:
    """Writes a file atomically; arrays of an existing file that are to be kept and aren't replaced stay in it.

    Errors: ResourceError.
    """
    _make_folder(path.parent)
    if keep is None:
        _write(path, arrays, compressed)
        return
    with _locked(path):
        kept: Arrays = {}
        with suppress(FileNotFoundError, DamagedCacheError):
            kept = read_arrays(path, keep)
        _write(path, {**kept, **arrays}, compressed)


def _write(path: Path, arrays: Mapping[str, Array], compressed: bool) -> None:
    save = np.savez_compressed if compressed else np.savez
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        save(file, **arrays)  # type: ignore[arg-type]


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        hint = "choose another --cache_dir"
        what = f"can't make the folder: {error.strerror or error}"
        raise ResourceError(what, str(folder), hint, code="E-CACHE") from error


def narrowed(array: Array) -> Array:
    """The bits of float numbers rounded to bfloat16, uint16; other arrays as they are."""
    if array.dtype.kind != "f":
        return array
    bits = np.ascontiguousarray(array, dtype=np.float32).view(np.uint32)
    rounded = bits + 0x7FFF + ((bits >> 16) & 1)
    return (np.where(np.isnan(array), bits | 0x400000, rounded) >> 16).astype(np.uint16)


def widened(array: Array) -> Array:
    """The float32 numbers whose bits `narrowed` gave."""
    return (array.astype(np.uint32) << 16).view(np.float32)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Keeps other processes from extending the same file; a lock that was left behind is broken after a while."""
    lock = path.with_name(f".{path.name}.lock")
    deadline = time.monotonic() + STALE_LOCK_SECONDS
    held = False
    while not held and time.monotonic() < deadline:
        try:
            os.close(os.open(lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            held = True
        except FileExistsError:
            time.sleep(0.02)
        except OSError:
            break  # a folder that can't be written says so when the file is
    try:
        yield
    finally:
        with suppress(OSError):
            lock.unlink(missing_ok=True)
