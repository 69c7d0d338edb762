"""The algebra of adapters: sums, factors and changes against plain products of matrices, and against golden files."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from library.log import DataError, UserError
from networks import kinds, oft, splitting
from networks.algebra import (
    AdapterFile,
    BlockRatios,
    LowRank,
    RankChoice,
    added,
    change,
    clamped,
    concatenated,
    nearest,
    nearest_to,
    same_family,
    shuffled,
    svd,
    svd_of_product,
)
from networks.blocks import LISTS, POSITIONS, position
from networks.factored import Dropouts, weight_shape
from networks.reading import Rank
from networks.targets import Target

GOLDEN = Path(__file__).parent.parent / "golden"
MODULES = {
    "linear": lambda: nn.Linear(10, 14),
    "conv 1x1": lambda: nn.Conv2d(6, 9, 1),
    "conv 3x3": lambda: nn.Conv2d(4, 7, 3),
    "fused qkv": lambda: nn.Linear(8, 24),
}
each_module = pytest.mark.parametrize("name", MODULES)


def shape_of(name: str) -> tuple[int, ...]:
    return weight_shape(MODULES[name]())


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def lora(shape: tuple[int, ...], rank: int = 3, alpha: float = 1.5, seed: int = 0) -> LowRank:
    down = random(rank, math.prod(shape[1:]), seed=seed)
    return LowRank.of_matrices(down, random(shape[0], rank, seed=seed + 100), shape, alpha)


def filled(adapter: nn.Module, seed: int = 5) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)


# extract and merge


@each_module
def test_what_is_extracted_at_full_rank_merges_to_the_tuned_weight(name: str) -> None:
    shape = shape_of(name)
    base, tuned = random(*shape), random(*shape, seed=1)
    low_rank, error = nearest_to(tuned - base, min(shape[0], math.prod(shape[1:])))
    delta = change(low_rank.file_tensors(), weight=base)
    assert error < 1e-6
    assert torch.allclose(base + delta, tuned, atol=1e-5)
    assert low_rank.alpha == low_rank.rank


@each_module
def test_the_error_of_an_extract_is_what_is_left_out(name: str) -> None:
    shape = shape_of(name)
    delta = random(*shape)
    values = torch.linalg.svdvals(delta.flatten(1))
    low_rank, error = nearest_to(delta, 2)
    true = float((delta - low_rank.delta()).norm() / delta.norm())
    assert error == pytest.approx(true, abs=1e-5)
    assert error == pytest.approx(float(values[2:].norm() / values.norm()), abs=1e-5)


# sums


@each_module
def test_a_concatenation_is_the_exact_sum_of_the_changes(name: str) -> None:
    shape = shape_of(name)
    modules = [lora(shape, rank, alpha, seed) for seed, (rank, alpha) in enumerate([(3, 1.0), (2, 8.0), (5, 0.25)])]
    ratios = [0.7, -0.4, 1.0]
    total = concatenated(modules, ratios)
    wanted = sum(ratio * module.delta() for ratio, module in zip(ratios, modules, strict=True))
    assert total.rank == total.alpha == 10
    assert torch.allclose(total.delta(), wanted, atol=1e-5)
    mixed = shuffled(total, torch.Generator().manual_seed(3))
    assert torch.allclose(mixed.delta(), wanted, atol=1e-5)
    assert not torch.equal(mixed.down, total.down)


@each_module
def test_an_svd_merge_leaves_out_exactly_the_smaller_singular_values(name: str) -> None:
    shape = shape_of(name)
    modules, ratios = [lora(shape, seed=seed) for seed in range(3)], [1.0, -0.5, 0.25]
    exact = sum(ratio * module.delta() for ratio, module in zip(ratios, modules, strict=True)).flatten(1)
    values = torch.linalg.svdvals(exact)
    merged, error = nearest(modules, ratios, 4)
    left_out = (merged.delta().flatten(1) - exact).norm()
    assert float(left_out) == pytest.approx(float(values[4:].norm()), abs=1e-4)
    assert error == pytest.approx(float(values[4:].norm() / values.norm()), abs=1e-5)


def test_a_nearest_lora_has_the_asked_rank_even_where_the_sum_has_less() -> None:
    small = lora((10, 8), rank=1)
    merged, error = nearest([small], [1.0], 4)
    assert merged.rank == merged.alpha == 4
    assert error < 1e-6
    assert torch.allclose(merged.delta(), small.delta(), atol=1e-5)
    assert nearest([small], [1.0], 99)[0].rank == 8


def golden_module(values: dict[str, object], name: str) -> LowRank:
    tensors = {key.split(".", 1)[1]: torch.tensor(value) for key, value in values.items() if key.startswith(name)}
    return LowRank.of(tensors)


@pytest.mark.parametrize("ratios", ["1.0/1.0", "0.5/0.5", "0.7/-0.3"])
def test_sums_are_those_of_the_golden_file(ratios: str) -> None:
    golden = json.loads((GOLDEN / "lora_ops.json").read_text(encoding="utf-8"))
    modules = [golden_module(golden["inputs"][name], "lora_unet_a") for name in ("A", "B")]
    for module, name in zip(modules, "AB", strict=True):
        assert torch.allclose(module.delta(), torch.tensor(golden["inputs"][f"{name}_effective"]), atol=1e-6)
    numbers = [float(ratio) for ratio in ratios.split("/")]
    expected = golden[f"merge,ratios={ratios}"]
    before = added(modules, numbers, as_before=True)
    theirs = golden_module(expected, "lora_unet_a")
    assert torch.allclose(before.down, theirs.down, atol=1e-5)
    assert torch.allclose(before.up, theirs.up, atol=1e-5)
    assert before.alpha == theirs.alpha
    assert torch.allclose(before.delta(), torch.tensor(expected["effective"]), atol=1e-5)
    exact = torch.tensor(golden[f"merge,ratios={ratios},concat"]["exact_sum"])
    assert torch.allclose(concatenated(modules, numbers).delta(), exact, atol=1e-5)
    assert torch.allclose(nearest(modules, numbers, 4)[0].delta(), exact, atol=1e-5)


def test_alone_a_file_counts_with_its_ratio() -> None:
    module = lora((6, 5))
    assert torch.allclose(added([module], [0.3]).delta(), 0.3 * module.delta(), atol=1e-6)
    assert torch.allclose(added([module], [-0.3]).delta(), -0.3 * module.delta(), atol=1e-6)


def test_matrices_of_different_ranks_or_weights_are_not_added() -> None:
    with pytest.raises(DataError, match="ranks 3, 2"):
        added([lora((6, 5)), lora((6, 5), rank=2)], [1, 1])
    with pytest.raises(DataError, match="different weights"):
        concatenated([lora((6, 5)), lora((6, 4))], [1, 1])


def test_the_golden_kernel_of_a_convolution() -> None:
    golden = json.loads((GOLDEN / "lora_ops.json").read_text(encoding="utf-8"))["conv3x3 delta (scale 1)"]
    down, up, delta = (torch.tensor(golden[name]) for name in ("down", "up", "delta"))
    assert torch.allclose(LowRank(down, up, float(len(down))).delta(), delta, atol=1e-6)


# changes of every kind


KINDS = [("lora", {}), ("dora", {}), ("loha", {}), ("lokr", {"factor": "2"}), ("oft", {})]


@pytest.mark.parametrize("kind", [name for name, _ in KINDS])
@each_module
def test_a_change_is_that_of_the_adapter(kind: str, name: str) -> None:
    from networks.arguments import Arguments

    module = MODULES[name]()
    parts = (8, 8, 8) if name == "fused qkv" else ()
    target = Target("lora_unet_x", "x", module, parts)
    found = kinds.OFT if kind == "oft" else kinds.KINDS[kind]
    blocks = 1 if name in ("conv 3x3", "conv 1x1") else 2
    size = Rank(blocks, 0.05) if kind == "oft" else Rank(2, 1.0)
    settings = found.settings(Arguments(dict(KINDS)[kind]))
    adapter = found.create(target, "", size, 1.0, Dropouts(), settings)
    filled(adapter)
    tensors = {key: tensor.detach() for key, tensor in adapter.file_tensors().items()}
    delta = change(tensors, weight=module.weight.detach(), parts=parts)
    assert delta.shape == module.weight.shape
    assert torch.allclose(delta, adapter.delta(), atol=1e-6)
    assert float(delta.norm()) > 1e-3


def test_the_parts_of_a_split_layer_are_an_ordinary_lora() -> None:
    target = Target("lora_unet_x", "x", nn.Linear(8, 24), (8, 8, 8))
    adapter = splitting.SplitAdapter(target, "", size=Rank(2, 1.0))
    filled(adapter)
    assert torch.allclose(change(adapter.file_tensors()), adapter.delta(), atol=1e-6)


def test_whole_layers_rotated_as_in_files_for_sd() -> None:
    module = nn.Linear(8, 12)
    adapter = oft.WHOLE_OFT.create(Target("oft_unet_x", "x", module), "", Rank(3, 0.1), 1.0, Dropouts(), None)
    filled(adapter)
    file = AdapterFile({f"oft_unet_x.{key}": tensor for key, tensor in adapter.file_tensors().items()}, "a")
    assert file.kind("lora_unet_x") == "oft"
    assert torch.allclose(change(file["lora_unet_x"], weight=module.weight), adapter.delta(), atol=1e-6)


def test_a_change_that_needs_the_weight_says_so() -> None:
    tensors = {**lora((6, 5)).file_tensors(), "dora_scale": torch.ones(6, 1)}
    with pytest.raises(DataError, match="together with the model's weight"):
        change(tensors, name="lora_unet_x")


def test_strange_tensors_are_refused() -> None:
    with pytest.raises(DataError, match="unknown kind: diff"):
        change({"diff": torch.ones(2, 2)}, name="lora_unet_x")
    with pytest.raises(DataError, match="don't go together"):
        change({"lora_down.weight": torch.ones(3, 4), "lora_up.weight": torch.ones(5, 2)}, name="lora_unet_x")
    with pytest.raises(DataError, match="the weight"):
        change(lora((6, 5)).file_tensors(), weight=torch.ones(6, 4))


# singular values


def decaying(rows: int, columns: int, falls: float, seed: int = 0) -> Tensor:
    """A matrix whose singular values are powers of the rank."""
    count = min(rows, columns)
    left, right = (torch.linalg.qr(random(size, count, seed=seed + size))[0] for size in (rows, columns))
    return (left * torch.arange(1, count + 1) ** -falls) @ right.T


@pytest.mark.parametrize("falls", [0.2, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("shape", [(300, 200), (180, 420)])
def test_the_randomised_method_comes_as_near_as_it_says(falls: float, shape: tuple[int, int]) -> None:
    matrix = decaying(*shape, falls)
    for rank in (4, 20):
        fast, exact = svd(matrix, rank), svd(matrix, rank, exact=True)
        down, up = fast.factors(rank)
        true = float((matrix - up @ down).norm() / matrix.norm())
        least = exact.error(rank)
        assert fast.error(rank) == pytest.approx(true, rel=1e-3, abs=1e-4)
        assert least - 1e-5 <= true <= least * (1 + 2e-4) + 1e-5
        assert torch.allclose(fast.values[:rank], exact.values[:rank], rtol=5e-3)


def test_it_is_the_same_each_time() -> None:
    matrix = random(200, 150)
    assert torch.equal(svd(matrix, 5).right, svd(matrix, 5).right)


def test_matrices_of_low_rank_and_zero_are_no_trouble() -> None:
    low = random(200, 3) @ random(3, 150, seed=1)
    found = svd(low, 5)
    down, up = found.factors(5)
    assert torch.allclose(up @ down, low, atol=1e-3)
    assert found.error(5) < 1e-3
    zero = svd(torch.zeros(200, 150), 5)
    assert zero.norm == zero.error(5) == 0
    with pytest.raises(DataError, match="aren't finite"):
        svd(torch.full((3, 3), torch.nan))


def test_the_product_of_small_matrices_needs_no_large_one() -> None:
    up, down = random(90, 6), random(6, 70, seed=1)
    found, wanted = svd_of_product(up, down), torch.linalg.svdvals(up @ down)
    assert torch.allclose(found.values, wanted[:6], rtol=1e-5)
    low_down, low_up = found.factors(6)
    assert torch.allclose(low_up @ low_down, up @ down, atol=1e-4)
    assert len(svd_of_product(random(4, 6), random(6, 70)).values) == 4


def golden_ranks() -> list[dict[str, object]]:
    return json.loads((GOLDEN / "resize_rank.json").read_text(encoding="utf-8"))["cases"]  # type: ignore[no-any-return]


def test_ranks_are_those_of_the_golden_file() -> None:
    values = json.loads((GOLDEN / "resize_rank.json").read_text(encoding="utf-8"))["singular_values"]
    for case in golden_ranks():
        choice = RankChoice(case["cap"], case["method"], case["param"] or 0.0)  # type: ignore[arg-type]
        assert choice.rank(torch.tensor(values[case["S"]])) == case["rank"], case


def test_clamping_cuts_both_signs_alike() -> None:
    down, up = random(4, 50), random(60, 4, seed=1)
    cut_down, cut_up = clamped(down, up, 0.9)
    most = torch.quantile(torch.cat([down.flatten(), up.flatten()]).abs(), 0.9)
    assert torch.allclose(cut_down, down.clamp(-most, most))
    assert torch.allclose(cut_up.abs().max(), most)
    assert clamped(down, up, 1.0)[0] is down


# ratios by block


def names_of(model: str) -> dict[str, list[int]]:
    golden = json.loads((GOLDEN / f"{model}_lora_keys.json").read_text(encoding="utf-8"))
    return {**golden["default"], **golden["extra_keys_with_conv_dim"]}


@pytest.mark.parametrize("model", ["sd15", "sdxl"])
@pytest.mark.parametrize("length", LISTS)
def test_a_list_hits_exactly_its_blocks(model: str, length: int) -> None:
    modules = {key.partition(".")[0] for key in names_of(model)}
    for index, listed in enumerate(LISTS[length]):
        ratios = BlockRatios.of([float(other == index) + 2 for other in range(length)])
        hit = {POSITIONS[position(name) or 0] for name in modules if ratios.ratio(name) == 3}
        assert hit <= {listed}
        missed = [name for name in modules if ratios.ratio(name) == 1]
        assert all(POSITIONS[position(name) or 0] not in LISTS[length] for name in missed)


def test_positions_are_those_of_the_first_checkpoints() -> None:
    pairs = {
        "lora_te_text_model_encoder_layers_0_mlp_fc1": "BASE",
        "lora_unet_down_blocks_0_attentions_0_proj_in": "IN01",
        "lora_unet_down_blocks_0_downsamplers_0_conv": "IN03",
        "lora_unet_down_blocks_3_resnets_1_conv1": "IN11",
        "lora_unet_mid_block_attentions_0_proj_in": "MID",
        "lora_unet_up_blocks_1_attentions_2_proj_in": "OUT05",
        "lora_unet_up_blocks_1_upsamplers_0_conv": "OUT05",
        "lora_unet_input_blocks_8_1_proj_in": "IN08",
        "lora_unet_middle_block_2_in_layers_2": "MID",
        "lora_unet_output_blocks_0_0_in_layers_2": "OUT00",
        "oft_unet_output_blocks_5_1_proj_in": "OUT05",
    }
    assert {name: POSITIONS[position(name) or 0] for name in pairs} == pairs
    assert position("lora_unet_conv_in") is None


def test_lists_that_cannot_be_are_refused() -> None:
    for text, said in [("[1,2]", "2 numbers"), ("a,b", "no list"), ("[NaN]", "no list"), ("[[1]]", "no list")]:
        with pytest.raises(UserError, match=said):
            BlockRatios.parse(text)
    assert BlockRatios.parse("1," * 11 + "0.5").length == 12
    with pytest.raises(UserError, match="12 numbers, for a LoRA for SD 1"):
        BlockRatios.of([1] * 12).check_family("SD 1.x or 2.x")
    with pytest.raises(UserError, match="FLUX has no such blocks"):
        BlockRatios.of([1] * 12).check_family("FLUX")
    BlockRatios.of([1] * 17).check_family("SD 1.x or 2.x")
    with pytest.raises(DataError, match="no such blocks"):
        BlockRatios.of([1] * 12).ratio("lora_unet_double_blocks_0_img_mlp_0")


# files


def adapter(names: dict[str, tuple[int, ...]], path: str = "a.safetensors") -> AdapterFile:
    tensors = {
        f"{name}.{key}": tensor
        for seed, (name, shape) in enumerate(names.items())
        for key, tensor in lora(shape, seed=seed).file_tensors().items()
    }
    return AdapterFile(tensors, path)


def test_files_for_different_models_do_not_go_together() -> None:
    flux = adapter({"lora_unet_double_blocks_0_img_mlp_0": (6, 5)})
    sd = adapter({"lora_unet_down_blocks_0_attentions_0_proj_in": (6, 5)}, "b.safetensors")
    other = adapter({"lora_unet_double_blocks_0_img_mlp_0": (6, 4)}, "c.safetensors")
    assert same_family([flux, flux]) == "FLUX"
    with pytest.raises(DataError, match=r"a\.safetensors is for FLUX and b\.safetensors is for SD"):
        same_family([flux, sd])
    with pytest.raises(DataError, match=r"lora_unet_double_blocks_0_img_mlp_0\.lora_down"):
        same_family([flux, other])


def test_a_file_that_is_no_adapter_is_named() -> None:
    with pytest.raises(DataError, match="Diffusers or PEFT"):
        AdapterFile({"transformer.x.lora_A.weight": torch.ones(2, 2)}, "a")
    with pytest.raises(DataError, match="unknown kind: nonsense"):
        AdapterFile({"nonsense": torch.ones(2, 2)}, "a")
    with pytest.raises(DataError, match="empty"):
        AdapterFile({}, "a")


def test_values_that_are_not_finite_are_refused() -> None:
    tensors = lora((6, 5)).file_tensors()
    tensors["lora_up.weight"][0, 0] = torch.inf
    file = AdapterFile({f"lora_unet_x.{key}": tensor for key, tensor in tensors.items()}, "a")
    with pytest.raises(DataError, match=r"lora_unet_x\.lora_up\.weight has values"):
        file["lora_unet_x"]


def test_what_a_tool_is_not_for_is_named() -> None:
    file = adapter({"lora_unet_down_blocks_0_attentions_0_proj_in": (6, 5)})
    file.require(["lora"], "this")
    with pytest.raises(DataError, match="1 of 1 modules are no loha"):
        file.require(["loha"], "this")
    assert file.sizes() == {"lora_unet_down_blocks_0_attentions_0_proj_in": Rank(3, 1.5)}
    assert file.dtype() == torch.float32
