"""Where the tensors of a model lie: one file, shards, or a Diffusers folder; safetensors, or PyTorch files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from library.files import Header, LazyTensors, TensorInfo, header, shards
from library.log import DataError
from library.pickles import PickledTensors, is_pickled, pickled_header

_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")
_ENDINGS = ("safetensors", "bin")
_STANDARD = ("diffusion_pytorch_model", "model", "pytorch_model")
"""Names of the file that is meant where variants such as `….fp16` lie beside it."""


def locate(path: Path | str, option: str, folders: Sequence[str] = ()) -> list[Path]:
    """The files that a path means: a file, the first of several shards, an index, or a folder.

    Args:
        option: the option that gave the path, for messages.
        folders: subfolders of a Diffusers folder to look into before the folder itself.

    Raises:
        DataError: nothing is there, or too much.
    """
    path = Path(path)
    where = f"{option} {path}"
    if path.is_dir():
        return _in_folder(path, where, folders)
    if not path.exists():
        raise DataError("no such file or folder", where, "check the path", code="E-FILE-MISSING")
    if path.name.endswith(".index.json"):
        return _indexed(path, where)
    if match := _SHARD.fullmatch(path.name):
        stem, _, count = match.groups()
        names = (f"{stem}-{i + 1:05}-of-{count}.safetensors" for i in range(int(count)))
        return _existing([path.with_name(name) for name in names], where)
    return [path]


def _in_folder(folder: Path, where: str, folders: Sequence[str]) -> list[Path]:
    places = (*(folder / name for name in folders), folder)
    for place, ending in ((place, ending) for place in places for ending in _ENDINGS):
        files = sorted(place.glob(f"*.{ending}"))
        if standard := [file for file in files if file.stem in _STANDARD]:
            return standard[:1]
        if indices := sorted(place.glob(f"*.{ending}.index.json")):
            return _indexed(indices[0], where)
        if len(files) == 1:
            return files
        if files:
            names = ", ".join(file.name for file in files[:3])
            raise DataError(f"several models in this folder ({names})", where, "name the file", code="E-FILE-MANY")
    expected = " or ".join(f"{name}/" for name in folders)
    what = "no .safetensors file in this folder" + (f" nor in its {expected}" if expected else "")
    raise DataError(what, where, "name the file", code="E-FILE-MISSING")


def _indexed(index: Path, where: str) -> list[Path]:
    return _existing(shards(index), where)


def _existing(paths: list[Path], where: str) -> list[Path]:
    missing = [path.name for path in paths if not path.exists()]
    if missing:
        what = f"{len(missing)} of {len(paths)} shards missing ({', '.join(missing[:3])})"
        raise DataError(what, where, "put all shards into one folder", code="E-FILE-MISSING")
    return paths


def joint_header(paths: Sequence[Path], option: str) -> Header:
    """The headers of all files as one; positions in files lose their meaning.

    Raises:
        DataError: a file is damaged or of another kind.
    """
    tensors: dict[str, TensorInfo] = {}
    metadata: dict[str, str] = {}
    for path in paths:
        try:
            found = pickled_header(path) if is_pickled(path) else header(path)
        except DataError as error:
            raise DataError(error.what, f"{option} {error.where}", error.hint, code=error.code) from None
        tensors |= found.tensors
        metadata |= found.metadata
    return Header(tensors, metadata, 0)


def open_tensors(paths: Sequence[Path], mmap: bool = True) -> LazyTensors | PickledTensors:
    """The tensors of all files as one, each read from the disk when it is asked for. `mmap`: see `LazyTensors`."""
    return PickledTensors(paths) if paths and is_pickled(paths[0]) else LazyTensors(paths, mmap)
