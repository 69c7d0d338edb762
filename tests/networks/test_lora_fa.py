"""LoRA-FA: the down matrices are random, stay as they are, and are in the file."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from library.log import UserError
from library.types import DENOISER
from networks import lora, lora_fa
from networks.base import Network
from networks.lora_fa import FrozenDownAdapter
from tests.networks import tiny_unets


def create(**arguments: object) -> tuple[Network, nn.Module, list[nn.Module]]:
    unet, encoders = tiny_unets.unet(sdxl=True), tiny_unets.encoders(sdxl=True)
    torch.manual_seed(1)
    return lora_fa.create_network(1.0, 4, 2.0, None, encoders, unet, **arguments), unet, encoders


@pytest.mark.parametrize("module", [nn.Linear(300, 8), nn.Conv2d(300, 8, 3)], ids=["linear", "conv"])
def test_how_the_down_matrix_begins(module: nn.Module) -> None:
    torch.manual_seed(0)
    made = FrozenDownAdapter("m", module, DENOISER, rank=20, alpha=1)
    down, up = made.pair()
    assert float(down.std()) == pytest.approx(math.sqrt(2 / 320), rel=0.05)
    assert float(down.abs().max()) > 3 * float(down.std())  # not uniform
    assert not up.any()


def test_only_up_matrices_are_trained() -> None:
    network, unet, encoders = create(conv_dim="2")
    network.apply_to()
    network.prepare_grad_etc()
    groups, names = network.prepare_optimizer_params_with_multiple_te_lrs([1e-2, 1e-2], 1e-2, None)
    assert names == ["textencoder 1", "textencoder 2", "unet"]
    before = {name: tensor.clone() for name, tensor in network.file_tensors().items()}
    assert sum(len(group["params"]) for group in groups) == len(network.adapters)
    optimizer = torch.optim.AdamW(groups, weight_decay=0.5)
    loss = sum(said.square().mean() for said in tiny_unets.say(unet, encoders))
    loss.backward()  # type: ignore[union-attr]
    optimizer.step()
    moved = {name for name, tensor in network.file_tensors().items() if not torch.equal(tensor, before[name])}
    assert moved == {name for name in before if "lora_up" in name}
    assert {id(parameter) for parameter in network.get_trainable_params()} == {
        id(parameter) for group in groups for parameter in group["params"]
    }


def test_files_are_those_of_lora_and_norms_change_the_up_matrices(tmp_path: Path) -> None:
    network, unet, encoders = create(conv_dim="2")
    tiny_unets.fill(network).apply_to()
    downs = {adapter.name: adapter.pair()[0].clone() for adapter in network.adapters}  # type: ignore[operator]
    largest = max(float(adapter.delta_norm()) for adapter in network.adapters)
    network.apply_max_norm_regularization(largest / 2)
    norms = [float(adapter.delta().norm()) for adapter in network.adapters]
    assert max(norms) == pytest.approx(largest / 2)
    assert all(torch.equal(adapter.pair()[0], downs[adapter.name]) for adapter in network.adapters)  # type: ignore[operator]
    applied = tiny_unets.say(unet, encoders)
    path = tmp_path / "fa.safetensors"
    network.save_weights(path, None, {})
    network.restore()
    for module, kind in ((lora, "LoraAdapter"), (lora_fa, "FrozenDownAdapter")):
        again, tensors = module.create_network_from_weights(1.0, path, None, encoders, unet)
        assert {type(adapter).__name__ for adapter in again.created} == {kind}
        again.apply_to()
        again.load_tensors(tensors)
        for wanted, found in zip(applied, tiny_unets.say(unet, encoders), strict=True):
            torch.testing.assert_close(found, wanted)
        again.restore()


def test_the_state_holds_the_down_matrices() -> None:
    network, *_ = create()
    other, *_ = create()
    for made in (network, other):
        made.apply_to()
    tiny_unets.fill(network)
    for adapter in network.adapters:
        adapter.lora_down.weight.normal_()  # type: ignore[union-attr, operator]
    other.load_state_dict(network.state_dict())
    loaded = other.file_tensors()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in network.file_tensors().items())


def test_block_lists_work_for_sdxl_and_lora_plus_does_nothing(caplog: pytest.LogCaptureFixture) -> None:
    network, *_ = create(block_dims=",".join(["1"] * 17), mid_lr_weight="1,0.5", loraplus_lr_ratio="4")
    assert "LoRA+ has no effect on LoRA-FA" in caplog.text
    network.apply_to()
    assert "unet_block8" in network.prepare_optimizer_params(None, 1.0)[1]


@pytest.mark.parametrize("arguments", [{"algo": "loha"}, {"unit": "2"}, {"split_qkv": "True"}])
def test_what_it_does_not_know(arguments: dict[str, str]) -> None:
    with pytest.raises(UserError):
        create(**arguments)
