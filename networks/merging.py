"""Adapters merged into whole models, tensor by tensor, and the differences of two models."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import torch
from torch import Tensor

from library import files
from library.files import DTYPES, LazyTensors
from library.log import DataError, get_logger
from library.models.keymaps import Mapped
from library.models.scaled_files import ScaledTensors
from library.pickles import PickledTensors
from library.progress import Progress
from networks import changes
from networks.adapter_file import AdapterFile, check_finite
from networks.blocks import BlockRatios
from networks.places import Place, Places
from networks.report import Report
from networks.results import converted

logger = get_logger(__name__)


@dataclass(frozen=True)
class Source:
    """An adapter file, and how much of it counts."""

    file: AdapterFile
    ratio: float = 1.0
    blocks: BlockRatios | None = None

    def ratio_of(self, module: str) -> float:
        """Of one module, with that of its block."""
        return self.ratio if self.blocks is None else self.ratio * self.blocks.ratio(module)


def check_sources(sources: Sequence[Source], places: Places, where: str, left_out: Sequence[str] = ()) -> None:
    """Every module of every file must have a place in the model, with its shape.

    Args:
        where: the model, for messages.
        left_out: beginnings of names of modules that are to be left out, such as those of text encoders.

    Errors: DataError that names the first three keys that don't fit, and what the file looks like.
    """
    for source in sources:
        file = source.file
        modules = [module for module in file if not module.startswith(tuple(left_out))]
        _complain(file, [module for module in modules if module not in places], "are for no layer of it", where)
        wrong = [module for module in modules if not _fits(file.weight_shape(module), places[module])]
        _complain(file, wrong, "are for layers of other sizes", where)
        _complain(file, [module for module in modules if file.kind(module) is None], "are of an unknown kind", where)
        if not modules:
            raise DataError("no module of it is for this model", f"{file.path}, {where}", code="E-MERGE-NOTHING")


def _complain(file: AdapterFile, modules: Sequence[str], what: str, where: str) -> None:
    if modules:
        named = ", ".join(file.key(module) for module in modules[:3])
        found = f"{len(modules)} of {len(file)} modules {what}: {named}; the file is for {file.family}"
        hint = "merge it into the model it was made for"
        raise DataError(found, f"{file.path}, {where}", hint, code="E-MERGE-MISFIT")


def _fits(shape: tuple[int, ...] | None, place: Place) -> bool:
    if shape is None or len(shape) == 1:
        return shape is None or shape[0] == place.shape[0]
    return shape[0] == place.shape[0] and math.prod(shape) == math.prod(place.shape)


class Merged(Mapping[str, Tensor]):
    """A model with adapters merged into it: each tensor is computed when it is asked for, and not kept.

    Changes are those of the weights as they were, and added up, as adapters that run beside each other do.
    """

    def __init__(
        self,
        base: Mapping[str, Tensor],
        places: Places,
        sources: Sequence[Source],
        *,
        where: str = "the model",
        left_out: Sequence[str] = (),
        dtype: torch.dtype | None = None,
        shapes: Mapping[str, tuple[int, ...]] | None = None,
        device: torch.device | str = "cpu",
        progress: str | None = None,
    ) -> None:
        """Checks at once that everything fits.

        Args:
            base: tensors of the model, lazy or not (`LazyTensors(path, mmap=False)`, so that its pages don't pile up
                in memory); keys stay as they are.
            places: of `networks.places`, for the same model.
            sources: what is merged.
            where, left_out: see `check_sources`.
            dtype: of the floating-point tensors of the result; None: each tensor's own.
            shapes: of the model's tensors, if `base` is neither `LazyTensors` nor small.
            device: where merging is computed.
            progress: what a bar says; None: no bar.

        Errors: DataError as `check_sources`.
        """
        check_sources(sources, places, where, left_out)
        self.report = Report()
        self._base, self._sources, self._where, self._left_out = base, sources, where, tuple(left_out)
        self._dtype, self._device, self._progress = dtype, device, progress
        self._places: dict[str, list[tuple[str, Place]]] = defaultdict(list)
        for module, place in places.items():
            if any(module in source.file for source in sources):
                self._places[place.key].append((module, place))
        self._shapes = shapes or getattr(base, "shapes", None) or {key: base[key].shape for key in base}
        for source in sources:
            self.report.expect(source.file.name)

    @property
    def like(self) -> Mapping[str, Tensor]:
        """Types and shapes of the tensors, without data."""
        found = {}
        for key in self._base:
            dtype = dtype_of(self._base, key)
            if self._dtype is not None and dtype.is_floating_point:
                dtype = self._dtype
            found[key] = torch.empty(tuple(self._shapes[key]), dtype=dtype, device="meta")
        return found

    def __getitem__(self, key: str) -> Tensor:
        """Errors: DataError when values aren't finite, here or in the type of the result."""
        tensor = self._base[key]
        if not tensor.is_floating_point():
            return tensor
        own = self._dtype or tensor.dtype
        if key in self._places:
            tensor = self._merged(key, tensor)
        return converted(tensor, own, key, self._where)

    def _merged(self, key: str, tensor: Tensor) -> Tensor:
        check_finite(tensor, key, self._where)
        total = tensor.to(self._device, torch.float32, copy=True)
        for module, place in self._places[key]:
            sources = [source for source in self._sources if module in source.file]
            if not sources or module.startswith(self._left_out):
                continue
            rows = slice(None) if place.rows is None else slice(*place.rows)
            own = total[rows]
            norm, weight = float(own.norm()), None
            if any(source.file.kind(module) in changes.OF_WEIGHTS for source in sources):
                weight = own.reshape(place.shape).clone()
            for source in sources:
                own += self._change(source, module, place, weight, norm).reshape(own.shape)
        return total.cpu()

    def _change(self, source: Source, module: str, place: Place, weight: Tensor | None, norm: float) -> Tensor:
        """Of one module, with its ratio; `norm` is that of its weight."""
        ratio, file = source.ratio_of(module), source.file
        try:
            delta = changes.change(
                file[module],
                name=module,
                weight=weight,
                shape=place.shape,
                parts=place.parts,
                device=self._device,
            ).mul_(ratio)
        except DataError as error:
            raise DataError(error.what, error.where or file.path, error.hint, code=error.code) from None
        self.report.add(file.name, module, place.component, float(delta.norm()), norm)
        return delta

    def __iter__(self) -> Iterator[str]:
        return iter(self._base)

    def __len__(self) -> int:
        return len(self._base)

    def __contains__(self, key: object) -> bool:
        return key in self._base

    def save(self, path: Path | str, metadata: Mapping[str, str] | None = None) -> None:
        """Writes the model and logs the report. Errors: DataError when nothing changed; no file is left then."""
        with Progress(self._progress or "merging", len(self), "tensors", visible=self._progress is not None) as bar:
            files.save_safetensors(_Counted(self, bar), path, metadata, like=self.like)
        for line in self.report.lines():
            logger.info("%s", line)
        logger.info("saved %s", path)


class _Counted(Mapping[str, Tensor]):
    """A merged model on its way to the disk; the last tensor isn't given out when nothing has changed."""

    def __init__(self, merged: Merged, bar: Progress) -> None:
        self._merged, self._bar = merged, bar

    def __getitem__(self, key: str) -> Tensor:
        tensor = self._merged[key]
        self._bar.advance()
        if self._bar.done == len(self._merged):
            self._merged.report.check()
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._merged)

    def __len__(self) -> int:
        return len(self._merged)


def dtype_of(tensors: Mapping[str, Tensor], key: str) -> torch.dtype:
    """The type of a tensor, without reading it where that can be."""
    if isinstance(tensors, Mapped):
        return reduce(torch.promote_types, {dtype_of(tensors.source, name) for name in tensors.recipes[key].sources})
    if isinstance(tensors, ScaledTensors):
        stored: torch.dtype = getattr(torch, DTYPES[tensors.stored_dtype(key)])
        return stored
    if isinstance(tensors, LazyTensors | PickledTensors):
        found: torch.dtype = getattr(torch, DTYPES[tensors.infos[key].dtype])
        return found
    return tensors[key].dtype


def differences(
    original: Mapping[str, Tensor],
    tuned: Mapping[str, Tensor],
    original_places: Places,
    tuned_places: Places,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """What each module's weight of one model is more than that of another, float32 on `device`; one at a time.

    Args:
        dtype: both are rounded to this type first.

    Errors: DataError when modules or shapes differ, or values aren't finite.
    """
    check_same_layers(original_places, tuned_places)
    for module, place in original_places.items():
        if place.usual:
            yield module, difference(original, tuned, place, tuned_places[module], device=device, dtype=dtype)


def check_same_layers(original: Places, tuned: Places) -> None:
    """Errors: DataError when two models don't have the same layers, of the same sizes."""
    wanted = {module: place.shape for module, place in original.items() if place.usual}
    found = {module: place.shape for module, place in tuned.items() if place.usual}
    if wanted != found:
        wrong = [module for module in {**wanted, **found} if wanted.get(module) != found.get(module)]
        what = f"{len(wrong)} layers are only in one of the models, or of other sizes: {', '.join(wrong[:3])}"
        raise DataError(what, "the models", "both must be of the same kind", code="E-MERGE-MISFIT")


def difference(
    original: Mapping[str, Tensor],
    tuned: Mapping[str, Tensor],
    place: Place,
    tuned_place: Place,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """What one weight of a model is more than that of another, float32 on `device`. See `differences`."""
    pair = []
    for tensors, where, name in ((tuned, tuned_place, "tuned model"), (original, place, "original model")):
        tensor = tensors[where.key]
        rows = tensor if where.rows is None else tensor[slice(*where.rows)]
        check_finite(rows, where.key, name)
        pair.append((rows if dtype is None else rows.to(dtype)).to(device, torch.float32).reshape(where.shape))
    return pair[0] - pair[1]
