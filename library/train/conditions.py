"""Text outputs and latents for the loop and the previews, whether cached or made on the spot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from library import devices
from library.log import get_logger
from library.randomness import Draws
from library.train.ranks import Later
from library.types import Batch, Cond, Models, Posterior

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
    _finite: Later | None = field(default=None, init=False)
    """Whether the latents of the batch before are finite, where the autoencoder may overflow."""

    def of_batch(self, batch: Batch) -> Cond:
        """What the denoiser is told about a batch: text outputs, and sizes where it is told those."""
        cond = {**(batch.cond or {}), **self._sizes(batch)}
        return {**cond, **self._live(batch.tokens)} if self.models.encoders else cond

    def _sizes(self, batch: Batch) -> Cond:
        sizes = self.family.size_cond(batch.original_sizes, batch.crops, batch.size)
        return {name: devices.send(tensor, self.device) for name, tensor in sizes.items()}

    def of_prompt(self, prompt: str) -> Cond:
        """The text outputs of one prompt, on the device."""
        gone = {name: tensor.to(self.device) for name, tensor in self.remembered.get(prompt, {}).items()}
        if not self.models.encoders:
            return gone
        tokens = {name: tensor.to(self.device) for name, tensor in self.family.tokenize([prompt]).items()}
        with torch.no_grad():
            return {**gone, **self._live(tokens)}

    def latents(self, batch: Batch) -> Tensor:
        """The latents of a batch as the denoiser wants them, float32.

        An overflow in half precision is noticed with the next batch, so that nobody waits for the device; a step
        that is not finite moves nothing by its gradient.
        """
        if batch.latents is not None:
            return self.family.traits.for_denoiser(batch.latents)
        vae = self.models.vae
        assert batch.pixels is not None
        assert vae is not None
        if self._finite is not None and not all(self._finite.read()):
            _widen(vae)
        with torch.no_grad():
            latents = sampled(_encoded(self.family, vae, batch.pixels), batch.image_seeds)
            self._finite = Later(torch.isfinite(latents).all().float()[None]) if _may_overflow(vae) else None
        return self.family.traits.for_denoiser(latents)

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


def encode_images(family: Family, vae: torch.nn.Module, pixels: Tensor) -> Posterior:
    """The posterior of latents, in the autoencoder's type; once more in float32 if half precision overflows."""
    posterior = _encoded(family, vae, pixels)
    if not _may_overflow(vae) or bool(torch.isfinite(posterior.mean).all()):
        return posterior
    _widen(vae)
    return _encoded(family, vae, pixels)


def sampled(posterior: Posterior, seeds: Sequence[int]) -> Tensor:
    """Latents (B, C, h, w), each drawn with its own seed."""
    device = posterior.mean.device
    return posterior.sample(devices.send(Draws(seeds).posterior(posterior.mean.shape[1:]), device))


def _encoded(family: Family, vae: torch.nn.Module, pixels: Tensor) -> Posterior:
    """The posterior of latents, in the autoencoder's own type whatever the training around computes in."""
    parameter = next(vae.parameters())
    device = parameter.device
    with torch.autocast(device.type, enabled=False):
        # contiguous, so that cached and live latents come from the same kernels
        return family.encode_images(vae, pixels.to(device, parameter.dtype).contiguous())


def decode_latents(family: Family, vae: torch.nn.Module, latents: Tensor) -> Tensor:
    """Pixels of latents, in the autoencoder's type; once more in float32 if half precision overflows."""
    with torch.autocast(latents.device.type, enabled=False):
        pixels = family.decode_latents(vae, latents)
        if not _may_overflow(vae) or bool(torch.isfinite(pixels).all()):
            return pixels
        _widen(vae)
        return family.decode_latents(vae, latents)


def _may_overflow(vae: torch.nn.Module) -> bool:
    return next(vae.parameters()).dtype == torch.float16


def _widen(vae: torch.nn.Module) -> None:
    logger.warning("the autoencoder overflows in float16; it runs in float32 from here on (--no_half_vae does at once)")
    vae.float()


def remember_prompts(conditions: Conditions, encoders: dict[str, torch.nn.Module], prompts: Sequence[str]) -> None:
    """Encodes sample prompts with encoders that are about to be dropped."""
    for prompt in prompts:
        if prompt in conditions.remembered:
            continue
        tokens = {name: tensor.to(conditions.device) for name, tensor in conditions.family.tokenize([prompt]).items()}
        with torch.no_grad():
            cond = conditions.family.encode_text(encoders, tokens)
        conditions.remembered[prompt] = {name: tensor.cpu() for name, tensor in cond.items()}
