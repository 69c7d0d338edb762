"""The SD3 transformer against the Diffusers implementation, with the same random weights, and against goldens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from library.log import DataError
from library.models import keymaps_sd3
from library.models.keymaps import Mapped, chained, mapped_shapes
from library.models.memory import checkpoint_blocks
from library.models.mmdit import MMDiT, MMDiTConfig
from library.models.positions import choose_size, crop, crops, scaled_size, scaled_table, sincos_table
from library.models.streaming import stream
from tests import tiny_sd3
from tests.tiny_sd3 import VARIANTS, Variant

GOLDEN = Path(__file__).parents[2] / "golden"
KEYS = json.loads((GOLDEN / "sd3_keys.json").read_text(encoding="utf-8"))
POSITIONS = json.loads((GOLDEN / "sd3_pos_embed.json").read_text(encoding="utf-8"))
PREFIX = "model.diffusion_model."
PUBLISHED: dict[str, dict[str, tuple[int, ...]]] = {
    "medium": {
        name.removeprefix(PREFIX): tuple(shape)
        for name, shape in KEYS["sd3_medium_unified"].items()
        if name.startswith(PREFIX)
    },
    "5-medium": {name: tuple(shape) for name, shape in KEYS["sd35_medium_mmdit"].items()},
    "5-large": {name: tuple(shape) for name, shape in KEYS["sd35_large_mmdit"].items()},
}


def inputs(height: int = 12, width: int = 8) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "x": torch.randn(2, 16, height, width, generator=generator),
        "timesteps": torch.tensor([250.0, 917.0]),
        "context": torch.randn(2, 9, tiny_sd3.CONTEXT_WIDTH, generator=generator),
        "pooled": torch.randn(2, tiny_sd3.L_WIDTH + tiny_sd3.G_WIDTH, generator=generator),
    }


@pytest.mark.parametrize("variant", VARIANTS)
def test_same_answer_as_diffusers(variant: Variant) -> None:
    model, given = tiny_sd3.mmdit(variant, depth=3).eval(), inputs()
    with torch.no_grad():
        found = model(**given)
        expected = tiny_sd3.diffusers_mmdit(model)(
            hidden_states=given["x"],
            encoder_hidden_states=given["context"],
            pooled_projections=given["pooled"],
            timestep=given["timesteps"],
        ).sample
    assert found.shape == given["x"].shape
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("variant", VARIANTS)
def test_names_of_diffusers_and_back(variant: Variant) -> None:
    state = tiny_sd3.mmdit(variant, depth=3).state_dict()
    theirs = tiny_sd3.diffusers_mmdit(tiny_sd3.mmdit(variant, depth=3)).state_dict()
    back = Mapped(theirs, keymaps_sd3.mmdit_from_file(theirs))
    assert set(back) == set(state)
    assert all(torch.equal(back[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("variant", VARIANTS)
def test_published_checkpoints_have_exactly_the_golden_tensors(variant: Variant) -> None:
    shapes = PUBLISHED[variant]
    config = MMDiTConfig.from_shapes(shapes)
    with torch.device("meta"):
        state = MMDiT(config).state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == shapes
    assert config.variant == variant
    assert (config.width // config.head_width, config.head_width) == (38 if variant == "5-large" else 24, 64)
    assert config.dual_blocks == (set(range(13)) if variant == "5-medium" else set())
    there = keymaps_sd3.mmdit_to_diffusers(shapes)
    theirs = mapped_shapes(shapes, there)
    again = chained(there, keymaps_sd3.mmdit_from_file(theirs))
    assert mapped_shapes(shapes, again) == shapes


def test_defaults_are_sd3_medium() -> None:
    assert MMDiTConfig.from_shapes(PUBLISHED["medium"]) == MMDiTConfig()
    with pytest.raises(DataError, match=r"context_embedder\.weight"):
        MMDiTConfig.from_shapes({n: s for n, s in PUBLISHED["medium"].items() if n != "context_embedder.weight"})


def test_every_part_of_a_dual_block_counts() -> None:
    given = inputs()
    before = tiny_sd3.mmdit("5-medium")(**given)
    for name in ("attn2.proj", "attn2.ln_q", "attn2.qkv", "attn.ln_k", "adaLN_modulation.1"):
        model = tiny_sd3.mmdit("5-medium")
        model.get_parameter(f"joint_blocks.0.x_block.{name}.weight").data *= -0.5
        assert not torch.allclose(model(**given), before, atol=1e-3), name


def test_gradients_reach_every_parameter_and_not_the_positions() -> None:
    model = tiny_sd3.mmdit("5-medium")
    model(**inputs()).square().mean().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    assert "pos_embed" not in dict(model.named_parameters())


@pytest.mark.parametrize("variant", VARIANTS)
def test_recomputed_and_streamed_blocks_give_the_same_gradients(variant: Variant) -> None:
    plain, other, given = tiny_sd3.mmdit(variant), tiny_sd3.mmdit(variant), inputs()
    checkpoint_blocks(other)
    streaming = stream(other, 2, torch.device("cpu"), slots=1, poison=True)
    for model in (plain, other):
        model(**given).square().mean().backward()
    streaming.close()
    theirs = dict(other.named_parameters())
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(theirs[name].grad, parameter.grad)


def test_odd_sizes_are_filled_up_and_cut() -> None:
    model, given = tiny_sd3.mmdit(), inputs(7, 6)
    filled = torch.cat((given["x"], given["x"][:, :, -2:-1]), dim=2)
    found = model(**given)
    assert found.shape == (2, 16, 7, 6)
    torch.testing.assert_close(found, model(**(given | {"x": filled}))[:, :, :7])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_runs_in_half_precision(dtype: torch.dtype) -> None:
    model, given = tiny_sd3.mmdit("5-medium"), inputs()
    exact = model(**given)
    half = {name: value if name == "timesteps" else value.to(dtype) for name, value in given.items()}
    found = model.to(dtype)(**half)
    assert found.dtype == dtype
    assert (found.float() - exact).abs().max() < 0.05 * exact.abs().max()


def test_table_golden() -> None:
    table = sincos_table(1536, 192).view(192, 192, 1536)
    for (row, column), values in zip(
        POSITIONS["grid 192"]["points (row,col)"], POSITIONS["grid 192"]["values"], strict=True
    ):
        found = table[row, column, POSITIONS["columns"]]
        torch.testing.assert_close(found, torch.tensor(values), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("size", [32, 48, 64])
def test_scaled_table_golden(size: int) -> None:
    golden = POSITIONS["scaled"][f"patched size {size}"]
    side = golden["grid"]
    table = scaled_table(1536, size).view(side, side, 1536)
    for (row, column), values in zip(golden["points (row,col)"], golden["values"], strict=True):
        found = table[row, column, POSITIONS["columns"]]
        torch.testing.assert_close(found, torch.tensor(values), rtol=1e-4, atol=2e-5)


def test_crop_golden() -> None:
    table = torch.arange(192 * 192).view(1, -1, 1)
    for rows, columns, top, left in ((64, 64, 64, 64), (52, 76, 70, 58)):
        part = crop(table, rows, columns)[0, :, 0]
        assert len(part) == rows * columns
        assert divmod(int(part[0]), 192) == (top, left)
        assert divmod(int(part[-1]), 192) == (top + rows - 1, left + columns - 1)
    assert int(crop(table, 2, 2, (3, 5))[0, 0]) == 3 * 192 + 5
    with pytest.raises(DataError, match="193 x 10 tokens"):
        crop(table, 10, 193)


def test_each_image_of_a_batch_has_a_part_of_its_own() -> None:
    table = sincos_table(8, 6)
    places = [(top, left) for top in range(3) for left in range(2)]
    found = crops(table, 4, 5, torch.tensor(places))
    assert found.shape == (6, 20, 8)
    for part, place in zip(found, places, strict=True):
        assert torch.equal(part, crop(table, 4, 5, place)[0])


def test_positions_can_be_given() -> None:
    model, given = tiny_sd3.mmdit(), inputs()
    middle = crop(model.pos_embed, 6, 4)
    assert torch.equal(model(**given, positions=middle), model(**given))
    assert not torch.allclose(model(**given, positions=crop(model.pos_embed, 6, 4, (0, 0))), model(**given), atol=1e-4)


def test_scaled_tables_are_chosen_by_area() -> None:
    sizes = [scaled_size(*size) for size in ((512, 512), (768, 768), (1024, 1024), (1152, 896))]
    assert sizes == [32, 48, 64, 63]
    sizes = [64, 32, 48]
    assert choose_size(sizes, 32, 32) == 32
    assert choose_size(sizes, 39, 42) == 32  # 1664 tokens are the boundary
    assert choose_size(sizes, 41, 41) == 48
    assert choose_size(sizes, 40, 80) == 80  # longer than any table for this area
    assert choose_size(sizes, 90, 90) == 64
    assert choose_size(sizes, 97, 97) == 97
