"""Small models with the module paths of the real ones."""

from __future__ import annotations

import torch
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from library.models.flux import Flux, FluxConfig, image_ids, patchify, text_ids

TINY = FluxConfig(
    width=64,
    head_width=32,
    mlp_width=128,
    double_blocks=2,
    single_blocks=3,
    context_width=24,
    pooled_width=16,
    frequencies=256,
)


def flux(config: FluxConfig = TINY, seed: int = 0) -> Flux:
    torch.manual_seed(seed)
    model = Flux(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.08)
    return model.eval().requires_grad_(False)


def clip_l(layers: int = 2, width: int = 16) -> nn.Module:
    torch.manual_seed(1)
    config = CLIPTextConfig(
        vocab_size=64, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=2
    )
    return CLIPTextModel(config).eval().requires_grad_(False)


def t5(layers: int = 1) -> nn.Module:
    torch.manual_seed(2)
    config = T5Config(
        vocab_size=64, d_model=24, d_ff=48, d_kv=12, num_heads=2, num_layers=layers, feed_forward_proj="gated-gelu"
    )
    return T5EncoderModel(config).eval().requires_grad_(False)


def flux_inputs(seed: int = 3, batch: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(batch, 16, 8, 8, generator=generator)
    txt = torch.randn(batch, 5, TINY.context_width, generator=generator)
    return {
        "img": patchify(latents),
        "img_ids": image_ids(latents),
        "txt": txt,
        "txt_ids": text_ids(txt),
        "timesteps": torch.rand(batch, generator=generator),
        "pooled": torch.randn(batch, TINY.pooled_width, generator=generator),
        "guidance": torch.full((batch,), 3.5),
    }
