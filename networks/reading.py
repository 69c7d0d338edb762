"""Network files from outside: tensors by module, ranks, and what a file is that doesn't fit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from library import files
from library.log import DataError
from library.models import detect


class Rank(NamedTuple):
    """Size of an adapter in a file."""

    rank: int
    alpha: float


def read_weights(file: str | Path) -> dict[str, Tensor]:
    """All tensors of a network file, on the CPU.

    Errors: DataError when the file isn't there or isn't safetensors (pickled files can run code when opened).
    """
    path = Path(file)
    if not path.is_file():
        raise DataError("the network file isn't there", str(path), code="E-NETWORK-FILE")
    if path.suffix != ".safetensors":
        raise DataError(
            "only .safetensors files are read", str(path), "convert it to .safetensors", code="E-NETWORK-FILE"
        )
    lazy = files.LazyTensors(path, mmap=False)
    return {name: lazy[name] for name in lazy}


def by_module(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The tensors of each module: names are split at the first dot; those without a dot are left out."""
    modules: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        module, dot, rest = key.partition(".")
        if dot:
            modules.setdefault(module, {})[rest] = tensor
    return modules


def renamed(tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors of a file under other names of their modules, where `names` has one."""

    def new(key: str) -> str:
        module, dot, rest = key.partition(".")
        return names.get(module, module) + dot + rest

    return {new(key): tensor for key, tensor in tensors.items()}


LENGTHS = "dora_scale"
"""A module's tensor with the lengths of DoRA."""


def ranks(tensors: Mapping[str, Tensor]) -> dict[str, Rank]:
    """Rank and alpha of each module with two low-rank matrices; where a file has no alpha, it is the rank."""
    found = {module: low_rank(parts) for module, parts in by_module(tensors).items()}
    return {module: size for module, size in found.items() if size}


def low_rank(tensors: Mapping[str, Tensor]) -> Rank | None:
    """Rank and alpha of one module's two low-rank matrices, named without the module; None: it has none."""
    down = tensors.get("lora_down.weight")
    return None if down is None or "lora_up.weight" not in tensors else with_alpha(down.shape[0], tensors)


def lora_size(tensors: Mapping[str, Tensor]) -> Rank | None:
    """As `low_rank`; None for those of DoRA, too."""
    return None if LENGTHS in tensors else low_rank(tensors)


def with_alpha(rank: int, tensors: Mapping[str, Tensor]) -> Rank:
    """A rank and the alpha of one module's tensors; without one it is the rank."""
    return Rank(rank, float(tensors.get("alpha", rank)))


_OF_ENCODERS = "lora_te"


def for_encoders_only(names: Iterable[str]) -> bool:
    """Whether a file with tensors of these names changes text encoders, of whatever family, and nothing else."""
    return all(name.startswith(_OF_ENCODERS) for name in names)


LORA_FAMILIES = (
    (("lora_unet_joint_blocks_",), "SD3"),
    (("lora_unet_double_blocks_", "lora_unet_single_blocks_"), "FLUX"),
    (("lora_te2_", "lora_unet_input_blocks_", "lora_unet_output_blocks_"), "SDXL"),
    (("lora_unet_down_blocks_", "lora_unet_up_blocks_", "lora_te_"), "SD 1.x or 2.x"),
    (("lora_te1_", "lora_te3_"), "text encoders only"),
    (("lora_unet_",), "a model that isn't known here"),
)
"""Beginnings of names, and what the file is for; the first that occurs counts."""


MERGE_TOOLS: Mapping[str, str] = {
    "SD 1.x or 2.x": "networks/merge_lora.py",
    "SDXL": "networks/sdxl_merge_lora.py",
    "FLUX": "networks/flux_merge_lora.py",
    "SD3": "networks/sd3_merge_lora.py",
}
"""The tool that merges networks for each of these families."""


def describe(tensors: Mapping[str, Tensor]) -> str:
    """What a file looks like, in words."""
    if not tensors:
        return "the file is empty"
    kind = detect.detect({name: tuple(tensor.shape) for name, tensor in tensors.items()})
    if kind.name == "lora":
        for beginnings, family in LORA_FAMILIES:
            if any(name.startswith(beginnings) for name in tensors):
                return f"it is a LoRA for {family}"
    if kind is detect.UNKNOWN:
        return f"its names are unknown, such as {next(iter(tensors))}"
    return f"it is {kind.description}"
