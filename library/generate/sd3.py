"""Image generation with SD3 and SD3.5 for `sd3_minimal_inference.py`."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from library import devices, findings
from library.families.sd3 import Sd3
from library.generate.painter import VAE, LoraFile, Plugin, idle_in_session, idle_networks, misfits
from library.generate.running import run
from library.log import UserError
from library.models import attention, quantized
from library.models.keymaps_sd3 import ENCODERS, T5
from library.option_groups import Sd3InferenceOptions
from library.places import check_writable
from library.sampling import SampleRequest
from library.types import DENOISER, Finding, errors

if TYPE_CHECKING:
    from library.options import Options

NETWORKS = "networks.lora_sd3"
"""The module that reads network files for SD3, whatever kind they are of."""
OWN_TYPES = {DENOISER: "mmdit_dtype", T5: "t5xxl_dtype", VAE: "vae_dtype"}
"""Parts whose type has an option."""
OF_T5 = ("t5xxl", "t5xxl_token_length", "t5xxl_dtype", "apply_t5_attn_mask")


def generate(options: Options) -> None:
    """Makes the images that the inference script's options ask for."""
    group = options[Sd3InferenceOptions]
    types = types_of(group)
    attention.use(group.attn_mode)
    family = Sd3.from_inference_options(group)
    loras = [LoraFile.parse(text) for text in group.lora_weights]
    findings.report(_wrong(group, family, loras))
    findings.report(_idle(options, family, types))
    family.load_tokenizers()
    run(group, family, types, plugin_of, loras, request_of(group))


def plugin_of(weights: Mapping[str, Tensor]) -> Plugin:
    """The network module for a file: there is one for all."""
    return cast(Plugin, importlib.import_module(NETWORKS))


def request_of(group: Sd3InferenceOptions) -> SampleRequest:
    """The image that the options ask for."""
    return SampleRequest(
        prompt=group.prompt,
        negative_prompt=group.negative_prompt,
        width=group.width,
        height=group.height,
        seed=group.seed,
        steps=group.steps,
        guidance=None,
        cfg=group.cfg_scale,
    )


def types_of(group: Sd3InferenceOptions) -> dict[str, torch.dtype]:
    """Types of the parts, of all encoders that there may be. Errors: UserError for two types, or an unknown one."""
    if group.fp16 and group.bf16:
        raise UserError("--fp16 and --bf16 contradict each other", "--fp16", "leave one of them out", code="E-CHECK")
    dtype = torch.float16 if group.fp16 else torch.bfloat16 if group.bf16 else torch.float32
    types = {**dict.fromkeys((*ENCODERS, DENOISER), dtype), VAE: torch.float32 if group.fp16 else dtype}
    for part, option in OWN_TYPES.items():
        if name := getattr(group, option):
            types[part] = devices.dtype_of(name, f"--{option}")
    return types


def _wrong(group: Sd3InferenceOptions, family: Sd3, loras: Sequence[LoraFile]) -> list[Finding]:
    """What is wrong with the files and folders."""
    found = [
        *check_writable(Path(group.output_dir), "--output_dir"),
        *(line for lora in loras for line in lora.findings()),
        *family.findings(),
    ]
    if errors(found):
        return found
    return [*found, *_too_large(group, family), *misfits(loras, plugin_of, family.encoder_names, family.outline)]


def _too_large(group: Sd3InferenceOptions, family: Sd3) -> Iterator[Finding]:
    """A mistake where the model has no positions for so large an image."""
    most = family.config.table_side * family.traits.latent_stride * family.traits.patch
    for name in ("width", "height"):
        if getattr(group, name) > most:
            yield findings.error(
                "the model has no positions for that", f"--{name}", f"give {most} or less", "E-MODEL-SIZE"
            )


def _idle(options: Options, family: Sd3, types: Mapping[str, torch.dtype]) -> Iterator[Finding]:
    """A warning for each option that does nothing beside the others, or with this model."""
    group = options[Sd3InferenceOptions]
    if group.cfg_scale == 1.0 and group.negative_prompt and not group.interactive:
        yield findings.warning("it does nothing without --cfg_scale above 1", "--negative_prompt")
    yield from idle_networks(group.merge_lora_weights, group.lora_weights)
    if quantized.is_float8(types[VAE]):
        yield findings.warning("fp8 is for the other parts: the autoencoder is kept in bfloat16", "--vae_dtype")
    if T5 not in family.encoder_names:
        for name in filter(options.given, OF_T5):
            yield findings.warning("it does nothing: T5 isn't used", f"--{name}")
    if group.interactive:
        yield from idle_in_session(options.given, ("prompt", "negative_prompt", "seed"))
