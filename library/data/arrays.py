"""Named arrays in `.npz` files: read with their checksums, written so that half a file is never seen."""

from __future__ import annotations

import os
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from library.files import atomic_write

Array = np.ndarray[Any, np.dtype[Any]]
Arrays = dict[str, Array]

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


def write_arrays(path: Path, arrays: Mapping[str, Array], keep: Callable[[str], bool] | None = None) -> None:
    """Writes a file atomically; arrays of an existing file that are to be kept and aren't replaced stay in it.

    Errors: ResourceError.
    """
    if keep is None:
        _write(path, arrays)
        return
    with _locked(path):
        kept: Arrays = {}
        with suppress(FileNotFoundError, DamagedCacheError):
            kept = read_arrays(path, keep)
        _write(path, {**kept, **arrays})


def _write(path: Path, arrays: Mapping[str, Array]) -> None:
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


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
        lock.unlink(missing_ok=True)
