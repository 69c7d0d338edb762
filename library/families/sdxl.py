"""Stable Diffusion XL, in any size."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from library.epsilon import EpsilonSettings
from library.families.sd_family import SdFamily
from library.families.sd_files import Asked, SdFiles, epsilon_settings
from library.families.sd_text import LAYER
from library.families.tokenizers import CLIP_L, OPEN_CLIP_G, TokenizerSource
from library.models import unet
from library.models.checkpoints_sd import TEXT, TEXT_2
from library.models.keymaps import CLIP_TOKENS, PROJECTION, count_indices
from library.models.text_chunks import CONTENT, hidden_state, penultimate_and_pooled
from library.option_groups import LegacySDOptions, SdxlInferenceOptions
from library.options import Options
from library.types import Cond, Size, Tokens, Traits

FROM_THE_END = 2
"""Which layer of the first encoder is used, counted from the end: the last but one."""
FILE_BYTES = 4096
"""What a cache file has besides its numbers, about."""


@dataclass
class Sdxl(SdFamily):
    """See `library.families.base.Family`."""

    traits: ClassVar[Traits] = Traits(
        name="sdxl",
        latent_channels=4,
        latent_stride=8,
        latent_scale=0.13025,
        patch=1,
        bucket_step=32,
        latents_suffix="_sdxl.npz",
        latents_keys_carry_size=False,
        text_suffix="_te_outputs.npz",
        base_model_version="sdxl_base_v1-0",
    )
    encoder_names: ClassVar[tuple[str, ...]] = (TEXT, TEXT_2)

    @classmethod
    def from_options(cls, options: Options) -> Sdxl:
        """The family as a training or caching script's options want it."""
        group = options[LegacySDOptions]
        return cls(
            SdFiles.from_options(options, "sdxl"),
            epsilon_settings(options),
            Asked.of(options),
            length=group.max_token_length or CONTENT,
            weighted=group.weighted_captions,
        )

    @classmethod
    def from_inference_options(cls, options: SdxlInferenceOptions, settings: EpsilonSettings) -> Sdxl:
        """The family as the inference script's options want it; `settings` say what the model predicts."""
        files = SdFiles(
            options.ckpt_path,
            "sdxl",
            vae=options.vae,
            option="--ckpt_path",
            tokenizer_cache_dir=options.tokenizer_cache_dir,
        )
        return cls(files, settings, length=options.max_token_length or CONTENT)

    # what the files are

    def text_output_bytes(self) -> int:
        """Room on the disk that the text outputs of one caption need, at most."""
        shapes = self.part_shapes()
        widths = [shapes[name][CLIP_TOKENS][1] for name in self.encoder_names]
        return 4 * ((self.length + 2) * sum(widths) + shapes[TEXT_2][PROJECTION][0]) + FILE_BYTES

    def architecture(self) -> str:
        """`modelspec.architecture` of the base model."""
        return "stable-diffusion-xl-v1-base"

    def modelspec(self) -> dict[str, Any]:
        """See `Family.modelspec`."""
        return {"v_parameterization": self.settings.v_parameterization}

    def metadata(self) -> dict[str, object]:
        """What the model turned out to be."""
        return {"zero_terminal_snr": self.settings.zero_terminal_snr}

    def text_identity(self) -> str:
        """Changes when a text encoder, a tokenizer or an option that decides the text outputs changes."""
        parts = [*self.files.encoder_identities(), *self.wording.identity()]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    # text

    def tokenizer_sources(self) -> Mapping[str, TokenizerSource]:
        """See `SdFamily.tokenizer_sources`."""
        return {TEXT: CLIP_L, TEXT_2: OPEN_CLIP_G}

    def encode_text(self, encoders: Mapping[str, nn.Module], tokens: Tokens) -> Cond:
        """`hidden_state1` (B, L, 768) from the first; `hidden_state2` (B, L, 1280) and `pool2` (B, 1280)."""
        wording, cond = self.wording, Cond()
        if TEXT in encoders:
            rows = wording.rows(TEXT, tokens)
            hidden = hidden_state(encoders[TEXT], rows.flatten(0, 1), FROM_THE_END, normed=False)
            cond["hidden_state1"] = wording.finished(TEXT, hidden, rows, tokens)
        if TEXT_2 in encoders:
            rows = wording.rows(TEXT_2, tokens)
            hidden, pooled = penultimate_and_pooled(encoders[TEXT_2], rows.flatten(0, 1), wording.eos(TEXT_2))
            cond["hidden_state2"] = wording.finished(TEXT_2, hidden, rows, tokens)
            cond["pool2"] = pooled.view(*rows.shape[:2], -1)[:, 0]  # of the first row
        return cond

    def unused_parameters(self) -> Mapping[str, Sequence[str]]:
        """Those of the first encoder's last layer, and of the norm behind it."""
        last = count_indices(self.part_shapes()[TEXT], LAYER) - 1
        beginnings = (f"encoder.layers.{last}.", "final_layer_norm.")
        return {TEXT: [level + name for level in ("", "text_model.") for name in beginnings]}

    # the denoiser

    def size_cond(self, original_sizes: Sequence[Size], crops: Sequence[tuple[int, int]], size: Size) -> Cond:
        """`sizes` (B, 6): original height and width, top and left of the crop, height and width now."""
        rows = [
            (original.height, original.width, top, left, size.height, size.width)
            for original, (left, top) in zip(original_sizes, crops, strict=True)
        ]
        return {"sizes": torch.tensor(rows, dtype=torch.float32)}

    def predict(
        self, denoiser: nn.Module, x: Tensor, timesteps: Tensor, cond: Cond, guidance: Tensor | None = None
    ) -> Tensor:
        """The U-Net's answer (B, 4, h, w) for noisy latents x at timesteps (B,) in [0, 1000)."""
        context = torch.cat((cond["hidden_state1"], cond["hidden_state2"]), dim=-1)
        return unet.predict(denoiser, x, timesteps, context, cond["pool2"], cond["sizes"])
