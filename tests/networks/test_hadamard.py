"""LoHa: both ways to apply it, and what it costs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from networks.hadamard import HadamardAdapter
from tests.networks.test_kinds import shake


def adapter(rank: int, outputs: int = 40, inputs: int = 64) -> HadamardAdapter:
    torch.manual_seed(0)
    module = nn.Linear(inputs, outputs).requires_grad_(False)
    made = HadamardAdapter("m", module, "unet", rank=rank, alpha=2.0)
    shake(made)
    return made


def results(made: HadamardAdapter, monkeypatch: pytest.MonkeyPatch, cheap: bool) -> list[Tensor]:
    monkeypatch.setattr(HadamardAdapter, "is_cheap_as_pair", cheap)
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    out = made(x)
    return [out, *torch.autograd.grad(out.square().sum(), [x, *made.parameters()]), made.delta(), made.delta_norm()]


@pytest.mark.parametrize("outputs", [40, 24, 100])
@pytest.mark.parametrize("multiplier", [1.0, 0.3])
def test_both_ways_give_the_same(outputs: int, multiplier: float, monkeypatch: pytest.MonkeyPatch) -> None:
    made = adapter(3, outputs)
    made.multiplier = multiplier
    as_pair, as_sum = results(made, monkeypatch, True), results(made, monkeypatch, False)
    for one, other in zip(as_pair, as_sum, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("rank", "outputs", "inputs", "cheap"),
    [(8, 3072, 3072, True), (16, 3072, 3072, True), (22, 3072, 3072, True), (23, 3072, 3072, False),
     (16, 12288, 3072, True), (4, 64, 64, False)],
)  # fmt: skip
def test_the_way_with_less_work_is_taken(rank: int, outputs: int, inputs: int, cheap: bool) -> None:
    with torch.device("meta"):
        made = HadamardAdapter("m", nn.Linear(inputs, outputs), "unet", rank=rank, alpha=1)
    assert made.is_cheap_as_pair == cheap


@pytest.mark.parametrize("rank", [1, 12])
def test_nothing_of_the_size_of_the_weight_is_kept(rank: int) -> None:
    made = adapter(rank)
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        made(torch.randn(5, 64, requires_grad=True))
    weight: Any = made.module.weight
    large = [tensor for tensor in kept if tensor.numel() >= weight.numel()]
    assert all(tensor.data_ptr() == weight.data_ptr() for tensor in large)


def test_the_start_is_at_rest_but_can_move() -> None:
    module = nn.Linear(64, 40).requires_grad_(False)
    made = HadamardAdapter("m", module, "unet", rank=2, alpha=1)
    made(torch.randn(5, 64)).square().sum().backward()
    assert bool(made.hada_w2_a.grad.any())  # type: ignore[union-attr, operator]
