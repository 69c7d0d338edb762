"""LoRA files of other ranks: resized by singular values, or the first ranks of a DyLoRA."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from library import devices
from library.log import DataError, UserError, get_logger
from library.option_groups import ExtractDyloraOptions, ResizeLoraOptions
from library.progress import Progress
from networks import changes, results
from networks.adapter_file import AdapterFile
from networks.changes import LowRank
from networks.decomposition import RankChoice, Svd
from networks.reading import Rank

logger = get_logger(__name__)

COMMENT = "ss_training_comment"


def resize(options: ResizeLoraOptions) -> None:
    """What `networks/resize_lora.py` does. Errors: UserError, DataError; nothing is written then."""
    _check_dynamic(options)
    path = results.check_output(options.save_to, [options.model], overwrite=options.overwrite)
    file = _lora(options.model, "resizing")
    device = devices.device_of(options.device, "--device")
    kept: dict[str, LowRank] = {}
    errors: dict[str, float] = {}
    with Progress("resizing", len(file), "modules") as bar:
        for name in file:
            module = LowRank.of(file[name], name)
            kept[name], found = changes.resized(module, _choice(options, module), device)
            errors[name] = found.error(kept[name].rank) if kept[name] is not module else 0.0
            if options.verbose:
                logger.info("%s: %s", name, described(module.rank, kept[name].rank, found))
            bar.advance()
    sizes = file.sizes()
    _report(file, kept, errors)
    dtype = results.PRECISIONS[options.save_precision] if options.save_precision else file.dtype()
    results.save_network(_tensors(kept, dtype), path, _resized_metadata(options, file, sizes, kept))


def _check_dynamic(options: ResizeLoraOptions) -> None:
    method, parameter = options.dynamic_method, options.dynamic_param
    if method is None:
        if parameter is not None:
            raise UserError("it needs --dynamic_method", "--dynamic_param", "give one or leave it out", code="E-RESIZE")
        return
    low, high = (1.0, math.inf) if method == "sv_ratio" else (0.0, 1.0)
    if parameter is None or not low < parameter < high:
        wanted = "a number above 1" if method == "sv_ratio" else "a number between 0 and 1"
        raise UserError(f"{method} needs {wanted}, not {parameter}", "--dynamic_param", code="E-RESIZE")


def _choice(options: ResizeLoraOptions, module: LowRank) -> RankChoice:
    """1x1 convolutions count as linear layers."""
    largest = options.new_rank
    if module.is_window and options.new_conv_rank is not None:
        largest = options.new_conv_rank
    return RankChoice(largest, options.dynamic_method, options.dynamic_param or 0.0)


def described(old: int, new: int, found: Svd) -> str:
    """What of the singular values is kept."""
    values = found.values.double()
    part, squares = values[:new], values.square()
    total, norm = float(values.sum()), float(squares.sum())
    kept = (float(part.sum()) / total, math.sqrt(float(squares[:new].sum()) / norm)) if norm else (1.0, 1.0)
    smallest = float(part[-1]) if len(part) else 0.0
    ratio = f"{float(values[0]) / smallest:.1f}" if smallest else "inf"
    return f"rank {old} -> {new}, sum retained {kept[0]:.1%}, fro retained {kept[1]:.1%}, max ratio {ratio}"


def _report(file: AdapterFile, kept: Mapping[str, LowRank], errors: Mapping[str, float]) -> None:
    ranks = sorted(module.rank for module in kept.values())
    worst = max(errors, key=lambda name: errors[name])
    norm = math.hypot(*(module.norm() for module in kept.values()))
    logger.info(
        "%s: %d modules, ranks %d to %d (mean %.1f), norm %.4g; up to %.2g%% of a change is left out (%s)",
        *(file.name, len(kept), ranks[0], ranks[-1], sum(ranks) / len(ranks), norm, 100 * errors[worst], worst),
    )


def _resized_metadata(
    options: ResizeLoraOptions, file: AdapterFile, sizes: Mapping[str, Rank], kept: Mapping[str, LowRank]
) -> dict[str, str]:
    windows = [name for name, module in kept.items() if module.is_window]
    linear = [name for name in kept if name not in windows] or windows
    old = results.common(sizes[name].rank for name in linear)
    new = {name: Rank(module.rank, module.alpha) for name, module in kept.items()}
    facts = results.network_metadata(file.metadata, [new[name] for name in linear], keep_all=True)
    if options.dynamic_method is not None:
        note = f"Dynamic resize with {options.dynamic_method}: {options.dynamic_param} from {old}"
        facts |= {"ss_network_dim": results.DYNAMIC, "ss_network_alpha": results.DYNAMIC}
    else:
        conv = f" (conv: {options.new_conv_rank})" if options.new_conv_rank is not None else ""
        note = f"dimension is resized from {old} to {options.new_rank}{conv}"
    return _with_note(_with_conv(facts, [new[name] for name in windows]), note)


def _with_conv(facts: Mapping[str, str], windows: Sequence[Rank]) -> dict[str, str]:
    """The arguments of the network with what convolutions have now."""
    try:
        arguments = json.loads(facts.get("ss_network_args", "{}"))
    except ValueError:
        return dict(facts)
    if not windows or not isinstance(arguments, dict) or "conv_dim" not in arguments:
        return dict(facts)
    arguments["conv_dim"] = results.common(size.rank for size in windows)
    arguments["conv_alpha"] = results.common(size.alpha for size in windows)
    return {**facts, "ss_network_args": json.dumps(arguments)}


def _with_note(facts: Mapping[str, str], note: str) -> dict[str, str]:
    return {**facts, COMMENT: f"{note}; {facts.get(COMMENT, '')}"}


def _lora(path: str | None, what: str) -> AdapterFile:
    """A file with nothing but plain LoRA. Errors: UserError, DataError."""
    if not path:
        raise UserError("no file", "--model", "give a LoRA", code="E-USAGE")
    file = AdapterFile.open(path)
    file.require(["lora"], what)
    return file


def _tensors(modules: Mapping[str, LowRank], dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": tensor
        for name, module in modules.items()
        for key, tensor in module.file_tensors(dtype).items()
    }


# DyLoRA


def split_dylora(options: ExtractDyloraOptions) -> None:
    """What `networks/extract_lora_from_dylora.py` does. Errors: UserError, DataError; nothing is written then."""
    if not options.save_to or not options.unit:
        missing = "--unit" if options.save_to else "--save_to"
        raise UserError("it is needed", missing, f"give {missing}", code="E-USAGE")
    file = _lora(options.model, "extracting")
    largest = _only_rank(file)
    if options.unit >= largest:
        what = f"a unit of {options.unit}, of rank {largest}: there is no smaller rank to extract"
        raise UserError(what, "--unit", "give the unit of the training", code="E-DYLORA")
    end = Path(options.save_to)
    ranks = range(options.unit, largest, options.unit)
    names = {rank: end.with_name(f"{end.stem}-{rank:04d}{end.suffix}") for rank in ranks}
    for name in names.values():
        results.check_output(str(name), [options.model], overwrite=options.overwrite)
    modules = {name: LowRank.of(file[name], name) for name in file}
    for rank, path in names.items():
        cut = {name: first_ranks(module, rank) for name, module in modules.items()}
        sizes = [Rank(module.rank, module.alpha) for module in cut.values()]
        facts = results.network_metadata(file.metadata, sizes, keep_all=True)
        note = f"split from DyLoRA, rank {largest} to {rank}"
        results.save_network(_tensors(cut, file.dtype()), path, _with_note(facts, note))
        logger.info("%s: rank %d of %d, %d modules", path, rank, largest, len(cut))


def first_ranks(module: LowRank, rank: int) -> LowRank:
    """The LoRA of the first ranks of a DyLoRA, as strong as in training.

    There a pass with b of r ranks has the scale alpha / sqrt(r b), so that alpha becomes alpha * sqrt(b / r).
    """
    alpha = module.alpha * math.sqrt(rank / module.rank)
    return LowRank(module.down[:rank].contiguous(), module.up[:, :rank].contiguous(), alpha)


def _only_rank(file: AdapterFile) -> int:
    ranks = {size.rank for size in file.sizes().values()}
    if len(ranks) > 1:
        what = f"its modules have ranks {', '.join(map(str, sorted(ranks)))}; a DyLoRA has one"
        raise DataError(what, file.path, "use networks/resize_lora.py for a LoRA", code="E-DYLORA")
    return ranks.pop()
