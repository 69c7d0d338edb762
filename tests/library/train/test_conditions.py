"""Latents made on the spot: in the autoencoder's own type, and without waiting for the device."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from library.families.sdxl import Sdxl
from library.train.conditions import Conditions, encode_images
from library.types import Batch, Models, Posterior, Size


class Vae(nn.Module):
    """A convolution that overflows in half precision where pixels are 1."""

    def __init__(self, dtype: torch.dtype, weight: float = 1.0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 8, stride=8, bias=False, dtype=dtype)
        nn.init.constant_(self.conv.weight, weight)


class Family:
    """Encodes with the convolution alone."""

    traits = replace(Sdxl.traits, latent_scale=0.5)

    def __init__(self) -> None:
        self.types: list[torch.dtype] = []

    def encode_images(self, vae: Vae, pixels: Tensor) -> Posterior:
        made = vae.conv(pixels)
        self.types.append(made.dtype)
        return Posterior(made.float(), torch.zeros_like(made, dtype=torch.float32))


def batch(brightness: float) -> Batch:
    size = Size(16, 16)
    return Batch(
        names=["a"],
        captions=[""],
        pixels=torch.full((1, 3, 16, 16), brightness),
        loss_weights=torch.ones(1),
        draws=[1],
        image_seeds=[1],
        size=size,
        original_sizes=[size],
        crops=[(0, 0)],
    )


def conditions(vae: Vae) -> Conditions:
    return Conditions(family=Family(), models=Models(vae=vae), device=torch.device("cpu"))


def test_a_float32_autoencoder_stays_so_within_mixed_precision() -> None:
    made = conditions(Vae(torch.float32, 1e-3))
    with torch.autocast("cpu", torch.bfloat16):
        latents = made.latents(batch(1.0))
    assert made.family.types == [torch.float32]
    assert latents[0, 0, 0, 0].item() == pytest.approx(0.096, abs=1e-6)  # bfloat16 says 0.0962


def test_an_overflow_is_noticed_with_the_next_batch() -> None:
    made = conditions(Vae(torch.float16, 1000.0))
    assert made.latents(batch(0.0)).isfinite().all()
    assert not made.latents(batch(1.0)).isfinite().all()
    assert made.latents(batch(1.0)).isfinite().all()
    assert made.family.types == [torch.float16, torch.float16, torch.float32]


def test_the_host_asks_nothing_of_the_batch_it_has_just_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    made = [conditions(Vae(dtype)) for dtype in (torch.float16, torch.bfloat16)]

    def asked(*_: object) -> None:
        raise AssertionError("a tensor was read")

    for name in ("item", "__bool__", "__float__", "cpu", "tolist"):
        monkeypatch.setattr(torch.Tensor, name, asked)
    for one in made:
        one.latents(batch(0.0))


def test_caching_tries_again_at_once() -> None:
    vae, family = Vae(torch.float16, 1000.0), Family()
    assert encode_images(family, vae, batch(1.0).pixels).mean.isfinite().all()
    assert family.types == [torch.float16, torch.float32]
