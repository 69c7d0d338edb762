"""Names of the tensors of SD 1.x, SD 2.x and SDXL, as tables: single files (LDM) and Diffusers, exact both ways.

Recipes read from a whole file: their sources carry its prefixes. Those that make a single file give the names after the
prefix. Tensors of unknown names keep them, so that who fills a model sees them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from library.models import keymaps
from library.models.keymaps import (
    CLIP_IGNORED,
    CLIP_TOKENS,
    PROJECTION,
    Recipe,
    Recipes,
    Rows,
    Shapes,
    count_indices,
    flatten,
    stack,
    unflatten,
)

Version = Literal["1", "2", "xl"]
"""SD 1.x, SD 2.x, SDXL."""

UNET_PREFIXES = ("model.diffusion_model.", "diffusion_model.")
CLIP_PREFIXES: dict[Version, tuple[str, ...]] = {
    "1": ("cond_stage_model.transformer.",),
    "xl": ("conditioner.embedders.0.transformer.",),
}
"""Where CLIP-L lies in a single file, by version."""
OPEN_CLIP_PREFIXES: dict[Version, tuple[str, ...]] = {
    "2": ("cond_stage_model.model.",),
    "xl": ("conditioner.embedders.1.model.",),
}
"""Where an OpenCLIP text tower lies in a single file, by version."""

VAE_IGNORED = ("loss.", "model_ema.")
"""What files of autoencoders may hold from their training."""


# U-Net

_ENDS = {
    "input_blocks.0.0": "conv_in",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
    "middle_block.1": "mid_block.attentions.0",
}
_RESIDUAL = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}


@dataclass(frozen=True)
class UnetLayout:
    """What decides the numbers in the names of a U-Net."""

    blocks: tuple[int, ...]
    """Residual blocks on the way down, by level; on the way up there is one more."""
    attends_up: tuple[bool, ...]
    """Whether there is attention on the way up, by level."""

    @classmethod
    def of(cls, names: Mapping[str, object]) -> UnetLayout:
        """The layout of a U-Net with these names, LDM or Diffusers ones."""
        if any(name.startswith("input_blocks.") for name in names):
            return cls._of_ldm(names)
        levels = range(count_indices(names, r"down_blocks\.(\d+)\."))
        blocks = tuple(count_indices(names, rf"down_blocks\.{level}\.resnets\.(\d+)\.") for level in levels)
        ups = [len(blocks) - 1 - level for level in levels]
        return cls(blocks, tuple(any(name.startswith(f"up_blocks.{up}.attentions.") for name in names) for up in ups))

    @classmethod
    def _of_ldm(cls, names: Mapping[str, object]) -> UnetLayout:
        count = count_indices(names, r"input_blocks\.(\d+)\.")
        ends = [index for index in range(count) if f"input_blocks.{index}.0.op.weight" in names]
        starts = [0, *ends]
        blocks = tuple(end - start - 1 for start, end in zip(starts, [*ends, count], strict=True))
        attends, first = [], 0
        for number in reversed(blocks):
            attends.append(f"output_blocks.{first}.1.norm.weight" in names)
            first += number + 1
        return cls(blocks, tuple(reversed(attends)))

    def modules(self) -> dict[str, str]:
        """LDM name -> Diffusers name of each convolution, linear layer, norm, and transformer."""
        table = dict(_ENDS) | _residual("middle_block.0", "mid_block.resnets.0")
        table |= _residual("middle_block.2", "mid_block.resnets.1")
        index, out = 1, 0
        last = len(self.blocks) - 1
        for level, number in enumerate(self.blocks):
            down = f"down_blocks.{level}"
            for block in range(number):
                table |= _residual(f"input_blocks.{index}.0", f"{down}.resnets.{block}")
                table[f"input_blocks.{index}.1"] = f"{down}.attentions.{block}"
                index += 1
            if level < last:
                table[f"input_blocks.{index}.0.op"] = f"{down}.downsamplers.0.conv"
                index += 1
        for level in reversed(range(last + 1)):
            up = f"up_blocks.{last - level}"
            for block in range(self.blocks[level] + 1):
                table |= _residual(f"output_blocks.{out}.0", f"{up}.resnets.{block}")
                if self.attends_up[level]:
                    table[f"output_blocks.{out}.1"] = f"{up}.attentions.{block}"
                out += 1
            if level:
                child = 2 if self.attends_up[level] else 1
                table[f"output_blocks.{out - 1}.{child}.conv"] = f"{up}.upsamplers.0.conv"
        return table


def _residual(ldm: str, new: str) -> dict[str, str]:
    return {f"{ldm}.{theirs}": f"{new}.{ours}" for theirs, ours in _RESIDUAL.items()}


def renamed(name: str, modules: Mapping[str, str]) -> str:
    """The name of a tensor or a module, with the longest beginning that is in `modules` replaced."""
    parts = name.split(".")
    for stop in range(len(parts), 0, -1):
        if new := modules.get(".".join(parts[:stop])):
            return ".".join([new, *parts[stop:]])
    return name


def unet_version(shapes: Shapes) -> Version:
    """`1`, `2` or `xl`, for a U-Net with these tensors, LDM or Diffusers names, whatever its prefix.

    SDXL embeds sizes; SD 1.x and 2.x differ in the width of the text, or, where it is neither's, in the kind of
    projections around attention.
    """
    if any(name.endswith(("label_emb.0.0.weight", "add_embedding.linear_1.weight")) for name in shapes):
        return "xl"
    width = next((shape[1] for name, shape in shapes.items() if name.endswith("attn2.to_k.weight")), 0)
    if width in _CONTEXT_WIDTHS:
        return _CONTEXT_WIDTHS[width]
    projection = next((shape for name, shape in shapes.items() if name.endswith(".proj_in.weight")), ())
    return "2" if len(projection) == 2 else "1"


_CONTEXT_WIDTHS: Mapping[int, Version] = {768: "1", 1024: "2"}


def unet_from_file(shapes: Shapes) -> Recipes:
    """Diffusers layout from a file with a U-Net in it, of either layout."""
    prefix = next((prefix for prefix in UNET_PREFIXES if prefix + "input_blocks.0.0.weight" in shapes), "")
    names = {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}
    ldm = "input_blocks.0.0.weight" in names
    modules = UnetLayout.of(names).modules() if ldm else {}
    version = unet_version(names)
    return {
        renamed(name, modules): Recipe((prefix + name,), _projection(version, name, shape))
        for name, shape in names.items()
    }


def unet_to_ldm(shapes: Shapes) -> Recipes:
    """LDM layout from Diffusers tensors; projections around attention as the version has them."""
    back = {new: ldm for ldm, new in UnetLayout.of(shapes).modules().items()}
    version = unet_version(shapes)
    return {renamed(name, back): Recipe((name,), _projection(version, name, shape)) for name, shape in shapes.items()}


def _projection(version: Version, name: str, shape: tuple[int, ...]) -> Callable[[Tensor], Tensor] | None:
    """Gives projections around attention the shape that files have: convolutions in SD 1.x, matrices in the others."""
    if not name.endswith((".proj_in.weight", ".proj_out.weight")):
        return None
    wanted = 4 if version == "1" else 2
    return None if len(shape) == wanted else unflatten if wanted == 4 else flatten


# Text encoders

_TOWER = {
    "token_embedding.weight": CLIP_TOKENS,
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
}
_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_JOINT = ("q_proj", "k_proj", "v_proj")
OPEN_CLIP_IGNORED = ("logit_scale", "attn_mask", "text_projection", "visual.")
"""What OpenCLIP towers may hold that no model here computes with; the projection is read where it is wanted."""


def clip_from_file(names: Mapping[str, object], version: Version) -> Recipes:
    """Hugging Face layout of the CLIP-L in a single file; the level `text_model.`, which early files lack, is added."""
    for prefix in CLIP_PREFIXES[version]:
        found = {name.removeprefix(prefix): name for name in names if name.startswith(prefix)}
        if found:
            leveled = {_leveled(name): Recipe((source,)) for name, source in found.items()}
            return {name: recipe for name, recipe in leveled.items() if not name.startswith(CLIP_IGNORED)}
    return {}


def clip_from_folder(names: Mapping[str, object], *, projected: bool) -> Recipes:
    """Hugging Face layout of a text encoder in a folder of its own; `projected`: with its projection."""
    recipes = {_leveled(name): Recipe((name,)) for name in names}
    return {
        name: recipe
        for name, recipe in recipes.items()
        if (projected and name == PROJECTION) or not name.startswith(CLIP_IGNORED)
    }


def _leveled(name: str) -> str:
    return f"text_model.{name}" if name.startswith(("embeddings.", "encoder.", "final_layer_norm.")) else name


def open_clip_layers(version: Version, count: int) -> int:
    """How many of the blocks of a file are used: SD 2.x never used its last one."""
    return count if version != "2" or count == SD2_LAYERS else max(1, count - 1)


SD2_LAYERS = 23


def open_clip_from_file(shapes: Shapes, version: Version) -> Recipes:
    """Hugging Face layout of the OpenCLIP tower in a single file, with the projection for SDXL.

    OpenCLIP multiplies `x @ text_projection`, so that its matrix is the transpose of that of a linear layer.
    """
    for prefix in OPEN_CLIP_PREFIXES[version]:
        found = {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}
        if found:
            return {
                name: Recipe(tuple(prefix + source for source in recipe.sources), recipe.make)
                for name, recipe in _tower(found, version).items()
            }
    return {}


def _tower(shapes: Shapes, version: Version) -> Recipes:
    layers = open_clip_layers(version, count_indices(shapes, r"transformer\.resblocks\.(\d+)\."))
    recipes: Recipes = {}
    for name, shape in shapes.items():
        if name.startswith("transformer.resblocks."):
            number, _, rest = name.removeprefix("transformer.resblocks.").partition(".")
            if int(number) < layers:
                recipes |= _layer(name, f"text_model.encoder.layers.{number}.", rest, shape)
        elif name in _TOWER:
            recipes[_TOWER[name]] = Recipe((name,))
        elif name in ("text_projection", PROJECTION) and version == "xl":
            recipes[PROJECTION] = Recipe((name,), None if name == PROJECTION else _transposed)
        elif not name.startswith(OPEN_CLIP_IGNORED):
            recipes[name] = Recipe((name,))
    return recipes


def _layer(source: str, new: str, rest: str, shape: tuple[int, ...]) -> Recipes:
    if rest.startswith("attn.in_proj_"):
        width, kind = shape[0] // 3, rest.removeprefix("attn.in_proj_")
        return {
            f"{new}self_attn.{part}.{kind}": Recipe((source,), Rows(index * width, (index + 1) * width))
            for index, part in enumerate(_JOINT)
        }
    return {new + renamed(rest, _LAYER): Recipe((source,))}


def open_clip_to_ldm(names: Mapping[str, object]) -> Recipes:
    """OpenCLIP layout of a text tower with Hugging Face names (`text_model.…`)."""
    ends = {new: ldm for ldm, new in _TOWER.items()}
    back = {new: ldm for ldm, new in _LAYER.items()}
    recipes: Recipes = {}
    for name in names:
        if name == PROJECTION:
            recipes["text_projection"] = Recipe((name,), _transposed)
        elif name.startswith("text_model.encoder.layers."):
            number, _, rest = name.removeprefix("text_model.encoder.layers.").partition(".")
            block, kind = f"transformer.resblocks.{number}.", rest.rpartition(".")[2]
            if not rest.startswith(tuple(f"self_attn.{part}." for part in _JOINT)):
                recipes[block + renamed(rest, back)] = Recipe((name,))
            elif rest.startswith(f"self_attn.{_JOINT[0]}."):
                sources = tuple(name.replace(_JOINT[0], part) for part in _JOINT)
                recipes[f"{block}attn.in_proj_{kind}"] = Recipe(sources, stack)
        else:
            recipes[ends.get(name, name)] = Recipe((name,))
    return recipes


def _transposed(matrix: Tensor) -> Tensor:
    return matrix.T.contiguous()


def made_up_sd2(names: Mapping[str, object]) -> Recipes:
    """What a single file of SD 2.x has and no model computes with, made up from a Hugging Face text tower.

    The last block is a copy of the one before it, the projection all ones, the scale 1. Programs that build the whole
    tower want to find them.
    """
    layers = count_indices(names, r"text_model\.encoder\.layers\.(\d+)\.")
    block = f"transformer.resblocks.{layers - 1}."
    copied = {
        name.replace(block, f"transformer.resblocks.{layers}."): recipe
        for name, recipe in open_clip_to_ldm(names).items()
        if name.startswith(block)
    }
    return copied | {
        "text_projection": Recipe((CLIP_TOKENS,), _ones_square),
        "logit_scale": Recipe((CLIP_TOKENS,), _one),
    }


def _ones_square(embedding: Tensor) -> Tensor:
    return embedding.new_ones(embedding.shape[1], embedding.shape[1])


def _one(embedding: Tensor) -> Tensor:
    return embedding.new_ones(())


# The autoencoder


def vae_from_file(shapes: Shapes) -> Recipes:
    """Diffusers layout of the autoencoder in a file of any layout, alone or with others; nothing if there is none."""
    prefixes = (*keymaps.VAE_PREFIXES, "")
    prefix = next((prefix for prefix in prefixes if prefix + "decoder.conv_in.weight" in shapes), None)
    if prefix is None:
        return {}
    found = keymaps.without_prefix(shapes, prefix)
    ldm = {name: recipe for name, recipe in found.items() if not name.startswith(VAE_IGNORED)}
    if "decoder.up_blocks.0.resnets.0.conv1.weight" in ldm:
        ldm = keymaps.chained(ldm, keymaps.vae_from_diffusers(ldm))
    return keymaps.chained(ldm, keymaps.vae_to_diffusers(ldm))
