"""The SD3 network: names and shapes in files, reading, merging, arguments, and what Diffusers makes of its files."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from library.log import DataError, UserError
from library.models.mmdit import MMDiT, MMDiTConfig
from networks.base import Network
from networks.lora_sd3 import create_network, create_network_from_weights, trained_encoders, weights_for
from tests import tiny_sd3

GOLDEN = Path(__file__).parents[1] / "golden"
KEYS = json.loads((GOLDEN / "sd3_lora_keys.json").read_text("utf-8"))
LARGE = {"depth": 38, "width": 2432, "mlp_width": 9728, "qk_norm": True}
SIZES = {
    "sd3_medium_mmdit": MMDiTConfig(table_side=4),
    "sd35_medium_mmdit": MMDiTConfig(table_side=4, qk_norm=True, dual_blocks=frozenset(range(13))),
    "sd35_large_mmdit": MMDiTConfig(table_side=4, **LARGE),  # type: ignore[arg-type]
}


def names_and_shapes(made: Network) -> dict[str, list[int]]:
    return {
        f"{adapter.name}.{key}": list(tensor.shape)
        for adapter in made.adapters
        for key, tensor in adapter.file_tensors().items()
    }


@pytest.mark.parametrize("variant", SIZES)
def test_names_and_shapes_at_full_size_are_those_of_the_reference(variant: str) -> None:
    with torch.device("meta"):
        made = create_network(1.0, 4, 1, None, [None, None, None], MMDiT(SIZES[variant]))
        made.apply_to()
        assert names_and_shapes(made) == KEYS[variant]


def test_layers_outside_the_blocks_and_text_encoders_at_full_size() -> None:
    with torch.device("meta"):
        first = CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12))
        second = CLIPTextModelWithProjection(
            CLIPTextConfig(
                hidden_size=1280,
                intermediate_size=5120,
                num_attention_heads=20,
                num_hidden_layers=32,
                projection_dim=1280,
            )
        )
        t5 = T5EncoderModel(
            T5Config(d_model=4096, d_ff=10240, d_kv=64, num_heads=64, num_layers=24, feed_forward_proj="gated-gelu")
        )
        model = MMDiT(SIZES["sd3_medium_mmdit"])
        made = create_network(1.0, 4, 1, None, [first, second, t5], model, train_t5xxl="True", emb_dims="[4,4,4,4,4,4]")
        made.apply_to()
        wanted = KEYS["sd3_medium_mmdit"] | KEYS["sd3_medium_extra_with_emb_dims_4"] | KEYS["text_encoders"]
        assert names_and_shapes(made) == wanted


def network(**arguments: object) -> tuple[Network, MMDiT]:
    model = tiny_sd3.mmdit("5-medium").eval().requires_grad_(False)
    torch.manual_seed(7)
    encoders: list[nn.Module | None] = [None, None, None]
    return create_network(1.0, 4, 2.0, None, encoders, model, **arguments), model  # type: ignore[arg-type]


def fill(made: Network) -> None:
    torch.manual_seed(8)
    for name, parameter in made.named_parameters():
        if "lora_up" in name:
            nn.init.normal_(parameter, std=0.1)


def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "x": torch.randn(2, 16, 8, 8, generator=generator),
        "timesteps": torch.tensor([250.0, 917.0]),
        "context": torch.randn(2, 9, tiny_sd3.CONTEXT_WIDTH, generator=generator),
        "pooled": torch.randn(2, tiny_sd3.L_WIDTH + tiny_sd3.G_WIDTH, generator=generator),
    }


@pytest.mark.parametrize("arguments", [{}, {"split_qkv": "True"}, {"emb_dims": "2,2,2,2,2,2"}], ids=str)
def test_a_file_read_back_and_merged_says_the_same(tmp_path: Path, arguments: dict[str, str]) -> None:
    made, model = network(**arguments)
    before = model(**inputs())
    made.apply_to()
    torch.testing.assert_close(model(**inputs()), before)
    fill(made)
    applied = model(**inputs())
    assert not torch.allclose(applied, before, atol=1e-3)
    path = tmp_path / "n.safetensors"
    made.save_weights(path, None, None)
    made.restore()
    again, tensors = create_network_from_weights(1.0, path, None, [None] * 3, model, for_inference=True)
    again.merge_to([None] * 3, model, tensors)
    torch.testing.assert_close(model(**inputs()), applied, rtol=1e-4, atol=1e-4)


def test_diffusers_says_the_same_with_the_file(tmp_path: Path) -> None:
    made, model = network()
    made.apply_to()
    fill(made)
    path = tmp_path / "n.safetensors"
    applied = model(**inputs())
    made.save_weights(path, None, None)
    made.restore()
    again, tensors = create_network_from_weights(1.0, path, None, [None] * 3, model, for_inference=True)
    again.merge_to([None] * 3, model, tensors)
    given = inputs()
    found = tiny_sd3.diffusers_mmdit(model)(
        hidden_states=given["x"],
        encoder_hidden_states=given["context"],
        pooled_projections=given["pooled"],
        timestep=given["timesteps"],
    ).sample
    torch.testing.assert_close(found, applied, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("argument", "gone"),
    [
        ("context_attn_dim", ("context_block_attn_qkv", "context_block_attn_proj")),
        ("context_mlp_dim", ("context_block_mlp_fc1", "context_block_mlp_fc2")),
        ("context_mod_dim", ("context_block_adaLN_modulation_1",)),
        ("x_attn_dim", ("x_block_attn_qkv", "x_block_attn_proj", "x_block_attn2_qkv", "x_block_attn2_proj")),
        ("x_mlp_dim", ("x_block_mlp_fc1", "x_block_mlp_fc2")),
        ("x_mod_dim", ("x_block_adaLN_modulation_1",)),
    ],
)
def test_ranks_of_groups(argument: str, gone: tuple[str, ...]) -> None:
    everywhere = {adapter.name for adapter in network()[0].created}
    found = {adapter.name for adapter in network(**{argument: "0"})[0].created}
    assert everywhere - found == {name for name in everywhere if name.endswith(gone)}
    ranks = {adapter.name: adapter.rank for adapter in network(**{argument: "7"})[0].created}  # type: ignore[attr-defined]
    assert {name for name, rank in ranks.items() if rank == 7} == everywhere - found
    assert set(ranks.values()) == {4, 7}


def test_blocks_can_be_chosen() -> None:
    made, _ = network(train_block_indices="1")
    assert {adapter.name.split("_")[4] for adapter in made.created} == {"1"}
    with pytest.raises(UserError, match="there is no block 2"):
        network(train_block_indices="0-2")
    with pytest.raises(UserError, match="6 are needed"):
        network(emb_dims="4,4")
    with pytest.raises(UserError, match="did you mean x_attn_dim"):
        network(x_atn_dim="4")


def test_ranks_without_effect_are_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        network(train_block_indices="none", emb_dims="4,0,0,0,0,0", x_mlp_dim="8", conv_dim="4")
    assert "x_mlp_dim has no effect" in caplog.text
    assert "conv_dim has no effect" in caplog.text


def test_t5_is_trained_on_request() -> None:
    names = ("clip_l", "clip_g", "t5xxl")
    assert list(trained_encoders(names, {})) == ["clip_l", "clip_g"]
    assert list(trained_encoders(names, {"train_t5xxl": "True"})) == list(names)
    encoders = [tiny_sd3.encoder(name) for name in names]
    made = create_network(1.0, 4, 1, None, encoders, None)
    assert {adapter.name[:8] for adapter in made.created} == {"lora_te1", "lora_te2"}
    made = create_network(1.0, 4, 1, None, encoders, None, train_t5xxl="True")
    assert {adapter.name[:8] for adapter in made.created} == {"lora_te1", "lora_te2", "lora_te3"}


def test_files_for_other_models_are_refused() -> None:
    _, model = network()
    flux = {"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": torch.zeros(4, 8)}
    assert weights_for(flux, [None] * 3, model) == {}
    with pytest.raises(DataError, match="FLUX"):
        create_network_from_weights(1.0, None, None, [None] * 3, model, weights_sd=flux)
