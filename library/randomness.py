"""Random numbers that depend on the sample alone, not on batch size, process count, call order or resuming."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import TYPE_CHECKING

from library import devices

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_MASK = (1 << 64) - 1
_GOLDEN_GAMMA = 0x9E3779B97F4A7C15


def mix(seed: int, *numbers: int) -> int:
    """A 64-bit number (unsigned) that looks random and depends on all arguments and their order.

    Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators" (2014), the finalizer of SplitMix64.
    """
    state = _scramble(seed)
    for number in numbers:
        state = _scramble(state ^ _scramble(number))
    return state


def _scramble(number: int) -> int:
    z = (number + _GOLDEN_GAMMA) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


class Stream(IntEnum):
    """What numbers are drawn for; each purpose has numbers of its own."""

    NOISE = 0
    TIMESTEP = 1
    PERTURBATION = 2
    """Extra noise on the noise, see `--ip_noise_gamma`."""
    STRENGTH = 3
    """Random strength of such extras."""
    POSTERIOR = 4
    """The autoencoder's sample."""
    OFFSET = 5
    """Noise that is constant over each channel, see `--noise_offset`."""
    OFFSET_STRENGTH = 6
    LEVELS = 7
    """Coarser levels of noise, see `--multires_noise_iterations`; further levels take the numbers after it."""
    LEVEL_SIZES = 1000
    """Their sizes; further levels take the numbers after it."""
    TEXT_DROPOUT = 2000
    """Whether a text encoder is left out; further encoders take the numbers after it."""
    POSITIONS = 2100
    """Which positions image tokens get; three numbers are drawn."""


class Draws:
    """The random numbers of a batch; the same call always gives the same numbers.

    Sample i uses a generator seeded with `seeds[i]` and the stream. Scalars are drawn on the CPU, so that timesteps are
    the same on every device; tensors are drawn where they are used.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device | str = "cpu") -> None:
        self.seeds = list(seeds)
        self.device = device

    def normal(self, shape: Sequence[int], stream: int = Stream.NOISE) -> Tensor:
        """(B, *shape), standard normal, float32, on the device; `shape` is that of one sample."""
        import torch

        numbers = torch.empty((len(self.seeds), *shape), device=self.device)
        for row, seed in zip(numbers, self.seeds, strict=True):
            row.normal_(generator=torch.Generator(self.device).manual_seed(mix(seed, stream)))
        return numbers

    def posterior(self, shape: Sequence[int]) -> Tensor:
        """(B, *shape), standard normal: for sampling the autoencoder's posterior."""
        return self.normal(shape, Stream.POSTERIOR)

    def normal_scalars(self, stream: int = Stream.TIMESTEP) -> Tensor:
        """(B,), standard normal, float32."""
        return self._scalars(lambda number, generator: number.normal_(generator=generator), stream)

    def uniform_scalars(self, stream: int = Stream.TIMESTEP) -> Tensor:
        """(B,), uniform in [0, 1), float32."""
        return self._scalars(lambda number, generator: number.uniform_(generator=generator), stream)

    def _scalars(self, draw: Callable[[Tensor, torch.Generator], object], stream: int) -> Tensor:
        import torch

        numbers = torch.empty(len(self.seeds))
        for number, seed in zip(numbers, self.seeds, strict=True):
            draw(number, torch.Generator().manual_seed(mix(seed, stream)))
        return devices.send(numbers, self.device)
