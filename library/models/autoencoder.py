"""The image autoencoder of FLUX, SD3, SDXL and SD: the Diffusers class, sized by the checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from library.log import DataError
from library.models.keymaps import count_indices
from library.types import Posterior

if TYPE_CHECKING:
    from torch import nn


def build_autoencoder(shapes: Mapping[str, tuple[int, ...]]) -> nn.Module:
    """A Diffusers `AutoencoderKL` for the checkpoint with these tensors, LDM names.

    Raises:
        DataError: a tensor that tells a size is missing.
    """
    from diffusers import AutoencoderKL

    try:
        levels = count_indices(shapes, r"encoder\.down\.(\d+)\.")
        channels = tuple(shapes[f"encoder.down.{level}.block.0.conv1.weight"][0] for level in range(levels))
        model: nn.Module = AutoencoderKL(
            in_channels=shapes["encoder.conv_in.weight"][1],
            out_channels=shapes["decoder.conv_out.weight"][0],
            latent_channels=shapes["decoder.conv_in.weight"][1],
            block_out_channels=channels,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            layers_per_block=count_indices(shapes, r"encoder\.down\.\d+\.block\.(\d+)\."),
            norm_num_groups=min(32, channels[0]),
            use_quant_conv="quant_conv.weight" in shapes,
            use_post_quant_conv="post_quant_conv.weight" in shapes,
            mid_block_add_attention="encoder.mid.attn_1.q.weight" in shapes,
        )
    except (KeyError, IndexError) as missing:
        raise DataError(f"not an image autoencoder: it has no tensor {missing}", code="E-MODEL-KIND") from None
    return model


def encode(vae: Any, pixels: Tensor) -> Posterior:
    """The posterior of the latents (B, C, h, w), unscaled float32, of pixels (B, 3, H, W) in [-1, 1]."""
    moments = vae.encoder(pixels)
    if vae.quant_conv is not None:
        moments = vae.quant_conv(moments)
    mean, log_variance = moments.float().chunk(2, dim=1)
    return Posterior(mean, torch.exp(0.5 * log_variance))


def decode(vae: Any, latents: Tensor) -> Tensor:
    """Pixels (B, 3, H, W), about [-1, 1], of unscaled latents (B, C, h, w)."""
    latents = latents.to(next(vae.parameters()).dtype)
    if vae.post_quant_conv is not None:
        latents = vae.post_quant_conv(latents)
    pixels: Tensor = vae.decoder(latents)
    return pixels
