"""How large the weights of a network are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from library.log import DataError
from library.models.locations import open_tensors
from networks.adapter_file import AdapterFile


def statistics(path: str, *, everything: bool = False) -> Iterator[str]:
    """A line for each matrix, or with `everything` each tensor: key, shape, mean and least absolute value.

    Values that aren't finite are said at once, and complained of at the end. Errors: DataError.
    """
    if not Path(path).is_file():
        raise DataError("the network file isn't there", path, code="E-NETWORK-FILE")
    broken = []
    with open_tensors([Path(path)], mmap=False) as tensors:
        AdapterFile(tensors, path)  # refuses whole models and files of other layouts
        keys = [key for key, shape in tensors.shapes.items() if everything or len(shape) > 1]
        yield f"{len(tensors)} tensors, {len(keys)} shown: key, shape, mean |w|, min |w|"
        for key in keys:
            values = tensors[key].to(torch.float32).abs()
            line = f"{key},{tuple(values.shape)}"
            line += f",{values.mean():.6g},{values.min():.6g}" if values.numel() else ",-,-"
            if not bool(torch.isfinite(values).all()):
                broken.append(key)
                line += ",not finite"
            yield line
    if broken:
        what = f"{len(broken)} tensors have values that aren't finite: {', '.join(broken[:3])}"
        raise DataError(what, path, "the file is broken; use an earlier one", code="E-TENSOR-FINITE")
