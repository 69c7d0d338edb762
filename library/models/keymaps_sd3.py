"""Names of the tensors of SD3 and SD3.5, as tables: single files, Diffusers folders and files of single encoders.

Recipes read from a whole file: their sources carry its prefixes. Those that make one give the names after the prefix.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from library.models import keymaps
from library.models.keymaps import CLIP_TOKENS, Recipes, Shapes, count_indices, from_parts, table_of, to_parts
from library.models.keymaps_sd import clip_from_folder

MMDIT_PREFIXES = ("model.diffusion_model.", "diffusion_model.")
ENCODER_PREFIX = "text_encoders.{}.transformer."
"""Where an encoder lies in a single file."""
CLIP_L, CLIP_G, T5 = ENCODERS = ("clip_l", "clip_g", "t5xxl")
"""The encoders, in the order of the folders `text_encoder`, `text_encoder_2` and `text_encoder_3`."""
FOLDERS = dict(zip(ENCODERS, ("text_encoder", "text_encoder_2", "text_encoder_3"), strict=True))

_ENDS = {
    "x_embedder.proj": ["pos_embed.proj"],
    "t_embedder.mlp.0": ["time_text_embed.timestep_embedder.linear_1"],
    "t_embedder.mlp.2": ["time_text_embed.timestep_embedder.linear_2"],
    "y_embedder.mlp.0": ["time_text_embed.text_embedder.linear_1"],
    "y_embedder.mlp.2": ["time_text_embed.text_embedder.linear_2"],
    "context_embedder": ["context_embedder"],
    "final_layer.linear": ["proj_out"],
    "final_layer.adaLN_modulation.1": ["norm_out.linear"],
}
_TABLE = {"pos_embed": ("pos_embed.pos_embed",)}
"""The table of positions: a tensor without `.weight`."""
_CONTEXT = {
    "adaLN_modulation.1": ["norm1_context.linear"],
    "attn.qkv": ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"],
    "attn.ln_q.weight": ["attn.norm_added_q.weight"],
    "attn.ln_k.weight": ["attn.norm_added_k.weight"],
    "attn.proj": ["attn.to_add_out"],
    "mlp.fc1": ["ff_context.net.0.proj"],
    "mlp.fc2": ["ff_context.net.2"],
}
_IMAGE = {
    "adaLN_modulation.1": ["norm1.linear"],
    "mlp.fc1": ["ff.net.0.proj"],
    "mlp.fc2": ["ff.net.2"],
} | {
    f"{attention}.{ours}": [f"{attention}.{name}" for name in theirs]
    for attention in ("attn", "attn2")
    for ours, theirs in {
        "qkv": ["to_q", "to_k", "to_v"],
        "ln_q.weight": ["norm_q.weight"],
        "ln_k.weight": ["norm_k.weight"],
        "proj": ["to_out.0"],
    }.items()
}


def mmdit_names(blocks: int) -> dict[str, tuple[str, ...]]:
    """The authors' name -> the Diffusers names whose tensors, one below the other, make it up; of all variants."""

    def tables() -> Iterator[tuple[str, str, Mapping[str, Sequence[str]]]]:
        yield "", "", _ENDS
        for i in range(blocks):
            yield f"joint_blocks.{i}.context_block.", f"transformer_blocks.{i}.", _CONTEXT
            yield f"joint_blocks.{i}.x_block.", f"transformer_blocks.{i}.", _IMAGE

    return table_of(tables()) | _TABLE


def _swapped(blocks: int) -> tuple[str, ...]:
    """The authors: shift, scale. Diffusers: scale, shift."""
    layers = ("final_layer", f"joint_blocks.{blocks - 1}.context_block")
    return tuple(f"{layer}.adaLN_modulation.1.{kind}" for layer in layers for kind in ("weight", "bias"))


def mmdit_from_file(names: Mapping[str, object]) -> Recipes:
    """The authors' layout of the transformer in a file of any layout, alone or with others."""
    if "pos_embed.proj.weight" in names:
        blocks = count_indices(names, r"transformer_blocks\.(\d+)\.")
        return from_parts(mmdit_names(blocks), names, _swapped(blocks))
    prefix = next((prefix for prefix in MMDIT_PREFIXES if prefix + "x_embedder.proj.weight" in names), "")
    return keymaps.without_prefix(names, prefix)


def mmdit_to_diffusers(shapes: Shapes) -> Recipes:
    """Diffusers layout from the authors' tensors."""
    blocks = count_indices(shapes, r"joint_blocks\.(\d+)\.")
    return to_parts(mmdit_names(blocks), shapes, _swapped(blocks))


def embedded(names: Mapping[str, object], encoder: str) -> dict[str, object]:
    """The names of a single file that belong to an encoder; none if it has none."""
    prefix = ENCODER_PREFIX.format(encoder)
    return {name: value for name, value in names.items() if name.startswith(prefix)}


def encoder_from_file(names: Mapping[str, object], encoder: str) -> Recipes:
    """Hugging Face layout of an encoder, CLIP-G with its projection, from a file of its own or a bigger one.

    CLIP-L's projection is left out: the transformer was trained with what comes before it.
    """
    names = embedded(names, encoder) or names
    if encoder == T5:
        return keymaps.t5_encoder(names)
    if any(name.endswith(CLIP_TOKENS) for name in names):
        return keymaps.clip_text(names, projected=encoder == CLIP_G)
    return clip_from_folder(names, projected=encoder == CLIP_G)
