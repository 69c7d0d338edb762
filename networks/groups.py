"""Parameter groups of a network: by component, by the adapters' own learning rates, and by LoRA+."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from library.log import get_logger
from library.types import DENOISER

if TYPE_CHECKING:
    from torch import nn

    from networks.base import ModuleAdapter

logger = get_logger(__name__)


@dataclass(frozen=True)
class LrRatios:
    """LoRA+: the learning rate of the up matrices is that of the group times these.

    Source: Hayou et al., "LoRA+: Efficient Low Rank Adaptation of Large Models" (2024).
    """

    denoiser: float | None = None
    encoders: float | None = None

    def of(self, component: str) -> float | None:
        """The ratio of a component; None: one rate for all."""
        return self.denoiser if component == DENOISER else self.encoders


@dataclass(frozen=True)
class BlockRate:
    """A block of the denoiser and its learning rate."""

    index: int
    weight: float
    """What the rate of the component is multiplied by."""


def parameter_groups(
    components: Mapping[str, Sequence[ModuleAdapter]], rates: Mapping[str, float | None], ratios: LrRatios
) -> tuple[list[dict[str, Any]], list[str]]:
    """Groups for an optimizer, and their descriptions; freezes what gets no rate, or 0.

    Descriptions are those of the components. "_block" and its number follow where blocks have shares of the rate, or
    " lr=" and the rate where adapters have one of their own; LoRA+ adds " plus" for the up matrices.
    """
    groups: list[dict[str, Any]] = []
    descriptions: list[str] = []
    for component, members in components.items():
        ratio = ratios.of(component)
        if ratio is not None and not any(_is_up(name) for adapter in members for name, _ in adapter.named_parameters()):
            logger.warning("LoRA+ has no effect on %s: these adapters have no up matrices", component)
        for (suffix, lr), adapters in _by_rate(members, rates[component]).items():
            for adapter in adapters:
                adapter.requires_grad_(bool(lr))
            if not lr:
                continue
            name = component + suffix
            downs, ups = _matrices(adapters, ratio is not None)
            for params, rate, description in ((downs, lr, name), (ups, lr * (ratio or 0), f"{name} plus")):
                if params and rate:
                    groups.append({"params": params, "lr": rate})
                    descriptions.append(description)
    return groups, descriptions


def rate_of(
    component: str, encoder_lrs: float | Sequence[float] | None, unet_lr: float | None, default_lr: float | None
) -> float | None:
    """The learning rate of a component; one rate for the encoders counts for all of them."""
    if component == DENOISER:
        return default_lr if unet_lr is None else unet_lr
    if encoder_lrs is None or isinstance(encoder_lrs, int | float):
        return default_lr if encoder_lrs is None else encoder_lrs
    if not encoder_lrs:
        return default_lr
    index = int(component.split()[-1]) - 1
    return encoder_lrs[min(index, len(encoder_lrs) - 1)]


def _by_rate(
    adapters: Sequence[ModuleAdapter], rate: float | None
) -> dict[tuple[str, float | None], list[ModuleAdapter]]:
    """Adapters by what their group is called after the component, and its rate: the component's, blocks, own rates."""

    def place(adapter: ModuleAdapter) -> tuple[int, int]:
        return (2, 0) if adapter.lr is not None else (0, 0) if adapter.block is None else (1, adapter.block.index)

    found: dict[tuple[str, float | None], list[ModuleAdapter]] = {}
    for adapter in sorted(adapters, key=place):
        key: tuple[str, float | None] = ("", rate)
        if adapter.lr is not None:
            key = (f" lr={adapter.lr:g}", adapter.lr)
        elif adapter.block is not None:
            key = (f"_block{adapter.block.index}", rate and rate * adapter.block.weight)
        found.setdefault(key, []).append(adapter)
    return found


def _matrices(adapters: Sequence[ModuleAdapter], apart: bool) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Parameters; the up matrices `apart` from the others, or with them."""
    split: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
    for adapter in adapters:
        for name, parameter in adapter.named_parameters():
            split[apart and _is_up(name)].append(parameter)
    return split


def _is_up(name: str) -> bool:
    return "lora_up" in name
