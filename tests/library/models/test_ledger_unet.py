"""The ledger says how much memory a step of a U-Net takes: compared with what PyTorch really holds."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from library.models import unet
from library.models.activations import Amount, Numerics, Training
from library.models.ledger_unet import UnetActivations
from library.models.memory import blocks, checkpoint_blocks
from library.models.unet_blocks import block_paths
from tests import tiny_sd
from tests.allocations import Allocations, without_data

CLOSE = 0.1
"""What the forecast promises."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is computed, and how."""

    version: Any = "xl"
    width: int = 64
    side: int = 32
    """Of the latents."""
    images: int = 1
    rank: int = 4
    every: int = 0
    dtype: torch.dtype = torch.float32

    @property
    def amount(self) -> Amount:
        return Amount(images=self.images, image_tokens=self.side**2, text_tokens=77)


def shapes_of(case: Case) -> dict[str, tuple[int, ...]]:
    model = tiny_sd.unet(case.version, width=case.width)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def peak_of(case: Case, shapes: dict[str, tuple[int, ...]]) -> int:
    """Most bytes that activations and gradients take in a step, beside weights and batch."""
    lora = pytest.importorskip("networks.lora")
    with ExitStack() as stack:
        stack.enter_context(without_data())
        before = torch.get_default_dtype()
        torch.set_default_dtype(case.dtype)
        stack.callback(torch.set_default_dtype, before)
        model: Any = unet.build_unet(shapes)
        amount, context = case.amount, shapes["mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"][1]
        sample = torch.randn(amount.images, 4, case.side, case.side)
        text = torch.randn(amount.images, amount.text_tokens, context)
        pooled = torch.randn(amount.images, tiny_sd.WIDTHS["text_encoder_2"]) if case.version == "xl" else None
        sizes = None if pooled is None else torch.ones(amount.images, 6)
        times = torch.ones(amount.images)
        params: list[nn.Parameter] = list(model.parameters())
        if case.rank:
            model.requires_grad_(False)
            network = lora.create_network(1.0, case.rank, case.rank, None, None, model)
            network.apply_to(None, model, False, True)
            params = list(network.parameters())
        if case.every:
            checkpoint_blocks(model, case.every)
        model.train()
        batch = [tensor for tensor in (sample, text, pooled, sizes, times) if tensor is not None]
        counter = Allocations(
            [*{id(one): one for one in (*model.parameters(), *model.buffers(), *params, *batch)}.values()]
        )
        start = counter.live
        mixed = case.dtype != torch.float32
        with counter:
            with torch.autocast("cpu", case.dtype if mixed else torch.bfloat16, enabled=mixed):
                answer = unet.predict(model, sample, times, text, pooled, sizes)
            answer.float().square().mean().backward()  # type: ignore[no-untyped-call]
        return counter.peak - start


CASES = {
    "LoRA": Case(),
    "LoRA, recomputing": Case(every=1),
    "LoRA, some recomputing": Case(every=3),
    "LoRA, two images, SD 1.x": Case(version="1", images=2),
    "LoRA, SD 2.x, recomputing": Case(version="2", every=1),
    "LoRA in bfloat16, larger": Case(dtype=torch.bfloat16, side=128),
    "LoRA in bfloat16, larger, recomputing": Case(dtype=torch.bfloat16, side=128, every=1),
    "whole": Case(rank=0),
    "whole, recomputing": Case(rank=0, every=1),
}


QUICK = ("LoRA", "whole, recomputing")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in CASES]
)
def test_a_step_takes_what_the_ledger_says(name: str) -> None:
    case = CASES[name]
    shapes = shapes_of(case)
    size = case.dtype.itemsize
    training = Training(rank=case.rank, whole=not case.rank, checkpoint_every=case.every)
    foreseen = UnetActivations(shapes).step(case.amount, Numerics.of("cpu", size), training).peak
    assert foreseen == pytest.approx(peak_of(case, shapes), rel=CLOSE)


@pytest.mark.parametrize("version", ["1", "2", "xl"])
def test_blocks_are_all_that_is_repeated_in_the_order_in_which_they_compute(version: Any) -> None:
    model: Any = tiny_sd.unet(version)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    built: Any = unet.build_unet(shapes)
    order: list[str] = []
    for path in block_paths(shapes):
        built.get_submodule(path).register_forward_pre_hook(lambda *_, path=path: order.append(path))
    pooled, sizes = (torch.ones(1, 64), torch.ones(1, 6)) if version == "xl" else (None, None)
    context = shapes["mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"][1]
    unet.predict(built, torch.ones(1, 4, 8, 8), torch.ones(1), torch.ones(1, 77, context), pooled, sizes)
    assert tuple(order) == block_paths(shapes)
    assert [built.get_submodule(path) for path in order] == list(blocks(built))
    outside = [name for name in shapes if not name.startswith(tuple(f"{path}." for path in order))]
    assert not [name for name in outside if "resnets" in name or "transformer_blocks" in name or "samplers" in name]
