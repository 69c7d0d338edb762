"""A LoRA step on an SD3.5 transformer of real width with random weights, and the arithmetic it needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import adapted
import torch
from torch import Tensor, nn
from workload import Work

from library.models.mmdit import MMDiT, MMDiTConfig
from library.objectives import Flow, FlowSettings
from library.randomness import Draws
from library.types import Cond, Noised
from networks.lora_sd3 import create_network

STRIDE, TEXT_TOKENS = 8, 77 + 256


@dataclass(frozen=True, kw_only=True)
class Sd3Shape:
    """How much is computed in a step; the width is that of SD3.5-medium."""

    resolution: int = 512
    batch: int = 1
    rank: int = 16
    depth: int = 3
    """Joint blocks; SD3.5-medium has 24."""
    dual_blocks: int = 1
    """How many of them have a second attention; 13 there."""

    @property
    def config(self) -> MMDiTConfig:
        """Sizes of the transformer."""
        return MMDiTConfig(depth=self.depth, dual_blocks=frozenset(range(self.dual_blocks)), qk_norm=True)

    @property
    def attention(self) -> float:
        """Multiply-adds of the attention."""
        config = self.config
        image = (self.resolution // STRIDE // config.patch) ** 2
        pairs = config.depth * (image + TEXT_TOKENS) ** 2 + self.dual_blocks * image**2
        return 2.0 * self.batch * pairs * config.width


WHOLE = {"depth": 24, "dual_blocks": 13}
"""Of SD3.5-medium."""


def training_step(
    shape: Sd3Shape, device: torch.device, dtype: torch.dtype, *, checkpointing: bool = False, recorded: bool = False
) -> tuple[list[Callable[[], None]], Work]:
    """A LoRA on all linear layers of the blocks; see `adapted.training_step`."""
    model = MMDiT(shape.config).to(device, dtype).requires_grad_(False).train()
    network, batch = create_network(1.0, shape.rank, shape.rank, None, None, model), _Batch(shape, device, dtype)
    return adapted.training_step(model, network, batch, shape.attention, checkpointing=checkpointing, recorded=recorded)


class _Batch:
    def __init__(self, shape: Sd3Shape, device: torch.device, dtype: torch.dtype) -> None:
        generator, config = torch.Generator().manual_seed(0), shape.config

        def random(*sizes: int) -> Tensor:
            return torch.randn(shape.batch, *sizes, generator=generator).to(device, dtype)

        side = shape.resolution // STRIDE
        self.latents = random(config.in_channels, side, side)
        self.cond: Cond = {"text": random(TEXT_TOKENS, config.context_width), "pooled": random(config.pooled_width)}
        self.objective, self.draws = Flow(FlowSettings()), Draws(range(shape.batch), device)
        mixed = dtype != torch.float32
        self.autocast = torch.autocast(device.type, torch.bfloat16 if not mixed else dtype, enabled=mixed)

    def noised(self) -> Noised:
        with self.autocast:
            return self.objective.noise(self.latents, self.draws)

    def predict(self, model: nn.Module, x: Tensor, timesteps: Tensor, cond: Cond) -> Tensor:
        answer: Tensor = model(x, timesteps, cond["text"], cond["pooled"])
        return answer
