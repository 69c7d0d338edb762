"""Ranks and learning rates by block: numbers of blocks, presets, lists, groups, files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from library.log import UserError
from networks import lora
from networks.arguments import Arguments
from networks.base import Network
from networks.block_weights import BlockArguments
from networks.creating import Parts
from networks.reading import Rank
from networks.unet import UnetLayout, family, parts_of
from tests.networks import tiny_unets

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "lora_block_lr.json").read_text("utf-8"))
RIGHT = {"1": [1.0], "0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5": [0.5]}
"""Values of `down_lr_weight` at which the reference stops, and the weights of its blocks."""


@pytest.fixture(scope="module", params=["1", "xl"], ids=["sd", "sdxl"])
def large(request: pytest.FixtureRequest) -> tuple[bool, nn.Module]:
    return request.param == "xl", tiny_unets.large(request.param)[0]


def weights(layout: UnetLayout, given: dict[str, str]) -> list[float] | None:
    arguments = Arguments(given)
    blocks = BlockArguments(arguments, Rank(4, 1.0), None, 1.0)
    arguments.finish()
    return blocks.weights(layout)


def test_weights_are_those_of_the_reference(large: tuple[bool, nn.Module]) -> None:
    sdxl, unet = large
    layout = UnetLayout.of(unet)
    cases = [case for case in GOLDEN["cases"] if case["sdxl"] == sdxl]
    assert len(cases) >= 16
    for case in cases:
        wanted = case["weights"]
        if isinstance(wanted, dict):  # where it stops with an error of Python's
            down = 9 if sdxl else 12
            wanted = [*[1.0] * sdxl, *RIGHT[case["args"]["down_lr_weight"]] * down]
            wanted += [1.0] * ((23 if sdxl else 25) - len(wanted))
        found = weights(layout, case["args"])
        assert found == (wanted if wanted is None else pytest.approx(wanted, abs=1e-8)), case["args"]


def test_blocks_are_those_of_the_reference(large: tuple[bool, nn.Module]) -> None:
    sdxl, unet = large
    layout = UnetLayout.of(unet)
    blocks = {
        target.name: layout.block(target.path) if component == "unet" else -1
        for target, component in parts_of(None, unet).targets()
    }
    wanted = GOLDEN["block_index"]["sdxl" if sdxl else "sd"]
    assert {name: blocks[name] for name, index in wanted.items() if index >= 0} == {
        name: index for name, index in wanted.items() if index >= 0
    }
    # the first convolution, and in SDXL the embeddings and the end
    assert set(range(23 if sdxl else 25)) - set(blocks.values()) == ({0, 1, 22} if sdxl else {0})


def test_the_other_layout_names_every_module_of_the_reference() -> None:
    unet, _ = tiny_unets.large("xl")
    made = Parts.of(family(unet), None, unet)
    assert len(made.family.aliases) == 722 + 66
    assert all(name.startswith(("lora_unet_down", "lora_unet_up", "lora_unet_mid")) for name in made.family.aliases)


def create(*, sdxl: bool = False, **arguments: str) -> Network:
    torch.manual_seed(0)
    return lora.create_network(1.0, 4, 2.0, None, None, tiny_unets.unet(sdxl=sdxl), **arguments)


COUNT = 6 + 1 + 6
"""Blocks of the small SD; it has attention in 1, 3, 6, 9 to 12."""


def sizes(network: Network) -> dict[str, tuple[int, float]]:
    return {
        adapter.name.removeprefix("lora_unet_"): (adapter.rank, float(adapter.alpha))  # type: ignore[misc, arg-type]
        for adapter in network.created
    }


def test_lists_of_ranks_and_alphas() -> None:
    dims = "1,2,3,4,5,6,7,8,9,10,0,12,13"
    alphas = ",".join(str(index / 2) for index in range(COUNT))
    found = sizes(create(block_dims=dims, block_alphas=alphas))
    assert found["down_blocks_0_attentions_0_proj_in"] == (2, 0.5)
    assert found["down_blocks_1_attentions_0_proj_in"] == (4, 1.5)
    assert found["mid_block_attentions_0_proj_in"] == (7, 3)
    assert found["up_blocks_2_attentions_1_proj_in"] == (13, 6)
    assert "up_blocks_1_attentions_1_proj_in" not in found
    assert not any("resnets" in name for name in found)
    convolutions = sizes(create(block_dims=dims, conv_block_dims="0,2,3,4,5,6,7,8,9,10,11,0,9", conv_alpha="3"))
    assert convolutions["down_blocks_0_resnets_0_conv1"] == (2, 3)
    assert convolutions["down_blocks_0_resnets_0_time_emb_proj"] == (2, 2)
    assert convolutions["down_blocks_0_downsamplers_0_conv"] == (3, 3)
    assert convolutions["up_blocks_1_resnets_1_conv1"] == (11, 3)
    assert "up_blocks_1_resnets_1_time_emb_proj" not in convolutions
    assert "up_blocks_2_resnets_0_conv1" not in convolutions
    assert convolutions["up_blocks_2_resnets_0_time_emb_proj"] == (12, 2)
    everywhere = sizes(create(block_dims=dims, conv_dim="5", conv_block_alphas=alphas))
    assert everywhere["down_blocks_0_resnets_0_conv1"] == (5, 0.5)


def test_a_weight_of_0_leaves_the_block_out_and_the_others_have_groups(caplog: pytest.LogCaptureFixture) -> None:
    network = create(
        down_lr_weight="0,0.5,1,0.1", mid_lr_weight="2", up_lr_weight="zeros+.25", block_lr_zero_threshold="0.1"
    )
    assert "down_lr_weight: 4 numbers for 6 blocks; the others get 1" in caplog.text
    names = sizes(network)
    assert "down_blocks_0_attentions_0_proj_in" in names
    assert "down_blocks_1_attentions_0_proj_in" not in names
    network.apply_to()
    groups, descriptions = network.prepare_optimizer_params(None, 1e-3)
    assert descriptions == [f"unet_block{index}" for index in (1, 6, 9, 10, 11, 12)]
    assert [group["lr"] for group in groups] == pytest.approx([5e-4, 2e-3, 2.5e-4, 2.5e-4, 2.5e-4, 2.5e-4])
    assert sum(len(group["params"]) for group in groups) == len(list(network.parameters()))


def test_lora_plus_and_rules_beside_blocks() -> None:
    network = create(
        sdxl=True,
        mid_lr_weight="0.5,0.5,0.5",
        loraplus_lr_ratio="2",
        rules=r"mid_block.*ff: lr=0.125; input_blocks.3.1_proj_in: dim=9",
    )
    network.apply_to()
    groups, names = network.prepare_optimizer_params(None, 1.0)
    rates = dict(zip(names, (group["lr"] for group in groups), strict=True))
    # one before the first, 6 on the way down, 3 in the middle with the attention in the second
    assert rates["unet_block8"] == 0.5
    assert rates["unet_block8 plus"] == 1.0
    assert rates["unet_block4"] == 1.0
    assert rates["unet lr=0.125"] == 0.125
    assert "unet" not in rates
    assert network.created[0].rank == 9  # type: ignore[comparison-overlap]


def test_a_rule_takes_a_module_of_a_block_without_rate_in() -> None:
    network = create(down_lr_weight="zeros", rules=r"down_blocks\.0.*proj_in: train=yes")
    network.apply_to()
    _, names = network.prepare_optimizer_params(None, 1.0)
    assert names[:2] == ["unet", "unet_block6"]


def test_of_a_file_weights_are_rates_only(caplog: pytest.LogCaptureFixture) -> None:
    network = create()
    network.apply_to()
    unet, tensors = tiny_unets.unet(), network.file_tensors()
    again, _ = lora.create_network_from_weights(
        1.0, None, None, None, unet, tensors, down_lr_weight="zeros", block_alphas="1"
    )
    assert len(again.created) == len(network.created)
    assert "block_alphas has no effect: the file" in caplog.text
    again.apply_to()
    _, names = again.prepare_optimizer_params(None, 1.0)
    assert names == [f"unet_block{index}" for index in (6, 9, 10, 11, 12)]
    assert again.file_tensors().keys() == tensors.keys()


def test_text_encoders_have_no_blocks() -> None:
    encoders = tiny_unets.encoders(sdxl=False)
    network = lora.create_network(1.0, 4, 2.0, None, encoders, None, block_dims="1,2", up_lr_weight="cosine")
    assert {adapter.rank for adapter in network.created} == {4}
    network.apply_to()
    assert network.prepare_optimizer_params([1e-4], None)[1] == ["textencoder 1"]


def test_what_has_no_effect_is_said(caplog: pytest.LogCaptureFixture) -> None:
    create(block_alphas="1", conv_block_dims="1", block_lr_zero_threshold="0.5")
    for name in ("block_alphas", "conv_block_dims", "block_lr_zero_threshold"):
        assert f"{name} has no effect" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"block_dims": "1,2"}, "2 numbers, for 13 blocks.*give 13"),
        ({"block_dims": ",".join(["1.5"] * COUNT)}, "'1.5' is no whole number"),
        ({"block_dims": ",".join(["-1"] * COUNT)}, "-1 is out of range"),
        ({"block_dims": ",".join(["4"] * COUNT), "block_alphas": "1,,2"}, "'' is no number"),
        ({"down_lr_weight": "sin"}, "'sin' is no number.*sine"),
        ({"down_lr_weight": "sine+x"}, "'x' is no number"),
        ({"up_lr_weight": "1,nan"}, "nan is out of range"),
        ({"mid_lr_weight": "cosine"}, "'cosine' is no number"),
        ({"block_lr_zero_threshold": "x", "mid_lr_weight": "1"}, "'x' is no number"),
        ({"down_lr_weight": "zeros", "mid_lr_weight": "0", "up_lr_weight": "0"}, "no module of unet is left to train"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        create(**arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("sdxl", [False, True])
def test_a_preset_for_any_number_of_blocks(sdxl: bool) -> None:
    layout = UnetLayout.of(tiny_unets.unet(sdxl=sdxl))
    assert layout.counts == ((6, 3, 6) if sdxl else (6, 1, 6))
    found = weights(layout, {"up_lr_weight": "reverse_linear"})
    assert found is not None
    assert found[-7:] == pytest.approx([1, 0.8, 0.6, 0.4, 0.2, 0, 1] if sdxl else [1, 1, 0.8, 0.6, 0.4, 0.2, 0])
