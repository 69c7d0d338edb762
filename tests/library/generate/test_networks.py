"""Networks of all kinds in the inference script: applied and merged, told apart by their keys."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from library.families.flux import Flux, FluxFiles
from library.files import save_safetensors
from library.generate.flux import Dtypes, plugin_of
from library.generate.painter import LoraFile, Painter
from library.log import DataError
from networks import loha, lokr, lora_flux, oft_flux
from networks.base import Network
from tests import tiny

FIRST = "encoder.layers.0.mlp.fc1"
TYPES = Dtypes(torch.float32, torch.float32, torch.float32, torch.float32)
KINDS = {
    "lora": lambda model: lora_flux.create_network(1.0, 2, 2.0, None, [None, None], model),
    "dora": lambda model: lora_flux.create_network(1.0, 2, 2.0, None, [None, None], model, algo="dora"),
    "loha": lambda model: loha.create_network(1.0, 2, 2.0, None, [None, None], model),
    "lokr": lambda model: lokr.create_network(1.0, 2, 2.0, None, [None, None], model, factor="4"),
    "oft": lambda model: oft_flux.create_network(1.0, 4, 1e-3, None, [None, None], model),
}


def network_file(kind: str, folder: Path, seed: int) -> tuple[Path, Network]:
    network: Network = KINDS[kind](tiny.flux_model())
    network.apply_to()
    torch.manual_seed(seed)
    for parameter in network.parameters():
        nn.init.normal_(parameter, mean=float(parameter.detach().mean()), std=0.2)
    path = folder / f"{kind}.safetensors"
    network.save_weights(path, None, {})
    network.restore()
    return path, network


def layer_of(model: Path, files: list[LoraFile], *, merge: bool = False) -> nn.Linear:
    """A layer of the transformer as the inference script has it."""
    family = Flux(FluxFiles(str(model), None, None, None))
    painter = Painter(family, TYPES.by_part(), torch.device("cpu"), plugin_of, loras=files, merge=merge)
    layer = painter._part("unet").get_submodule("double_blocks.0.img_attn.qkv")
    assert isinstance(layer, nn.Linear)
    return layer


def change_of(network: Network) -> Tensor:
    return next(one for one in network.created if one.name.endswith("double_blocks_0_img_attn_qkv")).delta()


@pytest.mark.parametrize("kinds", [*([kind] for kind in KINDS), ["oft", "loha"]], ids="-".join)
def test_applied_and_merged_give_the_same(kinds: list[str], models: dict[str, Path], tmp_path: Path) -> None:
    made = [network_file(kind, tmp_path, seed) for seed, kind in enumerate(kinds)]
    files = [LoraFile(str(path), 0.5) for path, _ in made]
    plain = layer_of(models["flux"], [])
    x = torch.randn(5, plain.in_features, generator=torch.Generator().manual_seed(3))
    before = plain(x)
    change = torch.stack([change_of(network) for _, network in made]).sum(0)
    expected = torch.nn.functional.linear(x, plain.weight + 0.5 * change, plain.bias)
    assert not torch.allclose(before, expected, atol=5e-3)
    torch.testing.assert_close(layer_of(models["flux"], files)(x), expected, rtol=1e-4, atol=1e-4)
    if len(kinds) == 1:  # merged one after the other, each changes what the one before left
        torch.testing.assert_close(layer_of(models["flux"], files, merge=True)(x), expected, rtol=1e-4, atol=1e-4)


def test_a_network_for_another_model_is_not_applied_to_the_text_alone(models: dict[str, Path], tmp_path: Path) -> None:
    family = Flux(FluxFiles(str(models["flux"]), str(models["clip_l"]), None, None))
    layer = family.load_encoders(["clip_l"], torch.device("cpu"), torch.float32)["clip_l"].get_submodule(FIRST)
    assert isinstance(layer, nn.Linear)
    pair = {"lora_down.weight": torch.ones(2, layer.in_features), "lora_up.weight": torch.ones(layer.out_features, 2)}

    def parts(*names: str) -> None:
        path = tmp_path / "text.safetensors"
        save_safetensors({f"{name}.{key}": tensor for name in names for key, tensor in pair.items()}, path)
        painter = Painter(family, TYPES.by_part(), torch.device("cpu"), plugin_of, loras=[LoraFile(str(path))])
        for part in ("clip_l", "unet"):
            painter._part(part)

    text = f"lora_te1_text_model_{FIRST}".replace(".", "_")
    parts(text)
    with pytest.raises(DataError, match="it is a LoRA for SDXL"):
        parts(text, "lora_unet_input_blocks_4_1_proj_in")


def test_the_strength_of_applied_networks_can_be_changed(models: dict[str, Path], tmp_path: Path) -> None:
    path, network = network_file("oft", tmp_path, 1)
    family = Flux(FluxFiles(str(models["flux"]), None, None, None))
    painter = Painter(family, TYPES.by_part(), torch.device("cpu"), plugin_of, loras=[LoraFile(str(path), 0.5)])
    layer = painter._part("unet").get_submodule("double_blocks.0.img_attn.qkv")
    assert isinstance(layer, nn.Linear)
    x = torch.randn(5, layer.in_features, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        layer(x)
        painter.set_multipliers([1.0])
        expected = torch.nn.functional.linear(x, layer.weight + change_of(network), layer.bias)
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
