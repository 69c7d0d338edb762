"""Weighted sums of checkpoints, tensor by tensor."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from library import metadata
from library.files import DTYPES, Header, save_safetensors
from library.log import DataError, get_logger
from library.models import detect
from library.models.checkpoints_sd import V_MARK
from library.models.detect import Kind
from library.models.keymaps_sd import CLIP_PREFIXES, UNET_PREFIXES
from library.models.locations import joint_header, open_tensors
from library.models.scaled_files import ScaledTensors, without_scales
from library.progress import Progress

logger = get_logger(__name__)

_OLD_CLIP = re.compile(
    rf"({'|'.join(re.escape(prefix) for prefixes in CLIP_PREFIXES.values() for prefix in prefixes)})"
    r"(embeddings|encoder|final_layer_norm)\."
)
"""Names of early files, without a level."""

LEAST = 1e-6
"""A change whose norm is less, in parts of that of the model, is only rounding."""


@dataclass(frozen=True)
class Model:
    """A checkpoint that is mixed; tensors under the names of today."""

    path: str
    header: Header
    keys: Mapping[str, str]
    """Name of today -> name in the file."""
    shapes: Mapping[str, tuple[int, ...]]
    kind: Kind

    @classmethod
    def of(cls, path: str) -> Model:
        """Reads the header. Errors: DataError when it is a folder, damaged, or no model."""
        if Path(path).is_dir():
            hint = "give single files; tools/convert_diffusers20_original_sd.py makes them"
            raise DataError("this is a folder", path, hint, code="E-FILE-KIND")
        if not Path(path).exists():
            raise DataError("no such file", path, "check the path", code="E-FILE-MISSING")
        header = joint_header([Path(path)], "--models")
        kind = detect.detect(header)
        if "network" in kind.roles or "textual_inversion" in kind.roles:
            hint = "for networks there is networks/merge_lora.py and others"
            raise DataError(f"it is {kind.description}, no model", path, hint, code="E-MODEL-KIND")
        keys = {_OLD_CLIP.sub(r"\1text_model.\2.", key): key for key in without_scales(header.tensors)}
        return cls(path, header, keys, {name: header.tensors[key].shape for name, key in keys.items()}, kind)

    def dtype(self, name: str) -> torch.dtype:
        """The type of a tensor in the file."""
        found: torch.dtype = getattr(torch, DTYPES[self.header.tensors[self.keys[name]].dtype])
        return found


def check(models: Sequence[Model], *, show_skipped: bool = False) -> None:
    """All models must be of one kind and have tensors of the same shapes; what only some have is warned of.

    Errors: DataError that names the first three tensors that differ.
    """
    first = models[0]
    for other in models[1:]:
        common = first.keys.keys() & other.keys.keys()
        wrong = [name for name in first.keys if name in common and first.shapes[name] != other.shapes[name]]
        if wrong or not common or _family(first.kind) != _family(other.kind):
            named = ", ".join(f"{name} {other.shapes[name]} and not {first.shapes[name]}" for name in wrong[:3])
            named = named or ", ".join([name for name in other.keys if name not in first.keys][:3])
            what = f"it is {other.kind.description}, and {Path(first.path).name} {first.kind.description}: {named}"
            raise DataError(what, other.path, "merge models of one kind", code="E-MERGE-MISFIT")
        skipped = [name for name in other.keys if name not in first.keys]
        missing = [name for name in first.keys if name not in other.keys]
        for names, what in (
            (skipped, "are skipped, as the first model hasn't got them"),
            (missing, "are missing; those of the first model count for them"),
        ):
            if names:
                some = names if show_skipped else names[:3]
                more = "" if len(some) == len(names) else ", … (--show_skipped lists them)"
                logger.warning("%s: %d tensors %s: %s%s", other.path, len(names), what, ", ".join(some), more)


def _family(kind: Kind) -> str:
    return kind.name.removesuffix("_diffusers")


class Mixed(Mapping[str, Tensor]):
    """The weighted sum of models: each tensor is computed when it is asked for, and not kept.

    It has the tensors of the first model; where another model lacks one, that of the first counts for it. Numbers that
    aren't floating-point are those of the first model.
    """

    def __init__(
        self,
        models: Sequence[Model],
        tensors: Sequence[Mapping[str, Tensor]],
        ratios: Sequence[float],
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        unet_only: bool = False,
    ) -> None:
        """Args:
            models, tensors, ratios: one of each for each model; tensors under the names in the files.
            dtype: of the result.
            device: where sums are computed, in float32.
            unet_only: everything but the U-Net is that of the first model.

        Errors: DataError when there is no U-Net, but only it is wanted.
        """
        self._models, self._tensors, self._ratios = models, tensors, ratios
        self._dtype, self._device = dtype, device
        names = list(models[0].keys)
        self._mixed = {name for name in names if not unet_only or name.startswith(UNET_PREFIXES)}
        if not self._mixed:
            what = f"it is {models[0].kind.description} without a U-Net under its usual names: {', '.join(names[:3])}"
            raise DataError(what, models[0].path, "leave --unet_only out", code="E-MODEL-PART")
        self.moved = self.whole = 0.0
        """Squared norms of what was changed in the first model, and of that."""

    @property
    def like(self) -> dict[str, Tensor]:
        """Types and shapes of the tensors, without data."""
        first = self._models[0]
        dtypes = {name: first.dtype(name) for name in first.keys}
        return {
            name: torch.empty(
                first.shapes[name], dtype=self._dtype if dtype.is_floating_point else dtype, device="meta"
            )
            for name, dtype in dtypes.items()
        }

    def __getitem__(self, name: str) -> Tensor:
        """Errors: DataError when values aren't finite, here or in the type of the result."""
        own = self._of(0, name)
        if not own.is_floating_point():
            return own
        own = own.to(self._device, torch.float32)
        total = own
        if name in self._mixed:
            total = torch.zeros_like(own)
            for index, ratio in enumerate(self._ratios):
                has = name in self._models[index].keys
                total += ratio * (self._of(index, name).to(self._device, torch.float32) if has else own)
            self.moved += float((total - own).square().sum())
            self.whole += float(own.square().sum())
        result = total.to(self._dtype)
        if not bool(torch.isfinite(result).all()):
            what = f"{name} has values that aren't finite, or too large for {str(self._dtype)[6:]}"
            hint = "check the models, or use --saving_precision bf16"
            raise DataError(what, ", ".join(model.path for model in self._models), hint, code="E-TENSOR-FINITE")
        return result.cpu()

    def _of(self, index: int, name: str) -> Tensor:
        return self._tensors[index][self._models[index].keys[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._models[0].keys)

    def __len__(self) -> int:
        return len(self._models[0].keys)

    def save(self, path: Path, facts: Mapping[str, str]) -> None:
        """Writes the sum and says what was done. Errors: DataError when it is the first model; no file is left then."""
        with Progress("merging", len(self), "tensors") as bar:
            save_safetensors(_Counted(self, bar), path, facts, self.like)
        logger.info(
            "merged %d tensors of %d models (%s), %.2f%% away from the first one",
            *(len(self._mixed), len(self._models), ", ".join(f"{ratio:g}" for ratio in self._ratios)),
            100 * (self.moved / self.whole) ** 0.5,
        )
        logger.info("saved %s", path)


class _Counted(Mapping[str, Tensor]):
    """The sum on its way to the disk; the last tensor isn't given out when nothing has changed."""

    def __init__(self, mixed: Mixed, bar: Progress) -> None:
        self._mixed, self._bar = mixed, bar

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._mixed[name]
        self._bar.advance()
        if self._bar.done == len(self._mixed) and self._mixed.moved <= LEAST**2 * self._mixed.whole:
            hint = "check the models and --ratios"
            raise DataError("the result would be the first model as it is", "--models", hint, code="E-MERGE-NOTHING")
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._mixed)

    def __len__(self) -> int:
        return len(self._mixed)


def mixed_metadata(models: Sequence[Model], path: Path) -> dict[str, str]:
    """Metadata of the sum: those of the first model that still hold, and a new specification, if the kind is known."""
    first = models[0]
    versions = {"sd1": "1", "sd2": "2", "sdxl": "xl"}
    said = first.header.metadata
    v_prediction = V_MARK in first.keys or said.get("modelspec.prediction_type") == "v"
    base = said.get("modelspec.architecture")
    if first.kind.name in versions:
        base = metadata.sd_architecture(versions[first.kind.name], v_prediction=v_prediction)
    if base is None:
        return metadata.lasting(said)
    return metadata.lasting(said) | metadata.build_modelspec(
        architecture=base,
        timestamp=time.time(),
        title=path.stem,
        v_parameterization=v_prediction,
        merged_from=", ".join(metadata.title_of(model.header.metadata, model.path) for model in models),
    )


@contextmanager
def opened(model: Model) -> Iterator[ScaledTensors]:
    """The tensors of a model, read when they are asked for; scaled ones with their scales."""
    with open_tensors([Path(model.path)], mmap=False) as tensors:
        yield ScaledTensors(tensors)
