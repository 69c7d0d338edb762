"""What `convert_lora.py` does: a file read, recognised, converted, written, and compared."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from library import files
from library.log import DataError, get_logger
from library.option_groups import ConvertLoraOptions
from networks.converting import Result, converted
from networks.layout_files import PEFT_KEY, Adapter, read, recognised, written
from networks.layouts import FAMILIES, KINDS, LAYOUTS, ROWS
from networks.proving import largest_error
from networks.results import check_output, save_network

logger = get_logger(__name__)


def convert(options: ConvertLoraOptions) -> None:
    """Converts the file that the options name.

    Errors: UserError for the output; DataError when the file isn't known, or can't be said in the layout.
    """
    output = check_output(options.save_to, [options.model], overwrite=options.overwrite)
    tensors = _opened(options.model)
    source, metadata = _read(tensors, options.model, options.source_layout, options.family)
    target = ROWS[options.to, source.row.family]
    if target == source.row:
        what = f"the file is in the layout of {LAYOUTS[target.layout]} already"
        raise DataError(what, options.model, "give another one as --to", code="E-NETWORK-LAYOUT")
    result = converted(source, target, metadata, options.model)
    made = written(result.adapter)
    kept = {name: value for name, value in result.metadata.items() if result.hashed or not name.startswith("sshs_")}
    if result.hashed:
        save_network(made, output, kept)
    else:
        files.save_safetensors(made, output, kept)
    names = LAYOUTS[source.row.layout], LAYOUTS[target.layout], FAMILIES[source.row.family]
    logger.info("converted from %s to %s, for %s: %s", *names, _summary(result))
    if result.rounded:
        named = ", ".join(result.rounded[:3])
        logger.warning("%d modules are rounded, so that the way back isn't exact: %s", len(result.rounded), named)
    if options.verify:
        _verify(source, output, options)


def _opened(path: str) -> files.LazyTensors:
    if not Path(path).is_file():
        raise DataError("the network file isn't there", path, code="E-NETWORK-FILE")
    return files.LazyTensors(path, mmap=False)


def _read(
    tensors: files.LazyTensors, path: str, layout: str | None, family: str | None
) -> tuple[Adapter, Mapping[str, str]]:
    parsed = recognised(tensors.shapes, path, layout=layout, family=family)
    metadata = tensors.metadata
    return read(tensors, parsed, path, metadata.get(PEFT_KEY)), metadata


def _summary(result: Result) -> str:
    parts = [f"{count} {KINDS[kind]} in {component}" for (component, kind), count in result.counts.items()]
    return f"{sum(result.counts.values())} modules ({', '.join(parts)})"


def _verify(source: Adapter, output: Path, options: ConvertLoraOptions) -> None:
    """Reads what was written, and compares what it does. Errors: DataError when it does something else."""
    again, _ = _read(_opened(str(output)), str(output), options.to, source.row.family)
    error, size = largest_error(source, again)
    logger.info("largest error of a changed weight: %.3g (largest change: %.3g)", error, size)
    if error > TOLERANCE * size:
        what = f"the file does something else: the largest error is {error:.3g}, of {size:.3g}"
        raise DataError(what, str(output), "this is a mistake of the program: report it", code="E-NETWORK-LAYOUT")


TOLERANCE = 1e-5
"""Of the largest change."""
