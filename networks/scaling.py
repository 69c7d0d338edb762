"""Alpha and matrices of one module: what is known of them, and factors that move between them without loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from library.log import DataError
from networks.layouts import BLOCKS, FACTORS, LENGTHS

Tensors = dict[str, Tensor]
"""Those of a module, named as in `layouts.TENSORS`."""

DOWN, UP, _ = FACTORS
PAIRS = {
    "lora": ((UP, DOWN),),
    "dora": ((UP, DOWN),),
    "loha": (("hada_w1_a", "hada_w1_b"), ("hada_w2_a", "hada_w2_b")),
}
"""By kind: matrices whose products, multiplied with each other, are the change of the weight."""
WIDER = (torch.float32, torch.float64)


def kind_of(tensors: Mapping[str, Tensor]) -> str:
    """lora, dora, loha, lokr or oft. Errors: DataError when tensors are missing."""
    for kind, start in (("oft", BLOCKS[0]), ("lokr", "lokr_"), ("loha", "hada_"), ("lora", "lora_")):
        if any(name.startswith(start) for name in tensors):
            kind = "dora" if kind == "lora" and LENGTHS in tensors else kind
            break
    else:
        raise DataError(f"there are no matrices beside {', '.join(tensors)}", code="E-NETWORK-FILE")
    wanted = {name for pair in PAIRS.get(kind, ()) for name in pair}
    if kind == "lokr":
        wanted = {name for number in "12" for name in _halves(tensors, f"lokr_w{number}")}
    if missing := sorted(wanted - tensors.keys()):
        raise DataError(f"{missing[0]} is missing", code="E-NETWORK-FILE")
    _check_shapes(kind, tensors)
    return kind


def _check_shapes(kind: str, tensors: Mapping[str, Tensor]) -> None:
    """Errors: DataError when matrices can't be multiplied."""
    products = {"lokr": (("lokr_w1_a", "lokr_w1_b"), ("lokr_w2_a", "lokr_w2_b"))}.get(kind, PAIRS.get(kind, ()))
    cores = any(name in tensors for name in (FACTORS[2], "hada_t1", "lokr_t2"))
    for left, right in products:
        if left in tensors and not cores:
            one, other = tuple(tensors[left].shape), tuple(tensors[right].shape)
            if len(one) < 2 or len(other) < 2 or one[1] != other[0] or len(one) != len(other) or 0 in one:
                what = f"{left} and {right} of {one} and {other} can't be multiplied"
                raise DataError(what, code="E-NETWORK-SHAPE")
    if kind == "oft" and any(part.ndim != 3 or part.shape[1] != part.shape[2] for part in _blocks(tensors)):
        raise DataError("the blocks aren't square", code="E-NETWORK-SHAPE")
    if any(tensors[name].ndim < 2 for name in ("lokr_w1", "lokr_w2") if name in tensors):
        raise DataError("the factors aren't matrices", code="E-NETWORK-SHAPE")


def _blocks(tensors: Mapping[str, Tensor]) -> list[Tensor]:
    return [tensors[name] for name in BLOCKS if name in tensors]


def _halves(tensors: Mapping[str, Tensor], name: str) -> tuple[str, ...]:
    return (f"{name}_a", f"{name}_b") if f"{name}_a" in tensors or f"{name}_b" in tensors else (name,)


def rank_of(tensors: Mapping[str, Tensor]) -> int | None:
    """The rank that alpha is divided by; None: there is none."""
    if BLOCKS[0] in tensors:
        return None
    names = (DOWN, "hada_w1_b", "lokr_w1_b", "lokr_w2_b")
    return next((tensors[name].shape[0] for name in names if name in tensors), None)


def scale_of(tensors: Mapping[str, Tensor]) -> float:
    """Alpha over the rank; 1 without alpha or rank. Errors: DataError when it is 0."""
    alpha, rank = tensors.get("alpha"), rank_of(tensors)
    if alpha is None or not rank:
        return 1.0
    scale = float(alpha) / rank
    if not scale:
        raise DataError("alpha is 0, so that it does nothing", code="E-NETWORK-FILE")
    return scale


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same to the bit."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(*(each.contiguous().reshape(-1).view(torch.uint8) for each in (one, other)))


def all_same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """The same for the tensors of a module."""
    return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)


def scaled(tensor: Tensor, factor: float) -> Tensor:
    """The tensor times a number, in its own type or in the narrowest that `unscaled` gets it back from.

    Types of less than 32 bits are only kept when nothing is rounded.
    """
    if factor == 1:
        return tensor
    product = tensor.double() * factor
    for dtype in (tensor.dtype, *WIDER):
        result = product.to(dtype)
        if dtype.itemsize < 4 and not torch.equal(result.double(), product):
            continue
        if same(unscaled(result, factor, tensor.dtype), tensor):
            return result
    return product  # a float64 that no type is wider than


def unscaled(tensor: Tensor, factor: float, dtype: torch.dtype) -> Tensor:
    """What `scaled` made this tensor of, which was of that type."""
    return (tensor.double() / factor).to(dtype)


def shares(scale: float) -> tuple[float, float]:
    """Factors for the down and the up matrix that make up a scale; small ones are shared by powers of two."""
    down, up = scale, 1.0
    while abs(down) * 2 < up:
        down, up = down * 2, up / 2
    return down, up


def folded(tensors: Tensors) -> Tensors:
    """The same change of a LoRA with alpha equal to the rank, and left out."""
    down, up = shares(scale_of(tensors))
    rest = {name: tensor for name, tensor in tensors.items() if name != "alpha"}
    return {**rest, DOWN: scaled(tensors[DOWN], down), UP: scaled(tensors[UP], up)}


def unfolded(tensors: Tensors, alpha: Tensor, types: Mapping[str, torch.dtype]) -> Tensors:
    """What `folded` made this LoRA of, which had that alpha."""
    down, up = shares(float(alpha) / tensors[DOWN].shape[0])
    return {
        **tensors,
        DOWN: unscaled(tensors[DOWN], down, types[DOWN]),
        UP: unscaled(tensors[UP], up, types[UP]),
        "alpha": alpha,
    }


def alpha_like(alpha: Tensor, value: float) -> Tensor:
    """An alpha in the type of another where that can hold it, else in float32."""
    own = torch.full_like(alpha, value)
    return own if float(own) == value else torch.full_like(alpha, value, dtype=torch.float32)


def with_alpha(tensors: Tensors) -> Tensors:
    """With an alpha that says what its absence did."""
    if "alpha" in tensors or BLOCKS[0] in tensors:
        return tensors
    matrix = next(tensor for name, tensor in tensors.items() if name != LENGTHS)
    value = torch.tensor(float(rank_of(tensors) or 1))
    own = value.to(matrix.dtype)
    return {**tensors, "alpha": own if float(own) == float(value) else value}


# what a module was like, for the way back

Fact = dict[str, Any]


def fact_of(tensors: Mapping[str, Tensor]) -> Fact:
    """Rank, alpha and types, as JSON holds them."""
    types = {name: _name(tensor.dtype) for name, tensor in sorted(tensors.items()) if name != "alpha"}
    alpha = tensors.get("alpha")
    fact: Fact = {"rank": rank_of(tensors), "types": types}
    if len(set(types.values())) == 1:
        fact["types"] = next(iter(types.values()))
    if alpha is not None:
        fact["alpha"] = [alpha.reshape(-1)[0].item(), _name(alpha.dtype), list(alpha.shape)]
    return fact


def alpha_of(fact: Fact) -> Tensor | None:
    """The alpha that a fact tells."""
    if "alpha" not in fact:
        return None
    value, dtype, shape = fact["alpha"]
    return torch.full(shape, value, dtype=_dtype(dtype))


def types_of(fact: Fact, names: Mapping[str, Tensor]) -> dict[str, torch.dtype]:
    """The types that a fact tells, for tensors of these names."""
    types = fact["types"]
    return {name: _dtype(types if isinstance(types, str) else types[name]) for name in names if name != "alpha"}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise TypeError(name)
    return dtype
