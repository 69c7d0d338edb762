"""What weighs the loss: masks in pixels, and in cells of the latents."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


def to_latent_size(mask: Tensor, stride: int) -> Tensor:
    """(h, w) float32: the mean of a mask (H, W) over the `stride` x `stride` pixels of each latent cell."""
    height, width = mask.shape
    size = (max(height // stride, 1), max(width // stride, 1))
    return torch.nn.functional.interpolate(mask.float()[None, None], size=size, mode="area")[0, 0]


def to_bytes(mask: Tensor) -> Tensor:
    """A mask in [0, 1] as uint8; exact for masks that came from 8 bits."""
    return mask.mul(255).add(0.5).clamp(0, 255).to(torch.uint8)


def from_bytes(mask: Tensor) -> Tensor:
    """A mask in [0, 1], float32, of uint8."""
    return mask.float().div(255)
