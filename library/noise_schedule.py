"""The noise schedule of Stable Diffusion: how much of an image is left at each of 1000 timesteps."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

TIMESTEPS = 1000
FIRST_BETA, LAST_BETA = 0.00085, 0.012


class NoiseSchedule:
    """Tables over the timesteps, float32: x_t = sqrt(alphas[t]) x + sqrt(1 - alphas[t]) noise.

    With `zero_terminal_snr` the last timestep is pure noise: the roots of the alphas are shifted so that the last is 0
    and stretched so that the first stays.

    Source: Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models" (2022) for the betas; Lin et
    al., "Common Diffusion Noise Schedules and Sample Steps are Flawed" (2024), section 3.1.
    """

    def __init__(self, *, zero_terminal_snr: bool = False) -> None:
        self.zero_terminal_snr = zero_terminal_snr

    @cached_property
    def betas(self) -> Tensor:
        """(1000,): share of the variance that is replaced by noise at each step."""
        if not self.zero_terminal_snr:
            return torch.linspace(FIRST_BETA**0.5, LAST_BETA**0.5, TIMESTEPS) ** 2
        roots = _cumulated(torch.linspace(FIRST_BETA**0.5, LAST_BETA**0.5, TIMESTEPS) ** 2).sqrt()
        alphas = ((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])) ** 2
        return 1 - torch.cat((alphas[:1], alphas[1:] / alphas[:-1]))

    @cached_property
    def alphas(self) -> Tensor:
        """(1000,): share of the image in the variance; also called the cumulated product of the alphas."""
        return _cumulated(self.betas)

    @cached_property
    def snr(self) -> Tensor:
        """(1000,): signal-to-noise ratio; 0 at the last timestep with `zero_terminal_snr`."""
        return self.alphas / (1 - self.alphas)

    def at(self, table: Tensor, timesteps: Tensor) -> Tensor:
        """(B,): values of a table at timesteps (B,), on their device."""
        return table.to(timesteps.device, non_blocking=True)[timesteps.long().clamp(0, TIMESTEPS - 1)]


def _cumulated(betas: Tensor) -> Tensor:
    return torch.cumprod(1 - betas, dim=0)
