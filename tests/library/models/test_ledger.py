"""The ledger says how much memory a training step takes: compared with what PyTorch really holds."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from library.models.activations import Amount, Numerics, Training
from library.models.ledger import Ledger
from library.models.ledger_flux import FluxActivations
from library.models.ledger_layers import Linear, gelu, linear
from tests.flux_steps import Case, like_cuda, peak_of

CLOSE = 0.03
"""Far closer than what the forecast promises (a tenth), and than what a changed forward would come out as."""

SMALL = Amount(images=1, image_tokens=256, text_tokens=64)
LARGE = Amount(images=1, image_tokens=4096, text_tokens=512)
"""Of an image of 1024 x 1024 pixels."""
REAL = Case(width=3072, head=128, double=1, single=2, amount=LARGE, dtype=torch.bfloat16)

CASES = {
    "LoRA": Case(amount=SMALL, rank=4),
    "LoRA, recomputing": Case(amount=SMALL, rank=4, every=1),
    "LoRA, some recomputing": Case(amount=SMALL, rank=4, every=2),
    "LoRA, two images": Case(amount=replace(SMALL, images=2), rank=4, every=3),
    "LoRA in bfloat16": Case(amount=SMALL, rank=4, every=1, dtype=torch.bfloat16),
    "LoRA on stored weights": Case(width=512, amount=SMALL, rank=4, every=1, scheme="fp8_scaled"),
    "whole": Case(amount=SMALL),
    "whole, recomputing": Case(amount=replace(SMALL, images=2), every=1),
    "whole in bfloat16": Case(amount=SMALL, every=2, dtype=torch.bfloat16),
    "LoRA on FLUX.1-dev's width, recomputing": replace(REAL, rank=16, every=1),
    "whole of FLUX.1-dev's width, recomputing": replace(REAL, every=1),
}


def foreseen(case: Case, numerics: Numerics | None = None) -> int:
    size = case.dtype.itemsize
    training = Training(
        rank=case.rank,
        whole=not case.rank,
        size=4 if case.rank else size,
        checkpoint_every=case.every,
        offload=case.offload,
        dense=case.scheme is not None,
    )
    return FluxActivations(case.config).step(case.amount, numerics or Numerics.of("cpu", size), training).peak


@pytest.mark.parametrize("name", CASES)
def test_a_step_takes_what_the_ledger_says(name: str) -> None:
    case = CASES[name]
    measured = peak_of(case, data=case.dtype == torch.float32)
    assert foreseen(case) == pytest.approx(measured, rel=CLOSE)


@pytest.mark.parametrize("name", ["LoRA, recomputing"])
def test_without_numbers_it_is_the_same(name: str) -> None:
    assert peak_of(CASES[name]) == pytest.approx(peak_of(CASES[name], data=True), rel=0.001)


@pytest.mark.parametrize("name", ["whole in bfloat16", "LoRA on FLUX.1-dev's width, recomputing"])
def test_norms_in_float32_count_on_cuda(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    numerics = replace(Numerics.of("cuda", 2), attention_scratch=0)  # the CPU's attention needs none
    with like_cuda(monkeypatch):
        measured = peak_of(CASES[name])
    assert foreseen(CASES[name], numerics) == pytest.approx(measured, rel=CLOSE)


def test_inputs_in_main_memory_dont_count() -> None:
    # not more than four blocks, so that most of what is kept are inputs of the others
    case = replace(CASES["LoRA, recomputing"], double=1, single=10)
    amount, training = case.amount, Training(rank=4, checkpoint_every=1, offload=True)
    step = FluxActivations(case.config).step(amount, Numerics.of("cpu", 4), training)
    assert step.peak < 0.7 * foreseen(case)
    tokens = amount.image_tokens + amount.text_tokens
    assert step.offloaded == pytest.approx(11 * tokens * case.width * 4, rel=0.1)


@pytest.mark.parametrize("gradients", ["block", "none"])
def test_gradients_that_are_used_at_once_dont_count(gradients: str) -> None:
    case = replace(CASES["whole, recomputing"], single=12)
    model, numerics = FluxActivations(case.config), Numerics.of("cpu", 4)
    every = model.step(case.amount, numerics, Training(whole=True, checkpoint_every=1))
    few = model.step(case.amount, numerics, Training(whole=True, checkpoint_every=1, gradients=gradients))  # type: ignore[arg-type]
    weights = sum(parameter.numel() for parameter in _model(case).parameters() if parameter.ndim > 1)
    assert every.gradients == 4 * weights
    assert few.gradients < every.gradients / 8
    assert few.peak < every.peak - every.gradients / 2


def test_a_graph_is_gone_after_the_backward_pass() -> None:
    ledger = Ledger(Numerics.of("cpu", 4))
    x = ledger.fresh(8 * 16)
    before = ledger.live
    y = gelu(ledger, linear(ledger, x, Linear(inputs=16, outputs=32, trained=True)))
    assert ledger.live == before + 2 * 8 * 32 * 4
    sources = [y.source]
    del y
    assert ledger.live == before + 8 * 32 * 4, "the result isn't needed, what went into GELU is"
    ledger.backward(sources, [ledger.new(8 * 32 * 4)])
    assert ledger.live == before + ledger.gradients == before + 16 * 32 * 4


def test_without_gradients_little_is_held() -> None:
    model = FluxActivations(CASES["LoRA"].config)
    assert model.look(SMALL, Numerics.of("cpu", 4)) < foreseen(CASES["LoRA"]) / 3


def _model(case: Case) -> torch.nn.Module:
    with torch.device("meta"):
        from library.models.flux import Flux

        return Flux(case.config)
