"""Values that travel between the layers: sizes, batches, noised latents, traits of a model family."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

Cond = dict[str, "Tensor"]
"""What the text encoders said: array name -> tensor with a leading batch axis; names as in the text cache file."""

DENOISER = "unet"
"""Name of the denoiser among the parts of a model, whatever kind of network it is; the others are text encoders."""

Tokens = dict[str, "Tensor"]
"""Token ids and masks by name, each (B, L), int64."""


class Chance(IntEnum):
    """Where random numbers are drawn while a model that is trained computes; the larger one counts."""

    NOWHERE = 0
    DEVICE = 1
    """For values only: the same is computed each time."""
    HOST = 2
    """What is computed may depend on them, or nobody knows."""


class Size(NamedTuple):
    """A size in pixels."""

    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"

    @property
    def area(self) -> int:
        """Pixels."""
        return self.width * self.height


@dataclass(kw_only=True, frozen=True)
class Traits:
    """What the data layer, the metadata and the plan need to know of a model family."""

    name: str
    """One of `sd`, `sdxl`, `sd3`, `flux`."""
    latent_channels: int
    latent_stride: int
    """Pixels per latent cell."""
    latent_scale: float = 1.0
    """What the latents that `Family.encode_images` gives, and that caches hold, are multiplied by for the denoiser."""
    latent_shift: float = 0.0
    """What is subtracted from them before."""
    patch: int = 2
    """Latent cells per side of a token of the denoiser; 1 for a U-Net. Sides of sample images are whole tokens."""
    bucket_step: int
    """Bucket sides must be multiples of this many pixels."""
    latents_suffix: str
    """End of the name of a latents cache file, such as `_flux.npz`."""
    latents_keys_carry_size: bool
    """Whether the arrays of a latents file are named `latents_<h>x<w>` (latent units) instead of `latents`."""
    text_suffix: str | None
    """End of the name of a text cache file, such as `_flux_te.npz`; None: text outputs can't be cached on disk."""
    base_model_version: str
    """`ss_base_model_version` of the files trained on it."""

    def for_denoiser(self, latents: Tensor) -> Tensor:
        """Latents as the denoiser wants them, of those that the autoencoder gives and caches hold."""
        return (latents - self.latent_shift if self.latent_shift else latents) * self.latent_scale

    def from_denoiser(self, latents: Tensor) -> Tensor:
        """The other way, float32."""
        return latents.float() / self.latent_scale + self.latent_shift


@dataclass(kw_only=True)
class Batch:
    """One micro-batch of one process, all of one size."""

    names: list[str]
    """Image paths, for messages."""
    captions: list[str]
    latents: Tensor | None = None
    """(B, C, h, w), as caches hold them."""
    pixels: Tensor | None = None
    """(B, 3, H, W) in [-1, 1], when latents aren't cached."""
    cond: Cond | None = None
    """Cached text outputs."""
    tokens: Tokens | None = None
    """For encoders that run live."""
    conditioning: Tensor | None = None
    """(B, 3, H, W) in [-1, 1]."""
    mask: Tensor | None = None
    """(B, 1, h, w) in [0, 1]."""
    loss_weights: Tensor
    """(B,): prior loss weight times what makes the mean over processes and accumulated batches a mean over samples."""
    draws: list[int]
    """B numbers of 64 bits; sample i draws its noise and timestep from a generator seeded with draws[i]."""
    image_seeds: list[int]
    """B numbers that decide the autoencoder's sample: always the same for an image, cached or not."""
    size: Size
    original_sizes: list[Size]
    crops: list[tuple[int, int]]
    """Left and top of the crop in the resized image."""
    multiplier: float = 1.0
    """Strength of the network for this dataset."""
    attributes: list[dict[str, object]] = field(default_factory=list)
    """`custom_attributes` of each sample's subset."""
    completes_step: bool = True
    """Whether the optimizer steps after this batch."""
    epoch: int = 1
    """Counted from 1."""
    index: int = 0
    """Position of this micro-batch in its epoch, from 0."""

    def to(self, device: object, dtype: object = None) -> Batch:
        """This batch with its tensors on `device`; floating-point latents, pixels, cond and masks in `dtype`."""

        def move(tensor: Tensor) -> Tensor:
            floating = dtype if tensor.is_floating_point() else None
            return tensor.to(device=device, dtype=floating, non_blocking=True)  # type: ignore[call-overload, no-any-return]

        weights = self.loss_weights.to(device=device, non_blocking=True)  # type: ignore[call-overload]
        return replace(self._changed(move), loss_weights=weights)

    def pinned(self) -> Batch:
        """This batch in memory from which a GPU fetches by itself, so that nobody waits."""
        return replace(self._changed(lambda tensor: tensor.pin_memory()), loss_weights=self.loss_weights.pin_memory())

    def _changed(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """This batch with something done to each tensor but the loss weights."""

        def one(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else change(tensor)

        def all_of(tensors: dict[str, Tensor] | None) -> dict[str, Tensor] | None:
            return None if tensors is None else {name: change(tensor) for name, tensor in tensors.items()}

        return replace(
            self,
            latents=one(self.latents),
            pixels=one(self.pixels),
            cond=all_of(self.cond),
            tokens=all_of(self.tokens),
            conditioning=one(self.conditioning),
            mask=one(self.mask),
        )


@dataclass(kw_only=True, frozen=True)
class Noised:
    """Latents with noise, and what the denoiser should say about them."""

    latents: Tensor
    """(B, C, h, w): clean."""
    input: Tensor
    """(B, C, h, w): what the denoiser sees."""
    target: Tensor
    """(B, C, h, w)"""
    timesteps: Tensor
    """(B,) in [0, 1000], float32."""
    weight: Tensor
    """(B,) loss weight of each sample."""

    def rows(self, numbers: Tensor) -> Noised:
        """Those of some samples, whose numbers (n,) lie on the device."""
        return Noised(
            latents=self.latents.index_select(0, numbers),
            input=self.input.index_select(0, numbers),
            target=self.target.index_select(0, numbers),
            timesteps=self.timesteps.index_select(0, numbers),
            weight=self.weight.index_select(0, numbers),
        )


class Posterior(NamedTuple):
    """What an autoencoder makes of images: a normal distribution of each number of their latents."""

    mean: Tensor
    """(B, C, h, w) float32"""
    deviation: Tensor
    """(B, C, h, w) float32: the standard deviation."""

    def sample(self, noise: Tensor) -> Tensor:
        """(B, C, h, w): latents, from normal numbers."""
        return self.mean + self.deviation * noise

    def row(self, index: int) -> Posterior:
        """That of one image, (C, h, w)."""
        return Posterior(self.mean[index], self.deviation[index])


@dataclass(kw_only=True)
class Models:
    """The parts of a diffusion model; a part that isn't needed (any more) is absent."""

    denoiser: nn.Module | None = None
    vae: nn.Module | None = None
    encoders: dict[str, nn.Module] = field(default_factory=dict)
    """Text encoders by name (`clip_l`, `t5xxl`, …), in the order of the family's `encoder_names`."""
    unused: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Beginnings of the names of parameters of text encoders on which what they say doesn't depend."""


@dataclass(kw_only=True, frozen=True)
class Saving:
    """How a whole model is written."""

    kind: str | None = None
    """As `--save_model_as`; None: as the model was that the training started from."""
    dtype: torch.dtype | None = None
    """Of what is written; None: as it is in memory and in the files."""
    metadata: Mapping[str, str] | None = None
    epoch: int = 0
    """Of this run, as is `steps`."""
    steps: int = 0


@dataclass(kw_only=True, frozen=True)
class Finding:
    """Something the preflight noticed."""

    error: bool
    what: str
    where: str = ""
    hint: str = ""
    code: str = "E-CHECK"


def errors(findings: Sequence[Finding]) -> list[Finding]:
    """Those findings that forbid to start."""
    return [finding for finding in findings if finding.error]
