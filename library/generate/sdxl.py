"""Image generation with SDXL for `sdxl_minimal_inference.py`."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from library import devices, findings
from library.epsilon import EpsilonSettings
from library.families.sdxl import Sdxl
from library.generate.painter import VAE, LoraFile, Plugin, idle_in_session, idle_networks
from library.generate.running import run
from library.log import get_logger
from library.models import quantized
from library.models.checkpoints_sd import find_checkpoint, stated_prediction
from library.option_groups import SdxlInferenceOptions
from library.places import check_writable
from library.sampling import SampleRequest
from library.types import DENOISER, Finding

if TYPE_CHECKING:
    from library.options import Options

logger = get_logger(__name__)

NETWORKS = "networks.lora"
"""The module that reads network files for Stable Diffusion."""


def generate(options: Options) -> None:
    """Makes the images that the inference script's options ask for."""
    group = options[SdxlInferenceOptions]
    loras = [LoraFile.parse(text) for text in group.lora_weights]
    found = [
        *check_writable(Path(group.output_dir), "--output_dir"),
        *(line for lora in loras for line in lora.findings()),
    ]
    findings.report(found)
    family = Sdxl.from_inference_options(group, settings_of(group))
    findings.report([*family.findings(), *_idle(options)])
    family.load_tokenizers()
    run(group, family, types_of(group, family.encoder_names), plugin_of, loras, request_of(group))


def plugin_of(weights: Mapping[str, Tensor]) -> Plugin:
    """The network module for a file: there is one for all."""
    return cast(Plugin, importlib.import_module(NETWORKS))


def request_of(group: SdxlInferenceOptions) -> SampleRequest:
    """The image that the options ask for."""
    return SampleRequest(
        prompt=group.prompt,
        prompt2=group.prompt2,
        negative_prompt=group.negative_prompt,
        width=group.width,
        height=group.height,
        seed=group.seed,
        steps=group.steps,
        guidance=None,
        cfg=group.cfg_scale,
        sampler=group.sampler,
    )


def settings_of(group: SdxlInferenceOptions) -> EpsilonSettings:
    """What the model predicts: what the options say, else what the model says of itself.

    Errors: DataError when the model can't be read or is something else.
    """
    stated = stated_prediction(find_checkpoint(group.ckpt_path, "sdxl", "--ckpt_path"))
    velocity = group.v_parameterization or stated.kind == "v"
    zero = group.zero_terminal_snr or bool(stated.zero_terminal)
    if velocity and not group.v_parameterization:
        ending = " and was trained down to pure noise" if stated.zero_terminal else ""
        logger.info("the model predicts velocity%s, as %s says", ending, stated.said_by)
    return EpsilonSettings(v_parameterization=velocity, zero_terminal_snr=zero)


def types_of(group: SdxlInferenceOptions, encoder_names: tuple[str, ...]) -> dict[str, torch.dtype]:
    """Types of the parts. Errors: UserError for an unknown type."""
    dtype = devices.dtype_of(group.dtype, "--dtype")
    if group.vae_dtype is not None:
        vae = devices.dtype_of(group.vae_dtype, "--vae_dtype")
    else:
        vae = torch.float32 if dtype == torch.float16 else dtype
    return {**dict.fromkeys((*encoder_names, DENOISER), dtype), VAE: vae}


def _idle(options: Options) -> Iterator[Finding]:
    """A warning for each option that does nothing beside the others."""
    group = options[SdxlInferenceOptions]
    if group.cfg_scale == 1.0 and group.negative_prompt and not group.interactive:
        yield findings.warning("it does nothing without --cfg_scale above 1", "--negative_prompt")
    yield from idle_networks(group.merge_lora_weights, group.lora_weights)
    if group.vae_dtype is not None and quantized.is_float8(devices.dtype_of(group.vae_dtype, "--vae_dtype")):
        yield findings.warning("fp8 is for the other parts: the autoencoder is kept in bfloat16", "--vae_dtype")
    if group.interactive:
        yield from idle_in_session(options.given, ("prompt", "prompt2", "negative_prompt", "seed"))
