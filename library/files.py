"""Files: safetensors read one tensor at a time, atomic and verified writes, hashes, text in any usual encoding."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import secrets
import shutil
import struct
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from library.encodings import decode
from library.log import DataError, ResourceError, get_logger
from library.mounts import is_remote

if TYPE_CHECKING:
    from torch import Tensor

DTYPES = {
    "U64": "uint64",
    "I64": "int64",
    "F64": "float64",
    "C64": "complex64",
    "F32": "float32",
    "U32": "uint32",
    "I32": "int32",
    "BF16": "bfloat16",
    "F16": "float16",
    "U16": "uint16",
    "I16": "int16",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
"""Element types, names in safetensors files -> in torch, in the order in which the format's own writer puts tensors."""

_ITEM_SIZES = {"F64": 8, "I64": 8, "U64": 8, "C64": 8, "F32": 4, "I32": 4, "U32": 4} | dict.fromkeys(
    ("F16", "BF16", "I16", "U16"), 2
)
_LONGEST_HEADER = 100_000_000  # bytes; the limit of the format's own reader
_CHUNK = 1 << 20
_REPLACE_TRIES = 6


@dataclass(frozen=True)
class TensorInfo:
    """What the header of a safetensors file says about one tensor."""

    dtype: str
    """As in the file, such as `BF16`."""
    shape: tuple[int, ...]
    start: int
    """First byte, counted from the start of the data."""
    end: int


@dataclass(frozen=True)
class Header:
    """The header of a safetensors file, tensors in the order of their data."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    data_start: int
    """Position of the first data byte in the file."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor."""
        return {name: info.shape for name, info in self.tensors.items()}


def header(path: Path | str) -> Header:
    """The header of a safetensors file, checked against the size of the file.

    Raises:
        DataError: the file is missing, truncated, damaged, or something else than safetensors.
    """
    path = Path(path)
    with _open(path) as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if length < 2 or length > _LONGEST_HEADER:
            raise _not_safetensors(path)
        if 8 + length > size:
            raise _not_safetensors(path) if file.read(1) != b"{" else _truncated(path, size, 8 + length)
        raw = file.read(length)
    try:
        parsed = _parse(raw)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise _not_safetensors(path) from None
    found = Header(parsed[0], parsed[1], 8 + length)
    expected = found.data_start + max((info.end for info in found.tensors.values()), default=0)
    if size < expected:
        raise _truncated(path, size, expected)
    if size > expected:
        what = f"damaged file: it is {_gigabytes(size)}, its header says {_gigabytes(expected)}"
        raise DataError(what, str(path), "copy or download it again", code="E-FILE-DAMAGED")
    return found


def _parse(raw: bytes) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Tensors and metadata of a header; any kind of nonsense in it raises one of the built-in errors."""
    entries: dict[str, Any] = json.loads(raw)
    metadata = {str(key): str(value) for key, value in entries.pop("__metadata__", {}).items()}
    tensors = [
        (name, TensorInfo(entry["dtype"], tuple(map(int, entry["shape"])), *map(int, entry["data_offsets"])))
        for name, entry in entries.items()
    ]
    tensors.sort(key=lambda item: (item[1].start, item[1].end))
    position = 0
    for name, info in tensors:
        bytes_needed = math.prod(info.shape) * _ITEM_SIZES.get(info.dtype, 1)
        if info.start != position or (info.dtype in DTYPES and info.end - info.start != bytes_needed):
            raise ValueError(name)
        position = info.end
    return dict(tensors), metadata


class LazyTensors(Mapping[str, "Tensor"]):
    """The tensors of one or more safetensors files, each read from disk when it is asked for.

    Iteration follows the order of the data in the files, so that a disk reads straight on.

    Args:
        source: a file, a list of shards, or a Diffusers `….index.json`.
        mmap: map files on local disks into memory. Otherwise, and always on network disks and WSL mounts, where it is
            far faster, each tensor is one plain read.
    """

    def __init__(self, source: Path | str | Sequence[Path | str], mmap: bool = True) -> None:
        self.paths = shards(source)
        self.headers = {path: header(path) for path in self.paths}
        self._places = {name: path for path, found in self.headers.items() for name in found.tensors}
        self._mappable = {path: mmap and not is_remote(path) for path in self.paths}
        self._open: dict[Path, Any] = {}

    @property
    def metadata(self) -> dict[str, str]:
        """Metadata of all files together."""
        return {key: value for found in self.headers.values() for key, value in found.metadata.items()}

    @property
    def infos(self) -> dict[str, TensorInfo]:
        """What the headers say of each tensor."""
        return {name: info for found in self.headers.values() for name, info in found.tensors.items()}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor, without reading it."""
        return {name: info.shape for name, info in self.infos.items()}

    def __getitem__(self, name: str) -> Tensor:
        path = self._places[name]
        info = self.headers[path].tensors[name]
        if info.dtype not in DTYPES:
            raise DataError(f"element type {info.dtype} of {name!r} is unknown", str(path), code="E-FILE-KIND")
        return self._mapped(path, name) if self._mappable[path] else self._read(path, info)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __enter__(self) -> LazyTensors:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files; tensors already read stay valid."""
        for opened in self._open.values():
            opened.__exit__(None, None, None)
        self._open.clear()

    def _mapped(self, path: Path, name: str) -> Tensor:
        from safetensors import safe_open

        if path not in self._open:
            self._open[path] = safe_open(str(path), framework="pt", device="cpu").__enter__()
        tensor: Tensor = self._open[path].get_tensor(name)
        return tensor

    def _read(self, path: Path, info: TensorInfo) -> Tensor:
        import torch

        if path not in self._open:
            self._open[path] = path.open("rb", buffering=_CHUNK)
        file: BinaryIO = self._open[path]
        data = torch.empty(info.end - info.start, dtype=torch.uint8)
        file.seek(self.headers[path].data_start + info.start)
        if len(data) and file.readinto(data.numpy().data) != len(data):  # type: ignore[attr-defined]
            raise DataError("the file ended early; was it changed meanwhile?", str(path), code="E-FILE-TRUNCATED")
        return data.view(getattr(torch, DTYPES[info.dtype])).reshape(info.shape)


def shards(source: Path | str | Sequence[Path | str]) -> list[Path]:
    """The files that `source` stands for."""
    if not isinstance(source, (str, Path)):
        return [Path(path) for path in source]
    path = Path(source)
    if path.suffix != ".json":
        return [path]
    try:
        names = json.loads(read_text(path))["weight_map"].values()
    except (ValueError, KeyError, TypeError, AttributeError):
        what = "not an index of safetensors shards"
        raise DataError(what, str(path), "give the folder or a .safetensors file", code="E-FILE-KIND") from None
    return [path.parent / name for name in dict.fromkeys(names)]


def save_safetensors(
    tensors: Mapping[str, Tensor],
    path: Path | str,
    metadata: Mapping[str, str] | None = None,
    like: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a safetensors file so that either the whole new file or the old one is there, whatever happens.

    Tensors go to the CPU one at a time; any element type of the format is written, float8 included. Order and bytes are
    those of the format's own writer. What reached the disk is verified before the name is changed.

    Args:
        like: tensors of the same names, types and shapes, without data, where making the true ones twice is dear.

    Raises:
        ResourceError: disk full, no permission, or the file came out wrong.
    """
    path = Path(path)
    planned = planned_infos(tensors if like is None else like)
    head = header_bytes(planned, dict(sorted((metadata or {}).items())))
    size = len(head) + max((info.end for info in planned.values()), default=0)
    _require_space(path, size)
    with atomic_write(path, sync=True) as temporary:
        with temporary.open("wb") as file:
            file.write(head)
            for name in planned:
                file.write(raw_bytes(tensors[name]))
        _verify(temporary, path, head, size)


def planned_infos(tensors: Mapping[str, Tensor]) -> dict[str, TensorInfo]:
    """What the header of a file with these tensors says of each, in the order of the format's own writer."""
    names = {torch_name: name for name, torch_name in DTYPES.items()}
    dtypes = {name: names[str(tensor.dtype).removeprefix("torch.")] for name, tensor in tensors.items()}
    planned, position = {}, 0
    for name in writing_order(dtypes):
        end = position + tensors[name].numel() * tensors[name].element_size()
        planned[name] = TensorInfo(dtypes[name], tuple(tensors[name].shape), position, end)
        position = end
    return planned


def writing_order(dtypes: Mapping[str, str]) -> list[str]:
    """The names of tensors with these element types, in the order in which the format's own writer puts them."""
    ranks = {dtype: rank for rank, dtype in enumerate(DTYPES)}
    return sorted(dtypes, key=lambda name: (ranks.get(dtypes[name], len(ranks)), name))


def header_bytes(tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> bytes:
    """The beginning of a file, up to the data: length and header."""
    entries: dict[str, Any] = {}
    if metadata:
        entries["__metadata__"] = {str(key): str(value) for key, value in metadata.items()}
    for name, info in tensors.items():
        entries[name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [info.start, info.end]}
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode("utf-8", errors="replace")
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def save_with_metadata(source: Path | str, path: Path | str, metadata: Mapping[str, str]) -> None:
    """Write a safetensors file once more with other metadata; its data are copied byte by byte.

    `path` may be `source` itself: either the whole new file or the old one is there, whatever happens.

    Raises:
        DataError: the source isn't safetensors, or damaged.
        ResourceError: as `save_safetensors`.
    """
    source, path = Path(source), Path(path)
    found = header(source)
    head = header_bytes(found.tensors, dict(sorted(metadata.items())))
    size = len(head) + source.stat().st_size - found.data_start
    _require_space(path, size)
    with atomic_write(path, sync=True) as temporary:
        with _open(source) as old, temporary.open("wb") as new:
            new.write(head)
            old.seek(found.data_start)
            shutil.copyfileobj(old, new, _CHUNK)
        _verify(temporary, path, head, size)
        shutil.copymode(source, temporary)


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, in row-major order."""
    import torch

    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def _verify(temporary: Path, path: Path, head: bytes, size: int) -> None:
    """Compare size and header of the file just written with what they should be."""
    with temporary.open("rb") as file:
        intact = temporary.stat().st_size == size and file.read(len(head)) == head
    if not intact:
        raise ResourceError("the file came out damaged", str(path), "check the disk", code="E-DISK-WRITE")


def _require_space(path: Path, size: int) -> None:
    """Refuse at once what cannot fit on the disk."""
    folder = next((parent for parent in path.absolute().parents if parent.exists()), None)
    with suppress(OSError):
        free = shutil.disk_usage(folder).free if folder else size
        if free < size:
            what = f"disk full: {_gigabytes(size)} needed, {_gigabytes(free)} free"
            raise ResourceError(what, str(path), "free some space or choose another --output_dir", code="E-DISK-FULL")


@contextmanager
def atomic_write(path: Path | str, *, sync: bool = False) -> Iterator[Path]:
    """A temporary path in the folder of `path`; it takes the name `path` when the block succeeds, and goes otherwise.

    Args:
        path: the final name; folders are made.
        sync: force the data to the disk before the name is changed (survives a power cut; slow for many small files).

    Raises:
        ResourceError: disk full, no permission, or the old file is held by another program.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name[:40]}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        if sync:
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
        _replace(temporary, path)
    except OSError as error:
        raise _write_error(error, path) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _replace(temporary: Path, path: Path) -> None:
    """Give the file its name; on Windows virus scanners and viewers may hold the old one for a moment."""
    for attempt in range(_REPLACE_TRIES):
        try:
            temporary.replace(path)
            return
        except PermissionError:
            if attempt == _REPLACE_TRIES - 1:
                raise
            time.sleep(0.1 * 2**attempt)


def _write_error(error: OSError, path: Path) -> ResourceError:
    """The error of the operating system in one line."""
    if error.errno in {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}:
        return ResourceError("disk full", str(path), "free some space or choose another folder", code="E-DISK-FULL")
    if error.errno == errno.EFBIG:
        hint = "the file system (FAT32?) does not take files of this size"
        return ResourceError("file too large", str(path), hint, code="E-DISK-WRITE")
    if isinstance(error, PermissionError):
        hint = "close programs that have it open, or check the rights of the folder"
        return ResourceError("no permission to write", str(path), hint, code="E-DISK-WRITE")
    return ResourceError(f"cannot write: {error.strerror or error}", str(path), code="E-DISK-WRITE")


def read_text(path: Path | str) -> str:
    """The text of a file: UTF-8 (a byte order mark is dropped), or else the likeliest other encoding, with a warning.

    Raises:
        DataError: the file cannot be opened.
    """
    with _open(Path(path)) as file:
        text, encoding = decode(file.read())
    if encoding not in {"utf-8", "utf-16"}:
        get_logger(__name__).warning("%s is not UTF-8; read as %s. Save it as UTF-8 to be sure.", path, encoding)
    return text


def write_text(path: Path | str, text: str) -> None:
    """Write a text file, UTF-8 with plain newlines, whole or not at all."""
    with atomic_write(path, sync=True) as temporary:
        temporary.write_bytes(text.encode("utf-8", errors="surrogateescape"))


def sha256(path: Path | str) -> str:
    """SHA-256 of the whole file, in hexadecimal."""
    digest = hashlib.sha256()
    with _open(Path(path)) as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def fingerprint(path: Path | str, samples: int = 16) -> str:
    """A quick identity of the content: hash of size and of evenly spaced pieces; same name for equal files anywhere."""
    piece = 1 << 14
    with _open(Path(path)) as file:
        size = os.fstat(file.fileno()).st_size
        digest = hashlib.sha256(struct.pack("<Q", size))
        last = max(0, size - piece)
        for position in dict.fromkeys(last * index // max(1, samples - 1) for index in range(samples)):
            file.seek(position)
            digest.update(file.read(piece))
    return digest.hexdigest()[:32]


def _open(path: Path) -> BinaryIO:
    """The file, opened to read bytes."""
    try:
        return path.open("rb")
    except FileNotFoundError:
        raise DataError("no such file", str(path), code="E-FILE-MISSING") from None
    except OSError as error:
        what = "this is a folder, not a file" if path.is_dir() else f"cannot read: {error.strerror or error}"
        raise DataError(what, str(path), code="E-FILE-READ") from error


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 10_000_000 else f"{size:,} bytes"


def _truncated(path: Path, size: int, expected: int) -> DataError:
    what = f"truncated file: file is {_gigabytes(size)}, header says {_gigabytes(expected)}"
    return DataError(what, str(path), "copy or download it again", code="E-FILE-TRUNCATED")


_LOOKS = (
    (b"PK", "a PyTorch checkpoint (zip, .ckpt/.pt/.bin)", "convert it to safetensors"),
    (b"\x80", "a Python pickle (old .ckpt/.pt/.bin)", "convert it to safetensors"),
    (b"version https://git-lfs", "a git-lfs pointer", "run 'git lfs pull' or download the file itself"),
    (b"<", "a web page", "it is the page around the file; use its download link"),
    (b"GGUF", "a GGUF model", "use the safetensors version"),
    (b"{", "a JSON text", "give the .safetensors file"),
)


def _not_safetensors(path: Path) -> DataError:
    """What a file that isn't safetensors seems to be."""
    with _open(path) as file:
        start = file.read(64).lstrip(b"\xef\xbb\xbf \r\n\t")
    if not start.strip(b"\0"):
        return DataError("the file is empty", str(path), "copy or download it again", code="E-FILE-DAMAGED")
    for magic, kind, hint in _LOOKS:
        if start.startswith(magic):
            return DataError(f"not a safetensors file: it looks like {kind}", str(path), hint, code="E-FILE-KIND")
    what = "not a safetensors file, or damaged at its start"
    return DataError(what, str(path), "copy or download it again", code="E-FILE-KIND")
