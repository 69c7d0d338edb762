"""The ledger says how much memory a training step of SD3 takes: compared with what PyTorch really holds."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from library.models.activations import Amount, Numerics, Training
from library.models.ledger_mmdit import MMDiTActivations
from library.models.memory import checkpoint_blocks
from library.models.mmdit import MMDiT, MMDiTConfig
from networks.lora_sd3 import create_network
from tests.allocations import Allocations, without_data
from tests.flux_steps import in_type

SIZES = MMDiTConfig(depth=3, width=256, mlp_width=1024, context_width=512, pooled_width=128, table_side=32)
MODELS = {
    "medium": SIZES,
    "5-medium": replace(SIZES, qk_norm=True, dual_blocks=frozenset(range(2))),
    "5-large": replace(SIZES, qk_norm=True),
}


def peak_of(config: MMDiTConfig, images: int, rank: int, every: int, dtype: torch.dtype) -> int:
    """Most bytes that activations and gradients take in a step on 512 x 512 pixels, beside weights and batch."""
    with without_data():
        with in_type(dtype):
            model = MMDiT(config)
        parameters = list(model.parameters())
        if rank:
            model.requires_grad_(False)
            network = create_network(1.0, rank, rank, None, None, model)
            network.apply_to(None, model, False, True)
            network.prepare_grad_etc(None, model)
            parameters = list(network.parameters())
        if every:
            checkpoint_blocks(model, every)
        batch = (
            torch.randn(images, config.in_channels, 64, 64, dtype=dtype),
            torch.full((images,), 500.0),
            torch.randn(images, 141, config.context_width, dtype=dtype),
            torch.randn(images, config.pooled_width, dtype=dtype),
        )
        counter = Allocations([*model.parameters(), *model.buffers(), *parameters, *batch])
        before = counter.live
        with counter:
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                out = model.train()(*batch)
            out.float().square().mean().backward()
        return counter.peak - before


@pytest.mark.parametrize(
    ("variant", "rank", "every", "dtype"),
    [
        ("medium", 4, 1, torch.bfloat16),
        ("medium", 0, 1, torch.float32),
        ("5-medium", 4, 0, torch.float32),
        ("5-medium", 4, 2, torch.bfloat16),
        ("5-medium", 0, 1, torch.bfloat16),
        ("5-large", 0, 0, torch.float32),
    ],
)
def test_a_step_takes_what_the_ledger_says(variant: str, rank: int, every: int, dtype: torch.dtype) -> None:
    config, images = MODELS[variant], 1 + every
    model = MMDiTActivations(config)
    size = dtype.itemsize
    training = Training(rank=rank, whole=not rank, size=4 if rank else size, checkpoint_every=every)
    amount = model.amount(images, 512, 512, 64)
    assert amount == Amount(images=images, image_tokens=1024, text_tokens=141)
    measured = peak_of(config, images, rank, every, dtype)
    assert model.step(amount, Numerics.of("cpu", size), training).peak == pytest.approx(measured, rel=0.03)


def test_less_is_held_without_gradients() -> None:
    model = MMDiTActivations(SIZES)
    amount, numerics = model.amount(1, 512, 512, 64), Numerics.of("cpu", 4)
    assert model.look(amount, numerics) < model.step(amount, numerics, Training(rank=4)).peak / 3
    assert (model.swap_units, list(model.block_lists)) == (3, ["joint_blocks"])
