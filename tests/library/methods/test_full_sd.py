"""Training of the parts of SD and SDXL themselves: what moves at which rate, by option."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from library import options
from library.log import UserError
from library.methods import block_rates
from library.methods.base import average_gradients, trained_table
from library.methods.full import Full
from library.option_groups import FINE_TUNE, FLUX_TRAIN_NETWORK, SDXL_TRAIN, TRAIN_DB
from library.option_types import Script
from library.train import combinations
from library.types import DENOISER, Models
from tests import tiny_sd

SD, XL = ("text_encoder",), ("text_encoder", "text_encoder_2")
TE, TE1, TE2 = "text_encoder", "text_encoder1", "text_encoder2"
DREAM, TUNE = (TRAIN_DB, SD), (FINE_TUNE, SD)
BOTH = "--train_text_encoder"
ROWS: list[tuple[tuple[Script, Sequence[str]], str, dict[str, float]]] = [
    (DREAM, "--learning_rate 1e-4", {DENOISER: 1e-4, TE: 1e-4}),
    (DREAM, "--learning_rate 1e-4 --learning_rate_te 2e-5", {DENOISER: 1e-4, TE: 2e-5}),
    (DREAM, "--learning_rate 1e-4 --learning_rate_te 0", {DENOISER: 1e-4}),
    (DREAM, "--learning_rate 0 --learning_rate_te 1e-5", {TE: 1e-5}),
    (DREAM, "--learning_rate 1e-4 --stop_text_encoder_training 5", {DENOISER: 1e-4, TE: 1e-4}),
    (DREAM, "--learning_rate 1e-4 --stop_text_encoder_training -1", {DENOISER: 1e-4}),
    (DREAM, "--learning_rate 1e-4 --stop_text_encoder_training 0", {DENOISER: 1e-4}),
    (DREAM, "", {DENOISER: 2e-6, TE: 2e-6}),
    (TUNE, "--learning_rate 1e-4", {DENOISER: 1e-4}),
    (TUNE, "--learning_rate 1e-4 --learning_rate_te 1e-5", {DENOISER: 1e-4}),
    (TUNE, f"--learning_rate 1e-4 {BOTH}", {DENOISER: 1e-4, TE: 1e-4}),
    (TUNE, f"--learning_rate 1e-4 {BOTH} --learning_rate_te 1e-5", {DENOISER: 1e-4, TE: 1e-5}),
    (TUNE, f"--learning_rate 1e-4 {BOTH} --learning_rate_te 0", {DENOISER: 1e-4}),
    (TUNE, f"--learning_rate -1e-4 {BOTH} --learning_rate_te -1e-5", {DENOISER: -1e-4, TE: -1e-5}),
    ((SDXL_TRAIN, XL), "--learning_rate 1e-4", {DENOISER: 1e-4}),
    ((SDXL_TRAIN, XL), "--learning_rate 1e-4 --learning_rate_te1 1e-5", {DENOISER: 1e-4}),
    ((SDXL_TRAIN, XL), f"--learning_rate 1e-4 {BOTH}", {DENOISER: 1e-4, TE1: 1e-4, TE2: 1e-4}),
    ((SDXL_TRAIN, XL), f"--learning_rate 1e-4 {BOTH} --learning_rate_te1 0", {DENOISER: 1e-4, TE2: 1e-4}),
    ((SDXL_TRAIN, XL), f"--learning_rate 1e-4 {BOTH} --learning_rate_te2 0", {DENOISER: 1e-4, TE1: 1e-4}),
    ((SDXL_TRAIN, XL), f"--learning_rate 0 {BOTH} --learning_rate_te1 1e-5", {TE1: 1e-5}),
    ((SDXL_TRAIN, XL), f"--learning_rate 0 {BOTH} --learning_rate_te2 1e-5", {TE2: 1e-5}),
]


def all_rates() -> list[tuple[tuple[Script, Sequence[str]], str, dict[str, float]]]:
    """Need A5: each rate of SDXL given, 0, and absent."""
    found = []
    for rates in itertools.product(("3e-3", "0", None), repeat=3):
        flags = zip(("learning_rate", "learning_rate_te1", "learning_rate_te2"), rates, strict=True)
        given = " ".join(f"--{flag} {rate}" for flag, rate in flags if rate is not None)
        default = 2e-6 if rates[0] is None else float(rates[0])
        own = [default, *(default if rate is None else float(rate) for rate in rates[1:])]
        expected = {name: rate for name, rate in zip((DENOISER, TE1, TE2), own, strict=True) if rate}
        if expected:
            found.append(((SDXL_TRAIN, XL), f"{BOTH} {given}", expected))
    return found


ROWS += all_rates()


class Encoder(nn.Module):
    """Two layers, of which the last may have no effect."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[1](self.layers[0](x))


def attached(script: Script, names: Sequence[str], *given: str, **unused: Sequence[str]) -> tuple[Full, Models]:
    method = Full.from_options(options.parse(script, list(given)), names)
    models = Models(denoiser=nn.Linear(2, 2), encoders={name: Encoder() for name in names}, unused=unused)
    method.attach(models)
    method.prepare(SimpleNamespace(num_processes=1), models)
    return method, models


@pytest.mark.parametrize(("where", "given", "expected"), ROWS, ids=[f"{row[0][0].name} {row[1]}" for row in ROWS])
def test_exactly_what_the_table_says_moves(
    where: tuple[Script, Sequence[str]], given: str, expected: dict[str, float]
) -> None:
    method, models = attached(*where, *given.split())
    groups = method.param_groups()
    assert {group.name: group.lr for group in groups} == expected
    rows = trained_table(groups, method.frozen())
    trained = {row.component for row in rows if row.parameters}
    everything = {DENOISER: models.denoiser, **models.encoders}
    assert trained | {row.component for row in rows if not row.parameters} == everything.keys()
    assert method.trained_encoders() == trained - {DENOISER}
    assert (DENOISER in method.frozen()) == (DENOISER not in trained)
    before = {name: weights(part) for name, part in everything.items()}
    optimizer = torch.optim.SGD([group.for_optimizer() for group in groups])
    x = torch.ones(1, 2)
    for encoder in models.encoders.values():
        x = encoder(x)
    assert models.denoiser is not None
    models.denoiser(x).square().sum().backward()
    optimizer.step()
    assert {name for name, part in everything.items() if moved(before[name], part)} == trained
    prefixes = {name.split(".")[0] for name in method.state_dict()}
    assert prefixes == ({"weight", "bias"} if trained == {DENOISER} else trained)
    shapes = {name: {key: tuple(tensor.shape) for key, tensor in part.items()} for name, part in before.items()}
    assert method.trained_elements(shapes) == sum(row.parameters for row in rows)


def weights(part: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in part.state_dict().items()}


def moved(before: Mapping[str, Tensor], part: nn.Module) -> bool:
    return any(not tensor.equal(before[name]) for name, tensor in part.state_dict().items())


@pytest.mark.parametrize(
    ("script", "names", "given"),
    [
        (TRAIN_DB, SD, "--learning_rate 0"),
        (FINE_TUNE, SD, "--learning_rate 0 --learning_rate_te 1e-4"),
        (SDXL_TRAIN, XL, f"--learning_rate 0 {BOTH} --learning_rate_te1 0"),
        (SDXL_TRAIN, XL, "--block_lr " + ",".join("0" * 23)),
    ],
)
def test_nothing_to_train_is_an_error(script: Script, names: Sequence[str], given: str) -> None:
    with pytest.raises(UserError, match="nothing would be trained"):
        Full.from_options(options.parse(script, given.split()), names)


def test_a_negative_rate_goes_uphill() -> None:
    losses = []
    for rate in ("0.1", "-0.1"):
        torch.manual_seed(0)
        method, models = attached(FINE_TUNE, SD, "--learning_rate", rate)
        (group,) = method.param_groups()
        optimizer = torch.optim.AdamW([group.for_optimizer()])  # which refuses negative rates
        assert models.denoiser is not None
        for _ in range(3):
            loss = models.denoiser(torch.ones(1, 2)).square().sum()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert losses[2] < losses[0] < losses[5]
    assert trained_table(method.param_groups())[0].lr == "-0.1"


def test_what_is_unused_is_not_trained() -> None:
    method, models = attached(SDXL_TRAIN, XL, BOTH, text_encoder=["layers.1."])
    groups = {group.name: group for group in method.param_groups()}
    assert [len(groups[name].params) for name in (TE1, TE2)] == [2, 4]
    assert not models.encoders["text_encoder"].layers[1].weight.requires_grad


def test_states_fit_what_is_trained() -> None:
    method, _ = attached(SDXL_TRAIN, XL, BOTH)
    other, models = attached(SDXL_TRAIN, XL, BOTH)
    other.load_state_dict(method.state_dict())
    assert all(tensor.equal(other.state_dict()[name]) for name, tensor in method.state_dict().items())
    assert models.denoiser is not None
    first = [tensor.clone() for tensor in models.denoiser.state_dict().values()]
    alone, _ = attached(SDXL_TRAIN, XL, BOTH, "--learning_rate_te2", "0")
    with pytest.raises(KeyError, match="text_encoder_2"):
        alone.load_state_dict(method.state_dict())
    assert all(map(torch.equal, first, models.denoiser.state_dict().values()))


# the text encoder stops


def test_the_text_encoder_stops_at_its_step() -> None:
    method, models = attached(TRAIN_DB, SD, "--learning_rate", "0.1", "--stop_text_encoder_training", "2")
    encoder, groups = models.encoders["text_encoder"], method.param_groups()
    optimizer = torch.optim.AdamW([group.for_optimizer() for group in groups])
    stood = []
    for step in range(1, 5):
        before = weights(encoder)
        assert models.denoiser is not None
        models.denoiser(encoder(torch.ones(1, 2))).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        method.after_step(step)
        stood.append(not moved(before, encoder))
    assert stood == [False, False, True, True]
    assert not encoder.training
    method.train_mode(True)
    assert not encoder.training
    assert models.denoiser.training
    assert [group.name for group in method.param_groups()] == [DENOISER, TE]


@pytest.mark.parametrize(("step", "stopped"), [(0, False), (1, False), (2, True), (9, True)])
def test_a_resumed_run_knows_whether_it_has_stopped(step: int, stopped: bool) -> None:
    method, models = attached(TRAIN_DB, SD, "--stop_text_encoder_training", "2")
    method.begin_after(step)
    assert models.encoders["text_encoder"].layers[0].weight.requires_grad == (not stopped)


def test_stopped_encoders_get_no_gradients_from_other_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("library.methods.base.average_gradients", lambda params, *_: seen.append(list(params)))
    assert average_gradients
    method, _ = attached(TRAIN_DB, SD, "--stop_text_encoder_training", "1")
    accelerator = SimpleNamespace(num_processes=2, device=torch.device("cpu"))
    method.reduce_gradients(accelerator)
    method.after_step(1)
    method.reduce_gradients(accelerator)
    assert [len(params) for params in seen] == [6, 2]


# rates of blocks

EXPECTED = {
    **dict.fromkeys(("time_embedding.linear_1", "time_embedding.linear_2"), 0),
    **dict.fromkeys(("add_embedding.linear_1", "add_embedding.linear_2"), 0),
    "conv_in": 1,
    "down_blocks.0.resnets.0.conv1": 2,
    "down_blocks.0.resnets.1.norm2": 3,
    "down_blocks.0.downsamplers.0.conv": 4,
    "down_blocks.1.resnets.0.conv1": 5,
    "down_blocks.1.attentions.0.proj_in": 5,
    "down_blocks.1.attentions.1.transformer_blocks.0.attn1.to_q": 6,
    "down_blocks.1.downsamplers.0.conv": 7,
    "down_blocks.2.attentions.0.transformer_blocks.1.ff.net.2": 8,
    "down_blocks.2.resnets.1.time_emb_proj": 9,
    "mid_block.resnets.0.conv1": 10,
    "mid_block.attentions.0.norm": 11,
    "mid_block.resnets.1.conv2": 12,
    "up_blocks.0.resnets.0.conv_shortcut": 13,
    "up_blocks.0.attentions.1.proj_out": 14,
    "up_blocks.0.resnets.2.conv1": 15,
    "up_blocks.0.upsamplers.0.conv": 15,
    "up_blocks.1.attentions.0.proj_in": 16,
    "up_blocks.1.resnets.1.conv1": 17,
    "up_blocks.1.upsamplers.0.conv": 18,
    "up_blocks.2.resnets.0.conv1": 19,
    "up_blocks.2.resnets.1.conv1": 20,
    "up_blocks.2.resnets.2.conv2": 21,
    "conv_norm_out": 22,
    "conv_out": 22,
}
"""Written by hand, after the layout of SDXL."""


@pytest.fixture(scope="module")
def unet() -> nn.Module:
    return tiny_sd.unet("xl")


def shapes_of(unet: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in unet.state_dict().items()}


def test_blocks_are_numbered_as_the_option_means(unet: nn.Module) -> None:
    found = block_rates.blocks_of(shapes_of(unet))
    assert found.keys() == unet.state_dict().keys()
    assert {name: found[f"{name}.weight"] for name in EXPECTED} == EXPECTED
    assert set(found.values()) == set(range(23))


def test_each_block_has_its_rate_and_zeros_are_frozen(unet: nn.Module) -> None:
    rates = [0.0 if number in (3, 11) else 1e-6 * (number + 1) for number in range(23)]
    rates[5] = -2e-6
    given = ("--learning_rate", "1e-4", "--block_lr", ",".join(f"{rate:g}" for rate in rates))
    method = Full.from_options(options.parse(SDXL_TRAIN, [*given]), XL)
    method.attach(Models(denoiser=unet, encoders={name: Encoder() for name in XL}))
    groups = method.param_groups()
    assert {group.name: group.lr for group in groups} == {
        f"block{number}": pytest.approx(rate) for number, rate in enumerate(rates) if rate
    }
    assert groups[3].for_optimizer()["lr"] == pytest.approx(5e-6)
    assert {f"{DENOISER} block 3", f"{DENOISER} block 11"} <= method.frozen().keys()
    assert DENOISER not in method.frozen()
    block = block_rates.blocks_of(shapes_of(unet))
    for name, parameter in unet.named_parameters():
        assert parameter.requires_grad == (block[name] not in (3, 11)), name
    assert method.trained_elements({DENOISER: shapes_of(unet)}) == sum(
        parameter.numel() for group in groups for parameter in group.params
    )


@pytest.mark.parametrize(
    ("given", "what"),
    [(",".join(["1e-5"] * 22), "22 rates for 23 blocks"), ("1e-5,fast", "isn't a list of numbers")],
)
def test_a_wrong_list_is_one_line(given: str, what: str) -> None:
    with pytest.raises(UserError, match=what) as caught:
        Full.from_options(options.parse(SDXL_TRAIN, ["--block_lr", given]), XL)
    assert "\n" not in str(caught.value)


def test_other_layouts_have_no_such_blocks() -> None:
    with pytest.raises(UserError, match=r"input_blocks\.9"):
        block_rates.blocks_of(shapes_of(tiny_sd.unet("1")))


# combinations of options


@pytest.mark.parametrize(
    ("script", "given", "what"),
    [
        (SDXL_TRAIN, "--fused_optimizer_groups 4 --gradient_accumulation_steps 2", "each backward pass"),
        (SDXL_TRAIN, "--fused_optimizer_groups 4 --mixed_precision fp16", "fp16 are scaled"),
        (SDXL_TRAIN, "--fused_optimizer_groups 4 --fused_backward_pass", "both step in the backward pass"),
        (SDXL_TRAIN, "--fused_optimizer_groups 4 --optimizer_type AdamWScheduleFree", "can't be split"),
        (SDXL_TRAIN, "--learning_rate_te1 1e-5", "does nothing here"),
        (FINE_TUNE, "--learning_rate_te 1e-5", "does nothing here"),
        (TRAIN_DB, "--learning_rate_te 1e-5 --stop_text_encoder_training -1", "does nothing here"),
        (TRAIN_DB, "--no_token_padding --max_token_length 150", "chunks of 75"),
        (FLUX_TRAIN_NETWORK, "--learning_rate -1e-4", "negative rate"),
    ],
)
def test_what_does_not_go_together(script: Script, given: str, what: str) -> None:
    found = combinations.check(options.parse(script, given.split()))
    assert any(what in finding.what for finding in found), found


@pytest.mark.parametrize("script", [TRAIN_DB, FINE_TUNE, SDXL_TRAIN])
def test_plain_commands_have_nothing_wrong(script: Script) -> None:
    assert not combinations.check(options.parse(script, ["--learning_rate", "1e-5"]))
