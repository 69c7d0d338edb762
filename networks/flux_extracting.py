"""A LoRA from the difference of two FLUX.1 transformers."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

from library import devices
from library.log import DataError, get_logger
from library.option_groups import FluxExtractLoraOptions
from library.progress import Progress
from library.types import DENOISER
from networks import algebra, merging, places, results
from networks.algebra import LowRank
from networks.flux_files import ModelFile, input_files, modelspec, opened_model
from networks.places import Place
from networks.reading import Rank
from networks.report import Report

logger = get_logger(__name__)

BLOCKS = re.compile(r"lora_unet_(double|single)_blocks_\d+_.+")
"""Modules that a LoRA has by default, and so those that are looked at."""


def extract(options: FluxExtractLoraOptions) -> None:
    """What `networks/flux_extract_lora.py` does. Errors: UserError, DataError; nothing is written then."""
    inputs = [
        file
        for name, path in (("--model_org", options.model_org), ("--model_tuned", options.model_tuned))
        for file in input_files(path, "flux", name)
    ]
    path = results.check_output(options.save_to, inputs, overwrite=options.overwrite)
    dtype = results.PRECISIONS[options.save_precision or "float"]
    device = devices.device_of(options.device, "--device")
    with (
        opened_model(options.model_org, "flux", "--model_org") as original,
        opened_model(options.model_tuned, "flux", "--model_tuned") as tuned,
    ):
        modules = _factors(original, tuned, options, device)
    if not modules:
        what = "the two models don't differ in any layer of their blocks"
        raise DataError(what, options.model_tuned, "check --model_org and --model_tuned", code="E-MERGE-NOTHING")
    sizes = [Rank(module.rank, module.alpha) for module in modules.values()]
    values = results.network_metadata({}, sizes, module="networks.lora_flux", base_model_version="flux1")
    if not options.no_metadata:
        values |= modelspec(original.architecture, "lora", path)
    tensors = {
        f"{name}.{key}": tensor
        for name, module in modules.items()
        for key, tensor in module.file_tensors(dtype).items()
    }
    results.save_network(tensors, path, values)


def _factors(
    original: ModelFile, tuned: ModelFile, options: FluxExtractLoraOptions, device: torch.device
) -> dict[str, LowRank]:
    """The modules that differ, as LoRA; logs what was found and left out."""
    found: dict[str, LowRank] = {}
    report, worst = Report("extracted"), (0.0, "")
    wanted = _places(original)
    changes = merging.differences(original.tensors, tuned.tensors, wanted, _places(tuned), device=device)
    with Progress("extracting", len(wanted), "layers") as bar:
        for name, delta in changes:
            norm = float(torch.linalg.vector_norm(delta))
            if norm:
                report.add(options.model_tuned, name, DENOISER, norm)
                found[name], error = algebra.nearest_to(
                    delta, options.dim, clamp_quantile=options.clamp_quantile, exact=options.exact
                )
                worst = max(worst, (error, name))
            bar.advance()
    for line in report.lines():
        logger.info("%s", line)
    if found:
        part, name = worst
        logger.info("rank %d leaves out up to %.1f%% of the change of a layer (%s)", options.dim, 100 * part, name)
    return found


def _places(model: ModelFile) -> Mapping[str, Place]:
    return {name: place for name, place in places.flux_places(model.shapes).items() if BLOCKS.fullmatch(name)}
