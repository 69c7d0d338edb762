"""LoRAs for FLUX.1 in both layouts: the reference's numbers, and that nothing gets lost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from library.log import DataError
from networks import flux_layouts
from networks.flux_layouts import Factors

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "flux_lora_conversion.json").read_text("utf-8"))
QKV = ("attn.to_q", "attn.to_k", "attn.to_v")


def tensors(named: dict[str, object]) -> dict[str, Tensor]:
    return {name: torch.tensor(value) for name, value in named.items()}


@pytest.mark.parametrize("case", GOLDEN["scale_split"], ids=lambda case: f"{case['alpha']}/{case['rank']}")
def test_scales_are_split_as_by_the_reference(case: dict[str, float]) -> None:
    rank = int(case["rank"])
    made = flux_layouts.fold(Factors(torch.ones(rank, 2), torch.ones(3, rank), case["alpha"]))
    assert float(made.down[0, 0]) == case["lora_A_factor"]
    assert float(made.up[0, 0]) == case["lora_B_factor"]


def theirs(named: dict[str, object], block: int = 0) -> dict[str, Tensor]:
    """The golden's short names -> those of files."""
    paths = dict(zip("qkv", QKV, strict=True))
    found = tensors(named)
    return {
        f"transformer.transformer_blocks.{block}.{paths[name.split('.')[1]]}.{name.split('.', 2)[2]}": tensor
        for name, tensor in found.items()
    }


def ours(named: dict[str, object]) -> dict[str, Tensor]:
    start = "lora_unet_double_blocks_0_img_attn_qkv."
    return {start + name.removeprefix("y."): tensor for name, tensor in tensors(named).items()}


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


def test_separate_layers_are_fused_as_by_the_reference() -> None:
    case = GOLDEN["fused_from_separate"]
    made = flux_layouts.from_diffusers(theirs(case["input"]))
    same(made.tensors, ours(case["output"]))
    assert not made.unknown
    same(flux_layouts.to_diffusers(made.tensors).tensors, theirs(case["back"]))


def test_a_dense_layer_is_separated_as_by_the_reference() -> None:
    case = GOLDEN["separate_from_dense"]
    made = flux_layouts.to_diffusers(ours(case["input"])).tensors
    same(made, theirs(case["output"]))
    back = flux_layouts.from_diffusers(made).tensors
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    assert back[f"{name}.lora_down.weight"].shape == (2, 3), "parts with one down matrix keep their rank"
    assert torch.equal(delta(back, name), delta(ours(case["input"]), name))


def delta(found: dict[str, Tensor], name: str) -> Tensor:
    down, up = found[f"{name}.lora_down.weight"].float(), found[f"{name}.lora_up.weight"].float()
    alpha = found.get(f"{name}.alpha", torch.tensor(float(len(down))))
    return float(alpha) / len(down) * up @ down


MODULES = {
    "lora_unet_double_blocks_18_img_mod_lin": (6, 1),
    "lora_unet_double_blocks_18_txt_attn_qkv": (3, 1),
    "lora_unet_double_blocks_0_txt_mlp_2": (1, 4),
    "lora_unet_single_blocks_37_linear1": (7, 1),
    "lora_unet_single_blocks_37_linear2": (1, 5),
    "lora_unet_single_blocks_3_modulation_lin": (3, 1),
    "lora_unet_time_in_in_layer": (1, 2),
    "lora_unet_final_layer_linear": (1, 1),
    "lora_unet_final_layer_adaLN_modulation_1": (2, 1),
    "lora_te1_text_model_encoder_layers_11_self_attn_out_proj": (1, 1),
    "lora_te1_text_model_encoder_layers_0_mlp_fc1": (4, 1),
    "lora_te3_encoder_block_23_layer_0_SelfAttention_o": (1, 1),
    "lora_te3_encoder_block_1_layer_1_DenseReluDense_wi_1": (2, 1),
}
"""Modules with the sizes of their outputs and inputs, in parts of a width."""


def lora(rank: int = 4, alpha: float = 1.0, width: int = 8, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(rank)
    made: dict[str, Tensor] = {}
    for name, (out, inputs) in MODULES.items():
        made[f"{name}.lora_down.weight"] = torch.randn(rank, inputs * width, generator=generator).to(dtype)
        made[f"{name}.lora_up.weight"] = torch.randn(out * width, rank, generator=generator).to(dtype)
        made[f"{name}.alpha"] = torch.tensor(alpha)
    return made


@pytest.mark.parametrize("alpha", [1.0, 4.0, 8.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_there_and_back_changes_nothing(alpha: float, dtype: torch.dtype) -> None:
    source = lora(alpha=alpha, dtype=dtype)
    there = flux_layouts.to_diffusers(source)
    assert there.modules == len(MODULES)
    assert not there.unknown
    assert all(name.startswith(("transformer.", "text_encoder.", "text_encoder_2.")) for name in there.tensors)
    back = flux_layouts.from_diffusers(there.tensors)
    assert not back.unknown
    assert {name.partition(".")[0] for name in back.tensors} == MODULES.keys()
    for name in MODULES:
        assert torch.equal(delta(back.tensors, name), delta(source, name)), name
    same(flux_layouts.to_diffusers(back.tensors).tensors, there.tensors)


def test_the_names_are_those_of_diffusers() -> None:
    """The table of names against the map of checkpoints."""
    mapped = json.loads((Path(__file__).parents[1] / "golden" / "flux_diffusers_map.json").read_text("utf-8"))["map"]
    for theirs_, (index, ours_) in mapped.items():
        if ours_.endswith(".weight") and ".norm." not in theirs_ and "norm_" not in theirs_.split(".")[-2]:
            table = flux_layouts._table(["blocks.37."])
            assert table[ours_.removesuffix(".weight")][index] == theirs_.removesuffix(".weight")


def test_parts_may_be_missing_or_of_several_ranks() -> None:
    block = "transformer.single_transformer_blocks.0"
    q, mlp = torch.randn(2, 8), torch.randn(3, 8)
    q_up, mlp_up = torch.randn(8, 2), torch.randn(24, 3)
    made = flux_layouts.from_diffusers(
        {
            f"{block}.attn.to_q.lora_A.weight": q,
            f"{block}.attn.to_q.lora_B.weight": q_up,
            f"{block}.attn.to_q.alpha": torch.tensor(1.0),
            f"{block}.proj_mlp.lora_A.weight": mlp,
            f"{block}.proj_mlp.lora_B.weight": mlp_up,
        }
    )
    found = delta(made.tensors, "lora_unet_single_blocks_0_linear1")
    wanted = torch.cat([0.5 * q_up @ q, torch.zeros(16, 8), mlp_up @ mlp])
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(
    "name",
    [
        "transformer.transformer_blocks.0.attn.to_out.0.lora_{}.weight",
        "base_model.model.transformer.transformer_blocks.0.attn.to_out.0.lora_{}.default.weight",
        "diffusion_model.double_blocks.0.img_attn.proj.lora_{}.weight",
        "transformer_blocks.0.attn.to_out.0.lora_{}.weight",
    ],
)
def test_other_spellings_are_read(name: str) -> None:
    found = {name.format(matrix): torch.randn(2, 2) for matrix in "AB"}
    assert flux_layouts.is_diffusers(found)
    made = flux_layouts.from_diffusers(found)
    assert not made.unknown
    assert {key.partition(".")[0] for key in made.tensors} == {"lora_unet_double_blocks_0_img_attn_proj"}


def test_what_has_no_counterpart_is_named() -> None:
    more = {
        "transformer.pos_embed.lora_A.weight": torch.ones(1, 2),
        "transformer.pos_embed.lora_B.weight": torch.ones(2, 1),
    }
    made = flux_layouts.from_diffusers({**theirs(GOLDEN["fused_from_separate"]["input"]), **more, "odd": torch.ones(1)})
    assert sorted(made.unknown) == ["odd", *sorted(more)]
    there = flux_layouts.to_diffusers({**lora(), "lora_unet_down_blocks_0.alpha": torch.ones(1), "odd": torch.ones(1)})
    assert sorted(there.unknown) == ["lora_unet_down_blocks_0.alpha", "odd"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora_down.weight": None}, "isn't a plain LoRA"),
        ({"dora_scale": torch.ones(8)}, "isn't a plain LoRA"),
        ({"lora_up.weight": torch.ones(8, 3)}, "don't make a LoRA"),
        ({"lora_up.weight": torch.full((24, 4), float("nan"))}, "NaN"),
        ({"lora_up.weight": torch.ones(25, 4)}, "don't make 3 layers"),
    ],
)
def test_what_cannot_be_converted_is_refused(change: dict[str, Tensor | None], message: str) -> None:
    name = "lora_unet_double_blocks_18_txt_attn_qkv"
    found = {key: value for key, value in lora().items() if key.startswith(name)}
    for key, value in change.items():
        if value is None:
            del found[f"{name}.{key}"]
        else:
            found[f"{name}.{key}"] = value
    with pytest.raises(DataError, match=message):
        flux_layouts.to_diffusers(found)


def test_a_missing_matrix_is_named() -> None:
    found = theirs(GOLDEN["fused_from_separate"]["input"])
    found.pop("transformer.transformer_blocks.0.attn.to_k.lora_B.weight")
    with pytest.raises(DataError, match=r"to_k has only one"):
        flux_layouts.from_diffusers(found)


def test_every_module_of_the_full_size_has_a_counterpart() -> None:
    keys = json.loads((Path(__file__).parents[1] / "golden" / "flux_lora_keys.json").read_text("utf-8"))
    names = {key.partition(".")[0] for part in keys.values() if isinstance(part, dict) for key in part if "." in key}
    names = {name for name in names if name.startswith("lora_")}
    assert len(names) >= 304 + 72 + 168
    source: dict[str, Tensor] = {}
    for name in sorted(names):
        out = 14 if name.endswith("linear1") else 6
        source[f"{name}.lora_down.weight"] = torch.randn(1, 2)
        source[f"{name}.lora_up.weight"] = torch.randn(out, 1)
    there = flux_layouts.to_diffusers(source)
    assert not there.unknown
    assert there.modules == len(names)
    back = flux_layouts.from_diffusers(there.tensors)
    assert not back.unknown
    assert {key.partition(".")[0] for key in back.tensors} == names
