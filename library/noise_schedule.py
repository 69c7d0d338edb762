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
        self._placed: dict[tuple[str, torch.device], Tensor] = {}
        """Tables on the devices where they were asked for, so that a step needn't send them."""

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

    def alphas_at(self, timesteps: Tensor) -> Tensor:
        """(B,): `alphas` at timesteps (B,), on their device."""
        return self._at("alphas", timesteps)

    def snr_at(self, timesteps: Tensor) -> Tensor:
        """(B,): `snr` at timesteps (B,), on their device."""
        return self._at("snr", timesteps)

    def _at(self, name: str, timesteps: Tensor) -> Tensor:
        place = name, timesteps.device
        if place not in self._placed:
            table: Tensor = getattr(self, name)
            self._placed[place] = table.to(timesteps.device)
        return self._placed[place][timesteps.long().clamp(0, TIMESTEPS - 1)]


def _cumulated(betas: Tensor) -> Tensor:
    return torch.cumprod(1 - betas, dim=0)
