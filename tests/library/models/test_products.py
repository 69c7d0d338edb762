"""Products with stored weights: forward and backward, and what eight-bit arithmetic costs."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from library.models import eight_bits, four_bits, quantized
from library.models.products import PRODUCTS, dense, stored

WAYS = [
    (None, None),
    ("fp8", None),
    ("fp8_scaled", None),
    ("int8", None),
    ("nf4", None),
    ("int8", "int8"),
    ("fp8_scaled", "fp8"),
    ("fp8_scaled", "fp8 by rows"),
    ("fp8", "fp8"),
]
COMPUTED = {None: 1e-5, "int8": 0.015, "fp8": 0.04, "fp8 by rows": 0.04}
"""Relative error beside a product with the same weight, raised. Activations in fp8 have three bits behind the first."""


def layer(scheme: str | None, product: str | None = None, out: int = 64, width: int = 128) -> nn.Linear:
    torch.manual_seed(0)
    made = nn.Linear(width, out).requires_grad_(False)
    if scheme is not None:
        quantized.store(made, scheme, product)
    return made


def error(found: Tensor, wanted: Tensor) -> float:
    found, wanted = found.detach().float(), wanted.detach().float()
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize(("scheme", "product"), WAYS)
@pytest.mark.parametrize("shape", [(3, 128), (2, 40, 128)])
def test_forward_and_backward_are_those_of_the_raised_weight(
    scheme: str | None, product: str | None, shape: tuple[int, ...]
) -> None:
    module = layer(scheme, product)
    weight = dense(module, torch.float32).clone()
    x = torch.randn(shape, requires_grad=True)
    direction = torch.randn(*shape[:-1], 64)
    out = module(x)
    (found,) = torch.autograd.grad((out * direction).sum(), x)
    assert (out.dtype, out.shape) == (torch.float32, direction.shape)
    assert error(out, F.linear(x, weight, module.bias)) < COMPUTED[product]
    assert error(found, direction @ weight) < COMPUTED[product]


@pytest.mark.parametrize(("scheme", "product"), WAYS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_types_of_autocast(scheme: str | None, product: str | None, dtype: torch.dtype) -> None:
    module = layer(scheme, product, 32, 32)
    x = torch.randn(4, 32, requires_grad=True)
    with torch.autocast("cpu", dtype):
        out = module(x)
    assert out.dtype == dtype
    out.float().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
    weight = dense(module, torch.float32)
    assert error(out, F.linear(x, weight, module.bias)) < COMPUTED[product] + 0.02
    assert error(x.grad, weight.sum(0).expand(4, -1)) < COMPUTED[product] + 0.02


@pytest.mark.parametrize("scheme", quantized.SCHEMES)
def test_dense_rounds_once(scheme: str) -> None:
    module = layer(scheme)
    exact = dense(module, torch.float32)
    assert exact.shape == (64, 128)
    for dtype in (torch.bfloat16, torch.float16):
        found = dense(module, dtype)
        assert found.dtype == dtype
        if scheme != "nf4":
            assert torch.equal(found, exact.to(dtype))
        assert error(found, exact) < 2**-7


def test_dense_copies_nothing_that_is_dense() -> None:
    module = layer(None)
    assert dense(module, torch.float32) is module.weight
    convolution = nn.Conv2d(2, 3, 3)
    assert dense(convolution, torch.float32) is convolution.weight
    assert dense(convolution, torch.bfloat16).shape == (3, 2, 3, 3)


def test_nothing_dense_is_kept_for_the_backward_pass() -> None:
    for scheme, product in WAYS[1:]:
        module = layer(scheme, product)
        saved: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor, to=saved: to.append(tensor) or tensor, lambda t: t
        ):
            module(torch.randn(4, 128, requires_grad=True))
        held = {parameter.data_ptr() for parameter in (*module.parameters(), *module.buffers())}
        assert {tensor.data_ptr() for tensor in saved} <= held, (scheme, product)


@pytest.mark.parametrize(("scheme", "product"), WAYS[1:])
def test_checkpointed_gradients_are_the_same(scheme: str, product: str | None) -> None:
    module = layer(scheme, product)
    gradients = []
    for again in (False, True):
        x = torch.linspace(-1, 1, 4 * 128).view(4, 128).requires_grad_()
        out = checkpoint(module, x, use_reentrant=False) if again else module(x)
        out.square().sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)


# arithmetic in eight bits


@given(rows=st.integers(1, 40), seed=st.integers(0, 1000), size=st.floats(1e-6, 1e6))
@settings(max_examples=25, deadline=None)
def test_int8_is_exact_integer_arithmetic(rows: int, seed: int, size: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 32, generator=generator) * size
    weight = torch.randint(-127, 128, (48, 32), generator=generator, dtype=torch.int8)
    scale = torch.rand(48, 1, generator=generator) + 0.5
    row_scale = x.abs().amax(1, keepdim=True) / 127
    integers = (x * row_scale.reciprocal()).round().long()
    assert integers.abs().max() <= 127
    wanted = (integers @ weight.long().T).float() * row_scale * scale.T
    found = PRODUCTS["int8"].forward(x, weight, scale, None)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("product", ["int8", "fp8", "fp8 by rows"])
def test_scales_of_the_weight_go_into_the_gradient_before_it_is_quantised(product: str) -> None:
    """Rows of the weight differ by ten thousand; gradients differ the other way round, so that each counts the same."""
    torch.manual_seed(0)
    sizes = torch.logspace(-2, 2, 64)[:, None]
    weight = torch.randn(64, 128) * sizes
    module = nn.Linear(128, 64, bias=False).requires_grad_(False)
    module.weight.copy_(weight)
    quantized.store(module, "int8" if product == "int8" else "fp8_scaled", product)
    held = stored(module)
    grad = torch.randn(8, 64) / sizes.T
    assert error(PRODUCTS[product].back(grad, held.weight, held.scale), grad @ dense(module, torch.float32)) < 0.05
    rows = eight_bits.int8(grad, held.weight.T.contiguous().T, None, None, torch.float32) if product == "int8" else None
    if rows is not None:  # without them most of the gradient would be rounded away
        row_scale = grad.abs().amax(1, keepdim=True) / 127
        careless = ((grad / row_scale).round() * row_scale) @ dense(module, torch.float32)
        assert error(careless, grad @ dense(module, torch.float32)) > 0.1


@pytest.mark.parametrize("product", ["int8", "fp8", "fp8 by rows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_zeros_and_what_is_not_finite(product: str, dtype: torch.dtype) -> None:
    held = stored(layer("int8" if product == "int8" else "fp8_scaled", product, 32, 32))
    x = torch.randn(3, 32, dtype=dtype)
    x[0], x[1, 3] = 0, torch.nan
    out = PRODUCTS[product].forward(x, held.weight, held.scale, None)
    assert torch.equal(out[0], torch.zeros(32, dtype=dtype))
    assert out[1].isnan().all()
    assert out[2].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_largest_value_of_a_row_never_overflows(dtype: torch.dtype) -> None:
    """Factors are rounded; whatever the largest value is, it stays within what eight bits hold."""
    x = torch.linspace(0.9, 1.1, 4001).to(dtype)[:, None] * torch.tensor([[1.0, -1.0]], dtype=dtype)
    rows, scale = eight_bits._fp8_rows(x)
    assert rows.float().abs().max() <= 448
    assert torch.allclose(rows.float() * scale, x.float(), rtol=2**-4)
    weight = torch.tensor([[1, 0], [0, 1]], dtype=torch.int8)
    out = eight_bits.int8(x, weight, None, None, torch.float32)
    assert torch.allclose(out, x.float(), rtol=1e-5)


def test_the_gpu_is_asked_for_what_it_can_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Row-major times column-major, float32 scales of the right shapes, bias in the type of the result."""
    asked: list[tuple[tuple[int, ...], tuple[int, ...], torch.dtype, bool]] = []

    class OnGpu(Tensor):
        is_cuda = True  # type: ignore[assignment]

    def multiply(
        a: Tensor,
        b: Tensor,
        *,
        scale_a: Tensor,
        scale_b: Tensor,
        bias: Tensor | None,
        out_dtype: torch.dtype,
        **more: bool,
    ) -> Tensor:
        assert a.is_contiguous()
        assert b.T.is_contiguous()
        assert scale_a.is_contiguous()
        assert scale_b.is_contiguous()
        assert bias is None or bias.dtype == out_dtype
        asked.append((tuple(scale_a.shape), tuple(scale_b.shape), out_dtype, more["use_fast_accum"]))
        return (a.as_subclass(Tensor).float() @ b.float()).to(out_dtype)

    monkeypatch.setattr(torch, "_scaled_mm", multiply)
    rows = eight_bits._fp8_rows
    monkeypatch.setattr(eight_bits, "_fp8_rows", lambda x: (rows(x)[0].as_subclass(OnGpu), rows(x)[1]))
    x = torch.randn(4, 32, dtype=torch.bfloat16)
    for product in ("fp8 by rows", "fp8"):
        module = layer("fp8_scaled", product, 16, 32)
        held, bias = stored(module), module.bias
        PRODUCTS[product].forward(x, held.weight, held.scale, bias)
        PRODUCTS[product].back(torch.randn(4, 16, dtype=torch.bfloat16), held.weight, held.scale)
    kind = torch.bfloat16
    assert asked[:2] == [((4, 1), (1, 16), kind, True), ((4, 1), (1, 32), kind, False)]
    assert asked[2:] == [((), (), kind, True), ((), (), kind, False)]


# four bits


def test_values_of_nf4_are_quantiles_of_the_normal_distribution() -> None:
    most = 0.9677083
    normal = torch.distributions.Normal(0.0, 1.0)
    above = normal.icdf(torch.linspace(most, 0.5, 9)[:-1])
    below = -normal.icdf(torch.linspace(most, 0.5, 8)[:-1])
    values = torch.cat((above, below, torch.zeros(1))).sort().values
    torch.testing.assert_close(torch.tensor(four_bits.VALUES), values / values.max(), atol=1e-5, rtol=0)


def test_each_weight_gets_the_nearest_value() -> None:
    weight = torch.randn(3, 128)
    codes, scale = four_bits.lowered(weight)
    assert (codes.shape, codes.dtype, scale.shape) == ((3, 64), torch.uint8, (3, 2))
    largest = weight.view(3, 2, 64).abs().amax(-1)
    torch.testing.assert_close(scale, largest)
    choices = torch.tensor(four_bits.VALUES) * largest[..., None, None]
    nearest = (weight.view(3, 2, 64, 1) - choices).abs().amin(-1).view(3, 128)
    torch.testing.assert_close((four_bits.raised(codes, scale, torch.float32) - weight).abs(), nearest)


def test_bitsandbytes_raises_the_same_where_it_is_installed() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(4, 128)
    codes, scale = four_bits.lowered(weight)
    theirs, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=False)
    assert torch.equal(theirs.view(4, 64), codes)
    torch.testing.assert_close(state.absmax.view(4, 2), scale)
    mine = four_bits.raised(codes, scale, torch.float32)
    torch.testing.assert_close(four_bits._raised_by_kernel(codes, scale, torch.float32), mine)


def test_the_kernel_of_bitsandbytes_gets_codes_scales_and_values(monkeypatch: pytest.MonkeyPatch) -> None:
    module, package = ModuleType("bitsandbytes.functional"), ModuleType("bitsandbytes")
    seen: dict[str, object] = {}
    module.QuantState = lambda **state: seen.update(state)  # type: ignore[attr-defined]
    module.dequantize_4bit = lambda codes, quant_state: torch.arange(6 * 64.0)  # type: ignore[attr-defined]
    package.functional = module  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "bitsandbytes", package)
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", module)
    codes, scale = four_bits.lowered(torch.randn(3, 128))
    assert four_bits._raised_by_kernel(codes, scale, torch.bfloat16).shape == (3, 128)
    assert (seen["shape"], seen["blocksize"], seen["quant_type"]) == ((3, 128), 64, "nf4")
