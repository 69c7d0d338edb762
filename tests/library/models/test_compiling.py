"""Compiled blocks compute the same, are compiled a few times only, and where the compiler fails nothing else does."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from library.models.compiling import compile_blocks
from library.models.flux import Flux, image_ids, patchify, text_ids
from library.models.memory import blocks, checkpoint_blocks
from library.models.streaming import stream
from networks import lora_flux
from networks.base import Network
from tests.networks import tiny_models

ONE_AND_TWO = replace(tiny_models.TINY, double_blocks=1, single_blocks=2)
SIZES = ((8, 8), (8, 4), (12, 8))


@pytest.fixture(autouse=True)
def _nothing_compiled_is_left() -> Iterator[None]:
    yield
    torch.compiler.reset()


def adapted() -> tuple[Flux, Network]:
    model = tiny_models.flux(ONE_AND_TWO)
    network = lora_flux.create_network(1.0, 2, 1.0, None, [None, None], model)
    network.apply_to(None, model, False, True)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model, network


def gradients(model: nn.Module, network: nn.Module, size: tuple[int, int]) -> list[Tensor]:
    """The loss and all gradients for an image of this size (latent cells)."""
    generator = torch.Generator().manual_seed(size[0])
    latents, txt = torch.randn(1, 16, *size, generator=generator), torch.randn(1, 5, 24, generator=generator)
    t, pooled = torch.rand(1, generator=generator), torch.randn(1, 16, generator=generator)
    answer = model(patchify(latents), image_ids(latents), txt, text_ids(txt), t, pooled, t)
    loss = answer.square().mean()
    loss.backward()
    found = [
        loss.detach(),
        *(parameter.grad.clone() for parameter in network.parameters() if parameter.grad is not None),
    ]
    network.zero_grad()
    return found


def test_blocks_with_adapters_are_compiled_once_per_kind_for_all_sizes_and_within_all_that_saves_memory() -> None:
    expected = [gradients(*adapted(), size) for size in SIZES]
    model, network = adapted()
    counter = CompileCounterWithBackend("eager")
    assert compile_blocks(model, counter)
    tried = counter.frame_count
    checkpoint_blocks(model, offload=True)
    stream(model, 3, torch.device("cpu"), poison=True)
    for size, numbers in zip(SIZES, expected, strict=True):
        found = gradients(model, network, size)
        assert len(found) == len(numbers)
        assert all(map(torch.equal, found, numbers))
    assert counter.frame_count - tried == 2


class Block(nn.Module):
    """A block that is quickly compiled."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.layer(x))


class Other(Block):
    """A block of another kind."""

    def forward(self, x: Tensor) -> Tensor:
        return x - torch.sin(self.layer(x))


def toy() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"first": nn.ModuleList([Block(), Block()]), "second": nn.ModuleList([Other(), Other()])})


def toy_gradients(model: nn.Module, tokens: int = 3) -> list[Tensor]:
    x = torch.linspace(-1, 1, 8 * tokens).view(1, tokens, 8).requires_grad_()
    for block in blocks(model):
        x = block(x)
    return list(torch.autograd.grad(x.square().mean(), list(model.parameters())))


def broken(when: Callable[[int], bool]) -> Callable[..., Any]:
    """A compiler that fails at some of its calls, counted from 0."""
    calls = iter(range(1000))

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        if when(next(calls)):
            raise FileNotFoundError("no compiler: cl.exe\nand much more")
        return graph.forward

    return backend


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("library")]


def test_without_a_compiler_nothing_is_compiled_and_one_line_says_so(caplog: pytest.LogCaptureFixture) -> None:
    model = toy()
    with caplog.at_level(logging.WARNING):
        assert not compile_blocks(model, broken(lambda call: True))
        assert all(map(torch.equal, toy_gradients(model), toy_gradients(toy())))
    assert all("forward" not in block.__dict__ for block in blocks(model))
    (line,) = said(caplog)
    assert "no compiler: cl.exe" in line
    assert "\n" not in line


@pytest.mark.parametrize("call", [1, 2])
def test_a_kind_of_block_that_fails_runs_as_it_is(call: int, caplog: pytest.LogCaptureFixture) -> None:
    model = toy()
    with caplog.at_level(logging.WARNING):
        assert compile_blocks(model, broken(lambda number: number == call))
        checkpoint_blocks(model)
        for tokens in (3, 4):
            assert all(map(torch.equal, toy_gradients(model, tokens), toy_gradients(toy(), tokens)))
    (line,) = said(caplog)
    assert line.startswith(f"--torch_compile: {'Block' if call == 1 else 'Other'} ")


def test_a_block_that_worked_and_fails_later_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    model = toy()
    with caplog.at_level(logging.WARNING):
        assert compile_blocks(model, broken(lambda number: number == 3))
        toy_gradients(model)
        with torch.no_grad():  # another way to compile
            first = next(iter(blocks(model)))
            assert first(torch.ones(1, 3, 8)).isfinite().all()
        assert all(map(torch.equal, toy_gradients(model), toy_gradients(toy())))
    assert len(said(caplog)) == 1


def test_a_mistake_that_is_not_the_compilers_stays_visible() -> None:
    model = toy()
    assert compile_blocks(model, "eager")
    with pytest.raises(RuntimeError):
        next(iter(blocks(model)))(torch.ones(3))


def test_an_unknown_backend_is_no_reason_to_stop(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert not compile_blocks(toy(), "no such compiler")
    assert "no such compiler" in caplog.text
