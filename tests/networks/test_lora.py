"""LoRA for SD and SDXL: names and shapes in files, sizes, reading, merging, other algorithms, Diffusers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from library import files
from library.log import DataError, UserError
from networks import lora, lora_fa
from networks.base import Network
from tests.networks import tiny_models, tiny_unets
from tests.networks.tiny_unets import answer, fill, say

GOLDEN = Path(__file__).parents[1] / "golden"
FILES = {"1": "sd15_lora_keys", "2": "sd2_lora_keys", "xl": "sdxl_lora_keys"}
COUNTS = {"1": (192, 86, [72]), "2": (192, 86, [138]), "xl": (722, 66, [72, 192])}

each_family = pytest.mark.parametrize("sdxl", [False, True], ids=["sd", "sdxl"])


def golden(name: str) -> dict[str, Any]:
    return json.loads((GOLDEN / f"{name}.json").read_text("utf-8"))  # type: ignore[no-any-return]


@pytest.fixture(scope="module", params=["1", "2", "xl"])
def large(request: pytest.FixtureRequest) -> tuple[str, nn.Module, list[nn.Module]]:
    return request.param, *tiny_unets.large(request.param)


def shapes(network: Network) -> dict[str, list[int]]:
    return {
        f"{adapter.name}.{key}": list(tensor.shape)
        for adapter in network.created
        for key, tensor in adapter.file_tensors().items()
    }


@pytest.mark.parametrize("arguments", [{}, {"conv_dim": "4"}], ids=["attention", "everywhere"])
def test_names_and_shapes_at_full_size_are_those_of_the_reference(
    large: tuple[str, nn.Module, list[nn.Module]], arguments: dict[str, str]
) -> None:
    version, unet, encoders = large
    keys = golden(FILES[version])
    with torch.device("meta"):
        made = lora.create_network(1.0, 4, 1, None, encoders, unet, **arguments)
    attention, extra, texts = COUNTS[version]
    found = [sum(one.component == f"textencoder {index + 1}" for one in made.created) for index in range(len(texts))]
    assert found == texts
    assert len(made.created) - sum(texts) == attention + (extra if arguments else 0)
    assert shapes(made) == keys["default"] | (keys["extra_keys_with_conv_dim"] if arguments else {})


def test_modules_are_those_of_the_lists(large: tuple[str, nn.Module, list[nn.Module]]) -> None:
    version, unet, encoders = large
    lists = golden("lora_modules_sdxl" if version == "xl" else "lora_modules_sd")
    with torch.device("meta"):
        made = lora.create_network(1.0, 4, 1, None, encoders if version != "2" else None, unet, conv_dim="4")
    names = {"1": "sd1", "2": "sd2 unet", "xl": "sdxl"}[version]
    wanted = set(lists[names]) | set(lists.get(f"{names.split()[0]},conv adds", lists.get("sd1,conv adds", {})))
    assert {adapter.name for adapter in made.created} == wanted


def create(*, sdxl: bool, seed: int = 7, module: Any = lora, **arguments: object) -> tuple[Network, nn.Module, Any]:
    unet, encoders = tiny_unets.unet(sdxl=sdxl), tiny_unets.encoders(sdxl=sdxl)
    torch.manual_seed(seed)
    return module.create_network(1.0, 4, 2.0, None, encoders, unet, **arguments), unet, encoders


@each_family
@pytest.mark.parametrize("arguments", [{}, {"conv_dim": "3", "conv_alpha": "1.5"}], ids=["attention", "everywhere"])
def test_applied_read_and_merged_are_the_same(sdxl: bool, arguments: dict[str, str], tmp_path: Path) -> None:
    network, unet, encoders = create(sdxl=sdxl, **arguments)
    plain = say(unet, encoders)
    network.apply_to()
    for before, now in zip(plain, say(unet, encoders), strict=True):
        torch.testing.assert_close(now, before, rtol=1e-4, atol=1e-5)
    applied = say(unet, encoders) if fill(network) else []
    assert not any(torch.allclose(before, now, atol=1e-2) for before, now in zip(plain, applied, strict=True))
    path = tmp_path / "n.safetensors"
    network.save_weights(path, None, {})
    network.restore()
    again, tensors = lora.create_network_from_weights(1.0, path, None, encoders, unet)
    again.apply_to()
    assert "0 not in the file, 0 of the file" in again.load_weights(path)
    for wanted, found in zip(applied, say(unet, encoders), strict=True):
        torch.testing.assert_close(found, wanted)
    again.restore()
    again.merge_to(encoders, unet, tensors)
    for wanted, found in zip(applied, say(unet, encoders), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("sdxl", "arguments"),
    [(False, {"algo": "loha"}), (True, {"algo": "lokr", "factor": "2"}), (False, {"algo": "dora"})],
)
def test_other_algorithms_cover_the_same_modules(sdxl: bool, arguments: dict[str, str]) -> None:
    network, unet, encoders = create(sdxl=sdxl, conv_dim="2", **arguments)
    plain, _, _ = create(sdxl=sdxl, conv_dim="2")
    assert [one.name for one in network.created] == [one.name for one in plain.created]
    fill(network, 0.1).apply_to()
    applied = say(unet, encoders)
    tensors = network.file_tensors()
    network.restore()
    again, tensors = lora.create_network_from_weights(1.0, None, None, encoders, unet, dict(tensors))
    assert {type(one) for one in again.created} == {type(one) for one in network.created}
    again.merge_to(encoders, unet, tensors)
    for wanted, found in zip(applied, say(unet, encoders), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


def test_sdxl_files_with_the_names_of_diffusers_are_read() -> None:
    network, unet, encoders = create(sdxl=True, conv_dim="2")
    fill(network).apply_to()
    tensors, applied = network.file_tensors(), say(unet, encoders)
    network.restore()
    paths = {module: path for path, module in unet.named_modules()}
    theirs = {
        one.name: "lora_unet_" + paths[one.module].replace(".", "_") if one.component == "unet" else one.name
        for one in network.created
    }
    foreign = {theirs[key.split(".")[0]] + key[key.index(".") :]: tensor for key, tensor in tensors.items()}
    assert "lora_unet_down_blocks_1_attentions_0_transformer_blocks_1_attn2_to_out_0.alpha" in foreign
    assert not any("put_blocks" in key for key in foreign)
    assert lora.weights_for(foreign, encoders, unet).keys() == tensors.keys()
    again, read = lora.create_network_from_weights(1.0, None, None, encoders, unet, foreign)
    assert read.keys() == tensors.keys()
    again.apply_to()
    again.load_tensors(foreign)
    for wanted, found in zip(applied, say(unet, encoders), strict=True):
        torch.testing.assert_close(found, wanted)
    again.restore()
    again.merge_to(encoders, unet, foreign)
    torch.testing.assert_close(answer(unet), applied[0], rtol=1e-4, atol=1e-4)


def test_projections_of_either_shape_are_read() -> None:
    network, _, _ = create(sdxl=False)
    fill(network).apply_to()
    tensors = network.file_tensors()
    assert tensors["lora_unet_mid_block_attentions_0_proj_in.lora_down.weight"].shape == (4, 16, 1, 1)
    linear = tiny_unets.unet(linear=True)
    again, read = lora.create_network_from_weights(1.0, None, None, None, linear, tensors)
    again.apply_to()
    again.load_tensors(read)
    assert again.file_tensors()["lora_unet_mid_block_attentions_0_proj_in.lora_down.weight"].shape == (4, 16)


@each_family
def test_parts_that_are_not_loaded_are_left_alone(sdxl: bool) -> None:
    network, unet, encoders = create(sdxl=sdxl)
    fill(network).apply_to()
    tensors = network.file_tensors()
    prefixes = ["lora_te1_", "lora_te2_"] if sdxl else ["lora_te_"]
    places: list[nn.Module | None] = [None] * len(encoders)
    assert lora.weights_for(tensors, places, unet).keys() == {key for key in tensors if key.startswith("lora_unet_")}
    for index, prefix in enumerate(prefixes):
        one = [encoder if at == index else None for at, encoder in enumerate(encoders)]
        assert lora.weights_for(tensors, one, None).keys() == {key for key in tensors if key.startswith(prefix)}
        alone, _ = lora.create_network_from_weights(1.0, None, None, one, None, tensors)
        assert {adapter.component for adapter in alone.created} == {f"textencoder {index + 1}"}


def test_one_encoder_may_come_without_a_list() -> None:
    clip = tiny_models.clip_l()
    made = lora.create_network(1.0, 4, 1, None, clip, None)
    assert made.created[0].name == "lora_te_text_model_encoder_layers_0_self_attn_k_proj"


def test_gradients_and_dropouts() -> None:
    network, unet, _ = create(sdxl=False, conv_dim="2", rank_dropout="0.5", module_dropout="0.3", dropout="0.2")
    network.apply_to()
    fill(network)
    network.prepare_grad_etc()
    network.on_epoch_start()
    torch.manual_seed(0)
    first = answer(unet)
    assert not torch.equal(first, answer(unet))
    torch.manual_seed(0)
    assert torch.equal(first, answer(unet))
    first.sum().backward()
    used = [parameter.grad is not None for parameter in network.parameters() if parameter.requires_grad]
    assert any(used)
    assert not all(used)
    network.eval()
    assert torch.equal(answer(unet), answer(unet))


def test_rules_and_lora_plus() -> None:
    network, *_ = create(
        sdxl=True,
        rules=r"input_blocks.3.1: dim=8; down_blocks\.2.*ff: lr=0.5; mid_block\.resnets.*conv1: train=yes; "
        r"clip_g.*mlp: train=no; clip_l.*mlp: dim=1",
        loraplus_unet_lr_ratio="4",
    )
    ranks = {adapter.name: adapter.rank for adapter in network.created}  # type: ignore[misc]
    assert ranks["lora_unet_input_blocks_3_1_proj_in"] == 8
    assert ranks["lora_unet_input_blocks_5_1_proj_in"] == 4
    assert ranks["lora_unet_middle_block_0_in_layers_2"] == 4
    assert ranks["lora_te1_text_model_encoder_layers_0_mlp_fc1"] == 1
    assert sum(name.startswith("lora_te2_") for name in ranks) == 4
    network.apply_to()
    groups, names = network.prepare_optimizer_params_with_multiple_te_lrs([1e-4, 1e-4], 1e-3, 1e-3)
    assert names == ["textencoder 1", "textencoder 2", "unet", "unet plus", "unet lr=0.5", "unet lr=0.5 plus"]
    assert [group["lr"] for group in groups] == pytest.approx([1e-4, 1e-4, 1e-3, 4e-3, 0.5, 2])


def test_a_convolution_of_rank_0_leaves_the_layers_beside_it() -> None:
    network, *_ = create(sdxl=False, conv_dim="0")
    names = {adapter.name for adapter in network.created}
    assert "lora_unet_mid_block_resnets_0_time_emb_proj" in names
    assert "lora_unet_mid_block_resnets_0_conv1" not in names


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"conv_dims": "4"}, "did you mean conv_dim"),
        ({"conv_dim": "x"}, "no whole number"),
        ({"conv_alpha": "-1"}, "out of range"),
        ({"rules": "double_blocks: dim=4"}, "matches no module"),
    ],
)
def test_wrong_arguments(arguments: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        create(sdxl=False, **arguments)
    assert "\n" not in str(error.value)


def test_arguments_are_checked_before_anything_is_loaded() -> None:
    assert list(lora.trained_encoders(["clip_l", "clip_g"], {"conv_dim": "4"})) == ["clip_l", "clip_g"]
    with pytest.raises(UserError, match="unknown argument"):
        lora.trained_encoders(["clip_l"], {"down_lr_weights": "1"})


def test_what_has_no_effect_is_said(caplog: pytest.LogCaptureFixture) -> None:
    without_effect = {"conv_alpha": "1", "split_qkv": "True"}
    lora.trained_encoders([], without_effect)
    network, unet, encoders = create(sdxl=False, **without_effect)
    assert caplog.text.count("conv_alpha has no effect") == 1
    assert caplog.text.count("split_qkv has no effect") == 1
    network.apply_to()
    lora.create_network_from_weights(1.0, None, None, encoders, unet, network.file_tensors(), conv_dim="4")
    assert "conv_dim has no effect: the file says" in caplog.text


def test_other_models_and_files_are_refused() -> None:
    with pytest.raises(UserError, match=r"another kind of model.*networks\.lora_flux"):
        lora.create_network(1.0, 4, 1, None, None, tiny_models.flux())
    network, *_ = create(sdxl=True)
    network.apply_to()
    with pytest.raises(DataError, match="it is a LoRA for SDXL"):
        lora.create_network_from_weights(
            1.0, None, None, tiny_unets.encoders(sdxl=False), tiny_unets.unet(), network.file_tensors()
        )


def pipeline(unet: nn.Module, encoders: list[nn.Module]) -> Any:
    import diffusers

    parts: dict[str, Any] = {
        "vae": diffusers.AutoencoderKL(block_out_channels=(32,)),
        "unet": unet,
        "scheduler": diffusers.DDIMScheduler(),
        "text_encoder": encoders[0],
        "tokenizer": None,
    }
    if len(encoders) > 1:
        parts |= {"text_encoder_2": encoders[1], "tokenizer_2": None}
        return diffusers.StableDiffusionXLPipeline(**parts)
    return diffusers.StableDiffusionPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )


@pytest.mark.parametrize(
    ("sdxl", "module", "arguments"),
    [(False, lora, {}), (True, lora, {}), (False, lora, {"conv_dim": "3"}), (True, lora_fa, {"conv_dim": "3"})],
    ids=["sd", "sdxl", "sd conv", "sdxl conv lora_fa"],
)
@pytest.mark.filterwarnings("ignore")
def test_diffusers_gives_the_same_answers(sdxl: bool, module: Any, arguments: dict[str, str], tmp_path: Path) -> None:
    pytest.importorskip("peft")
    network, unet, encoders = create(sdxl=sdxl, module=module, **arguments)
    plain = say(unet, encoders)
    fill(network).apply_to()
    path = tmp_path / "ours.safetensors"
    files.save_safetensors(network.file_tensors(), path, {"ss_network_module": "networks.lora"})
    network.restore()
    merged, tensors = module.create_network_from_weights(1.0, path, None, encoders, unet, for_inference=True)
    merged.merge_to(encoders, unet, tensors)

    theirs, their_encoders = tiny_unets.unet(sdxl=sdxl), tiny_unets.encoders(sdxl=sdxl)
    pipeline(theirs, their_encoders).load_lora_weights(str(tmp_path), weight_name=path.name)
    for before, ours, found in zip(plain, say(unet, encoders), say(theirs, their_encoders), strict=True):
        assert float((ours - before).abs().max()) > 0.05
        assert float((found - ours).abs().max() / ours.abs().max()) < 1e-4
