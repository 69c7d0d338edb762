"""What adapters have in common whose change is alpha / rank times something made of small matrices."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from library.log import DataError
from library.models.quantized import StoredLinear
from library.types import Chance
from networks.base import ModuleAdapter


@dataclass(frozen=True)
class Dropouts:
    """Probabilities, in training only."""

    neuron: float = 0.0
    """Of each element between the two matrices."""
    rank: float = 0.0
    """Of each rank, per sample."""
    module: float = 0.0
    """Of the whole adapter, per call."""


class FactoredAdapter(ModuleAdapter):
    """Holds alpha, and reads and writes its parameters under their own names; what they mean is for subclasses."""

    alpha: Tensor

    def __init__(
        self,
        name: str,
        module: nn.Module,
        component: str,
        *,
        rank: int,
        alpha: float | None,
        multiplier: float = 1.0,
        dropouts: Dropouts | None = None,
    ) -> None:
        """A new adapter that changes nothing yet; alpha None or 0 means the rank."""
        super().__init__(name, module, component, multiplier)
        self.rank, self.dropouts = rank, dropouts or Dropouts()
        self.register_buffer("alpha", torch.tensor(alpha or rank))
        self.scale = float(alpha or rank) / rank
        self.register_load_state_dict_post_hook(_refresh_scale)  # type: ignore[no-untyped-call]

    @property
    def chance(self) -> Chance:
        """See `ModuleAdapter.chance`."""
        if self.dropouts.module:
            return Chance.HOST
        return Chance.DEVICE if self.dropouts.neuron or self.dropouts.rank else Chance.NOWHERE

    @property
    def strength(self) -> float:
        """What the product of the matrices is multiplied by."""
        return self.multiplier * self.scale

    def fits(self, names: Collection[str]) -> bool:
        """Whether all matrices are there."""
        return all(name in names for name, _ in self.named_parameters())

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes over a file's matrices and alpha; without alpha it is the rank.

        Errors: DataError when a shape differs.
        """
        for key, parameter in self.named_parameters():
            self._take(key, tensors[key], parameter)
        alpha = tensors.get("alpha", torch.tensor(self.rank))
        self.alpha = alpha.detach().clone().to(self.alpha.device)
        self.scale = float(alpha) / self.rank

    def _take(self, key: str, tensor: Tensor, parameter: nn.Parameter) -> None:
        """1x1 convolutions are written with and without their two last axes; both are read."""
        wanted = tuple(parameter.shape)
        if tuple(tensor.shape) != wanted:
            if tuple(tensor.flatten(1).shape) != tuple(parameter.flatten(1).shape):
                what = f"{self.name}.{key} is {tuple(tensor.shape)} in the file, {wanted} in this network"
                hint = "if only the rank differs, give --dim_from_weights or the file's --network_dim"
                raise DataError(what, "network weights", hint, code="E-NETWORK-SHAPE")
            tensor = tensor.reshape(wanted)
        with torch.no_grad():
            parameter.copy_(tensor)

    def forward(self, x: Tensor) -> Tensor:
        """What the module would answer with its weight changed."""
        probability = self.dropouts.module
        dropped = self.training and probability > 0 and float(torch.rand((), device="cpu")) < probability
        if dropped or self.multiplier == 0:
            return cast("Tensor", self.original_forward(x))
        return self.changed(x)

    @abstractmethod
    def changed(self, x: Tensor) -> Tensor:
        """As `forward`, where the change counts."""

    def gate(
        self, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype, channels: int = -1
    ) -> Tensor | None:
        """What the activations between two matrices are multiplied by: 0 where dropped, more than 1 elsewhere.

        `shape` is theirs, the batch first and the ranks on axis `channels`. None: nothing is dropped.
        """
        neuron, rank = self.dropouts.neuron, self.dropouts.rank
        if not self.training or not (neuron or rank):
            return None
        gate = torch.ones((), device=device, dtype=dtype)
        if neuron:
            gate = kept(shape, neuron, device, dtype)
        if rank:
            per_sample = [shape[0], *[1] * (len(shape) - 1)]
            per_sample[channels] = shape[channels]
            gate = gate * kept(per_sample, rank, device, dtype)
        return gate


def covers_plain_linear(adapter: ModuleAdapter) -> bool:
    """Whether its module is nothing but `x W^T + b` with a frozen W, so that one fused function can replace it."""
    module = adapter.module
    plain = type(module) in (nn.Linear, StoredLinear)
    return plain and not adapter.covers_a_hook and not weight_of(module).requires_grad


def weight_of(module: nn.Module) -> Tensor:
    """The weight of a linear layer or a convolution, as it is held."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def weight_shape(module: nn.Module) -> tuple[int, ...]:
    """(out, in) of a linear layer, (out, in, height, width) of a convolution, however the weight is held."""
    if isinstance(module, nn.Conv2d):
        assert module.groups == 1, "grouped convolutions have no adapter"
        return (module.out_channels, module.in_channels, *module.kernel_size)
    assert isinstance(module, nn.Linear)
    return (module.out_features, module.in_features)


def kept(shape: Sequence[int], probability: float, device: torch.device, dtype: torch.dtype) -> Tensor:
    """0 with a probability, elsewhere what keeps the mean at 1."""
    keep = 1 - probability
    mask = torch.rand(shape, device=device) < keep
    return mask.to(dtype) / keep if keep > 0 else mask.to(dtype)


def _refresh_scale(adapter: nn.Module, _: Any) -> None:
    assert isinstance(adapter, FactoredAdapter)
    adapter.scale = float(adapter.alpha) / adapter.rank
