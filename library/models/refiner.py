"""A small network that refines latents of pictures that were enlarged: residual blocks on what the autoencoder gave."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from library.log import DataError

CHANNELS = 128
BLOCKS, GROUP = 20, 4


class ResidualBlock(nn.Module):
    """Two convolutions beside a short way."""

    def __init__(self, channels: int = CHANNELS) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> the same."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + x)


class LatentRefiner(nn.Module):
    """Unscaled latents (B, 4, h, w) -> refined ones. A new one changes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4, CHANNELS, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(CHANNELS)
        for number in range(1, BLOCKS + 1):
            self.add_module(f"resblock{number}", ResidualBlock())
        self.conv2 = nn.Conv2d(CHANNELS, 64, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(64)
        self.conv3 = nn.Conv2d(64, 64, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(64)
        self.conv_final = nn.Conv2d(64, 4, 1)
        nn.init.zeros_(self.conv_final.weight)
        nn.init.zeros_(cast("Tensor", self.conv_final.bias))

    def forward(self, latents: Tensor) -> Tensor:
        """Adds to the latents what they lack."""
        x = F.relu(self.bn1(self.conv1(latents)))
        for first in range(1, BLOCKS + 1, GROUP):
            y = x
            for number in range(first, first + GROUP):
                y = self.get_submodule(f"resblock{number}")(y)
            x = x + y
        x = F.relu(self.bn2(self.conv2(x)))
        x = self.bn3(self.conv3(x))
        return cast("Tensor", self.conv_final(x) + latents)


def load(tensors: Mapping[str, Tensor], where: str) -> LatentRefiner:
    """A refiner with the tensors of a file. Errors: DataError when they aren't its."""
    model = LatentRefiner()
    own = model.state_dict()
    counters = {name for name in own if name.endswith(".num_batches_tracked")}
    missing = [name for name in own if name not in tensors and name not in counters]
    unknown = [name for name in tensors if name not in own]
    wrong = [name for name in own if name in tensors and tensors[name].shape != own[name].shape]
    for names, what in ((missing, "has no"), (unknown, "has unknown tensors:"), (wrong, "has another shape of")):
        if names:
            problem = f"this is no latent upscaler: it {what} {', '.join(names[:3])}"
            raise DataError(problem, where, "give the weights of the upscaler", code="E-MODEL-KIND")
    model.load_state_dict({name: tensors[name] for name in own if name in tensors}, strict=False)
    return model.eval().requires_grad_(False)
