"""SD 1.x, 2.x and SDXL checkpoints from single files to Diffusers folders, and back."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from library import metadata
from library.files import Header
from library.log import DataError, UserError, get_logger
from library.models import keymaps_sd
from library.models.checkpoints_sd import (
    TEXT_2,
    UNET,
    VAE,
    Checkpoint,
    Part,
    Role,
    find_checkpoint,
    read_json,
    stated_prediction,
)
from library.models.detect import ROLES, detect, refusal
from library.models.keymaps import mapped_shapes
from library.models.locations import joint_header, locate
from library.models.saving_sd import SINGLE, Product, opened, save_checkpoint

logger = get_logger(__name__)

INDEX = "model_index.json"


@dataclass(frozen=True)
class VariantFolder(Checkpoint):
    """A Diffusers folder, of whose files those of a variant count."""

    variant: str = ""

    def part(self, name: str) -> Part:
        """A part by name. Errors: DataError when it isn't there in this variant."""
        files = variant_files(self.path / name, self.variant, self.option)
        shapes = joint_header(files, self.option).shapes
        if name == UNET:
            recipes = keymaps_sd.unet_from_file(shapes)
        elif name == VAE:
            recipes = keymaps_sd.vae_from_file(shapes)
        else:
            recipes = keymaps_sd.clip_from_folder(shapes, projected=name == TEXT_2)
        return Part(tuple(files), recipes, mapped_shapes(shapes, recipes), f"{self.option} {self.path}", self.mmap)


def variant_files(folder: Path, variant: str, option: str) -> list[Path]:
    """The files of a variant in the folder of a part. Errors: DataError when there is none, or several."""
    files = sorted(folder.glob(f"*.{variant}.safetensors")) or sorted(folder.glob(f"*.{variant}.bin"))
    if len(files) != 1:
        what = f"{len(files)} files of the variant {variant} in {folder.name}/"
        raise DataError(what, f"{option} {folder.parent}", "leave --variant out", code="E-MODEL-PART")
    return files


def find(path: str, option: str, variant: str | None = None) -> Checkpoint:
    """A checkpoint of any of the versions. Errors: DataError when it is something else, or damaged."""
    if variant:
        if not Path(path).is_dir():
            raise DataError("only folders have variants", f"{option} {path}", "leave --variant out", code="E-FILE-KIND")
        files = variant_files(Path(path) / UNET, variant, option)
        header = joint_header(files, option)
        role = _role(header)
        if problem := refusal(header, path, option, role):
            raise DataError(problem.what, problem.where, problem.hint, code=problem.code)
        return VariantFolder(Path(path), role, option, header, tuple(files), False, variant)
    header = joint_header(locate(path, option, ROLES["sd"].folders), option)
    return find_checkpoint(path, _role(header), option, mmap=False)


def _role(header: Header) -> Role:
    return "sdxl" if "sdxl" in detect(header).roles else "sd"


@dataclass(frozen=True)
class Conversion:
    """What is to be made of a checkpoint."""

    source: Checkpoint
    target: Path
    """A file by its suffix, or else a folder."""
    dtype: torch.dtype | None = None
    epoch: int = 0
    steps: int = 0
    facts: Mapping[str, str] | None = None
    """Further metadata of a safetensors file."""
    reference: Path | None = None
    """A folder that scheduler and tokenizers are taken from."""

    @property
    def is_file(self) -> bool:
        """Whether one file is made."""
        return self.target.suffix in SINGLE.values()

    def run(self) -> None:
        """Writes the result, whole or not at all.

        Errors: DataError for a part that is missing and values that aren't finite, ResourceError.
        """
        product = self._product()
        check_values(product)
        kind = next((kind for kind, suffix in SINGLE.items() if suffix == self.target.suffix), "diffusers_safetensors")
        values = self._metadata(product.v_prediction) if self.target.suffix == ".safetensors" else None
        save_checkpoint(self.target, kind, product, values)  # type: ignore[arg-type]
        logger.info("saved %s: %s", self.target, _described(product))

    def _product(self) -> Product:
        stated = stated_prediction(self.source)
        kind, zero = stated.kind, bool(stated.zero_terminal)
        product = Product(self.source, {}, dtype=self.dtype, epoch=self.epoch, steps=self.steps, zero_terminal=zero)
        for name in product.parts:
            self.source.part(name)  # complains of what is missing
        if self.reference is not None and not self.is_file:
            settings = read_json(self.reference / "scheduler" / "scheduler_config.json")
            if kind is None and settings.get("prediction_type") == "v_prediction":
                kind = "v"
            names = [name.replace("text_encoder", "tokenizer") for name in self.source.encoders]
            folders = {name: CopiedFolder(self.reference / name) for name in names if (self.reference / name).is_dir()}
            product = replace(product, tokenizers=folders, reference=self.reference)
        return replace(product, v_prediction=kind == "v")

    def _metadata(self, v_prediction: bool) -> dict[str, str]:
        """Those of the source, which stay true, a specification where it has none, and what was given."""
        said = {
            key: value
            for key, value in ({} if self.source.is_folder else self.source.header.metadata).items()
            if key not in ("epoch", "global_step", "format")
        }
        own = metadata.build_modelspec(
            architecture=metadata.sd_architecture(self.source.version, v_prediction=v_prediction),
            timestamp=time.time(),
            title=self.target.stem,
            v_parameterization=v_prediction,
        )
        return own | said | dict(self.facts or {})


class CopiedFolder:
    """A tokenizer as it lies in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def save_pretrained(self, target: str) -> None:
        """Copies it."""
        shutil.copytree(self._folder, target)


def check_target(target: Path, source: Path, *, overwrite: bool, option: str) -> None:
    """To be called before anything is read.

    Errors: UserError when the result would take the place of something that isn't to be overwritten.
    """
    if target.suffix in SINGLE.values():
        if target.is_dir():
            raise UserError(f"{target} is a folder", option, "name a file in it", code="E-OUTPUT")
        if target.exists() and not overwrite:
            raise UserError(f"{target} is there already", option, "add --overwrite", code="E-OUTPUT-INPUT")
        return
    if target.suffix in (".pt", ".pth", ".bin", ".onnx", ".gguf"):
        hint = "end it in .safetensors or .ckpt, or name a folder"
        raise UserError(f"{target}: such files aren't written", option, hint, code="E-OUTPUT")
    if target.is_file():
        raise UserError(f"{target} is a file", option, "name a folder, or end it in .safetensors", code="E-OUTPUT")
    if source.absolute().is_relative_to(target.absolute()) and source.absolute() != target.absolute():
        raise UserError(f"{target} holds the model that is read", option, "name another folder", code="E-OUTPUT-INPUT")
    if target.is_dir() and any(target.iterdir()):
        if not (target / INDEX).is_file():
            what, hint = f"{target} holds other things than a Diffusers model", "name another folder"
            raise UserError(what, option, hint, code="E-OUTPUT")
        if not overwrite:
            raise UserError(f"{target} is there already", option, "add --overwrite", code="E-OUTPUT-INPUT")


def check_values(product: Product) -> None:
    """Errors: DataError when a value isn't finite, here or in the type of the result."""
    for name in product.parts:
        with opened(product, name) as part:
            if part is None:
                continue
            tensors, recipes, _ = part
            for key in dict.fromkeys(source for recipe in recipes.values() for source in recipe.sources):
                tensor = tensors[key]
                if not tensor.is_floating_point():
                    continue
                new = tensor if product.dtype is None else tensor.to(product.dtype)
                if not bool(torch.isfinite(new.float() if new.dtype.itemsize == 1 else new).all()):
                    what = f"{key} has values that aren't finite" + (
                        f" in {str(new.dtype)[6:]}" if product.dtype else ""
                    )
                    hint = "check the model" + (", or save it in bf16" if product.dtype == torch.float16 else "")
                    raise DataError(what, str(product.source.path), hint, code="E-TENSOR-FINITE")


def _described(product: Product) -> str:
    version = {"1": "SD 1.x", "2": "SD 2.x", "xl": "SDXL"}[product.source.version]
    prediction = "v-prediction" if product.v_prediction else "epsilon prediction"
    return f"{version}, {prediction}, {', '.join(product.parts)}"
