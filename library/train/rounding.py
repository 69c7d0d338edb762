"""Float32 values into bfloat16 weights, so that changes too small for them aren't lost."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from library.randomness import mix

if TYPE_CHECKING:
    from torch import Tensor, nn

_LOW_BITS = 16
"""What float32 has and bfloat16 hasn't."""
_PURPOSE = 0x5EED0F0D
"""Keeps the seeds apart from those of samples."""


def stochastically_rounded(values: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """The values (float32, any shape) in bfloat16: up or down at random, so that the mean is right.

    The nearer of the two neighbours is the more likely one, and what bfloat16 can hold stays as it is. Adding noise to
    the bits makes the magnitude larger, whatever the sign. NaN and infinities stay what they are.

    Args:
        generator: on the device of `values`; None is torch's own.
    """
    bits = torch.randint(0, 1 << _LOW_BITS, values.shape, dtype=torch.int32, device=values.device, generator=generator)
    bits.add_(values.view(torch.int32)).bitwise_and_(-(1 << _LOW_BITS))
    rounded = bits.view(torch.float32)
    return torch.where(values.isfinite(), rounded, values, out=rounded).to(torch.bfloat16)


class Rounding:
    """Writes into bfloat16 parameters. What it draws depends on the seed, the step and the parameter alone.

    So it is the same in all processes, whose weights must stay equal, in whatever order parameters are stepped; and
    there is nothing to save.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], seed: int) -> None:
        """`parameters`: all that are trained, in an order that doesn't change from run to run."""
        self._places = {parameter: place for place, parameter in enumerate(parameters)}
        self._seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}

    @torch.no_grad()
    def write(self, parameter: nn.Parameter, values: Tensor, step: int) -> None:
        """Gives a parameter the values (float32, its shape) in the step of this number."""
        device = values.device
        if device not in self._generators:
            self._generators[device] = torch.Generator(device)
        seed = mix(self._seed, _PURPOSE, step, self._places[parameter]) % 2**63
        parameter.copy_(stochastically_rounded(values, self._generators[device].manual_seed(seed)))


def rounds(parameter: Tensor) -> bool:
    """Whether the parameter is of the type that needs it."""
    return parameter.dtype == torch.bfloat16
