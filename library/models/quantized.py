"""Weights stored in fewer bits than they compute in."""

from __future__ import annotations

import torch
from torch import nn


def is_float8(dtype: torch.dtype) -> bool:
    """Whether a type has eight bits."""
    return dtype in (torch.float8_e4m3fn, torch.float8_e5m2)


def store_linears(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The module with the weights of its Linear layers stored in `dtype`; autocast raises them for each product.

    Norms, biases and embeddings keep their type.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            layer.weight = nn.Parameter(layer.weight.detach().to(dtype), requires_grad=False)
    return module
