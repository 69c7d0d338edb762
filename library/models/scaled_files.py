"""Files in 'scaled fp8' form: weights in float8_e4m3fn, each with a scale beside it, as ComfyUI writes them.

A weight `X.weight` is what is stored times `X.scale_weight`, or `X.weight_scale` in newer files. Scales and factors for
activations, and marks of the form, are there for programs that compute in float8 without measuring; they are left out.

Source: comfyanonymous/ComfyUI, QUANTIZATION.md and comfy/ops.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TypeVar

from torch import Tensor

from library.files import LazyTensors, TensorInfo
from library.pickles import PickledTensors

SCALES = (".scale_weight", ".weight_scale")
_LEFT_OUT = (".scale_input", ".input_scale", ".comfy_quant")
_MARK = "scaled_fp8"
_WEIGHT = ".weight"

Value = TypeVar("Value")


def without_scales(tensors: Mapping[str, Value]) -> dict[str, Value]:
    """What would be there if the file weren't in this form; all that is there if it isn't."""
    return {
        name: value
        for name, value in tensors.items()
        if not name.endswith((*SCALES, *_LEFT_OUT)) and name.rpartition(".")[2] != _MARK
    }


def odd_weight(infos: Mapping[str, TensorInfo]) -> str | None:
    """The first weight of a file that has a scale, but not in this form; None without any."""
    for name, info in infos.items():
        if not name.endswith(SCALES):
            continue
        layer = next(name.removesuffix(end) for end in SCALES if name.endswith(end))
        weight = infos.get(layer + _WEIGHT)
        if weight is None or weight.dtype != "F8_E4M3" or math.prod(info.shape) not in (1, weight.shape[0]):
            return layer + _WEIGHT
    return None


class ScaledTensors(Mapping[str, Tensor]):
    """The tensors of a file in this form, or in any other: weights come with their scale multiplied in, in float32."""

    def __init__(self, tensors: LazyTensors | PickledTensors) -> None:
        self._tensors = tensors
        self.shapes: Mapping[str, tuple[int, ...]] = without_scales(tensors.shapes)

    @property
    def infos(self) -> dict[str, TensorInfo]:
        """Types, as they come out, and shapes."""
        found = without_scales(self._tensors.infos)
        return {name: replace(info, dtype="F32") if self._scale_of(name) else info for name, info in found.items()}

    def __getitem__(self, name: str) -> Tensor:
        tensor, scale = self.parts(name)
        return tensor if scale is None else tensor.float() * scale

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._tensors if name in self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def __contains__(self, name: object) -> bool:
        return name in self.shapes

    def parts(self, name: str) -> tuple[Tensor, Tensor | None]:
        """A tensor as the file has it, and its scale (rows, 1), float32; None if it has none."""
        tensor, scale = self._tensors[name], self._scale_of(name)
        if scale is None:
            return tensor, None
        return tensor, self._tensors[scale].float().reshape(-1, 1).expand(len(tensor), 1)

    def stored_dtype(self, name: str) -> str:
        """The type that a tensor comes in, as headers call it; nothing is read."""
        return "F32" if self._scale_of(name) else self._tensors.infos[name].dtype

    def _scale_of(self, name: str) -> str | None:
        """The name of a tensor's scale; None: it has none."""
        layer = name.removesuffix(_WEIGHT)
        return next((layer + end for end in SCALES if layer != name and layer + end in self._tensors), None)
