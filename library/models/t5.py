"""The T5 text encoder: the Transformers class, sized by the checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from library.log import DataError
from library.models.keymaps import T5_EMBEDDINGS, count_indices

if TYPE_CHECKING:
    from torch import nn

_BLOCK = "encoder.block.0.layer"
EXACT_IN_FP16 = (".DenseReluDense.wo.weight",)
"""What is held and multiplied in float32 where the rest is in float16: its results are too large for that."""


def build_t5(shapes: Mapping[str, tuple[int, ...]]) -> nn.Module:
    """A Transformers `T5EncoderModel` (v1.1: gated GELU) for the checkpoint with these tensors.

    Raises:
        DataError: a tensor that tells a size is missing.
    """
    from transformers import T5Config, T5EncoderModel

    try:
        vocabulary, width = shapes[T5_EMBEDDINGS[0]]
        buckets, heads = shapes[f"{_BLOCK}.0.SelfAttention.relative_attention_bias.weight"]
        config = T5Config(
            vocab_size=vocabulary,
            d_model=width,
            d_kv=shapes[f"{_BLOCK}.0.SelfAttention.q.weight"][0] // heads,
            d_ff=shapes[f"{_BLOCK}.1.DenseReluDense.wi_0.weight"][0],
            num_layers=count_indices(shapes, r"encoder\.block\.(\d+)\."),
            num_heads=heads,
            relative_attention_num_buckets=buckets,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            use_cache=False,
        )
    except KeyError as missing:
        raise DataError(f"not a T5 v1.1 encoder: it has no tensor {missing}", code="E-MODEL-KIND") from None
    model: Any = T5EncoderModel(config)
    model.encoder.embed_tokens.weight = model.shared.weight
    for block in model.encoder.block:
        dense = block.layer[1].DenseReluDense
        dense.forward = MethodType(_gated, dense)
    built: nn.Module = model
    return built


def _gated(dense: Any, hidden: Tensor) -> Tensor:
    """The feed-forward layer; unlike the library's, it never casts activations to a storage type such as float8.

    In float16 the second half is computed in float32, see `EXACT_IN_FP16`.
    """
    activated, gate = dense.act(dense.wi_0(hidden)), dense.wi_1(hidden)
    exact = gate.dtype == torch.float16
    if exact:
        activated, gate = activated.float(), gate.float()
    with torch.autocast(hidden.device.type, enabled=False) if exact else nullcontext():
        out: Tensor = dense.wo(dense.dropout(activated * gate))
    return out


def t5_hidden(model: Any, input_ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """The last hidden state (B, L, D) for token ids (B, L).

    Args:
        mask: (B, L), 0 where a token is padding that nobody may look at; None: all are looked at.
    """
    hidden: Tensor = model(input_ids=input_ids, attention_mask=mask).last_hidden_state
    return hidden
