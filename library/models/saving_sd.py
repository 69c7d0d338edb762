"""Whole checkpoints of SD 1.x, 2.x and SDXL as single files; as Diffusers folders in `library.models.folders_sd`.

What isn't trained comes from the checkpoint that the training started from, read when it is written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from library.log import DataError, get_logger
from library.models import clip, keymaps, keymaps_sd
from library.models.checkpoints_sd import TEXT_2, UNET, V_MARK, VAE, ZERO_MARK, Checkpoint, Part
from library.models.joined import Joined, same
from library.models.keymaps import Recipes, Shapes
from library.models.locations import open_tensors

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

logger = get_logger(__name__)

Kind = Literal["safetensors", "ckpt", "diffusers", "diffusers_safetensors"]
"""Values of `--save_model_as`."""
SINGLE: Mapping[str, str] = {"safetensors": ".safetensors", "ckpt": ".ckpt"}
"""Kinds that are one file, and what their names end in."""
_XL_EXTRAS = ("conditioner.embedders.1.model.logit_scale", V_MARK, ZERO_MARK)
"""What survives of an SDXL source besides its models."""


@dataclass(frozen=True)
class Product:
    """A checkpoint that is to be written."""

    source: Checkpoint
    """What the training started from."""
    trained: Mapping[str, nn.Module]
    """The models that replace those of the source, by name (see `library.models.checkpoints_sd`)."""
    vae: Part | None = None
    """The autoencoder that replaces that of the source."""
    dtype: torch.dtype | None = None
    """Of what is written; None: as it is in memory and in the source."""
    epoch: int = 0
    """Of this run; for `.ckpt`, where those of the source are added."""
    steps: int = 0
    v_prediction: bool = False
    zero_terminal: bool = False
    tokenizers: Mapping[str, Any] = field(default_factory=dict)
    """For folders: `tokenizer`, `tokenizer_2`; those that are missing are copied from a source folder."""
    reference: Path | None = None
    """For folders: another one, whose scheduler is taken."""

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of all models."""
        return (UNET, *self.source.encoders, VAE)


def default_kind(source: Checkpoint) -> Kind:
    """What a checkpoint is saved as without `--save_model_as`: a file or a folder, as the source is."""
    return "diffusers_safetensors" if source.is_folder else "safetensors"


def save_checkpoint(path: Path, kind: Kind, product: Product, metadata: Mapping[str, str] | None = None) -> None:
    """Write a checkpoint, whole or not at all.

    Args:
        path: of the file or the folder.
        metadata: for `.safetensors`; the other kinds have none.

    Raises:
        ResourceError: disk full, no permission.
    """
    if kind in SINGLE:
        save_single(path, kind, product, metadata)
    else:
        from library.models.folders_sd import save_folder

        save_folder(path, product, safetensors=kind == "diffusers_safetensors")


def save_single(path: Path, kind: str, product: Product, metadata: Mapping[str, str] | None = None) -> None:
    """Write a single file, `.safetensors` or `.ckpt`. See `save_checkpoint`.

    SD 1.x and 2.x keep all other tensors of a single file that they started from, as they were there; SDXL keeps none.
    """
    with ExitStack() as stack:
        joined = Joined()
        product = _carried(joined, product, stack)
        for name in product.parts:
            if part := _opened(product, name, stack):
                tensors, recipes, shapes = part
                ldm = keymaps.chained(recipes, to_single(name, product, shapes))
                joined.add(tensors, ldm, single_prefix(name, product), product.dtype)
        if kind == "safetensors":
            joined.save_safetensors(path, metadata)
        else:
            before = product.source.header.metadata
            counts = {"epoch": product.epoch, "global_step": product.steps}
            joined.save_pickled(path, {name: count + int(before.get(name, 0)) for name, count in counts.items()})


def _carried(joined: Joined, product: Product, stack: ExitStack) -> Product:
    """Add what is carried over from a single file; if that is gone, the result gets along without it."""
    source = product.source
    try:
        tensors = open_tensors(source.files, source.mmap)
        stack.enter_context(tensors)
        if tensors.shapes != source.header.shapes:
            raise DataError("it was changed", str(source.path))
    except (DataError, OSError):
        logger.warning("%s is gone or was changed: only what was trained is written", source.path)
        return replace(product, source=replace(source, files=()))
    if source.is_folder:
        return product
    if source.version == "xl":
        extras = {name for name in _XL_EXTRAS if name in tensors}
        joined.add(tensors, same(dict.fromkeys(sorted(extras))), dtype=product.dtype)
        return product
    known = {name for part in product.parts for name in _sources(source, part)}
    joined.add(tensors, same({name: None for name in tensors if name not in known}))
    return product


def _sources(source: Checkpoint, name: str) -> set[str]:
    """The tensors of a single file that make up a part; none if it hasn't got it."""
    try:
        recipes = source.part(name).recipes
    except DataError:
        return set()
    return {tensor for recipe in recipes.values() for tensor in recipe.sources}


@contextmanager
def opened(product: Product, name: str) -> Iterator[tuple[Mapping[str, Tensor], Recipes, Shapes] | None]:
    """See `_opened`."""
    with ExitStack() as stack:
        yield _opened(product, name, stack)


def _opened(product: Product, name: str, stack: ExitStack) -> tuple[Mapping[str, Tensor], Recipes, Shapes] | None:
    """Tensors, how the layout of the models is made of them, and its shapes; None for a part that is nowhere."""
    if name in product.trained:
        state: Mapping[str, Tensor] = product.trained[name].state_dict()
        if name not in (UNET, VAE):
            state = {clip.file_name(key): tensor for key, tensor in state.items()}
        return state, same(state), {key: tuple(tensor.shape) for key, tensor in state.items()}
    part = product.vae if name == VAE else None
    if part is None:
        try:
            part = product.source.part(name) if product.source.files else None
        except DataError:
            logger.warning("%s has no %s: none is written", product.source.path, name)
    if part is None:
        return None
    return stack.enter_context(open_tensors(part.files, part.mmap)), part.recipes, part.shapes


def to_single(name: str, product: Product, shapes: Shapes) -> Recipes:
    """The layout of single files, without prefix, from that of a model."""
    version = product.source.version
    if name == UNET:
        return keymaps_sd.unet_to_ldm(shapes)
    if name == VAE:
        return keymaps.vae_from_diffusers(shapes)
    if name != TEXT_2 and version != "2":
        return same(shapes)
    recipes = keymaps_sd.open_clip_to_ldm(shapes)
    if version == "2" and (product.source.is_folder or not product.source.files):
        recipes |= keymaps_sd.made_up_sd2(shapes)
    return recipes


def single_prefix(name: str, product: Product) -> str:
    """What stands before the names of a part in single files."""
    version = product.source.version
    if name == UNET:
        return keymaps_sd.UNET_PREFIXES[0]
    if name == VAE:
        return keymaps.VAE_PREFIXES[0]
    prefixes = keymaps_sd.OPEN_CLIP_PREFIXES if name == TEXT_2 or version == "2" else keymaps_sd.CLIP_PREFIXES
    return prefixes[version][0]
