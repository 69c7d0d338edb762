"""Who computes the attention: the right function gets the right layout, and torch helps out where it can't."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from library.log import UserError
from library.models import attention as module
from library.models.attention import attention, use

SHAPE = (2, 5, 3, 8)


@pytest.fixture(autouse=True)
def _torch_afterwards() -> Iterator[None]:
    yield
    use(None)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stubs of the packages, with the layout that their documentation names: (B, L, H, d)."""
    called: list[str] = []

    def stub(name: str, function: str) -> None:
        package, inner = ModuleType(name.partition(".")[0]), ModuleType(name)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            assert q.shape == k.shape == v.shape == SHAPE
            assert q.dtype == k.dtype == v.dtype
            called.append(function)
            return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

        setattr(inner, function, attend)
        monkeypatch.setitem(sys.modules, package.__name__, package)
        monkeypatch.setitem(sys.modules, name, inner)

    stub("xformers.ops", "memory_efficient_attention")
    stub("flash_attn", "flash_attn_func")
    monkeypatch.setattr(module, "_UNKNOWN_DEVICES", ())
    return called


def heads(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(SHAPE, generator=generator) for _ in range(3))
    return q.to(dtype), k.to(dtype), v.to(dtype)


@pytest.mark.parametrize(
    ("name", "dtype", "function"),
    [
        ("xformers", torch.float32, "memory_efficient_attention"),
        ("xformers", torch.bfloat16, "memory_efficient_attention"),
        ("flash", torch.bfloat16, "flash_attn_func"),
        ("flash", torch.float16, "flash_attn_func"),
    ],
)
def test_the_chosen_package_gets_queries_keys_and_values(
    name: str, dtype: torch.dtype, function: str, calls: list[str]
) -> None:
    inputs = heads(dtype)
    expected = attention(*inputs)
    use(name)
    assert torch.equal(attention(*inputs), expected)
    assert calls == [function]


@pytest.mark.parametrize("name", ["xformers", "flash"])
def test_torch_computes_where_there_is_a_mask_and_says_so_once(
    name: str, calls: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    inputs, mask = heads(torch.bfloat16), torch.tensor([[[[True, True, False, True, True]]]])
    expected = attention(*inputs, mask)
    use(name)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert torch.equal(attention(*inputs, mask), expected)
    assert calls == []
    assert [record.getMessage().count("no masks") for record in caplog.records] == [1]
    assert not torch.equal(attention(*inputs), expected)
    assert calls


def test_flash_knows_halves_only(calls: list[str]) -> None:
    use("flash")
    q, k, v = heads(torch.float32)
    assert torch.equal(attention(q, k, v), attention(q, k, v, torch.ones(1, 1, 1, 5, dtype=torch.bool)))
    assert calls == []


def test_no_package_computes_without_a_gpu(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_UNKNOWN_DEVICES", ("cpu",))
    use("xformers")
    attention(*heads(torch.bfloat16))
    assert calls == []


def test_types_that_differ_are_brought_together(calls: list[str]) -> None:
    use("flash")
    q, k, v = heads(torch.bfloat16)
    assert attention(q, k.float(), v.float()).dtype == torch.bfloat16
    assert calls == ["flash_attn_func"]


@pytest.mark.parametrize(("name", "package"), [("xformers", "xformers"), ("flash", "flash-attn")])
def test_a_package_that_is_not_installed_is_refused_in_one_line(
    name: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for missing in ("xformers", "xformers.ops", "flash_attn"):
        monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(UserError) as caught:
        use(name, "--attn_mode")
    (line,) = caught.value.lines()
    assert "E-PACKAGE" in line
    assert f"pip install {package}" in line


def test_a_name_that_is_unknown_is_refused_with_those_there_are() -> None:
    with pytest.raises(UserError, match=r"'best'.*--attn_mode.*torch, sdpa, xformers, flash"):
        use("best")


@pytest.mark.parametrize("name", [None, "torch", "sdpa"])
def test_torch_is_the_default_and_can_be_chosen_again(name: str | None, calls: list[str]) -> None:
    use("xformers")
    use(name)
    attention(*heads(torch.float32))
    assert calls == []
