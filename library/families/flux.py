"""FLUX.1: dev, schnell, and models of the same layout in any size."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from library.families.tokenizers import CLIP_L, T5_XXL, load_tokenizer
from library.findings import of_error, warning
from library.log import UserError, get_logger
from library.models import autoencoder, clip, detect, loading, t5
from library.models.flux import Flux as FluxModel
from library.models.flux import FluxConfig, image_ids, patchify, text_ids, unpatchify
from library.models.joined import Joined, same
from library.models.ledger_flux import FluxActivations
from library.objectives import Flow, FlowSettings
from library.option_groups import (
    FlowDensityOptions,
    FluxInferenceOptions,
    FluxOptions,
    InferenceExtraOptions,
    LossOptions,
    ModelOptions,
    NoiseOptions,
    OptimizerOptions,
    T5TextOptions,
)
from library.options import Options
from library.places import check_readable
from library.randomness import Draws
from library.types import DENOISER, Cond, Finding, Posterior, Saving, Size, Tokens, Traits

logger = get_logger(__name__)

LATENT_SCALE, LATENT_SHIFT = 0.3611, 0.1159
T5_LENGTH = {True: 512, False: 256}
"""Default number of T5 tokens, by whether the model embeds guidance (dev) or not (schnell)."""
CLIP_POSITIONS = "embeddings.position_embedding.weight"
T5_QUERY = "block.0.layer.0.SelfAttention.q.weight"
FILE_BYTES = 4096
"""What a cache file has besides its numbers, about."""


@dataclass(frozen=True)
class FluxFiles:
    """Where the parts of a FLUX.1 model lie, and how to read them."""

    transformer: str | None
    clip_l: str | None
    t5xxl: str | None
    ae: str | None
    transformer_option: str = "--pretrained_model_name_or_path"
    tokenizer_cache_dir: str | None = None
    mmap: bool = True
    t5_length: int | None = None
    """None: as the model suggests, see `T5_LENGTH`."""
    apply_t5_mask: bool = False

    def required(self, name: str) -> str:
        """The path of a part. Errors: UserError when the option wasn't given."""
        path = getattr(self, name)
        if not path:
            option = self.transformer_option if name == "transformer" else f"--{name}"
            raise UserError(
                "a model file is missing from the command", option, f"give {option} FILE", code="E-MODEL-NONE"
            )
        return str(path)


@dataclass
class Flux:
    """See `library.families.base.Family`."""

    files: FluxFiles
    settings: FlowSettings = field(default_factory=FlowSettings)
    guidance: float = 3.5
    """Embedded guidance of training."""
    guidance_given: bool | None = None
    """Whether the user chose it; None where nothing is trained."""

    traits: ClassVar[Traits] = Traits(
        name="flux",
        latent_channels=16,
        latent_stride=8,
        bucket_step=16,
        latents_suffix="_flux.npz",
        latents_keys_carry_size=True,
        text_suffix="_flux_te.npz",
        base_model_version="flux1",
    )
    encoder_names: ClassVar[tuple[str, ...]] = ("clip_l", "t5xxl")

    @classmethod
    def from_options(cls, options: Options) -> Flux:
        """The family as a training or caching script's options want it."""
        model, text, flux = options[ModelOptions], options[T5TextOptions], options[FluxOptions]
        return cls(
            FluxFiles(
                transformer=model.pretrained_model_name_or_path,
                clip_l=text.clip_l,
                t5xxl=text.t5xxl,
                ae=flux.ae,
                tokenizer_cache_dir=model.tokenizer_cache_dir,
                mmap=not model.disable_mmap_load_safetensors,
                t5_length=text.t5xxl_max_token_length,
                apply_t5_mask=text.apply_t5_attn_mask,
            ),
            flow_settings(options),
            flux.guidance_scale,
            options.given("guidance_scale") if options.has(OptimizerOptions) else None,
        )

    @classmethod
    def from_inference_options(cls, options: FluxInferenceOptions, extra: InferenceExtraOptions) -> Flux:
        """The family as the inference script's options want it."""
        return cls(
            FluxFiles(
                transformer=options.ckpt_path,
                clip_l=options.clip_l,
                t5xxl=options.t5xxl,
                ae=options.ae,
                transformer_option="--ckpt_path",
                tokenizer_cache_dir=extra.tokenizer_cache_dir,
                t5_length=extra.t5xxl_max_token_length,
                apply_t5_mask=options.apply_t5_attn_mask,
            )
        )

    # what the files are

    def findings(self) -> list[Finding]:
        """What is wrong with the model files named in the options, read from their headers only."""
        wanted = (
            (self.files.transformer, self.files.transformer_option, "flux"),
            (self.files.clip_l, "--clip_l", "clip_l"),
            (self.files.t5xxl, "--t5xxl", "t5xxl"),
            (self.files.ae, "--ae", "flux_ae"),
        )
        found: list[Finding] = []
        for path, option, kind in wanted:
            if path and not (unreadable := check_readable(path, option)):
                found += filter(None, [detect.check(path, option, kind)])
            elif path:
                found += unreadable
        if self.guidance_given is not None:
            found += self._training_findings(usable=bool(self.files.transformer) and not found)
        return found

    def _training_findings(self, *, usable: bool) -> list[Finding]:
        """What is wrong with settings of the training; `usable`: whether the transformer's header can be read."""
        if usable and self.embeds_guidance and not self.guidance_given:
            logger.info("--guidance_scale is 3.5 by default; 1.0 is the usual choice for training on FLUX.1-dev")
        found: list[Finding] = []
        if usable and self.guidance_given and not self.embeds_guidance:
            found.append(warning("it does nothing: this model has no guidance input", "--guidance_scale"))
        try:
            self.objective()
        except UserError as mistake:
            found.append(of_error(mistake, ""))
        return found

    @cached_property
    def embeds_guidance(self) -> bool:
        """Whether the model has a guidance input, as FLUX.1-dev has and FLUX.1-schnell has not."""
        names = loading.header_of(self.files.required("transformer"), "flux", self.files.transformer_option).tensors
        return any("guidance_in." in name or "guidance_embedder." in name for name in names)

    def part_shapes(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """Shapes of the tensors of the transformer and the text encoders, from the headers only."""
        return self._part_shapes

    @cached_property
    def _part_shapes(self) -> dict[str, dict[str, tuple[int, ...]]]:
        transformer = loading.flux_shapes(self.files.required("transformer"), self.files.transformer_option)
        return {"unet": transformer, **self._encoder_shapes()}

    def _encoder_shapes(self) -> dict[str, dict[str, tuple[int, ...]]]:
        return {
            name: loading.header_of(self.files.required(name), name, f"--{name}").shapes for name in self.encoder_names
        }

    def activations(self) -> FluxActivations:
        """What the transformer needs in memory beside its weights."""
        return FluxActivations(FluxConfig.from_shapes(self.part_shapes()[DENOISER]))

    def text_output_bytes(self) -> int:
        """Room on the disk that the text outputs of one caption need, at most; 0 without text encoders."""
        if not self.files.clip_l and not self.files.t5xxl:
            return 0
        shapes = self._encoder_shapes()
        t5_width = next(shape[1] for name, shape in shapes["t5xxl"].items() if name.endswith(T5_QUERY))
        clip_width = next(shape[1] for name, shape in shapes["clip_l"].items() if name.endswith(CLIP_POSITIONS))
        per_token = 4 * t5_width + 3 * 4 + 8  # output, position, mask
        return self.t5_length * per_token + 4 * clip_width + FILE_BYTES

    @property
    def t5_length(self) -> int:
        """Number of T5 tokens."""
        return self.files.t5_length or T5_LENGTH[self.embeds_guidance]

    @cached_property
    def clip_length(self) -> int:
        """Number of CLIP tokens."""
        tensors = loading.header_of(self.files.required("clip_l"), "clip_l", "--clip_l").tensors
        return next(info.shape[0] for name, info in tensors.items() if name.endswith(CLIP_POSITIONS))

    def architecture(self) -> str:
        """`modelspec.architecture` of the base model."""
        return "flux-1-dev" if self.embeds_guidance else "flux-1-schnell"

    def modelspec(self) -> dict[str, Any]:
        """See `Family.modelspec`."""
        return {}

    def sampling_shift(self) -> bool:
        """Whether the sampling schedule is shifted by the number of image tokens."""
        return self.embeds_guidance

    def train_at(self, resolutions: Sequence[Size], sizes: Collection[Size]) -> list[Finding]:
        """They are all the same to it."""
        return []

    def vary(self, cond: Cond, size: Size, draws: Draws) -> Cond:
        """Nothing is changed."""
        return cond

    def vae_identity(self) -> str:
        """Changes when the autoencoder changes."""
        return loading.fingerprint_of(self.files.required("ae"), "flux_ae", "--ae")

    def text_identity(self) -> str:
        """Changes when a text encoder, a tokenizer or an option that decides the text outputs changes."""
        parts = [
            *(loading.fingerprint_of(self.files.required(name), name, f"--{name}") for name in self.encoder_names),
            str(self.t5_length),
            str(self.files.apply_t5_mask),
            *(repr(sorted(tokenizer.get_vocab().items())) for tokenizer in self._tokenizers.values()),
        ]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def metadata(self) -> dict[str, object]:
        """FLUX's own `ss_*` values, names without the prefix."""
        settings = self.settings
        return {
            "apply_t5_attn_mask": self.files.apply_t5_mask,
            "weighting_scheme": settings.weighting_scheme,
            "logit_mean": settings.logit_mean,
            "logit_std": settings.logit_std,
            "mode_scale": settings.mode_scale,
            "guidance_scale": self.guidance,
            "timestep_sampling": settings.timestep_sampling,
            "sigmoid_scale": settings.sigmoid_scale,
            "model_prediction_type": settings.model_prediction_type,
            "discrete_flow_shift": settings.discrete_flow_shift,
        }

    # text

    def load_tokenizers(self) -> None:
        """Loads the tokenizers if there are text encoders. Errors: ResourceError when their files are nowhere."""
        if self.files.clip_l or self.files.t5xxl:
            _ = self._tokenizers

    @cached_property
    def _tokenizers(self) -> dict[str, Any]:
        cache, beside = self.files.tokenizer_cache_dir, (self.files.clip_l, self.files.t5xxl)
        return {
            "clip_l": load_tokenizer(CLIP_L, cache, beside),
            "t5xxl": load_tokenizer(T5_XXL, cache, beside),
        }

    def token_limits(self) -> dict[str, int]:
        """Longest token sequence by encoder name."""
        return {"clip_l": self.clip_length, "t5xxl": self.t5_length}

    def count_tokens(self, captions: Sequence[str]) -> dict[str, list[int]]:
        """Number of tokens of each caption, end mark included and nothing cut, by encoder name."""
        return {
            name: [len(ids) for ids in tokenizer(list(captions), verbose=False)["input_ids"]]
            for name, tokenizer in self._tokenizers.items()
        }

    def tokenize(self, captions: Sequence[str]) -> Tokens:
        """`clip_l` (B, 77), `t5xxl` and `t5_attn_mask` (B, L)."""

        def padded(name: str) -> Any:
            return self._tokenizers[name](
                list(captions),
                padding="max_length",
                truncation=True,
                max_length=self.token_limits()[name],
                return_tensors="pt",
            )

        t5_tokens = padded("t5xxl")
        return {
            "clip_l": padded("clip_l")["input_ids"],
            "t5xxl": t5_tokens["input_ids"],
            "t5_attn_mask": t5_tokens["attention_mask"],
        }

    def encode_text(self, encoders: Mapping[str, nn.Module], tokens: Tokens) -> Cond:
        """`l_pooled` (B, 768) from CLIP-L; `t5_out` (B, L, 4096), `txt_ids` (B, L, 3) and the masks from T5."""
        cond: Cond = {}
        if "clip_l" in encoders:
            eos = self._tokenizers["clip_l"].eos_token_id
            cond["l_pooled"] = clip.clip_pooled(encoders["clip_l"], tokens["clip_l"], eos)
        if "t5xxl" in encoders:
            mask = tokens["t5_attn_mask"]
            cond["t5_out"] = t5.t5_hidden(
                encoders["t5xxl"], tokens["t5xxl"], mask if self.files.apply_t5_mask else None
            )
            cond["txt_ids"] = text_ids(cond["t5_out"])
            cond["t5_attn_mask"] = mask
            cond["apply_t5_attn_mask"] = torch.full((len(mask),), self.files.apply_t5_mask, device=mask.device)
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
        load = {"clip_l": loading.load_clip, "t5xxl": loading.load_t5}
        return {
            name: loading.frozen(
                load[name](
                    self.files.required(name),
                    dtype=dtype,
                    device=device,
                    mmap=self.files.mmap,
                    option=f"--{name}",
                    finished=finished,
                    keep_float8=keep_float8,
                )
            )
            for name in self.encoder_names
            if name in names
        }

    # images

    def load_vae(self, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """The image autoencoder, frozen, in evaluation mode."""
        path = self.files.required("ae")
        return loading.frozen(
            loading.load_autoencoder(path, dtype=dtype, device=device, mmap=self.files.mmap, option="--ae")
        )

    def encode_images(self, vae: nn.Module, pixels: Tensor) -> Posterior:
        """The posterior of the latents (B, 16, h, w), shifted and scaled."""
        mean, deviation = autoencoder.encode(vae, pixels)
        return Posterior((mean - LATENT_SHIFT) * LATENT_SCALE, deviation * LATENT_SCALE)

    def decode_latents(self, vae: nn.Module, latents: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) in [-1, 1], float32."""
        return autoencoder.decode(vae, latents.float() / LATENT_SCALE + LATENT_SHIFT).float()

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
        return loading.load_flux(
            self.files.required("transformer"),
            dtype=dtype,
            device=device,
            mmap=self.files.mmap,
            option=self.files.transformer_option,
            finished=finished,
            keep_float8=keep_float8,
        ).eval()

    def unused_parameters(self) -> Mapping[str, Sequence[str]]:
        """None that anybody trains."""
        return {}

    def model_elements(self) -> int:
        """Those of the transformer."""
        return sum(map(math.prod, self.part_shapes()[DENOISER].values()))

    def model_extension(self, kind: str | None) -> str:
        """Always that of safetensors files."""
        return ".safetensors"

    def save_model(self, path: Path, parts: Mapping[str, nn.Module], saving: Saving) -> None:
        """Writes the transformer, each tensor converted when its turn comes."""
        tensors, joined = parts[DENOISER].state_dict(), Joined()
        joined.add(tensors, same(tensors), dtype=saving.dtype)
        joined.save_safetensors(path, saving.metadata)

    def objective(self) -> Flow:
        """Rectified flow."""
        return Flow(self.settings)

    def predict(
        self, denoiser: nn.Module, x: Tensor, timesteps: Tensor, cond: Cond, guidance: Tensor | None = None
    ) -> Tensor:
        """The velocity (B, 16, h, w) for noisy latents x at timesteps (B,) in [0, 1000]."""
        model = denoiser
        assert isinstance(model, FluxModel)
        stored = model.img_in.weight.dtype  # not of a block, so that it stays in the type to compute in
        dtype = stored if stored.itemsize > 1 else x.dtype  # of a file in eight bits autocast says what to compute in
        if guidance is None:
            guidance = torch.full_like(timesteps, self.guidance)
        velocity: Tensor = model(
            img=patchify(x).to(dtype),
            img_ids=image_ids(x),
            txt=cond["t5_out"].to(dtype),
            txt_ids=cond["txt_ids"],
            timesteps=timesteps / 1000,
            pooled=cond["l_pooled"].to(dtype),
            guidance=guidance if model.config.guidance else None,
            txt_mask=cond["t5_attn_mask"].bool() if self.files.apply_t5_mask else None,
        )
        return unpatchify(velocity, x.shape[-2], x.shape[-1])


def flow_settings(options: Options) -> FlowSettings:
    """The objective's settings from the option groups."""
    flux, density, loss, noise = (
        options[FluxOptions],
        options[FlowDensityOptions],
        options[LossOptions],
        options[NoiseOptions],
    )
    return FlowSettings(
        timestep_sampling=flux.timestep_sampling,
        sigmoid_scale=flux.sigmoid_scale,
        discrete_flow_shift=flux.discrete_flow_shift,
        model_prediction_type=flux.model_prediction_type,
        weighting_scheme=density.weighting_scheme,
        logit_mean=density.logit_mean,
        logit_std=density.logit_std,
        mode_scale=density.mode_scale,
        loss_type=loss.loss_type,
        huber_schedule=loss.huber_schedule,
        huber_c=loss.huber_c,
        huber_scale=loss.huber_scale,
        min_timestep=noise.min_timestep,
        max_timestep=noise.max_timestep,
        ip_noise_gamma=noise.ip_noise_gamma,
        ip_noise_gamma_random_strength=noise.ip_noise_gamma_random_strength,
        masked_loss_normalize=loss.masked_loss_normalize,
    )
