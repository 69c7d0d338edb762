"""Streamed blocks change nothing but memory: every number is the same, and stale weights would be NaN."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from library.models import streaming
from library.models.flux import Flux
from library.models.memory import blocks, checkpoint_blocks
from library.models.quantized import store_linears
from library.models.streaming import Streaming, spread, stream, streamed_names, swapped_blocks
from networks import lora_flux
from networks.base import Network
from tests.late_copies import moved
from tests.networks import tiny_models

CPU = torch.device("cpu")
BLOCKS = 5
SMALL = replace(tiny_models.TINY, width=32, mlp_width=64)


@dataclass
class Trace:
    """All numbers of a training."""

    losses: list[Tensor] = field(default_factory=list)
    samples: list[Tensor] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)

    def same_as(self, other: Trace) -> bool:
        return all(
            len(mine) == len(theirs) and all(map(torch.equal, mine, theirs))
            for mine, theirs in (
                (self.losses, other.losses),
                (self.samples, other.samples),
                (list(self.weights.values()), list(other.weights.values())),
                *((list(a.values()), list(b.values())) for a, b in zip(self.gradients, other.gradients, strict=True)),
            )
        )


@dataclass(frozen=True)
class Case:
    """A way to train."""

    adapted: bool = True
    every: int | None = 1
    """Each so many blocks are recomputed; None: none."""
    offload: bool = False
    fused: bool = False
    """The optimizer steps in the backward pass."""
    micro: int = 1
    steps: int = 2
    samples_inside: bool = False
    """Between forward and backward, and between backward and the step."""


def build(case: Case) -> tuple[Flux, Network | None]:
    model = tiny_models.flux(SMALL)
    network = None
    if case.adapted:
        network = lora_flux.create_network(1.0, 2, 1.0, None, [None, None], model)
        network.apply_to(None, model, False, True)
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    else:
        model.requires_grad_(True)
    if case.every is not None:
        checkpoint_blocks(model, case.every, offload=case.offload)
    return model, network


def trained(model: Flux, network: Network | None) -> dict[str, nn.Parameter]:
    return dict((network or model).named_parameters())


def train(model: Flux, network: Network | None, case: Case) -> Trace:
    """Some steps with momentum, and samples before, between and inside."""
    parameters, trace = trained(model, network), Trace()
    gradients: dict[str, Tensor] = {}
    hooks = []
    if case.fused:

        def step_now(name: str, parameter: Tensor) -> None:
            assert parameter.grad is not None
            gradients[name] = parameter.grad.clone()
            with torch.no_grad():
                parameter.sub_(parameter.grad, alpha=0.1)
            parameter.grad = None

        for name, parameter in parameters.items():
            hooks.append(parameter.register_post_accumulate_grad_hook(lambda p, name=name: step_now(name, p)))  # type: ignore[misc]
    optimizer = torch.optim.SGD(list(parameters.values()), lr=0.1, momentum=0.9, foreach=False)
    trace.samples.append(sample(model))
    for step in range(case.steps):
        for micro in range(case.micro):
            inputs = tiny_models.flux_inputs(seed=10 * step + micro)
            loss = model(**inputs).square().mean()
            if case.samples_inside:
                trace.samples.append(sample(model))
            loss.backward()
            trace.losses.append(loss.detach())
            if case.samples_inside:
                trace.samples.append(sample(model))
        if not case.fused:
            gradients = {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}
            optimizer.step()
            optimizer.zero_grad()
        assert gradients
        trace.gradients.append(dict(gradients))
        trace.samples.append(sample(model))
    for hook in hooks:
        hook.remove()
    trace.weights = {name: value.clone() for name, value in model.state_dict().items()}
    trace.weights |= {f"lora {name}": p.detach().clone() for name, p in parameters.items()}
    return trace


def sample(model: Flux) -> Tensor:
    with torch.no_grad():
        answer: Tensor = model(**tiny_models.flux_inputs(seed=99))
    return answer


EXPECTED: dict[Case, Trace] = {}


def expected(case: Case) -> Trace:
    """The numbers without streaming."""
    if case not in EXPECTED:
        EXPECTED[case] = train(*build(case), case)
        assert all(value.isfinite().all() for value in EXPECTED[case].losses)
    return EXPECTED[case]


CASES = st.builds(
    Case,
    adapted=st.booleans(),
    every=st.sampled_from([None, 1, 2]),
    offload=st.booleans(),
    micro=st.sampled_from([1, 2]),
    samples_inside=st.booleans(),
) | st.builds(
    Case,
    adapted=st.just(False),
    every=st.sampled_from([None, 1, 2]),
    fused=st.just(True),
    samples_inside=st.booleans(),
)


@settings(max_examples=30, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate))
@given(case=CASES, count=st.integers(0, BLOCKS), slots=st.integers(1, BLOCKS + 1), late=st.booleans())
def test_every_number_is_the_same(case: Case, count: int, slots: int, late: bool) -> None:
    with moved(late=late):
        model, network = build(case)
        stream(model, count, CPU, slots=slots, poison=True)
        found = train(model, network, case)
    assert found.same_as(expected(case))


def test_a_slot_that_a_block_left_is_poisoned_and_only_read_when_filled_again() -> None:
    model, _ = build(Case(every=None))
    streaming_ = stream(model, BLOCKS, CPU, poison=True)
    sample(model)
    streaming_.settle()
    assert all(slot.memory.view(torch.float32).isnan().all() for slot in streaming_._slots)


def test_reading_a_left_slot_would_show() -> None:
    """The other tests can fail: without the packing of saved weights, the backward pass reads NaN."""
    case = Case(adapted=False, every=None, steps=1, samples_inside=True)
    model, network = build(case)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Streaming, "_pack", lambda self, block, tensor: tensor)
        stream(model, BLOCKS, CPU, slots=3, poison=True)
        assert not train(model, network, case).same_as(expected(case))


def test_the_ring_is_all_that_is_on_the_device_and_frozen_weights_never_come_back() -> None:
    model, network = build(Case())
    names = streamed_names(model, 4)
    homes = {id(tensor) for name, tensor in model.named_parameters() if name in names}
    copied: list[tuple[Tensor, Tensor]] = []

    class Counting(streaming.CopyStream):
        def copy(self, target: Tensor, source: Tensor) -> None:
            copied.append((target, source))
            super().copy(target, source)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streaming, "CopyStream", Counting)
        streaming_ = stream(model, 4, CPU, slots=2)
    train(model, network, Case())
    ring = {slot.memory.untyped_storage().data_ptr() for slot in streaming_._slots}
    assert copied
    assert all(target.untyped_storage().data_ptr() in ring for target, _ in copied)
    away = {
        tensor.untyped_storage().data_ptr()
        for tensor in (*model.parameters(), *model.buffers())
        if id(tensor) in homes and tensor.untyped_storage().data_ptr() in ring
    }
    assert len(away) <= 2
    largest = max(packed.layout.bytes for packed in streaming_._packed.values())
    assert streaming_.device_bytes == 2 * largest < streaming_.host_bytes


def test_blocks_that_turn_stay_so_that_a_step_moves_each_other_block_twice() -> None:
    model, _ = build(Case())
    sent: list[int] = []

    class Noting(Streaming):
        def _send(self, slot: Any, block: int) -> None:
            sent.append(block)
            super()._send(slot, block)

    Noting(model, BLOCKS, CPU, slots=2)
    for _ in range(2):
        sent.clear()
        model(**tiny_models.flux_inputs()).square().mean().backward()
    assert sent == [2, 3, 4, 2, 1, 0]
    with torch.no_grad():
        sample(model)
        sent.clear()
        sample(model)
    assert sent == [1, 2, 3, 4, 0]


def test_an_exception_in_the_middle_of_a_pass_leaves_nothing_behind() -> None:
    for stage in ("forward", "backward"):
        case = Case(adapted=False, steps=1)
        model, network = build(case)
        stream(model, BLOCKS, CPU, poison=True)
        parameter = next(iter(list(blocks(model))[2].parameters()))

        def fail(*_: object) -> None:
            raise KeyboardInterrupt

        hook = parameter.register_hook(fail) if stage == "backward" else blocks_hook(model, fail)
        with pytest.raises(KeyboardInterrupt):
            model(**tiny_models.flux_inputs()).square().mean().backward()
        hook.remove()
        model.zero_grad()
        assert train(model, network, case).same_as(expected(case))


@pytest.mark.parametrize("adapted", [False, True])
def test_a_backward_pass_may_begin_inside_a_block(adapted: bool) -> None:
    found: list[list[Tensor]] = []
    for count in (0, BLOCKS):
        model, network = build(Case(adapted=adapted, every=None))
        stream(model, count, CPU, slots=3, poison=True)
        inside: list[Tensor] = []
        layer = list(blocks(model))[1].img_mlp[2]
        hook = layer.register_forward_hook(lambda module, inputs, answer: inside.append(answer))  # noqa: B023
        model(**tiny_models.flux_inputs())
        hook.remove()
        sample(model)
        inside[0].square().sum().backward()
        found.append([p.grad for p in trained(model, network).values() if p.grad is not None])
    assert found[0]
    assert all(map(torch.equal, *found))


def blocks_hook(model: Flux, fail: Callable[..., None]) -> Any:
    return list(list(blocks(model))[3].modules())[-1].register_forward_hook(fail)


def test_weights_are_in_main_memory_when_they_are_saved_and_a_state_goes_on_exactly() -> None:
    case = Case(adapted=False, steps=1)
    model, network = build(case)
    whole = train(*build(Case(adapted=False, steps=2)), Case(adapted=False, steps=2))
    with moved():
        streaming_ = stream(model, 3, CPU, poison=True)
        train(model, network, case)
        sample(model)
        saved = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    homes = {packed.home.untyped_storage().data_ptr() for packed in streaming_._packed.values()}
    names = streamed_names(model, 3)
    assert all((value.untyped_storage().data_ptr() in homes) == (n in names) for n, value in model.state_dict().items())

    other, _ = build(case)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    stream(other, 4, CPU, slots=1, poison=True)
    sample(other)
    other.load_state_dict(saved)
    assert torch.equal(sample(other), whole.samples[1])


def test_gradients_and_weights_are_in_main_memory_after_backward() -> None:
    model, _ = build(Case(adapted=False))
    with moved():
        streaming_ = stream(model, BLOCKS, CPU, poison=True)
        model(**tiny_models.flux_inputs()).square().mean().backward()
    ring = {slot.memory.untyped_storage().data_ptr() for slot in streaming_._slots}
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()
        assert parameter.untyped_storage().data_ptr() not in ring


def test_names_are_known_without_data() -> None:
    with torch.device("meta"):
        model = Flux(tiny_models.TINY)
    assert streamed_names(model, 0) == frozenset()
    assert {name.split(".")[0] for name in streamed_names(model, 1)} == {"single_blocks"}
    everything = {name for name, _ in model.named_parameters() if "_blocks." in name}
    assert streamed_names(model, BLOCKS) == everything == streamed_names(model, 99)


def test_weights_of_few_bits_their_scales_and_odd_shapes_travel() -> None:
    class Block(nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            generator = torch.Generator().manual_seed(seed)
            numbers = torch.randint(-127, 127, (3, 5), dtype=torch.int8, generator=generator)
            self.weight = nn.Parameter(numbers, requires_grad=False)
            self.eight = nn.Parameter(torch.randn(5, 3, generator=generator).to(torch.float8_e4m3fn).T, False)
            self.register_buffer("scale", torch.rand((), generator=generator))
            self.register_buffer("empty", torch.empty(0))

        def forward(self, x: Tensor) -> Tensor:
            return x + (self.weight.float() * self.scale * 0.01 + self.eight.float()).sum(0)

    def model() -> nn.Sequential:
        return nn.Sequential(nn.ModuleList(Block(seed) for seed in range(4)))

    def answer(whole: nn.Module) -> Tensor:
        x = torch.ones(5, requires_grad=True)
        for block in blocks(whole):
            x = block(x)
        return x

    one, other = model(), model()
    assert one[0][0].eight.stride() == (1, 3)
    stream(other, 4, CPU, poison=True)
    assert torch.equal(answer(one), answer(other))
    assert other[0][0].eight.stride() == (1, 3)
    assert {name.rpartition(".")[2] for name in streamed_names(model(), 4)} == {"weight", "eight", "scale", "empty"}


@pytest.mark.parametrize("scheme", ["fp8", "fp8_scaled", "int8", "nf4"])
def test_stored_linears_are_streamed_under_adapters_in_autocast(scheme: str) -> None:
    found: list[list[Tensor]] = []
    for count in (0, 4):
        model = tiny_models.flux(SMALL)
        store_linears(model, scheme)
        network = lora_flux.create_network(1.0, 2, 1.0, None, [None, None], model)
        network.apply_to(None, model, False, True)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.fill_(0.1)
        if count:
            checkpoint_blocks(model, 2)
        stream(model, count, CPU, poison=True)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**tiny_models.flux_inputs()).square().mean()
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in network.parameters() if p.grad is not None)])
    assert len(found[0]) > 10
    assert all(map(torch.equal, *found))
    assert all(numbers.isfinite().all() for numbers in found[0])


@pytest.mark.parametrize("build_encoder", [tiny_models.clip_l, lambda: tiny_models.t5(layers=3)])
def test_any_lists_of_blocks_are_streamed(build_encoder: Callable[[], nn.Module]) -> None:
    found: list[list[Tensor]] = []
    for count in (0, 1, 9):
        encoder = build_encoder().requires_grad_(True)
        stream(encoder, count, CPU, slots=1, poison=True)
        answer = encoder(input_ids=torch.arange(6).reshape(1, 6)).last_hidden_state
        answer.square().sum().backward()
        found.append([answer.detach(), *(p.grad for p in encoder.parameters() if p.grad is not None)])
    for others in found[1:]:
        assert len(others) == len(found[0])
        assert all(map(torch.equal, others, found[0]))


def test_what_others_use_too_stays_where_it_is() -> None:
    shared = nn.Linear(2, 2)
    model = nn.ModuleDict({"list": nn.ModuleList([nn.Sequential(shared), nn.Sequential(nn.Linear(2, 2))]), "x": shared})
    assert streamed_names(model, 2) == {"list.1.0.weight", "list.1.0.bias"}
    stream(model, 2, CPU, poison=True)
    for block in blocks(model):
        assert block(torch.ones(2)).isfinite().all()


def test_closing_gives_the_model_back() -> None:
    model, _ = build(Case())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    forwards = [block.forward for block in blocks(model)]
    streaming_ = stream(model, 3, CPU, poison=True)
    model(**tiny_models.flux_inputs()).square().mean().backward()
    streaming_.close()
    assert [block.forward for block in blocks(model)] == forwards
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert sample(model).isfinite().all()


@given(blocks=st.integers(1, 60), count=st.integers(0, 70))
def test_streamed_blocks_are_spread(blocks: int, count: int) -> None:
    chosen = spread(blocks, count)
    assert len(chosen) == len(set(chosen)) == min(count, blocks)
    assert chosen == sorted(chosen)
    assert set(chosen) <= set(range(blocks))
    gaps = {b - a for a, b in pairwise(chosen)}
    assert max(gaps, default=0) - min(gaps, default=0) <= 1


def test_old_numbers_of_blocks() -> None:
    assert swapped_blocks(57, 0, 38) == 0
    assert swapped_blocks(57, 18, 38) == 27 + 2  # half of FLUX.1-dev
    assert swapped_blocks(57, 36, 38) == 56
    assert swapped_blocks(57, 99, 38) == 57
    assert swapped_blocks(38, 5) == 7
