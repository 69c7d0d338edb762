"""A LoRA from the difference of two transformers, of FLUX.1 or SD3."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from library import devices
from library.log import DataError, get_logger
from library.option_groups import FluxExtractLoraOptions, Sd3ExtractLoraOptions
from library.progress import Progress
from library.types import DENOISER
from networks import algebra, merging, results
from networks.algebra import LowRank
from networks.model_files import ModelFile, ToolFamily, input_files, modelspec, opened_model
from networks.places import Place
from networks.reading import Rank
from networks.report import Report

logger = get_logger(__name__)

ExtractOptions = FluxExtractLoraOptions | Sd3ExtractLoraOptions


def extract(family: ToolFamily, options: ExtractOptions) -> None:
    """What `networks/flux_extract_lora.py` and `networks/sd3_extract_lora.py` do.

    Errors: UserError, DataError; nothing is written then.
    """
    inputs = [
        file
        for name, path in (("--model_org", options.model_org), ("--model_tuned", options.model_tuned))
        for file in input_files(path, family.role, name)
    ]
    path = results.check_output(options.save_to, inputs, overwrite=options.overwrite)
    dtype = results.PRECISIONS[options.save_precision or "float"]
    device = devices.device_of(options.device, "--device")
    with (
        opened_model(options.model_org, family.role, "--model_org") as original,
        opened_model(options.model_tuned, family.role, "--model_tuned") as tuned,
    ):
        architecture = family.architecture(original.shapes)
        modules = _factors(family, original, tuned, options, device)
    if not modules:
        what = "the two models don't differ in any layer of their blocks"
        raise DataError(what, options.model_tuned, "check --model_org and --model_tuned", code="E-MERGE-NOTHING")
    sizes = [Rank(module.rank, module.alpha) for module in modules.values()]
    base = family.base_version(architecture)
    values = results.network_metadata({}, sizes, module=family.module, base_model_version=base)
    if not options.no_metadata:
        values |= modelspec(architecture, "lora", path)
    tensors = {
        f"{name}.{key}": tensor
        for name, module in modules.items()
        for key, tensor in module.file_tensors(dtype).items()
    }
    results.save_network(tensors, path, values)


def _factors(
    family: ToolFamily, original: ModelFile, tuned: ModelFile, options: ExtractOptions, device: torch.device
) -> dict[str, LowRank]:
    """The modules that differ, as LoRA; logs what was found and left out."""
    found: dict[str, LowRank] = {}
    report, worst = Report("extracted"), (0.0, "")
    wanted = _places(family, original)
    changes = merging.differences(original.tensors, tuned.tensors, wanted, _places(family, tuned), device=device)
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


def _places(family: ToolFamily, model: ModelFile) -> Mapping[str, Place]:
    return {name: place for name, place in family.places(model.shapes).items() if family.blocks.fullmatch(name)}
