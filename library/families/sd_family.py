"""What the families of SD 1.x, 2.x and SDXL do alike: all but text encoders, and what the U-Net is told."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from library.epsilon import Epsilon, EpsilonSettings
from library.families.sd_files import Asked, SdFiles, objective_findings, settled
from library.families.sd_text import Wording
from library.families.tokenizers import TokenizerSource
from library.models import autoencoder, loading
from library.models.ledger_unet import UnetActivations
from library.models.text_chunks import CONTENT
from library.randomness import Draws
from library.types import DENOISER, Cond, Finding, Posterior, Saving, Size, Tokens, Traits


@dataclass
class SdFamily(ABC):
    """See `library.families.base.Family`."""

    files: SdFiles
    options: EpsilonSettings = field(default_factory=EpsilonSettings)
    """What the options say; what the model says of itself is added, see `settings`."""
    asked: Asked | None = None
    """None where nothing is trained."""
    length: int = CONTENT
    """Tokens of a caption: 75, 150 or 225."""
    weighted: bool = False
    padded: bool = True
    """Whether captions are filled up to the length."""

    traits: ClassVar[Traits]
    encoder_names: ClassVar[tuple[str, ...]]

    @abstractmethod
    def tokenizer_sources(self) -> Mapping[str, TokenizerSource]:
        """The tokenizer of each text encoder."""

    # what the files are

    @cached_property
    def settings(self) -> EpsilonSettings:
        """Of the objective, with what the model says of itself."""
        return settled(self.options, self.files.stated)

    def findings(self) -> list[Finding]:
        """What is wrong with the model files named in the options, read from their headers only."""
        found = self.files.findings()
        if found or not self.files.model:
            return found
        return [*self.own_findings(), *objective_findings(self.asked, self.files.stated, self.settings)]

    def own_findings(self) -> list[Finding]:
        """What is wrong with a model that has all parts, to one of the families: nothing."""
        return []

    def part_shapes(self) -> Mapping[str, Mapping[str, tuple[int, ...]]]:
        """Shapes of the tensors of the U-Net and the text encoders, from the headers only."""
        return self.files.part_shapes()

    def activations(self) -> UnetActivations:
        """What the U-Net needs in memory beside its weights."""
        return UnetActivations(self.part_shapes()[DENOISER])

    def sampling_shift(self) -> bool:
        """There is none."""
        return False

    def train_at(self, resolutions: Sequence[Size], sizes: Collection[Size]) -> list[Finding]:
        """They are all the same to it."""
        return []

    def vary(self, cond: Cond, size: Size, draws: Draws) -> Cond:
        """Nothing is changed."""
        return cond

    def vae_identity(self) -> str:
        """Changes when the autoencoder changes."""
        return self.files.vae_identity()

    # text

    @cached_property
    def wording(self) -> Wording:
        """How captions become tokens."""
        return Wording(
            self.tokenizer_sources(),
            self.files.model,
            self.files.tokenizer_cache_dir,
            length=self.length,
            weighted=self.weighted,
            padded=self.padded,
        )

    def load_tokenizers(self) -> None:
        """Loads the tokenizers. Errors: ResourceError when their files are nowhere."""
        self.wording.load()

    def token_limits(self) -> dict[str, int]:
        """Longest token sequences, with both marks."""
        return self.wording.limits()

    def count_tokens(self, captions: Sequence[str]) -> dict[str, list[int]]:
        """Number of tokens of each caption, both marks included and nothing cut, by encoder name."""
        return self.wording.counts(captions)

    def tokenize(self, captions: Sequence[str]) -> Tokens:
        """Ids (B, L) by encoder name, and with weighted captions also the weights (B, L), as `text_encoder_weights`."""
        return self.wording.tokenize(captions)

    def load_encoders(
        self,
        names: Sequence[str],
        device: torch.device,
        dtype: torch.dtype,
        finished: loading.Finished | None = None,
        keep_float8: bool = False,
    ) -> dict[str, nn.Module]:
        """The named text encoders, frozen, in evaluation mode."""
        return self.files.load_encoders(names, device, dtype, finished, keep_float8)

    # images

    def load_vae(self, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """The image autoencoder, frozen, in evaluation mode."""
        return self.files.load_vae(device, dtype)

    def encode_images(self, vae: nn.Module, pixels: Tensor) -> Posterior:
        """The posterior of the latents (B, 4, h, w), unscaled."""
        return autoencoder.encode(vae, pixels)

    def decode_latents(self, vae: nn.Module, latents: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) in [-1, 1], float32."""
        return autoencoder.decode(vae, self.traits.from_denoiser(latents)).float()

    # the denoiser

    def load_denoiser(
        self,
        device: torch.device,
        dtype: torch.dtype | None,
        finished: loading.Finished | None = None,
        keep_float8: bool = False,
    ) -> nn.Module:
        """The U-Net, in evaluation mode."""
        return self.files.load_unet(device, dtype, finished, keep_float8)

    def objective(self) -> Epsilon:
        """Noise or velocity, at discrete timesteps."""
        return Epsilon(self.settings)

    # whole models

    def model_elements(self) -> int:
        """See `Family.model_elements`."""
        return self.files.model_elements()

    def model_extension(self, kind: str | None) -> str:
        """See `Family.model_extension`."""
        return self.files.model_extension(kind)

    def save_model(self, path: Path, parts: Mapping[str, nn.Module], saving: Saving) -> None:
        """See `Family.save_model`."""
        self.files.save_model(path, parts, saving, self.settings, self.wording.tokenizers())
