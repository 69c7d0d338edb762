"""Stable Diffusion 1.x and 2.x, in any size."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from library.epsilon import Epsilon, EpsilonSettings
from library.families.sd_files import Asked, SdFiles, epsilon_settings, objective_findings, settled
from library.families.sd_text import LAYER, Wording
from library.families.tokenizers import CLIP_L, OPEN_CLIP_H
from library.findings import error, warning
from library.models import autoencoder, loading, unet
from library.models.checkpoints_sd import TEXT
from library.models.keymaps import count_indices
from library.models.ledger_unet import UnetActivations
from library.models.text_chunks import CONTENT, hidden_state
from library.option_groups import LegacySDOptions
from library.options import Options
from library.randomness import Draws
from library.types import DENOISER, Cond, Finding, Posterior, Saving, Size, Tokens, Traits


@dataclass
class Sd:
    """See `library.families.base.Family`."""

    files: SdFiles
    options: EpsilonSettings = field(default_factory=EpsilonSettings)
    """What the options say; what the model says of itself is added, see `settings`."""
    asked: Asked | None = None
    """None where nothing is trained."""
    v2: bool | None = None
    """What `--v2` said; None: nothing."""
    clip_skip: int | None = None
    length: int = CONTENT
    """Tokens of a caption: 75, 150 or 225."""
    weighted: bool = False
    padded: bool = True

    traits: ClassVar[Traits] = Traits(
        name="sd",
        latent_channels=4,
        latent_stride=8,
        latent_scale=0.18215,
        patch=1,
        bucket_step=64,
        latents_suffix="_sd.npz",
        latents_keys_carry_size=False,
        text_suffix=None,
        base_model_version="sd_v1",
    )
    encoder_names: ClassVar[tuple[str, ...]] = (TEXT,)

    @classmethod
    def from_options(cls, options: Options) -> Sd:
        """The family as a training or caching script's options want it."""
        group = options[LegacySDOptions]
        return cls(
            SdFiles.from_options(options, "sd"),
            epsilon_settings(options),
            Asked.of(options),
            v2=group.v2 if group.v2 or options.given("v2") else None,
            clip_skip=group.clip_skip,
            length=group.max_token_length or CONTENT,
            weighted=group.weighted_captions,
            padded=not (options.script.option("no_token_padding") and options.value("no_token_padding")),
        )

    # what the files are

    @property
    def is_v2(self) -> bool:
        """Whether the model is SD 2.x, as its tensors say."""
        return self.files.checkpoint.version == "2"

    @cached_property
    def settings(self) -> EpsilonSettings:
        """Of the objective, with what the model says of itself."""
        return settled(self.options, self.files.stated)

    def findings(self) -> list[Finding]:
        """What is wrong with the model files named in the options, read from their headers only."""
        found = self.files.findings()
        if found or not self.files.model:
            return found
        if self.v2 is not None and self.v2 != self.is_v2:
            said, seen = ("2.x", "1.x") if self.v2 else ("1.x", "2.x")
            what = f"{Path(self.files.model).name} is an SD {seen} checkpoint, not one of SD {said}"
            found.append(error(what, "--v2", "leave the option out" if self.v2 else "give --v2", "E-MODEL-KIND"))
        elif self.v2 is None and self.is_v2:
            found.append(warning("switched on: the model is SD 2.x", "--v2"))
        return [*found, *self._clip_findings(), *objective_findings(self.asked, self.files.stated, self.settings)]

    @property
    def _layers(self) -> int:
        """Of the text encoder."""
        return count_indices(self.part_shapes()[TEXT], LAYER)

    def _clip_findings(self) -> list[Finding]:
        layers = self._layers
        if self.clip_skip is None or 1 <= self.clip_skip <= layers:
            return []
        what = f"the text encoder has {layers} layers, of which none is number {self.clip_skip} from the end"
        return [error(what, "--clip_skip", f"give 1 (the last) to {layers}")]

    def part_shapes(self) -> Mapping[str, Mapping[str, tuple[int, ...]]]:
        """Shapes of the tensors of the U-Net and the text encoder, from the headers only."""
        return self.files.part_shapes()

    def activations(self) -> UnetActivations:
        """What the U-Net needs in memory beside its weights."""
        return UnetActivations(self.part_shapes()[DENOISER])

    def text_output_bytes(self) -> int:
        """None: text outputs are never on the disk."""
        return 0

    def architecture(self) -> str:
        """`modelspec.architecture` of the base model."""
        if not self.is_v2:
            return "stable-diffusion-v1"
        return "stable-diffusion-v2-768-v" if self.settings.v_parameterization else "stable-diffusion-v2-512"

    def modelspec(self) -> dict[str, Any]:
        """See `Family.modelspec`."""
        return {"v_parameterization": self.settings.v_parameterization, "clip_skip": self.clip_skip}

    def metadata(self) -> dict[str, object]:
        """What the model turned out to be."""
        version = f"sd_v{2 if self.is_v2 else 1}{'_v' if self.settings.v_parameterization else ''}"
        return {
            "v2": self.is_v2,
            "base_model_version": version,
            "zero_terminal_snr": self.settings.zero_terminal_snr,
        }

    def sampling_shift(self) -> bool:
        """There is none."""
        return False

    def train_at(self, resolutions: Sequence[Size]) -> None:
        """They are all the same to it."""

    def vary(self, cond: Cond, size: Size, draws: Draws) -> Cond:
        """Nothing is changed."""
        return cond

    def vae_identity(self) -> str:
        """Changes when the autoencoder changes."""
        return self.files.vae_identity()

    def text_identity(self) -> str:
        """Changes when the text encoder, its tokenizer or an option that decides the text outputs changes."""
        parts = [*self.files.encoder_identities(), str(self.clip_skip), *self.wording.identity()]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    # text

    @cached_property
    def wording(self) -> Wording:
        """How captions become tokens."""
        return Wording(
            {TEXT: OPEN_CLIP_H if self.is_v2 else CLIP_L},
            self.files.model,
            self.files.tokenizer_cache_dir,
            length=self.length,
            weighted=self.weighted,
            padded=self.padded,
        )

    def load_tokenizers(self) -> None:
        """Loads the tokenizer. Errors: ResourceError when its files are nowhere."""
        self.wording.load()

    def token_limits(self) -> dict[str, int]:
        """Longest token sequence, with both marks."""
        return self.wording.limits()

    def count_tokens(self, captions: Sequence[str]) -> dict[str, list[int]]:
        """Number of tokens of each caption, both marks included and nothing cut."""
        return self.wording.counts(captions)

    def tokenize(self, captions: Sequence[str]) -> Tokens:
        """`text_encoder` (B, L) ids, and with weighted captions `text_encoder_weights` (B, L)."""
        return self.wording.tokenize(captions)

    def encode_text(self, encoders: Mapping[str, nn.Module], tokens: Tokens) -> Cond:
        """`hidden_state` (B, L, 768 or 1024)."""
        if TEXT not in encoders:
            return {}
        rows = self.wording.rows(TEXT, tokens)
        hidden = hidden_state(encoders[TEXT], rows.flatten(0, 1), self.clip_skip)
        return {"hidden_state": self.wording.finished(TEXT, hidden, rows, tokens)}

    def load_encoders(
        self,
        names: Sequence[str],
        device: torch.device,
        dtype: torch.dtype,
        finished: loading.Finished | None = None,
        keep_float8: bool = False,
    ) -> dict[str, nn.Module]:
        """The text encoder, frozen, in evaluation mode, if it is named."""
        return self.files.load_encoders(names, device, dtype, finished, keep_float8)

    def unused_parameters(self) -> Mapping[str, Sequence[str]]:
        """Those of the layers that are skipped."""
        layers = self._layers
        skipped = range(layers - (self.clip_skip or 1) + 1, layers)
        return {TEXT: [f"{level}encoder.layers.{index}." for level in ("", "text_model.") for index in skipped]}

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

    def size_cond(self, original_sizes: Sequence[Size], crops: Sequence[tuple[int, int]], size: Size) -> Cond:
        """Nothing: the U-Net isn't told."""
        return {}

    def load_denoiser(
        self,
        device: torch.device,
        dtype: torch.dtype | None,
        finished: loading.Finished | None = None,
        keep_float8: bool = False,
    ) -> nn.Module:
        """The U-Net, in evaluation mode."""
        return self.files.load_unet(device, dtype, finished, keep_float8)

    def model_elements(self) -> int:
        """See `Family.model_elements`."""
        return self.files.model_elements()

    def model_extension(self, kind: str | None) -> str:
        """See `Family.model_extension`."""
        return self.files.model_extension(kind)

    def save_model(self, path: Path, parts: Mapping[str, nn.Module], saving: Saving) -> None:
        """See `Family.save_model`."""
        self.files.save_model(path, parts, saving, self.settings, self.wording.tokenizers())

    def objective(self) -> Epsilon:
        """Noise or velocity, at discrete timesteps."""
        return Epsilon(self.settings)

    def predict(
        self, denoiser: nn.Module, x: Tensor, timesteps: Tensor, cond: Cond, guidance: Tensor | None = None
    ) -> Tensor:
        """The U-Net's answer (B, 4, h, w) for noisy latents x at timesteps (B,) in [0, 1000)."""
        return unet.predict(denoiser, x, timesteps, cond["hidden_state"])
