"""DyLoRA for SD and SDXL: LoRA whose first ranks are of use without the others (`--network_module networks.dylora`).

Its `--network_args` besides those of `networks.lora`:

* `unit` (default 1): ranks are trained in groups of so many, and all ranks must be multiples of it.

Files are those of LoRA. To keep the first r ranks of a file, cut its matrices and multiply alpha with sqrt(r / rank).
Dropouts have no effect.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from library.log import DataError
from library.types import Chance
from networks import lora
from networks.arguments import Arguments, error
from networks.base import ModuleAdapter
from networks.creating import Settings
from networks.factored import Dropouts
from networks.low_rank import LoraAdapter, LowRankAdapter
from networks.reading import Rank, lora_size
from networks.targets import Target


class NestedAdapter(LowRankAdapter):
    """`W x + multiplier * alpha / sqrt(r b) * up[:, :b] down[:b] x`, for a random b up to the rank r in training.

    Of the b ranks the last group is trained in that pass, the groups before it are not, and those after it take no
    part. Otherwise b is r, and it is LoRA. Each group has tensors of its own, so that an optimizer leaves alone those
    without a gradient.

    Source: Valipour et al., "DyLoRA: Parameter-Efficient Tuning of Pre-trained Models using Dynamic Search-Free
    Low-Rank Adaptation" (2023), algorithm 1, with the frozen lower ranks of section 4.
    """

    def __init__(self, target: Target, component: str, *, size: Rank, unit: int, multiplier: float = 1.0) -> None:
        """A new adapter that changes nothing yet; alpha 0 means the rank. `unit` must divide the rank."""
        super().__init__(target.name, target.module, component, rank=size.rank, alpha=size.alpha, multiplier=multiplier)
        assert size.rank % unit == 0, "groups of ranks of unequal sizes"
        self.unit = unit
        plain = LoraAdapter(target.name, target.module, component, rank=size.rank, alpha=size.alpha)
        down, up = (matrix.detach() for matrix in plain.pair())
        self.lora_down = nn.ParameterList([part.clone() for part in torch.split(down, unit)])
        self.lora_up = nn.ParameterList([part.clone() for part in torch.split(up, unit, 1)])
        self._last: int | None = None
        """The group that is trained in this pass; None: all ranks count."""

    @property
    def chance(self) -> Chance:
        """See `ModuleAdapter.chance`."""
        return Chance.HOST

    def pair(self) -> tuple[Tensor, Tensor]:
        """See `LowRankAdapter.pair`: all ranks, or those of this pass."""
        # not by index, which is slow for many groups
        downs: list[Tensor] = list(self.lora_down.parameters(recurse=False))
        ups: list[Tensor] = list(self.lora_up.parameters(recurse=False))
        if self._last is None:
            return torch.cat(downs), torch.cat(ups, 1)
        last, stop = self._last, self._last + 1
        growth = math.sqrt(self.rank / (stop * self.unit))
        down = torch.cat([*(part.detach() for part in downs[:last]), downs[last]])
        up = torch.cat([*(part.detach() for part in ups[:last]), ups[last]], 1)
        return down, up * growth

    def changed(self, x: Tensor) -> Tensor:
        """See `FactoredAdapter.changed`; in training with some of the ranks."""
        if not self.training:
            return super().changed(x)
        # from the generator whose state is saved, and which recomputing activations sets back
        self._last = int(torch.randint(len(self.lora_down), (), device="cpu"))
        try:
            return super().changed(x)
        finally:
            self._last = None

    def fits(self, names: Collection[str]) -> bool:
        """Whether the matrices of a LoRA are there."""
        return "lora_down.weight" in names and "lora_up.weight" in names

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes over the matrices and alpha of a LoRA. Errors: DataError when a shape differs."""
        down, up = tensors["lora_down.weight"], tensors["lora_up.weight"]
        if len(down) != self.rank or up.shape[1] != self.rank:
            what = f"{self.name} has rank {len(down)} in the file, {self.rank} in this network"
            raise DataError(
                what, "network weights", "give --dim_from_weights or the file's --network_dim", code="E-NETWORK-SHAPE"
            )
        groups = {f"lora_down.{index}": part for index, part in enumerate(torch.split(down, self.unit))}
        groups |= {f"lora_up.{index}": part for index, part in enumerate(torch.split(up, self.unit, 1))}
        super().load({**tensors, **groups})

    @torch.no_grad()
    def scale_by(self, ratio: Tensor) -> None:
        """Multiplies all matrices by the root of `ratio`, and so the change by it."""
        root = ratio.sqrt()
        for part in self.parameters():
            part.mul_(root.to(part.dtype))

    def file_tensors(self) -> dict[str, Tensor]:
        """The tensors of a LoRA."""
        down, up = self.pair()
        return {"alpha": self.alpha, "lora_down.weight": down, "lora_up.weight": up}


class Dylora:
    """See `networks.kinds.Kind`."""

    name = "dylora"

    def __init__(self, arguments: Arguments) -> None:
        """Reads `unit`. Errors: UserError."""
        self.unit = arguments.integer("unit", low=1) or 1

    def settings(self, arguments: Arguments) -> object:
        """None but those that it is made of."""
        return None

    def create(
        self, target: Target, component: str, size: Rank, multiplier: float, dropouts: Dropouts, settings: object
    ) -> ModuleAdapter:
        """See `Kind.create`. Errors: UserError when the unit doesn't divide the rank."""
        if size.rank % self.unit:
            what = f"{self.unit} doesn't divide {size.rank}, the rank of {target.path}"
            raise error(what, "unit", "give a divisor of all ranks, or other ranks")
        return NestedAdapter(target, component, size=size, unit=self.unit, multiplier=multiplier)

    def of_file(
        self, target: Target, component: str, tensors: Mapping[str, Tensor], multiplier: float, dropouts: Dropouts
    ) -> ModuleAdapter | None:
        """See `Kind.of_file`. Errors: UserError when the unit doesn't divide the rank."""
        size = lora_size(tensors)
        return size and self.create(target, component, size, multiplier, dropouts, None)


def settings(arguments: Arguments, neuron_dropout: float | None) -> Settings:
    """See `Plugin.settings`."""
    found = lora.settings(arguments, neuron_dropout, Dylora(arguments))
    if found.dropouts == Dropouts():
        return found
    plain = replace(found, dropouts=Dropouts())
    return plain.noting("dropouts have no effect: DyLoRA leaves out ranks in its own way")


PLUGIN = replace(lora.PLUGIN, settings=settings)
create_network = PLUGIN.create_network
create_network_from_weights = PLUGIN.create_network_from_weights
trained_encoders = PLUGIN.trained_encoders
weights_for = PLUGIN.weights_for
require_fit = PLUGIN.require_fit
