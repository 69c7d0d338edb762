"""Recomputed activations change nothing but memory."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.models.flux import Flux, image_ids, patchify, text_ids
from library.models.memory import blocks, checkpoint_blocks
from networks import lora_flux
from tests import tiny
from tests.networks import tiny_models


def gradients(model: Flux) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 16, 4, 4, generator=generator)
    txt = torch.randn(1, 3, 32, generator=generator)
    pooled = torch.randn(1, 32, generator=generator)
    t = torch.tensor([0.5])
    model(patchify(latents), image_ids(latents), txt, text_ids(txt), t, pooled, t).square().mean().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def counted(forward: Callable[..., object], calls: list[int]) -> Callable[..., object]:
    def run(*inputs: object) -> object:
        calls[0] += 1
        return forward(*inputs)

    return run


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("every", [1, 2])
def test_gradients_are_the_same(every: int, offload: bool) -> None:
    expected = gradients(tiny.flux_model(double=2, single=2))
    model = tiny.flux_model(double=2, single=2)
    calls = [0]
    for block in blocks(model):
        block.forward = counted(block.forward, calls)
    checkpoint_blocks(model, every, offload=offload)
    found = gradients(model)
    assert calls[0] == 4 + 4 // every
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


def test_nothing_is_recomputed_without_gradients() -> None:
    model = tiny.flux_model()
    saved: list[Tensor] = []
    checkpoint_blocks(model)
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(saved.append, lambda tensor: tensor):
        x = torch.randn(1, 16, 4, 4)
        txt = torch.randn(1, 3, 32)
        t = torch.tensor([0.5])
        model(patchify(x), image_ids(x), txt, text_ids(txt), t, torch.randn(1, 32), t)
    assert saved == []


@pytest.mark.parametrize("adapted", [False, True])
def test_narrow_products_are_made_once_and_wide_ones_twice(adapted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.flux_model(double=1, single=1)
    if adapted:
        model.requires_grad_(False)
        lora_flux.create_network(1.0, 2, 1.0, None, [None, None], model).apply_to(None, model, False, True)
    checkpoint_blocks(model)
    products: list[tuple[int, ...]] = []
    whole = F.linear

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        products.append(tuple(weight.shape))
        return whole(x, weight, bias)

    monkeypatch.setattr(F, "linear", linear)
    gradients(model)
    assert products.count((64, 256)) == 2 + 2  # time and guidance outside of blocks, two streams
    assert products.count((64, 320)) == 1
    assert products.count((256, 64)) == 4
    assert products.count((448, 64)) == 2


def test_a_graph_that_is_dropped_takes_all_that_was_kept_with_it() -> None:
    layer = nn.Linear(8, 2)
    model = nn.Sequential(nn.ModuleList([nn.Sequential(layer)]))
    checkpoint_blocks(model)
    (block,) = blocks(model)
    gc.disable()
    try:
        answer = block(torch.ones(1, 8, requires_grad=True))
        watched = weakref.ref(answer.grad_fn)
        del answer
        assert watched() is None
    finally:
        gc.enable()


def test_blocks_of_the_text_encoders_are_found_and_recomputed() -> None:
    for encoder, kind in ((tiny_models.clip_l(), "CLIPEncoderLayer"), (tiny_models.t5(), "T5Block")):
        assert {type(block).__name__ for block in blocks(encoder)} == {kind}
        encoder.requires_grad_(True)
        tokens = torch.arange(6).reshape(1, 6)
        answers = []
        for checkpointed in (False, True):
            if checkpointed:
                checkpoint_blocks(encoder)
            encoder.zero_grad()
            encoder(input_ids=tokens).last_hidden_state.square().sum().backward()
            answers.append({name: parameter.grad for name, parameter in encoder.named_parameters()})
        for name, gradient in answers[0].items():
            torch.testing.assert_close(answers[1][name], gradient, msg=name)
