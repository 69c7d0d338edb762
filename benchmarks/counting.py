"""Multiply-adds of the layers of a model and of its adapters, counted while data passes through."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from workload import Work


def counted(
    model: nn.Module, network: Any, run: Callable[[], object], attention: Callable[[], float] | float = 0.0
) -> Work:
    """A step's arithmetic: two operations per multiply-add, small element-wise work left out.

    Of the frozen layers only the gradient of the inputs is needed, which costs as much as the forward pass; attention
    costs twice its forward there. An adapter costs its forward three times.

    Args:
        run: sends data through the model.
        attention: multiply-adds of the attention; a function is asked when the data is through.
    """
    found = {"layers": 0.0, "adapters": 0.0}
    by_module = {id(adapter.module): adapter for adapter in network.adapters}

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        rows = output.numel() // (output.shape[1] if isinstance(module, nn.Conv2d) else output.shape[-1])
        found["layers"] += rows * module.weight.numel()
        adapter = by_module.get(id(module))
        if adapter is not None:
            found["adapters"] += rows * sum(parameter.numel() for parameter in adapter.parameters())

    layers = (module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d))
    handles = [module.register_forward_hook(count) for module in layers]
    with torch.no_grad():
        run()
    for handle in handles:
        handle.remove()
    attended = attention() if callable(attention) else attention
    return Work(2 * (found["layers"] + attended), 2 * (found["layers"] + 2 * attended), 2 * 3 * found["adapters"])
