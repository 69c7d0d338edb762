"""CLIP on texts of any length: tokens in rows of 77, hidden states of a wanted layer, and rows joined again.

B texts, n rows each, L tokens of a text with its two marks (75 n + 2), D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

ROW = 77
CONTENT = ROW - 2
"""Tokens of a row besides the marks at its ends."""


def rows_of(tokens: Tensor, *, eos: int | None = None, pad: int | None = None) -> Tensor:
    """(B, n, 77) of tokens (B, 75 n + 2), or of what belongs to them, such as weights.

    Each row begins with the first token of all and ends with the last. With `eos` and `pad`, for tokenizers that pad
    with something else than their end mark, each row gets an end mark where it needs one: at its end if it is full,
    behind its first token if it is empty.
    """
    count = (tokens.shape[1] - 2) // CONTENT
    middle = tokens[:, 1:-1].reshape(len(tokens), count, CONTENT)
    first, last = (tokens[:, place, None, None].expand(-1, count, 1) for place in (0, -1))
    rows = torch.cat((first, middle, last), dim=2)
    if eos is not None and pad is not None and eos != pad:
        is_full = (rows[..., -2] != pad) & (rows[..., -2] != eos)
        rows[..., -1] = torch.where(is_full, eos, rows[..., -1])
        rows[..., 1] = torch.where(rows[..., 1] == pad, eos, rows[..., 1])
    return rows


def joined(hidden: Tensor, count: int) -> Tensor:
    """(B, 75 n + 2, D) of rows (B * n, 77, D): the marks between them are left out."""
    if count == 1:
        return hidden
    rows = hidden.view(-1, count, *hidden.shape[1:])  # (B, n, 77, D)
    return torch.cat((rows[:, 0, :1], rows[:, :, 1:-1].flatten(1, 2), rows[:, -1, -1:]), dim=1)


def hidden_state(model: Any, rows: Tensor, skip: int | None = None, *, normed: bool = True) -> Tensor:
    """(R, 77, D): the state of each token of rows (R, 77).

    Args:
        skip: which layer, counted from the end, 1 is the last; None: the last one, normed.
        normed: whether the final norm follows.
    """
    if skip is None:
        state: Tensor = model(input_ids=rows).last_hidden_state
        return state
    state = model(input_ids=rows, output_hidden_states=True).hidden_states[-skip]
    return final_norm(model)(state) if normed else state


def penultimate_and_pooled(model: Any, rows: Tensor, eos: int, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The last but one layer's states (R, 77, D), and the final state at the end mark of each row (R, P).

    The latter is projected if the model has a projection.

    Args:
        mask: (R, 77), 0 where a token is padding that nobody may look at; None: all are looked at.
    """
    said = model(input_ids=rows, attention_mask=mask, output_hidden_states=True)
    final = final_norm(model)(said.hidden_states[-1])
    at = (rows == eos).int().argmax(dim=-1)
    pooled = final[torch.arange(len(final), device=final.device), at]
    return said.hidden_states[-2], model.text_projection(pooled) if hasattr(model, "text_projection") else pooled


def weighted(hidden: Tensor, weights: Tensor | None) -> Tensor:
    """Hidden states (B, L, D) times weights (B, L); None: as they are."""
    return hidden if weights is None else hidden * weights[..., None].to(hidden.dtype)


def final_norm(model: Any) -> Any:
    """The norm behind the last layer, wherever a version of Transformers keeps it."""
    inner = getattr(model, "text_model", model)
    return inner.final_layer_norm
