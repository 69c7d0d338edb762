"""A LoRA step on a model of any family, and the arithmetic it needs, counted while data passes through."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from workload import SMALL, Work, stepping

from library.models.memory import checkpoint_blocks


def training_step(
    model: nn.Module,
    network: Any,
    batch: Any,
    attention: Callable[[], float] | float,
    *,
    checkpointing: bool = False,
    recorded: bool = False,
) -> tuple[list[Callable[[], None]], Work]:
    """Forward, backward and optimizer step of a new network, and its arithmetic; `recorded`: once more, recorded.

    `batch` is as `workload.stepping` wants it; for `attention` see `counted`.
    """
    device = next(model.parameters()).device
    for adapter in network.created:
        for parameter in adapter.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=SMALL)
    network.apply_to(None, model, False, True)
    network.to(device).train()

    def run() -> None:
        noised = batch.noised()
        with batch.autocast:
            batch.predict(model, noised.input, noised.timesteps, batch.cond)

    arithmetic = counted(model, network, run, attention)
    if checkpointing:
        checkpoint_blocks(model, draws=False)
    kinds = (False, True) if recorded else (False,)
    return [stepping(device, model, network, batch, recorded=kind) for kind in kinds], arithmetic


def counted(model: nn.Module, network: Any, run: Callable[[], object], attention: Callable[[], float] | float) -> Work:
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
