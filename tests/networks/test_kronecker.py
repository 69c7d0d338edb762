"""LoKr: how weights are divided, and that the product is never formed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from library.log import DataError
from networks.kronecker import KroneckerAdapter, Splitting, divide
from tests.networks.test_kinds import shake


def adapter(module: nn.Module, rank: int, **splitting: Any) -> KroneckerAdapter:
    torch.manual_seed(0)
    shapes = Splitting(**splitting).shapes(module, rank)
    made = KroneckerAdapter("m", module.requires_grad_(False), "unet", shapes=shapes, rank=rank, alpha=2.0)
    shake(made)
    return made


@given(st.integers(1, 5000), st.integers(-1, 70).filter(bool))
def test_sizes_are_divided_without_a_rest(size: int, factor: int) -> None:
    smaller, larger = divide(size, factor)
    assert smaller * larger == size
    assert smaller <= larger
    assert factor < 0 or smaller <= factor


@pytest.mark.parametrize(
    ("rank", "more", "names"),
    [
        (4, {}, {"lokr_w1": (48, 48), "lokr_w2_a": (64, 4), "lokr_w2_b": (4, 64)}),
        (32, {}, {"lokr_w1": (48, 48), "lokr_w2": (64, 64)}),
        (4, {"factor": 8}, {"lokr_w1": (8, 8), "lokr_w2_a": (384, 4), "lokr_w2_b": (4, 384)}),
        (
            4,
            {"decompose_both": True},
            {"lokr_w1_a": (48, 4), "lokr_w1_b": (4, 48), "lokr_w2_a": (64, 4), "lokr_w2_b": (4, 64)},
        ),
        (4, {"decompose_both": True, "factor": 8}, {"lokr_w1": (8, 8), "lokr_w2_a": (384, 4), "lokr_w2_b": (4, 384)}),
        (4, {"full_matrix": True}, {"lokr_w1": (48, 48), "lokr_w2": (64, 64)}),
    ],
)  # fmt: skip
def test_shapes_of_a_layer_of_flux(rank: int, more: dict[str, Any], names: dict[str, tuple[int, ...]]) -> None:
    with torch.device("meta"):
        module = nn.Linear(3072, 3072)
    assert Splitting(**more).shapes(module, rank) == names


class Largest(TorchDispatchMode):
    """Remembers the size of the largest tensor that was made."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and "view" not in str(func) and func is not torch.ops.aten.t.default:
                self.numel = max(self.numel, leaf.numel())
        return result


@pytest.mark.parametrize("more", [{}, {"full_matrix": True}, {"decompose_both": True}, {"factor": 4}])
def test_the_product_is_never_formed(more: dict[str, Any]) -> None:
    made = adapter(nn.Linear(144, 256), 2, **more)
    x = torch.randn(3, 144, requires_grad=True)
    with Largest() as seen:
        made(x).square().sum().backward()
        made.delta_norm()
        made.scale_by(torch.tensor(0.5))
    assert seen.numel < 144 * 256 / 4
    assert all(parameter.grad is not None for parameter in made.parameters())


def test_strided_inputs() -> None:
    made = adapter(nn.Linear(36, 36), 1)
    wide = torch.randn(2, 5, 80, requires_grad=True)
    part = wide[..., 7:43]
    torch.testing.assert_close(made(part), made(part.contiguous()))
    made(part).sum().backward()
    got = wide.grad
    wide.grad = None
    made(part.contiguous()).sum().backward()
    torch.testing.assert_close(got, wide.grad)


@pytest.mark.parametrize(
    "shapes",
    [
        {"lokr_w1": (6, 6), "lokr_w2": (6, 5)},
        {"lokr_w1": (6, 6), "lokr_w2_a": (7, 2), "lokr_w2_b": (2, 6)},
        {"lokr_w1_a": (6, 1), "lokr_w1_b": (1, 5), "lokr_w2": (6, 6)},
        {"lokr_w1": (6, 6), "lokr_w2": (6, 6, 3, 3)},
    ],
)
def test_tensors_of_another_layer_are_refused(shapes: dict[str, tuple[int, ...]]) -> None:
    with pytest.raises(DataError, match="the file's change is"):
        KroneckerAdapter("m", nn.Linear(36, 36), "unet", shapes=shapes, rank=2, alpha=None)


def test_alpha_has_no_meaning_without_a_low_rank_product() -> None:
    module = nn.Linear(36, 36)
    made = adapter(module, 4, full_matrix=True)
    assert made.scale == 1
    tensors = {**made.state_dict(), "alpha": torch.tensor(77.0)}
    before = made.delta()
    made.load(tensors)
    torch.testing.assert_close(made.delta(), before)
    made.load_state_dict(made.state_dict())
    assert made.scale == 1
