"""Stable Diffusion XL, in any size."""

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
from library.families.tokenizers import CLIP_L, OPEN_CLIP_G
from library.models import autoencoder, loading, unet
from library.models.checkpoints_sd import TEXT, TEXT_2
from library.models.keymaps import CLIP_TOKENS, PROJECTION, count_indices
from library.models.ledger_unet import UnetActivations
from library.models.text_chunks import CONTENT, hidden_state, penultimate_and_pooled
from library.option_groups import LegacySDOptions, SdxlInferenceOptions
from library.options import Options
from library.randomness import Draws
from library.types import DENOISER, Cond, Finding, Posterior, Saving, Size, Tokens, Traits

FROM_THE_END = 2
"""Which layer of the first encoder is used, counted from the end: the last but one."""
FILE_BYTES = 4096
"""What a cache file has besides its numbers, about."""


@dataclass
class Sdxl:
    """See `library.families.base.Family`."""

    files: SdFiles
    options: EpsilonSettings = field(default_factory=EpsilonSettings)
    """What the options say; what the model says of itself is added, see `settings`."""
    asked: Asked | None = None
    """None where nothing is trained."""
    length: int = CONTENT
    """Tokens of a caption: 75, 150 or 225."""
    weighted: bool = False

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

    @cached_property
    def settings(self) -> EpsilonSettings:
        """Of the objective, with what the model says of itself."""
        return settled(self.options, self.files.stated)

    def findings(self) -> list[Finding]:
        """What is wrong with the model files named in the options, read from their headers only."""
        found = self.files.findings()
        if found or not self.files.model:
            return found
        return list(objective_findings(self.asked, self.files.stated, self.settings))

    def part_shapes(self) -> Mapping[str, Mapping[str, tuple[int, ...]]]:
        """Shapes of the tensors of the U-Net and the text encoders, from the headers only."""
        return self.files.part_shapes()

    def activations(self) -> UnetActivations:
        """What the U-Net needs in memory beside its weights."""
        return UnetActivations(self.part_shapes()[DENOISER])

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
        """Changes when a text encoder, a tokenizer or an option that decides the text outputs changes."""
        parts = [*self.files.encoder_identities(), *self.wording.identity()]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    # text

    @cached_property
    def wording(self) -> Wording:
        """How captions become tokens."""
        return Wording(
            {TEXT: CLIP_L, TEXT_2: OPEN_CLIP_G},
            self.files.model,
            self.files.tokenizer_cache_dir,
            length=self.length,
            weighted=self.weighted,
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
        """`text_encoder` and `text_encoder_2` (B, L) ids, and with weighted captions the weights of both (B, L)."""
        return self.wording.tokenize(captions)

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

    def unused_parameters(self) -> Mapping[str, Sequence[str]]:
        """Those of the first encoder's last layer, and of the norm behind it."""
        last = count_indices(self.part_shapes()[TEXT], LAYER) - 1
        beginnings = (f"encoder.layers.{last}.", "final_layer_norm.")
        return {TEXT: [level + name for level in ("", "text_model.") for name in beginnings]}

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
        """`sizes` (B, 6): original height and width, top and left of the crop, height and width now."""
        rows = [
            (original.height, original.width, top, left, size.height, size.width)
            for original, (left, top) in zip(original_sizes, crops, strict=True)
        ]
        return {"sizes": torch.tensor(rows, dtype=torch.float32)}

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
        context = torch.cat((cond["hidden_state1"], cond["hidden_state2"]), dim=-1)
        return unet.predict(denoiser, x, timesteps, context, cond["pool2"], cond["sizes"])
