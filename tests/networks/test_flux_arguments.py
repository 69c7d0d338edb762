"""What `--network_args` of networks.lora_flux choose: parts, blocks, layers, ranks, rates."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from library.log import DataError, UserError
from library.models.flux import Flux, FluxConfig
from networks import lora_flux
from networks.base import Network
from networks.lora_flux import create_network, create_network_from_weights
from networks.splitting import SplitAdapter
from tests.networks import tiny_models

ENCODERS = ("clip_l", "t5xxl")


def network(*, clip: bool = False, t5: bool = False, unet: bool = True, **arguments: object) -> Network:
    encoders = [tiny_models.clip_l() if clip else None, tiny_models.t5() if t5 else None]
    torch.manual_seed(7)
    return create_network(1.0, 4, 2.0, None, encoders, tiny_models.flux() if unet else None, **arguments)  # type: ignore[arg-type]


def ranks(made: Network, removed: str = "lora_unet_") -> dict[str, int]:
    return {adapter.name.removeprefix(removed): adapter.rank for adapter in made.created}  # type: ignore[misc]


def fill(made: Network) -> Network:
    torch.manual_seed(8)
    for adapter in made.created:
        for name, parameter in adapter.named_parameters():
            if "lora_up" in name:
                nn.init.normal_(parameter, std=0.1)
    return made


DOUBLE = ["mod_lin", "attn_qkv", "attn_proj", "mlp_0", "mlp_2"]
SINGLE = ["linear1", "linear2", "modulation_lin"]
NAMES = [
    *(f"double_blocks_{block}_{stream}_{layer}" for block in range(2) for stream in ("img", "txt") for layer in DOUBLE),
    *(f"single_blocks_{block}_{layer}" for block in range(3) for layer in SINGLE),
]


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ({}, NAMES),
        ({"train_blocks": "all"}, NAMES),
        ({"train_blocks": "double"}, [name for name in NAMES if "double" in name]),
        ({"train_blocks": "Single"}, [name for name in NAMES if "single" in name]),
        ({"train_double_block_indices": "none"}, [name for name in NAMES if "single" in name]),
        ({"train_double_block_indices": ""}, [name for name in NAMES if "single" in name]),
        ({"train_single_block_indices": "0, 2"}, [name for name in NAMES if "single_blocks_1" not in name]),
        ({"train_single_block_indices": "1-2"}, [name for name in NAMES if "single_blocks_0" not in name]),
        (
            {"train_double_block_indices": "1", "train_single_block_indices": "none"},
            [name for name in NAMES if "double_blocks_1" in name],
        ),
    ],
)
def test_blocks_are_chosen(arguments: dict[str, str], wanted: list[str]) -> None:
    assert sorted(ranks(network(**arguments))) == sorted(wanted)


DIMS = {
    "img_attn_dim": ["img_attn"],
    "txt_attn_dim": ["txt_attn"],
    "img_mlp_dim": ["img_mlp"],
    "txt_mlp_dim": ["txt_mlp"],
    "img_mod_dim": ["img_mod"],
    "txt_mod_dim": ["txt_mod"],
    "single_dim": ["linear1", "linear2"],
    "single_mod_dim": ["modulation"],
}


@pytest.mark.parametrize("argument", DIMS)
@pytest.mark.parametrize("dim", [0, 7])
def test_layers_get_ranks_of_their_own(argument: str, dim: int) -> None:
    made = network(**{argument: str(dim)})
    wanted = {name: dim if any(part in name for part in DIMS[argument]) else 4 for name in NAMES}
    assert ranks(made) == {name: rank for name, rank in wanted.items() if rank}
    assert {float(adapter.alpha) for adapter in made.created} == {2.0}  # type: ignore[arg-type]


def test_input_layers() -> None:
    made = network(in_dims="1,2,3,0,5", train_blocks="single")
    assert {name: rank for name, rank in ranks(made).items() if "_in" in name} == {
        "img_in": 1,
        "time_in_in_layer": 2,
        "time_in_out_layer": 2,
        "vector_in_in_layer": 3,
        "vector_in_out_layer": 3,
        "txt_in": 5,
    }


def test_counts_come_from_the_model(caplog: pytest.LogCaptureFixture) -> None:
    small = Flux(
        FluxConfig(
            width=32, head_width=16, mlp_width=48, double_blocks=1, single_blocks=2, context_width=8, guidance=False
        )
    )
    made = create_network(
        1.0, 2, 1, None, None, small, train_single_block_indices="1", split_qkv="1", in_dims="0,0,0,9,0"
    )
    assert [adapter.parts for adapter in made.created if isinstance(adapter, SplitAdapter)] == [
        (32, 32, 32),
        (32, 32, 32),
        (32, 32, 32, 48),
    ]
    assert "no guidance_in" in caplog.text
    with pytest.raises(UserError, match=r"no block 2: the model has 2.*0 to 1"):
        create_network(1.0, 2, 1, None, None, small, train_single_block_indices="0,1-2")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"train_blocks": "singel"}, "did you mean single"),
        ({"train_double_block_indices": "0-2"}, "no block 2: the model has 2"),
        ({"train_double_block_indices": "1-0"}, "'1-0' is no index"),
        ({"train_single_block_indices": "0,,1"}, "'' is no index"),
        ({"train_single_block_indices": "-1"}, "'-1' is no index"),
        ({"in_dims": "4,4"}, "2 numbers.*5 are needed"),
        ({"in_dims": "[4,4,4,4,x]"}, "'x' is no whole number"),
        ({"img_attn_dim": "-4"}, "out of range"),
        ({"train_t5xxl": "perhaps"}, "neither True nor False"),
        ({"train_double_block_indices": "none", "train_single_block_indices": "none"}, "no module of unet is left"),
        ({"rules": "t5xxl: lr=1e-4"}, "matches no module"),
    ],
)
def test_wrong_arguments_are_one_line(arguments: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        network(**arguments)
    assert "\n" not in str(caught.value)
    assert "--network_args" in str(caught.value)


def test_ranks_for_what_is_not_trained_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    network(train_blocks="single", img_attn_dim="8", single_dim="2")
    assert "img_attn_dim has no effect" in caplog.text
    assert "single_dim" not in caplog.text


PARTS = {
    "unet only": (False, False, True, {"unet": 29}),
    "unet and CLIP-L": (True, False, True, {"textencoder 1": 12, "unet": 29}),
    "unet, CLIP-L and T5": (True, True, True, {"textencoder 1": 12, "textencoder 2": 7, "unet": 29}),
    "CLIP-L only": (True, False, False, {"textencoder 1": 12}),
    "CLIP-L and T5 only": (True, True, False, {"textencoder 1": 12, "textencoder 2": 7}),
}
"""Which encoders are trained, whether the transformer is, and the modules in each group."""


@pytest.mark.parametrize("row", PARTS)
@pytest.mark.parametrize("split", ["False", "True"])
def test_exactly_the_chosen_parts_are_trained(row: str, split: str) -> None:
    clip, t5, unet, modules = PARTS[row]
    arguments = {"train_t5xxl": str(t5), "split_qkv": split}
    assert lora_flux.trained_encoders(ENCODERS, arguments) == (list(ENCODERS) if t5 else ["clip_l"])
    made = network(clip=clip, t5=t5, **arguments)  # the transformer is there in any case
    made.apply_to(None, None, clip or t5, unet)
    groups, names = made.prepare_optimizer_params_with_multiple_te_lrs([0.1, 0.2], 0.3, 0.4)
    rates = {"textencoder 1": 0.1, "textencoder 2": 0.2, "unet": 0.3}
    assert {name: (len(group["params"]), group["lr"]) for name, group in zip(names, groups, strict=True)} == {
        name: (2 * count, rates[name]) for name, count in modules.items()
    }
    prefixes = {"textencoder 1": "lora_te1_", "textencoder 2": "lora_te3_", "unet": "lora_unet_"}
    keys = made.file_tensors()
    assert {name: sum(key.startswith(prefixes[name]) for key in keys) for name in modules} == {
        name: 3 * count for name, count in modules.items()
    }
    assert len(keys) == 3 * sum(modules.values())
    grouped = {id(parameter) for group in groups for parameter in group["params"]}
    assert grouped == {id(parameter) for parameter in made.parameters()}


def test_t5_is_trained_on_request_only() -> None:
    made = network(clip=True, t5=True)
    assert {adapter.component for adapter in made.created} == {"textencoder 1", "unet"}
    assert lora_flux.trained_encoders(ENCODERS, {}) == ["clip_l"]
    for word in ("true", "1", "Yes", "True"):
        assert lora_flux.trained_encoders(ENCODERS, {"train_t5xxl": word}) == list(ENCODERS)


RULES = r"img_attn: dim=8 lr=0.5; modulation: train=no; clip_l.*fc1: lr=0.7; blocks: alpha=4"


def test_rules_make_groups_and_save_memory(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    made = network(clip=True, rules=RULES, loraplus_unet_lr_ratio="10", verbose="yes")
    assert "4 modules  img_attn: dim=8 lr=0.5" in caplog.text
    assert "lora_unet_double_blocks_0_img_attn_qkv: LoraAdapter dim=8 alpha=2 lr=0.5 on Linear" in caplog.text
    made.apply_to()
    groups, names = made.prepare_optimizer_params_with_multiple_te_lrs(0.1, 0.3, None)
    assert {name: (len(group["params"]), group["lr"]) for name, group in zip(names, groups, strict=True)} == {
        "textencoder 1": (20, 0.1),
        "textencoder 1 lr=0.7": (4, 0.7),
        "unet": (22, 0.3),
        "unet plus": (22, 3.0),
        "unet lr=0.5": (4, 0.5),
        "unet lr=0.5 plus": (4, 5.0),
    }
    assert {float(adapter.alpha) for adapter in made.created} == {2.0, 4.0}  # type: ignore[arg-type]
    plain, fewer = network(), network(rules="modulation: train=no")
    sizes = [sum(p.numel() for adapter in each.created for p in adapter.parameters()) for each in (plain, fewer)]
    assert sizes[0] - sizes[1] == 3 * 4 * (64 + 192)


def says(model: Flux, t5: nn.Module) -> tuple[Tensor, Tensor]:
    return model(**tiny_models.flux_inputs()), t5(input_ids=torch.arange(10)[None]).last_hidden_state


def test_a_split_network_with_everything_is_the_same_in_any_reader(tmp_path: Path) -> None:
    model, t5 = tiny_models.flux(), tiny_models.t5()
    given = {"split_qkv": "yes", "train_t5xxl": "yes", "in_dims": "1,2,3,4,5", "rules": "txt_attn: dim=3 alpha=5"}
    made = fill(create_network(1.0, 4, 2.0, None, [None, t5], model, **given))
    made.apply_to()
    plain, wanted = says(tiny_models.flux(), tiny_models.t5()), says(model, t5)
    assert not torch.allclose(plain[0], wanted[0], atol=1e-2)
    assert not torch.allclose(plain[1], wanted[1], atol=1e-2)
    path = tmp_path / "n.safetensors"
    made.save_weights(path, None, {})
    made.restore()
    for arguments in ({}, {"split_qkv": "True", "train_t5xxl": "True"}):  # as --dim_from_weights does
        again, tensors = create_network_from_weights(1.0, path, None, [None, t5], model, **arguments)
        again.apply_to()
        again.load_weights(path)
        torch.testing.assert_close(says(model, t5), wanted, rtol=0, atol=0)
        assert any(isinstance(adapter, SplitAdapter) for adapter in again.adapters) == bool(arguments)
        assert again.file_tensors().keys() == made.file_tensors().keys()
        again.restore()
    same = create_network(1.0, 4, 2.0, None, [None, t5], model, **given)  # as --network_weights does
    same.apply_to()
    same.load_weights(path)
    torch.testing.assert_close(says(model, t5), wanted, rtol=0, atol=0)
    same.restore()
    merged, tensors = create_network_from_weights(1.0, path, None, [None, t5], model, for_inference=True)
    merged.merge_to([None, t5], model, tensors)
    torch.testing.assert_close(says(model, t5), wanted, rtol=1e-4, atol=1e-4)


def test_what_older_scripts_split_is_read_as_it_was_trained(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_models.flux()
    made = fill(create_network(1.0, 4, 2.0, None, None, model, split_qkv="True"))
    made.apply_to()
    wanted = model(**tiny_models.flux_inputs())
    theirs = {name: torch.tensor(2.0) if "alpha" in name else tensor for name, tensor in made.file_tensors().items()}
    made.restore()
    caplog.set_level("INFO")
    again, tensors = create_network_from_weights(1.0, None, None, None, model, theirs, split_qkv="True")
    again.apply_to()
    again.load_tensors(theirs)
    torch.testing.assert_close(model(**tiny_models.flux_inputs()), wanted, rtol=0, atol=0)
    assert "that of one part" in caplog.text
    again.restore()
    for name, tensor in made.file_tensors().items():
        torch.testing.assert_close(tensors[name], tensor, check_dtype=False)
    other, _ = create_network_from_weights(1.0, None, None, None, model, theirs)
    scales = {adapter.name: adapter.scale for adapter in other.created}  # type: ignore[misc]
    assert scales["lora_unet_double_blocks_0_img_attn_qkv"] == pytest.approx(
        2 / 12
    )  # what every other reader makes of it


def test_an_unsplit_file_is_not_taken_for_a_split_one() -> None:
    model = tiny_models.flux()
    made = fill(create_network(1.0, 12, 2.0, None, None, model))
    made.apply_to()
    tensors = made.file_tensors()
    made.restore()
    again, _ = create_network_from_weights(1.0, None, None, None, model, tensors, split_qkv="True")
    again.apply_to()
    with pytest.raises(DataError, match="isn't split in the file"):
        again.load_tensors(tensors)


def test_arguments_that_a_file_decides_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    made = fill(network())
    made.apply_to()
    arguments = {"train_blocks": "single", "in_dims": "1,1,1,1,1", "conv_dim": "4"}
    create_network_from_weights(1.0, None, None, None, tiny_models.flux(), made.file_tensors(), **arguments)
    for name in arguments:
        assert f"{name} has no effect" in caplog.text


def test_norms_are_kept_below_the_maximum_when_split() -> None:
    made = fill(network(split_qkv="True"))
    made.apply_to()
    before = torch.stack([adapter.delta_norm() for adapter in made.adapters])
    limit = float(before.median())
    made.apply_max_norm_regularization(limit)
    after = torch.stack([adapter.delta().norm() for adapter in made.adapters])
    torch.testing.assert_close(after, before.clamp(max=limit))
