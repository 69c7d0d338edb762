"""Recomputed activations change nothing but memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from library.models.flux import Flux, image_ids, patchify, text_ids
from library.models.memory import blocks, checkpoint_blocks
from tests import tiny


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
