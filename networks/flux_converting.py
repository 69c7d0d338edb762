"""LoRAs and models for FLUX.1 from one layout to the other, as files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from library import devices, files
from library.log import DataError, UserError, get_logger
from library.models.flux import Flux, FluxConfig
from library.option_groups import ConvertDiffusersToFluxOptions, ConvertFluxLoraOptions
from library.progress import Progress
from networks import flux_layouts, reading, results
from networks.flux_files import refuse_unknown
from networks.merging import Merged
from networks.model_files import input_files, opened_model
from networks.reading import Rank

logger = get_logger(__name__)

LAYOUTS = {"ai-toolkit": "ai-toolkit", "diffusers": "ai-toolkit", "sd-scripts": "sd-scripts", "kohya": "sd-scripts"}
"""Names that --src and --dst take -> those that the program uses."""


def convert(options: ConvertFluxLoraOptions) -> None:
    """What `networks/convert_flux_lora.py` does. Errors: UserError, DataError; nothing is written then."""
    source, target = _layout(options.src, "--src"), _layout(options.dst, "--dst")
    if source == target:
        raise UserError(f"--src and --dst are both {source}", "--dst", "give the other layout")
    if not options.src_path or not options.dst_path:
        missing = "--dst_path" if options.src_path else "--src_path"
        raise UserError("the file isn't named", missing, "give the path of a .safetensors file")
    path = results.check_output(options.dst_path, [options.src_path], overwrite=options.overwrite)
    tensors = reading.read_weights(options.src_path)
    if flux_layouts.is_diffusers(tensors) != (source == "ai-toolkit"):
        what = f"the file isn't in the layout of {source}: {reading.describe(tensors)}"
        raise DataError(what, options.src_path, "check --src and the file", code="E-NETWORK-FILE")
    to_diffusers = target == "ai-toolkit"
    converted = flux_layouts.to_diffusers(tensors) if to_diffusers else flux_layouts.from_diffusers(tensors)
    refuse_unknown(converted.unknown, tensors, options.src_path)
    inherited = files.header(options.src_path).metadata
    values = results.network_metadata(inherited, _sizes(converted.tensors), keep_all=True)
    results.save_network(converted.tensors, path, values)
    made = len(converted.tensors) // (2 if to_diffusers else 3)
    logger.info("%s: %d modules of %s are now %d of %s", Path(path), converted.modules, source, made, target)


def convert_model(options: ConvertDiffusersToFluxOptions) -> None:
    """What `tools/convert_diffusers_to_flux.py` does. Errors: UserError, DataError; nothing is written then."""
    where = f"--diffusers_path {options.diffusers_path}"
    inputs = input_files(options.diffusers_path, "flux", "--diffusers_path")
    path = results.check_output(options.save_to, inputs, overwrite=options.overwrite)
    dtype = devices.dtype_of(options.save_precision, "--save_precision") if options.save_precision else None
    with opened_model(options.diffusers_path, "flux", "--diffusers_path") as model:
        if not model.converted:
            what, hint = "the model isn't in the layout of Diffusers", "it is in that of its authors already"
            raise DataError(what, where, hint, code="E-MODEL-KIND")
        _check_complete(model.shapes, where)
        tensors = Merged(model.tensors, {}, [], dtype=dtype or model.dtype, shapes=model.shapes, where=where)
        with Progress("converting", len(tensors), "tensors") as bar:
            files.save_safetensors(Counted(tensors, bar), path, model.metadata, like=tensors.like)
    logger.info("%s: %d tensors", path, len(tensors))


class Counted(Mapping[str, Tensor]):
    """Tensors that a bar counts when they are asked for."""

    def __init__(self, tensors: Mapping[str, Tensor], bar: Progress) -> None:
        self._tensors, self._bar = tensors, bar

    def __getitem__(self, name: str) -> Tensor:
        self._bar.advance()
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _check_complete(shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Errors: DataError when there are other tensors than those of a FLUX.1 transformer of this size."""
    with torch.device("meta"):
        wanted = {
            name: tuple(tensor.shape) for name, tensor in Flux(FluxConfig.from_shapes(shapes)).state_dict().items()
        }
    unknown = [name for name in shapes if name not in wanted]
    missing = [name for name, shape in wanted.items() if shapes.get(name) != shape]
    for names, what in ((unknown, "unknown"), (missing, "missing or of another shape")):
        if names:
            some = ", ".join(names[:3])
            raise DataError(
                f"{len(names)} tensors are {what}, such as {some}",
                where,
                "the model is incomplete, or another",
                code="E-MODEL-KEYS",
            )


def _layout(name: str, option: str) -> str:
    if name not in LAYOUTS:
        raise UserError(f"unknown layout {name!r}", option, "use ai-toolkit or sd-scripts")
    return LAYOUTS[name]


def _sizes(tensors: flux_layouts.Tensors) -> list[Rank]:
    """Of all modules; in the layout of Diffusers alpha is the rank."""
    sizes = []
    for name, tensor in tensors.items():
        stem, dot, end = name.rpartition(
            ".lora_down.weight" if name.endswith(".lora_down.weight") else ".lora_A.weight"
        )
        if dot and not end:
            alpha = tensors.get(f"{stem}.alpha")
            sizes.append(Rank(tensor.shape[0], float(tensor.shape[0] if alpha is None else alpha)))
    return sizes
