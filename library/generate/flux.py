"""Image generation with FLUX.1 for `flux_minimal_inference.py`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch

from library import devices, findings
from library.families.flux import Flux
from library.generate.painter import VAE, LoraFile, Plugin, idle_in_session, idle_networks
from library.generate.running import run
from library.models import quantized
from library.option_groups import FluxInferenceOptions, InferenceExtraOptions
from library.places import check_writable
from library.sampling import SampleRequest
from library.types import DENOISER, Finding
from networks import lora_flux, oft_flux

if TYPE_CHECKING:
    from library.options import Options

STEPS = {True: 50, False: 4}
"""Default number of steps, by whether the model embeds guidance (dev) or not (schnell)."""


@dataclass(frozen=True)
class Dtypes:
    """Types of the parts."""

    clip_l: torch.dtype
    t5xxl: torch.dtype
    ae: torch.dtype
    flux: torch.dtype

    @classmethod
    def from_options(cls, options: FluxInferenceOptions) -> Dtypes:
        """Each part's own option, else `--dtype`. Errors: UserError for an unknown type."""

        def of(part: str) -> torch.dtype:
            option = f"{part}_dtype" if getattr(options, f"{part}_dtype") else "dtype"
            return devices.dtype_of(getattr(options, option), f"--{option}")

        return cls(of("clip_l"), of("t5xxl"), of("ae"), of("flux"))

    def by_part(self) -> dict[str, torch.dtype]:
        """The same under the names of the parts."""
        return {"clip_l": self.clip_l, "t5xxl": self.t5xxl, VAE: self.ae, DENOISER: self.flux}


def plugin_of(weights: Iterable[str]) -> Plugin:
    """The network module for a file with tensors of these names."""
    found = oft_flux if any(name.startswith("oft_unet_") for name in weights) else lora_flux
    return cast("Plugin", found)


def generate(options: Options) -> None:
    """Makes the images that the inference script's options ask for."""
    group, extra = options[FluxInferenceOptions], options[InferenceExtraOptions]
    family = Flux.from_inference_options(group, extra)
    loras = [LoraFile.parse(text) for text in group.lora_weights]
    findings.report([*_check_files(group, loras), *family.findings()])
    dtypes = Dtypes.from_options(group)
    findings.report(_idle(options, family, dtypes))
    family.load_tokenizers()
    first = SampleRequest(
        prompt=group.prompt,
        negative_prompt=group.negative_prompt,
        width=group.width,
        height=group.height,
        seed=group.seed,
        steps=group.steps or STEPS[family.embeds_guidance],
        guidance=group.guidance,
        cfg=1.0 if group.negative_prompt is None else group.cfg_scale,
    )
    run(group, family, dtypes.by_part(), plugin_of, loras, first)


def _check_files(group: FluxInferenceOptions, loras: Sequence[LoraFile]) -> Iterator[Finding]:
    """What is wrong with the files and folders besides those of the model itself."""
    for name in ("clip_l", "t5xxl", "ae"):
        if not getattr(group, name):
            yield findings.error("a model file is missing", f"--{name}", f"give --{name} FILE", "E-MODEL-NONE")
    yield from check_writable(Path(group.output_dir), "--output_dir")
    for lora in loras:
        yield from lora.findings()


def _idle(options: Options, family: Flux, dtypes: Dtypes) -> Iterator[Finding]:
    """A warning for each option that does nothing beside the others, or with this model."""
    group = options[FluxInferenceOptions]
    if group.cfg_scale != 1.0 and group.negative_prompt is None and not group.interactive:
        yield findings.warning("it does nothing without --negative_prompt", "--cfg_scale", "an empty one will do")
    if group.cfg_scale == 1.0 and group.negative_prompt and not group.interactive:
        yield findings.warning("it does nothing without --cfg_scale above 1", "--negative_prompt")
    yield from idle_networks(group.merge_lora_weights, group.lora_weights)
    if options.given("guidance") and not family.embeds_guidance:
        yield findings.warning("it does nothing: this model has no guidance input", "--guidance")
    if quantized.is_float8(dtypes.ae):
        yield findings.warning("fp8 is for the other parts: the autoencoder is kept in bfloat16", "--ae_dtype")
    if group.interactive:
        yield from idle_in_session(options.given, ("prompt", "negative_prompt", "seed"))
