"""CLIP text encoders: the Transformers class, sized by the checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from library.log import DataError
from library.models.keymaps import CLIP_TOKENS, PROJECTION, Recipe, Recipes, count_indices

if TYPE_CHECKING:
    from torch import nn

HEAD_WIDTH = 64
LEVEL = "text_model."
"""What the names in files begin with; Transformers 5 has dropped it from its modules."""


def build_clip(shapes: Mapping[str, tuple[int, ...]], activation: str = "quick_gelu") -> nn.Module:
    """A Transformers `CLIPTextModel`, or `CLIPTextModelWithProjection`, for the checkpoint with these tensors.

    Args:
        activation: `quick_gelu` as OpenAI trained CLIP-L, `gelu` for OpenCLIP's encoders.

    Raises:
        DataError: a tensor that tells a size is missing.
    """
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    try:
        vocabulary, width = shapes[CLIP_TOKENS]
        projected = shapes.get(PROJECTION)
        config = CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=shapes["text_model.encoder.layers.0.mlp.fc1.weight"][0],
            num_hidden_layers=count_indices(shapes, r"text_model\.encoder\.layers\.(\d+)\."),
            num_attention_heads=max(1, width // HEAD_WIDTH),
            max_position_embeddings=shapes["text_model.embeddings.position_embedding.weight"][0],
            hidden_act=activation,
            bos_token_id=vocabulary - 2,
            eos_token_id=vocabulary - 1,
            pad_token_id=vocabulary - 1,
            projection_dim=projected[0] if projected else width,
        )
    except KeyError as missing:
        raise DataError(f"not a CLIP text encoder: it has no tensor {missing}", code="E-MODEL-KIND") from None
    model: nn.Module = CLIPTextModelWithProjection(config) if projected else CLIPTextModel(config)
    return model


def clip_keys(model: nn.Module, names: Mapping[str, object]) -> Recipes:
    """The names that `model` gives its tensors, from those in files (`text_model.…`)."""
    ours = "" if not any(name.startswith(LEVEL) for name in model.state_dict()) else LEVEL
    return {name if name == PROJECTION else ours + name.removeprefix(LEVEL): Recipe((name,)) for name in names}


def file_name(name: str) -> str:
    """The name in files of a tensor or module of a `CLIPTextModel`, with a projection or without."""
    return name if name.startswith("text_projection") else LEVEL + name.removeprefix(LEVEL)


def restore_positions(model: nn.Module) -> None:
    """Give a model built without data its table of positions, which files do not hold."""
    for module in model.modules():
        ids = getattr(module, "position_ids", None)
        if isinstance(ids, Tensor) and ids.is_meta:
            device = next(model.parameters()).device
            module.register_buffer("position_ids", torch.arange(ids.shape[-1], device=device)[None], persistent=False)


def clip_pooled(model: Any, input_ids: Tensor, eos: int | None = None) -> Tensor:
    """The final-norm state (B, D) at the first end token of each row of ids (B, L).

    Args:
        eos: the end token; None: the last of the vocabulary, as in OpenAI's.
    """
    hidden: Tensor = model(input_ids=input_ids).last_hidden_state  # (B, L, D), after the final norm
    end = model.config.eos_token_id if eos is None else eos
    first = (input_ids == end).int().argmax(dim=-1)
    return hidden[torch.arange(len(hidden), device=hidden.device), first]
