"""DoRA: lengths, norms without the changed weight, and no gradient through them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from library.models.products import dense
from library.models.quantized import SCHEMES, store
from networks.dora import EPSILON, DoraAdapter
from tests.networks.test_kinds import inputs, shake


def adapter(module: nn.Module, by_rows: bool = True, rank: int = 3) -> DoraAdapter:
    torch.manual_seed(0)
    return DoraAdapter("m", module.requires_grad_(False), "unet", rank=rank, alpha=2.0, by_rows=by_rows)


MODULES = [lambda: nn.Linear(20, 12), lambda: nn.Linear(48, 12, bias=False), lambda: nn.Conv2d(8, 6, 3, padding=1)]
each_module = pytest.mark.parametrize("make", MODULES)
both_axes = pytest.mark.parametrize("by_rows", [True, False])


@each_module
@both_axes
def test_at_step_0_the_answer_is_that_of_the_module(make, by_rows: bool) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(1)
    module = make()
    x = inputs(module)
    made = adapter(module, by_rows)
    torch.testing.assert_close(made(x), module(x), rtol=1e-6, atol=1e-6)
    assert float(made.delta().abs().max()) < 1e-7
    assert float(made.delta_norm()) < 1e-6


@each_module
@both_axes
def test_norms_are_those_of_the_changed_weight(make, by_rows: bool) -> None:  # type: ignore[no-untyped-def]
    module = make()
    made = shake(adapter(module, by_rows))
    assert isinstance(made, DoraAdapter)
    down, up = (matrix.flatten(1) for matrix in made.pair())
    changed = module.weight + (up @ down * made.scale).view(module.weight.shape)
    expected = changed.transpose(0, 0 if by_rows else 1).flatten(1).norm(dim=1)
    torch.testing.assert_close(made._norms() - EPSILON, expected, rtol=1e-5, atol=1e-5)
    lengths = (module.weight + made.delta()).transpose(0, 0 if by_rows else 1).flatten(1).norm(dim=1)
    torch.testing.assert_close(lengths, made.dora_scale.flatten().abs(), rtol=1e-5, atol=1e-5)


@each_module
@both_axes
@pytest.mark.parametrize("multiplier", [1.0, 0.4])
def test_no_gradient_goes_through_the_norms(make, by_rows: bool, multiplier: float) -> None:  # type: ignore[no-untyped-def]
    module = make().double()
    made = shake(adapter(module, by_rows)).double()
    assert isinstance(made, DoraAdapter)
    made.multiplier = multiplier
    x = inputs(module).double().requires_grad_()
    got = torch.autograd.grad(made(x).square().sum(), [x, *made.parameters()])
    down, up = made.pair()
    shape = [1] * module.weight.ndim
    shape[0 if by_rows else 1] = -1
    growth = made.dora_scale.flatten() / made._norms().double()
    product = (up.flatten(1) @ down.flatten(1) * made.scale).view(module.weight.shape)
    new = (module.weight + product) * growth.view(shape)
    weight = module.weight + multiplier * (new - module.weight)
    out = torch.func.functional_call(module, {"weight": weight}, (x,))
    wanted = torch.autograd.grad(out.square().sum(), [x, *made.parameters()])
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)  # the norms are float32


def test_rows_of_zeros_stay_finite() -> None:
    module = nn.Linear(20, 12)
    nn.init.zeros_(module.weight[:3])
    made = shake(adapter(module))
    assert isinstance(made, DoraAdapter)
    with torch.no_grad():
        made.dora_scale[:2] = 0
    out = made(inputs(module))
    out.square().sum().backward()
    for parameter in made.parameters():
        assert parameter.grad is not None
        assert bool(torch.isfinite(parameter.grad).all())


@pytest.mark.parametrize("scheme", SCHEMES)
@both_axes
def test_weights_in_few_bits(scheme: str, by_rows: bool) -> None:
    torch.manual_seed(0)
    module = nn.Linear(64, 64).requires_grad_(False)
    store(module, scheme)
    made = adapter(module, by_rows)
    x = inputs(module)
    torch.testing.assert_close(made(x), module(x), rtol=1e-5, atol=1e-5)
    shake(made)
    weight = dense(module, torch.float32) + made.delta()
    torch.testing.assert_close(made(x), nn.functional.linear(x, weight, module.bias), rtol=1e-4, atol=1e-4)


def test_a_weight_that_changed_before_hooking_counts() -> None:
    module = nn.Linear(20, 12)
    made = adapter(module)
    x: Tensor = inputs(module)
    made(x)
    module.weight.mul_(2)
    made.hook()
    expected = nn.functional.linear(x, module.weight / 2, module.bias)
    torch.testing.assert_close(module(x), expected, rtol=1e-5, atol=1e-5)  # the lengths are those of before
    made.unhook()
