"""Separate adapters in a fused layer: values, gradients, files, and those of older scripts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from library.log import DataError
from networks.factored import Dropouts
from networks.low_rank import LoraAdapter
from networks.reading import Rank
from networks.splitting import SplitAdapter, as_trained, diagonal, of_file
from networks.targets import Target

PARTS = pytest.mark.parametrize("parts", [(6, 6, 6), (6, 6, 6, 20)])


def target(parts: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Target:
    torch.manual_seed(0)
    module = nn.Linear(6, sum(parts), dtype=dtype).requires_grad_(False)
    return Target("m", "m", module, parts)


def split(place: Target, rank: int = 2, alpha: float = 3.0, **settings: object) -> SplitAdapter:
    torch.manual_seed(1)
    made = SplitAdapter(place, "unet", size=Rank(rank, alpha), **settings)  # type: ignore[arg-type]
    nn.init.normal_(made.lora_up.blocks)
    return made


def whole(place: Target, tensors: dict[str, Tensor]) -> LoraAdapter:
    """How a reader that knows nothing of parts takes a file."""
    down = tensors["lora_down.weight"]
    made = LoraAdapter("m", place.module, "unet", rank=len(down), alpha=float(tensors["alpha"]))
    made.load(tensors)
    return made


def apart(x: Tensor, place: Target, down: Tensor, blocks: Tensor, scale: float) -> Tensor:
    """Three or four ordinary LoRAs, one for each part."""
    module = place.module
    downs, ups = down.chunk(len(place.parts)), blocks.split_with_sizes(list(place.parts))
    pieces = zip(module.weight.split(place.parts), downs, ups, strict=True)  # type: ignore[operator]
    return torch.cat([F.linear(x, w + scale * b @ a) for w, a, b in pieces], -1) + module.bias


@PARTS
def test_output_and_gradients_are_those_of_separate_adapters(parts: tuple[int, ...]) -> None:
    place = target(parts, torch.double)
    made = split(place, multiplier=0.5).double()
    x = torch.randn(2, 4, 6, dtype=torch.double, requires_grad=True)
    inputs = [x, made.lora_down.weight, made.lora_up.blocks]
    wanted = apart(*([inputs[0], place, *inputs[1:], 0.5 * 3 / 2]))  # type: ignore[arg-type]
    wanted_gradients = torch.autograd.grad(wanted.square().sum(), inputs)
    made.hook()
    out = place.module(x)
    torch.testing.assert_close(out, wanted)
    torch.testing.assert_close(torch.autograd.grad(out.square().sum(), inputs), wanted_gradients)


@PARTS
@pytest.mark.parametrize("alpha", [3.0, 1, 0])
def test_the_file_gives_every_reader_the_same_output(parts: tuple[int, ...], alpha: float) -> None:
    place = target(parts)
    made = split(place, alpha=alpha)
    tensors = made.file_tensors()
    count = len(parts)
    assert {key: tuple(tensor.shape) for key, tensor in tensors.items()} == {
        "alpha": (),
        "lora_down.weight": (2 * count, 6),
        "lora_up.weight": (sum(parts), 2 * count),
    }
    assert float(tensors["alpha"]) == count * (alpha or 2)
    assert tensors["alpha"].dtype == (torch.float32 if isinstance(alpha, float) else torch.int64)
    assert not torch.signbit(tensors["lora_up.weight"][tensors["lora_up.weight"] == 0]).any()
    again = of_file(place, "unet", tensors, 1.0, Dropouts())
    assert again is not None
    assert again.fits(tensors)
    again.load(tensors)
    x = torch.randn(3, 6)
    outputs = []
    for reader in (made, whole(place, tensors), again):
        reader.hook()
        outputs.append(place.module(x))
        reader.unhook()
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])
    for name, tensor in made.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_a_new_one_changes_nothing_and_starts_like_separate_ones() -> None:
    place = target((6, 6, 6))
    made = SplitAdapter(place, "unet", size=Rank(50, 1))
    x = torch.randn(3, 6)
    before = place.module(x)
    made.hook()
    assert torch.equal(place.module(x), before)
    down = made.lora_down.weight
    assert 0.9 / 6**0.5 < float(down.detach().abs().max()) <= 1 / 6**0.5
    assert {name for name, _ in made.named_parameters()} == {"lora_down.weight", "lora_up.blocks"}
    assert made.lora_up.blocks.numel() == 18 * 50  # a third of that of the matrix in the file


@PARTS
def test_norms_and_scaling(parts: tuple[int, ...]) -> None:
    made = split(target(parts))
    before = made.delta()
    torch.testing.assert_close(made.delta_norm(), before.norm())
    made.scale_by(torch.tensor(0.3))
    torch.testing.assert_close(made.delta(), before * 0.3)


def test_the_state_is_exact_in_any_type() -> None:
    made, again = split(target((6, 6, 6))).bfloat16(), split(target((6, 6, 6)), alpha=9.0).bfloat16()
    again.load_state_dict(made.state_dict())
    assert again.scale == made.scale == 1.5
    assert torch.equal(again.delta(), made.delta())
    assert made.file_tensors()["lora_up.weight"].dtype == torch.bfloat16


def test_dropping_ranks_and_elements() -> None:
    place = target((6, 6, 6))
    made = split(place, dropouts=Dropouts(neuron=0.2, rank=0.5))
    x = torch.randn(1, 3, 6).expand(3000, 3, 6)
    plain, full = place.module(x[0]), F.linear(x[0], made.delta())
    made.hook()
    torch.manual_seed(0)
    changes = place.module(x) - plain
    assert not torch.equal(changes[0], changes[1])
    torch.testing.assert_close(changes.mean(0), full, rtol=0.3, atol=0.3)


def test_it_costs_no_more_than_an_ordinary_one_of_the_same_file() -> None:
    place = target((6, 6, 6, 20))
    x = torch.randn(50, 6, requires_grad=True)
    counts = []
    for made in (split(place), LoraAdapter("m", place.module, "unet", rank=8, alpha=1)):
        made.hook()
        with FlopCounterMode(display=False) as counter:
            place.module(x).sum().backward()
        made.unhook()
        counts.append(counter.get_total_flops())
    assert counts[0] <= counts[1]


def test_what_is_not_split_is_refused() -> None:
    place = target((6, 6, 6))
    tensors = split(place).file_tensors()
    dense = {**tensors, "lora_up.weight": tensors["lora_up.weight"] + 1}
    made = split(place)
    with pytest.raises(DataError, match="block-diagonal"):
        made.load(dense)
    with pytest.raises(DataError, match=r"\(18, 9\) in the file, \(18, 6\) in this network"):
        made.load({**tensors, "lora_up.weight": torch.zeros(18, 9)})
    with pytest.raises(DataError, match="rank 4 isn't a multiple of 3"):
        of_file(
            place,
            "unet",
            {"lora_down.weight": torch.zeros(4, 6), "lora_up.weight": torch.zeros(18, 4)},
            1.0,
            Dropouts(),
        )
    assert of_file(place, "unet", {"hada_w1_a": torch.zeros(4, 6)}, 1.0, Dropouts()) is None
    assert of_file(place._replace(parts=()), "unet", tensors, 1.0, Dropouts()) is None
    assert diagonal(torch.eye(3), (1, 1, 1)) is not None
    assert diagonal(torch.ones(3, 3), (1, 1, 1)) is None


def a_file(alphas: dict[str, float]) -> tuple[dict[str, Tensor], dict[str, tuple[int, ...]]]:
    """Modules of two, three and four parts with these alphas, block-diagonal as needed."""
    parts: dict[str, tuple[int, ...]] = {"proj": (), "qkv": (6, 6, 6), "linear1": (6, 6, 6, 20)}
    tensors = {}
    for name, alpha in alphas.items():
        if parts[name]:
            made = split(target(parts[name])).file_tensors()
        else:
            made = {"lora_down.weight": torch.randn(2, 6), "lora_up.weight": torch.randn(6, 2)}
        tensors |= {f"{name}.{key}": tensor for key, tensor in made.items()}
        tensors[f"{name}.alpha"] = torch.tensor(alpha)
    return tensors, parts


@pytest.mark.parametrize(
    ("alphas", "wanted"),
    [
        ({"proj": 2.0, "qkv": 2.0, "linear1": 2.0}, {"proj": 2.0, "qkv": 6.0, "linear1": 8.0}),  # an older script's
        ({"qkv": 2.0, "linear1": 2.0}, {"qkv": 6.0, "linear1": 8.0}),
        ({"proj": 2.0, "qkv": 6.0, "linear1": 8.0}, {"proj": 2.0, "qkv": 6.0, "linear1": 8.0}),  # ours
        ({"qkv": 6.0, "linear1": 8.0}, {"qkv": 6.0, "linear1": 8.0}),
        ({"qkv": 2.0}, {"qkv": 2.0}),  # nothing to tell them apart by
    ],
)
def test_the_alpha_of_older_scripts_is_understood(alphas: dict[str, float], wanted: dict[str, float]) -> None:
    tensors, parts = a_file(alphas)
    found = as_trained(tensors, parts)
    assert {name: float(found[f"{name}.alpha"]) for name in alphas} == wanted
    assert as_trained(found, parts) is found
    assert {name for name in tensors if found[name] is not tensors[name]} <= {f"{name}.alpha" for name in alphas}


def test_a_file_with_one_alpha_that_is_not_split_stays() -> None:
    tensors, parts = a_file({"proj": 2.0, "qkv": 2.0})
    tensors["qkv.lora_up.weight"] = torch.randn(18, 6)
    assert as_trained(tensors, parts) is tensors
