"""LoRA on single modules: values, gradients, dtypes, dropout, hooks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from library.log import DataError
from networks.low_rank import Dropouts, LoraAdapter

BOTH = pytest.mark.parametrize("fused", [True, False])


def linear(bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(6, 5, bias=bias, dtype=dtype).requires_grad_(False)


def adapter(module: nn.Module, fused: bool = True, **settings: object) -> LoraAdapter:
    torch.manual_seed(1)
    made = LoraAdapter("m", module, "unet", **{"rank": 3, "alpha": 2.0, **settings})  # type: ignore[arg-type]
    nn.init.normal_(made.lora_up.weight)
    if not fused:
        made._is_plain = lambda module: False  # type: ignore[method-assign]
    return made


def test_a_new_adapter_changes_nothing() -> None:
    module = linear()
    x = torch.randn(2, 4, 6)
    before = module(x)
    made = LoraAdapter("m", module, "unet", rank=3, alpha=1)
    made.hook()
    assert torch.equal(module(x), before)
    assert made.lora_down.weight.abs().max() <= 1 / 6**0.5
    assert made.lora_down.weight.std() > 0.1


@BOTH
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(2, 4, 6), (3, 6), (2, 1, 3, 6)])
def test_output_and_gradients_are_those_of_the_formula(fused: bool, bias: bool, shape: tuple[int, ...]) -> None:
    module = linear(bias).double()
    made = adapter(module, fused, multiplier=0.5).double()
    x = torch.randn(shape, dtype=torch.double, requires_grad=True)

    def formula(x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        return F.linear(x, module.weight + 0.5 * 2 / 3 * up @ down, module.bias)

    wanted = formula(x, made.lora_down.weight, made.lora_up.weight)
    inputs = [x, made.lora_down.weight, made.lora_up.weight]
    wanted_gradients = torch.autograd.grad(wanted.square().sum(), inputs)
    made.hook()
    out = module(x)
    torch.testing.assert_close(out, wanted)
    torch.testing.assert_close(torch.autograd.grad(out.square().sum(), inputs), wanted_gradients)


def test_input_without_gradient() -> None:
    module = linear()
    made = adapter(module)
    made.hook()
    module(torch.randn(2, 6)).sum().backward()
    assert made.lora_down.weight.grad is not None


def test_the_output_may_be_changed_in_place() -> None:
    module = linear()
    adapter(module).hook()
    module(torch.randn(2, 4, 6)).mul_(2).sum().backward()


@BOTH
@pytest.mark.parametrize("kernel", [1, 3])
def test_convolutions(fused: bool, kernel: int) -> None:
    torch.manual_seed(0)
    module = nn.Conv2d(4, 5, kernel, stride=2, padding=1).requires_grad_(False)
    made = adapter(module, fused)
    x = torch.randn(2, 4, 8, 8)
    wanted = F.conv2d(x, module.weight + made.delta(), module.bias, 2, 1)
    made.hook()
    torch.testing.assert_close(module(x), wanted, rtol=1e-4, atol=1e-5)


@BOTH
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("own", [torch.float32, torch.bfloat16])
def test_types_under_autocast(fused: bool, base: torch.dtype, own: torch.dtype) -> None:
    module = linear(dtype=base)
    made = adapter(module, fused).to(own)
    x = torch.randn(2, 4, 6, requires_grad=True)
    wanted = F.linear(x, module.weight.float() + made.delta(), module.bias.float())
    made.hook()
    with torch.autocast("cpu", torch.bfloat16):
        out = module(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), wanted, rtol=0.03, atol=0.03)
    out.float().sum().backward()
    assert made.lora_down.weight.grad is not None
    assert made.lora_down.weight.grad.dtype == own
    assert x.grad is not None
    assert x.grad.dtype == torch.float32


def test_a_bfloat16_model_without_autocast_keeps_its_type() -> None:
    module = linear(dtype=torch.bfloat16)
    adapter(module).hook()
    assert module(torch.randn(2, 6, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_a_float8_weight_is_raised_for_the_product() -> None:
    module = linear()
    made = adapter(module)
    stored = module.weight.to(torch.float8_e4m3fn)
    wanted = F.linear(torch.ones(1, 6), stored.float() + made.delta(), module.bias)
    module.weight = nn.Parameter(stored, requires_grad=False)
    made.hook()
    with torch.autocast("cpu", torch.bfloat16):
        out = module(torch.ones(1, 6))
    torch.testing.assert_close(out.float(), wanted, rtol=0.05, atol=0.05)


@BOTH
def test_gradient_checkpointing_repeats_the_dropout(fused: bool) -> None:
    module = linear()
    made = adapter(module, fused, dropouts=Dropouts(neuron=0.3, rank=0.3, module=0.3))
    made.hook()
    x = torch.randn(2, 4, 6, requires_grad=True)
    gradients = []
    for again in (False, True):
        x.grad = made.lora_down.weight.grad = made.lora_up.weight.grad = None
        torch.manual_seed(5)
        out = checkpoint(module, x, use_reentrant=False) if again else module(x)
        out.square().sum().backward()
        gradients.append([x.grad, made.lora_down.weight.grad, made.lora_up.weight.grad])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@BOTH
@pytest.mark.parametrize("kind", ["neuron", "rank", "module"])
def test_dropout_keeps_the_mean_and_ends_in_evaluation(fused: bool, kind: str) -> None:
    module = linear()
    x = torch.randn(1, 3, 6).expand(2000, 3, 6)
    plain = module(x[0])
    made = adapter(module, fused, dropouts=Dropouts(**{kind: 0.5}))
    made.hook()
    made.eval()
    full = module(x)
    torch.testing.assert_close(full[0], F.linear(x[0], module.weight + made.delta(), module.bias))
    made.train()
    torch.manual_seed(0)
    if kind == "module":
        outs = [module(x[0]) for _ in range(50)]
        skipped = [torch.equal(out, plain) for out in outs]
        assert 10 < sum(skipped) < 40
        return
    changes = module(x) - plain
    assert not torch.allclose(changes[0], changes[1])
    torch.testing.assert_close(changes.mean(0), full[0] - plain, rtol=0.3, atol=0.3)
    if kind == "rank":  # one mask for all tokens of a sample
        few = adapter(module, fused, rank=1, dropouts=Dropouts(rank=0.5))
        made.unhook()
        few.hook()
        unchanged = ((module(x) - plain).abs().amax(-1) < 1e-6).float().mean(-1)
        assert set(unchanged.tolist()) == {0.0, 1.0}


def test_delta_norm_needs_no_product() -> None:
    for module in (linear(), nn.Conv2d(4, 5, 3)):
        made = adapter(module)
        torch.testing.assert_close(made.delta_norm(), made.delta().norm())


def test_hooks_come_off_in_reverse_order() -> None:
    module = linear()
    x = torch.randn(2, 6)
    plain = module(x)
    first, second = adapter(module), adapter(module)
    first.hook()
    once = module(x)
    second.hook()
    torch.testing.assert_close(module(x) - plain, 2 * (once - plain))
    with pytest.raises(AssertionError, match="another hook"):
        first.unhook()
    second.unhook()
    assert torch.equal(module(x), once)
    first.unhook()
    assert torch.equal(module(x), plain)
    assert "forward" not in module.__dict__


def test_multiplier_zero_is_the_plain_module() -> None:
    module = linear()
    x = torch.randn(2, 6)
    plain = module(x)
    made = adapter(module)
    made.hook()
    made.multiplier = 0
    assert torch.equal(module(x), plain)


def test_loading_takes_any_alpha_and_4d_matrices() -> None:
    made = adapter(linear(), rank=4, alpha=1)
    down, up = torch.randn(4, 6), torch.randn(5, 4)
    for alpha, scale in ((torch.tensor(2.5, dtype=torch.bfloat16), 0.625), (torch.tensor(2), 0.5), (None, 1.0)):
        tensors = {"lora_down.weight": down[..., None, None], "lora_up.weight": up}
        made.load(tensors if alpha is None else {**tensors, "alpha": alpha})
        assert made.scale == scale
        assert torch.equal(made.lora_down.weight, down)
    with pytest.raises(DataError, match="dim_from_weights"):
        made.load({"lora_down.weight": torch.randn(3, 6), "lora_up.weight": up})
    made.load_state_dict({**made.state_dict(), "alpha": torch.tensor(2)})
    assert made.scale == 0.5
