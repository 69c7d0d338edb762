"""Stable Diffusion 1.x and 2.x, in any size."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from library.families.sd_family import SdFamily
from library.families.sd_files import Asked, SdFiles, epsilon_settings
from library.families.sd_text import LAYER
from library.families.tokenizers import CLIP_L, OPEN_CLIP_H, TokenizerSource
from library.findings import error, warning
from library.models import unet
from library.models.checkpoints_sd import TEXT
from library.models.keymaps import count_indices
from library.models.text_chunks import CONTENT, hidden_state
from library.option_groups import LegacySDOptions
from library.options import Options
from library.types import Cond, Finding, Size, Tokens, Traits


@dataclass
class Sd(SdFamily):
    """See `library.families.base.Family`."""

    v2: bool | None = None
    """What `--v2` said; None: nothing."""
    clip_skip: int | None = None

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

    def own_findings(self) -> list[Finding]:
        """A wrong `--v2`, a wrong `--clip_skip`."""
        return [*self._version_findings(), *self._clip_findings()]

    def _version_findings(self) -> list[Finding]:
        if self.v2 is not None and self.v2 != self.is_v2:
            said, seen = ("2.x", "1.x") if self.v2 else ("1.x", "2.x")
            what = f"{Path(self.files.path).name} is an SD {seen} checkpoint, not one of SD {said}"
            return [error(what, "--v2", "leave the option out" if self.v2 else "give --v2", "E-MODEL-KIND")]
        if self.v2 is None and self.is_v2:
            return [warning("switched on: the model is SD 2.x", "--v2")]
        return []

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

    def text_identity(self) -> str:
        """Changes when the text encoder, its tokenizer or an option that decides the text outputs changes."""
        parts = [*self.files.encoder_identities(), str(self.clip_skip), *self.wording.identity()]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    # text

    def tokenizer_sources(self) -> Mapping[str, TokenizerSource]:
        """See `SdFamily.tokenizer_sources`."""
        return {TEXT: OPEN_CLIP_H if self.is_v2 else CLIP_L}

    def encode_text(self, encoders: Mapping[str, nn.Module], tokens: Tokens) -> Cond:
        """`hidden_state` (B, L, 768 or 1024)."""
        if TEXT not in encoders:
            return {}
        rows = self.wording.rows(TEXT, tokens)
        hidden = hidden_state(encoders[TEXT], rows.flatten(0, 1), self.clip_skip)
        return {"hidden_state": self.wording.finished(TEXT, hidden, rows, tokens)}

    def unused_parameters(self) -> Mapping[str, Sequence[str]]:
        """Those of the layers that are skipped."""
        layers = self._layers
        skipped = range(layers - (self.clip_skip or 1) + 1, layers)
        return {TEXT: [f"{level}encoder.layers.{index}." for level in ("", "text_model.") for index in skipped]}

    # the denoiser

    def size_cond(self, original_sizes: Sequence[Size], crops: Sequence[tuple[int, int]], size: Size) -> Cond:
        """Nothing: the U-Net isn't told."""
        return {}

    def predict(
        self, denoiser: nn.Module, x: Tensor, timesteps: Tensor, cond: Cond, guidance: Tensor | None = None
    ) -> Tensor:
        """The U-Net's answer (B, 4, h, w) for noisy latents x at timesteps (B,) in [0, 1000)."""
        return unet.predict(denoiser, x, timesteps, cond["hidden_state"])
