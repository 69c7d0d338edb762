"""What is trained is what was asked for, in every combination of parts and caches (needs A5)."""

from __future__ import annotations

import pytest

from tests.cells import MakeCell

CELL = "lora, nothing cached"
T5 = ("--network_args", "train_t5xxl=True")
PARTS = {
    "transformer": (("--network_train_unet_only",), {"unet"}),
    "with CLIP-L": ((), {"unet", "te1"}),
    "with both": (T5, {"unet", "te1", "te3"}),
    "with T5, CLIP-L at rate 0": ((*T5, "--text_encoder_lr", "0", "1e-3"), {"unet", "te3"}),
    "CLIP-L alone": (("--network_train_text_encoder_only",), {"te1"}),
    "both encoders": (("--network_train_text_encoder_only", *T5), {"te1", "te3"}),
    "transformer at rate 0": (("--unet_lr", "0"), {"te1"}),
}
CACHES = {
    "nothing cached": (),
    "latents cached": ("--cache_latents",),
    "all cached that can be": ("--cache_latents", "--cache_text_encoder_outputs"),
}


@pytest.mark.parametrize("caches", CACHES)
@pytest.mark.parametrize("parts", PARTS)
def test_exactly_the_wanted_parts_move(make_cell: MakeCell, parts: str, caches: str) -> None:
    given, wanted = PARTS[parts]
    cell = make_cell(CELL, "out")
    cell("--max_train_steps", "2", *given, *CACHES[caches])
    weights = cell.weights()
    assert {name.split("_")[1] for name in weights} == wanted
    moved = {name.split("_")[1] for name, tensor in weights.items() if "lora_up" in name and tensor.any()}
    assert moved == wanted
