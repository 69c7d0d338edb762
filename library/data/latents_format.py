"""Arrays in latents files: their names, and how they are stored compactly."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from library.data.arrays import NOT_CACHED, Arrays, narrowed, read_arrays, widened

_NARROW, _BYTES = "_bf16", "_uint8"
"""Ends of the names of arrays stored compactly, so that other programs don't take them for what they aren't."""

Shape = tuple[int, ...]


def array_name(kind: str, mirrored: bool) -> str:
    """The name of an array, of the image or of the mirrored one."""
    return kind + "_flipped" if mirrored else kind


def needed_arrays(kinds: Sequence[str], sides: Sequence[bool], latents: Shape, mask: Shape | None) -> dict[str, Shape]:
    """Names and shapes of the arrays of an entry; `sides`: which are wanted, of the mirrored image or not."""
    names: dict[str, Shape] = {array_name(kind, side): latents for kind in kinds for side in sides}
    return names if mask is None else {**names, "alpha_mask": mask}


def lack(arrays: Arrays, needed: dict[str, Shape]) -> str | None:
    """What is wrong with the arrays of an entry; None: all that is needed is there."""
    for name, shape in needed.items():
        if name not in arrays:
            return _meaning(name)
        if arrays[name].shape != shape:
            return "other size"
    return None


def _meaning(name: str) -> str:
    """What the absence of an array means."""
    meanings = {"latents": NOT_CACHED, "latents_flipped": "no mirrored latents", "alpha_mask": "no mask"}
    return meanings.get(name, "no mean and variance")


def packed(arrays: Arrays) -> Arrays:
    """Arrays as they are stored compactly: masks with 8 bits, which loses nothing, all others in bfloat16."""
    small: Arrays = {}
    for name, array in arrays.items():
        if name == "alpha_mask":
            small[name + _BYTES] = np.rint(array * 255).astype(np.uint8)
        else:
            small[name + _NARROW] = narrowed(array)
    return small


def unpacked(path: Path, suffix: str, names: Iterable[str]) -> tuple[Arrays, bool]:
    """Arrays of a file by their names without suffix, and whether they were stored compactly.

    Files of other programs may have names without suffix where ours have one. Errors: FileNotFoundError,
    DamagedCacheError.
    """
    bare = {name + kind for name in names for kind in ("", _NARROW, _BYTES)}
    stored = read_arrays(path, lambda name: name.removesuffix(suffix) in bare)
    if suffix and any(name.endswith(suffix) for name in stored):
        stored = {name.removesuffix(suffix): array for name, array in stored.items() if name.endswith(suffix)}
    arrays: Arrays = {}
    for name, array in stored.items():
        if name.endswith(_NARROW):
            arrays[name.removesuffix(_NARROW)] = widened(array)
        elif name.endswith(_BYTES):
            arrays[name.removesuffix(_BYTES)] = array.astype(np.float32) / np.float32(255)
        else:
            arrays[name] = array
    return arrays, any(name.endswith(_NARROW) for name in stored)
