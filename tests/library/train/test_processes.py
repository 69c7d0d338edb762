"""The accelerator is what the options say, whatever the launcher's configuration says."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from library.devices import best_device
from library.log import UserError
from library.option_groups import DistributedOptions, PrecisionOptions
from library.train import processes


class Chosen:
    """Options of two groups."""

    def __init__(self, **precision: Any) -> None:
        self.groups = {PrecisionOptions: PrecisionOptions(**precision), DistributedOptions: DistributedOptions()}

    def __getitem__(self, group: type) -> Any:
        return self.groups[group]


@pytest.mark.skipif(best_device().type != "cpu", reason="there is a GPU")
def test_half_precision_on_the_cpu_is_refused() -> None:
    with pytest.raises(UserError, match="fp16 needs a GPU"):
        processes.start(Chosen(mixed_precision="fp16"))


@pytest.mark.parametrize("variable", processes.NOT_HERE)
def test_a_sharded_model_is_refused(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "true")
    with pytest.raises(UserError, match="accelerate config"):
        processes.start(Chosen())


def test_accumulation_of_the_launcher_does_not_divide_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    accelerator = processes.start(Chosen())
    weight = torch.ones(1, requires_grad=True, device=accelerator.device)
    accelerator.backward(3 * weight.sum())
    assert weight.grad is not None
    assert weight.grad.item() == 3


def test_autocast_keeps_no_second_copy_of_the_weights() -> None:
    with processes.start(Chosen(mixed_precision="bf16")).autocast():
        assert torch.is_autocast_enabled(best_device().type)
        assert not torch.is_autocast_cache_enabled()


def test_gradients_of_half_precision_weights_are_unscaled() -> None:
    weight = torch.nn.Parameter(torch.ones(4, dtype=torch.float16))
    optimizer = torch.optim.SGD([weight], lr=0.5)
    for scaler in (torch.amp.GradScaler("cpu", init_scale=256.0), processes.HalfScaler("cpu", init_scale=256.0)):
        optimizer.zero_grad()
        scaler.scale(weight.sum()).backward()
        if isinstance(scaler, processes.HalfScaler):
            scaler.unscale_(optimizer)
            assert weight.grad is not None
            assert weight.grad.tolist() == [1.0] * 4
            scaler.step(optimizer)
        else:
            with pytest.raises(ValueError, match="unscale FP16"):
                scaler.unscale_(optimizer)
    assert weight.tolist() == [0.5] * 4
