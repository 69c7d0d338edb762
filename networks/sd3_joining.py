"""The parts of SD3 joined into one file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from library import devices, files, metadata
from library.log import get_logger
from library.models.checkpoints_sd import Part
from library.models.keymaps_sd3 import ENCODERS
from library.models.loading_sd3 import VAE, Sd3Files, prefix_of, require_whole, single_file
from library.models.locations import joint_header
from library.models.mmdit import MMDiTConfig
from library.models.scaled_files import without_scales
from library.option_groups import MergeSd3Options
from library.progress import Progress
from library.types import DENOISER
from networks import results
from networks.model_files import modelspec

logger = get_logger(__name__)

STALE = ("format", "modelspec.hash_sha256")
"""Metadata that don't hold for a file with more in it."""


def join(options: MergeSd3Options) -> None:
    """What `tools/merge_sd3_safetensors.py` does. Errors: UserError, DataError; nothing is written then."""
    separate = {name: getattr(options, name) for name in (VAE, *ENCODERS)}
    sources = Sd3Files(options.dit, separate, "--dit", mmap=False)
    parts = {DENOISER: sources.part(DENOISER)}
    parts |= {name: part for name in (VAE, *ENCODERS) if (part := sources.find(name)) is not None}
    inputs = [str(file) for part in parts.values() for file in part.files]
    path = results.check_output(options.output, inputs, overwrite=options.overwrite, option="--output")
    dtype = devices.dtype_of(options.save_precision, "--save_precision") if options.save_precision else None
    for name, part in parts.items():
        require_whole(part, name)
        logger.info("%s: %d tensors of %s", prefix_of(name).rstrip("."), len(part.recipes), part.where)
    with single_file(sources, {}, ENCODERS) as joined:
        dtypes = {prefix_of(name): kept for name, part in parts.items() if (kept := _dtype(name, part, dtype))}
        with Progress("joining", len(joined), "tensors") as bar:
            result = Converted(joined, dtypes, joined.like, bar, options.dit)
            files.save_safetensors(result, path, _metadata(parts[DENOISER], path), like=result.like)
    logger.info("saved %s: %d tensors", path, len(joined))


def _dtype(name: str, part: Part, wanted: torch.dtype | None) -> torch.dtype | None:
    """What a part is written in; None: as it is.

    The autoencoder isn't written in eight bits, and weights with scales come out as what they mean.
    """
    if wanted is not None and (name != VAE or wanted.itemsize > 1):
        return wanted
    tensors = joint_header(part.files, part.where).tensors
    return torch.bfloat16 if len(without_scales(tensors)) < len(tensors) else None


class Converted(Mapping[str, Tensor]):
    """Tensors in their new types, checked and counted when they are asked for."""

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        dtypes: Mapping[str, torch.dtype],
        like: Mapping[str, Tensor],
        bar: Progress,
        where: str,
    ) -> None:
        """Args:
        tensors: lazy or not.
        dtypes: by what names begin with; others stay as they are.
        like: the tensors without data.
        bar: what counts them.
        where: their file, for messages.
        """
        self._tensors, self._dtypes, self._bar, self._where = tensors, dtypes, bar, where
        self.like = {name: self._typed(name, tensor) for name, tensor in like.items()}

    def __getitem__(self, name: str) -> Tensor:
        """Errors: DataError when a value isn't finite, here or in the new type."""
        self._bar.advance()
        return results.converted(self._tensors[name], self._dtype(name), name, self._where)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def _dtype(self, name: str) -> torch.dtype | None:
        return next((dtype for start, dtype in self._dtypes.items() if name.startswith(start)), None)

    def _typed(self, name: str, tensor: Tensor) -> Tensor:
        dtype = self._dtype(name)
        return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor


def _metadata(part: Part, path: Path) -> dict[str, str]:
    """Those of the transformer, and a specification where it has none."""
    said = joint_header(part.files, part.where).metadata
    kept = {key: value for key, value in said.items() if key not in STALE}
    return modelspec(metadata.sd3_architecture(MMDiTConfig.from_shapes(part.shapes).variant), "", path) | kept
