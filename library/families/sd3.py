"""Stable Diffusion 3 and 3.5, in any size."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from library.devices import send
from library.families.sd3_files import CLIP_EMBEDDING, Sd3Model
from library.families.sd3_positions import Sd3Positions
from library.families.sd3_wording import Sd3Wording
from library.findings import of_error, warning
from library.log import UserError
from library.metadata import sd3_architecture
from library.models import autoencoder, loading
from library.models.keymaps import PROJECTION
from library.models.keymaps_sd3 import CLIP_G, CLIP_L, T5
from library.models.ledger_mmdit import MMDiTActivations
from library.models.loading_sd3 import VAE
from library.models.mmdit import MMDiT, MMDiTConfig
from library.models.sd3_text import CLIP, CLIP_TOKENS, context, joint_clip, without_dropped
from library.objectives import Flow, FlowSettings
from library.option_groups import (
    LossOptions,
    NoiseOptions,
    OptimizerOptions,
    Sd3DensityOptions,
    Sd3InferenceOptions,
    Sd3Options,
    Sd3TextOptions,
    T5TextOptions,
)
from library.options import Options
from library.randomness import Draws, Stream
from library.types import DENOISER, Cond, Finding, Posterior, Saving, Size, Tokens, Traits, errors

T5_LENGTH = 256
"""Default number of T5 tokens."""
SAMPLING_SHIFT = 3.0
FILE_BYTES = 4096
"""What a cache file has besides its numbers, about."""


@dataclass(frozen=True, kw_only=True)
class Sd3Settings:
    """What the options say of text and positions."""

    t5_length: int = T5_LENGTH
    apply_lg_mask: bool = False
    """Whether padding is hidden from the CLIP encoders."""
    apply_t5_mask: bool = False
    dropout: Mapping[str, float] = field(default_factory=dict)
    """How often training does without an encoder, by name."""
    random_crop_rate: float = 0.0
    """How often training takes positions from a random place of the table."""
    scaled_positions: bool = False
    """Whether positions span the same range at every resolution."""

    @classmethod
    def from_options(cls, options: Options) -> Sd3Settings:
        """As a training or caching script's options say."""
        text = options[T5TextOptions]
        own = options[Sd3Options] if options.has(Sd3Options) else Sd3Options()
        return cls(
            t5_length=text.t5xxl_max_token_length or T5_LENGTH,
            apply_lg_mask=options[Sd3TextOptions].apply_lg_attn_mask,
            apply_t5_mask=text.apply_t5_attn_mask,
            dropout={CLIP_L: own.clip_l_dropout_rate, CLIP_G: own.clip_g_dropout_rate, T5: own.t5_dropout_rate},
            random_crop_rate=own.pos_emb_random_crop_rate,
            scaled_positions=own.enable_scaled_pos_embed,
        )

    @classmethod
    def from_inference_options(cls, options: Sd3InferenceOptions) -> Sd3Settings:
        """As the inference script's options say."""
        return cls(
            t5_length=options.t5xxl_token_length,
            apply_lg_mask=options.apply_lg_attn_mask,
            apply_t5_mask=options.apply_t5_attn_mask,
        )

    @property
    def masked(self) -> Mapping[str, bool]:
        """Whether padding is hidden from an encoder."""
        return {CLIP_L: self.apply_lg_mask, CLIP_G: self.apply_lg_mask, T5: self.apply_t5_mask}


@dataclass
class Sd3:
    """See `library.families.base.Family`."""

    model: Sd3Model
    tokenizer_cache_dir: str | None = None
    settings: Sd3Settings = field(default_factory=Sd3Settings)
    flow: FlowSettings = field(default_factory=lambda: flow_settings(None))
    trains: bool = False

    traits: ClassVar[Traits] = Traits(
        name="sd3",
        latent_channels=16,
        latent_stride=8,
        latent_scale=1.5305,
        latent_shift=0.0609,
        bucket_step=8,
        latents_suffix="_sd3.npz",
        latents_keys_carry_size=True,
        text_suffix="_sd3_te.npz",
        base_model_version="medium",
    )

    @classmethod
    def from_options(cls, options: Options) -> Sd3:
        """The family as a training or caching script's options want it."""
        trains = options.has(OptimizerOptions)
        return cls(
            Sd3Model.from_options(options),
            options.value("tokenizer_cache_dir"),
            Sd3Settings.from_options(options),
            flow_settings(options if trains else None),
            trains,
        )

    @classmethod
    def from_inference_options(cls, options: Sd3InferenceOptions) -> Sd3:
        """The family as the inference script's options want it."""
        return cls(
            Sd3Model.from_inference_options(options),
            options.tokenizer_cache_dir,
            Sd3Settings.from_inference_options(options),
        )

    # what the files are

    @property
    def encoder_names(self) -> tuple[str, ...]:
        """CLIP-L, CLIP-G, and T5 where there is one."""
        return self.model.encoder_names

    def findings(self) -> list[Finding]:
        """What is wrong with the model files named in the options, read from their headers only, and with settings."""
        found = self.model.findings()
        if found or not self.model.path:
            return found
        if T5 not in self.encoder_names and self.model.uses_t5:
            hint = "give --t5xxl FILE; without it long and precise prompts work less well"
            found.append(warning("there is no T5: its part of the text is left empty", "--t5xxl", hint))
            found += [warning("it does nothing without T5", f"--{name}") for name in self.model.t5_options]
        if self.settings.scaled_positions and not self.config.dual_blocks:
            found.append(warning("it was made for SD3.5-medium, and this is another", "--enable_scaled_pos_embed"))
        if self.trains:
            try:
                self.objective()
            except UserError as mistake:
                found.append(of_error(mistake, ""))
        return found

    @cached_property
    def config(self) -> MMDiTConfig:
        """Sizes of the transformer."""
        return MMDiTConfig.from_shapes(self.part_shapes()[DENOISER])

    @cached_property
    def clip_l_width(self) -> int:
        """Features of CLIP-L."""
        return self.part_shapes()[CLIP_L][CLIP_EMBEDDING][1]

    def part_shapes(self) -> Mapping[str, Mapping[str, tuple[int, ...]]]:
        """Shapes of the tensors of the transformer and the text encoders, from the headers only."""
        return self.model.shapes

    def outline(self, name: str) -> nn.Module:
        """The transformer or a text encoder without its weights, from the headers only."""
        return self.model.outline(name)

    def activations(self) -> MMDiTActivations:
        """What the transformer needs in memory beside its weights."""
        return MMDiTActivations(self.config)

    def text_output_bytes(self) -> int:
        """Room on the disk that the text outputs of one caption need, at most."""
        shapes = self.part_shapes()
        clip = 4 * (CLIP_TOKENS + 1) * (self.clip_l_width + shapes[CLIP_G][PROJECTION][0]) + 2 * 8 * CLIP_TOKENS
        t5_row = 4 * self.config.context_width + 8
        return clip + self.settings.t5_length * t5_row * (T5 in self.encoder_names) + FILE_BYTES

    def architecture(self) -> str:
        """`modelspec.architecture` of the base model."""
        return sd3_architecture(self.config.variant)

    def modelspec(self) -> dict[str, Any]:
        """Nothing more."""
        return {}

    def metadata(self) -> dict[str, object]:
        """SD3's own `ss_*` values, names without the prefix."""
        flow, settings = self.flow, self.settings
        return {
            "base_model_version": self.config.variant,
            "apply_lg_attn_mask": settings.apply_lg_mask,
            "apply_t5_attn_mask": settings.apply_t5_mask,
            "weighting_scheme": flow.weighting_scheme,
            "logit_mean": flow.logit_mean,
            "logit_std": flow.logit_std,
            "mode_scale": flow.mode_scale,
            "training_shift": flow.discrete_flow_shift,
        }

    def sampling_shift(self) -> bool:
        """It is always the same one."""
        return False

    def train_at(self, resolutions: Sequence[Size], sizes: Collection[Size]) -> list[Finding]:
        """Tables of positions are scaled for the resolutions; without that, images may be too large for the model's."""
        if errors(self.model.findings()) or not self.model.path:
            return []
        self.positions.resolutions = resolutions
        return self.positions.findings(sizes) if self.trains else []

    def vae_identity(self) -> str:
        """Changes when the autoencoder changes."""
        return self.model.identity(VAE)

    def text_identity(self) -> str:
        """Changes when a text encoder, a tokenizer or an option that decides the text outputs changes."""
        parts = [*(self.model.identity(name) for name in self.encoder_names), *self.wording.identity()]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    # text

    @cached_property
    def wording(self) -> Sd3Wording:
        """How captions become tokens."""
        return Sd3Wording(
            self.encoder_names,
            self.settings.t5_length,
            self.settings.masked,
            self.model.path,
            (self.model.path, *self.model.separate.values()),
            self.tokenizer_cache_dir,
        )

    def load_tokenizers(self) -> None:
        """Loads the tokenizers. Errors: ResourceError when their files are nowhere."""
        self.wording.load()

    def token_limits(self) -> dict[str, int]:
        """Longest token sequence by encoder name."""
        return self.wording.limits()

    def count_tokens(self, captions: Sequence[str]) -> dict[str, list[int]]:
        """Number of tokens of each caption, marks included and nothing cut, by encoder name."""
        return self.wording.counts(captions)

    def tokenize(self, captions: Sequence[str]) -> Tokens:
        """`clip_l`, `clip_g` (B, 77) and `t5xxl` (B, L) ids, and their masks under the names of the cache."""
        return self.wording.tokenize(captions)

    def encode_text(self, encoders: Mapping[str, nn.Module], tokens: Tokens) -> Cond:
        """What the encoders say, with both of CLIP in joint arrays; names: `library.models.sd3_text`."""
        said = self.wording.said(encoders, tokens)
        return joint_clip(said, self.clip_l_width) if encoders.keys() >= CLIP.keys() else said

    def load_encoders(
        self,
        names: Sequence[str],
        device: torch.device,
        dtype: torch.dtype,
        finished: loading.Finished | None = None,
        keep_float8: bool = False,
    ) -> dict[str, nn.Module]:
        """The named text encoders, frozen, in evaluation mode."""
        return self.model.load_encoders(names, device, dtype, finished, keep_float8)

    def unused_parameters(self) -> Mapping[str, Sequence[str]]:
        """None: of the last layers of CLIP there is the pooled output."""
        return {}

    # images

    def load_vae(self, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """The image autoencoder, frozen, in evaluation mode."""
        return self.model.load_vae(device, dtype)

    def encode_images(self, vae: nn.Module, pixels: Tensor) -> Posterior:
        """The posterior of the latents (B, 16, h, w), neither shifted nor scaled."""
        return autoencoder.encode(vae, pixels)

    def decode_latents(self, vae: nn.Module, latents: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) in [-1, 1], float32."""
        return autoencoder.decode(vae, self.traits.from_denoiser(latents)).float()

    # the denoiser

    def size_cond(self, original_sizes: Sequence[Size], crops: Sequence[tuple[int, int]], size: Size) -> Cond:
        """Nothing: the transformer isn't told."""
        return {}

    def load_denoiser(
        self,
        device: torch.device,
        dtype: torch.dtype | None,
        finished: loading.Finished | None = None,
        keep_float8: bool = False,
    ) -> nn.Module:
        """The transformer, in evaluation mode."""
        return self.model.load_denoiser(device, dtype, finished, keep_float8)

    def model_elements(self) -> int:
        """See `Family.model_elements`."""
        return self.model.model_elements()

    def model_extension(self, kind: str | None) -> str:
        """Always that of safetensors files."""
        return ".safetensors"

    def save_model(self, path: Path, parts: Mapping[str, nn.Module], saving: Saving) -> None:
        """Writes one file with transformer, autoencoder, and the text encoders that are trained or wanted."""
        self.model.save(path, parts, saving)

    def objective(self) -> Flow:
        """Rectified flow."""
        return Flow(self.flow)

    def vary(self, cond: Cond, size: Size, draws: Draws) -> Cond:
        """Zeros for what encoders say that are dropped; `origin` (B, 2), where positions are taken from the table."""
        dropped = {
            name: _chances(draws, Stream.TEXT_DROPOUT + number, rate)
            for number, (name, rate) in enumerate(self.settings.dropout.items())
            if rate
        }
        if dropped:
            cond = without_dropped(joint_clip(cond, self.clip_l_width), dropped, self.clip_l_width)
        if self.settings.random_crop_rate:
            cond = {**cond, "origin": self.positions.origins(size, draws)}
        return cond

    @cached_property
    def positions(self) -> Sd3Positions:
        """Which positions an image gets."""
        config, settings = self.config, self.settings
        pixels = self.traits.latent_stride * config.patch
        return Sd3Positions(config.table_side, pixels, settings.random_crop_rate, settings.scaled_positions)

    def predict(
        self, denoiser: nn.Module, x: Tensor, timesteps: Tensor, cond: Cond, guidance: Tensor | None = None
    ) -> Tensor:
        """The velocity (B, 16, h, w) for noisy latents x at timesteps (B,) in [0, 1000]."""
        model = denoiser
        assert isinstance(model, MMDiT)
        stored = model.context_embedder.weight.dtype  # not of a block, so that it stays in the type to compute in
        dtype = stored if stored.itemsize > 1 else x.dtype  # of a file in eight bits autocast says what to compute in
        cond = joint_clip(cond, self.clip_l_width)
        rows, columns = (-(-side // model.config.patch) for side in x.shape[-2:])
        velocity: Tensor = model(
            x.to(dtype),
            timesteps,
            context(cond["lg_out"].to(dtype), cond.get("t5_out"), model.config.context_width),
            cond["lg_pooled"].to(dtype),
            self.positions.of(model.pos_embed, rows, columns, cond.get("origin")),
        )
        return velocity


def flow_settings(options: Options | None) -> FlowSettings:
    """The objective's settings from the option groups; None: where nothing is trained."""
    if options is None:
        return FlowSettings(sampling_shift=SAMPLING_SHIFT)
    density, loss, noise = options[Sd3DensityOptions], options[LossOptions], options[NoiseOptions]
    return FlowSettings(
        timestep_sampling="density",
        discrete_flow_shift=options[Sd3Options].training_shift,
        weighting_scheme=density.weighting_scheme,
        logit_mean=density.logit_mean,
        logit_std=density.logit_std,
        mode_scale=density.mode_scale,
        model_prediction_type="sigma_scaled",
        loss_type=loss.loss_type,
        huber_schedule=loss.huber_schedule,
        huber_c=loss.huber_c,
        huber_scale=loss.huber_scale,
        whole_timesteps=True,
        sampling_shift=SAMPLING_SHIFT,
        min_timestep=noise.min_timestep,
        max_timestep=noise.max_timestep,
        ip_noise_gamma=noise.ip_noise_gamma,
        ip_noise_gamma_random_strength=noise.ip_noise_gamma_random_strength,
        masked_loss_normalize=loss.masked_loss_normalize,
    )


def _chances(draws: Draws, stream: int, rate: float) -> Tensor:
    """(B,) boolean, on the device: what happens at that rate."""
    return send(draws.uniform_scalars(stream) < rate, draws.device)
