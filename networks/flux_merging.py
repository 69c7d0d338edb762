"""Merging of networks into FLUX.1 and its text encoders, and with each other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from library import devices
from library.log import DataError, UserError, get_logger
from library.option_groups import FluxMergeLoraOptions
from networks import places, results, sums
from networks.adapter_file import AdapterFile, same_family
from networks.base import encoder_component
from networks.flux_files import DEV, ModelFile, input_files, modelspec, open_network, opened_model, title_of
from networks.merging import Merged, Source
from networks.reading import Rank

logger = get_logger(__name__)


@dataclass(frozen=True)
class Part:
    """A part of the model that networks can be merged into."""

    option: str
    output: str
    """The option for the result."""
    role: str
    """A key of `detect.ROLES`."""
    beginnings: tuple[str, ...]
    """Of the names of its modules."""

    def places(self, shapes: places.Shapes) -> places.Places:
        """Where its modules lie."""
        if self.role == "flux":
            return places.flux_places(shapes)
        if self.role == "clip_l":
            return places.clip_places(shapes, "lora_te1", encoder_component(0))
        return places.t5_places(shapes)


PARTS = (
    Part("clip_l", "clip_l_save_to", "clip_l", ("lora_te1_",)),
    Part("t5xxl", "t5xxl_save_to", "t5xxl", ("lora_te3_",)),
    Part("flux_model", "save_to", "flux", ("lora_unet_",)),
)
"""In the order in which they are merged: what is quick to fail comes first."""


@dataclass(frozen=True)
class Job:
    """One part, its file and its result."""

    part: Part
    model: str
    output: Path


def merge(options: FluxMergeLoraOptions) -> None:
    """What `networks/flux_merge_lora.py` does.

    Errors: UserError and DataError before anything is written; what was written goes when something fails later.
    """
    ratios = _ratios(options)
    jobs = _jobs(options)
    path = _output(options) if not jobs else None
    dtype = devices.dtype_of(options.save_precision, "--save_precision") if options.save_precision else None
    loading = devices.device_of(options.loading_device, "--loading_device")
    working = devices.device_of(options.working_device, "--working_device")
    networks = [open_network(path, loading) for path in options.models or ()]
    if path is None:
        merge_into_models(jobs, networks, ratios, dtype=dtype, device=working, with_metadata=not options.no_metadata)
        return
    _merge_networks(options, networks, ratios, path, dtype)


def _output(options: FluxMergeLoraOptions) -> Path:
    return results.check_output(options.save_to, options.models or (), overwrite=options.overwrite)


def _ratios(options: FluxMergeLoraOptions) -> Sequence[float]:
    """Errors: UserError when there are no networks, or not as many ratios."""
    if not options.models:
        raise UserError("no network to merge", "--models", "give one file or more")
    if options.ratios is not None and len(options.ratios) != len(options.models):
        what = f"{len(options.ratios)} ratios for {len(options.models)} networks"
        raise UserError(what, "--ratios", "give one for each of --models, in their order")
    return options.ratios or [1.0] * len(options.models)


def _jobs(options: FluxMergeLoraOptions) -> list[Job]:
    """The models to merge into; none: the networks are merged with each other. Errors: UserError."""
    jobs = []
    for part in PARTS:
        model, output = getattr(options, part.option), getattr(options, part.output)
        if model is None and output and part.output != "save_to":
            raise UserError("there is no model for this result", f"--{part.output}", f"give --{part.option}, too")
        if model is not None:
            inputs = [*(options.models or ()), *_model_files(options)]
            checked = results.check_output(output, inputs, overwrite=options.overwrite, option=f"--{part.output}")
            jobs.append(Job(part, model, checked))
    if jobs and options.save_to and options.flux_model is None:
        raise UserError("there is no model for this result", "--save_to", "give --flux_model, too")
    if len({job.output.resolve() for job in jobs}) < len(jobs):
        raise UserError("two results would go to one file", "--save_to", "give each a file of its own")
    for name in ("concat", "shuffle"):
        if jobs and getattr(options, name):
            logger.warning("--%s has no effect: it is for merging networks with each other", name)
    return jobs


def _model_files(options: FluxMergeLoraOptions) -> Iterator[str]:
    """Errors: DataError for a model that isn't there."""
    for part in PARTS:
        if (model := getattr(options, part.option)) is not None:
            yield from input_files(model, part.role, f"--{part.option}")


# into models


def merge_into_models(
    jobs: Sequence[Job],
    networks: Sequence[AdapterFile],
    ratios: Sequence[float],
    *,
    dtype: torch.dtype | None,
    device: torch.device,
    with_metadata: bool,
) -> None:
    """Merges the networks into each model, tensor by tensor. Errors: DataError; no result is left then."""
    for network in networks:
        _check(network, jobs)
    with ExitStack() as stack:
        merged = []
        for job in jobs:
            model = stack.enter_context(opened_model(job.model, job.part.role, f"--{job.part.option}"))
            sources = [
                Source(network.only(own), ratio)
                for network, ratio in zip(networks, ratios, strict=True)
                if (own := [name for name in network if name.startswith(job.part.beginnings)])
            ]
            if not sources:
                what, where = "no network has anything for this model", f"--{job.part.option} {job.model}"
                raise DataError(what, where, f"leave --{job.part.option} out", code="E-MERGE-NOTHING")
            merged.append((job, model, _merged(job, model, sources, dtype, device)))
        with _all_or_none() as written:
            for job, model, result in merged:
                result.save(job.output, _metadata_of(job, model, networks, with_metadata))
                written.append(job.output)


def _merged(
    job: Job, model: ModelFile, sources: Sequence[Source], dtype: torch.dtype | None, device: torch.device
) -> Merged:
    return Merged(
        model.tensors,
        job.part.places(model.shapes),
        sources,
        dtype=dtype or model.dtype,
        shapes=model.shapes,
        device=device,
        progress=f"merging into {Path(job.model).name}",
        where=f"--{job.part.option} {job.model}",
    )


def _check(network: AdapterFile, jobs: Sequence[Job]) -> None:
    """Refuses values that aren't finite, and warns of modules for parts that aren't given. Errors: DataError."""
    for module in network:
        _ = network[module]
    given = {job.part for job in jobs}
    for part in PARTS:
        left = [name for name in network if name.startswith(part.beginnings)]
        if part not in given and left:
            logger.warning("%s: %d modules are left out: --%s isn't given", network.path, len(left), part.option)
    known = tuple(beginning for part in PARTS for beginning in part.beginnings)
    unknown = [name for name in network if not name.startswith(known)]
    if unknown or network.keys_left:
        names = [*unknown, *network.keys_left]
        what = (
            f"{len(names)} modules match nothing in FLUX.1, such as {', '.join(names[:3])}: it is for {network.family}"
        )
        raise DataError(what, network.path, "use a network for FLUX.1", code="E-MERGE-MISFIT")


def _metadata_of(job: Job, model: ModelFile, networks: Sequence[AdapterFile], with_metadata: bool) -> dict[str, str]:
    if not with_metadata or job.part.role != "flux":
        return {name: value for name, value in model.metadata.items() if with_metadata or name == "format"}
    titles = [Path(job.model).stem, *(title_of(network) for network in networks)]
    return {**model.metadata, **modelspec(model.architecture, "", job.output, titles)}


@contextmanager
def _all_or_none() -> Iterator[list[Path]]:
    """Takes note of files that were written, and removes them when something fails."""
    written: list[Path] = []
    try:
        yield written
    except BaseException:
        for path in written:
            path.unlink(missing_ok=True)
        raise


# with each other


def _merge_networks(
    options: FluxMergeLoraOptions,
    networks: Sequence[AdapterFile],
    ratios: Sequence[float],
    path: Path,
    dtype: torch.dtype | None,
) -> None:
    family = same_family(networks)
    if family not in ("FLUX", "text encoders only"):
        raise DataError(
            f"these are for {family}", networks[0].path, "use networks/merge_lora.py", code="E-ADAPTER-FAMILY"
        )
    if not options.concat:
        logger.warning("matrices are added, which isn't the exact sum of the networks; --concat is, at a higher rank")
    sources = [Source(network, ratio) for network, ratio in zip(networks, ratios, strict=True)]
    modules = sums.merged(sources, sums.concatenated if options.concat else sums.added, shuffle=options.shuffle)
    kept = dtype or networks[0].dtype()
    tensors = {
        f"{name}.{key}": tensor for name, module in modules.items() for key, tensor in module.file_tensors(kept).items()
    }
    sizes = [Rank(module.rank, module.alpha) for module in modules.values()]
    values = results.network_metadata(
        networks[0].metadata, sizes, module="networks.lora_flux", base_model_version="flux1"
    )
    if not options.no_metadata:
        architecture = networks[0].metadata.get("modelspec.architecture", DEV).partition("/")[0]
        values |= modelspec(architecture, "lora", path, [title_of(network) for network in networks])
    results.save_network(tensors, path, values)
    logger.info("%s: %d modules", path, len(modules))
