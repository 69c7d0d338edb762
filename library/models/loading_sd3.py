"""The models of SD3 and SD3.5 from their files, and a single file of them; see `library.models.loading`.

A checkpoint is a single file, with or without autoencoder and text encoders, or a Diffusers folder. What has a file of
its own is taken from there, whatever the checkpoint holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from library.files import Header
from library.log import DataError, get_logger
from library.models import clip, keymaps, loading, t5
from library.models import keymaps_sd3 as names
from library.models.checkpoints_sd import OPTION, Part
from library.models.detect import ROLES, refusal
from library.models.joined import Joined, same
from library.models.keymaps import PROJECTION, Recipe, Recipes, mapped_shapes
from library.models.keymaps_sd import vae_from_file
from library.models.keymaps_sd3 import CLIP_G, CLIP_L, ENCODERS, FOLDERS, T5
from library.models.loading import Filling, Finished, filled
from library.models.loading_sd import build_vae, load_clip
from library.models.locations import joint_header, locate
from library.models.mmdit import MMDiT, MMDiTConfig
from library.models.scaled_files import without_scales
from library.types import DENOISER

logger = get_logger(__name__)

VAE = "vae"
_ACTIVATIONS = {CLIP_L: "quick_gelu", CLIP_G: "gelu"}


@dataclass(frozen=True)
class Sd3Files:
    """Where the parts of a model lie: its transformer `unet`, its encoders `clip_l`, `clip_g`, `t5xxl`, and `vae`."""

    path: str | Path
    """The checkpoint."""
    separate: Mapping[str, str | None] = field(default_factory=dict)
    """Files of parts; each is given by the option of its name."""
    option: str = OPTION
    """The one that gave the checkpoint, for messages."""
    mmap: bool = True

    def part(self, name: str) -> Part:
        """A part. Errors: DataError when there is none, or a file is damaged or something else."""
        part = self.find(name)
        if part is None:
            hint = f"give it as --{name}, or a checkpoint that holds it"
            raise DataError(f"there is no {name}", f"{self.option} {self.path}", hint, code="E-MODEL-PART")
        return part

    def find(self, name: str) -> Part | None:
        """A part; None where there is none. Errors: DataError when a file is damaged or something else."""
        own = self.separate.get(name)
        if own:
            return self._part(own, f"--{name}", "sd3_vae" if name == VAE else name, name)
        if name == DENOISER:
            return self._part(self.path, self.option, "sd3", name)
        if not Path(self.path).is_dir():
            shapes = self._header.shapes
            there = _recipes(shapes, VAE) if name == VAE else names.embedded(shapes, name)
            return self._part(self.path, self.option, "sd3", name) if there else None
        folder = Path(self.path) / FOLDERS.get(name, VAE)
        return self._part(folder, self.option, "sd3_vae" if name == VAE else name, name) if folder.is_dir() else None

    @cached_property
    def _header(self) -> Header:
        return joint_header(locate(self.path, self.option, ROLES["sd3"].folders), self.option)

    def _part(self, path: str | Path, option: str, role: str, name: str) -> Part:
        files = locate(path, option, ROLES[role].folders)
        header = joint_header(files, option)
        if problem := refusal(header, path, option, role):
            raise DataError(problem.what, problem.where, problem.hint, code=problem.code)
        shapes = without_scales(header.shapes)
        recipes = _recipes(shapes, name)
        if name == CLIP_G and PROJECTION not in recipes:
            raise DataError(f"it has no {PROJECTION}", f"{option} {path}", "use another CLIP-G", code="E-MODEL-KEYS")
        return Part(tuple(files), recipes, mapped_shapes(shapes, recipes), f"{option} {path}", self.mmap)

    def shapes(self) -> dict[str, keymaps.Shapes]:
        """Shapes of the tensors of the transformer and of the encoders that are there, from the headers only."""
        found = {name: self.find(name) for name in (DENOISER, *ENCODERS)}
        return {name: part.shapes for name, part in found.items() if part is not None}


def _recipes(shapes: keymaps.Shapes, name: str) -> Recipes:
    """The layout of a part in memory from a file that holds it."""
    if name == DENOISER:
        return names.mmdit_from_file(shapes)
    return vae_from_file(shapes) if name == VAE else names.encoder_from_file(shapes, name)


def load_mmdit(
    files: Sd3Files,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    *,
    finished: Finished | None = None,
    keep_float8: bool = False,
) -> MMDiT:
    """The transformer. Arguments and errors: see `library.models.loading.load_flux`."""
    part = files.part(DENOISER)
    with part.opened() as tensors:
        config = MMDiTConfig.from_shapes(part.shapes)
        return filled(lambda: MMDiT(config), tensors, part.shapes, Filling(dtype, device, finished, keep_float8))


def load_encoder(
    files: Sd3Files,
    name: str,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    *,
    finished: Finished | None = None,
    keep_float8: bool = False,
) -> nn.Module:
    """The encoder `clip_l`, `clip_g` (with its projection) or `t5xxl`. As `load_mmdit`."""
    part = files.part(name)
    if name != T5:
        filling = Filling(dtype, device, finished, keep_float8)
        return load_clip(part, _ACTIVATIONS[name], filling)
    filling = Filling(dtype, device, finished, keep_float8, t5.EXACT_IN_FP16)
    with part.opened() as tensors:
        return filled(lambda: t5.build_t5(part.shapes), tensors, part.shapes, filling)


def outline(files: Sd3Files, name: str) -> nn.Module:
    """The transformer or an encoder without its weights, from the headers only. Errors: see `Sd3Files.part`."""
    shapes = files.part(name).shapes
    with torch.device("meta"):
        if name == DENOISER:
            return MMDiT(MMDiTConfig.from_shapes(shapes))
        return t5.build_t5(shapes) if name == T5 else clip.build_clip(shapes, _ACTIVATIONS[name])


def load_vae(files: Sd3Files, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> nn.Module:
    """The autoencoder. As `load_mmdit`."""
    part = files.part(VAE)
    with part.opened() as tensors:
        return filled(lambda: build_vae(part.shapes), tensors, part.shapes, Filling(dtype, device))


def require_whole(part: Part, name: str) -> None:
    """Errors: DataError when tensors of a part are missing, or there are others. Only headers are read."""
    shapes = part.shapes
    builders: Mapping[str, Callable[[], nn.Module]] = {
        DENOISER: lambda: MMDiT(MMDiTConfig.from_shapes(shapes)),
        VAE: lambda: build_vae(shapes),
        T5: lambda: t5.build_t5(shapes),
    }
    build = builders.get(name, lambda: clip.build_clip(shapes, "gelu"))
    try:
        if name in (CLIP_L, CLIP_G):
            with torch.device("meta"):
                recipes = clip.clip_keys(build(), shapes)
        else:
            recipes = same(shapes)
        loading.require_whole(build, mapped_shapes(shapes, recipes))
    except DataError as error:
        raise DataError(error.what, part.where, error.hint, code=error.code) from None


@contextmanager
def single_file(
    files: Sd3Files,
    trained: Mapping[str, nn.Module],
    encoders: tuple[str, ...] = (),
    dtype: torch.dtype | None = None,
) -> Iterator[Joined]:
    """The tensors of a single file: transformer, autoencoder if there is one, and encoders, while the files are open.

    Write it with `save_safetensors`. What isn't trained is read when it is written.

    Args:
        trained: models that replace those of the files, by name.
        encoders: which to put in, if they are there.
        dtype: of what is written; None: as it is in memory and in the files.
    """
    joined = Joined()
    with ExitStack() as stack:
        for name in (DENOISER, VAE, *encoders):
            if name in trained:
                state = trained[name].state_dict()
                if name in (CLIP_L, CLIP_G):
                    state = {clip.file_name(key): tensor for key, tensor in state.items()}
                joined.add(state, _file_layout(name, state), prefix_of(name), dtype)
            elif part := _at_hand(files, name):
                tensors = stack.enter_context(part.opened())
                recipes = keymaps.chained(part.recipes, _file_layout(name, part.shapes))
                joined.add(tensors.source, recipes, prefix_of(name), dtype)
        yield joined


def _at_hand(files: Sd3Files, name: str) -> Part | None:
    """A part; if its file is gone meanwhile, the result gets along without it."""
    try:
        return files.find(name)
    except DataError as error:
        logger.warning("no %s is written: %s", name, error)
        return None


def _file_layout(name: str, shapes: Mapping[str, object]) -> Recipes:
    """The layout in files, without prefix, from that in memory."""
    if name == VAE:
        return keymaps.vae_from_diffusers(shapes)
    recipes = same(shapes)
    if name == T5:
        shared, ours = keymaps.T5_EMBEDDINGS
        recipes[ours] = recipes.pop(shared)
    if name == CLIP_L:  # for programs that multiply by it
        recipes[PROJECTION] = Recipe((_CLIP_NORM,), _identity)
    return recipes


_CLIP_NORM = "text_model.final_layer_norm.weight"


def _identity(norm: Tensor) -> Tensor:
    return torch.eye(len(norm), dtype=norm.dtype, device=norm.device)


def prefix_of(name: str) -> str:
    """What the names of a part begin with in a single file."""
    prefixes = {DENOISER: names.MMDIT_PREFIXES[0], VAE: keymaps.VAE_PREFIXES[0]}
    return prefixes.get(name, names.ENCODER_PREFIX.format(name))
