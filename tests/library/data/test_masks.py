"""Masks in the cells of the latents."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from library.data.masks import from_bytes, to_bytes, to_latent_size

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "masked_loss.json").read_text("utf-8"))


def test_alpha_is_averaged_as_in_the_reference():
    mask = torch.tensor(GOLDEN["alpha_mask"]["mask"][0])
    wanted = torch.tensor(GOLDEN["alpha_mask"]["out"])[0, 0]
    assert torch.allclose(to_latent_size(mask, 2), wanted, atol=1e-6)


def test_red_channel_is_averaged_as_in_the_reference():
    red = torch.tensor(GOLDEN["conditioning_image"]["R channel (-1..1)"])
    wanted = torch.tensor(GOLDEN["conditioning_image"]["out"])[0, 0]
    assert torch.allclose(to_latent_size(red / 2 + 0.5, 2), wanted, atol=1e-6)


@pytest.mark.parametrize("stride", [1, 8, 16])
def test_cells_are_means_of_their_pixels(stride):
    mask = torch.rand(48, 80)
    cells = to_latent_size(mask, stride)
    assert cells.shape == (48 // stride, 80 // stride)
    blocks = mask.reshape(48 // stride, stride, 80 // stride, stride).mean((1, 3))
    assert torch.allclose(cells, blocks, atol=1e-6)
    assert to_latent_size(torch.zeros(16, 16), stride).max() == 0
    assert to_latent_size(torch.ones(16, 16), stride).min() == 1


def test_eight_bits_lose_nothing():
    mask = torch.arange(256).float().div(255).reshape(16, 16)
    assert torch.equal(from_bytes(to_bytes(mask)), mask)
