"""A LoRA of the difference of two models of SD 1.x, SD 2.x or SDXL."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from library import devices, metadata
from library.log import DataError, get_logger
from library.models import detect
from library.models.checkpoints_sd import UNET, Checkpoint, Role, find_checkpoint, stated_prediction
from library.models.keymaps_sd import Version
from library.models.locations import joint_header, locate
from library.option_groups import ExtractLoraOptions
from library.progress import Progress
from networks import changes, merging, results
from networks.base import encoder_component
from networks.changes import LowRank
from networks.places import Place, clip_places, sd_places
from networks.reading import Rank
from networks.report import Report

logger = get_logger(__name__)


@dataclass
class Extract:
    """What is made of the parts of two models."""

    options: ExtractLoraOptions
    device: torch.device
    dtype: torch.dtype | None
    """Both models are rounded to it first; None: they aren't."""
    modules: dict[str, LowRank] = field(default_factory=dict)
    worst: tuple[float, str] = (0.0, "")
    """The largest error, in parts of the change, and of which module."""
    report: Report = field(default_factory=lambda: Report("extracted"))

    def add(self, part: PartPair) -> None:
        """The changes of one part. Errors: DataError when its layers differ, or values aren't finite."""
        merging.check_same_layers(part.original_places, part.tuned_places)
        places = {name: place for name, place in part.original_places.items() if self._wants(place)}
        if part.name != UNET and not self._moved(part, places):
            logger.info("%s: no value moved by more than %g; it is left out", part.name, self.options.min_diff)
            return
        with Progress(f"extracting {part.name}", len(places), "layers") as bar:
            for name in places:
                self._take(name, places[name], part.difference(name, self))
                bar.advance()

    def _wants(self, place: Place) -> bool:
        """Kernels, and what is around them, with a rank for them only."""
        return place.usual and (self.options.conv_dim is not None or not place.extra)

    def _moved(self, part: PartPair, places: Mapping[str, Place]) -> bool:
        return any(float(part.difference(name, self).abs().max()) > self.options.min_diff for name in places)

    def _take(self, name: str, place: Place, delta: Tensor) -> None:
        norm = float(delta.norm())
        if norm == 0:
            return
        window = delta.ndim == 4 and delta[0, 0].numel() > 1
        rank = self.options.conv_dim if window and self.options.conv_dim is not None else self.options.dim
        self.modules[name], error = changes.nearest_to(
            delta, rank, clamp_quantile=self.options.clamp_quantile, exact=self.options.exact
        )
        self.worst = max(self.worst, (error, name))
        self.report.add(Path(self.options.model_tuned).name, name, place.component, norm)


@dataclass(frozen=True)
class PartPair:
    """A part of both models."""

    name: str
    original: Mapping[str, Tensor]
    tuned: Mapping[str, Tensor]
    original_places: Mapping[str, Place]
    tuned_places: Mapping[str, Place]

    def difference(self, module: str, extract: Extract) -> Tensor:
        """What the weight of a module is more in the tuned model."""
        pair = self.original_places[module], self.tuned_places[module]
        return merging.difference(self.original, self.tuned, *pair, device=extract.device, dtype=extract.dtype)


def extract(options: ExtractLoraOptions) -> None:
    """What `networks/extract_lora_from_models.py` does. Errors: UserError, DataError; nothing is written then."""
    inputs = (options.model_org, options.model_tuned)
    path = results.check_output(options.save_to, inputs, overwrite=options.overwrite)
    original = _checkpoint(options.model_org, "--model_org")
    tuned = _checkpoint(options.model_tuned, "--model_tuned")
    _check_versions(options, original, tuned)
    device = devices.device_of(options.device, "--device")
    done = Extract(options, device, results.PRECISIONS.get(options.load_precision or ""))
    for name in (*original.encoders, UNET):
        with _opened(name, original, tuned) as part:
            done.add(part)
    if not done.modules:
        what = "the two models don't differ in any layer that a LoRA has"
        raise DataError(what, options.model_tuned, "check --model_org and --model_tuned", code="E-MERGE-NOTHING")
    tensors = {
        f"{name}.{key}": tensor
        for name, module in done.modules.items()
        for key, tensor in module.file_tensors(results.PRECISIONS[options.save_precision or "float"]).items()
    }
    results.save_network(tensors, path, _metadata(options, original.version, path, tuned))
    for line in done.report.lines():
        logger.info("%s", line)
    logger.info("%s: rank %d leaves out up to %.1f%% of a change (%s)", path, options.dim, *_percent(done.worst))


def _percent(worst: tuple[float, str]) -> tuple[float, str]:
    return 100 * worst[0], worst[1]


def _checkpoint(path: str, option: str) -> Checkpoint:
    """A model of any version. Errors: DataError when it is something else."""
    header = joint_header(locate(path, option, detect.ROLES["sd"].folders), option)
    role: Role = "sdxl" if "sdxl" in detect.detect(header).roles else "sd"
    return find_checkpoint(path, role, option, mmap=False)


def _check_versions(options: ExtractLoraOptions, original: Checkpoint, tuned: Checkpoint) -> None:
    names: Mapping[Version, str] = {"1": "SD 1.x", "2": "SD 2.x", "xl": "SDXL"}
    if original.version != tuned.version:
        what = f"the original model is {names[original.version]}, the tuned one {names[tuned.version]}"
        raise DataError(what, f"{original.path}, {tuned.path}", "give two of a kind", code="E-ADAPTER-FAMILY")
    for flag, version in (("v2", "2"), ("sdxl", "xl")):
        if getattr(options, flag) and original.version != version:
            what = f"the models are {names[original.version]}"
            raise DataError(what, f"--{flag}", f"leave --{flag} out", code="E-ADAPTER-FAMILY")


@contextmanager
def _opened(name: str, original: Checkpoint, tuned: Checkpoint) -> Iterator[PartPair]:
    """A part of both, in the layout of the models, whatever the files have."""
    parts = original.part(name), tuned.part(name)
    with parts[0].opened() as old, parts[1].opened() as new:
        if name == UNET:
            places = [sd_places(part.shapes) for part in parts]
        else:
            index = original.encoders.index(name)
            prefix = f"lora_te{index + 1}" if len(original.encoders) > 1 else "lora_te"
            places = [clip_places(part.shapes, prefix, encoder_component(index)) for part in parts]
        yield PartPair(name, old, new, *places)


def _metadata(options: ExtractLoraOptions, version: Version, path: Path, tuned: Checkpoint) -> dict[str, str]:
    v_prediction = bool(options.v_parameterization) or stated_prediction(tuned).kind == "v"
    base = "sdxl_base_v1-0" if version == "xl" else f"sd_v{version}{'_v' if v_prediction else ''}"
    size = Rank(options.dim, float(options.dim))
    facts = results.network_metadata({}, [size], module="networks.lora", base_model_version=base)
    conv = options.conv_dim
    arguments = {} if conv is None else {"conv_dim": str(conv), "conv_alpha": str(float(conv))}
    facts |= {"ss_v2": str(version == "2"), "ss_network_args": json.dumps(arguments)}
    facts["ss_network_alpha"] = str(float(options.dim))
    if options.no_metadata:
        return facts
    return facts | metadata.build_modelspec(
        architecture=metadata.sd_architecture(version, v_prediction=v_prediction),
        kind="lora",
        timestamp=time.time(),
        title=path.stem,
        v_parameterization=v_prediction,
    )
