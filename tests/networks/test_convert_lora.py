"""`networks/convert_lora.py`: every pair of layouts, back and forth, and what other programs make of the files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from library.log import DataError
from networks.converting import converted
from networks.layout_files import Adapter, read, recognised, written
from networks.layouts import FAMILIES, KINDS, LAYOUTS, ROWS, Row
from networks.proving import largest_error
from networks.scaling import all_same, shares
from tests.networks import layout_samples

FACTS = {"ss_base_model_version": "x", "sshs_model_hash": "0", "sshs_legacy_hash": "1"}
REFUSED = {("kohya", "comfyui"), ("lycoris", "comfyui")}
"""OFT of fused layers whose blocks differ in size can't be said in names of the authors."""


def opened(tensors: Mapping[str, Tensor], row: Row | None = None, peft: str | None = None) -> Adapter:
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    layout, family = (row.layout, row.family) if row else (None, None)
    return read(tensors, recognised(shapes, "a file", layout=layout, family=family), "a file", peft)


def there_and_back(tensors: dict[str, Tensor], source: Row, target: Row) -> dict[str, Tensor]:
    """The tensors in the other layout, after all that must hold was compared."""
    first = opened(tensors, source)
    result = converted(first, target, FACTS, "a file")
    made = written(result.adapter)
    second = opened(made, target)
    assert not result.rounded
    error, size = largest_error(first, second)
    assert size > 0
    assert error <= 1e-6 * size
    again = converted(second, source, result.metadata, "a file")
    assert all_same(written(again.adapter), tensors)
    assert again.metadata == FACTS
    return made


def test_lists_are_complete() -> None:
    assert {row.layout for row in ROWS.values()} == set(LAYOUTS)
    assert len(ROWS) == len(LAYOUTS) * len(FAMILIES)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_pair_there_and_back(family: str, kind: str) -> None:
    for source, target in layout_samples.pairs(family):
        if kind not in source.kinds:
            continue
        for dtype, alpha in ((torch.float32, 2.0), (torch.bfloat16, 2.0 if kind == "oft" else None)):
            tensors = layout_samples.sample(source, kind, dtype=dtype, alpha=alpha)
            if kind not in target.kinds:
                with pytest.raises(DataError, match=f"knows no {KINDS[kind]}"):
                    converted(opened(tensors, source), target, FACTS, "a file")
            elif kind == "oft" and family == "flux" and (source.layout, target.layout) in REFUSED:
                with pytest.raises(DataError, match="aren't one of the whole"):
                    converted(opened(tensors, source), target, FACTS, "a file")
            else:
                there_and_back(tensors, source, target)


@pytest.mark.parametrize("alpha", [1.0, 3.0, 8.0, 5 / 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_layers_that_learned_apart(dtype: torch.dtype, alpha: float) -> None:
    """Block-diagonal matrices come apart, whatever alpha: each part has the rank that it was trained with."""
    for target in ("diffusers", "ai-toolkit", "lycoris"):
        tensors = layout_samples.sample(ROWS["kohya", "flux"], "lora", dtype=dtype, alpha=alpha, diagonal=True)
        made = there_and_back(tensors, ROWS["kohya", "flux"], ROWS[target, "flux"])
        found = [tensor for key, tensor in made.items() if "single_transformer_blocks" in key and "to_q" in key]
        assert any(tensor.shape[0] == layout_samples.RANK for tensor in found)


def partly(skip: str, **changes: Tensor) -> dict[str, Tensor]:
    tensors = layout_samples.sample(ROWS["diffusers", "flux"], "lora", alpha=None)
    return {key: tensor for key, tensor in tensors.items() if skip not in key} | changes


def test_layers_that_are_missing_or_differ() -> None:
    """Parts without an adapter, of other ranks, types and scales."""
    path = "transformer.transformer_blocks.1.attn.to_q"
    longer = {f"{path}.lora_A.weight": torch.randn(5, 12), f"{path}.lora_B.weight": torch.randn(12, 5)}
    half = {f"{path}.lora_A.weight": torch.randn(3, 12).half(), f"{path}.lora_B.weight": torch.randn(12, 3).half()}
    scaled = {f"{path}.alpha": torch.tensor(2.0)}
    source = ROWS["diffusers", "flux"]
    for tensors in (partly("to_k"), partly("proj_mlp"), partly("-", **longer), partly("-", **half)):
        for target in ("kohya", "comfyui"):
            there_and_back(tensors, source, ROWS[target, "flux"])
    there_and_back(partly("-", **scaled), source, ROWS["kohya", "flux"])
    shared = layout_samples.sample(source, "lora", alpha=None)
    for name in ("to_k", "to_v"):
        key = "transformer.transformer_blocks.1.attn.{}.lora_A.weight"
        shared[key.format(name)] = shared[key.format("to_q")]
    made = there_and_back(shared, source, ROWS["kohya", "flux"])
    assert made["lora_unet_double_blocks_1_img_attn_qkv.lora_down.weight"].shape[0] == layout_samples.RANK


def test_lengths_of_columns_and_other_limits_are_refused() -> None:
    row = ROWS["kohya", "flux"]
    tensors = layout_samples.sample(row, "dora")
    key = "lora_unet_double_blocks_1_img_attn_qkv.dora_scale"
    tensors[key] = torch.ones(1, 12)
    with pytest.raises(DataError, match=r"img_attn_qkv: the lengths of DoRA are those of columns"):
        converted(opened(tensors), ROWS["lycoris", "flux"], {}, "a file")
    there_and_back(tensors, row, ROWS["comfyui", "flux"])
    lokr = layout_samples.sample(row, "lokr")
    lokr["lora_unet_double_blocks_1_img_attn_qkv.lokr_w1"] = torch.randn(4, 2)
    lokr["lora_unet_double_blocks_1_img_attn_qkv.lokr_w2_a"] = torch.randn(9, 3)
    with pytest.raises(DataError, match="blocks of 9 rows"):
        converted(opened(lokr), ROWS["lycoris", "flux"], {}, "a file")


def test_recognises_layouts_and_families() -> None:
    for row in ROWS.values():
        if row.layout == "ai-toolkit":
            continue  # the same names as another one
        parsed = opened(layout_samples.sample(row, "lora")).row
        assert parsed.layout == row.layout
        assert parsed.family.replace("sd2", "sd1") == row.family.replace("sd2", "sd1")
    wide = {f"lora_te_text_model_encoder_layers_0_mlp_fc1.{name}": torch.ones(1, 1) for name in ("alpha",)}
    wide["lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight"] = torch.ones(4, 1024)
    assert opened(wide).row.family == "sd2"


@pytest.mark.parametrize(
    ("start", "down", "up"),
    [
        ("base_model.model.", "lora_A.weight", "lora_B.weight"),
        ("base_model.model.", "lora_A.default.weight", "lora_B.default.weight"),
        ("", "lora.down.weight", "lora.up.weight"),
        ("unet.", "lora_linear_layer.down.weight", "lora_linear_layer.up.weight"),
    ],
)
def test_other_spellings_come_back(start: str, down: str, up: str) -> None:
    module = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    tensors = {f"{start}{module}.{down}": torch.randn(4, 8), f"{start}{module}.{up}": torch.randn(8, 4)}
    made = there_and_back(tensors, ROWS["diffusers", "sdxl"], ROWS["kohya", "sdxl"])
    assert set(made) == {
        f"lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.{name}"
        for name in ("lora_down.weight", "lora_up.weight", "alpha")
    }


def test_processors_of_early_diffusers_are_read() -> None:
    module = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora"
    tensors = {f"{module}.down.weight": torch.randn(4, 8), f"{module}.up.weight": torch.randn(8, 4)}
    made = written(converted(opened(tensors), ROWS["kohya", "sd1"], {}, "a file").adapter)
    assert "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0.lora_up.weight" in made


def test_alpha_in_metadata_of_peft_counts() -> None:
    tensors = layout_samples.sample(ROWS["diffusers", "flux"], "lora", alpha=None)
    peft = json.dumps({"transformer.r": 3, "transformer.lora_alpha": 6, "transformer.alpha_pattern": {"attn.to_q": 1}})
    source = opened(tensors, peft=peft)
    facts = {**FACTS, "lora_adapter_metadata": peft}
    result = converted(source, ROWS["kohya", "flux"], facts, "a file")
    assert float(written(result.adapter)["lora_unet_double_blocks_1_img_attn_proj.alpha"]) == 6
    assert "lora_adapter_metadata" not in result.metadata
    again = converted(opened(written(result.adapter)), ROWS["diffusers", "flux"], result.metadata, "a file")
    assert again.metadata == facts
    assert all_same(written(again.adapter), tensors)


def test_a_changed_file_is_converted_by_rules() -> None:
    """A note is believed only as long as it is of this file."""
    tensors = layout_samples.sample(ROWS["kohya", "flux"], "lora", alpha=2.0)
    result = converted(opened(tensors), ROWS["diffusers", "flux"], FACTS, "a file")
    changed = {key: tensor * 1.7 for key, tensor in written(result.adapter).items()}
    back = converted(opened(changed), ROWS["kohya", "flux"], result.metadata, "a file")
    error, size = largest_error(opened(changed), back.adapter)
    assert error <= 1e-6 * size
    nonsense = {**FACTS, "convert_lora": '{"layout": "kohya", "family": "flux", "facts": {"*": {"units": 3}}}'}
    again = converted(opened(changed), ROWS["kohya", "flux"], nonsense, "a file")
    assert all_same(written(again.adapter), written(back.adapter)) or largest_error(again.adapter, back.adapter)[0] < 1


def test_golden_numbers() -> None:
    """Files that the reference converted."""
    golden = json.loads((Path(__file__).parents[1] / "golden" / "flux_lora_conversion.json").read_text())
    for case in golden["scale_split"]:
        wanted = case["lora_A_factor"], case["lora_B_factor"]
        assert shares(case["alpha"] / case["rank"]) == pytest.approx(wanted, rel=1e-6)
    ours, theirs = "lora_unet_double_blocks_0_img_attn_qkv", "transformer.transformer_blocks.0.attn.to_"

    def renamed(values: Mapping[str, object]) -> dict[str, Tensor]:
        names = {key: key.replace("y.", f"{ours}.").replace("x.", theirs) for key in values}
        return {names[key]: torch.tensor(value) for key, value in values.items()}

    def convert(values: Mapping[str, object], layout: str) -> dict[str, Tensor]:
        return written(converted(opened(renamed(values)), ROWS[layout, "flux"], FACTS, "a file").adapter)

    for case, layout in ((golden["fused_from_separate"], "kohya"), (golden["separate_from_dense"], "diffusers")):
        made = convert(case["input"], layout)
        wanted_tensors = renamed(case["output"])
        assert made.keys() == wanted_tensors.keys()
        for key, tensor in wanted_tensors.items():
            assert torch.equal(made[key].double(), tensor.double()), key
    fused = golden["fused_from_separate"]
    assert all_same(convert(fused["output"], "diffusers"), renamed(fused["back"]))
