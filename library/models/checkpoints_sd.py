"""Checkpoints of SD 1.x, 2.x and SDXL, files and Diffusers folders: where their parts lie and how they are read.

Parts are named as the subfolders of Diffusers: `unet`, `text_encoder`, `text_encoder_2` (SDXL), `vae`. A part is seen
in the layout of the models: Diffusers names, and for text encoders Hugging Face's (`text_model.…`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from library.files import Header, fingerprint, read_text
from library.log import DataError
from library.models import keymaps_sd as names
from library.models.detect import ROLES, refusal
from library.models.keymaps import Mapped, Recipes, Shapes, mapped_shapes
from library.models.keymaps_sd import Version
from library.models.locations import joint_header, locate, open_tensors
from library.models.scaled_files import ScaledTensors

Role = Literal["sd", "sdxl"]
UNET, TEXT, TEXT_2, VAE = "unet", "text_encoder", "text_encoder_2", "vae"
ENCODERS: Mapping[Version, tuple[str, ...]] = {"1": (TEXT,), "2": (TEXT,), "xl": (TEXT, TEXT_2)}
"""Text encoders by version, in the order in which their outputs are joined."""
_WHAT = {UNET: "U-Net", TEXT: "text encoder", TEXT_2: "second text encoder", VAE: "autoencoder"}
OPTION = "--pretrained_model_name_or_path"


@dataclass(frozen=True)
class Part:
    """One model of a checkpoint."""

    files: tuple[Path, ...]
    recipes: Recipes
    shapes: Shapes
    """In the layout of the model."""
    where: str
    """For messages."""
    mmap: bool = True

    @contextmanager
    def opened(self) -> Iterator[Mapped]:
        """The tensors, each read when it is asked for; errors inside the block come out naming option and path."""
        with open_tensors(self.files, self.mmap) as tensors:
            try:
                yield Mapped(ScaledTensors(tensors), self.recipes)
            except DataError as error:
                raise DataError(error.what, self.where, error.hint, code=error.code) from None


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was found to be one for the script. Holds paths and headers, never tensors."""

    path: Path
    role: Role
    option: str
    header: Header
    """Of the single file, or of the U-Net in a folder."""
    files: tuple[Path, ...]
    mmap: bool = True

    @property
    def is_folder(self) -> bool:
        """Whether this is a Diffusers folder."""
        return self.path.is_dir()

    @cached_property
    def version(self) -> Version:
        """Which of SD 1.x, SD 2.x and SDXL: told by the text encoder where there is one, else by the U-Net."""
        if self.role == "sdxl":
            return "xl"
        if not self.is_folder:
            for version, starts in (names.OPEN_CLIP_PREFIXES | names.CLIP_PREFIXES).items():
                if version != "xl" and any(name.startswith(starts) for name in self.header.tensors):
                    return version
        return names.unet_version(self.header.shapes)

    @property
    def encoders(self) -> tuple[str, ...]:
        """Names of the text encoders."""
        return ENCODERS[self.version]

    def part(self, name: str) -> Part:
        """A part by name. Errors: DataError when the checkpoint has none."""
        where = f"{self.option} {self.path}"
        if self.is_folder and name != UNET:
            if not (self.path / name).is_dir():
                raise self._lacks(name)
            files = tuple(locate(self.path / name, self.option))
            shapes = joint_header(files, self.option).shapes
        else:
            files, shapes = self.files, self.header.shapes
        recipes = self._recipes(name)(shapes)
        if not recipes:
            raise self._lacks(name)
        return Part(files, recipes, mapped_shapes(shapes, recipes), where, self.mmap)

    def _recipes(self, name: str) -> Callable[[Shapes], Recipes]:
        version = self.version
        if name == UNET:
            return names.unet_from_file
        if name == VAE:
            return names.vae_from_file
        if self.is_folder:
            return lambda shapes: names.clip_from_folder(shapes, projected=name == TEXT_2)
        if version == "2" or name == TEXT_2:
            return lambda shapes: names.open_clip_from_file(shapes, version)
        return lambda shapes: names.clip_from_file(shapes, version)

    def _lacks(self, name: str) -> DataError:
        kind = "folder" if self.is_folder else "file"
        hint = "give the whole checkpoint, a file or a Diffusers folder"
        hint += ", or give the autoencoder as --vae" if name == VAE else ""
        return DataError(f"the {kind} has no {_WHAT[name]}", f"{self.option} {self.path}", hint, code="E-MODEL-PART")


def find_checkpoint(path: Path | str, role: Role, option: str = OPTION, *, mmap: bool = True) -> Checkpoint:
    """The checkpoint of a single file (`.safetensors`, `.ckpt`) or a Diffusers folder, for scripts of this role.

    Raises:
        DataError: nothing is there, it is damaged, or it is something else: the line says what.
    """
    files = locate(path, option, ROLES[role].folders)
    header = joint_header(files, option)
    if problem := refusal(header, path, option, role):
        raise DataError(problem.what, problem.where, problem.hint, code=problem.code)
    return Checkpoint(Path(path), role, option, header, tuple(files), mmap)


def find_vae(path: Path | str, option: str = "--vae", *, mmap: bool = True) -> Part:
    """The autoencoder of a folder, its subfolder `vae`, a file with nothing else, or a full checkpoint.

    Raises:
        DataError: as `find_checkpoint`.
    """
    files = locate(path, option, ROLES["sd_vae"].folders)
    header = joint_header(files, option)
    if problem := refusal(header, path, option, "sd_vae"):
        raise DataError(problem.what, problem.where, problem.hint, code=problem.code)
    recipes = names.vae_from_file(header.shapes)
    return Part(tuple(files), recipes, mapped_shapes(header.shapes, recipes), f"{option} {path}", mmap)


def part_fingerprint(part: Part) -> str:
    """Changes when a file of the part changes."""
    return "-".join(fingerprint(file) for file in part.files)


@dataclass(frozen=True)
class Prediction:
    """What a checkpoint says of what its U-Net predicts; None where it says nothing."""

    kind: Literal["epsilon", "v"] | None
    zero_terminal: bool | None
    said_by: str = ""
    """What says so, for messages."""


def stated_prediction(checkpoint: Checkpoint) -> Prediction:
    """What the scheduler of a folder, or the tensors `v_pred` and `ztsnr` or the metadata of a file say."""
    kinds: Mapping[object, Literal["epsilon", "v"]] = {"epsilon": "epsilon", "v": "v", "v_prediction": "v"}
    if checkpoint.is_folder:
        path = checkpoint.path / "scheduler" / "scheduler_config.json"
        settings = read_json(path)
        kind = kinds.get(settings.get("prediction_type"))
        zero = settings.get("rescale_betas_zero_snr")
        return Prediction(kind, zero if isinstance(zero, bool) else None, "its scheduler_config.json" if kind else "")
    if V_MARK in checkpoint.header.tensors:
        return Prediction("v", ZERO_MARK in checkpoint.header.tensors, f"its tensor {V_MARK}")
    stated = kinds.get(checkpoint.header.metadata.get("modelspec.prediction_type"))
    return Prediction(stated, None, "its metadata" if stated else "")


V_MARK, ZERO_MARK = "v_pred", "ztsnr"
"""Tensors without meaning of their own that tell other programs how to sample."""


def read_json(path: Path) -> dict[str, object]:
    """A JSON object of a Diffusers folder; an empty one where there is none that can be read."""
    try:
        found = json.loads(read_text(path))
    except (ValueError, DataError):
        return {}
    return found if isinstance(found, dict) else {}
