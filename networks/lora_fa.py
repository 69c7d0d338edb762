"""LoRA-FA for SD and SDXL: as `networks.lora`, with down matrices that stay as they are (`networks.lora_fa`).

Only the up matrices are trained, so there is half to keep for the optimizer. Files are those of LoRA. LoRA+ has no
meaning here.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from networks import lora
from networks.arguments import Arguments
from networks.base import ModuleAdapter
from networks.creating import Settings
from networks.factored import Dropouts, weight_shape
from networks.groups import LrRatios
from networks.low_rank import LoraAdapter
from networks.reading import Rank, lora_size
from networks.targets import Target


class Frozen(nn.Module):
    """Holds a matrix that isn't trained, so that its key in files ends in `.weight`."""

    weight: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)


class FrozenDownAdapter(LoraAdapter):
    """Two matrices, the first of which is random and stays so.

    Source: Zhang et al., "LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models Fine-tuning" (2023).
    """

    lora_down: Frozen  # type: ignore[assignment]

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
        super().__init__(name, module, component, rank=rank, alpha=alpha, multiplier=multiplier, dropouts=dropouts)
        spread = math.sqrt(2 / (weight_shape(module)[1] + rank))
        self.lora_down = Frozen(torch.empty(self.lora_down.weight.shape).normal_(std=spread))

    def fits(self, names: Collection[str]) -> bool:
        """Whether both matrices are there."""
        return "lora_down.weight" in names and super().fits(names)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """See `FactoredAdapter.load`."""
        super().load(tensors)
        self._take("lora_down.weight", tensors["lora_down.weight"], self.lora_down.weight)  # type: ignore[arg-type]

    @torch.no_grad()
    def scale_by(self, ratio: Tensor) -> None:
        """Multiplies the matrix that is trained."""
        self.lora_up.weight.mul_(ratio.to(self.lora_up.weight.dtype))


class LoraFa:
    """See `networks.kinds.Kind`."""

    name = "lora_fa"

    def settings(self, arguments: Arguments) -> object:
        """It has none."""
        return None

    def create(
        self, target: Target, component: str, size: Rank, multiplier: float, dropouts: Dropouts, settings: object
    ) -> ModuleAdapter:
        """See `Kind.create`."""
        return FrozenDownAdapter(
            target.name,
            target.module,
            component,
            rank=size.rank,
            alpha=size.alpha,
            multiplier=multiplier,
            dropouts=dropouts,
        )

    def of_file(
        self, target: Target, component: str, tensors: Mapping[str, Tensor], multiplier: float, dropouts: Dropouts
    ) -> ModuleAdapter | None:
        """See `Kind.of_file`."""
        size = lora_size(tensors)
        return size and self.create(target, component, size, multiplier, dropouts, None)


def settings(arguments: Arguments, neuron_dropout: float | None) -> Settings:
    """See `Plugin.settings`."""
    found = lora.settings(arguments, neuron_dropout, LoraFa())
    if found.lr_ratios == LrRatios():
        return found
    plain = replace(found, lr_ratios=LrRatios())
    return plain.noting("LoRA+ has no effect on LoRA-FA, which trains the up matrices only")


PLUGIN = replace(lora.PLUGIN, settings=settings)
create_network = PLUGIN.create_network
create_network_from_weights = PLUGIN.create_network_from_weights
trained_encoders = PLUGIN.trained_encoders
weights_for = PLUGIN.weights_for
require_fit = PLUGIN.require_fit
