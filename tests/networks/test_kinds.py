"""What all algorithms have in common, on small linear layers and convolutions."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from library.log import UserError
from library.models.memory import checkpoint_blocks
from library.models.products import dense
from library.models.quantized import SCHEMES, store
from networks import kinds, loha, lokr, lora_flux
from networks.arguments import Arguments
from networks.base import DENOISER, ModuleAdapter, Network
from networks.dora import DoraAdapter
from networks.factored import Dropouts
from networks.kronecker import KroneckerAdapter
from networks.reading import Rank
from networks.targets import Target
from tests.networks import tiny_models


class Case(NamedTuple):
    kind: str
    arguments: dict[str, str]
    module: Callable[[], nn.Module]
    rank: int = 2


def linear(outputs: int = 12, inputs: int = 8, bias: bool = True) -> Callable[[], nn.Module]:
    return lambda: nn.Linear(inputs, outputs, bias=bias)


def conv(kernel: int = 3, **more: object) -> Callable[[], nn.Module]:
    return lambda: nn.Conv2d(8, 12, kernel, padding=kernel // 2, **more)


CASES = [
    Case("lora", {}, linear()),
    Case("lora", {}, conv()),
    Case("lora", {}, conv(padding_mode="reflect")),
    Case("dora", {}, linear()),
    Case("dora", {}, linear(bias=False)),
    Case("dora", {"wd_on_output": "False"}, linear()),
    Case("dora", {}, conv()),
    Case("dora", {"wd_on_output": "False"}, conv(stride=2)),
    Case("loha", {}, linear(48, 40)),
    Case("loha", {}, linear(bias=False)),
    Case("loha", {}, linear(), 5),
    Case("loha", {}, conv()),
    Case("loha", {}, conv(stride=2, padding_mode="reflect"), 6),
    Case("loha", {"use_tucker": "True"}, conv()),
    Case("lokr", {}, linear(36, 64)),
    Case("lokr", {}, linear(36, 64, bias=False), 1),
    Case("lokr", {"factor": "4"}, linear(36, 64)),
    Case("lokr", {"factor": "4", "unbalanced_factorization": "True"}, linear(36, 64)),
    Case("lokr", {"decompose_both": "True"}, linear(36, 64), 1),
    Case("lokr", {"full_matrix": "True"}, linear(36, 64)),
    Case("lokr", {}, linear(36, 64), 100),
    Case("lokr", {"factor": "2"}, conv(), 1),
    Case("lokr", {"factor": "2"}, conv(padding_mode="circular"), 1),
    Case("lokr", {"full_matrix": "True"}, conv(stride=2)),
    Case("lokr", {"factor": "2", "use_tucker": "True"}, conv(), 1),
    Case("lokr", {}, conv(1), 1),
]
NAMES = [f"{c.kind}-{type(c.module()).__name__}-{c.rank}-{'-'.join(c.arguments)}" for c in CASES]
each_case = pytest.mark.parametrize("case", CASES, ids=[f"{i}-{name}" for i, name in enumerate(NAMES)])


def create(case: Case, dropouts: Dropouts | None = None, seed: int = 0) -> ModuleAdapter:
    """An adapter on a module of its own."""
    torch.manual_seed(seed)
    kind, arguments = kinds.KINDS[case.kind], Arguments(case.arguments)
    settings = kind.settings(arguments)
    arguments.finish()
    module = case.module().requires_grad_(False)
    target = Target("lora_unet_x", "x", module)
    return kind.create(target, DENOISER, Rank(case.rank, 1.5), 1.0, dropouts or Dropouts(), settings)


def shake(adapter: nn.Module, by: float = 0.3) -> nn.Module:
    """Other values than the initial ones."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * by)
    return adapter


def inputs(module: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    shape = (2, 3, module.in_features) if isinstance(module, nn.Linear) else (2, module.in_channels, 5, 6)
    return torch.randn(shape, generator=generator)


def with_weight(module: nn.Module, weight: Tensor, x: Tensor) -> Tensor:
    """What the module answers with another weight."""
    return torch.func.functional_call(module, {"weight": weight}, (x,))


@each_case
def test_a_new_adapter_changes_nothing(case: Case) -> None:
    adapter = create(case)
    x = inputs(adapter.module)
    torch.testing.assert_close(adapter(x), adapter.module(x), rtol=1e-6, atol=1e-6)
    assert float(adapter.delta().abs().max()) < 1e-6


@each_case
@pytest.mark.parametrize("multiplier", [1.0, 0.6, 0.0, -0.5])
def test_the_answer_is_that_of_the_weight_with_the_change(case: Case, multiplier: float) -> None:
    adapter = shake(create(case))
    module, x = adapter.module, inputs(adapter.module)
    adapter.multiplier = multiplier
    delta = adapter.delta()
    assert delta.shape == module.weight.shape
    assert float(delta.norm()) > 0.1
    expected = with_weight(module, module.weight + multiplier * delta, x)
    torch.testing.assert_close(adapter(x), expected, rtol=1e-4, atol=1e-4)


@each_case
def test_gradients_are_those_of_the_change(case: Case) -> None:
    """Against autograd through the plain formula: that of the module with `delta` added, without dropouts."""
    adapter = shake(create(case)).double()
    adapter.module.double()
    x = inputs(adapter.module).double().requires_grad_()
    out = adapter(x)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=out.dtype)
    got = torch.autograd.grad((out * weights).sum(), [x, *adapter.parameters()])
    numbers = [parameter for _, parameter in adapter.named_parameters()]
    detached_norm = case.kind == "dora"

    def loss(values: list[Tensor]) -> Tensor:
        with torch.no_grad():
            for parameter, value in zip(numbers, values, strict=True):
                parameter.copy_(value)
            return (adapter(x) * weights).sum()

    start = [parameter.detach().clone() for parameter in numbers]
    for index, gradient in enumerate(got[1:]):
        name = list(dict(adapter.named_parameters()))[index]
        if detached_norm and name != "dora_scale":
            continue  # no gradient goes through the norm: see test_dora
        direction = torch.randn(start[index].shape, generator=torch.Generator().manual_seed(index)).double()
        step = 1e-2 if detached_norm else 1e-5  # lengths are float32, and the answer is linear in them
        ahead = [value + step * direction if i == index else value for i, value in enumerate(start)]
        behind = [value - step * direction if i == index else value for i, value in enumerate(start)]
        slope = (loss(ahead) - loss(behind)) / (2 * step)
        tolerance = 1e-4 if detached_norm else 1e-5
        torch.testing.assert_close((gradient * direction).sum(), slope, rtol=tolerance, atol=tolerance)


@each_case
def test_an_earlier_hook_is_kept(case: Case) -> None:
    adapter = shake(create(case))
    module, x = adapter.module, inputs(adapter.module)
    expected = module(x)
    own = shake(create(case))
    adapter.hook()
    second = own
    second._module = (module,)
    second.original_forward = module.forward
    second.hook()
    once = adapter.delta()
    torch.testing.assert_close(
        module(x), with_weight_unhooked(adapter, second, module.weight + once + second.delta(), x), rtol=1e-4, atol=1e-4
    )
    second.unhook()
    adapter.unhook()
    torch.testing.assert_close(module(x), expected)


def with_weight_unhooked(first: ModuleAdapter, second: ModuleAdapter, weight: Tensor, x: Tensor) -> Tensor:
    second.unhook()
    first.unhook()
    result = with_weight(first.module, weight, x)
    first.hook()
    second.hook()
    return result


@each_case
def test_a_file_gives_the_same_answer(case: Case) -> None:
    adapter = shake(create(case))
    module, x = adapter.module, inputs(adapter.module)
    tensors = {name: tensor.clone() for name, tensor in adapter.state_dict().items()}
    assert adapter.fits(tensors)
    target = Target("lora_unet_x", "x", module)
    read = kinds.of_file(target, DENOISER, tensors, 1.0, Dropouts())
    assert read is not None
    assert type(read) is type(adapter)
    assert read.fits(tensors)
    read.load(tensors)
    torch.testing.assert_close(read(x), adapter(x), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(read.delta(), adapter.delta(), rtol=1e-6, atol=1e-6)
    assert set(read.state_dict()) == set(tensors)


@each_case
def test_an_adapter_in_bfloat16(case: Case) -> None:
    adapter = shake(create(case))
    module, x = adapter.module, inputs(adapter.module)
    expected = adapter(x)
    adapter.bfloat16()
    module.bfloat16()
    got = adapter(x.bfloat16())
    assert got.dtype == torch.bfloat16
    assert float((got - expected).detach().norm() / expected.detach().norm()) < 0.03
    got.float().square().mean().backward()
    for parameter in adapter.parameters():
        assert parameter.grad is not None
        assert parameter.grad.dtype == parameter.dtype


@each_case
def test_norms_are_limited(case: Case) -> None:
    adapter = shake(create(case))
    network = Network([adapter])
    network.apply_to(None, adapter.module)
    before = adapter.delta()
    torch.testing.assert_close(adapter.delta_norm(), before.norm(), rtol=1e-4, atol=1e-5)
    limit = float(before.norm()) / 3
    scaled, mean, largest = network.apply_max_norm_regularization(limit)
    assert int(scaled) == 1
    assert float(mean) == float(largest) == pytest.approx(limit, rel=1e-4)
    torch.testing.assert_close(adapter.delta(), before / 3, rtol=1e-3, atol=1e-4)


@each_case
def test_a_norm_below_the_limit_stays_as_it_is(case: Case) -> None:
    adapter = shake(create(case))
    before = {name: tensor.clone() for name, tensor in adapter.state_dict().items()}
    adapter.scale_by(torch.tensor(1.0))
    for name, tensor in adapter.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@each_case
def test_a_merged_network_gives_the_same_answer(case: Case) -> None:
    adapter = shake(create(case))
    network = Network([adapter])
    x = inputs(adapter.module)
    adapter.multiplier = 0.7
    expected = adapter(x)
    network.merge_to(None, adapter.module)
    torch.testing.assert_close(adapter.module(x), expected, rtol=1e-4, atol=1e-4)


@each_case
def test_dropouts_act_in_training_only(case: Case) -> None:
    if case.arguments.get("use_tucker") and case.kind == "loha":
        pytest.skip("nothing lies between the matrices there")
    adapter = shake(create(case, Dropouts(neuron=0.5, rank=0.3)))
    x = inputs(adapter.module)
    first = adapter.train()(x)
    assert any(not torch.equal(first, adapter(x)) for _ in range(8))
    torch.testing.assert_close(adapter.eval()(x), shake(create(case))(x))
    adapter.train().dropouts = Dropouts(module=1.0)
    torch.testing.assert_close(adapter(x), adapter.module(x))


@each_case
def test_dropouts_keep_the_mean(case: Case) -> None:
    """The mean over many draws comes near the answer without."""
    if case.arguments.get("use_tucker") and case.kind == "loha":
        pytest.skip("nothing lies between the matrices there")
    adapter = shake(create(case, Dropouts(neuron=0.2)))
    x = inputs(adapter.module)
    expected = adapter.eval()(x) - adapter.module(x)
    adapter.train()
    mean = torch.stack([adapter(x) for _ in range(150)]).mean(0) - adapter.module(x)
    assert float((mean - expected).norm() / expected.norm()) < 0.15


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("case", [case for case in CASES if isinstance(case.module(), nn.Linear)])
def test_on_weights_in_few_bits(case: Case, scheme: str) -> None:
    stored = case._replace(module=lambda: quantized_linear(scheme))
    adapter = shake(create(stored))
    module, x = adapter.module, inputs(adapter.module)
    assert isinstance(module, nn.Linear)
    x.requires_grad_()
    out = adapter(x)
    weight = dense(module, torch.float32) + adapter.delta()
    torch.testing.assert_close(out, nn.functional.linear(x, weight, module.bias), rtol=1e-4, atol=1e-4)
    (gradient,) = torch.autograd.grad(out.sum(), [x])
    torch.testing.assert_close(gradient, weight.sum(0).expand_as(x), rtol=1e-3, atol=1e-3)


def quantized_linear(scheme: str) -> nn.Module:
    module = nn.Linear(64, 36).requires_grad_(False)
    store(module, scheme)
    return module


MODULES = [
    ("lora_flux", {}, 2),
    ("lora_flux", {"algo": "dora"}, 2),
    ("loha", {}, 2),
    ("loha", {}, 6),
    ("lokr", {}, 1),
    ("lokr", {"full_matrix": "True"}, 1),
    ("oft_flux", {"enable_all_linear": "True"}, 4),
]
each_network = pytest.mark.parametrize(("module", "arguments", "rank"), MODULES)


@each_network
def test_gradients_with_recomputed_blocks(module: str, arguments: dict[str, str], rank: int) -> None:
    """Narrow layers keep their product, and the second pass takes it over."""
    gradients = []
    for recompute in (False, True):
        model = tiny_models.flux()
        torch.manual_seed(0)
        plugin = importlib.import_module(f"networks.{module}")
        network = plugin.create_network(1.0, rank, 0.01, None, [None, None], model, **arguments)
        network.apply_to(None, model)
        shake(network, 0.05)
        if recompute:
            checkpoint_blocks(model.train())
        model(**tiny_models.flux_inputs()).square().mean().backward()
        gradients.append({name: parameter.grad for name, parameter in network.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6)


@each_network
def test_a_network_is_saved_and_read_again(module: str, arguments: dict[str, str], rank: int, tmp_path: Path) -> None:
    model, given = tiny_models.flux(), tiny_models.flux_inputs()
    plugin = importlib.import_module(f"networks.{module}")
    network = plugin.create_network(1.0, rank, 1.0, None, [None, None], model, **arguments)
    network.apply_to(None, model)
    shake(network, 0.05)
    expected = model(**given)
    path = tmp_path / "n.safetensors"
    network.save_weights(path, None, {"ss_network_module": f"networks.{module}"})
    network.restore()
    read, _ = plugin.create_network_from_weights(1.0, path, None, [None, None], model, for_inference=True)
    read.apply_to(None, model)
    read.load_weights(path)
    torch.testing.assert_close(model(**given), expected, rtol=1e-5, atol=1e-5)


def test_unknown_tensors_are_of_no_kind() -> None:
    target = Target("x", "x", nn.Linear(4, 4))
    assert kinds.of_file(target, DENOISER, {"weight": torch.ones(4, 4)}, 1.0, Dropouts()) is None


@pytest.mark.parametrize(
    ("kind", "arguments", "words"),
    [
        ("lokr", {"factor": "0"}, "at least 1"),
        ("lokr", {"factor": "many"}, "whole number"),
        ("lokr", {"decompose_both": "maybe"}, "True"),
    ],
)
def test_wrong_arguments_are_refused(kind: str, arguments: dict[str, str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        kinds.KINDS[kind].settings(Arguments(arguments))


def test_a_file_with_lengths_of_another_kind_is_refused() -> None:
    adapter = create(Case("loha", {}, linear()))
    tensors = {**adapter.state_dict(), "dora_scale": torch.ones(12, 1)}
    with pytest.raises(UserError, match="DoRA"):
        kinds.of_file(Target("x", "x", adapter.module), DENOISER, tensors, 1.0, Dropouts())


def test_dora_is_also_known_by_its_lycoris_name() -> None:
    network = lora_flux.create_network(1.0, 2, 1.0, None, [None, None], tiny_models.flux(), dora_wd="True")
    assert {type(adapter) for adapter in network.created} == {DoraAdapter}
    with pytest.raises(UserError, match="dora_wd"):
        loha.create_network(1.0, 2, 1.0, None, [None, None], tiny_models.flux(), dora_wd="True")


def test_a_module_of_one_kind_knows_the_arguments_of_that_kind_before_anything_is_loaded() -> None:
    assert lokr.trained_encoders(["clip_l", "t5xxl"], {"factor": "4"}) == ["clip_l"]
    assert loha.trained_encoders(["clip_l", "t5xxl"], {"train_t5xxl": "True", "use_tucker": "True"})[1:] == ["t5xxl"]
    with pytest.raises(UserError, match="unknown argument"):
        loha.trained_encoders(["clip_l"], {"factor": "4"})
    made = lokr.create_network(1.0, 2, 1.0, None, [None, None], tiny_models.flux(), factor="4")
    assert {type(adapter) for adapter in made.created} == {KroneckerAdapter}
