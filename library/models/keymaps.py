"""Names of tensors in the layouts that checkpoints come in, as tables, and how one layout is made from another."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Recipe:
    """How one tensor is made: from which tensors, by which function of all of them."""

    sources: tuple[str, ...]
    make: Callable[..., Tensor] | None = None
    """None: the one source as it is."""

    def __call__(self, tensors: Sequence[Tensor]) -> Tensor:
        """The tensor."""
        return tensors[0] if self.make is None else self.make(*tensors)


Recipes = dict[str, Recipe]
"""Name in the new layout -> how it is made of the old."""


class Mapped(Mapping[str, Tensor]):
    """Tensors in a new layout, each made from its sources when it is asked for."""

    def __init__(self, source: Mapping[str, Tensor], recipes: Recipes) -> None:
        self.source = source
        self.recipes = recipes

    def __getitem__(self, name: str) -> Tensor:
        recipe = self.recipes[name]
        return recipe([self.source[source] for source in recipe.sources])

    def __iter__(self) -> Iterator[str]:
        return iter(self.recipes)

    def __len__(self) -> int:
        return len(self.recipes)

    def __contains__(self, name: object) -> bool:
        return name in self.recipes


def mapped_shapes(shapes: Shapes, recipes: Recipes) -> dict[str, tuple[int, ...]]:
    """Shapes in the new layout, without any data."""

    def empty(name: str) -> Tensor:
        return torch.empty(shapes[name], device="meta")

    return {name: tuple(recipe([empty(source) for source in recipe.sources]).shape) for name, recipe in recipes.items()}


def without_prefix(names: Mapping[str, object], prefix: str) -> Recipes:
    """Only the tensors below `prefix`, under their names after it."""
    return {name.removeprefix(prefix): Recipe((name,)) for name in names if name.startswith(prefix)}


def chained(first: Recipes, second: Recipes) -> Recipes:
    """The tensors of `second`, which is made of those of `first`, made of those of which `first` is made."""
    return {name: _chain([first[source] for source in recipe.sources], recipe) for name, recipe in second.items()}


def _chain(inner: Sequence[Recipe], outer: Recipe) -> Recipe:
    sources = tuple(source for recipe in inner for source in recipe.sources)
    if outer.make is None:
        return inner[0]
    if all(recipe.make is None for recipe in inner):
        return Recipe(sources, outer.make)
    return Recipe(sources, _Chain(tuple(inner), outer))


@dataclass(frozen=True)
class _Chain:
    inner: tuple[Recipe, ...]
    outer: Recipe

    def __call__(self, *tensors: Tensor) -> Tensor:
        made, position = [], 0
        for recipe in self.inner:
            made.append(recipe(tensors[position : position + len(recipe.sources)]))
            position += len(recipe.sources)
        return self.outer(made)


def count_indices(names: Iterable[str], pattern: str) -> int:
    """1 + the largest index in the names that begin like this; 0 without any."""
    matches = (re.match(pattern, name) for name in names)
    return 1 + max((int(match[1]) for match in matches if match), default=-1)


# FLUX.1: names of the authors (BFL) and of Diffusers

FLUX_PREFIXES = ("model.diffusion_model.", "diffusion_model.")
"""What programs put before the authors' names."""

_FLUX = {
    "img_in": ["x_embedder"],
    "txt_in": ["context_embedder"],
    "time_in.in_layer": ["time_text_embed.timestep_embedder.linear_1"],
    "time_in.out_layer": ["time_text_embed.timestep_embedder.linear_2"],
    "vector_in.in_layer": ["time_text_embed.text_embedder.linear_1"],
    "vector_in.out_layer": ["time_text_embed.text_embedder.linear_2"],
    "guidance_in.in_layer": ["time_text_embed.guidance_embedder.linear_1"],
    "guidance_in.out_layer": ["time_text_embed.guidance_embedder.linear_2"],
    "final_layer.linear": ["proj_out"],
    "final_layer.adaLN_modulation.1": ["norm_out.linear"],
}
_FLUX_DOUBLE = {
    "img_mod.lin": ["norm1.linear"],
    "img_attn.qkv": ["attn.to_q", "attn.to_k", "attn.to_v"],
    "img_attn.norm.query_norm.scale": ["attn.norm_q.weight"],
    "img_attn.norm.key_norm.scale": ["attn.norm_k.weight"],
    "img_attn.proj": ["attn.to_out.0"],
    "img_mlp.0": ["ff.net.0.proj"],
    "img_mlp.2": ["ff.net.2"],
    "txt_mod.lin": ["norm1_context.linear"],
    "txt_attn.qkv": ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"],
    "txt_attn.norm.query_norm.scale": ["attn.norm_added_q.weight"],
    "txt_attn.norm.key_norm.scale": ["attn.norm_added_k.weight"],
    "txt_attn.proj": ["attn.to_add_out"],
    "txt_mlp.0": ["ff_context.net.0.proj"],
    "txt_mlp.2": ["ff_context.net.2"],
}
_FLUX_SINGLE = {
    "modulation.lin": ["norm.linear"],
    "linear1": ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"],
    "linear2": ["proj_out"],
    "norm.query_norm.scale": ["attn.norm_q.weight"],
    "norm.key_norm.scale": ["attn.norm_k.weight"],
}
_FLUX_SWAPPED = ("final_layer.adaLN_modulation.1.weight", "final_layer.adaLN_modulation.1.bias")
"""BFL: shift, scale. Diffusers: scale, shift."""


def flux_names(double_blocks: int, single_blocks: int) -> dict[str, tuple[str, ...]]:
    """BFL name -> the Diffusers names whose tensors, one below the other, make it up; guidance included."""
    tables: list[tuple[str, str, Mapping[str, Sequence[str]]]] = [("", "", _FLUX)]
    tables += [(f"double_blocks.{i}.", f"transformer_blocks.{i}.", _FLUX_DOUBLE) for i in range(double_blocks)]
    tables += [(f"single_blocks.{i}.", f"single_transformer_blocks.{i}.", _FLUX_SINGLE) for i in range(single_blocks)]
    return table_of(tables)


def flux_from_diffusers(names: Mapping[str, object]) -> Recipes:
    """BFL layout from Diffusers names; tensors of unknown names keep them, and those that can't be made are absent."""
    double, single = (count_indices(names, rf"{kind}transformer_blocks\.(\d+)\.") for kind in ("", "single_"))
    return from_parts(flux_names(double, single), names, _FLUX_SWAPPED)


def flux_to_diffusers(shapes: Shapes) -> Recipes:
    """Diffusers layout from BFL tensors."""
    double, single = (count_indices(shapes, rf"{kind}_blocks\.(\d+)\.") for kind in ("double", "single"))
    return to_parts(flux_names(double, single), shapes, _FLUX_SWAPPED)


# layouts that differ in names, in fused layers, and in the order of halves

Table = Mapping[str, tuple[str, ...]]
"""A name in one layout -> names in another whose tensors, one below the other, make it up."""


def table_of(modules: Iterable[tuple[str, str, Mapping[str, Sequence[str]]]]) -> dict[str, tuple[str, ...]]:
    """The table of tensors from tables of layers, each with the beginnings of its names in both layouts.

    Names of layers stand for their weight and bias, those that end in `.scale` or `.weight` for a tensor.
    """
    names: dict[str, tuple[str, ...]] = {}
    for before, new_before, table in modules:
        for ours, theirs in table.items():
            for kind in ("",) if ours.endswith((".scale", ".weight")) else (".weight", ".bias"):
                names[before + ours + kind] = tuple(new_before + name + kind for name in theirs)
    return names


def from_parts(table: Table, names: Mapping[str, object], swapped: Collection[str] = ()) -> Recipes:
    """The first layout of a table from the names of the second; unknown names stay, what can't be made is absent.

    Args:
        swapped: names of tensors whose halves the layouts have in different order.
    """
    known = {source for sources in table.values() for source in sources}
    recipes = {
        ours: Recipe(sources, _swap_halves if ours in swapped else stack if len(sources) > 1 else None)
        for ours, sources in table.items()
        if all(source in names for source in sources)
    }
    return recipes | {name: Recipe((name,)) for name in names if name not in known}


def to_parts(table: Table, shapes: Shapes, swapped: Collection[str] = ()) -> Recipes:
    """The second layout of a table from tensors of the first; see `from_parts`."""
    recipes: Recipes = {}
    for ours, targets in table.items():
        if ours in shapes:
            width = shapes[ours.removesuffix(".bias").removesuffix(".weight") + ".weight"][1] if len(targets) > 1 else 0
            for index, target in enumerate(targets):
                if ours in swapped:
                    recipes[target] = Recipe((ours,), _swap_halves)
                elif len(targets) > 1:
                    stop = (index + 1) * width if index + 1 < len(targets) else None
                    recipes[target] = Recipe((ours,), Rows(index * width, stop))
                else:
                    recipes[target] = Recipe((ours,))
    return recipes


@dataclass(frozen=True)
class Rows:
    """Makes a tensor of some rows of another."""

    start: int
    stop: int | None

    def __call__(self, tensor: Tensor) -> Tensor:
        return tensor[self.start : self.stop]


def stack(*tensors: Tensor) -> Tensor:
    """The tensors, one below the other."""
    return torch.cat(tensors)


def _swap_halves(tensor: Tensor) -> Tensor:
    return torch.cat(tensor.chunk(2)[::-1])


# The autoencoder: names of latent-diffusion (LDM) and of Diffusers

VAE_PREFIXES = ("first_stage_model.", "vae.")

_RESIDUAL = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "nin_shortcut": "conv_shortcut"}
_VAE_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_VAE_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""Names of early Diffusers files."""


def vae_names(levels: int, blocks: int) -> dict[str, str]:
    """LDM name -> Diffusers name, for `levels` resolutions with up to `blocks` residual blocks each."""
    modules = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    for side in ("encoder", "decoder"):
        modules |= {f"{side}.{ldm}": f"{side}.{new}" for ldm, new in _VAE_ENDS.items()}
        for ldm, new in _VAE_ATTENTION.items():
            modules[f"{side}.mid.attn_1.{ldm}"] = f"{side}.mid_block.attentions.0.{new}"
        for i in range(2):
            modules |= _residual(f"{side}.mid.block_{i + 1}", f"{side}.mid_block.resnets.{i}")
    for level in range(levels):
        down, up = f"encoder.down_blocks.{level}", f"decoder.up_blocks.{levels - 1 - level}"
        modules[f"encoder.down.{level}.downsample.conv"] = f"{down}.downsamplers.0.conv"
        modules[f"decoder.up.{level}.upsample.conv"] = f"{up}.upsamplers.0.conv"
        for block in range(blocks):
            modules |= _residual(f"encoder.down.{level}.block.{block}", f"{down}.resnets.{block}")
            modules |= _residual(f"decoder.up.{level}.block.{block}", f"{up}.resnets.{block}")
    return {ldm + kind: new + kind for ldm, new in modules.items() for kind in (".weight", ".bias")}


_VAE_ENDS = {"conv_in": "conv_in", "norm_out": "conv_norm_out", "conv_out": "conv_out"}


def _residual(ldm: str, new: str) -> dict[str, str]:
    return {f"{ldm}.{theirs}": f"{new}.{ours}" for theirs, ours in _RESIDUAL.items()}


def vae_to_diffusers(names: Mapping[str, object]) -> Recipes:
    """Diffusers layout from LDM names; tensors of unknown names keep them."""
    levels = count_indices(names, r"encoder\.down\.(\d+)\.")
    table = vae_names(levels, count_indices(names, r"decoder\.up\.\d+\.block\.(\d+)\."))
    return {table.get(name, name): Recipe((name,), flatten if _is_vae_attention(name) else None) for name in names}


def vae_from_diffusers(names: Mapping[str, object]) -> Recipes:
    """LDM layout from Diffusers names, early ones too; tensors of unknown names keep them."""
    levels = count_indices(names, r"encoder\.down_blocks\.(\d+)\.")
    table = vae_names(levels, count_indices(names, r"decoder\.up_blocks\.\d+\.resnets\.(\d+)\."))
    back = {new: ldm for ldm, new in table.items()}
    recipes: Recipes = {}
    for name in names:
        old = re.sub(r"\.(query|key|value|proj_attn)\.", lambda match: f".{_VAE_OLD_ATTENTION[match[1]]}.", name)
        ldm = back.get(old, name)
        recipes[ldm] = Recipe((name,), unflatten if _is_vae_attention(ldm) else None)
    return recipes


def _is_vae_attention(ldm: str) -> bool:
    return ".mid.attn_1." in ldm and ldm.endswith(".weight") and ".norm." not in ldm


def flatten(tensor: Tensor) -> Tensor:
    """A matrix from a 1x1 convolution."""
    return tensor.reshape(tensor.shape[:2])


def unflatten(tensor: Tensor) -> Tensor:
    """A 1x1 convolution from a matrix."""
    return tensor.reshape(*tensor.shape[:2], 1, 1)


# Text encoders: Hugging Face names

CLIP_TOKENS = "text_model.embeddings.token_embedding.weight"
PROJECTION = "text_projection.weight"
CLIP_IGNORED = (
    "logit_scale",
    "text_projection.",
    "text_model.embeddings.position_ids",
    "vision_model.",
    "visual_projection.",
)
"""What CLIP files may hold besides the text tower."""

T5_FIRST = "encoder.block.0.layer.0.SelfAttention.q.weight"
T5_EMBEDDINGS = ("shared.weight", "encoder.embed_tokens.weight")
T5_IGNORED = ("decoder.", "lm_head.", "spiece_model", "logit_scale")
"""What T5 files may hold besides the encoder."""


def clip_text(names: Mapping[str, object], *, projected: bool = False) -> Recipes:
    """The text tower of a CLIP file, `text_model.…`, wherever in a bigger file it lies; its projection if wanted."""
    prefix = next((name.removesuffix(CLIP_TOKENS) for name in names if name.endswith(CLIP_TOKENS)), "")
    found = without_prefix(names, prefix)
    projection = {name: recipe for name, recipe in found.items() if projected and name == PROJECTION}
    return _without(found, CLIP_IGNORED) | projection


def t5_encoder(names: Mapping[str, object]) -> Recipes:
    """The encoder of a T5 file with its token embedding as `shared.weight`, wherever in a bigger file it lies."""
    prefix = next((name.removesuffix(T5_FIRST) for name in names if name.endswith(T5_FIRST)), "")
    recipes = _without(without_prefix(names, prefix), T5_IGNORED)
    for name in T5_EMBEDDINGS:
        if name in recipes:
            recipes = {T5_EMBEDDINGS[0]: recipes[name]} | {
                other: recipe for other, recipe in recipes.items() if other not in T5_EMBEDDINGS
            }
            break
    return recipes


def _without(recipes: Recipes, starts: tuple[str, ...]) -> Recipes:
    return {name: recipe for name, recipe in recipes.items() if not name.startswith(starts)}
