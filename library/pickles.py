"""PyTorch files (`.ckpt`, `.pt`, `.bin`): tensors read one at a time, without running anything that is in them.

Such a file is a zip archive of raw storages and one pickle, which says which tensors lie in which; see
`library.pickle_program` for how that is read.
"""

from __future__ import annotations

import io
import math
import struct
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from library.files import DTYPES, Header, TensorInfo
from library.log import DataError
from library.pickle_program import ITEM_SIZES, Machine, RefusalError, TensorPlan, span_of

if TYPE_CHECKING:
    from torch import Tensor

MAGIC = b"PK"
_LONGEST_PROGRAM = 100_000_000  # bytes


def is_pickled(path: Path) -> bool:
    """Whether a file is a zip archive, as PyTorch files are."""
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def pickled_header(path: Path | str) -> Header:
    """Names, types and shapes of the tensors of a PyTorch file; `epoch` and `global_step` as metadata, where given.

    Raises:
        DataError: the file is damaged, or asks for something that isn't done.
    """
    with PickledTensors([path]) as tensors:
        return Header(tensors.infos, tensors.metadata, 0)


class PickledTensors(Mapping[str, "Tensor"]):
    """The tensors of one or more PyTorch files, as `library.files.LazyTensors` gives those of safetensors files."""

    def __init__(self, paths: Sequence[Path | str]) -> None:
        self.paths = [Path(path) for path in paths]
        self.metadata: dict[str, str] = {}
        self._places: dict[str, tuple[Path, _Place]] = {}
        self._open: dict[Path, BinaryIO] = {}
        for path in self.paths:
            places, metadata = _read(path)
            self._places |= {name: (path, place) for name, place in places.items()}
            self.metadata |= metadata

    @property
    def infos(self) -> dict[str, TensorInfo]:
        """Types and shapes, and which bytes of its file each tensor is."""
        return {
            name: TensorInfo(place.dtype, place.shape, place.start, place.start + math.prod(place.shape) * place.item)
            for name, (_, place) in self._places.items()
        }

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor, without reading it."""
        return {name: place.shape for name, (_, place) in self._places.items()}

    def __getitem__(self, name: str) -> Tensor:
        import torch

        path, place = self._places[name]
        if path not in self._open:
            self._open[path] = path.open("rb")
        file = self._open[path]
        data = torch.empty(place.span * place.item, dtype=torch.uint8)
        file.seek(place.start)
        if len(data) and file.readinto(data.numpy().data) != len(data):  # type: ignore[attr-defined]
            raise DataError("the file ended early; was it changed meanwhile?", str(path), code="E-FILE-TRUNCATED")
        return data.view(getattr(torch, DTYPES[place.dtype])).as_strided(place.shape, place.strides).contiguous()

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __enter__(self) -> PickledTensors:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files; tensors already read stay valid."""
        for opened in self._open.values():
            opened.close()
        self._open.clear()


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies in its file."""

    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    start: int
    """Of its first byte."""
    span: int
    """Elements from its first to its last."""

    @property
    def item(self) -> int:
        return ITEM_SIZES.get(self.dtype, 1)


def _read(path: Path) -> tuple[dict[str, _Place], dict[str, str]]:
    """Where the tensors lie, and the numbers that training programs add."""
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            folder, program = _program(archive)
            content = Machine().run(program)
            state = content.get("state_dict", content) if isinstance(content, dict) else None
            if not isinstance(state, dict):
                raise RefusalError("it holds no table of tensors")
            tensors = {name: value for name, value in state.items() if isinstance(value, TensorPlan)}
            if not tensors or not all(isinstance(name, str) for name in tensors):
                raise RefusalError("it holds no table of tensors")
            starts = _storages(archive, file, folder, tensors.values())
    except (zipfile.BadZipFile, OSError, NotImplementedError, EOFError) as error:
        what = f"not a whole PyTorch checkpoint: {str(error) or 'it is damaged'}"
        raise DataError(what, str(path), "copy or download it again", code="E-FILE-DAMAGED") from None
    except (RefusalError, ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        reason = str(error) if isinstance(error, RefusalError) else "its table of tensors makes no sense"
        what = f"this PyTorch file is not read: {reason}"
        raise DataError(what, str(path), "use the safetensors file of the model", code="E-FILE-PICKLE") from None
    numbers = {name: content[name] for name in ("epoch", "global_step") if type(content.get(name)) is int}
    places = {name: _place(tensor, starts[tensor.storage.key]) for name, tensor in tensors.items()}
    return places, {name: str(number) for name, number in numbers.items()}


def _program(archive: zipfile.ZipFile) -> tuple[str, bytes]:
    """The folder of the archive in which everything lies, and the pickle."""
    names = [name for name in archive.namelist() if name == "data.pkl" or name.endswith("/data.pkl")]
    if len(names) != 1:
        raise RefusalError("it has no data.pkl")
    folder = names[0].removesuffix("data.pkl")
    info = archive.getinfo(names[0])
    if info.compress_type != zipfile.ZIP_STORED or info.file_size > _LONGEST_PROGRAM:
        raise RefusalError("its data.pkl is compressed or of a size that makes no sense")
    if folder + "byteorder" in archive.namelist() and archive.read(folder + "byteorder")[:8] != b"little":
        raise RefusalError("its numbers are in big-endian order")
    return folder, archive.read(names[0])


def _storages(archive: zipfile.ZipFile, file: BinaryIO, folder: str, tensors: Iterable[TensorPlan]) -> dict[str, int]:
    """Where the bytes of each storage begin; all of a size that fits."""
    starts: dict[str, int] = {}
    size = file.seek(0, io.SEEK_END)
    for tensor in tensors:
        storage = tensor.storage
        if storage.key not in starts:
            info = archive.getinfo(f"{folder}data/{storage.key}")
            if info.compress_type != zipfile.ZIP_STORED:
                raise RefusalError("its data are compressed")
            file.seek(info.header_offset)
            head = file.read(30)
            name_length, extra_length = struct.unpack("<HH", head[26:30])
            starts[storage.key] = info.header_offset + 30 + name_length + extra_length
            if starts[storage.key] + info.file_size > size:
                raise zipfile.BadZipFile("it ends early")
            if info.file_size != storage.elements * ITEM_SIZES.get(storage.dtype, 1):
                raise RefusalError("the size of its data is not what it says")
    return starts


def _place(tensor: TensorPlan, start: int) -> _Place:
    item = ITEM_SIZES.get(tensor.dtype, 1)
    return _Place(tensor.dtype, tensor.shape, tensor.strides, start + tensor.offset * item, span_of(tensor))
