"""Merging of networks into a transformer such as FLUX.1 and its text encoders, and with each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from library import devices
from library.log import DataError, UserError, get_logger
from library.option_groups import FluxMergeLoraOptions, Sd3MergeLoraOptions
from networks import results, sums
from networks.adapter_file import AdapterFile, same_family
from networks.merging import Merged, Source
from networks.model_files import ModelFile, ToolFamily, input_files, modelspec, opened_model, title_of
from networks.places import Places, Shapes
from networks.reading import MERGE_TOOLS, Rank

logger = get_logger(__name__)

MergeOptions = FluxMergeLoraOptions | Sd3MergeLoraOptions


@dataclass(frozen=True)
class Part:
    """A part of a model that networks can be merged into."""

    option: str
    """That names its file."""
    output: str
    """The option for the result."""
    role: str
    """A key of `detect.ROLES`."""
    beginning: str
    """Of the names of its modules."""
    places: Callable[[Shapes], Places]
    """Where its modules lie."""
    inside: tuple[str, ...] = ()
    """Beginnings of names of modules of other parts, which may lie in the same file."""


@dataclass(frozen=True)
class MergeFamily:
    """A family, and its parts."""

    family: ToolFamily
    parts: tuple[Part, ...]
    """In the order in which they are merged: what is quick to fail comes first, the transformer last."""


@dataclass(frozen=True)
class Job:
    """One part, its file and its result."""

    part: Part
    model: str
    output: Path

    @property
    def where(self) -> str:
        """For messages."""
        return f"--{self.part.option} {self.model}"


@dataclass(frozen=True)
class Opened:
    """A job with its model."""

    job: Job
    model: ModelFile
    places: Places

    @property
    def beginnings(self) -> tuple[str, ...]:
        """Of the names of the modules that are in it."""
        part = self.job.part
        others = [start for start in part.inside if any(name.startswith(start) for name in self.places)]
        return (part.beginning, *others)


def merge(family: MergeFamily, options: MergeOptions) -> None:
    """What `networks/flux_merge_lora.py` and `networks/sd3_merge_lora.py` do.

    Errors: UserError and DataError before anything is written; what was written goes when something fails later.
    """
    ratios = _ratios(options)
    jobs = _jobs(family, options)
    path = None if jobs else _output(options)
    dtype = devices.dtype_of(options.save_precision, "--save_precision") if options.save_precision else None
    loading = devices.device_of(options.loading_device, "--loading_device")
    working = devices.device_of(options.working_device, "--working_device")
    networks = [family.family.open_network(network, loading) for network in options.models or ()]
    sources = [Source(network, ratio) for network, ratio in zip(networks, ratios, strict=True)]
    if path is None:
        merge_into_models(family, jobs, sources, dtype=dtype, device=working, with_metadata=not options.no_metadata)
        return
    _merge_networks(family, options, sources, path, dtype)


def _output(options: MergeOptions) -> Path:
    return results.check_output(options.save_to, options.models or (), overwrite=options.overwrite)


def _ratios(options: MergeOptions) -> Sequence[float]:
    """Errors: UserError when there are no networks, or not as many ratios."""
    if not options.models:
        raise UserError("no network to merge", "--models", "give one file or more")
    if options.ratios is not None and len(options.ratios) != len(options.models):
        what = f"{len(options.ratios)} ratios for {len(options.models)} networks"
        raise UserError(what, "--ratios", "give one for each of --models, in their order")
    return options.ratios or [1.0] * len(options.models)


def _jobs(family: MergeFamily, options: MergeOptions) -> list[Job]:
    """The models to merge into; none: the networks are merged with each other. Errors: UserError."""
    jobs = []
    main = family.parts[-1]
    for part in family.parts:
        model, output = getattr(options, part.option), getattr(options, part.output)
        if model is None and output and part is not main:
            raise UserError("there is no model for this result", f"--{part.output}", f"give --{part.option}, too")
        if model is not None:
            inputs = [*(options.models or ()), *_model_files(family, options)]
            checked = results.check_output(output, inputs, overwrite=options.overwrite, option=f"--{part.output}")
            jobs.append(Job(part, model, checked))
    if jobs and options.save_to and getattr(options, main.option) is None:
        raise UserError("there is no model for this result", "--save_to", f"give --{main.option}, too")
    if len({job.output.resolve() for job in jobs}) < len(jobs):
        raise UserError("two results would go to one file", "--save_to", "give each a file of its own")
    for name in ("concat", "shuffle"):
        if jobs and getattr(options, name):
            logger.warning("--%s has no effect: it is for merging networks with each other", name)
    return jobs


def _model_files(family: MergeFamily, options: MergeOptions) -> Iterator[str]:
    """Errors: DataError for a model that isn't there."""
    for part in family.parts:
        if (model := getattr(options, part.option)) is not None:
            yield from input_files(model, part.role, f"--{part.option}")


# into models


def merge_into_models(
    family: MergeFamily,
    jobs: Sequence[Job],
    sources: Sequence[Source],
    *,
    dtype: torch.dtype | None,
    device: torch.device,
    with_metadata: bool,
) -> None:
    """Merges the networks into each model, tensor by tensor. Errors: DataError; no result is left then."""
    for source in sources:
        _check(family, source.file)
    networks = [source.file for source in sources]
    with ExitStack() as stack:
        opened = [_opened(job, stack) for job in jobs]
        _warn_of_left(family, networks, opened)
        merged = [(one, _merged(one, sources, dtype, device)) for one in opened]
        with _all_or_none() as written:
            for one, result in merged:
                result.save(one.job.output, _metadata_of(family, one, networks, with_metadata))
                written.append(one.job.output)


def _opened(job: Job, stack: ExitStack) -> Opened:
    model = stack.enter_context(opened_model(job.model, job.part.role, f"--{job.part.option}"))
    return Opened(job, model, job.part.places(model.shapes))


def _merged(one: Opened, sources: Sequence[Source], dtype: torch.dtype | None, device: torch.device) -> Merged:
    """Errors: DataError when no network has anything for the model, or something doesn't fit."""
    found = [
        Source(source.file.only(own), source.ratio)
        for source in sources
        if (own := [name for name in source.file if name.startswith(one.beginnings)])
    ]
    if not found:
        what, hint = "no network has anything for this model", f"leave --{one.job.part.option} out"
        raise DataError(what, one.job.where, hint, code="E-MERGE-NOTHING")
    return Merged(
        one.model.tensors,
        one.places,
        found,
        dtype=dtype or one.model.dtype,
        shapes=one.model.shapes,
        device=device,
        progress=f"merging into {Path(one.job.model).name}",
        where=one.job.where,
    )


def _check(family: MergeFamily, network: AdapterFile) -> None:
    """Errors: DataError for values that aren't finite, and for modules that no part of the family has."""
    for module in network:
        _ = network[module]
    known = tuple(part.beginning for part in family.parts)
    unknown = [name for name in network if not name.startswith(known)]
    if unknown or network.keys_left:
        names, title = [*unknown, *network.keys_left], family.family.title
        some = ", ".join(names[:3])
        what = f"{len(names)} modules match nothing in {title}, such as {some}: it is for {network.family}"
        raise DataError(what, network.path, f"use a network for {title}", code="E-MERGE-MISFIT")


def _warn_of_left(family: MergeFamily, networks: Sequence[AdapterFile], opened: Sequence[Opened]) -> None:
    """Warns of modules for parts that aren't given."""
    there = {beginning for one in opened for beginning in one.beginnings}
    for network in networks:
        for part in family.parts:
            left = [name for name in network if name.startswith(part.beginning)]
            if left and part.beginning not in there:
                logger.warning("%s: %d modules are left out: --%s isn't given", network.path, len(left), part.option)


def _metadata_of(
    family: MergeFamily, one: Opened, networks: Sequence[AdapterFile], with_metadata: bool
) -> dict[str, str]:
    model, job = one.model, one.job
    if not with_metadata or job.part.role != family.family.role:
        return {name: value for name, value in model.metadata.items() if with_metadata or name == "format"}
    titles = [Path(job.model).stem, *(title_of(network) for network in networks)]
    return {**model.metadata, **modelspec(family.family.architecture(model.shapes), "", job.output, titles)}


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
    family: MergeFamily, options: MergeOptions, sources: Sequence[Source], path: Path, dtype: torch.dtype | None
) -> None:
    facts, networks = family.family, [source.file for source in sources]
    found = same_family(networks)
    if found not in (facts.known_as, "text encoders only"):
        raise DataError(
            f"these are for {found}",
            networks[0].path,
            f"use {MERGE_TOOLS.get(found, 'its own tool')}",
            code="E-ADAPTER-FAMILY",
        )
    if not options.concat:
        logger.warning("matrices are added, which isn't the exact sum of the networks; --concat is, at a higher rank")
    modules = sums.merged(sources, sums.concatenated if options.concat else sums.added, shuffle=options.shuffle)
    kept = dtype or networks[0].dtype()
    tensors = {
        f"{name}.{key}": tensor for name, module in modules.items() for key, tensor in module.file_tensors(kept).items()
    }
    sizes = [Rank(module.rank, module.alpha) for module in modules.values()]
    architecture = facts.architecture_of_network(networks[0])
    base = facts.base_version(architecture)
    values = results.network_metadata(networks[0].metadata, sizes, module=facts.module, base_model_version=base)
    if not options.no_metadata:
        values |= modelspec(architecture, "lora", path, [title_of(network) for network in networks])
    results.save_network(tensors, path, values)
    logger.info("%s: %d modules", path, len(modules))
