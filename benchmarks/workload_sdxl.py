"""A LoRA step on an SDXL U-Net of real width with random weights, and the arithmetic it needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import adapted
import torch
from torch import Tensor, nn
from workload import Work

from library.epsilon import Epsilon, EpsilonSettings
from library.models import unet
from library.randomness import Draws
from library.types import Cond, Noised
from networks.lora import create_network

CHANNELS, STRIDE, TEXT_TOKENS, CONTEXT, POOLED = 4, 8, 77, 2048, 1280


@dataclass(frozen=True, kw_only=True)
class SdxlShape:
    """How much is computed in a step; widths are those of SDXL, depths smaller."""

    resolution: int = 512
    batch: int = 1
    rank: int = 16
    layers: int = 1
    """Residual blocks per level; SDXL has 2."""
    depths: tuple[int, int, int] = (1, 1, 2)
    """Transformer blocks per attention on each level; SDXL has 2 and 10 on the second and third, none on the first."""


WHOLE = {"layers": 2, "depths": (1, 2, 10)}
"""Of SDXL."""


def build(shape: SdxlShape, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A U-Net with frozen random weights."""
    from diffusers import UNet2DConditionModel

    model: nn.Module = UNet2DConditionModel(
        block_out_channels=(320, 640, 1280),
        layers_per_block=shape.layers,
        transformer_layers_per_block=shape.depths,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=CONTEXT,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=POOLED + 6 * 256,
    )
    return model.to(device, dtype).requires_grad_(False).train()


def training_step(
    shape: SdxlShape, device: torch.device, dtype: torch.dtype, *, checkpointing: bool = False, recorded: bool = False
) -> tuple[list[Callable[[], None]], Work]:
    """A LoRA on all attention layers; see `adapted.training_step`."""
    model = build(shape, device, dtype)
    network = create_network(1.0, shape.rank, shape.rank, None, None, model)
    batch, attention = _Batch(shape, device, dtype), _Attention(model)
    return adapted.training_step(model, network, batch, attention, checkpointing=checkpointing, recorded=recorded)


class _Batch:
    def __init__(self, shape: SdxlShape, device: torch.device, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)

        def random(*sizes: int) -> Tensor:
            return torch.randn(shape.batch, *sizes, generator=generator).to(device, dtype)

        side = shape.resolution // STRIDE
        self.latents, self.text, self.pooled = (
            random(CHANNELS, side, side),
            random(TEXT_TOKENS, CONTEXT),
            random(POOLED),
        )
        self.sizes = torch.full((shape.batch, 6), float(shape.resolution), device=device)
        self.objective, self.draws = Epsilon(EpsilonSettings()), Draws(range(shape.batch), device)
        mixed = dtype != torch.float32
        self.autocast = torch.autocast(device.type, torch.bfloat16 if not mixed else dtype, enabled=mixed)

    def noised(self) -> Noised:
        with self.autocast:
            return self.objective.noise(self.latents, self.draws)

    @property
    def cond(self) -> Cond:
        return {"text": self.text, "pooled": self.pooled, "sizes": self.sizes}

    def predict(self, model: nn.Module, x: Tensor, timesteps: Tensor, cond: Cond) -> Tensor:
        return unet.predict(model, x, timesteps, cond["text"], cond["pooled"], cond["sizes"])


class _Attention:
    """Multiply-adds of the attention layers of a U-Net, counted while data passes through."""

    def __init__(self, model: nn.Module) -> None:
        self._found = 0.0
        layers = (module for module in model.modules() if hasattr(module, "to_q"))
        self._handles = [module.register_forward_hook(self._count, with_kwargs=True) for module in layers]

    def _count(self, module: Any, inputs: tuple[Tensor, ...], named: dict[str, Any], output: Tensor) -> None:
        context = named.get("encoder_hidden_states")
        keys = output.shape[1] if context is None else context.shape[1]
        self._found += 2.0 * output.shape[0] * output.shape[1] * keys * module.inner_dim

    def __call__(self) -> float:
        for handle in self._handles:
            handle.remove()
        return self._found
