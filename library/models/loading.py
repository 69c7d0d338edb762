"""Checkpoints into models: built without data, then filled tensor by tensor, so that one copy is in memory at most."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from library.files import Header, fingerprint
from library.log import DataError
from library.models import autoencoder, clip, keymaps, quantized, t5
from library.models.detect import ROLES, refusal
from library.models.flux import Flux, FluxConfig
from library.models.keymaps import Mapped, Recipes, mapped_shapes
from library.models.locations import joint_header, locate, open_tensors
from library.models.scaled_files import ScaledTensors, without_scales

if TYPE_CHECKING:
    from collections.abc import Iterator

Model = TypeVar("Model", bound=nn.Module)
Shapes = Mapping[str, tuple[int, ...]]
Finished = Callable[[str, nn.Module], None]


def load_flux(
    path: Path | str,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    *,
    mmap: bool = True,
    option: str = "--pretrained_model_name_or_path",
    finished: Finished | None = None,
    keep_float8: bool = False,
) -> Flux:
    """The FLUX.1 transformer of a BFL or ComfyUI file, a Diffusers folder, or the first of its shards.

    Args:
        dtype: of all weights; None keeps that of the file.
        option: the option that gave the path, for messages.
        finished: what to call for each module, with its name, as soon as all of its own tensors are there; the next
            tensor is read when it is done.
        keep_float8: leave linear layers of blocks as they are that the file has in float8_e4m3fn, with scales or
            without, whatever `dtype` is. See `library.models.quantized`.

    Raises:
        DataError: the file is something else, damaged, incomplete, or stored in a way that isn't understood.
    """
    with _opened(path, "flux", mmap, option) as tensors:
        source = Mapped(tensors, flux_recipes(tensors.shapes))
        shapes = mapped_shapes(tensors.shapes, source.recipes)
        model = _empty(lambda: Flux(FluxConfig.from_shapes(shapes)))
        return _fill(model, source, shapes, Filling(dtype, device, finished, keep_float8))


def load_autoencoder(
    path: Path | str,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    *,
    mmap: bool = True,
    option: str = "--ae",
) -> nn.Module:
    """The image autoencoder of a file with LDM or Diffusers names, alone or in a full checkpoint. As `load_flux`."""
    with _opened(path, "flux_ae", mmap, option) as tensors:
        ldm = Mapped(tensors, vae_recipes(tensors.shapes))
        ldm_shapes = mapped_shapes(tensors.shapes, ldm.recipes)
        source = Mapped(ldm, keymaps.vae_to_diffusers(ldm_shapes))
        model = _empty(lambda: autoencoder.build_autoencoder(ldm_shapes))
        return _fill(model, source, mapped_shapes(ldm_shapes, source.recipes), Filling(dtype, device))


def load_clip(
    path: Path | str,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    *,
    mmap: bool = True,
    option: str = "--clip_l",
    finished: Finished | None = None,
    keep_float8: bool = False,
) -> nn.Module:
    """The CLIP-L text encoder of a file with Hugging Face names. As `load_flux`."""
    with _opened(path, "clip_l", mmap, option) as tensors:
        file = Mapped(tensors, keymaps.clip_text(tensors.shapes))
        shapes = mapped_shapes(tensors.shapes, file.recipes)
        model = _empty(lambda: clip.build_clip(shapes))
        source = Mapped(file, clip.clip_keys(model, shapes))
        model = _fill(
            model, source, mapped_shapes(shapes, source.recipes), Filling(dtype, device, finished, keep_float8)
        )
        clip.restore_positions(model)
        return model


def load_t5(
    path: Path | str,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    *,
    mmap: bool = True,
    option: str = "--t5xxl",
    finished: Finished | None = None,
    keep_float8: bool = False,
) -> nn.Module:
    """The T5 encoder of a file with Hugging Face names. As `load_flux`."""
    with _opened(path, "t5xxl", mmap, option) as tensors:
        source = Mapped(tensors, keymaps.t5_encoder(tensors.shapes))
        shapes = mapped_shapes(tensors.shapes, source.recipes)
        model = _empty(lambda: t5.build_t5(shapes))
        return _fill(model, source, shapes, Filling(dtype, device, finished, keep_float8, t5.EXACT_IN_FP16))


def filled(build: Callable[[], Model], tensors: Mapped, shapes: Shapes, filling: Filling) -> Model:
    """The model that `build` makes, with tensors of these shapes in it, moved there one by one.

    Errors: DataError when names or shapes differ from those of the model.
    """
    return _fill(_empty(build), tensors, shapes, filling)


def require_whole(build: Callable[[], nn.Module], shapes: Shapes) -> None:
    """Errors: DataError when tensors of these names and shapes aren't those of the model that `build` makes."""
    _compare({names[0]: tuple(tensor.shape) for names, tensor in _tensors_of(_empty(build))}, shapes)


def header_of(path: Path | str, role: str, option: str) -> Header:
    """Names, shapes and metadata of a model (a key of `detect.ROLES`), names as in its files; nothing else is read."""
    found = joint_header(locate(path, option, ROLES[role].folders), option)
    return replace(found, tensors=without_scales(found.tensors))


def flux_shapes(path: Path | str, option: str) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of a FLUX.1 transformer, BFL names, from the headers only."""
    shapes = header_of(path, "flux", option).shapes
    return mapped_shapes(shapes, flux_recipes(shapes))


def frozen(module: nn.Module) -> nn.Module:
    """The model, in evaluation mode and without gradients."""
    return module.eval().requires_grad_(False)


def fingerprint_of(path: Path | str, role: str, option: str) -> str:
    """Changes when a file of the model changes."""
    return "-".join(fingerprint(file) for file in locate(path, option, ROLES[role].folders))


def flux_recipes(shapes: Shapes) -> Recipes:
    """BFL layout from any of the layouts in which FLUX.1 comes."""
    if "transformer_blocks.0.attn.add_k_proj.weight" in shapes:
        return keymaps.flux_from_diffusers(shapes)
    return _unprefixed(shapes, keymaps.FLUX_PREFIXES, "img_in.weight")


def vae_recipes(shapes: Shapes) -> Recipes:
    """LDM layout from any of the layouts in which autoencoders come."""
    recipes = _unprefixed(shapes, keymaps.VAE_PREFIXES, "decoder.conv_in.weight")
    if "decoder.up_blocks.0.resnets.0.conv1.weight" in recipes:
        return keymaps.vae_from_diffusers(recipes)
    return recipes


def _unprefixed(shapes: Shapes, prefixes: Iterable[str], known: str) -> Recipes:
    """The tensors below the prefix at which the tensor `known` lies."""
    prefix = next((prefix for prefix in prefixes if prefix + known in shapes), "")
    return keymaps.without_prefix(shapes, prefix)


@contextmanager
def _opened(path: Path | str, role: str, mmap: bool, option: str) -> Iterator[ScaledTensors]:
    """The tensors of a file that can play `role`; errors inside the block come out naming option and path."""
    paths = locate(path, option, ROLES[role].folders)
    found = joint_header(paths, option)
    if problem := refusal(found, path, option, role):
        raise DataError(problem.what, problem.where, problem.hint, code=problem.code)
    with open_tensors(paths, mmap) as tensors:
        try:
            yield ScaledTensors(tensors)
        except DataError as error:
            raise DataError(error.what, f"{option} {path}", error.hint, code=error.code) from None


def _empty(build: Callable[[], Model]) -> Model:
    """A model without data."""
    with torch.device("meta"):
        return build()


@dataclass(frozen=True)
class Filling:
    """How a model is filled, see `load_flux`."""

    dtype: torch.dtype | None
    device: torch.device | str
    finished: Finished | None = None
    keep_float8: bool = False
    exact: tuple[str, ...] = ()
    """Ends of the names of tensors that are held in float32 where others are in float16."""

    def placed(self, name: str, value: Tensor) -> Tensor:
        """A copy of a tensor, in type and place."""
        exact = self.dtype == torch.float16 and name.endswith(self.exact)
        return value.detach().to(device=self.device, dtype=torch.float32 if exact else self.dtype, copy=True)


def _fill(model: Model, tensors: Mapped, shapes: Shapes, filling: Filling) -> Model:
    """The model with the tensors in place of its empty ones; aliases of one tensor stay one."""
    empty = {names[0]: tensor for names, tensor in _tensors_of(model)}
    places = {names[0]: names for names, _ in _tensors_of(model)}
    _compare({name: tuple(tensor.shape) for name, tensor in empty.items()}, shapes)
    missing = Counter(name.rpartition(".")[0] for names in places.values() for name in names)
    for name in tensors:
        if not (filling.keep_float8 and _adopted(model, name, tensors, filling)):
            value = filling.placed(name, tensors[name])
            if isinstance(empty[name], nn.Parameter):
                value = nn.Parameter(value, requires_grad=value.is_floating_point())
            for alias in places[name]:
                owner, _, leaf = alias.rpartition(".")
                setattr(model.get_submodule(owner), leaf, value)
        for alias in places[name]:
            owner = alias.rpartition(".")[0]
            missing[owner] -= 1
            if owner and filling.finished is not None and not missing[owner]:
                filling.finished(owner, model.get_submodule(owner))
    return model


def _tensors_of(model: nn.Module) -> Iterator[tuple[list[str], Tensor]]:
    """Parameters, and buffers that files hold, with all the names that each has."""
    named: dict[int, tuple[list[str], Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        named.setdefault(id(tensor), ([], tensor))[0].append(name)
    yield from named.values()


def _adopted(model: nn.Module, name: str, tensors: Mapped, filling: Filling) -> bool:
    """Whether a weight could be left as the file has it."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if leaf != "weight" or type(module) is not nn.Linear or not quantized.is_in_a_block(owner):
        return False
    recipe, source = tensors.recipes[name], tensors.source
    while isinstance(source, Mapped) and recipe.make is None:
        recipe, source = source.recipes[recipe.sources[0]], source.source
    if not isinstance(source, ScaledTensors):
        return False
    parts = [source.parts(part) for part in recipe.sources]
    weights, scales = [weight for weight, _ in parts], [scale for _, scale in parts if scale is not None]
    if any(weight.dtype != torch.float8_e4m3fn for weight in weights) or len(scales) not in (0, len(parts)):
        return False
    scale = recipe(scales).to(filling.device, copy=True) if scales else None
    quantized.adopt(module, recipe(weights).to(filling.device, copy=True), scale)
    return True


def _compare(wanted: Shapes, given: Shapes) -> None:
    """Errors: DataError, in one line, when names or shapes differ."""
    differences = [
        _listed([name for name in wanted if name not in given], "missing"),
        _listed([name for name in given if name not in wanted], "unexpected"),
        _listed(
            [
                f"{name} {list(given[name])} instead of {list(shape)}"
                for name, shape in wanted.items()
                if name in given and tuple(given[name]) != tuple(shape)
            ],
            "of a wrong shape",
        ),
    ]
    found = [difference for difference in differences if difference]
    if found:
        what = f"the tensors do not fit: {'; '.join(found)}"
        raise DataError(what, hint="the file is incomplete or of another kind", code="E-MODEL-KEYS")


def _listed(names: list[str], what: str) -> str:
    if not names:
        return ""
    return f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
