"""Recomputed activations change nothing but memory."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.models import offloading
from library.models.flux import Flux, image_ids, patchify, text_ids
from library.models.memory import blocks, checkpoint_blocks, without_cast_cache
from networks import lora_flux
from tests import tiny
from tests.late_copies import moved
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
    with moved():
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


def test_generators_are_set_back_only_for_blocks_that_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    ask = torch.get_rng_state

    def noting() -> Tensor:
        asked.append(1)
        return ask()

    monkeypatch.setattr(torch, "get_rng_state", noting)
    found = []
    for draws in (True, False):
        model = tiny.flux_model(double=1, single=1)
        checkpoint_blocks(model, draws=draws)
        found.append(gradients(model))
        assert bool(asked) is draws
        asked.clear()
    kept, left = found
    assert all(torch.equal(left[name], gradient) for name, gradient in kept.items())


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


# inputs that wait in main memory


class Chain(nn.Module):
    """Blocks with one input."""

    def __init__(self, count: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.layers:
            x = block(x)
        return x


def chained(model: nn.Module, rows: int) -> list[Tensor]:
    x = torch.linspace(-1, 1, 8 * rows).view(rows, 8).requires_grad_()
    return list(torch.autograd.grad(model(x).square().sum(), [x, *model.parameters()]))


@pytest.fixture
def allocated(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the main memory that was asked for; it holds NaN at first."""
    sizes: list[int] = []

    def memory(size: int, device: torch.device) -> Tensor:
        sizes.append(size)
        return torch.full((size,), 0xFF, dtype=torch.uint8)

    monkeypatch.setattr(offloading, "host_memory", memory)
    return sizes


@pytest.mark.parametrize("late", [False, True])
def test_main_memory_is_used_again_whatever_the_sizes(late: bool, allocated: list[int]) -> None:
    model = Chain()
    checkpoint_blocks(model, offload=True)
    with moved(late=late):
        for rows in (2, 5, 3, 4, 5, 2):
            assert all(map(torch.equal, chained(model, rows), chained(Chain(), rows)))
    assert allocated == [2 * 32] * 4 + [5 * 32] * 4


def test_inputs_leave_the_device_and_come_back_one_block_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[str] = []
    homes: list[Tensor] = []

    def memory(size: int, device: torch.device) -> Tensor:
        homes.append(torch.empty(size, dtype=torch.uint8))
        return homes[-1]

    class Noting(offloading.CopyStream):
        def copy(self, target: Tensor, source: Tensor) -> None:
            leaves = any(home.data_ptr() == target.data_ptr() for home in homes)
            happened.append("leaves" if leaves else "comes")
            super().copy(target, source)

    def noted(index: int, forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            happened.append(f"block {index}")
            return forward(x)

        return run

    model = Chain()
    for index, block in enumerate(model.layers):
        block.forward = noted(index, block.forward)
    checkpoint_blocks(model, offload=True)
    monkeypatch.setattr(offloading, "CopyStream", Noting)
    monkeypatch.setattr(offloading, "host_memory", memory)
    with moved(late=False):
        answer = model(torch.ones(2, 8, requires_grad=True))
        assert happened == [part for index in range(4) for part in ("leaves", f"block {index}")]
        happened.clear()
        answer.sum().backward()
    assert happened == ["comes", "block 3", "comes", "block 2", "comes", "block 1", "block 0"]


def test_a_graph_that_is_dropped_gives_main_memory_back(allocated: list[int]) -> None:
    model = Chain()
    checkpoint_blocks(model, offload=True)
    gc.disable()
    try:
        with moved():
            for _ in range(3):
                model(torch.ones(2, 8, requires_grad=True))
    finally:
        gc.enable()
    assert len(allocated) == 4


def test_a_graph_can_be_used_twice() -> None:
    model = Chain()
    checkpoint_blocks(model, offload=True)
    with moved():
        x = torch.ones(2, 8, requires_grad=True)
        loss = model(x).sum()
        (first,) = torch.autograd.grad(loss, x, retain_graph=True)
        (second,) = torch.autograd.grad(loss, x)
    assert torch.equal(first, second)


def test_masks_and_tables_stay() -> None:
    model = tiny.flux_model(double=2, single=2)
    checkpoint_blocks(model, offload=True)
    shapes: list[tuple[int, ...]] = []

    class Noting(offloading.CopyStream):
        def copy(self, target: Tensor, source: Tensor) -> None:
            shapes.append(tuple(source.shape))
            super().copy(target, source)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(offloading, "CopyStream", Noting)
        with moved(late=False):
            gradients(model)
    assert {shape[-1] for shape in shapes} == {64}  # the width, not that of heads


def test_autocast_keeps_no_converted_weights_of_recomputed_blocks() -> None:
    kept: list[bool] = []

    class Block(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            kept.append(torch.is_autocast_cache_enabled())
            return super().forward(x)

    model = nn.Sequential(nn.ModuleList([Block(4, 4)]))
    checkpoint_blocks(model)
    (block,) = blocks(model)
    with torch.autocast("cpu", torch.bfloat16):
        loss = block(torch.ones(1, 4)).sum()
        assert torch.is_autocast_cache_enabled()
    loss.backward()
    assert kept == [False, False]
    with pytest.raises(KeyError), without_cast_cache():
        raise KeyError
    assert torch.is_autocast_cache_enabled()
