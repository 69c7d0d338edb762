"""OFT for SD and SDXL: names and shapes in files, which modules, reading, merging."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from library.log import DataError, UserError
from library.types import DENOISER
from networks import lora, oft
from networks.base import Network
from networks.oft import WholeRotationAdapter
from tests.networks import tiny_unets

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.mark.parametrize(
    ("case", "alpha", "multiplier"),
    [("alpha=0.01", 0.01, 1.0), ("alpha=10", 10.0, 1.0), ("alpha=10,multiplier=0.5", 10.0, 0.5)],
)
def test_the_numbers_of_the_reference(case: str, alpha: float, multiplier: float) -> None:
    golden = json.loads((GOLDEN / "oft.json").read_text("utf-8"))
    module = nn.Linear(3, 8).requires_grad_(False)
    module.load_state_dict({"weight": torch.tensor(golden["W"]), "bias": torch.tensor(golden["bias"])})
    made = WholeRotationAdapter("m", module, DENOISER, blocks=[2], sizes=[8], alpha=alpha, multiplier=multiplier)
    made.load({"oft_blocks": torch.tensor(golden["oft_blocks"])})
    torch.testing.assert_close(made(torch.tensor(golden["x"])), torch.tensor(golden[case]["y"]), rtol=1e-5, atol=1e-6)


EVERYTHING = {"enable_all_linear": "true", "enable_conv": "1"}


@pytest.mark.parametrize(
    ("version", "arguments", "count", "keys"),
    [
        ("1", {}, 128, ["sd15_attention_only"]),
        ("1", {"enable_all_linear": "False", "enable_conv": "False"}, 128, ["sd15_attention_only"]),
        ("1", EVERYTHING, 278, []),
        ("xl", {}, 560, ["sdxl_attention_only"]),
        ("xl", {"enable_all_linear": "True"}, 722, ["sdxl_attention_only", "sdxl_extra_with_enable_all_linear"]),
        ("xl", {"enable_conv": "True"}, 626, ["sdxl_attention_only", "sdxl_extra_with_enable_conv"]),
    ],
)
def test_names_and_shapes_at_full_size_are_those_of_the_reference(
    version: str, arguments: dict[str, str], count: int, keys: list[str]
) -> None:
    golden = json.loads((GOLDEN / "oft_keys.json").read_text("utf-8"))
    unet, encoders = tiny_unets.large(version)
    with torch.device("meta"):
        made = oft.create_network(1.0, 4, 1e-3, None, encoders, unet, **arguments)
        found = {
            f"{one.name}.{key}": list(tensor.shape)
            for one in made.created
            for key, tensor in one.file_tensors().items()
        }
    assert len(made.created) == count
    assert not keys or found == {name: shape for key in keys for name, shape in golden[key].items()}


def create(*, sdxl: bool = False, blocks: int = 4, **arguments: object) -> tuple[Network, nn.Module]:
    unet = tiny_unets.unet(sdxl=sdxl)
    made = oft.create_network(1.0, blocks, 1e-1, None, tiny_unets.encoders(sdxl=sdxl), unet, **arguments)
    return made, unet


@pytest.mark.parametrize("sdxl", [False, True], ids=["sd", "sdxl"])
@pytest.mark.parametrize("arguments", [{}, EVERYTHING], ids=["attention", "everywhere"])
def test_applied_read_and_merged_are_the_same(sdxl: bool, arguments: dict[str, str], tmp_path: Path) -> None:
    made, unet = create(sdxl=sdxl, **arguments)
    plain = tiny_unets.answer(unet)
    made.apply_to()
    torch.testing.assert_close(tiny_unets.answer(unet), plain, rtol=1e-4, atol=1e-5)
    applied = tiny_unets.answer(unet) if tiny_unets.fill(made, 0.3) else plain
    assert not torch.allclose(applied, plain, atol=1e-2)
    path = tmp_path / "oft.safetensors"
    made.save_weights(path, None, {})
    made.restore()
    again, tensors = oft.create_network_from_weights(1.0, path, None, None, unet, for_inference=True)
    assert {key.split(".", 1)[1] for key in tensors} == {"oft_blocks", "alpha"}
    assert [one.name for one in again.created] == [one.name for one in made.created]
    again.apply_to()
    assert "0 not in the file, 0 of the file" in again.load_weights(path)
    torch.testing.assert_close(tiny_unets.answer(unet), applied)
    again.restore()
    again.merge_to(None, unet, tensors)
    torch.testing.assert_close(tiny_unets.answer(unet), applied, rtol=1e-4, atol=1e-4)


def test_sdxl_files_with_the_names_of_diffusers_are_read() -> None:
    made, unet = create(sdxl=True)
    tiny_unets.fill(made).apply_to()
    paths = {module: path.replace(".", "_") for path, module in unet.named_modules()}
    foreign = {
        f"oft_unet_{paths[one.module]}.{key}": tensor
        for one in made.created
        for key, tensor in one.file_tensors().items()
    }
    assert oft.weights_for(foreign, None, unet).keys() == made.file_tensors().keys()
    assert oft.weights_for(foreign, None, None) == {}


def test_it_is_trained() -> None:
    made, unet = create()
    made.apply_to()
    groups, names = made.prepare_optimizer_params(None, 1e-2)
    assert names == ["unet"]
    optimizer = torch.optim.AdamW(groups)
    losses = []
    for _ in range(3):
        loss = (tiny_unets.answer(unet) - 1).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


def test_text_encoders_are_left_alone() -> None:
    made, _ = create(sdxl=True)
    assert {one.component for one in made.created} == {DENOISER}
    assert list(oft.trained_encoders(["clip_l", "clip_g"], {})) == []
    with pytest.raises(UserError, match="neither True nor False"):
        oft.trained_encoders([], {"enable_conv": "maybe"})


def test_mistakes(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(UserError, match=r"3 blocks don't divide the 8 outputs of down_blocks\.0.*give 2 or 4"):
        create(blocks=3)
    with pytest.raises(UserError, match="unknown argument"):
        create(enable_all_linears="True")
    name = "oft_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    with pytest.raises(DataError, match="rotates 32 outputs, of 16"):
        oft.create_network_from_weights(
            1.0, None, None, None, tiny_unets.unet(), {f"{name}.oft_blocks": torch.zeros(4, 8, 8)}
        )
    network = lora.create_network(1.0, 4, 1, None, tiny_unets.encoders(sdxl=False), tiny_unets.unet())
    network.apply_to()
    with pytest.raises(DataError, match="it is a LoRA for SD"):
        oft.create_network_from_weights(1.0, None, None, None, tiny_unets.unet(), network.file_tensors())
    oft.create_network(1.0, 4, 1, None, None, tiny_unets.unet(), neuron_dropout=0.1)
    assert "--network_alpha 1 hardly limits" in caplog.text
    assert "--network_dropout has no effect" in caplog.text
