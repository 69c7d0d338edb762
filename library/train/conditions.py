"""Text outputs and latents for the loop and the previews, whether cached or made on the spot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from library.log import get_logger
from library.randomness import Draws
from library.types import Batch, Cond, Models

if TYPE_CHECKING:
    from library.families.base import Family

logger = get_logger(__name__)


@dataclass(kw_only=True)
class Conditions:
    """Joins what was cached with what the live models say."""

    family: Family
    models: Models
    """`encoders` holds those that run for each batch, `vae` the autoencoder if latents are live or samples are made."""
    device: torch.device
    trained: frozenset[str] = frozenset()
    """Names of the encoders that get gradients."""
    remembered: dict[str, Cond] = field(default_factory=dict)
    """Text outputs of sample prompts by encoders that are gone by now, each with a batch axis of 1."""

    def of_batch(self, batch: Batch) -> Cond:
        """The text outputs of a batch."""
        return {**(batch.cond or {}), **self._live(batch.tokens)} if self.models.encoders else dict(batch.cond or {})

    def of_prompt(self, prompt: str) -> Cond:
        """The text outputs of one prompt, on the device."""
        gone = {name: tensor.to(self.device) for name, tensor in self.remembered.get(prompt, {}).items()}
        if not self.models.encoders:
            return gone
        tokens = {name: tensor.to(self.device) for name, tensor in self.family.tokenize([prompt]).items()}
        with torch.no_grad():
            return {**gone, **self._live(tokens)}

    def latents(self, batch: Batch) -> Tensor:
        """The latents of a batch, float32."""
        if batch.latents is not None:
            return batch.latents
        assert batch.pixels is not None
        assert self.models.vae is not None
        with torch.no_grad():
            return encode_images(self.family, self.models.vae, batch.pixels, batch.image_seeds)

    def _live(self, tokens: dict[str, Tensor] | None) -> Cond:
        assert tokens is not None
        trained = {name: module for name, module in self.models.encoders.items() if name in self.trained}
        frozen = {name: module for name, module in self.models.encoders.items() if name not in self.trained}
        cond: Cond = {}
        if frozen:
            with torch.no_grad():
                cond |= self.family.encode_text(frozen, tokens)
        if trained:
            cond |= self.family.encode_text(trained, tokens)
        return cond


def encode_images(family: Family, vae: torch.nn.Module, pixels: Tensor, seeds: Sequence[int]) -> Tensor:
    """Latents of pixels, in the autoencoder's type; once more in float32 if half precision overflows."""
    parameter = next(vae.parameters())

    def noise(shape: tuple[int, ...]) -> Tensor:
        return Draws(seeds).posterior(shape[1:]).to(parameter.device)

    latents = family.encode_images(vae, pixels.to(parameter.device, parameter.dtype), noise)
    if parameter.dtype == torch.float32 or bool(torch.isfinite(latents).all()):
        return latents
    logger.warning(
        "the autoencoder overflows in %s; it runs in float32 from here on (--no_half_vae does so at once)",
        str(parameter.dtype).removeprefix("torch."),
    )
    vae.float()
    return family.encode_images(vae, pixels.to(parameter.device, torch.float32), noise)


def remember_prompts(conditions: Conditions, encoders: dict[str, torch.nn.Module], prompts: Sequence[str]) -> None:
    """Encodes sample prompts with encoders that are about to be dropped."""
    for prompt in prompts:
        if prompt in conditions.remembered:
            continue
        tokens = {name: tensor.to(conditions.device) for name, tensor in conditions.family.tokenize([prompt]).items()}
        with torch.no_grad():
            cond = conditions.family.encode_text(encoders, tokens)
        conditions.remembered[prompt] = {name: tensor.cpu() for name, tensor in cond.items()}
