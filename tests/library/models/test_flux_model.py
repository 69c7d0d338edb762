"""The FLUX.1 transformer against the Diffusers implementation, with the same random weights, and against goldens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from library.log import DataError
from library.models import keymaps
from library.models.flux import (
    Flux,
    FluxConfig,
    RMSNorm,
    image_ids,
    patchify,
    rotary_tables,
    rotate,
    text_ids,
    timestep_embedding,
    unpatchify,
)
from tests import tiny

GOLDEN = Path(__file__).parents[2] / "golden"
DEV = json.loads((GOLDEN / "flux_checkpoint_keys.json").read_text(encoding="utf-8"))
EMBEDDINGS = json.loads((GOLDEN / "flux_embeddings.json").read_text(encoding="utf-8"))


def relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


def inputs(batch: int = 2, length: int = 7) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(batch, 16, 6, 4, generator=generator)
    txt = torch.randn(batch, length, 32, generator=generator)
    return {
        "img": patchify(latents),
        "img_ids": image_ids(latents),
        "txt": txt,
        "txt_ids": text_ids(txt),
        "timesteps": torch.tensor([0.25, 0.9])[:batch],
        "pooled": torch.randn(batch, 32, generator=generator),
        "guidance": torch.tensor([3.5, 1.0])[:batch],
    }


def diffusers_answer(model: Flux, given: dict[str, Tensor], txt_mask: Tensor | None) -> Tensor:
    """What Diffusers' class makes of the same weights and inputs."""
    from diffusers import FluxTransformer2DModel

    config = model.config
    other = FluxTransformer2DModel(
        in_channels=config.in_channels,
        num_layers=config.double_blocks,
        num_single_layers=config.single_blocks,
        attention_head_dim=config.head_width,
        num_attention_heads=config.heads,
        joint_attention_dim=config.context_width,
        pooled_projection_dim=config.pooled_width,
        guidance_embeds=config.guidance,
        axes_dims_rope=config.axes,
    )
    state = model.state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    other.load_state_dict(dict(keymaps.Mapped(state, keymaps.flux_to_diffusers(shapes))), strict=True)
    mask = None
    if txt_mask is not None:
        mask = torch.cat((txt_mask, torch.ones(given["img"].shape[:2], dtype=torch.bool)), dim=1)[:, None, None]
    return other(
        hidden_states=given["img"],
        encoder_hidden_states=given["txt"],
        pooled_projections=given["pooled"],
        timestep=given["timesteps"],
        img_ids=given["img_ids"][0],
        txt_ids=given["txt_ids"][0],
        guidance=given["guidance"] if config.guidance else None,
        joint_attention_kwargs=None if mask is None else {"attention_mask": mask},
    ).sample


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("guidance", [False, True])
def test_same_answer_as_diffusers(guidance: bool, masked: bool) -> None:
    model = tiny.flux_model(guidance=guidance, double=2, single=2).eval()
    given = inputs()
    mask = torch.arange(7)[None] < torch.tensor([[4], [7]]) if masked else None
    with torch.no_grad():
        found = model(**given, txt_mask=mask)
        expected = diffusers_answer(model, given, mask)
    assert relative_error(found, expected) < 1e-5


def test_mask_hides_padding_text() -> None:
    model = tiny.flux_model().eval()
    given = inputs()
    mask = torch.arange(7)[None] < torch.tensor([[4], [7]])
    changed = given | {"txt": given["txt"].clone()}
    changed["txt"][0, 4:] += 1
    with torch.no_grad():
        assert torch.equal(model(**given, txt_mask=mask), model(**changed, txt_mask=mask))
        assert not torch.equal(model(**given), model(**changed))


def test_schnell_ignores_guidance_and_dev_needs_it() -> None:
    given = inputs()
    schnell = tiny.flux_model(guidance=False)
    assert torch.equal(schnell(**given), schnell(**(given | {"guidance": None})))
    with pytest.raises(ValueError, match="guidance"):
        tiny.flux_model(guidance=True)(**(given | {"guidance": None}))


@pytest.mark.parametrize("width", [16, 256])
def test_timestep_embedding_golden(width: int) -> None:
    golden = EMBEDDINGS[f"timestep_embedding,dim={width}"]
    found = timestep_embedding(torch.tensor(golden["t"]), width)
    found = found[:, golden["columns"]] if "columns" in golden else found
    torch.testing.assert_close(found, torch.tensor(golden["value"]), rtol=1e-4, atol=3e-4)


def test_dev_checkpoint_has_exactly_the_golden_tensors() -> None:
    shapes = {name: tuple(shape) for name, shape in DEV["dev"].items()}
    absent = set(DEV["guidance_keys_absent_in_schnell"])
    schnell = {name: shape for name, shape in shapes.items() if name not in absent}
    for expected, count in ((shapes, 780), (schnell, 776)):
        config = FluxConfig.from_shapes(expected)
        with torch.device("meta"):
            state = Flux(config).state_dict()
        assert {name: tuple(tensor.shape) for name, tensor in state.items()} == expected
        assert len(state) == count
        assert (config.heads, config.axes) == (24, (16, 56, 56))
        assert config.guidance == (count == 780)
    assert FluxConfig.from_shapes(shapes) == FluxConfig()


def test_sizes_of_a_pruned_checkpoint_are_read() -> None:
    model = tiny.flux_model(width=96, head_width=32, double=3, single=5, context_width=40, pooled_width=24)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert FluxConfig.from_shapes(shapes) == model.config
    assert model.config.heads == 3
    del shapes["img_in.weight"]
    with pytest.raises(DataError, match=r"img_in\.weight"):
        FluxConfig.from_shapes(shapes)


def test_tokens_are_ordered_by_row_and_features_by_channel() -> None:
    latents = torch.randn(2, 16, 6, 4)
    tokens = patchify(latents)
    assert tokens.shape == (2, 6, 64)
    for row, column, channel, dy, dx in ((0, 0, 0, 0, 0), (2, 1, 5, 1, 0), (1, 0, 15, 0, 1)):
        expected = latents[:, channel, 2 * row + dy, 2 * column + dx]
        assert torch.equal(tokens[:, row * 2 + column, channel * 4 + 2 * dy + dx], expected)
    assert torch.equal(unpatchify(tokens, 6, 4), latents)
    ids = image_ids(latents)
    assert ids.shape == (2, 6, 3)
    assert ids[1].tolist() == [[0, row, column] for row in range(3) for column in range(2)]


def test_rms_norm_of_half_precision_is_reckoned_in_float32() -> None:
    x = 200 * torch.randn(5, 3, 32)
    norm = RMSNorm(32)
    norm.scale.data = torch.rand(32)
    expected = (
        x.bfloat16().float() / x.bfloat16().float().square().mean(-1, keepdim=True).add(1e-6).sqrt()
    ) * norm.scale
    torch.testing.assert_close(norm(x.bfloat16()).float(), expected, rtol=1.6e-2, atol=1e-2)
    assert norm(x.half()).isfinite().all()  # squares would overflow in float16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_runs_in_half_precision(dtype: torch.dtype) -> None:
    model, given = tiny.flux_model(), inputs()
    exact = model(**given)
    half = {name: value if name.endswith("ids") else value.to(dtype) for name, value in given.items()}
    half["timesteps"], half["guidance"] = given["timesteps"], given["guidance"]
    found = model.to(dtype)(**half)
    assert found.dtype == dtype
    assert relative_error(found.float(), exact) < 0.05


def test_gradients_reach_every_parameter() -> None:
    model = tiny.flux_model()
    model(**inputs()).square().mean().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_rotation_keeps_lengths_and_depends_on_distance_only() -> None:
    def dot(first: float, second: float) -> Tensor:
        table = rotary_tables(torch.tensor([[[0.0, first, 0.0], [0.0, second, 0.0]]]), (4, 14, 14))
        turned = rotate(x, table)
        return (turned[0, 0] * turned[0, 1]).sum()

    x = torch.randn(1, 2, 1, 32)
    torch.testing.assert_close(dot(3, 5), dot(10, 12), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(dot(3, 5), dot(3, 6), rtol=1e-3)


def test_rotary_tables_golden() -> None:
    golden = EMBEDDINGS["rope"]
    table = rotary_tables(torch.tensor([golden["ids"]]), (16, 56, 56))
    pairs = torch.tensor(golden["pair_index"])
    torch.testing.assert_close(table.cos[0, :, 0, 2 * pairs], torch.tensor(golden["cos"]), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(table.sin[0, :, 0, 2 * pairs + 1], torch.tensor(golden["sin"]), rtol=1e-4, atol=1e-6)
    assert torch.equal(table.sin[..., 0::2], -table.sin[..., 1::2])


def test_rotation_golden() -> None:
    q = (torch.arange(128) / 64 - 1).reshape(1, 1, 1, 128)
    found = rotate(q, rotary_tables(torch.tensor([[[0, 3, 5]]]), (16, 56, 56)))
    expected = torch.tensor(EMBEDDINGS["apply_rope"]["q_out"])
    torch.testing.assert_close(found.flatten(), expected, rtol=1e-4, atol=1e-6)
