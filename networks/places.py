"""Where the modules of adapters lie in checkpoints: names in adapter files -> keys of FLUX, SD3, SD and SDXL files.

Everything is found by names and shapes of a header; no model is built.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from library.log import DataError
from library.models import keymaps, keymaps_sd, keymaps_sd3
from library.models.keymaps import Recipe, Recipes, Rows, mapped_shapes
from library.models.keymaps_sd import CLIP_PREFIXES, OPEN_CLIP_PREFIXES, Version
from library.types import DENOISER
from networks.base import encoder_component
from networks.targets import FLUX, SD, SD3, SDXL, Part
from networks.unet import UnetLayout

Shapes = Mapping[str, "tuple[int, ...]"]

WEIGHT = ".weight"


@dataclass(frozen=True)
class Place:
    """The weight of one module in a checkpoint."""

    key: str
    """Of the tensor in the file."""
    shape: tuple[int, ...]
    """Of the module's weight: that of the tensor, or of its rows; 1x1 convolutions may have another in the file."""
    rows: tuple[int, int] | None = None
    """First and last + 1 of the rows that are the module's, where a checkpoint keeps several in one tensor (OpenCLIP's
    queries, keys, values); None: all."""
    parts: tuple[int, ...] = ()
    """Numbers of outputs of the layers that are fused in the module, see `Target.parts`."""
    component: str = DENOISER
    """`library.types.DENOISER`, or `networks.base.encoder_component` of a text encoder."""
    usual: bool = True
    """Whether networks have adapters there, on request or not; the others only occur in files from elsewhere."""
    extra: bool = False
    """Whether they have them on request only, see `FamilyTargets.extras`."""


Places = Mapping[str, Place]
"""By module name as in adapter files: `lora_unet_...`; `AdapterFile` names OFT's modules so, too."""


def empty_module(shape: Sequence[int]) -> nn.Linear | nn.Conv2d:
    """A linear layer or a convolution with a weight of this shape and no data."""
    out, inputs, *kernel = shape
    with torch.device("meta"):
        if kernel:
            return nn.Conv2d(inputs, out, (kernel[0], kernel[1]), bias=False)
        return nn.Linear(inputs, out, bias=False)


def flux_places(shapes: Shapes) -> dict[str, Place]:
    """Of the transformer in a FLUX checkpoint in its own layout, with any prefix such as model.diffusion_model.

    Errors: DataError when there is none.
    """
    first = "double_blocks.0.img_attn.qkv.weight"
    prefix = next((key.removesuffix(first) for key in shapes if key.endswith(first)), None)
    if prefix is None:
        raise DataError("no FLUX.1 transformer in its own layout", "the model", code="E-MODEL-KIND")
    recipes = keymaps.without_prefix(shapes, prefix)
    extras = [part for part in (FLUX.denoiser, FLUX.extras, _all_of(FLUX.denoiser)) if part]
    return _places(shapes, recipes, extras, DENOISER)


def clip_places(shapes: Shapes, prefix: str, component: str) -> dict[str, Place]:
    """Of a CLIP text encoder in the layout of transformers; `prefix` as in adapter files: lora_te, lora_te1."""
    part = replace(FLUX.encoders[0], prefix=prefix)
    return _places(shapes, keymaps.clip_text(shapes), [part], component)


def t5_places(shapes: Shapes) -> dict[str, Place]:
    """Of T5-XXL's encoder, `lora_te3_...`."""
    return _places(shapes, keymaps.t5_encoder(shapes), [FLUX.encoders[1]], encoder_component(1))


def sd3_places(shapes: Shapes) -> dict[str, Place]:
    """Of the transformer in an SD3 checkpoint in its own layout, and of the text encoders that lie beside it.

    Errors: DataError when there is none.
    """
    recipes = keymaps_sd3.mmdit_from_file(shapes)
    if "x_embedder.proj.weight" not in recipes:
        raise DataError("no SD3 transformer in its own layout", "the model", code="E-MODEL-KIND")
    found = _places(
        shapes, recipes, [part for part in (SD3.denoiser, SD3.extras, _all_of(SD3.denoiser)) if part], DENOISER
    )
    for encoder in keymaps_sd3.ENCODERS:
        if keymaps_sd3.embedded(shapes, encoder):
            found |= sd3_encoder_places(shapes, encoder)
    return found


def sd3_encoder_places(shapes: Shapes, encoder: str) -> dict[str, Place]:
    """Of `clip_l`, `clip_g` or `t5xxl` in a file of its own, or in an SD3 checkpoint."""
    index = keymaps_sd3.ENCODERS.index(encoder)
    recipes = keymaps_sd3.encoder_from_file(shapes, encoder)
    return _places(shapes, recipes, [SD3.encoders[index]], encoder_component(index))


def sd_version(shapes: Shapes) -> Version:
    """Which of SD 1.x, SD 2.x and SDXL a single file is: told by the text encoder where there is one."""
    for version, starts in (OPEN_CLIP_PREFIXES | CLIP_PREFIXES).items():
        if version != "xl" and any(name.startswith(starts) for name in shapes):
            return version
    return keymaps_sd.unet_version(shapes)


def sd_places(shapes: Shapes) -> dict[str, Place]:
    """Of U-Net and text encoders of an SD 1.x, SD 2.x or SDXL checkpoint (one file, the layout of the first ones).

    Errors: DataError when it is something else.
    """
    version = sd_version(shapes)
    family = SDXL if version == "xl" else SD
    unet = {name: recipe for name, recipe in keymaps_sd.unet_from_file(shapes).items() if _is_unet(recipe)}
    layout = UnetLayout([name.removesuffix(WEIGHT) for name in unet])
    if not any(layout.counts):
        raise DataError("no SD or SDXL checkpoint", "the model", "give a whole checkpoint", code="E-MODEL-KIND")
    parts = [part for part in (family.denoiser, family.extras) if part]
    parts = [replace(part, written=layout.written) for part in parts] if version == "xl" else parts
    rest = _all_of(family.denoiser)
    found = _places(shapes, unet, [*parts, replace(rest, written=_original) if version == "xl" else rest], DENOISER)
    for index, part in enumerate(family.encoders):
        recipes = _encoder(shapes, version, index)
        found |= _places(shapes, recipes, [part], encoder_component(index))
    return found


def sdxl_aliases(shapes: Shapes) -> dict[str, str]:
    """Names of U-Net modules in other files for SDXL, after the layout of Diffusers -> those of `sd_places`."""
    recipes = {name: recipe for name, recipe in keymaps_sd.unet_from_file(shapes).items() if _is_unet(recipe)}
    layout = UnetLayout([name.removesuffix(WEIGHT) for name in recipes])
    parts = [part for part in (SDXL.denoiser, SDXL.extras) if part]
    paths = [name.removesuffix(WEIGHT) for name in _layers(shapes, recipes)]
    pairs = [(path, part) for path in paths for part in parts if part.target(path, empty_module((1, 1)))]
    return {part.file_name(path): part.file_name(layout.written(path)) for path, part in pairs}


def _is_unet(recipe: Recipe) -> bool:
    return not recipe.sources[0].startswith(("cond_stage_model.", "conditioner.", "first_stage_model."))


def _encoder(shapes: Shapes, version: Version, index: int) -> Recipes:
    if version == "2" or index:
        return keymaps_sd.open_clip_from_file(shapes, version)
    return keymaps_sd.clip_from_file(shapes, version)


_ORIGINAL = {"conv_in": "input_blocks.0.0", "conv_out": "out.2"} | {
    f"{new}.linear_{number}": f"{old}.{2 * number - 2}"
    for new, old in (("time_embedding", "time_embed"), ("add_embedding", "label_emb.0"))
    for number in (1, 2)
}


def _original(path: str) -> str:
    """What the first checkpoints call layers outside of blocks."""
    return _ORIGINAL.get(path, path)


def _all_of(part: Part) -> Part:
    """All layers of a model."""
    return replace(part, pattern=r"(?P<path>.+)", fused=None)


def _places(shapes: Shapes, recipes: Recipes, parts: Sequence[Part], component: str) -> dict[str, Place]:
    """The layers of a model by module name; the last of several `parts` is that of files from elsewhere."""
    layers = _layers(shapes, recipes)
    found: dict[str, Place] = {}
    for name, shape, part in _matched(layers, parts):
        target = part.target(name.removesuffix(WEIGHT), empty_module(shape))
        assert target is not None
        recipe = recipes[name]
        rows = (recipe.make.start, recipe.make.stop or 0) if isinstance(recipe.make, Rows) else None
        number = parts.index(part)
        usual = number == 0 or part is not parts[-1]
        extra = number == 1 and usual
        found[target.name] = Place(recipe.sources[0], shape, rows, target.parts, component, usual, extra)
    return found


def _layers(shapes: Shapes, recipes: Recipes) -> dict[str, tuple[int, ...]]:
    """The shapes of weights of linear layers, convolutions and embeddings, in the layout of the recipes."""
    weights = {name: recipe for name, recipe in recipes.items() if name.endswith(WEIGHT)}
    return {name: shape for name, shape in mapped_shapes(shapes, weights).items() if len(shape) in (2, 4)}


def _matched(layers: Shapes, parts: Iterable[Part]) -> Iterator[tuple[str, tuple[int, ...], Part]]:
    """Each layer with the first part that it belongs to."""
    parts = list(parts)
    for name, shape in layers.items():
        path = name.removesuffix(WEIGHT)
        part = next((part for part in parts if part.target(path, empty_module((1, 1)))), None)
        if part is not None:
            yield name, shape, part
