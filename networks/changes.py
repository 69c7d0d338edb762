"""What adapters change in weights, sums of them, and low-rank factors; see `networks.algebra`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from library.log import DataError
from networks import adapter_file, kinds
from networks.decomposition import RankChoice, Svd, clamped, svd, svd_of_product
from networks.factored import Dropouts
from networks.places import empty_module
from networks.targets import Target

Tensors = Mapping[str, Tensor]
"""Those of one module, named without the module's name."""


OF_WEIGHTS = ("dora", "oft")
"""Kinds whose changes depend on the weight."""

# one module


def change(
    tensors: Tensors,
    *,
    name: str = "",
    weight: Tensor | None = None,
    shape: Sequence[int] | None = None,
    parts: Sequence[int] = (),
    device: torch.device | str = "cpu",
) -> Tensor:
    """The change of a module's weight at multiplier 1, float32 on `device`, alpha included.

    For every kind that `networks.kinds` knows. A multiplier other than 1 is a factor, for all of them.

    Args:
        tensors: of one module of a file.
        name: of the module, for messages.
        weight: the module's own, which DoRA and OFT need; any type.
        shape: of the weight, where `weight` isn't given; None: that of the tensors (a matrix for LoHa and LoKr).
        parts: see `Target.parts`, for OFT.

    Errors: DataError when the kind is unknown, the shapes don't go together, or the weight is needed and missing.
    """
    kind = adapter_file.kind_of(tensors)
    if kind is None:
        what = f"{name} has tensors of an unknown kind: {', '.join(sorted(tensors)[:3])}"
        raise DataError(what, "network weights", code="E-ADAPTER-KIND")
    if kind in OF_WEIGHTS and weight is None:
        what = f"{name} is {kind}, which only means something together with the model's weight"
        raise DataError(what, "network weights", "merge it into the model", code="E-ADAPTER-KIND")
    if weight is not None:
        shape = tuple(weight.shape)
    if shape is None:
        shape = adapter_file.weight_shape({key: tuple(tensor.shape) for key, tensor in tensors.items()})
        assert shape is not None
    if kind == "lora":
        delta = LowRank.of(tensors, name).delta(device)
        return _shaped(delta, shape, name)
    adapter = kinds.of_file(Target(name, name, _carrier(shape, weight, device), tuple(parts)), "", tensors, 1.0, NO)
    if adapter is None:
        raise DataError(f"{name} lacks tensors", "network weights", "the file is broken", code="E-ADAPTER-KIND")
    adapter.load({key: tensor.float() for key, tensor in tensors.items()})
    return adapter.to(device).delta().to(torch.float32)


NO = Dropouts()


def _carrier(shape: Sequence[int], weight: Tensor | None, device: torch.device | str) -> nn.Module:
    """A module with this weight, or with none."""
    module = empty_module(shape)
    if weight is not None:
        module.weight = nn.Parameter(weight.to(device, torch.float32), requires_grad=False)
    return module


def _shaped(delta: Tensor, shape: Sequence[int], name: str) -> Tensor:
    """1x1 convolutions are written with and without their two last axes."""
    if tuple(delta.shape) == tuple(shape):
        return delta
    if delta.shape[0] != shape[0] or delta.numel() != math.prod(shape):
        what = f"{name}: the file's change is {tuple(delta.shape)}, the weight {tuple(shape)}"
        raise DataError(what, "network weights", "use it with the model it was made for", code="E-ADAPTER-SHAPE")
    return delta.reshape(tuple(shape))


@dataclass(frozen=True)
class LowRank:
    """One module as LoRA. Matrices have the shapes they have in files, in any type."""

    down: Tensor
    """(r, in), or (r, in, height, width)."""
    up: Tensor
    """(out, r), or (out, r, 1, 1)."""
    alpha: float

    @classmethod
    def of(cls, tensors: Tensors, name: str = "") -> LowRank:
        """The tensors of a file; without alpha it is the rank. Errors: DataError when they aren't plain LoRA."""
        if adapter_file.kind_of(tensors) != "lora":
            what = f"{name} is no plain LoRA: {', '.join(sorted(tensors)[:3])}"
            raise DataError(what, "network weights", code="E-ADAPTER-KIND")
        down, up = tensors[adapter_file.DOWN], tensors[adapter_file.UP]
        fits = min(down.ndim, up.ndim) >= 2 and up.shape[1] == down.shape[0] and math.prod(up.shape[2:]) == 1
        if not fits:
            what = f"{name}: {tuple(down.shape)} and {tuple(up.shape)} don't go together"
            raise DataError(what, "network weights", "the file is broken", code="E-ADAPTER-SHAPE")
        return cls(down, up, float(tensors.get(adapter_file.ALPHA, torch.tensor(float(len(down))))))

    @classmethod
    def of_matrices(cls, down: Tensor, up: Tensor, shape: Sequence[int], alpha: float | None = None) -> LowRank:
        """Matrices (r, in * kernel) and (out, r) for a weight of a shape; alpha None: the rank."""
        _, *rest = shape
        rank = down.shape[0]
        shaped_up = up.reshape(len(up), rank, *[1] * (len(rest) - 1))
        return cls(down.reshape(rank, *rest), shaped_up, float(rank if alpha is None else alpha))

    @property
    def rank(self) -> int:
        """r."""
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        """alpha / r."""
        return self.alpha / self.rank

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight it changes."""
        return (self.up.shape[0], *self.down.shape[1:])

    @property
    def is_window(self) -> bool:
        """Whether it is on a convolution with a kernel larger than 1 x 1."""
        return math.prod(self.down.shape[2:]) > 1

    def matrices(self, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """Down (r, in * kernel) and up (out, r), float32."""
        return self.down.to(device, torch.float32).flatten(1), self.up.to(device, torch.float32).flatten(1)

    def delta(self, device: torch.device | str = "cpu") -> Tensor:
        """`alpha / r * up down`, float32, in the shape of the weight."""
        down, up = self.matrices(device)
        return (up * self.scale @ down).view(self.shape)

    def norm(self, device: torch.device | str = "cpu") -> float:
        """Frobenius norm of `delta`, from two r x r matrices."""
        down, up = self.matrices(device)
        squared = float(((up.T @ up) * (down @ down.T)).sum(dtype=torch.float32))
        return math.sqrt(max(squared, 0.0)) * abs(self.scale)

    def file_tensors(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """As in files: lora_down.weight, lora_up.weight, alpha; in `dtype`, or as they are with alpha in their type."""
        dtype = dtype or self.down.dtype
        tensors = {adapter_file.DOWN: self.down, adapter_file.UP: self.up, adapter_file.ALPHA: torch.tensor(self.alpha)}
        return {key: tensor.to(dtype).contiguous() for key, tensor in tensors.items()}


def concatenated(modules: Sequence[LowRank], ratios: Sequence[float]) -> LowRank:
    """The exact weighted sum: ranks one after the other, scales folded evenly into both matrices, alpha = rank.

    With float32 matrices, whatever those of the files are: products of rounded ones would be less than exact.

    Errors: DataError when the shapes differ.
    """
    shape = _common_shape(modules)
    downs, ups = [], []
    for module, ratio in zip(modules, ratios, strict=True):
        down, up = module.matrices(module.down.device)
        factor = ratio * module.scale
        root = math.sqrt(abs(factor))
        downs.append(down * math.copysign(root, factor))
        ups.append(up * root)
    return LowRank.of_matrices(torch.cat(downs), torch.cat(ups, 1), shape)


def added(modules: Sequence[LowRank], ratios: Sequence[float], *, as_before: bool = False) -> LowRank:
    """Matrix by matrix: the sum has the rank and alpha of the first, and products of different files in it, too.

    Each file's factors are scaled so that alone it counts with its ratio. `as_before` counts the square of it, as
    kohya's tool does. Errors: DataError when shapes or ranks differ.
    """
    shape, first = _common_shape(modules), modules[0]
    if any(module.rank != first.rank for module in modules):
        what = f"ranks {', '.join(str(module.rank) for module in modules)} can't be added matrix by matrix"
        raise DataError(what, "network weights", "add --concat, or use networks/svd_merge_lora.py", code="E-MERGE-RANK")
    down, up = (torch.zeros_like(matrix) for matrix in first.matrices(first.down.device))
    for module, ratio in zip(modules, ratios, strict=True):
        own_down, own_up = module.matrices(module.down.device)
        root = math.sqrt(module.alpha / first.alpha) if module.alpha != first.alpha else 1.0
        root *= abs(ratio) if as_before else math.sqrt(abs(ratio))
        down += own_down * math.copysign(root, ratio)
        up += own_up * root
    return LowRank.of_matrices(down, up, shape, first.alpha)


def nearest(
    modules: Sequence[LowRank],
    ratios: Sequence[float],
    rank: int,
    *,
    clamp_quantile: float = 1.0,
    device: torch.device | str = "cpu",
) -> tuple[LowRank, float]:
    """The LoRA of a rank (or the smaller side of the weight) nearest to the weighted sum, alpha = rank; and the error.

    The error is the Frobenius norm of what is left out (before clamping), in parts of that of the sum; exact, as
    it is computed without forming the sum. Where the sum has a smaller rank, what is left is filled with 0.

    Errors: DataError when the shapes differ.
    """
    shape = _common_shape(modules)
    moved = [LowRank(module.down.to(device), module.up.to(device), module.alpha) for module in modules]
    whole = concatenated(moved, ratios)
    down, up = whole.matrices(device)
    found = svd_of_product(up, down)
    rank = min(rank, shape[0], math.prod(shape[1:]))
    small_down, small_up = clamped(*found.factors(rank), clamp_quantile)
    missing = rank - len(small_down)
    if missing > 0:
        small_down = torch.cat([small_down, small_down.new_zeros(missing, small_down.shape[1])])
        small_up = torch.cat([small_up, small_up.new_zeros(len(small_up), missing)], 1)
    return LowRank.of_matrices(small_down, small_up, shape), found.error(rank)


def nearest_to(delta: Tensor, rank: int, *, clamp_quantile: float = 1.0, exact: bool = False) -> tuple[LowRank, float]:
    """As `nearest`, of any change of a weight, (out, in) or a kernel; on the device of `delta`.

    Randomised where that is faster, unless `exact`; see `decomposition.svd`.
    """
    flat = delta.flatten(1)
    rank = min(rank, *flat.shape)
    found = svd(flat, rank, exact=exact)
    down, up = clamped(*found.factors(rank), clamp_quantile)
    return LowRank.of_matrices(down, up, delta.shape), found.error(rank)


def resized(module: LowRank, choice: RankChoice, device: torch.device | str = "cpu") -> tuple[LowRank, Svd]:
    """The nearest LoRA of the rank that `choice` says, with the same scale; and the singular values of `up down`.

    A rank is never made larger than it is, and where it stays, the matrices stay as they are.
    """
    down, up = module.matrices(device)
    found = svd_of_product(up, down)
    rank = choice.rank(found.values)
    if rank >= len(found.values) and len(found.values) == module.rank:
        return module, found
    small_down, small_up = found.factors(rank)
    return LowRank.of_matrices(small_down, small_up, module.shape, module.scale * len(small_down)), found


def shuffled(module: LowRank, generator: torch.Generator | None = None) -> LowRank:
    """The same with its ranks in random order."""
    order = torch.randperm(module.rank, generator=generator).to(module.down.device)
    return replace(module, down=module.down[order], up=module.up[:, order])


def _common_shape(modules: Sequence[LowRank]) -> tuple[int, ...]:
    """Errors: DataError when they are for different weights."""
    shapes = {module.shape for module in modules}
    out = {shape[0] for shape in shapes}
    if len(out) > 1 or len({math.prod(shape) for shape in shapes}) > 1:
        what = f"changes of different weights: {' and '.join(map(str, sorted(shapes)))}"
        raise DataError(what, "network weights", "merge files for the same model", code="E-ADAPTER-SHAPE")
    return modules[0].shape
