"""How much memory the weights of a run will take, known from the headers of its files. Pure arithmetic."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from library.train.plan import readable_bytes
from library.types import DENOISER

STATE_BYTES: Mapping[str, float] = {
    **dict.fromkeys(("adamw", "pagedadamw", "pagedadamw32bit", "adamwschedulefree"), 8),
    **dict.fromkeys(("adamw8bit", "pagedadamw8bit"), 2),
    **dict.fromkeys(("lion", "pagedlion", "sgdnesterov", "sgdschedulefree"), 4),
    **dict.fromkeys(("lion8bit", "pagedlion8bit", "sgdnesterov8bit"), 1),
    **dict.fromkeys(("prodigy", "dadaptadam", "dadaptation", "dadaptadampreprint", "dadaptadanip", "dadaptadan"), 16),
    "adafactor": 0.1,
}
"""What an optimizer remembers of each float32 weight, in bytes; others are taken for AdamW."""


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Weights of a run on one device, in bytes."""

    encoders: int
    """All text encoders together."""
    kept_encoders: int
    """Those of them that stay while training."""
    denoiser: int
    trained: int
    """What is trained beside the denoiser, or 0 if it is the denoiser itself."""
    gradients: int
    optimizer: int

    @classmethod
    def of(
        cls,
        shapes: Mapping[str, Mapping[str, tuple[int, ...]]],
        *,
        kept: Collection[str],
        trained_elements: int,
        beside: bool,
        frozen_size: int,
        trained_size: int,
        optimizer: str,
    ) -> Forecast:
        """From the shapes of each part; `beside` says whether the trained weights are added to the denoiser's."""
        elements = {name: sum(map(math.prod, part.values())) for name, part in shapes.items()}
        denoiser = elements.pop(DENOISER)
        state = STATE_BYTES.get(optimizer.lower(), 8) * trained_size / 4
        return cls(
            encoders=sum(elements.values()) * frozen_size,
            kept_encoders=sum(count for name, count in elements.items() if name in kept) * frozen_size,
            denoiser=denoiser * (frozen_size if beside else trained_size),
            trained=trained_elements * trained_size if beside else 0,
            gradients=trained_elements * trained_size,
            optimizer=round(trained_elements * state),
        )

    @property
    def training(self) -> int:
        """What is there while training, without activations."""
        return self.kept_encoders + self.denoiser + self.trained + self.gradients + self.optimizer

    def lines(self) -> list[str]:
        """The forecast for people."""
        parts = {
            "text encoders": self.kept_encoders,
            "denoiser": self.denoiser,
            "trained weights": self.trained,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
        }
        named = ", ".join(f"{name} {readable_bytes(size)}" for name, size in parts.items() if size)
        lines = [f"training  {readable_bytes(self.training)} and what the images take: {named}"]
        if self.encoders > self.kept_encoders:
            lines.insert(0, f"caching   {readable_bytes(self.encoders)}: all text encoders")
        return lines
