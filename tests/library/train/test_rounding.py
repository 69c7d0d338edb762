"""Rounding at random: right on average, between neighbours, and never of what isn't a number."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from library.train.rounding import Rounding, stochastically_rounded

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**126), max_value=2.0**126)


def neighbours(value: float) -> tuple[float, float]:
    """The bfloat16 numbers around a value, the one nearer to zero first."""
    bits = torch.tensor([value]).view(torch.int32) & -(1 << 16)
    return bits.view(torch.float32).item(), (bits + (1 << 16)).view(torch.float32).item()


@settings(max_examples=60, deadline=None)
@given(FLOATS)
def test_values_go_to_one_of_their_neighbours(value):
    drawn = stochastically_rounded(torch.full((64,), value))
    assert drawn.dtype == torch.bfloat16
    below, above = neighbours(value)
    exact = torch.tensor(value).item()
    assert set(drawn.tolist()) <= ({below} if below == exact else {below, above})


@pytest.mark.parametrize("value", [1.001, -1.001, 3.14159, -2.71828e-5, 1e-40, -7.0])
def test_the_mean_is_the_value(value):
    count = 40000
    drawn = stochastically_rounded(torch.full((count,), value), torch.Generator().manual_seed(1)).double()
    below, above = neighbours(value)
    spread = abs(above - below) / 2 / math.sqrt(count)
    assert abs(drawn.mean().item() - torch.tensor(value).item()) <= 4 * spread


def test_what_is_no_number_stays_what_it_is():
    values = torch.tensor([math.inf, -math.inf, math.nan, 0.0, -0.0]).repeat(100, 1)
    drawn = stochastically_rounded(values)
    assert (drawn[:, 0] == math.inf).all()
    assert (drawn[:, 1] == -math.inf).all()
    assert drawn[:, 2].isnan().all()
    assert (drawn[:, 3:] == 0).all()
    assert torch.equal(drawn[:, 3:].signbit(), values[:, 3:].signbit())
    odd = torch.tensor([0x7FFFFFFF, 0x7F800001, -1], dtype=torch.int32).view(torch.float32).repeat(100, 1)
    assert stochastically_rounded(odd).isnan().all()


def test_bfloat16_values_stay_and_views_are_read_right():
    values = torch.randn(8, 6).bfloat16().float()
    assert torch.equal(stochastically_rounded(values.T), values.T.bfloat16())
    assert stochastically_rounded(torch.tensor(2.0)).shape == ()


def test_changes_too_small_for_bfloat16_add_up():
    weight = torch.nn.Parameter(torch.ones(2000, dtype=torch.bfloat16))
    rounding = Rounding([weight], seed=0)
    for step in range(100):
        rounding.write(weight, weight.detach().float() + 2e-4, step)
    assert weight.float().mean().item() == pytest.approx(1.02, rel=2e-3)
    assert (torch.ones((), dtype=torch.bfloat16) + 2e-4).item() == 1


def test_draws_depend_on_seed_step_and_parameter_alone():
    def written(seed=3, step=5, place=0, disturbed=False):
        parameters = [torch.nn.Parameter(torch.zeros(50, dtype=torch.bfloat16)) for _ in range(2)]
        rounding = Rounding(parameters, seed)
        if disturbed:
            torch.rand(3)
            rounding.write(parameters[1], torch.ones(50), 1)
        rounding.write(parameters[place], torch.full((50,), 1.003), step)
        return parameters[place].detach()

    assert torch.equal(written(), written(disturbed=True))
    for other in (written(seed=4), written(step=6), written(place=1)):
        assert not torch.equal(written(), other)
