"""Merging of networks into SD 1.x, 2.x and SDXL checkpoints, and with each other."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from library import devices, metadata
from library.log import DataError, UserError, get_logger
from library.metadata import sd_architecture
from library.models import keymaps_sd
from library.models.checkpoints_sd import Checkpoint, Role, find_checkpoint, stated_prediction
from library.models.locations import open_tensors
from library.models.scaled_files import ScaledTensors, without_scales
from library.option_groups import MergeModelOptions, MergeNetworksOptions, SvdMergeOptions
from networks import places, results, sums
from networks.adapter_file import AdapterFile, same_family
from networks.algebra import LowRank, Merged, Source
from networks.blocks import BlockRatios
from networks.flux_files import FLUX
from networks.model_files import ToolFamily
from networks.reading import MERGE_TOOLS, Rank
from networks.sd3_files import SD3

logger = get_logger(__name__)

SD, XL = "SD 1.x or 2.x", "SDXL"
"""Families, as `reading.LORA_FAMILIES` calls them."""
TRANSFORMERS: Mapping[str, ToolFamily] = {family.known_as: family for family in (FLUX, SD3)}
"""Families without a U-Net, whose networks are merged with each other here, too."""


def merge(model: MergeModelOptions, options: MergeNetworksOptions, family: str, *, v2: bool = False) -> None:
    """What `merge_lora.py` and `sdxl_merge_lora.py` do.

    Args:
        family: `SD` or `XL`.
        v2: whether networks that don't say it are for SD 2.x.

    Errors: UserError and DataError; nothing is written then.
    """
    wanted = Wanted.of(options, [model.sd_model])
    if model.sd_model is not None:
        for name in ("concat", "shuffle"):
            if getattr(model, name):
                logger.warning("--%s has no effect: it is for merging networks with each other", name)
        if v2 and family == SD:
            _require_v2(model.sd_model)
        merge_into(model.sd_model, wanted, "sdxl" if family == XL else "sd")
        return
    sources = wanted.sources(family)
    if not model.concat:
        logger.warning("matrices are added, which isn't the exact sum of the networks; --concat is, at a higher rank")
    merged = sums.merged(sources, sums.concatenated if model.concat else sums.added, shuffle=model.shuffle)
    wanted.save(sources, merged, family, v2=v2)


def merge_by_svd(options: MergeNetworksOptions, svd: SvdMergeOptions) -> None:
    """What `svd_merge_lora.py` does. Errors: UserError and DataError; nothing is written then."""
    wanted = Wanted.of(options, [])
    sources = wanted.sources(None)
    joining = sums.Nearest(svd.new_rank, svd.new_conv_rank or svd.new_rank, svd.clamp_quantile, wanted.device)
    merged = sums.merged(sources, joining)
    logger.info("of the sum's norm %.2f%% are left out", 100 * joining.error)
    wanted.save(sources, merged, same_family([source.file for source in sources]), svd=svd)


@dataclass(frozen=True)
class Wanted:
    """What is to be merged, checked as far as no file is needed for it."""

    paths: Sequence[str]
    ratios: Sequence[float]
    blocks: Sequence[BlockRatios | None]
    output: Path
    dtype: torch.dtype | None
    device: torch.device
    with_metadata: bool

    @classmethod
    def of(cls, options: MergeNetworksOptions, models: Sequence[str | None]) -> Wanted:
        """From the options; `models` are further files that are read. Errors: UserError."""
        paths = options.models or ()
        if not paths:
            raise UserError("no network to merge", "--models", "give one file or more")
        output = results.check_output(options.save_to, (*paths, *models), overwrite=options.overwrite)
        for name in ("ratios", "lbws"):
            given = getattr(options, name)
            if given is not None and len(given) != len(paths):
                what = f"{len(given)} {'ratios' if name == 'ratios' else 'lists'} for {len(paths)} networks"
                raise UserError(what, f"--{name}", "give one for each of --models, in their order")
        return cls(
            paths,
            options.ratios or [1.0] * len(paths),
            [BlockRatios.parse(text) for text in options.lbws] if options.lbws else [None] * len(paths),
            output,
            results.PRECISIONS[options.save_precision] if options.save_precision else None,
            devices.device_of(options.device, "--device"),
            not options.no_metadata,
        )

    def sources(self, family: str | None, aliases: Mapping[str, str] | None = None) -> list[Source]:
        """The networks. Errors: DataError when they are for another family, UserError for lists that don't fit.

        Args:
            family: that of the tool; None: any, but of all the same.
            aliases: names that modules have in other people's files; None: those of SDXL itself, for SDXL.
        """
        opened = [AdapterFile.open(path) for path in self.paths]
        common = same_family(opened)
        if family is not None and common in MERGE_TOOLS and common != family:
            raise _other_family(opened, family)
        if family == XL and aliases is None:
            opened = [file.renamed(_sdxl_names(file)) for file in opened]
        elif aliases:
            opened = [file.renamed(aliases) for file in opened]
        for file, blocks in zip(opened, self.blocks, strict=True):
            if blocks is not None:
                blocks.check_family(family or file.family)
        rows = zip(opened, self.ratios, self.blocks, strict=True)
        return [Source(file, ratio, blocks) for file, ratio, blocks in rows]

    def save(
        self,
        sources: Sequence[Source],
        merged: Mapping[str, LowRank],
        family: str,
        *,
        v2: bool = False,
        svd: SvdMergeOptions | None = None,
    ) -> None:
        """Writes the sum of networks."""
        facts = NetworkFacts.of(sources, family, v2=v2)
        values = facts.metadata(sources, merged, svd)
        if self.with_metadata:
            values |= modelspec(facts.architecture, "lora", self.output, sources, v_prediction=facts.v_prediction)
        kept = self.dtype or sources[0].file.dtype()
        tensors = {
            f"{name}.{key}": tensor
            for name, module in merged.items()
            for key, tensor in module.file_tensors(kept).items()
        }
        results.save_network(tensors, self.output, values)


def _other_family(files: Sequence[AdapterFile], family: str) -> DataError:
    other = next(file for file in files if file.family in MERGE_TOOLS and file.family != family)
    keys = ", ".join(other.key(module) for module in list(other)[:3])
    what = f"it is for {other.family}, not for {family}: {keys}"
    return DataError(what, other.path, f"use {MERGE_TOOLS[other.family]}", code="E-ADAPTER-FAMILY")


def _sdxl_names(file: AdapterFile) -> dict[str, str]:
    """Names in the layout of Diffusers, and those of SDXL files."""
    if not any("_down_blocks_" in name or "_up_blocks_" in name for name in file):
        return {}
    layout = keymaps_sd.UnetLayout((2, 2, 2), (False, True, True)).modules()
    table = {new.replace(".", "_"): ldm.replace(".", "_") for ldm, new in layout.items() if "block" in new}
    beginnings = sorted(table, key=len, reverse=True)
    found = {}
    for name in file:
        rest = name.removeprefix("lora_unet_")
        start = next((start for start in beginnings if rest == start or rest.startswith(f"{start}_")), None)
        if start is not None and rest != name:
            found[name] = f"lora_unet_{table[start]}{rest.removeprefix(start)}"
    return found


# into a checkpoint


def merge_into(path: str, wanted: Wanted, role: Role) -> None:
    """Merges networks into a checkpoint, tensor by tensor. Errors: DataError; no file is left then."""
    with opened_checkpoint(path, role) as (checkpoint, tensors, shapes):
        aliases = places.sdxl_aliases(shapes) if role == "sdxl" else {}
        sources = wanted.sources(XL if role == "sdxl" else SD, aliases)
        merged = Merged(
            tensors,
            places.sd_places(shapes),
            sources,
            where=f"--sd_model {path}",
            dtype=wanted.dtype or (torch.bfloat16 if isinstance(tensors, ScaledTensors) else None),
            shapes=shapes,
            device=wanted.device,
            progress="merging",
        )
        merged.save(wanted.output, _model_metadata(checkpoint, sources, wanted))


@contextmanager
def opened_checkpoint(
    path: str, role: Role, option: str = "--sd_model"
) -> Iterator[tuple[Checkpoint, Mapping[str, Tensor], places.Shapes]]:
    """A checkpoint in one file, with its tensors, read when they are asked for, and their shapes.

    Errors: DataError when it is a folder, another kind of file, or damaged.
    """
    if Path(path).is_dir():
        hint = "make one file of it first: tools/convert_diffusers20_original_sd.py"
        raise DataError("this is a folder", f"{option} {path}", hint, code="E-FILE-KIND")
    checkpoint = find_checkpoint(path, role, option, mmap=False)
    shapes = without_scales(checkpoint.header.shapes)
    with open_tensors(checkpoint.files, mmap=False) as opened:
        scaled = len(shapes) < len(checkpoint.header.shapes)
        yield checkpoint, ScaledTensors(opened) if scaled else opened, shapes


def _require_v2(path: str) -> None:
    checkpoint = find_checkpoint(path, "sd", "--sd_model")
    if checkpoint.version != "2":
        raise DataError("this is no SD 2.x model", f"--sd_model {path}", "leave --v2 out", code="E-MODEL-KIND")


def _model_metadata(checkpoint: Checkpoint, sources: Sequence[Source], wanted: Wanted) -> dict[str, str]:
    found = checkpoint.header.metadata
    values = metadata.lasting(found)
    if not wanted.with_metadata:
        return values
    v_prediction = stated_prediction(checkpoint).kind == "v"
    first = metadata.title_of(found, checkpoint.path)
    own = modelspec(
        metadata.sd_architecture(checkpoint.version, v_prediction=v_prediction),
        "",
        wanted.output,
        sources,
        v_prediction=v_prediction,
        first=first,
    )
    return values | own


# metadata


def modelspec(
    base: str,
    kind: str,
    path: Path,
    sources: Sequence[Source],
    *,
    v_prediction: bool,
    first: str | None = None,
) -> dict[str, str]:
    """`modelspec.*` of a file that is merged of networks, and of `first`, the title of a model."""
    titles = [metadata.title_of(source.file.metadata, source.file.path) for source in sources]
    return metadata.build_modelspec(
        architecture=base,
        kind=kind,
        timestamp=time.time(),
        title=path.stem,
        v_parameterization=v_prediction,
        merged_from=", ".join(([first] if first else []) + titles),
    )


@dataclass(frozen=True)
class NetworkFacts:
    """What a sum of networks is for, as far as their files say it."""

    family: str
    base_model_version: str
    architecture: str
    v2: bool
    v_prediction: bool

    @classmethod
    def of(cls, sources: Sequence[Source], family: str, *, v2: bool = False) -> NetworkFacts:
        """From the first file that says something, or else from its tensors."""
        said = [source.file.metadata for source in sources]

        def first(key: str) -> str | None:
            return next((values[key] for values in said if values.get(key)), None)

        if known := TRANSFORMERS.get(family):
            named = known.architecture_of_network(sources[0].file)
            return cls(family, known.base_version(named), named, False, False)
        if family == XL:
            v_prediction = first("modelspec.prediction_type") == "v"
            version = first("ss_base_model_version") or "sdxl_base_v1-0"
            return cls(family, version, sd_architecture("xl"), False, v_prediction)
        stated = first("ss_base_model_version")
        of_tensors = _is_v2(sources)
        two = of_tensors if of_tensors is not None else (first("ss_v2") == "True" if first("ss_v2") else v2)
        v_prediction = bool(stated and stated.endswith("_v")) or first("modelspec.prediction_type") == "v"
        version = stated or f"sd_v{2 if two else 1}{'_v' if v_prediction else ''}"
        base = sd_architecture("2" if two else "1", v_prediction=v_prediction)
        return cls(family, version, base, two, v_prediction)

    def metadata(
        self, sources: Sequence[Source], merged: Mapping[str, LowRank], svd: SvdMergeOptions | None
    ) -> dict[str, str]:
        """The `ss_*` values of the sum."""
        sizes = [Rank(module.rank, module.alpha) for module in merged.values()]
        own = {"ss_v2": str(self.v2)}
        if svd is not None:
            sizes = [Rank(svd.new_rank, svd.new_rank)]
            if any(module.is_window for module in merged.values()):
                rank = svd.new_conv_rank or svd.new_rank
                own["ss_network_args"] = f'{{"conv_dim": {rank}, "conv_alpha": {rank}}}'
        known = TRANSFORMERS.get(self.family)
        module = known.module if known else "networks.lora"
        inherited = sources[0].file.metadata
        values = results.network_metadata(inherited, sizes, module=module, base_model_version=self.base_model_version)
        return values | own


def _is_v2(sources: Sequence[Source]) -> bool | None:
    """Told by the width of the text that adapters look at; None where it isn't there."""
    for source in sources:
        for name in source.file:
            shape = source.file.weight_shape(name) if name.endswith("attn2_to_k") else None
            if shape is not None and len(shape) > 1 and shape[1] in (768, 1024):
                return shape[1] == 1024
    return None
