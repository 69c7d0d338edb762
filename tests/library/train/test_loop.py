"""The device's part of a step asks the device for no number and sends it none: it runs on tensors without data."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from library.epsilon import Epsilon, EpsilonSettings
from library.families.flux import Flux, FluxFiles
from library.families.sd import Sd
from library.families.sd_files import SdFiles
from library.families.sdxl import Sdxl
from library.models import memory
from library.models.unet import build_unet
from library.objectives import Flow, FlowSettings
from library.train.loop import Task, learn
from library.types import Cond, Noised
from networks import lora, lora_flux
from tests import tiny_sd
from tests.networks import tiny_models

CELLS = 16
"""Latent cells per side."""
TEXT = 5


class OnTheDevice(TorchDispatchMode):
    """Lets nothing through that reads or makes a tensor of main memory; numbers can't be read without data."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        found = [value for value in tree_leaves((args, kwargs, result)) if isinstance(value, Tensor)]
        assert all(value.device.type == "meta" for value in found), f"{func} is in main memory"
        return result


def unet(version: Any) -> nn.Module:
    return build_unet({name: tuple(value.shape) for name, value in tiny_sd.unet(version).state_dict().items()})


def sdxl() -> tuple[Any, nn.Module, Any, Cond, int]:
    model, (one, other) = unet("xl"), tiny_sd.WIDTHS.values()
    cond = {
        "hidden_state1": torch.zeros(2, TEXT, one),
        "hidden_state2": torch.zeros(2, TEXT, other),
        "pool2": torch.zeros(2, other),
        "sizes": torch.zeros(2, 6),
    }
    return Sdxl(SdFiles(None, "sdxl")), model, lora.create_network(1.0, 2, 1.0, None, None, model), cond, 4


def sd() -> tuple[Any, nn.Module, Any, Cond, int]:
    model = unet("1")
    cond = {"hidden_state": torch.zeros(2, TEXT, tiny_sd.WIDTHS["text_encoder"])}
    network = lora.create_network(1.0, 2, 1.0, None, None, model, conv_dim="2")
    return Sd(SdFiles(None, "sd")), model, network, cond, 4


def flux() -> tuple[Any, nn.Module, Any, Cond, int]:
    model, config = tiny_models.flux(), tiny_models.TINY
    cond = {
        "t5_out": torch.zeros(2, TEXT, config.context_width),
        "txt_ids": torch.zeros(2, TEXT, 3),
        "l_pooled": torch.zeros(2, config.pooled_width),
        "t5_attn_mask": torch.ones(2, TEXT, dtype=torch.bool),
    }
    network = lora_flux.create_network(1.0, 2, 1.0, None, [None, None], model)
    return Flux(FluxFiles(None, None, None, None, apply_t5_mask=True)), model, network, cond, 16


FAMILIES: dict[str, Callable[[], tuple[Any, nn.Module, Any, Cond, int]]] = {
    "flux": flux,
    "sdxl": sdxl,
    "sd": sd,
}


def objective_of(family: Any) -> Any:
    """With as much to compute as the options allow."""
    if isinstance(family, Flux):
        return Flow(FlowSettings(loss_type="huber", huber_schedule="exponential"))
    return Epsilon(EpsilonSettings(loss_type="huber", min_snr_gamma=5.0))


@pytest.mark.parametrize(
    ("name", "checkpointing"), [("flux", False), ("flux", True), ("sdxl", False), ("sdxl", True), ("sd", False)]
)
def test_a_step_waits_for_nothing(name: str, checkpointing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)  # which doesn't know this device
    family, model, network, cond, channels = FAMILIES[name]()
    model.requires_grad_(False)
    network.apply_to(None, model, False, True)
    network.prepare_grad_etc(None, model)
    if checkpointing:
        memory.checkpoint_blocks(model, draws=False)
        monkeypatch.setattr(torch, "get_rng_state", lambda: pytest.fail("generators can't be looked at"))
    model.to("meta")
    network.to("meta").train()
    objective = objective_of(family)
    if isinstance(objective, Epsilon):
        objective.levels.alphas_at(torch.zeros(2, device="meta"))  # which sends its table once
    run: Any = SimpleNamespace(
        accelerator=SimpleNamespace(autocast=nullcontext, backward=lambda loss: loss.backward()),
        family=family,
        objective=objective,
        denoiser=model,
    )
    image, each = torch.zeros(2, channels, CELLS, CELLS), torch.ones(2)
    noised = Noised(latents=image, input=image, target=image, timesteps=each, weight=each)
    mask = torch.ones(2, 1, CELLS, CELLS)
    task = Task(noised=noised, cond=cond, weights=each, mask=mask, multiplier=1.0)
    task = task.changed(lambda tensor: tensor.to("meta"))
    with OnTheDevice():
        loss = learn(run, task)
    assert loss.share.device.type == "meta"
    assert all(parameter.grad is not None for parameter in network.parameters())
