"""U-Nets and text encoders of SD and SDXL: small ones to compute with, large ones without memory for names."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from networks.base import Network
from tests.networks import tiny_models

CROSS = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D", "DownBlock2D", "UpBlock2D")
IDS = torch.arange(10)[None]
TEXT_WIDTH = 16


def unet(*, sdxl: bool = False, linear: bool = False, seed: int = 0) -> nn.Module:
    """Three levels of one block, with attention where SDXL has it, or SD."""
    from diffusers import UNet2DConditionModel

    down, up, plain_down, plain_up = CROSS
    torch.manual_seed(seed)
    model = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16, 16),
        layers_per_block=1,
        down_block_types=(plain_down, down, down) if sdxl else (down, down, plain_down),
        up_block_types=(up, up, plain_up) if sdxl else (plain_up, up, up),
        transformer_layers_per_block=(1, 2, 1) if sdxl else 1,
        attention_head_dim=2,
        cross_attention_dim=TEXT_WIDTH,
        norm_num_groups=4,
        use_linear_projection=sdxl or linear,
        **_sizes(TEXT_WIDTH) if sdxl else {},
    )
    return model.eval().requires_grad_(False)  # type: ignore[no-any-return]


def _sizes(pooled: int) -> dict[str, Any]:
    return {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": pooled + 6 * 8,
    }


def answer(model: nn.Module, batch: int = 2) -> Tensor:
    """What a small U-Net says."""
    generator = torch.Generator().manual_seed(3)
    sample = torch.randn(batch, 4, 8, 8, generator=generator)
    context = torch.randn(batch, 5, TEXT_WIDTH, generator=generator)
    added = {"text_embeds": torch.randn(batch, TEXT_WIDTH, generator=generator), "time_ids": torch.ones(batch, 6)}
    return model(sample, torch.tensor(500), context, added_cond_kwargs=added).sample  # type: ignore[no-any-return]


def clip_g(seed: int = 4) -> nn.Module:
    """A text encoder with a projection."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=64, hidden_size=16, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    return CLIPTextModelWithProjection(config).eval().requires_grad_(False)


def encoders(*, sdxl: bool) -> list[nn.Module]:
    """The small text encoders."""
    return [tiny_models.clip_l(), clip_g()] if sdxl else [tiny_models.clip_l()]


def text_answer(model: nn.Module) -> Tensor:
    """What a small text encoder says."""
    return model(input_ids=IDS).last_hidden_state  # type: ignore[no-any-return]


def say(model: nn.Module, texts: list[nn.Module]) -> list[Tensor]:
    """What a small U-Net and small text encoders say."""
    return [answer(model), *map(text_answer, texts)]


def fill(network: Network, std: float = 0.2) -> Network:
    """Gives what is zero in new adapters values, and more."""
    torch.manual_seed(8)
    for adapter in network.created:
        for name, parameter in adapter.named_parameters():
            if "lora_down" not in name:
                nn.init.normal_(parameter, std=std)
    return network


def large(version: str) -> tuple[nn.Module, list[nn.Module]]:
    """U-Net and text encoders of the true size on the meta device: "1", "2" or "xl"."""
    from diffusers import UNet2DConditionModel

    down, up, plain_down, plain_up = CROSS
    shape: dict[str, Any] = {"cross_attention_dim": 768 if version == "1" else 1024}
    if version == "2":
        shape |= {"attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True}
    if version == "xl":
        shape = {
            "cross_attention_dim": 2048,
            "block_out_channels": (320, 640, 1280),
            "down_block_types": (plain_down, down, down),
            "up_block_types": (up, up, plain_up),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        }
    sizes = {"1": [(768, 12)], "2": [(1024, 23)], "xl": [(768, 12), (1280, 32)]}[version]
    with torch.device("meta"):
        return UNet2DConditionModel(**shape), [_clip(width, layers) for width, layers in sizes]


def _clip(width: int, layers: int) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=8,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
    )
    return CLIPTextModel(config)
