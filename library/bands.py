"""Losses by noise level: what a single loss says little about, since it depends on the level that was drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

BANDS = 4
TIMESTEPS = 1000
WIDTH = TIMESTEPS // BANDS
NUMBERS = 2 * BANDS
"""How many numbers `sums` gives."""


def tag(band: int) -> str:
    """Name of a band in logs, such as `loss/timesteps 250-500`."""
    return f"loss/timesteps {band * WIDTH}-{(band + 1) * WIDTH}"


def sums(losses: Tensor, timesteps: Tensor, weights: Tensor) -> Tensor:
    """(2 * BANDS,) float32: the sum of the losses in each band, then their number; from losses and timesteps (B,).

    Samples of weight 0, copies that fill a batch up, don't count.
    """
    import torch

    band = (timesteps * (BANDS / TIMESTEPS)).long().clamp(0, BANDS - 1)
    counted = weights != 0
    both = torch.stack((losses.detach().float().masked_fill(~counted, 0), counted.float()))  # (2, B)
    return torch.zeros(2, BANDS, device=losses.device).index_add_(1, band, both).flatten()


def means(numbers: Sequence[float]) -> dict[str, float]:
    """The mean loss of each band that had a sample, by `tag`, from what `sums` gave, added or averaged at will."""
    pairs = zip(numbers[:BANDS], numbers[BANDS:], strict=True)
    return {tag(band): total / count for band, (total, count) in enumerate(pairs) if count}
