"""Where the tensors of a model lie: one file, shards, or a Diffusers folder."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from library.files import Header, TensorInfo, header, shards
from library.log import DataError

_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")


def locate(path: Path | str, option: str, folders: Sequence[str] = ()) -> list[Path]:
    """The safetensors files that a path means: a file, the first of several shards, an index, or a folder.

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
    for place in (*(folder / name for name in folders), folder):
        if indices := sorted(place.glob("*.safetensors.index.json")):
            return _indexed(indices[0], where)
        files = sorted(place.glob("*.safetensors"))
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
        DataError: a file is damaged or isn't safetensors.
    """
    tensors: dict[str, TensorInfo] = {}
    metadata: dict[str, str] = {}
    for path in paths:
        try:
            found = header(path)
        except DataError as error:
            raise DataError(error.what, f"{option} {error.where}", error.hint, code=error.code) from None
        tensors |= found.tensors
        metadata |= found.metadata
    return Header(tensors, metadata, 0)
