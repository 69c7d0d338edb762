"""Files that tools write: checked beforehand, streamed, with metadata and hashes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from library import files, metadata
from library.log import DataError, UserError, get_logger
from networks.adapter_file import check_finite, is_finite
from networks.reading import Rank

logger = get_logger(__name__)

PRECISIONS = {"float": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
"""Values of `--save_precision`."""
DYNAMIC = "Dynamic"
HASHES = ("sshs_model_hash", "sshs_legacy_hash")
SUFFIX = ".safetensors"


def check_output(
    path: str | None, inputs: Iterable[str | None], *, overwrite: bool = False, option: str = "--save_to"
) -> Path:
    """The output path. To be called before anything is read.

    Errors: UserError when there is none, or it is one of the inputs and `overwrite` is off, has a suffix other than
    .safetensors, is a folder, or lies in one that can't be written to.
    """
    if not path:
        raise UserError("no name for the result", option, "give a .safetensors file", code="E-OUTPUT")
    found = Path(path)
    if found.suffix.lower() != SUFFIX:
        raise UserError(f"{path}: only .safetensors files are written", option, f"end it in {SUFFIX}", code="E-OUTPUT")
    if found.is_dir():
        raise UserError(f"{path} is a folder", option, "name a file in it", code="E-OUTPUT")
    if not overwrite and any(same_file(found, other) for other in inputs if other):
        hint = "choose another name, or add --overwrite"
        raise UserError(f"{path} is one of the files that are read", option, hint, code="E-OUTPUT-INPUT")
    folder = next(parent for parent in found.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"nothing can be written to {folder}", option, "choose another folder", code="E-OUTPUT")
    return found


def same_file(path: Path, other: Path | str) -> bool:
    """Whether both are one file, however they are spelled."""
    try:
        return path.samefile(other)
    except OSError:
        return path.absolute() == Path(other).absolute()


def converted(tensor: Tensor, dtype: torch.dtype | None, key: str, path: str) -> Tensor:
    """In another type. Errors: DataError when a value isn't finite, or is too large for the type."""
    check_finite(tensor, key, path)
    if dtype is None or dtype == tensor.dtype or not tensor.dtype.is_floating_point:
        return tensor
    result = tensor.to(dtype)
    if not is_finite(result):
        hint = "choose another --save_precision, such as bf16"
        raise DataError(f"{key} has values too large for {str(dtype)[6:]}", path, hint, code="E-TENSOR-FINITE")
    return result


def save_network(
    tensors: Mapping[str, Tensor], path: Path | str, facts: Mapping[str, str], dtype: torch.dtype | None = None
) -> None:
    """Writes an adapter file; hashes are those of the new tensors. `dtype` None: as they are.

    Errors: DataError when there is no tensor, a value isn't finite, or isn't any more in `dtype`; nothing is written
    then.
    """
    if not tensors:
        raise DataError("there is nothing to write", str(path), code="E-MERGE-NOTHING")
    final = {key: converted(tensor.detach().cpu(), dtype, key, str(path)) for key, tensor in tensors.items()}
    kept = {key: value for key, value in facts.items() if key not in HASHES}
    files.save_safetensors(final, path, kept | metadata.network_hashes(final, kept))
    logger.info("saved %s: %d tensors", path, len(final))


def common(values: Iterable[float]) -> str:
    """The value that all have, as in files, or "Dynamic"; whole numbers without a dot."""
    found = set(values)
    if len(found) != 1:
        return DYNAMIC
    value = found.pop()
    return str(int(value)) if value == int(value) else str(value)


def network_metadata(
    inherited: Mapping[str, str],
    sizes: Iterable[Rank],
    *,
    module: str | None = None,
    base_model_version: str | None = None,
    keep_all: bool = False,
) -> dict[str, str]:
    """The `ss_*` values of a new adapter: its module, dim and alpha ("Dynamic" where they vary), the base model.

    Args:
        inherited: metadata of the (first) source; only ss_base_model_version, ss_v2 and ss_network_module are taken
            from it, or with `keep_all` everything but hashes.
        sizes: of all modules.
        module: value of ss_network_module; None: that of the source.
        base_model_version: None: that of the source.
    """
    sizes = list(sizes)
    taken = ("ss_base_model_version", "ss_v2", "ss_network_module")
    found = {key: value for key, value in inherited.items() if key not in HASHES and (keep_all or key in taken)}
    if module is not None:
        found["ss_network_module"] = module
    if base_model_version is not None:
        found["ss_base_model_version"] = base_model_version
    dim, alpha = common(size.rank for size in sizes), common(size.alpha for size in sizes)
    return found | {"ss_network_dim": dim, "ss_network_alpha": alpha}
