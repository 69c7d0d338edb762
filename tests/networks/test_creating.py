"""Networks for a family of which nothing here knows: a plug-in is a few lines."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from library.log import DataError, UserError
from networks import creating
from networks.arguments import Arguments
from networks.base import Network
from networks.creating import Parts, Settings
from networks.reading import Rank
from networks.targets import FamilyTargets, Part, Target

TOY = FamilyTargets(
    denoiser=Part("lora_unet", r"(?P<path>blocks\.\d+\.(attn|conv|point))", fused=r".*\.attn"),
    extras=Part("lora_unet", r"(?P<path>head)"),
    encoders=(Part("lora_te", r"(?P<path>layer)", root="text.", name="clip"),),
)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.point, self.conv = nn.Linear(4, 12), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.attn(x.movedim(1, -1)).chunk(3, -1)
        return self.conv(self.point((q * k + v).movedim(-1, 1)))  # type: ignore[no-any-return]


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x.movedim(1, -1))  # type: ignore[no-any-return]


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)


def toy() -> Toy:
    torch.manual_seed(0)
    return Toy().requires_grad_(False)


def parts(model: nn.Module | None = None, encoder: nn.Module | None = None) -> Parts:
    return Parts.of(TOY, [encoder], model)


def create(place: Parts, rank: int = 2, **given: object) -> Network:
    """What a plug-in's `create_network` looks like, with `conv_dim` as its only own argument."""
    arguments = Arguments(given)
    settings = Settings.from_arguments(arguments, None)
    conv = arguments.integer("conv_dim")
    arguments.finish()

    def select(target: Target, component: str) -> Rank | None:
        if isinstance(target.module, nn.Conv2d) and target.module.kernel_size != (1, 1):
            return Rank(conv, 1.0) if conv else None
        return None if target.path == "head" else Rank(rank, 1.0)

    return creating.create(place, settings, select, Rank(rank, 1.0), 1.0)


def read(place: Parts, tensors: dict[str, Tensor], **given: object) -> Network:
    settings = Settings.from_arguments(Arguments(given), None)
    made, weights = creating.create_from_weights(place, settings, 1.0, None, tensors, False)
    made.apply_to()
    made.load_tensors(weights)
    return made


def fill(made: Network) -> Network:
    torch.manual_seed(3)
    for adapter in made.created:
        for name, parameter in adapter.named_parameters():
            if "lora_up" in name:
                nn.init.normal_(parameter, std=0.3)
    return made


def ranks(made: Network) -> dict[str, int]:
    return {adapter.name.removeprefix("lora_"): adapter.rank for adapter in made.created}  # type: ignore[misc]


def test_the_choice_is_the_family_s_then_that_of_the_rules() -> None:
    blocks = {"unet_blocks_0_attn": 2, "unet_blocks_0_point": 2, "unet_blocks_1_attn": 2, "unet_blocks_1_point": 2}
    encoder = Encoder()
    assert ranks(create(parts(toy(), encoder))) == {"te_text_layer": 2, **blocks}
    convs = {"unet_blocks_0_conv": 5, "unet_blocks_1_conv": 5}
    assert ranks(create(parts(toy()), conv_dim="5")) == {**blocks, **convs}
    made = create(
        parts(toy(), encoder),
        rules=r"head: train=yes; blocks\.0\.: train=no; attn: dim=7; clip\.text\.layer: alpha=4; conv: train=yes dim=3",
    )
    wanted = {
        "te_text_layer": 2,
        "unet_blocks_1_attn": 7,
        "unet_blocks_1_point": 2,
        "unet_blocks_1_conv": 3,
        "unet_head": 2,
    }
    assert ranks(made) == wanted
    assert float(made.created[0].alpha) == 4.0  # type: ignore[arg-type]


@pytest.mark.parametrize("split", ["False", "True"])
def test_files_convolutions_included_read_back(split: str) -> None:
    model, x = toy(), torch.randn(1, 4, 5, 5)
    made = fill(create(parts(model), conv_dim="3", split_qkv=split, rules="head: train=yes"))
    made.apply_to()
    plain, wanted = toy()(x), model(x)
    assert not torch.allclose(plain, wanted, atol=1e-2)
    tensors = made.file_tensors()
    made.restore()
    assert tensors["lora_unet_blocks_0_attn.lora_up.weight"].shape == (12, 6 if split == "True" else 2)
    for again in ({}, {"split_qkv": "True"}) if split == "True" else ({},):
        other = read(parts(model), tensors, **again)
        torch.testing.assert_close(model(x), wanted)
        assert other.file_tensors().keys() == tensors.keys()
        assert all(torch.equal(other.file_tensors()[name], tensor) for name, tensor in tensors.items())
        other.restore()
    other.merge_to(weights_sd=tensors)
    torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-5)


def test_norms_are_limited_for_all_of_them() -> None:
    made = fill(create(parts(toy()), conv_dim="3", split_qkv="1"))
    made.apply_to()
    limit = float(torch.stack([adapter.delta_norm() for adapter in made.adapters]).median())
    made.apply_max_norm_regularization(limit)
    after = torch.stack([adapter.delta().norm() for adapter in made.adapters])
    assert float(after.max()) == pytest.approx(limit)


def test_of_a_file_rules_give_rates_and_leave_out(caplog: pytest.LogCaptureFixture) -> None:
    model = toy()
    made = fill(create(parts(model)))
    made.apply_to()
    tensors = made.file_tensors()
    made.restore()
    again = read(parts(model), tensors, rules=r"blocks\.0: train=no; attn: lr=0.5 dim=9")
    assert ranks(again) == {"unet_blocks_1_attn": 2, "unet_blocks_1_point": 2}
    assert [adapter.lr for adapter in again.created] == [0.5, None]
    assert "dim and alpha have no effect" in caplog.text
    again.restore()
    with pytest.raises(UserError, match="matches no module"):
        read(parts(model), tensors, rules="conv: lr=1")
    with pytest.raises(DataError, match="fits this model"):
        read(parts(model), {"lora_unet_other.lora_down.weight": torch.zeros(1, 1)})


def test_a_part_that_is_trained_keeps_some_module() -> None:
    with pytest.raises(UserError, match=r"no module of unet.*--network_train_text_encoder_only"):
        create(parts(toy(), Encoder()), rules="blocks: train=no")
    with pytest.raises(UserError, match=r"no module of textencoder 1.*--network_train_unet_only"):
        create(parts(toy(), Encoder()), rules="clip: train=no")
    assert not create(parts()).created


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"algo": "lorra"}, "did you mean lora"),
        ({"conv_dim": "2.5"}, "no whole number"),
        ({"conv_dim": "-2"}, "out of range"),
        ({"dora_wd": "perhaps"}, "neither True nor False"),
    ],
)
def test_wrong_arguments(given: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        create(parts(toy()), **given)


def test_other_kinds_are_not_split() -> None:
    for name in creating.kinds.KINDS:
        if name != "lora":
            with pytest.raises(UserError, match=f"not {name}"):
                create(parts(toy()), algo=name, split_qkv="True")
