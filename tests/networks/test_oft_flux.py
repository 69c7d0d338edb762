"""Rotations: the mathematics against the reference's numbers, files, training, merging."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from library import files
from library.log import DataError, UserError
from library.models.flux import Flux, FluxConfig
from library.types import DENOISER
from networks import oft_flux
from networks.base import Network
from networks.rotation import RotationAdapter, turn
from tests.networks import tiny_models

GOLDEN = Path(__file__).parents[1] / "golden"


def adapter(module: nn.Module, blocks: int = 4, parts: tuple[int, ...] = (), alpha: float = 0.01) -> RotationAdapter:
    sizes = parts or (module.weight.shape[0],)  # type: ignore[index]
    made = RotationAdapter("m", module, DENOISER, blocks=[blocks] * len(sizes), sizes=sizes, alpha=alpha)
    torch.manual_seed(2)
    with torch.no_grad():
        for part in made.oft_blocks:
            part.normal_(std=0.2)
    return made


@pytest.mark.parametrize(
    ("case", "alpha", "multiplier"),
    [("alpha=0.01", 0.01, 1.0), ("alpha=10", 10.0, 1.0), ("alpha=10,multiplier=0.5", 10.0, 0.5)],
)
def test_the_numbers_of_the_reference(case: str, alpha: float, multiplier: float) -> None:
    golden = json.loads((GOLDEN / "oft.json").read_text("utf-8"))
    module = nn.Linear(3, 8)
    module.load_state_dict({"weight": torch.tensor(golden["W"]), "bias": torch.tensor(golden["bias"])})
    module.requires_grad_(False)
    made = RotationAdapter("m", module, DENOISER, blocks=[2], sizes=[8], alpha=alpha, multiplier=multiplier)
    made.load({"oft_blocks.0": torch.tensor(golden["oft_blocks"])})
    rotation = torch.eye(4) + multiplier * made.turns()[0]
    torch.testing.assert_close(rotation, torch.tensor(golden[case]["R"]), rtol=1e-5, atol=1e-6)
    x = torch.tensor(golden["x"])
    torch.testing.assert_close(made(x), torch.tensor(golden[case]["y"]), rtol=1e-5, atol=1e-6)
    module.weight += multiplier * made.delta()
    torch.testing.assert_close(module(x), torch.tensor(golden[case]["y"]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("everywhere", [False, True])
def test_names_and_shapes_at_full_size_are_those_of_the_reference(everywhere: bool) -> None:
    golden = json.loads((GOLDEN / "oft_keys.json").read_text("utf-8"))
    with torch.device("meta"):
        made = oft_flux.create_network(
            1.0, 4, 1e-3, None, [], Flux(FluxConfig()), **({"enable_all_linear": "True"} if everywhere else {})
        )
        found = {
            f"{one.name}.{key}": list(tensor.shape) for one in made.created for key, tensor in one.state_dict().items()
        }
    wanted = golden["flux_attention_only"]
    assert len(made.created) == (304 if everywhere else 76)
    assert found == ({**wanted, **golden["flux_extra_with_enable_all_linear"]} if everywhere else wanted)


MODULES = [
    (lambda: nn.Linear(6, 16), ()),
    (lambda: nn.Linear(40, 16, bias=False), (8, 4, 4)),
    (lambda: nn.Conv2d(3, 8, 3, padding=1), ()),
    (lambda: nn.Conv2d(3, 16, 3, stride=2), (8, 8)),
]
each_module = pytest.mark.parametrize(("make", "parts"), MODULES)


def inputs(module: nn.Module) -> Tensor:
    shape = (2, 3, module.in_features) if isinstance(module, nn.Linear) else (2, 3, 6, 6)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@each_module
@pytest.mark.parametrize("multiplier", [1.0, 0.4, 0.0])
@pytest.mark.parametrize("covered", [False, True])
def test_the_answer_is_that_of_the_rotated_weight(make, parts, multiplier: float, covered: bool) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    module = make().requires_grad_(False)
    made, x = adapter(module, parts=parts), inputs(module)
    made.multiplier, made.covers_a_hook = multiplier, covered
    weight = module.weight + multiplier * made.delta()
    expected = torch.func.functional_call(module, {"weight": weight}, (x,))
    for training in (True, False):
        made.train(training)
        torch.testing.assert_close(made(x), expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(made(x), expected, rtol=1e-5, atol=1e-5)
        made.multiplier = 2 * multiplier
        twice = torch.func.functional_call(module, {"weight": module.weight + 2 * multiplier * made.delta()}, (x,))
        torch.testing.assert_close(made(x), twice, rtol=1e-5, atol=1e-5)
    full = module.weight.flatten(1)
    rotated = (module.weight + made.delta()).flatten(1)
    torch.testing.assert_close(rotated.T @ rotated, full.T @ full, rtol=1e-4, atol=1e-5)


def test_kept_rotations_follow_the_weights() -> None:
    module = nn.Linear(6, 16).requires_grad_(False)
    made = adapter(module, alpha=10).eval()
    x = inputs(module)
    with torch.no_grad():
        before = made(x)
        made.oft_blocks[0].mul_(0.1)
        after = made(x)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, made.train()(x))


@pytest.mark.parametrize("alpha", [0.01, 10.0])
def test_gradients_of_the_rotation(alpha: float) -> None:
    blocks = torch.randn(2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(lambda blocks: turn(blocks, alpha), (blocks,))


@each_module
def test_gradients_of_the_answer(make, parts) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    module = make().double().requires_grad_(False)
    made, x = adapter(module, parts=parts).double(), inputs(module).double().requires_grad_()
    parameters = list(made.oft_blocks)
    got = torch.autograd.grad(made(x).square().sum(), [x, *parameters])
    turns = made.turns()
    weight = module.weight.flatten(1)
    rotated, at = [], 0
    for part in turns:
        count, size, _ = part.shape
        rows = weight[at : at + count * size].view(count, size, -1)
        rotated.append((rows + part.mT @ rows).flatten(0, 1))
        at += count * size
    new = torch.cat(rotated).view_as(module.weight)
    wanted = torch.autograd.grad(
        torch.func.functional_call(module, {"weight": new}, (x,)).square().sum(), [x, *parameters]
    )
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_at_zero_gradients_are_finite_and_the_answer_is_the_same() -> None:
    module = nn.Linear(6, 16).requires_grad_(False)
    made = RotationAdapter("m", module, DENOISER, blocks=[4], sizes=[16], alpha=1e-3)
    x = inputs(module)
    out = made(x)
    torch.testing.assert_close(out, module(x), rtol=1e-6, atol=1e-6)
    (out * inputs(nn.Linear(16, 1))).sum().backward()
    gradient = made.oft_blocks[0].grad
    assert gradient is not None
    assert bool(torch.isfinite(gradient).all())
    assert bool(gradient.any())


def test_norms_are_limited() -> None:
    module = nn.Linear(6, 16).requires_grad_(False)
    made = adapter(module, alpha=0.02)
    network = Network([made])
    network.apply_to()
    limit = float(made.delta_norm()) / 2
    for _ in range(3):
        network.apply_max_norm_regularization(limit)
    assert float(made.delta_norm()) == pytest.approx(limit, rel=0.02)
    before = made.oft_blocks[0].clone()
    network.apply_max_norm_regularization(limit * 10)
    assert torch.equal(before, made.oft_blocks[0])


def test_in_bfloat16_small_rotations_survive() -> None:
    module = nn.Linear(6, 16).requires_grad_(False)
    made = adapter(module, alpha=1e-3)
    x = inputs(module).bfloat16()
    expected = made(x.float()) - module(x.float())
    module.bfloat16()
    got = (made.bfloat16()(x).float() - module(x).float()).detach()
    assert float((got - expected).norm() / expected.detach().norm()) < 0.5  # of a change of 1 %, rounded to 0.4 %


def test_a_network_is_trained_saved_read_and_merged(tmp_path: Path) -> None:
    model, given = tiny_models.flux(), tiny_models.flux_inputs()
    base = model(**given)
    made = oft_flux.create_network(1.0, 4, 1e-3, None, [], model, enable_all_linear="true")
    made.apply_to(None, model)
    torch.testing.assert_close(model(**given), base, rtol=1e-4, atol=1e-4)
    groups, names = made.prepare_optimizer_params_with_multiple_te_lrs([], 1e-2, 1e-2)
    assert names == ["unet"]
    optimizer = torch.optim.AdamW(groups)
    losses = []
    for _ in range(4):
        loss = (model(**given) - 1).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    made.eval()
    trained = model(**given)
    path = tmp_path / "oft.safetensors"
    made.save_weights(path, None, {})
    assert {key.split(".")[1] for key in files.header(path).tensors} == {"oft_blocks", "alpha"}
    made.restore()
    torch.testing.assert_close(model(**given), base)

    read, weights = oft_flux.create_network_from_weights(1.0, path, None, [], model, for_inference=True)
    read.apply_to(None, model)
    assert read.load_weights(path).startswith(f"{len(made.created)} modules loaded, 0 not")
    torch.testing.assert_close(model(**given), trained, rtol=1e-5, atol=1e-5)
    read.restore()
    read.merge_to(None, model, weights)
    torch.testing.assert_close(model(**given), trained, rtol=1e-4, atol=1e-4)


def test_parts_follow_the_model() -> None:
    made = oft_flux.create_network(1.0, 4, None, None, [], tiny_models.flux(), enable_all_linear="True")
    shapes = {one.name: [tuple(part.shape) for part in one.oft_blocks] for one in made.created}  # type: ignore[union-attr]
    assert shapes["oft_unet_double_blocks_0_img_attn_qkv"] == [(4, 16, 16)] * 3
    assert shapes["oft_unet_double_blocks_0_img_attn_proj"] == [(4, 16, 16)]
    assert shapes["oft_unet_single_blocks_0_linear1"] == [(4, 16, 16)] * 3 + [(4, 32, 32)]
    assert float(made.created[0].alpha) == pytest.approx(1e-3)  # type: ignore[arg-type]


@pytest.mark.parametrize(("blocks", "words"), [(5, "give 4 or 8"), (0, "give 1,"), (100, "give 64,")])
def test_a_number_of_blocks_that_does_not_divide_is_refused(blocks: int, words: str) -> None:
    with pytest.raises(UserError, match=r"64 outputs of double_blocks\.0\.img_attn\.qkv") as error:
        oft_flux.create_network(1.0, blocks, None, None, [], tiny_models.flux())
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(UserError, match="unknown argument"):
        oft_flux.create_network(1.0, 4, None, None, [], tiny_models.flux(), enable_all_linears="True")
    with pytest.raises(UserError, match="neither True nor False"):
        oft_flux.create_network(1.0, 4, None, None, [], tiny_models.flux(), enable_all_linear="maybe")


def test_a_limit_that_limits_nothing_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    oft_flux.create_network(1.0, 4, 1, None, [], tiny_models.flux())
    assert "--network_alpha 1 hardly limits" in caplog.text


def test_only_a_dropout_that_would_drop_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_models.flux()
    made = oft_flux.create_network(1.0, 4, None, None, [], model, neuron_dropout=0.0, dropout="0")
    assert "dropout" not in caplog.text
    made.apply_to(None, model)
    oft_flux.create_network_from_weights(1.0, None, None, [], model, made.file_tensors(), dropout="0.1")
    assert caplog.text.count("--network_dropout has no effect") == 1


def test_arguments_are_checked_before_anything_is_loaded() -> None:
    for wrong in ({"enable_all_linears": "True"}, {"enable_all_linear": "maybe"}, {"dropout": "some"}):
        with pytest.raises(UserError, match="--network_args"):
            oft_flux.trained_encoders([], wrong)


def test_text_encoders_are_left_alone() -> None:
    assert list(oft_flux.trained_encoders(["clip_l", "t5xxl"], {"enable_all_linear": "True"})) == []
    made = oft_flux.create_network(1.0, 4, 1e-3, None, [tiny_models.clip_l(), None], tiny_models.flux())
    assert {one.component for one in made.created} == {DENOISER}


def test_files_of_other_models_are_refused() -> None:
    model = tiny_models.flux()
    name = "oft_unet_double_blocks_0_img_attn_proj"
    with pytest.raises(DataError, match="rotates 32 outputs, of 64"):
        oft_flux.create_network_from_weights(1.0, None, None, [], model, {f"{name}.oft_blocks.0": torch.zeros(4, 8, 8)})
    with pytest.raises(DataError, match="no weight fits"):
        oft_flux.create_network_from_weights(1.0, None, None, [], model, {"lora_unet_x.alpha": torch.ones(())})
    made = oft_flux.create_network(1.0, 4, 1e-3, None, [], model)
    made.apply_to(None, model)
    with pytest.raises(DataError, match="is \\(2, 32, 32\\) in the file"):
        made.load_tensors(
            {f"{name}.oft_blocks.0": torch.zeros(2, 32, 32), f"{name}.alpha": torch.tensor(1e-3)}, "a file"
        )
